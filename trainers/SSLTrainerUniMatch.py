"""UniMatch."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunet_ssl.base import SemiSupervisedTrainer, Terms
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import (
    confidence,
    cutmix,
    cutmix_boxes,
    full_res,
    hard_labels,
    random_partners,
    to_prob,
)
from nnunet_ssl.modules import dropout_factors, perturbed_forward

STRONG_VIEW, FEATURES = 0.25, 0.5  # weights of each strong view and of the perturbed features


class SSLTrainerUniMatch(SemiSupervisedTrainer):
    """UniMatch: sure labels of the weak view teach two strong views and perturbed features.

    Yang, Qi, Feng, Zhang & Shi, CVPR 2023, arXiv:2208.09910; the authors' medical code.

        e = encoder(weak(u));  p = softmax(decoder(e));  y = argmax p;  m = [max p >= tau]
                                                               no gradient through p, y, m
        s1, s2: intensity(weak(u)), twice; a box of another patch's strong view pasted in half of
                the patches, its y and m pasted alike
        L = sup(l) + w [ 1/4 R(student(s1)) + 1/4 R(student(s2)) + 1/2 R(decoder(dropped e)) ]
        R = CE + Dice over m;   dropped: each channel of each encoder level left out with p = .5

    No ramp-up: the threshold opens by itself as the student grows sure. The student labels and
    predicts, as published; `labels=teacher+ema_decay=auto` lets an EMA teacher label,
    `deploy=teacher+ema_decay=auto` lets it predict.

    Deviates: nnU-Net's CE + Dice in all terms, where the medical code has half of CE + Dice beside
    Dice alone, and nnU-Net's Dice is neither squared nor with background (`unsup_loss=dice` leaves
    CE out); the common factor 1/2 is dropped. Intensity operations for z-scored images instead of
    colour jitter. Boxes come from other patches of the same batch, not of a further one; in 3D
    their share is one of volume. Deep supervision as in nnU-Net. Padding does not count.
    """

    method: ClassVar[str] = "UniMatch"
    paper: ClassVar[str] = "Yang et al. 2023, arXiv:2208.09910"
    networks: ClassVar[str] = "PlainConvUNet, ResidualEncoderUNet"
    needs_unet: ClassVar[bool] = True
    twin: ClassVar[str] = "SSLTrainerSupervised+ema_decay=None+deploy=student"
    supports_regions: ClassVar[bool] = True
    supports_ignore: ClassVar[bool] = True
    step_cost: ClassVar[float] = 4.2  # the decoder is 0.2 to 0.7 of a pass

    deploy: Literal["teacher", "student"] = "student"
    ema_decay: float | Literal["auto"] | None = None
    labels: Literal["student", "teacher"] = "student"  # which network makes the pseudo-labels
    threshold: float = 0.95  # tau, on the probability of the pseudo-label
    unsup_weight: float = 1.0
    unsup_loss: Literal["ce_dice", "dice", "ce"] = "ce_dice"
    cutmix_probability: float = 0.5  # probability of a patch to get a box of another one
    box_low: float = 0.02  # smallest and
    box_high: float = 0.4  # largest share of the patch that a box fills
    box_aspect: float = 3.3  # largest ratio of two sides of a box
    channel_dropout: float = 0.5  # probability of a channel to be left out

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        cls.require(cls.unsup_weight >= 0, "unsup_weight", "0 or more")
        cls.require(0 <= cls.cutmix_probability <= 1, "cutmix_probability", "in [0, 1]")
        cls.require(0 < cls.box_low <= cls.box_high <= 1, "box_low", "above 0, up to box_high")
        cls.require(cls.box_aspect >= 1, "box_aspect", "at least 1")
        cls.require(0 <= cls.channel_dropout < 1, "channel_dropout", "in [0, 1)")
        cls.require(
            cls.labels == "student" or cls.ema_decay is not None,
            "labels",
            "student, since ema_decay=None makes no teacher",
        )

    @classmethod
    def refuse_unsupported(cls, plans: dict, configuration: str, dataset_json: dict) -> None:
        """Refuse also CutMix of one patch."""
        super().refuse_unsupported(plans, configuration, dataset_json)
        several = PlansManager(plans).get_configuration(configuration).batch_size > 1
        rule = "0: the plan's batch is 1 patch, and there is no other to take a box from"
        cls.require(several or cls.cutmix_probability == 0, "cutmix_probability", rule)

    def initialize(self) -> None:
        """Compile the pass with perturbed features where nnU-Net compiles."""
        super().initialize()
        self._perturbed_forward = (
            torch.compile(perturbed_forward) if self._do_i_compile() else perturbed_forward
        )

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the supervised loss, then those on perturbed features and on two strong views."""
        yield {"sup": self.loss(self.student(batch.x_l), batch.y_l)}
        self.track("weight", self.unsup_weight)
        if self.unsup_weight == 0:
            return
        x, valid = batch.x_u, batch.valid_u
        factors = dropout_factors(self.student, x, self.channel_dropout)
        output, weak = self._perturbed_forward(self.student, x, factors, self.labels == "student")
        if self.labels == "teacher":
            prob = self.teacher_prob(x)
        else:
            prob = to_prob(full_res(weak), self.regions)
        pseudo_label = hard_labels(prob, self.regions)
        sure = (confidence(prob, self.regions) >= self.threshold) & valid
        self.track_pseudo_labels(prob, sure, valid)
        del weak, prob
        # Deviates: CE beside the medical code's Dice, which is squared and has background
        loss = self.pseudo_loss(output, pseudo_label, sure, valid, self.unsup_loss)
        terms = {"unsup_features": self.unsup_weight * FEATURES * loss}
        del output, loss  # nothing of this chunk stays while the next one is built
        yield terms
        del terms
        for view in ("strong1", "strong2"):
            image, label, counted, voxels = self.strong_view(x, pseudo_label, sure, valid)
            output = self.student(image)
            if view == "strong1":
                self.track_agreement(output, label, counted)
            loss = self.pseudo_loss(output, label, counted, voxels, self.unsup_loss)
            terms = {f"unsup_{view}": self.unsup_weight * STRONG_VIEW * loss}
            del output, loss
            yield terms
            del terms

    def strong_view(self, x: Tensor, *maps: Tensor) -> list[Tensor]:
        """Change intensities, then paste boxes; the maps get the same boxes.

        Args:
            x: weak view, (B, C, *).
            maps: what belongs to it, (B, 1 or R, *) each; the last one is False on padding.
        """
        # Deviates: intensity operations for z-scored images instead of colour jitter
        strong = self.strong_intensity(x, maps[-1])
        if self.cutmix_probability == 0:
            return [strong, *maps]
        inside = cutmix_boxes(
            len(x),
            x.shape[2:],
            self.box_low,
            self.box_high,
            aspect=self.box_aspect,
            probability=self.cutmix_probability,
            device=x.device,
        )
        # Deviates: boxes come from this batch, published from a further one
        return cutmix(inside, random_partners(len(x)), strong, *maps)
