import math

import pytest
import torch

from nnunet_ssl.functional import (
    Opinion,
    binary_logits,
    dirichlet_logits,
    fisher_evidential_loss,
    fuse_opinions,
    hard_labels,
    opinion,
    to_prob,
    voxel_reliability,
)

SPATIAL = [(6, 5), (3, 4, 5)]
RULES = ("caef", "precursor", "dempster")


def given(belief):
    """Opinions on one voxel each from beliefs (..., K)."""
    belief = torch.tensor(belief, dtype=torch.float64).reshape(-1, len(belief), 1)
    uncertainty = 1 - belief.sum(1, keepdim=True)
    return Opinion(torch.full_like(belief, torch.nan), belief, uncertainty)


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("classes", [2, 3, 14])
def test_opinion_is_a_share_of_belief_and_doubt(classes, spatial):
    logits = torch.randn(2, classes, *spatial) * 10
    alpha, belief, u = opinion(logits)
    e = torch.log1p(logits.double().exp())
    strength = e.sum(1, keepdim=True) + classes
    assert torch.allclose(alpha.double(), e + 1, rtol=1e-5)
    assert torch.allclose(belief.double(), e / strength, rtol=1e-4, atol=1e-7)
    assert torch.allclose(belief.sum(1, keepdim=True) + u, torch.ones_like(u))
    assert (belief >= 0).all() and (u > 0).all() and (u <= 1).all()
    for k in range(classes):
        more = logits.clone()
        more[:, k] = logits[:, k].clamp(min=0) + 3
        assert (opinion(more).uncertainty < u).all()
    assert (opinion(torch.full((1, classes, 1), -1e4)).uncertainty == 1).all()


@pytest.mark.parametrize("activation", ["softplus", "exp"])
def test_large_and_half_precision_logits_stay_finite(activation):
    z = torch.tensor([6e4, -6e4, 0.0]).view(1, 3, 1).half().requires_grad_()
    linked = [dirichlet_logits(z, regions, activation) for regions in (False, True)]
    for values in (*opinion(z, activation), *linked):
        assert values.dtype == torch.float32 and values.isfinite().all()
    alpha = opinion(z, activation).alpha
    assert alpha[0, 0].item() == pytest.approx(1e4 + 1)
    loss = fisher_evidential_loss(alpha, torch.ones(1, 1, 1).long(), 0.05)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("spatial", SPATIAL)
def test_linked_logits_give_the_expected_probability(spatial):
    z = torch.randn(2, 4, *spatial) * 5
    alpha = opinion(z).alpha
    p = to_prob(dirichlet_logits(z, False), False)
    assert torch.allclose(p, alpha / alpha.sum(1, keepdim=True), atol=1e-6)
    rows = opinion(binary_logits(z)).alpha.view(2, 4, 2, *spatial)
    p = to_prob(dirichlet_logits(z, True), True)
    assert torch.allclose(p, rows[:, :, 1] / rows.sum(2), atol=1e-6)
    assert torch.equal(hard_labels(p, True), z > 0)


def test_exp_evidence_is_nearly_exp_and_makes_regions_a_sigmoid():
    z = torch.linspace(-2, 2, 9).view(1, 1, 9)
    assert torch.allclose(opinion(z, "exp").alpha - 1, z.exp(), rtol=0.04)
    assert torch.allclose(dirichlet_logits(z, True, "exp"), z, rtol=0.02)
    large = torch.tensor([[[15.0]]], requires_grad=True)
    (grad,) = torch.autograd.grad(opinion(large, "exp").alpha.sum(), large)
    assert grad.item() > 1
    with pytest.raises(ValueError, match=r"softplus, exp; got 'relu'"):
        opinion(z, "relu")


def test_region_is_a_class_opinion_with_logits_against_and_for():
    z = torch.randn(3, 1, 5, 4) * 3
    as_classes = torch.cat([-z, z], 1)
    for a, b in zip(opinion(binary_logits(z)), opinion(as_classes), strict=True):
        assert torch.equal(a, b)
    two_regions = binary_logits(torch.cat([z, 2 * z], 1)).view(3, 2, 2, 5, 4)
    assert torch.equal(two_regions[:, 0], as_classes)
    assert torch.equal(two_regions[:, 1], 2 * as_classes)


def naive_fusion(b1, u1, b2, u2, g):
    fused = [x * y + g * (x * u2 + y * u1) for x, y in zip(b1, b2, strict=True)]
    total = sum(fused) + u1 * u2
    return [f / total for f in fused], u1 * u2 / total


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("classes", [2, 4])
def test_fusion_equals_the_formula_voxel_by_voxel(rule, classes):
    a, b = (opinion(torch.randn(2, classes, 3, 4) * 3) for _ in range(2))
    g = {"caef": 1 / (classes + 1), "precursor": 1 / classes, "dempster": 1}[rule]
    belief, u = fuse_opinions(a, b, rule)
    for n in range(2):
        for y in range(3):
            for x in range(4):
                at = n, slice(None), y, x
                expected, unknown = naive_fusion(
                    a.belief[at].tolist(),
                    a.uncertainty[at].item(),
                    b.belief[at].tolist(),
                    b.uncertainty[at].item(),
                    g,
                )
                assert belief[at].tolist() == pytest.approx(expected, rel=1e-4)
                assert u[at].item() == pytest.approx(unknown, rel=1e-4)
    assert torch.allclose(belief.sum(1, keepdim=True) + u, torch.ones_like(u))
    for one, other in zip((belief, u), fuse_opinions(b, a, rule), strict=True):
        assert torch.equal(one, other)


def test_vacuous_opinion_is_neutral_for_dempster_only():
    sure, vacuous = given([0.5, 0.2, 0.1]), given([0.0, 0.0, 0.0])
    belief, u = fuse_opinions(sure, vacuous, "dempster")
    assert torch.allclose(belief, sure.belief, atol=1e-15)
    assert torch.allclose(u, sure.uncertainty, atol=1e-15)
    belief, u = fuse_opinions(sure, vacuous, "caef")
    assert belief.argmax() == sure.belief.argmax()
    u1, g = sure.uncertainty, 1 / 4
    assert torch.allclose(u, u1 / (g * (1 - u1) + u1)) and (u >= u1).all()


@pytest.mark.parametrize("rule", RULES)
def test_certain_opinions_agree_or_leave_nothing(rule):
    one, other = given([1.0, 0.0, 0.0]), given([0.0, 1.0, 0.0])
    belief, u = fuse_opinions(one, one, rule)
    assert belief.flatten().tolist() == [1, 0, 0] and u.item() == 0
    belief, u = fuse_opinions(one, other, rule)
    assert belief.flatten().tolist() == [0, 0, 0] and u.item() == 1


def test_damped_cross_terms_leave_more_uncertainty():
    a, b = given([0.4, 0.2, 0.1]), given([0.3, 0.1, 0.3])
    u = {rule: fuse_opinions(a, b, rule)[1].item() for rule in RULES}
    assert u["dempster"] < u["precursor"] < u["caef"]


@pytest.mark.parametrize(("classes", "caef", "dempster"), [(2, 0.587, 0.381), (14, 0.888, 0.413)])
def test_fresh_networks_leave_the_uncertainty_of_the_card(classes, caef, dempster):
    fresh = opinion(torch.zeros(1, classes, 1))
    assert fuse_opinions(fresh, fresh, "caef")[1].item() == pytest.approx(caef, abs=1e-3)
    assert fuse_opinions(fresh, fresh, "dempster")[1].item() == pytest.approx(dempster, abs=1e-3)


def test_unknown_names_are_refused():
    a = given([0.4, 0.2])
    with pytest.raises(ValueError, match=r"caef, dempster, precursor; got 'mean'"):
        fuse_opinions(a, a, "mean")
    with pytest.raises(ValueError, match=r"max, upcol, pignistic; got 'min'"):
        voxel_reliability(a.belief, a.uncertainty, torch.ones(1, 1, 1).bool(), "min")


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("mode", ["max", "upcol", "pignistic"])
def test_reliability_equals_the_formula_and_ignores_what_is_not_valid(mode, spatial):
    logits = (torch.randn(2, 3, *spatial) * 4).requires_grad_()
    belief, u = fuse_opinions(opinion(logits), opinion(logits.flip(1)))
    valid = torch.rand(2, 1, *spatial) < 0.7
    w = voxel_reliability(belief, u, valid, mode)
    assert not w.requires_grad
    assert w.min() >= 0 and w.max() <= 1 and (w[~valid] == 0).all()
    b = belief + u / 3 if mode == "pignistic" else belief
    doubt = (u.exp() * -(b * b.log2()).sum(1, keepdim=True)).detach()
    for sample in range(2):
        inside = valid[sample]
        top = doubt[sample][inside].sum() if mode == "upcol" else doubt[sample][inside].max()
        expected = 1 - doubt[sample][inside] / top
        assert torch.allclose(w[sample][inside], expected, atol=1e-5)
    changed = torch.where(valid, belief, 0.5)
    assert torch.equal(voxel_reliability(changed, u, valid, mode), w)


def test_certain_or_invalid_samples_have_finite_reliability():
    belief = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3)
    u = torch.zeros(1, 1, 3, 3)
    everywhere = torch.ones(1, 1, 3, 3).bool()
    assert (voxel_reliability(belief, u, everywhere) == 1).all()
    assert (voxel_reliability(belief, u, ~everywhere) == 0).all()


def test_pignistic_reliability_falls_with_uncertainty_where_the_printed_formula_does_not():
    u = torch.linspace(0, 1, 50).view(1, 1, 50)
    belief = (1 - u) * torch.tensor([0.4, 0.3, 0.2, 0.1]).view(1, 4, 1)
    valid = torch.ones(1, 1, 50).bool()
    falls = voxel_reliability(belief, u, valid, "pignistic").flatten().diff() <= 1e-6
    assert falls.all()
    assert not (voxel_reliability(belief, u, valid, "max").flatten().diff() <= 1e-6).all()


def test_data_term_is_the_mean_squared_error_of_draws():
    alpha = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64).view(1, 3, 1)
    trigamma = torch.polygamma(1, alpha)
    draws = torch.distributions.Dirichlet(alpha.flatten()).sample((200_000,))
    y = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    expected = ((y - draws) ** 2).mean(0) @ trigamma.flatten()
    found = fisher_evidential_loss(alpha, torch.zeros(1, 1, 1).long(), 0.0)
    assert found.item() == pytest.approx(expected.item(), rel=0.01)
    p = alpha.flatten() / 10
    closed = ((y - p) ** 2 + p * (1 - p) / 11).sum().item()
    assert closed == pytest.approx(1.03636, abs=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 14])
def test_determinant_equals_that_of_the_fisher_matrix(classes):
    alpha = 1 + torch.rand(5, classes, 1, dtype=torch.float64) * 30
    label = torch.zeros(5, 1, 1).long()
    with_det = fisher_evidential_loss(alpha, label, 1.0)
    log_det = fisher_evidential_loss(alpha, label, 0.0) - with_det
    for row, found in zip(alpha, log_det, strict=True):
        a = row.flatten()
        matrix = torch.diag(torch.polygamma(1, a)) - torch.polygamma(1, a.sum())
        assert found.item() == pytest.approx(torch.logdet(matrix).item(), abs=1e-10)


def test_fisher_loss_is_finite_to_the_largest_evidence_and_differentiable():
    for a in (1.0, 10.0, 1e3, 1e4 + 1):
        alpha = torch.full((1, 4, 1), a)
        alpha[:, 0] = 1 + a / 2
        alpha.requires_grad_()
        loss = fisher_evidential_loss(alpha, torch.ones(1, 1, 1).long(), 0.05)
        loss.sum().backward()
        assert loss.isfinite().all() and alpha.grad.isfinite().all()
    alpha = (1 + torch.rand(2, 3, 2, dtype=torch.float64) * 5).requires_grad_()
    label = torch.randint(0, 3, (2, 1, 2))
    assert torch.autograd.gradcheck(lambda x: fisher_evidential_loss(x, label, 0.05), (alpha,))


def test_fisher_loss_pulls_to_the_label_and_holds_evidence_down():
    z = torch.zeros(1, 3, 1, requires_grad=True)
    label = torch.full((1, 1, 1), 2)
    (pull,) = torch.autograd.grad(fisher_evidential_loss(opinion(z).alpha, label, 0.0).sum(), z)
    assert pull[0, 2] < 0 < pull[0, 0]
    alpha = torch.full((1, 3, 1), 4.0, requires_grad=True)
    both = [fisher_evidential_loss(alpha, label, c).sum() for c in (0.0, 1.0)]
    (hold,) = torch.autograd.grad(both[1] - both[0], alpha)
    assert (hold > 0).all()
    assert math.isfinite(both[0].item())
