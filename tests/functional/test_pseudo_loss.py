import math

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_ssl.functional import deep_supervised, downsample, pseudo_ce_dice
from nnunet_ssl.functional.pseudo_loss import _mean_dice

SPATIAL = [(6, 7), (4, 5, 6)]
SOFTMAX = DC_and_CE_loss(
    {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}, {},
    ignore_label=255, dice_class=MemoryEfficientSoftDiceLoss,
)  # fmt: skip
REGIONS = DC_and_BCE_loss(
    {}, {"batch_dice": True, "do_bg": True, "smooth": 1e-5, "ddp": False}, use_ignore_label=True
)


def case(spatial, regions):
    logits = torch.randn(2, 3, *spatial, requires_grad=True)
    if regions:
        label = torch.rand(2, 3, *spatial) > 0.6
        weight = torch.rand(2, 3, *spatial) > 0.3
    else:
        label = torch.randint(0, 3, (2, 1, *spatial))
        weight = torch.rand(2, 1, *spatial) > 0.3
    pseudo = torch.rand(2, 1, *spatial) > 0.4
    return logits, label, weight & pseudo, pseudo


def naive(logits, label, weight, pseudo, regions, min_voxels):
    z = logits.detach().double().transpose(0, 1).flatten(1)
    channels = z.shape[0]
    y = label.transpose(0, 1).flatten(1).tolist()
    w = weight.transpose(0, 1).flatten(1).float().tolist()
    ce, sums = 0.0, [[0.0, 0.0, 0.0] for _ in range(channels)]
    for i in range(z.shape[1]):
        v = z[:, i].tolist()
        norm = sum(math.exp(a) for a in v)
        for k in range(channels):
            wk = w[k][i] if regions else w[0][i]
            p = 1 / (1 + math.exp(-v[k])) if regions else math.exp(v[k]) / norm
            t = y[k][i] if regions else y[0][i] == k
            if regions:
                ce -= wk * math.log(p if t else 1 - p)
            elif t:
                ce -= wk * math.log(p)
            sums[k][0] += wk * p * t
            sums[k][1] += wk * p
            sums[k][2] += wk * t
    count = pseudo.sum().item() * (channels if regions else 1)
    dice = [
        (2 * both + 1e-5) / (p + t + 1e-5)
        for both, p, t in (sums if regions else sums[1:])
        if t >= min_voxels
    ]
    return ce / max(count, 1) - (sum(dice) / len(dice) if dice else 0)


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("min_voxels", [0, 13, 10**6])
def test_equals_naive_loop(spatial, regions, min_voxels):
    args = case(spatial, regions)
    value = pseudo_ce_dice(*args, regions=regions, min_voxels=min_voxels)
    assert value.item() == pytest.approx(naive(*args, regions, min_voxels), rel=1e-5)


@pytest.mark.parametrize("spatial", SPATIAL)
def test_equals_nnunets_losses_where_the_divisors_agree(spatial):
    logits, label, weight, _ = case(spatial, regions=False)
    for counted in (torch.ones_like(weight), weight):
        ours = pseudo_ce_dice(logits, label, counted, counted, min_voxels=0)
        theirs = SOFTMAX(logits, torch.where(counted, label, 255))
        torch.testing.assert_close(ours, theirs)
        gradients = [torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (ours, theirs)]
        torch.testing.assert_close(*gradients)
    logits, label, _, _ = case(spatial, regions=True)
    everywhere = torch.ones(2, 1, *spatial, dtype=torch.bool)
    ours = pseudo_ce_dice(logits, label, everywhere, everywhere, regions=True, min_voxels=0)
    theirs = REGIONS(logits, torch.cat((label, ~everywhere), 1))
    # nnU-Net divides its masked binary CE by voxels, not by voxels times regions
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, label.float())
    torch.testing.assert_close(ours, theirs - 2 * bce)


@pytest.mark.parametrize("regions", [False, True])
def test_uncounted_voxels_have_no_gradient_and_their_label_is_free(regions):
    logits, label, weight, pseudo = case((6, 7), regions)
    value = pseudo_ce_dice(logits, label, weight, pseudo, regions=regions, min_voxels=1)
    value.backward()
    outside = ~weight.expand_as(logits)
    assert (logits.grad[outside] == 0).all()
    assert (logits.grad[~outside] != 0).all()
    other = torch.where(weight, label, ~label if regions else 255)
    again = pseudo_ce_dice(logits, other, weight, pseudo, regions=regions, min_voxels=1)
    assert again.item() == value.item()
    if not regions:  # padding in nnU-Net's maps is -1
        other = torch.where(weight, label, -1)
        assert pseudo_ce_dice(logits, other, weight, pseudo, min_voxels=1).item() == value.item()


@pytest.mark.parametrize("regions", [False, True])
def test_nothing_counted_gives_zero(regions):
    logits, label, weight, pseudo = case((6, 7), regions)
    for pseudo_voxels in (pseudo, pseudo & False):
        value = pseudo_ce_dice(
            logits, label, weight & False, pseudo_voxels, regions=regions, min_voxels=1
        )
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.item() == 0 and (gradient == 0).all()


def test_low_coverage_is_a_small_cross_entropy():
    logits = torch.zeros(1, 2, 10, 10)
    label = torch.zeros(1, 1, 10, 10, dtype=torch.int64)
    pseudo = torch.ones(1, 1, 10, 10, dtype=torch.bool)
    weight = torch.zeros_like(pseudo)
    weight[..., :2, :] = True
    value = pseudo_ce_dice(logits, label, weight, pseudo, min_voxels=1)
    assert value.item() == pytest.approx(0.2 * math.log(2))


def test_soft_weights_scale_both_terms():
    args = case((6, 7), regions=False)
    weight = args[2] * torch.rand_like(args[2].float())
    value = pseudo_ce_dice(args[0], args[1], weight, args[3], min_voxels=2)
    expected = naive(args[0], args[1], weight, args[3], False, 2)
    assert value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("regions", [False, True])
def test_half_logits_of_any_size_stay_finite(regions):
    logits, label, weight, pseudo = case((4, 5, 6), regions)
    huge = (logits.detach().sign() * 1e4).half().requires_grad_()
    value = pseudo_ce_dice(huge, label, weight, pseudo, regions=regions, min_voxels=1)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite() and huge.grad.isfinite().all()


def test_tiny_class_gets_no_dice_gradient():
    prob = torch.full((1, 2, 10, 10), 0.3, requires_grad=True)
    target = torch.zeros(1, 2, 10, 10, dtype=torch.bool)
    target[:, 0, :5] = True
    target[:, 1, 9, :3] = True
    _mean_dice(prob, target, torch.ones(1, 1, 10, 10), min_voxels=4).backward()
    assert (prob.grad[:, 0] != 0).all() and (prob.grad[:, 1] == 0).all()


def test_pooling_with_true_labels_would_push_a_lost_class_down():
    prob = torch.full((2, 1, 10, 10), 0.3, requires_grad=True)
    target = torch.zeros(2, 1, 10, 10, dtype=torch.bool)
    target[0, 0, :5] = True  # sample 0 is labelled; the teacher misses the class in sample 1
    weight = torch.ones(2, 1, 10, 10)
    (pooled,) = torch.autograd.grad(-_mean_dice(prob, target, weight, 1), prob)
    apart = [-_mean_dice(prob[i : i + 1], target[i : i + 1], weight[:1], 1) for i in range(2)]
    (separate,) = torch.autograd.grad(sum(apart), prob)
    assert pooled[1].sum() > 0.2
    assert separate[1].abs().sum() == 0


def test_shapes_are_checked():
    logits, label, weight, pseudo = case((6, 7), regions=False)
    with pytest.raises(ValueError, match=r"pseudo-label must be \(2, 1, 6, 7\)"):
        pseudo_ce_dice(logits, label[:, 0], weight, pseudo, min_voxels=1)
    with pytest.raises(ValueError, match=r"pseudo-label must be \(2, 3, 6, 7\)"):
        pseudo_ce_dice(logits, label, weight, pseudo, regions=True, min_voxels=1)


def test_deep_supervised_sums_scales_and_skips_weight_zero():
    _, label, weight, pseudo = case((8, 8), regions=False)
    scales = [[1.0, 1.0], [0.5, 0.5], [0.25, 0.25]]
    outputs = [torch.randn(2, 3, n, n, requires_grad=True) for n in (8, 4, 2)]
    targets = [downsample(t, scales) for t in (label, weight, pseudo)]

    def loss(*args):
        return pseudo_ce_dice(*args, min_voxels=1)

    value = deep_supervised(loss, outputs, *targets, weights=[2 / 3, 1 / 3, 0])
    parts = [loss(outputs[i], *(t[i] for t in targets)) for i in range(2)]
    torch.testing.assert_close(value, parts[0] * 2 / 3 + parts[1] / 3)
    value.backward()
    assert outputs[0].grad is not None and outputs[1].grad is not None
    assert outputs[2].grad is None
    with pytest.raises(ValueError, match=r"number of scales: \[3, 3, 3, 3, 2\]"):
        deep_supervised(loss, outputs, *targets, weights=[1, 0])
    with pytest.raises(ValueError, match="weights are 0"):
        deep_supervised(loss, outputs, *targets, weights=[0, 0, 0])


@pytest.mark.parametrize("regions", [False, True])
def test_its_two_terms_can_be_had_alone(regions):
    logits, label, weight, pseudo = case((6, 7), regions)
    settings = {"regions": regions, "min_voxels": 0}
    both = pseudo_ce_dice(logits, label, weight, pseudo, **settings)
    ce = pseudo_ce_dice(logits, label, weight, pseudo, dice_weight=0, **settings)
    dice = pseudo_ce_dice(logits, label, weight, pseudo, ce_weight=0, **settings)
    assert ce > 0 > dice
    torch.testing.assert_close(ce + dice, both)
