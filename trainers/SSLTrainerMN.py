"""M&N: a 2D network of natural images and nnU-Net's network teach each other."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.optim import Optimizer

from nnunet_ssl.base import Phase, SemiSupervisedTrainer, Terms
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import (
    deep_supervised,
    downsample,
    full_res,
    guided_count,
    guided_share,
    hard_labels,
    soft_target_dice_loss,
    soft_target_kl,
    to_prob,
    warmup_cosine,
)
from nnunet_ssl.modules import (
    ImageSegmenter,
    SliceNetwork,
    check_backbone,
    pretrained_backbone,
)

LORA_RANK = LORA_ALPHA = 64  # as released
LORA_DROPOUT = 0.1
WARMUP = 0.1, 0.01  # of the peer's first stage; first learning rate, in maximal ones
PEER_LR = {"lora": 1e-3, "full": 1e-4}  # the second is not published


class SSLTrainerMN(SemiSupervisedTrainer):
    """M&N: a 2D model of natural images and the plan's network teach each other.

    Yeung, Ramesh, Lyu, Namburete & Rajapakse 2025 (MLMI), arXiv:2509.15167; github pakheiyeung/M-N.

        stage 1, `supervised`: both networks learn from labelled patches
        stage 2: 8 steps of the 2D network (peer), 8 of the plan's network (student), and so on
            tau = (progress - supervised) / (1 - supervised)
            n_u = floor(tau B + U(0, 1)) of B patches are unlabelled, n_l = B - n_u; at most B - 1
            q = softmax(other(x_u))                                other in eval, no gradient
            z = network([x_l, x_u])
            L = (n_l L_l(z_l, y) + n_u L_u(z_u, q)) / B,   L_u = squared Dice + KL, soft target q

    The student predicts. The peer sees volumes as slices along their coarsest axis, in a 2D
    configuration the patches themselves; its weights come as `modules.backbones` tells. tau is how
    far the learning rate has decayed, which starts anew with stage 2: the student's along
    nnU-Net's polynomial, the peer's (AdamW) along half a cosine. Both see the same crops.

    Deviates: timm's encoders (no SegFormer there) with a fresh decode head, trained in full. L_l is
    nnU-Net's own loss for the student, with deep supervision as L_u; the peer's is L_u with the
    one-hot mask. Dice over labelled and over unlabelled patches apart; KL per voxel, not per voxel
    and class, so that it is the cross-entropy for hard targets. Rounding at random for batches
    under 5. nnU-Net's SGD for the student, its augmentation; unlabelled crops anywhere (published:
    half of them at foreground of stored masks), of unlabelled scans only (published: test scans,
    too). Padding does not count, except in nnU-Net's own loss.
    """

    method: ClassVar[str] = "M&N"
    paper: ClassVar[str] = "Yeung et al. 2025, arXiv:2509.15167"
    supports_regions: ClassVar[bool] = True
    supports_ignore: ClassVar[bool] = True
    twin: ClassVar[str] = "SSLTrainerSupervised+ema_decay=None+deploy=student"
    views: ClassVar[tuple[str, ...]] = ("stock",)  # one augmentation for all
    step_cost: ClassVar[float] = 1.0
    step_memory: ClassVar[float] = 3.1  # of one group of slices; 2D and tuned in full 2.2
    trained_networks: ClassVar[int] = 2

    deploy: Literal["student"] = "student"
    ema_decay: None = None
    backbone: str = "pvt_v2_b2"  # timm's name, with or without a tag of weights
    weights: Literal["pretrained", "random"] = "pretrained"
    tuning: Literal["auto", "lora", "full"] = "auto"  # auto: lora, or full from random weights
    peer_lr: float | Literal["auto"] = "auto"  # auto: 1e-3 with lora, 1e-4 with full
    supervised: float = 0.125  # fraction of training without unlabelled patches, whole epochs
    turn: int = 8  # steps of one network before the other's; 0: both in each step
    guided: bool = True  # False: half of the patches are unlabelled all through stage 2
    pixels_at_once: int = 2**20  # of slices in the peer; less takes less memory, and longer

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges, and that timm has the backbone."""
        super().check_settings()
        cls.require(cls.peer_lr == "auto" or 0 < cls.peer_lr < 1, "peer_lr", "in (0, 1), or auto")
        cls.require(0 <= cls.supervised < 1, "supervised", "in [0, 1)")
        cls.require(cls.turn >= 0, "turn", "0 or more steps")
        cls.require(cls.pixels_at_once >= 1, "pixels_at_once", "1 or more")
        check_backbone(cls.backbone)

    # ------------------------------------------------------------------ the 2D network

    @property
    def tuned(self) -> str:
        """How the peer's encoder learns: "lora" or "full"."""
        if self.tuning == "auto":
            return "lora" if self.weights == "pretrained" else "full"
        return self.tuning

    def check_data(self) -> None:
        """Check also that a fresh run can get its weights, before any work."""
        super().check_data()
        if self._resumed is None and self.weights == "pretrained":
            pretrained_backbone(self.backbone)

    def build_companions(self) -> dict[str, nn.Module]:
        """Return the 2D network, with random weights until the run starts."""
        # nnU-Net has the coarsest axis first, but in plans made for another data set
        axis = int(np.argmax(self.configuration_manager.spacing))
        # Deviates: one of timm's encoders with a fresh decode head, published a SegFormer
        segmenter = ImageSegmenter(self.backbone, self.num_input_channels, self.num_heads)
        scales = self._get_deep_supervision_scales()
        peer = SliceNetwork(segmenter, axis, self.pixels_at_once, scales)
        if self.tuned == "lora":
            peer.add_low_rank(LORA_RANK, LORA_ALPHA, LORA_DROPOUT)
        if self._do_i_compile():
            peer.compile()
        return {"peer": peer}

    def start_companions(self) -> None:
        """Give the 2D network of a fresh run its pretrained weights."""
        super().start_companions()
        if self.weights == "pretrained":
            self.peer.load_backbone(pretrained_backbone(self.backbone))
            return
        self.print_to_log_file(
            "NOTE: weights=random: the 2D network knows no natural images. This is teaching "
            "between a 2D and the plan's network from scratch, not M&N."
        )

    @property
    def peer(self) -> SliceNetwork:
        """The 2D network."""
        return self.companions["peer"]  # type: ignore

    def _scored_networks(self) -> dict[str, nn.Module]:
        return {**super()._scored_networks(), "peer": self.peer}

    # ------------------------------------------------------------------ stages, turns, rates

    @property
    def first_epochs(self) -> int:
        """Epochs of stage 1; one at least, unless there is no such stage."""
        wanted = max(round(self.supervised * self.num_epochs), 1) if self.supervised else 0
        return min(wanted, self.num_epochs - 1)

    @property
    def start(self) -> float:
        """Progress at which stage 2 starts."""
        return self.first_epochs / self.num_epochs

    def in_stage(self, progress: float) -> float:
        """Return the part of its stage that is done, in [0, 1)."""
        if progress < self.start:
            return progress / self.start
        return guided_share(progress, self.start)

    def needs_unlabeled(self, progress: float) -> bool:
        """Stage 1 loads no unlabelled patches."""
        return progress > self.start + 1e-9

    def configure_optimizers(self) -> tuple[Optimizer, PolyLRScheduler]:
        """Let nnU-Net's learning rate start anew with stage 2."""
        # Deviates: nnU-Net's SGD and polynomial for the student
        optimizer, _ = super().configure_optimizers()
        rate = self.initial_lr, self.num_epochs
        return optimizer, RestartedPolyLR(optimizer, *rate, self.first_epochs)

    def peer_schedule(self, progress: float) -> float:
        """Return the factor on the peer's learning rate: a cosine for each stage."""
        share, first = WARMUP
        in_first = progress < self.start or not self.start
        # a warm-up shorter than an epoch would be a whole one
        warms_up = in_first and share * (self.first_epochs or self.num_epochs) >= 1
        return warmup_cosine(self.in_stage(progress), share if warms_up else 0.0, first, 0.0)

    def phases(self) -> list[Phase]:
        """Return an update for each network, with its own optimizer."""
        trained = [p for p in self.peer.parameters() if p.requires_grad]
        rate = PEER_LR[self.tuned] if self.peer_lr == "auto" else self.peer_lr
        optimizer = torch.optim.AdamW(trained, rate)
        return [
            Phase("peer", [self.peer], optimizer, self.peer_losses, self.peer_schedule),
            Phase("student", [self.network], self.optimizer, self.student_losses),
        ]

    def learns(self, name: Literal["peer", "student"]) -> bool:
        """Tell whether a network is trained in this step: always in stage 1, then in its turns."""
        since = self.step - self.first_epochs * self.num_iterations_per_epoch
        if since < 0 or self.turn == 0:
            return True
        return (since // self.turn) % 2 == (name == "student")

    # ------------------------------------------------------------------ losses

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the losses of those networks that learn in this step."""
        yield from self.peer_losses(batch)
        yield from self.student_losses(batch)

    def peer_losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the 2D network's losses if it is its turn."""
        if not self.learns("peer"):
            return
        lesson = self.lesson(batch, self.student)
        logits, n_l, share = self.peer(lesson.x), lesson.n_l, lesson.n_l / len(lesson.x)
        terms: Terms = {}
        if n_l:
            target, counted = self.annotations(lesson)
            loss = self.soft_loss(logits[:n_l], target, counted)
            terms["sup_peer"] = share * loss
        if lesson.prob is not None:
            loss = self.soft_loss(logits[n_l:], lesson.prob, lesson.valid_u)
            terms["unsup_peer"] = (1 - share) * loss
        yield terms

    def student_losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield the losses of the plan's network if it is its turn."""
        if not self.learns("student"):
            return
        lesson = self.lesson(batch, self.peer)
        output, n_l, share = self.student(lesson.x), lesson.n_l, lesson.n_l / len(lesson.x)
        terms: Terms = {}
        if n_l:
            # Deviates: nnU-Net's own loss; published squared Dice + KL, over all patches at once
            terms["sup"] = share * self.loss(rows(output, slice(n_l)), lesson.y)
        if lesson.prob is not None:
            output_u = rows(output, slice(n_l, None))
            self.track_pseudo_labels(lesson.prob, lesson.valid_u, lesson.valid_u)
            decision = hard_labels(lesson.prob, self.regions)
            self.track_agreement(output_u, decision, lesson.valid_u)
            loss = self.soft_loss(output_u, lesson.prob, lesson.valid_u)
            terms["unsup"] = (1 - share) * loss
        yield terms

    def lesson(self, batch: Batch, labeler: nn.Module) -> "Lesson":
        """Draw what one network learns from in this step, with the other's soft labels."""
        size = len(batch.x_l)
        n_u = self.draw_count(size)
        if n_u == 0:
            return Lesson(batch.x_l, size, batch.y_l, batch.valid_l)
        # forced foreground is in the last patches of a batch, so the first ones would not do
        labeled, unlabeled = (
            torch.randperm(size)[part].to(self.device, non_blocking=True)
            for part in (slice(n_u, None), slice(n_u))
        )
        x_u = batch.views["stock"][unlabeled]
        return Lesson(
            torch.cat([batch.x_l[labeled], x_u]),
            size - n_u,
            rows(batch.y_l, labeled),
            batch.valid_l[labeled],
            self.soft_labels(labeler, x_u),
            batch.valid_u[unlabeled],  # type: ignore[index]
        )

    def draw_count(self, size: int) -> int:
        """Return how many patches of a batch are unlabelled in this step."""
        if self.step < self.first_epochs * self.num_iterations_per_epoch:
            return 0
        share = guided_share(self.progress, self.start) if self.guided else 0.5
        n_u = guided_count(share, size, torch.rand(()).item())
        self.track("unlabeled_share", n_u / size)
        return n_u

    @torch.no_grad()
    def soft_labels(self, network: nn.Module, x: Tensor) -> Tensor:
        """Return a network's probabilities, (B, K, *) in fp32, without dropout or gradient."""
        network.eval()
        prob = to_prob(full_res(network(x)), self.regions)
        network.train()
        return prob

    def annotations(self, lesson: "Lesson") -> tuple[Tensor, Tensor]:
        """Return the masks as probabilities, (B, K, *), and which voxels count, (B, 1, *) bool.

        Padding and ignored voxels do not count.
        """
        target, counted = full_res(lesson.y), lesson.valid_l
        if self.regions:
            if self.label_manager.has_ignore_label:
                counted = counted & ~target[:, -1:].bool()
            return target[:, : self.num_heads].float(), counted
        counted = counted & (target < self.num_heads)  # the ignore label is above all classes
        classes = torch.where(counted, target, 0)[:, 0].long()
        return one_hot(classes, self.num_heads).movedim(-1, 1).float(), counted

    def soft_loss(self, output: Any, prob: Tensor, counted: Tensor) -> Tensor:
        """Return squared Dice + KL against probabilities, over nnU-Net's scales if there are.

        Args:
            output: logits, (B, K, *), or a list of them.
            prob: full resolution, (B, K, *).
            counted: (B, 1, *) bool.
        """
        # nnU-Net's own loss sums the BCE over regions where there is an ignore label
        summed = self.regions and self.label_manager.has_ignore_label
        weight = self.num_heads if summed else 1

        def at_scale(logits: Tensor, target: Tensor, mask: Tensor) -> Tensor:
            # Deviates: KL per voxel, not per voxel and class
            kl = soft_target_kl(logits, target, mask, self.regions)
            return soft_target_dice_loss(logits, target, mask, self.regions) + weight * kl

        if isinstance(output, Tensor):
            return at_scale(output, prob, counted)
        scales = self._get_deep_supervision_scales()
        maps = [downsample(m, scales) for m in (prob, counted)]
        return deep_supervised(at_scale, output, *maps, weights=self.loss.weight_factors)


@dataclass
class Lesson:
    """What one network learns from in one step.

    Attributes:
        x: labelled patches, then unlabelled ones, (B, C, *).
        n_l: how many are labelled.
        y: targets of these, as in `Batch`.
        valid_l: (n_l, 1, *) bool, False on padding.
        prob: the other network's probabilities for the unlabelled ones; None without any.
        valid_u: as valid_l, for the unlabelled ones.
    """

    x: Tensor
    n_l: int
    y: Any
    valid_l: Tensor
    prob: Tensor | None = None
    valid_u: Any = None


def rows(tensors: Any, index: slice | Tensor) -> Any:
    """Return samples of a tensor, or of each tensor of a list."""
    return tensors[index] if isinstance(tensors, Tensor) else [t[index] for t in tensors]


class RestartedPolyLR(PolyLRScheduler):
    """nnU-Net's polynomial, once over the first epochs and once over the others."""

    def __init__(self, optimizer: Optimizer, initial_lr: float, epochs: int, first: int):
        self.first = first
        super().__init__(optimizer, initial_lr, epochs)

    def step(self, current_step: int | None = None) -> None:
        """Set the learning rate of an epoch."""
        if current_step is not None and current_step >= 0:
            later = current_step >= self.first
            begin, end = (self.first, self.max_steps) if later else (0, self.first)
            current_step = (current_step - begin) / (end - begin) * self.max_steps
        super().step(current_step)
