"""The brake: fades the unlabelled loss when the teacher loses a class."""

import math

import torch
from torch import Tensor, nn

from nnunet_ssl.functional import joint_sum


class ClassBrake(nn.Module):
    """Compare how often the teacher predicts each class with how often it is truly there.

    f_k is the share of class k among the teacher's voxels, g_k among true labels, both averaged
    over steps (EMA with bias correction) on patches drawn without forced foreground. A class that
    vanishes from the pseudo-labels lowers `value()` and with it the unlabelled loss; labelled
    learning goes on, and the brake opens again when the class is back.

    State: buffers `teacher_share`, `label_share` (K,) and their numbers of observations.

    Args:
        num_classes: K, foreground classes, or regions.
        decay: weight of the old shares per update.
        floor: f_k / g_k below which the brake acts.
        min_share: classes with a smaller true share are not watched.
    """

    teacher_share: Tensor
    label_share: Tensor
    teacher_count: Tensor
    label_count: Tensor

    def __init__(
        self, num_classes: int, decay: float = 0.999, floor: float = 0.2, min_share: float = 1e-5
    ):
        super().__init__()
        if not (0 < decay < 1 and floor > 0):
            raise ValueError(f"The brake needs 0 < decay < 1 and floor > 0; got {decay}, {floor}.")
        self.decay, self.floor, self.min_share = decay, floor, min_share
        self.register_buffer("teacher_share", torch.zeros(num_classes))
        self.register_buffer("label_share", torch.zeros(num_classes))
        self.register_buffer("teacher_count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("label_count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, teacher_share: Tensor, label_share: Tensor) -> None:
        """Add the shares of a step, each (K,) from `class_shares`.

        A vector with NaN (no patch without forced foreground in this step) leaves its side as is.
        """
        for average, count, share in (
            (self.teacher_share, self.teacher_count, teacher_share),
            (self.label_share, self.label_count, label_share),
        ):
            observed = share.isfinite().all()
            moved = self.decay * average + (1 - self.decay) * share
            average.copy_(torch.where(observed, moved, average))
            count.add_(observed)

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return the factor for the unlabelled loss: scalar in [0, 1], 1 = no brake.

        clip(min_k (f_k / g_k) / floor, 0, 1) over watched classes; 1 before the first observation
        of either side.
        """
        f = self._unbiased(self.teacher_share, self.teacher_count)
        g = self._unbiased(self.label_share, self.label_count)
        watched = (g > self.min_share) & (self.teacher_count > 0)
        ratios = torch.where(watched, f / torch.where(watched, g, 1), math.inf)
        return (ratios / self.floor).amin().clamp(0, 1)

    def _unbiased(self, average: Tensor, count: Tensor) -> Tensor:
        weight = -torch.expm1(count.clamp_min(1) * math.log(self.decay))  # 1 - decay^count
        return average / weight


@torch.no_grad()
def class_shares(
    labels: Tensor,
    valid: Tensor,
    num_classes: int,
    regions: bool,
    samples: Tensor | None = None,
) -> Tensor:
    """Return each foreground class's share of the voxels.

    Args:
        labels: (B, 1, *) integers; for regions (B, R, *) bool.
        valid: (B, 1, *) bool, voxels to count (False on padding and on ignored voxels).
        num_classes: classes with background, or regions.
        regions: labels hold one channel per region.
        samples: (B,) bool, samples to count; None counts all.

    Returns:
        (num_classes - 1,), entry 0 being class 1; for regions (num_classes,). In [0, 1]; NaN if no
        voxel counts. Over all processes. Counts are exact up to 2^24 voxels of a class.
    """
    if samples is not None:
        samples = samples.to(labels.device, non_blocking=True)
        valid = valid & samples.view(-1, *[1] * (labels.ndim - 1))
    found = class_counts(labels, valid, num_classes, regions)
    counts = joint_sum(torch.cat([found, valid.sum()[None]]))
    return counts[:-1] / counts[-1]


@torch.no_grad()
def class_counts(labels: Tensor, valid: Tensor, num_classes: int, regions: bool) -> Tensor:
    """Return how many voxels each foreground class has in this process; as `class_shares`."""
    if regions:
        return (labels.bool() & valid).sum((0, *range(2, labels.ndim)))
    counted = torch.where(valid, labels, -1).float()  # histc leaves out what lies outside
    return torch.histc(counted, num_classes, -0.5, num_classes - 0.5)[1:]
