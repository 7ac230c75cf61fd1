"""Mirror images at the axis of an ellipse."""

import math

import pytest
import torch

from nnunet_ssl.functional import (
    ellipse_distance,
    half_mirrored,
    mirror_at,
    mirror_mse,
    mirrored_image,
    perturbed,
    reflect,
    sample_mse,
)

from .test_ellipses import HEAD, SHAPE, ellipses_of

UPRIGHT = ((45.0, 60.0), 34.0, 22.0, 0.0)  # the long axis is a column
TILTED = HEAD


def head_of(ellipse):
    return ellipse_distance(ellipses_of(ellipse), SHAPE) <= 1


def dice(a, b):
    return (2 * (a & b).sum() / (a.sum() + b.sum())).item()


def test_reflection_at_a_column():
    mirror = mirror_at(ellipses_of(UPRIGHT), SHAPE)
    x = torch.rand(1, 2, *SHAPE)
    found = reflect(x, mirror)
    assert torch.equal(found[..., 1:], x[..., 1:].flip(-1))  # column 60 is the middle of 1..119
    assert mirror.inside[..., 1:].all() and not mirror.inside[..., 0].any()
    assert torch.equal(found[..., 60], x[..., 60])


def test_twice_is_the_identity_but_for_one_pixel():
    mirror = mirror_at(ellipses_of(TILTED), SHAPE)
    place = torch.stack(torch.meshgrid(*map(torch.arange, SHAPE), indexing="ij"))[None].float()
    twice = reflect(reflect(place, mirror), mirror)
    inside = mirror.inside & (reflect(mirror.inside, mirror))
    moved = (twice - place).abs().amax(1, keepdim=True)[inside]
    assert moved.max() <= 1 and (moved == 0).float().mean() > 0.5
    axis = ellipse_distance(ellipses_of((TILTED[0], 1e6, 1.0, TILTED[3])), SHAPE) < 0.04
    still = (reflect(place, mirror) - place).abs().amax(1, keepdim=True)[axis]
    assert len(still) > 20 and still.max() <= 1


@pytest.mark.parametrize("ellipse", [UPRIGHT, TILTED])
def test_a_symmetric_mask_is_its_own_mirror_image(ellipse):
    mirror, mask = mirror_at(ellipses_of(ellipse), SHAPE), head_of(ellipse)
    assert dice(reflect(mask, mirror), mask) > 0.98
    for side in ("left", "right"):
        assert dice(half_mirrored(mask, mirror, side), mask) > 0.97
    # at its short axis, too, but a mark on one side moves across the long one only
    mark = torch.zeros(1, 1, *SHAPE, dtype=torch.bool)
    cos, sin = math.cos(ellipse[3]), math.sin(ellipse[3])
    at = [
        round(c) for c in (ellipse[0][0] - 10 * sin + 12 * cos, ellipse[0][1] + 10 * cos + 12 * sin)
    ]
    to = [
        round(c) for c in (ellipse[0][0] + 10 * sin + 12 * cos, ellipse[0][1] - 10 * cos + 12 * sin)
    ]
    mark[0, 0, at[0] - 1 : at[0] + 2, at[1] - 1 : at[1] + 2] = True
    assert reflect(mark, mirror)[0, 0, to[0], to[1]]


def test_samples_have_their_own_axes():
    both = ellipses_of(UPRIGHT, TILTED)
    mirror = mirror_at(both, SHAPE)
    x = torch.rand(2, 3, *SHAPE)
    for i, ellipse in enumerate((UPRIGHT, TILTED)):
        alone = mirror_at(ellipses_of(ellipse), SHAPE)
        assert torch.equal(reflect(x, mirror)[i], reflect(x[i : i + 1], alone)[0])
        for a, b in zip(mirror.rows(slice(i, i + 1)), alone, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("perturb", [False, True])
def test_images_change_inside_the_head_only(side, perturb):
    torch.manual_seed(0)
    mirror, head = mirror_at(ellipses_of(TILTED), SHAPE), head_of(TILTED)
    x = torch.randn(1, 2, *SHAPE) * 3 - 100  # 0 is no background
    before = x.clone()
    found = mirrored_image(x, head, torch.ones_like(head), mirror, side, perturb)
    assert torch.equal(x, before)
    outside = (~head).expand_as(x)
    assert torch.equal(found[outside], x[outside])
    stays = mirror.left if side == "left" else ~mirror.left
    if not perturb:
        assert torch.equal(found[(head & stays).expand_as(x)], x[(head & stays).expand_as(x)])
        other = (head & ~stays & mirror.inside).expand_as(x)
        assert torch.equal(found[other], reflect(x, mirror)[other])
        assert not torch.equal(found[other], x[other])


def test_pixels_whose_mirror_image_is_outside_stay():
    near = ((45.0, 100.0), 34.0, 22.0, 0.0)
    mirror, head = mirror_at(ellipses_of(near), SHAPE), torch.ones(1, 1, *SHAPE, dtype=torch.bool)
    x = torch.rand(1, 1, *SHAPE)
    side = "right" if mirror.left[0, 0, 0, 0] else "left"
    found = mirrored_image(x, head, head, mirror, side, perturb=False)
    assert torch.equal(found[..., :81], x[..., :81]) and not mirror.inside[..., :81].any()


def test_padding_is_not_painted_into_the_head():
    mirror, head = mirror_at(ellipses_of(UPRIGHT), SHAPE), head_of(UPRIGHT)
    x, valid = torch.rand(1, 1, *SHAPE) + 1, torch.ones(1, 1, *SHAPE, dtype=torch.bool)
    known = (torch.arange(SHAPE[1]) < UPRIGHT[0][1] + 10).expand_as(valid)
    x[~known] = 0
    for side in ("left", "right"):
        found = mirrored_image(x, head & known, valid & known, mirror, side, perturb=False)
        assert (found[known] >= 1).all()
        assert not torch.equal(found, x)


def test_each_half_has_its_own_intensities(monkeypatch):
    import nnunet_ssl.functional.symmetry as symmetry

    mirror, head = mirror_at(ellipses_of(UPRIGHT), SHAPE), head_of(UPRIGHT)
    drawn = []

    def shifted(x, part):
        drawn.append(part)
        return x + len(drawn)

    monkeypatch.setattr(symmetry, "perturbed", shifted)
    x = torch.zeros(1, 1, *SHAPE)
    found = mirrored_image(x, head, torch.ones_like(head), mirror, "left", True)
    own, other = drawn
    assert torch.equal(own | other, head) and not (own & other).any()
    assert (found[own] == 1).all() and (found[other] == 2).all() and not found[~head].any()


def test_perturbations_are_within_the_range_of_the_image(monkeypatch):
    torch.manual_seed(0)
    part = torch.zeros(64, 1, 16, 16, dtype=torch.bool)
    part[..., 4:12, 4:12] = True
    part[0] = False
    x = torch.rand(64, 2, 16, 16) * 40 - 500
    found = perturbed(x, part)
    assert torch.isfinite(found).all() and found.dtype == x.dtype
    apart = (found - x).abs().amax((1, 2, 3))
    same = (apart == 0).float().mean().item()
    assert same == pytest.approx(0.8**4, abs=0.2)
    assert apart.max() < 0.1 * 40 + 0.3 * 40 + 40
    scaled = []
    for factor in (1, 7):
        torch.manual_seed(1)
        scaled.append(perturbed(x * factor, part) / factor)
    assert torch.allclose(*scaled, atol=1e-2)
    assert perturbed(x.half(), part).dtype == torch.float16


def test_losses_equal_their_definition():
    torch.manual_seed(0)
    mirror = mirror_at(ellipses_of(UPRIGHT, TILTED), SHAPE)
    t, other = torch.rand(2, 1, *SHAPE), torch.rand(2, 1, *SHAPE)
    counted = torch.rand(2, 1, *SHAPE) < 0.7
    for i in (0, 1):
        mean = ((t - other) ** 2)[i][counted[i]].mean().item()
        assert sample_mse(t, other, counted)[i].item() == pytest.approx(mean, rel=1e-4)
        distance = (t - reflect(t, mirror)) ** 2
        expected = distance[i][(counted & mirror.left)[i]].sum() / counted[i].sum()
        assert mirror_mse(t, mirror, counted)[i].item() == pytest.approx(expected.item(), rel=1e-4)
    none = torch.zeros_like(counted)
    assert not sample_mse(t, other, none).any() and not mirror_mse(t, mirror, none).any()


def test_a_symmetric_prediction_has_no_mirror_loss_and_both_sides_learn():
    mirror = mirror_at(ellipses_of(UPRIGHT), SHAPE)
    everywhere = mirror.inside
    t = torch.rand(1, 1, *SHAPE)
    even = half_mirrored(t, mirror, "left")
    assert mirror_mse(even, mirror, everywhere).item() < 1e-12
    t.requires_grad_()
    mirror_mse(t, mirror, everywhere).sum().backward()
    for side in (mirror.left, ~mirror.left):
        assert t.grad[side & everywhere].abs().sum() > 0
    assert not t.grad[..., 0].any()  # has no mirror image
    whole, half = torch.rand(2, 1, 1, *SHAPE).requires_grad_().unbind(0)
    grads = torch.autograd.grad(
        sample_mse(half, half_mirrored(whole, mirror, "left"), everywhere).sum(), (whole, half)
    )
    assert all(g.abs().sum() > 0 for g in grads)
    grads[0][..., 60] = 0  # the axis
    assert not grads[0][~mirror.left].any()  # the other half is not in the target
