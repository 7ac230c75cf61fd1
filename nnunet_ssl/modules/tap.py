"""Features of nnU-Net's U-Nets, without a change to their modules or state dict."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

UNETS = (PlainConvUNet, ResidualEncoderUNet)


class Tapped(NamedTuple):
    """What a U-Net returns, and the features on the way.

    Attributes:
        output: as the network returns it: logits, or a list of them under deep supervision.
        bottleneck: encoder output of the lowest resolution, (B, C_low, *small).
        feature: input of the last segmentation layer, (B, C_full, *), full resolution.
    """

    output: Any
    bottleneck: Tensor
    feature: Tensor


def tapped_forward(network: nn.Module, x: Tensor) -> Tapped:
    """Run a plan's U-Net and keep its features.

    Args:
        network: PlainConvUNet or ResidualEncoderUNet.
        x: (B, C, *).
    """
    return decode(network, network.encoder(x))  # type: ignore[operator]


def decode(network: nn.Module, skips: Sequence[Tensor]) -> Tapped:
    """Run the decoder on the encoder's outputs; the same operations in the same order as its own.

    Args:
        network: PlainConvUNet or ResidualEncoderUNet.
        skips: encoder outputs, full resolution first, (B, C_i, *_i) each.
    """
    decoder: Any = network.decoder
    x, outputs = skips[-1], []
    stages = zip(
        decoder.transpconvs, decoder.stages, decoder.seg_layers, reversed(skips[:-1]), strict=True
    )
    for up, stage, head, skip in stages:
        x = stage(torch.cat((up(x), skip), 1))
        if decoder.deep_supervision or head is decoder.seg_layers[-1]:
            outputs.append(head(x))
    return Tapped(outputs[::-1] if decoder.deep_supervision else outputs[0], skips[-1], x)
