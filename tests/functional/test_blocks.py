import math

import pytest
import torch

from nnunet_ssl.functional import random_blocks


def cells_of(mask, cells):
    """The one value of each cell, (*cells), after checking that a cell has only one."""
    edges = [[i * s // g for i in range(g + 1)] for s, g in zip(mask.shape, cells, strict=True)]
    values = torch.zeros(cells, dtype=torch.bool)
    for index in torch.cartesian_prod(*[torch.arange(g) for g in cells]).tolist():
        cell = mask[tuple(slice(e[i], e[i + 1]) for e, i in zip(edges, index, strict=True))]
        assert cell.numel() > 0
        assert (cell == cell.flatten()[0]).all()
        values[tuple(index)] = cell.flatten()[0]
    return values


# the patches, strides and grids of the released code and of odd and thin patches
@pytest.mark.parametrize(
    ("spatial", "min_cell", "cells"),
    [
        ((256, 256), (16, 16), (4, 4)),
        ((112, 112, 80), (16, 16, 16), (4, 4, 4)),
        ((20, 256, 224), (4, 32, 32), (4, 4, 4)),
        ((7, 320, 256), (4, 32, 32), (1, 4, 4)),
        ((33, 21), (8, 8), (4, 2)),
        ((3, 5), (4, 4), (1, 1)),
    ],
)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_exactly_that_many_whole_cells_are_drawn(spatial, min_cell, cells, ratio):
    mask = random_blocks(2, spatial, 4, ratio, min_cell)
    assert mask.dtype == torch.bool and mask.shape == (2, 1, *spatial)
    expected = math.floor(round(ratio * math.prod(cells), 6))
    for sample in mask[:, 0]:
        assert cells_of(sample, cells).sum() == expected


def test_half_of_the_voxels_for_the_published_patch_sizes():
    for spatial, cell in (((256, 256), 64), ((112, 112, 80), 28)):
        mask = random_blocks(3, spatial, 4, 0.5, [16] * len(spatial))
        assert mask.flatten(1).float().mean(1).tolist() == [0.5] * 3
        assert mask[0, 0].sum() % cell == 0


def test_samples_differ_cells_are_alike_and_the_cpu_generator_decides():
    torch.manual_seed(3)
    mask = random_blocks(400, (8, 8), 4, 0.5, (1, 1))
    assert (mask[0] != mask[1:]).flatten(1).any(1).float().mean() > 0.99
    often = mask.float().mean(0)
    assert (often - 0.5).abs().max() < 0.12  # 4.8 standard errors
    torch.manual_seed(3)
    assert torch.equal(mask, random_blocks(400, (8, 8), 4, 0.5, (1, 1)))


@pytest.mark.parametrize(
    ("grid", "ratio", "min_cell"), [(0, 0.5, (1, 1)), (4, 1.2, (1, 1)), (4, 0.5, (1,))]
)
def test_impossible_blocks_are_refused(grid, ratio, min_cell):
    with pytest.raises(ValueError, match=r"ratio in \[0, 1\], a grid of at least 1"):
        random_blocks(1, (8, 8), grid, ratio, min_cell)
