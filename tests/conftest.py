"""Toy data sets, and trainers on them, for all tests."""

from pathlib import Path

import pytest
import torch
from make_data import TOYS, make_raw_dataset, preprocess_toy
from make_trainers import FOLDERS, new_trainer
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_ssl.naming import discovery_folder


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


@pytest.fixture
def make_trainer(nnunet, no_plots):
    """Return a function that makes a trainer as `nnUNetv2_train` does, in this process."""

    return new_trainer


@pytest.fixture
def every_cpu_has_bf16(monkeypatch):
    """Let `bf16_on_cpu` work on every CPU, slowly where it is only emulated."""
    monkeypatch.setattr("nnunet_ssl.base.cpu_has_bf16", lambda: True)


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
