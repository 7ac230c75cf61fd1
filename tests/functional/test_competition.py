import pytest
import torch

from nnunet_ssl.functional import competition_loss, competition_score, view_cosine

SPATIAL = [(6, 5), (3, 4, 5)]
YES, NO = torch.tensor(True), torch.tensor(False)


def everywhere(t):
    return torch.ones_like(t[:, :1]).bool()


@pytest.mark.parametrize("spatial", SPATIAL)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_score_equals_the_formula_over_counted_voxels(share, spatial):
    logits = torch.randn(2, 4, *spatial)
    target = torch.randint(0, 3, (2, 1, *spatial))  # class 3 is absent
    counted = torch.rand(2, 1, *spatial) < 0.8
    p = logits.double().softmax(1)
    ce, n = 0.0, 0
    sums = {k: [0.0, 0.0, 0.0] for k in range(1, 4)}
    for at in counted.nonzero().tolist():
        b, where = at[0], tuple(at[2:])
        k = target[(b, 0, *where)].item()
        ce, n = ce - p[(b, k, *where)].log().item(), n + 1
        for c in range(1, 4):
            pc = p[(b, c, *where)].item()
            sums[c][0] += pc * (k == c)
            sums[c][1] += pc
            sums[c][2] += k == c
    dice = [2 * i / (q + t) for i, q, t in (sums[1], sums[2])]
    expected = share * ce / n + (1 - share) * (1 - sum(dice) / 2)
    found = competition_score(logits, target, counted, share)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    target[~counted] = 255
    assert torch.equal(competition_score(logits, target, counted, share), found)


def test_without_foreground_cross_entropy_alone_decides():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    target = torch.zeros(1, 1, 4, 4)
    score = competition_score(logits, target, everywhere(logits), 0.5)
    assert score.item() == pytest.approx(-0.5 * logits.log_softmax(1)[:, 0].mean().item(), rel=1e-5)
    assert not score.requires_grad
    assert competition_score(logits, target, ~everywhere(logits), 0.5).item() == 0


@pytest.mark.parametrize("spatial", SPATIAL)
def test_loser_follows_the_sharpened_winner_who_gets_no_gradient(spatial):
    a, b = (torch.randn(2, 3, *spatial, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 1, *spatial) < 0.7
    loss = competition_loss(a, b, YES, 0.1, mask)
    p = a.detach().double().softmax(1) ** 10
    q = p / p.sum(1, keepdim=True)
    squared = (b.double().softmax(1) - q) ** 2
    assert loss.item() == pytest.approx(squared.mean(1, keepdim=True)[mask].mean().item(), rel=1e-4)
    loss.backward()
    assert (a.grad == 0).all()
    assert (b.grad != 0).any() and (b.grad[~mask.expand_as(b)] == 0).all()
    assert torch.equal(competition_loss(b, a, NO, 0.1, mask), loss)


def test_sharpening_keeps_the_decision_and_lowers_entropy():
    a, b = torch.randn(2, 1, 4, 8, 8)

    def target(temperature):  # from the loss: its gradient's only dependence on the winner
        return (a / temperature).softmax(0 if a.ndim == 3 else 1)

    def loss(temperature):
        return competition_loss(a[None], b[None], YES, temperature, torch.ones(1, 1, 8, 8).bool())

    a, b = a[0], b[0]
    for temperature in (0.1, 1.0):
        expected = ((b.softmax(0) - target(temperature)) ** 2).mean()
        assert loss(temperature).item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(target(0.1).argmax(0), a.argmax(0))
    entropy = [-torch.xlogy(target(t), target(t)).sum(0) for t in (0.1, 1.0)]
    assert (entropy[0] <= entropy[1]).all()


def test_half_precision_logits_stay_finite():
    a = torch.tensor([1e4, -1e4, 0.0]).view(1, 3, 1, 1).half().requires_grad_()
    b = (-a).detach().requires_grad_()
    loss = competition_loss(a, b, NO, 0.1, everywhere(a)) + view_cosine(a, b, everywhere(a))
    assert loss.isfinite() and loss.dtype == torch.float32
    loss.backward()
    assert a.grad.isfinite().all() and b.grad.isfinite().all()


@pytest.mark.parametrize("spatial", SPATIAL)
def test_cosine_is_over_classes_and_zero_for_identical_views(spatial):
    a, b = (torch.randn(2, 3, *spatial, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 1, *spatial) < 0.6
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    expected = (1 - cosine)[mask[:, 0]].mean()
    assert view_cosine(a, b, mask).item() == pytest.approx(expected.item(), rel=1e-5)
    assert view_cosine(a, a, mask).item() == pytest.approx(0, abs=1e-6)
    assert view_cosine(a, 3 * a, mask).item() == pytest.approx(0, abs=1e-6)
    view_cosine(a, b, mask).backward()
    for t in (a, b):
        assert (t.grad != 0).any() and (t.grad[~mask.expand_as(t)] == 0).all()
    assert view_cosine(a, b, torch.zeros_like(mask)).item() == 0
