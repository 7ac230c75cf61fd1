"""What the base gives all methods: losses, update, scores, log."""

import copy
from pathlib import Path

import pytest
import torch
from make_trainers import next_batch, start
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl import base


def test_masked_loss_is_divided_by_the_voxels_kept(make_trainer, monkeypatch):
    trainer = start(make_trainer("SSLTrainer+enable_deep_supervision=false", configuration="2d"))
    monkeypatch.setattr(trainer, "_masked_dice", lambda *a, **k: 0)
    batch = next_batch(trainer)
    output = trainer.student(batch.x_l)
    keep = torch.rand(batch.valid_l.shape) < 0.3
    ce = torch.nn.functional.cross_entropy(output, batch.target[:, 0].long(), reduction="none")
    found = trainer.masked_loss(output, batch.target, keep)
    assert found.item() == pytest.approx(ce[keep[:, 0]].mean().item(), rel=1e-5)


def test_the_strong_view_keeps_masked_channels_0_outside(make_trainer, monkeypatch):
    trainer = make_trainer("SSLTrainer", "Channels", "2d")
    configuration = trainer.configuration_manager.configuration
    monkeypatch.setitem(configuration, "use_mask_for_norm", [True, False])
    monkeypatch.setattr(base, "strong_intensity", lambda x, **_: x + 1)
    valid = torch.rand(2, 1, 8, 8) < 0.5
    strong = trainer.strong_intensity(torch.zeros(2, 2, 8, 8), valid)
    assert torch.equal(strong[:, :1], valid.float()) and (strong[:, 1] == 1).all()


def test_gradients_are_clipped_as_nnunets(make_trainer):
    trainer = start(make_trainer("SSLTrainerSupervised", configuration="2d"))
    trainer._phases[0].losses = lambda batch: iter(
        [{"sup": 1e4 * trainer.loss(trainer.student(batch.x_l), batch.y_l)}]
    )
    trainer.train_step(next(trainer.dataloader_train))
    norms = [p.grad.norm() for p in trainer.student.parameters() if p.grad is not None]
    assert torch.stack(norms).norm().item() == pytest.approx(12, rel=1e-3)


def test_the_optimizer_of_several_networks_is_nnunets(make_trainer):
    trainer = start(make_trainer("SSLTrainerCAD+weight_decay=0.1+initial_lr=0.02", "Toy", "2d"))
    (group,) = trainer.optimizer.param_groups
    found = [group[k] for k in ("weight_decay", "initial_lr", "momentum", "nesterov")]
    assert found == [0.1, 0.02, 0.99, True]
    trained = [p for m in (trainer.student, trainer.peer) for p in m.parameters()]
    assert {id(p) for p in trained} == {id(p) for p in group["params"]}


@pytest.mark.parametrize("dataset", ["Toy", "Ignore"])
def test_each_network_is_scored_as_nnunet_scores_it(dataset, make_trainer):
    trainer = start(make_trainer("SSLTrainerFixMatch", dataset, "2d"))
    with torch.no_grad():
        for layer in trainer.teacher.decoder.seg_layers:
            layer.bias[1] += 100  # foreground everywhere, where annotations are ignored, too
        batch = next(trainer.dataloader_val)
        pristine = copy.deepcopy(batch)  # nnU-Net writes into targets with an ignore label
        trainer.on_validation_epoch_start()
        found = trainer.validation_step(batch)
        trainer.on_validation_epoch_end([found])
        for name in ("student", "teacher"):
            with trainer._in_place_of_student(getattr(trainer, name)):
                counts = nnUNetTrainer.validation_step(trainer, copy.deepcopy(pristine))
            tp, fp, fn = (counts[f"{c}_hard"] for c in ("tp", "fp", "fn"))
            assert (found[f"{name}_tp"] == tp).all() and (found[f"{name}_fp"] == fp).all()
            assert trainer._pseudo_dice[name] == pytest.approx(
                (2 * tp / (2 * tp + fp + fn)).tolist(), nan_ok=True
            )
            if name == trainer.deploy:
                assert (found["tp_hard"] == tp).all()


def test_logged_shares_leave_padding_out(make_trainer):
    trainer = start(make_trainer("SSLTrainerFixMatch", configuration="2d"))
    logits, label = torch.randn(2, 3, 8, 8), torch.randint(3, (2, 1, 8, 8))
    valid, counted = torch.rand(2, 1, 8, 8) < 0.5, torch.rand(2, 1, 8, 8) < 0.5
    prob, trainer._meter = logits.softmax(1), base.Meter()
    trainer.track_pseudo_labels(prob, counted, valid)
    trainer.track_agreement(logits, label, counted)
    agreed = prob.argmax(1, keepdim=True) == label
    expected = {
        "coverage": counted[valid].float().mean(),
        "confidence": prob.amax(1, keepdim=True)[valid].mean(),
        "agreement": agreed[counted].float().mean(),
    }
    found = trainer._meter.means()
    for name, value in expected.items():
        assert found[f"pseudo_labels/{name}"] == pytest.approx(value.item(), rel=1e-5)


def test_weights_are_kept_at_the_end_of_the_epoch_that_reaches_the_fraction(
    make_trainer, monkeypatch
):
    trainer = make_trainer("SSLTrainerSupervised+keep_at=0.5,0.7")  # of 4 epochs
    kept, save = [], base.checkpoints.save_checkpoint

    def watched(state, path):
        if "_at_" in Path(path).name:
            kept.append((trainer.current_epoch + 1, Path(path).name))
        save(state, path)

    monkeypatch.setattr(base.checkpoints, "save_checkpoint", watched)
    trainer.run_training()
    assert kept == [(2, "checkpoint_at_50.pth"), (3, "checkpoint_at_70.pth")]
