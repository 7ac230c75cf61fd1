"""Scores of shapes, and the choice by them."""

import pytest
import torch

from nnunet_ssl.functional import (
    boundary_excess,
    contour_roughness,
    ellipse_distance,
    released_scores,
    select_best,
)

from .test_ellipses import ellipses_of

SHAPE = (160, 160)
VALID = torch.ones(1, 1, *SHAPE, dtype=torch.bool)


def mask_of(center, long, short, noise=0.0, angle=0.4):
    d = ellipse_distance(ellipses_of((center, long, short, angle)), SHAPE).sqrt()
    g = torch.Generator().manual_seed(0)
    bumps = torch.nn.functional.avg_pool2d(
        torch.randn(1, 1, *SHAPE, generator=g), 5, stride=1, padding=2
    )
    return d + noise * bumps / bumps.std() <= 1


def scores(mask):
    return (
        boundary_excess(mask.float(), VALID.expand_as(mask)).item(),
        contour_roughness(mask, VALID.expand_as(mask)).item(),
    )


def test_a_disc_has_no_excess_at_any_size():
    for radius in (10.0, 20.0, 60.0):
        disc = mask_of((79.5, 79.5), radius, radius)
        assert scores(disc)[0] == pytest.approx(0, abs=0.03)


def test_scaled_and_moved_heads_score_alike():
    sizes = [scores(mask_of((80.0, 80.0), 15.0 * s, 10.0 * s))[0] for s in (1, 2, 4)]
    assert max(sizes) - min(sizes) < 0.02
    places = [scores(mask_of(c, 24.0, 16.0)) for c in ((80.0, 80.0), (40.0, 120.0), (50.0, 45.0))]
    boundary, contour = zip(*places, strict=True)
    assert max(boundary) - min(boundary) < 0.02
    assert max(contour) < 1.1 * min(contour)


def test_noise_at_the_outline_raises_both():
    for size in (1, 2, 4):
        levels = [
            scores(mask_of((80.0, 80.0), 15.0 * size, 10.0 * size, noise))
            for noise in (0, 0.1, 0.2)
        ]
        for one in zip(*levels, strict=True):
            assert list(one) == sorted(one) and one[-1] > 1.1 * one[0], size


def test_released_scores_are_ruled_by_the_frame():
    """The error of the released code that the corrected scores mend."""
    heads = [mask_of(c, 24.0, 16.0) for c in ((80.0, 80.0), (30.0, 30.0))]
    small, empty = mask_of((80.0, 80.0), 12.0, 8.0), torch.zeros_like(heads[0])
    rough = mask_of((80.0, 80.0), 64.0, 48.0, 0.2)
    contour = [released_scores(m.float())[0, 1].item() for m in (*heads, small, empty, rough)]
    assert contour[1] > 1.05 * contour[0]  # another place, another score
    assert contour[2] > contour[4]  # a clean small head is worse than a rough large one
    assert contour[3] == 0  # and nothing is best of all
    boundary = released_scores(heads[0].float())[0, 0].item()
    assert boundary < 0.1 * contour[0]
    corrected = [scores(m) for m in (small, rough)]
    assert corrected[0][0] < corrected[1][0] and corrected[0][1] < corrected[1][1]


def test_empty_and_full_masks_are_worst():
    masks = torch.cat([torch.zeros_like(VALID), VALID, mask_of((80.0, 80.0), 48.0, 32.0, 0.2)])
    found = contour_roughness(masks, VALID.expand_as(masks))
    assert found[0] == found[1] == 1e6 and found[2] < 1e3
    assert torch.isfinite(boundary_excess(masks.float(), VALID.expand_as(masks))).all()


def test_padding_does_not_count():
    mask = mask_of((80.0, 80.0), 24.0, 16.0)
    valid, other = VALID.clone(), mask.clone()
    valid[..., :30] = False
    other[..., :20] = torch.rand(1, 1, 160, 20) < 0.5
    assert boundary_excess(other.float(), valid).item() == pytest.approx(
        boundary_excess(mask.float(), valid).item()
    )


def test_large_patches_are_scored_on_a_coarser_grid():
    mask = mask_of((80.0, 80.0), 48.0, 32.0)
    large = mask.repeat_interleave(4, 2).repeat_interleave(4, 3)
    found = contour_roughness(large, torch.ones_like(large))
    assert found.item() == pytest.approx(scores(mask)[1], rel=0.2)


def choose(values, past=(), keep=0.5, min_keep=0.5, share=0.5, ranked=True):
    past = torch.tensor(past).view(-1, 2)
    empty = torch.zeros(3, 2)  # unused entries look like the best
    seen = torch.cat([torch.ones(len(past)), torch.zeros(3)]).bool()
    return select_best(
        torch.tensor(values),
        torch.cat([past, empty]),
        seen,
        keep=keep,
        min_keep=min_keep,
        share=share,
        ranked=ranked,
    ).tolist()


def test_the_best_of_all_seen_are_kept_and_at_least_a_part_of_the_batch():
    batch = [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0), (4.0, 4.0)]
    assert choose(batch) == [True, True, False, False]
    assert choose(batch, keep=1.0) == [True] * 4
    worse, better = [(9.0, 9.0)] * 4, [(0.0, 0.0)] * 8
    assert choose(batch, worse) == [True] * 4
    assert choose(batch, better, min_keep=0.8) == [True, True, True, False]  # int(3.2)
    assert choose(batch, better, min_keep=0.0) == [True, False, False, False]
    assert choose([(5.0, 5.0)], better) == [True]


def test_ranks_make_both_scores_count_alike():
    batch = [(0.0, 300.0), (1.0, 100.0), (2.0, 0.0), (3.0, 50.0)]
    assert choose(batch, ranked=False) == [False, False, True, True]  # the second one rules
    assert choose(batch, share=1.0) == [True, True, False, False]
    assert choose(batch, share=0.0) == [False, False, True, True]
    # rank sums 3, 3, 2, 4
    assert choose(batch)[2] and not choose(batch)[3]


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_the_floor_holds_for_any_batch(size):
    torch.manual_seed(size)
    values = torch.rand(size, 2)
    kept = choose(values.tolist(), [(0.0, 0.0)] * 20, min_keep=0.8, ranked=False)
    assert sum(kept) == max(1, int(0.8 * size))
