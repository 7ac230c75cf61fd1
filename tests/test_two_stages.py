"""Pre-training and the training after it, as commands; the trainings themselves are faked."""

from pathlib import Path

import pytest
import torch

from nnunet_ssl import cli, estimate, two_stages
from nnunet_ssl.doctor import trainer_path
from nnunet_ssl.errors import UserError
from nnunet_ssl.naming import VARIABLE
from nnunet_ssl.two_stages import pretraining_of, train_in_two_stages

FIRST, SECOND = "SSLTrainerSPCLPretrain+num_epochs=2", "SSLTrainerSPCL+seed=1"


@pytest.fixture
def ran(nnunet, monkeypatch):
    """The commands that would have run; each leaves its final checkpoint."""
    commands = []

    def run(command, log, environment, on_epoch):
        assert environment[VARIABLE] == trainer_path()
        commands.append(command)
        for _ in range(2):
            on_epoch()
        (log.parent / two_stages.FINAL).touch()

    monkeypatch.setattr(two_stages, "run_command", run)
    return commands


def train(resume=False, **options):
    names = {"first": FIRST, "second": SECOND, "plans": "nnUNetPlans", "device": "cpu"} | options
    train_in_two_stages("901", "2d", "all", **names, resume=resume)


def folder_of(trainer, tmp_path):
    return tmp_path / f"results/Dataset901_Toy/{trainer}__nnUNetPlans__2d/fold_all"


def test_the_second_stage_starts_from_the_weights_of_the_first(ran, tmp_path, capsys):
    train()
    start = ["nnUNetv2_train", "901", "2d", "all", "-tr"]
    end = ["-p", "nnUNetPlans", "-device", "cpu"]
    weights = str(folder_of(FIRST, tmp_path) / "checkpoint_final.pth")
    assert ran == [
        [*start, FIRST, *end],
        [*start, SECOND, *end, "-pretrained_weights", weights],
    ]
    out = capsys.readouterr().out
    assert f"$ nnUNetv2_train 901 2d all -tr {FIRST}" in out and "2/2" in out
    train()
    assert ran[2:] == ran[:2]  # without --c all is run anew


def test_going_on_where_it_was(ran, tmp_path):
    first, second = (folder_of(name, tmp_path) for name in (FIRST, SECOND))
    first.mkdir(parents=True)
    (first / "checkpoint_latest.pth").touch()
    train(resume=True)
    assert [c[5] for c in ran] == [FIRST, SECOND]
    assert ran[0][-1] == "--c" and "-pretrained_weights" in ran[1]

    ran.clear()  # the first is finished; nnU-Net cannot continue and load weights at once
    (second / "checkpoint_final.pth").unlink()
    (second / "checkpoint_latest.pth").touch()
    train(resume=True)
    assert [c[5] for c in ran] == [SECOND]
    assert ran[0][-1] == "--c" and "-pretrained_weights" not in ran[0]


def test_any_trainer_with_one_network_may_follow(ran):
    train(second="SSLTrainer")
    assert [c[5] for c in ran] == [FIRST, "SSLTrainer"]
    ran.clear()
    with pytest.raises(UserError, match="SSLTrainerMEDL does not train one network"):
        train(second="SSLTrainerMEDL")
    with pytest.raises(UserError, match="No trainer 'SSLTrainerNone'"):
        train(first="SSLTrainerNone")
    assert not ran


@pytest.mark.parametrize(
    ("trainer", "first"),
    [
        ("SSLTrainerSPCL", "SSLTrainerSPCLPretrain"),
        (
            "SSLTrainerSPCL+seed=3+contrast_weight=1+meta_labels=phase,partition+initial_lr=0.1",
            "SSLTrainerSPCLPretrain+seed=3+meta_labels=phase,partition",
        ),
        ("SSLTrainerSPCL+ema_decay=0.9+num_epochs=7", "SSLTrainerSPCLPretrain+num_epochs=7"),
        ("SSLTrainer", None),
    ],
)
def test_settings_that_both_stages_know_are_shared(trainer, first):
    assert pretraining_of(trainer) == first


def test_unknown_data_set(ran):
    with pytest.raises(UserError, match="777"):
        train_in_two_stages(
            "777", "2d", "all", first=FIRST, second=SECOND, plans="nnUNetPlans", device="cpu"
        )


def test_the_command(ran, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        estimate,
        "measure_elsewhere",
        lambda *args: {name: (60.0, f"1 min {args[:3]}") for name in args[3]},
    )
    arguments = ["spcl", "901", "2d", "all", "-pre", FIRST, "-tr", SECOND, "-device", "cpu"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    for name in (FIRST, SECOND):
        assert f"{name}: 1 min ('901', '2d', 'nnUNetPlans')" in out
    assert f"nnUNetv2_predict -d 901 -c 2d -tr {SECOND}" in out
    assert [c[5] for c in ran] == [FIRST, SECOND]
    assert cli.main([*arguments[:4], *arguments[6:]]) == 0
    assert [c[5] for c in ran[2:]] == ["SSLTrainerSPCLPretrain+seed=1", SECOND]
    assert Path(ran[1][-1]).parent == folder_of(FIRST, tmp_path)
    if not torch.cuda.is_available():
        assert cli.main(arguments[:-2]) == 2
        assert "Add: -device cpu" in capsys.readouterr().err
