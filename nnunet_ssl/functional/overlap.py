"""Soft Dice with background."""

import torch
from torch import Tensor

from nnunet_ssl.functional.outputs import to_prob


def squared_dice_loss(logits: Tensor, label: Tensor, mask: Tensor, regions: bool = False) -> Tensor:
    """One minus the mean Dice of all classes, with background and squared probabilities.

    For regions, inside and outside of each count as two classes.

    Args:
        logits: (B, K, *).
        label: (B, 1, *) integers in [0, K), or (B, K, *) bool for regions; no gradient.
        mask: (B, 1, *) bool, voxels to count.
        regions: channels are independent regions.

    Returns:
        Scalar in [0, 1], sums over the batch; 0 if nothing counts.

    Raises:
        ValueError: shapes do not fit.

    Source: Milletari et al. 2016 (V-Net), arXiv:1606.04797; mutual loss of Chi et al. 2024 (ABD),
        code, smooth 1e-5.
    """
    one = (logits.shape[0], 1, *logits.shape[2:])
    expected = tuple(logits.shape) if regions else one
    if tuple(label.shape) != expected or tuple(mask.shape) != one:
        raise ValueError(
            f"For logits {tuple(logits.shape)} the label must be {expected} and the mask {one}; "
            f"got {tuple(label.shape)} and {tuple(mask.shape)}."
        )
    prob = to_prob(logits, regions)
    if regions:
        prob, target = torch.cat([prob, 1 - prob], 1), torch.cat([label, ~label], 1)
    else:
        classes = torch.arange(logits.shape[1], device=logits.device)
        target = label == classes.view(1, -1, *[1] * (logits.ndim - 2))
    return 1 - _squared_dice(prob, target.float(), mask)


def soft_target_dice_loss(
    logits: Tensor, target_prob: Tensor, mask: Tensor, regions: bool = False
) -> Tensor:
    """One minus the mean Dice with background against probabilities: 0 exactly where both agree.

    nnU-Net's Dice does not square its denominator: with a soft target it is above 0 at the target
    itself and drives the network away from it.

    Args:
        logits: (B, K, *).
        target_prob: (B, K, *), in [0, 1]; no gradient.
        mask: (B, 1, *) bool, voxels to count.
        regions: channels are independent regions; inside and outside of each count as two classes.

    Returns:
        Scalar in [0, 1], sums over the batch; 0 if nothing counts.

    Raises:
        ValueError: shapes do not fit.

    Source: Yeung et al. 2025 (M&N), arXiv:2509.15167 (code).
    """
    check_soft_target(logits, target_prob, mask)
    prob, target = to_prob(logits, regions), target_prob.detach().float()
    if regions:
        prob, target = torch.cat([prob, 1 - prob], 1), torch.cat([target, 1 - target], 1)
    return 1 - _squared_dice(prob, target, mask)


def check_soft_target(logits: Tensor, target_prob: Tensor, mask: Tensor) -> None:
    """Raise ValueError unless target and mask fit logits (B, K, *)."""
    one = (logits.shape[0], 1, *logits.shape[2:])
    if target_prob.shape != logits.shape or tuple(mask.shape) != one:
        raise ValueError(
            f"For logits {tuple(logits.shape)} the target must be as large and the mask {one}; got "
            f"{tuple(target_prob.shape)} and {tuple(mask.shape)}."
        )


def _squared_dice(prob: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    axes = (0, *range(2, prob.ndim))
    prob, target = prob * mask, target * mask
    both = (prob * target).sum(axes)
    dice = (2 * both + 1e-5) / ((prob**2).sum(axes) + (target**2).sum(axes) + 1e-5)
    return dice.mean()
