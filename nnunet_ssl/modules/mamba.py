"""Attention to edges: a state space model runs over the high frequencies of a feature map."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu, softplus

from nnunet_ssl.functional import fft_bands, haar_split, laplacian_bands, selective_scan

MIN_STEP, MAX_STEP = 0.001, 0.1  # of dt at first

HighPass = Literal["haar", "fft", "laplacian"]


class SelectiveSSM(nn.Module):
    """Mamba block: mixes tokens along a sequence, each seeing those before it, at linear cost.

    Computes in fp32. `A_log` and `skip` say by `_no_weight_decay` that an optimizer should not
    decay them. The scan's implementation leaves no trace in the state dict.

    Args:
        channels: C, of the tokens.
        state: N, of the memory of each inner channel.
        expand: inner channels per channel.
        conv: length of the causal convolution before the scan.

    Source: Gu & Dao 2023, arXiv:2312.00752, Sec. 3.4; defaults and initial values of its code.
    """

    def __init__(self, channels: int, state: int = 16, expand: int = 2, conv: int = 4):
        super().__init__()
        inner, rank = expand * channels, math.ceil(channels / 16)
        self.sizes = (rank, state, state)
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, conv, groups=inner, padding=conv - 1)
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, channels, bias=False)
        for parameter in (self.A_log, self.skip):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        low, high = math.log(MIN_STEP), math.log(MAX_STEP)
        with torch.no_grad():
            steps = torch.exp(torch.empty(inner).uniform_(low, high))
            self.dt_proj.bias.copy_(steps.expm1().log())  # inverse of softplus

    def forward(self, tokens: Tensor) -> Tensor:
        """Return mixed tokens in fp32.

        Args:
            tokens: (B, L, C).
        """
        with torch.autocast(tokens.device.type, enabled=False):
            u, gate = self.in_proj(tokens.float()).chunk(2, 2)
            u = self.conv(u.transpose(1, 2))[..., : tokens.shape[1]]  # no token sees a later one
            u = silu(u.transpose(1, 2))
            step, b, c = self.x_proj(u).split(self.sizes, 2)
            dt = softplus(self.dt_proj(step))
            y = selective_scan(u, dt, -self.A_log.exp(), b, c, self.skip)
            return self.out_proj(y * silu(gate))


class HighFrequencyMamba(nn.Module):
    """Scales a feature map by what two scans over its high frequencies find.

        h   = linear(high bands of f)            one token per cell of 2 x 2 (x 2) voxels
        tok = LayerNorm(h);  tok = scan(tok) + flip(scan'(flip(tok)))
        out = f (1 + tanh(linear'(tok)))         linear' is 0 at first, so out = f

    Args:
        channels: C, of the feature map.
        dim: number of its axes, 2 or 3.
        high_pass: "haar" takes the high bands of the Haar transform; "fft" and "laplacian" take low
            frequencies out of the map, whose 2^dim voxels a cell then make the token.

    Raises:
        ValueError: unknown high pass, or another number of axes.

    Source: reconstructed from a secondary summary of Guo et al. 2025 (Diff-CL), arXiv:2503.09408,
        which names a high-frequency Mamba and an attention by it. Scans of both directions as in
        SegMamba (Xing et al. 2024, arXiv:2401.13560), with own projections; its third order, slice
        after slice, is left out. The gate is ours.
    """

    def __init__(self, channels: int, dim: int, high_pass: HighPass = "haar"):
        super().__init__()
        if high_pass not in ("haar", "fft", "laplacian") or dim not in (2, 3):
            raise ValueError(
                f"high_pass is haar, fft or laplacian and dim 2 or 3, not {high_pass!r} and {dim}."
            )
        self.high_pass = high_pass
        bands = 2**dim - 1 if high_pass == "haar" else 2**dim
        self.mix = nn.Linear(channels * bands, channels)
        self.norm = nn.LayerNorm(channels)
        self.ahead, self.back = SelectiveSSM(channels), SelectiveSSM(channels)
        self.gate = nn.Linear(channels, channels)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, feature: Tensor) -> Tensor:
        """Return the scaled map, same shape and precision.

        Args:
            feature: (B, C, *).
        """
        bands = self.bands(feature)
        half, size = bands.shape[3:], feature.shape[2:]
        tokens = self.mix(bands.flatten(3).flatten(1, 2).transpose(1, 2))
        with torch.autocast(feature.device.type, enabled=False):
            tokens = self.norm(tokens.float())
            tokens = self.ahead(tokens) + self.back(tokens.flip(1)).flip(1)
            gate = 1 + self.gate(tokens).tanh()
        gate = gate.to(feature.dtype).transpose(1, 2).unflatten(2, half)
        gate = interpolate(gate, scale_factor=2, mode="nearest")  # each voxel gets its cell's
        inside = tuple(slice(n) for n in gate.shape[:2] + size)
        return feature * gate[inside].to(feature.dtype)  # CUDA's autocast interpolates in fp32

    def bands(self, feature: Tensor) -> Tensor:
        """Return high frequencies, (B, C, bands, *half)."""
        if self.high_pass == "haar":
            return haar_split(feature)[1]
        return fft_bands(feature) if self.high_pass == "fft" else laplacian_bands(feature)
