import math

import pytest
import torch

from nnunet_ssl.functional import exchange, random_boxes


@pytest.mark.parametrize("spatial", [(9, 96), (13, 7, 1), (96, 112, 80)])
@pytest.mark.parametrize("same", [True, False])
def test_box_volume_is_the_published_one(spatial, same):
    inside = random_boxes(3, spatial, 2 / 3, 2 / 3, same=same)
    assert inside.dtype == torch.bool and inside.shape == (3, 1, *spatial)
    expected = math.prod(max(2 * n // 3, 1) for n in spatial)
    assert inside.flatten(1).sum(1).tolist() == [expected] * 3
    assert (inside == inside[:1]).all() or not same


def test_boxes_are_solid_differ_and_reach_every_position():
    inside = random_boxes(400, (6, 8), 0.3, 0.8)[:, 0]
    sides = set()
    for mask in inside:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        height, width = len(rows), len(columns)
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert mask.sum() == height * width
        sides.add((height, width))
    assert {h for h, _ in sides} == {1, 2, 3, 4} and {w for _, w in sides} == {2, 3, 4, 5, 6}
    assert inside.any(0).all()  # the last row and column too


def test_mean_volume_of_the_default():
    inside = random_boxes(2000, (40, 40), 0.5, 0.8)
    assert inside.float().mean().item() == pytest.approx(0.42, abs=0.03)


def test_boxes_follow_the_cpu_generator():
    torch.manual_seed(3)
    first = random_boxes(4, (8, 8, 8), 0.2, 0.9)
    torch.manual_seed(3)
    assert torch.equal(first, random_boxes(4, (8, 8, 8), 0.2, 0.9))
    assert not torch.equal(first, random_boxes(4, (8, 8, 8), 0.2, 0.9))


@pytest.mark.parametrize(("low", "high"), [(0, 0.5), (0.6, 0.5), (0.5, 1.1)])
def test_impossible_sides_are_refused(low, high):
    with pytest.raises(ValueError, match="0 < low <= high <= 1"):
        random_boxes(1, (4, 4), low, high)


@pytest.mark.parametrize("spatial", [(9, 8), (7, 8, 5)])
def test_exchange_moves_voxels_and_labels_together(spatial):
    a, b = torch.randn(3, 2, *spatial), torch.randn(3, 2, *spatial)
    y_a, y_b = (a[:, :1] * 100).long(), (b[:, :1] * 100).long()
    inside = random_boxes(3, spatial, 0.5, 0.8)
    x, z = exchange(a, b, inside)
    everywhere = inside.expand_as(a)
    assert torch.equal(x[everywhere], b[everywhere]) and torch.equal(x[~everywhere], a[~everywhere])
    assert torch.equal(x + z, a + b)
    y_x, y_z = exchange(y_a, y_b, inside)
    assert torch.equal(y_x, (x[:, :1] * 100).long()) and torch.equal(y_z, (z[:, :1] * 100).long())
    back = exchange(x, z, inside)
    assert torch.equal(back[0], a) and torch.equal(back[1], b)


def test_exchange_keeps_masks_boolean_and_checks_shapes():
    inside = random_boxes(2, (4, 4), 0.5, 0.5)
    ones, zeros = torch.ones(2, 1, 4, 4, dtype=torch.bool), torch.zeros(2, 1, 4, 4).bool()
    origin, _ = exchange(ones, zeros, inside)
    assert origin.dtype == torch.bool and torch.equal(origin, ~inside)
    with pytest.raises(ValueError, match="same shape"):
        exchange(ones, zeros[:1], inside)
