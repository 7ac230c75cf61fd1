"""Mutual mask mix with high- and low-level feature consistency."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from nnunet_ssl.base import Terms
from nnunet_ssl.copy_paste import CopyPasteTrainer
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import (
    feature_cosine,
    feature_l1,
    full_res,
    joint_sum,
    random_blocks,
    sigmoid_rampup,
    to_prob,
)
from nnunet_ssl.modules import Tapped


@torch.no_grad()
def patch_spread(feature: Tensor) -> Tensor:
    """Return how much features differ between patches, beside how much they vary at all.

    Features that are the same for every patch, which would satisfy the consistency, give 0. A
    common factor changes nothing.

    Args:
        feature: (B, C, *); patches i and B - 1 - i are compared, voxel by voxel.

    Returns:
        Scalar float32, of all processes: root of half the mean squared difference, over the
        standard deviation within channels; about 1 for unrelated patches, NaN for a single one.
    """
    feature = feature.float()
    pairs = len(feature) // 2
    apart = (feature[:pairs] - feature.flip(0)[:pairs]).square().sum() / 2
    rows = feature.transpose(0, 1).flatten(1)
    of_all = rows.new_full((), rows.shape[1])  # filled there, so that no step waits for a copy
    counts = torch.stack([of_all, of_all * pairs / len(feature), apart])
    sums = joint_sum(torch.cat([counts, rows.sum(1), rows.square().sum(1)]))
    (of_all, of_pairs, apart), (total, squares) = sums[:3], sums[3:].view(2, -1)
    variance = (squares / of_all - (total / of_all).square()).sum()
    return (apart / of_pairs / variance).sqrt()


class SSLTrainerM3HL(CopyPasteTrainer):
    """M3HL: block-wise mixes, and features of mixes that follow those of unlabelled patches.

    Liu, Zhang, Yue, Guo & Li, MICCAI 2025, arXiv:2508.03752; the authors' released code.

        1. labelled only: random blocks of one labelled patch in another, teacher = student
        2. p_u = largest component of argmax teacher(u)                          no gradient
           M: half of the blocks of a 4-per-axis grid, drawn for each pair (a, b)
           x1 = l_a in M, u_a elsewhere        x2 = u_b in M, l_b elsewhere
           L_mix  = R(true voxels) + alpha R(pseudo-labelled voxels),            R = CE + Dice
           L_low  = mean over x1, x2 and u_a, u_b of |low(x) - low_teacher(u)|
           L_high = mean over the same of 1 - cos(high(x), high_teacher(u))
           L = L_mix + w (L_low + L_high);      teacher <- 0.99 teacher + 0.01 student

    `high` is the bottleneck, flattened to one vector a patch, `low` the full-resolution feature
    before the last segmentation layer. Each mix follows both unlabelled patches of its pair, also
    where it shows labelled blocks. No threshold and no ramp-up, as released.

    Deviates: the body of the paper and its numbers were not to be had, so this is the released
    code; a labelled-only first stage as in BCP, which the code's history suggests (`pretrain=0` is
    the released form), and the teacher starts as the student, not with random weights of its own;
    a grid of 4 cells an axis for every patch size instead of fixed blocks for two sizes, a cell
    being at least as large as a voxel of the bottleneck; in 3D, too, `low` is the last decoder
    output (released: one block earlier) and `high` is not pooled, since nnU-Net's bottlenecks are
    small; nnU-Net's Dice and CE + Dice as in `SSLTrainerBCP`; 2B patches make B mixes; of an odd
    batch the middle sample is mixed in one direction, drawn, and follows its own patch only;
    largest components only of classes that are one piece (`largest_component=on` is the released
    form); no dropout in the teacher; padding of unlabelled patches has no pseudo-label, that of
    labelled ones is background; nnU-Net's augmentation, and its optimiser, whose steps are ten
    times as large (momentum 0.99 for 0.9). With `pretrain=0` the teacher averages less than 0.99 in
    its first 100 steps (released: from the start).
    """

    method: ClassVar[str] = "M3HL, mutual mask mix"
    paper: ClassVar[str] = "Liu et al. 2025, arXiv:2508.03752"
    twin: ClassVar[str] = "SSLTrainerSupervised+ema_decay=0.99+deploy=student"
    supports_ddp: ClassVar[bool] = True
    networks: ClassVar[str] = "PlainConvUNet, ResidualEncoderUNet"
    needs_unet: ClassVar[bool] = True
    step_cost: ClassVar[float] = 4 / 3
    step_memory: ClassVar[float] = 1.2

    deploy: Literal["teacher", "student"] = "student"
    grid: int = 4  # cells per axis
    ratio: float = 0.5  # share of the cells in M
    ratio_spread: float = 0.0  # half width of the range around it that each step draws from
    feature_weight: float = 0.5  # w, weight of L_low + L_high
    feature_rampup: float = 0.0  # fraction of the second stage until w; released 0
    # compare only where the mix shows that unlabelled patch; released False
    masked_features: bool = False

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        cls.require(cls.grid >= 2, "grid", "at least 2")
        cls.require(0 < cls.ratio < 1, "ratio", "between 0 and 1")
        limit = min(cls.ratio, 1 - cls.ratio)
        cls.require(
            0 <= cls.ratio_spread <= limit, "ratio_spread", f"in [0, {limit:g}] beside this ratio"
        )
        for name in ("feature_weight", "feature_rampup"):
            cls.require(getattr(cls, name) >= 0, name, "0 or more")

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the loss of the stage on one batch of mixed patches."""
        if self.first_stage:
            # Deviates: released without this stage
            blocks = self.draw_blocks(len(batch.x_l), batch.x_l.shape[2:])
            yield self.labeled_mix_loss(batch, blocks)
            return
        x_u = batch.views["stock"]
        with torch.no_grad():
            aim = self.tap(self.teacher, x_u)
        prob = to_prob(full_res(aim.output), self.regions)
        pseudo_label = self.pseudo_labels(prob, batch)
        del prob  # not needed while the student runs
        true_voxels = self.draw_true_voxels(x_u)
        mixed = self.tap(self.student, torch.where(true_voxels, batch.x_l, x_u))
        self.track("feature_spread", patch_spread(mixed.feature))
        terms = self.mix_loss(mixed.output, batch, pseudo_label, true_voxels)
        second_stage = (self.progress - self.pretrain) / (1 - self.pretrain)
        weight = self.feature_weight * sigmoid_rampup(second_stage, self.feature_rampup)
        self.track("feature_weight", weight)
        if weight > 0:
            low, high = self.feature_distances(mixed, aim, ~true_voxels)
            terms |= {"unsup_low": weight * low, "unsup_high": weight * high}
        yield terms

    def draw_blocks(self, batch: int, spatial: torch.Size) -> Tensor:
        """Return M for so many samples, (batch, 1, *spatial) bool, True in the drawn blocks."""
        ratio = self.ratio
        if self.ratio_spread > 0:
            ratio += self.ratio_spread * (2 * torch.rand(()).item() - 1)
        # Deviates: released with fixed blocks for two patch sizes; a cell holds at least one voxel
        # of the bottleneck
        stride = np.prod(self.configuration_manager.pool_op_kernel_sizes, 0).tolist()
        return random_blocks(batch, spatial, self.grid, ratio, stride, self.device)

    def draw_true_voxels(self, x: Tensor) -> Tensor:
        """Return where each mix shows its labelled patch, (B, 1, *) bool.

        Samples i and B - 1 - i are the pair (a, b): one mask, labelled in M in one and outside M
        in the other. The middle of an odd batch has one of the directions at random.
        """
        size = len(x)
        blocks = self.draw_blocks((size + 1) // 2, x.shape[2:])
        blocks = torch.cat([blocks, blocks[: size // 2].flip(0)])
        # Deviates: released with both directions of each pair, so twice the mixes
        first = torch.arange(size) < (size + int(torch.randint(2, ()))) // 2
        return blocks == first.to(x.device, non_blocking=True).view(-1, *[1] * (x.ndim - 1))

    def feature_distances(
        self, mixed: Tapped, aim: Tapped, unlabeled: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return L_low and L_high of mixes to the unlabelled patches of their pairs.

        Args:
            mixed: the student on the mixes.
            aim: the teacher on the unlabelled patches, in the same order.
            unlabeled: (B, 1, *) bool, voxels of the mix that show its own unlabelled patch.
        """
        if self.masked_features:
            coarse = interpolate(unlabeled.float(), mixed.bottleneck.shape[2:], mode="nearest")
            return (
                feature_l1(mixed.feature, aim.feature, unlabeled),
                feature_cosine(mixed.bottleneck, aim.bottleneck, coarse.bool()),
            )
        # Deviates: released with `low` one block earlier in 3D and with `high` pooled
        # own patch, then the partner's: the means over samples are those over the four pairs
        low, high = (
            (distance(feature, target) + distance(feature, target.flip(0))) / 2
            for distance, feature, target in (
                (feature_l1, mixed.feature, aim.feature),
                (feature_cosine, mixed.bottleneck, aim.bottleneck),
            )
        )
        return low, high
