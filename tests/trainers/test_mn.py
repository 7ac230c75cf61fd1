"""What is M&N's own."""

import math

import pytest
import timm
import torch
from make_trainers import next_batch, start
from torch import nn
from torch.nn.functional import one_hot

from nnunet_ssl.errors import UserError
from nnunet_ssl.functional import full_res, soft_target_dice_loss, soft_target_kl
from nnunet_ssl.modules import backbones

FULL = "SSLTrainerMN+supervised=0+turn=0+guided=False"  # one of two patches is unlabelled


def without_dropout(trainer):
    for module in trainer.peer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return trainer


@pytest.fixture
def first_rows(monkeypatch):
    """Draw the first patches."""
    monkeypatch.setattr(torch, "randperm", torch.arange)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_step_equals_the_formulas(configuration, make_trainer, first_rows):
    trainer = without_dropout(start(make_trainer(FULL, "Toy", configuration)))
    batch = next_batch(trainer)
    found = {k: v.item() for terms in trainer.losses(batch) for k, v in terms.items()}
    x_l, x_u = batch.x_l[1:], batch.views["stock"][:1]
    y, valid_l, valid_u = [t[1:] for t in batch.y_l], batch.valid_l[1:], batch.valid_u[:1]

    def soft(z, t, mask):
        return soft_target_dice_loss(z, t, mask) + soft_target_kl(z, t, mask)

    with torch.no_grad():
        q_peer, q_student = trainer.peer.eval()(x_u), full_res(trainer.student(x_u))
        truth = one_hot(y[0][:, 0].long(), 3).movedim(-1, 1).float()
        z = trainer.peer.train()(x_l)
        expected = {"sup_peer": soft(z, truth, valid_l) / 2}
        expected["unsup_peer"] = soft(trainer.peer(x_u), q_student.softmax(1), valid_u) / 2
        expected["sup"] = trainer.loss(trainer.student(x_l), y) / 2
        outputs, weights = trainer.student(x_u), trainer.loss.weight_factors
        loss = 0
        for z, w in zip(outputs, weights, strict=True):
            down = [
                nn.functional.interpolate(m.float(), z.shape[2:], mode="nearest-exact")
                for m in (q_peer.softmax(1), valid_u)
            ]
            loss = loss + w * soft(z, down[0], down[1].bool())
        expected["unsup"] = loss / 2
    assert found == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-4)


def test_no_gradient_reaches_the_labelling_network(make_trainer):
    trainer = start(make_trainer(FULL))
    batch = next_batch(trainer)
    for losses, other in (
        (trainer.peer_losses, trainer.student),
        (trainer.student_losses, trainer.peer),
    ):
        trainer.student.zero_grad()
        trainer.peer.zero_grad()
        for terms in losses(batch):
            assert len(terms) == 2
            sum(terms.values()).backward()
        assert all(p.grad is None for p in other.parameters())
        assert all(m.training for m in (*trainer.peer.modules(), *trainer.student.modules()))


@pytest.mark.parametrize("name", ["student", "peer"])
def test_labels_are_soft_fp32_and_without_dropout(name, make_trainer):
    trainer = start(make_trainer(FULL))
    network, x = getattr(trainer, name), next_batch(trainer).x_u
    a, b = trainer.soft_labels(network, x), trainer.soft_labels(network, x)
    assert torch.equal(a, b) and a.dtype == torch.float32 and not a.requires_grad
    assert torch.allclose(a.sum(1), torch.ones_like(a[:, 0]), atol=1e-6)


def test_first_stage_is_the_twin_beside_a_supervised_peer(make_trainer):
    twin = start(make_trainer("SSLTrainerSupervised+ema_decay=None+deploy=student"))
    trainer = start(make_trainer("SSLTrainerMN+supervised=0.75"))
    trainer.student.load_state_dict(twin.student.state_dict())
    peer = [p.detach().clone() for p in trainer.peer.parameters()]
    assert next_batch(trainer).x_u is None
    for _ in range(3):
        batch = next(twin.dataloader_train)
        twin.train_step(dict(batch))
        trainer.train_step(dict(batch))
    pairs = zip(twin.student.parameters(), trainer.student.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(peer, trainer.peer.parameters(), strict=True))


def test_stages_and_turns(make_trainer):
    trainer = make_trainer(
        "SSLTrainerMN+num_epochs=40+num_iterations_per_epoch=50+turn=8", short=False
    )
    assert trainer.first_epochs == 5
    assert not trainer.needs_unlabeled(5 / 40) and trainer.needs_unlabeled(6 / 40)
    taught = []
    for trainer.step in (0, 249, *range(250, 282)):
        taught.append({n for n in ("peer", "student") if trainer.learns(n)})
    assert taught[:2] == [{"peer", "student"}] * 2
    assert taught[2:] == ([{"peer"}] * 8 + [{"student"}] * 8) * 2


def test_learning_rates_start_anew_with_the_second_stage(make_trainer):
    trainer = make_trainer(
        "SSLTrainerMN+num_epochs=40+num_iterations_per_epoch=1+supervised=0.25+seed=1", short=False
    )
    trainer.initialize()
    peer = trainer._phases[0].optimizer
    rates = []
    for trainer.current_epoch in range(40):
        trainer.on_train_epoch_start()
        rates.append((trainer.optimizer.param_groups[0]["lr"], peer.param_groups[0]["lr"]))
    student, peer = zip(*rates, strict=True)
    for e in range(40):
        done = e / 10 if e < 10 else (e - 10) / 30
        assert student[e] == pytest.approx(0.01 * (1 - done) ** 0.9)
        if e > 0:
            done = (e - 1) / 9 if e < 10 else done  # after a warm-up of one epoch
            assert peer[e] == pytest.approx(1e-4 * (1 + math.cos(math.pi * done)) / 2, abs=1e-9)
    assert peer[0] == pytest.approx(1e-6)


def test_share_of_unlabelled_patches_follows_the_learning_rate(make_trainer):
    trainer = make_trainer(
        "SSLTrainerMN+num_epochs=8+num_iterations_per_epoch=10+seed=1", short=False
    )
    torch.manual_seed(0)
    for progress, expected in ((0.0, 0.0), (0.125, 0.0), (0.3, 0.4), (0.5625, 1.0), (0.99, 1.0)):
        trainer.step = round(progress * 80)
        mean = sum(trainer.draw_count(2) for _ in range(600)) / 600
        assert mean == pytest.approx(expected, abs=0.07)


def test_slices_lie_along_the_coarsest_axis(make_trainer):
    trainer = make_trainer(FULL)
    trainer.configuration_manager.configuration["spacing"] = [1.0, 1.0, 4.0]
    trainer.initialize()
    seen = []
    trainer.peer.segmenter.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    assert trainer.peer(torch.randn(2, 1, 16, 32, 24)).shape == (2, 3, 16, 32, 24)
    assert seen == [(48, 1, 16, 32)]


@pytest.mark.parametrize("dataset", ["Ignore", "RegionsIgnore"])
def test_ignored_voxels_and_padding_do_not_teach_the_peer(dataset, make_trainer):
    trainer = start(make_trainer(FULL, dataset))
    batch = next_batch(trainer)
    lesson = trainer.lesson(batch, trainer.student)
    lesson.valid_l[..., :3] = False
    target = lesson.y[0]
    target[..., 5:9] = 0
    if trainer.regions:
        target[..., 5:9] = False
        target[:, -1, ..., 5:9] = True
    else:
        target[..., 5:9] = trainer.label_manager.ignore_label
    prob, counted = trainer.annotations(lesson)
    assert not counted[..., :3].any() and not counted[..., 5:9].any() and counted.any()
    assert prob.shape[1] == trainer.num_heads and set(prob.unique().tolist()) <= {0.0, 1.0}


# ------------------------------------------------------------------ weights


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.delenv(backbones.WEIGHTS_VARIABLE, raising=False)
    monkeypatch.setattr(backbones, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(backbones.urllib.request, "urlopen", refuse)


def test_stops_at_once_without_weights(make_trainer, no_hub):
    trainer = make_trainer("SSLTrainerMN+weights=pretrained")
    with pytest.raises(UserError, match="export NNUNET_SSL_WEIGHTS"):
        trainer.on_train_start()
    assert trainer.dataloader_train is None


def test_pretrained_weights_are_tuned_and_a_resumed_run_needs_them_no_more(
    make_trainer, no_hub, monkeypatch, tmp_path
):
    state = timm.create_model("pvt_v2_b0").state_dict()
    torch.save(state, tmp_path / "pvt_v2_b0.pth")
    monkeypatch.setenv(backbones.WEIGHTS_VARIABLE, str(tmp_path))
    name = FULL + "+weights=pretrained"
    trainer = start(make_trainer(name))
    key = "stages.0.blocks.0.attn.q"
    layer = trainer.peer.segmenter.backbone.encoder.stages_0.blocks[0].attn.q
    assert trainer._phases[0].optimizer.param_groups[0]["initial_lr"] == 1e-3
    trainer.train_step(next(trainer.dataloader_train))
    assert torch.equal(layer.layer.weight, state[f"{key}.weight"])
    assert not torch.equal(layer.layer.bias, state[f"{key}.bias"])
    assert layer.up.weight.abs().sum() > 0
    checkpoint = str(tmp_path / "checkpoint.pth")
    trainer.save_checkpoint(checkpoint)

    monkeypatch.delenv(backbones.WEIGHTS_VARIABLE)
    resumed = make_trainer(name)
    resumed.load_checkpoint(checkpoint)
    resumed.on_train_start()
    a, b = trainer.peer.state_dict(), resumed.peer.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    a, b = (t._phases[0].optimizer.state_dict()["state"] for t in (trainer, resumed))
    assert a and all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])


def test_random_weights_are_told_and_train_the_whole_network(make_trainer):
    trainer = make_trainer("SSLTrainerMN")
    told = []
    trainer.print_to_log_file = lambda *args, **kwargs: told.append(str(args[0]))
    start(trainer)
    assert any("weights=random" in line and "not M&N" in line for line in told)
    assert all(p.requires_grad for p in trainer.peer.segmenter.backbone.parameters())
    assert trainer._phases[0].optimizer.param_groups[0]["initial_lr"] == 1e-4


# ------------------------------------------------------------------ as a whole


def test_both_networks_learn_to_segment(make_trainer):
    short = "+num_epochs=2+num_iterations_per_epoch=60+num_val_iterations_per_epoch=1+seed=1"
    name = "SSLTrainerMN+supervised=0.5+peer_lr=0.001+initial_lr=0.02"
    trainer = start(make_trainer(name + short, "Toy", "2d", short=False))
    batch = next(trainer.dataloader_train)
    held_out = batch["data"] + 0.1 * torch.randn_like(batch["data"])
    target = batch["target"][0]
    for _ in range(60):
        trainer.train_step(batch)
    for network in (trainer.student.eval(), trainer.peer.eval()):
        with torch.no_grad():
            found = full_res(network(held_out)).argmax(1, keepdim=True)
        for k in (1, 2):
            both, size = (found == k) & (target == k), (found == k).sum() + (target == k).sum()
            assert 2 * both.sum() / size > 0.8


def test_the_peer_is_scored_beside_the_student(make_trainer):
    trainer = start(make_trainer("SSLTrainerMN"))
    trainer.on_validation_epoch_start()
    assert not any(m.training for m in trainer.peer.modules())  # no dropout
    result = trainer.validation_step(next(trainer.dataloader_val))
    for name in ("student", "peer"):
        assert result[f"{name}_tp"].shape == (2,)
    assert not trainer.peer.deep_supervision  # until the next validation


@pytest.mark.parametrize(
    "setting",
    ["backbone=pvt_v9", "supervised=1.0", "turn=-1", "peer_lr=0.0", "pixels_at_once=0"],
)
def test_settings_out_of_range_are_refused(setting, make_trainer):
    with pytest.raises(UserError, match=setting.split("=")[-1].split(".")[0]):
        make_trainer("SSLTrainerMN+" + setting)
