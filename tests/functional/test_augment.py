import math

import pytest
import torch
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform

from nnunet_ssl.functional import (
    add_noise,
    apply_flips,
    apply_rot90,
    augment,
    random_flips,
    random_rot90,
    strong_intensity,
)

SPATIAL = [(12, 10), (6, 10, 8)]
NAMES = [operation.__name__ for operation, _, _ in augment._OPERATIONS]


def images(spatial, batch=3, channels=2):
    return torch.randn(batch, channels, *spatial) * 2 + 1


def by_nnunet(transform, x, values, kept=0, **extra):
    """Apply nnU-Net's transform sample by sample with the given strengths, not to `kept` axes."""
    results = []
    for sample, value in zip(x, values.tolist(), strict=True):
        channels = torch.arange(len(sample))
        params = {"apply_to_channel": channels, **extra}
        for key in ("multipliers", "gamma"):
            params[key] = torch.full((len(sample),), value)
        params["scales"] = torch.full((len(sample), sample.ndim - 1), value)
        params["scales"][:, :kept] = 1  # nnU-Net's `ignore_axes`
        results.append(transform._apply_to_image(sample.clone(), **params))
    return torch.stack(results)


def test_add_noise():
    x = images((60, 60))
    noise = add_noise(x, 0.1) - x
    assert noise.std().item() == pytest.approx(0.1, rel=0.05)
    assert noise.abs().max() > 0.2
    clipped = add_noise(x, 0.1, clip=0.2) - x
    assert clipped.abs().max() <= 0.2 + 1e-6
    assert torch.equal(add_noise(x, 0.0), x)


def test_noise_has_the_variance_of_its_sample():
    x = torch.zeros(3, 2, 60, 60)
    variance = torch.tensor([0.0, 0.02, 0.1])
    result = augment._noise(x, variance, relative=False)
    assert result.var((1, 2, 3)).tolist() == pytest.approx(variance.tolist(), rel=0.1)


def test_relative_noise_follows_the_scale_of_each_channel():
    scale = torch.tensor([0.1, 30.0]).view(2, 1, 1)
    x = scale * torch.randn(3, 2, 60, 60) + 5
    variance = torch.tensor([0.0, 0.02, 0.1])
    noise = (augment._noise(x, variance, relative=True) - x) / scale
    for channel in range(2):
        found = noise[:, channel].var((1, 2)).tolist()
        assert found == pytest.approx(variance.tolist(), rel=0.15, abs=1e-6)


@pytest.mark.parametrize(("spatial", "across"), [*((s, 2) for s in SPATIAL), (SPATIAL[1], 3)])
def test_blur_equals_direct_sums(spatial, across):
    x = images(spatial)
    sigma = torch.tensor([0.5, 1.0, 1.5])
    result = augment._blur(x, sigma, range(across, x.ndim))
    for sample in range(3):
        expected = x[sample].double()
        s = sigma[sample].item()
        kernel = [math.exp(-0.5 * (o / s) ** 2) for o in range(-5, 6)]
        for axis in range(across - 1, expected.ndim):
            n = expected.shape[axis]
            rows = expected.unbind(axis)
            blurred = []
            for i in range(n):
                near = [rows[min(max(i + o, 0), n - 1)] for o in range(-5, 6)]
                blurred.append(sum(k * r for k, r in zip(kernel, near, strict=True)) / sum(kernel))
            expected = torch.stack(blurred, axis)
        torch.testing.assert_close(result[sample], expected.float(), rtol=1e-4, atol=1e-5)


def test_brightness_scales_each_sample():
    x = images((5, 6))
    factor = torch.tensor([0.6, 1.0, 1.4])
    result = augment._brightness(x, factor)
    for sample in range(3):
        assert torch.equal(result[sample], x[sample] * factor[sample])


@pytest.mark.parametrize("spatial", SPATIAL)
def test_contrast_equals_nnunets(spatial):
    x, factor = images(spatial), torch.tensor([0.5, 1.0, 1.5])
    expected = by_nnunet(ContrastTransform((0.5, 1.5), True, False), x, factor)
    result = augment._contrast(x, factor)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    axes = tuple(range(2, x.ndim))
    assert (result.amax(axes) <= x.amax(axes)).all() and (result.amin(axes) >= x.amin(axes)).all()


@pytest.mark.parametrize(("spatial", "kept"), [*((s, 0) for s in SPATIAL), (SPATIAL[1], 1)])
def test_low_resolution_equals_nnunets(spatial, kept):
    x, scale = images(spatial), torch.tensor([0.5, 0.75, 1.0])
    transform = SimulateLowResolutionTransform((0.5, 1), True, True, None)
    result = augment._low_resolution(x, scale, range(2 + kept, x.ndim))
    torch.testing.assert_close(result, by_nnunet(transform, x, scale, kept))
    torch.testing.assert_close(result[2], x[2])


@pytest.mark.parametrize("thick", [False, True])
def test_thick_slices_stay_apart(thick, monkeypatch):
    """What one slice shows changes no other one, or a thin organ would leave its label."""
    mixing = [o for o in augment._OPERATIONS if o[0] in (augment._blur, augment._low_resolution)]
    monkeypatch.setattr(augment, "_OPERATIONS", tuple(mixing))
    x = torch.zeros(8, 1, 5, 12, 10)
    x[:, :, 2] = torch.randn(8, 1, 12, 10)
    changed = strong_intensity(x, ops=(2, 2), thick_slices=thick)
    assert not torch.equal(changed[:, :, 2], x[:, :, 2])
    assert changed[:, :, [0, 1, 3, 4]].any() != thick


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_equals_nnunets(spatial, inverted):
    x, gamma = images(spatial), torch.tensor([0.7, 1.0, 1.5])
    flags = torch.ones(2, dtype=torch.bool)
    expected = by_nnunet(
        GammaTransform((0.7, 1.5), 0, False, 1, 1), x, gamma,
        retain_stats=flags, invert_image=flags & inverted,
    )  # fmt: skip
    result = (augment._inverted_gamma if inverted else augment._gamma)(x, gamma)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    axes = tuple(range(2, x.ndim))
    torch.testing.assert_close(result.mean(axes), x.mean(axes), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.std(axes), x.std(axes), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("x", [torch.zeros(2, 1, 6, 6), torch.full((2, 3, 1, 5, 6), -3.7)])
def test_each_operation_is_finite_on_constant_and_thin_images(name, x):
    options = {"_noise": {"relative": True}}
    options |= {n: {"axes": range(2, x.ndim)} for n in ("_blur", "_low_resolution")}
    for value in (0.0, 0.1) if name == "_noise" else (0.5, 1.5):
        result = getattr(augment, name)(x, torch.full((2,), value), **options.get(name, {}))
        assert result.shape == x.shape and result.isfinite().all()
        if name not in ("_noise", "_brightness"):
            torch.testing.assert_close(result, x)


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strong_intensity_keeps_shape_dtype_and_input(spatial, dtype):
    x = images(spatial, batch=5).to(dtype).requires_grad_()
    before = x.detach().clone()
    torch.manual_seed(1)
    first = strong_intensity(x)
    torch.manual_seed(1)
    assert torch.equal(first, strong_intensity(x))
    assert first.shape == x.shape and first.dtype == dtype and not first.requires_grad
    assert torch.equal(x, before) and first.data_ptr() != x.data_ptr()
    assert (first != x).flatten(1).any(1).all()
    assert not torch.equal(first, strong_intensity(x))


def test_number_choice_and_strength_of_the_operations(monkeypatch):
    calls = []

    def spy(i):
        def operation(x, value):  # adds 10^i, so the sum tells which operations a sample got
            calls.append((i, value))
            return x + 10.0**i

        return operation

    ranges = [(low, high) for _, low, high in augment._OPERATIONS]
    assert ranges == [(0, 0.1), (0.5, 1.5), (0.6, 1.4), (0.5, 1.5), (0.5, 1), (0.5, 2), (0.7, 1.5)]
    spies = tuple((spy(i), *r) for i, r in enumerate(ranges))
    monkeypatch.setattr(augment, "_OPERATIONS", spies)
    x = torch.zeros(3000, 1, 2, 2)
    digits = [f"{int(v):07d}" for v in strong_intensity(x)[:, 0, 0, 0].tolist()]
    assert all(set(d) <= {"0", "1"} for d in digits)
    counts = [d.count("1") for d in digits]
    for k in (1, 2, 3):
        assert counts.count(k) / 3000 == pytest.approx(1 / 3, abs=0.05)
    assert [i for i, _ in calls] == list(range(7))
    for (_, value), (low, high) in zip(calls, ranges, strict=True):
        assert len(value) / 3000 == pytest.approx(2 / 7, abs=0.05)
        assert low <= value.min() and value.max() <= high
        assert value.mean().item() == pytest.approx((low + high) / 2, rel=0.05)
    assert torch.equal(strong_intensity(x, ops=(0, 0)), x)
    with pytest.raises(ValueError, match=r"got \(2, 8\)"):
        strong_intensity(x, ops=(2, 8))


@pytest.mark.parametrize("spatial", SPATIAL)
def test_flips_move_images_and_labels_alike_and_undo_themselves(spatial):
    axes = list(range(len(spatial)))
    x = images(spatial, batch=8)
    labels, mask = (x[:, :1] * 100).long(), x[:, :1] > 1
    flips = random_flips(8, axes)
    assert flips.shape == (8, len(axes)) and flips.any() and not flips.all()
    y = apply_flips(x, flips, axes)
    for sample in range(8):
        chosen = [a + 1 for a in axes if flips[sample, a]]
        assert torch.equal(y[sample], x[sample].flip(chosen))
    assert torch.equal(apply_flips(labels, flips, axes), (y[:, :1] * 100).long())
    assert torch.equal(apply_flips(mask, flips, axes), y[:, :1] > 1)
    assert torch.equal(apply_flips(y, flips, axes), x)


def test_flips_of_some_axes_only():
    x = images((4, 5, 6), batch=2)
    flips = torch.tensor([[True], [False]])
    y = apply_flips(x, flips, axes=[2])
    assert torch.equal(y[0], x[0].flip(-1)) and torch.equal(y[1], x[1])
    assert torch.equal(apply_flips(x, random_flips(2, []), []), x)
    with pytest.raises(ValueError, match="do not fit 2 samples and 2 axes"):
        apply_flips(x, flips, axes=[0, 1])


def test_quarter_turns():
    x = images((7, 7), batch=64)
    k = random_rot90(64)
    assert sorted(set(k.tolist())) == [0, 1, 2, 3]
    y = apply_rot90(x, k)
    for sample in range(64):
        assert torch.equal(y[sample], torch.rot90(x[sample], k[sample].item(), (-2, -1)))
    assert torch.equal(apply_rot90(y, -k), x)
    assert torch.equal(apply_rot90(x > 0, k), y > 0)
    with pytest.raises(ValueError, match="square plane; got 4 x 5"):
        apply_rot90(torch.zeros(1, 1, 4, 5), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="do not fit 64 samples"):
        apply_rot90(x, k[:3])
