"""`nnunet_ssl export`: a slim model folder to share, which stock nnU-Net predicts with."""

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nnunet_ssl.checkpoint import load_checkpoint, save_checkpoint
from nnunet_ssl.errors import UserError
from nnunet_ssl.io import explain_os_error

FILES = ("plans.json", "dataset.json", "dataset_fingerprint.json")
STOCK_TRAINER = "nnUNetTrainer"


def export_model(
    model_folder: str | os.PathLike,
    out: str | os.PathLike,
    network: str | None = None,
    folds: Sequence[str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
) -> str:
    """Write a model folder that holds only what prediction reads.

    Built beside `out` and renamed at the end, so `out` is whole or absent.

    Args:
        model_folder: `TRAINER__PLANS__CONFIGURATION` with plans.json and fold folders.
        out: folder to make.
        network: "student", "teacher", or None for the one the trainer predicts with.
        folds: folds to take; None takes all that have the checkpoint.
        checkpoint: which checkpoint of each fold; stored as checkpoint_final.pth, the name that
            prediction takes by default.

    Returns:
        Text that tells sizes and the commands to predict with.

    Raises:
        UserError: `out` exists, nothing to export, a damaged checkpoint, or a network that the
            checkpoint does not hold.
    """
    source, target = Path(model_folder), Path(out)
    if target.exists():
        raise UserError(f"{target} exists. Delete it or give another folder with -o.")
    for name in FILES[:2]:
        if not (source / name).is_file():
            raise UserError(
                f"{source / name} is missing. Give -i a model folder of nnU-Net, for example "
                f"$nnUNet_results/Dataset004_X/SSLTrainer__nnUNetPlans__3d_fullres."
            )
    checkpoints = find_checkpoints(source, folds, checkpoint)

    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for name in FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, part / name)
        trainers = set()
        for path in checkpoints:
            slim = slim_checkpoint(load_checkpoint(path), path, network)
            trainers.add(slim["trainer_name"])
            (part / path.parent.name).mkdir()
            save_checkpoint(slim, part / path.parent.name / "checkpoint_final.pth")
        os.replace(part, target)
    except OSError as error:
        raise UserError(explain_os_error(error, target)) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return report(source, target, checkpoints, trainers)


def find_checkpoints(source: Path, folds: Sequence[str] | None, checkpoint: str) -> list[Path]:
    """The checkpoint of each wanted fold.

    Raises:
        UserError: a fold lacks it, or no fold has it.
    """
    there = sorted(source.glob(f"fold_*/{checkpoint}"))
    if not there:
        raise UserError(
            f"{source} has no fold_X/{checkpoint}. Finish the training, or name another "
            f"checkpoint with -chk checkpoint_best.pth."
        )
    if folds is None:
        return there
    wanted = [source / f"fold_{fold}" / checkpoint for fold in folds]
    for path in wanted:
        if path not in there:
            names = " ".join(p.parent.name.removeprefix("fold_") for p in there)
            raise UserError(f"{path} does not exist. Folds there: -f {names}")
    return wanted


def slim_checkpoint(checkpoint: Mapping[str, Any], path: Path, network: str | None) -> dict:
    """Keep what nnU-Net's predictor reads, with the weights of the wanted network.

    Keys that only training reads stay, empty, so that nnU-Net's readers find them.
    """
    weights = checkpoint["network_weights"]
    trainer_name = checkpoint["trainer_name"]
    if network is not None:
        weights = stored_networks(checkpoint, path).get(network)
        if weights is None:
            held = ", ".join(stored_networks(checkpoint, path))
            raise UserError(
                f"{path} holds no network {network!r}, only: {held}. Leave --network out to "
                f"export the network that the trainer predicts with."
            )
        if fits_stock(weights, checkpoint["init_args"]):
            trainer_name = STOCK_TRAINER
        elif checkpoint["network_weights"].keys() != weights.keys():
            raise UserError(
                f"{path}: network {network!r} cannot predict, neither with stock nnU-Net nor with "
                f"{trainer_name}. Leave --network out."
            )
    return {
        "network_weights": weights,
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": None,
        "_best_ema": None,
        "current_epoch": checkpoint["current_epoch"],
        "init_args": {**checkpoint["init_args"], "device": torch.device("cpu")},
        "trainer_name": trainer_name,
        "inference_allowed_mirroring_axes": checkpoint["inference_allowed_mirroring_axes"],
    }


def stored_networks(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The state dicts of student and teacher in the semi-supervised state."""
    if "ssl_state" not in checkpoint:
        raise UserError(
            f"{path} has no semi-supervised state (a stock or exported checkpoint), so it holds "
            f"one network only. Leave --network out."
        )
    state = checkpoint["ssl_state"]
    networks = {"student": state["student"], "teacher": state["companions"].get("teacher")}
    networks |= state.get("parts", {})  # where the trained network consists of several
    return {name: weights for name, weights in networks.items() if weights is not None}


def fits_stock(weights: Mapping[str, torch.Tensor], init_args: Mapping[str, Any]) -> bool:
    """Whether the weights load strictly into the network that stock nnU-Net builds."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(dict(init_args["plans"]))
    configuration = plans.get_configuration(init_args["configuration"])
    dataset_json = init_args["dataset_json"]
    stock = nnUNetTrainer.build_network_architecture(
        plans,
        configuration,
        determine_num_input_channels(plans, configuration, dataset_json),
        plans.get_label_manager(dataset_json).num_segmentation_heads,
        False,
    ).state_dict()
    return stock.keys() == weights.keys() and all(
        stock[key].shape == weights[key].shape for key in stock
    )


def report(source: Path, target: Path, checkpoints: Sequence[Path], trainers: set[str]) -> str:
    """Sizes and the commands of the receiver."""
    before = sum(p.stat().st_size for p in checkpoints) / 1e6
    after = sum(p.stat().st_size for p in target.rglob("*") if p.is_file()) / 1e6
    folds = " ".join(p.parent.name.removeprefix("fold_") for p in checkpoints)
    lines = [
        f"{target}: {after:.1f} MB (checkpoints before: {before:.1f} MB)",
        "Predict with it:",
        f"  nnUNetv2_predict_from_modelfolder -i INPUT -o OUTPUT -m {shlex.quote(str(target))} "
        f"-f {folds}",
    ]
    name, dataset = source.resolve().name, source.resolve().parent.name
    if name.count("__") == 2 and dataset.startswith("Dataset"):
        trainer, plans, configuration = name.split("__")
        lines += [
            f"or put it at $nnUNet_results/{dataset}/{name} and run:",
            f"  nnUNetv2_predict -i INPUT -o OUTPUT -d {dataset} -c {configuration} "
            f"-tr {shlex.quote(trainer)} -p {plans} -f {folds}",
        ]
    ours = trainers - {STOCK_TRAINER}
    if ours:
        lines.append(
            f"The receiver needs nnunet_ssl, and the line that `nnunet_ssl env` prints: "
            f"{', '.join(sorted(ours))} predicts with a network of its own."
        )
    else:
        lines.append("The receiver needs nnU-Net only. Without a GPU: add -device cpu.")
    return "\n".join(lines)
