"""Perturbed features of nnU-Net's U-Nets."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ssl.modules.tap import decode


def dropout_factors(network: nn.Module, x: Tensor, rate: float) -> list[Tensor]:
    """Draw which channels of each encoder level stay, for each sample.

    Args:
        network: PlainConvUNet or ResidualEncoderUNet.
        x: the input, (B, C, *).
        rate: p, probability of a channel to be dropped, in [0, 1).

    Returns:
        One (B, C_i, 1, ...) tensor per level, full resolution first: 0, or 1 / (1 - p).
    """
    ones = [1] * (x.ndim - 2)
    return [
        (torch.rand(len(x), channels, *ones, device=x.device) >= rate) / (1 - rate)
        for channels in network.encoder.output_channels  # type: ignore[union-attr]
    ]


def perturbed_forward(
    network: nn.Module, x: Tensor, factors: Sequence[Tensor], clean: bool
) -> tuple[Any, Any]:
    """Run a plan's U-Net with its encoder outputs multiplied by factors.

    Args:
        network: PlainConvUNet or ResidualEncoderUNet.
        x: (B, C, *).
        factors: one per encoder level, e.g. from `dropout_factors`.
        clean: also decode the outputs as they are, without gradient; the encoder runs once.

    Returns:
        What the network returns with perturbed features, and without (None unless `clean`).
    """
    skips = network.encoder(x)  # type: ignore[operator]
    unperturbed = None
    if clean:
        with torch.no_grad():
            unperturbed = decode(network, skips).output
    perturbed = [s * f.to(s.dtype) for s, f in zip(skips, factors, strict=True)]
    return decode(network, perturbed).output, unperturbed
