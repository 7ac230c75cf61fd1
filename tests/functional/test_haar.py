import itertools

import pytest
import torch

from nnunet_ssl.functional import fft_bands, haar_split, laplacian_bands

SIZES = [(8, 6), (4, 6, 8), (7, 5), (3, 1, 5)]


def even(size):
    return tuple(n + n % 2 for n in size)


def continued(x):
    """Append the last voxel to axes of odd size."""
    for axis in range(2, x.ndim):
        if x.shape[axis] % 2:
            x = torch.cat([x, x.narrow(axis, -1 % x.shape[axis], 1)], axis)
    return x


def naive(x):
    """Every band of every cell as a sum over its voxels, (B, C, 2^n, *half)."""
    x, n = continued(x), x.ndim - 2
    half = [size // 2 for size in x.shape[2:]]
    bands = torch.zeros(*x.shape[:2], 2**n, *half, dtype=x.dtype)
    for cell in itertools.product(*map(range, half)):
        for band, offset in itertools.product(itertools.product((0, 1), repeat=n), repeat=2):
            sign = (-1) ** sum(i * j for i, j in zip(band, offset, strict=True))
            voxel = tuple(2 * i + j for i, j in zip(cell, offset, strict=True))
            index = sum(b << a for a, b in enumerate(band))
            bands[:, :, index][(..., *cell)] += sign * x[(..., *voxel)] / 2 ** (n / 2)
    return bands


def all_bands(x):
    low, high = haar_split(x)
    return torch.cat([low[:, :, None], high], 2)


@pytest.mark.parametrize("size", SIZES)
def test_bands_are_signed_sums_of_cells(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(all_bands(x), naive(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_the_map_comes_back_and_energy_is_kept(size):
    whole = continued(torch.randn(2, 3, *size, dtype=torch.float64)).requires_grad_()
    bands = all_bands(whole[(..., *(slice(n) for n in size))])
    torch.testing.assert_close(bands.square().sum(), whole.square().sum(), rtol=1e-12, atol=0)
    # orthonormal: the transpose, which autograd applies, is the inverse
    bands = all_bands(whole)
    back = torch.autograd.grad(bands, whole, bands.detach())[0]
    torch.testing.assert_close(back, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_constants_have_no_high_bands(size, dtype):
    x = torch.full((1, 2, *size), 3.7, dtype=dtype)
    low, high = haar_split(x)
    assert low.dtype == high.dtype == dtype
    assert high.shape == (1, 2, 2 ** len(size) - 1, *(n // 2 for n in even(size)))
    assert not high.any() and (low > 3.7).all()
    assert laplacian_bands(x).abs().max() <= 0.05 * (dtype == torch.bfloat16) + 1e-6
    assert fft_bands(x).abs().max() < 1e-5


def test_low_precision_and_meta_tensors():
    x = torch.randn(1, 2, 5, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert fft_bands(x.bfloat16()).dtype == torch.float32
        assert laplacian_bands(x.bfloat16()).isfinite().all()
    assert haar_split(x.to("meta"))[1].shape == (1, 2, 7, 3, 3, 4)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("period, passes", [(12, False), (6, False), (3, True), (2, True)])
def test_fft_passes_short_waves_only(axis, period, passes):
    size = (12, 12, 12)
    wave = torch.cos(torch.arange(12) * 2 * torch.pi / period)
    x = wave.view([-1 if a == axis else 1 for a in range(3)]).expand(1, 1, *size)
    energy = fft_bands(x).square().sum() / x.square().sum()
    assert energy.item() == pytest.approx(float(passes), abs=1e-5)


def test_laplacian_is_what_the_blur_takes_away():
    x = torch.zeros(1, 1, 8, 8)
    x[..., 4, 4] = 1
    weights = torch.tensor([1.0, 2.0, 1.0]) / 4
    expected = x.clone()
    expected[..., 3:6, 3:6] -= weights[:, None] * weights
    cells = laplacian_bands(x)
    for band, (i, j) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
        torch.testing.assert_close(cells[:, :, band], expected[..., i::2, j::2])
    slope = torch.arange(8.0).expand(1, 1, 8, 8)  # changes at the border only
    assert not laplacian_bands(slope)[..., 1:-1].any()
