"""FixMatch: whose labels count, and where."""

import pytest
import torch
from make_trainers import next_batch, start, start_apart
from torch.nn.functional import cross_entropy

FULL = "SSLTrainerFixMatch+warmup=0"


def term_of(trainer, batch):
    (terms,) = list(trainer.losses(batch))[1:]
    assert terms.keys() == {"unsup"}
    return terms["unsup"]


def test_the_teacher_labels_the_weak_view_and_the_student_learns_the_strong_one(
    make_trainer, monkeypatch
):
    trainer = start_apart(make_trainer(FULL + "+threshold=0.5+unsup_weight=3"))
    batch = next_batch(trainer)
    monkeypatch.setattr(trainer, "strong_intensity", lambda x, valid: 2 * x + 1)
    batch.valid_u[..., :5] = False
    found = term_of(trainer, batch)
    with torch.no_grad():
        prob = trainer.teacher(batch.x_u).softmax(1)
    output = trainer.student(2 * batch.x_u + 1)
    sure = (prob.amax(1, keepdim=True) >= 0.5) & batch.valid_u
    assert 0.05 < sure[batch.valid_u].float().mean() < 0.95
    expected = trainer.pseudo_loss(output, prob.argmax(1, keepdim=True), sure, batch.valid_u)
    torch.testing.assert_close(found, 3 * expected)


def test_without_a_threshold_all_voxels_count(make_trainer, monkeypatch):
    trainer = start_apart(
        make_trainer(FULL + "+threshold=0+unsup_weight=1+enable_deep_supervision=false")
    )
    batch = next_batch(trainer)
    batch.valid_u[:] = True
    monkeypatch.setattr(trainer, "strong_intensity", lambda x, valid: x)
    whole = trainer.pseudo_loss
    monkeypatch.setattr(trainer, "pseudo_loss", lambda *args: whole(*args, "ce"))
    label = trainer.teacher(batch.x_u).argmax(1)
    expected = cross_entropy(trainer.student(batch.x_u), label)
    torch.testing.assert_close(term_of(trainer, batch), expected)


@pytest.mark.parametrize("dataset", ["Toy", "RegionsIgnore"])
def test_unsure_voxels_teach_nothing(make_trainer, dataset):
    trainer = start_apart(make_trainer(FULL + "+threshold=1.1", dataset))
    batch = next_batch(trainer)
    value = term_of(trainer, batch)
    value.backward()
    grads = [p.grad for p in trainer.student.parameters() if p.grad is not None]
    assert value == 0 and grads and all((g == 0).all() for g in grads)


def test_the_first_tenth_is_supervised(make_trainer):
    trainer = start(make_trainer("SSLTrainerFixMatch+warmup=0.5"))
    batch = next(trainer.dataloader_train)
    assert "unlabeled" not in batch
    assert not trainer.needs_unlabeled(0.5) and trainer.needs_unlabeled(0.51)
    assert type(trainer).mro()[1].warmup == 0.1
