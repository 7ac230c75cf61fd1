"""Cross pseudo-supervision between a diffusion network and a convolutional one."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn
from torch._functorch import config as compiler
from torch.optim import Optimizer

from nnunet_ssl.base import Phase, SemiSupervisedTrainer, Terms
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.functional import (
    clean_state,
    ddim,
    draw_per_class,
    full_res,
    gather_places,
    hard_labels,
    propagation_loss,
    q_sample,
    sigmoid_rampup,
    to_prob,
)
from nnunet_ssl.modules import (
    ClassBank,
    DiffusionNetwork,
    HighFrequencyMamba,
    Projector,
    finest_stage,
    insert_after_stage,
    take_from_stage,
)

NEW_VECTORS = 32  # a class and step, into the bank


class SSLTrainerDiffCL(SemiSupervisedTrainer):
    """Diff-CL: a diffusion network and a convolutional one label unlabelled patches for each other.

    Guo, Yu, Shi, Lei & Wang 2025, arXiv:2503.09408. Only the abstract and the sum of the losses
    were available, no code: architectures, formulas of the parts and all numbers are
    reconstructed, most of them from GenericSSL (Wang & Li 2023), the nearest public code.

        student: the plan's network with a high-frequency Mamba module behind one encoder stage
        diffusion: the plan's network on image and noisy label map, told the time by FiLM
        x_0 = 2 onehot - 1,  x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) n,  t uniform, n normal

        y_c = argmax student(u);  y_d = argmax DDIM(diffusion | u), from noise     no gradient
        L_c = sup(student(l), y) + w [CE+Dice(student(u), y_d) + eta L_cl]
        L_d = sup(diffusion(l, x_t(y), t), y) + w_d [CE+Dice(diffusion(u, x_t(y_c), t), y_c)]

    L_cl (`functional.propagation_loss`) pulls unlabelled features that are like the labelled
    features of a class to them, and pushes the least similar away. The bank holds the latest
    features of annotated voxels that the student gets right. The two losses have their own
    optimizers; both labels of a step come from the weights before it. The student predicts.

    Deviates: the backbones are nnU-Net's, with its deep supervision. The student predicts and alone
    has the Mamba module: which network does is not told. w ramps up over the first 0.4 of training
    and y_d teaches from 0.1 on, since a fresh denoiser samples noise. The sampler turns logits into
    states by softmax; GenericSSL clamps them. FiLM instead of additive times, which instance norm
    would take out. The bank also has background, so that voxels are told apart from it (SS-Net's
    has none). Voxels of L_cl are drawn evenly over the student's decisions, so shares hold within
    these. B labelled and B unlabelled patches in turn. Ignored voxels have the state 0. Each
    region is a pair of classes, inside and outside, in L_cl. The Dice on pseudo-labels leaves out
    classes of a few voxels. Padding does not count.
    """

    method: ClassVar[str] = "Diff-CL, diffusion and convolution teach each other"
    paper: ClassVar[str] = "Guo et al. 2025, arXiv:2503.09408"
    networks: ClassVar[str] = "PlainConvUNet, ResidualEncoderUNet"
    twin: ClassVar[str] = "SSLTrainerSupervised+ema_decay=None+deploy=student"
    deploys_stock: ClassVar[bool] = False
    needs_unet: ClassVar[bool] = True
    supports_regions: ClassVar[bool] = True
    supports_ignore: ClassVar[bool] = True
    views: ClassVar[tuple[str, ...]] = ("stock",)  # one augmentation for both networks
    step_cost: ClassVar[float] = 22 / 3
    step_memory: ClassVar[float] = 1.4  # 2D; 3D 1.15
    trained_networks: ClassVar[int] = 2

    deploy: Literal["student"] = "student"
    ema_decay: None = None
    unsup_weight: float = 1.0  # w, mu_2 in the paper
    diffusion_weight: float = 1.0  # w_d, mu_1
    rampup: float = 0.4  # fraction of training until both are reached
    # Deviates: no warm-up is told of, but a fresh denoiser samples noise
    warmup: float = 0.1  # fraction of training before y_d teaches the student
    ddim_steps: int = 10  # passes of the diffusion network for y_d
    high_pass: Literal["haar", "fft", "laplacian"] = "haar"  # of the Mamba module
    max_tokens: int = 8192  # of a patch; the module stands at the finest stage with so few
    contrast_weight: float = 0.1  # eta
    contrast_temperature: float = 0.1  # tau
    contrast_samples: int = 1024  # voxels a class
    similar: float = 0.3  # share of a class's voxels that are positives
    dissimilar: float = 0.3  # share of all voxels that are negatives of a class
    bank_size: int = 256  # vectors a class
    embedding: int = 32  # channels in which voxels are compared

    _taken: tuple[int, nn.Module] | None = None  # stage and module, while they are taken out

    def __init_subclass__(cls) -> None:
        """Let the cost follow the number of sampling steps (settings subclass)."""
        super().__init_subclass__()
        cls.step_cost = 4 + cls.ddim_steps / 3 if cls.unsup_weight > 0 else 1.0

    @classmethod
    def check_settings(cls) -> None:
        """Check ranges."""
        super().check_settings()
        for name in ("unsup_weight", "diffusion_weight", "rampup", "contrast_weight"):
            cls.require(getattr(cls, name) >= 0, name, "0 or more")
        cls.require(0 <= cls.warmup < 1, "warmup", "in [0, 1)")
        cls.require(1 <= cls.ddim_steps <= 1000, "ddim_steps", "between 1 and 1000")
        cls.require(cls.contrast_temperature >= 0.01, "contrast_temperature", "at least 0.01")
        for name in ("similar", "dissimilar"):
            cls.require(0 < getattr(cls, name) <= 1, name, "in (0, 1]")
        for name in ("contrast_samples", "embedding"):
            cls.require(getattr(cls, name) >= 2, name, "at least 2")
        cls.require(cls.max_tokens >= 1, "max_tokens", "at least 1")
        cls.require(cls.bank_size >= NEW_VECTORS, "bank_size", f"at least {NEW_VECTORS}")

    # ------------------------------------------------------------------ networks

    @classmethod
    def build_network_architecture(  # type: ignore[override]
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the student; nnU-Net's predictor calls this as well."""
        network = nnUNetTrainer.build_network_architecture(
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        # Deviates: which network has the module is not told
        patch_size = configuration_manager.patch_size
        stage = finest_stage(network, patch_size, cls.max_tokens)
        channels = network.encoder.output_channels[stage]
        module = HighFrequencyMamba(channels, len(patch_size), cls.high_pass)
        insert_after_stage(network, stage, module)
        return network

    def initialize(self) -> None:
        """Build all; take the Mamba module out, so that `-pretrained_weights` takes the plan's."""
        if self._do_i_compile() and hasattr(compiler, "backward_pass_autocast"):
            # else a compiled backward pass takes in half precision what ran in fp32 forwards
            compiler.backward_pass_autocast = "off"
        super().initialize()
        patch_size = self.configuration_manager.patch_size
        stage = finest_stage(self.network, patch_size, self.max_tokens)
        self._taken = stage, take_from_stage(self.network, stage)

    def on_train_start(self) -> None:
        """Start with the whole network."""
        self._put_module_back()
        super().on_train_start()

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Load a checkpoint, which holds the whole network."""
        self._put_module_back()
        super().load_checkpoint(filename_or_checkpoint)

    def _put_module_back(self) -> None:
        if not self.was_initialized:
            self.initialize()
        if self._taken is not None:
            insert_after_stage(self.network, *self._taken)
            self._taken = None

    @classmethod
    def build_diffusion_network(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> DiffusionNetwork:
        """Build the diffusion network: the plan's, with the label map beside the image."""
        return DiffusionNetwork(
            nnUNetTrainer.build_network_architecture(
                plans_manager,
                configuration_manager,
                num_input_channels + num_output_channels,
                num_output_channels,
                enable_deep_supervision,
            )
        )

    def build_companions(self) -> dict[str, nn.Module]:
        """Return the diffusion network, and what maps features to the contrast and keeps them."""
        diffusion = self.build_diffusion_network(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.num_heads,
            self.enable_deep_supervision,
        )
        if self._do_i_compile():
            diffusion.compile()
        companions: dict[str, nn.Module] = {"diffusion": diffusion}
        if self.contrast_weight > 0:
            groups = 2 * self.num_heads if self.regions else self.num_heads
            width = self.student.encoder.output_channels[0]
            companions["projector"] = Projector(width, self.embedding)
            # Deviates: SS-Net's memory has no background
            companions["bank"] = ClassBank(groups, self.bank_size, self.embedding)
        return companions

    def phases(self) -> list[Phase]:
        """Return the update of the student, then that of the diffusion network."""
        student, diffusion = [self.network], [self.companions["diffusion"]]
        if self.contrast_weight > 0:
            student.append(self.companions["projector"])
        self.optimizer = self.new_optimizer(student)
        self.lr_scheduler.optimizer = self.optimizer
        return [
            Phase("main", student, self.optimizer, self.losses),
            Phase("diffusion", diffusion, self.new_optimizer(diffusion), self.diffusion_losses),
        ]

    def new_optimizer(self, modules: Sequence[nn.Module]) -> Optimizer:
        """Return nnU-Net's SGD; what decays in a scan's state has no weight decay."""
        optimizer = super().new_optimizer(modules)
        (group,) = optimizer.param_groups
        free = [p for p in group["params"] if getattr(p, "_no_weight_decay", False)]
        if free:
            group["params"] = [p for p in group["params"] if all(p is not f for f in free)]
            optimizer.add_param_group({"params": free, "weight_decay": 0.0})
        return optimizer

    # ------------------------------------------------------------------ the step

    def needs_unlabeled(self, progress: float) -> bool:
        """Without weight for the student, no unlabelled patches and no diffusion network."""
        return self.unsup_weight > 0

    def after_step(self, observed: dict[str, list[Tensor]]) -> None:
        """Put this step's labelled features into the bank."""
        super().after_step(observed)
        if "vectors" in observed:
            self.companions["bank"].update(observed["vectors"][0], observed["found"][0])

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield L_c on labelled, then on unlabelled patches."""
        labeled = self.tap(self.student, batch.x_l)
        if self.contrast_weight > 0:
            self.remember(labeled.feature, full_res(labeled.output), batch)
        yield {"sup": self.loss(labeled.output, batch.y_l)}
        del labeled  # nothing of it stays while the other patches run
        if self.needs_unlabeled(self.progress):
            yield from self.unlabeled_losses(batch.views["stock"], batch.valid_u)

    def unlabeled_losses(self, x: Tensor, valid: Tensor) -> Iterator[Terms]:
        """Yield what the diffusion network and the bank teach the student, after the warm-up.

        Observes the student's own labels, for the diffusion network.

        Args:
            x: (B, C, *).
            valid: (B, 1, *) bool, False on padding.
        """
        if self.progress < self.warmup:
            with torch.no_grad():
                self.observe("student_label", self.decisions(self.student(x)))
            return
        sampled = self.sample(x)
        label = hard_labels(sampled, self.regions)
        self.track_pseudo_labels(sampled, valid, valid)
        del sampled
        weight = self.unsup_weight * self.ramp
        self.track("weight", weight)
        tapped = self.tap(self.student, x)
        own = self.decisions(tapped.output)
        self.observe("student_label", own)
        self.track_agreement(tapped.output, label, valid)
        terms = {"unsup": weight * self.pseudo_loss(tapped.output, label, valid, valid)}
        if self.contrast_weight > 0:
            contrast = self.contrast(tapped.feature, own, valid)
            terms["unsup_contrast"] = weight * self.contrast_weight * contrast
        yield terms

    def diffusion_losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield L_d on labelled, then on unlabelled patches; after `losses` of the same step."""
        if not self.needs_unlabeled(self.progress):
            return
        target, known = self.annotation(batch)
        output = self.denoised(batch.x_l, target, known)
        yield {"sup_diffusion": self.loss(output, batch.y_l)}
        del output
        weight = self.diffusion_weight * self.ramp
        if weight > 0:
            x, valid = batch.views["stock"], batch.valid_u
            label = self._observed["student_label"][-1]
            loss = self.pseudo_loss(self.denoised(x, label, None), label, valid, valid)
            yield {"unsup_diffusion": weight * loss}

    @property
    def ramp(self) -> float:
        """Share of the unlabelled weights that holds now."""
        return sigmoid_rampup(self.progress, self.rampup)

    def decisions(self, output: Any) -> Tensor:
        """Return hard labels of a network's output, without gradient."""
        return hard_labels(to_prob(full_res(output).detach(), self.regions), self.regions)

    def annotation(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return labels without the ignore channel, and where they are known (None: all)."""
        target = batch.target
        if not self.label_manager.has_ignore_label:
            return target, None
        if self.regions:
            return target[:, :-1], ~target[:, -1:].bool()
        return target, target != self.label_manager.ignore_label

    # ------------------------------------------------------------------ diffusion

    def denoised(self, x: Tensor, label: Tensor, known: Tensor | None) -> Any:
        """Return the diffusion network's output on label maps with noise of random times.

        Args:
            x: images, (B, C, *).
            label: (B, 1, *), or (B, R, *) bool for regions.
            known: (B, 1, *) bool, where the label is known; None: everywhere.
        """
        network = self.companions["diffusion"]
        # Deviates: ignored voxels have the state 0
        clean = clean_state(label, self.num_heads, self.regions, known)
        time = torch.randint(len(network.alpha_bars), (len(x),), device=x.device)
        state = q_sample(clean, torch.randn_like(clean), network.alpha_bars[time])
        return network(x, state, time)

    @torch.no_grad()
    def sample(self, x: Tensor) -> Tensor:
        """Return the diffusion network's probabilities for images, (B, K, *), from random noise."""
        network = self.companions["diffusion"]
        noise = torch.randn(len(x), self.num_heads, *x.shape[2:], device=x.device)

        def denoise(state: Tensor, time: Tensor) -> Tensor:
            return full_res(network(x, state, time))

        # Deviates: logits become states by softmax; GenericSSL clamps them
        return ddim(denoise, noise, network.alpha_bars, self.ddim_steps, self.regions)

    # ------------------------------------------------------------------ contrast

    @torch.no_grad()
    def remember(self, feature: Tensor, logits: Tensor, batch: Batch) -> None:
        """Observe features of annotated voxels that the student gets right, of each class."""
        target, known = self.annotation(batch)
        keep = batch.valid_l if known is None else batch.valid_l & known
        right = self.decisions(logits) == target
        vectors, found = [], []
        for row, own in zip(target.split(1, 1), right.split(1, 1), strict=True):
            places = draw_per_class(row, own & keep, self.sides, NEW_VECTORS)
            with torch.autocast(self.device.type, enabled=False):
                drawn = gather_places(feature, places).float()
                vectors.append(self.companions["projector"](drawn))
            found.append(places.counted)
        groups = self.sides * len(found)
        self.observe("vectors", torch.cat(vectors).unflatten(0, (groups, -1)))
        self.observe("found", torch.cat(found).unflatten(0, (groups, -1)))

    def contrast(self, feature: Tensor, label: Tensor, valid: Tensor) -> Tensor:
        """Return L_cl of unlabelled patches, the mean over regions if there are any.

        Args:
            feature: the student's last one, (B, A, *).
            label: its decisions, (B, 1, *), or (B, R, *) bool.
            valid: (B, 1, *) bool, False on padding.
        """
        bank = self.companions["bank"]
        prototypes = bank.prototypes().unflatten(0, (-1, self.sides))
        known = bank.seen().unflatten(0, (-1, self.sides))
        losses = []
        for k, row in enumerate(label.split(1, 1)):
            # Deviates: evenly over the student's decisions, so shares hold within these
            places = draw_per_class(row, valid, self.sides, self.contrast_samples)
            with torch.autocast(self.device.type, enabled=False):
                losses.append(
                    propagation_loss(
                        self.companions["projector"](gather_places(feature, places).float()),
                        prototypes[k],
                        known[k],
                        places.counted,
                        self.contrast_temperature,
                        self.similar,
                        self.dissimilar,
                    )
                )
        return torch.stack(losses).mean()

    @property
    def sides(self) -> int:
        """Classes that a voxel is told apart by: all, or inside and outside of each region."""
        return 2 if self.regions else self.num_heads
