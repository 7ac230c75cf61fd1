"""Mirror images of one side of an ellipse, and losses that ask for symmetry. 2D only."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nnunet_ssl.functional.augment import _blur
from nnunet_ssl.functional.ellipses import Ellipses, offsets

Side = Literal["left", "right"]


class Mirror(NamedTuple):
    """Reflection at the long axis of each sample's ellipse.

    Attributes:
        source: (B, 1, H * W) int64, the pixel that each one is reflected to, clamped to the frame.
        inside: (B, 1, H, W) bool, False where that lies outside the patch.
        left: (B, 1, H, W) bool, which side of the axis a pixel is on; those on it are right.
    """

    source: Tensor
    inside: Tensor
    left: Tensor

    def rows(self, rows: slice) -> "Mirror":
        """Return some of the samples."""
        return Mirror(*(t[rows] for t in self))


@torch.no_grad()
def mirror_at(ellipses: Ellipses, spatial: Sequence[int]) -> Mirror:
    """Return the reflection at the long axes, to the nearest pixel.

    Args:
        ellipses: of B samples.
        spatial: (H, W).
    """
    _, v = offsets(ellipses, spatial)
    # the short axis is the long one turned by a right angle: (-column, row)
    normal = -ellipses.along[:, 1], ellipses.along[:, 0]
    inside = torch.ones_like(v, dtype=torch.bool)
    index = torch.zeros_like(v, dtype=torch.int64)
    for size, n, shape in zip(spatial, normal, ((-1, 1), (1, -1)), strict=True):
        here = torch.arange(size, device=v.device).view(shape)
        there = (here - 2 * v * n.view(-1, 1, 1, 1)).round().long()
        inside = inside & (there >= 0) & (there < size)
        index = index * size + there.clamp(0, size - 1)
    return Mirror(index.flatten(2), inside, v < 0)


def reflect(t: Tensor, mirror: Mirror) -> Tensor:
    """Return t with each pixel taken from its mirror image, (B, C, H, W); differentiable."""
    return t.flatten(2).gather(2, mirror.source.expand(-1, t.shape[1], -1)).view(t.shape)


def half_mirrored(t: Tensor, mirror: Mirror, side: Side) -> Tensor:
    """Return one side of t and its mirror image on the other side; differentiable.

    Args:
        t: (B, C, H, W), images, masks or probabilities.
        mirror: from `mirror_at`.
        side: which one stays.
    """
    stays = mirror.left if side == "left" else ~mirror.left
    return torch.where(stays, t, reflect(t, mirror))


@torch.no_grad()
def mirrored_image(
    x: Tensor, head: Tensor, valid: Tensor, mirror: Mirror, side: Side, perturb: bool
) -> Tensor:
    """Return images whose heads are made of one of their sides and its mirror image.

    Args:
        x: (B, C, H, W); not modified.
        head: (B, 1, H, W) bool; what lies outside stays as it is, and so do pixels of the head
            whose mirror image lies outside the patch or on padding.
        valid: (B, 1, H, W) bool, False on padding.
        mirror: from `mirror_at`.
        side: which one stays.
        perturb: change the intensities of both halves, each by itself; see `perturbed`.

    Source: Zhou et al. 2025 (ERSR), arXiv:2508.19815, code.
    """
    stays = mirror.left if side == "left" else ~mirror.left
    # Deviates: the mirror image of the mask is painted where the mask is, not also beside it
    own, other = head & stays, head & ~stays & mirror.inside & reflect(valid, mirror)
    reflected = reflect(x, mirror)
    here = perturbed(x, own) if perturb else x
    there = perturbed(reflected, other) if perturb else reflected
    return torch.where(own, here, torch.where(other, there, x))


@torch.no_grad()
def perturbed(x: Tensor, part: Tensor) -> Tensor:
    """Change the intensities of images by up to four operations, each with probability 0.2.

    In this order: noise of standard deviation 0.05; gamma 1.2-1.8; shift by up to 0.1 either way;
    blur of sigma 0.5-1.5 pixels. Noise and shift in units of the image's range, gamma within the
    range of the part. Drawn by sample, from PyTorch's CPU generator but for the noise itself.

    Args:
        x: (B, C, H, W), any intensity scale; not modified, dtype kept.
        part: (B, 1, H, W) bool, what will be used of the result.

    Source: Zhou et al. 2025 (ERSR), code; there images are stretched to [0, 1] after each.
    """
    out = x.to(torch.float32, copy=True)
    chosen = torch.rand(len(x), 4) < 0.2
    strength = torch.rand(len(x), 4)
    span = out.amax((2, 3), keepdim=True) - out.amin((2, 3), keepdim=True)

    def noise(y: Tensor, _: Tensor, rows: Tensor) -> Tensor:
        return y + 0.05 * span[rows] * torch.randn_like(y)

    def gamma(y: Tensor, s: Tensor, rows: Tensor) -> Tensor:
        inside = part[rows]
        low = torch.where(inside, y, torch.inf).amin((2, 3), keepdim=True)
        width = torch.where(inside, y, -torch.inf).amax((2, 3), keepdim=True) - low
        usable = width.isfinite() & (width > 0)  # an empty or flat part stays
        low, width = torch.where(usable, low, 0), torch.where(usable, width, 1)
        exponent = (1.2 + 0.6 * s).to(y.device, non_blocking=True).view(-1, 1, 1, 1)
        curved = ((y - low) / width).clamp(0, 1) ** exponent * width + low
        return torch.where(usable, curved, y)

    def shift(y: Tensor, s: Tensor, rows: Tensor) -> Tensor:
        by = (0.2 * s - 0.1).to(y.device, non_blocking=True).view(-1, 1, 1, 1)
        return y + by * span[rows]

    def smooth(y: Tensor, s: Tensor, _: Tensor) -> Tensor:
        return _blur(y, 0.5 + s, axes=(2, 3))

    for i, operation in enumerate((noise, gamma, shift, smooth)):
        rows = chosen[:, i].nonzero()[:, 0]
        if len(rows):
            on_device = rows.to(x.device, non_blocking=True)
            changed = operation(out.index_select(0, on_device), strength[rows, i], on_device)
            out.index_copy_(0, on_device, changed)
    return out.to(x.dtype)


def sample_mse(a: Tensor, b: Tensor, counted: Tensor) -> Tensor:
    """Mean squared distance over the counted pixels of each sample.

    Args:
        a: (B, C, H, W).
        b: (B, C, H, W); both sides get a gradient.
        counted: (B, 1, H, W) bool.

    Returns:
        (B,) float32; 0 for samples of which nothing counts.
    """
    squared = (a.float() - b.float()) ** 2 * counted
    return squared.flatten(1).sum(1) / (counted.flatten(1).sum(1) * a.shape[1]).clamp_min(1)


def mirror_mse(t: Tensor, mirror: Mirror, counted: Tensor) -> Tensor:
    """Mean squared distance of each sample to its own mirror image.

    The sum runs over one side, the mean over both, as published.

    Args:
        t: (B, C, H, W); gets a gradient on both sides of the axis.
        mirror: from `mirror_at`.
        counted: (B, 1, H, W) bool.

    Returns:
        (B,) float32; 0 for a symmetric one.

    Source: Zhou et al. 2025 (ERSR), code.
    """
    squared = (t.float() - reflect(t.float(), mirror)) ** 2 * (counted & mirror.left)
    return squared.flatten(1).sum(1) / (counted.flatten(1).sum(1) * t.shape[1]).clamp_min(1)
