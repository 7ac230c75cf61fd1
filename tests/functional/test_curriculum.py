import math

import pytest
import torch

from nnunet_ssl.functional import curriculum_weight, relative_rank

SPATIAL = [(20, 15), (6, 10, 5)]


def everywhere(values):
    return torch.ones_like(values[:, :1]).bool()


@pytest.mark.parametrize("spatial", SPATIAL)
def test_rank_equals_a_sort_within_each_sample_and_channel(spatial):
    values = torch.rand(2, 3, *spatial) ** 8  # most of them small, as uncertainties are
    rank = relative_rank(values, everywhere(values))
    flat = values.flatten(2)
    number = flat.shape[2]
    exact = 2 * (flat.argsort(2).argsort(2) + 0.5) / number - 1
    assert (rank.flatten(2) - exact).abs().max() < 0.02
    assert (rank.flatten(2) - exact).abs().mean() < 1e-3
    assert rank.flatten(2).mean(2).abs().max() < 1e-6
    assert rank.abs().max() < 1


def test_only_valid_voxels_are_ranked():
    values = torch.rand(2, 1, 30, 30)
    valid = torch.rand(2, 1, 30, 30) < 0.5
    rank = relative_rank(values, valid)
    assert (rank[~valid] == 0).all()
    changed = torch.where(valid, values, 1e6)
    assert torch.equal(relative_rank(changed, valid), rank)
    for sample in range(2):
        inside = values[sample][valid[sample]]
        exact = 2 * (inside.argsort().argsort() + 0.5) / len(inside) - 1
        assert (rank[sample][valid[sample]] - exact).abs().max() < 0.01


def test_ties_constant_maps_and_no_valid_voxel_stay_finite():
    values = torch.full((1, 1, 4, 4), 0.3)
    assert (relative_rank(values, everywhere(values)) == 0).all()
    values[..., 0] = 0.1  # four tie low, twelve tie high
    rank = relative_rank(values, everywhere(values))
    assert rank[..., 0].unique().item() == pytest.approx(-0.75)
    assert rank[..., 1:].unique().item() == pytest.approx(0.25)
    assert (relative_rank(values, ~everywhere(values)) == 0).all()
    assert relative_rank(torch.zeros(1, 1, 3, 3), torch.ones(1, 1, 3, 3).bool()).isfinite().all()


def test_magnitudes_far_apart_are_told_apart():
    values = torch.cat([torch.linspace(1e-7, 2e-7, 900), torch.linspace(0.1, 1, 100)])
    rank = relative_rank(values.view(1, 1, -1), torch.ones(1, 1, 1000).bool()).flatten()
    assert len(rank.unique()) > 100
    assert (rank[1:] >= rank[:-1]).all() and rank[0] < -0.95 and rank[-1] > 0.99


@pytest.mark.parametrize("strength", [0.25, 0.5])
def test_weights_move_from_sure_to_unsure_voxels(strength):
    u = torch.linspace(0.01, 1, 400).view(1, 1, 20, 20)
    valid = everywhere(u)
    first, middle, last = (curriculum_weight(u, valid, p, strength) for p in (0.0, 0.5, 1.0))
    assert (first.flatten().diff() <= 0).all() and (last.flatten().diff() >= 0).all()
    assert torch.equal(middle, torch.ones_like(u))
    bound = strength * math.tanh(1)
    for w in (first, last):
        assert w.mean().item() == pytest.approx(1, abs=1e-4)
        assert w.min() >= 1 - bound and w.max() <= 1 + bound
        assert w.max() - w.min() > 1.9 * bound
    assert torch.allclose(first.flip(-1, -2), last, atol=0.01)


def test_weights_carry_no_gradient():
    u = torch.rand(1, 1, 5, 5, requires_grad=True)
    assert not curriculum_weight(u, torch.ones(1, 1, 5, 5).bool(), 0.2, 0.5).requires_grad
