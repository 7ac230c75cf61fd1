"""Bidirectional copy-paste: what the mixes show, and what their voxels learn."""

import pytest
import torch
from make_trainers import next_batch, start, start_apart
from torch.nn.functional import cross_entropy

FULL = "SSLTrainerBCP+pretrain=0+largest_component=off+enable_deep_supervision=false"


@pytest.fixture
def ready(make_trainer):
    """Return a function that makes a trainer, a batch, and lists of what is shown and counted."""

    def make(settings="", configuration="3d_fullres"):
        trainer = start_apart(make_trainer(FULL + settings, "Toy", configuration))
        batch, shown, kept = next_batch(trainer), [], []
        batch.valid_u[..., :4] = False
        whole = trainer.masked_loss

        def watched(output, target, keep):
            kept.append(keep)
            return whole(output, target, keep)

        trainer.masked_loss = watched
        trainer.student.register_forward_pre_hook(lambda _, args: shown.append(args[0]))
        return trainer, batch, shown, kept

    return make


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_one_box_shows_labeled_patches_inside_or_outside(ready, configuration):
    trainer, batch, shown, kept = ready("+box=0.5", configuration)
    list(trainer.losses(batch))
    true, pseudo = kept
    assert torch.equal(shown[0], torch.where(true, batch.x_l, batch.views["stock"]))
    assert torch.equal(pseudo, ~true & batch.valid_u)
    size = torch.tensor([s // 2 for s in true.shape[2:]]).prod()
    inside = true.flatten(1).sum(1) == size
    assert abs(inside.sum() - len(true) / 2) <= 0.5
    box = true[inside][0] if inside.any() else ~true[0]
    assert box.sum() == size and (box.nonzero()[-1] - box.nonzero()[0])[1:].tolist() == [
        s // 2 - 1 for s in true.shape[2:]
    ]
    for one, is_inside in zip(true, inside, strict=True):
        assert torch.equal(one, box if is_inside else ~box)


@pytest.mark.parametrize("alpha", [0, 1, 2])
def test_voxels_learn_the_annotation_or_the_teachers_label(ready, monkeypatch, alpha):
    trainer, batch, shown, kept = ready(f"+unsup_weight={alpha}")
    monkeypatch.setattr(trainer, "_masked_dice", lambda *_, **__: 0)  # the CE alone
    (terms,) = trainer.losses(batch)
    with torch.no_grad():
        pseudo = trainer.teacher(batch.views["stock"]).argmax(1)
    z = trainer.student(shown[0])
    labels = {"sup": (batch.target[:, 0].long(), 1), "unsup": (pseudo, alpha)}
    for (key, (label, weight)), keep in zip(labels.items(), kept, strict=True):
        ce = cross_entropy(z, label, reduction="none")[keep[:, 0]].mean()
        torch.testing.assert_close(terms[key], weight * ce)


def test_the_first_stage_opens_no_unlabeled_case(make_trainer):
    trainer = start(make_trainer("SSLTrainerBCP+pretrain=0.5"))
    data = next(trainer.dataloader_train)
    assert "unlabeled" not in data
    trainer.train_step(data)
    for a, b in zip(trainer.teacher.parameters(), trainer.student.parameters(), strict=True):
        assert torch.equal(a, b)
