"""Box exchange between two batches."""

from collections.abc import Sequence

import torch
from torch import Tensor


def random_boxes(
    batch: int,
    spatial: Sequence[int],
    low: float,
    high: float,
    same: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw one box per sample.

    Random numbers come from PyTorch's CPU generator, whatever the device, so the saved CPU state
    reproduces them.

    Args:
        batch: number of samples.
        spatial: patch size P in voxels, 2D or 3D.
        low: smallest side as a fraction of the patch side, per axis.
        high: largest side; sides are floor(U(low, high) * P), at least one voxel.
        same: one box for the whole batch.
        device: where the mask is made.

    Returns:
        (batch, 1, *spatial) bool, True inside the box; positions uniform in [0, P - side].

    Raises:
        ValueError: not 0 < low <= high <= 1.

    Source: Bai et al. 2023, arXiv:2305.00673, with low = high = 2/3 and same = True.
    """
    if not 0 < low <= high <= 1:
        raise ValueError(f"Box sides must satisfy 0 < low <= high <= 1; got {low} and {high}.")
    draws = torch.rand(1 if same else batch, len(spatial), 2, dtype=torch.float64)
    sizes = torch.tensor(spatial, dtype=torch.float64)
    # 1e-6: 2/3 of 96 is 64 voxels, not 63.99
    sides = ((low + (high - low) * draws[..., 0]) * sizes + 1e-6).floor().clamp_min(1)
    sides = torch.minimum(sides, sizes)
    starts = (draws[..., 1] * (sizes - sides + 1)).floor()
    ends = torch.stack([starts, starts + sides]).long().expand(2, batch, -1)
    ends = ends.to(device=device, non_blocking=True)
    inside = torch.ones((batch, 1, *spatial), dtype=torch.bool, device=device)
    for axis, size in enumerate(spatial):
        place = torch.arange(size, device=device).view(-1, *[1] * (len(spatial) - 1 - axis))
        first, end = ends[..., axis].view(2, batch, 1, *[1] * len(spatial))
        inside &= (place >= first) & (place < end)
    return inside


def exchange(a: Tensor, b: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Swap the boxes of two batches; voxels are moved, never interpolated.

    Args:
        a: (B, C, *) images, labels or masks.
        b: (B, C, *), the partners in the same order.
        inside: (B, 1, *) bool, True in the box.

    Returns:
        `a` with the boxes of `b`, and `b` with the boxes of `a`.

    Raises:
        ValueError: shapes differ.

    Source: Bai et al. 2023, arXiv:2305.00673 (bidirectional copy-paste).
    """
    if a.shape != b.shape or inside.shape != (a.shape[0], 1, *a.shape[2:]):
        raise ValueError(
            f"Cannot exchange boxes {tuple(inside.shape)} between {tuple(a.shape)} and "
            f"{tuple(b.shape)}: both sides need the same shape."
        )
    return torch.where(inside, b, a), torch.where(inside, a, b)
