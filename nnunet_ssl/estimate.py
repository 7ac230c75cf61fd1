"""What a training will cost in time and memory, measured on one step of its network.

Runs as a process of its own: it leaves no memory, threads or CUDA context behind, and can be cut
off when it takes too long.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from nnunet_ssl.errors import UserError

LIMIT = 300  # seconds for the whole measurement
SLOW = 60  # seconds; a first step slower than this is not repeated


class Cost(NamedTuple):
    """One supervised step: seconds with and without backward, and bytes at its peak."""

    step: float
    forward: float
    memory: int


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
        raise UserError(lines[-1] if lines else f"exit code {done.returncode}")
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
        f"memory about {cost.memory / 1e9:.2g} GB"
    )


def seconds_of(cost: Cost, trainer: Any) -> float:
    """Expected seconds of a training whose supervised twin costs `cost` a step."""
    settings = trainer.settings()
    steps = settings["num_iterations_per_epoch"] * trainer.step_cost * cost.step
    validation = settings["num_val_iterations_per_epoch"] * cost.forward
    return settings["num_epochs"] * (steps + validation)


def measure(network: nn.Module, loss: Callable, batch_shape: tuple[int, ...], device: str) -> Cost:
    """Time forward and backward on random input, once to warm up and once for the clock.

    Args:
        network: in training mode, with deep supervision outputs, highest resolution first.
        loss: of logits (B, C, *) and target (B, 1, *).
        batch_shape: (B, C, *) of a step.
        device: "cpu", "cuda" or "mps".

    Returns:
        The cost; memory counts weights, gradients, momentum, an EMA teacher, and what forward
        keeps for backward (on CUDA: the measured peak).
    """
    network = network.to(device)
    own = sum(p.numel() * p.element_size() for p in network.parameters())
    x = torch.rand(batch_shape, device=device)
    cost = Cost(0.0, 0.0, 0)
    for _ in range(2):
        start = clock(device)
        saved, total = forward(network, loss, x)
        middle = clock(device)
        total.backward()
        end = clock(device)
        network.zero_grad(set_to_none=False)
        memory = saved + 4 * own
        if device == "cuda":  # the peak holds weights and gradients already
            memory = torch.cuda.max_memory_allocated() + 2 * own
        cost = Cost(end - start, middle - start, memory)
        if cost.step > SLOW:
            break
    return cost


def forward(network: nn.Module, loss: Callable, x: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Return the bytes kept for backward, beside the weights, and the summed loss."""
    weights = {p.data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    amp = torch.autocast(x.device.type, enabled=x.device.type == "cuda")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), amp:
        outputs = network(x)
        outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
        total = torch.stack(
            [loss(o, torch.randint(o.shape[1], (len(o), 1, *o.shape[2:])).to(o)) for o in outputs]
        ).sum()
    return sum(kept.values()), total


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
