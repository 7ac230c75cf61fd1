"""Contrast between the voxels of two networks, chosen by where their decisions agree."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot


class Places(NamedTuple):
    """Drawn voxels of a batch.

    Attributes:
        sample: (n,) index into the batch.
        voxel: (n,) index into the flattened voxels.
        counted: (n,) bool, False where there was nothing left to draw.
    """

    sample: Tensor
    voxel: Tensor
    counted: Tensor


@torch.no_grad()
def draw_places(
    label_a: Tensor,
    label_b: Tensor,
    valid: Tensor,
    num_classes: int,
    number: int,
    by_outcome: bool = True,
) -> Places:
    """Draw voxels without putting any back.

    Args:
        label_a: decisions of one network, (B, 1, *), in [0, K).
        label_b: those of the other one.
        valid: (B, 1, *) bool, voxels that may be drawn.
        num_classes: K with background.
        number: of voxels, over the whole batch; all of them if there are fewer.
        by_outcome: about as many voxels of each outcome: both say background; both say k; one of
            them says k (for each foreground class k). False draws all voxels alike.

    Returns:
        Voxels; drawn from the generator of the device, without waiting for it.
    """
    k, voxels = num_classes, label_a[0].numel()
    pair = (label_a * k + label_b).flatten()
    weight = valid.flatten().float()
    if by_outcome:
        counts = weight.new_zeros(k * k).scatter_add_(0, pair, weight).view(k, k)
        agreed = counts.diagonal()
        disagreed = counts.sum(0) + counts.sum(1) - 2 * agreed
        share = torch.where(disagreed > 0, 1 / disagreed, 0)
        share[0] = 0  # only one of them says background: counted for the other's class
        table = share[:, None] + share[None]
        table.diagonal().copy_(torch.where(agreed > 0, 1 / agreed, 0))
        weight = weight * table.flatten()[pair]
    # the largest w / e with exponential e: as drawn one after the other with chances by w
    key, index = (weight / torch.empty_like(weight).exponential_()).topk(min(number, len(weight)))
    return Places(index.div(voxels, rounding_mode="floor"), index % voxels, key > 0)


def gather_places(t: Tensor, places: Places) -> Tensor:
    """Return the channels at places, (n, C), of a map (B, C, *)."""
    return t.flatten(2)[places.sample, :, places.voxel]


def outcome_contrast(
    a: Tensor,
    b: Tensor,
    label_a: Tensor,
    label_b: Tensor,
    counted: Tensor,
    num_classes: int,
    temperature: float,
) -> Tensor:
    """Pull two networks' embeddings of a voxel together, apart from those of other outcomes.

    For each foreground class k let I be the voxels that both networks call k, O those that at least
    one does. Anchors are the voxels of I with all outside of I as negatives, and those outside of O
    with all of O; so the zone O without I, mostly boundaries, is a negative for both.

        mean over anchors p of  - log e^{s_pp} / (e^{s_pp} + sum_q e^{s_pq}),  s = a . b / tau

    Both networks take the part of the anchor in turn; mean over both and over classes with an I. A
    class with fewer voxels in I than an equal part of the drawn ones, n / (2 K - 1), counts less by
    that ratio.

    Args:
        a: embeddings of drawn voxels, (n, E), of length 1. Run without autocast.
        b: those of the other network at the same voxels.
        label_a: (n,) decisions, in [0, K).
        label_b: those of the other network.
        counted: (n,) bool.
        num_classes: K with background.
        temperature: tau, at least 0.025 (for float32).

    Returns:
        Scalar; 0 with zero gradient if the networks agree on no foreground voxel.

    Deviates: not the released formula, which drives agreeing voxels apart; and without the ratio
    the first voxels that networks agree on outweigh the annotated loss.

    Source: the aim of He et al. 2025 (C3S3), arXiv:2506.07368; their code is `iuc_contrast`.
    """
    agreed, either = _outcomes(label_a, label_b, num_classes)
    both, keep = agreed & counted[:, None], counted[:, None]
    anchors = torch.cat([both, ~either & keep], 1).float()
    negatives = torch.cat([~agreed & keep, either & keep], 1).float()
    present = both.any(0).sum().clamp_min(1)
    quota = counted.sum() / (2 * num_classes - 1)
    # Deviates: released, a class counts in full from its first agreed voxel
    share = (both.sum(0) / quota.clamp_min(1)).clamp_max(1).repeat(2)
    similarity = a @ b.T / temperature
    loss = similarity.new_zeros(())
    for s in (similarity, similarity.T):
        top = s.detach().amax(1, keepdim=True)
        own = s.diagonal()[:, None] - top
        total = own.exp() + (s - top).exp() @ negatives
        mean = ((total.log() - own) * anchors).sum(0) / anchors.sum(0).clamp_min(1)
        loss = loss + (mean * share).sum() / present
    return loss / 2


def iuc_contrast(
    a: Tensor,
    b: Tensor,
    label_a: Tensor,
    label_b: Tensor,
    counted: Tensor,
    num_classes: int,
    temperature: float,
) -> Tensor:
    """The contrast as released, of voxels with themselves only; see `outcome_contrast`.

        l1_p = - log e^{I_p s_p} / (sum_q e^{(1 - I_q) s_q} + e^{I_p s_p}),  s_p = a_p . b_p / tau
        l2_p the same with 1 - O for I; mean over p of l1 + l2, mean over foreground classes

    A large constant (log(n + 1) each for s = 0); it drives the networks' embeddings apart, at
    disagreements most. What is masked enters the sums as e^0 = 1. A class that no network finds
    still has l2 over all voxels.

    Args:
        a: see `outcome_contrast`, also for the others; voxels drawn alike (`by_outcome=False`).
        b: same.
        label_a: same.
        label_b: same.
        counted: same.
        num_classes: same.
        temperature: same.

    Returns:
        Scalar; 0 with zero gradient if nothing counts.

    Source: He et al. 2025 (C3S3), arXiv:2506.07368, code (ContrastiveLoss.py), stable.
    """
    agreed, either = _outcomes(label_a, label_b, num_classes)
    s = ((a * b).sum(1) / temperature)[:, None]
    keep = counted[:, None]
    loss = s.new_zeros(agreed.shape[1])
    for own in (agreed, ~either):
        others = torch.where(keep, torch.where(own, 0, s), -torch.inf).logsumexp(0)
        mine = torch.where(own, s, 0)
        loss = loss + (torch.logaddexp(others, mine) - mine).where(keep, 0).sum(0)
    return loss.mean() / keep.sum().clamp_min(1)


def _outcomes(label_a: Tensor, label_b: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return for each foreground class whether both and whether either says so, (n, K - 1)."""
    in_a, in_b = (one_hot(label, num_classes)[:, 1:].bool() for label in (label_a, label_b))
    return in_a & in_b, in_a | in_b
