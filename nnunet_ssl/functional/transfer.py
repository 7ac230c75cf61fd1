"""Semantic augmentation in closed form: cross-entropy expected over shifted, spread features.

A classifier is linear in its input, so Gaussian shifts of the feature change the logits of a voxel
by numbers that depend on its label alone: a K x K table, or two numbers a region. No feature is
ever sampled.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, embedding


class Moments(NamedTuple):
    """Mean and covariance of the features of each group of voxels.

    Attributes:
        mean: (G, A) float32.
        covariance: (G, A, A) float32, or its diagonal (G, A).
        number: (G,) float32, voxels behind them; 0 leaves the others without meaning.
    """

    mean: Tensor
    covariance: Tensor
    number: Tensor


@torch.no_grad()
def sampled_moments(
    feature: Tensor, groups: Iterable[Tensor], most: int, least: int, diagonal: bool = False
) -> Moments:
    """Return the moments of the features of each group, from randomly drawn voxels.

    Args:
        feature: (B, A, *), any precision; one draw of random numbers from its device's generator.
        groups: masks (B, 1, *) bool, one a group; they may overlap.
        most: voxels to draw from each group, without replacement; fewer where it has fewer.
        least: groups with fewer voxels get number 0.
        diagonal: only the variances.

    Returns:
        Moments of the drawn voxels, divided by their number.
    """
    flat = feature.flatten(2)
    places = flat.shape[2]
    order = torch.rand(len(flat) * places, device=feature.device)
    most = min(most, len(order))
    means, covariances, counts = [], [], []
    with torch.autocast(feature.device.type, enabled=False):
        for mask in groups:
            # the drawn voxels first, others (-1) after them, so that the number is a shape
            drawn, index = torch.where(mask.flatten(), order, -1).topk(most, sorted=False)
            weight = (drawn >= 0).float()[:, None]
            x = flat[index // places, :, index % places].float()
            number = weight.sum()
            mean = (x * weight).sum(0) / number.clamp_min(1)
            x = (x - mean) * weight
            spread = (x * x).sum(0) if diagonal else x.T @ x
            means.append(mean)
            covariances.append(spread / number.clamp_min(1))
            counts.append(torch.where(number >= least, number, 0))
    return Moments(torch.stack(means), torch.stack(covariances), torch.stack(counts))


def merged_moments(old: Moments, new: Moments, rate: Tensor) -> Moments:
    """Return the moments of a mixture of two groups of voxels.

    Args:
        old: what is known,
        new: what is added; groups of number 0 keep what is known.
        rate: (G,) share of the new voxels, in [0, 1]; numbers are added.

    Source: recursion of Wang et al. 2019 (ISDA), arXiv:1909.12220, with any rate.
    """
    rate = torch.where(new.number > 0, rate, 0)[:, None]
    gap = old.mean - new.mean
    mean = (1 - rate) * old.mean + rate * new.mean
    full = old.covariance.ndim == 3
    apart = gap[:, :, None] * gap[:, None] if full else gap * gap
    rate = rate[:, None] if full else rate
    covariance = (1 - rate) * old.covariance + rate * new.covariance + rate * (1 - rate) * apart
    # a rate of 0 alone would not keep NaN out
    mean, covariance = (
        torch.where(rate.view(-1, *[1] * (t.ndim - 1)) > 0, t, before)
        for t, before in ((mean, old.mean), (covariance, old.covariance))
    )
    return Moments(mean, covariance, old.number + new.number)


def class_shift(weight: Tensor, mean_gap: Tensor, covariance: Tensor, strength: float) -> Tensor:
    """Return what to add to the logits of a voxel by its label.

    With d ~ N(strength * gap_y, strength * cov_y) added to the feature f of a voxel of class y,

        E[-log softmax_y(W (f + d) + b)] <= -log softmax_y(W f + b + table[y]).

    Args:
        weight: W, rows of the classifier, (K, A); gets a gradient.
        mean_gap: (K, A), where the features of each class should move.
        covariance: (K, A, A), or its diagonal (K, A).
        strength: lambda, 0 or more.

    Returns:
        Table (K, K) float32: row = label, column = logit; 0 on the diagonal.

    Source: Li et al. 2021 (TSA), arXiv:2103.12562; as a table, since it does not depend on
        the voxel.
    """
    with torch.autocast(weight.device.type, enabled=False):
        weight = weight.float()
        apart = weight - weight[:, None]  # [y, k] = w_k - w_y
        shift = (apart * mean_gap[:, None]).sum(2)
        if covariance.ndim == 3:
            spread = (apart @ covariance * apart).sum(2)
        else:
            spread = (apart * apart * covariance[:, None]).sum(2)
        return strength * (shift + 0.5 * spread)


def region_shift(weight: Tensor, mean_gap: Tensor, covariance: Tensor, strength: float) -> Tensor:
    """Return what to add to the logit of a region by whether the voxel is inside.

    As `class_shift` for a sigmoid and the binary cross-entropy. With two classes it says the same.

    Args:
        weight: W, (R, A); gets a gradient.
        mean_gap: (R, 2, A), for voxels outside and inside of each region.
        covariance: (R, 2, A, A), or (R, 2, A).
        strength: lambda, 0 or more.

    Returns:
        Table (R, 2) float32, second axis outside, inside.
    """
    with torch.autocast(weight.device.type, enabled=False):
        weight = weight.float()[:, None]
        shift = (weight * mean_gap).sum(2)
        if covariance.ndim == 4:
            spread = (weight[:, :, None] @ covariance)[:, :, 0] * weight
        else:
            spread = weight * weight * covariance
        sign = torch.tensor([1.0, -1.0]).to(weight.device, non_blocking=True)
        return strength * (shift + 0.5 * sign * spread.sum(2))


def expected_ce(
    logits: Tensor,
    label: Tensor,
    table: Tensor,
    keep: Tensor,
    *,
    regions: bool = False,
    balanced: bool = False,
) -> Tensor:
    """Cross-entropy expected over augmented features, in its closed upper bound.

    Args:
        logits: (B, K, *), full resolution, of a linear classifier.
        label: (B, 1, *) integers in [0, K) where `keep` is True, free elsewhere; for regions
            (B, R, *) bool.
        table: from `class_shift`, or `region_shift` for regions; a table of zeros gives the plain
            cross-entropy.
        keep: (B, 1, *) bool, voxels to count.
        regions: binary cross-entropy, mean over regions.
        balanced: mean over the classes that are there (for regions over inside and outside of each)
            instead of over voxels.

    Returns:
        Scalar float32; 0 with zero gradient if nothing counts.
    """
    logits = logits.float()
    spatial = [1] * (logits.ndim - 2)
    if regions:
        label = label.bool()
        outside, inside = (table[:, i].view(1, -1, *spatial) for i in (0, 1))
        logits = logits + torch.where(label, inside, outside)
        loss = binary_cross_entropy_with_logits(logits, label.float(), reduction="none")
        parts = [part & keep for part in (label, ~label)]
        axes: tuple[int, ...] = (0, *range(2, logits.ndim))
    else:
        label = torch.where(keep, label, 0)[:, 0].long()
        # one row a voxel; the gradient of an embedding is summed by row without waiting
        logits = logits + embedding(label, table).movedim(-1, 1)
        loss = cross_entropy(logits, label, reduction="none")[:, None]
        parts = [(label == k)[:, None] & keep for k in range(logits.shape[1])] if balanced else []
        axes = tuple(range(loss.ndim))
    if not balanced:
        return (loss * keep).sum() / (keep.sum() * loss.shape[1]).clamp_min(1)
    sums = torch.stack([(loss * part).sum(axes) for part in parts])
    counts = torch.stack([part.sum(axes) for part in parts])
    return (sums / counts.clamp_min(1)).sum() / (counts > 0).sum().clamp_min(1)
