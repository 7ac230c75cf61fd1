"""Ellipse-constrained pseudo-labels with symmetric consistency."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunet_ssl.base import SemiSupervisedTrainer, Terms
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.errors import UserError
from nnunet_ssl.functional import (
    Mirror,
    boundary_excess,
    cached_gradients,
    contour_roughness,
    ellipse_distance,
    fit_ellipses,
    full_res,
    half_mirrored,
    mirror_at,
    mirror_mse,
    mirrored_image,
    refine_by_ellipse,
    reflect,
    released_scores,
    sample_mse,
    select_best,
    sigmoid_rampup,
    to_prob,
)
from nnunet_ssl.functional.shape_scores import WORST
from nnunet_ssl.modules import ScoreMemory


class SSLTrainerERSR(SemiSupervisedTrainer):
    """ERSR: a pseudo-labelled head is the ellipse that fits it, and its halves mirror each other.

    Zhou, Chen, Shen, Xu, Xuan, Zhu, Fang, Cong, Wei, Su, Zhou & Jin, IEEE JBHI 2025,
    arXiv:2508.19815; the authors' released code. 2D, for one elliptic class `head_label`.

        1. labelled only, teacher = student
        2. p = teacher's probability of the head on x_u                          no gradient
           R = alpha rank(boundary excess of p) + (1 - alpha) rank(contour roughness of p)
           keep what is among the best r(t) of the latest samples, 80 % of the batch at least
           ellipse = least squares fit to the outline of the largest piece of p > theta
           m = p raised inside the ellipse, lowered outside, > theta
           x_L, x_R = x_u with the head made of its left (right) half and that one's mirror image
               at the long axis, each half with its own intensity changes
           s_u, s_L, s_R = student on the three
           L_seg = |s_u - m|^2
           L_aug = |s_L - mirrored left half of s_u|^2, and right; both sides learn
           L_mir = |s_L - its mirror image|^2, and s_R
           L = CE + Dice + lambda(t) (L_seg + L_aug + L_mir)
           teacher <- 0.99 teacher + 0.01 student
           lambda = exp(-5 (1 - t)^2),  r = 0.5 + 0.5 exp(-5 (1 - t)^2),  t in stage 2

    Deviates: the released contour score is ruled by zeros around the image and says next to
    nothing about the error; scores that are divided by the head's size instead, added as ranks
    (`score=released` is the published form, `score=residual` the distance to the ellipse itself).
    They are compared with the latest 512 samples, not with those of the epoch. A sample without an
    ellipse, as of an empty mask, has no weight; the released one teaches "no head". Points on the
    frame and on padding are left out of the fit. Both stages are one run, the second with the last
    weights. nnU-Net's CE + Dice for half of BCE + Dice + focal loss, about twice as large, so that
    lambda = 1 weighs half of what it did; its labelled augmentation, its optimiser, B labelled and
    B unlabelled patches; other classes get no unlabelled term. The teacher is the student up to
    stage 2 and then averages with 0.99 at once (released: with less in its first 100 steps). Images
    are not stretched to [0, 1] after each intensity change; mirror images are painted within the
    mask alone, which matters where it is not symmetric; pixels whose mirror image is outside the
    patch do not count; pixels on the axis belong to one side, not to both.

    Waits for the device once a step: outlines, fits and distance maps are made on the CPU.
    """

    method: ClassVar[str] = "ERSR, ellipse-constrained pseudo-labels"
    paper: ClassVar[str] = "Zhou et al. 2025, arXiv:2508.19815"
    dims: ClassVar[tuple[str, ...]] = ("2d",)
    twin: ClassVar[str] = "SSLTrainerSupervised+ema_decay=0.99+deploy=student"
    needs_teacher: ClassVar[bool] = True
    supports_regions: ClassVar[bool] = True
    supports_ignore: ClassVar[bool] = True
    step_cost: ClassVar[float] = 13 / 3

    deploy: Literal["teacher", "student"] = "student"
    ema_decay: float | Literal["auto"] | None = 0.99
    pretrain: float = 0.3  # fraction of training on labelled scans only; Deviates: 0.5
    head_label: int = 1  # which class is elliptic, from 1; for regions which one in their order
    unsup_weight: float = 1.0  # lambda at the end
    rampup: float = 1.0  # fraction of stage 2 until then
    threshold: float = 0.6  # theta
    soft_target: bool = False  # L_seg with the refined probability instead of the mask m
    # Deviates: the released score is ruled by zeros around the image
    score: Literal["corrected", "released", "residual"] = "corrected"
    boundary_share: float = 0.5  # alpha, of the first score
    keep_start: float = 0.5  # r at the start of stage 2; 1 at the end
    min_keep: float = 0.8  # part of the batch that is kept in any case
    min_inside: float = 0.4  # least part of an ellipse inside the patch; not published
    memory: int = 512  # samples that scores are compared with; Deviates: those of an epoch
    perturb: bool = True  # intensity changes of the halves

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        cls.require(0 <= cls.pretrain < 1, "pretrain", "in [0, 1)")
        cls.require(cls.head_label >= 1, "head_label", "at least 1")
        for name in ("unsup_weight", "rampup"):
            cls.require(getattr(cls, name) >= 0, name, "0 or more")
        cls.require(0 < cls.threshold < 1, "threshold", "between 0 and 1")
        for name in ("boundary_share", "keep_start", "min_keep", "min_inside"):
            cls.require(0 <= getattr(cls, name) <= 1, name, "in [0, 1]")
        cls.require(cls.memory >= 1, "memory", "at least 1")

    @classmethod
    def refuse_unsupported(cls, plans: dict, configuration: str, dataset_json: dict) -> None:
        """Refuse also a data set without that class."""
        super().refuse_unsupported(plans, configuration, dataset_json)
        labels = PlansManager(plans).get_label_manager(dataset_json)
        names = [name for name in dataset_json["labels"] if name not in ("background", "ignore")]
        number = labels.num_segmentation_heads - (not labels.has_regions)
        if cls.head_label > number:
            raise UserError(
                f"{cls.__name__}: setting head_label={cls.head_label} names no class. The data set "
                f"has {number}: {', '.join(names)}. Choose 1 to {number}."
            )

    def build_companions(self) -> dict[str, nn.Module]:
        """Return the memory of scores."""
        return {"scores": ScoreMemory(self.memory)}

    @property
    def stage(self) -> float:
        """Share of stage 2 that is done; below 0 before it."""
        return (self.progress - self.pretrain) / (1 - self.pretrain)

    def needs_unlabeled(self, progress: float) -> bool:
        """No unlabelled patches in the first stage."""
        return progress > self.pretrain and self.unsup_weight > 0

    def teacher_decay(self) -> float:
        """Return 0 in the first stage: the teacher is the student until the second one starts."""
        # Deviates: released with less than 0.99 in the first 100 steps of stage 2
        return 0.0 if self.stage < 0 else super().teacher_decay()

    def after_step(self, observed: dict[str, list[Tensor]]) -> None:
        """Move the teacher and keep the scores."""
        super().after_step(observed)
        for scores in observed.get("scores", []):
            self.companions["scores"].update(scores)

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the labelled loss, then that of unlabelled patches with their mirror images."""
        # Deviates: half of BCE + Dice + focal loss
        yield {"sup": self.loss(self.student(batch.x_l), batch.y_l)}
        if self.stage < 0 or self.unsup_weight == 0:
            return
        ramp = self.unsup_weight * sigmoid_rampup(self.stage, self.rampup)
        self.track("weight", ramp)
        x, valid = batch.x_u, batch.valid_u
        prob = self.teacher_prob(x)
        head = self.head(prob)
        ellipses = fit_ellipses((head > self.threshold) & valid, valid, self.min_inside)
        distance = ellipse_distance(ellipses, x.shape[2:])
        soft, mask = refine_by_ellipse(head, distance, self.threshold)
        # Deviates: a sample without an ellipse is released with the target "no head"
        kept = self.select(head, mask, valid, ellipses.found) & ellipses.found
        self.track("found", ellipses.found.float().mean())
        self.track("kept", kept.float().mean())
        self.track_pseudo_labels(prob, valid & kept.view(-1, 1, 1, 1), valid)
        del prob
        mirror = mirror_at(ellipses, x.shape[2:])
        target = soft if self.soft_target else mask.float()
        weight = ramp * kept.float() / kept.sum().clamp_min(1)
        halves = (
            mirrored_image(x, mask, valid, mirror, side, self.perturb) for side in ("left", "right")
        )
        images = [x, *halves]
        size = len(x)
        if size < 3:  # three images of a sample are more than a batch: one kind at a time
            yield from cached_gradients(
                lambda image: (self.head_prob(image),),
                images,
                lambda chunks: self.terms([s for (s,) in chunks], target, mirror, valid, weight),
            )
            return
        for start in range(0, size, size // 3):
            rows = slice(start, start + size // 3)
            probs = self.head_prob(torch.cat([image[rows] for image in images])).chunk(3)
            own = mirror.rows(rows)
            yield self.terms(probs, target[rows], own, valid[rows], weight[rows])

    @staticmethod
    def terms(
        probs: Sequence[Tensor], target: Tensor, mirror: Mirror, valid: Tensor, weight: Tensor
    ) -> Terms:
        """Return L_seg, L_aug and L_mir, summed over samples by their weights (n,).

        Args:
            probs: s_u, s_L, s_R, (n, 1, H, W) each.
            target: refined pseudo-label, (n, 1, H, W).
            mirror: at the axes of the samples' ellipses.
            valid: (n, 1, H, W) bool, False on padding.
            weight: 0 leaves a sample out.
        """
        whole, left, right = probs
        # Deviates: released with the frame's pixels for mirror images outside the patch
        both = valid & mirror.inside & reflect(valid, mirror)
        aug = [
            sample_mse(left, half_mirrored(whole, mirror, "left"), both),
            sample_mse(right, half_mirrored(whole, mirror, "right"), both),
        ]
        mir = [mirror_mse(s, mirror, both) for s in (left, right)]
        return {
            "unsup_seg": (weight * sample_mse(whole, target, valid)).sum(),
            "unsup_augmented": (weight * sum(aug) / 2).sum(),
            "unsup_mirror": (weight * sum(mir) / 2).sum(),
        }

    def head(self, prob: Tensor) -> Tensor:
        """Return the channel of the head, (B, 1, H, W)."""
        channel = self.head_label - self.regions
        return prob[:, channel : channel + 1]

    def head_prob(self, x: Tensor) -> Tensor:
        """Return the student's probability of the head, (B, 1, H, W) float32."""
        return self.head(to_prob(full_res(self.student(x)), self.regions))

    @torch.no_grad()
    def select(self, head: Tensor, mask: Tensor, valid: Tensor, found: Tensor) -> Tensor:
        """Return which samples are regular enough, (B,) bool; observe their scores.

        Args:
            head: the teacher's probability, (B, 1, H, W).
            mask: the refined one, (B, 1, H, W) bool.
            valid: (B, 1, H, W) bool, False on padding.
            found: (B,) bool, samples with an ellipse; the others score worst.
        """
        decided = head > 0.5
        if self.score == "released":
            scores = released_scores(head)
        elif self.score == "residual":
            common = (decided & mask & valid).flatten(1).sum(1)
            total = sum((t & valid).flatten(1).sum(1) for t in (decided, mask))
            scores = (1 - 2 * common / total.clamp_min(1))[:, None].expand(-1, 2)
        else:
            scores = torch.stack(
                [boundary_excess(head, valid), contour_roughness(decided, valid)], 1
            )
        scores = torch.where(found[:, None], scores, WORST)
        self.observe("scores", scores)
        memory = self.companions["scores"]
        return select_best(
            scores,
            memory.scores,
            memory.seen(),
            keep=self.keep_start + (1 - self.keep_start) * sigmoid_rampup(self.stage, 1),
            min_keep=self.min_keep,
            share=self.boundary_share,
            ranked=self.score != "released",
        )
