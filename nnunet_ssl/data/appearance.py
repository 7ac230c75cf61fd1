"""How a preprocessed scan looks, to tell scans that do not belong among the others.

Four coarse measures, none of which needs a mask: intensities, layout, sharpness and spacing. They
find scans that are inverted, blurred, of another organ or another protocol; they do not find a
scan of the right kind that happens to lack the structure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

LEVELS = np.linspace(0.05, 0.95, 19)  # of the intensity quantiles
CELLS = 8  # of the layout, per axis
MOST_VOXELS = 2_000_000  # looked at; larger scans are thinned out

# Limits beyond which a scan looks unlike another. On z-scored images of ACDC, hippocampus (MSD),
# HC18, LA and PSFHS with 4 annotated cases, drawn ten times, no scan of the same set was beyond
# them, and 80 (HC18) to 100 % were with inverted intensities.
INTENSITY_LIMIT = 0.5  # mean distance of quantiles, in the network's input units
LAYOUT_LIMIT = 0.0  # correlation of the layouts,
LAYOUT_MARGIN = 0.3  # less where annotated scans come this near to it among themselves
SHARPNESS_LIMIT = 3.0  # factor
SPACING_LIMIT = 3.0  # factor


@dataclass
class Appearance:
    """What `unlike` compares.

    Attributes:
        intensities: (C, 19) quantiles from 5 % to 95 % of the network's input.
        layout: (8^n,) mean intensities of 8 cells an axis, first channel, without mean, of norm 1;
            zeros if the scan is even.
        sharpness: mean absolute step between neighbouring voxels in the last two axes.
        spacing: of the original scan, in mm, sorted.
    """

    intensities: np.ndarray
    layout: np.ndarray
    sharpness: float
    spacing: np.ndarray


def appearance(data: np.ndarray, inside: np.ndarray, spacing: Sequence[float]) -> Appearance:
    """Describe a preprocessed scan.

    Args:
        data: (C, *) with 3 axes, the first of length 1 for slices.
        inside: (*) bool, False on nnU-Net's padding.
        spacing: of the original scan, in mm.
    """
    # whole slices, two a cell of the layout at least
    step = max(1, min(inside.size // MOST_VOXELS, inside.shape[0] // (2 * CELLS)))
    data, inside = np.asarray(data[:, ::step], dtype=np.float32), inside[::step]
    if not inside.any():
        inside = np.ones_like(inside)
    first = data[0]
    return Appearance(
        intensities=np.stack([np.quantile(channel[inside], LEVELS) for channel in data]),
        layout=_layout(first),
        sharpness=float(np.mean([np.abs(np.diff(first, axis=a)).mean() for a in (-2, -1)])),
        spacing=np.sort(np.asarray(spacing, dtype=float)),
    )


def _layout(image: np.ndarray) -> np.ndarray:
    cells = image
    for axis, length in enumerate(image.shape):
        if length == 1:
            continue
        edges = np.linspace(0, length, CELLS + 1)
        picked = [
            cells.take(range(int(low), max(int(low) + 1, int(np.ceil(high)))), axis).mean(axis)
            for low, high in pairwise(edges)
        ]
        cells = np.stack(picked, axis)
    cells = cells.ravel() - cells.mean()
    norm = float(np.linalg.norm(cells))
    return cells / norm if norm > 1e-6 else np.zeros_like(cells)


def unlike(scan: Appearance, annotated: Sequence[Appearance]) -> list[str]:
    """Return in what a scan is unlike every annotated one; empty if it is like one of them.

    Each measure takes the annotated case that is nearest in it.

    Args:
        scan: the one to judge.
        annotated: at least one.

    Returns:
        Some of "intensities", "layout", "sharpness", "spacing".
    """
    found = []
    if min(np.abs(scan.intensities - a.intensities).mean() for a in annotated) > INTENSITY_LIMIT:
        found.append("intensities")
    if _correlation(scan, annotated) < layout_limit(annotated):
        found.append("layout")
    if min(_factor(scan.sharpness, a.sharpness) for a in annotated) > SHARPNESS_LIMIT:
        found.append("sharpness")
    if min(_factor(scan.spacing, a.spacing) for a in annotated) > SPACING_LIMIT:
        found.append("spacing")
    return found


def layout_limit(annotated: Sequence[Appearance]) -> float:
    """Return the smallest correlation that counts as alike; low where layouts tell nothing."""
    among_themselves = [
        _correlation(one, [other for other in annotated if other is not one])
        for one in (annotated if len(annotated) > 1 else ())
    ]
    return min(LAYOUT_LIMIT, min(among_themselves, default=0.0) - LAYOUT_MARGIN)


def _correlation(scan: Appearance, others: Sequence[Appearance]) -> float:
    """Return the correlation with the most similar layout of the same number of cells."""
    comparable = [o.layout for o in others if o.layout.shape == scan.layout.shape]
    return max((float(scan.layout @ layout) for layout in comparable), default=-1.0)


def _factor(one: Any, other: Any) -> float:
    """Largest ratio between two positive values, or between those of two vectors."""
    ratio = (np.asarray(one) + 1e-9) / (np.asarray(other) + 1e-9)
    return float(np.max(np.maximum(ratio, 1 / ratio)))


def describe_unlike(unlike_cases: Mapping[str, Sequence[str]], total: int) -> str:
    """Return a warning that names the first ten of these scans, for people."""
    named = [f"{case} ({', '.join(why)})" for case, why in sorted(unlike_cases.items())]
    more = f" and {len(named) - 10} more" if len(named) > 10 else ""
    return (
        f"WARNING: {len(named)} of {total} scans in imagesUn look unlike every annotated scan: "
        f"{', '.join(named[:10])}{more}. Scans of another kind can make training worse than "
        f"without them: look at them, and take out of imagesUn what does not belong."
    )
