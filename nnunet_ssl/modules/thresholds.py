"""Confidence thresholds per class."""

import torch
from torch import Tensor, nn

from nnunet_ssl.functional import confidence, hard_labels


class ClassThresholds(nn.Module):
    """Keep the surest part of each predicted class: tau_k = clip(Q_k, low, high).

    Q_k is a low quantile of the confidence over the voxels predicted as class k, so a threshold
    depends on how sure the teacher is within a class, not on how large the class is. Confidences
    are collected in one histogram per class, averaged over steps. State: the buffer `histogram`
    (K, bins), each row summing to 1, or to 0 before its class was seen.

    For regions, Q_k is taken over voxels predicted inside region k (p > 0.5) and the threshold acts
    on max(p, 1 - p).

    Args:
        num_classes: K, classes with background, or regions.
        low: smallest threshold; also used for classes not seen yet.
        high: largest threshold.
        quantile: share of each class that may be dropped.
        decay: weight of the old histogram per update.
        bins: resolution of the histogram over [0, 1].
        regions: channels are independent regions.
    """

    histogram: Tensor

    def __init__(
        self,
        num_classes: int,
        low: float = 0.60,
        high: float = 0.95,
        quantile: float = 0.20,
        decay: float = 0.99,
        bins: int = 64,
        regions: bool = False,
    ):
        super().__init__()
        if not 0 <= low <= high <= 1:
            raise ValueError(f"Thresholds must satisfy 0 <= low <= high <= 1; got {low}, {high}.")
        self.low, self.high, self.quantile = low, high, quantile
        self.decay, self.bins, self.regions = decay, bins, regions
        self.register_buffer("histogram", torch.zeros(num_classes, bins))

    @torch.no_grad()
    def thresholds(self) -> Tensor:
        """Return tau (K,), in [low, high]."""
        cumulative = self.histogram.cumsum(1)
        below = cumulative < self.quantile * cumulative[:, -1:]
        bin_ = below.sum(1, keepdim=True).clamp_max(self.bins - 1)
        content = self.histogram.gather(1, bin_)
        before = cumulative.gather(1, bin_) - content
        inside = (self.quantile * cumulative[:, -1:] - before) / content.clamp_min(1e-12)
        quantile = (bin_ + inside.clamp(0, 1)) / self.bins
        # a class without voxels has an empty histogram
        quantile = torch.where(cumulative[:, -1:] > 0, quantile, self.low)
        return quantile[:, 0].clamp(self.low, self.high)

    def mask(self, prob: Tensor) -> Tensor:
        """Return which voxels are sure enough: confidence >= tau of the predicted class.

        Args:
            prob: (B, K, *), in [0, 1].

        Returns:
            (B, 1, *) bool; for regions (B, K, *), each region by its own threshold.
        """
        prob = prob.float()
        tau = self.thresholds()
        if self.regions:
            tau = tau.view(1, -1, *[1] * (prob.ndim - 2))
        else:
            tau = tau[hard_labels(prob, regions=False)]
        return confidence(prob, self.regions) >= tau

    def update(self, prob: Tensor, valid: Tensor) -> None:
        """Add the teacher's prediction of a step; see `update_from_histogram`."""
        histogram = self.confidence_histogram(prob, valid, self.bins, self.regions)
        self.update_from_histogram(histogram)

    @torch.no_grad()
    def update_from_histogram(self, histogram: Tensor) -> None:
        """Move each class's histogram towards the one of a step.

        The first observation of a class replaces its row; a class absent from the step keeps it.

        Args:
            histogram: (K, bins) counts, from `confidence_histogram`; sums over chunks or devices
                are fine.
        """
        total = histogram.sum(1, keepdim=True)
        new = histogram / total.clamp_min(1)
        seen = self.histogram.sum(1, keepdim=True) > 0
        moved = torch.where(seen, self.decay * self.histogram + (1 - self.decay) * new, new)
        self.histogram.copy_(torch.where(total > 0, moved, self.histogram))

    @staticmethod
    @torch.no_grad()
    def confidence_histogram(prob: Tensor, valid: Tensor, bins: int, regions: bool) -> Tensor:
        """Count voxels by predicted class and confidence.

        Args:
            prob: (B, K, *), in [0, 1]; voxels that are not finite are skipped.
            valid: (B, 1, *) bool, voxels to count (False on padding).
            bins: number of equal bins over [0, 1].
            regions: count per region the voxels predicted inside it.

        Returns:
            (K, bins) float32 counts, exact up to 2^24 per bin.
        """
        prob = prob.float()
        classes = prob.shape[1]
        sure = confidence(prob, regions)
        if regions:
            row = torch.arange(classes, device=prob.device).view(1, -1, *[1] * (prob.ndim - 2))
            counted = valid & hard_labels(prob, regions)
        else:
            row = hard_labels(prob, regions)
            counted = valid & sure.isfinite()
        cell = row * bins + (sure * bins).floor().clamp(0, bins - 1)
        # histc ignores what lies outside and, unlike bincount, does not wait for the device
        cell = torch.where(counted, cell + 0.5, -1.0)
        return torch.histc(cell, classes * bins, 0, classes * bins).view(classes, bins)
