"""The strong view, made on the training device: intensity operations, flips, quarter turns.

Parameters come from PyTorch's CPU generator, so the saved CPU state reproduces them, and shapes are
known without waiting for the device. Noise voxels come from the generator of the image's device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def add_noise(x: Tensor, std: float, clip: float | None = None) -> Tensor:
    """Add Gaussian noise.

    Args:
        x: images, (B, C, *), in normalised intensity; not modified.
        std: standard deviation of the noise, in units of `x`.
        clip: largest absolute value of the noise; None does not clip.

    Source: Tarvainen & Valpola 2017 as run in SSL4MIS: std 0.1, clip 0.2.
    """
    noise = torch.randn_like(x) * std
    return x + (noise if clip is None else noise.clamp(-clip, clip))


@torch.no_grad()
def strong_intensity(
    x: Tensor,
    ops: tuple[int, int] = (1, 3),
    thick_slices: bool = False,
    relative_noise: bool = False,
) -> Tensor:
    """Change the intensities of each sample by a few of seven random operations.

    Per sample a number from `ops` is drawn, then so many different operations, applied in this
    order, each with a uniform strength: noise of variance 0-0.1, so up to three times as strong as
    nnU-Net's, whose `noise_variance` of 0-0.1 is a standard deviation; Gaussian blur of sigma
    0.5-1.5 voxels (nnU-Net 0.5-1); brightness x 0.6-1.4; contrast x 0.5-1.5; resolution x 0.5-1;
    gamma 0.5-2; gamma 0.7-1.5 of the negative. Strengths are shared by a sample's channels,
    statistics are per channel.

    Args:
        x: images, (B, C, *); not modified, no gradient.
        ops: smallest and largest number of operations per sample, inclusive.
        thick_slices: blur and lower the resolution within the slices of the first spatial axis
            only; across thick ones an organ would move away from its label.
        relative_noise: noise is in units of each channel's standard deviation; else in those of
            `x`, for z-scored images.

    Returns:
        (B, C, *), dtype of `x`; geometry unchanged.

    Raises:
        ValueError: not 0 <= ops[0] <= ops[1] <= 7.

    Source: operations of nnU-Net's training augmentation; their number and uniform strength from
        Zhao et al. 2023 (AugSeg), arXiv:2212.04976.
    """
    fewest, most = ops
    if not 0 <= fewest <= most <= len(_OPERATIONS):
        raise ValueError(f"ops must lie in 0 to {len(_OPERATIONS)}, smaller first; got {ops}.")
    batch = x.shape[0]
    rank = torch.rand(batch, len(_OPERATIONS)).argsort(1).argsort(1)
    chosen = rank < torch.randint(fewest, most + 1, (batch, 1))
    strength = torch.rand(batch, len(_OPERATIONS))
    out = x.to(torch.float32, copy=True)
    axes = tuple(range(3 if thick_slices else 2, x.ndim))
    options: dict[Callable[..., Tensor], dict[str, Any]] = {
        _noise: {"relative": relative_noise},
        _blur: {"axes": axes},
        _low_resolution: {"axes": axes},
    }
    for i, (operation, low, high) in enumerate(_OPERATIONS):
        rows = chosen[:, i].nonzero()[:, 0]
        if len(rows):
            value = low + (high - low) * strength[rows, i]
            rows = rows.to(x.device, non_blocking=True)
            changed = operation(out.index_select(0, rows), value, **options.get(operation, {}))
            out.index_copy_(0, rows, changed)
    return out.to(x.dtype)


# Each operation takes float32 images (n, C, *) and one strength per sample, (n,) on the CPU.


def _noise(x: Tensor, variance: Tensor, relative: bool) -> Tensor:
    std = _per_sample(variance.sqrt(), x)
    if relative:
        std = std * x.std(tuple(range(2, x.ndim)), correction=0, keepdim=True)
    return x + torch.randn_like(x) * std


def _blur(x: Tensor, sigma: Tensor, axes: Sequence[int]) -> Tensor:
    # Shifted sums instead of a grouped convolution: no TF32, no cuDNN search per number of samples.
    radius = math.ceil(3 * _LARGEST_SIGMA)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(x.device, non_blocking=True)
    weights = kernel.T.reshape(-1, x.shape[0], *[1] * (x.ndim - 1))
    for axis in axes:
        size = x.shape[axis]
        index = torch.arange(-radius, size + radius, device=x.device).clamp(0, size - 1)
        padded = x.index_select(axis, index)  # edges repeated
        x = torch.zeros_like(x)
        for shift, weight in enumerate(weights):
            x.addcmul_(padded.narrow(axis, shift, size), weight)
    return x


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x * _per_sample(factor, x)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    axes = tuple(range(2, x.ndim))
    mean = x.mean(axes, keepdim=True)
    changed = (x - mean) * _per_sample(factor, x) + mean
    return changed.clamp(x.amin(axes, keepdim=True), x.amax(axes, keepdim=True))


def _low_resolution(x: Tensor, scale: Tensor, axes: Sequence[int]) -> Tensor:
    mode = "bilinear" if x.ndim == 4 else "trilinear"
    spatial = dict(enumerate(x.shape[2:], 2))
    results = []
    for sample, s in zip(x.split(1), scale.tolist(), strict=True):  # sizes differ per sample
        size = [max(round(n * s), 1) if axis in axes else n for axis, n in spatial.items()]
        small = interpolate(sample, size, mode="nearest-exact")
        results.append(interpolate(small, list(spatial.values()), mode=mode))
    return torch.cat(results)


def _gamma(x: Tensor, exponent: Tensor) -> Tensor:
    axes = tuple(range(2, x.ndim))
    mean = x.mean(axes, keepdim=True)
    std = x.std(axes, correction=0, keepdim=True)
    low = x.amin(axes, keepdim=True)
    span = x.amax(axes, keepdim=True) - low
    curved = ((x - low) / span.clamp_min(1e-7)) ** _per_sample(exponent, x) * span
    curved = curved - curved.mean(axes, keepdim=True)
    return curved * (std / curved.std(axes, correction=0, keepdim=True).clamp_min(1e-7)) + mean


def _inverted_gamma(x: Tensor, exponent: Tensor) -> Tensor:
    return -_gamma(-x, exponent)


def _per_sample(value: Tensor, x: Tensor) -> Tensor:
    return value.to(x.device, non_blocking=True).view(-1, *[1] * (x.ndim - 1))


_LARGEST_SIGMA = 1.5
_OPERATIONS: tuple[tuple[Callable[..., Tensor], float, float], ...] = (
    (_noise, 0.0, 0.1),
    (_blur, 0.5, _LARGEST_SIGMA),
    (_brightness, 0.6, 1.4),
    (_contrast, 0.5, 1.5),
    (_low_resolution, 0.5, 1.0),
    (_gamma, 0.5, 2.0),
    (_inverted_gamma, 0.7, 1.5),
)


def random_flips(batch: int, axes: Sequence[int], chance: float = 0.5) -> Tensor:
    """Draw which of the spatial `axes` to flip: (batch, len(axes)) bool on the CPU."""
    return torch.rand(batch, len(axes)) < chance


def apply_flips(t: Tensor, flips: Tensor, axes: Sequence[int]) -> Tensor:
    """Flip spatial axes per sample; applied twice it gives the input back.

    Args:
        t: images, labels or masks, (B, C, *).
        flips: (B, len(axes)) bool on the CPU, from `random_flips`.
        axes: spatial axes, 0 = first axis after the channels.

    Raises:
        ValueError: `flips` fits neither the batch nor the axes.
    """
    if flips.shape != (t.shape[0], len(axes)):
        raise ValueError(
            f"Flips {tuple(flips.shape)} do not fit {t.shape[0]} samples and {len(axes)} axes."
        )
    flips = flips.to(t.device, non_blocking=True).view(*flips.shape, *[1] * (t.ndim - 1))
    for axis, flip in zip(axes, flips.unbind(1), strict=True):
        t = torch.where(flip, t.flip(axis + 2), t)
    return t


def random_rot90(batch: int) -> Tensor:
    """Draw quarter turns per sample: (batch,) int64 in 0..3 on the CPU."""
    return torch.randint(0, 4, (batch,))


def apply_rot90(t: Tensor, k: Tensor, plane: tuple[int, int] = (-2, -1)) -> Tensor:
    """Rotate each sample by `k` quarter turns; -k turns it back.

    Args:
        t: images, labels or masks, (B, C, *).
        k: (B,) integers on the CPU, from `random_rot90`.
        plane: the two axes that span the plane, counted from the end.

    Raises:
        ValueError: the plane is not square, or `k` does not fit the batch.
    """
    if t.shape[plane[0]] != t.shape[plane[1]]:
        raise ValueError(
            f"Quarter turns need a square plane; got {t.shape[plane[0]]} x {t.shape[plane[1]]}."
        )
    if k.shape != (t.shape[0],):
        raise ValueError(f"Turns {tuple(k.shape)} do not fit {t.shape[0]} samples.")
    return torch.stack([torch.rot90(s, n, plane) for s, n in zip(t, k.tolist(), strict=True)])
