import json
import os
import pickle
import shutil

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from make_data import make_raw_dataset, write_image
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.unlabeled import read_manifest
from nnunet_ssl.errors import UserError
from nnunet_ssl.planning import preprocessing
from nnunet_ssl.planning.api import plan_and_preprocess
from nnunet_ssl.planning.workers import Workers

LABELED, UNLABELED = "nnUNetPlans_3d_fullres", "nnUNetPlans_3d_fullres_unlabeled"
CASES = [f"un_{i:03d}" for i in range(5)]


def plan(**options):
    return plan_and_preprocess(901, ["3d_fullres"], num_processes=1, **options)


@pytest.fixture
def calls(monkeypatch):
    """Names of the scans without masks that get preprocessed."""
    seen = []
    original = preprocessing.preprocess_case

    def recording(output, images, mask, *args):
        if mask is None:
            seen.append(output.name)
        original(output, images, mask, *args)

    monkeypatch.setattr(preprocessing, "preprocess_case", recording)
    return seen


def files_of(*cases):
    return {f"{c}{e}" for c in cases for e in (".b2nd", "_seg.b2nd", ".pkl")}


def names(folder):
    return {p.name for p in folder.iterdir()}


def test_scans_without_masks_equal_nnunets_preprocessing(toy, base):
    array = np.random.default_rng(3).normal(100, 9, (16, 32, 32)).astype(np.float32)
    array[:, :, :3] = 0
    array[:2, :2, :6] = 0  # inside the box around what is not zero, yet padding
    write_image(array, toy / "imagesUn" / "un_000_0000.nii.gz")
    plan()
    folder = base / UNLABELED
    assert names(folder) == files_of(*CASES)
    assert names(base / LABELED) == files_of("tr_000", "tr_001", "tr_002")
    assert set(infer_dataset_class(str(folder)).get_identifiers(str(folder))) == set(CASES)

    plans = json.loads((base / "nnUNetPlans.json").read_text(encoding="utf-8"))
    manager = PlansManager(plans)
    image = str(toy / "imagesUn" / "un_000_0000.nii.gz")
    data, seg, _ = DefaultPreprocessor(verbose=False).run_case(
        [image], None, manager, manager.get_configuration("3d_fullres"), {}
    )
    saved = blosc2.open(str(folder / "un_000.b2nd"), mode="r")
    np.testing.assert_array_equal(saved[:], data)
    mask = blosc2.open(str(folder / "un_000_seg.b2nd"), mode="r")[:]
    np.testing.assert_array_equal(mask, seg)
    assert mask.shape == (1, 16, 32, 29)
    assert (mask == -1).sum() == 2 * 2 * 3
    assert set(np.unique(mask)) == {-1, 0}
    properties = pickle.loads((folder / "un_000.pkl").read_bytes())
    assert "class_locations" not in properties

    manifest = read_manifest(base, plans, "3d_fullres")
    assert manifest["plans_name"] == "nnUNetPlans"
    assert manifest["configuration"] == "3d_fullres"
    assert list(manifest["cases"]) == CASES
    assert manifest["cases"]["un_000"]["content"] == properties["nnunet_ssl"]["content"]


def test_killed_and_continued(toy, base, monkeypatch, calls):
    original = DefaultPreprocessor.run_case_save

    def killed(self, output, images, mask, *args):
        if output.endswith("un_002"):
            (base / UNLABELED / ".un_002.part" / "un_002.b2nd").write_bytes(b"half")
            raise KeyboardInterrupt
        original(self, output, images, mask, *args)

    monkeypatch.setattr(DefaultPreprocessor, "run_case_save", killed)
    with pytest.raises(KeyboardInterrupt):
        plan()
    assert names(base / UNLABELED) == files_of("un_000", "un_001")
    assert not (base / f"{UNLABELED}.json").exists()

    monkeypatch.setattr(DefaultPreprocessor, "run_case_save", original)
    (base / UNLABELED / ".un_003.part").mkdir()  # as SIGKILL leaves it
    (base / UNLABELED / "un_004.b2nd").write_bytes(b"no .pkl yet")
    calls.clear()
    plan()
    assert calls == ["un_002", "un_003", "un_004"]
    assert names(base / UNLABELED) == files_of(*CASES)
    assert (base / f"{UNLABELED}.json").exists()


def test_only_what_changed_is_made_anew(toy, base, calls):
    plan()
    plan()
    assert calls == CASES
    calls.clear()

    rng = np.random.default_rng(4)
    changed = toy / "imagesUn" / "un_001_0000.nii.gz"
    array = rng.normal(100, 9, (16, 32, 32)).astype(np.float32)
    write_image(array, changed)
    (toy / "imagesUn" / "un_003_0000.nii.gz").unlink()
    plan()
    assert calls == ["un_001"]
    assert names(base / UNLABELED) == files_of("un_000", "un_001", "un_002", "un_004")
    manifest = json.loads((base / f"{UNLABELED}.json").read_text(encoding="utf-8"))
    assert list(manifest["cases"]) == ["un_000", "un_001", "un_002", "un_004"]
    calls.clear()

    write_image(array, changed, spacing=(1, 1, 2))  # same voxels, other resampling
    plan(keep_plans=True)
    assert calls == ["un_001"]
    assert blosc2.open(str(base / UNLABELED / "un_001.b2nd"), mode="r").shape == (1, 32, 32, 32)
    calls.clear()

    plan(overwrite_target_spacing=(2, 2, 2))  # other voxels for all
    assert calls == ["un_000", "un_001", "un_002", "un_004"]
    stored = json.loads((base / f"{UNLABELED}.json").read_text(encoding="utf-8"))
    assert stored["preprocessing"] != manifest["preprocessing"]


def test_stale_manifest_does_not_survive_a_failure(toy, base, monkeypatch):
    plan()
    monkeypatch.setattr(preprocessing, "preprocess_unlabeled_case", fail)
    with pytest.raises(ZeroDivisionError):
        plan(overwrite_target_spacing=(2, 2, 2))
    plans = json.loads((base / "nnUNetPlans.json").read_text(encoding="utf-8"))
    with pytest.raises(UserError, match="not preprocessed for configuration 3d_fullres"):
        read_manifest(base, plans, "3d_fullres")


def fail(*_):
    raise ZeroDivisionError


@pytest.mark.parametrize("case", ["un_001", "tr_001"])
@pytest.mark.parametrize("hidden_by_blosc2", [False, True])
def test_disk_full_while_preprocessing(toy, base, monkeypatch, case, hidden_by_blosc2):
    original = DefaultPreprocessor.run_case_save
    full = OSError(28, "No space left on device")

    def disk_full(self, output, images, mask, *args):
        if not output.endswith(case):
            return original(self, output, images, mask, *args)
        with open(f"{output}.b2nd", "wb") as f:
            f.write(b"half")
        if not hidden_by_blosc2:
            raise full
        monkeypatch.setattr(os, "fsync", raising(full))
        raise RuntimeError("Error while creating the NDArray")

    monkeypatch.setattr(DefaultPreprocessor, "run_case_save", disk_full)
    with pytest.raises(UserError) as caught:
        plan()
    assert str(base / UNLABELED if case == "un_001" else base) in str(caught.value)
    assert "the disk is full. Free some space" in str(caught.value)
    assert not (base / f"{UNLABELED}.json").exists()
    if case == "un_001":
        assert names(base / UNLABELED) == files_of("un_000")
    else:
        assert not (base / LABELED).exists()
        assert not list(base.glob(".*"))


def raising(error):
    def function(*_):
        raise error

    return function


def test_other_runtime_errors_are_not_called_a_full_disk(toy, monkeypatch):
    monkeypatch.setattr(DefaultPreprocessor, "run_case_save", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        plan()


def test_failed_run_keeps_the_former_annotated_folder(toy, base, monkeypatch):
    plan()
    before = names(base / LABELED)
    monkeypatch.setattr(DefaultPreprocessor, "run_case_save", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        plan()
    assert names(base / LABELED) == before


def test_removed_annotated_case_leaves_the_folder(toy, base):
    plan()
    for path in toy.glob("*/tr_002*"):
        path.unlink()
    content = json.loads((toy / "dataset.json").read_text(encoding="utf-8"))
    (toy / "dataset.json").write_text(json.dumps(content | {"numTraining": 2}))
    with pytest.raises(UserError, match=r"splits_final.json names tr_002 in fold 0.*delete"):
        plan()
    for folder in (toy, base):
        (folder / "splits_final.json").unlink()
    plan()
    assert names(base / LABELED) == files_of("tr_000", "tr_001")


def test_several_processes_give_the_same(roots, base, monkeypatch):
    make_raw_dataset(roots / "raw", num_labeled=2, num_unlabeled=3, channels=2)
    plan()
    before = {p.name: blosc2.open(str(p), mode="r")[:] for p in base.glob("*/*.b2nd")}
    manifest = (base / f"{UNLABELED}.json").read_text(encoding="utf-8")
    shutil.rmtree(base)
    plan_and_preprocess(901, ["3d_fullres"], num_processes=2, fingerprint_processes=1)
    assert (base / f"{UNLABELED}.json").read_text(encoding="utf-8") == manifest
    assert len(before) == 10
    for path in base.glob("*/*.b2nd"):
        np.testing.assert_array_equal(blosc2.open(str(path), mode="r")[:], before[path.name])


def test_a_worker_that_dies_is_reported():
    with (
        pytest.raises(
            UserError, match=r"worker process died \(work\).*fewer processes than 2: -np"
        ),
        Workers(2) as workers,
    ):
        workers.map(os._exit, [(9,)], "work")


def test_no_processes():
    with pytest.raises(UserError, match="processes is -1; give -np 1 or more"):
        Workers(-1)


def test_scans_that_do_not_belong_are_named_and_listed(toy, base, capsys):
    plan()
    manifest = base / f"{UNLABELED}.json"
    assert json.loads(manifest.read_text(encoding="utf-8"))["unlike"] == {}
    assert "unlike every annotated" not in capsys.readouterr().out
    for case in CASES[:2]:
        path = toy / "imagesUn" / f"{case}_0000.nii.gz"
        image = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        write_image(image.max() + 1 - image, path)
    plan(keep_plans=True)
    listed = json.loads(manifest.read_text(encoding="utf-8"))["unlike"]
    assert set(listed) == set(CASES[:2]) and all("layout" in why for why in listed.values())
    told = capsys.readouterr().out
    assert "2 of 5 scans in imagesUn look unlike every annotated scan: un_000 (" in told
    # kept cases are judged again: a new annotated scan may be like them
    plan(keep_plans=True)
    assert json.loads(manifest.read_text(encoding="utf-8"))["unlike"] == listed
