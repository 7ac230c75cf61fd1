"""A data set of its own, a model that segments it, and trainings that leave models at once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.fakes import EPOCH, InProcess, option

from nnunet_ssl.checkpoint import save_checkpoint
from nnunet_ssl.evaluation import tasks
from nnunet_ssl.naming import resolve
from nnunet_ssl.offline import command, predict

TRAINER = "SSLTrainer+num_epochs=2+num_iterations_per_epoch=1+num_val_iterations_per_epoch=1+seed=1"
KEPT = TRAINER + "+keep_at=0.4,0.7"
CHECKPOINTS = ("checkpoint_at_40.pth", "checkpoint_at_70.pth", "checkpoint_final.pth")


def copy_dataset(nnunet, tmp_path, monkeypatch, name):
    """Nothing but this data set: a test may write beside it."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        shutil.copytree(nnunet / variable / name, tmp_path / variable / name)
        monkeypatch.setenv(variable, str(tmp_path / variable))
    (tmp_path / "results").mkdir()
    return tmp_path


@pytest.fixture
def own(nnunet, tmp_path, monkeypatch):
    return copy_dataset(nnunet, tmp_path, monkeypatch, "Dataset901_Toy")


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def make_model(root, dataset, configuration="2d", trainer=KEPT, folds=("all",), log=EPOCH):
    """Write a model folder as a finished training leaves it; its weights are random."""
    base = root / "nnUNet_preprocessed" / dataset
    model = root / f"results/{dataset}/{trainer}__nnUNetPlans__{configuration}"
    for fold in folds:
        (model / f"fold_{fold}").mkdir(parents=True, exist_ok=True)
        for name in CHECKPOINTS:
            save_checkpoint(weights(base, configuration, name), model / f"fold_{fold}" / name)
        lines = [json.dumps(log | {"epoch": k, "progress": (k + 1) / 2}) for k in range(2)]
        (model / f"fold_{fold}/ssl_log.jsonl").write_text("\n".join(lines) + "\n")
    shutil.copy(base / "nnUNetPlans.json", model / "plans.json")
    for name in ("dataset.json", "dataset_fingerprint.json"):
        shutil.copy(base / name, model)
    return model


def weights(base, configuration, name):
    """A checkpoint of a network of the plan."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans, dataset = read(base / "nnUNetPlans.json"), read(base / "dataset.json")
    manager = PlansManager(plans)
    config = manager.get_configuration(configuration)
    torch.manual_seed(len(name))
    network = nnUNetTrainer.build_network_architecture(
        manager,
        config,
        determine_num_input_channels(manager, config, dataset),
        manager.get_label_manager(dataset).num_segmentation_heads,
        False,
    )
    return {
        "network_weights": network.state_dict(),
        "init_args": {"configuration": configuration, "plans": plans, "dataset_json": dataset},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
        "current_epoch": 2,
    }


def by_intensity(data, organs=2):
    """What the toy data show: each organ is brighter than the one before."""
    image = data[0].numpy()
    low, high = np.percentile(image, [5, 99.5])
    scaled = (image - low) / (high - low) * organs
    return np.clip(np.floor(scaled + 0.4), 0, organs).astype(np.uint8)


@pytest.fixture
def segmenting(monkeypatch):
    """Teachers segment by intensity; earlier checkpoints are off by a voxel along the last axis."""

    def segment(self, data, properties, weights=None, mirroring=True, axes=()):
        labels = by_intensity(data)
        return labels if weights is None else np.roll(labels, 1, -1)

    monkeypatch.setattr(predict.Teacher, "segment", segment)


@pytest.fixture
def trainings(own, monkeypatch):
    """The commands of trainings, each of which leaves a model at once."""
    ran = []

    def run(words, log, environment):
        number, configuration, fold = words[1:4]
        (raw,) = (own / "nnUNet_raw").glob(f"Dataset{int(number):03d}_*")
        ran.append(words)
        make_model(own, raw.name, configuration, option(words, "-tr"), (fold,))

    monkeypatch.setattr(tasks, "run_command", run)
    monkeypatch.setattr(command, "LocalLauncher", lambda workers: InProcess())
    return ran


@pytest.fixture
def start(own):
    """Return a trainer on a data set, as `nnUNetv2_train` makes it."""

    def make(dataset, fold="all", trainer_class=None):
        base = own / "nnUNet_preprocessed" / dataset
        plans = read(base / "nnUNetPlans.json") | {"continue_training": False}
        make = trainer_class or resolve(TRAINER)
        return make(plans, "2d", fold, read(base / "dataset.json"), torch.device("cpu"))

    return make
