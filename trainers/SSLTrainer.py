"""The default."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nnunet_ssl import checkpoint
from nnunet_ssl.base import SemiSupervisedTrainer, Terms
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import (
    apply_flips,
    apply_rot90,
    exchange,
    full_res,
    hard_labels,
    joint_sum,
    rampup_between,
    random_boxes,
    random_flips,
    random_rot90,
    to_prob,
)
from nnunet_ssl.history import mean_of
from nnunet_ssl.modules import (
    ClassBrake,
    ClassThresholds,
    DriftGauge,
    Readiness,
    confirmed_for,
    overlap_counts,
)

LEAST_WARMUP = 1000  # steps
LEAST_PATCH = 0.25  # of a case (2D: slice) of median size; a smaller patch may cut organs in two


class SSLTrainer(SemiSupervisedTrainer):
    """The default: sure pseudo-labels of an EMA teacher on one strong view.

    Made of published parts: weak-to-strong pseudo-labels (FixMatch, arXiv:2001.07685; UniMatch,
    arXiv:2208.09910) and an EMA teacher (Mean Teacher, arXiv:1703.01780). For N steps, s = step / N
    and s_0 = max(.1, min(1000 / N, .4)):

        lam = 0 for s < s_0, sigmoid ramp to s_0 + .2, then 1
        p = softmax(teacher(weak(u)));  y = pieces(argmax p)                     no gradient
        counted = max p >= tau_y,  tau_k keeps the surest 80 % of class k, within [.6, .95]
        x = flip(intensity(weak(u)));  y and counted flipped alike
        L = sup + lam b r pse
            pieces  of a class that is one piece in 98 % of the annotated cases (2D: slices), the
                 largest; the others become background. None where fewer than 20 tell, patches are
                 small, or labels partial
            sup  nnU-Net's loss; where annotated scans hold few patches (`mix_share`), in half of
                 the steps each of them shows a box of another one, as in BCP's pre-training
            pse  counted CE / #pseudo-labelled voxels + Dice over counted voxels
        b = 1, less if the teacher loses a class (always 1 with the ignore label)
        r = clip((d - .7) / .2, 0, 1), d the Dice of the student on the annotated patches of about
            the last 50 steps, mean of the classes
        teacher <- a teacher + (1 - a) student

    At the end of each epoch the drift gauge looks at 16 fixed unlabelled patches: how far the
    teacher's labels moved, how sure it is, how well the student follows. It changes nothing.

    Without unlabelled weight (lam = 0) the step is the twin's, exactly.

    With `exchange_probability=q` labelled patch i and x_i swap one box in so many of the steps, as
    in BCP (arXiv:2305.00673) in all of them; true and pseudo-labelled voxels are then normalised
    apart. With `unlabeled_foreground=q` so many unlabelled patches are drawn around foreground that
    the teacher saw. Both cost accuracy where they were measured.

    Deviates from those sources: class-relative thresholds; the first part of training is supervised
    only; r; pieces and boxes between annotated patches, which are BCP's but for the conditions.
    Padding of labelled patches counts as background, as in nnU-Net; padding of unlabelled ones does
    not count.
    """

    method: ClassVar[str] = "default of nnunet_ssl"
    paper: ClassVar[str] = "parts of FixMatch, UniMatch, Mean Teacher and BCP"
    twin: ClassVar[str] = "SSLTrainerSupervised+labeled_mix=auto"
    needs_teacher: ClassVar[bool] = True
    supports_regions: ClassVar[bool] = True
    supports_ignore: ClassVar[bool] = True
    supports_ddp: ClassVar[bool] = True
    step_cost: ClassVar[float] = 7 / 3
    pieces_seen: ClassVar[int] = 20
    pieces_share: ClassVar[float] = 0.98

    labeled_mix: float | Literal["auto"] = "auto"  # Deviates: BCP, all steps of a pre-training
    unsup_weight: float = 1.0  # lambda, after the ramp-up
    normalized: bool = False  # divide the loss by 1 + lam b r
    # fractions of training: on labelled scans only, and from which the full weight holds; `ramp`
    warmup: float | Literal["auto"] = "auto"
    rampup_end: float | Literal["auto"] = "auto"
    exchange_probability: float = 0.0  # q, of a step in which patches swap boxes
    box_low: float = 0.5  # smallest and
    box_high: float = 0.8  # largest side of a box, as a fraction of the patch
    threshold_low: float = 0.6  # limits of
    threshold_high: float = 0.95  # tau_k
    threshold_drop: float = 0.2  # share of each class that may be left out as unsure
    ready_low: float = 0.7  # Dice on annotated patches up to which unlabelled ones do not count,
    ready_high: float = 0.9  # and from which they count fully
    # of the pseudo-labels; "auto": see `keep_pieces`
    largest_component: Literal["auto", "on", "off"] = "auto"
    brake_floor: float = 0.2  # share of its true volume under which a lost class brakes
    # share of the unlabelled patches that is drawn around foreground which the teacher saw, if a
    # patch holds less than half of a median case
    unlabeled_foreground: float = 0.0

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        shares = "in [0, 1], low limits not above high ones"
        cls.require(cls.unsup_weight >= 0, "unsup_weight", "0 or more")
        rule = "auto or in [0, 1), since readiness looks at patches without boxes"
        cls.require(cls.labeled_mix != 1 or cls.ready_high == 0, "labeled_mix", rule)
        start, end = cls.ramp()
        cls.require(0 <= start < 1, "warmup", "auto or in [0, 1)")
        rule = f"auto or between warmup and 1, here from {start:g}"
        cls.require(start <= end <= 1, "rampup_end", rule)
        cls.require(0 <= cls.exchange_probability <= 1, "exchange_probability", "in [0, 1]")
        cls.require(0 < cls.box_low <= cls.box_high <= 1, "box_low", shares + " and above 0")
        cls.require(0 <= cls.threshold_low <= cls.threshold_high <= 1, "threshold_low", shares)
        cls.require(0 <= cls.threshold_drop < 1, "threshold_drop", "in [0, 1)")
        cls.require(0 <= cls.ready_low <= cls.ready_high <= 1, "ready_low", shares)
        cls.require(cls.brake_floor > 0, "brake_floor", "above 0")
        rule = "in [0, 1), so that some patches are drawn anywhere"
        cls.require(0 <= cls.unlabeled_foreground < 1, "unlabeled_foreground", rule)

    @classmethod
    def ramp(cls) -> tuple[float, float]:
        """Return at which fractions of training unlabelled patches begin to count, and count fully.

        "auto" is a tenth of training, or 1000 steps if that is more, but not over 40 %: before,
        the teacher has little to teach. Then the weight takes a fifth of training to rise.
        """
        start, end = cls.warmup, cls.rampup_end
        if start == "auto":
            steps = cls.num_epochs * cls.num_iterations_per_epoch
            start = max(0.1, min(LEAST_WARMUP / steps, 0.4))
        if end == "auto":
            end = min(start + 0.2, 1)
        return float(start), float(end)

    def build_companions(self) -> dict[str, nn.Module]:
        """Return what remembers confidences and class volumes."""
        classes = self.num_heads if self.regions else self.num_heads - 1
        return {
            "thresholds": ClassThresholds(
                self.num_heads,
                low=self.threshold_low,
                high=self.threshold_high,
                quantile=self.threshold_drop,
                regions=self.regions,
            ),
            "brake": ClassBrake(classes, floor=self.brake_floor),
            "readiness": Readiness(classes, low=self.ready_low, high=self.ready_high),
        }

    def needs_unlabeled(self, progress: float) -> bool:
        """Load them a little before they count, so that thresholds know the teacher by then."""
        return progress > 0.8 * self.ramp()[0]

    def foreground_searches(self) -> tuple[float, Sequence[float]]:
        """Look for foreground when the ramp begins, and twice more, if patches are small."""
        if self.unsup_weight == 0 or self.unlabeled_foreground == 0 or self.patch_share() >= 0.5:
            return 0.0, ()
        start = self.ramp()[0]
        return self.unlabeled_foreground, [t for t in (start, start + 0.3, start + 0.6) if t < 1]

    def after_step(self, observed: dict[str, list[Tensor]]) -> None:
        """Move teacher, thresholds and class volumes."""
        super().after_step(observed)
        if "overlaps" in observed:
            self.companions["readiness"].update(torch.stack(observed["overlaps"]).sum(0))
        if "confidences" in observed:
            self.companions["thresholds"].update_from_histogram(observed["confidences"][0])
            # partial annotations do not tell true volumes
            if not self.label_manager.has_ignore_label:
                self.companions["brake"].update(
                    observed["pseudo_shares"][0], observed["label_shares"][0]
                )

    def on_train_start(self) -> None:
        """Look at the fixed patches before the first step, also before that of a continued run."""
        super().on_train_start()
        if self.unsup_weight > 0:
            x, valid = self.fixed_patches(least=16)
            foreground = self.num_heads if self.regions else self.num_heads - 1
            self._gauge = DriftGauge(
                x, valid, foreground, self.regions, self.batch_size, self.look, self.look_again
            )

    def look(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher's decisions on fixed patches, and which of them are sure."""
        with self._autocast():
            prob = self.teacher_prob(x.to(self.device, non_blocking=True))
        counted = self.companions["thresholds"].mask(prob) & valid.to(
            self.device, non_blocking=True
        )
        return hard_labels(prob, self.regions), counted

    def look_again(self, x: Tensor, valid: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the student's decisions on a strong view, and labels and validity moved alike."""
        x, valid = (t.to(self.device, non_blocking=True) for t in (x, valid))
        # with a cache as in nnU-Net's validation, so that one compiled graph serves both
        with checkpoint.own_randomness(0, self.device), self._autocast(cache=True):
            x, labels, _, valid = self.strong_view(x, labels, valid, valid)
            prob = to_prob(full_res(self.student(x)), self.regions)
        return hard_labels(prob, self.regions), labels, valid

    def on_epoch_end(self) -> None:
        """Say so if unlabelled patches still do not count when they should count fully."""
        epoch, full = self.current_epoch, self.ramp()[1] * self.num_epochs
        super().on_epoch_end()
        if epoch < full <= epoch + 1 and self.companions["readiness"].value() == 0:
            self._warn_of_readiness("do not count yet")

    def on_train_end(self) -> None:
        """Say so if the training was too short for unlabelled patches to count."""
        super().on_train_end()
        if self.companions["readiness"].value() < 0.5:
            self._warn_of_readiness("did not count, or little")

    def _warn_of_readiness(self, what: str) -> None:
        if self.unsup_weight == 0:
            return
        dice = self.companions["readiness"].dice()
        self.print_to_log_file(
            f"WARNING: unlabelled scans {what}: on annotated patches the student reaches a Dice of "
            f"only {dice:.2f}, and pseudo-labels are no better. They begin to count at "
            f"{self.ready_low:g} and count fully at {self.ready_high:g}. Train longer, or lower "
            f"ready_low and ready_high."
        )

    def measure_drift(self) -> dict[str, float | list[float]]:
        """Measure the fixed patches; warn where sureness rises while the student follows less.

        The warning comes when this begins, then every fifty epochs.
        """
        if self.unsup_weight == 0:
            return {}
        measured = self._gauge.measure()
        # a continued run may have begun without the gauge
        records = [r for r in self._history.records if r.get("drift")]
        records.append({"progress": self.progress, "drift": measured})
        values = [[mean_of(r["drift"][n]) for r in records] for n in ("coverage", "agreement")]
        ramped = sum(r["progress"] > self.ramp()[1] for r in records)
        streak = min(confirmed_for(*values), ramped)
        if streak == 1 or (streak and streak % 50 == 0):
            self.print_to_log_file(
                "WARNING: over the last ten epochs the teacher became no less sure of unlabelled "
                "patches while the student follows it less. Pseudo-labels may confirm their own "
                "mistakes: compare with SSLTrainerSupervised, or annotate more scans."
            )
        return measured

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the loss of the labelled chunk, then of the unlabelled one."""
        weight = self.unsup_weight * rampup_between(self.progress, *self.ramp())
        self.track("weight", weight)
        if batch.x_u is not None:  # a little before they count, too
            pseudo_label, counted = self.label(batch)
        brake, ready = self.companions["brake"].value(), self.companions["readiness"].value()
        self.track("readiness", ready)
        if weight == 0:  # Deviates: FixMatch and UniMatch count unlabelled patches from the start
            yield {"sup": self.labeled_loss(batch)}
            return
        self.track("brake", brake)
        pseudo_label = self.keep_pieces(pseudo_label, batch.valid_u)
        x, pseudo_label, counted, valid = self.strong_view(
            batch.x_u, pseudo_label, counted, batch.valid_u
        )
        weight = weight * brake * ready  # Deviates: no source fades the loss so
        w_sup, w_pse = 1, weight
        if self.normalized:  # SGD keeps the twin's scale
            w_sup, w_pse = 1 / (1 + weight), weight / (1 + weight)
        if self.exchange_probability == 0 or self.draw() >= self.exchange_probability:
            yield {"sup": w_sup * self.labeled_loss(batch)}
            output = self.student(x)
            self.track_agreement(output, pseudo_label, counted)
            yield {"unsup": w_pse * self.pseudo_loss(output, pseudo_label, counted, valid)}
            return
        inside = random_boxes(len(x), x.shape[2:], self.box_low, self.box_high, device=x.device)
        mixed = exchange(batch.x_l, x, inside)
        # both chunks hold both kinds of voxels: each term is the mean over the two
        for image, true_voxels in zip(mixed, (~inside, inside), strict=True):
            output = self.student(image)
            self.observe_overlap(output, batch, true_voxels)
            sup = self.masked_loss(output, batch.target, true_voxels)
            pse = self.pseudo_loss(
                output, pseudo_label, counted & ~true_voxels, valid & ~true_voxels
            )
            terms = {"sup": w_sup * sup / 2, "unsup": w_pse * pse / 2}
            del output, sup, pse  # nothing of this chunk stays while the next one is built
            yield terms
            del terms

    def labeled_loss(self, batch: Batch) -> Tensor:
        """Return the twin's loss; observes how well the student knows its annotated patches."""
        output = self.student(batch.x_l)
        self.observe_overlap(output, batch)
        return self.loss(output, batch.y_l)

    @torch.no_grad()
    def observe_overlap(self, output: Any, batch: Batch, true_voxels: Tensor | None = None) -> None:
        """Observe the overlap of the student's decisions with annotations, from its logits."""
        if batch.mixed_l:  # harder than what readiness is scaled for
            return
        target, known = self.known_labels(batch)
        if true_voxels is not None:
            known = known & true_voxels
        labels = self.decisions(output)
        counts = overlap_counts(labels, target, known, self.num_heads, self.regions)
        self.observe("overlaps", counts)

    def label(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the teacher's decisions on the weak view and which of them count.

        Observes the statistics from which `after_step` moves thresholds and brake.
        """
        prob = self.teacher_prob(batch.x_u)
        thresholds = self.companions["thresholds"]
        # Deviates: FixMatch and UniMatch have one threshold for all classes
        counted = thresholds.mask(prob) & batch.valid_u
        self.track_pseudo_labels(prob, counted, batch.valid_u, batch.forced_fg_u)
        histogram = thresholds.confidence_histogram(
            prob, batch.valid_u, thresholds.bins, self.regions
        )
        self.observe("confidences", joint_sum(histogram))
        return hard_labels(prob, self.regions), counted

    def keep_pieces(self, labels: Tensor, valid: Tensor) -> Tensor:
        """Turn all but the largest piece of a class into background; "auto" where that is safe.

        What the teacher sees in padding is no piece. "auto": the class is one piece in 98 % of the
        annotated cases (2D: slices) that show it, 20 at least, and a patch holds enough of a case
        not to cut one organ in two. Partial annotations do not tell.
        """
        mode = self.largest_component
        small = self.patch_share(of_slice=True) < LEAST_PATCH
        if mode == "auto" and (small or self.label_manager.has_ignore_label):
            mode = "off"  # Deviates: BCP keeps the largest of every class in every patch
        return labels if mode == "off" else self.keep_largest(labels, valid, mode)

    def strong_view(
        self, x: Tensor, pseudo_label: Tensor, counted: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Change intensities and flip; labels and masks are flipped alike.

        Square 2D patches are also turned by quarters.
        """
        axes = self.inference_allowed_mirroring_axes or ()
        flips = random_flips(len(x), axes)
        turns = random_rot90(len(x)) if x.ndim == 4 and x.shape[-1] == x.shape[-2] else None

        def move(t: Tensor) -> Tensor:
            t = apply_flips(t, flips, axes)
            return t if turns is None else apply_rot90(t, turns)

        return move(self.strong_intensity(x, valid)), move(pseudo_label), move(counted), move(valid)
