import json
import os
from pathlib import Path

import blosc2
import numpy as np
import pytest
from make_data import make_raw_dataset, write_image
from nnunetv2.experiment_planning import plan_and_preprocess_api as stock
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
    DatasetFingerprintExtractor,
)
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)

from nnunet_ssl.data.unlabeled import read_manifest
from nnunet_ssl.errors import UserError
from nnunet_ssl.planning.api import plan_and_preprocess


def plan(*configurations, **options):
    return plan_and_preprocess(901, configurations or ("2d",), num_processes=1, **options)


def load(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


class FewerVoxels(DatasetFingerprintExtractor):
    """Stock, but with a million voxels of each of three cases, as ours draws."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = 3e6


def test_stock_commands_work_on_the_same_folder_and_agree(toy, roots, base, monkeypatch):
    """--plan-on labeled gives stock nnU-Net's fingerprint, plans and voxels."""
    dataset_json = (toy / "dataset.json").read_bytes()
    plan("3d_fullres", plan_on="labeled")
    ours, own_print = load(base / "nnUNetPlans.json"), load(base / "dataset_fingerprint.json")

    (roots / "stock").mkdir()
    monkeypatch.setenv("nnUNet_preprocessed", str(roots / "stock"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    stock.extract_fingerprint_dataset(901, FewerVoxels, num_processes=1)
    stock.plan_experiments([901])
    stock.preprocess([901], configurations=["3d_fullres"], num_processes=[1])
    other = roots / "stock" / "Dataset901_Toy"
    theirs, stock_print = load(other / "nnUNetPlans.json"), load(other / "dataset_fingerprint.json")

    own_print.pop("nnunet_ssl")
    assert own_print == stock_print
    assert ours == theirs
    identifier = "nnUNetPlans_3d_fullres"
    names = sorted(p.name for p in (base / identifier).iterdir())
    assert names == sorted(p.name for p in (other / identifier).iterdir())
    for name in (n for n in names if n.endswith(".b2nd")):
        a, b = (blosc2.open(str(f / identifier / name), mode="r")[:] for f in (base, other))
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b)
    assert (toy / "dataset.json").read_bytes() == dataset_json
    assert (base / "splits_final.json").read_bytes() == (toy / "splits_final.json").read_bytes()
    for case in ("tr_000", "tr_001", "tr_002"):
        mask = (base / "gt_segmentations" / f"{case}.nii.gz").read_bytes()
        assert mask == (toy / "labelsTr" / f"{case}.nii.gz").read_bytes()


def test_plans_on_all_scans(toy, base, capsys):
    """Shapes, spacings and the number of cases count; dataset.json stays as it is."""
    dataset_json = (toy / "dataset.json").read_bytes()
    rng = np.random.default_rng(1)
    for i in range(5):
        write_image(
            rng.normal(100, 9, (20, 40, 44)).astype(np.float32),
            toy / "imagesUn" / f"un_{i:03d}_0000.nii.gz",
            spacing=(0.5, 0.5, 0.5),
        )
    plan("2d", plan_on="labeled")
    assert "Next: nnUNetv2_train 901 2d all -tr SSLTrainer\n" in capsys.readouterr().out
    labeled = load(base / "nnUNetPlans.json")
    assert load(base / "dataset_fingerprint.json")["nnunet_ssl"]["plan_on"] == "labeled"

    assert plan("2d", overwrite_plans_name="allPlans") == "allPlans"
    assert "without masks. allPlans: 2d: batch" in (out := capsys.readouterr().out)
    assert "Next: nnUNetv2_train 901 2d all -tr SSLTrainer -p allPlans\n" in out
    fingerprint, everything = load(base / "dataset_fingerprint.json"), load(base / "allPlans.json")
    assert fingerprint["spacings"] == [[1, 1, 1]] * 3 + [[0.5, 0.5, 0.5]] * 5
    assert fingerprint["shapes_after_crop"] == [[16, 32, 32]] * 3 + [[20, 40, 44]] * 5
    assert fingerprint["nnunet_ssl"] == {"plan_on": "all", "num_labeled": 3, "num_unlabeled": 5}
    assert labeled["configurations"]["2d"]["spacing"] == [1, 1]
    assert everything["configurations"]["2d"]["spacing"] == [0.5, 0.5]
    assert (toy / "dataset.json").read_bytes() == dataset_json
    assert (base / "dataset.json").read_bytes() == dataset_json


def test_hidden_files_do_not_count(toy, base):
    """macOS writes one beside each file on a foreign disk; they sort first."""
    for name in ("imagesTr/._tr_000_0000", "labelsTr/._tr_000", "imagesUn/._un_000_0000"):
        (toy / f"{name}.nii.gz").write_bytes(b"\0\5\x16\7")
    plan("2d")
    assert load(base / "nnUNetPlans.json")["image_reader_writer"] == "SimpleITKIO"
    assert len(list((base / "nnUNetPlans_2d").glob("*.pkl"))) == 3


def test_batch_cap_counts_all_scans(roots, base):
    """5 % of 3 x 16 slices is a batch of 2, of 20 x 16 slices a batch of 16."""
    make_raw_dataset(roots / "raw", num_unlabeled=17)
    plan("2d", plan_on="labeled")
    assert load(base / "nnUNetPlans.json")["configurations"]["2d"]["batch_size"] == 2
    plan("2d")
    assert load(base / "nnUNetPlans.json")["configurations"]["2d"]["batch_size"] == 16
    assert os.environ["nnUNet_n_proc_DA"] == "0"


def test_keeps_plans_that_have_results(toy, roots, base):
    plan("2d")
    model = roots / "results" / "Dataset901_Toy" / "SSLTrainer__nnUNetPlans__2d" / "fold_all"
    model.mkdir(parents=True)
    plan("2d")  # no checkpoint yet
    checkpoint = model / "checkpoint_latest.pth"
    checkpoint.touch()
    files = [base / n for n in ("nnUNetPlans.json", "dataset_fingerprint.json")]
    before = [f.read_bytes() for f in files]
    with pytest.raises(UserError) as caught:
        plan("2d", plan_on="labeled")
    for word in (base / "nnUNetPlans.json", checkpoint, "--keep_plans", "-overwrite_plans_name"):
        assert str(word) in str(caught.value)
    assert [f.read_bytes() for f in files] == before

    rng = np.random.default_rng(2)
    new = rng.normal(100, 9, (8, 32, 32)).astype(np.float32)
    write_image(new, toy / "imagesUn" / "un_new_0000.nii.gz")
    assert plan("2d", keep_plans=True) == "nnUNetPlans"
    assert [f.read_bytes() for f in files] == before
    assert "un_new" in read_manifest(base, load(files[0]), "2d")["cases"]
    assert plan("2d", overwrite_plans_name="others") == "others"
    with pytest.raises(UserError, match=r"nothing.json does not exist.*Omit --keep_plans"):
        plan("2d", keep_plans=True, overwrite_plans_name="nothing")


def test_two_planners_share_a_folder(toy, base, capsys):
    """ResEnc plans name their 2d data nnUNetPlans_2d too: fine if they preprocess alike."""
    plan("2d")
    plan("2d", planner="nnUNetPlannerResEncM")
    out = capsys.readouterr().out
    assert "2d: 5 scans are preprocessed already" in out
    assert "WARNING" not in out
    plain, resenc = (load(base / f"nnUNet{n}Plans.json") for n in ("", "ResEncUNetM"))
    assert read_manifest(base, plain, "2d") == read_manifest(base, resenc, "2d")

    plan("2d", planner="nnUNetPlannerResEncM", overwrite_target_spacing=(1, 0.5, 0.5))
    out = capsys.readouterr().out
    assert "WARNING: nnUNetPlans.json keeps its 2d data in" in out
    assert "preprocess again with --keep_plans" in out
    with pytest.raises(UserError, match=r"nnUNetPlans_2d_unlabeled.json belongs to plans"):
        read_manifest(base, plain, "2d")
    plan("2d", keep_plans=True)
    assert len(read_manifest(base, plain, "2d")["cases"]) == 5


@pytest.mark.parametrize(
    "options, words",
    [
        ({"planner": "NoPlanner"}, "-pl NoPlanner.*Check the spelling"),
        ({"preprocessor": "NoPre"}, "-preprocessor_name NoPre.*Check the spelling"),
        ({"plan_on": "some"}, "--plan-on is 'some'; give 'all' or 'labeled'"),
        ({"overwrite_target_spacing": (1, 0, 1)}, r"\[1, 0, 1\]; give three positive numbers"),
    ],
)
def test_bad_options(toy, base, options, words):
    with pytest.raises(UserError, match=words):
        plan("2d", **options)
    assert not base.exists()


def test_configurations_not_in_the_plans(roots, base, capsys):
    make_raw_dataset(roots / "raw", dim=2)
    plan("2d", "3d_fullres", "3d_cascade_fullres")
    out = capsys.readouterr().out
    assert "nnUNetPlans.json has no configuration 3d_fullres; skipped" in out
    assert "3d_cascade_fullres is not preprocessed" in out
    with pytest.raises(UserError, match=r"none of the configurations 3d_fullres.*with -c: 2d"):
        plan("3d_fullres")


def test_masks_without_foreground(roots, base):
    folder = make_raw_dataset(roots / "raw", num_labeled=1)
    write_image(np.zeros((16, 32, 32), np.uint8), folder / "labelsTr" / "tr_000.nii.gz")
    with pytest.raises(UserError, match=r"labelsTr marks any foreground voxel.*Add masks"):
        plan("2d")
    assert not (base / "dataset_fingerprint.json").exists()


def test_full_disk_while_planning_restores_the_plans(toy, base, monkeypatch):
    plan("2d")
    before = (base / "nnUNetPlans.json").read_bytes()

    def half_written(self, plans):
        (base / "nnUNetPlans.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ExperimentPlanner, "save_plans", half_written)
    with pytest.raises(UserError, match=r"nnUNetPlans.json: the disk is full. Free some space"):
        plan("2d")
    assert (base / "nnUNetPlans.json").read_bytes() == before


def test_preprocessed_folder_not_writable(toy, roots, base, monkeypatch):
    mkdir = Path.mkdir

    def refusing(self, *args, **kwargs):
        if self == base:
            raise PermissionError(13, "Permission denied")
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refusing)
    with pytest.raises(UserError, match=r"Dataset901_Toy: the folder is not writable. Change"):
        plan("2d")
    assert not (toy / "splits_final.json").exists()


def test_values_per_case_are_carried_to_the_preprocessed_data(toy, base):
    base.mkdir()
    (base / "cases.csv").write_text("case,old\n")
    plan()
    assert (base / "cases.csv").read_text(encoding="utf-8") == "case,old\n"  # nothing to carry
    (toy / "cases.csv").write_text("case,phase\ntr_000,ED\n")
    plan(keep_plans=True)
    assert (base / "cases.csv").read_text(encoding="utf-8") == "case,phase\ntr_000,ED\n"
