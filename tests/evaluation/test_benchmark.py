"""The runner: every stage once, whatever happens; no test case in training; tables that add up."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import SimpleITK as sitk
from filelock import FileLock
from make_data import make_raw_dataset

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation import benchmark, runner, tasks
from nnunet_ssl.evaluation.benchmark import run_benchmark
from nnunet_ssl.evaluation.report import write_report

from .fakes import Commands, InProcess, Killed

SPEC = """\
name: toy
about: A toy.
protocol: raw
dataset:
  source: Dataset901_Toy
test:
  last: 2
configuration: 2d
plans: {features: [4, 8, 8], batch: 2}
labeled: [2]
draws: [0, 1]
seeds: [1]
trainers: [SSLTrainer]
settings: {num_epochs: 2, num_iterations_per_epoch: 2, num_val_iterations_per_epoch: 1}
device: cpu
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A fully annotated data set of eight cases, and a spec."""
    before = dict(os.environ)  # tasks change it
    for name in before:
        if name.startswith("nnUNet_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "source"))
    make_raw_dataset(tmp_path / "source", num_labeled=8, num_unlabeled=0, shape=(2, 16, 16))
    (tmp_path / "toy.yaml").write_text(SPEC)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def commands(place, monkeypatch):
    """Fake commands, tasks in this process."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(runner, "POLL", 0)
    monkeypatch.setattr(benchmark, "LocalLauncher", lambda workers: InProcess())
    return Commands(monkeypatch)


@pytest.fixture
def run(place):
    """Return a function that runs the spec, changed or not."""

    def run(old="", new="", more="", folder="out", **options):
        assert old in SPEC
        (place / "toy.yaml").write_text(SPEC.replace(old, new) + more)
        os.environ["nnUNet_raw"] = str(place / "source")
        return run_benchmark(place / "toy.yaml", place / folder, **options)

    return run


def runs(place, folder="out"):
    return json.loads((place / folder / "runs.json").read_text(encoding="utf-8"))


def results(place, folder="out"):
    with (place / folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def tree(folder):
    return {p.relative_to(folder): p.lstat().st_mtime_ns for p in folder.rglob("*")}


# --- what comes out -----------------------------------------------------------------------------


def test_tables_hold_every_cell(place, commands, run, capsys):
    assert run() == 0
    content = runs(place)
    assert content["labels"] == {"organ1": 1, "organ2": 2}
    assert (content["units"], content["protocol"]) == ("draws and seeds", "raw")
    assert content["command"] == "nnunet_ssl benchmark toy.yaml -o out"
    cells = content["cells"]
    assert [c["role"] for c in cells] == ["twin", "method"] * 2
    assert [c["draw"] for c in cells] == [0, 0, 1, 1]
    method = cells[1]
    assert method["twin"] == cells[0]["id"] and method["state"] == "done"
    assert method["patches"] == {"labeled": 8, "unlabeled": 12}
    assert method["seconds"]["train"] == 4.0 and method["patches_per_second"] == 5.0
    assert method["peak_memory_mb"]["gpu"] == 70 and method["step_cost"] == pytest.approx(7 / 3)
    assert method["versions"]["nnunetv2"] and method["hardware"]["cores"] == 1
    assert method["precision"] == "float16"
    for key in ("predictions", "ssl_log", "log"):
        assert (place / "out" / method[key]).exists() and not Path(method[key]).is_absolute()
    assert str(place) not in (place / "out" / "runs.json").read_text(encoding="utf-8")
    assert "-tr SSLTrainer+num_epochs=2" in method["commands"][0]
    assert "-chk checkpoint_final.pth" in method["commands"][1]

    rows = results(place)
    dice = [r for r in rows if r["metric"] == "dice" and r["cell"] == method["id"]]
    assert {(r["case"], r["class"]) for r in dice} == {
        (case, organ) for case in ("tr_006", "tr_007") for organ in ("organ1", "organ2")
    }
    assert {float(r["value"]) for r in dice} == {1.0}
    assert {r["cell"] for r in rows} == {c["id"] for c in cells}
    out = capsys.readouterr().out
    assert "SSLTrainer: train done" in out and "4 of 4 cells are done" in out
    assert "nnunet_ssl report" in out


def test_draws_share_test_cases_and_no_nnunet_folder_holds_them(place, commands, run):
    run()
    out = place / "out"
    splits = [
        json.loads(p.read_text(encoding="utf-8"))
        for p in sorted(out.glob("nnUNet_raw/*/split.json"))
    ]
    assert len(splits) == 2 and splits[0]["labeled"] == ["tr_000", "tr_001"]
    assert set(splits[0]["labeled"]) != set(splits[1]["labeled"])
    for split in splits:
        assert sorted(split["labeled"] + split["unlabeled"]) == [f"tr_{i:03d}" for i in range(6)]
    inside = [p.name for root in out.glob("nnUNet_*") for p in root.rglob("*")]
    assert inside and not [n for n in inside if n.startswith(("tr_006", "tr_007"))]
    assert len(list((out / "test" / "images").iterdir())) == 2
    predictions = [c for c in commands.ran if "nnUNetv2_predict" in c]
    assert all(f"-i {out / 'test' / 'images'}" in c for c in predictions)


@pytest.mark.parametrize("told_by", ["groups.csv", "conversion.json", "split.json"])
def test_groups_are_budget_and_test(place, commands, run, told_by):
    groups = {f"tr_{i:03d}": f"p{i // 2}" for i in range(8)}
    new = "source: Dataset901_Toy"
    if told_by == "groups.csv":
        rows = "".join(f"{case},{group}\n" for case, group in groups.items())
        (place / "groups.csv").write_text("case,group\n" + rows)
        new += "\n  groups: groups.csv"
    else:
        path = place / "source" / "Dataset901_Toy" / told_by
        path.write_text(json.dumps({"groups": groups}))
    text = SPEC.replace("source: Dataset901_Toy", new).replace("last: 2", "last: 1")
    (place / "toy.yaml").write_text(text.replace("[2]", "[1]"))
    run_benchmark(place / "toy.yaml", place / "out")
    splits = [
        json.loads(p.read_text(encoding="utf-8"))
        for p in (place / "out").glob("nnUNet_raw/*/split.json")
    ]
    for split in splits:
        first, second = sorted(split["labeled"])
        assert int(first[-1]) // 2 == int(second[-1]) // 2 and len(split["unlabeled"]) == 4
    assert runs(place)["cells"][0]["budget"] == 1 and runs(place)["budget_unit"] == "group"


def test_extra_rows_see_annotated_cases_only(place, commands, run):
    more = "also: [stock, bound, equal_compute]\n"
    run("draws: [0, 1]", "draws: [0]", more)
    cells = {c["role"]: c for c in runs(place)["cells"]}
    assert set(cells) == {"twin", "method", "stock", "bound", "equal_compute"}
    raw = place / "out" / "nnUNet_raw"
    held = {p.name.split("_", 1)[1]: p for p in raw.iterdir()}
    assert set(held) == {"Toy_2labeled", "Toy_stock_2labeled", "Toy_bound_all"}
    assert len(list((held["Toy_bound_all"] / "labelsTr").iterdir())) == 6
    assert not (held["Toy_bound_all"] / "imagesUn").exists()
    assert len(list((held["Toy_stock_2labeled"] / "imagesTr").iterdir())) == 2
    plans = [c for c in commands.ran if c.startswith("nnUNetv2_plan_and_preprocess")]
    assert len(plans) == 2
    assert "-p nnUNetSmallPlans" in cells["bound"]["commands"][0]
    assert "-p nnUNetPlans " in cells["stock"]["commands"][0]
    assert cells["stock"]["seconds"]["train"] == 2.5  # from nnU-Net's own log
    assert cells["stock"]["patches"] == {"labeled": 1000 * 250 * 2, "unlabeled": 0}
    assert cells["stock"]["precision"] is None  # its log does not tell


def test_reproducible_loading_does_not_reach_the_planner(place, commands, run, monkeypatch):
    """nnU-Net's planner refuses 0, the variable of single-process loading."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    run("draws: [0, 1]", "draws: [0]", "also: [bound]\n")
    for folder, number in (("datasets", "1"), ("cells", "0")):
        tasks = list((place / "out" / folder).glob("*/task.json"))
        assert tasks
        for task in tasks:
            environment = json.loads(task.read_text(encoding="utf-8"))["environment"]
            assert environment["nnUNet_n_proc_DA"] == number


def test_pseudo_labels_are_scored_along_training(place, commands, run):
    run("draws: [0, 1]", "draws: [0]", "pseudo_labels: 3\n")
    method = runs(place)["cells"][1]
    with (place / "out" / method["pseudo_labels"]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["progress"] for r in rows} == {"0.4", "0.7", "1.0"}  # as in ssl_log.jsonl
    assert {r["case"] for r in rows} == {"tr_002", "tr_003", "tr_004"}
    assert len(rows) == 3 * 3 * 2 and {float(r["value"]) for r in rows} == {1.0}
    assert "+keep_at=0.4,0.7+" in method["trainer"]
    write_report(place / "out", place / "report.html")  # reads what the runner writes
    plot = (
        (place / "report.html")
        .read_text(encoding="utf-8")
        .split('aria-label="Pseudo-labels, 2 annotated')[1]
    )
    assert all(f">{tick}<" in plot.split("</svg>")[0] for tick in (40, 70, 100))
    asked = [c for c in commands.ran if "checkpoint_at_" in c]
    assert len(asked) == 4 and all("--disable_tta" in c for c in asked)


@pytest.mark.parametrize("way", ["folders", "val"])
def test_test_cases_of_their_own(place, commands, run, way):
    make_raw_dataset(
        place / "other" / "raw", num_test=2, num_unlabeled=0, shape=(2, 16, 16), seed=5
    )
    held = place / "other" / "heldout"
    if way == "folders":
        new = "images: other/heldout/imagesTs\n  labels: other/heldout/labelsTs"
    else:
        new = "set: val"
        (held / "imagesTs").rename(held / "val_images")
        (held / "labelsTs").rename(held / "val_labels")
        (held / "labels").symlink_to(held / "val_labels")  # where the fake looks
        content = {"protocol": "raw", "order": [f"tr_{i:03d}" for i in range(8)], "groups": {}}
        conversion = place / "source" / "Dataset901_Toy" / "conversion.json"
        conversion.write_text(json.dumps(content | {"heldout": str(held)}))
    if way == "folders":
        (held / "labels").symlink_to(held / "labelsTs")
    assert run("last: 2", new) == 0
    assert {r["case"] for r in results(place)} == {"ts_000", "ts_001"}
    split = json.loads(
        next((place / "out").glob("nnUNet_raw/*_2labeled/split.json")).read_text(encoding="utf-8")
    )
    assert len(split["unlabeled"]) == 6
    assert not (place / "out" / "test").exists()


# --- once, whatever happens ---------------------------------------------------------------------


def test_killed_at_any_moment_it_goes_on_and_does_nothing_twice(place, commands, run):
    run("draws: [0, 1]", "draws: [0]", folder="whole")
    wanted, total = sorted(commands.ran), commands.events
    assert len(wanted) == 1 + 2 + 2 and total > 15
    for moment in range(1, total + 1):
        commands.ran.clear()
        commands.events, commands.kill_at = 0, moment
        folder = f"killed_{moment}"
        with pytest.raises(Killed):
            run("draws: [0, 1]", "draws: [0]", folder=folder)
        ran_before = list(commands.ran)
        commands.kill_at = None
        assert run("draws: [0, 1]", "draws: [0]", folder=folder) == 0
        assert results(place, folder) == results(place, "whole")
        # only what was not yet noted as done ran again: at most the command that was hit
        again = [c.removesuffix(" --c").replace(folder, "whole") for c in commands.ran]
        assert set(again) == set(wanted) and len(again) <= len(wanted) + 1
        assert len(ran_before) <= len(wanted)
        assert not list((place / folder).rglob("*.part"))


def test_finished_cells_are_not_touched_and_new_ones_are_added(place, commands, run):
    run("draws: [0, 1]", "draws: [0]")
    before, states = len(commands.ran), tree(place / "out" / "cells")
    run("draws: [0, 1]", "draws: [0]")
    assert len(commands.ran) == before
    assert run("[SSLTrainer]", "[SSLTrainer, SSLTrainer+warmup=0.2]") == 0
    new = commands.ran[before:]
    assert sum("nnUNetv2_train" in c for c in new) == 4  # with warmup; three more of draw 1
    kept = {p: t for p, t in tree(place / "out" / "cells").items() if p in states}
    changed = {p for p in kept if kept[p] != states[p]}
    assert {p.name for p in changed} <= {"task.json"} | {
        p.name for p in states if len(p.parts) == 1
    }
    assert len(runs(place)["cells"]) == 6


def test_begun_training_continues(place, commands, run):
    commands.broken = "nnUNetv2_predict"
    assert run() == 1
    state = next((place / "out" / "cells").glob("2labeled_draw0*Supervised*/state.json"))
    content = json.loads(state.read_text(encoding="utf-8"))
    del content["stages"]["train"]
    state.write_text(json.dumps(content))  # as if killed before its end was noted
    commands.broken = None
    commands.ran.clear()
    assert run() == 0
    (continued,) = [c for c in commands.ran if "nnUNetv2_train" in c]
    assert continued.endswith("--c") and "SSLTrainerSupervised" in continued


def test_a_trainer_that_starts_from_another_ones_weights(place, commands, run):
    options = {"new": "[SSLTrainerSPCL, SSLTrainerSPCL+contrast_weight=0.5]", "old": "[SSLTrainer]"}
    commands.broken = "contrast_weight=0.5"
    assert run(**options, only=["draw0"]) == 1
    trained = [c for c in commands.ran if "nnUNetv2_train" in c]
    first, *others = [c for c in trained if "Supervised" not in c]
    assert "-tr SSLTrainerSPCLPretrain+num_epochs=2+" in first and "-pretrained" not in first
    assert "contrast_weight" not in first and "keep_at" not in first and "seed=" in first
    (one,) = others
    assert one.split("-pretrained_weights ")[1].startswith(str(place / "out/nnUNet_results"))
    assert "/SSLTrainerSPCLPretrain+num_epochs=2+" in one
    commands.broken = None
    assert run(**options, only=["draw0"]) == 0
    trained = [c for c in commands.ran if "nnUNetv2_train" in c and "Supervised" not in c]
    assert len(trained) == 3 and sum("-tr SSLTrainerSPCLPretrain" in c for c in trained) == 1
    method = next(c for c in runs(place)["cells"] if c["name"] == "SSLTrainerSPCL")
    assert method["patches"] == {"labeled": 16, "unlabeled": 24}  # of both trainings
    assert method["seconds"]["train"] == 8.0 and method["step_cost"] == pytest.approx(1.6 + 1.5)
    assert len(method["commands"]) == 3 and "SPCLPretrain" in method["commands"][0]


def test_failed_cell_keeps_its_log_and_stops_no_other(place, commands, run, capsys):
    commands.broken = "-tr SSLTrainer+"
    assert run() == 1
    cells = runs(place)["cells"]
    assert [c["state"] for c in cells] == ["done", "failed"] * 2
    assert "train: The command failed with code 1: no such thing" in cells[1]["error"]
    log = place / "out" / cells[1]["log"] / "train.log"
    assert "nnUNetv2_train 1 2d all -tr SSLTrainer+" in log.read_text(encoding="utf-8")
    assert {r["role"] for r in results(place)} == {"twin"}
    out = capsys.readouterr().out
    assert "SSLTrainer: FAILED" in out and "Failed: 2labeled_draw0_seed1_SSLTrainer" in out

    commands.broken = None
    commands.ran.clear()
    assert run() == 0
    assert sum("nnUNetv2_train" in c for c in commands.ran) == 2  # the failed ones alone
    assert [c["error"] for c in runs(place)["cells"]] == [None] * 4
    assert log.read_text(encoding="utf-8").count("nnUNetv2_train") == 2


def test_a_data_set_that_cannot_be_planned_fails_its_cells(place, commands, run):
    assert run("features: [4, 8, 8]", "features: [4, 8, 8, 8]") == 1
    cells = runs(place)["cells"]
    assert {c["state"] for c in cells} == {"failed"}
    assert "Toy_2labeled was not made: plan: The plans of the spec" in cells[0]["error"]
    assert run() == 0  # nothing had begun: the new plans are taken


def test_changed_spec_is_refused_once_a_cell_has_begun(place, commands, run):
    run()
    before = tree(place / "out")
    for old, new, key in (
        ("num_epochs: 2", "num_epochs: 3", "trainer"),
        ("batch: 2", "batch: 4", "plans"),
        ("device: cpu", "device: cpu\npredict: {mirroring: false}", "predict"),
        ("device: cpu", "device: cpu\nevaluate: {tolerance: 2}", "evaluate"),
        ("  last: 2", "  last: 3", "(test cases|cases without masks)"),
    ):
        with pytest.raises(UserError, match=f"has begun with another spec: {key} was .*-o, or put"):
            run(old, new)
    assert tree(place / "out") == before
    assert run("A toy.", "Another sentence.") == 0
    assert runs(place)["about"] == "Another sentence."


def test_plans_may_change_after_a_training_that_left_no_checkpoint(place, commands, run):
    """Out of memory, then smaller plans."""
    commands.broken = "nnUNetv2_train"
    more = "also: [stock]\n"
    assert run(more=more, only=["draw0"]) == 1
    results = place / "out" / "nnUNet_results"
    for model in list(results.glob("Dataset*/*")) + list(results.glob("seed1/Dataset*/*")):
        (model / "fold_all").mkdir(exist_ok=True)
        (model / "fold_all" / "training_log.txt").write_text("out of memory")
    (results / "Dataset001_Toy_2labeled" / "Other__Plans__2d").mkdir(parents=True, exist_ok=True)
    commands.broken = None
    assert run("batch: 2", "batch: 3", more, only=["draw0"]) == 0
    assert not (results / "Dataset001_Toy_2labeled" / "Other__Plans__2d").exists()
    assert {c["state"] for c in runs(place)["cells"][:3]} == {"done"}


def test_a_folder_that_an_earlier_training_without_checkpoint_blocks(place, commands, run):
    commands.broken = "plan_and_preprocess"
    assert run() == 1
    (place / "out/nnUNet_results/Dataset001_Toy_2labeled/SSLTrainer").mkdir(parents=True)
    state = place / "out/datasets/Toy_2labeled/state.json"
    state.unlink()  # made anew with other plans, which the folder above forbade
    commands.broken = None
    assert run() == 0


def test_plans_may_not_change_after_a_pretraining(place, commands):
    def start(batch):
        os.environ["nnUNet_raw"] = str(place / "source")
        text = SPEC.replace("[SSLTrainer]", "[SSLTrainerSPCL]").replace("batch: 2", batch)
        (place / "toy.yaml").write_text(text)
        return run_benchmark(place / "toy.yaml", place / "out", only=["draw0_seed1_SSLTrainerSPCL"])

    commands.broken = "-tr SSLTrainerSPCL+"
    assert start("batch: 2") == 1
    (pretrained,) = (place / "out").rglob("checkpoint_final.pth")
    before = tree(place / "out")
    refused = (
        r"SSLTrainerSPCLPretrain.*fold_all holds a training on Toy_2labeled, which was made with "
        r"another spec: plans was .*2.*, now it is .*3.* -o, put plans back, or remove .*fold_all"
    )
    with pytest.raises(UserError, match=refused):
        start("batch: 3")
    assert tree(place / "out") == before
    commands.broken = None
    shutil.rmtree(pretrained.parent)
    assert start("batch: 3") == 0


def test_two_runners_do_not_train_one_model(place, commands, run):
    commands.broken = "nnUNetv2_train"
    run(only=["draw0"])
    commands.broken = None
    (cell,) = (place / "out/cells").glob("2labeled_draw0*Supervised*")
    model = Path(tasks.read_task(cell)["train"]["model"])
    model.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{model}.lock"):
        assert run(only=["draw0"]) == 1
    failed = [c["error"] for c in runs(place)["cells"] if c["state"] == "failed"]
    assert failed == [
        f"train: Another runner trains {model}. Wait for its end; the same command then goes on "
        f"with what it left."
    ]
    assert run(only=["draw0"]) == 0


def test_only_and_dry_run(place, commands, run, capsys):
    assert run(dry_run=True) == 0
    assert not (place / "out").exists() and not commands.ran
    assert "4 cells, 4 to run" in capsys.readouterr().out

    run(only=["draw1_seed1_SSLTrainerSup"])
    assert [c["state"] for c in runs(place)["cells"]] == ["waiting", "waiting", "done", "waiting"]
    assert len(commands.ran) == 3  # plan, train, predict
    before = tree(place / "out")
    capsys.readouterr()
    run(dry_run=True)
    assert tree(place / "out") == before
    lines = capsys.readouterr().out.splitlines()
    twin = "2labeled_draw1_seed1_SSLTrainerSupervised+labeled_mix=auto"
    assert lines[2].split()[:3] == [twin, "twin", "done"]
    assert "about" in lines[0] and "about" not in lines[1]  # a twin's time is known by now
    assert re.search(r"4 cells, 3 to run, about \d+ s and 2 of unknown time", lines[-1])


# --- what is refused ----------------------------------------------------------------------------


def test_a_test_image_among_training_images(place, commands, run):
    images = place / "source" / "Dataset901_Toy" / "imagesTr"
    (images / "tr_007_0000.nii.gz").write_bytes((images / "tr_003_0000.nii.gz").read_bytes())
    with pytest.raises(UserError, match=r"test image .*tr_007_0000.* training image .*tr_003_0000"):
        run()
    assert not commands.ran and not (place / "out" / "cells").exists()
    make_raw_dataset(place / "source", num_labeled=8, num_unlabeled=0, shape=(2, 16, 16))
    assert run() == 0  # changed files are read again


def test_test_masks_that_do_not_fit_their_images(place, commands, run, monkeypatch):
    masks = place / "source" / "Dataset901_Toy" / "labelsTr"
    good = {n: (masks / f"tr_00{n}.nii.gz").read_bytes() for n in (5, 6, 7)}
    for number in (5, 6):  # the former is a training case
        mask = sitk.ReadImage(str(masks / f"tr_00{number}.nii.gz"))
        mask.SetOrigin((0, 0, 3.5))
        sitk.WriteImage(mask, str(masks / f"tr_00{number}.nii.gz"))
    mask = sitk.ReadImage(str(masks / "tr_007.nii.gz"))
    sitk.WriteImage(sitk.Cast(mask > 0, sitk.sitkUInt8) * 9, str(masks / "tr_007.nii.gz"))
    refused = (
        r"labelsTr/tr_006.nii.gz has origin \(0, 0, 3.5\), but .*imagesTr/tr_006_0000.nii.gz has "
        r"\(0, 0, 0\). Correct the header, or resample the mask to the grid of the image.\n"
        r".*labelsTr/tr_007.nii.gz holds the value\(s\) 9, outside the set 0, 1, 2 .*dataset.json"
    )
    with pytest.raises(UserError, match=refused) as told:
        run()
    assert "tr_005" not in str(told.value)
    assert not commands.ran and not (place / "out" / "cells").exists()
    for number, content in good.items():
        (masks / f"tr_00{number}.nii.gz").write_bytes(content)
    assert run() == 0

    monkeypatch.setattr(benchmark.evaluate, "check_annotations", None)
    monkeypatch.setattr(benchmark, "inspect_case", None)
    assert run() == 0  # nothing is read twice


def test_masks_of_test_folders_are_checked(place, commands, run):
    make_raw_dataset(
        place / "other" / "raw", num_test=2, num_unlabeled=0, shape=(2, 16, 16), seed=5
    )
    path = place / "other" / "heldout" / "labelsTs" / "ts_001.nii.gz"
    mask = sitk.ReadImage(str(path))
    mask.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(mask, str(path))
    with pytest.raises(UserError, match=r"labelsTs/ts_001.nii.gz has direction \(-1, 0, 0, 0, -1"):
        run("last: 2", "images: other/heldout/imagesTs\n  labels: other/heldout/labelsTs")
    assert not commands.ran


def test_a_second_runner(place, commands, run):
    (place / "out").mkdir()
    refused = pytest.raises(UserError, match=r"Another runner works in .*out.*-o")
    with runner.locked(place / "out"), refused:
        run()
    assert run() == 0


def test_no_millimetres_without_spacing(place, run):
    path = place / "source" / "Dataset901_Toy" / "conversion.json"
    path.write_text(json.dumps({"protocol": "raw", "spacing_known": False}))
    with pytest.raises(UserError, match=r"evaluate: distances in mm.* evaluate: {units: voxel}"):
        run(dry_run=True)
    assert run(more="evaluate: {units: voxel}\n", dry_run=True) == 0


def test_circumference(place, commands, run):
    more = "evaluate: {circumference: [CLASS]}\n"
    with pytest.raises(UserError, match=r"line 16, evaluate.circumference: is for 2D images, but"):
        run(more=more.replace("CLASS", "organ1"))
    with pytest.raises(UserError, match=r"circumference: brain is no class. There are: organ"):
        run(more=more.replace("CLASS", "brain"))
    shutil.rmtree(place / "source")
    make_raw_dataset(place / "source", num_labeled=8, num_unlabeled=0, shape=(1, 16, 16))
    assert run(more=more.replace("CLASS", "organ1")) == 0
    errors = [row for row in results(place) if row["metric"] == "hc_abs_error"]
    assert {row["class"] for row in errors} == {"organ1"}
    assert all(row["value"] in ("", "0.0") and row["unit"] == "mm" for row in errors)
    write_report(place / "out", place / "report.html")
    page = (place / "report.html").read_text(encoding="utf-8")
    assert "|HC error|" in page and "the HC error should be near 0" in page
    with pytest.raises(UserError, match="another spec: evaluate was"):
        run()


def test_groups_that_lack_a_case(place, run):
    (place / "groups.csv").write_text("case,group\ntr_000,p0\n")
    with pytest.raises(UserError, match=r"Case tr_001 has no group"):
        run("source: Dataset901_Toy", "source: Dataset901_Toy\n  groups: groups.csv")


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("Dataset901_Toy", "Dataset902_None", r"line 5, dataset.source: no dataset.json in"),
        ("last: 2", "last: 8", "line 6, test: 8 test cases are asked for, but there are 8 cases"),
        ("labeled: [2]", "labeled: [6]", "line 10, labeled: 6 leaves nothing unlabelled: 6 cases"),
        ("labeled: [2]", "labeled: [2, 33%]", "line 10, labeled: names 2 twice"),
        ("last: 2", "set: val", "line 6, test: .* has no conversion.json"),
        ("protocol: raw", "protocol: cropped-literature", "line 3, protocol: .*converted as raw"),
        ("device: cpu", "device: cuda", "line 15, device: cuda, but none is found"),
    ],
)
def test_what_does_not_fit_the_data(place, run, old, new, words, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if "protocol" in old:
        path = place / "source" / "Dataset901_Toy" / "conversion.json"
        path.write_text(json.dumps({"protocol": "raw"}))
    with pytest.raises(UserError, match=words):
        run(old, new)
    assert not (place / "out").exists()


def test_a_folder_with_other_files(place, run):
    (place / "out").mkdir()
    (place / "out" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"out holds other files. Give an empty"):
        run()
    with pytest.raises(UserError, match="--workers is 0; give 1"):
        run(workers=0)


def test_slurm_without_submitit_or_sbatch(place, run, monkeypatch):
    with pytest.raises(UserError, match=r"--launcher slurm: .*leave the option out"):
        run(launcher="slurm")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"needs submitit. Run: pip install 'nnunet-ssl\[slurm\]'"):
        run(launcher="slurm")


# --- real processes -----------------------------------------------------------------------------

PROGRAM = """\
#!{python}
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
command = [Path(sys.argv[0]).name, *sys.argv[1:]]
mark = Path({marks!r}) / (command[0] + str(os.getpid()))
if command[0] == "nnUNetv2_train" and Path({marks!r}, "hang").exists():
    mark.with_suffix(".pid").write_text(str(os.getpid()))
    if os.fork():  # as nnU-Net's loaders: both stay
        time.sleep(120)
    time.sleep(120)
from evaluation.fakes import run_fake
run_fake(command, os.environ)
mark.write_text(" ".join(command))
"""


@pytest.fixture
def programs(place, monkeypatch):
    """Fake programs that other processes find where nnU-Net's are; returns their marks."""
    marks, scripts = place / "marks", place / "bin"
    marks.mkdir()
    scripts.mkdir()
    tests = str(Path(__file__).parents[1])
    for name in ("nnunet_ssl", "nnUNetv2_train", "nnUNetv2_predict"):
        program = PROGRAM.format(python=sys.executable, tests=tests, marks=str(marks))
        (scripts / name).write_text(program)
        (scripts / name).chmod(0o755)
    (place / "sitecustomize.py").write_text(
        "import sysconfig\nfound = sysconfig.get_path\n"
        f"sysconfig.get_path = lambda n, *a, **k: {str(scripts)!r} if n == 'scripts' "
        "else found(n, *a, **k)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(place))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return marks


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.slow  # three processes that import nnU-Net; fakes are killed above
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
def test_runner_killed_with_all_it_started_goes_on(place, programs):
    (place / "toy.yaml").write_text(SPEC.replace("[0, 1]", "[0]"))
    code = "import sys; from nnunet_ssl.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["benchmark", str(place / "toy.yaml"), "-o", str(place / "out")]
    command = [sys.executable, "-c", code, *arguments]
    (programs / "hang").touch()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        try:
            wait_for(lambda: list(programs.glob("*.pid")))
            second = subprocess.run(command, capture_output=True, text=True)
            assert second.returncode == 2 and "Another runner works in" in second.stderr
        finally:
            first.send_signal(signal.SIGKILL)
    (pid,) = [int(p.read_text(encoding="utf-8")) for p in programs.glob("*.pid")]
    wait_for(lambda: not alive(pid))
    group = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(place / "bin" / "nnUNetv2_train") not in group  # nor its child

    (programs / "hang").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "split done" not in done.stdout and "train done" in done.stdout
    ran = sorted(
        p.read_text(encoding="utf-8").split()[0] for p in programs.iterdir() if p.suffix != ".pid"
    )
    assert ran == ["nnUNetv2_predict"] * 2 + ["nnUNetv2_train"] * 2 + ["nnunet_ssl"]
    assert {c["state"] for c in runs(place)["cells"]} == {"done"}


def test_jobs_of_submitit(place, programs, run, monkeypatch):
    local = partial(benchmark.SubmititLauncher, cluster="local")
    monkeypatch.setattr(benchmark, "SubmititLauncher", local)
    assert run("draws: [0, 1]", "draws: [0]", launcher="slurm", only=["Supervised"]) == 0
    states = [c["state"] for c in runs(place)["cells"]]
    assert states == ["done", "waiting"]
    assert (
        place
        / "out"
        / "cells"
        / "2labeled_draw0_seed1_SSLTrainerSupervised+labeled_mix=auto"
        / "job.txt"
    ).is_file()


@pytest.fixture
def slurm(place, monkeypatch):
    """Slurm's programs, which tell what the returned folder holds: queue and accounting."""
    told, scripts = place / "slurm", place / "slurm_bin"
    told.mkdir()
    scripts.mkdir()
    programs = {
        "srun": "",
        "sbatch": f"echo x >> {told}/jobs; echo Submitted batch job 70$(wc -l < {told}/jobs)",
        "squeue": f"echo x >> {told}/asked; cat {told}/queue",
        "sacct": f"echo 'JobID|State|NodeList'; cat {told}/accounting",
    }
    for name, program in programs.items():
        (scripts / name).write_text(f"#!/bin/sh\n{program}\n")
        (scripts / name).chmod(0o755)
    (told / "queue").touch()
    (told / "accounting").touch()
    monkeypatch.setenv("PATH", f"{scripts}{os.pathsep}{os.environ['PATH']}")
    return told


@pytest.fixture
def task(place):
    """Folder of a task that does nothing."""
    folder = place / "task"
    runner.write_task(folder, {"environment": {}, "evaluate": {}})
    return folder


def test_a_job_that_slurm_no_longer_knows_has_ended(place, slurm, task, monkeypatch, capsys):
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(runner, "time", clock)
    launcher = runner.SubmititLauncher(place / "submitit", "cpu")
    job = launcher.start(task)
    (slurm / "queue").write_text(f"{job.job_id}\n")
    for _ in range(20):  # without accounting, the queue alone knows it
        assert not launcher.ended(job)
        now[0] += 59
    assert len((slurm / "asked").read_text().split()) < 20
    (slurm / "queue").unlink()  # squeue fails: nobody can tell
    for _ in range(20):
        assert not launcher.ended(job)
        now[0] += 59
    (slurm / "queue").write_text("1\n")
    now[0] += 61
    assert not launcher.ended(job)  # its result may still be on its way through the file system
    now[0] += 100
    assert not launcher.ended(job)
    now[0] += 200
    assert launcher.ended(job)

    job.paths.stderr.write_text("slurmstepd: Detected 1 oom_kill event\n")
    runner.close(task, launcher.log(task, job))
    error = tasks.read_state(task)["error"]
    assert "ended from outside" in error and str(job.paths.stderr) in error
    assert error.endswith("oom_kill event")
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    "queue, accounting, again",
    [
        ("", "", True),  # nobody knows it
        ("{id}\n", "", False),  # no accounting here
        ("{id}\n", "{id}|RUNNING|node1\n", False),
        ("", "{id}|OUT_OF_MEMORY|node1\n", True),
        ("", "{id}|CANCELLED by 1000|None assigned\n", True),
        ("", "{id}|PREEMPTED|node1\n", True),
        (None, "", False),  # Slurm does not answer
    ],
)
def test_the_next_runner_finds_a_job_or_starts_it_again(
    place, slurm, task, queue, accounting, again
):
    first = runner.SubmititLauncher(place / "submitit", "cpu").start(task)
    (slurm / "queue").unlink()
    if queue is not None:
        (slurm / "queue").write_text(queue.format(id=first.job_id))
    (slurm / "accounting").write_text(accounting.format(id=first.job_id))
    job = runner.SubmititLauncher(place / "submitit", "cpu").start(task)
    assert (job.job_id != first.job_id) == again
    assert (task / "job.txt").read_text(encoding="utf-8") == job.job_id


@pytest.mark.parametrize("workers, alone, cpus", [(1, False, 6), (3, False, 2), (3, True, 6)])
def test_processes_by_the_cpus_of_the_task(place, run, monkeypatch, workers, alone, cpus):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.setattr(runner, "POLL", 0)
    found = {}

    def score(truth, predictions, output, processes, **options):
        found["score"] = processes
        output.mkdir(parents=True)
        (output / "cases.csv").write_text("case,class,metric,unit,value\n")

    class Launcher(InProcess):
        def start(self, folder):
            tasks.run_task(folder, alone=alone)

    monkeypatch.setattr("nnunet_ssl.evaluation.evaluate.evaluate_folder", score)
    monkeypatch.setattr(benchmark, "LocalLauncher", lambda workers: Launcher())
    commands = Commands(monkeypatch)
    taken = {}

    def command(words, log, environment):
        taken[words[0]] = {name: environment[name] for name in tasks.PROCESSES}
        commands(words, log, environment)

    monkeypatch.setattr(tasks, "run_command", command)
    assert run(workers=workers, only=["draw0_seed1_SSLTrainerSup"]) == 0
    planned, _, predicted = commands.ran
    assert planned.endswith("-np 4 -npfp 4")
    half = str(max(1, min(3, cpus // 2)))
    assert predicted.endswith(f"-npp {half} -nps {half}") and found["score"] == cpus
    wanted = {"nnUNet_n_proc_DA": str(cpus), "nnUNet_def_n_proc": "6"}
    assert taken["nnUNetv2_train"] == wanted
    monkeypatch.setenv("nnUNet_def_n_proc", "5")
    folders = {"nnUNet_raw": place}
    assert runner.environment(folders, 1)["nnUNet_def_n_proc"] == "5"  # what the user set stays


def test_a_task_that_is_killed_from_outside(place, commands, run, monkeypatch):
    class Dying(InProcess):
        def start(self, folder):
            if "cells" in folder.parts:
                (folder / "logs").mkdir(exist_ok=True)
                (folder / "logs" / "task.log").write_text("some words\n")
                return None
            return super().start(folder)

    monkeypatch.setattr(benchmark, "LocalLauncher", lambda workers: Dying())
    assert run() == 1
    error = runs(place)["cells"][0]["error"]
    assert "ended from outside, most likely for lack of memory" in error and "some words" in error


def test_stopped_by_hand(place, commands, run, monkeypatch):
    stopped = []

    class Interrupted(InProcess):
        def ended(self, handle):
            raise KeyboardInterrupt

        def stop(self, handle):
            stopped.append(handle)

    monkeypatch.setattr(benchmark, "LocalLauncher", lambda workers: Interrupted())
    with pytest.raises(UserError, match=r"Stopped\. The same command goes on where it was"):
        run()
    assert len(stopped) == 1


def test_several_at_a_time_but_never_before_their_data_set(place, commands, run, monkeypatch):
    class Two(InProcess):
        slots = 2

        def __init__(self):
            self.running, self.most, self.started = set(), 0, []

        def start(self, folder):
            needed = folder.parent.parent / "datasets" / "Toy_2labeled"
            assert "datasets" in folder.parts or tasks.is_done(needed)
            self.running.add(folder)
            self.most = max(self.most, len(self.running))
            self.started.append(folder.name)
            return folder

        def ended(self, folder):
            if folder in self.running:
                self.running.remove(folder)
                super().start(folder)
                return False
            return True

    two = Two()
    monkeypatch.setattr(benchmark, "LocalLauncher", lambda workers: two)
    assert run(workers=2) == 0
    assert two.most == 2 and len(two.started) == 6 == len(set(two.started))


# --- the true stages ----------------------------------------------------------------------------


def test_true_stages(place, run, monkeypatch, no_plots):
    """nnU-Net's own entry points in this process; its validation on training cases is left out."""
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point
    from nnunetv2.run.run_training import run_training_entry

    from nnunet_ssl import cli
    from nnunet_ssl.base import SemiSupervisedTrainer

    entries = {
        "nnUNetv2_train": run_training_entry,
        "nnUNetv2_predict": predict_entry_point,
        "nnunet_ssl": lambda: cli.main(),
    }

    def call(command, log, environment):
        monkeypatch.setattr(sys, "argv", list(command))
        entries[command[0]]()

    monkeypatch.setattr(tasks, "run_command", call)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(runner, "POLL", 0)
    monkeypatch.setattr(benchmark, "LocalLauncher", lambda workers: InProcess())
    monkeypatch.setattr(SemiSupervisedTrainer, "perform_actual_validation", lambda self, x: None)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    make_raw_dataset(place / "source", num_labeled=6, num_unlabeled=0, shape=(4, 32, 32))
    assert run("draws: [0, 1]", "draws: [0]", only=["SSLTrainerSup"]) == 0
    cell = runs(place)["cells"][0]
    assert cell["state"] == "done" and cell["patches"] == {"labeled": 8, "unlabeled": 0}
    values = [float(r["value"]) for r in results(place) if r["metric"] == "dice"]
    assert len(values) == 4 and all(0 <= v <= 1 for v in values)
    checkpoint = (place / "out" / cell["ssl_log"]).with_name("checkpoint_final.pth")
    assert checkpoint.is_file()
