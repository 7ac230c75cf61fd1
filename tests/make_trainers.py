"""Trainers on toy data sets, made as `nnUNetv2_train` does, but in this process."""

import json
import os
from pathlib import Path

import torch
from make_data import TOYS

from nnunet_ssl.data.batch import Batch
from nnunet_ssl.naming import resolve

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
SHORT = "+num_epochs=4+num_iterations_per_epoch=2+num_val_iterations_per_epoch=1+seed=1"

# What a trainer needs to run on toy data without a network, unless its name says otherwise.
NEEDED = {
    # a few steps teach nothing: unlabelled patches would never count
    "SSLTrainer": {"ready_low": "0", "ready_high": "0"},
    "SSLTrainerMN": {"weights": "random", "backbone": "pvt_v2_b0", "turn": "1"},
}


def with_needed(name: str) -> str:
    base, *pairs = name.split("+")
    missing = {k: v for k, v in NEEDED.get(base, {}).items() if f"+{k}=" not in name}
    return "+".join([base, *pairs, *(f"{k}={v}" for k, v in missing.items())])


def dataset_folder(dataset: str) -> str:
    return f"Dataset{TOYS[dataset]['dataset_id']}_{dataset}"


def new_trainer(
    name, dataset="Toy", configuration=None, fold="all", short=True, device="cpu", batch=None
):
    """Make a trainer; the folders of nnU-Net are set. `batch` is another batch size."""
    base = Path(os.environ["nnUNet_preprocessed"]) / dataset_folder(dataset)
    plans = json.loads((base / "nnUNetPlans.json").read_text(encoding="utf-8"))
    plans["continue_training"] = False
    name = with_needed(name)
    trainer_class = resolve(name + SHORT) if short else resolve(name)
    configuration = configuration or ("3d_fullres" if "3d" in trainer_class.dims else "2d")
    if batch is not None:
        plans["configurations"][configuration]["batch_size"] = batch
    dataset_json = json.loads((base / "dataset.json").read_text(encoding="utf-8"))
    return trainer_class(plans, configuration, fold, dataset_json, torch.device(device))


def start(trainer):
    """Do what comes before the first step."""
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


def start_apart(trainer):
    """Do what comes before the first step, and give the teacher other weights than the student."""
    start(trainer)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in trainer.teacher.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return trainer


def next_batch(trainer):
    return Batch.from_loader(next(trainer.dataloader_train), trainer.device)


def values(yields):
    """The terms that `losses` yields, as numbers."""
    return {k: v.item() for terms in yields for k, v in terms.items()}
