"""Mean Teacher: its term, who makes the target, and the ramp."""

import math

import pytest
import torch
from make_trainers import next_batch, start_apart

from nnunet_ssl.errors import UserError

PLAIN = "SSLTrainerMeanTeacher+rampup=0+strong_view=false"


def term_of(trainer, batch):
    (terms,) = list(trainer.losses(batch))[1:]
    assert terms.keys() == {"unsup_mse"}
    return terms["unsup_mse"]


@pytest.mark.parametrize("dataset", ["Channels", "RegionsIgnore"])
def test_the_students_probabilities_follow_those_of_the_noisy_teacher(make_trainer, dataset):
    trainer = start_apart(make_trainer(PLAIN, dataset))
    batch = next_batch(trainer)
    batch.valid_u[..., :5] = False
    seen = []
    trainer.teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = term_of(trainer, batch)
    (noisy,) = seen
    noise = noisy - batch.x_u
    assert 0.19 < noise.abs().max() <= 0.2 + 1e-5 and noise.std() == pytest.approx(0.1, rel=0.2)
    sides = torch.sigmoid if trainer.regions else (lambda z: z.softmax(1))
    with torch.no_grad():
        target = sides(trainer.teacher(noisy))
    squared = (sides(trainer.student(batch.x_u)[0]) - target) ** 2
    expected = squared.mean(1)[batch.valid_u[:, 0]].mean()
    assert expected > 1e-3
    torch.testing.assert_close(found, 0.2 * expected, rtol=1e-4, atol=1e-7)


def test_equal_networks_on_equal_views_agree(make_trainer):
    trainer = start_apart(make_trainer(PLAIN + "+noise_std=0"))
    batch = next_batch(trainer)
    assert term_of(trainer, batch) > 1e-4
    trainer.teacher.load_state_dict(trainer.student.state_dict())
    assert term_of(trainer, batch) < 1e-10


def test_only_the_student_sees_the_strong_view_and_learns(make_trainer, monkeypatch):
    trainer = start_apart(make_trainer("SSLTrainerMeanTeacher+rampup=0+noise_std=0"))
    batch = next_batch(trainer)
    monkeypatch.setattr(trainer, "strong_intensity", lambda x, valid: 2 * x + 1)
    inputs = {}
    for name in ("student", "teacher"):
        getattr(trainer, name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.update({name: args[0]})
        )
    term_of(trainer, batch).backward()
    assert torch.equal(inputs["teacher"], batch.x_u)
    assert torch.equal(inputs["student"], 2 * batch.x_u + 1)
    assert all(p.grad is None for p in trainer.teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in trainer.student.parameters())


def test_the_weight_ramps_up_over_training(make_trainer):
    trainer = start_apart(make_trainer(PLAIN.replace("rampup=0", "rampup=1") + "+noise_std=0"))
    batch = next_batch(trainer)
    values = []
    for step in (0, 4, 8):  # of 8
        trainer.step = step
        values.append(term_of(trainer, batch).item())
    assert values[1] == pytest.approx(values[2] * math.exp(-5 / 4), rel=1e-4)
    assert values[0] == pytest.approx(values[2] * math.exp(-5), rel=1e-4)


@pytest.mark.parametrize("setting", ["consistency_weight=-1", "rampup=-1", "noise_std=-1"])
def test_settings_out_of_range_are_refused(setting, make_trainer):
    with pytest.raises(UserError, match=setting.split("=")[0]):
        make_trainer("SSLTrainerMeanTeacher+" + setting)
