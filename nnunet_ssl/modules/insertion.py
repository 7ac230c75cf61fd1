"""A further module inside a plan's U-Net."""

from collections.abc import Sequence
from math import ceil, prod
from typing import Any

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn


def stage_sizes(network: nn.Module, patch_size: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the spatial size of each encoder stage's output for a patch, finest first."""
    encoder: Any = network.encoder
    sizes, size = [], tuple(patch_size)
    for strides in encoder.strides:
        size = tuple(ceil(n / s) for n, s in zip(size, strides, strict=True))
        sizes.append(size)
    return sizes


def finest_stage(network: nn.Module, patch_size: Sequence[int], limit: int) -> int:
    """Return the finest encoder stage of which half the resolution has at most so many places.

    Args:
        network: PlainConvUNet or ResidualEncoderUNet.
        patch_size: of the plan, voxels.
        limit: of prod(ceil(size / 2)); where all stages have more, the coarsest one.
    """
    sizes = stage_sizes(network, patch_size)
    fits = (i for i, size in enumerate(sizes) if prod(ceil(n / 2) for n in size) <= limit)
    return next(fits, len(sizes) - 1)


def insert_after_stage(network: nn.Module, stage: int, module: nn.Module) -> None:
    """Put a module behind an encoder stage, so that skip and next stage get what it returns.

    It becomes the last part of the stage, so the plan's own parameters keep their names and
    everything that runs the network, taps and `torch.compile` included, runs it as well.

    Args:
        network: PlainConvUNet or ResidualEncoderUNet; changed in place.
        stage: index into the encoder's stages.
        module: keeps the shape of the stage's output.

    Raises:
        NotImplementedError: another architecture.
    """
    _parts(network, stage).append(module)


def take_from_stage(network: nn.Module, stage: int) -> nn.Module:
    """Take out the module that `insert_after_stage` put behind a stage, and return it."""
    return _parts(network, stage).pop(-1)


def _parts(network: nn.Module, stage: int) -> nn.Sequential:
    if isinstance(network, PlainConvUNet):
        return network.encoder.stages[stage]
    if isinstance(network, ResidualEncoderUNet):
        return network.encoder.stages[stage].blocks  # type: ignore[return-value]
    raise NotImplementedError(
        f"{type(network).__name__} takes no further module; PlainConvUNet and "
        f"ResidualEncoderUNet do."
    )
