"""The loop of all methods, and the only code that touches nnU-Net's trainer internals."""

import json
import math
import typing
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import takewhile
from multiprocessing import Value
from pathlib import Path
from time import time
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.helpers import softmax_helper_dim1
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.optim import Optimizer

from nnunet_ssl import checkpoint as checkpoints
from nnunet_ssl.data.appearance import describe_unlike
from nnunet_ssl.data.batch import Batch
from nnunet_ssl.data.components import single_piece
from nnunet_ssl.data.foreground import FILE_NAME as FOREGROUND_NAME
from nnunet_ssl.data.foreground import ForegroundPlaces, search, write_places
from nnunet_ssl.data.loader import (
    CASE_TABLE,
    META,
    PatchLoader,
    TwoStreamLoader,
    read_case_table,
)
from nnunet_ssl.data.pseudo_labels import balanced, pseudo_labeled
from nnunet_ssl.data.unlabeled import UnlabeledDataset, read_manifest, unlabeled_folder
from nnunet_ssl.data.views import Pipeline
from nnunet_ssl.errors import UnsupportedError, UserError
from nnunet_ssl.functional import (
    confidence,
    copy_from_first,
    deep_supervised,
    downsample,
    ema_decay_at,
    ema_update,
    full_res,
    gather,
    hard_labels,
    joint_roll,
    joint_share,
    largest_component,
    largest_component_regions,
    masked_ce_dice,
    process_count,
    pseudo_ce_dice,
    random_boxes,
    strong_intensity,
    to_prob,
)
from nnunet_ssl.history import LOG_NAME, PLOT_NAME, History, Meter
from nnunet_ssl.io import explain_os_error
from nnunet_ssl.modules import Tapped, class_shares, tapped_forward
from nnunet_ssl.modules.tap import UNETS
from nnunet_ssl.version import check_nnunet_version

check_nnunet_version()

Terms = dict[str, Tensor]
LABELED_BOX = (0.3, 0.8)  # sides of a box between annotated patches, as fractions of the patch
MIXED_STEPS = 0.5  # with labeled_mix=auto, where annotated training scans hold at most
MIXED_PATCHES = 130  # patches side by side
GRADIENT_CLIP = 12  # nnU-Net's, per module
# a class is lost or inflated whose share among pseudo-labels is under or above its share among
# labels by these factors
COLLAPSE_RATIO = 0.05
GROWTH_RATIO = 3
SEARCH_SHARE = 0.01  # of the training's passes, that one search for foreground takes at most
UNIT_VARIANCE = {"ZScoreNormalization", "CTNormalization"}  # of nnU-Net's normalisations
UNET_NAMES = tuple(cls.__name__ for cls in UNETS)

NNUNET_SETTINGS = (
    "num_epochs",
    "num_iterations_per_epoch",
    "num_val_iterations_per_epoch",
    "initial_lr",
    "weight_decay",
    "oversample_foreground_percent",
    "probabilistic_oversampling",
    "enable_deep_supervision",
    "save_every",
)


def cpu_has_bf16() -> bool:
    """Return whether this CPU computes in bfloat16; others emulate it, many times slower."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass
class Phase:
    """One of the updates that a step consists of.

    Attributes:
        name: under which the optimizer's state is saved.
        modules: what this phase trains; all else is frozen meanwhile. Gradients are clipped for
            each module by itself.
        optimizer: over the parameters of these modules.
        losses: generator of weighted terms; each yield is back-propagated at once.
        schedule: factor on each group's first learning rate for a progress in [0, 1); nnU-Net's
            polynomial by default. The phase of nnU-Net's own optimizer follows nnU-Net.
    """

    name: str
    modules: Sequence[nn.Module]
    optimizer: Optimizer
    losses: Callable[[Batch], Iterable[Terms]]
    schedule: Callable[[float], float] = lambda progress: (1 - progress) ** 0.9


class SemiSupervisedTrainer(nnUNetTrainer):
    """Trains a stock nnU-Net with scans without masks beside the annotated ones.

    A method is a subclass with settings (class attributes) and `losses`. Everything else, from
    nnU-Net's preprocessing to its postprocessing, stays nnU-Net's.

    Raises:
        UnsupportedError: cascade, several GPUs, regions, ignore label, or a dimension that the
            method does not support; before any folder is made.
    """

    network: Any  # nnU-Net sets these to None first
    dataset_class: Any
    is_ddp: bool

    # What `nnunet_ssl list` tells, and what a method declares about itself.
    method: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    dims: ClassVar[tuple[str, ...]] = ("2d", "3d")
    networks: ClassVar[str] = "any plan network"
    supports_regions: ClassVar[bool] = False
    supports_ignore: ClassVar[bool] = False
    supports_ddp: ClassVar[bool] = False
    least_patches: ClassVar[int] = 1  # of a batch, on each of several GPUs
    deploys_stock: ClassVar[bool] = True
    deployed: ClassVar[str] = ""  # what predicts, in words, where it is not what `deploy` names
    uses_unlabeled: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False
    needs_unet: ClassVar[bool] = False  # taps features, or builds the other architecture
    twin: ClassVar[str] = "SSLTrainerSupervised"  # with the settings that make it comparable
    pretraining: ClassVar[str] = ""  # trainer that this one is meant to start from, if any
    views: ClassVar[tuple[str, ...]] = ()  # further views of unlabelled patches, see data.views
    meta: ClassVar[tuple[str, ...]] = ()  # values per sample, see data.loader.META
    pieces_seen: ClassVar[int] = 1  # annotated cases (2D: slices) from which `keep_largest` judges
    pieces_share: ClassVar[float] = 0.95  # of these in which one piece makes a class filtered
    step_cost: ClassVar[float] = 1.0  # in steps of the supervised twin
    step_memory: ClassVar[float] = 1.0  # what a step keeps for backward, in that of the twin
    trained_networks: ClassVar[int] = 1  # each about as large as the plan's

    # nnU-Net's fields.
    num_epochs: int = 250
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50
    initial_lr: float = 1e-2
    weight_decay: float = 3e-5
    oversample_foreground_percent: float = 0.33
    probabilistic_oversampling: bool = False
    enable_deep_supervision: bool = True
    save_every: int = 10  # epochs between two latest checkpoints

    # Ours.
    seed: int | None = None  # None draws afresh; workers of nnU-Net's loader are never seeded
    deploy: Literal["teacher", "student"] = "teacher"  # validated, saved as network, predicts
    ema_decay: float | Literal["auto"] | None = "auto"  # weight of the teacher's old value a step
    # share of the steps whose annotated patches show boxes of each other; "auto": see `mix_share`
    labeled_mix: float | Literal["auto"] = 0.0
    keep_at: tuple[float, ...] = ()  # fractions of training at which weights are kept
    bf16_on_cpu: bool = False  # autocast to bfloat16 on a CPU that has it; about twice as fast

    # ------------------------------------------------------------------ settings

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Return the settings of this trainer with their values."""
        hints = typing.get_type_hints(cls)
        declared = {k for k, h in hints.items() if typing.get_origin(h) is ClassVar}
        found: dict[str, Any] = {}
        for part in reversed(cls.__mro__):
            if issubclass(part, SemiSupervisedTrainer):
                for name, value in vars(part).items():
                    if name.startswith("_") or name in declared:
                        continue
                    if value is None or isinstance(value, bool | int | float | str | tuple):
                        found[name] = value
        return found

    @classmethod
    def check_settings(cls) -> None:
        """Check values against each other and their ranges.

        Raises:
            UserError: names the setting, its value and what fits.
        """
        require = cls.require
        for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch"):
            require(getattr(cls, name) >= 1, name, "at least 1")
        require(1 <= cls.save_every <= 10, "save_every", "between 1 and 10 epochs")
        require(0 < cls.initial_lr < math.inf, "initial_lr", "above 0 and finite")
        require(cls.seed is None or 0 <= cls.seed < 2**32, "seed", "between 0 and 2^32 - 1")
        mix = cls.labeled_mix
        require(mix == "auto" or 0 <= mix <= 1, "labeled_mix", "auto or in [0, 1]")
        require(all(0 < f < 1 for f in cls.keep_at), "keep_at", "fractions between 0 and 1")
        decay = cls.ema_decay
        require(
            decay is not None or not cls.needs_teacher,
            "ema_decay",
            "a number or auto, since the method needs its teacher",
        )
        require(not isinstance(decay, float) or 0 <= decay < 1, "ema_decay", "in [0, 1)")
        require(
            cls.deploy != "teacher" or decay is not None,
            "deploy",
            "student, since ema_decay=None makes no teacher",
        )

    @classmethod
    def require(cls, fits: bool, name: str, rule: str) -> None:
        """Raise UserError naming a setting, its value and the rule, unless it fits."""
        if not fits:
            value = getattr(cls, name)
            raise UserError(f"{cls.__name__}: setting {name}={value} must be {rule}.")

    # ------------------------------------------------------------------ life of a trainer

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's exact signature
    ):
        self.refuse_unsupported(plans, configuration, dataset_json)
        type(self).check_settings()
        self.refuse_missing_fold(plans["dataset_name"], fold)
        try:
            super().__init__(plans, configuration, fold, dataset_json, device)
        except OSError as error:
            place = error.filename or "the folder nnUNet_results"
            raise UserError(explain_os_error(error, place)) from error
        if self.is_ddp and device.type == "cpu":  # nnU-Net takes a GPU for each process
            self.device, self.grad_scaler = device, None
        for name in NNUNET_SETTINGS:
            setattr(self, name, getattr(type(self), name))
        self.companions = nn.ModuleDict()
        # always in eval mode and without deep supervision; None with ema_decay=None
        self.teacher: Any = None
        self.step = 0
        self._phases: list[Phase] = []
        self._single_piece: list[int] | None = None  # found when first asked for
        self._thick_slices = False  # nnU-Net's "dummy 2D": augmentation within slices only
        self._mix_share: float | None = None  # alike, of "auto"
        self._resumed: dict | None = None
        self._meter = Meter()
        self._skipped_steps = 0  # of this epoch, as the next one
        self._dropped_pseudo = 0
        self._at_fault = False  # whether losses of this step, not their scale, were not finite
        self._patches = {"labeled": 0, "unlabeled": 0}  # seen in this epoch
        self._observed: dict[str, list[Tensor]] = defaultdict(list)
        self._unlabeled_active = Value("b", False)
        self._places: ForegroundPlaces | None = None  # made with the loaders

    @classmethod
    def refuse_unsupported(cls, plans: dict, configuration: str, dataset_json: dict) -> None:
        """Raise UnsupportedError for what the method cannot do; nothing has been made yet."""
        manager = PlansManager(plans)
        config = manager.get_configuration(configuration)
        labels = manager.get_label_manager(dataset_json)
        dimension = f"{len(config.patch_size)}d"
        problems = {
            f"the cascade ({configuration})": config.previous_stage_name is not None,
            "training on several GPUs": process_count() > 1 and not cls.supports_ddp,
            "region-based training": labels.has_regions and not cls.supports_regions,
            "the ignore label": labels.has_ignore_label and not cls.supports_ignore,
            f"{dimension} configurations": dimension not in cls.dims,
            f"the network {config.network_arch_class_name}": (
                cls.needs_unet
                and config.network_arch_class_name.rpartition(".")[2] not in UNET_NAMES
            ),
        }
        for feature, present in problems.items():
            if present:
                raise UnsupportedError(
                    f"{cls.__name__} does not support {feature}. `nnunet_ssl list` shows which "
                    f"trainers do."
                )
        stages = config.network_arch_init_kwargs.get("n_stages", 3)
        if stages < 3 and cls.enable_deep_supervision:
            raise UserError(
                f"{cls.__name__}: the network of {configuration} has {stages} stages. nnU-Net's "
                f"deep supervision leaves the lowest one out, so it would have no loss. Add "
                f"+enable_deep_supervision=false, or plan with a larger patch."
            )
        patches, rest = divmod(config.batch_size, process_count())
        if process_count() > 1 and (rest or patches < cls.least_patches):
            raise UserError(
                f"{cls.__name__}: the plan's batch of {config.batch_size} patches does not give "
                f"each of {process_count()} GPUs the same number, at least {cls.least_patches}. "
                f"Give another -num_gpus, or plan for more GPU memory."
            )
        rule = "0: a batch of 1 patch has no other one to take a box from"
        several = config.batch_size > 1
        cls.require(several or cls.labeled_mix in (0, "auto"), "labeled_mix", rule)

    @staticmethod
    def refuse_missing_fold(dataset: str, fold: int | str) -> None:
        """Raise UserError if the split of a data set has no such fold."""
        path = Path(nnUNet_preprocessed.get() or "") / dataset / "splits_final.json"
        if fold == "all" or not path.is_file():
            return
        splits = json.loads(path.read_text(encoding="utf-8"))
        if not 0 <= int(fold) < len(splits):
            raise UserError(
                f"{path} has folds 0 to {len(splits) - 1}, not {fold}. Choose one of them, or fold "
                f"all."
            )

    def initialize(self) -> None:
        """Build student, companions, losses and optimizers."""
        if self.seed is not None:
            checkpoints.seed_everything(self.seed)
        with self._alone():
            super().initialize()
        if self.is_ddp:
            self._set_batch_size_and_oversample()
            self.loss = self._build_loss()
        if isinstance(self.network, OptimizedModule):
            # compiled in place, so that state-dict keys and feature taps stay as they are
            self.network = self.network._orig_mod
            self.network.compile()
        self.companions = nn.ModuleDict(self.build_companions())
        if self.ema_decay is not None:
            self.teacher = self.companions["teacher"] = self.new_network().requires_grad_(False)
            self._set_deep_supervision(self.teacher, False)
            self.teacher.eval()
        self.companions.to(self.device)
        self._tapped_forward = (
            torch.compile(tapped_forward) if self._do_i_compile() else tapped_forward
        )
        self._masked_dice = self._build_masked_dice()
        if self.is_ddp:
            for module in (self.network, self.companions):
                copy_from_first([*module.parameters(), *module.buffers()])
            if self.seed is not None:
                checkpoints.seed_everything(self.seed + self.local_rank)  # of data and views
        self._phases = list(self.phases())
        for phase in self._phases:
            for group in phase.optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])

    def on_train_start(self) -> None:
        """Check the data, set an old run aside, start loaders; put the state of a run back."""
        if not self.was_initialized:
            self.initialize()
        self.check_data()
        super().on_train_start()
        if self.device.type == "cpu" and self.bf16_on_cpu and self.precision == "float32":
            self.print_to_log_file(
                "WARNING: this CPU has no bfloat16, so bf16_on_cpu has no effect: float32 is used."
            )
        self.mix_share()  # says what "auto" comes to
        self._history = History(self.output_folder, writes=self.local_rank == 0)
        if self._resumed is None:
            if self.local_rank == 0:
                self._set_old_run_aside()
            gather(None)  # no process goes on before that
            self.start_companions()
        else:
            self._history.cut_back(self.current_epoch)
            self._go_on_with_places()
            # after the loaders' warm-up batch, which the uninterrupted run drew at its own start
            if self.local_rank < len(self._resumed["rng"]):
                state = self._resumed["rng"][self.local_rank]
                checkpoints.restore_random_state(state, self.device)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let nnU-Net work as on one GPU: it would wrap the network, and look for the wrapped one.

        Gradients are averaged over processes by `_average_gradients` instead, phase by phase.
        """
        several = self.is_ddp
        self.is_ddp = False
        try:
            yield
        finally:
            self.is_ddp = several

    def check_data(self) -> None:
        """Check the unlabelled cases against plans, labelled cases and the raw folder.

        Raises:
            UserError: names the file or case and the fix.
        """
        if not self.uses_unlabeled:
            return
        base = Path(self.preprocessed_dataset_folder_base)
        manifest = read_manifest(base, self.plans_manager.plans, self.configuration_name)
        cases = set(manifest["cases"])
        if manifest.get("unlike"):
            self.print_to_log_file(describe_unlike(manifest["unlike"], len(cases)))
        fix = (
            f"Run: nnunet_ssl plan_and_preprocess -d {base.name[7:10]} -c {self.configuration_name}"
        )
        labeled = infer_dataset_class(self.preprocessed_dataset_folder).get_identifiers(
            self.preprocessed_dataset_folder
        )
        both = sorted(cases & set(labeled))
        if both:
            raise UserError(
                f"Case {both[0]!r} is in imagesTr and in imagesUn of {base.name}. Remove or rename "
                f"one of them. {fix}"
            )
        raw = Path(nnUNet_raw.get() or "") / base.name / "imagesUn"
        if nnUNet_raw.is_set() and raw.is_dir():
            ending = f"_0000{self.dataset_json['file_ending']}"
            present = {p.name[: -len(ending)] for p in raw.glob(f"[!.]*{ending}")}
            changed = sorted(present ^ cases)
            if changed:
                what = "is new in" if changed[0] in present else "is gone from"
                raise UserError(
                    f"Case {changed[0]!r} {what} {raw} since preprocessing ({len(changed)} "
                    f"differences). {fix}"
                )

    def _set_old_run_aside(self) -> None:
        """Move an earlier run's files away: `--c` would prefer its final checkpoint."""
        folder = Path(self.output_folder)
        found = [*folder.glob("checkpoint_*.pth"), *folder.glob(FOREGROUND_NAME.format("*"))]
        old = [*found, folder / LOG_NAME, folder / PLOT_NAME]
        old = [path for path in old if path.is_file()]
        if old:
            numbers = [int(p.name.rpartition("_")[2]) for p in folder.glob("previous_run_[0-9]*")]
            aside = folder / f"previous_run_{max(numbers, default=0) + 1}"
            aside.mkdir()
            for path in old:
                path.rename(aside / path.name)
            self.print_to_log_file(f"A run was in this folder; its files are now in {aside}.")

    # ------------------------------------------------------------------ hooks of a method

    def losses(self, batch: Batch) -> Iterator[Terms]:
        """Yield dicts of weighted terms; each yield is back-propagated at once and its graph freed.

        Called under autocast. Keys start with `sup` or `unsup`. A yield covers at most one plan
        batch of patches, so memory stays near the supervised run. Losses never change state.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no losses")

    def build_companions(self) -> dict[str, nn.Module]:
        """Return by name what learns or remembers beside the student; the base adds `teacher`."""
        return {}

    def start_companions(self) -> None:
        """Set the companions of a fresh run, after pretrained weights were loaded."""
        if self.ema_decay is not None:
            ema_update(self.teacher, self.network, 0.0)

    def phases(self) -> list[Phase]:
        """Return the updates of a step; called once, when student and companions exist."""
        modules = [self.network] + [
            m for m in self.companions.values() if any(p.requires_grad for p in m.parameters())
        ]
        if len(modules) > 1:
            self.optimizer = self.new_optimizer(modules)
            self.lr_scheduler.optimizer = self.optimizer
        return [Phase("main", modules, self.optimizer, self.losses)]

    def after_step(self, observed: dict[str, list[Tensor]]) -> None:
        """Change state after the optimizer step.

        Args:
            observed: what `losses` passed to `observe`, detached, a list a name; also
                `label_shares` of methods with unlabelled data.
        """
        if self.ema_decay is not None:
            ema_update(self.teacher, self.network, self.teacher_decay())

    def measure_drift(self) -> dict[str, float | list[float]]:
        """Return numbers about the pseudo-labels of fixed patches, at the end of each epoch."""
        return {}

    def teacher_decay(self) -> float:
        """Return the weight of the teacher's old value for this step.

        "auto" averages over a horizon of a 75th of the run, between 10 and 1000 steps. Early
        steps weigh less, so the teacher is not held back by its start.
        """
        decay = self.ema_decay
        if decay == "auto":
            decay = 1 - 1 / min(max(self.total_steps / 75, 10), 1000)
        return ema_decay_at(self.step, float(decay))  # type: ignore[arg-type]

    def foreground_searches(self) -> tuple[float, Sequence[float]]:
        """Tell how unlabelled patches are drawn.

        Returns:
            Which share of them is drawn around foreground that the teacher saw, and at which
            progress it looks for some, in the epoch that begins then or next. By default no share.
        """
        return 0.0, ()

    def needs_unlabeled(self, progress: float) -> bool:
        """Tell whether unlabelled patches are needed at this progress; if not, none are loaded."""
        return self.uses_unlabeled

    def parts(self) -> dict[str, nn.Module]:
        """Return by name the single networks that a trained network of several consists of."""
        return {}

    def deployed_network(self) -> nn.Module:
        """Return the network that is validated, saved as `network_weights` and predicts."""
        return self.teacher if self.deploy == "teacher" else self.network

    # ------------------------------------------------------------------ what methods use

    @property
    def student(self) -> nn.Module:
        """The trained network."""
        return self.network

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.num_epochs * self.num_iterations_per_epoch

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1)."""
        return self.step / self.total_steps

    @property
    def regions(self) -> bool:
        """True if the data set has regions: sigmoid heads that may overlap."""
        return self.label_manager.has_regions

    @property
    def num_heads(self) -> int:
        """Output channels of the network: classes with background, or regions."""
        return self.label_manager.num_segmentation_heads

    def new_network(self) -> nn.Module:
        """Build another network of the plan, with its own random weights, on the device."""
        network = self.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.num_heads,
            self.enable_deep_supervision,
        ).to(self.device)
        if self._do_i_compile():
            network.compile()
        return network

    def new_optimizer(self, modules: Sequence[nn.Module]) -> Optimizer:
        """Return nnU-Net's SGD over the parameters of several modules."""
        parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        return torch.optim.SGD(
            parameters,
            self.initial_lr,
            weight_decay=self.weight_decay,
            momentum=0.99,
            nesterov=True,
        )

    def tap(self, network: nn.Module, x: Tensor) -> Tapped:
        """Run a plan's U-Net and return its output with its features; for `needs_unet` methods."""
        return self._tapped_forward(network, x)

    @torch.no_grad()
    def teacher_prob(self, x: Tensor) -> Tensor:
        """Return the teacher's probabilities, (B, K, *) in fp32, without gradient."""
        return to_prob(full_res(self.teacher(x)), self.regions)

    def deep(self, full: Tensor) -> list[Tensor] | Tensor:
        """Return a full-resolution target or mask as nnU-Net's loss wants targets."""
        scales = self._get_deep_supervision_scales()
        return full if scales is None else downsample(full, scales)

    def mix_share(self) -> float:
        """Return in which share of the steps annotated patches show boxes of each other.

        "auto" is half of them if the annotated training cases are scans, not single 2D images, if
        they hold at most 130 patches side by side (2D: slices, if a patch holds one) and a batch
        has more than one patch; otherwise none.
        """
        if self.labeled_mix != "auto":
            return self.labeled_mix
        if self._mix_share is None:
            patches = len(self.do_split()[0]) / self.patch_share()
            slices = self.plans_manager.plans["original_median_shape_after_transp"][0]
            mixes = patches <= MIXED_PATCHES and slices > 1
            mixes &= self.batch_size * process_count() > 1
            self._mix_share = MIXED_STEPS if mixes else 0.0
            self.print_to_log_file(
                f"labeled_mix=auto: annotated patches, about {patches:.0f} side by side, show "
                f"boxes of each other in {self._mix_share:.0%} of the steps."
            )
        return self._mix_share

    def mix_labeled(self, batch: Batch, inside: Tensor) -> Batch:
        """Return the batch with annotated patches that show their neighbour, labels alike.

        Args:
            batch: the step's data; not changed.
            inside: (B, 1, *) bool, where each patch shows the one before it in the batch.
        """

        def mixed(t: Tensor) -> Tensor:
            return torch.where(inside, joint_roll(t), t)

        return replace(
            batch,
            x_l=mixed(batch.x_l),
            y_l=self.deep(mixed(batch.target)),
            valid_l=mixed(batch.valid_l),
            mixed_l=True,
        )

    def masked_loss(self, output: Any, target: Tensor, keep: Tensor) -> Tensor:
        """Return nnU-Net's CE + Dice over the voxels to keep, each scale by its own count.

        Args:
            output: logits, as the network returns them.
            target: full resolution, as in `Batch.target`.
            keep: (B, 1, *) bool. Voxels with the ignore label are left out as well.
        """
        ce_weight = 1.0
        if self.label_manager.has_ignore_label:
            if self.regions:
                keep, target = keep & ~target[:, -1:].bool(), target[:, :-1]
            else:
                keep = keep & (target != self.label_manager.ignore_label)
        elif self.regions:
            # with an ignore label nnU-Net sums the BCE over regions, without one it averages
            ce_weight = 1 / self.num_heads

        def at_scale(logits: Tensor, target: Tensor, keep: Tensor) -> Tensor:
            return masked_ce_dice(
                logits,
                target,
                keep,
                dice=self._masked_dice,
                regions=self.regions,
                ce_weight=ce_weight,
            )

        return self._over_scales(at_scale, output, target, keep)

    def pseudo_loss(
        self,
        output: Any,
        pseudo_label: Tensor,
        weight: Tensor,
        pseudo_voxels: Tensor,
        parts: Literal["ce_dice", "ce", "dice"] = "ce_dice",
    ) -> Tensor:
        """Return CE + Dice on pseudo-labels; see `functional.pseudo_ce_dice`.

        All scales get the full-resolution teacher's map. Classes with fewer than 64 (3D) or 16
        (2D) voxels at full resolution, in proportion on coarser scales, are left out of the Dice.

        Args:
            output: logits, as the network returns them.
            pseudo_label: full resolution, (B, 1, *) labels or (B, R, *) bool.
            weight: same voxels, (B, 1 or R, *); 0 counts nothing.
            pseudo_voxels: (B, 1, *) bool, voxels whose target is a pseudo-label.
            parts: both terms, or one of them.
        """
        full_size = pseudo_label[0, 0].numel()
        # nnU-Net's own loss sums the BCE over regions where there is an ignore label
        summed = self.regions and self.label_manager.has_ignore_label
        ce_weight = (self.num_heads if summed else 1) * float("ce" in parts.split("_"))
        least = 64 if pseudo_label.ndim == 5 else 16

        def at_scale(logits: Tensor, label: Tensor, w: Tensor, voxels: Tensor) -> Tensor:
            share = label[0, 0].numel() / full_size
            return pseudo_ce_dice(
                logits,
                label,
                w,
                voxels,
                regions=self.regions,
                min_voxels=max(1, round(least * share)),
                ce_weight=ce_weight,
                dice_weight=float("dice" in parts),
            )

        return self._over_scales(at_scale, output, pseudo_label, weight, pseudo_voxels)

    def _over_scales(self, loss_fn: Callable[..., Tensor], output: Any, *full: Tensor) -> Tensor:
        """Return a loss on full-resolution maps, summed over scales with nnU-Net's weights."""
        if not self.enable_deep_supervision:
            return loss_fn(output, *full)
        scales = self._get_deep_supervision_scales()
        maps = [downsample(m, scales) for m in full]
        return deep_supervised(loss_fn, output, *maps, weights=self.loss.weight_factors)

    def as_target(self, pseudo_label: Tensor) -> Tensor:
        """Give pseudo-labels of regions the empty ignore channel that targets have, if any."""
        if self.regions and self.label_manager.has_ignore_label:
            return torch.cat([pseudo_label, torch.zeros_like(pseudo_label[:, :1])], 1)
        return pseudo_label

    def strong_intensity(self, x: Tensor, valid: Tensor) -> Tensor:
        """Return the strong intensity view; channels that nnU-Net masks stay 0 outside the mask.

        Where nnU-Net turns and zooms within thick slices only, nothing is blurred across them.
        """
        schemes = self.configuration_manager.normalization_schemes
        strong = strong_intensity(
            x,
            thick_slices=self._thick_slices,
            relative_noise=not UNIT_VARIANCE.issuperset(schemes),
        )
        masked = self.configuration_manager.use_mask_for_norm
        if any(masked):
            channels = torch.tensor(masked).to(x.device, non_blocking=True)
            strong = torch.where(channels.view(1, -1, *[1] * (x.ndim - 2)) & ~valid, 0, strong)
        return strong

    def keep_largest(self, labels: Tensor, valid: Tensor, mode: str) -> Tensor:
        """Keep the largest connected component of each class, per sample; the rest is background.

        Args:
            labels: hard pseudo-labels, (B, 1, *), or (B, R, *) bool for regions.
            valid: (B, 1, *) bool, False on padding: what a network sees there is no piece.
            mode: "on" filters all classes, "off" none, "auto" those that are one piece in nearly
                all annotated training cases (2D: slices): `pieces_share` of at least `pieces_seen`.
        """
        if mode == "off":
            return labels
        foreground = range(self.num_heads) if self.regions else range(1, self.num_heads)
        if mode == "auto" and self._single_piece is None:
            self._single_piece = self._find_single_piece()
        chosen = list(foreground) if mode == "on" else self._single_piece
        if not chosen:
            return labels
        labels = labels * valid
        if not self.regions:
            return largest_component(labels, self.num_heads, chosen)
        filtered = labels.clone()
        filtered[:, chosen] = largest_component_regions(labels[:, chosen])
        return filtered

    def _find_single_piece(self) -> list[int]:
        """Classes (regions) that are one piece in the annotated training cases."""
        manager = self.label_manager
        sets = manager.foreground_regions if self.regions else manager.foreground_labels
        label_sets = [s if isinstance(s, list | tuple) else (s,) for s in sets]
        training_cases, _ = self.get_tr_and_val_datasets()
        slices = len(self.configuration_manager.patch_size) == 2
        single = single_piece(
            training_cases, label_sets, slices, share=self.pieces_share, least=self.pieces_seen
        )
        if single:
            self.print_to_log_file(
                f"Pseudo-labels keep the largest piece of {'region' if self.regions else 'class'} "
                f"{', '.join(str(i + 1) for i in single)} only: one piece in at least "
                f"{100 * self.pieces_share:g} % of the annotated {'slices' if slices else 'scans'}."
            )
        return single if self.regions else [label_sets[i][0] for i in single]

    def draw(self) -> float:
        """Draw a number from [0, 1), the same for all processes: they run the same passes."""
        number = torch.rand(())
        if self.is_ddp:
            number = number.to(self.device)
            copy_from_first([number])
        return number.item()

    def observe(self, name: str, value: Tensor) -> None:
        """Keep a tensor, detached, for `after_step` of this step."""
        self._observed[name].append(value.detach())

    def track(self, name: str, value: Tensor | float) -> None:
        """Log the epoch's mean of a value beside coverage and confidence."""
        self._meter.add(f"pseudo_labels/{name}", value)

    @torch.no_grad()
    def track_pseudo_labels(
        self, prob: Tensor, counted: Tensor, valid: Tensor, forced: Tensor | None = None
    ) -> None:
        """Log coverage, mean confidence and class shares; observe the last as `pseudo_shares`.

        Args:
            prob: the labelling network's probabilities, (B, K, *).
            counted: voxels that enter the loss, (B, 1 or R, *).
            valid: (B, 1, *) bool, False on padding.
            forced: (B,) bool, samples drawn around foreground: they do not tell class shares.
        """
        covered = (counted.bool() & valid).float().mean(1).sum()
        self.track("coverage", joint_share(covered, valid.sum()))
        sure = confidence(prob, self.regions).mean(1, keepdim=True)
        self.track("confidence", joint_share((sure * valid).sum(), valid.sum()))
        freely = None if forced is None else ~forced
        shares = self._shares(hard_labels(prob, self.regions), valid, freely)
        self._meter.add("shares/pseudo", shares)
        self.observe("pseudo_shares", shares)

    @torch.no_grad()
    def decisions(self, output: Any) -> Tensor:
        """Return the labels (B, 1, *), or regions (B, R, *), that logits decide for."""
        logits = full_res(output)
        return logits > 0 if self.regions else hard_labels(logits, regions=False)

    @torch.no_grad()
    def track_agreement(self, output: Any, pseudo_label: Tensor, counted: Tensor) -> None:
        """Log the share of counted voxels at which student and pseudo-label agree."""
        student = self.decisions(output)
        counted = counted.bool().expand_as(student)
        agreed = ((student == pseudo_label) & counted).sum()
        # NaN, so missing, where none counts
        self.track("agreement", joint_share(agreed, counted.sum()))

    def _shares(self, labels: Tensor, valid: Tensor, samples: Tensor | None) -> Tensor:
        return class_shares(labels, valid, self.num_heads, self.regions, samples)

    def label_shares(self, batch: Batch) -> Tensor:
        """Return the share of each foreground class or region in patches that were not forced.

        NaN if all patches of the batch had foreground forced into them.
        """
        return self._shares(*self.known_labels(batch), ~batch.forced_fg_l)

    def known_labels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return labels or regions of the annotated patches, and where they are known.

        Returns:
            (B, 1 or R, *) labels, and (B, 1, *) bool, False on padding and where ignored.
        """
        target, valid = batch.target, batch.valid_l
        if self.label_manager.has_ignore_label:
            if self.regions:
                return target[:, :-1], valid & ~target[:, -1:].bool()
            valid = valid & (target != self.label_manager.ignore_label)
        return target, valid

    # ------------------------------------------------------------------ the step

    def on_train_epoch_start(self) -> None:
        """Set modes, learning rates and whether unlabelled patches are loaded."""
        super().on_train_epoch_start()
        self.step = self.current_epoch * self.num_iterations_per_epoch
        self._set_modes()
        for phase in self._phases:
            if phase.optimizer is not self.optimizer:
                for group in phase.optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * phase.schedule(self.progress)
        end_of_epoch = (self.step + self.num_iterations_per_epoch) / self.total_steps
        self._unlabeled_active.value = self.needs_unlabeled(end_of_epoch)
        due = self._searches_until(self.progress)
        if self._places is not None and due > self._places.number:
            self._search_foreground(self._places, due)

    def _searches_until(self, progress: float) -> int:
        return sum(start <= progress for start in self.foreground_searches()[1])

    def _go_on_with_places(self) -> None:
        """Take up the search that the interrupted run had last; the first epoch may add one."""
        done = self._searches_until((self.current_epoch - 1) / self.num_epochs)
        if self._places is not None and self._places.path(done).is_file():
            self._places.number = done

    def _search_foreground(self, places: ForegroundPlaces, number: int) -> None:
        """Let the teacher look for foreground in unlabelled cases; patches are drawn there then."""

        @torch.no_grad()
        def decide(x: Tensor) -> Tensor:
            with self._autocast():
                return self.decisions(self.teacher(x.to(self.device, non_blocking=True)))

        start = time()
        passes_in_training = 3 * self.step_cost * self.batch_size * self.total_steps
        found = search(
            self._unlabeled_cases(),
            decide,
            self.configuration_manager.patch_size,
            self.batch_size,
            int(SEARCH_SHARE * passes_in_training),
            self.num_heads,
            self.regions,
            np.random.default_rng([self.seed or 0, number]),
            (self.local_rank, process_count()),
        )
        everywhere = {case: voxels for part in gather(found) for case, voxels in part.items()}
        seen = {case: voxels for case, voxels in everywhere.items() if voxels}
        if self.local_rank == 0:
            write_places(seen, places.path(number))
        gather(None)  # no process goes on before that
        places.number = number
        self.print_to_log_file(
            f"The teacher sees foreground in {len(seen)} of {len(everywhere)} unlabelled scans "
            f"({time() - start:.0f} s); part of the unlabelled patches is drawn there now."
        )

    def _set_modes(self) -> None:
        self.companions.train()
        if self.ema_decay is not None:
            self.teacher.eval()

    @property
    def precision(self) -> str:
        """Type of the numbers that most layers compute in: float16, bfloat16 or float32."""
        if self.device.type == "cuda":
            return "float16"
        bf16 = self.device.type == "cpu" and self.bf16_on_cpu and cpu_has_bf16()
        return "bfloat16" if bf16 else "float32"

    def _autocast(self, cache: bool = False) -> AbstractContextManager:
        # No cache of cast weights in a step: before PyTorch 2.10 one that was filled without
        # gradient cuts the gradient of a later pass through the same network.
        if self.precision == "float16":
            return torch.autocast("cuda", cache_enabled=cache)
        if self.precision == "bfloat16":
            return torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)
        return nullcontext()

    def train_step(self, batch: dict) -> dict:
        """Run all phases on one batch of the two-stream loader."""
        while self._unlabeled_active.value and "unlabeled" not in batch:
            batch = next(self.dataloader_train)  # made before unlabelled patches were asked for
        data = Batch.from_loader(batch, self.device)
        self._patches["labeled"] += len(data.keys_l)
        self._patches["unlabeled"] += len(data.keys_u)
        self._observed = defaultdict(list)
        if self.uses_unlabeled:
            shares = self.label_shares(data)
            self._meter.add("shares/labels", shares)
            self.observe("label_shares", shares)
        share = self.mix_share()
        if share > 0 and self.draw() < share:
            spatial = data.x_l.shape[2:]
            boxes = random_boxes(len(data.x_l), spatial, *LABELED_BOX, device=self.device)
            data = self.mix_labeled(data, boxes)
        step_terms: dict[str, Tensor] = {}
        stepped, self._at_fault = False, False
        for phase in self._phases:
            stepped |= self._run_phase(phase, data, step_terms)
        if stepped:
            self._update_scale(self._at_fault)
        for name, value in step_terms.items():
            self._meter.add(f"terms/{name}", value)
        self.after_step(self._observed)
        self.step += 1
        return {"loss": sum(step_terms.values(), torch.zeros((), device=self.device))}

    def _run_phase(self, phase: Phase, batch: Batch, step_terms: dict[str, Tensor]) -> bool:
        if len(self._phases) > 1:
            own = {id(p) for group in phase.optimizer.param_groups for p in group["params"]}
            for other in self._phases:
                for group in other.optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.requires_grad_(id(parameter) in own)
        observed = {name: list(values) for name, values in self._observed.items()}
        terms = self._backpropagate(phase, batch)
        if not terms:
            return False
        finite = self._clip(phase)
        at_fault = not finite and self._are_at_fault(terms)
        if not finite and len({name.startswith("sup") for name in terms}) == 2:
            # what the annotated patches teach is not lost with the rest
            self._observed = defaultdict(list, observed)
            self._update_scale(at_fault)  # from here on gradients may be unscaled anew
            terms = self._backpropagate(phase, batch, only="sup")
            finite = self._clip(phase)
            self._dropped_pseudo += finite and at_fault
            at_fault = not finite and self._are_at_fault(terms)
        for name, value in terms.items():
            step_terms[name] = step_terms[name] + value if name in step_terms else value
        if finite:
            phase.optimizer.step()
        self._at_fault |= at_fault
        self._skipped_steps += at_fault
        return True

    def _update_scale(self, at_fault: bool) -> None:
        """Let the gradient scaler follow what it found, but not where its scale is not at fault.

        Halved for each loss that is not finite, it would end at 0, and with it all gradients.
        """
        if self.grad_scaler is not None:
            self.grad_scaler.update(self.grad_scaler.get_scale() if at_fault else None)

    def _are_at_fault(self, terms: Terms) -> bool:
        """Tell whether gradients that are not finite are so without their scale, too.

        The scaler tries larger scales now and then, until half precision overflows.
        """
        if self.grad_scaler is None or self.grad_scaler.get_scale() < 1:
            return True
        return any(gather(not all(value.isfinite() for value in terms.values())))

    def _backpropagate(self, phase: Phase, batch: Batch, only: str = "") -> Terms:
        """Add up the gradients of a phase's terms, of those named `only`...; return the terms."""
        phase.optimizer.zero_grad(set_to_none=True)
        summed: Terms = {}
        generator = iter(phase.losses(batch))
        while True:
            with self._autocast():
                terms = next(generator, None)
            if terms is None:
                self._average_gradients(phase)
                return summed
            counted = {name: value for name, value in terms.items() if name.startswith(only)}
            del terms
            total: Any = sum(counted.values())
            if counted:
                (total if self.grad_scaler is None else self.grad_scaler.scale(total)).backward()
            for name, value in counted.items():
                value = value.detach().float()
                summed[name] = summed[name] + value if name in summed else value
            del counted, total

    def _clip(self, phase: Phase) -> bool:
        """Clip the gradients of each module and tell whether all of them are finite.

        This waits for the device, where the gradient scaler would wait right afterwards.
        """
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(phase.optimizer)
        norms = [nn.utils.clip_grad_norm_(m.parameters(), GRADIENT_CLIP) for m in phase.modules]
        return bool(torch.stack([n.to(self.device) for n in norms]).isfinite().all())

    def _average_gradients(self, phase: Phase) -> None:
        """Give all processes the mean of their gradients; the same parameters have one in all."""
        if not self.is_ddp:
            return
        for module in phase.modules:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            if gradients:
                joint = torch.cat([g.flatten() for g in gradients])
                torch.distributed.all_reduce(joint)
                joint /= process_count()
                parts = joint.split([g.numel() for g in gradients])
                torch._foreach_copy_(
                    gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)]
                )

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Bring the epoch's losses to the host at once."""
        losses = torch.stack([o["loss"] for o in train_outputs]).cpu().numpy()
        super().on_train_epoch_end([{"loss": loss} for loss in losses])

    # ------------------------------------------------------------------ validation

    @contextmanager
    def _in_place_of_student(self, network: nn.Module) -> Iterator[None]:
        """Put a network where nnU-Net looks for its own, with nnU-Net's deep supervision."""
        trained = self.network
        before: list[Any] = [m for m in network.modules() if getattr(m, "deep_supervision", False)]
        self.network = network
        try:
            self._set_deep_supervision(network, self.enable_deep_supervision)
            yield
        finally:
            self.network = trained
            self._set_deep_supervision(network, False)  # a teacher's is always off
            for module in before:
                module.deep_supervision = True

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch deep supervision of the network in the student's place."""
        self._set_deep_supervision(self.network, enabled)

    @staticmethod
    def _set_deep_supervision(network: nn.Module, enabled: bool) -> None:
        for module in network.modules():
            if hasattr(module, "deep_supervision"):
                module.deep_supervision = enabled  # type: ignore

    def on_validation_epoch_start(self) -> None:
        """Switch off dropout and the like in all networks that are scored."""
        super().on_validation_epoch_start()
        for network in self._scored_networks().values():
            network.eval()

    def validation_step(self, batch: dict) -> dict:
        """Score the deployed network as nnU-Net does, and student and teacher beside it."""
        result: dict = {}
        for name, network in self._scored_networks().items():
            with self._in_place_of_student(network):
                # a copy: nnU-Net writes into the target where there is an ignore label
                target = batch["target"]
                target = [t.clone() for t in target] if isinstance(target, list) else target.clone()
                scored = super().validation_step({**batch, "target": target})
            counts = {f"{name}_{c}": scored[f"{c}_hard"] for c in ("tp", "fp", "fn")}
            result |= counts | (scored if network is self.deployed_network() else {})
        return result

    def _scored_networks(self) -> dict[str, nn.Module]:
        networks = self.parts() or {"student": self.network}
        if self.teacher is not None:
            networks["teacher"] = self.teacher
        if all(self.deployed_network() is not n for n in networks.values()):
            networks["deployed"] = self.deployed_network()
        return networks

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Keep the pseudo-Dice of student and teacher for the log."""
        super().on_validation_epoch_end(val_outputs)
        self._pseudo_dice = {}
        for name in self._scored_networks():
            counts = np.sum(
                [[o[f"{name}_{c}"] for c in ("tp", "fp", "fn")] for o in val_outputs], 0
            )
            tp, fp, fn = np.sum(gather(counts), 0)
            with np.errstate(invalid="ignore"):
                self._pseudo_dice[name] = (2 * tp / (2 * tp + fp + fn)).tolist()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate the deployed network on the annotated validation cases."""
        with self._in_place_of_student(self.deployed_network()):
            super().perform_actual_validation(save_probabilities)

    def on_epoch_end(self) -> None:
        """Write the log, then nnU-Net's checkpoints."""
        epoch = self.current_epoch
        everywhere = gather(self._patches)
        patches = {stream: sum(p[stream] for p in everywhere) for stream in self._patches}
        record = {
            "epoch": epoch,
            "progress": self.progress,
            "seconds": time() - self.logger.get_value("epoch_start_timestamps", step=-1),
            "lr": self.optimizer.param_groups[0]["lr"],
            "terms": {},
            "pseudo_labels": {},
            "shares": {},
            "pseudo_dice": self._pseudo_dice,
            "drift": self.measure_drift(),
            "patches": patches,
            "precision": self.precision,
            "steps_without_pseudo": self._dropped_pseudo,
            "steps_left_out": self._skipped_steps,
        }
        if self.device.type == "cuda":
            record["gpu_peak_mb"] = round(torch.cuda.max_memory_allocated(self.device) / 2**20)
        self._patches = {"labeled": 0, "unlabeled": 0}
        for name, value in self._meter.means().items():
            group, _, key = name.partition("/")
            record[group][key] = value
        self._warn_of_non_finite()
        self._history.append(record)
        self._log_externally(record)
        self._warn_of_shares(record)
        for fraction in self.keep_at:
            reached = epoch < fraction * self.num_epochs <= epoch + 1
            if reached and not self.disable_checkpointing and self.local_rank == 0:
                kept = Path(self.output_folder) / f"checkpoint_at_{100 * fraction:g}.pth"
                checkpoints.save_checkpoint(self._prediction_state(), kept)
        super().on_epoch_end()
        if (epoch + 1) % self.save_every == 0 or epoch + 1 == self.num_epochs:
            self._history.plot()

    def _warn_of_non_finite(self) -> None:
        """Tell how many steps of the epoch were left out, wholly or in part; count anew."""
        for count, what in (
            (self._skipped_steps, "were left out because their"),
            (self._dropped_pseudo, "learnt from the annotated patches alone because the whole"),
        ):
            if count:
                none = count == self.num_iterations_per_epoch and count == self._skipped_steps
                self.print_to_log_file(
                    f"WARNING: {count} steps of this epoch {what} gradient was not finite. "
                    f"{'So nothing was learnt. ' if none else ''}If this goes on, check the images "
                    f"for extreme values."
                )
        self._skipped_steps = self._dropped_pseudo = 0

    def _log_externally(self, record: dict) -> None:
        """Send every number to nnU-Net's external loggers; its local one takes no new keys."""
        for group in ("terms", "pseudo_labels", "shares", "pseudo_dice", "drift"):
            for name, value in record[group].items():
                values = value if isinstance(value, list) else [value]
                for k, number in enumerate(values):
                    key = f"ssl_{group}/{name}" + (f"/class_{k + 1}" if len(values) > 1 else "")
                    for logger in self.logger.loggers:
                        logger.log(key, number, record["epoch"])

    def _warn_of_shares(self, record: dict) -> None:
        """Tell which classes pseudo-labels lose or inflate: for three epochs, then every fifty."""
        # Partial annotations do not tell true volumes, and early on no class is known yet.
        if self.label_manager.has_ignore_label or record["progress"] < 0.15:
            return
        for k, expected in enumerate(record["shares"].get("labels") or []):
            trend = self._trend_of_share(record, k)
            trends = (self._trend_of_share(r, k) for r in reversed(self._history.records))
            streak = sum(1 for _ in takewhile(trend.__eq__, trends))
            if not trend or (streak != 3 and streak % 50):
                continue
            found = record["shares"]["pseudo"][k]
            self.print_to_log_file(
                f"WARNING: the pseudo-labels are {trend} {'region' if self.regions else 'class'} "
                f"{k + 1}: it fills {100 * found:.3f} % of the pseudo-labelled voxels but "
                f"{100 * expected:.3f} % of the annotated ones. If this stays so, the unlabelled "
                f"scans may be of another kind, or training collapses: compare with "
                f"SSLTrainerSupervised, annotate more cases, or check imagesUn."
            )

    @staticmethod
    def _trend_of_share(record: dict, k: int) -> str:
        found, expected = (
            (record["shares"].get(name) or [None] * (k + 1))[k] for name in ("pseudo", "labels")
        )
        if found is None or expected is None or expected <= 1e-5:
            return ""
        if found < COLLAPSE_RATIO * expected:
            return "losing"
        return "inflating" if found > GROWTH_RATIO * expected else ""

    # ------------------------------------------------------------------ data

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return labelled training and validation cases.

        Masks that a model made validate nothing, and true ones are half of what is drawn.

        Raises:
            UserError: no split and too few cases for one, or a split that names cases which are not
                preprocessed.
        """
        train, val = self._read_split()
        made = pseudo_labeled(self.preprocessed_dataset_folder_base)
        if not made:
            return train, val
        return balanced(train, made), [case for case in val if case not in made]

    def _read_split(self) -> tuple[list[str], list[str]]:
        if self.fold == "all":
            return super().do_split()
        path = Path(self.preprocessed_dataset_folder_base) / "splits_final.json"
        data_class = infer_dataset_class(self.preprocessed_dataset_folder)
        cases = data_class.get_identifiers(self.preprocessed_dataset_folder)
        fix = f"Run: nnunet_ssl plan_and_preprocess -d {path.parent.name[7:10]}"
        if not path.is_file() and len(cases) < 5:
            raise UserError(f"{path} is missing, and {len(cases)} cases make no 5 folds. {fix}")
        if path.is_file():
            splits = json.loads(path.read_text(encoding="utf-8"))
            split = splits[self.fold]
            unknown = sorted({*split["train"], *split["val"]} - set(cases))
            if unknown:
                raise UserError(
                    f"{path}, fold {self.fold}, names {unknown[0]!r}, which is no preprocessed "
                    f"annotated case. Mend or delete the file. {fix}"
                )
        return super().do_split()

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Return nnU-Net's loaders; the training one carries both streams in one worker pool."""
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        patch_size = self.configuration_manager.patch_size
        scales = self._get_deep_supervision_scales()
        rotation, self._thick_slices, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        labels = self.label_manager
        regions = labels.foreground_regions if labels.has_regions else None
        train_transforms = self.get_training_transforms(
            patch_size,
            rotation,
            scales,
            mirror_axes,
            self._thick_slices,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
            is_cascaded=False,
            foreground_labels=labels.foreground_labels,
            regions=regions,
            ignore_label=labels.ignore_label,
        )
        val_transforms = self.get_validation_transforms(
            scales,
            is_cascaded=False,
            foreground_labels=labels.foreground_labels,
            regions=regions,
            ignore_label=labels.ignore_label,
        )
        train, val = self.make_loaders(train_transforms, val_transforms, initial_patch_size)
        progress = self.current_epoch / self.num_epochs
        self._unlabeled_active.value = self.needs_unlabeled(progress + 1 / self.num_epochs)
        workers = get_allowed_n_proc_DA()
        loaders = (
            self._augmenter(train, workers, workers, max(6, workers // 2)),
            self._augmenter(val, workers, max(1, workers // 2), max(3, workers // 4)),
        )
        for loader in loaders:
            next(loader)
        return loaders

    def make_loaders(
        self, train_transforms: Any, val_transforms: Any, initial_patch_size: Sequence[int]
    ) -> tuple[TwoStreamLoader, nnUNetDataLoader]:
        """Return what makes the batches of training and of the validation of an epoch."""
        patch_size, labels = self.configuration_manager.patch_size, self.label_manager
        train_cases, val_cases = self.get_tr_and_val_datasets()
        reproducible = get_allowed_n_proc_DA() == 0

        def stream(cases: Any, labeled: bool) -> PatchLoader:
            return PatchLoader(
                cases,
                self.batch_size,
                initial_patch_size,
                patch_size,
                labels,
                Pipeline(train_transforms, labeled, () if labeled else self.views, reproducible),
                oversample_foreground_percent=(
                    self.oversample_foreground_percent if labeled else share
                ),
                probabilistic_oversampling=labeled and self.probabilistic_oversampling,
                meta=self.meta,
                table=self.case_table(cases.identifiers),
                slice_axis=self.plans_manager.transpose_forward[0],
                places=None if labeled else self._places,
            )

        share, searches = self.foreground_searches()
        if searches:
            self._places = ForegroundPlaces(Path(self.output_folder))
        unlabeled = stream(self._unlabeled_cases(), False) if self.uses_unlabeled else None
        train = TwoStreamLoader(stream(train_cases, True), unlabeled, self._unlabeled_active)
        val = nnUNetDataLoader(
            val_cases,
            self.batch_size,
            patch_size,
            patch_size,
            labels,
            oversample_foreground_percent=self.oversample_foreground_percent,
            transforms=val_transforms,
            probabilistic_oversampling=self.probabilistic_oversampling,
        )
        return train, val

    def patch_share(self, of_slice: bool = False) -> float:
        """Return how much of a case of median size one patch holds, at most 1.

        Args:
            of_slice: in 2D, how much of one slice.
        """
        case = self.configuration_manager.median_image_size_in_voxels
        patch = self.configuration_manager.patch_size
        share = math.prod(min(p / n, 1) for p, n in zip(patch, case, strict=True))
        if len(patch) == 2 and not of_slice:
            share /= self.plans_manager.plans["original_median_shape_after_transp"][0]
        return share

    def fixed_patches(self, least: int) -> tuple[Tensor, Tensor]:
        """Return unlabelled patches without augmentation, the same ones in every run.

        Args:
            least: number of patches, rounded up to whole batches of the plan.

        Returns:
            x (N, C, *) and valid (N, 1, *) bool, False on padding; not on the training device.
        """
        patch_size = self.configuration_manager.patch_size
        transforms = self.get_validation_transforms(
            None, foreground_labels=self.label_manager.foreground_labels
        )
        with checkpoints.own_randomness(0, self.device):
            batch = PatchLoader(
                self._unlabeled_cases(),
                math.ceil(least / self.batch_size) * self.batch_size,
                patch_size,
                patch_size,
                self.label_manager,
                Pipeline(transforms, labeled=False),
            ).generate_train_batch()
        return batch["data"], batch["valid"]

    def _augmenter(self, loader: Any, workers: int, processes: int, cached: int) -> Any:
        if workers == 0:
            return SingleThreadedAugmenter(loader, None)
        return NonDetMultiThreadedAugmenter(
            data_loader=loader,
            transform=None,
            num_processes=processes,
            num_cached=cached,
            seeds=None,
            pin_memory=self.device.type == "cuda",
            wait_time=0.002,
        )

    def _unlabeled_cases(self) -> UnlabeledDataset:
        base = Path(self.preprocessed_dataset_folder_base)
        manifest = read_manifest(base, self.plans_manager.plans, self.configuration_name)
        folder = unlabeled_folder(base, self.configuration_manager.data_identifier)
        return UnlabeledDataset(str(folder), sorted(manifest["cases"]))

    @property
    def case_table_path(self) -> Path:
        """The CSV file with values per case; `plan_and_preprocess` copies it from the raw data."""
        return Path(self.preprocessed_dataset_folder_base) / CASE_TABLE

    def case_table(self, cases: Sequence[str]) -> dict[str, dict[str, float]]:
        """Return the values of the columns that `meta` names: case -> column -> number."""
        columns = [name for name in self.meta if name not in META]
        return read_case_table(self.case_table_path, columns, cases)

    # ------------------------------------------------------------------ losses of nnU-Net, masked

    def _build_masked_dice(self) -> nn.Module:
        """nnU-Net's Dice as its own loss has it."""
        dice: nn.Module = MemoryEfficientSoftDiceLoss(
            torch.sigmoid if self.regions else softmax_helper_dim1,
            batch_dice=self.configuration_manager.batch_dice,
            do_bg=self.regions,
            smooth=1e-5,
            ddp=self.is_ddp,
        )
        return torch.compile(dice) if self._do_i_compile() else dice  # type: ignore[return-value]

    # ------------------------------------------------------------------ state

    def _prediction_state(self) -> dict:
        """What nnU-Net's predictor reads."""
        return {
            "network_weights": self.deployed_network().state_dict(),
            "init_args": self.my_init_kwargs,
            # a stock network needs neither this package nor the variable to predict
            "trainer_name": "nnUNetTrainer" if self.deploys_stock else type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
        }

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint with our state beside it, atomically.

        Raises:
            UserError: disk full or folder not writable; the old file is unharmed.
        """
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        rng = gather(checkpoints.random_state(self.device))
        if self.local_rank > 0:
            return
        scaler = self.grad_scaler
        state = {
            **self._prediction_state(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": scaler.state_dict() if scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema_with_this_epoch(),
            "current_epoch": self.current_epoch + 1,
            "ssl_state": {
                "format": checkpoints.STATE_FORMAT,
                "trainer": type(self).__name__,
                "deploy": self.deploy,
                "student": self.network.state_dict(),
                "parts": {k: m.state_dict() for k, m in self.parts().items()},
                "companions": {k: m.state_dict() for k, m in self.companions.items()},
                "optimizers": {
                    p.name: p.optimizer.state_dict()
                    for p in self._phases
                    if p.optimizer is not self.optimizer
                },
                "rng": rng,  # of each process
                "settings": self.settings(),
            },
        }
        checkpoints.save_checkpoint(state, filename)

    def _best_ema_with_this_epoch(self) -> float | None:
        """nnU-Net saves the latest checkpoint before it looks whether the epoch is the best."""
        so_far = self.logger.get_value("ema_fg_dice", step=None)
        values = [v for v in (self._best_ema, *so_far[-1:]) if v is not None]
        return max(values, default=None)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Load a checkpoint of this trainer, to continue or to validate.

        Raises:
            UserError: the file is cut short, another trainer's, or has no state of ours.
        """
        path = str(filename_or_checkpoint)
        saved = checkpoints.load_training_state(path, type(self).__name__)
        if not self.was_initialized:
            self.initialize()
        # whose weights nnU-Net reads
        with self._alone(), self._in_place_of_student(self.deployed_network()):
            super().load_checkpoint(path)
        state = saved["ssl_state"]
        self.network.load_state_dict(state["student"])
        for name, module in self.companions.items():
            module.load_state_dict(state["companions"][name])
        for phase in self._phases:
            if phase.optimizer is not self.optimizer:
                phase.optimizer.load_state_dict(state["optimizers"][phase.name])
        for phase in self._phases:
            # Adam counts its steps on the host, nnU-Net loads all to the device
            for values in phase.optimizer.state.values():
                if isinstance(values.get("step"), Tensor):
                    values["step"] = values["step"].cpu()
        changed = {
            k: (v, state["settings"][k])
            for k, v in self.settings().items()
            if k in state["settings"] and state["settings"][k] != v
        }
        for name, (now, then) in changed.items():
            self.print_to_log_file(f"NOTE: setting {name} is {now}; the run began with {then}.")
        self._resumed = {"rng": state["rng"]}
