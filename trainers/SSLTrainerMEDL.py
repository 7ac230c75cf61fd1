"""Mutual evidential deep learning."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from nnunet_ssl.base import Terms
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.duo import TwoNetworkTrainer
from nnunet_ssl.functional import (
    binary_logits,
    curriculum_weight,
    dirichlet_logits,
    fisher_evidential_loss,
    full_res,
    fuse_opinions,
    opinion,
    shared_count,
    sigmoid_rampup,
    voxel_reliability,
)
from nnunet_ssl.modules.networks import Link


class SSLTrainerMEDL(TwoNetworkTrainer):
    """Mutual evidential deep learning: the fused evidence of two architectures teaches both.

    He, Bi, Li, Pun, Jiao & Jin 2025, arXiv:2505.12418 (BIBM 2024); no released code. For each of
    the two networks i, from the start of training, s = step / N:

        a = evidence(logits) + 1,  p = a / sum a,  b = (a - 1) / sum a,  u = K / sum a
        b_f, u_f = caef(b_1, u_1, b_2, u_2)                                      no gradient
        omega(u) = 1 + Xi tanh(rank(u) (2 s - 1)),  rank in (-1, 1) within a sample
        L_l = CE + Dice(p_l, truth)
        L_w = mean omega(l1 u_i + l2 u_f) CE(p_l, truth)
        y = argmax b_f,  w = 1 - U / max U,  U = e^{u_f} H(b_f)                  no gradient
        L_u = w-weighted CE + Dice(p_u, y)
        L_I = mean w omega(u_f) fisher_evidential(a_u, y)
        L  += L_l + L_w + ramp L_u + lambda_GWU(s) L_I

    The fused opinion carries no gradient, so the two networks' losses do not meet; both graphs of
    B patches are alive together, since each network's opinion is the other's target.

    Deviates: architectures are nnU-Net's, plain and residual; p takes the softmax's place in all
    losses, so that losses, uncertainty and prediction agree (`probability=softmax`: the other
    reading, p = softmax(logits) in L_l, L_w, L_u and for prediction). Ranks run from sure to unsure
    as the paper's aim and figure have it, not as its text. Reliability is normalised by the largest
    U of a sample: the published sum leaves all weights near 1 (`reliability=upcol`). L_u is ramped
    up over the first fifth of training, since fresh nnU-Nets predict background (`rampup=0` as
    published). What makes evidence, Xi, c and the size of lambda_GWU are not in the paper: c is
    I-EDL's, lambda_GWU is MCF's, Xi is chosen here, and evidence is nearly exp(logits), since with
    I-EDL's softplus short trainings of nnU-Nets never found a class (`evidence=softplus`). Labelled
    and unlabelled patches run in turn (instance norm does not join them). Each region is an opinion
    of two classes. The CE of L_u is divided by all voxels, its Dice leaves out classes of a few;
    coarser scales take w and y of the nearest voxel. Padding does not count in terms beside L_l.
    """

    method: ClassVar[str] = "Mutual evidential deep learning"
    paper: ClassVar[str] = "He et al. 2025, arXiv:2505.12418"
    supports_regions: ClassVar[bool] = True
    supports_ignore: ClassVar[bool] = True
    supports_ddp: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("stock",)  # one augmentation for all, no weak and strong
    step_cost: ClassVar[float] = 4.0
    step_memory: ClassVar[float] = 2.0

    evidence: Literal["softplus", "exp"] = "exp"  # of logits; not published, I-EDL's is softplus
    # what CE and Dice see, and what predicts; "softmax": evidence makes opinions and L_I alone;
    # Deviates: the paper does not tell which
    probability: Literal["expected", "softmax"] = "expected"
    fusion: Literal["caef", "dempster", "precursor"] = "caef"
    fused_share: float = 0.5  # lambda_2, of the fused uncertainty on labelled voxels
    curriculum: float = 0.5  # Xi, how far weights of easy and hard voxels differ; not published
    # Deviates: "upcol" is the published normaliser
    reliability: Literal["max", "upcol", "pignistic"] = "max"
    unsup_weight: float = 1.0  # of L_u
    rampup: float = 0.2  # of L_u, fraction of training; Deviates: published without
    evidential_weight: float = 0.1  # of L_I at the end of training; not published, MCF's
    det_weight: float = 0.05  # c, of log |I| in L_I; not published, I-EDL's for CIFAR-10

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        for name in ("unsup_weight", "rampup", "evidential_weight", "det_weight"):
            cls.require(getattr(cls, name) >= 0, name, "0 or more")
        cls.require(0 <= cls.fused_share <= 1, "fused_share", "in [0, 1]")
        cls.require(0 <= cls.curriculum < 1, "curriculum", "in [0, 1)")

    @classmethod
    def link(cls) -> Link:
        """Logits give evidence, whose expected probability predicts, or are those of nnU-Net."""
        return cls.evidence if cls.probability == "expected" else "softmax"

    def __init_subclass__(cls) -> None:
        """Let the cost be that of labelled patches alone where no others are needed."""
        super().__init_subclass__()
        cls.step_cost = 4.0 if cls.unsup_weight > 0 or cls.evidential_weight > 0 else 2.0

    def needs_unlabeled(self, progress: float) -> bool:
        """Without weights for them, no unlabelled patches."""
        return self.unsup_weight > 0 or self.evidential_weight > 0

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the losses of both networks on labelled, then on unlabelled patches."""
        yield self.labeled_terms(batch)
        if self.needs_unlabeled(self.progress):
            yield self.unlabeled_terms(batch.views["stock"], batch.valid_u)

    def labeled_terms(self, batch: Batch) -> Terms:
        """Return L_l and L_w, summed over the two networks."""
        outputs = [self.student(batch.x_l), self.peer(batch.x_l)]
        *own, (_, u_fused) = self.opinions(outputs)
        counted = self.rows(self.known_labels(batch)[1])

        def terms(outputs: list[Any]) -> Iterator[Terms]:
            for output, (_, u) in zip(outputs, own, strict=True):
                yield {"sup": self.loss(self.linked(output), batch.y_l)}
                mixed = (1 - self.fused_share) * u + self.fused_share * u_fused
                ce = self.voxel_ce(self.linked(full_res(output)), batch.target)
                yield {"sup_curriculum": masked_mean(self.omega(mixed, counted) * ce, counted)}

        return self.terms_at(outputs, terms)

    def unlabeled_terms(self, x: Tensor, valid: Tensor) -> Terms:
        """Return the ramped L_u and L_I, summed over the two networks."""
        outputs = [self.student(x), self.peer(x)]
        *_, (belief, u) = self.opinions(outputs)
        decision = belief.argmax(1, keepdim=True)
        label = self.per_region(decision).bool() if self.regions else decision
        rows = self.rows(valid)
        reliable = voxel_reliability(belief, u, rows, self.reliability)
        weight = self.per_region(reliable)
        self.track_fusion(belief, u, weight, valid)
        self.track_agreement(outputs[0], label, valid)
        ramp = self.unsup_weight * sigmoid_rampup(self.progress, self.rampup)
        gwu = self.evidential_weight * sigmoid_rampup(self.progress, 1.0)
        self.track("weight", ramp)
        evidential_weight = reliable * self.omega(u, rows)

        def terms(outputs: list[Any]) -> Iterator[Terms]:
            for output in outputs:
                # Deviates: CE by all voxels, Dice without classes of a few
                loss = self.pseudo_loss(self.linked(output), label, weight, valid)
                yield {"unsup": ramp * loss}
                alpha = opinion(self.as_rows(full_res(output)), self.evidence).alpha
                fie = fisher_evidential_loss(alpha, decision, self.det_weight)
                yield {"unsup_evidence": gwu * masked_mean(evidential_weight * fie, rows)}

        return self.terms_at(outputs, terms)

    @torch.no_grad()
    def opinions(self, outputs: list[Any]) -> list[tuple[Tensor, Tensor]]:
        """Return belief and uncertainty of student, peer and of the two fused, without gradient.

        Each is (N, K, *) and (N, 1, *); see `functional.evidence` for regions.
        """
        both = [opinion(self.as_rows(full_res(o)), self.evidence) for o in outputs]
        fused = fuse_opinions(*both, self.fusion)
        return [*((o.belief, o.uncertainty) for o in both), fused]

    def omega(self, uncertainty: Tensor, valid: Tensor) -> Tensor:
        """Return the curriculum weight of each voxel."""
        # Deviates: from sure to unsure as the paper's figure has it, not as its text
        return curriculum_weight(uncertainty, valid, self.progress, self.curriculum)

    def linked(self, output: Any) -> Any:
        """Return logits whose softmax (sigmoid) is p, at all scales."""
        if self.probability == "softmax":
            return output
        if isinstance(output, Tensor):
            return dirichlet_logits(output, self.regions, self.evidence)
        return [dirichlet_logits(z, self.regions, self.evidence) for z in output]

    def voxel_ce(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of each voxel, (N, 1, *) with a row for each region."""
        if self.regions:
            truth = target[:, : self.num_heads].float()
            ce = binary_cross_entropy_with_logits(logits, truth, reduction="none")
            return ce.flatten(0, 1)[:, None]
        label = torch.where(target < self.num_heads, target, 0)[:, 0].long()
        return cross_entropy(logits, label, reduction="none")[:, None]

    def track_fusion(self, belief: Tensor, u: Tensor, weight: Tensor, valid: Tensor) -> None:
        """Log the fused opinion; what is more reliable than not counts as covered."""
        prob = belief + u / belief.shape[1]
        prob = self.per_region(prob[:, 1:]) if self.regions else prob
        self.track_pseudo_labels(prob, weight > 0.5, valid)
        self.track("reliability", masked_mean(weight, valid.expand_as(weight)))
        self.track("uncertainty", masked_mean(u, self.rows(valid)))

    def as_rows(self, logits: Tensor) -> Tensor:
        """Return logits of opinions, (N, K, *): regions become samples of two classes."""
        return binary_logits(logits) if self.regions else logits

    def rows(self, mask: Tensor) -> Tensor:
        """Repeat a mask (B, 1, *) for each region: (N, 1, *)."""
        return mask.repeat_interleave(self.num_heads, 0) if self.regions else mask

    def per_region(self, rows: Tensor) -> Tensor:
        """Give rows (N, 1, *) of regions back their channels: (B, R, *)."""
        return rows[:, 0].unflatten(0, (-1, self.num_heads)) if self.regions else rows


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the voxels of a mask of the same shape, of all processes; 0 if there are none."""
    return (values * mask).sum() / shared_count(mask.sum())
