"""Bidirectional copy-paste."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch

from nnunet_ssl.base import Terms
from nnunet_ssl.copy_paste import CopyPasteTrainer
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import random_boxes


class SSLTrainerBCP(CopyPasteTrainer):
    """Bidirectional copy-paste: the student only ever sees mixed images.

    Bai, Chen, Li, Shen & Wang, CVPR 2023, arXiv:2305.00673; the authors' released code.

        1. labelled only: a box of one labelled patch pasted into another, teacher = student
        2. p_u = largest component of argmax teacher(u)                      no gradient
           one box M for the batch, 2/3 of each side
           one half:  x = l inside M, u outside    the other:  x = u inside M, l outside
           L = R(x; true voxels) + alpha R(x; pseudo-labelled voxels),       R = CE + Dice
           teacher <- 0.99 teacher + 0.01 student

    True and pseudo-labelled voxels are normalised apart. No confidence threshold and no ramp-up, as
    released.

    Deviates: nnU-Net's Dice (without background) and CE + Dice instead of half their sum, which
    scales the loss as nnU-Net's optimiser expects; the mean is over the labelled (pseudo-labelled)
    voxels of both directions together, not over each and then the two, so what lies inside boxes
    weighs by their size (0.3 in 3D, 0.44 in 2D, published 0.5); 2B patches make B mixed ones, so
    memory is that of the supervised run; both stages are one run, the second starting with the last
    weights and not the best ones; which half of the batch gets which direction is drawn, not fixed;
    the largest component is kept only for classes that are one piece in at least 95 % of the
    annotated training cases (`largest_component=on` is the published form); no dropout in the
    teacher, nnU-Net has none; padding of unlabelled patches does not count, that of labelled ones
    is background, as in nnU-Net; nnU-Net's augmentation, and its optimiser, whose steps are ten
    times as large (momentum 0.99 for 0.9).
    """

    method: ClassVar[str] = "Bidirectional copy-paste"
    paper: ClassVar[str] = "Bai et al. 2023, arXiv:2305.00673"
    twin: ClassVar[str] = "SSLTrainerSupervised+ema_decay=0.99+deploy=student"
    supports_ddp: ClassVar[bool] = True
    step_cost: ClassVar[float] = 4 / 3

    deploy: Literal["teacher", "student"] = "student"
    box: float = 2 / 3  # beta, side of the box as a fraction of the patch

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        cls.require(0 < cls.box < 1, "box", "between 0 and 1")

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the loss of the stage on one batch of mixed patches."""
        spatial = batch.x_l.shape[2:]
        inside = random_boxes(
            len(batch.x_l), spatial, self.box, self.box, same=True, device=self.device
        )
        if self.first_stage:
            yield self.labeled_mix_loss(batch, inside)
            return
        x_u = batch.views["stock"]
        pseudo_label = self.pseudo_labels(self.teacher_prob(x_u), batch)
        # Deviates: B mixes of 2B patches, published 2B
        true_voxels = self.random_directions(inside)
        output = self.student(torch.where(true_voxels, batch.x_l, x_u))
        yield self.mix_loss(output, batch, pseudo_label, true_voxels)
