"""Metrics against medpy and against naive code."""

from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from medpy.metric import binary
from scipy.ndimage import gaussian_filter

from nnunet_ssl.evaluation.metrics import (
    DISTANCES,
    OVERLAPS,
    circumference_errors,
    score_masks,
)

HIPPOCAMPUS = (
    Path(__file__).parents[3] / "shared" / "data" / "hippocampus" / "Task04_Hippocampus/labelsTr"
)


def assert_equals_medpy(segmentation, annotation, spacing):
    scores = score_masks(segmentation, annotation, {"mm": spacing})
    assert scores["dice", ""] == pytest.approx(binary.dc(segmentation, annotation), abs=1e-6)
    assert scores["jaccard", ""] == pytest.approx(binary.jc(segmentation, annotation), abs=1e-6)
    for name in ("hd95", "assd", "asd"):
        expected = getattr(binary, name)(segmentation, annotation, voxelspacing=spacing)
        assert scores[name, "mm"] == pytest.approx(expected, abs=1e-6), name


def blobs(rng, shape, sigma=2.0, threshold=0.3):
    field = gaussian_filter(rng.normal(size=shape), sigma)
    return field > threshold * field.std()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((40, 33), (1, 1)),
        ((40, 33), (0.7, 2.3)),
        ((14, 25, 19), (1, 1, 1)),
        ((9, 25, 31), (8.0, 1.36719, 1.36719)),
        ((12, 12), (0.1, 0.1)),
    ],
)
def test_random_masks_equal_medpy(shape, spacing, seed):
    rng = np.random.default_rng(seed)
    first = blobs(rng, shape)  # reaches the borders
    assert first[0].any() or first[-1].any()
    assert_equals_medpy(first, blobs(rng, shape), spacing)
    assert_equals_medpy(first, first ^ (rng.random(shape) > 0.95), spacing)


@pytest.mark.parametrize("dim", [2, 3])
def test_masks_at_the_borders_equal_medpy(dim):
    shape, spacing = (9, 8, 7)[:dim], (2.0, 0.5, 1.0)[:dim]
    whole, corner, far = np.ones(shape, bool), np.zeros(shape, bool), np.zeros(shape, bool)
    corner[(slice(0, 3),) * dim] = True
    far[(slice(-2, None),) * dim] = True
    inner = np.zeros(shape, bool)
    inner[(slice(1, -1),) * dim] = True
    voxel = np.zeros(shape, bool)
    voxel[(4,) * dim] = True
    for first, second in product((whole, corner, far, inner, voxel), repeat=2):
        assert_equals_medpy(first, second, spacing)


def test_real_masks_equal_medpy():
    if not HIPPOCAMPUS.is_dir():
        pytest.skip("the hippocampus data set is not beside the repository")
    images = [sitk.ReadImage(str(p)) for p in sorted(HIPPOCAMPUS.glob("hippo*.nii.gz"))[:4]]
    arrays = [sitk.GetArrayFromImage(i) for i in images]
    shape = np.min([a.shape for a in arrays], axis=0)
    masks = [a[tuple(slice(s) for s in shape)] for a in arrays]
    for first, second in pairwise(masks):
        for label in (1, 2):
            assert_equals_medpy(first == label, second == label, (1.0, 1.0, 1.0))
            assert_equals_medpy(first == label, second == label, (3.0, 0.6, 0.8))


def naive_surface(mask):
    points = []
    for index in np.argwhere(mask):
        for axis, step in product(range(mask.ndim), (-1, 1)):
            other = index.copy()
            other[axis] += step
            outside = other[axis] < 0 or other[axis] >= mask.shape[axis]
            if outside or not mask[tuple(other)]:
                points.append(index)
                break
    return np.array(points)


@pytest.mark.parametrize("shape", [(9, 11), (5, 7, 6)])
def test_every_metric_equals_naive_loops(shape):
    rng = np.random.default_rng(1)
    first, second = blobs(rng, shape, 1), blobs(rng, shape, 1)
    spacing = (1.5, 0.5, 1.0)[: len(shape)]
    a, b = naive_surface(first) * spacing, naive_surface(second) * spacing
    there = [min(np.linalg.norm(p - q) for q in b) for p in a]
    back = [min(np.linalg.norm(p - q) for q in a) for p in b]
    pooled = sorted(there + back)
    rank = 0.95 * (len(pooled) - 1)
    low = pooled[int(rank)]
    expected = {
        "dice": 2 * (first & second).sum() / (first.sum() + second.sum()),
        "jaccard": (first & second).sum() / (first | second).sum(),
        "hd95": low + (rank % 1) * (pooled[int(rank) + 1] - low),
        "assd": sum(pooled) / len(pooled),
        "asd": sum(there) / len(there),
        "nsd": sum(d <= 1 for d in pooled) / len(pooled),
    }
    scores = score_masks(first, second, {"mm": spacing}, tolerance=1)
    assert {
        name: scores[name, "" if name in OVERLAPS else "mm"]
        for name in (*OVERLAPS, *DISTANCES, "nsd")
    } == (pytest.approx(expected))


def test_asd_runs_from_the_segmentation_to_the_annotation():
    annotation = np.zeros((20, 20), bool)
    annotation[5, 5] = True
    segmentation = annotation.copy()
    segmentation[5, 15] = True
    assert score_masks(segmentation, annotation, {"mm": (1, 1)})["asd", "mm"] == 5
    assert score_masks(annotation, segmentation, {"mm": (1, 1)})["asd", "mm"] == 0


def test_identical_masks():
    mask = blobs(np.random.default_rng(0), (10, 12, 11))
    scores = score_masks(mask, mask, {"mm": (1, 2, 3), "voxel": (1, 1, 1)}, tolerance=0)
    perfect = {"dice": 1, "jaccard": 1, "nsd": 1, "hd95": 0, "assd": 0, "asd": 0}
    assert all(value == perfect[metric] for (metric, _), value in scores.items())
    assert len(scores) == 2 + 2 * 4


def test_units_differ_by_the_spacing():
    first, second = np.zeros((6, 30), bool), np.zeros((6, 30), bool)
    first[2, 4], second[2, 10] = True, True
    scores = score_masks(first, second, {"mm": (1, 0.5), "voxel": (1, 1)}, tolerance=3)
    assert (scores["hd95", "mm"], scores["hd95", "voxel"]) == (3, 6)
    assert (scores["nsd", "mm"], scores["nsd", "voxel"]) == (1, 0)


def test_tolerance_allows_for_single_precision_spacing():
    first, second = np.zeros((20, 5), bool), np.zeros((20, 5), bool)
    first[1, 2], second[11, 2] = True, True
    spacing = (float(np.float32(0.1)), 1.0)  # a little above 0.1
    assert score_masks(first, second, {"mm": spacing}, tolerance=1.0)["nsd", "mm"] == 1
    assert score_masks(first, second, {"mm": spacing}, tolerance=0.99)["nsd", "mm"] == 0


def test_empty_masks():
    empty, mask = np.zeros((4, 5, 6), bool), np.ones((4, 5, 6), bool)
    spacings = {"mm": (1, 1, 1)}
    assert set(score_masks(empty, empty, spacings).values()) == {None}
    for pair in ((empty, mask), (mask, empty)):
        scores = score_masks(*pair, spacings)
        assert [scores["dice", ""], scores["jaccard", ""], scores["nsd", "mm"]] == [0, 0, 0]
        assert [scores[m, "mm"] for m in ("hd95", "assd", "asd")] == [None] * 3


def test_ignored_voxels_count_nowhere():
    annotation, segmentation = np.zeros((12, 12), bool), np.zeros((12, 12), bool)
    annotation[3:9, 3:9] = True
    segmentation[3:9, 3:12] = True
    ignored = np.zeros((12, 12), bool)
    ignored[:, 9:] = True
    scores = score_masks(segmentation, annotation, {"mm": (1, 1)}, ignored=ignored)
    assert (scores["dice", ""], scores["hd95", "mm"], scores["nsd", "mm"]) == (1, 0, 1)


def test_sparse_annotation_has_no_surface_towards_ignored_slices():
    annotation = np.zeros((7, 16, 16), bool)
    annotation[:, 4:12, 4:12] = True
    segmentation = np.zeros_like(annotation)
    segmentation[:, 2:14, 2:14] = True
    ignored = np.ones_like(annotation)
    ignored[3] = False
    sparse = score_masks(segmentation, annotation, {"mm": (1, 1, 1)}, ignored=ignored)
    slice_alone = score_masks(segmentation[3], annotation[3], {"mm": (1, 1)})
    assert sparse == pytest.approx(slice_alone)


def test_a_surface_hidden_by_ignored_voxels_leaves_distances_undefined():
    mask = np.zeros((5, 5), bool)
    mask[2, 2] = True
    scores = score_masks(mask, mask, {"mm": (1, 1)}, ignored=~mask)
    assert scores["dice", ""] == 1
    assert scores["hd95", "mm"] is None
    assert scores["nsd", "mm"] is None


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        score_masks(np.ones((2, 3), bool), np.ones((3, 2), bool), {"mm": (1, 1)})


def head(long, short, shape=(200, 240)):
    row, column = (g - s / 2 for g, s in zip(np.indices(shape), shape, strict=True))
    return np.hypot(row / short, column / long) <= 1


def test_circumference_error_is_that_of_the_ellipses():
    """Of circles with anisotropic pixels: 2 pi r, and with its sign."""
    small, large = head(60, 30), head(80, 40)  # circles of 15 and 20 mm
    spacing = (0.5, 0.25)
    there = circumference_errors(large, small, spacing)
    back = circumference_errors(small, large, spacing)
    assert there["hc_error", "mm"] == pytest.approx(2 * np.pi * 5, rel=0.01)
    assert back["hc_error", "mm"] == -there["hc_error", "mm"]
    assert there["hc_abs_error", "mm"] == back["hc_abs_error", "mm"] == there["hc_error", "mm"]
    double = circumference_errors(large, small, (1, 0.5))
    assert double["hc_error", "mm"] == pytest.approx(2 * there["hc_error", "mm"])


def test_circumference_of_equal_masks_and_of_none():
    mask = head(60, 30)
    assert set(circumference_errors(mask, mask, (1, 1)).values()) == {0.0}
    for other in (mask & False, head(0.5, 0.5)):  # empty, one pixel
        for pair in ((mask, other), (other, mask), (other, other)):
            assert set(circumference_errors(*pair, (1, 1)).values()) == {None}


def test_circumference_ignores_what_lies_apart():
    mask, speck = head(60, 30), head(60, 30)
    speck[5:12, 5:12] = True
    speck[98:102, 100:140] = False  # a hole
    assert set(circumference_errors(speck, mask, (1, 1)).values()) == {0.0}
    ignored = np.zeros_like(mask)
    ignored[:, 150:] = True
    half = mask & ~ignored
    assert set(circumference_errors(mask, half, (1, 1), ignored).values()) == {0.0}
    # the edge towards what is ignored is no outline: the ellipse is that of the whole head
    cut = circumference_errors(half, mask, (1, 1))["hc_error", "mm"]
    same = circumference_errors(half, head(60, 30), (1, 1), ignored)["hc_error", "mm"]
    assert same == 0 and cut < -5
