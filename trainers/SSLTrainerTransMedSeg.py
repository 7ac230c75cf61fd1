"""Transferable semantic augmentation on bidirectional copy-paste."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv3d

from nnunet_ssl.base import Terms
from nnunet_ssl.copy_paste import CopyPasteTrainer
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import (
    Moments,
    affinity,
    class_shift,
    clustering_loss,
    confidence,
    expected_ce,
    full_res,
    random_boxes,
    region_shift,
    sampled_moments,
    to_prob,
)
from nnunet_ssl.modules import ClassMoments, Tapped, TokenClusters

MOST_VOXELS, LEAST_VOXELS = 16384, 32  # of a class and step behind its moments
FULL_COVARIANCE = 64  # channels up to which "auto" keeps full covariances


class SSLTrainerTransMedSeg(CopyPasteTrainer):
    """TransMedSeg: labelled features take the shift and spread of unlabelled ones, in closed form.

    Wang, Li, Wang, Lan, Tan, Yang & Yang 2025, arXiv:2505.14753. RECONSTRUCTED: only the abstract
    could be had, and no code; equations from a reading note, from TSA (Li et al., CVPR 2021,
    released code) and ISDA (Wang et al., NeurIPS 2019, released code). The host is bidirectional
    copy-paste, see `SSLTrainerBCP`, in place of its extension GraphCL.

        1. labelled only: a box of one labelled patch in another, teacher = student
        2. x = mixes of labelled and unlabelled patches, p_u = argmax teacher(u)     no gradient
           f = feature before the last layer, logits z = W f + b
           memory, per class k: mu_s, S_s of f(x) at true voxels labelled k          student
                                mu_t, S_t of f_teacher(u) at voxels of p_u = k       teacher
           z~_k = z_k + lambda (w_k - w_y).(mu_t^y - mu_s^y)
                      + lambda / 2 (w_k - w_y)' S_t^y (w_k - w_y)
           L_tsa = mean over true voxels of CE(z~, y)
           L = L_bcp + beta L_tsa;                teacher <- 0.99 teacher + 0.01 student
           lambda grows linearly from 0 at the start of stage 2 to lambda_0 at the end

    L_tsa is an upper bound of the cross-entropy expected over features f + d, d ~ N(lambda (mu_t -
    mu_s), lambda S_t). The correction depends on the label and the class alone, so it is a K x K
    table; the gradient goes into f, and into W through z and through the table. For regions: two
    numbers each, and the binary cross-entropy.

    Reconstructed, so open to doubt: beta, lambda_0 and its ramp, that f is the last full-resolution
    feature, moments as averages over steps, that only true voxels count, the direction (the
    abstract has it the other way round: `direction=teacher_to_student`). GraphCL's correlation
    clustering is off; here it is a mean over pairs of places of a sample, published a sum over
    pairs with kappa = 0.01, so weights do not compare (0.01 there is 0.01 N^2 here, N places). Its
    graph over the samples of a batch is left out, since a tile's prediction would depend on its
    neighbours in the batch.

    Deviates from BCP as `SSLTrainerBCP` does; from TSA in that lambda grows from the start of stage
    2 and the table is made from the moments of the steps before, since losses change no state.
    """

    method: ClassVar[str] = "TransMedSeg, transferable semantic augmentation (reconstructed)"
    paper: ClassVar[str] = "Wang et al. 2025, arXiv:2505.14753"
    twin: ClassVar[str] = "SSLTrainerSupervised+ema_decay=0.99+deploy=student"
    networks: ClassVar[str] = "PlainConvUNet, ResidualEncoderUNet"
    needs_unet: ClassVar[bool] = True
    step_cost: ClassVar[float] = 4 / 3

    deploy: Literal["teacher", "student"] = "student"
    box: float = 2 / 3  # side of the box as a fraction of the patch
    transfer_weight: float = 0.1  # beta, weight of L_tsa; not published
    strength: float = 0.25  # lambda_0, of shift and spread at the end; not published, TSA's
    # whose features are augmented; "student_to_teacher" is TSA's, the other one the abstract's
    direction: Literal["student_to_teacher", "teacher_to_student"] = "student_to_teacher"
    covariance: Literal["auto", "full", "diagonal"] = "auto"  # auto: full up to 64 channels
    memory_decay: float = 0.99  # weight of the old moments a step; not published
    min_confidence: float = 0.0  # of pseudo-labelled voxels behind the moments; reconstructed
    class_balanced: bool = False  # mean of L_tsa over classes instead of voxels
    cluster_weight: float = 0.0  # kappa, weight of L_CC as a mean over pairs; GraphCL: as a sum
    clusters: int = 10  # groups of L_CC; not known of GraphCL, DeepCut's
    cluster_temperature: float = 2.0  # tau of L_CC

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        cls.require(0 < cls.box < 1, "box", "between 0 and 1")
        for name in ("transfer_weight", "strength", "cluster_weight"):
            cls.require(getattr(cls, name) >= 0, name, "0 or more")
        cls.require(0 <= cls.memory_decay < 1, "memory_decay", "in [0, 1)")
        cls.require(0 <= cls.min_confidence < 1, "min_confidence", "in [0, 1)")
        cls.require(cls.clusters >= 2, "clusters", "at least 2")
        cls.require(cls.cluster_temperature > 1, "cluster_temperature", "above 1")

    def build_companions(self) -> dict[str, nn.Module]:
        """Return the memory of both sides, and the groups of L_CC where it has a weight."""
        companions: dict[str, nn.Module] = {}
        if self.transfer_weight > 0:
            groups = 2 * self.num_heads if self.regions else self.num_heads
            size = self.classifier.in_channels
            shape = groups, size, self.memory_decay, self.diagonal
            companions |= {"source": ClassMoments(*shape), "target": ClassMoments(*shape)}
        if self.cluster_weight > 0:
            size = self.student.encoder.output_channels[-1]
            companions["clusters"] = TokenClusters(size, self.clusters)
        return companions

    @property
    def classifier(self) -> Any:
        """The student's last layer, logits = W f + b."""
        return self.student.decoder.seg_layers[-1]

    @property
    def diagonal(self) -> bool:
        """True if only variances are kept."""
        small = self.classifier.in_channels <= FULL_COVARIANCE
        return self.covariance == "diagonal" or (self.covariance == "auto" and not small)

    def after_step(self, observed: dict[str, list[Tensor]]) -> None:
        """Move the teacher and the memory."""
        super().after_step(observed)
        for name in ("source", "target"):
            if f"{name}_mean" in observed:
                moments = Moments(*(observed[f"{name}_{field}"][0] for field in Moments._fields))
                self.companions[name].update(moments)

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
        with torch.no_grad():
            aim = self.tap(self.teacher, x_u)
        prob = to_prob(full_res(aim.output), self.regions)
        pseudo_label = self.pseudo_labels(prob, batch)
        true_voxels = self.random_directions(inside)
        mixed = self.tap(self.student, torch.where(true_voxels, batch.x_l, x_u))
        # Deviates: published on GraphCL, an extension of BCP
        terms = self.mix_loss(mixed.output, batch, pseudo_label, true_voxels)
        if self.transfer_weight > 0:
            target, annotated = self.annotation(batch, true_voxels)
            sure = confidence(prob, self.regions).amin(1, keepdim=True) >= self.min_confidence
            known = batch.valid_u & sure
            self.remember("source", mixed.feature, target, annotated)
            self.remember("target", aim.feature, pseudo_label, known)
            if self.direction == "student_to_teacher":
                expected = self.transfer_loss(full_res(mixed.output), target, annotated)
            else:
                logits = self.classify(aim.feature)
                expected = self.transfer_loss(logits, pseudo_label, known)
            terms["unsup_transfer"] = self.transfer_weight * expected
        if self.cluster_weight > 0:
            terms["unsup_cluster"] = self.cluster_weight * self.cluster_loss(mixed)
        yield terms

    def annotation(self, batch: Batch, true_voxels: Tensor) -> tuple[Tensor, Tensor]:
        """Return labels without the ignore channel, and the true voxels whose annotation is known.

        Padding is not: what a network sees there would count as features of background.
        """
        target, known = self.known_labels(batch)
        return target, true_voxels & known

    def remember(self, name: str, feature: Tensor, label: Tensor, keep: Tensor) -> None:
        """Observe the moments of the features of each class, or of each region's two sides."""
        if self.regions:
            parts = (side & keep for r in label.bool().split(1, 1) for side in (~r, r))
        else:
            parts = ((label == k) & keep for k in range(self.num_heads))
        moments = sampled_moments(feature.detach(), parts, MOST_VOXELS, LEAST_VOXELS, self.diagonal)
        for field, value in moments._asdict().items():
            self.observe(f"{name}_{field}", value)

    def transfer_loss(self, logits: Tensor, label: Tensor, keep: Tensor) -> Tensor:
        """Return L_tsa with the table of the moments of the steps before."""
        # Deviates: TSA's lambda grows from the start of training
        stage = (self.progress - self.pretrain) / (1 - self.pretrain)
        self.track("strength", self.strength * stage)
        return expected_ce(
            logits,
            label,
            self.shift_table(self.strength * stage),
            keep,
            regions=self.regions,
            balanced=self.class_balanced,
        )

    def shift_table(self, strength: float) -> Tensor:
        """Return what the logits get added by label; classes seen on one side only spread."""
        # Deviates: of the steps before; TSA and ISDA move their statistics first
        here, there = self.companions["source"], self.companions["target"]
        if self.direction == "teacher_to_student":
            here, there = there, here
        both = (here.seen() & there.seen())[:, None]
        gap = torch.where(both, there.mean - here.mean, 0)
        variance = there.covariance
        traces = variance if self.diagonal else variance.diagonal(dim1=1, dim2=2)
        self.track("mean_gap", gap.norm(dim=1).mean())
        self.track("spread", traces.sum(1).mean())
        weight = self.classifier.weight.flatten(1)
        if self.regions:
            pairs = (t.unflatten(0, (-1, 2)) for t in (gap, variance))
            return region_shift(weight, *pairs, strength)
        return class_shift(weight, gap, variance, strength)

    def classify(self, feature: Tensor) -> Tensor:
        """Return the student's last layer on a feature that gets no gradient."""
        conv = conv2d if feature.ndim == 4 else conv3d
        return conv(feature.detach(), self.classifier.weight, self.classifier.bias)

    def cluster_loss(self, mixed: Tapped) -> Tensor:
        """Return L_CC of the student's bottleneck."""
        places = mixed.bottleneck.flatten(2).transpose(1, 2)
        affinities = affinity(places, self.cluster_temperature)
        return clustering_loss(affinities, self.companions["clusters"](places, affinities))
