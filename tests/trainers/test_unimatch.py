import json

import pytest
import torch

from nnunet_ssl.data.batch import Batch
from nnunet_ssl.errors import UserError
from nnunet_ssl.naming import resolve

FULL = "SSLTrainerUniMatch+threshold=0"


@pytest.fixture
def ready(make_trainer):
    """Return a function that makes a trainer and a batch."""

    def make(name=FULL, *args):
        trainer = make_trainer(name, *args)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        return trainer, Batch.from_loader(next(trainer.dataloader_train), trainer.device)

    return make


def collect(trainer, batch):
    return {k: v for terms in trainer.losses(batch) for k, v in terms.items()}


def test_unsure_voxels_teach_nothing(ready):
    trainer, batch = ready("SSLTrainerUniMatch+threshold=1.1")
    for key, value in collect(trainer, batch).items():
        if key == "sup":
            continue
        trainer.student.zero_grad()
        value.backward()
        grads = [p.grad for p in trainer.student.parameters() if p.grad is not None]
        assert value == 0 and grads and all((g == 0).all() for g in grads), key


def test_terms_have_the_published_weights(ready, monkeypatch):
    trainer, batch = ready(FULL + "+unsup_weight=2")
    monkeypatch.setattr(trainer, "pseudo_loss", lambda *_: torch.ones(()))
    terms = collect(trainer, batch)
    assert {k: v.item() for k, v in terms.items() if k != "sup"} == {
        "unsup_features": 1.0,
        "unsup_strong1": 0.5,
        "unsup_strong2": 0.5,
    }


def recorded(trainer, batch, monkeypatch):
    """Return label, mask and valid voxels of each unlabelled term, and what the student saw."""
    targets, inputs = [], []
    monkeypatch.setattr(
        trainer,
        "pseudo_loss",
        lambda output, label, sure, valid, parts: (
            targets.append((label, sure, valid)) or sum(o.sum() for o in output) * 0
        ),
    )
    hook = trainer.student.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    collect(trainer, batch)
    hook.remove()
    return targets, inputs[1:]


@pytest.mark.parametrize("dataset", ["Toy", "RegionsIgnore"])
def test_the_student_labels_the_weak_view_and_feature_dropout_leaves_labels_alone(
    ready, monkeypatch, dataset
):
    trainer, batch = ready("SSLTrainerUniMatch+threshold=0.6+cutmix_probability=0", dataset)
    targets, inputs = recorded(trainer, batch, monkeypatch)
    z = trainer.student(batch.x_u)[0]
    p = z.sigmoid() if trainer.regions else z.softmax(1)
    label = p > 0.5 if trainer.regions else p.argmax(1, keepdim=True)
    sure = (p - 0.5).abs() >= 0.1 if trainer.regions else p.amax(1, keepdim=True) >= 0.6
    for found in targets:
        assert torch.equal(found[0], label)
        assert torch.equal(found[1], sure & batch.valid_u)
    first, second = inputs
    assert not torch.equal(first, second) and first.shape == second.shape == batch.x_u.shape


def test_image_labels_and_masks_get_the_same_boxes(ready, monkeypatch):
    trainer, batch = ready(FULL + "+cutmix_probability=1")
    monkeypatch.setattr(trainer, "strong_intensity", lambda x, valid: x)
    code = (10 * batch.x_u).long()
    valid = batch.x_u > 0
    for _ in range(5):
        image, label, mask = trainer.strong_view(batch.x_u, code, valid)
        assert torch.equal(label, (10 * image).long()) and torch.equal(mask, image > 0)
        changed = (image != batch.x_u).flatten(1).float().mean(1)
        assert (changed > 0).all() and (changed < 0.45).all()


def test_feature_term_without_dropout_is_the_loss_of_the_weak_view(ready):
    trainer, batch = ready(FULL + "+channel_dropout=0")
    found = collect(trainer, batch)["unsup_features"]
    output = trainer.student(batch.x_u)
    label = output[0].argmax(1, keepdim=True)
    expected = trainer.pseudo_loss(output, label, batch.valid_u, batch.valid_u) / 2
    torch.testing.assert_close(found, expected)


def test_feature_dropout_is_drawn_anew(ready):
    trainer, batch = ready()
    values = {collect(trainer, batch)["unsup_features"].item() for _ in range(3)}
    assert len(values) == 3


def test_the_teacher_can_label_and_predict(ready, monkeypatch):
    trainer, batch = ready(FULL + "+labels=teacher+deploy=teacher+ema_decay=auto")
    with torch.no_grad():
        for p in trainer.teacher.parameters():
            p.copy_(torch.randn_like(p))
    targets, _ = recorded(trainer, batch, monkeypatch)
    assert torch.equal(targets[0][0], trainer.teacher(batch.x_u).argmax(1, keepdim=True))
    assert trainer.deployed_network() is trainer.teacher


@pytest.mark.usefixtures("every_cpu_has_bf16")
def test_every_parameter_learns_under_autocast(ready):
    trainer, _ = ready(FULL + "+bf16_on_cpu=true")
    trainer.train_step(next(trainer.dataloader_train))
    for key, parameter in trainer.student.named_parameters():
        coarsest = "seg_layers.0" in key  # of weight 0 in nnU-Net's loss
        assert coarsest or (parameter.grad is not None and parameter.grad.abs().sum() > 0), key


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="labels=teacher must be student"):
        resolve("SSLTrainerUniMatch+labels=teacher")
    with pytest.raises(UserError, match=r"box_low=0.5 must be above 0, up to box_high"):
        resolve("SSLTrainerUniMatch+box_low=0.5")


def planned(nnunet, batch_size):
    base = nnunet / "nnUNet_preprocessed" / "Dataset901_Toy"
    plans = json.loads((base / "nnUNetPlans.json").read_text(encoding="utf-8")) | {
        "continue_training": False
    }
    plans["configurations"]["3d_fullres"]["batch_size"] = batch_size
    return (
        plans,
        "3d_fullres",
        "all",
        json.loads((base / "dataset.json").read_text(encoding="utf-8")),
    )


def test_a_batch_of_one_patch_has_no_boxes_to_take(nnunet):
    with pytest.raises(UserError, match=r"cutmix_probability=0.5 must be 0.*batch is 1 patch"):
        resolve(FULL)(*planned(nnunet, 1))


@pytest.mark.parametrize(("size", "settings"), [(1, "+cutmix_probability=0"), (3, "")])
def test_odd_batches(nnunet, no_plots, size, settings):
    trainer = resolve(FULL + settings)(*planned(nnunet, size), torch.device("cpu"))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    assert trainer.train_step(next(trainer.dataloader_train))["loss"].isfinite()
