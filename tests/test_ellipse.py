"""Ellipses fitted to points and masks."""

import math
import subprocess
import sys

import numpy as np
import pytest

from nnunet_ssl.ellipse import (
    Ellipse,
    fit_ellipse,
    head_circumference,
    largest_piece,
    mask_ellipse,
    outline,
)

TRUE = Ellipse((100.0, 120.0), 70.0, 45.0, 0.5)


def points_of(ellipse, number=200, noise=0.0, part=1.0, seed=0):
    t = np.linspace(0, 2 * np.pi * part, number, endpoint=False)
    u, v = ellipse.long * np.cos(t), ellipse.short * np.sin(t)
    cos, sin = math.cos(ellipse.angle), math.sin(ellipse.angle)
    points = np.stack([u * cos - v * sin, u * sin + v * cos], 1) + ellipse.center
    return points + noise * np.random.default_rng(seed).normal(size=points.shape)


def mask_of(ellipse, shape=(224, 256)):
    row, column = (g - c for g, c in zip(np.indices(shape), ellipse.center, strict=True))
    cos, sin = math.cos(ellipse.angle), math.sin(ellipse.angle)
    u, v = row * cos + column * sin, column * cos - row * sin
    return (u / ellipse.long) ** 2 + (v / ellipse.short) ** 2 <= 1


def close(found, expected, pixels, angle):
    assert found.center == pytest.approx(expected.center, abs=pixels)
    assert (found.long, found.short) == pytest.approx((expected.long, expected.short), abs=pixels)
    turn = (found.angle - expected.angle + math.pi / 2) % math.pi - math.pi / 2
    assert abs(turn) <= angle


@pytest.mark.parametrize("angle", [0.0, 0.5, math.pi / 2, 2.0, 3.1])
@pytest.mark.parametrize("scale", [1e-3, 1, 1e4])
def test_exact_points_give_the_ellipse_at_any_place_turn_and_scale(angle, scale):
    ellipse = Ellipse((-3.0 * scale, 500.0 * scale), 7.0 * scale, 4.0 * scale, angle)
    close(fit_ellipse(points_of(ellipse)), ellipse, 1e-6 * scale, 1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_it_little(seed):
    found = fit_ellipse(points_of(TRUE, noise=1.0, seed=seed))
    assert found.center == pytest.approx(TRUE.center, abs=0.5)
    assert (found.long, found.short) == pytest.approx((70, 45), abs=1)
    assert found.angle == pytest.approx(0.5, abs=math.radians(1))


@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_equals_the_fit_of_scikit_image(noise):
    from skimage.measure import EllipseModel

    points = points_of(TRUE, noise=noise)
    if hasattr(EllipseModel, "from_estimate"):
        model = EllipseModel.from_estimate(points)
    else:
        model = EllipseModel()
        assert model.estimate(points)
    row, column, a, b, theta = model.params
    if a < b:
        a, b, theta = b, a, theta + math.pi / 2
    close(fit_ellipse(points), Ellipse((row, column), a, b, theta % math.pi), 1e-6, 1e-6)


def test_a_circle_is_an_ellipse():
    found = fit_ellipse(points_of(Ellipse((5.0, 5.0), 3.0, 3.0, 0.0)))
    assert (found.long, found.short) == pytest.approx((3, 3))
    assert found.circumference == pytest.approx(6 * math.pi)


@pytest.mark.parametrize(
    "points",
    [
        np.zeros((0, 2)),
        points_of(TRUE, 5),
        np.ones((50, 2)),
        np.stack([np.arange(50), 2.0 * np.arange(50)], 1),
        np.stack([np.arange(50), np.full(50, 7.0)], 1),
    ],
    ids=["none", "five", "one place", "line", "row"],
)
def test_points_without_an_ellipse_give_none(points):
    assert fit_ellipse(points) is None


def test_parabola_and_hyperbola_give_an_ellipse_or_none():
    x = np.linspace(-3, 3, 50)
    for y in (x**2, np.sqrt(1 + x**2)):
        found = fit_ellipse(np.stack([x, y], 1))
        assert found is None or np.isfinite([found.long, found.short, *found.center]).all()


def test_edges_of_a_mask_have_no_bias():
    close(mask_ellipse(mask_of(TRUE)), TRUE, 0.1, 0.005)


@pytest.mark.parametrize("row", [25.0, 12.0])
def test_a_head_cut_by_the_frame_keeps_its_size(row):
    ellipse = Ellipse((row, 120.0), 70.0, 45.0, 0.4)
    mask = mask_of(ellipse)
    cut = 1 - mask.sum() / (math.pi * 70 * 45)
    assert cut > 0.2
    found = mask_ellipse(mask)
    assert (found.long, found.short) == pytest.approx((70, 45), rel=0.02)
    assert found.angle == pytest.approx(0.4, abs=0.03)
    # with the frame as outline it would not
    framed = mask_ellipse(np.pad(mask, 1))
    assert framed.long < 0.95 * 70


def test_a_rough_outline_of_a_cut_head_is_within_a_tenth():
    rng = np.random.default_rng(0)
    from scipy.ndimage import gaussian_filter

    bumps = gaussian_filter(rng.normal(size=(224, 256)), 3)
    ellipse = Ellipse((20.0, 120.0), 70.0, 45.0, 0.4)
    row, column = (g - c for g, c in zip(np.indices((224, 256)), ellipse.center, strict=True))
    u, v = (
        row * math.cos(0.4) + column * math.sin(0.4),
        column * math.cos(0.4) - row * math.sin(0.4),
    )
    rough = np.sqrt((u / 70) ** 2 + (v / 45) ** 2) + 0.04 * bumps / bumps.std() <= 1
    found = mask_ellipse(rough)
    assert (found.long, found.short) == pytest.approx((70, 45), rel=0.1)


def test_edges_towards_padding_are_no_outline():
    mask, known = mask_of(TRUE), np.ones((224, 256), bool)
    known[:, :100] = False
    close(mask_ellipse(mask & known, known), TRUE, 0.5, 0.02)
    assert mask_ellipse(mask & known).short < 40


def test_outline_of_one_pixel():
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True
    assert sorted(map(tuple, outline(mask))) == [(0.5, 2), (1, 1.5), (1, 2.5), (1.5, 2)]
    assert len(outline(np.ones((3, 4), bool))) == 0


def test_the_largest_piece_has_no_holes():
    mask = np.zeros((12, 12), bool)
    mask[1:8, 1:8] = True
    mask[3:5, 3:5] = False  # a hole
    mask[8, 8] = True  # touches by a corner
    mask[10:, 2:5] = True  # another piece
    mask[0:3, 6] = False  # a bay open to the frame
    expected = mask.copy()
    expected[10:] = False
    expected[3:5, 3:5] = True
    assert np.array_equal(largest_piece(mask), expected)
    assert not largest_piece(np.zeros((4, 4), bool)).any()
    assert largest_piece(np.ones((4, 4), bool)).all()


def test_circumference_is_the_length_of_the_outline():
    dense = points_of(TRUE, 20000)
    length = np.linalg.norm(dense - np.roll(dense, 1, 0), axis=1).sum()
    assert TRUE.circumference == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("spacing", [(0.2, 0.2), (0.1, 0.3)])
def test_head_circumference_is_in_mm_for_any_pixel(spacing):
    head = Ellipse((15.0, 20.0), 12.0, 9.0, 0.7)  # in mm
    shape = [round(40 / s) for s in spacing]
    row, column = (
        g * s - c for g, s, c in zip(np.indices(shape), spacing, head.center, strict=True)
    )
    u = row * math.cos(0.7) + column * math.sin(0.7)
    v = column * math.cos(0.7) - row * math.sin(0.7)
    mask = (u / 12) ** 2 + (v / 9) ** 2 <= 1
    assert head_circumference(mask, spacing) == pytest.approx(head.circumference, rel=2e-3)
    assert head_circumference(np.zeros((9, 9), bool), spacing) is None
    assert head_circumference(np.ones((9, 9), bool), spacing) is None


def test_it_needs_no_torch():
    code = "import sys, nnunet_ssl.ellipse; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
