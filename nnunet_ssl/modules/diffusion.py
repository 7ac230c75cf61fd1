"""The plan's network as a denoiser of label maps."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ssl.functional import alpha_bars
from nnunet_ssl.modules.tap import decode

FREQUENCIES = 64  # of the time, each as sine and cosine
HIDDEN = 512


class TimeEmbedding(nn.Module):
    """Sinusoids of the time and a perceptron.

    Source: Ho et al. 2020, arXiv:2006.11239; sizes of GenericSSL and Diff-UNet.
    """

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        exponents = torch.arange(FREQUENCIES) / (FREQUENCIES - 1)
        frequencies = torch.exp(-math.log(10000) * exponents)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.perceptron = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU()
        )

    def forward(self, time: Tensor) -> Tensor:
        """Return the embedding (B, 512) of times (B,)."""
        angles = time[:, None] * self.frequencies
        return self.perceptron(torch.cat([angles.sin(), angles.cos()], 1))


class FiLM(nn.Module):
    """Scale and shift each channel by an embedding; changes nothing at first.

    A shift alone would be lost: the instance norm of the next convolution takes it out again
    everywhere but near the border.

    Args:
        embedding: size of the embedding.
        channels: C, of the feature map.
    """

    def __init__(self, embedding: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(embedding, 2 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, feature: Tensor, embedding: Tensor) -> Tensor:
        """Return the changed feature, (B, C, *) in its own precision; embedding (B, E) float32."""
        scale, shift = (
            part.view(*part.shape, *[1] * (feature.ndim - 2)).to(feature.dtype)
            for part in self.linear(embedding).chunk(2, 1)
        )
        return torch.addcmul(shift, feature, 1 + scale)


class DiffusionNetwork(nn.Module):
    """Predicts a clean label map from an image, a noisy map and how noisy it is.

    The plan's network with the map's channels beside the image's; the time scales and shifts the
    output of each encoder stage.

    Args:
        unet: PlainConvUNet or ResidualEncoderUNet with C + K input and K output channels.

    Attributes:
        alpha_bars: (1000,) float32, see `functional.alpha_bars`; not in the state dict.
    """

    alpha_bars: Tensor

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet
        self.time = TimeEmbedding()
        encoder: Any = unet.encoder
        self.films = nn.ModuleList(FiLM(HIDDEN, channels) for channels in encoder.output_channels)
        self.register_buffer("alpha_bars", alpha_bars(), persistent=False)

    def forward(self, image: Tensor, state: Tensor, time: Tensor) -> Tensor | list[Tensor]:
        """Return logits of the clean map, as the plan's network does.

        Args:
            image: (B, C, *).
            state: noisy map x_t, (B, K, *).
            time: t, (B,) integers in [0, 1000).
        """
        with torch.autocast(image.device.type, enabled=False):
            embedding = self.time(time)
        encoder: Any = self.unet.encoder
        feature = torch.cat([image, state], 1)
        if getattr(encoder, "stem", None) is not None:
            feature = encoder.stem(feature)
        skips = []
        for stage, film in zip(encoder.stages, self.films, strict=True):
            feature = stage(feature)
            with torch.autocast(image.device.type, enabled=False):
                feature = film(feature, embedding)
            skips.append(feature)
        return decode(self.unet, skips).output
