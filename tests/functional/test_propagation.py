import math

import pytest
import torch
from torch.nn.functional import normalize

from nnunet_ssl.functional import draw_per_class, propagation_loss

SHARES = {"temperature": 0.1, "similar": 0.3, "dissimilar": 0.3}


def clusters(per_class=40, classes=3, size=8, spread=0.05):
    """Features around one direction a class, and the directions."""
    torch.manual_seed(0)
    directions = torch.eye(size)[:classes]
    x = directions.repeat_interleave(per_class, 0)
    return x + spread * torch.randn(x.shape), directions


def naive(x, prototypes, known, counted, temperature, similar, dissimilar):
    s = normalize(x, dim=1) @ prototypes.T
    voxels = [v for v in range(len(x)) if counted[v]]
    classes = [c for c in range(len(prototypes)) if known[c]]
    own = {v: max(classes, key=lambda c: s[v, c].item()) for v in voxels}
    losses = []
    for c in classes:
        mine = sorted((v for v in voxels if own[v] == c), key=lambda v: -s[v, c].item())
        positive = mine[: math.ceil(similar * len(mine))]
        least = sorted(voxels, key=lambda v: s[v, c].item())
        negative = [v for v in least[: math.ceil(dissimilar * len(voxels))] if v not in positive]
        if not positive:
            continue
        terms = []
        for v in positive:
            pull = (s[v, c] / temperature).exp()
            push = sum((s[w, c] / temperature).exp() for w in negative)
            terms.append(-(pull / (pull + push)).log())
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("known", [[True] * 4, [True, False, True, True]])
def test_equals_the_naive_loop_with_its_gradient(known):
    torch.manual_seed(1)
    x = torch.randn(50, 6, dtype=torch.float32, requires_grad=True)
    prototypes = normalize(torch.randn(4, 6), dim=1).requires_grad_()
    counted = torch.rand(50) > 0.2
    settings = {"temperature": 0.2, "similar": 0.25, "dissimilar": 0.5}
    loss = propagation_loss(x, prototypes, torch.tensor(known), counted, **settings)
    expected = naive(x, prototypes.detach(), known, counted, **settings)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    (found,) = torch.autograd.grad(loss, x, retain_graph=True)
    (reference,) = torch.autograd.grad(expected, x)
    assert torch.allclose(found, reference, atol=1e-5)
    assert (found[~counted] == 0).all()
    assert torch.autograd.grad(loss, prototypes, allow_unused=True) == (None,)


def test_small_for_separate_clusters_large_for_mixed_ones():
    x, directions = clusters()
    known, counted = torch.ones(3).bool(), torch.ones(len(x)).bool()
    apart = propagation_loss(x, directions, known, counted, **SHARES)
    assert apart < 0.01
    # features that lie between the classes
    blurred = x + 2 * directions.mean(0)
    assert propagation_loss(blurred, directions, known, counted, **SHARES) > 10 * apart
    # features of which half have crossed over: pulling those that are left still separates
    swapped = torch.where((torch.arange(len(x)) % 2 == 0)[:, None], x, x.roll(40, 0) + x)
    assert propagation_loss(swapped, directions, known, counted, **SHARES) > apart


def test_wrong_prototypes_cost_more_than_right_ones():
    x, directions = clusters()
    known, counted = torch.ones(3).bool(), torch.ones(len(x)).bool()
    right = propagation_loss(x, directions, known, counted, **SHARES)
    between = normalize(directions + directions.roll(1, 0) + directions.roll(2, 0) * 0.9, dim=1)
    assert propagation_loss(x, between, known, counted, **SHARES) > right + 0.5


def test_length_of_features_does_not_count():
    x, directions = clusters(spread=0.5)
    known, counted = torch.ones(3).bool(), torch.ones(len(x)).bool()
    scale = torch.rand(len(x), 1) * 20 + 0.1
    a, b = (propagation_loss(t, directions, known, counted, **SHARES) for t in (x, x * scale))
    assert a.item() == pytest.approx(b.item(), rel=1e-4)


def test_a_step_separates_what_was_close():
    torch.manual_seed(2)
    x = torch.randn(120, 8, requires_grad=True)
    directions = torch.eye(8)[:2]
    known, counted = torch.ones(2).bool(), torch.ones(120).bool()
    optimizer = torch.optim.Adam([x], 0.05)
    losses = []
    for _ in range(60):
        loss = propagation_loss(x, directions, known, counted, **SHARES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("case", ["none counted", "none known", "one known", "one voxel"])
def test_nothing_to_tell_apart_is_zero_with_zero_gradient(case):
    x = torch.randn(20, 4, requires_grad=True)
    known, counted = torch.ones(3).bool(), torch.ones(20).bool()
    if case == "none counted":
        counted[:] = False
    elif case == "one voxel":
        counted[1:] = False  # a positive of its class without negatives
    else:
        known[int(case == "one known") :] = False
    loss = propagation_loss(x, torch.eye(4)[:3], known, counted, **SHARES)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()
    assert loss == 0 and (x.grad == 0).all()


@pytest.mark.parametrize("shape", [(9, 11), (4, 5, 6)])
def test_draws_come_from_their_class_and_are_not_repeated(shape):
    torch.manual_seed(0)
    label = torch.randint(0, 3, (2, 1, *shape))
    label[label == 2] = 1
    label[0, 0].view(-1)[:4] = 2  # a class of four voxels
    keep = torch.rand(2, 1, *shape) > 0.3
    keep[0, 0].view(-1)[:4] = True
    places = draw_per_class(label, keep, 4, 7)
    index = places.sample * label[0].numel() + places.voxel
    for k, (drawn, found) in enumerate(
        zip(index.view(4, 7), places.counted.view(4, 7), strict=True)
    ):
        assert found.sum() == (7, 7, 4, 0)[k]
        drawn = drawn[found]
        assert len(set(drawn.tolist())) == len(drawn)
        assert (label.flatten()[drawn] == k).all() and keep.flatten()[drawn].all()


def test_all_voxels_of_a_class_can_be_drawn():
    torch.manual_seed(0)
    label, keep = torch.zeros(1, 1, 3, 3).long(), torch.ones(1, 1, 3, 3).bool()
    counts = torch.zeros(9)
    for _ in range(300):
        places = draw_per_class(label, keep, 2, 3)
        assert places.counted.tolist() == [True] * 3 + [False] * 3
        counts[places.voxel[:3]] += 1
    assert (counts > 60).all() and (counts < 140).all()
    assert len(draw_per_class(label, keep, 2, 100).voxel) == 18
