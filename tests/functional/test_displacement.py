import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn.functional import avg_pool2d, avg_pool3d

from nnunet_ssl.functional import (
    Windows,
    choose_windows,
    coarse_maps,
    displace,
    largest_region,
    window_means,
)


def view(confidence, prob=None, valid=None, classes=3):
    """A coarse map as `coarse_maps` gives it; without `prob` all classes are alike."""
    confidence = torch.as_tensor(confidence, dtype=torch.float32)
    if prob is None:
        prob = torch.full((classes, *confidence.shape), 1 / classes)
    valid = torch.ones_like(confidence) if valid is None else valid.float()
    return torch.cat([confidence[None], valid[None], prob])


def window(values, start, size):
    return values[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]


# ---------------------------------------------------------------- tables and components


@pytest.mark.parametrize(("spatial", "size"), [((9, 7), (3, 7)), ((6, 5, 8), (2, 5, 3))])
def test_window_means_equal_brute_force(spatial, size):
    values = torch.rand(2, *spatial)
    means = window_means(values, size)
    assert means.shape == (2, *(s - n + 1 for s, n in zip(spatial, size, strict=True)))
    for start in itertools.product(*(range(n) for n in means.shape[1:])):
        for k in range(2):
            expected = window(values[k], start, size).mean().item()
            assert means[(k, *start)].item() == pytest.approx(expected, abs=1e-6)
    pool = avg_pool2d if len(size) == 2 else avg_pool3d
    assert torch.allclose(means.float(), pool(values[:, None], size, stride=1)[:, 0], atol=1e-5)


@pytest.mark.parametrize("size", [(0, 2), (3, 9)])
def test_windows_that_do_not_fit_are_refused(size):
    with pytest.raises(ValueError, match="No window of"):
        window_means(torch.rand(4, 8), size)


@pytest.mark.parametrize("spatial", [(30, 31), (11, 12, 13)])
def test_largest_region_is_scipys(spatial):
    generator = torch.Generator().manual_seed(1)
    for share in (0.2, 0.4, 0.5, 0.9):
        mask = torch.rand(spatial, generator=generator) < share
        labels, _ = ndimage.label(mask.numpy())  # faces connect
        sizes = np.bincount(labels.ravel())[1:]
        found = largest_region(mask)
        assert found.sum().item() == sizes.max()
        assert len(np.unique(labels[found.numpy()])) == 1 and (found <= mask).all()
    assert not largest_region(torch.zeros(spatial, dtype=torch.bool)).any()
    everything = torch.ones(spatial, dtype=torch.bool)
    assert torch.equal(largest_region(everything), everything)


def test_of_equal_components_always_the_same_and_diagonals_do_not_connect():
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[0, 0] = mask[1, 1] = mask[4, 0:2] = mask[4, 4:6] = True
    found = [largest_region(mask) for _ in range(3)]
    assert all(torch.equal(found[0], f) and f.sum() == 2 for f in found)


# ---------------------------------------------------------------- maps


@pytest.mark.parametrize(("spatial", "factor"), [((9, 8), (2, 2)), ((5, 8, 9), (1, 4, 2))])
@pytest.mark.parametrize("regions", [False, True])
def test_maps_are_means_over_cells_without_gradient(spatial, factor, regions):
    logits = torch.randn(2, 3, *spatial, requires_grad=True)
    prob = logits.sigmoid() if regions else logits.softmax(1)
    valid = torch.rand(2, 1, *spatial) < 0.7
    maps = coarse_maps(prob, valid, factor, regions)
    cells = tuple(s // f for s, f in zip(spatial, factor, strict=True))
    assert maps.shape == (2, 5, *cells) and not maps.requires_grad
    sure = torch.maximum(prob, 1 - prob).amin(1, keepdim=True) if regions else prob.amax(1, True)
    everything = torch.cat([sure, valid.float(), prob], 1)
    for start in itertools.product(*(range(c) for c in cells)):
        at = tuple(slice(f * i, f * (i + 1)) for i, f in zip(start, factor, strict=True))
        expected = everything[(..., *at)].flatten(2).mean(2)
        assert torch.allclose(maps[(..., *start)], expected, atol=1e-6)
    if regions:
        assert (maps[:, 0] >= 0.5).all()
        opposite = coarse_maps(1 - prob, valid, factor, regions)
        assert torch.allclose(opposite[:, :2], maps[:, :2], atol=1e-6)


def test_cells_larger_than_the_patch_are_refused():
    with pytest.raises(ValueError, match="do not fit a patch"):
        coarse_maps(torch.rand(1, 2, 8, 3), torch.ones(1, 1, 8, 3) > 0, (4, 4), False)


# ---------------------------------------------------------------- choice


@pytest.mark.parametrize("spatial", [(20, 23), (12, 13, 14)])
@pytest.mark.parametrize("limit", [2, 4])
def test_windows_are_the_extreme_ones_and_never_too_large(spatial, limit):
    generator = torch.Generator().manual_seed(0)
    chosen = 0
    for _ in range(10):
        smooth = torch.from_numpy(
            ndimage.gaussian_filter(torch.randn(spatial, generator=generator).numpy(), 2)
        )
        smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
        other = torch.rand(spatial, generator=generator)
        found = choose_windows(
            view(smooth), view(other), threshold=0.5, limit=[limit] * len(spatial), candidates=1
        )
        if found is None:
            continue
        chosen += 1
        region = largest_region(smooth < 0.5)
        cells = region.nonzero()
        low, high = cells.amin(0), cells.amax(0) + 1
        extent = (high - low).tolist()
        assert found.size == tuple(min(e, limit) for e in extent)
        # the least confident window in the box, the most confident one of the other view
        own, means = window_means(smooth, found.size), window_means(other, found.size)
        box = tuple(
            slice(a, b - n + 1)
            for a, b, n in zip(low.tolist(), high.tolist(), found.size, strict=True)
        )
        assert own[found.target] == own[box].min()
        assert means[found.source] == means.max() >= other.median()
        centred = tuple((a + (e - n) // 2) for a, e, n in zip(
            low.tolist(), extent, found.size, strict=True
        ))  # fmt: skip
        assert own[found.target] <= own[centred]
        assert torch.equal(found.region, window(region, found.target, found.size))
    assert chosen >= 8


def test_a_shell_around_a_sure_organ_is_found():
    """The centre of a shell is sure; a window around it would miss all that is unsure."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(32.0)] * 3, indexing="ij"))
    radius = (grid - 15.5).norm(dim=0)
    confidence = torch.where((radius - 11).abs() < 1, 0.6, 0.99)
    found = choose_windows(
        view(confidence), view(torch.full_like(confidence, 0.99)), threshold=0.8, limit=[6] * 3
    )
    assert found.size == (6, 6, 6)
    unsure = window(confidence, found.target, found.size) < 0.8
    assert unsure.float().mean() > 0.2
    assert not (window(confidence, (13, 13, 13), found.size) < 0.8).any()


def test_nothing_unsure_too_little_unsure_and_everything_unsure():
    sure, unsure = torch.full((10, 12), 0.9), torch.full((10, 12), 0.4)
    settings = {"threshold": 0.6, "limit": (3, 4)}
    assert choose_windows(view(sure), view(sure), **settings) is None
    few = sure.clone()
    few[2, 2:9] = 0.4
    assert choose_windows(view(few), view(sure), min_region=8, **settings) is None
    found = choose_windows(view(few), view(sure), min_region=7, **settings)
    assert found.size == (1, 4) and found.region.all()
    found = choose_windows(view(unsure), view(sure), **settings)
    assert found.size == (3, 4)


def test_oversized_regions_are_clipped_or_left():
    confidence = torch.full((10, 12), 0.9)
    confidence[2:6, 2:9] = 0.4
    settings = {"threshold": 0.6, "oversized": "skip"}
    assert choose_windows(view(confidence), view(confidence), limit=(4, 6), **settings) is None
    found = choose_windows(view(confidence), view(confidence), limit=(4, 7), **settings)
    assert found.target == (2, 2) and found.size == (4, 7)


@pytest.mark.parametrize("regions", [False, True])
def test_the_source_whose_prediction_is_closest_wins(regions):
    target = torch.full((8, 16), 0.9)
    target[0:2, 0:4] = 0.3
    confidence = torch.full((8, 16), 0.5)
    confidence[0:2, 0:4] = 0.99  # the surest
    confidence[4:6, 4:8] = 0.95
    confidence[4:6, 12:16] = 0.90
    means = {(0, 0): (0.8, 0.1), (4, 4): (0.1, 0.8), (4, 12): (0.4, 0.5)}
    prob = torch.full((2, 8, 16), 0.5)
    for (row, column), (p, q) in means.items():
        prob[0, row : row + 2, column : column + 4] = p
        prob[1, row : row + 2, column : column + 4] = q
    here = torch.full((2, 8, 16), 0.0)
    here[0], here[1] = 0.15, 0.75
    if not regions:
        here, prob = (torch.cat([p, 1 - p.sum(0, keepdim=True)]) for p in (here, prob))

    def divergence(p, q):
        if regions:
            p, q = [*p, *(1 - x for x in p)], [*q, *(1 - x for x in q)]
        else:
            p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    by_hand = {start: divergence((0.15, 0.75), mean) for start, mean in means.items()}
    assert min(by_hand, key=by_hand.get) == (4, 4)
    settings = {"threshold": 0.6, "limit": (2, 4), "regions": regions}
    for candidates, expected in ((1, (0, 0)), (3, (4, 4)), (4, (4, 4))):
        found = choose_windows(
            view(target, here), view(confidence, prob), candidates=candidates, **settings
        )
        assert found.size == (2, 4) and found.source == expected
    same = prob.clone()  # an identical prediction has divergence 0 and wins
    at = (slice(None), slice(4, 6), slice(12, 16))
    same[at] = here[at]
    found = choose_windows(view(target, here), view(confidence, same), candidates=3, **settings)
    assert found.source == (4, 12)
    if regions:  # a region and its complement are one
        flipped = choose_windows(
            view(target, 1 - here), view(confidence, 1 - prob), candidates=3, **settings
        )
        assert flipped.source == (4, 4) and flipped.target == found.target


def test_sources_do_not_overlap():
    confidence = torch.full((4, 16), 0.5)
    confidence[:, :10] = 0.99  # all of the surest windows of 4x4 lie here; two of them are disjoint
    prob = torch.full((2, 4, 16), 0.5)
    here = torch.tensor([0.9, 0.1]).view(2, 1, 1).expand(2, 4, 16).clone()
    prob[:, :, 12:] = here[:, :, 12:]
    target = torch.full((4, 16), 0.9)
    target[:, 4:8] = 0.3
    found = choose_windows(
        view(target, here), view(confidence, prob), threshold=0.6, limit=(4, 4), candidates=4
    )
    assert found.source == (0, 12)  # four that overlap would all lie in the first ten columns


def test_padding_is_neither_replaced_nor_copied():
    confidence = torch.full((12, 12), 0.9)
    confidence[:, :6] = 0.3  # unsure, but half of it is padding
    valid = torch.ones(12, 12)
    valid[:, :4] = 0
    source = torch.full((12, 12), 0.7)
    source[:, :4] = 1.0
    found = choose_windows(
        view(confidence, valid=valid), view(source, valid=valid), threshold=0.6, limit=(3, 3)
    )
    assert found.target[1] == 4 and found.size == (3, 2) and found.source[1] >= 4
    nothing = torch.zeros(12, 12)
    for own, other in ((nothing, valid), (valid, nothing)):
        assert (
            choose_windows(
                view(confidence, valid=own), view(source, valid=other), threshold=0.6, limit=(3, 3)
            )
            is None
        )


# ---------------------------------------------------------------- displacement


@pytest.mark.parametrize(
    ("spatial", "factor", "target", "source", "size"),
    [
        ((17, 23), (2, 2), (1, 3), (4, 6), (3, 4)),
        ((9, 18, 17), (1, 4, 4), (2, 0, 1), (4, 1, 0), (4, 2, 2)),
    ],
)
@pytest.mark.parametrize("shape", ["box", "region"])
def test_windows_are_copied_bit_for_bit_and_all_else_stays(
    spatial, factor, target, source, size, shape
):
    a, b = torch.randn(2, 3, *spatial), torch.randn(2, 3, *spatial)
    before = a.clone(), b.clone()
    region = torch.rand(size) < 0.5
    windows = [Windows(target, source, size, region), None]
    result = displace(a, b, windows, factor, shape)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])
    expected = a.clone()
    for cell in itertools.product(*(range(n) for n in size)):
        if shape == "region" and not region[cell]:
            continue
        to, of = (
            tuple(slice(f * (s + i), f * (s + i + 1)) for f, s, i in zip(
                factor, start, cell, strict=True
            ))
            for start in (target, source)
        )  # fmt: skip
        expected[(0, slice(None), *to)] = b[(0, slice(None), *of)]
    assert torch.equal(result, expected)
    assert not torch.equal(result[0], a[0]) and torch.equal(result[1], a[1])
    # masks travel alike
    mask = torch.rand(2, 1, *spatial) < 0.5
    moved = displace(mask, mask, windows, factor, shape)
    assert moved.dtype == torch.bool
    whole = displace(mask.float(), mask.float(), windows, factor, shape)
    assert torch.equal(moved, whole.bool())


def test_both_views_are_displaced_from_what_they_were():
    a, b = torch.randn(1, 1, 8, 8), torch.randn(1, 1, 8, 8)
    everywhere = torch.ones(4, 4, dtype=torch.bool)
    to_a = [Windows((0, 0), (2, 2), (4, 4), everywhere)]
    to_b = [Windows((3, 3), (1, 1), (4, 4), everywhere)]
    first = displace(a, b, to_a, (1, 1)), displace(b, a, to_b, (1, 1))
    second = displace(b, a, to_b, (1, 1)), displace(a, b, to_a, (1, 1))
    assert torch.equal(first[0], second[1]) and torch.equal(first[1], second[0])


def test_views_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="same shape, and a window"):
        displace(torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 5), [None, None], (1, 1))
    with pytest.raises(ValueError, match="a window for each sample; got 1"):
        displace(torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4), [None], (1, 1))


def test_the_divergence_is_that_of_the_source_from_the_target():
    target, source = torch.full((8, 16), 0.9), torch.full((8, 16), 0.5)
    target[0:2, 0:4] = 0.3
    source[4:6, 4:8], source[4:6, 12:16] = 0.95, 0.90
    here = torch.full((3, 8, 16), 1 / 3)
    prob = here.clone()
    # KL(target || source) 1.7 and 0.51, the other way round 0.40 and 0.46
    prob[:, 4:6, 4:8] = torch.tensor([0.4995, 0.4995, 0.001]).view(3, 1, 1)
    prob[:, 4:6, 12:16] = torch.tensor([0.8, 0.1, 0.1]).view(3, 1, 1)
    one = torch.ones(1, 8, 16)
    own, other = torch.cat([target[None], one, here]), torch.cat([source[None], one, prob])
    found = choose_windows(own, other, threshold=0.6, limit=(2, 4), candidates=2)
    assert found.source == (4, 12)
