"""The rounds as a whole: nnU-Net's predictor and preprocessing are real, trainings are faked."""

import json
import re
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.errors import UserError
from nnunet_ssl.naming import resolve
from nnunet_ssl.offline import write
from nnunet_ssl.offline.command import pseudo_label
from nnunet_ssl.planning.preprocessing import LOOK

from .conftest import KEPT, TRAINER, by_intensity, make_model, read

FIRST, SECOND = "Dataset950_Toy_round1", "Dataset951_Toy_round2"


def run(**options):
    return pseudo_label(901, "2d", 950, **{"trainer": TRAINER, "device": "cpu"} | options)


def mask(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def names(folder):
    return sorted(p.name.removesuffix(".nii.gz") for p in folder.iterdir())


def test_a_round_from_a_finished_model(own, segmenting, trainings, start, no_plots, capsys):
    make_model(own, "Dataset901_Toy")
    assert run(rounds=1, drop=0.4) == 0
    assert [words[1:4] for words in trainings] == [["950", "2d", "all"]]
    raw, base = own / "nnUNet_raw" / FIRST, own / "nnUNet_preprocessed" / FIRST
    told = read(raw / "pseudo_labels.json")
    kept = [case for case, row in told["cases"].items() if row["kept"]]
    left = sorted(told["cases"].keys() - set(kept))
    assert len(kept) == 3 and len(left) == 2
    assert all(told["cases"][case]["why"] == "among the least stable 40 %" for case in left)
    assert min(told["cases"][c]["stability"] for c in kept) >= max(
        told["cases"][c]["stability"] for c in left
    )
    assert told["stability"]["members"] == ["at_40", "at_70", "view", "view0", "view1"]

    assert names(raw / "labelsTr") == sorted(["tr_000", "tr_001", "tr_002", *kept])
    assert names(raw / "imagesUn") == [f"{case}_0000" for case in left]
    assert read(raw / "dataset.json") == read(own / "nnUNet_raw/Dataset901_Toy/dataset.json") | {
        "numTraining": 6,
        "labels": {"background": 0, "organ1": 1, "organ2": 2, "ignore": 3},
    }
    source = own / "nnUNet_raw/Dataset901_Toy/labelsTr/tr_000.nii.gz"
    assert (mask(raw / "labelsTr/tr_000.nii.gz") == mask(source)).all()
    made = own / f"results/{FIRST}/self_training/teacher0/fold_all/masks/{kept[0]}.nii.gz"
    decision, target = mask(made), mask(raw / f"labelsTr/{kept[0]}.nii.gz")
    unsure = np.roll(decision, 1, -1) != decision  # where the earlier checkpoints differ
    assert ((target == 3) == unsure).all() and (target[~unsure] == decision[~unsure]).all()

    # plans and fingerprint are the teacher's
    plans = read(base / "nnUNetPlans.json")
    before = own / "nnUNet_preprocessed/Dataset901_Toy"
    assert plans == read(before / "nnUNetPlans.json") | {"dataset_name": FIRST}
    for name in ("dataset_fingerprint.json",):
        assert read(base / name) == read(before / name)

    trainer = start(FIRST)
    trainer.on_train_start()
    train, val = trainer.do_split()
    val = sorted(val)
    assert val == ["tr_000", "tr_001", "tr_002"]  # no mask that a model made
    assert sorted(set(train)) == sorted([*val, *kept])
    trainer.on_train_epoch_start()
    trainer.step = 1  # of 2: the unlabelled weight is on
    result = trainer.train_step(next(trainer.dataloader_train))
    assert np.isfinite(float(result["loss"]))
    trainer.on_train_end()
    stock = start(FIRST, trainer_class=nnUNetTrainer)
    stock.on_train_start()
    assert np.isfinite(float(stock.train_step(next(stock.dataloader_train))["loss"]))
    assert set(stock.do_split()[0]) == set(train)
    out = capsys.readouterr().out
    assert "3 of 5 pseudo-labels kept" in out and "nnUNetv2_predict -d 950 -c 2d" in out


def test_scans_unlike_the_annotated_ones_are_listed_again(
    own, segmenting, trainings, monkeypatch, capsys
):
    make_model(own, "Dataset901_Toy")
    for path in (own / "nnUNet_preprocessed/Dataset901_Toy/nnUNetPlans_2d_unlabeled").glob("*.pkl"):
        properties = load_pickle(str(path))
        properties[LOOK]["intensities"] += 10
        write_pickle(properties, str(path))
    real = write.preprocess_labeled

    def preprocess_labeled(raw, *rest):
        looks = real(raw, *rest)
        for case, look in zip(raw.labeled, looks, strict=True):
            look.intensities += 10 * case.startswith("un")  # as strange, but its mask was made
        return looks

    monkeypatch.setattr(write, "preprocess_labeled", preprocess_labeled)
    assert run(rounds=1, drop=0.4) == 0
    manifest = read(own / "nnUNet_preprocessed" / FIRST / "nnUNetPlans_2d_unlabeled.json")
    assert len(manifest["cases"]) == 2
    assert manifest["unlike"] == {case: ["intensities"] for case in manifest["cases"]}
    assert "2 of 2 scans in imagesUn look unlike every annotated" in capsys.readouterr().out


def test_rounds_end_when_the_masks_settle(own, segmenting, trainings, no_plots, capsys):
    assert run(rounds=3) == 0
    # the teacher, then the student of the first round; its masks are the same
    assert [words[1] for words in trainings] == ["901", "950"]
    assert all(words[5] == KEPT for words in trainings)
    assert "settled" in capsys.readouterr().out
    assert not (own / "nnUNet_raw" / SECOND).exists()


def test_every_round_has_a_data_set_of_its_own(own, segmenting, trainings, monkeypatch):
    monkeypatch.setattr("nnunet_ssl.offline.command.LEAST_CHANGE", -1)
    assert run(rounds=2) == 0
    assert [words[1] for words in trainings] == ["901", "950", "951"]
    second = read(own / "nnUNet_raw" / SECOND / "pseudo_labels.json")
    assert second["round"] == 2 and FIRST in second["teacher"]
    # all scans are labelled anew, not only those that were left
    assert sorted(second["cases"]) == [f"un_{k:03d}" for k in range(5)]
    assert sorted(read(own / "nnUNet_raw" / SECOND / "dataset.json")["labels"].values()) == [
        0,
        1,
        2,
        3,
    ]
    trainings.clear()
    assert run(rounds=2) == 0 and not trainings  # all is there


def test_folds_get_pseudo_labels_of_their_own(own, segmenting, trainings, start, no_plots):
    assert run(rounds=1, folds=["0", "2"]) == 0
    assert [(w[1], w[3]) for w in trainings] == [
        ("901", "0"),
        ("901", "2"),
        ("950", "0"),
        ("950", "2"),
    ]
    raw, base = own / "nnUNet_raw" / FIRST, own / "nnUNet_preprocessed" / FIRST
    told = read(raw / "pseudo_labels.json")["cases"]
    splits, before = (
        read(folder / "splits_final.json")
        for folder in (base, own / "nnUNet_preprocessed/Dataset901_Toy")
    )
    for number, (fold, old) in enumerate(zip(splits, before, strict=True)):
        assert fold["val"] == old["val"]
        added = set(fold["train"]) - set(old["train"])
        made = {n for n, row in told.items() if row["kept"] and row["fold"] == str(number)}
        assert added == made and len(made) == (4 if number in (0, 2) else 0)
    train, val = start(FIRST, fold=2).do_split()
    assert not {c for c in train if "_fold0" in c} and val == before[2]["val"]


def test_folds_that_label_together(own, segmenting, trainings):
    assert run(rounds=1, folds=["0", "1"], joint=True, parts=2) == 0
    assert [(w[1], w[3]) for w in trainings] == [("901", "0"), ("901", "1"), ("950", "all")]
    told = read(own / "nnUNet_raw" / FIRST / "pseudo_labels.json")
    assert told["folds"] == {"all": ["0", "1"]} and len(told["cases"]) == 5
    assert told["stability"]["members"][-2:] == ["fold0", "fold1"]
    assert told["validation"].startswith("none")
    # the folds hold no mask whose makers know their validation cases
    splits = read(own / "nnUNet_preprocessed" / FIRST / "splits_final.json")
    assert splits == read(own / "nnUNet_preprocessed/Dataset901_Toy/splits_final.json")
    tasks = sorted(p.name for p in (own / f"results/{FIRST}/self_training/tasks").glob("label0*"))
    assert tasks == ["label0_fold_all_all_0of2", "label0_fold_all_all_1of2"]


def test_values_per_case_follow_their_scan(own, segmenting, trainings):
    table = own / "nnUNet_raw/Dataset901_Toy/cases.csv"
    table.write_text("case,site\ntr_000,1\nun_001,2\nun_002,3\n")
    assert run(rounds=1, folds=["0"], drop=0) == 0
    rows = (own / "nnUNet_preprocessed" / FIRST / "cases.csv").read_text().split()
    assert {"case,site", "tr_000,1", "un_001,2", "un_002,3"} <= set(rows)
    assert {"un_001_fold0,2", "un_002_fold0,3"} & set(rows)


def test_all_rejected_changes_nothing(own, trainings, monkeypatch, capsys):
    monkeypatch.setattr(
        "nnunet_ssl.offline.predict.Teacher.segment",
        lambda self, data, *_, **__: np.zeros(data.shape[1:], np.uint8),
    )
    assert run() == 1
    out = capsys.readouterr().out
    assert "All 5 pseudo-labels for fold all were rejected: 5 times no organ1" in out
    assert not (own / "nnUNet_raw" / FIRST).exists()
    assert not (own / "nnUNet_preprocessed" / FIRST).exists()


def test_a_student_that_finds_nothing_ends_the_rounds(own, trainings, monkeypatch, capsys):
    def segment(self, data, properties, weights=None, mirroring=True, axes=()):
        first = self.predictor.plans_manager.dataset_name == "Dataset901_Toy"
        return by_intensity(data) * first

    monkeypatch.setattr("nnunet_ssl.offline.predict.Teacher.segment", segment)
    assert run(rounds=3) == 0
    out = capsys.readouterr().out
    assert "100.00 % of the probes' foreground changed" in out
    assert "no data set is made for round 2" in out and "Model of round 1" in out
    assert not (own / "nnUNet_raw" / SECOND).exists()


def test_a_scan_that_cannot_be_read_is_skipped(own, segmenting, trainings, capsys):
    scan = own / "nnUNet_raw/Dataset901_Toy/imagesUn/un_001_0000.nii.gz"
    scan.write_bytes(scan.read_bytes()[:200])
    (own / "nnUNet_preprocessed/Dataset901_Toy/nnUNetPlans_2d_unlabeled/un_003.b2nd").write_bytes(
        b"damaged"
    )
    assert run(rounds=1) == 0
    told = read(own / "nnUNet_raw" / FIRST / "pseudo_labels.json")["cases"]
    assert "un_001_0000.nii.gz" in told["un_001"]["why"] and "un_003" in told["un_003"]["why"]
    left = names(own / "nnUNet_raw" / FIRST / "imagesUn")
    assert not {"un_001_0000", "un_003_0000"} & set(left)
    assert "2 scans skipped" in capsys.readouterr().out


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "--rounds is 0"),
        ({"drop": 1.0}, "--drop is 1"),
        ({"folds": ["7"]}, "give all alone, or some of 0 1 2"),
        ({"folds": ["0", "all"]}, "give all alone"),
        ({"folds": ["0"], "joint": True}, "--joint"),
        ({"shapes": ["round"]}, "--shape round: it is none of the ready ones"),
        ({"shapes": ["ellipse"]}, "these images are 3D"),
        ({"plans": "None"}, r"None.json does not exist. Run: nnunet_ssl plan_and_preprocess"),
        ({"trainer": "SSLTrainer+keep_at=0.5"}, "keep_at must hold 0.4,0.7"),
        ({"hidden": "nowhere"}, "--hidden nowhere is no folder"),
        ({"model": "nowhere"}, "No finished model in"),
    ],
)
def test_bad_options(own, trainings, options, message):
    before = sorted(own.rglob("*"))
    with pytest.raises(UserError, match=message):
        run(**options)
    assert sorted(own.rglob("*")) == before and not trainings


def test_scans_that_came_after_preprocessing(own, trainings):
    scans = own / "nnUNet_raw/Dataset901_Toy/imagesUn"
    shutil.copy(scans / "un_000_0000.nii.gz", scans / "un_009_0000.nii.gz")
    with pytest.raises(UserError, match=r"changed since preprocessing: un_009 .*--keep_plans"):
        run()
    assert not trainings


def test_the_command_hands_its_options_on(monkeypatch):
    from nnunet_ssl import cli

    asked = []
    monkeypatch.setattr(
        "nnunet_ssl.offline.command.pseudo_label", lambda *a, **k: asked.append((a, k)) or 1
    )
    words = ["-d", "Dataset104_Liver", "-c", "2d", "-o", "105", "--folds", "0", "1", "--joint"]
    words += ["--shape", "largest", "volume", "--disable_tta", "--launcher", "slurm"]
    assert cli.main(["pseudo_label", *words]) == 1
    ((place, options),) = asked
    assert place == (104, "2d", 105)
    told = {"folds": ["0", "1"], "joint": True, "shapes": ["largest", "volume"], "rounds": 2}
    told |= {"mirroring": False, "launcher": "slurm", "drop": 0.2, "model": None}
    assert told.items() <= options.items()


def test_a_trainer_without_the_ignore_label(own, trainings, monkeypatch):
    monkeypatch.setattr(resolve("SSLTrainer"), "supports_ignore", False)
    with pytest.raises(UserError, match="does not support the ignore label"):
        run(trainer=TRAINER + "+save_every=9")  # a name that no other test has made
    assert not trainings


def test_id_that_is_taken(own, trainings):
    (own / "nnUNet_preprocessed/Dataset951_Other").mkdir()
    with pytest.raises(UserError, match=r"Id 951 is taken by .*Dataset951_Other"):
        run(rounds=2)
    assert not trainings


def test_models_that_cannot_start(own, trainings):
    model = make_model(own, "Dataset901_Toy", folds=("0",))
    with pytest.raises(UserError, match=r"has no finished fold all. Folds there: 0"):
        run(model=model)
    plans = read(model / "plans.json")
    (model / "plans.json").write_text(json.dumps(plans | {"dataset_name": "Dataset004_Other"}))
    with pytest.raises(UserError, match="a model of Dataset004_Other, not of Dataset901_Toy"):
        run(model=model)
    (model / "plans.json").write_text(json.dumps(plans))
    (model / "fold_0/validation").mkdir()
    (model / "fold_0/validation/tr_001.nii.gz").touch()
    with pytest.raises(UserError, match="another split than fold 0 has now"):
        run(model=model, folds=["0"])


def test_a_collapsed_model_must_not_teach(own, trainings):
    log = {
        "terms": {"sup": -0.5},
        "pseudo_labels": {"brake": 0.3},
        "pseudo_dice": {"teacher": [0.5, 0.6]},
    }
    make_model(own, "Dataset901_Toy", log=log)
    with pytest.raises(UserError, match=r"must not teach: .*the brake stood at 0.30"):
        run()
    assert not (own / "nnUNet_raw" / FIRST).exists()


def test_a_run_that_was_begun_otherwise(own, segmenting, trainings):
    assert run(rounds=1) == 0
    with pytest.raises(UserError, match=r"has begun with drop 0.2, now it is 0.3"):
        run(rounds=1, drop=0.3)


def test_an_annotation_that_was_corrected_on_the_way(own, segmenting, trainings):
    assert run(rounds=1) == 0
    path = own / "nnUNet_raw/Dataset901_Toy/labelsTr/tr_001.nii.gz"
    before, image = path.read_bytes(), sitk.ReadImage(str(path))
    sitk.WriteImage(image * 0, str(path))
    with pytest.raises(UserError, match=r"The annotation of tr_001 .* is not the one"):
        run(rounds=2)
    path.write_bytes(before)
    assert run(rounds=1) == 0


# --- killed and started again -------------------------------------------------------------------


def test_killed_at_any_stage_it_goes_on(own, segmenting, trainings, monkeypatch):
    from evaluation.fakes import Killed

    from nnunet_ssl.offline import command, predict

    def dying(real, after):
        """Work some times, then die like a killed process."""
        left = [after]

        def work(*args, **options):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(*args, **options)

        return work

    for module, name, after in (
        (predict, "label_case", 2),
        (predict, "add_line", 1),  # masks written, the line not
        (write, "link_images", 3),
        (command, "preprocess", 0),
        (write, "preprocess_labeled", 0),
        (write, "preprocess_unlabeled", 0),
        (command, "change_of", 0),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, dying(getattr(module, name), after))
            with pytest.raises(Killed):
                run(rounds=1)
        # never a data set that is not whole
        raw = own / "nnUNet_raw" / FIRST
        assert not raw.exists() or (raw / "pseudo_labels.json").is_file()
    assert run(rounds=1) == 0
    assert [words[1] for words in trainings] == ["901", "950"]  # each once
    told = read(raw / "pseudo_labels.json")["cases"]
    assert sum(row["kept"] for row in told.values()) == 4
    assert not list((own / "nnUNet_raw").glob(".*")) and not list(
        (own / "nnUNet_preprocessed" / FIRST).glob(".*")
    )


def test_the_page(own, segmenting, trainings, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for k in range(4):
        image = sitk.ReadImage(
            str(own / f"nnUNet_raw/Dataset901_Toy/imagesUn/un_{k:03d}_0000.nii.gz")
        )
        labels = by_intensity(torch.from_numpy(sitk.GetArrayFromImage(image))[None])
        truth = sitk.GetImageFromArray(np.roll(labels, 1 + k // 2, 1))
        sitk.WriteImage(truth, str(hidden / f"un_{k:03d}.nii.gz"))
    assert run(rounds=1, hidden=hidden, shapes=["largest", "volume"]) == 0
    page = (own / f"results/{FIRST}/self_training/report.html").read_text(encoding="utf-8")
    assert "Surest:" in page and "Median:" in page and "Least sure:" in page
    assert "4 cases with hidden masks" in page and "true Dice (%)" in page
    assert page.count('aria-label="Hidden mask"') >= 2
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)
    assert "<script" not in page and 'src="http' not in page
    assert "refused by largest, volume" in page and "organ2" in page


@pytest.mark.slow
def test_the_command_with_real_trainings(own, monkeypatch):
    from nnunet_ssl.cli import main

    # a toy model is sure of nothing
    monkeypatch.setattr("nnunet_ssl.offline.select.MOST_UNSURE", 1)
    model = make_model(own, "Dataset901_Toy")
    words = ["pseudo_label", "-d", "901", "-c", "2d", "-o", "950", "--rounds", "1"]
    words += ["-tr", TRAINER, "-device", "cpu", "--parts", "2", "--model", str(model)]
    assert main(words) == 0
    (student,) = (own / "results" / FIRST).glob("SSLTrainer*")
    assert student.name.startswith(KEPT)
    summary = read(student / "fold_all/validation/summary.json")
    assert len(summary["metric_per_case"]) == 3  # masks that a model made validate nothing
