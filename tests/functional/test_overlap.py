import pytest
import torch

from nnunet_ssl.functional import squared_dice_loss


@pytest.mark.parametrize("spatial", [(5, 6), (3, 4, 5)])
@pytest.mark.parametrize("regions", [False, True])
def test_equals_a_naive_loop(spatial, regions):
    logits = torch.randn(2, 3, *spatial)
    mask = torch.rand(2, 1, *spatial) < 0.6
    if regions:
        label = torch.rand(2, 3, *spatial) < 0.4
        p = logits.sigmoid()
        pairs = [(p[:, k], label[:, k]) for k in range(3)]
        pairs += [(1 - q, ~t) for q, t in pairs]
    else:
        label = torch.randint(3, (2, 1, *spatial))
        p = logits.softmax(1)
        pairs = [(p[:, k], label[:, 0] == k) for k in range(3)]
    scores = []
    for q, t in pairs:
        q, t = q[mask[:, 0]], t[mask[:, 0]].float()
        scores.append((2 * (q * t).sum() + 1e-5) / ((q * q).sum() + t.sum() + 1e-5))
    expected = 1 - sum(scores) / len(scores)
    found = squared_dice_loss(logits, label, mask, regions)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("regions", [False, True])
def test_zero_for_a_sure_right_answer_and_for_nothing_one_for_a_wrong_one(regions):
    label = torch.randint(2, (2, 1, 6, 6))
    right = torch.cat([1 - label, label], 1).bool()
    logits = (50.0 * (2 * right.float() - 1)).requires_grad_()
    answer = right if regions else label
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    assert squared_dice_loss(logits, answer, mask, regions).item() == pytest.approx(0, abs=1e-6)
    assert squared_dice_loss(-logits, answer, mask, regions).item() == pytest.approx(1, abs=1e-6)
    nothing = squared_dice_loss(logits, answer, ~mask, regions)
    nothing.backward()
    assert nothing.item() == 0 and not logits.grad.any()


def test_half_precision_stays_finite_and_masked_voxels_have_no_gradient():
    logits = (1e4 * torch.randn(2, 3, 6, 6).sign()).half().requires_grad_()
    mask = torch.rand(2, 1, 6, 6) < 0.5
    loss = squared_dice_loss(logits, torch.randint(3, (2, 1, 6, 6)), mask)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and logits.grad.isfinite().all()
    soft = torch.randn(2, 3, 6, 6, requires_grad=True)
    squared_dice_loss(soft, torch.randint(3, (2, 1, 6, 6)), mask).backward()
    assert not soft.grad[(~mask).expand_as(soft)].any() and soft.grad[mask.expand_as(soft)].all()


def test_shapes_are_checked():
    logits, mask = torch.randn(2, 3, 4, 4), torch.ones(2, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"label must be \(2, 1, 4, 4\)"):
        squared_dice_loss(logits, torch.zeros(2, 4, 4).long(), mask)
    with pytest.raises(ValueError, match=r"label must be \(2, 3, 4, 4\)"):
        squared_dice_loss(logits, mask, mask, regions=True)
