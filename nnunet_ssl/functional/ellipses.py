"""Pseudo-labels refined by the ellipse that fits them. 2D only."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nnunet_ssl.ellipse import fit_ellipse, largest_piece, outline

LEAST_PIXELS = 16  # smaller masks have no shape


class Ellipses(NamedTuple):
    """One ellipse a sample, in pixels; coordinates are (row, column).

    Attributes:
        center: (B, 2) float32.
        axes: (B, 2) float32, longer and shorter semi-axis.
        along: (B, 2) float32, unit vector of the long axis.
        found: (B,) bool; False: the others are of no ellipse, but finite.
    """

    center: Tensor
    axes: Tensor
    along: Tensor
    found: Tensor


@torch.no_grad()
def fit_ellipses(mask: Tensor, valid: Tensor, min_inside: float = 0.4) -> Ellipses:
    """Fit an ellipse to the outline of the largest piece of each sample's mask.

    Waits for the device. The frame of the patch and edges towards padding are no outline, so a head
    that the patch cuts keeps its size.

    Args:
        mask: (B, 1, H, W) bool.
        valid: (B, 1, H, W) bool, False on padding.
        min_inside: least part of the ellipse that lies on valid pixels; its centre has to, too.

    Returns:
        On the device of the mask. `found` is False for masks of under 16 pixels and where no
        ellipse fits.

    Source: Zhou et al. 2025 (ERSR), arXiv:2508.19815, with direct least squares for OpenCV's fit.
    """
    both = torch.cat([mask & valid, valid], 1).cpu().numpy()
    rows = [_fit(sample, known, min_inside) for sample, known in both]
    found = torch.tensor([row is not None for row in rows])
    middle = [(s - 1) / 2 for s in mask.shape[2:]]
    values = torch.tensor([row or (*middle, 1.0, 1.0, 1.0, 0.0) for row in rows])
    values, found = (t.to(mask.device, non_blocking=True) for t in (values, found))
    return Ellipses(values[:, :2], values[:, 2:4], values[:, 4:], found)


def _fit(mask: np.ndarray, known: np.ndarray, min_inside: float) -> tuple[float, ...] | None:
    piece = largest_piece(mask)
    if piece.sum() < LEAST_PIXELS or (ellipse := fit_ellipse(outline(piece, known))) is None:
        return None
    if not all(0 <= c <= s - 1 for c, s in zip(ellipse.center, mask.shape, strict=True)):
        return None
    along = math.cos(ellipse.angle), math.sin(ellipse.angle)
    row, column = (np.arange(s) - c for s, c in zip(mask.shape, ellipse.center, strict=True))
    u = row[:, None] * along[0] + column * along[1]
    v = column * along[0] - row[:, None] * along[1]
    inside = known & ((u / ellipse.long) ** 2 + (v / ellipse.short) ** 2 <= 1)
    center = tuple(round(c) for c in ellipse.center)
    if not known[center] or inside.sum() < min_inside * math.pi * ellipse.long * ellipse.short:
        return None
    return (*ellipse.center, ellipse.long, ellipse.short, *along)


def offsets(ellipses: Ellipses, spatial: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return each pixel's distance from the centre along the long and the short axis.

    Args:
        ellipses: of B samples.
        spatial: (H, W).

    Returns:
        Two (B, 1, H, W), signed, in pixels.
    """
    device = ellipses.center.device
    row, column = (
        torch.arange(s, device=device).view(shape) - ellipses.center[:, i, None, None, None]
        for i, (s, shape) in enumerate(zip(spatial, ((-1, 1), (1, -1)), strict=True))
    )
    along_row, along_column = ellipses.along[:, :, None, None, None].unbind(1)
    return row * along_row + column * along_column, column * along_row - row * along_column


def ellipse_distance(ellipses: Ellipses, spatial: Sequence[int]) -> Tensor:
    """Return the squared distance from the centre in semi-axes, (B, 1, H, W); 1 on the ellipse."""
    u, v = offsets(ellipses, spatial)
    long, short = ellipses.axes[:, :, None, None, None].unbind(1)
    return (u / long) ** 2 + (v / short) ** 2


def refine_by_ellipse(prob: Tensor, distance: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Raise probabilities inside an ellipse and lower them outside.

    Inside, p becomes max(p, min(1, threshold + (1 - d)^2)), outside p exp(-(d - 1) / 2). Above the
    threshold are then the whole ellipse and the surest pixels around it.

    Args:
        prob: (B, 1, H, W), in [0, 1].
        distance: d, from `ellipse_distance`.
        threshold: theta.

    Returns:
        The refined probability, and the mask of what is above the threshold, (B, 1, H, W) each.

    Source: Zhou et al. 2025 (ERSR), code; the edge d = 1 counts as inside.
    """
    inside = distance <= 1
    raised = torch.maximum(prob, (threshold + (1 - distance) ** 2).clamp_max(1))
    lowered = prob * torch.exp(-0.5 * (distance - 1))
    soft = torch.where(inside, raised, lowered)
    return soft, inside | (soft > threshold)
