"""Pre-training and the training that starts from it, each a stock nnU-Net command."""

import os
import shlex
import sys
from pathlib import Path

from nnunetv2.utilities.file_path_utilities import get_output_folder
from tqdm import tqdm

from nnunet_ssl.commands import run_command
from nnunet_ssl.doctor import trainer_path
from nnunet_ssl.errors import UserError
from nnunet_ssl.io import explain_os_error
from nnunet_ssl.naming import VARIABLE, resolve

FINAL = "checkpoint_final.pth"
# settings that mean something else in the first stage, or nothing
NOT_SHARED = {"initial_lr", "weight_decay", "keep_at", "ema_decay", "deploy"}
LOG = "command.log"


def with_settings_of(trainer: str, first: str) -> str:
    """Give a first stage those settings in the name of a trainer that it knows as well."""
    known = set(resolve(first).settings()) - NOT_SHARED  # type: ignore[attr-defined]
    pairs = [pair for pair in trainer.split("+")[1:] if pair.partition("=")[0] in known]
    return "+".join([first, *pairs])


def pretraining_of(trainer: str) -> str | None:
    """Return the trainer, with settings, that one is meant to start from, if there is any."""
    first = resolve(trainer).pretraining  # type: ignore[attr-defined]
    return with_settings_of(trainer, first) if first else None


def train_in_two_stages(
    dataset: str,
    configuration: str,
    fold: str,
    *,
    first: str,
    second: str,
    plans: str,
    device: str,
    resume: bool = False,
) -> None:
    """Train one trainer, then another from its weights.

    Args:
        dataset: id or name.
        configuration: "2d", "3d_fullres", ...
        fold: "all", or a number.
        first: trainer name of the pre-training, with settings if there are any.
        second: trainer name of what starts from it.
        plans: plans identifier.
        device: "cuda", "cpu" or "mps".
        resume: leave out a stage that is finished, go on with one that has begun.

    Raises:
        UserError: unknown trainer, one that cannot take up the weights, or a command that failed;
            tells its last lines and its log.
    """
    for name in (first, second):
        if not resolve(name).deploys_stock:  # type: ignore[attr-defined]
            raise UserError(
                f"{name} does not train one network of the plan, so weights of another "
                f"trainer do not fit it. Give another trainer."
            )
    before: Path | None = None
    for name in (first, second):
        try:
            folder = Path(get_output_folder(dataset, name, plans, configuration, fold))
        except (RuntimeError, ValueError) as error:  # unknown data set, or nnUNet_results unset
            raise UserError(str(error)) from error
        command = ["nnUNetv2_train", dataset, configuration, fold, "-tr", name, "-p", plans]
        command += ["-device", device]
        if resume and any(folder.glob("checkpoint_*.pth")):
            command.append("--c")
        elif before is not None:
            command += ["-pretrained_weights", str(before)]
        if resume and (folder / FINAL).is_file() and before is None:
            print(f"{name} is finished: {folder / FINAL}")
        else:
            run_stage(command, folder, resolve(name).num_epochs)  # type: ignore[attr-defined]
        before = folder / FINAL


def run_stage(command: list[str], folder: Path, epochs: int) -> None:
    """Print a training command and run it, with a bar over its epochs."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(explain_os_error(error, folder)) from error
    environment = {**os.environ, VARIABLE: trainer_path(), "PYTHONUNBUFFERED": "1"}
    with tqdm(total=epochs, unit="epoch", file=sys.stdout) as bar:
        run_command(command, folder / LOG, environment, bar.update)
