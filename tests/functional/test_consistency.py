import pytest
import torch

from nnunet_ssl.functional import prob_mse, sigmoid_mse, softmax_mse

SPATIAL = [(5, 4), (4, 3, 5)]


def naive(prob, target, mask):
    total, count = 0.0, 0
    for b in range(prob.shape[0]):
        for c in range(prob.shape[1]):
            p, t = prob[b, c].flatten().tolist(), target[b, c].flatten().tolist()
            m = mask[b, 0 if mask.shape[1] == 1 else c].flatten().tolist()
            for i in range(len(p)):
                total += m[i] * (p[i] - t[i]) ** 2
                count += m[i]
    return total / count


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("channels", [1, 3])
def test_equals_naive_loop(spatial, channels):
    logits, other = torch.randn(2, 3, *spatial), torch.randn(2, 3, *spatial)
    mask = torch.rand(2, channels, *spatial) > 0.4
    soft, sig = other.softmax(1), other.sigmoid()
    expected = naive(logits.softmax(1), soft, mask)
    assert softmax_mse(logits, soft, mask).item() == pytest.approx(expected, rel=1e-5)
    assert prob_mse(logits.softmax(1), soft, mask).item() == pytest.approx(expected, rel=1e-5)
    expected = naive(logits.sigmoid(), sig, mask)
    assert sigmoid_mse(logits, sig, mask).item() == pytest.approx(expected, rel=1e-5)
    full = torch.ones_like(mask)
    assert softmax_mse(logits, soft).item() == pytest.approx(softmax_mse(logits, soft, full).item())


def test_identity_symmetry_and_opposite_one_hots():
    logits, other = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    p, q = logits.softmax(1), other.softmax(1)
    assert softmax_mse(logits, p).item() == 0
    assert prob_mse(p, q).item() == pytest.approx(prob_mse(q, p).item())
    a, b = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    a[:, 0], b[:, 1] = 1, 1
    assert prob_mse(a, b).item() == pytest.approx(2 / 4)


def test_gradient_reaches_counted_student_voxels_only():
    logits = torch.randn(2, 3, 5, 4, requires_grad=True)
    target = torch.rand(2, 3, 5, 4, requires_grad=True)
    mask = torch.rand(2, 1, 5, 4) > 0.5
    softmax_mse(logits, target, mask).backward()
    assert target.grad is None
    assert (logits.grad[~mask.expand_as(logits)] == 0).all()
    assert (logits.grad[mask.expand_as(logits)] != 0).all()


@pytest.mark.parametrize("loss", [softmax_mse, sigmoid_mse])
def test_empty_mask_and_half_logits(loss):
    logits = torch.tensor([1e4, -1e4]).half().view(1, 2, 1, 1).requires_grad_()
    target = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    value = loss(logits, target)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(1)
    value.backward()
    assert logits.grad.isfinite().all()
    value = loss(logits, target, torch.zeros(1, 1, 1, 1, dtype=torch.bool))
    value.backward()
    assert value.item() == 0 and logits.grad.isfinite().all()


def test_small_weights_are_normalised():
    p, q = torch.rand(1, 2, 4, 4), torch.rand(1, 2, 4, 4)
    weight = torch.full((1, 1, 4, 4), 1e-3)
    assert prob_mse(p, q, weight).item() == pytest.approx(prob_mse(p, q).item(), rel=1e-5)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\(1, 2, 4, 4\).*\(1, 3, 4, 4\)"):
        prob_mse(torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="does not fit the prediction"):
        prob_mse(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4))
