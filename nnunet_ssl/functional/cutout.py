"""Cutout: boxes of noise."""

import torch
from torch import Tensor

from nnunet_ssl.functional.mixing import random_boxes


@torch.no_grad()
def cutout(
    x: Tensor, probability: float, smallest: float, largest: float, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Overwrite a box of some samples with noise of the sample's own mean and deviation.

    Places come from PyTorch's CPU generator, noise from that of the image's device.

    Args:
        x: images, (B, C, *); not modified, no gradient.
        probability: of a box, per sample.
        smallest: volume of the smallest and
        largest: of the largest box, as fractions of the patch; each side is drawn by itself.
        valid: (B, 1, *) bool, voxels that may be overwritten.

    Returns:
        The images, and (B, 1, *) bool, True where they were overwritten.

    Raises:
        ValueError: not 0 < smallest <= largest <= 1.

    Source: DeVries & Taylor 2017, arXiv:1708.04552; sizes and probability of Chi et al. 2024 (ABD),
        code: 0.5, 0.02 to 0.4.
    """
    axes = tuple(range(2, x.ndim))
    low, high = (fraction ** (1 / len(axes)) for fraction in (smallest, largest))
    box = random_boxes(len(x), x.shape[2:], low, high, device=x.device)
    chosen = (torch.rand(len(x)) < probability).to(x.device, non_blocking=True)
    erased = box & valid & chosen.view(-1, *[1] * (x.ndim - 1))
    std, mean = torch.std_mean(x, axes, correction=0, keepdim=True)
    return torch.where(erased, torch.randn_like(x) * std + mean, x), erased
