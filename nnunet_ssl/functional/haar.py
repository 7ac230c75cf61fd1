"""High-frequency content of feature maps, at half the resolution."""

import torch
from torch import Tensor


def haar_split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split a map by one level of the orthonormal Haar transform.

    Sums and differences of neighbours along each axis, over sqrt(2). Axes of odd size are continued
    by their last voxel.

    Args:
        x: (B, C, *), n = 2 or 3 axes.

    Returns:
        The low band, (B, C, *half), half being ceil(size / 2), and all others, (B, C, 2^n - 1,
        *half), 0 where x is constant. In the precision of x.

    Source: Mallat 1989 (wavelet decomposition); Haar 1910.
    """
    bands = x[:, :, None]
    for axis in range(3, bands.ndim):
        even, odd = _even_odd(bands, axis)
        bands = torch.cat([even + odd, even - odd], 2) * 0.5**0.5
    return bands[:, :, 0], bands[:, :, 1:]


def laplacian_bands(x: Tensor) -> Tensor:
    """Return what a binomial filter (1, 2, 1) / 4 along each axis takes out of a map.

    Args:
        x: (B, C, *), n = 2 or 3 axes; continued by the voxels at its border.

    Returns:
        (B, C, 2^n, *half), see `_folded`, in the precision of x.

    Source: Burt & Adelson 1983 (Laplacian pyramid), with a shorter filter.
    """
    smooth = x
    for axis in range(2, x.ndim):
        size = x.shape[axis]
        first, last = smooth.narrow(axis, 0, 1), smooth.narrow(axis, size - 1, 1)
        before = torch.cat([first, smooth.narrow(axis, 0, size - 1)], axis)
        after = torch.cat([smooth.narrow(axis, 1, size - 1), last], axis)
        smooth = smooth / 2 + (before + after) / 4
    return _folded(x - smooth)


def fft_bands(x: Tensor) -> Tensor:
    """Return a map without its low frequencies, cut off sharply.

    Low means less than a quarter of a period a voxel along every axis, half of what the grid can
    hold, as in the low band of `haar_split`.

    Args:
        x: (B, C, *), n = 2 or 3 axes; continued periodically.

    Returns:
        (B, C, 2^n, *half), see `_folded`, in fp32.
    """
    axes = tuple(range(2, x.ndim))
    with torch.autocast(x.device.type, enabled=False):
        spectrum = torch.fft.rfftn(x.float(), dim=axes)
        low = torch.ones((), dtype=torch.bool, device=x.device)
        for axis in axes:
            grid = torch.fft.rfftfreq if axis == axes[-1] else torch.fft.fftfreq
            frequencies = grid(x.shape[axis], device=x.device)
            low = low & (frequencies.abs() < 0.25).view([-1 if a == axis else 1 for a in axes])
        high = torch.fft.irfftn(spectrum.masked_fill(low, 0), s=x.shape[2:], dim=axes)
        return _folded(high)


def _folded(x: Tensor) -> Tensor:
    """Make the 2^n voxels of each cell of 2 x 2 (x 2) channels, (B, C, 2^n, *half)."""
    bands = x[:, :, None]
    for axis in range(3, bands.ndim):
        bands = torch.cat(_even_odd(bands, axis), 2)
    return bands


def _even_odd(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return each second voxel, from the first and from the second one, equally many."""
    size = x.shape[axis]
    if size % 2:
        x = torch.cat([x, x.narrow(axis, size - 1, 1)], axis)
    even, odd = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
    return even, odd
