"""CE + Dice on pseudo-labels, apart from the true labels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from nnunet_ssl.functional.joint import joint_sum, shared_count


def pseudo_ce_dice(
    logits: Tensor,
    pseudo_label: Tensor,
    weight: Tensor,
    pseudo_voxels: Tensor,
    *,
    regions: bool = False,
    min_voxels: int,
    ce_weight: float = 1.0,
    dice_weight: float = 1.0,
) -> Tensor:
    """Cross-entropy minus mean Dice, counted on pseudo-labelled voxels only.

    Pooled with true labels in one batch Dice, a class that the teacher lost would be pushed down
    at every pseudo-labelled voxel; hence the separate loss. A class absent from the pseudo-label
    gets no Dice gradient at all, and a tiny one an enormous one per voxel; hence `min_voxels`.
    The divisor of the cross-entropy makes low coverage a small loss.

    Args:
        logits: (B, C, *), before softmax or sigmoid.
        pseudo_label: (B, 1, *) integers in [0, C) where `weight` is above 0, free elsewhere; for
            regions (B, C, *) bool.
        weight: (B, 1, *), or (B, C, *) for regions: 1 or True where the pseudo-label counts, 0
            elsewhere and at all other voxels; values between scale both terms.
        pseudo_voxels: (B, 1, *) bool, voxels whose target is a pseudo-label, counted or not.
        regions: channels are independent regions: binary CE, Dice over all of them.
        min_voxels: classes (regions) with less counted pseudo-label are left out of the Dice; 0
            keeps all, absent ones too, as nnU-Net does.
        ce_weight: weight of the cross-entropy.
        dice_weight: weight of the Dice; 0 leaves it out.

    Returns:
        Scalar: ce_weight * sum(weight * CE) / #pseudo voxels (and regions) - dice_weight * mean
        Dice, summed over the batch and without background, of the classes kept; the number of
        voxels and the sums of the Dice are those of all processes. 0 with zero gradient if nothing
        counts. No gradient into labels or weights, nor into logits where `weight` is 0.

    Raises:
        ValueError: shapes do not fit.

    Source: nnU-Net's `DC_and_CE_loss` and `DC_and_BCE_loss` (smooth 1e-5, batch Dice); divisor from
        Sohn et al. 2020 (FixMatch), arXiv:2001.07685, Eq. 4.
    """
    one = (logits.shape[0], 1, *logits.shape[2:])
    label_shape = tuple(logits.shape) if regions else one
    if (
        tuple(pseudo_label.shape) != label_shape
        or tuple(weight.shape) not in (one, label_shape)
        or tuple(pseudo_voxels.shape) != one
    ):
        raise ValueError(
            f"For logits {tuple(logits.shape)} the pseudo-label must be {label_shape}, its weight "
            f"{label_shape}, pseudo_voxels {one}; got {tuple(pseudo_label.shape)}, "
            f"{tuple(weight.shape)}, {tuple(pseudo_voxels.shape)}."
        )
    logits = logits.float()
    weight = weight.detach().float()
    loss = logits.new_zeros(())
    if regions:
        target = pseudo_label.detach().bool()
    else:
        label = torch.where(weight > 0, pseudo_label.detach(), 0).long()
        classes = torch.arange(1, logits.shape[1], device=logits.device)
        target = label == classes.view(1, -1, *[1] * (logits.ndim - 2))
    if ce_weight:
        total = shared_count(pseudo_voxels.sum())
        if regions:
            ce = binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
            total = total * logits.shape[1]
        else:
            ce = cross_entropy(logits, label[:, 0], reduction="none")[:, None]
        loss = ce_weight * (weight * ce).sum() / total
    if dice_weight:
        prob = logits.sigmoid() if regions else logits.softmax(1)[:, 1:]
        loss = loss - dice_weight * _mean_dice(prob, target, weight, min_voxels)
    return loss


def _mean_dice(prob: Tensor, target: Tensor, weight: Tensor, min_voxels: int) -> Tensor:
    axes = (0, *range(2, prob.ndim))
    prob = prob * weight
    sums = (prob * target).sum(axes), (target * weight).sum(axes), prob.sum(axes)
    intersection, in_target, in_prob = joint_sum(torch.stack(sums))
    dice = (2 * intersection + 1e-5) / (in_target + in_prob + 1e-5)
    kept = in_target >= min_voxels
    return (dice * kept).sum() / kept.sum().clamp_min(1)


def deep_supervised(
    loss_fn: Callable[..., Tensor],
    outputs: Sequence[Tensor],
    *targets: Sequence[Tensor],
    weights: Sequence[float],
) -> Tensor:
    """Weighted sum of `loss_fn(output, *targets)` over scales; scales of weight 0 are skipped.

    Args:
        loss_fn: called with one output and, for each of `targets`, its entry at that scale.
        outputs: logits per scale, full resolution first.
        targets: lists as long as `outputs`, e.g. from `downsample`.
        weights: one per scale; nnU-Net's are 1, 1/2, 1/4, ..., 0, normalised to sum 1.

    Raises:
        ValueError: lists differ in length, or all weights are 0.
    """
    lengths = [len(outputs), *(len(t) for t in targets), len(weights)]
    if len(set(lengths)) > 1:
        raise ValueError(f"Outputs, targets and weights differ in number of scales: {lengths}.")
    terms = [
        float(weight) * loss_fn(*scale)
        for weight, *scale in zip(weights, outputs, *targets, strict=True)
        if weight != 0
    ]
    if not terms:
        raise ValueError("All deep-supervision weights are 0.")
    return torch.stack(terms).sum()
