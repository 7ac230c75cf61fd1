"""Two networks compete for who teaches."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from nnunet_ssl.functional.consistency import prob_mse


@torch.no_grad()
def competition_score(logits: Tensor, target: Tensor, counted: Tensor, ce_share: float) -> Tensor:
    """Return how badly a network does on annotated patches; smaller wins.

        a CE + (1 - a) (1 - mean Dice of the foreground classes in the patches)

    Cross-entropy alone where the patches hold no foreground. Deviates: published with a squared
    denominator, sample by sample, and near 0 or 1 without foreground.

    Args:
        logits: (B, K, *).
        target: (B, 1, *) labels, free where not counted.
        counted: (B, 1, *) bool.
        ce_share: a.

    Returns:
        Scalar, without gradient.

    Source: He et al. 2025 (C3S3), arXiv:2506.07368, code.
    """
    label = torch.where(counted, target, 0).long()
    ce = cross_entropy(logits.float(), label[:, 0], reduction="none")[:, None]
    classes = torch.arange(1, logits.shape[1], device=logits.device)
    truth = (label == classes.view(1, -1, *[1] * (logits.ndim - 2))) & counted
    prob = logits.float().softmax(1)[:, 1:] * counted
    axes = (0, *range(2, logits.ndim))
    size = truth.sum(axes)
    dice = 2 * (prob * truth).sum(axes) / (prob.sum(axes) + size).clamp_min(1e-5)
    present = size > 0  # Deviates: without foreground the published Dice is chance
    missed = ((1 - dice) * present).sum() / present.sum().clamp_min(1)
    return ce_share * (ce * counted).sum() / counted.sum().clamp_min(1) + (1 - ce_share) * missed


def competition_loss(
    logits_a: Tensor, logits_b: Tensor, a_wins: Tensor, temperature: float, mask: Tensor
) -> Tensor:
    """Mean squared distance of the loser's probabilities to the winner's sharpened ones.

    The winner's are softmax(z / T) = p^(1/T) / sum p^(1/T), without gradient; so the winner gets a
    gradient of exactly 0.

    Args:
        logits_a: (B, K, *).
        logits_b: (B, K, *).
        a_wins: bool scalar.
        temperature: T.
        mask: (B, 1, *) bool, voxels to count.

    Source: He et al. 2025 (C3S3), arXiv:2506.07368, code.
    """
    winner = torch.where(a_wins, logits_a, logits_b).detach().float()
    loser = torch.where(a_wins, logits_b, logits_a).float()
    return prob_mse(loser.softmax(1), (winner / temperature).softmax(1), mask)


def view_cosine(logits: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """One minus the cosine between two views' logits over the classes, mean over voxels.

    Args:
        logits: (B, K, *); gradient into both.
        other: the same voxels in another view.
        mask: (B, 1, *) bool, voxels to count.

    Source: He et al. 2025 (C3S3), arXiv:2506.07368. Deviates: their code takes the cosine along the
        last image axis.
    """
    # Deviates: along the classes
    distance = 1 - cosine_similarity(logits.float(), other.float(), dim=1)[:, None]
    return (distance * mask).sum() / mask.sum().clamp_min(1)
