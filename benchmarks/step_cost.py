"""Time and memory of a training step, for each trainer, against the supervised twin.

All trainers are built in one process on synthetic data and measured in turn, round after round, so
that a ratio compares what ran within the same minute. They stand late in training, past warm-ups,
stages and ramps, with their default settings. Two things stand beside them:

* the bound: supervised steps on the same number of patches x (1 + u/3), u the share of patches that
  pass a teacher, who has no backward pass. This is what a trainer declares as its `step_cost`. A
  supervised step on twice the patches is measured, too, as a step of its own.
* the usual research loop, written plainly below: two loaders, labelled and unlabelled patches in
  passes of their own and one joint graph, strong views made sample by sample on the CPU, averaged
  weights in a loop over parameters, the loss brought to the host in every step. It trains the same
  network with the same supervised loss, and on a GPU it has mixed precision and torch.compile, too.

Batches are drawn beforehand: the loader is a column of its own, for one process. Times are
processor time of one thread on a CPU, and until the device is done on a GPU. Memory is what is
allocated at the peak (GPU), or what is kept for the backward pass beside the weights (CPU).
Operations are those of convolutions and matrix products, counted by PyTorch.

    python benchmarks/step_cost.py --dims 2d --patch 40 56 --batch 8 --features 16 32 64 128
    python benchmarks/step_cost.py --device cuda --dims 3d      # the planned patch, batch, network

Results: benchmarks/results/step_cost_<device>_<dims>.json, and a plot of it beside it.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from gauges import MB, RESULTS, now, provenance
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm
from workbench import (
    TAUGHT,
    TWIN,
    build,
    configuration_of,
    kept_bytes,
    names_for,
    prepare,
    read_plans,
    resized,
    set_up,
    start_late,
    taught,
)

from nnunet_ssl.data.unlabeled import UnlabeledDataset, read_manifest, unlabeled_folder
from nnunet_ssl.data.views import Pipeline
from nnunet_ssl.functional import full_res
from nnunet_ssl.io import silence, write_json

DOUBLED, RESEARCH = "supervised, twice the patches", "research loop"
PROGRESS = 0.95  # of training; all ramps have ended or all but ended
BATCHES = 4  # drawn beforehand, then used in turn
WARM_UP = {"cpu": 2, "cuda": 12}  # steps; methods draw between branches that compile apart
COMPILED = 512  # graphs of one piece of code: many networks share it
# planned for these sizes, unless given: with room around the patch that nnU-Net plans
SHAPES = {"2d": (8, 256, 256), "3d": (160, 160, 160)}
SEED = 1

Pair = tuple[dict, dict]


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dims", choices=("2d", "3d"), default="2d")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="of each trainer in a round")
    parser.add_argument("--trainers", nargs="+", help="default: all that work in these dimensions")
    parser.add_argument("--features", type=int, nargs="+", help="of each stage; default: planned")
    parser.add_argument("--batch", type=int, help="default: planned")
    parser.add_argument("--patch", type=int, nargs="+", help="default: planned")
    parser.add_argument("-o", type=Path, help="results file")
    args = parser.parse_args()
    names = args.trainers or names_for((args.dims,))
    if unknown := sorted({n.partition("+")[0] for n in names} - set(names_for((args.dims,)))):
        parser.error(f"no such trainer for {args.dims}: {', '.join(unknown)}")
    if args.patch and len(args.patch) != int(args.dims[0]):
        parser.error(f"--patch takes {args.dims[0]} numbers for {args.dims}")
    output = args.o or RESULTS / f"step_cost_{args.device}_{args.dims}.json"

    device = torch.device(args.device)
    torch.set_num_threads(1)
    torch._dynamo.config.cache_size_limit = COMPILED
    with tempfile.TemporaryDirectory() as place:
        set_up(Path(place))
        subjects = [
            prepared(subject, device)
            for subject in tqdm(make_subjects(names, args, device), total=len(names) + 3)
        ]
        measure(subjects, args.rounds, args.steps, device)
    content = summarize(subjects) | {
        "device": args.device,
        "dims": args.dims,
        **subjects[0].facts,
        "rounds": args.rounds,
        "steps_a_round": args.steps,
        "progress": PROGRESS,
        "seed": SEED,
        **provenance(args.device),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(content, output)
    draw(content, output.with_suffix(".png"))
    for name, row in content["trainers"].items():
        print(f"{name}: {row['times_twin']} x twin, memory {row['memory_times_twin']}")


# --- what is measured -----------------------------------------------------------------------------


@dataclass
class Subject:
    """Something that takes steps.

    Attributes:
        name: of its row.
        settings: in the trainer's name.
        declared: cost of a step in steps of the twin, None if nobody says.
        draw: makes a batch.
        step: trains on it.
        modules: whose weights are no memory of a step.
        other_memory: bytes allocated on the GPU before it was built.
        facts: sizes of what it trains on.
    """

    name: str
    settings: str
    declared: float | None
    draw: Callable[[], Any]
    step: Callable[[Any], Any]
    modules: list[nn.Module]
    other_memory: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    batches: list[Any] = field(default_factory=list)
    operations: float = 0.0  # of a step
    memory: float = 0.0  # MB
    loading: list[float] = field(default_factory=list)  # seconds a batch, one a round
    stepping: list[float] = field(default_factory=list)  # seconds a step, one a round


def make_subjects(
    names: Sequence[str], args: argparse.Namespace, device: torch.device
) -> Iterator[Subject]:
    """Yield the twin, the twin with twice the patches, the research loop and the trainers."""
    configuration = configuration_of(args.dims)
    shape = SHAPES[args.dims]
    if args.patch:
        shape = (*shape[: 3 - len(args.patch)], *(math.ceil(1.25 * n) for n in args.patch))
    base = prepare(901, configuration, shape)
    plans = resized(read_plans(base), configuration, args.features, args.patch, args.batch)
    batch = plans["configurations"][configuration]["batch_size"]
    doubled = resized(plans, configuration, args.features, args.patch, 2 * batch)
    jobs = [(TWIN, TWIN, plans), (DOUBLED, TWIN, doubled), (RESEARCH, "", plans)]
    jobs += [(name, name, plans) for name in names if name != TWIN]
    for label, name, chosen in jobs:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        with silence():
            trainer = build(f"{name or TWIN}+seed={SEED}", base, chosen, configuration, device)
            if name:
                steps = TAUGHT.get(name.partition("+")[0], 0)
                start_late(trainer, PROGRESS, partial(taught, steps=steps))
                subject = of_trainer(label, trainer)
            else:
                subject = of_research_loop(trainer)
        subject.other_memory = before
        yield subject


def of_trainer(label: str, trainer: Any) -> Subject:
    """Make a subject of a trainer of ours."""
    manager = trainer.configuration_manager
    declared = {TWIN: 1.0, DOUBLED: 2.0}.get(label, trainer.step_cost)
    return Subject(
        label,
        type(trainer).__name__.partition("+")[2],
        declared,
        lambda: next(trainer.dataloader_train),
        trainer.train_step,
        [trainer.network, trainer.companions],
        facts={
            "patch": list(manager.patch_size),
            "batch": manager.batch_size,
            "features": manager.network_arch_init_kwargs["features_per_stage"],
            "network": manager.network_arch_class_name.rpartition(".")[2],
            "compiled": trainer._do_i_compile(),
        },
    )


# --- the research loop ----------------------------------------------------------------------------


def of_research_loop(trainer: Any) -> Subject:
    """Make a subject of the research loop, with the network and loss of a supervised trainer."""
    trainer.initialize()
    loop = ResearchLoop(trainer.network, trainer.new_network(), trainer.loss, trainer.device)
    labeled, unlabeled = research_loaders(trainer)
    return Subject(
        RESEARCH,
        "",
        None,
        lambda: (next(labeled), next(unlabeled)),
        loop.train_step,
        [loop.student, loop.teacher],
    )


class WeakAndStrong:
    """nnU-Net's geometry, then also its intensity changes: both views, one after the other."""

    def __init__(self, transforms: ComposeTransforms):
        self.pipeline = Pipeline(transforms, labeled=False, views=("stock",))

    def __call__(self, image: Tensor, segmentation: Tensor) -> dict[str, Tensor]:
        """Return the views in one tensor, (2 C, *)."""
        sample, views = self.pipeline(image, segmentation)
        return sample | {"image": torch.cat([sample["image"], views["stock"]])}


def research_loaders(trainer: Any) -> tuple[nnUNetDataLoader, nnUNetDataLoader]:
    """Return a loader of labelled patches and one of two views of unlabelled ones."""
    labels, manager = trainer.label_manager, trainer.configuration_manager
    rotation, dummy_2d, initial_size, mirror = (
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    )
    transforms = trainer.get_training_transforms(
        manager.patch_size,
        rotation,
        trainer._get_deep_supervision_scales(),
        mirror,
        dummy_2d,
        use_mask_for_norm=manager.use_mask_for_norm,
        foreground_labels=labels.foreground_labels,
    )
    base = Path(trainer.preprocessed_dataset_folder_base)
    cases = read_manifest(base, trainer.plans_manager.plans, trainer.configuration_name)["cases"]
    folder = unlabeled_folder(base, manager.data_identifier)
    sizes = manager.batch_size, initial_size, manager.patch_size, labels
    foreground = trainer.oversample_foreground_percent
    annotated, _ = trainer.get_tr_and_val_datasets()
    return (
        nnUNetDataLoader(annotated, *sizes, foreground, transforms=transforms),
        nnUNetDataLoader(
            UnlabeledDataset(str(folder), sorted(cases)),
            *sizes,
            transforms=WeakAndStrong(transforms),
        ),
    )


class ResearchLoop:
    """A teacher's sure decisions on a weak view teach the student on a strong one.

    Args:
        student: returns logits, highest resolution first.
        teacher: of the same architecture; gets the student's weights.
        loss: of labelled patches.
        device: trained on.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, loss: Callable, device: Any):
        self.student, self.teacher, self.loss, self.device = student, teacher, loss, device
        self.teacher.load_state_dict(student.state_dict())
        self.optimizer = torch.optim.SGD(student.parameters(), 0.01, 0.9, weight_decay=1e-4)
        self.scaler = torch.amp.GradScaler(enabled=device.type == "cuda")
        self.decay, self.threshold, self.weight = 0.99, 0.95, 0.5

    def train_step(self, batches: Pair) -> dict[str, float]:
        """Take a step on a labelled and an unlabelled batch; return the losses."""
        labeled, unlabeled = batches
        x = labeled["data"].to(self.device, non_blocking=True)
        target = labeled["target"]
        several = isinstance(target, list)
        y = [t.to(self.device) for t in target] if several else target.to(self.device)
        weak, strong = unlabeled["data"].to(self.device, non_blocking=True).chunk(2, 1)

        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            supervised = self.loss(self.student(x), y)
            with torch.no_grad():
                sure, label = full_res(self.teacher(weak)).float().softmax(1).max(1)
            logits = full_res(self.student(strong)).float()
            unsupervised = pseudo_label_loss(logits, label, (sure >= self.threshold).float())
            loss = supervised + self.weight * unsupervised
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            old.data.mul_(self.decay).add_(new.data, alpha=1 - self.decay)
        return {
            "loss": loss.item(),
            "supervised": supervised.item(),
            "unsupervised": unsupervised.item(),
        }


def pseudo_label_loss(logits: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    """Return masked cross-entropy + soft Dice without background.

    Args:
        logits: (B, C, *).
        label: (B, *), integers.
        mask: (B, *), 1 where the label counts, else 0.
    """
    ce = (cross_entropy(logits, label, reduction="none") * mask).sum() / mask.sum().clamp_min(1)
    prob = logits.softmax(1)
    one_hot = torch.zeros_like(prob).scatter_(1, label[:, None], 1)
    axes = (0, *range(2, prob.ndim))
    mask = mask[:, None]
    shared = (prob * one_hot * mask).sum(axes)
    sizes = ((prob + one_hot) * mask).sum(axes)
    return ce + 1 - ((2 * shared + 1e-5) / (sizes + 1e-5))[1:].mean()


# --- measuring ------------------------------------------------------------------------------------


def prepared(subject: Subject, device: torch.device) -> Subject:
    """Draw batches and warm up; count operations and measure memory, which do not drift."""
    with silence():
        for _ in range(BATCHES):
            subject.batches.append(pinned(subject.draw(), device))
        with torch.compiler.set_stance("force_eager"), Operations() as counter:
            subject.step(subject.batches[0])
        subject.operations = counter.total
        for k in range(WARM_UP[device.type]):
            subject.step(subject.batches[k % BATCHES])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            for batch in subject.batches:
                subject.step(batch)
            peak = torch.cuda.max_memory_allocated() - subject.other_memory
        else:
            peak = kept_bytes(subject.modules, lambda: subject.step(subject.batches[0]))
    subject.memory = peak / MB
    return subject


class Operations(TorchDispatchMode):
    """Counts operations of convolutions and matrix products, forward and backward.

    PyTorch's own counter follows modules, which fails where a loss calls `autograd.grad`.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            count = flop_registry[func._overloadpacket]
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def pinned(batch: Any, device: torch.device) -> Any:
    """Return the batch as nnU-Net's workers hand it over: in pinned memory if there is a GPU."""
    if isinstance(batch, Tensor) and device.type == "cuda":
        return batch.pin_memory()
    if isinstance(batch, dict):
        return {k: pinned(v, device) for k, v in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(pinned(v, device) for v in batch)
    return batch


def measure(subjects: Sequence[Subject], rounds: int, steps: int, device: torch.device) -> None:
    """Let all take their steps in turn, every other round in reverse."""
    cpu = torch.device("cpu")
    for k in tqdm(range(rounds), desc="Rounds"):
        for subject in subjects[:: 1 if k % 2 == 0 else -1]:
            with silence():
                start = now(cpu)
                subject.draw()
                subject.loading.append(now(cpu) - start)
                subject.step(subject.batches[-1])  # caches are warm again
                start = now(device)
                for i in range(steps):
                    subject.step(subject.batches[i % BATCHES])
                subject.stepping.append((now(device) - start) / steps)


# --- numbers --------------------------------------------------------------------------------------


def bound(samples: float, teacher_share: float) -> float:
    """Return what a step must cost: samples x (1 + u/3), a forward pass being a third of a step.

    Args:
        samples: patches that are trained on, in batches of the twin.
        teacher_share: u, part of the patches that pass a teacher, in [0, 1].
    """
    return samples * (1 + teacher_share / 3)


def ratios(times: Sequence[float], base: Sequence[float], scale: float = 1.0) -> list[float]:
    """Return median and quartiles of `times` / (`scale` x `base`), round by round."""
    each = np.array(times) / (scale * np.array(base))
    low, median, high = np.quantile(each, (0.25, 0.5, 0.75))
    return [round(float(value), 3) for value in (median, low, high)]


def summarize(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Return the table; ratios are median, lower and upper quartile over the rounds."""
    rows = {s.name: s for s in subjects}
    twin, doubled, research = rows[TWIN], rows[DOUBLED], rows[RESEARCH]
    two_streams = bound(2, 1 / 2)
    table = {}
    for s in subjects:
        row: dict[str, Any] = {
            "settings": s.settings,
            "seconds": round(float(np.median(s.stepping)), 5),
            "times_twin": ratios(s.stepping, twin.stepping),
            "bound": None if s.declared is None else round(s.declared, 3),
            "operations_times_twin": round(s.operations / twin.operations, 3),
            "times_research_loop": ratios(s.stepping, research.stepping),
            "memory_mb": round(s.memory, 2),
            "memory_times_twin": round(s.memory / twin.memory, 3),
            "loader_seconds": round(float(np.median(s.loading)), 5),
            "loader_times_twin": ratios(s.loading, twin.loading),
        }
        if s.declared is not None:
            row["times_bound"] = ratios(s.stepping, twin.stepping, s.declared)
        if s.name == RESEARCH or (s.declared and math.isclose(s.declared, two_streams)):
            # as many patches: the supervised step on all of them, and a pass of the teacher
            row["times_measured_bound"] = ratios(s.stepping, doubled.stepping, bound(1, 1 / 2))
        table[s.name] = row
    return {
        "what": (__doc__ or "").splitlines()[0],
        "columns": {
            "ratios": "median, lower quartile, upper quartile over the rounds",
            "bound": "declared step_cost: supervised steps on as many patches x (1 + u/3)",
            "times_bound": "time / (time of the twin's step x bound)",
            "times_measured_bound": "time / (time of a supervised step on all patches x (1 + u/3))",
            "operations": "of convolutions and matrix products",
            "memory": "GPU: allocated at the peak, with weights, gradients and momentum; CPU: kept "
            "for backward, without weights",
            "loader": "processor time of one process a batch",
        },
        "trainers": table,
    }


def draw(content: dict[str, Any], picture: Path) -> None:
    """Draw times with quartiles and bounds, and memory."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = sorted(content["trainers"].items(), key=lambda item: item[1]["times_twin"][0])
    names = [name.removeprefix("SSLTrainer") or "SSLTrainer" for name, _ in rows]
    height = 0.32 * len(rows) + 1.4
    with plt.style.context("default"):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9, height), sharey=True, width_ratios=(3, 1), layout="constrained"
        )
        middle, low, high = np.array([row["times_twin"] for _, row in rows]).T
        beside = (TWIN, DOUBLED, RESEARCH)
        colors = ["tab:gray" if name in beside else "tab:blue" for name, _ in rows]
        left.barh(names, middle, color=colors, xerr=(middle - low, high - middle), ecolor="black")
        for place, (_, row) in enumerate(rows):
            if row["bound"] is not None:
                left.plot([row["bound"]] * 2, [place - 0.4, place + 0.4], color="tab:orange", lw=2)
        left.plot([], [], color="tab:orange", lw=2, label="bound (declared)")
        left.legend(loc="lower right", frameon=False)
        left.set_xlabel("time of a step, in steps of the twin")
        right.barh(names, [row["memory_times_twin"] for _, row in rows], color=colors)
        right.set_xlabel("memory, of the twin's")
        for axis in (left, right):
            axis.axvline(1, color="black", lw=0.6, ls=":")
            axis.spines[["top", "right"]].set_visible(False)
        size = " x ".join(str(n) for n in content["patch"])
        gpu = content["hardware"]["gpu"]
        figure.suptitle(
            f"{content['dims']}, {content['batch']} patches of {size}, "
            f"{gpu or content['hardware']['cpu'] + ', one thread'}",
            fontsize=10,
        )
        figure.savefig(picture, dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    main()
