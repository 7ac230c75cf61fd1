"""The default: what counts, by how much, and where."""

import sys

import pytest
import torch
from make_trainers import next_batch, start, values

from nnunet_ssl.functional import random_boxes
from nnunet_ssl.trainers import SSLTrainer

OPEN = "SSLTrainer+warmup=0+rampup_end=0+threshold_low=0+threshold_high=0+labeled_mix=0"


def seeded(trainer, batch):
    torch.manual_seed(1)
    return values(trainer.losses(batch))


def test_a_lost_class_fades_the_unlabeled_loss(make_trainer):
    trainer = start(make_trainer(OPEN, configuration="2d"))
    batch, brake = next_batch(trainer), trainer.companions["brake"]
    brake.teacher_count.fill_(10**6), brake.label_count.fill_(10**6)
    brake.label_share.fill_(0.1)

    def unsup(share):
        brake.teacher_share.copy_(torch.tensor([0.1, share]))
        return seeded(trainer, batch)["unsup"]

    full = unsup(0.1)
    assert full != 0 and unsup(0) == 0
    assert unsup(0.01) == pytest.approx(full / 2, rel=1e-4)  # a tenth is left, the floor is 0.2


def test_weights_of_the_unlabeled_loss(make_trainer):
    trainer = start(make_trainer(OPEN, configuration="2d"))
    batch = next_batch(trainer)
    plain = seeded(trainer, batch)
    trainer.unsup_weight = 3.0
    expected = {"sup": plain["sup"], "unsup": 3 * plain["unsup"]}
    assert seeded(trainer, batch) == pytest.approx(expected, rel=1e-4)
    trainer.normalized = True
    expected = {k: v / 4 for k, v in expected.items()}
    assert seeded(trainer, batch) == pytest.approx(expected, rel=1e-4)


def test_settings_reach_thresholds_brake_and_boxes(make_trainer, monkeypatch):
    name = "SSLTrainer+threshold_low=0.3+threshold_high=0.8+threshold_drop=0.4+brake_floor=0.5"
    companions = start(make_trainer(name, configuration="2d")).companions
    thresholds = companions["thresholds"]
    assert (thresholds.low, thresholds.high, thresholds.quantile) == (0.3, 0.8, 0.4)
    assert companions["brake"].floor == 0.5
    name = OPEN + "+exchange_probability=1+box_low=0.2+box_high=0.3"
    trainer = start(make_trainer(name, configuration="2d"))
    seen = []

    def watched(batch, spatial, low, high, **options):
        seen.append((low, high))
        return random_boxes(batch, spatial, low, high, **options)

    monkeypatch.setattr(sys.modules[SSLTrainer.__module__], "random_boxes", watched)
    seeded(trainer, next_batch(trainer))
    assert seen == [(0.2, 0.3)]


def test_exchanged_boxes_show_and_count_each_side_alone(make_trainer, monkeypatch):
    trainer = start(make_trainer(OPEN + "+exchange_probability=1", configuration="2d"))
    batch, shown, true, pseudo = next_batch(trainer), [], [], []
    batch.valid_u[..., :8] = False
    monkeypatch.setattr(
        trainer, "masked_loss", lambda output, target, keep: true.append(keep) or torch.ones(())
    )
    monkeypatch.setattr(
        trainer,
        "pseudo_loss",
        lambda output, label, *counted: pseudo.append(counted) or torch.ones(()),
    )
    trainer.student.register_forward_pre_hook(lambda _, args: shown.append(args[0]))
    assert [values([t]) for t in trainer.losses(batch)] == 2 * [{"sup": 0.5, "unsup": 0.5}]
    assert torch.equal(true[0], ~true[1])
    for image, own, of_pseudo in zip(shown, true, pseudo, strict=True):
        assert torch.equal(image[own], batch.x_l[own])
        assert not torch.equal(image[~own], batch.x_l[~own])
        assert all(p.any() and not (p & own).any() for p in of_pseudo)


def test_padding_of_unlabeled_patches_is_no_pseudo_label(make_trainer):
    trainer = start(make_trainer(OPEN, configuration="2d"))
    batch = next_batch(trainer)
    batch.valid_u[..., :8] = False
    _, counted = trainer.label(batch)
    assert torch.equal(counted, batch.valid_u)  # without thresholds all else counts
    assert trainer._observed["confidences"][0].sum() == batch.valid_u.sum()


def test_masks_are_moved_with_the_strong_view(make_trainer, monkeypatch):
    trainer = start(make_trainer("SSLTrainer", configuration="2d"))
    monkeypatch.setattr(trainer, "strong_intensity", lambda x, valid: x)
    x = torch.rand(8, 1, 32, 32)
    torch.manual_seed(1)
    moved = trainer.strong_view(x, (x * 100).long(), x > 0.3, x > 0.1)
    assert not torch.equal(moved[0], x)
    for found, expected in zip(
        moved[1:], ((moved[0] * 100).long(), moved[0] > 0.3, moved[0] > 0.1), strict=True
    ):
        assert torch.equal(found, expected)
