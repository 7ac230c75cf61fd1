"""The command: help, arguments handed on unchanged, doctor, estimate."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nnunet_ssl import cli, doctor, estimate, naming
from nnunet_ssl.errors import UnsupportedError, UserError
from nnunet_ssl.version import check_nnunet_version

COMMANDS = {
    "env": [],
    "doctor": ["-d", "-c", "-p"],
    "list": ["name"],
    "split": ["--labeled", "--draw", "--list", "--test", "--copy"],
    "plan_and_preprocess": ["--plan-on", "--keep_plans", "-gpu_memory_target", "-npfp"],
    "train": ["-tr", "-pretrained_weights", "--val_best", "-num_gpus"],
    "spcl": ["-pre", "SSLTrainerSPCLPretrain", "--c"],
    "predict": ["-prev_stage_predictions", "--disable_tta", "-chk"],
    "export": ["--network", "MODEL_FOLDER"],
    "demo": ["--seed", "--device"],
}


class FakeTrainer:
    """Guesses.

    Not told in the list.
    """

    method, paper, dims, networks = "Guessing", "arXiv:0000.00000", ("2d", "3d"), "any"
    deploy, deployed, deploys_stock, step_cost = "teacher", "", True, 2.0
    step_memory, trained_networks = 1.0, 1
    supports_regions, supports_ignore, supports_ddp = True, False, False
    uses_unlabeled, twin = True, "SSLTrainerTwin+ema_decay=0.99"

    @classmethod
    def refuse_unsupported(cls, plans, configuration, dataset_json):
        if configuration == "3d_lowres":
            raise UnsupportedError("FakeTrainer does not support 3d_lowres.")

    @classmethod
    def settings(cls):
        return {"num_epochs": 250, "num_iterations_per_epoch": 250} | {
            "num_val_iterations_per_epoch": 50,
            "ema_decay": "auto",
        }


@pytest.fixture
def fake_trainers(monkeypatch):
    class OwnNetwork(FakeTrainer):
        deploys_stock = False
        deployed = "mean of two"

    classes = {"SSLTrainer": FakeTrainer, "SSLTrainerOwn": OwnNetwork}
    monkeypatch.setattr(naming, "trainer_classes", lambda module=None: classes)
    monkeypatch.setattr(naming, "resolve", lambda name: classes[name.split("+")[0]])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_options_and_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "example:" in text
    for option in COMMANDS[command]:
        assert option in text


def test_help_imports_neither_torch_nor_nnunet():
    code = (
        "import sys; from nnunet_ssl import cli; cli.build_parser();"
        "assert not {'torch', 'nnunetv2', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_env_keeps_other_folders(monkeypatch, capsys):
    ours = str(naming.discovery_folder())
    monkeypatch.setenv(naming.VARIABLE, "/other/trainers")
    assert cli.main(["env"]) == 0
    line = capsys.readouterr().out.strip()
    assert line == f"export nnUNet_extTrainer=/other/trainers{os.pathsep}{ours}"
    monkeypatch.setenv(naming.VARIABLE, ours)
    assert doctor.trainer_path() == ours


def test_list_shows_every_trainer_and_one_with_settings(fake_trainers, capsys):
    cli.main(["list"])
    text = capsys.readouterr().out
    assert "SSLTrainerOwn" in text and "mean of two (needs nnunet_ssl)" in text
    assert "2d/3d" in text and "arXiv:0000.00000" in text and "2x" in text

    cli.main(["list", "SSLTrainer"])
    text = capsys.readouterr().out
    assert "Guesses." in text and "Not told" not in text and "arXiv:0000.00000" in text
    assert "num_epochs" in text and "250" in text


def test_user_error_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def refuse(name):
        raise UserError("No trainer 'X'. There are: A, B.")

    monkeypatch.setattr(naming, "resolve", refuse)
    assert cli.main(["list", "X"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "Error: No trainer 'X'. There are: A, B.\n"


def test_unknown_option_is_refused_where_nnunet_is_not_called(capsys):
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--fast"])
    assert "--fast" in capsys.readouterr().err


@pytest.fixture
def entry_points(monkeypatch, fake_trainers):
    """nnU-Net's entry points replaced by ones that note sys.argv; no measurement."""
    import nnunetv2.inference.predict_from_raw_data as predict_module
    import nnunetv2.run.run_training as train_module

    seen = SimpleNamespace(argv=None, estimates=[])

    def note():
        seen.argv = list(sys.argv)
        seen.variable = os.environ[naming.VARIABLE]

    def measure(*args):
        seen.estimates.append(args)
        return "About 1 min"

    monkeypatch.setenv(naming.VARIABLE, "")
    monkeypatch.setattr(train_module, "run_training_entry", note)
    monkeypatch.setattr(predict_module, "predict_entry_point", note)
    monkeypatch.setattr(estimate, "estimate", measure)
    return seen


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """Data set 4 as if it were planned; no model of it, and no images."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name / "Dataset004_X").mkdir(parents=True)
        monkeypatch.setenv(name, str(tmp_path / name))
    base = tmp_path / "nnUNet_preprocessed" / "Dataset004_X"
    for plans in ("nnUNetPlans", "Small"):
        content = {"configurations": {"2d": {}, "3d_lowres": {}}}
        (base / f"{plans}.json").write_text(json.dumps(content))
    (base / "dataset.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["5", "2d"], "No data set 5"),
        (["4", "3d_fulres"], "no configuration 3d_fulres. Give one of these with -c: 2d, 3d_lowre"),
        (["4", "2d", "-p", "nope"], "nope.json does not exist"),
        (["4", "2d", "-tr", "SSLTrainerr"], "No trainer 'SSLTrainerr'"),
        (["4", "3d_lowres"], "FakeTrainer does not support 3d_lowres"),
    ],
)
def test_train_refuses_what_is_not_there_before_nnunet_starts(
    entry_points, planned, monkeypatch, capsys, typed, told
):
    if "-tr" in typed:
        monkeypatch.setattr(
            naming, "resolve", lambda name: naming._resolve.__wrapped__(name, naming.TRAINERS)
        )
    assert cli.main(["train", *typed[:2], "all", *typed[2:], "-device", "cpu"]) == 2
    assert told in capsys.readouterr().err
    assert entry_points.argv is None and not entry_points.estimates


def test_train_hands_arguments_on_and_prints_the_predict_command(entry_points, planned, capsys):
    typed = ["4", "2d", "all", "-tr", "SSLTrainer+num_epochs=3", "-p", "Small", "-device", "cpu"]
    typed += ["--npz", "-pretrained_weights", "w.pth", "--an_option_of_tomorrow"]
    before = list(sys.argv)
    assert cli.main(["train", *typed]) == 0
    assert entry_points.argv == ["nnUNetv2_train", *typed]
    assert sys.argv == before
    assert entry_points.variable == str(naming.discovery_folder())
    assert entry_points.estimates == [("4", "2d", "Small", "SSLTrainer+num_epochs=3", "cpu")]
    text = capsys.readouterr().out
    assert text.index("About 1 min") < text.index("Predict with stock nnU-Net")
    assert (
        "nnUNetv2_predict -d 4 -c 2d -tr SSLTrainer+num_epochs=3 -p Small -f all "
        "-i INPUT -o OUTPUT -device cpu\n"
    ) in text
    assert "export" not in text


def test_train_takes_our_trainer_by_default_and_measures_nothing_for_val(entry_points, planned):
    cli.main(["train", "4", "2d", "0", "-device", "cpu", "--val"])
    assert entry_points.argv[-2:] == ["-tr", "SSLTrainer"]
    assert not entry_points.estimates


def test_predict_hands_arguments_on(entry_points, monkeypatch, tmp_path, capsys):
    model = tmp_path / "Dataset004_X" / "SSLTrainerOwn__nnUNetPlans__3d_fullres"
    model.mkdir(parents=True)
    (model / "plans.json").write_text("{}")
    (model / "dataset.json").write_text('{"file_ending": ".png"}')
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("in put").mkdir()
    typed = ["-i", "in put", "-o", "out", "-d", "4", "-c", "3d_fullres", "-f", "0", "1"]
    typed += ["-tr", "SSLTrainerOwn", "-device", "cpu", "-chk", "checkpoint_best.pth"]
    typed += ["-prev_stage_predictions", "earlier"]
    for fold, told in ((0, "-f 0\n"), (1, "holds no images named CASE_0000.png")):
        (model / f"fold_{fold}").mkdir()
        (model / f"fold_{fold}" / "checkpoint_best.pth").touch()
        assert cli.main(["predict", *typed]) == 2
        assert told in capsys.readouterr().err
    Path("in put/case.png").touch()
    assert cli.main(["predict", *typed]) == 2
    assert entry_points.argv is None
    Path("in put/case_0000.png").touch()
    assert cli.main(["predict", *typed]) == 0
    assert entry_points.argv == ["nnUNetv2_predict", *typed]
    text = capsys.readouterr().out
    assert "-f 0 1 -i 'in put' -o out -device cpu -chk checkpoint_best.pth" in text
    assert "export nnUNet_extTrainer=" in text  # its network is not nnU-Net's


def test_predict_without_a_trained_model_says_what_is_missing(
    entry_points, monkeypatch, tmp_path, capsys
):
    (tmp_path / "Dataset004_X").mkdir()
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    typed = ["predict", "-i", "in", "-o", "out", "-c", "2d", "-device", "cpu", "-d"]
    assert cli.main([*typed, "4"]) == 2
    told = capsys.readouterr().err
    assert "No trained model in" in told and "train first: nnunet_ssl train 4 2d all" in told
    assert cli.main([*typed, "5"]) == 2
    assert "Could not find a dataset with the ID 5" in capsys.readouterr().err
    assert entry_points.argv is None


def test_missing_gpu_is_told_before_nnunet_starts(entry_points, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["train", "4", "2d", "all"]) == 2
    assert "Add: -device cpu" in capsys.readouterr().err
    assert entry_points.argv is None


def test_split_passes_numbers_and_files(monkeypatch, tmp_path):
    from nnunet_ssl.planning import splits

    seen = {}
    monkeypatch.setattr(splits, "split_dataset", lambda *a, **k: seen.update(k, ids=a))
    cli.main(["split", "-d", "Dataset004_X", "-o", "104", "--labeled", "4", "--test", "40"])
    assert seen["ids"] == (4, 104) and seen["test"] == 40 and seen["list_file"] is None
    cli.main(["split", "-d", "4", "-o", "104", "--labeled", "4", "--test", "t.txt", "--copy"])
    assert seen["test"].name == "t.txt" and seen["copy"] is True


def test_dataset_that_is_no_id_is_refused(capsys):
    assert cli.main(["plan_and_preprocess", "-d", "hippocampus"]) == 2
    assert "-d hippocampus" in capsys.readouterr().err


def test_nnunet_outside_the_range_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.9.1")
    with pytest.raises(UserError, match=r"nnunetv2 is 2\.9\.1.*pip install 'nnunetv2>=2\.8\.1,<2"):
        check_nnunet_version()


def levels(checks):
    return [(c.level, c.text, c.fix) for c in doctor.guarded(checks)]


def test_doctor_on_an_empty_set_up(monkeypatch, capsys):
    for name in (*doctor.FOLDERS, naming.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["doctor", "-d", "4"]) == 1
    text = capsys.readouterr().out
    assert "nnUNet_raw is not set" in text and "fix: export nnUNet_raw=" in text
    assert f"fix: {doctor.export_line()}" in text
    assert "Not ready" in text


def test_doctor_on_broken_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "none"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=5e8, total=1e12)
    )
    missing, locked, _ = levels(doctor.check_folders())
    assert missing[0] == "FAIL" and missing[2] == f"mkdir -p {tmp_path / 'none'}"
    assert "not writable" in locked[1] and "chmod" in locked[2]
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    _, full, _ = levels(doctor.check_folders())
    assert full[0] == "FAIL" and "0 GB free" in full[1]


def test_doctor_on_a_trainer_folder_that_fails_to_import(monkeypatch, tmp_path):
    (tmp_path / "broken_trainer.py").write_text("import a_module_that_does_not_exist\n")
    folders = os.pathsep.join([str(tmp_path), str(naming.discovery_folder())])
    monkeypatch.setenv(naming.VARIABLE, folders)
    [check] = levels(doctor.check_discovery())
    assert check[0] == "FAIL" and "a_module_that_does_not_exist" in check[1]
    assert "remove its folder" in check[2]


def test_doctor_never_shows_a_traceback():
    def broken():
        yield doctor.Check("OK", "fine")
        raise RuntimeError("surprise")

    assert levels(broken())[1] == ("FAIL", "RuntimeError: surprise", "")


def test_doctor_on_a_data_set_step_by_step(monkeypatch, tmp_path):
    raw = tmp_path / "raw" / "Dataset004_X"
    for name in ("imagesTr", "imagesUn"):
        (raw / name).mkdir(parents=True)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "pre"))

    [check] = levels(doctor.check_dataset("5", None, "nnUNetPlans"))
    assert "0 folders named Dataset005_*" in check[1]
    [check] = levels(doctor.check_dataset("4", None, "nnUNetPlans"))
    assert "dataset.json is missing or damaged" in check[1]

    (raw / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz"}))
    (raw / "imagesTr" / "a_0000.nii.gz").touch()
    annotated, unlabeled, plans = levels(doctor.check_dataset("4", None, "nnUNetPlans"))
    assert annotated[0] == "OK" and "1 scans" in annotated[1]
    assert unlabeled[0] == "FAIL" and "CASE_0000.nii.gz" in unlabeled[2]
    assert plans[0] == "FAIL" and "plan_and_preprocess -d 4" in plans[2]

    (raw / "imagesUn" / "b_0000.nii.gz").touch()
    base = tmp_path / "pre" / "Dataset004_X"
    base.mkdir(parents=True)
    configurations = {"2d": {"data_identifier": "P_2d", "spacing": [1, 1], "architecture": {}}}
    (base / "nnUNetPlans.json").write_text(
        json.dumps({"plans_name": "nnUNetPlans", "configurations": configurations})
    )
    report = levels(doctor.check_dataset("4", "2d", "nnUNetPlans"))
    assert any(level == "FAIL" and "0 of 1 annotated" in text for level, text, _ in report)
    (base / "P_2d").mkdir()
    (base / "P_2d" / "a.pkl").touch()
    report = levels(doctor.check_dataset("4", "2d", "nnUNetPlans"))
    assert any("not preprocessed" in text and "-c 2d" in fix for _, text, fix in report)
    report = levels(doctor.check_dataset("4", "3d_fullres", "nnUNetPlans"))
    assert report[-1][0] == "FAIL" and report[-1][2] == "use one of 2d"


def test_kept_bytes_equal_a_count_by_hand():
    network = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.rand(3, 8)
    kept, _ = estimate.forward(network, lambda output, target: output.sum(), x)
    # the input of the first layer and the output of ReLU, shared with the second layer's input
    assert kept == 4 * (3 * 8 + 3 * 4)


def test_measure_counts_memory_and_time():
    network = nn.Conv2d(1, 2, 3, padding=1)
    cost = estimate.measure(
        network, lambda o, t: nn.functional.cross_entropy(o, t[:, 0].long()), (2, 1, 8, 8), "cpu"
    )
    assert 0 < cost.forward < cost.step
    assert cost.weights == 4 * sum(p.numel() for p in network.parameters())
    assert cost.kept >= 4 * (2 * 8 * 8 + 2 * 2 * 8 * 8)  # input and logits
    assert cost.pixels == 2 * 8 * 8


def test_estimate_line_adds_up():
    cost = estimate.Cost(0.4, 0.1, 1_500_000_000, 100_000_000, 2_000_000)
    line = estimate.describe(cost, FakeTrainer, "cpu")
    # 250 * (250 * 2 * 0.4 + 50 * 0.1) s
    assert line.startswith("About 14 h 14 min on cpu (2 x the supervised step of 0.4 s, 250")
    assert line.endswith("memory about 1.9 GB")  # weights, gradients, momentum, teacher

    class TwoNetworks(FakeTrainer):
        step_memory, trained_networks = 2.1, 2

        @classmethod
        def settings(cls):
            return super().settings() | {"ema_decay": None}

    assert estimate.memory_of(cost, TwoNetworks) == pytest.approx(2.1 * 1.5e9 + 6 * 1e8)


@pytest.mark.parametrize(("pixels", "times"), [(500, 5), (1000, 5), (2000, 2.5), (9000, 1)])
def test_estimate_of_methods_that_run_slices_in_groups(pixels, times):
    class Slices(FakeTrainer):
        step_memory = 5.0

        @classmethod
        def settings(cls):
            return super().settings() | {"ema_decay": None, "pixels_at_once": 1000}

    cost = estimate.Cost(0.4, 0.1, 1_500_000_000, 100_000_000, pixels)
    assert estimate.memory_of(cost, Slices) == pytest.approx(times * 1.5e9 + 3e8)


def test_estimate_never_raises(monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    text = estimate.estimate("Dataset999_None", "2d", "nnUNetPlans", "SSLTrainer", "cpu")
    assert text.startswith("no estimate: ") and "Dataset999_None" in text

    def too_long(*args, **kwargs):
        raise subprocess.TimeoutExpired("python", estimate.LIMIT)

    monkeypatch.setattr(estimate.subprocess, "run", too_long)
    assert "takes more than" in estimate.estimate("4", "2d", "P", "SSLTrainer", "cpu")
