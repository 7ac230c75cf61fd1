"""Pseudo-labels refined by ellipses."""

import math

import pytest
import torch

from nnunet_ssl.ellipse import Ellipse
from nnunet_ssl.functional import (
    Ellipses,
    ellipse_distance,
    fit_ellipses,
    refine_by_ellipse,
)

SHAPE = (96, 120)
CENTER, LONG, SHORT, ANGLE = (46.0, 60.0), 34.0, 22.0, 0.6


def ellipses_of(*parameters):
    rows = torch.tensor([(*c, a, b, math.cos(t), math.sin(t)) for c, a, b, t in parameters])
    found = torch.ones(len(rows), dtype=torch.bool)
    return Ellipses(rows[:, :2], rows[:, 2:4], rows[:, 4:], found)


def soft(*parameters, sharpness=20.0):
    d = ellipse_distance(ellipses_of(*parameters), SHAPE)
    return torch.sigmoid(sharpness * (1 - d.sqrt()))


HEAD = (CENTER, LONG, SHORT, ANGLE)
VALID = torch.ones(1, 1, *SHAPE, dtype=torch.bool)


def refined(prob, valid=VALID, threshold=0.6):
    valid = valid.expand_as(prob)
    found = fit_ellipses((prob > threshold) & valid, valid)
    distance = ellipse_distance(found, SHAPE)
    return found, distance, *refine_by_ellipse(prob, distance, threshold)


def dice(a, b):
    return (2 * (a & b).sum() / (a.sum() + b.sum())).item()


def test_distance_equals_the_formula_at_each_pixel():
    d = ellipse_distance(ellipses_of(HEAD), SHAPE)
    for row, column in ((0, 0), (46, 60), (20, 99), (95, 3)):
        y, x = row - CENTER[0], column - CENTER[1]
        u = y * math.cos(ANGLE) + x * math.sin(ANGLE)
        v = x * math.cos(ANGLE) - y * math.sin(ANGLE)
        expected = (u / LONG) ** 2 + (v / SHORT) ** 2
        assert d[0, 0, row, column].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_clean_head_stays_as_it_is():
    prob = soft(HEAD)
    found, _, _, mask = refined(prob)
    assert found.found.all()
    assert found.center[0].tolist() == pytest.approx(CENTER, abs=0.2)
    assert dice(mask, prob > 0.6) > 0.99


def test_bites_holes_and_distant_blobs_are_mended():
    clean = soft(HEAD)
    prob = clean.clone()
    prob[..., 28:40, 66:80] = 0.02  # a bite at the outline
    prob[..., 44:50, 56:62] = 0.1  # a hole
    prob[..., 84:92, 100:112] = 0.95  # something else
    found, _, _, mask = refined(prob)
    assert mask[..., 44:50, 56:62].all()
    bite = clean[..., 28:40, 66:80] > 0.6
    assert 20 < (mask[..., 28:40, 66:80] & bite).sum() > 0.8 * bite.sum()
    assert dice(mask, clean > 0.6) > 0.93 > dice(prob > 0.6, clean > 0.6) - 0.05
    assert found.found.all() and not mask[..., 84:92, 100:112].any()


def test_refinement_is_the_closed_form_and_nearly_idempotent():
    torch.manual_seed(0)
    prob = (soft(HEAD) + 0.15 * torch.randn(1, 1, *SHAPE)).clamp(0, 1)
    _, d, raised, mask = refined(prob)
    expected = (d <= 1) | ((d > 1) & (prob * torch.exp(-0.5 * (d - 1)) > 0.6))
    assert torch.equal(mask, expected)
    assert torch.equal(raised[d > 1], (prob * torch.exp(-0.5 * (d - 1)))[d > 1])
    inside = torch.maximum(prob, (0.6 + (1 - d) ** 2).clamp_max(1))
    assert torch.equal(raised[d <= 1], inside[d <= 1])
    assert raised.min() >= 0 and raised.max() <= 1
    mask = refined((soft(HEAD) + 0.08 * torch.randn(1, 1, *SHAPE)).clamp(0, 1))[3]
    _, _, _, again = refined(mask.float())
    assert (again ^ mask).sum() < 0.01 * mask.sum()


def test_samples_are_fitted_one_by_one():
    others = ((30.0, 40.0), 20.0, 15.0, 2.0)
    prob = soft(HEAD, others)
    valid = VALID.expand_as(prob)
    both = fit_ellipses(prob > 0.6, valid)
    for i in (0, 1):
        one = fit_ellipses(prob[i : i + 1] > 0.6, VALID)
        for a, b in zip(both, one, strict=True):
            assert torch.equal(a[i], b[0])


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(SHAPE, dtype=torch.bool),
        torch.ones(SHAPE, dtype=torch.bool),
        torch.eye(*SHAPE, dtype=torch.bool) & (torch.arange(SHAPE[1]) < 3),
    ],
    ids=["empty", "full", "three pixels"],
)
def test_masks_without_a_shape_are_not_found_and_stay_finite(mask):
    found = fit_ellipses(mask[None, None], VALID)
    assert not found.found.any()
    d = ellipse_distance(found, SHAPE)
    assert torch.isfinite(d).all()
    assert all(torch.isfinite(t).all() for t in refine_by_ellipse(mask[None, None] * 1.0, d, 0.6))


def test_heads_mostly_outside_are_not_found():
    places = [((46.0, c), LONG, SHORT, ANGLE) for c in (60.0, 110.0, 118.0, 125.0)]
    prob = soft(*places)
    found = fit_ellipses(prob > 0.6, VALID.expand_as(prob))
    assert found.found.tolist() == [True, True, True, False]  # the last centre lies outside
    assert found.axes[1].tolist() == pytest.approx([LONG, SHORT], rel=0.05)
    strict = fit_ellipses(prob > 0.6, VALID.expand_as(prob), min_inside=0.8)
    assert strict.found.tolist() == [True, False, False, False]


def test_padding_is_no_outline():
    prob = soft(HEAD)
    valid = VALID.clone()
    valid[..., :50] = False
    found = fit_ellipses(prob > 0.6, valid)
    assert found.axes[0].tolist() == pytest.approx([LONG, SHORT], rel=0.05)
    valid[..., :62] = False  # and its centre must be inside
    assert not fit_ellipses(prob > 0.6, valid).found.any()


def test_types():
    found = fit_ellipses(soft(HEAD) > 0.6, VALID)
    assert [t.dtype for t in found] == [torch.float32] * 3 + [torch.bool]
    assert found.along.norm(dim=1).item() == pytest.approx(1)
    assert Ellipse._fields == ("center", "long", "short", "angle")
