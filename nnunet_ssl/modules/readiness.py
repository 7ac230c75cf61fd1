"""Readiness: opens the unlabelled loss as the student learns its annotated patches."""

import torch
from torch import Tensor, nn

from nnunet_ssl.functional import joint_sum
from nnunet_ssl.modules.brake import class_counts


class Readiness(nn.Module):
    """Follow how well the student knows annotated patches; pseudo-labels cannot be better.

    The Dice of each class is that of all annotated voxels of the last steps together (counts with
    exponentially falling weights). `value()` rises from 0 to 1 while their mean rises from `low`
    to `high`.

    State: buffers `hit` and `size` (K,), twice the voxels in both and the sum of both volumes.

    Args:
        num_classes: K, foreground classes, or regions.
        low: mean Dice up to which pseudo-labels do not count.
        high: mean Dice from which they count fully.
        decay: weight of the old counts per update.
    """

    hit: Tensor
    size: Tensor

    def __init__(self, num_classes: int, low: float, high: float, decay: float = 0.98):
        super().__init__()
        if not (low <= high and 0 <= decay < 1):
            raise ValueError(
                f"Readiness needs low <= high and 0 <= decay < 1; got {low}, {high}, {decay}."
            )
        self.low, self.high, self.decay = low, high, decay
        self.register_buffer("hit", torch.zeros(num_classes))
        self.register_buffer("size", torch.zeros(num_classes))

    @torch.no_grad()
    def update(self, counts: Tensor) -> None:
        """Add the counts of a step, (2, K) from `overlap_counts`."""
        self.hit.mul_(self.decay).add_(counts[0])
        self.size.mul_(self.decay).add_(counts[1])

    @torch.no_grad()
    def dice(self) -> Tensor:
        """Return the mean Dice of the classes that were seen, scalar; 0 before the first."""
        seen = self.size > 0
        dice = torch.where(seen, self.hit / torch.where(seen, self.size, 1), 0)
        return dice.sum() / seen.sum().clamp_min(1)

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return the factor for the unlabelled loss: scalar in [0, 1]."""
        dice = self.dice()
        if self.low == self.high:
            return (dice >= self.low).float()
        return ((dice - self.low) / (self.high - self.low)).clamp(0, 1)


@torch.no_grad()
def overlap_counts(
    labels: Tensor, target: Tensor, valid: Tensor, num_classes: int, regions: bool
) -> Tensor:
    """Return what the Dice of each foreground class is made of.

    Args:
        labels: predicted, (B, 1, *) integers; for regions (B, R, *) bool.
        target: true ones, alike.
        valid: (B, 1, *) bool, voxels to count.
        num_classes: classes with background, or regions.
        regions: one channel per region.

    Returns:
        (2, K): twice the voxels of the class in both, and the sum of its voxels in each; over all
        processes.
    """

    def count(x: Tensor, voxels: Tensor) -> Tensor:
        return class_counts(x, voxels, num_classes, regions)

    if regions:
        hit = count(labels.bool() & target.bool(), valid)
    else:
        hit = count(labels, valid & (labels == target))
    return joint_sum(torch.stack([2 * hit, count(labels, valid) + count(target, valid)]).float())
