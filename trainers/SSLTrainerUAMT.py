"""Uncertainty-aware mean teacher."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nnunet_ssl.base import SemiSupervisedTrainer, Terms
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import (
    add_noise,
    full_res,
    hard_labels,
    normalized_entropy,
    prob_mse,
    sigmoid_rampup,
    to_prob,
)


class SSLTrainerUAMT(SemiSupervisedTrainer):
    """UA-MT: the student follows the teacher where several noisy passes of it agree.

    Yu, Wang, Li, Fu & Heng, MICCAI 2019, arXiv:1907.07034; the authors' released code.

        q = softmax(teacher(u + noise))                                          no gradient
        p = mean of T further passes, each with fresh noise;  H = -sum_c p_c ln p_c
        counted = H < (.75 + .25 R(t)) ln K                      R from .007 to 1 over the run
        L = sup(l) + w R(t) mean over counted voxels and classes of (softmax(student(u)) - q)^2
        teacher <- .99 teacher + .01 student

    `passes_by=mirror` makes the passes see the patch mirrored along the allowed axes, each result
    mirrored back: on a network without dropout they spread more than noise alone does.

    Deviates: the code's ln 2 and divisor 2 mean two classes; here ln K and K, the same for K = 2.
    nnU-Net has no dropout, so the spread of the noisy passes is that of the input noise; and the
    student sees a strong intensity view (`strong_view=False` is the published form). The weight is
    twice the published 0.1 because nnU-Net's supervised loss is twice the published one. Each
    region is a two-class problem with its own entropy. Padding does not count.
    """

    method: ClassVar[str] = "Uncertainty-aware mean teacher"
    paper: ClassVar[str] = "Yu et al. 2019, arXiv:1907.07034"
    twin: ClassVar[str] = "SSLTrainerSupervised+ema_decay=0.99+deploy=student"
    needs_teacher: ClassVar[bool] = True
    supports_regions: ClassVar[bool] = True
    supports_ignore: ClassVar[bool] = True
    step_cost: ClassVar[float] = 15 / 3

    deploy: Literal["teacher", "student"] = "student"
    ema_decay: float | Literal["auto"] | None = 0.99
    # Deviates: published 0.1 beside (CE + Dice) / 2; nnU-Net's CE + Dice is twice that
    consistency_weight: float = 0.2  # after the ramp-up
    rampup: float = 1.0  # fraction of training until the full weight
    passes: int = 8  # T, of the teacher, beside the one that is the target
    passes_by: Literal["noise", "mirror"] = "noise"  # what they differ in; mirror adds to noise
    limit_start: float = 0.75  # of the entropy, as a fraction of ln K; it ends at 1
    noise_std: float = 0.1  # on the teacher's input, in normalised intensity, clipped at twice it
    strong_view: bool = True  # the student sees strong intensity changes

    def __init_subclass__(cls) -> None:
        """Let the cost follow the number of passes (settings subclass)."""
        super().__init_subclass__()
        cls.step_cost = (7 + cls.passes) / 3 if cls.consistency_weight > 0 else 1.0

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        for name in ("consistency_weight", "rampup", "noise_std"):
            cls.require(getattr(cls, name) >= 0, name, "0 or more")
        cls.require(cls.passes >= 1, "passes", "at least 1")
        cls.require(0 <= cls.limit_start <= 1, "limit_start", "in [0, 1]")

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the supervised loss, then the consistency where the teacher is certain."""
        yield {"sup": self.loss(self.student(batch.x_l), batch.y_l)}
        weight = self.consistency_weight * sigmoid_rampup(self.progress, self.rampup)
        self.track("weight", weight)
        if weight == 0:
            return
        prob_t = self.teacher_prob(self.noisy(batch.x_u))
        sure = (self.uncertainty(batch.x_u) < self.limit()) & batch.valid_u
        self.track_pseudo_labels(prob_t, sure, batch.valid_u)
        # Deviates: published without a strong view
        view = batch.x_u
        if self.strong_view:
            view = self.strong_intensity(batch.x_u, batch.valid_u)
        logits = full_res(self.student(view))
        self.track_agreement(logits, hard_labels(prob_t, self.regions), sure)
        # Deviates: the mean over K classes; the code's divisor 2 means two
        yield {"unsup_mse": weight * prob_mse(to_prob(logits, self.regions), prob_t, sure)}

    def limit(self) -> float:
        """Return the entropy from which a voxel is left out, as a fraction of the largest one."""
        # Deviates: of ln K; the code's ln 2 is that of two classes
        return self.limit_start + (1 - self.limit_start) * sigmoid_rampup(self.progress, 1.0)

    def noisy(self, x: Tensor) -> Tensor:
        """Return the teacher's view."""
        return add_noise(x, self.noise_std, 2 * self.noise_std)

    @torch.no_grad()
    def uncertainty(self, x: Tensor) -> Tensor:
        """Return the entropy of the mean over T passes, in [0, 1]: (B, 1, *), or (B, R, *)."""
        mean: Tensor | float = 0.0
        for i in range(self.passes):
            axes = self.mirrored_axes(i)
            prob = self.teacher_prob(self.noisy(x).flip(axes)).flip(axes)
            mean = mean + prob / self.passes
        return normalized_entropy(mean, self.regions)  # type: ignore[arg-type]

    def mirrored_axes(self, i: int) -> list[int]:
        """Return the tensor axes that pass `i` mirrors: each set of allowed axes in turn."""
        if self.passes_by == "noise":
            return []
        allowed = self.inference_allowed_mirroring_axes or ()
        return [axis + 2 for bit, axis in enumerate(allowed) if i >> bit & 1]
