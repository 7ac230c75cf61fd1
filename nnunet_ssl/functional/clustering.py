"""Correlation clustering: similar places into the same group, without labels."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def affinity(feature: Tensor, temperature: float) -> Tensor:
    """Return how much two places of a sample want to be in one group.

    Args:
        feature: (B, N, A), N places; detached, and normalised to length 1 here.
        temperature: tau; places whose cosine is above 1 / tau attract each other.

    Returns:
        (B, N, N) float32: F F' - max(F F') / tau, the maximum being 1.

    Source: Aflalo et al. 2023 (DeepCut), arXiv:2212.05853, as GraphCL (ICML 2025) takes it up.
    """
    with torch.autocast(feature.device.type, enabled=False):
        unit = normalize(feature.detach().float(), dim=2)
        return unit @ unit.transpose(1, 2) - 1 / temperature


def clustering_loss(affinities: Tensor, assignment: Tensor) -> Tensor:
    """Mean affinity of pairs of places within groups, negative: -Tr(W S S') / N^2.

    Args:
        affinities: W, (B, N, N).
        assignment: S, (B, N, groups), rows sum to 1.

    Returns:
        Scalar mean over samples, float32. Deviates: published as a sum over pairs, which depends
        on the number of places.
    """
    with torch.autocast(assignment.device.type, enabled=False):
        assignment = assignment.float()
        # Deviates: a mean over pairs of a sample
        within = (assignment.transpose(1, 2) @ affinities @ assignment).diagonal(dim1=1, dim2=2)
        return -within.sum(1).mean() / assignment.shape[1] ** 2
