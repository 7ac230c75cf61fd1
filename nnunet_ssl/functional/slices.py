"""Volumes as stacks of slices for 2D networks."""

from collections.abc import Sequence

from torch import Tensor


def to_slices(volume: Tensor, axis: int = 0) -> Tensor:
    """Cut volumes into slices.

    Args:
        volume: (B, C, D, H, W); images (B, C, H, W) are slices already.
        axis: spatial axis along which the slices lie, 0 to 2.

    Returns:
        (B * D, C, H, W), D, H, W in the order of the volume without `axis`; slice b * D + d is the
        d-th of volume b.

    Raises:
        ValueError: neither images nor volumes, or no such axis.
    """
    if volume.ndim == 4:
        return volume
    if volume.ndim != 5 or not 0 <= axis < 3:
        raise ValueError(f"Slices along axis {axis} of a tensor of shape {tuple(volume.shape)}.")
    return volume.movedim(2 + axis, 1).flatten(0, 1)


def from_slices(slices: Tensor, shape: Sequence[int], axis: int = 0) -> Tensor:
    """Put slices back together; the inverse of `to_slices`.

    Args:
        slices: (B * D, K, H, W).
        shape: of what was cut, (B, C, *); C need not be K.
        axis: as for `to_slices`.

    Returns:
        (B, K, *).
    """
    if len(shape) == 4:
        return slices
    return slices.unflatten(0, (shape[0], shape[2 + axis])).movedim(1, 2 + axis)
