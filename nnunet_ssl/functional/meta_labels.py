"""Labels that a scan brings along: which part of it a slice is from, and what finds it again."""

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, normalize

MIN_SHARE = 0.05  # of a slice that must lie in the scan, for it to count
ROWS = 1024  # compared at a time


def partition(position: Tensor, parts: int) -> Tensor:
    """Return which of equal parts of the scan a position lies in, 0 to parts - 1, int64.

    Args:
        position: in [0, 1]; for slice z of n the middle of the slice, (z + 1/2) / n. The parts then
            differ by one slice at most, and all are used where n >= parts.
        parts: S, 1 or more.

    Source: Peng et al. 2021, arXiv:2107.13741. Deviates: the released rules leave parts empty or
    make them uneven (3 slices in 3 parts, 40 in 8).
    """
    return (position.float() * parts).long().clamp(0, parts - 1)


def slice_features(feature: Tensor) -> Tensor:
    """Return one vector per slice: the mean over all axes but the first.

    Args:
        feature: (B, F, h, w), or (B, F, d, h, w).

    Returns:
        (B, F) in 2D; (B * d, F) in 3D, the slices of one sample side by side. float32.
    """
    mean = feature.float().mean((-2, -1))
    return mean if feature.ndim == 4 else mean.transpose(1, 2).flatten(0, 1)


def slice_positions(z_map: Tensor, valid: Tensor, slices: int) -> tuple[Tensor, Tensor]:
    """Return the place in the scan of each slice of a feature map.

    Args:
        z_map: (B, 1, D, H, W), position of each voxel along the scan, in [0, 1].
        valid: (B, 1, D, H, W) bool, False outside the scan.
        slices: d, of the feature map.

    Returns:
        Positions (B * d,), means over the voxels that a slice stands for, and (B * d,) bool, False
        where nearly all of these (over 95 %) lie outside.
    """
    inside = valid.float()
    # within slices first: pooling a slab to one number is slow on a GPU
    share, total = (
        adaptive_avg_pool1d(t.mean((3, 4)), slices).flatten()
        for t in (inside, inside * z_map.float())
    )
    return total / share.clamp_min(1e-6), share >= MIN_SHARE


@torch.no_grad()
def retrieval(feature: Tensor, labels: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return how often the nearest sample of another group has the same label.

    Args:
        feature: (M, F), compared by cosine.
        labels: (M,) integers; samples with negative ones are left out.
        group: (M,) integers; samples of one group are not compared.

    Returns:
        Share of hits, and the share to expect by chance, scalars over the samples that have one of
        their label in another group; NaN if none has.
    """
    unit = normalize(feature.float(), dim=1)
    hits, chance, count = (torch.zeros((), device=feature.device) for _ in range(3))
    for rows in torch.arange(len(unit), device=feature.device).split(ROWS):
        comparable = (group[rows, None] != group[None]) & (labels >= 0)[None]
        matches = comparable & (labels[rows, None] == labels[None])
        asked = matches.any(1)
        similarity = (unit[rows] @ unit.T).masked_fill(~comparable, -2)
        nearest = similarity.argmax(1)
        hits += (asked & (labels[nearest] == labels[rows])).sum()
        chance += (matches.sum(1) / comparable.sum(1).clamp_min(1))[asked].sum()
        count += asked.sum()
    return hits / count, chance / count
