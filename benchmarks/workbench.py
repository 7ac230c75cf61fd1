"""What the scripts that measure trainers share: toy data, and trainers in this process."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunet_ssl.estimate import KeptBytes
from nnunet_ssl.io import silence
from nnunet_ssl.naming import discovery_folder, resolve, trainer_classes
from nnunet_ssl.planning.small import shrink_plans

REPOSITORY = Path(__file__).parents[1]
sys.path += [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "trainers")]

from make_data import make_raw_dataset, preprocess_toy  # noqa: E402
from make_trainers import FOLDERS, with_needed  # noqa: E402 - tests are no package
from test_family import FULL, TAUGHT, start, taught  # noqa: E402

__all__ = ["FULL", "TAUGHT", "start", "taught"]

TWIN = "SSLTrainerSupervised"


def set_up(root: Path) -> None:
    """Make nnU-Net's folders in `root` and set its variables; patches are made in this process."""
    for name in FOLDERS:
        (root / name).mkdir(parents=True)
        os.environ[name] = str(root / name)
    os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_extTrainer": str(discovery_folder())}


def prepare(number: int, configuration: str, shape: tuple[int, ...], **raw: Any) -> Path:
    """Make and preprocess toy data with the planned network; return the preprocessed folder."""
    folders = [Path(os.environ[name]) for name in FOLDERS[:2]]
    with silence():
        made = make_raw_dataset(folders[0], number, shape=shape, **raw)
        preprocess_toy(folders[0], folders[1], number, (configuration,), small=False)
    return folders[1] / made.name


def read_plans(base: Path) -> dict[str, Any]:
    """Return nnU-Net's plans of a preprocessed data set."""
    return json.loads((base / "nnUNetPlans.json").read_text(encoding="utf-8"))


def resized(
    plans: dict[str, Any],
    configuration: str,
    features: Sequence[int] | None = None,
    patch: Sequence[int] | None = None,
    batch: int | None = None,
) -> dict[str, Any]:
    """Return plans with nnU-Net's two convolutions a stage; None keeps what is planned."""
    planned = plans["configurations"][configuration]["architecture"]["arch_kwargs"]
    features = features or planned["features_per_stage"]
    return shrink_plans(plans, configuration, features, patch, batch, convs_per_stage=2)


def build(
    name: str, base: Path, plans: dict[str, Any], configuration: str, device: torch.device
) -> Any:
    """Return a trainer, its settings in its name, on all annotated cases; not initialised."""
    dataset_json = json.loads((base / "dataset.json").read_text(encoding="utf-8"))
    fresh = plans | {"continue_training": False}  # nnU-Net takes it out again
    return resolve(with_needed(name))(fresh, configuration, "all", dataset_json, device)


def configuration_of(dims: str) -> str:
    """Return nnU-Net's configuration for 2d or 3d."""
    return "3d_fullres" if dims == "3d" else dims


def names_for(dims: Sequence[str]) -> list[str]:
    """Return the trainers with unlabelled data that work in one of `dims`."""
    return sorted(
        name
        for name, cls in trainer_classes().items()
        if cls.uses_unlabeled and set(dims) & set(cls.dims)  # type: ignore[attr-defined]
    )


def start_late(trainer: Any, progress: float, teach: Callable[[Any], Any]) -> None:
    """Start a training in its last part.

    Args:
        trainer: not initialised.
        progress: share of the training that counts as done, in [0, 1).
        teach: called with the trainer once its loaders run.
    """
    trainer.on_train_start()
    trainer.current_epoch = int(progress * trainer.num_epochs)
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    teach(trainer)


def kept_bytes(modules: Iterable[nn.Module], step: Callable[[], Any]) -> int:
    """Return what a step keeps for its backward pass beside the weights of `modules`, at most."""
    with KeptBytes(*modules) as kept:
        step()
    return kept.peak
