import pytest
import torch

from nnunet_ssl.modules import ClassThresholds

SPATIAL = [(40, 30), (10, 12, 15)]


def prediction(spatial, classes=3, sharpness=2.0):
    return (torch.randn(2, classes, *spatial) * sharpness).softmax(1)


def constant(confidences, spatial=(8, 8)):
    """One sample per class k, every voxel predicted as k with the given confidence."""
    k = len(confidences)
    prob = torch.stack([torch.full((k,), (1 - c) / (k - 1)) for c in confidences])
    prob[range(k), range(k)] = torch.tensor(confidences)
    return prob.view(k, k, *[1] * len(spatial)).expand(k, k, *spatial).contiguous()


def everywhere(prob):
    return torch.ones(prob.shape[0], 1, *prob.shape[2:], dtype=torch.bool)


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("regions", [False, True])
def test_histogram_equals_naive_loop(spatial, regions):
    prob, valid = prediction(spatial), torch.rand(2, 1, *spatial) > 0.3
    counts = ClassThresholds.confidence_histogram(prob, valid, 16, regions)
    expected = torch.zeros(3, 16)
    for row, ok in zip(prob.transpose(0, 1).flatten(1).T, valid.flatten().tolist(), strict=True):
        p = row.tolist()
        for k in range(3):
            if ok and (p[k] > 0.5 if regions else k == p.index(max(p))):
                expected[k, min(int(p[k] * 16), 15)] += 1
    assert torch.equal(counts, expected)


def test_histogram_skips_what_is_not_finite_and_keeps_confidence_one():
    prob = torch.tensor([[1.0, 0.0], [float("nan"), float("nan")]]).view(2, 2, 1, 1)
    for regions in (False, True):
        counts = ClassThresholds.confidence_histogram(prob, everywhere(prob), 8, regions)
        assert counts.sum() == 1 and counts[0, 7] == 1


@pytest.mark.parametrize("spatial", SPATIAL)
def test_thresholds_are_quantiles_of_each_class(spatial):
    prob, valid = prediction(spatial), torch.rand(2, 1, *spatial) > 0.2
    module = ClassThresholds(3, low=0.0, high=1.0)
    module.update(prob, valid)
    sure, label = prob.max(1, keepdim=True)
    mask = module.mask(prob)
    assert mask.dtype == torch.bool and mask.shape == valid.shape
    for k in range(3):
        members = (label == k) & valid
        exact = torch.quantile(sure[members], 0.2).item()
        assert module.thresholds()[k].item() == pytest.approx(exact, abs=1 / 64)
        assert mask[members].float().mean().item() == pytest.approx(0.8, abs=0.03)
        assert torch.equal(mask[label == k], sure[label == k] >= module.thresholds()[k])


def test_thresholds_stay_in_their_range_and_start_low():
    module = ClassThresholds(3)
    assert module.thresholds().tolist() == pytest.approx([0.6] * 3)
    prob = constant([0.999, 0.4, 0.8])
    module.update(prob, everywhere(prob))
    assert module.thresholds().tolist() == pytest.approx([0.95, 0.6, 0.8], abs=1 / 64)
    assert module.mask(prob).flatten(1).all(1).tolist() == [True, False, True]


def test_class_volume_does_not_move_its_threshold():
    once, often = ClassThresholds(3), ClassThresholds(3)
    prob = prediction((40, 40))
    once.update(prob, everywhere(prob))
    only_1 = prob.argmax(1, keepdim=True) == 1
    often.update(prob.repeat(3, 1, 1, 1), torch.cat((everywhere(prob), only_1, only_1)))
    torch.testing.assert_close(once.thresholds(), often.thresholds())


def test_first_observation_replaces_later_ones_average_absent_classes_stay():
    module = ClassThresholds(3, decay=0.9, bins=4)
    one, two = torch.tensor([[0, 0, 8, 0], [0, 0, 0, 0], [0, 0, 0, 2.0]]), torch.zeros(3, 4)
    two[0, 3], two[1, 2] = 5, 1
    module.update_from_histogram(one)
    assert module.histogram.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    for _ in range(3):
        module.update_from_histogram(two)
    expected = torch.tensor([[0, 0, 0.9**3, 1 - 0.9**3], [0, 0, 1, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(module.histogram, expected)


def test_update_equals_histogram_sums_over_chunks():
    prob = prediction((16, 16))
    whole, chunks = ClassThresholds(3), ClassThresholds(3)
    whole.update(prob, everywhere(prob))
    counts = [
        ClassThresholds.confidence_histogram(p, everywhere(p), 64, False) for p in prob.split(1)
    ]
    chunks.update_from_histogram(sum(counts))
    torch.testing.assert_close(whole.histogram, chunks.histogram)


@pytest.mark.parametrize("spatial", SPATIAL)
def test_regions_have_their_own_thresholds(spatial):
    prob = torch.rand(2, 2, *spatial)
    prob[:, 1] = 0.9 + 0.1 * prob[:, 1]  # sure everywhere
    module = ClassThresholds(2, regions=True)
    module.update(prob, everywhere(prob))
    tau = module.thresholds()
    assert tau.tolist() == pytest.approx([0.6, 0.92], abs=1 / 64)  # 0.6: 20 % of U(.5, 1)
    mask = module.mask(prob)
    assert mask.shape == prob.shape
    for r in range(2):
        assert torch.equal(mask[:, r], torch.maximum(prob[:, r], 1 - prob[:, r]) >= tau[r])


def test_state_is_complete_and_without_gradient():
    prob = prediction((16, 16)).requires_grad_()
    module, other = ClassThresholds(3), ClassThresholds(3)
    module.update(prob, everywhere(prob))
    assert set(module.state_dict()) == {"histogram"} and not list(module.parameters())
    assert not module.histogram.requires_grad and not module.mask(prob).requires_grad
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.thresholds(), module.thresholds())
    with pytest.raises(ValueError, match="low <= high"):
        ClassThresholds(3, low=0.9, high=0.8)
