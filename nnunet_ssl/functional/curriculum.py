"""Weights that move from easy to hard voxels while training goes on."""

import torch
from torch import Tensor


@torch.no_grad()
def relative_rank(values: Tensor, valid: Tensor, bins: int = 4096) -> Tensor:
    """Return the rank of each voxel's value within its sample and channel.

    From a histogram over the logarithm of the values, so neither a sort nor waiting for the device;
    voxels of one bin share its middle rank.

    Args:
        values: (B, C, *), above 0.
        valid: (B, 1 or C, *) bool, voxels that are ranked.
        bins: of the histogram, between the smallest and the largest valid value.

    Returns:
        (B, C, *) in (-1, 1): 2 (h - 1/2) / V - 1 for rank h = 1..V of V voxels; the mean over a
        sample's valid voxels is 0. 0 where not valid.
    """
    valid = valid.expand_as(values).flatten(2)
    logs = values.float().clamp_min(torch.finfo(torch.float32).tiny).log().flatten(2)
    low = torch.where(valid, logs, torch.inf).amin(2, keepdim=True)
    high = torch.where(valid, logs, -torch.inf).amax(2, keepdim=True)
    place = (logs - low) / (high - low).clamp_min(1e-6) * bins
    index = torch.where(valid, place, 0).long().clamp_(0, bins - 1)
    counts = logs.new_zeros(*logs.shape[:2], bins).scatter_add_(2, index, valid.float())
    before_half = counts.cumsum(2) - counts / 2
    total = counts.sum(2, keepdim=True).clamp_min(1)
    rank = (2 * before_half / total - 1).gather(2, index)
    return torch.where(valid, rank, 0).view(values.shape)


@torch.no_grad()
def curriculum_weight(
    uncertainty: Tensor, valid: Tensor, progress: float, strength: float
) -> Tensor:
    """Return weights 1 + Xi tanh(rho zeta): sure voxels first, unsure ones last.

    rho in (-1, 1) is the rank of a voxel's uncertainty within its sample, zeta = 2 progress - 1.
    Where all uncertainties differ the mean over a sample is 1, so the scale of a loss stays.

    Args:
        uncertainty: (B, C, *), above 0.
        valid: (B, 1 or C, *) bool, voxels that are ranked.
        progress: fraction of training done, in [0, 1].
        strength: Xi, below 1 keeps weights above 0.

    Returns:
        (B, C, *) in 1 -+ Xi tanh(1); 1 where not valid; without gradient.

    Source: He et al. 2025 (MEDL), arXiv:2505.12418, Eq. 5 and 6. Its text has the ranks the other
        way round than its figure and its aim; this is the aim's.
    """
    return 1 + strength * (relative_rank(uncertainty, valid) * (2 * progress - 1)).tanh()
