"""Expected cross-entropy over augmented features."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from nnunet_ssl.functional import (
    Moments,
    class_shift,
    expected_ce,
    merged_moments,
    region_shift,
    sampled_moments,
)

K, A = 4, 16


def problem(seed=0, groups=(K,), n=6):
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(K, A, generator=g), torch.randn(K, generator=g)
    gap = 0.5 * torch.randn(*groups, A, generator=g)
    root = 0.3 * torch.randn(*groups, A, A, generator=g)
    feature = torch.randn(n, A, generator=g)
    label = torch.arange(n) % K
    return weight, bias, gap, root @ root.transpose(-1, -2), root, feature, label


def as_image(t):
    """(N, C) as one sample of N voxels in a row."""
    return t.T[None, :, None]


def loss_of(weight, bias, feature, label, table, **kwargs):
    logits = as_image(feature @ weight.T + bias)
    label = label[None, None, None] if label.ndim == 1 else as_image(label)
    return expected_ce(
        logits, label, table, torch.ones(1, 1, 1, len(feature), dtype=torch.bool), **kwargs
    )


def test_table_equals_the_correction_of_each_voxel():
    weight, bias, gap, cov, _, feature, label = problem()
    table = class_shift(weight, gap, cov, 0.7)
    losses = []
    for f, y in zip(feature, label.tolist(), strict=True):
        corrected = []
        for k in range(K):
            apart = weight[k] - weight[y]
            shift = 0.7 * apart @ gap[y] + 0.35 * apart @ cov[y] @ apart
            corrected.append(weight[k] @ f + bias[k] + shift)
        losses.append(cross_entropy(torch.stack(corrected)[None], torch.tensor([y])))
    expected = torch.stack(losses).mean()
    assert loss_of(weight, bias, feature, label, table).item() == pytest.approx(expected.item())
    assert torch.equal(table.diagonal(), torch.zeros(K))


def test_no_strength_is_cross_entropy_exactly():
    weight, bias, gap, cov, _, feature, label = problem()
    plain = cross_entropy(feature @ weight.T + bias, label)
    for table in (
        class_shift(weight, gap, cov, 0.0),
        class_shift(weight, torch.zeros_like(gap), torch.zeros_like(cov), 1.0),
    ):
        assert not table.any()
        assert loss_of(weight, bias, feature, label, table).item() == pytest.approx(plain.item())


def test_spread_never_lowers_the_loss_and_shift_is_a_shift_of_the_feature():
    weight, bias, gap, cov, _, feature, label = problem()
    none = torch.zeros_like(gap)
    plain = loss_of(weight, bias, feature, label, torch.zeros(K, K))
    small, large = (class_shift(weight, none, c, 0.5) for c in (cov, cov + 0.1 * torch.eye(A)))
    assert (small >= 0).all() and (large >= small).all()
    losses = [loss_of(weight, bias, feature, label, t) for t in (small, large)]
    assert plain <= losses[0] <= losses[1]

    shifted = loss_of(weight, bias, feature, label, class_shift(weight, gap, 0 * cov, 0.5))
    moved = cross_entropy((feature + 0.5 * gap[label]) @ weight.T + bias, label)
    assert shifted.item() == pytest.approx(moved.item(), abs=1e-5)


def sampled_loss(weight, bias, feature, label, gap, root, strength, regions=False):
    torch.manual_seed(3)
    losses = []
    for f, y in zip(feature, label, strict=True):
        if regions:
            means, roots = gap[range(K), y.long()], root[range(K), y.long()]
            d = strength**0.5 * (torch.randn(8000, K, 1, A) @ roots.transpose(-1, -2))[:, :, 0]
            z = ((f + strength * means + d) * weight).sum(2) + bias
            losses.append(binary_cross_entropy_with_logits(z, y.float().expand_as(z)))
        else:
            d = strength * gap[y] + strength**0.5 * torch.randn(8000, A) @ root[y].T
            losses.append(cross_entropy((f + d) @ weight.T + bias, y.expand(8000)))
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_it_bounds_the_sampled_expectation(strength):
    weight, bias, gap, cov, root, feature, label = problem()
    bound = loss_of(weight, bias, feature, label, class_shift(weight, gap, cov, strength)).item()
    sampled = sampled_loss(weight, bias, feature, label, gap, root, strength)
    assert sampled <= bound + 0.02
    assert sampled > 0.2  # a bound on something


def test_the_bound_is_tight_for_small_strength():
    weight, bias, gap, cov, root, feature, label = problem()
    apart = []
    for strength in (0.1, 0.001):
        table = class_shift(weight, gap, cov, strength)
        sampled = sampled_loss(weight, bias, feature, label, gap, root, strength)
        apart.append(loss_of(weight, bias, feature, label, table).item() - sampled)
    assert apart[1] < 0.03 < apart[0]


def test_common_rows_and_the_order_of_classes_do_not_matter():
    weight, _, gap, cov, *_ = problem()
    table = class_shift(weight, gap, cov, 0.5)
    assert torch.allclose(class_shift(weight + torch.randn(A), gap, cov, 0.5), table, atol=1e-4)
    order = torch.tensor([2, 0, 3, 1])
    permuted = class_shift(weight[order], gap[order], cov[order], 0.5)
    assert torch.allclose(permuted, table[order][:, order], atol=1e-5)


def test_diagonal_covariances():
    weight, _, gap, cov, *_ = problem()
    variance = cov.diagonal(dim1=1, dim2=2)
    full = class_shift(weight, gap, torch.diag_embed(variance), 0.5)
    assert torch.allclose(class_shift(weight, gap, variance, 0.5), full, atol=1e-5)
    gap, cov = gap.view(2, 2, A), cov.view(2, 2, A, A)
    variance = cov.diagonal(dim1=2, dim2=3)
    full = region_shift(weight[:2], gap, torch.diag_embed(variance), 0.5)
    assert torch.allclose(region_shift(weight[:2], gap, variance, 0.5), full, atol=1e-5)


def test_regions_have_the_same_limits():
    weight, bias, gap, cov, root, feature, _ = problem(groups=(K, 2))
    label = torch.rand(len(feature), K, generator=torch.Generator().manual_seed(1)) < 0.5
    logits = feature @ weight.T + bias
    plain = binary_cross_entropy_with_logits(logits, label.float())

    def loss(table):
        return loss_of(weight, bias, feature, label, table, regions=True)

    assert loss(region_shift(weight, gap, cov, 0.0)).item() == pytest.approx(plain.item())
    none = torch.zeros_like(gap)
    losses = [loss(region_shift(weight, none, c, 0.5)) for c in (cov, cov + 0.1 * torch.eye(A))]
    assert plain <= losses[0] <= losses[1]
    means = gap[torch.arange(K), label.long()]
    moved = ((feature[:, None] + 0.5 * means) * weight).sum(2) + bias
    moved = binary_cross_entropy_with_logits(moved, label.float())
    shifted = loss(region_shift(weight, gap, 0 * cov, 0.5))
    assert shifted.item() == pytest.approx(moved.item(), abs=1e-5)
    bound = loss(region_shift(weight, gap, cov, 1.0)).item()
    sampled = sampled_loss(weight, bias, feature, label, gap, root, 1.0, regions=True)
    assert 0.2 < sampled <= bound + 0.02


def test_a_region_is_a_problem_of_two_classes():
    weight, _, gap, cov, *_ = problem()
    two = torch.stack([torch.zeros(A), weight[0]])
    table = class_shift(two, gap[:2], cov[:2], 0.5)
    region = region_shift(weight[:1], gap[None, :2], cov[None, :2], 0.5)[0]
    # the modified logit is z_1 - z_0
    apart = table[:, 1] - table[:, 0]
    assert torch.allclose(region, apart, atol=1e-5)


@pytest.mark.parametrize("regions", [False, True])
def test_only_kept_voxels_count_and_nothing_gives_zero(regions):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    shape = (2, 3, 4, 5) if regions else (2, 1, 4, 5)
    label = torch.randint(0, 2 if regions else 3, shape)
    table = torch.rand(3, 2 if regions else 3)
    keep = torch.rand(2, 1, 4, 5) < 0.5
    loss = expected_ce(logits, label, table, keep, regions=regions)
    loss.backward()
    assert not logits.grad[(~keep).expand_as(logits)].any()
    assert logits.grad[keep.expand_as(logits)].abs().min() > 0
    # labels of other voxels are free, also values that are no class
    other = label if regions else torch.where(keep, label, 255)
    again = expected_ce(logits, other, table, keep, regions=regions)
    assert again.item() == loss.item()
    for balanced in (False, True):
        none = expected_ce(
            logits, label, table, torch.zeros_like(keep), regions=regions, balanced=balanced
        )
        logits.grad = None
        none.backward()
        assert none.item() == 0 and not logits.grad.any()
    huge = expected_ce(logits.half() * 1e4, label, table, keep, regions=regions)
    assert torch.isfinite(huge) and huge.dtype == torch.float32


def test_balanced_is_the_mean_over_classes():
    torch.manual_seed(0)
    logits, table = torch.randn(2, 3, 4, 5), torch.rand(3, 3)
    label = torch.randint(0, 2, (2, 1, 4, 5))  # class 2 is absent
    keep = torch.rand(2, 1, 4, 5) < 0.7
    found = expected_ce(logits, label, table, keep, balanced=True)
    parts = [expected_ce(logits, label, table, keep & (label == k)) for k in (0, 1)]
    assert found.item() == pytest.approx(sum(parts).item() / 2)
    regions = label == torch.arange(3).view(1, 3, 1, 1)
    table = torch.rand(3, 2)
    found = expected_ce(logits, regions, table, keep, regions=True, balanced=True)
    parts = []
    for r in range(3):
        for inside in (False, True):
            part = keep & (regions[:, r : r + 1] == inside)
            if part.any():
                pick = (logits[:, r : r + 1], regions[:, r : r + 1], table[r : r + 1], part)
                parts.append(expected_ce(*pick, regions=True))
    assert found.item() == pytest.approx((sum(parts) / len(parts)).item())


def test_gradient_goes_into_the_classifier_and_not_into_moments():
    weight, bias, gap, cov, _, feature, label = problem()
    weight.requires_grad_(), feature.requires_grad_()
    table = class_shift(weight, gap, cov, 0.5)
    (through_table,) = torch.autograd.grad(table.sum(), weight, retain_graph=True)
    assert through_table.abs().sum() > 0
    loss_of(weight, bias, feature, label, table).backward()
    assert weight.grad.abs().sum() > 0 and feature.grad.abs().sum() > 0


@pytest.mark.parametrize("spatial", [(9, 11), (4, 5, 6)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_moments_of_all_voxels(spatial, diagonal):
    torch.manual_seed(0)
    feature = torch.randn(2, 5, *spatial) + 3
    label = torch.randint(0, 3, (2, 1, *spatial))
    groups = [label == k for k in range(4)]
    found = sampled_moments(feature, groups, 10**6, 2, diagonal)
    for k in range(3):
        x = feature.movedim(1, -1)[label[:, 0] == k]
        cov = torch.cov(x.T, correction=0)
        assert torch.allclose(found.mean[k], x.mean(0), atol=1e-5)
        assert torch.allclose(found.covariance[k], cov.diag() if diagonal else cov, atol=1e-5)
        assert found.number[k] == len(x)
    assert found.number[3] == 0 and torch.isfinite(found.covariance).all()


def test_moments_draw_as_many_as_allowed_and_leave_out_small_groups():
    torch.manual_seed(0)
    feature = torch.arange(1000.0).view(1, 1, 10, 100)
    large, small = feature >= 500, feature >= 990
    runs = [sampled_moments(feature, [large, small], 100, 32) for _ in range(40)]
    assert all(r.number.tolist() == [100, 0] for r in runs)
    means = torch.stack([r.mean[0, 0] for r in runs])
    assert means.min() >= 500 and means.std() > 1
    assert means.mean().item() == pytest.approx(749.5, abs=10)
    half = sampled_moments(feature.half(), [large], 100, 32)
    assert half.mean.dtype == half.covariance.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sampled_moments(feature, [large], 100, 32).covariance.dtype == torch.float32


@pytest.mark.parametrize("diagonal", [False, True])
def test_merging_by_numbers_is_exact(diagonal):
    torch.manual_seed(0)
    x = torch.randn(300, 6) * torch.rand(6) + torch.randn(6)
    mixed = torch.randn(6, 6)
    x = x @ mixed

    def moments(part):
        cov = torch.cov(part.T, correction=0)
        n = torch.tensor([float(len(part))])
        return Moments(part.mean(0)[None], (cov.diag() if diagonal else cov)[None], n)

    known = moments(x[:50])
    for start, stop in ((50, 60), (60, 200), (200, 300)):
        new = moments(x[start:stop])
        known = merged_moments(known, new, new.number / (known.number + new.number))
    expected = moments(x)
    for a, b in zip(known, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
