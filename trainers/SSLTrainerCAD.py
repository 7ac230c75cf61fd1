"""Confidence-aware adaptive displacement."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nnunet_ssl.base import Terms
from nnunet_ssl.copy_paste import CopyPasteTrainer
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import (
    Windows,
    choose_windows,
    coarse_maps,
    cutout,
    displace,
    ema_update,
    full_res,
    hard_labels,
    rampup_between,
    random_boxes,
    sigmoid_rampup,
    squared_dice_loss,
    to_prob,
)


class View(NamedTuple):
    """What one student learns from.

    Attributes:
        x: mixed images, (B, C, *).
        pseudo_label: of the unlabelled patches in this view, (B, 1, *), or (B, R, *) bool.
        kept: (B, 1, *) bool, False where the view shows noise.
    """

    x: Tensor
    pseudo_label: Tensor
    kept: Tensor


class SSLTrainerCAD(CopyPasteTrainer):
    """CAD: where a network is unsure, it gets what the other view is sure of.

    Xiao, Xu, Liang, Deng & Xiao 2025, arXiv:2502.00536. RECONSTRUCTED: of the paper only the
    abstract and the beginning could be had, and no code. The frame is that of its ancestor ABD
    (Chi et al., CVPR 2024, released code) on bidirectional copy-paste.

        1. labelled only: a box of one labelled patch in another, one student; teacher = student
        2. x, x~ = weak and strong view of the same BCP mixes, same box          students f1, f2
           p, p~ = argmax teacher(u), argmax teacher(u~)                         no gradient
           L_mix = R(f1(x); y, p) + R(f2(x~); y, p~)     R = CE + Dice, pseudo-labels weigh alpha
           L_cps = Dice(f1(x), argmax f2(x~)) + Dice(f2(x~), argmax f1(x))
           x': in x, the largest connected region with confidence f1(x) < tau(t), at most s(t)
               large, is overwritten by a confident window of x~; x~' the same way round
           L_dis = the mutual Dice of f1 and f2 on x' and on x~'
           L = L_mix + w (L_cps + L_dis);            teacher <- 0.99 teacher + 0.01 f1
           tau and s grow with r(t) = exp(-5 (1 - min(1, t / T))^2)

    Of the four most confident windows that do not overlap, the source is the one whose mean
    prediction is closest to the target's (KL). What selects is detached.

    Reconstructed, so open to doubt: both schedules and all their numbers, the rectangle, and that
    an oversized region is clipped to its least confident window.

    Deviates from ABD: weak is nnU-Net's augmentation, since no weaker view of labelled patches is
    made; strong adds intensity changes and a box of noise, where student 2 has nothing to teach and
    learns from student 1 alone (ABD: background, or the teacher's label of the noise); the source
    is always the closest of the candidates (ABD: in half of the samples the surest one); nnU-Net's
    Dice and CE + Dice over both directions of the mixes together, as in `SSLTrainerBCP`, its poly
    schedule and momentum; 2B patches make B mixes, and the two displaced views are scored one by
    one, for memory; f2 starts as a copy of f1 when the second stage starts, at its last, not best,
    weights; with `pretrain=0` it has random weights of its own; the mutual losses ramp up; largest
    components only of classes that are one piece (`largest_component=on` is the released form); the
    teacher predicts (ABD: student 1); padding of unlabelled patches does not count, that of
    labelled ones is background in L_mix, as in nnU-Net.

    Waits for the device once a step: regions are searched on a coarse grid on the CPU.
    """

    method: ClassVar[str] = "CAD, confidence-aware adaptive displacement (reconstructed)"
    paper: ClassVar[str] = "Xiao et al. 2025, arXiv:2502.00536"
    twin: ClassVar[str] = "SSLTrainerSupervised+ema_decay=0.99"
    # teacher 2 forward; both students forward and backward on the mixes and two displaced views
    step_cost: ClassVar[float] = 20 / 3
    step_memory: ClassVar[float] = 2.1
    trained_networks: ClassVar[int] = 2

    box: float = 2 / 3  # side of the box of the mixes, as a fraction of the patch
    cps_weight: float = 1.0  # w of L_cps and
    displaced_weight: float = 1.0  # w of L_dis, after the ramp-up
    rampup: float = 0.1  # fraction of training, after the first stage, until both; ABD 0
    threshold_start: float = 0.6  # tau at the start and
    threshold_end: float = 0.95  # at the end; reconstructed
    size_start: float = 0.125  # s, largest window as a fraction of each side, at the start and
    size_end: float = 0.25  # at the end, which is ABD's fixed patch; the start is reconstructed
    escalation: float = 0.8  # T, fraction of training until the end values; reconstructed
    min_region: int = 8  # smaller regions, in cells of the coarse grid, stay; reconstructed
    candidates: int = 4  # N, most confident windows to choose the source from
    shape: Literal["box", "region"] = "box"  # overwrite the window, or the region inside it
    oversized: Literal["clip", "skip"] = "clip"  # what becomes of regions larger than s
    source: Literal["other_view", "other_sample"] = "other_view"  # where sources come from
    cutout_probability: float = 0.5  # of a box of noise in the strong view

    def __init_subclass__(cls) -> None:
        """Let the cost follow what is asked for (settings subclass)."""
        super().__init_subclass__()
        cls.step_cost = 20 / 3 if cls.displaced_weight > 0 else 8 / 3

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        cls.require(0 < cls.box < 1, "box", "between 0 and 1")
        for name in ("cps_weight", "displaced_weight", "rampup"):
            cls.require(getattr(cls, name) >= 0, name, "0 or more")
        cls.require(0 <= cls.threshold_end <= 1, "threshold_end", "in [0, 1]")
        cls.require(
            0 <= cls.threshold_start <= cls.threshold_end,
            "threshold_start",
            "0 or more, and at most threshold_end",
        )
        cls.require(0 < cls.size_end <= 1, "size_end", "above 0 and at most 1")
        cls.require(
            0 < cls.size_start <= cls.size_end, "size_start", "above 0 and at most size_end"
        )
        cls.require(cls.escalation >= 0, "escalation", "0 or more")
        cls.require(cls.min_region >= 1, "min_region", "at least 1")
        cls.require(cls.candidates >= 1, "candidates", "at least 1")
        cls.require(0 <= cls.cutout_probability <= 1, "cutout_probability", "in [0, 1]")

    def build_companions(self) -> dict[str, nn.Module]:
        """Return student 2."""
        return {"peer": self.new_network()}

    @property
    def peer(self) -> nn.Module:
        """Student 2."""
        return self.companions["peer"]

    def after_step(self, observed: dict[str, list[Tensor]]) -> None:
        """Move the teacher; in the first stage student 2 is student 1, as the teacher is."""
        super().after_step(observed)
        # Deviates: ABD takes over the best weights of that stage, and the optimizer's state
        if self.first_stage:
            ema_update(self.peer, self.student, 0.0)

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the loss on the mixes, then on each displaced view."""
        inside = random_boxes(
            len(batch.x_l),
            batch.x_l.shape[2:],
            self.box,
            self.box,
            same=True,
            device=self.device,
        )
        if self.first_stage:
            yield self.labeled_mix_loss(batch, inside)
            return
        true_voxels = self.random_directions(inside)
        valid = torch.where(true_voxels, batch.valid_l, batch.valid_u)
        ramp = rampup_between(self.progress, self.pretrain, self.pretrain + self.rampup)
        self.track("weight", ramp)

        views = self.make_views(batch, true_voxels)
        seen = [valid & view.kept for view in views]
        terms, maps = self.losses_on_mixes(batch, views, true_voxels, seen, ramp)
        yield terms
        del terms  # nothing of this chunk stays while the next one is built
        weight = ramp * self.displaced_weight
        if weight == 0:
            return
        maps = maps.cpu()  # waits for the device
        for own, other in ((0, 1), (1, 0)):  # from the views as they were
            windows = self.choose(maps[own], maps[other])
            x = self.displaced(views[own].x, views[other].x, windows)
            counted = self.displaced(seen[own], seen[other], windows)
            # Deviates: published on both displaced views at once
            outputs = self.student(x), self.peer(x)
            prob = [to_prob(full_res(output).detach(), self.regions) for output in outputs]
            labels = [hard_labels(p, self.regions) for p in prob]
            del prob
            terms = {"unsup_displaced": weight / 2 * self.mutual(outputs, labels, [counted] * 2)}
            del outputs
            yield terms
            del terms

    def make_views(self, batch: Batch, true_voxels: Tensor) -> tuple[View, View]:
        """Return the weak and the strong view of the mixes, with the teacher's labels on each."""
        x_u = batch.views["stock"]
        strong_l, erased_l = self.strong_view(batch.x_l, batch.valid_l)
        strong_u, erased_u = self.strong_view(x_u, batch.valid_u)
        prob = self.teacher_prob(x_u)
        self.track_pseudo_labels(prob, batch.valid_u, batch.valid_u)
        weak_label = hard_labels(prob, self.regions)
        del prob
        strong_label = hard_labels(self.teacher_prob(strong_u), self.regions)
        # Deviates: ABD looks for the largest piece among the labels of the noise, too
        strong_label = torch.where(erased_u, weak_label, strong_label)
        mode = self.largest_component
        return (
            View(
                torch.where(true_voxels, batch.x_l, x_u),
                self.keep_largest(weak_label, batch.valid_u, mode),
                torch.ones_like(true_voxels),
            ),
            View(
                torch.where(true_voxels, strong_l, strong_u),
                self.keep_largest(strong_label, batch.valid_u, mode),
                ~torch.where(true_voxels, erased_l, erased_u),
            ),
        )

    def strong_view(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return a strong view of patches, and which voxels of it are noise."""
        # volumes of the box of noise are ABD's
        return cutout(self.strong_intensity(x, valid), self.cutout_probability, 0.02, 0.4, valid)

    def losses_on_mixes(
        self,
        batch: Batch,
        views: tuple[View, View],
        true_voxels: Tensor,
        seen: list[Tensor],
        ramp: float,
    ) -> tuple[Terms, Tensor]:
        """Return L_mix and L_cps of both students, and the coarse maps of both views.

        Args:
            batch: the step's data.
            views: of student 1 and of student 2.
            true_voxels: (B, 1, *) bool, where the mixes show labelled patches.
            seen: (B, 1, *) bool for each view, False on padding of either patch and on noise.
            ramp: factor on the mutual loss.
        """
        outputs = self.student(views[0].x), self.peer(views[1].x)
        prob = [to_prob(full_res(output).detach(), self.regions) for output in outputs]
        cell = self.cell(true_voxels.shape[2:])
        maps = torch.stack(
            [coarse_maps(p, s, cell, self.regions) for p, s in zip(prob, seen, strict=True)]
        )
        labels = [hard_labels(p, self.regions) for p in prob]
        del prob
        pseudo_voxels = ~true_voxels & batch.valid_u
        self.track_agreement(outputs[0], views[0].pseudo_label, pseudo_voxels)
        sup, unsup = [], []
        for output, view in zip(outputs, views, strict=True):
            # Deviates: noise is left out, not learnt as background; nnU-Net's CE + Dice, over
            # both directions of the mixes together
            pseudo_label = self.as_target(view.pseudo_label)
            sup.append(self.masked_loss(output, batch.target, true_voxels & view.kept))
            unsup.append(self.masked_loss(output, pseudo_label, pseudo_voxels & view.kept))
        terms = {"sup": sum(sup), "unsup": self.unsup_weight * sum(unsup)}
        weight = ramp * self.cps_weight
        if weight > 0:
            # who sees noise labels nothing there, but learns what the other one saw
            terms["unsup_cps"] = weight * self.mutual(outputs, labels, seen)
        return terms, maps

    def mutual(
        self, outputs: tuple[Any, Any], labels: list[Tensor], sure_of: list[Tensor]
    ) -> Tensor:
        """Return the Dice of each student to the other one's labels, full resolution, summed.

        Args:
            outputs: of student 1 and of student 2.
            labels: of both.
            sure_of: (B, 1, *) bool, where each one's labels count.
        """
        first, second = (
            squared_dice_loss(full_res(output), label, counted, self.regions)
            for output, label, counted in zip(outputs, labels[::-1], sure_of[::-1], strict=True)
        )
        return first + second

    # ------------------------------------------------------------------ displacement

    def cell(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Return the voxels of a cell of the coarse grid: up to 4 in 3D and 2 in 2D, per axis.

        At least 16 cells a side where there are so many voxels, so that windows have two.
        """
        most = 4 if len(spatial) == 3 else 2
        return tuple(max(1, min(most, s // 16)) for s in spatial)

    def choose(self, own: Tensor, other: Tensor) -> list[Windows | None]:
        """Return the windows of each sample, from the coarse maps of both views on the CPU."""
        grown = sigmoid_rampup(self.progress, self.escalation)
        threshold = self.threshold_start + (self.threshold_end - self.threshold_start) * grown
        size = self.size_start + (self.size_end - self.size_start) * grown
        patch = self.configuration_manager.patch_size
        limit = [max(1, round(size * s) // f) for s, f in zip(patch, self.cell(patch), strict=True)]
        if self.source == "other_sample":
            other = other.roll(1, 0)
        # Deviates: always the closest candidate; ABD has the surest one in half of the samples
        windows = [
            choose_windows(
                target,
                source,
                threshold=threshold,
                limit=limit,
                min_region=self.min_region,
                candidates=self.candidates,
                regions=self.regions,
                oversized=self.oversized,
            )
            for target, source in zip(own, other, strict=True)
        ]
        self.track("displaced", sum(w is not None for w in windows) / len(windows))
        self.track("threshold", threshold)
        self.track("largest_window", size)
        return windows

    def displaced(self, x: Tensor, source: Tensor, windows: list[Windows | None]) -> Tensor:
        """Return images or masks with the windows copied from the source view."""
        if self.source == "other_sample":
            source = source.roll(1, 0)
        return displace(x, source, windows, self.cell(x.shape[2:]), self.shape)
