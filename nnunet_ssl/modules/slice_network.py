"""A 2D network of natural images that segments images or, slice by slice, volumes."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torch.utils.checkpoint import checkpoint

from nnunet_ssl.functional import downsample, from_slices, to_slices
from nnunet_ssl.modules.backbones import STRIDES, Backbone
from nnunet_ssl.modules.lora import add_low_rank

WIDTH = 256  # features of the head; SegFormer's smaller forms
GROUPS = 32  # of its norm
HEAD_DROPOUT = 0.1  # SegFormer's


class ImageSegmenter(nn.Module):
    """Encoder of natural images with SegFormer's decode head and an input skip.

    The encoder's four features go to a common width and to stride 4, are joined, and meet the
    input, sub-sampled by 4; a transposed convolution brings both to full resolution. Inputs are
    padded to multiples of 32 by their border, and the output is cut back.

    Args:
        backbone: timm's name of the encoder.
        input_channels: one is repeated to three, three go in as they are, others are mixed by a
            trained 1 x 1 convolution that starts as their mean.
        output_channels: of the logits.

    Source: Yeung et al. 2025 (M&N), arXiv:2509.15167 (code); Xie et al. 2021 (SegFormer),
        arXiv:2105.15203. Group norm in place of batch norm, so that slices do not depend on the
        other slices of a pass.
    """

    def __init__(self, backbone: str, input_channels: int, output_channels: int):
        super().__init__()
        self.mix: nn.Conv2d | None = None
        if input_channels not in (1, 3):
            self.mix = nn.Conv2d(input_channels, 3, 1, bias=False)
            nn.init.constant_(self.mix.weight, 1 / input_channels)
        self.backbone = Backbone(backbone)
        self.project = nn.ModuleList(nn.Conv2d(c, WIDTH, 1) for c in self.backbone.channels)
        self.fuse = nn.Sequential(
            nn.Conv2d(len(STRIDES) * WIDTH, WIDTH, 1, bias=False),
            nn.GroupNorm(GROUPS, WIDTH),
            nn.ReLU(),
            nn.Dropout(HEAD_DROPOUT),
        )
        self.classify = nn.ConvTranspose2d(WIDTH + 3, output_channels, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits.

        Args:
            x: (N, C, H, W), any size.

        Returns:
            (N, K, H, W).
        """
        height, width = x.shape[2:]
        x = pad(x, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1]), mode="replicate")
        if self.mix is not None:
            x = self.mix(x)
        elif x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        features = [p(f) for p, f in zip(self.project, self.backbone(x), strict=True)]
        size = features[0].shape[2:]
        same = [interpolate(f, size, mode="bilinear", align_corners=False) for f in features[1:]]
        fused = self.fuse(torch.cat([features[0], *same], 1))
        skip = x[..., :: STRIDES[0], :: STRIDES[0]].to(fused.dtype)
        return self.classify(torch.cat([fused, skip], 1))[..., :height, :width]


class SliceNetwork(nn.Module):
    """Segments volumes slice by slice, and images as they are.

    Of more slices than fit `pixels_at_once`, that many run together; with gradient they run again
    in the backward pass, so that the activations of one group are alive at a time.

    Args:
        segmenter: for images.
        axis: spatial axis of volumes along which the slices lie.
        pixels_at_once: of a group of slices; a group has at least one slice.
        scales: of nnU-Net's deep supervision; None for none.

    Attributes:
        deep_supervision: True returns the logits at all scales, as nnU-Net's validation wants them.
    """

    def __init__(
        self,
        segmenter: ImageSegmenter,
        axis: int,
        pixels_at_once: int,
        scales: Sequence[Sequence[float]] | None,
    ):
        super().__init__()
        self.segmenter = segmenter
        self.axis, self.pixels_at_once, self.scales = axis, pixels_at_once, scales
        self.deep_supervision = False

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits, or a list of them under deep supervision.

        Args:
            x: (B, C, *).

        Returns:
            (B, K, *).
        """
        logits = from_slices(self._segment(to_slices(x, self.axis)), x.shape, self.axis)
        if self.deep_supervision and self.scales is not None:
            return downsample(logits, self.scales)
        return logits

    def _segment(self, slices: Tensor) -> Tensor:
        fitting = max(1, self.pixels_at_once // slices[0, 0].numel())
        # groups of one size, so that a compiled network sees few shapes
        groups = slices.chunk(math.ceil(len(slices) / fitting))
        if len(groups) == 1:
            return self.segmenter(slices)
        if not torch.is_grad_enabled():
            return torch.cat([self.segmenter(group) for group in groups])
        return torch.cat([checkpoint(self.segmenter, g, use_reentrant=False) for g in groups])

    @torch.no_grad()
    def load_backbone(self, pretrained: nn.Module) -> None:
        """Take the weights of an encoder, which low-rank additions may have been given since."""
        own = self.segmenter.backbone.state_dict()
        for name, tensor in pretrained.state_dict().items():
            module, _, leaf = name.rpartition(".")
            own[name if name in own else f"{module}.layer.{leaf}"].copy_(tensor)

    def add_low_rank(self, rank: int, alpha: float, dropout: float) -> None:
        """Freeze the encoder but for biases and norms; see `lora.add_low_rank`."""
        add_low_rank(self.segmenter.backbone, rank, alpha, dropout)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what runs on a group of slices."""
        self.segmenter.compile(*args, **kwargs)
