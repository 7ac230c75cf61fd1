"""What is C3S3's own."""

import math
from itertools import product

import pytest
import torch
from make_trainers import next_batch, start
from torch.nn.functional import normalize

from nnunet_ssl.errors import UserError
from nnunet_ssl.functional import (
    competition_loss,
    competition_score,
    gather_places,
    iuc_contrast,
    outcome_contrast,
    view_cosine,
)
from nnunet_ssl.trainers import SSLTrainerC3S3 as Trainer

NAME = "SSLTrainerC3S3+contrast_samples=200"
MODULE = __import__(Trainer.__module__, fromlist=["draw_places"])


def modules(trainer):
    return torch.nn.ModuleDict({"network": trainer.network, "companions": trainer.companions})


def gradients(trainer, yields):
    modules(trainer).zero_grad()
    for terms in yields:
        sum(terms.values()).backward()
    named = modules(trainer).named_parameters()
    return {n: p.grad.clone() for n, p in named if p.grad is not None}


def values(yields):
    found: dict[str, float] = {}
    for terms in yields:
        for key, value in terms.items():
            found[key] = found.get(key, 0.0) + value.item()
    return found


@pytest.fixture
def recorded(monkeypatch):
    """Places in the order of drawing; the second view is a fixed function of the first."""
    drawn = []
    original = MODULE.draw_places

    def draw(*args):
        drawn.append(original(*args))
        return drawn[-1]

    monkeypatch.setattr(MODULE, "draw_places", draw)
    monkeypatch.setattr(Trainer, "strong_intensity", lambda self, x, valid: 1.3 * x + 0.1)
    return drawn


@pytest.mark.parametrize("contrast", ["intended", "released"])
def test_step_equals_the_published_objective_in_one_graph(contrast, make_trainer, recorded):
    weight = {"intended": 0.5, "released": 8.0}[contrast]
    settings = f"+contrast={contrast}+contrast_weight={weight}+ce_share=0.8+rampup=0.9"
    trainer = start(make_trainer(NAME + settings, "Toy", "2d"))
    trainer.step = 3
    batch = next_batch(trainer)
    torch.manual_seed(5)
    found = gradients(trainer, trainer.losses(batch))
    del recorded[:]
    torch.manual_seed(5)
    logged = values(trainer.losses(batch))
    assert len(recorded) == 2

    nets = {"student": trainer.student, "peer": trainer.peer}
    loss_of = {"student": 0.0, "peer": 0.0}  # L_A and L_B of the released code
    scores = {}
    streams = (
        ([batch.x_l, 1.3 * batch.x_l + 0.1], batch.valid_l, recorded[0]),
        ([batch.views["stock"], 1.3 * batch.x_u + 0.1], batch.valid_u, recorded[1]),
    )
    sup_of_both = 0.0
    for labeled, (views, valid, places) in zip((True, False), streams, strict=True):
        outputs, embedded = {}, {}
        for name, net in nets.items():
            tapped = [trainer.tap(net, x) for x in views]
            outputs[name] = [t.output for t in tapped]
            head = trainer.companions[f"{name}_projector"]
            embedded[name] = [
                normalize(head(gather_places(t.feature, places)), dim=1) for t in tapped
            ]
            full = [o[0] for o in outputs[name]]
            if labeled:
                sup = sum(trainer.loss(o, batch.y_l) for o in outputs[name]) / 2
                loss_of[name] += sup
                sup_of_both += sup.item()
                scores[name] = sum(competition_score(z, batch.target, valid, 0.8) for z in full)
            loss_of[name] += 0.5 * view_cosine(*full, valid)
        pairs = []
        for i, j in product(range(2), repeat=2):
            z = outputs["student"][i][0], outputs["peer"][j][0]
            function = outcome_contrast if contrast == "intended" else iuc_contrast
            pairs.append(
                function(
                    embedded["student"][i],
                    embedded["peer"][j],
                    *(gather_places(t, places).argmax(1) for t in z),
                    places.counted,
                    3,
                    0.1,
                )
            )
        # the released code adds the sum of pairs to both losses and goes back through both
        for name in nets:
            loss_of[name] += (weight / 8) * sum(pairs) / 2
        if not labeled:
            ramp = 0.1 * math.exp(-5 * (1 - (3 / 8) / 0.9) ** 2)
            wins = scores["student"] < scores["peer"]
            loser = "peer" if wins else "student"
            for a, b in zip(outputs["student"], outputs["peer"], strict=True):
                loss_of[loser] += ramp * competition_loss(a[0], b[0], wins, 0.1, valid)

    total = sum(logged.values())
    assert total == pytest.approx(sum(v.item() for v in loss_of.values()), rel=1e-4)
    assert logged["sup"] == pytest.approx(sup_of_both, rel=1e-4)
    # two backward calls, as released
    modules(trainer).zero_grad()
    loss_of["student"].backward(retain_graph=True)
    loss_of["peer"].backward()
    reference = {n: p.grad for n, p in modules(trainer).named_parameters() if p.grad is not None}
    assert reference.keys() == found.keys()
    for name, grad in reference.items():
        scale = grad.abs().max().item() + 1e-2
        assert torch.allclose(grad, found[name], rtol=1e-3, atol=1e-3 * scale), name


def test_identical_views_have_no_view_loss(make_trainer, monkeypatch):
    trainer = start(make_trainer(NAME))
    batch = next_batch(trainer)
    batch.views["stock"] = batch.x_u
    assert values(trainer.losses(batch))["unsup_view"] > 1e-4
    monkeypatch.setattr(Trainer, "strong_intensity", lambda self, x, valid: x)
    assert values(trainer.losses(batch))["unsup_view"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("student_wins", [True, False])
def test_only_the_loser_learns_from_unlabeled_patches(student_wins, make_trainer, monkeypatch):
    trainer = start(make_trainer(NAME + "+view_weight=0+contrast_weight=0+rampup=0"))
    batch = next_batch(trainer)
    answers = iter([0.0, 0.0, 1.0, 1.0] if student_wins else [1.0, 1.0, 0.0, 0.0])
    monkeypatch.setattr(MODULE, "competition_score", lambda *_: torch.tensor(next(answers)))
    tracked = {}
    monkeypatch.setattr(trainer, "track", lambda name, value: tracked.update({name: value}))
    labeled, unlabeled = [], []
    for terms in trainer.losses(batch):
        (labeled if "sup" in terms else unlabeled).append(terms)
    assert len(labeled) == 2 and all(t["sup"].requires_grad for t in labeled)
    grads = gradients(trainer, unlabeled)
    size = {
        name: sum(g.abs().sum().item() for n, g in grads.items() if n.startswith(f"network.{name}"))
        for name in "ab"
    }
    loser, winner = ("b", "a") if student_wins else ("a", "b")
    assert size[loser] > 0 and size[winner] == 0
    assert tracked["student_wins"].item() == student_wins


def test_swapping_the_networks_swaps_the_winner_and_keeps_the_loss(make_trainer, recorded):
    trainer = start(make_trainer(NAME))
    batch = next_batch(trainer)
    results = []
    for _ in range(2):
        tracked = {}
        trainer.track = lambda name, value, to=tracked: to.update({name: value})
        torch.manual_seed(1)
        results.append((values(trainer.losses(batch)), tracked["student_wins"].item()))
        network, heads = trainer.network, trainer.companions
        network.a, network.b = network.b, network.a
        heads["student_projector"], heads["peer_projector"] = (
            heads["peer_projector"],
            heads["student_projector"],
        )
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert results[0][1] == 1 - results[1][1]


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1 * math.exp(-5)), (2, 0.1), (7, 0.1)])
def test_competition_ramps_up_over_a_quarter_of_training(step, expected, make_trainer):
    trainer = start(make_trainer(NAME))
    tracked = {}
    trainer.track = lambda name, value: tracked.update({name: value})
    trainer.step = step
    values(trainer.losses(next_batch(trainer)))
    assert tracked["weight"] == pytest.approx(expected)


def test_ignored_voxels_do_not_decide_who_wins(make_trainer, monkeypatch):
    trainer = start(make_trainer(NAME, "Ignore"))
    seen = []

    def score(logits, target, counted, share):
        seen.append((target, counted))
        return competition_score(logits, target, counted, share)

    monkeypatch.setattr(MODULE, "competition_score", score)
    values(trainer.losses(next_batch(trainer)))
    assert len(seen) == 4
    for target, counted in seen:
        assert not counted[target == trainer.label_manager.ignore_label].any()


def test_loss_is_finite_where_no_network_finds_foreground(make_trainer):
    trainer = start(make_trainer(NAME))
    with torch.no_grad():
        for network in (trainer.student, trainer.peer):
            network.decoder.seg_layers[-1].bias.copy_(torch.tensor([50.0, 0, 0]))
    found = values(trainer.losses(next_batch(trainer)))
    assert all(math.isfinite(v) for v in found.values())
    assert found["unsup_contrast"] == 0


@pytest.mark.parametrize(
    "setting",
    [
        "competition_weight=-0.1",
        "ce_share=1.5",
        "sharpening=0.0",
        "contrast_temperature=0.001",
        "contrast_samples=1",
    ],
)
def test_settings_out_of_range_are_refused(setting, make_trainer):
    with pytest.raises(UserError, match=setting.split("=")[0]):
        make_trainer("SSLTrainerC3S3+" + setting)
