"""FixMatch with an EMA teacher."""

from collections.abc import Iterator
from typing import ClassVar

from nnunet_ssl.base import SemiSupervisedTrainer, Terms
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import confidence, hard_labels


class SSLTrainerFixMatch(SemiSupervisedTrainer):
    """FixMatch: sure pseudo-labels of a weak view teach the strong view of the same patch.

    Sohn et al. 2020, arXiv:2001.07685, per voxel.

        p = softmax(teacher(weak(u)));  y = argmax p;  m = [max p >= tau]      no gradient
        L = sup(l) + w { sum m CE(student(strong(u)), y) / #voxels + Dice over m }

    Weak and strong view share their geometry, so nothing is warped back.

    Deviates: the EMA teacher labels, not the student, because few labels make student labels
    drift (its horizon follows the length of the run; at full length it is the published 0.999);
    one unlabelled patch beside each labelled one, not seven; the first tenth of training is
    supervised only; nnU-Net's Dice over the sure voxels, without classes of a few voxels, stands
    beside the cross-entropy, as in nnU-Net's supervised loss, since cross-entropy alone neglects
    small structures; deep supervision as in nnU-Net.
    """

    method: ClassVar[str] = "FixMatch"
    paper: ClassVar[str] = "Sohn et al. 2020, arXiv:2001.07685"
    needs_teacher: ClassVar[bool] = True
    supports_regions: ClassVar[bool] = True
    supports_ignore: ClassVar[bool] = True
    supports_ddp: ClassVar[bool] = True
    step_cost: ClassVar[float] = 7 / 3

    threshold: float = 0.95  # tau, on the probability of the pseudo-label
    unsup_weight: float = 1.0
    warmup: float = 0.1  # fraction of training on labelled scans only

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        cls.require(0 <= cls.warmup < 1, "warmup", "in [0, 1)")
        cls.require(cls.unsup_weight >= 0, "unsup_weight", "0 or more")

    def needs_unlabeled(self, progress: float) -> bool:
        """No unlabelled patches during the warm-up."""
        return progress > self.warmup

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the supervised loss, then the one on sure pseudo-labels."""
        yield {"sup": self.loss(self.student(batch.x_l), batch.y_l)}
        # Deviates: published with unlabelled patches from the start
        weight = self.unsup_weight if self.progress >= self.warmup else 0.0
        self.track("weight", weight)
        if weight == 0:
            return
        prob = self.teacher_prob(batch.x_u)  # Deviates: published with the student's
        pseudo_label = hard_labels(prob, self.regions)
        sure = (confidence(prob, self.regions) >= self.threshold) & batch.valid_u
        self.track_pseudo_labels(prob, sure, batch.valid_u)
        del prob  # as large as the logits; not needed while the student runs
        output = self.student(self.strong_intensity(batch.x_u, batch.valid_u))
        self.track_agreement(output, pseudo_label, sure)
        # Deviates: Dice beside the published cross-entropy
        loss = self.pseudo_loss(output, pseudo_label, sure, batch.valid_u)
        yield {"unsup": weight * loss}
