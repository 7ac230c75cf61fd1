"""Mean Teacher."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from nnunet_ssl.base import SemiSupervisedTrainer, Terms
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import (
    add_noise,
    full_res,
    hard_labels,
    prob_mse,
    sigmoid_rampup,
    to_prob,
)


class SSLTrainerMeanTeacher(SemiSupervisedTrainer):
    """Mean Teacher: the student's probabilities follow those of its moving average.

    Tarvainen & Valpola 2017, arXiv:1703.01780; settings of the segmentation form in SSL4MIS.

        p_t = softmax(teacher(u + noise))                        no gradient
        L   = sup(l) + w mean (softmax(student(strong(u))) - p_t)^2
        teacher <- a teacher + (1 - a) student

    The gradient of this term vanishes where the student is sure: expect little beyond the twin.

    Deviates: nnU-Net has neither dropout nor batch statistics, so noise is the only perturbation
    that is left of the published ones, and it moves an nnU-Net little; the student therefore sees
    a strong intensity view (`strong_view=False` is the published form). The weight is twice the
    published 0.1 because nnU-Net's supervised loss is twice the published one. Padding does not
    count. The teacher predicts, as in the original paper; SSL4MIS saves the student.
    """

    method: ClassVar[str] = "Mean Teacher"
    paper: ClassVar[str] = "Tarvainen & Valpola 2017, arXiv:1703.01780"
    twin: ClassVar[str] = "SSLTrainerSupervised+ema_decay=0.99"
    needs_teacher: ClassVar[bool] = True
    supports_regions: ClassVar[bool] = True
    supports_ignore: ClassVar[bool] = True
    supports_ddp: ClassVar[bool] = True
    step_cost: ClassVar[float] = 7 / 3

    ema_decay: float | Literal["auto"] | None = 0.99
    # Deviates: published 0.1 beside (CE + Dice) / 2; nnU-Net's CE + Dice is twice that
    consistency_weight: float = 0.2  # after the ramp-up
    rampup: float = 1.0  # fraction of training until the full weight
    noise_std: float = 0.1  # on the teacher's input, in normalised intensity, clipped at twice it
    strong_view: bool = True  # the student sees strong intensity changes

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        for name in ("consistency_weight", "rampup", "noise_std"):
            cls.require(getattr(cls, name) >= 0, name, "0 or more")

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the supervised loss, then the consistency with the noisy teacher."""
        yield {"sup": self.loss(self.student(batch.x_l), batch.y_l)}
        weight = self.consistency_weight * sigmoid_rampup(self.progress, self.rampup)
        self.track("weight", weight)
        if weight == 0:
            return
        prob_t = self.teacher_prob(add_noise(batch.x_u, self.noise_std, 2 * self.noise_std))
        self.track_pseudo_labels(prob_t, batch.valid_u, batch.valid_u)
        # Deviates: published without a strong view
        view = batch.x_u
        if self.strong_view:
            view = self.strong_intensity(batch.x_u, batch.valid_u)
        logits = full_res(self.student(view))
        self.track_agreement(logits, hard_labels(prob_t, self.regions), batch.valid_u)
        prob_s = to_prob(logits, self.regions)
        yield {"unsup_mse": weight * prob_mse(prob_s, prob_t, batch.valid_u)}
