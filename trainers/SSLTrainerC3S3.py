"""Complementary competition and contrastive selection."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from nnunet_ssl.base import Terms
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.duo import TwoNetworkTrainer
from nnunet_ssl.functional import (
    Places,
    cached_gradients,
    competition_loss,
    competition_score,
    draw_places,
    full_res,
    gather_places,
    hard_labels,
    iuc_contrast,
    outcome_contrast,
    sigmoid_rampup,
    view_cosine,
)

Outputs = tuple[Tensor, ...]


class SSLTrainerC3S3(TwoNetworkTrainer):
    """C3S3: the network that does better on labels teaches the other; contrast by outcome.

    He, Lin, Chen, Xu & Zheng, ICME 2025, arXiv:2506.07368; the authors' released code. Networks A
    and B, two intensity views m = 1, 2 of each patch:

        sup  = sum_{A,B} 1/2 sum_m CE + Dice
        A wins if sum_m (a CE + (1 - a) (1 - Dice)) is smaller on the labelled patches
        cp   = sum_m mean (p_loser,m - softmax(z_winner,m / T))^2 on unlabelled patches
        cos  = sum_{A,B} mean (1 - cos(z_1, z_2))                          all patches
        con  = mean over the pairs (A_m, B_m') of the contrast of voxels   all patches
        L    = sup + w(s) cp + cos + lambda con

    con works on voxels drawn by outcome: both networks say class k (I), at least one does (O), or
    none; see `functional.outcome_contrast`. Labelled and unlabelled patches run in turn. Of each,
    the first view keeps the graphs of both networks, while the second runs without a graph first
    and with one afterwards.

    Deviates: architectures are nnU-Net's, plain and residual (one block a stage, published 3, 4, 6,
    3), as are Dice, deep supervision (of sup only), batch, momentum 0.99 (published 0.9, so steps
    are ten times as large) and the decay of the learning rate (published constant). The two views
    differ (as the text has it): in the code they are one tensor, and without dropout cos would
    be 0. con pulls agreeing voxels together as the text says; the released formula drives them
    apart (`contrast=released+contrast_weight=8`, on voxels drawn alike instead of all). Contrast is
    within labelled and within unlabelled patches, one-vs-rest over classes, a class weighing in
    with the voxels that both networks agree on; its weight is chosen. The cosine is over classes,
    not along the last image axis. w ramps up over a quarter of training; the published ramp needs
    2.4 times the published training. The competition's Dice is over the batch and not squared;
    where patches hold no foreground, CE alone decides who wins. Gradients are clipped for each
    network by itself. Padding counts in sup only.
    """

    method: ClassVar[str] = "Complementary competition and contrastive selection"
    paper: ClassVar[str] = "He et al. 2025, arXiv:2506.07368"
    supports_ignore: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("stock",)
    step_cost: ClassVar[float] = 28 / 3
    step_memory: ClassVar[float] = 2.0

    competition_weight: float = 0.1  # of cp, after the ramp-up
    rampup: float = 0.25  # of cp, fraction of training; Deviates: 6000 steps in 2500
    ce_share: float = 0.5  # a, in the competition; published 0.8 (LA), 0.5 (Pancreas)
    sharpening: float = 0.1  # T
    view_weight: float = 1.0  # of cos
    contrast: Literal["intended", "released"] = "intended"
    # Deviates: lambda of the intended form is not published, the released one has 8
    contrast_weight: float = 0.05
    contrast_temperature: float = 0.1  # tau
    contrast_samples: int = 1024  # voxels of the labelled, and of the unlabelled patches
    embedding: int = 64  # channels in which voxels are compared

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        for name in ("competition_weight", "rampup", "view_weight", "contrast_weight"):
            cls.require(getattr(cls, name) >= 0, name, "0 or more")
        rule = "above 0 and at most 1, since it decides alone where patches hold no foreground"
        cls.require(0 < cls.ce_share <= 1, "ce_share", rule)
        cls.require(cls.sharpening > 0, "sharpening", "above 0")
        cls.require(cls.contrast_temperature >= 0.025, "contrast_temperature", "at least 0.025")
        for name in ("contrast_samples", "embedding"):
            cls.require(getattr(cls, name) >= 2, name, "at least 2")

    def build_companions(self) -> dict[str, nn.Module]:
        """Return what maps each network's last features to the space of the contrast."""
        width = self.configuration_manager.network_arch_init_kwargs["features_per_stage"][0]

        def projector() -> nn.Module:
            return nn.Sequential(
                nn.Linear(width, width), nn.PReLU(), nn.Linear(width, self.embedding)
            )

        return {"student_projector": projector(), "peer_projector": projector()}

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the loss of each view of the labelled, then of the unlabelled patches."""
        scores: list[Tensor] = []
        # Deviates: in the code both views are one tensor
        views = [batch.x_l, self.strong_intensity(batch.x_l, batch.valid_l)]
        supervised = partial(self.labeled_terms, batch=batch, scores=scores)
        # Deviates: contrast within labelled and within unlabelled patches, published over both
        yield from self.joint(views, batch.valid_l, supervised, self.enable_deep_supervision)
        views = [batch.views["stock"], self.strong_intensity(batch.x_u, batch.valid_u)]
        competition = partial(self.unlabeled_terms, a_wins=scores[0] < scores[1])
        yield from self.joint(views, batch.valid_u, competition)

    def joint(
        self,
        views: Sequence[Tensor],
        valid: Tensor,
        own_terms: Callable[..., Iterator[Terms]],
        deep: bool = False,
    ) -> Iterator[Terms]:
        """Yield for each view of the same patches the terms that join both views and networks.

        Args:
            views: two, of the same voxels.
            valid: (B, 1, *) bool, voxels that count.
            own_terms: what these patches have beside contrast and cosine.
            deep: it needs the logits of all scales.
        """
        first, places = self.outputs(views[0], valid, deep)

        def terms(chunks: list[Outputs]) -> Iterator[Terms]:
            # by network and view: logits at all scales, embeddings
            logits = [[c[: len(c) // 2 - 1] for c in chunks], [c[len(c) // 2 : -1] for c in chunks]]
            embedded = [[c[len(c) // 2 - 1] for c in chunks], [c[-1] for c in chunks]]
            yield from own_terms(logits, valid)
            full = [[z[0] for z in of_network] for of_network in logits]
            # halved, as labelled and unlabelled patches are two halves of one mean
            if self.view_weight:
                for one, two in full:
                    yield {"unsup_view": self.view_weight / 2 * view_cosine(one, two, valid)}
            if self.contrast_weight:
                yield from self.contrast_terms(full, embedded, places)

        yield from cached_gradients(
            lambda x: self.outputs(x, valid, deep, places)[0], views[1:], terms, first
        )

    def outputs(
        self, x: Tensor, valid: Tensor, deep: bool, places: Places | None = None
    ) -> tuple[Outputs, Places]:
        """Return logits (of all scales) and embeddings at places, of the student, then of the peer.

        Without places they are drawn by what the two networks say.
        """
        tapped = [self.tap(network, x) for network in (self.student, self.peer)]
        if places is None:
            labels = [hard_labels(full_res(t.output), regions=False) for t in tapped]
            # Deviates: published over all voxels
            by_outcome = self.contrast == "intended"
            places = draw_places(*labels, valid, self.num_heads, self.contrast_samples, by_outcome)
        found: list[Tensor] = []
        for name, t in zip(("student", "peer"), tapped, strict=True):
            found += t.output if deep else [full_res(t.output)]
            projector = self.companions[f"{name}_projector"]
            with torch.autocast(self.device.type, enabled=False):
                voxels = projector(gather_places(t.feature, places).float())
                found.append(normalize(voxels, dim=1))
        return tuple(found), places

    def labeled_terms(
        self, logits: list[list[Outputs]], valid: Tensor, batch: Batch, scores: list[Tensor]
    ) -> Iterator[Terms]:
        """Yield the supervised loss of each output and append each network's score."""
        counted = valid
        if self.label_manager.has_ignore_label:
            counted = counted & (batch.target != self.label_manager.ignore_label)
        for of_network in logits:
            for z in of_network:
                output = list(z) if self.enable_deep_supervision else z[0]
                yield {"sup": 0.5 * self.loss(output, batch.y_l)}
            views = [
                competition_score(z[0], batch.target, counted, self.ce_share) for z in of_network
            ]
            scores.append(torch.stack(views).sum())

    def unlabeled_terms(
        self, logits: list[list[Outputs]], valid: Tensor, a_wins: Tensor
    ) -> Iterator[Terms]:
        """Yield what the loser of the competition learns from the winner."""
        weight = self.competition_weight * sigmoid_rampup(self.progress, self.rampup)
        self.track("weight", weight)
        self.track("student_wins", a_wins.float())
        a, b = (z[0] for z in (logits[0][0], logits[1][0]))
        prob = torch.where(a_wins, a, b).detach().softmax(1)
        self.track_pseudo_labels(prob, valid, valid)
        self.track_agreement(torch.where(a_wins, b, a), hard_labels(prob, False), valid)
        for (a, *_), (b, *_) in zip(*logits, strict=True):
            loss = competition_loss(a, b, a_wins, self.sharpening, valid)
            yield {"unsup_competition": weight * loss}

    def contrast_terms(
        self, full: list[list[Tensor]], embedded: list[list[Tensor]], places: Places
    ) -> Iterator[Terms]:
        """Yield the contrast of each pair of a student's and a peer's view."""
        loss = outcome_contrast if self.contrast == "intended" else iuc_contrast
        labels = [[gather_places(z, places).argmax(1) for z in views] for views in full]
        for i, j in product(range(2), repeat=2):
            with torch.autocast(self.device.type, enabled=False):
                value = loss(
                    embedded[0][i],
                    embedded[1][j],
                    labels[0][i],
                    labels[1][j],
                    places.counted,
                    self.num_heads,
                    self.contrast_temperature,
                )
            # the mean of four pairs, halved as above
            yield {"unsup_contrast": self.contrast_weight / 8 * value}
