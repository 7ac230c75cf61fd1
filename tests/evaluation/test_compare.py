"""Cross-validation of twin and method on the user's own annotated cases."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation import compare as module
from nnunet_ssl.evaluation import runner
from nnunet_ssl.evaluation.compare import compare

from .fakes import Commands, InProcess, run_fake


@pytest.fixture
def commands(nnunet, monkeypatch):
    """Fake commands, tasks in this process, a second per training."""
    before = dict(os.environ)  # tasks change it
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(runner, "POLL", 0)
    monkeypatch.setattr(module, "LocalLauncher", lambda workers: InProcess())
    monkeypatch.setattr(
        module,
        "measure_elsewhere",
        lambda dataset, configuration, plans, names, device: {n: (600.0, "10 min") for n in names},
    )
    yield Commands(monkeypatch)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def run(tmp_path):
    """Return a function that compares on the toy data set of three annotated cases."""

    def run(*trainers, dataset=901, configuration="2d", plans="nnUNetPlans", **options):
        options = {"device": "cpu", "workers": 1, "ask": False} | options
        names = trainers or ("SSLTrainer",)
        return compare(dataset, configuration, names, tmp_path / "out", plans=plans, **options)

    return run


def test_each_fold_of_twin_and_method_is_scored_and_reported(commands, run, tmp_path, capsys):
    assert (
        run("SSLTrainerFixMatch+num_epochs=3", "SSLTrainerFixMatch+num_epochs=3+threshold=0.9") == 0
    )
    content = json.loads((tmp_path / "out" / "runs.json").read_text(encoding="utf-8"))
    cells = content["cells"]
    assert content["units"] == "folds" and content["labels"] == {"organ1": 1, "organ2": 2}
    assert content["command"].startswith("nnunet_ssl compare -d 901 -c 2d -tr SSLTrainerFix")
    names = ["SSLTrainerSupervised", "SSLTrainerFixMatch", "SSLTrainerFixMatch+threshold=0.9"]
    assert [c["name"] for c in cells] == names * 3  # what all share is left out of the names
    assert [c["fold"] for c in cells] == [str(k) for k in range(3) for _ in names]
    assert all(c["state"] == "done" and c["budget"] == 3 for c in cells)
    assert cells[2]["twin"] == cells[0]["id"] == "fold0_SSLTrainerSupervised"
    trained = [c for c in commands.ran if c.startswith("nnUNetv2_train 901 2d 1 ")]
    assert len(trained) == 3 and all("+num_epochs=3" in c for c in trained)
    assert cells[1]["ssl_log"].startswith(os.environ["nnUNet_results"])

    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["metric"] == "dice"]
    found = {(r["name"], r["fold"], r["case"]) for r in rows}
    assert found == {(n, str(k), f"tr_{k:03d}") for n in names for k in range(3)}
    assert {float(r["value"]) for r in rows} == {1.0}
    assert "<html" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    out = capsys.readouterr().out
    assert "3 folds, 9 trainings to run" in out and "In all about 1 h 30 min" in out

    before = len(commands.ran)
    assert (
        run("SSLTrainerFixMatch+num_epochs=3", "SSLTrainerFixMatch+num_epochs=3+threshold=0.9") == 0
    )
    assert len(commands.ran) == before
    assert "trainings to run" not in capsys.readouterr().out  # so nobody is asked either


def test_pretraining_runs_first_and_is_in_the_estimate(commands, run, tmp_path, capsys):
    assert run("SSLTrainerSPCL+seed=3") == 0
    fold = [c for c in commands.ran if c.startswith("nnUNetv2_train 901 2d 1 ")]
    assert len(fold) == 3 and "SSLTrainerSPCLPretrain+seed=3" in fold[1]
    weights = "SSLTrainerSPCLPretrain+seed=3__nnUNetPlans__2d/fold_1/checkpoint_final.pth"
    assert fold[2].endswith(weights)
    assert "In all about 1 h 30 min" in capsys.readouterr().out  # three trainings a fold


def test_a_fold_that_fails_is_tried_again(commands, run, tmp_path, monkeypatch):
    monkeypatch.setattr("nnunet_ssl.evaluation.report.write_report", lambda folder, output: None)
    commands.broken = "2d 1 -tr SSLTrainer "
    assert run() == 1
    cells = json.loads((tmp_path / "out" / "runs.json").read_text(encoding="utf-8"))["cells"]
    assert [c["id"] for c in cells if c["state"] == "failed"] == ["fold1_SSLTrainer"]
    commands.broken, commands.ran = None, []
    assert run() == 0 and len(commands.ran) == 1


@pytest.mark.parametrize(
    ("record", "protocol", "unit"),
    [
        (None, "", "mm"),
        ({"protocol": "raw", "spacing_known": True}, "raw", "mm"),
        ({"protocol": "cropped-literature", "spacing_known": False}, "cropped-literature", "voxel"),
    ],
)
def test_protocol_and_unit_are_those_of_the_conversion(
    record, protocol, unit, commands, run, tmp_path, nnunet
):
    path = nnunet / "nnUNet_raw" / "Dataset901_Toy" / "conversion.json"
    try:
        if record:
            path.write_text(json.dumps(record))
        assert run() == 0
    finally:
        path.unlink(missing_ok=True)
    content = json.loads((tmp_path / "out" / "runs.json").read_text(encoding="utf-8"))
    assert content["protocol"] == protocol
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        assert {r["unit"] for r in csv.DictReader(file) if r["metric"] == "hd95"} == {unit}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    told = {"": "not told", "raw": "whole images", "cropped-literature": "cut around"}
    assert told[protocol] in page


def test_other_scans_without_masks_make_another_comparison(commands, run, nnunet, monkeypatch):
    run()
    read_manifest = module.read_manifest

    def with_another_scan(*args):
        manifest = read_manifest(*args)
        return {**manifest, "cases": {**manifest["cases"], "un_999": {"content": "x"}}}

    monkeypatch.setattr(module, "read_manifest", with_another_scan)
    with pytest.raises(UserError, match=r"scans in imagesUn \(hash\) was"):
        run()


def test_settings_of_an_earlier_call_are_kept(commands, run, monkeypatch):
    monkeypatch.setattr("nnunet_ssl.evaluation.report.write_report", lambda folder, output: None)
    run("SSLTrainer+num_epochs=3")
    with pytest.raises(UserError, match=r"begun with another spec: trainer was .*=3.* now .*=4"):
        run("SSLTrainer+num_epochs=4")


def test_an_earlier_training_counts_if_it_is_of_these_data(commands, run, monkeypatch):
    monkeypatch.setattr("nnunet_ssl.evaluation.report.write_report", lambda folder, output: None)
    train = ["nnUNetv2_train", "901", "2d", "1", "-tr", "SSLTrainer", "-p", "nnUNetPlans"]
    run_fake(train, dict(os.environ))  # by hand, before
    (model,) = Path(os.environ["nnUNet_results"]).glob("Dataset901_*/SSLTrainer__*")
    case = model / "fold_1" / "validation" / "tr_001.nii.gz"
    refused = r"fold_1 holds a training with other {} .* fold 1 has .*SSLTrainer\+seed=2"
    case.rename(case.with_name("tr_000.nii.gz"))
    with pytest.raises(UserError, match=refused.format("validation cases")):
        run()
    case.with_name("tr_000.nii.gz").rename(case)
    plans = (model / "plans.json").read_text(encoding="utf-8")
    (model / "plans.json").write_text(plans.replace("nnUNetPlans", "others"))
    with pytest.raises(UserError, match=refused.format("plans.json")):
        run()
    assert not commands.ran
    (model / "plans.json").write_text(plans)
    assert run() == 0
    assert [c.endswith(" --c") for c in commands.ran].count(True) == 1  # goes on from its end


def test_several_at_a_time_on_a_cpu_are_warned_of(commands, run, monkeypatch, capsys):
    monkeypatch.setattr("nnunet_ssl.evaluation.report.write_report", lambda folder, output: None)
    run(workers=2)
    assert "NOTE: nnU-Net lets each training on a CPU use all cores" in capsys.readouterr().out


def test_asks_before_it_starts(commands, run, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"Nobody is there to be asked.*Add --yes"):
        run(ask=True)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(UserError, match=r"Not started\. Fewer trainers or epochs"):
        run(ask=True)
    assert not commands.ran and not (tmp_path / "out").exists()
    monkeypatch.setattr("nnunet_ssl.evaluation.report.write_report", lambda folder, output: None)
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert run(ask=True) == 0


def test_no_estimate_is_no_obstacle(commands, run, monkeypatch, capsys):
    def broken(*args):
        raise UserError("out of memory")

    monkeypatch.setattr(module, "measure_elsewhere", broken)
    monkeypatch.setattr("nnunet_ssl.evaluation.report.write_report", lambda folder, output: None)
    assert run() == 0
    assert "no estimate: out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"plans": "Other"},
            r"Other.json does not exist. Run: nnunet_ssl plan_and_preprocess -d 9",
        ),
        ({"configuration": "3d_lowres"}, r"no configuration 3d_lowres. Give one of .*2d"),
        ({"dataset": 999}, "No data set with id 999"),
        ({"workers": 0}, "--workers is 0; give 1"),
        ({"device": "cuda"}, "no CUDA GPU found here. Add: -device cpu"),
    ],
)
def test_what_does_not_fit(commands, run, tmp_path, options, words, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=words):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_unknown_trainer_and_single_case(commands, run, monkeypatch):
    with pytest.raises(UserError, match=r"No trainer 'SSLTrainerBest'. There are"):
        run("SSLTrainerBest")
    read = module.read_raw_dataset

    def with_one(dataset_id):
        raw = read(dataset_id)
        raw.labeled = dict(list(raw.labeled.items())[:1])
        return raw

    monkeypatch.setattr(module, "read_raw_dataset", with_one)
    with pytest.raises(UserError, match=r"1 annotated case, so nothing is left to validate on"):
        run()


@pytest.fixture
def own_data(nnunet, tmp_path, monkeypatch):
    """Raw and preprocessed folder of the toy data set, copied: this test may change them."""
    folders = []
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        shutil.copytree(nnunet / name / "Dataset901_Toy", tmp_path / name / "Dataset901_Toy")
        monkeypatch.setenv(name, str(tmp_path / name))
        folders.append(tmp_path / name / "Dataset901_Toy")
        (folders[-1] / "splits_final.json").unlink()
    return folders


def tell_groups(raw, *groups):
    content = {"groups": {f"tr_{i:03d}": group for i, group in enumerate(groups)}}
    (raw / "conversion.json").write_text(json.dumps(content))


def test_patients_are_validated_as_a_whole(own_data, commands, run, tmp_path, monkeypatch):
    monkeypatch.setattr("nnunet_ssl.evaluation.report.write_report", lambda folder, output: None)
    tell_groups(own_data[0], "p0", "p1", "p0")
    assert run("SSLTrainerFixMatch") == 0
    content = json.loads((tmp_path / "out" / "runs.json").read_text(encoding="utf-8"))
    assert [c["fold"] for c in content["cells"]] == ["0", "0", "1", "1"]
    task = json.loads(
        (tmp_path / "out" / "cells" / content["cells"][0]["id"] / "task.json").read_text()
    )
    assert task["definition"]["training cases"] == ["tr_001"]
    assert task["definition"]["validation cases"] == ["tr_000", "tr_002"]


def test_folds_that_part_a_patient_are_refused(own_data, commands, run, tmp_path, capsys):
    tell_groups(own_data[0], "p0", "p1", "p0")
    names = [f"tr_{i:03d}" for i in range(3)]
    old = [{"train": [c for c in names if c != val], "val": [val]} for val in names]
    path = own_data[1] / "splits_final.json"
    path.write_text(json.dumps(old))
    words = f"{path} parts 1 group.*: fold 0 trains on tr_002 and validates on tr_000, both of p0"
    with pytest.raises(UserError, match=words):
        run()
    assert "p0" not in capsys.readouterr().out  # said once
    assert not commands.ran and not (tmp_path / "out").exists()


def test_a_single_patient_is_refused(own_data, commands, run):
    tell_groups(own_data[0], "p0", "p0", "p0")
    words = r"conversion.json counts all 3 annotated cases as one group \(patient\), p0, so nothing"
    with pytest.raises(UserError, match=words):
        run()
    assert not (own_data[1] / "splits_final.json").exists()


def test_estimate_of_several_trainers_in_a_process_of_its_own(nnunet):
    from nnunet_ssl.estimate import measure_elsewhere

    names = ["SSLTrainerSupervised+num_epochs=2", "SSLTrainer+num_epochs=2"]
    told = measure_elsewhere("901", "2d", "nnUNetPlans", names, "cpu")
    assert list(told) == names and told[names[1]][0] > told[names[0]][0] > 0
    assert told[names[1]][1].startswith("About ") and Path(os.environ["nnUNet_raw"]).is_dir()
