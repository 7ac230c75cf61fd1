"""Toy data sets, and trainers on them, for all tests."""

import json
import os
from pathlib import Path

import pytest
import torch
from make_data import TOYS, make_raw_dataset, preprocess_toy
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_ssl.naming import discovery_folder, resolve

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
SHORT = "+num_epochs=4+num_iterations_per_epoch=2+num_val_iterations_per_epoch=1+seed=1"


# What a trainer needs to run on toy data without a network, unless its name says otherwise.
NEEDED = {"SSLTrainerMN": {"weights": "random", "backbone": "pvt_v2_b0", "turn": "1"}}


def with_needed(name: str) -> str:
    base, *pairs = name.split("+")
    missing = {k: v for k, v in NEEDED.get(base, {}).items() if f"+{k}=" not in name}
    return "+".join([base, *pairs, *(f"{k}={v}" for k, v in missing.items())])


def pytest_addoption(parser):
    parser.addoption("--rewrite-golden", action="store_true", help="write tests/golden anew")


@pytest.fixture(scope="session")
def toy_root(tmp_path_factory) -> Path:
    """Folders of nnU-Net with all toy data sets, preprocessed for 2D and 3D."""
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name in FOLDERS:
            (root / name).mkdir()
            patch.setenv(name, str(root / name))
        for name, options in TOYS.items():
            make_raw_dataset(root / "nnUNet_raw", name=name, **options)
            preprocess_toy(
                root / "nnUNet_raw",
                root / "nnUNet_preprocessed",
                options["dataset_id"],
                configurations=("2d", "3d_fullres"),
            )
    return root


@pytest.fixture
def nnunet(toy_root, tmp_path, monkeypatch) -> Path:
    """Environment of nnU-Net: shared raw and preprocessed folders, results of this test alone."""
    for name in FOLDERS:
        monkeypatch.setenv(name, str(toy_root / name))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.setenv("nnUNet_extTrainer", str(discovery_folder()))
    return toy_root


@pytest.fixture
def no_plots(monkeypatch):
    """Leave out the pictures, which take longer than the toy epochs."""
    monkeypatch.setattr("nnunet_ssl.history.History.plot", lambda self: None)
    monkeypatch.setattr(
        "nnunetv2.training.logging.nnunet_logger.LocalLogger.plot_progress_png",
        lambda self, folder: None,
    )


def dataset_folder(root: Path, dataset: str) -> str:
    return f"Dataset{TOYS[dataset]['dataset_id']}_{dataset}"


@pytest.fixture
def make_trainer(nnunet, no_plots):
    """Return a function that makes a trainer as `nnUNetv2_train` does, in this process."""

    def make(name, dataset="Toy", configuration=None, fold="all", short=True, device="cpu"):
        base = Path(os.environ["nnUNet_preprocessed"]) / dataset_folder(nnunet, dataset)
        plans = json.loads((base / "nnUNetPlans.json").read_text(encoding="utf-8"))
        plans["continue_training"] = False
        name = with_needed(name)
        trainer_class = resolve(name + SHORT) if short else resolve(name)
        configuration = configuration or ("3d_fullres" if "3d" in trainer_class.dims else "2d")
        return trainer_class(
            plans,
            configuration,
            fold,
            json.loads((base / "dataset.json").read_text(encoding="utf-8")),
            torch.device(device),
        )

    return make


@pytest.fixture
def compile_on_cpu(monkeypatch):
    """Return a function that switches `torch.compile` on where nnU-Net has none.

    Networks are traced as on a GPU; the code that is generated there is not made.
    """
    compile_module, compile_function = nn.Module.compile, torch.compile

    def switch_on():
        monkeypatch.setattr(nn.Module, "compile", lambda m: compile_module(m, backend="aot_eager"))
        monkeypatch.setattr(
            torch, "compile", lambda f, **kw: compile_function(f, backend="aot_eager")
        )
        monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda trainer: True)

    return switch_on
