"""Overlap and surface distances of two binary masks, as `medpy.metric.binary` defines them.

The surface of a mask is its voxels with a neighbour outside it, across a face (connectivity 1);
beyond the border of the image all is background. Distances run from the centre of each surface
voxel of one mask to the nearest one of the other. 2D and 3D alike; equal to medpy 0.5, much faster.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.spatial import cKDTree

from nnunet_ssl.ellipse import head_circumference

OVERLAPS = ("dice", "jaccard")
DISTANCES = ("hd95", "assd", "asd")
CIRCUMFERENCES = ("hc_error", "hc_abs_error")

# (metric, unit) -> value, None where it is not defined
Scores = dict[tuple[str, str], float | None]


def score_masks(
    segmentation: np.ndarray,
    annotation: np.ndarray,
    spacings: Mapping[str, Sequence[float]],
    tolerance: float = 1.0,
    ignored: np.ndarray | None = None,
) -> Scores:
    """All metrics of one pair of masks.

    Both masks empty: no metric is defined. One empty: Dice, Jaccard and NSD are 0 and no distance
    is defined.

    Args:
        segmentation: bool, (*).
        annotation: bool, (*), same shape.
        spacings: unit -> edge lengths of a voxel in it, in the order of the axes. Distances and
            NSD are given in each unit.
        tolerance: of NSD, in each unit.
        ignored: bool, (*), voxels to leave out; a face towards one is no surface.

    Returns:
        The overlaps under unit "", distances and NSD under each unit.

    Raises:
        ValueError: shapes differ.
    """
    if segmentation.shape != annotation.shape:
        raise ValueError(f"shapes differ: {segmentation.shape} and {annotation.shape}")
    if ignored is not None:
        segmentation, annotation = segmentation & ~ignored, annotation & ~ignored
    scores: Scores = dict.fromkeys([(metric, "") for metric in OVERLAPS])
    scores |= dict.fromkeys([(m, unit) for unit in spacings for m in (*DISTANCES, "nsd")])
    box = bounding_box(segmentation | annotation)
    if box is None:
        return scores

    segmentation, annotation = segmentation[box], annotation[box]
    scores["dice", ""], scores["jaccard", ""] = overlap(segmentation, annotation)
    if not (segmentation.any() and annotation.any()):
        return scores | {("nsd", unit): 0.0 for unit in spacings}

    inside = None if ignored is None else ignored[box]
    points, others = surface(segmentation, inside), surface(annotation, inside)
    if len(points) and len(others):  # all faces may lie towards ignored voxels
        for unit, spacing in spacings.items():
            distances = surface_distances(points, others, spacing)
            scores["hd95", unit] = hd95(*distances)
            scores["assd", unit] = assd(*distances)
            scores["asd", unit] = asd(distances[0])
            scores["nsd", unit] = nsd(*distances, tolerance)
    return scores


def circumference_errors(
    segmentation: np.ndarray,
    annotation: np.ndarray,
    spacing: Sequence[float],
    ignored: np.ndarray | None = None,
) -> Scores:
    """How much longer the ellipse around the segmentation is than that around the annotation.

    Args:
        segmentation: bool, (H, W).
        annotation: bool, (H, W).
        spacing: edge lengths of a pixel in mm, in the order of the axes.
        ignored: bool, (H, W), pixels to leave out; an edge towards one is no outline.

    Returns:
        Difference of the circumferences in mm, with its sign and without; None where no ellipse
        fits one of the masks.
    """
    known = None if ignored is None else ~ignored
    masks = (m if known is None else m & known for m in (segmentation, annotation))
    found, wanted = (head_circumference(mask, spacing, known) for mask in masks)
    error = None if found is None or wanted is None else found - wanted
    return {("hc_error", "mm"): error, ("hc_abs_error", "mm"): error and abs(error)}


def overlap(mask: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Dice 2|A∩B| / (|A|+|B|) and Jaccard |A∩B| / |A∪B|, in [0, 1], of masks not both empty."""
    common = np.count_nonzero(mask & other)
    total = np.count_nonzero(mask) + np.count_nonzero(other)
    return 2 * common / total, common / (total - common)


def bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """Smallest box around the mask and one voxel more, within the image; None if it is empty."""
    box: list[slice] = []
    for axis, size in enumerate(mask.shape):
        others = tuple(i for i in range(mask.ndim) if i != axis)
        found = np.flatnonzero(mask.any(axis=others))
        if not len(found):
            return None
        start, stop = int(found[0]), int(found[-1]) + 1
        box.append(slice(max(start - 1, 0), min(stop + 1, size)))
        mask = mask[(slice(None),) * axis + (slice(start, stop),)]  # less to search
    return tuple(box)


def surface(mask: np.ndarray, inside: np.ndarray | None = None) -> np.ndarray:
    """Indices (N, dim) of the voxels of the mask with a background neighbour across a face.

    Args:
        mask: bool, (*).
        inside: bool, (*), voxels that do not count as background.
    """
    solid = np.pad(mask if inside is None else mask | inside, 1)
    core = mask.copy()
    for axis, size in enumerate(mask.shape):
        for start in (0, 2):
            shift = [slice(1, -1)] * mask.ndim
            shift[axis] = slice(start, start + size)
            core &= solid[tuple(shift)]
    return np.argwhere(mask & ~core)


def surface_distances(
    points: np.ndarray, others: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each point to the nearest of the others, and the reverse.

    On atria a tree over the surfaces takes a third of the time of a distance transform of the box,
    on masks far apart a tenth (benchmarks/surface_distances.py).

    Args:
        points: (N, dim), indices.
        others: (M, dim), indices.
        spacing: edge lengths of a voxel, dim values.

    Returns:
        (N,) and (M,), in the unit of the spacing.
    """
    first, second = points * np.asarray(spacing), others * np.asarray(spacing)
    quick = {"balanced_tree": False, "compact_nodes": False}
    return cKDTree(second, **quick).query(first)[0], cKDTree(first, **quick).query(second)[0]


def hd95(there: np.ndarray, back: np.ndarray) -> float:
    """95th percentile of the distances of both directions together."""
    return float(np.percentile(np.concatenate((there, back)), 95))


def assd(there: np.ndarray, back: np.ndarray) -> float:
    """Average symmetric surface distance: mean over the surface voxels of both masks.

    As in medpy since 0.5; 0.4 took the mean of the two directed means.
    """
    return float(np.concatenate((there, back)).mean())


def asd(there: np.ndarray) -> float:
    """Average distance of one direction: from the segmentation to the annotation."""
    return float(there.mean())


def nsd(there: np.ndarray, back: np.ndarray, tolerance: float) -> float:
    """Normalised surface Dice: share of the surface voxels of both masks within the tolerance.

    Voxels are counted, not weighted by the area of their faces. A millionth of the tolerance is
    allowed for rounding, since spacings are stored in single precision.

    Source: Nikolov et al. 2021, arXiv:1809.04430, there weighted by area.
    """
    limit = tolerance * (1 + 1e-6)
    near = np.count_nonzero(there <= limit) + np.count_nonzero(back <= limit)
    return near / (len(there) + len(back))
