"""Soft groups of the places of a feature map."""

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, normalize


class TokenClusters(nn.Module):
    """One graph convolution and a perceptron that assign places to groups.

    Places pass their features to those that attract them, see `functional.affinity`.

    Args:
        size: channels of the feature map.
        groups: number of groups.
        hidden: channels after the graph convolution; half of it inside the perceptron.

    Source: Aflalo et al. 2023 (DeepCut), arXiv:2212.05853; sizes as there.
    """

    def __init__(self, size: int, groups: int, hidden: int = 64):
        super().__init__()
        self.graph = nn.Linear(size, hidden)
        self.assign = nn.Sequential(
            nn.Linear(hidden, hidden // 2), nn.ELU(), nn.Linear(hidden // 2, groups)
        )

    def forward(self, feature: Tensor, affinities: Tensor) -> Tensor:
        """Return the assignment (B, N, groups) float32, rows sum to 1.

        Args:
            feature: (B, N, A).
            affinities: (B, N, N); each place attracts itself.
        """
        with torch.autocast(feature.device.type, enabled=False):
            attracted = affinities.clamp_min(0)
            passed = attracted / attracted.sum(2, keepdim=True).clamp_min(1e-6)
            hidden = elu(self.graph(passed @ normalize(feature.float(), dim=2)))
            return self.assign(hidden).softmax(2)
