"""Methods that train on mixes of labelled and unlabelled patches."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nnunet_ssl.base import SemiSupervisedTrainer, Terms
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import hard_labels


class CopyPasteTrainer(SemiSupervisedTrainer):
    """Two stages in one run: mixes of labelled patches, then labelled with unlabelled ones.

    In the first stage teacher and student are one. A subclass says what the masks of the mixes are
    and what it adds to the loss. Bai et al. 2023 (BCP), arXiv:2305.00673.
    """

    needs_teacher: ClassVar[bool] = True
    supports_regions: ClassVar[bool] = True
    supports_ignore: ClassVar[bool] = True
    least_patches: ClassVar[int] = 2  # a mix has two
    views: ClassVar[tuple[str, ...]] = ("stock",)  # one augmentation for all, no weak and strong

    ema_decay: float | Literal["auto"] | None = 0.99
    pretrain: float = 0.2  # fraction of training on labelled scans only; BCP 0.12 to 0.25
    unsup_weight: float = 0.5  # alpha, weight of the pseudo-labelled part
    largest_component: Literal["auto", "on", "off"] = "auto"

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        cls.require(0 <= cls.pretrain < 1, "pretrain", "in [0, 1)")
        cls.require(cls.unsup_weight >= 0, "unsup_weight", "0 or more")

    @property
    def first_stage(self) -> bool:
        """True while only labelled patches count."""
        return self.progress < self.pretrain

    def needs_unlabeled(self, progress: float) -> bool:
        """No unlabelled patches in the first stage."""
        return progress > self.pretrain

    def teacher_decay(self) -> float:
        """Return 0 in the first stage: the teacher is the student until the second one starts."""
        return 0.0 if self.first_stage else super().teacher_decay()

    def labeled_mix_loss(self, batch: Batch, inside: Tensor) -> Terms:
        """Return the loss of the first stage.

        Args:
            batch: the step's data.
            inside: (B, 1, *) bool, where each labelled patch shows its neighbour in the batch.
        """
        mixed = self.mix_labeled(batch, inside)
        return {"sup": self.loss(self.student(mixed.x_l), mixed.y_l)}

    def random_directions(self, inside: Tensor) -> Tensor:
        """Return where each mix shows its labelled patch, (B, 1, *) bool.

        Half of the batch shows labelled patches inside the masks, the rest outside.

        Args:
            inside: masks of the mixes, (B, 1, *) bool.
        """
        # Deviates: a random half, not BCP's first: nnU-Net forces foreground into the centre of the
        # last patches, and a box of 2/3 of each side covers every centre.
        half = (len(inside) + int(torch.randint(2, ()))) // 2
        first = (torch.randperm(len(inside)) < half).to(inside.device, non_blocking=True)
        return inside == first.view(-1, *[1] * (inside.ndim - 1))

    def pseudo_labels(self, prob: Tensor, batch: Batch) -> Tensor:
        """Return the decisions of the teacher's probabilities, largest components; log them."""
        assert batch.valid_u is not None
        self.track("weight", self.unsup_weight)
        self.track_pseudo_labels(prob, batch.valid_u, batch.valid_u)
        # Deviates: filtered only where classes are one piece; BCP filters all
        labels = hard_labels(prob, self.regions)
        return self.keep_largest(labels, batch.valid_u, self.largest_component)

    def mix_loss(
        self, output: Any, batch: Batch, pseudo_label: Tensor, true_voxels: Tensor
    ) -> Terms:
        """Return the loss of the second stage; true and pseudo-labelled voxels normalised apart.

        Args:
            output: the student's on the mixes.
            batch: the step's data.
            pseudo_label: of the unlabelled patches, (B, 1, *), or (B, R, *) bool.
            true_voxels: (B, 1, *) bool, where the mixes show labelled patches.
        """
        assert batch.valid_u is not None
        pseudo_voxels = ~true_voxels & batch.valid_u
        self.track_agreement(output, pseudo_label, pseudo_voxels)
        # Deviates: published as half of CE + Dice, with background in the Dice, and as the sum of
        # the two directions, so that a voxel inside boxes counts by their size
        sup = self.masked_loss(output, batch.target, true_voxels)
        unsup = self.masked_loss(output, self.as_target(pseudo_label), pseudo_voxels)
        return {"sup": sup, "unsup": self.unsup_weight * unsup}
