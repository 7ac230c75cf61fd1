import math

import pytest
import torch

from nnunet_ssl.functional import normalized_entropy


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_uniform_is_just_under_one_and_sure_is_zero(classes):
    uniform = torch.full((2, classes, 3, 4), 1 / classes)
    found = normalized_entropy(uniform, regions=False)
    assert found.shape == (2, 1, 3, 4)
    assert (found < 1).all() and (found > 0.9999).all()
    sure = torch.zeros(2, classes, 3, 4)
    sure[:, 1] = 1
    assert normalized_entropy(sure, regions=False).abs().max() < 1e-5


@pytest.mark.parametrize("spatial", [(3, 4), (2, 3, 4)])
def test_equals_a_loop(spatial):
    prob = torch.randn(2, 4, *spatial).softmax(1)
    found = normalized_entropy(prob, regions=False)[:, 0].flatten()
    voxels = prob.movedim(1, -1).reshape(-1, 4).tolist()
    expected = [-sum(p * math.log(p) for p in v) / math.log(4) for v in voxels]
    assert found.numpy() == pytest.approx(expected, abs=1e-5)


def test_each_region_is_a_two_class_problem():
    prob = torch.rand(2, 3, 4, 5)
    found = normalized_entropy(prob, regions=True)
    for r in range(3):
        both = torch.stack([prob[:, r], 1 - prob[:, r]], 1)
        torch.testing.assert_close(found[:, r : r + 1], normalized_entropy(both, regions=False))


def test_half_precision_of_sure_predictions_is_finite():
    prob = torch.tensor([1e4, -1e4]).half().softmax(0).view(1, 2, 1, 1)
    assert normalized_entropy(prob, regions=False).isfinite().all()
    assert normalized_entropy(prob, regions=True).isfinite().all()
