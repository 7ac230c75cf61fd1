import pytest
import torch

from nnunet_ssl.functional import feature_cosine, feature_l1

DISTANCES = [feature_l1, feature_cosine]


def pair(spatial, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, *spatial, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("spatial", [(5, 6), (3, 5, 4)])
def test_equal_a_naive_loop(spatial):
    a, b = pair(spatial)
    mask = torch.rand(3, 1, *spatial) < 0.4
    differences, cosines = [], []
    for sample in range(3):
        x, y = [], []
        for index in mask[sample, 0].nonzero().tolist():
            for channel in range(4):
                x.append(a[(sample, channel, *index)])
                y.append(b[(sample, channel, *index)])
        x, y = torch.stack(x), torch.stack(y)
        differences += (x - y).abs().tolist()
        cosines.append((x @ y / x.norm() / y.norm()).item())
    assert feature_l1(a, b, mask).item() == pytest.approx(sum(differences) / len(differences))
    assert feature_cosine(a, b, mask).item() == pytest.approx(1 - sum(cosines) / 3, abs=1e-6)
    everywhere = torch.ones_like(mask)
    for distance in DISTANCES:
        assert distance(a, b).item() == pytest.approx(distance(a, b, everywhere).item(), abs=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_zero_for_itself_symmetric_and_no_gradient_into_the_target(distance):
    a, b = pair((5, 6))
    assert distance(a, a).item() == pytest.approx(0, abs=1e-6)
    assert distance(a, b).item() == pytest.approx(distance(b, a).item())
    a.requires_grad_(), b.requires_grad_()
    distance(a, b).backward()
    assert b.grad is None and a.grad.abs().sum() > 0


def test_the_cosine_ignores_scale_and_is_two_for_the_opposite():
    a, b = pair((5, 6))
    value = feature_cosine(a, b).item()
    for c in (1e-3, 7.0, 1e4):
        assert feature_cosine(c * a, b).item() == pytest.approx(value, abs=1e-6)
    assert feature_cosine(a, -a).item() == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_nothing_to_count_gives_zero_and_a_finite_gradient(distance):
    a, b = pair((5, 6))
    a.requires_grad_()
    mask = torch.zeros(3, 1, 5, 6, dtype=torch.bool)
    assert distance(a, b, mask).item() == 0
    distance(a, b, mask).backward()
    assert torch.isfinite(a.grad).all() and not a.grad.any()
    mask[1] = True  # the other samples do not count
    expected = distance(a[1:2], b[1:2])
    assert distance(a, b, mask).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_agrees_and_large_features_stay_finite(distance, dtype):
    a, b = (t.to(dtype) for t in pair((30, 40)))
    half, full = distance(a, b), distance(a.float(), b.float())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), abs=1e-2)
    large = [1e4 * t.sign() for t in (a, b)]
    large[0].requires_grad_()
    value = distance(*large)
    value.backward()
    assert value.isfinite() and large[0].grad.isfinite().all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_shapes_are_checked(distance):
    a, b = pair((5, 6))
    with pytest.raises(ValueError, match="same shape"):
        distance(a, b[:, :2])
    with pytest.raises(ValueError, match="same shape"):
        distance(a, b, torch.ones(3, 4, 5, 6))
