"""Running mean and covariance of the features of each class."""

import torch
from torch import Tensor, nn

from nnunet_ssl.functional import Moments, merged_moments


class ClassMoments(nn.Module):
    """What is known of the features of each group of voxels; averaged over steps.

    State: buffers `mean` (G, A), `covariance` (G, A, A) or (G, A), `count` (G,) voxels seen. A
    group that was never seen has zeros.

    Args:
        groups: G, classes; for regions 2 R, outside and inside of each.
        size: A, channels of the feature.
        decay: weight of the old moments per update; the first update of a group replaces them.
        diagonal: only variances.
    """

    mean: Tensor
    covariance: Tensor
    count: Tensor

    def __init__(self, groups: int, size: int, decay: float = 0.99, diagonal: bool = False):
        super().__init__()
        self.decay, self.diagonal = decay, diagonal
        shape = (groups, size) if diagonal else (groups, size, size)
        self.register_buffer("mean", torch.zeros(groups, size))
        self.register_buffer("covariance", torch.zeros(shape))
        self.register_buffer("count", torch.zeros(groups))

    @torch.no_grad()
    def update(self, new: Moments) -> None:
        """Move towards the moments of a step; groups of number 0, or not finite, stay as they are.

        One overflow would otherwise make all later tables, so all later unlabelled losses, NaN.
        """
        finite = new.mean.isfinite().all(1) & new.covariance.flatten(1).isfinite().all(1)
        new = new._replace(number=torch.where(finite, new.number, 0))
        rate = torch.where(self.count > 0, 1 - self.decay, 1.0)
        merged = merged_moments(Moments(self.mean, self.covariance, self.count), new, rate)
        for buffer, value in zip((self.mean, self.covariance, self.count), merged, strict=True):
            buffer.copy_(value)

    def seen(self) -> Tensor:
        """Return which groups were seen: (G,) bool."""
        return self.count > 0
