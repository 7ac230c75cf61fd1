import math

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from nnunet_ssl.functional import draw_places, gather_places, iuc_contrast, outcome_contrast

SPATIAL = [(20, 15), (6, 10, 8)]
TAU = 0.1


def labels(spatial, classes=3, agreement=0.7, samples=2):
    a = torch.randint(0, classes, (samples, 1, *spatial))
    b = torch.where(torch.rand(a.shape) < agreement, a, torch.randint(0, classes, a.shape))
    return a, b


def everywhere(label):
    return torch.ones_like(label).bool()


def drawn(n=60, classes=2, embedding=8, seed=0):
    """Embeddings and decisions of n voxels."""
    torch.manual_seed(seed)
    a, b = (normalize(torch.randn(n, embedding), dim=1) for _ in range(2))
    la = torch.randint(0, classes, (n,))
    lb = torch.where(torch.rand(n) < 0.7, la, torch.randint(0, classes, (n,)))
    return a, b, la, lb, torch.rand(n) < 0.9


@pytest.mark.parametrize("by_outcome", [True, False])
@pytest.mark.parametrize("spatial", SPATIAL)
def test_places_are_different_valid_voxels(by_outcome, spatial):
    a, b = labels(spatial)
    valid = torch.rand(a.shape) < 0.5
    places = draw_places(a, b, valid, 3, 100, by_outcome)
    assert all(len(t) == 100 for t in places) and places.counted.all()
    assert len(set(zip(places.sample.tolist(), places.voxel.tolist(), strict=True))) == 100
    assert valid.flatten(1)[places.sample, places.voxel].all()
    few = torch.zeros_like(valid)
    few.flatten()[:7] = True
    places = draw_places(a, b, few, 3, 100, by_outcome)
    assert places.counted.sum() == 7
    assert few.flatten(1)[places.sample, places.voxel][places.counted].all()
    everything = draw_places(a, b, valid, 3, 10**6, by_outcome)
    assert everything.counted.sum() == valid.sum()


def test_rare_outcomes_are_drawn_as_often_as_common_ones():
    a = torch.zeros(1, 1, 100, 100, dtype=torch.int64)
    a[..., :10, :20] = 1  # 200 of 10000
    b = a.clone()
    b[..., :10, 20:23] = 1  # 30 more: only b says 1
    places = draw_places(a, b, everywhere(a), 2, 90)
    la, lb = (t.flatten()[places.voxel] for t in (a, b))
    agreed, one = ((la == 1) & (lb == 1)).sum(), (la != lb).sum()
    assert 15 <= one <= 30 and 20 <= agreed <= 45
    alike = draw_places(a, b, everywhere(a), 2, 90, by_outcome=False)
    assert a.flatten()[alike.voxel].sum() < 10


@pytest.mark.parametrize("spatial", SPATIAL)
def test_gathered_projection_equals_the_dense_one(spatial):
    conv = nn.Conv2d if len(spatial) == 2 else nn.Conv3d
    linear, dense = nn.Linear(4, 6), conv(4, 6, 1)
    with torch.no_grad():
        dense.weight.copy_(linear.weight.view_as(dense.weight))
        dense.bias.copy_(linear.bias)
    f = torch.randn(2, 4, *spatial, requires_grad=True)
    a, b = labels(spatial)
    places = draw_places(a, b, everywhere(a), 3, 50)
    sparse, whole = linear(gather_places(f, places)), gather_places(dense(f), places)
    assert torch.allclose(sparse, whole, atol=1e-6)
    grads = [torch.autograd.grad(t.square().sum(), f)[0] for t in (sparse, whole)]
    assert torch.allclose(*grads, atol=1e-5)


def naive_outcome(a, b, la, lb, counted, classes):
    def one_order(x, y):
        total, present = 0.0, 0
        quota = max(sum(counted) / (2 * classes - 1), 1)
        for k in range(1, classes):
            both = [p for p in range(len(la)) if counted[p] and la[p] == k == lb[p]]
            either = [p for p in range(len(la)) if counted[p] and k in (la[p], lb[p])]
            if not both:
                continue
            present += 1
            rest = [p for p in range(len(la)) if counted[p] and p not in set(both)]
            out = [p for p in range(len(la)) if counted[p] and p not in set(either)]
            for anchors, negatives in ((both, rest), (out, either)):
                terms = []
                for p in anchors:
                    own = math.exp(float(x[p] @ y[p]) / TAU)
                    other = sum(math.exp(float(x[p] @ y[q]) / TAU) for q in negatives)
                    terms.append(-math.log(own / (own + other)))
                total += min(len(both) / quota, 1) * sum(terms) / max(len(terms), 1)
        return total / max(present, 1)

    return (one_order(a, b) + one_order(b, a)) / 2


@pytest.mark.parametrize("classes", [2, 4])
def test_outcome_contrast_equals_naive_loops(classes):
    a, b, la, lb, counted = drawn(40, classes)
    found = outcome_contrast(a, b, la, lb, counted, classes, TAU)
    expected = naive_outcome(
        a.double(), b.double(), la.tolist(), lb.tolist(), counted.tolist(), classes
    )
    assert found.item() == pytest.approx(expected, rel=1e-4)
    order = torch.randperm(40)
    mixed = [t[order] for t in (a, b, la, lb, counted)]
    assert outcome_contrast(*mixed, classes, TAU).item() == pytest.approx(found.item(), rel=1e-5)
    swapped = outcome_contrast(b, a, lb, la, counted, classes, TAU)
    assert swapped.item() == pytest.approx(found.item(), rel=1e-5)


def test_few_agreed_voxels_weigh_in_gently():
    """The gradient grows with the voxels that the networks agree on, and does not jump to all."""
    torch.manual_seed(0)
    a, b = (normalize(torch.randn(300, 8), dim=1) for _ in range(2))
    a.requires_grad_()
    la = torch.zeros(300).long()
    norms = []
    for agreed in (0, 1, 10, 100):
        la[:agreed] = 1
        value = outcome_contrast(a, b, la, la, torch.ones(300).bool(), 2, TAU)
        norms.append(torch.autograd.grad(value, a)[0].norm().item())
    assert norms[0] == 0 < norms[1] < norms[2] < norms[3]
    assert norms[1] < norms[3] / 5


def test_outcome_contrast_pulls_agreement_together_and_pushes_the_rest_away():
    _, _, la, lb, counted = drawn()
    torch.manual_seed(0)
    free = [torch.randn(60, 8, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.Adam(free, 0.05)
    for _ in range(80):
        optimizer.zero_grad()
        a, b = (normalize(t, dim=1) for t in free)
        outcome_contrast(a, b, la, lb, counted, 2, TAU).backward()
        optimizer.step()
    cosine = (a * b).sum(1).detach()[counted]
    agreed, foreground = (la == lb)[counted], (la == 1)[counted]
    assert cosine[agreed & foreground].mean() > 0.9
    assert cosine[agreed & ~foreground].mean() > 0.9
    across = (a @ b.T).detach()[counted][:, counted]
    assert across[agreed & foreground][:, agreed & ~foreground].mean() < 0.2


def test_perfect_embeddings_cost_nearly_nothing():
    la = torch.tensor([0, 0, 1, 1])
    e = torch.eye(2)[la]
    everything = torch.ones(4).bool()
    assert outcome_contrast(e, e, la, la, everything, 2, TAU).item() < 1e-3
    worse = e.flip(1)
    assert outcome_contrast(e, worse, la, la, everything, 2, TAU).item() > 5


@pytest.mark.parametrize("loss", [outcome_contrast, iuc_contrast])
@pytest.mark.parametrize("case", ["background", "nothing agreed", "all foreground", "uncounted"])
def test_empty_outcomes_give_finite_loss_and_gradient(loss, case):
    a, b, la, lb, counted = drawn(20, 3)
    a.requires_grad_()
    if case == "background":
        la, lb = torch.zeros_like(la), torch.zeros_like(lb)
    elif case == "nothing agreed":
        la, lb = torch.ones_like(la), torch.full_like(lb, 2)
    elif case == "all foreground":
        la, lb = torch.ones_like(la), torch.ones_like(lb)
    else:
        counted = torch.zeros_like(counted)
    value = loss(a, b, la, lb, counted, 3, TAU)
    value.backward()
    assert value.isfinite() and a.grad.isfinite().all()
    if case == "uncounted" or (
        case in ("background", "nothing agreed") and loss is outcome_contrast
    ):
        assert value.item() == 0 and (a.grad == 0).all()


@pytest.mark.parametrize("loss", [outcome_contrast, iuc_contrast])
def test_uncounted_places_have_no_influence(loss):
    a, b, la, lb, counted = drawn(50, 3)
    a.requires_grad_()
    value = loss(a, b, la, lb, counted, 3, TAU)
    value.backward()
    assert (a.grad[~counted] == 0).all() and (a.grad[counted] != 0).any()
    kept = loss(*(t[counted] for t in (a, b, la, lb, counted)), 3, TAU)
    assert kept.item() == pytest.approx(value.item(), rel=1e-5)


def naive_released(a, b, la, lb, foreground):
    s = (a * b).sum(1).double() / TAU
    inner = torch.tensor([x == foreground == y for x, y in zip(la, lb, strict=True)]).double()
    outer = torch.tensor([foreground in (x, y) for x, y in zip(la, lb, strict=True)]).double()
    l1 = -((inner * s).exp() / (((1 - inner) * s).exp().sum() + (inner * s).exp())).log()
    one = (1 - outer) * s
    l2 = -(one.exp() / ((outer * s).exp().sum() + one.exp())).log()
    return l1.mean() + l2.mean()


def test_released_contrast_equals_its_formula():
    a, b, la, lb, _ = drawn(200)
    everything = torch.ones(200).bool()
    found = iuc_contrast(a, b, la, lb, everything, 2, TAU)
    expected = naive_released(a, b, la.tolist(), lb.tolist(), 1)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    a, b, la, lb, _ = drawn(200, 3)
    found = iuc_contrast(a, b, la, lb, everything, 3, TAU)
    expected = sum(naive_released(a, b, la.tolist(), lb.tolist(), k) for k in (1, 2)) / 2
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    la, lb = (torch.where(label == 2, 0, label) for label in (la, lb))  # class 2 is never found
    for classes in (2, 3):
        found = iuc_contrast(a, b, la, lb, everything, classes, TAU)
        terms = [naive_released(a, b, la.tolist(), lb.tolist(), k) for k in range(1, classes)]
        assert found.item() == pytest.approx((sum(terms) / len(terms)).item(), rel=1e-5)


def test_released_contrast_of_orthogonal_embeddings_is_its_constant():
    a, b = torch.tensor([[1.0, 0]]).repeat(50, 1), torch.tensor([[0.0, 1]]).repeat(50, 1)
    la = torch.randint(0, 2, (50,))
    found = iuc_contrast(a, b, la, la.flip(0), torch.ones(50).bool(), 2, TAU)
    assert found.item() == pytest.approx(2 * math.log(51), rel=1e-6)


def test_released_contrast_is_finite_for_millions_of_voxels():
    n = 4_000_000
    la = (torch.arange(n) % 7 == 0).long()
    a = torch.ones(1, 1).expand(n, 1)
    assert iuc_contrast(a, a, la, la.roll(1), torch.ones(n).bool(), 2, TAU).isfinite()
