"""Rung 3 of the journal: the step that nnU-Net gains most from in nnFilterMatch, in our loop.

Not a method of the package. To run it beside others, name this folder, too:

    export nnUNet_extTrainer="$nnUNet_extTrainer:$PWD/benchmarks/trials"
"""

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch.nn.functional import interpolate

from nnunet_ssl.base import SemiSupervisedTrainer, Terms
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import apply_rot90, hard_labels


class SSLTrainerNFM(SemiSupervisedTrainer):
    """The student labels a patch and learns the labels on the patch turned by quarters; 2D, square.

    arXiv:2509.19746 without its filter of cases. Labels are the largest probability at every scale;
    all of them count from the end of the warm-up on, with full weight; annotated and unlabelled
    patches, both after nnU-Net's whole augmentation, are pooled in nnU-Net's loss.

    Deviates: its warm-up is 2 to 7 % of training, here as long as the default's in a short one; no
    flips beside the turns; the average of the weights predicts, as in the twin.
    """

    method: ClassVar[str] = "bare self-training step"
    paper: ClassVar[str] = "nnFilterMatch, arXiv:2509.19746"
    twin: ClassVar[str] = "SSLTrainerSupervised+labeled_mix=auto"
    dims: ClassVar[tuple[str, ...]] = ("2d",)
    needs_teacher: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("stock",)
    step_cost: ClassVar[float] = 7 / 3

    labeled_mix: float | Literal["auto"] = "auto"  # as the default it stands beside
    warmup: float = 0.3333  # Deviates: 2 to 7 %; fraction of training on labelled scans only
    teacher_labels: bool = False  # the average of the weights labels, once for all scales

    def needs_unlabeled(self, progress: float) -> bool:
        """Load unlabelled patches a little before they count."""
        return progress > 0.9 * self.warmup

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield nnU-Net's loss on annotated patches, after the warm-up pooled with turned ones."""
        if self.progress < self.warmup:
            yield {"sup": self.loss(self.student(batch.x_l), batch.y_l)}
            return
        x = batch.views["stock"]
        turns = torch.randint(1, 4, (len(x),))  # Deviates: no flips later on
        with torch.no_grad():
            if self.teacher_labels:
                label = apply_rot90(hard_labels(self.teacher_prob(x), self.regions), turns).float()
                sizes = [y.shape[2:] for y in batch.y_l]
                labels = [interpolate(label, size, mode="nearest-exact") for size in sizes]
            else:
                heads = [head.argmax(1, keepdim=True) for head in self.student(x)]
                labels = [apply_rot90(label, turns).float() for label in heads]
        output = self.student(torch.cat([batch.x_l, apply_rot90(x, turns)]))
        targets = [torch.cat(pair) for pair in zip(batch.y_l, labels, strict=True)]
        yield {"sup": self.loss(output, targets)}
