"""Losses whose targets are probabilities."""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from nnunet_ssl.functional.overlap import check_soft_target


def soft_target_kl(
    logits: Tensor, target_prob: Tensor, mask: Tensor, regions: bool = False
) -> Tensor:
    """Mean Kullback-Leibler divergence of the output from a soft target; 0 where both agree.

    For targets of 0 and 1 this is the cross-entropy.

    Args:
        logits: (B, K, *).
        target_prob: (B, K, *), in [0, 1]; no gradient.
        mask: (B, 1, *) bool, voxels to count.
        regions: channels are independent regions: two classes each.

    Returns:
        Scalar, 0 or more: the sum over classes, averaged over counted voxels (and regions); 0 if
        nothing counts.

    Raises:
        ValueError: shapes do not fit.

    Source: Yeung et al. 2025 (M&N), arXiv:2509.15167 (code), which averages over classes too.
    """
    check_soft_target(logits, target_prob, mask)
    logits, target = logits.float(), target_prob.detach().float()
    if regions:
        entropy = -torch.xlogy(target, target) - torch.xlogy(1 - target, 1 - target)
        ce = binary_cross_entropy_with_logits(logits, target, reduction="none")
        divergence = (ce - entropy).mean(1, keepdim=True)
    else:
        log_prob = logits.log_softmax(1)
        divergence = (torch.xlogy(target, target) - target * log_prob).sum(1, keepdim=True)
    return (divergence * mask).sum() / mask.sum().clamp_min(1)
