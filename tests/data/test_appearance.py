"""Scans that do not belong are told from those that do."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from nnunet_ssl.data.appearance import (
    LEVELS,
    Appearance,
    appearance,
    describe_unlike,
    layout_limit,
    unlike,
)

SPACING = (2.0, 1.0, 1.0)


def scan(seed, shape=(16, 40, 48)):
    """A bright organ left of the middle and a dark one right of it, with noise; z-scores."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(
        *[np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape], indexing="ij"
    )
    shift = rng.uniform(-0.1, 0.1)
    image = 3.0 * ((x + 0.5 + shift) ** 2 + y**2 + z**2 < 0.3) - ((x - 0.5) ** 2 + y**2 < 0.1)
    image = image + rng.normal(0, 0.3, shape)
    return ((image - image.mean()) / image.std())[None].astype(np.float32)


def look(image, spacing=SPACING):
    return appearance(image, np.ones(image.shape[1:], bool), spacing)


@pytest.fixture(params=[(16, 40, 48), (1, 40, 48)], ids=["3d", "slice"])
def shape(request):
    return request.param


@pytest.fixture
def annotated(shape):
    return [look(scan(seed, shape)) for seed in range(4)]


def test_a_scan_of_the_same_kind_belongs(annotated, shape):
    assert all(unlike(look(scan(seed, shape)), annotated) == [] for seed in range(10, 20))


@pytest.mark.parametrize(
    ("spoil", "measure"),
    [
        (lambda image: -image, "layout"),
        (lambda image: image + 1, "intensities"),
        (lambda image: 0.2 * image, "sharpness"),
        (lambda image: gaussian_filter(image, (0, 0, 2, 2)), "sharpness"),
        (lambda image: image[..., ::-1], "layout"),
    ],
    ids=["inverted", "brighter", "flat", "blurred", "other organ"],
)
def test_a_spoilt_scan_is_told_with_the_reason(annotated, shape, spoil, measure):
    assert measure in unlike(look(spoil(scan(10, shape))), annotated)


def test_another_spacing_is_told_whatever_the_order_of_axes(annotated, shape):
    same = look(scan(10, shape), spacing=(1.0, 2.0, 1.0))
    assert unlike(same, annotated) == []
    coarse = look(scan(10, shape), spacing=(7.0, 1.0, 1.0))
    assert unlike(coarse, annotated) == ["spacing"]


def test_one_annotated_scan_that_is_alike_is_enough(annotated, shape):
    inverted = look(-scan(10, shape))
    assert unlike(inverted, [*annotated, look(-scan(11, shape))]) == []


def test_layouts_that_differ_among_annotated_scans_say_little(shape):
    unrelated = [look(np.random.default_rng(s).normal(size=(1, *shape))) for s in range(4)]
    assert layout_limit(unrelated) < -0.2
    assert layout_limit([look(scan(s, shape)) for s in range(4)]) == 0


def test_padding_is_not_looked_at():
    image = scan(0)
    padded = np.concatenate([image, np.full_like(image, 50)], 1)
    inside = np.arange(padded.shape[1])[:, None, None] < image.shape[1]
    inside = np.broadcast_to(inside, padded.shape[1:])
    expected = np.quantile(image, LEVELS)
    assert np.allclose(appearance(padded, inside, SPACING).intensities[0], expected, atol=1e-5)


def test_even_images_give_numbers():
    even = look(np.zeros((2, 1, 8, 8), np.float32))
    assert np.isfinite(even.intensities).all() and even.intensities.shape == (2, 19)
    assert not even.layout.any() and even.sharpness == 0
    assert isinstance(even, Appearance) and unlike(even, [even]) == []


def test_warning_names_ten_and_counts_the_rest():
    told = describe_unlike({f"case_{i:02}": ["layout", "spacing"] for i in range(12)}, 30)
    assert "12 of 30" in told and "case_00 (layout, spacing)" in told and "case_09" in told
    assert "case_10" not in told and "and 2 more" in told
