"""One atomic checkpoint that holds everything."""

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_ssl.errors import UserError
from nnunet_ssl.io import atomic_path, explain_os_error

STATE_FORMAT = 3


def to_cpu(state: Any) -> Any:
    """Copy nested state to the CPU; a tensor that appears under several names is copied once."""
    copies: dict[tuple, Tensor] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.device.type == "cpu":
                return value.detach()
            place = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
            if place not in copies:
                copies[place] = value.detach().cpu()
            return copies[place]
        if isinstance(value, Mapping):
            return {k: convert(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(convert(v) for v in value)
        return value

    return convert(state)


def save_checkpoint(checkpoint: dict, path: str | os.PathLike) -> None:
    """Write a checkpoint; a kill at any moment leaves the old file or the whole new one.

    Raises:
        UserError: disk full or folder not writable; the old checkpoint is unharmed.
    """
    with atomic_path(path) as part:
        try:
            with open(part, "wb") as f:
                torch.save(to_cpu(checkpoint), f)
        except RuntimeError as error:  # how torch reports a write that failed underneath
            if isinstance(error.__context__, OSError):
                raise UserError(explain_os_error(error.__context__, path)) from error
            raise


def load_checkpoint(path: str | os.PathLike) -> dict:
    """Read a whole checkpoint to the CPU.

    Raises:
        UserError: the file is missing, cut short or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist. Give the path of a checkpoint.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    except MemoryError:
        raise
    except PermissionError as error:
        raise UserError(f"{path} is not readable. Change its permissions.") from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(
            f"{path} cannot be read, it is damaged or cut short ({type(error).__name__}). "
            f"Delete it: nnU-Net then continues from another checkpoint of the folder, if any."
        ) from error
    if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
        raise UserError(f"{path} is not an nnU-Net checkpoint. Give another file.")
    return checkpoint


def load_training_state(path: str | os.PathLike, trainer_name: str) -> dict:
    """Read a checkpoint that training can continue from.

    Raises:
        UserError: no semi-supervised state in it, or the state of another trainer.
    """
    checkpoint = load_checkpoint(path)
    state = checkpoint.get("ssl_state")
    if state is None:
        raise UserError(
            f"{path} has no semi-supervised state (a stock or exported checkpoint). Continue with "
            f"the trainer that wrote it, or start anew with -pretrained_weights {path}."
        )
    if state["format"] != STATE_FORMAT:
        raise UserError(
            f"{path} was written by another version of nnunet_ssl (format {state['format']}, this "
            f"one reads {STATE_FORMAT}). Install the version that wrote it."
        )
    if state["trainer"] != trainer_name:
        raise UserError(
            f"{path} was written by trainer {state['trainer']}, not {trainer_name}. Continue with "
            f"-tr {state['trainer']}."
        )
    return checkpoint


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of all random generators that training draws from."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "mps": torch.mps.get_rng_state() if device.type == "mps" else None,
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put all random generators back."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    if device.type == "mps" and state.get("mps") is not None:
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from generators seeded for this block; training draws as if it was not there."""
    drawn = random_state(device)
    seed_everything(seed)
    try:
        yield
    finally:
        restore_random_state(drawn, device)


def seed_everything(seed: int) -> None:
    """Seed all random generators of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
