"""Distances between features of two networks."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from nnunet_ssl.functional.joint import shared_count


def feature_l1(feature: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute distance of feature maps.

    The difference stays in the precision of the features, so that the graph keeps one map of half
    precision under autocast; sums are in float32.

    Args:
        feature: student, (B, C, *), any scale.
        target: (B, C, *); detached here.
        mask: (B, 1, *) bool, voxels to count; None counts all.

    Returns:
        Scalar mean over counted voxels and channels, float32; 0 if none count.

    Raises:
        ValueError: shapes differ.

    Source: Liu et al. 2025 (M3HL), arXiv:2508.03752, code (low-level consistency).
    """
    _check(feature, target, mask)
    distance = (feature - target.detach().to(feature.dtype)).abs()
    if mask is None:
        return distance.mean(dtype=torch.float32)
    counted = shared_count(mask.sum()) * feature.shape[1]
    return (distance * mask).sum(dtype=torch.float32) / counted


def feature_cosine(feature: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """One minus the cosine between feature maps, each flattened to one vector a sample.

    Args:
        feature: student, (B, C, *), any scale but 0.
        target: (B, C, *); detached here.
        mask: (B, 1, *) bool, places to compare; None compares all.

    Returns:
        Scalar mean over samples, in [0, 2], float32; samples of which nothing counts are left out,
        0 if all are.

    Raises:
        ValueError: shapes differ.

    Source: Liu et al. 2025 (M3HL), arXiv:2508.03752, code (high-level consistency).
    """
    _check(feature, target, mask)
    feature, target = feature.float(), target.detach().float()
    counted = torch.ones(len(feature), device=feature.device)
    if mask is not None:
        feature, target = feature * mask, target * mask
        counted = mask.flatten(1).any(1).float()
    distance = 1 - cosine_similarity(feature.flatten(1), target.flatten(1), dim=1)
    return (distance * counted).sum() / shared_count(counted.sum())


def _check(feature: Tensor, target: Tensor, mask: Tensor | None) -> None:
    one = (feature.shape[0], 1, *feature.shape[2:])
    if feature.shape != target.shape or (mask is not None and tuple(mask.shape) != one):
        raise ValueError(
            f"Features {tuple(feature.shape)} need a target of the same shape and a mask {one}; "
            f"got {tuple(target.shape)} and {None if mask is None else tuple(mask.shape)}."
        )
