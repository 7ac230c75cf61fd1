"""nnU-Net's CE + Dice over a part of the voxels."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from nnunet_ssl.functional.joint import shared_count


def masked_ce_dice(
    logits: Tensor,
    target: Tensor,
    keep: Tensor,
    *,
    dice: Callable[..., Tensor],
    regions: bool = False,
    ce_weight: float = 1.0,
) -> Tensor:
    """Cross-entropy plus nnU-Net's Dice over the voxels to keep, normalised by their number.

    Args:
        logits: (B, C, *), before softmax or sigmoid.
        target: (B, 1, *) integers, in [0, C) where they are kept; for regions (B, C, *) bool.
        keep: (B, 1, *) bool.
        dice: nnU-Net's loss, called with logits, target and `loss_mask`.
        regions: channels are independent regions; their binary cross-entropies are summed.
        ce_weight: weight of the cross-entropy.

    Returns:
        Scalar: ce_weight * sum CE / #kept voxels (of all processes) + dice. No gradient where
        `keep` is False.

    Source: nnU-Net's `DC_and_CE_loss` and `DC_and_BCE_loss` with an ignore label; these ask on the
        host whether any voxel counts.
    """
    if regions:
        target = target.bool()
        ce = binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
        total = (ce * keep).sum()
    else:
        label = torch.where(keep, target, -1)[:, 0].long()
        total = cross_entropy(logits, label, ignore_index=-1, reduction="sum")
        # nnU-Net's type of masks, also for pseudo-labels: each type compiles the Dice once more
        target = torch.where(keep, target, 0).short()
    return ce_weight * total / shared_count(keep.sum()) + dice(logits, target, loss_mask=keep)
