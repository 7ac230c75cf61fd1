"""Supervised contrast in which each pair of a noisy label counts by how easy it is."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

Mode = Literal["linear", "hard"]
NOT_A_PAIR = -1e9  # as a similarity: exp gives 0, and sums of such rows stay finite


class PairLosses(NamedTuple):
    """Losses of all pairs of a batch, and which of them are positive.

    Attributes:
        loss: (M, M) float32, -log of the share of pair (i, j) among all pairs of i; 0 where `pair`
            is False.
        pair: (M, M) bool, both samples count and differ.
        positive: (M, M) bool, such pairs with one label.
    """

    loss: Tensor
    pair: Tensor
    positive: Tensor


def pair_losses(
    embedding: Tensor, labels: Tensor, temperature: float, counted: Tensor | None = None
) -> PairLosses:
    """Return the contrastive loss of each pair; all other samples stand in its denominator.

    Args:
        embedding: (M, E), of any length and precision; brought to unit length here.
        labels: (M,) integers; negative ones count as no label: such a sample has no positive pair,
            but is a negative of the others.
        temperature: tau, above 0.
        counted: (M,) bool; samples that are False take no part at all. None: all do.

    Raises:
        ValueError: the shapes do not fit, or the temperature is not above 0.

    Source: Peng et al. 2021, arXiv:2107.13741, Eq. 1; Khosla et al. 2020, arXiv:2004.11362.
    """
    if embedding.ndim != 2 or labels.shape != embedding.shape[:1]:
        raise ValueError(
            f"Embeddings (M, E) need labels (M,); got {tuple(embedding.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if not temperature > 0:
        raise ValueError(f"The temperature is above 0; got {temperature}.")
    with torch.autocast(embedding.device.type, enabled=False):
        unit = normalize(embedding.float(), dim=1)
        similarity = unit @ unit.T / temperature
    keep = torch.ones_like(labels, dtype=torch.bool) if counted is None else counted
    same = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    pair = keep[:, None] & keep[None] & ~same
    similarity = similarity.masked_fill(~pair, NOT_A_PAIR)
    loss = (similarity.logsumexp(1, keepdim=True) - similarity).masked_fill(~pair, 0)
    one_label = (labels[:, None] == labels[None]) & (labels >= 0)[:, None]
    return PairLosses(loss, pair, pair & one_label)


@torch.no_grad()
def pair_weights(loss: Tensor, gamma: Tensor | float, mode: Mode) -> Tensor:
    """Return the weights that minimise w loss + R(w) over w in [0, 1], without gradient.

    "hard": R = -gamma w, so w = 1 where loss <= gamma. "linear": R = gamma (w^2 / 2 - w), so
    w = max(0, 1 - loss / gamma).

    Args:
        loss: 0 or more, any shape.
        gamma: above 0; pairs with a larger loss weigh nothing.
        mode: form of R.

    Source: Peng et al. 2021, arXiv:2107.13741, Eq. 3.
    """
    if mode == "hard":
        return (loss <= gamma).to(loss.dtype)
    return (1 - loss / gamma).clamp_min(0)


def weighted_contrast(pairs: PairLosses, weights: Tensor) -> Tensor:
    """Return the mean over samples of the weighted mean over their positive pairs.

    Args:
        pairs: of `pair_losses`.
        weights: (M, M), in [0, 1]; detached here.

    Returns:
        Scalar; samples without a positive pair are left out, 0 if all are.

    Source: Peng et al. 2021, arXiv:2107.13741, Eq. 2; R has no gradient and is left out.
    """
    positives = pairs.positive.sum(1)
    total = (weights.detach() * pairs.loss * pairs.positive).sum(1)
    return (total / positives.clamp_min(1)).sum() / (positives > 0).sum().clamp_min(1)


@torch.no_grad()
def pace_bounds(
    pairs: PairLosses, temperature: float, start: float, end: float
) -> tuple[Tensor, Tensor]:
    """Return first and last gamma, in units that hold for any batch and any label.

    The mean loss over the P positive pairs of a sample is at least log P, reached when they lie on
    one point far from all others; no loss is above 2 / tau + log(pairs of a sample).

    Args:
        pairs: of `pair_losses`.
        temperature: tau.
        start: the first gamma is log P + start, P the mean number of positive pairs of a sample.
        end: the last gamma is `end` times the largest possible loss.

    Returns:
        Two scalars; both are equal where the last would be below the first.
    """
    positives = pairs.positive.sum(1)
    mean = positives.sum() / (positives > 0).sum().clamp_min(1)
    others = pairs.pair.sum(1).amax()
    first = mean.clamp_min(1).log() + start
    last = end * (2 / temperature + others.clamp_min(1).log())
    return first, torch.maximum(first, last)


def pace_at(progress: float, power: float = 0.5) -> float:
    """Return the part of the way from the first to the last gamma, in [0, 1].

    Args:
        progress: fraction of training done, in [0, 1].
        power: below 1 the pace is fast at first; published 1/2.

    Source: Peng et al. 2021, arXiv:2107.13741, code (PScheduler).
    """
    if not 0 < power < math.inf:
        raise ValueError(f"The power of the pace is above 0; got {power}.")
    return min(max(progress, 0.0), 1.0) ** power
