import math

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from nnunet_ssl.functional import (
    soft_target_dice_loss,
    soft_target_kl,
    squared_dice_loss,
    to_prob,
)

LOSSES = (soft_target_dice_loss, soft_target_kl)
SHAPES = [(2, 3, 4, 5), (2, 3, 3, 4, 5)]


def example(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=generator) * 2
    t = torch.randn(shape, generator=generator) * 2
    mask = torch.rand((shape[0], 1, *shape[2:]), generator=generator) > 0.3
    return z.requires_grad_(), t, mask


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_a_naive_loop(shape, regions):
    z, t, mask = example(shape)
    p, q = to_prob(z.detach(), regions).double(), to_prob(t, regions).double()
    if regions:
        p, q = torch.cat([p, 1 - p], 1), torch.cat([q, 1 - q], 1)
    m = mask.double()
    dice = []
    for k in range(p.shape[1]):
        a, b = p[:, k : k + 1] * m, q[:, k : k + 1] * m
        dice.append((2 * (a * b).sum() / ((a * a).sum() + (b * b).sum())).item())
    kl = 0.0
    for index in mask.nonzero().tolist():
        b, _, *place = index
        kl += sum(
            q[(b, k, *place)].item() * math.log(q[(b, k, *place)] / p[(b, k, *place)])
            for k in range(p.shape[1])
        )
    kl /= mask.sum().item() * (shape[1] if regions else 1)
    target = to_prob(t, regions)
    found = [loss(z, target, mask, regions).item() for loss in LOSSES]
    assert found == pytest.approx([1 - sum(dice) / len(dice), kl], rel=1e-4)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_agreement_costs_nothing_and_pulls_nowhere(loss, regions):
    z, _, mask = example(SHAPES[0])
    value = loss(z, to_prob(z, regions), mask, regions)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert z.grad.abs().max() < 1e-6


def test_dice_is_symmetric():
    z, t, mask = example(SHAPES[1])
    there = soft_target_dice_loss(z, t.softmax(1), mask)
    back = soft_target_dice_loss(t, z.softmax(1), mask)
    assert there.item() == pytest.approx(back.item(), abs=1e-6)


def test_hard_targets_give_the_hard_losses():
    z, t, mask = example(SHAPES[0])
    label = t.argmax(1, keepdim=True)
    hard = one_hot(label[:, 0], 3).movedim(-1, 1).float()
    assert torch.allclose(soft_target_dice_loss(z, hard, mask), squared_dice_loss(z, label, mask))
    ce = cross_entropy(z, label[:, 0], reduction="none")[:, None][mask].mean()
    assert torch.allclose(soft_target_kl(z, hard, mask), ce)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_uncounted_voxels_and_targets_get_no_gradient(loss, regions):
    z, t, mask = example(SHAPES[0])
    t.requires_grad_()
    loss(z, to_prob(t, regions), mask, regions).backward()
    assert t.grad is None
    where = mask.expand_as(z)
    assert (z.grad[~where] == 0).all() and (z.grad[where] != 0).any()


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_empty_mask_and_extreme_logits_stay_finite(loss, regions):
    z, t, mask = example(SHAPES[0])
    empty = loss(z, to_prob(t, regions), torch.zeros_like(mask), regions)
    assert empty.item() == 0
    extreme = (z.detach().sign() * 1e4).half().requires_grad_()
    value = loss(extreme, to_prob(-extreme.detach(), regions), mask, regions)
    value.backward()
    assert value.isfinite() and extreme.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_shapes_that_do_not_fit_are_refused(loss):
    z, _, mask = example(SHAPES[0])
    with pytest.raises(ValueError, match="mask"):
        loss(z, z, mask.expand_as(z))
