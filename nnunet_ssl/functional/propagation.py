"""Labels that spread from annotated to unlabelled voxels by the likeness of their features."""

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot, softplus

from nnunet_ssl.functional.selection import Places

FAR = -1e4  # a logit that no sum of exponentials notices; finite, so that gradients are


@torch.no_grad()
def draw_per_class(label: Tensor, keep: Tensor, num_classes: int, number: int) -> Places:
    """Draw voxels of each class without putting any back.

    Args:
        label: (B, 1, *) integers.
        keep: (B, 1, *) bool, voxels that may be drawn.
        num_classes: K with background.
        number: n, voxels a class over the whole batch.

    Returns:
        K n voxels, class after class; where a class has fewer, the rest is not `counted`. One map
        of random numbers from the generator of the device, without waiting for it.
    """
    flat, keep = label.flatten(), keep.flatten()
    order = torch.rand(len(flat), device=label.device)
    number = min(number, len(flat))
    drawn = [
        torch.where((flat == k) & keep, order, -1).topk(number, sorted=False)
        for k in range(num_classes)
    ]
    index = torch.cat([d.indices for d in drawn])
    counted = torch.cat([d.values for d in drawn]) >= 0
    voxels = label[0].numel()
    return Places(index.div(voxels, rounding_mode="floor"), index % voxels, counted)


def propagation_loss(
    embedding: Tensor,
    prototypes: Tensor,
    known: Tensor,
    counted: Tensor,
    temperature: float,
    similar: float,
    dissimilar: float,
) -> Tensor:
    """Pull unlabelled voxels to the class they are most like, and push the least similar away.

    With s_vc the cosine of voxel v and class c: each voxel belongs to its most similar class. Of
    the voxels of a class the most similar ones are positives P_c, of all voxels the least similar
    ones are its negatives N_c.

        - mean_c mean_{v in P_c} log e_vc / (e_vc + sum_{w in N_c} e_wc),  e_vc = e^{s_vc / tau}

    Args:
        embedding: (n, E), any length; normalised here. Run without autocast.
        prototypes: direction of the labelled features of each class, (K, E) of length 1; detached
            here.
        known: (K,) bool, classes that have one; the others take no part.
        counted: (n,) bool, voxels that exist.
        temperature: tau, above 0.
        similar: share of a class's voxels that are positives, in (0, 1].
        dissimilar: share of all voxels that are negatives of a class, in (0, 1].

    Returns:
        Scalar float32, mean over classes with positives; 0 with zero gradient if there are none, or
        fewer than two classes are known. Shares are rounded up.

    Source: the aim of Guo et al. 2025 (Diff-CL), arXiv:2503.09408; the formula is ours.
    """
    similarity = normalize(embedding.float(), dim=1) @ prototypes.detach().float().T
    own = torch.where(known, similarity, -torch.inf).argmax(1)
    assigned = one_hot(own, len(prototypes)).bool() & counted[:, None] & known
    positive = _foremost(similarity, assigned, similar)
    candidates = (counted[:, None] & known).expand_as(similarity)
    negative = _foremost(-similarity, candidates, dissimilar) & ~positive
    logits = similarity / temperature
    against = torch.where(negative, logits, FAR).logsumexp(0)
    # -log of the share of the positive
    loss = softplus(against - logits)
    mean = (loss * positive).sum(0) / positive.sum(0).clamp_min(1)
    present = positive.any(0) & (known.sum() >= 2)
    return (mean * present).sum() / present.sum().clamp_min(1)


def _foremost(values: Tensor, mask: Tensor, share: float) -> Tensor:
    """Return which entries are among this share of a column's masked ones with the highest values.

    Args:
        values: (n, K); no gradient.
        mask: (n, K) bool.
        share: in (0, 1], of each column's count, rounded up.
    """
    values = torch.where(mask, values.detach(), -torch.inf)
    rank = values.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    return mask & (rank < (share * mask.sum(0)).ceil())
