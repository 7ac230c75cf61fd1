"""Entropy of predictions."""

import math

import torch
from torch import Tensor


def normalized_entropy(prob: Tensor, regions: bool) -> Tensor:
    """Return how undecided a prediction is: 0 where sure, 1 where all classes are equally likely.

    Args:
        prob: (B, C, *), in [0, 1].
        regions: channels are independent regions, each a decision between inside and outside.

    Returns:
        -sum_c p_c ln(p_c + 1e-6) / ln C, (B, 1, *) float32 in [0, 1); for regions of (p, 1 - p)
        with C = 2, (B, C, *). The 1e-6 keeps the uniform prediction just under 1.

    Source: Yu et al. 2019, arXiv:1907.07034, Eq. 2.
    """
    prob = prob.float()
    if regions:
        sides = torch.stack([prob, 1 - prob])
        return -(sides * (sides + 1e-6).log()).sum(0) / math.log(2)
    return -(prob * (prob + 1e-6).log()).sum(1, keepdim=True) / math.log(prob.shape[1])
