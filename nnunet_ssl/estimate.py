"""What a training will cost in time and memory, measured on one step of its network.

Runs as a process of its own: it leaves no memory, threads or CUDA context behind, and can be cut
off when it takes too long.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from nnunet_ssl.errors import UserError

LIMIT = 300  # seconds for the whole measurement
SLOW = 60  # seconds; a first step slower than this is not repeated


class Cost(NamedTuple):
    """One supervised step of the plan's network.

    Attributes:
        step: seconds.
        forward: seconds without backward.
        kept: bytes that are kept for backward, at their peak (on CUDA: all that is allocated beside
            weights and gradients).
        weights: bytes of the weights.
        pixels: of the batch.
    """

    step: float
    forward: float
    kept: int
    weights: int
    pixels: int


class KeptBytes:
    """Counts the bytes that are kept for backward while it is entered; each storage counts once.

    Args:
        modules: whose weights do not count.

    Attributes:
        now: bytes kept.
        peak: most bytes kept at a time.
    """

    def __init__(self, *modules: nn.Module):
        self.now = self.peak = 0
        self._weights = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}
        self._users: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            partial(KeptTensor, self), lambda kept: kept.tensor
        )

    def __enter__(self) -> "KeptBytes":
        """Begin to count."""
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Count no further tensors; those counted still leave when their graph is freed."""
        self._hooks.__exit__(*error)

    def add(self, tensor: torch.Tensor, users: int) -> None:
        """Count one user more or less of a tensor's storage."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self._weights:
            return
        before = self._users[key]
        self._users[key] += users
        self.now += storage.nbytes() * (bool(self._users[key]) - bool(before))
        self.peak = max(self.peak, self.now)


class KeptTensor:
    """A tensor that a graph holds; it is counted until the graph is freed."""

    def __init__(self, count: KeptBytes, tensor: torch.Tensor):
        self.count, self.tensor = count, tensor
        count.add(tensor, 1)

    def __del__(self) -> None:
        """Count it no more."""
        self.count.add(self.tensor, -1)


def estimate(dataset: str, configuration: str, plans: str, trainer: str, device: str) -> str:
    """Measure in a new process and tell the cost of the training in one line.

    Never raises: what goes wrong is told in the line.

    Args:
        dataset: id or name, as given to nnU-Net.
        configuration: "2d", "3d_fullres", ...
        plans: plans identifier.
        trainer: trainer name, with settings if there are any.
        device: "cpu", "cuda" or "mps".
    """
    try:
        return measure_elsewhere(dataset, configuration, plans, [trainer], device)[trainer][1]
    except UserError as error:
        return f"no estimate: {error}"


def measure_elsewhere(
    dataset: str, configuration: str, plans: str, trainers: Sequence[str], device: str
) -> dict[str, tuple[float, str]]:
    """Return the expected seconds of a training and the line about it, for each trainer.

    Raises:
        UserError: whatever went wrong.
    """
    command = [sys.executable, "-m", "nnunet_ssl.estimate"]
    command += [dataset, configuration, plans, device, *trainers]
    # not the current folder: in a checkout it hides the installed package
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT, env=environment
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"one training step takes more than {LIMIT // 2} s on {device}") from None
    except OSError as error:
        raise UserError(str(error)) from error
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode != 0 or not lines:
        told = lines[-1].removeprefix("nnunet_ssl.errors.UserError: ") if lines else ""
        raise UserError(told or f"exit code {done.returncode}")
    return {name: tuple(told) for name, told in json.loads(lines[-1]).items()}


def describe(cost: Cost, trainer: Any, device: str) -> str:
    """The line for a trainer class whose supervised twin costs `cost` a step."""
    settings = trainer.settings()
    epochs, steps = settings["num_epochs"], settings["num_iterations_per_epoch"]
    minutes = max(1, round(seconds_of(cost, trainer) / 60))
    hours, rest = divmod(minutes, 60)
    duration = f"{hours} h {rest} min" if hours else f"{rest} min"
    return (
        f"About {duration} on {device} ({trainer.step_cost:.3g} x the supervised step of "
        f"{cost.step:.2g} s, {epochs} epochs x {steps} iterations), "
        f"memory about {memory_of(cost, trainer) / 1e9:.2g} GB"
    )


def seconds_of(cost: Cost, trainer: Any) -> float:
    """Expected seconds of a training whose supervised twin costs `cost` a step."""
    settings = trainer.settings()
    steps = settings["num_iterations_per_epoch"] * trainer.step_cost * cost.step
    validation = settings["num_val_iterations_per_epoch"] * cost.forward
    return settings["num_epochs"] * (steps + validation)


def memory_of(cost: Cost, trainer: Any) -> float:
    """Expected bytes of a training whose supervised twin costs `cost` a step.

    What the step keeps for backward, and the weights: of each trained network with gradient and
    momentum, of the teacher by itself. Methods with the setting `pixels_at_once` keep no more of
    a larger batch, beside what the plan's network keeps.
    """
    settings = trainer.settings()
    copies = 3 * trainer.trained_networks + (settings["ema_decay"] is not None)
    times = trainer.step_memory
    if at_once := settings.get("pixels_at_once"):
        times = max(1.0, times * min(1.0, at_once / cost.pixels))
    return times * cost.kept + copies * cost.weights


def measure(network: nn.Module, loss: Callable, batch_shape: tuple[int, ...], device: str) -> Cost:
    """Time forward and backward on random input, once to warm up and once for the clock.

    Args:
        network: in training mode, with deep supervision outputs, highest resolution first.
        loss: of logits (B, C, *) and target (B, 1, *).
        batch_shape: (B, C, *) of a step.
        device: "cpu", "cuda" or "mps".

    Returns:
        The cost.
    """
    network = network.to(device)
    own = sum(p.numel() * p.element_size() for p in network.parameters())
    x = torch.rand(batch_shape, device=device)
    pixels = x[:, 0].numel()
    cost = Cost(0.0, 0.0, 0, own, pixels)
    for _ in range(2):
        start = clock(device)
        kept, total = forward(network, loss, x)
        middle = clock(device)
        total.backward()
        end = clock(device)
        network.zero_grad(set_to_none=False)
        if device == "cuda":
            kept = torch.cuda.max_memory_allocated() - 2 * own
        cost = Cost(end - start, middle - start, kept, own, pixels)
        if cost.step > SLOW:
            break
    return cost


def forward(network: nn.Module, loss: Callable, x: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Return the bytes kept for backward, beside the weights, and the summed loss."""
    amp = torch.autocast(x.device.type, enabled=x.device.type == "cuda")
    with KeptBytes(network) as kept, amp:
        outputs = network(x)
        outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
        total = torch.stack(
            [loss(o, torch.randint(o.shape[1], (len(o), 1, *o.shape[2:])).to(o)) for o in outputs]
        ).sum()
    return kept.peak, total


def clock(device: str) -> float:
    """Seconds, once the device has done all its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_plan(plans: dict, dataset_json: dict, configuration: str, device: str) -> Cost:
    """Build the planned network with nnU-Net's loss and measure it."""
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans)
    config = manager.get_configuration(configuration)
    channels = determine_num_input_channels(manager, config, dataset_json)
    heads = manager.get_label_manager(dataset_json).num_segmentation_heads
    network = nnUNetTrainer.build_network_architecture(manager, config, channels, heads, True)
    loss = DC_and_CE_loss(
        {"batch_dice": config.batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False},
        {},
        dice_class=MemoryEfficientSoftDiceLoss,
    )
    return measure(network, loss, (config.batch_size, channels, *config.patch_size), device)


def main(argv: list[str]) -> None:
    """Print seconds and line of each trainer as JSON; for dataset, configuration, plans, device."""
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    from nnunet_ssl.naming import resolve

    dataset, configuration, plans, device, *trainers = argv
    if device == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)  # as nnU-Net does
    base = Path(os.environ["nnUNet_preprocessed"]) / maybe_convert_to_dataset_name(dataset)
    cost = measure_plan(
        json.loads((base / f"{plans}.json").read_text(encoding="utf-8")),
        json.loads((base / "dataset.json").read_text(encoding="utf-8")),
        configuration,
        device,
    )
    classes = {name: resolve(name) for name in trainers}
    told = {n: (seconds_of(cost, c), describe(cost, c, device)) for n, c in classes.items()}
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1:])
