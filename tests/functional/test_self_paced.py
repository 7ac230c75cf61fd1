import math
from itertools import pairwise

import pytest
import torch

from nnunet_ssl.functional import (
    pace_at,
    pace_bounds,
    pair_losses,
    pair_weights,
    weighted_contrast,
)

TAU = 0.07


@pytest.fixture
def batch():
    """Unit embeddings of 30 slices in 2 views, and the part of the scan of each."""
    torch.manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(60, 16, dtype=torch.float32), dim=1)
    return z, (torch.arange(30) % 3).repeat(2)


def supervised_contrast(z, labels, tau=TAU):
    """Khosla et al. 2020, Eq. 2, in loops."""
    total = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        denominator = sum(torch.exp(z[i] @ z[a] / tau) for a in others)
        positives = [j for j in others if labels[j] == labels[i]]
        terms = [-torch.log(torch.exp(z[i] @ z[j] / tau) / denominator) for j in positives]
        if terms:
            total.append(sum(terms) / len(terms))
    return sum(total) / len(total)


def test_pair_losses_are_those_of_the_loops(batch):
    z, labels = batch[0][:9].double(), batch[1][:9]
    loss, pair, positive = pair_losses(z, labels, 0.5)
    for i in range(9):
        denominator = sum(math.exp(z[i] @ z[a] / 0.5) for a in range(9) if a != i)
        for j in range(9):
            assert pair[i, j] == (i != j)
            assert positive[i, j] == (i != j and labels[i] == labels[j])
            if i != j:
                expected = -math.log(math.exp(z[i] @ z[j] / 0.5) / denominator)
                assert loss[i, j].item() == pytest.approx(expected, rel=1e-5)
    assert (loss.diagonal() == 0).all()


def test_shares_of_a_sample_sum_to_one_and_bound_the_mean(batch):
    loss, pair, positive = pair_losses(*batch, TAU)
    torch.testing.assert_close(((-loss).exp() * pair).sum(1), torch.ones(60))
    count = positive.sum(1)
    assert (((loss * positive).sum(1) / count) >= count.log() - 1e-5).all()
    # reached by parts that lie on one point each, far from the others
    corners = torch.eye(3)[batch[1]]
    loss = pair_losses(corners, batch[1], TAU).loss
    torch.testing.assert_close((loss * positive).sum(1) / count, count.log(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["hard", "linear"])
@pytest.mark.parametrize("gamma", [0.5, 3.0, 40.0])
def test_weights_minimise_loss_and_regularizer(mode, gamma):
    loss = torch.tensor([0.0, 0.1, gamma / 2, gamma, 1.5 * gamma, 10 * gamma])
    weights = pair_weights(loss, gamma, mode)
    grid = torch.linspace(0, 1, 1001)
    penalty = -gamma * grid if mode == "hard" else gamma * (grid**2 / 2 - grid)
    for value, weight in zip(loss, weights, strict=True):
        best = (grid * value + penalty).min()
        own = -gamma * weight if mode == "hard" else gamma * (weight**2 / 2 - weight)
        assert weight * value + own <= best + 1e-6
        assert 0 <= weight <= 1


@pytest.mark.parametrize("mode", ["hard", "linear"])
def test_no_gradient_through_the_weights(batch, mode):
    z, labels = batch[0].clone().requires_grad_(), batch[1]
    pairs = pair_losses(z, labels, TAU)
    weights = pair_weights(pairs.loss, 8.0, mode)
    assert not weights.requires_grad
    gradient = torch.autograd.grad(weighted_contrast(pairs, weights), z, retain_graph=True)[0]
    fixed = weights.clone().requires_grad_()
    expected = torch.autograd.grad(weighted_contrast(pairs, fixed), z)[0]
    assert torch.equal(gradient, expected) and gradient.abs().sum() > 0


@pytest.mark.parametrize("mode", ["hard", "linear"])
def test_a_large_gamma_is_plain_supervised_contrast(batch, mode):
    z, labels = batch[0].clone().requires_grad_(), batch[1]
    pairs = pair_losses(z, labels, TAU)
    loss = weighted_contrast(pairs, pair_weights(pairs.loss, math.inf, mode))
    expected = supervised_contrast(torch.nn.functional.normalize(z, dim=1), labels)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(v, z, retain_graph=True)[0] for v in (loss, expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("mode", ["hard", "linear"])
def test_a_gamma_below_every_loss_teaches_nothing(batch, mode):
    z = batch[0].clone().requires_grad_()
    pairs = pair_losses(z, batch[1], TAU)
    smallest = pairs.loss[pairs.positive].min().item()
    loss = weighted_contrast(pairs, pair_weights(pairs.loss, 0.9 * smallest, mode))
    loss.backward()
    assert loss == 0 and (z.grad == 0).all()


@pytest.mark.parametrize("mode", ["hard", "linear"])
def test_more_pairs_are_admitted_as_gamma_grows(batch, mode):
    pairs = pair_losses(*batch, TAU)
    gammas = torch.linspace(1, 60, 40)
    shares = [
        (pair_weights(pairs.loss, g, mode)[pairs.positive] > 0).float().mean() for g in gammas
    ]
    assert all(a <= b for a, b in pairwise(shares))
    assert shares[0] < 0.1 and shares[-1] == 1


def test_order_and_views_do_not_matter(batch):
    z, labels = batch

    def loss(z, labels):
        pairs = pair_losses(z, labels, TAU)
        return weighted_contrast(pairs, pair_weights(pairs.loss, 9.0, "linear"))

    value = loss(z, labels)
    order = torch.randperm(60)
    torch.testing.assert_close(loss(z[order], labels[order]), value)
    torch.testing.assert_close(loss(z.roll(30, 0), labels.roll(30, 0)), value)
    torch.testing.assert_close(loss(1000 * z, labels), value)
    expected = torch.tensor((1 - math.log(59) / 9) * math.log(59))  # all pairs alike
    torch.testing.assert_close(loss(torch.ones(60, 4), labels), expected)


def test_half_precision_embeddings_and_autocast_change_nothing_inside(batch):
    z, labels = batch
    plain = pair_losses(z, labels, TAU).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = pair_losses(z, labels, TAU).loss
    assert torch.equal(plain, cast)
    far = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [1e4, -1e4]], dtype=torch.float16)
    assert pair_losses(far, torch.zeros(3, dtype=torch.long), TAU).loss.isfinite().all()


def test_samples_that_do_not_count_are_as_if_left_out(batch):
    z, labels = batch
    counted = torch.ones(60, dtype=torch.bool)
    counted[[3, 7, 20, 59]] = False
    some, few = pair_losses(z, labels, TAU, counted), pair_losses(z[counted], labels[counted], TAU)
    torch.testing.assert_close(
        weighted_contrast(some, torch.ones_like(some.loss)),
        weighted_contrast(few, torch.ones_like(few.loss)),
    )
    for a, b in zip(pace_bounds(some, TAU, 1, 1.8), pace_bounds(few, TAU, 1, 1.8), strict=True):
        torch.testing.assert_close(a, b)


def test_unknown_labels_are_negatives_of_all_and_positives_of_none(batch):
    z, labels = batch[0], batch[1].clone()
    labels[::4] = -1
    known, unknown = pair_losses(z, batch[1], TAU), pair_losses(z, labels, TAU)
    assert torch.equal(known.loss, unknown.loss)
    assert not unknown.positive[::4].any() and not unknown.positive[:, ::4].any()
    assert unknown.positive[1, 31]


@pytest.mark.parametrize(
    ("labels", "counted"), [([0, 1, 2], [True] * 3), ([0, 0, 0], [False] * 3), ([-1] * 3, None)]
)
def test_without_a_positive_pair_the_loss_is_zero(labels, counted):
    z = torch.randn(3, 5).requires_grad_()
    counted = None if counted is None else torch.tensor(counted)
    pairs = pair_losses(z, torch.tensor(labels), TAU, counted)
    first, last = pace_bounds(pairs, TAU, 0.5, 1.8)
    assert first == 0.5 and last.isfinite()
    loss = weighted_contrast(pairs, pair_weights(pairs.loss, first, "linear"))
    loss.backward()
    assert loss == 0 and (z.grad == 0).all()


def test_pace_in_units_of_the_batch_is_the_published_one_at_the_published_batch(batch):
    pairs = pair_losses(*batch, TAU)  # 30 slices, 3 parts: 19 positives a sample
    first, last = pace_bounds(pairs, TAU, 0.06, 1.834)
    assert first.item() == pytest.approx(3, abs=0.01) and last.item() == pytest.approx(60, abs=0.2)
    largest = -torch.ones(60, 60)
    largest.fill_diagonal_(0)
    assert pairs.loss.max() < pace_bounds(pairs, TAU, 0, 1)[1]
    first, last = pace_bounds(pairs, TAU, 100, 1.8)
    assert first == last  # never shrinks


def test_pace_ends_where_stated_and_grows():
    steps = [pace_at(e / 80) for e in range(81)]
    assert steps[0] == 0 and steps[20] == 0.5 and steps[80] == 1
    assert all(a < b for a, b in pairwise(steps))
    assert pace_at(0.5, 1.0) == 0.5
    with pytest.raises(ValueError, match=r"above 0; got 0"):
        pace_at(0.5, 0)


def test_shapes_and_temperature_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(3,\)"):
        pair_losses(torch.zeros(4, 2), torch.zeros(3), TAU)
    with pytest.raises(ValueError, match=r"above 0; got 0"):
        pair_losses(torch.zeros(4, 2), torch.zeros(4), 0)
