"""Random block masks on a grid."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def random_blocks(
    batch: int,
    spatial: Sequence[int],
    grid: int,
    ratio: float,
    min_cell: Sequence[int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw a random part of the cells of a grid, for each sample by itself.

    The grid covers the patch exactly: along an axis of S voxels the edges of g cells lie at
    floor(i S / g). Random numbers come from PyTorch's CPU generator, whatever the device.

    Args:
        batch: number of samples.
        spatial: patch size S in voxels, 2D or 3D.
        grid: cells per axis; fewer, but at least one, where a cell would be smaller than
            `min_cell`.
        ratio: share of the cells to draw, rounded down.
        min_cell: smallest cell in voxels, one number per axis.
        device: where the mask is made.

    Returns:
        (batch, 1, *spatial) bool, True in exactly floor(ratio * cells) cells of each sample.

    Raises:
        ValueError: ratio outside [0, 1], grid below 1, or `min_cell` that does not fit `spatial`.

    Source: Liu et al. 2025 (M3HL), arXiv:2508.03752, code; grids of 4 per axis, ratio 0.5.
    """
    if not 0 <= ratio <= 1 or grid < 1 or len(min_cell) != len(spatial):
        raise ValueError(
            f"Blocks need a ratio in [0, 1], a grid of at least 1 and a smallest cell for each of "
            f"{len(spatial)} axes; got {ratio}, {grid}, {tuple(min_cell)}."
        )
    cells = [max(1, min(grid, size // m)) for size, m in zip(spatial, min_cell, strict=True)]
    number = math.prod(cells)
    rank = torch.rand(batch, number).argsort(1).argsort(1)
    # 1e-6: 0.7 of 10 is 7 cells, not 6.99
    mask = (rank < math.floor(ratio * number + 1e-6)).view(batch, 1, *cells)
    mask = mask.to(device, non_blocking=True)
    for axis, (size, g) in enumerate(zip(spatial, cells, strict=True), start=2):
        edges = torch.tensor([i * size // g for i in range(g + 1)])
        cell_of = torch.repeat_interleave(torch.arange(g), edges.diff())
        mask = mask.index_select(axis, cell_of.to(mask.device, non_blocking=True))
    return mask
