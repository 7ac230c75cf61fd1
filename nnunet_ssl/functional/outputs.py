"""What networks return: logits at several scales, probabilities, hard labels."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def full_res(output: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the full-resolution logits (B, C, *), with or without deep supervision."""
    return output if isinstance(output, Tensor) else output[0]


def to_prob(logits: Tensor, regions: bool) -> Tensor:
    """Return probabilities (B, C, *) in [0, 1], float32: softmax, or a sigmoid per region."""
    logits = logits.float()
    return logits.sigmoid() if regions else logits.softmax(1)


def hard_labels(prob: Tensor, regions: bool) -> Tensor:
    """Return the decision: argmax (B, 1, *) int64, or per region prob > 0.5 (B, R, *) bool.

    Args:
        prob: (B, C, *), in [0, 1].
        regions: channels are independent regions.
    """
    # argmax finds the same, on a CPU ten times as slowly
    return prob > 0.5 if regions else prob.max(1, keepdim=True).indices


def confidence(prob: Tensor, regions: bool) -> Tensor:
    """Return the probability of the decision.

    Args:
        prob: (B, C, *), in [0, 1].
        regions: channels are independent regions.

    Returns:
        (B, 1, *) in [1/C, 1]; for regions (B, R, *), max(p, 1 - p) in [0.5, 1].
    """
    return torch.maximum(prob, 1 - prob) if regions else prob.amax(1, keepdim=True)


def downsample(labels_or_mask: Tensor, scales: Sequence[Sequence[float]]) -> list[Tensor]:
    """Return the map at each deep-supervision scale, by nnU-Net's own operator.

    Nearest neighbour ("nearest-exact") to round(size * scale). It commutes with mixing by a mask,
    so mixes are made once at full resolution.

    Args:
        labels_or_mask: (B, C, *), any dtype; integers up to 2^24.
        scales: one factor per spatial axis for each scale, as nnU-Net's trainer lists them.

    Returns:
        One (B, C, *) tensor per scale, dtype kept; the input itself where all factors are 1.

    Source: batchgeneratorsv2, `DownsampleSegForDSTransform`.
    """
    spatial = labels_or_mask.shape[2:]
    as_float = labels_or_mask.float()  # interpolate knows neither bool nor int16
    results = []
    for scale in scales:
        if len(scale) != len(spatial):
            raise ValueError(f"Scale {tuple(scale)} does not fit {len(spatial)} spatial axes.")
        if all(s == 1 for s in scale):
            results.append(labels_or_mask)
            continue
        size = [round(n * s) for n, s in zip(spatial, scale, strict=True)]
        small = interpolate(as_float, size, mode="nearest-exact")
        results.append(small.to(labels_or_mask.dtype))
    return results
