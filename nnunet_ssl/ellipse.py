"""Ellipses fitted to masks: for training, evaluation and conversion, so without torch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import label
from scipy.special import ellipe

LEAST_POINTS = 6  # an ellipse has five parameters
FLATTEST = 1e-3  # narrower sets of points are a line


class Ellipse(NamedTuple):
    """An ellipse in the units and axes of the points it was fitted to.

    Attributes:
        center: first and second coordinate.
        long: longer semi-axis.
        short: shorter semi-axis.
        angle: of the long axis, from the first coordinate's axis to the second's, in [0, pi).
    """

    center: tuple[float, float]
    long: float
    short: float
    angle: float

    @property
    def circumference(self) -> float:
        """Length of the outline, by the elliptic integral."""
        return 4 * self.long * float(ellipe(1 - (self.short / self.long) ** 2))


def fit_ellipse(points: np.ndarray) -> Ellipse | None:
    """Fit an ellipse by direct least squares of the algebraic distance.

    Always an ellipse, whatever the noise. Points on less than half of the outline make it too
    small. scikit-image has the same fit, but its name and its results for degenerate points differ
    between the versions that nnU-Net allows.

    Args:
        points: (N, 2).

    Returns:
        None for fewer than six points, or points on a line.

    Source: Halir & Flusser 1998, Numerically stable direct least squares fitting of ellipses.
    """
    if len(points) < LEAST_POINTS:
        return None
    points = np.asarray(points, dtype=np.float64)
    middle = points.mean(0)
    points = points - middle
    sizes = np.sqrt(np.linalg.eigvalsh(points.T @ points / len(points)).clip(0))
    if sizes[0] <= FLATTEST * sizes[1]:
        return None
    x, y = points.T / sizes[1]
    quadratic, linear = np.stack([x * x, x * y, y * y]), np.stack([x, y, np.ones_like(x)])
    try:
        to_linear = -np.linalg.solve(linear @ linear.T, linear @ quadratic.T)
        scatter = quadratic @ quadratic.T + quadratic @ linear.T @ to_linear
        _, vectors = np.linalg.eig(np.stack([scatter[2] / 2, -scatter[1], scatter[0] / 2]))
    except np.linalg.LinAlgError:
        return None
    vectors = vectors.real
    elliptic = 4 * vectors[0] * vectors[2] - vectors[1] ** 2
    best = int(elliptic.argmax())
    if not elliptic[best] > 0:
        return None
    a, b, c = vectors[:, best]
    d, e, f = to_linear @ vectors[:, best]
    form = np.array([[2 * a, b], [b, 2 * c]])
    center = np.linalg.solve(form, [-d, -e])
    values, axes = np.linalg.eigh(form / 2)
    squared = -(f + (d * center[0] + e * center[1]) / 2) / values
    if not (np.isfinite(squared).all() and (squared > 0).all()):
        return None
    long, short = int(squared.argmax()), int(squared.argmin())
    if long == short:  # a circle has no long axis
        long, short = 1, 0
    angle = math.atan2(axes[1, long], axes[0, long]) % math.pi
    center = center * sizes[1] + middle
    semi = np.sqrt(squared) * sizes[1]
    return Ellipse(
        (float(center[0]), float(center[1])), float(semi[long]), float(semi[short]), angle
    )


def largest_piece(mask: np.ndarray) -> np.ndarray:
    """Return the largest connected piece of a mask (H, W), diagonals connect, with holes filled."""
    pieces, number = label(mask, np.ones((3, 3)))
    if not number:
        return np.zeros(mask.shape, dtype=bool)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    outside, _ = label(pieces != sizes.argmax())
    frame = np.concatenate([outside[0], outside[-1], outside[:, 0], outside[:, -1]])
    reached = np.zeros(outside.max() + 1, dtype=bool)
    reached[frame] = True
    reached[0] = False  # the piece itself
    return ~reached[outside]


def outline(mask: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Return the middle of each pixel edge between mask and background.

    Edges have no bias, unlike the pixels inside them. The frame of the image is no outline.

    Args:
        mask: (H, W) bool.
        known: (H, W) bool, False on padding; edges towards it are left out as well.

    Returns:
        (N, 2) float64, in pixels, the centre of the first pixel being 0, 0.
    """
    known = np.ones(mask.shape, dtype=bool) if known is None else known
    points = []
    for axis in (0, 1):
        m, k = np.moveaxis(mask, axis, 0), np.moveaxis(known, axis, 0)
        edges = np.argwhere((m[1:] != m[:-1]) & k[1:] & k[:-1]) + np.array([0.5, 0.0])
        points.append(edges[:, ::-1] if axis else edges)
    return np.concatenate(points)


def mask_ellipse(
    mask: np.ndarray, known: np.ndarray | None = None, spacing: Sequence[float] = (1.0, 1.0)
) -> Ellipse | None:
    """Fit an ellipse to the outline of the largest piece of a mask.

    Args:
        mask: (H, W) bool.
        known: (H, W) bool, False on padding.
        spacing: edge lengths of a pixel in the order of the axes; the ellipse is in their unit.

    Returns:
        None if there is no outline to fit.
    """
    return fit_ellipse(outline(largest_piece(mask), known) * spacing)


def head_circumference(
    mask: np.ndarray, spacing: Sequence[float], known: np.ndarray | None = None
) -> float | None:
    """Return the circumference of the ellipse that fits a mask, in the unit of the spacing.

    Args:
        mask: (H, W) bool, e.g. a fetal head in ultrasound.
        spacing: edge lengths of a pixel, mm for mm, in the order of the axes.
        known: (H, W) bool, False on padding and where nothing is annotated.

    Returns:
        None if no ellipse fits, as for an empty mask.

    Source: the measure of the HC18 challenge, van den Heuvel et al. 2018,
        doi:10.1371/journal.pone.0200412.
    """
    ellipse = mask_ellipse(mask, known, spacing)
    return None if ellipse is None else ellipse.circumference
