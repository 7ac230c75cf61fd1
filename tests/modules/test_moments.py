"""Running moments."""

import pytest
import torch

from nnunet_ssl.functional import Moments, sampled_moments
from nnunet_ssl.modules import ClassMoments


def test_first_update_replaces_and_absent_groups_stay():
    torch.manual_seed(0)
    memory = ClassMoments(3, 4, decay=0.9)
    assert not memory.seen().any()
    feature = torch.randn(1, 4, 20, 20)
    label = (torch.rand(1, 1, 20, 20) < 0.5).long()
    new = sampled_moments(feature, [label == k for k in range(3)], 1000, 2)
    memory.update(new)
    assert memory.seen().tolist() == [True, True, False]
    assert torch.allclose(memory.mean[:2], new.mean[:2])
    assert torch.allclose(memory.covariance[:2], new.covariance[:2])
    before = memory.state_dict()["covariance"].clone()
    second = sampled_moments(feature + 5, [label == 1, label > 1, label > 1], 1000, 2)
    memory.update(second)
    assert torch.equal(memory.covariance[1:], before[1:]) and not memory.mean[2].any()
    assert torch.allclose(memory.mean[0], 0.9 * new.mean[0] + 0.1 * second.mean[0])


def test_covariances_stay_symmetric_and_positive():
    torch.manual_seed(0)
    memory = ClassMoments(2, 6, decay=0.9)
    for _ in range(30):
        feature = (
            torch.randn(1, 6, 8, 8) * torch.rand(1, 6, 1, 1) + torch.randn(1, 6, 1, 1)
        ).half()
        memory.update(sampled_moments(feature, [torch.rand(1, 1, 8, 8) < 0.5] * 2, 40, 8))
    assert memory.covariance.dtype == torch.float32
    assert torch.allclose(memory.covariance, memory.covariance.transpose(1, 2), atol=1e-5)
    assert torch.linalg.eigvalsh(memory.covariance).min() > -1e-4
    # the spread of the means between steps is in it
    within = sampled_moments(feature, [torch.ones(1, 1, 8, 8, dtype=torch.bool)], 64, 8)
    assert memory.covariance[0].trace() > within.covariance[0].trace()


def test_diagonal_keeps_variances():
    memory = ClassMoments(2, 3, diagonal=True)
    memory.update(Moments(torch.ones(2, 3), torch.full((2, 3), 2.0), torch.tensor([5.0, 0])))
    assert memory.covariance.tolist() == [[2, 2, 2], [0, 0, 0]]
    assert set(memory.state_dict()) == {"mean", "covariance", "count"}


@pytest.mark.parametrize("diagonal", [False, True])
def test_what_is_not_finite_is_not_remembered(diagonal):
    torch.manual_seed(0)
    memory = ClassMoments(3, 4, decay=0.9, diagonal=diagonal)
    feature = torch.randn(1, 4, 20, 20)
    label = torch.arange(400).view(1, 1, 20, 20) % 3
    masks = [label == k for k in range(2)] + [label > 2]  # the third is never seen
    memory.update(sampled_moments(feature, masks, 1000, 2, diagonal))
    before = {k: v.clone() for k, v in memory.state_dict().items()}
    second = sampled_moments(feature + 1, masks, 1000, 2, diagonal)
    second.mean[0, 1] = torch.nan
    second.mean[2] = second.covariance[2] = torch.nan
    memory.update(second)
    after = {k: v.clone() for k, v in memory.state_dict().items()}
    for name, value in before.items():
        assert torch.equal(after[name][[0, 2]], value[[0, 2]]), name
    assert after["count"][1] == 2 * before["count"][1]
    assert torch.allclose(memory.mean[1], 0.9 * before["mean"][1] + 0.1 * second.mean[1])
    memory.update(second._replace(covariance=torch.full_like(second.covariance, torch.inf)))
    for name, value in memory.state_dict().items():
        assert torch.equal(value, after[name]), name
