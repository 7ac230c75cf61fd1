"""Bidirectional copy-paste."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch

from nnunet_ssl.base import SemiSupervisedTrainer, Terms
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import hard_labels, random_boxes


class SSLTrainerBCP(SemiSupervisedTrainer):
    """Bidirectional copy-paste: the student only ever sees mixed images.

    Bai, Chen, Li, Shen & Wang, CVPR 2023, arXiv:2305.00673; the authors' released code.

        1. labelled only: a box of one labelled patch pasted into another, teacher = student
        2. p_u = largest component of argmax teacher(u)                      no gradient
           one box M for the batch, 2/3 of each side
           one half:  x = l inside M, u outside    the other:  x = u inside M, l outside
           L = R(x; true voxels) + alpha R(x; pseudo-labelled voxels),       R = CE + Dice
           teacher <- 0.99 teacher + 0.01 student

    Each region is normalised by its own size. No confidence threshold and no ramp-up, as released.

    Deviates: nnU-Net's Dice (without background) and CE + Dice instead of half their sum, which
    scales the loss as nnU-Net's optimiser expects; 2B patches make B mixed ones, so memory is that
    of the supervised run; both stages are one run, the second starting with the last weights and
    not the best ones; which half of the batch gets which direction is drawn, not fixed; the largest
    component is kept only for classes that are one piece in at least 95 % of the annotated training
    cases (`largest_component=on` is the published form); no dropout in the teacher, nnU-Net has
    none; padding of unlabelled patches does not count.
    """

    method: ClassVar[str] = "Bidirectional copy-paste"
    paper: ClassVar[str] = "Bai et al. 2023, arXiv:2305.00673"
    twin: ClassVar[str] = "SSLTrainerSupervised+ema_decay=0.99+deploy=student"
    needs_teacher: ClassVar[bool] = True
    supports_regions: ClassVar[bool] = True
    supports_ignore: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("stock",)  # one augmentation for all, no weak and strong
    step_cost: ClassVar[float] = 4 / 3

    deploy: Literal["teacher", "student"] = "student"
    ema_decay: float | Literal["auto"] | None = 0.99
    pretrain: float = 0.2  # fraction of training on labelled scans only; published 0.12 to 0.25
    box: float = 2 / 3  # beta, side of the box as a fraction of the patch
    unsup_weight: float = 0.5  # alpha, weight of the pseudo-labelled part
    largest_component: Literal["auto", "on", "off"] = "auto"

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        cls.require(0 <= cls.pretrain < 1, "pretrain", "in [0, 1)")
        cls.require(0 < cls.box < 1, "box", "between 0 and 1")
        cls.require(cls.unsup_weight >= 0, "unsup_weight", "0 or more")

    def needs_unlabeled(self, progress: float) -> bool:
        """No unlabelled patches in the first stage."""
        return progress > self.pretrain

    def teacher_decay(self) -> float:
        """Return 0 in the first stage: the teacher is the student until the second one starts."""
        return 0.0 if self.progress < self.pretrain else super().teacher_decay()

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the loss of the stage on one batch of mixed patches."""
        spatial = batch.x_l.shape[2:]
        inside = random_boxes(
            len(batch.x_l), spatial, self.box, self.box, same=True, device=self.device
        )
        if self.progress < self.pretrain:
            partner = torch.arange(len(batch.x_l), device=self.device).roll(1)
            x = torch.where(inside, batch.x_l[partner], batch.x_l)
            target = torch.where(inside, batch.target[partner], batch.target)
            yield {"sup": self.loss(self.student(x), self.deep(target))}
            return
        x_u = batch.views["stock"]
        prob = self.teacher_prob(x_u)
        # Deviates: filtered only where classes are one piece; published for all
        pseudo_label = self.keep_largest(hard_labels(prob, self.regions), self.largest_component)
        self.track("weight", self.unsup_weight)
        self.track_pseudo_labels(prob, batch.valid_u, batch.valid_u)
        # Deviates: a random half, not the first, gets labelled boxes in unlabelled patches and the
        # rest the reverse: nnU-Net forces foreground into the centre of the last patches, and a box
        # of 2/3 of each side covers every centre.
        half = (len(x_u) + int(torch.randint(2, ()))) // 2
        first = (torch.randperm(len(x_u)) < half).to(self.device)
        true_voxels = inside == first.view(-1, *[1] * (x_u.ndim - 1))
        output = self.student(torch.where(true_voxels, batch.x_l, x_u))
        pseudo_voxels = ~true_voxels & batch.valid_u
        self.track_agreement(output, pseudo_label, pseudo_voxels)
        # Deviates: published as half of CE + Dice, with background in the Dice
        yield {
            "sup": self.masked_loss(output, batch.target, true_voxels),
            "unsup": self.unsup_weight
            * self.masked_loss(output, self.as_target(pseudo_label), pseudo_voxels),
        }
