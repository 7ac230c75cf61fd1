import math

import pytest
import torch

from nnunet_ssl.data.batch import Batch
from nnunet_ssl.errors import UserError
from nnunet_ssl.functional import normalized_entropy
from nnunet_ssl.naming import resolve

FULL = "SSLTrainerUAMT+rampup=0+consistency_weight=1+strong_view=false"


@pytest.fixture
def ready(make_trainer):
    """Return a function that makes a trainer and a batch."""

    def make(name=FULL, *args):
        trainer = make_trainer(name, *args)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        return trainer, Batch.from_loader(next(trainer.dataloader_train), trainer.device)

    return make


def test_the_limit_grows_to_let_all_voxels_count(ready):
    trainer, _ = ready()
    assert (
        trainer.limit()
        == pytest.approx(0.75 + 0.25 * math.exp(-5))
        == pytest.approx(0.7517, abs=1e-4)
    )
    trainer.step = trainer.total_steps
    assert trainer.limit() == 1
    uniform = torch.full((1, 3, 2, 2), 1 / 3)
    assert (normalized_entropy(uniform, regions=False) < trainer.limit()).all()


@pytest.mark.parametrize("dataset", ["Channels", "RegionsIgnore"])
def test_the_term_is_the_published_one(ready, monkeypatch, dataset):
    """One pass is the target, T others the entropy; squares are averaged over counted voxels."""
    trainer, batch = ready(FULL + "+passes=3", dataset)
    classes, regions = trainer.num_heads, trainer.regions
    torch.manual_seed(0)
    logits = 2 * torch.randn(4, 2, classes, 16, 32, 32)
    passes = list(logits.sigmoid() if regions else logits.softmax(2))
    left = list(passes)
    monkeypatch.setattr(trainer, "teacher_prob", lambda x: left.pop(0))
    terms = [t for t in trainer.losses(batch)][-1]
    assert not left

    p = trainer.student(batch.x_u)[0]
    p = p.sigmoid() if regions else p.softmax(1)
    mean = sum(passes[1:]) / 3
    limit = trainer.limit()
    if regions:
        entropy = -(mean * mean.log() + (1 - mean) * (1 - mean).log())
        sure = (entropy < limit * math.log(2)) & batch.valid_u
        expected = ((p - passes[0]) ** 2)[sure].mean()
    else:
        entropy = -(mean * mean.log()).sum(1, keepdim=True)
        sure = (entropy < limit * math.log(classes)) & batch.valid_u
        expected = ((p - passes[0]) ** 2 * sure).sum() / (classes * sure.sum())
    assert 0.05 < sure.float().mean() < 0.95
    torch.testing.assert_close(terms["unsup_mse"], expected, rtol=1e-4, atol=1e-6)


def test_no_certain_voxel_gives_zero_and_a_finite_gradient(ready, monkeypatch):
    trainer, batch = ready()
    undecided = torch.full((2, 3, 16, 32, 32), 1 / 3)
    monkeypatch.setattr(trainer, "teacher_prob", lambda x: undecided)
    *_, terms = trainer.losses(batch)
    assert terms["unsup_mse"] == 0
    terms["unsup_mse"].backward()
    grads = [p.grad for p in trainer.student.parameters() if p.grad is not None]
    assert grads and all((g == 0).all() for g in grads)


def test_passes_see_fresh_noise_and_the_student_none(ready, monkeypatch):
    trainer, batch = ready(FULL + "+passes=4")
    seen, clean = [], []
    trainer.teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trainer.student.register_forward_pre_hook(lambda _, args: clean.append(args[0]))
    list(trainer.losses(batch))
    assert len(seen) == 5 and torch.equal(clean[-1], batch.x_u)
    for i, x in enumerate(seen):
        assert 0 < (x - batch.x_u).abs().max() <= 0.2 + 1e-5
        assert all(not torch.equal(x, other) for other in seen[:i])


@pytest.mark.parametrize(("configuration", "axes"), [("2d", 2), ("3d_fullres", 3)])
def test_mirrored_passes_take_each_set_of_allowed_axes_in_turn(ready, configuration, axes):
    trainer, _ = ready(FULL + "+passes_by=mirror", "Toy", configuration)
    sets = [tuple(trainer.mirrored_axes(i)) for i in range(8)]
    assert len(set(sets)) == 2**axes and max(max(s, default=2) for s in sets) == axes + 1
    trainer.inference_allowed_mirroring_axes = (0,)
    assert [trainer.mirrored_axes(i) for i in range(3)] == [[], [2], []]
    trainer.inference_allowed_mirroring_axes = None
    assert trainer.mirrored_axes(7) == []


def test_mirrored_passes_are_mirrored_back_and_spread(ready, monkeypatch):
    trainer, batch = ready(FULL + "+passes_by=mirror+noise_std=0")
    x = batch.x_u

    def by_voxel(image):
        return torch.cat([image, torch.zeros_like(image)], 1).softmax(1)

    monkeypatch.setattr(trainer, "teacher_prob", by_voxel)
    expected = normalized_entropy(by_voxel(x), regions=False)
    torch.testing.assert_close(trainer.uncertainty(x), expected)
    # a network that tells left from right is torn where its mirrored passes disagree
    torn = torch.zeros_like(x)
    torn[..., :16] = 20
    monkeypatch.setattr(trainer, "teacher_prob", lambda image: by_voxel(torn - 10))
    assert (trainer.uncertainty(x) > 0.99).all()


@pytest.mark.parametrize("settings", ["", "+passes=2", "+passes=16", "+consistency_weight=0"])
def test_passes_are_those_of_the_stated_cost(ready, settings):
    trainer, batch = ready(FULL.replace("+consistency_weight=1", "") + settings)
    passes = []
    for network in (trainer.student, trainer.teacher):
        network.register_forward_pre_hook(
            lambda *_: passes.append(3 if torch.is_grad_enabled() else 1)
        )
    list(trainer.losses(batch))
    assert sum(passes) / 3 == pytest.approx(trainer.step_cost)


def test_settings_out_of_range_are_named():
    with pytest.raises(UserError, match="passes=0 must be at least 1"):
        resolve("SSLTrainerUAMT+passes=0")
    with pytest.raises(UserError, match=r"limit_start=2.0 must be in"):
        resolve("SSLTrainerUAMT+limit_start=2")
