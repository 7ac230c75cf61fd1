"""Medical Segmentation Decathlon: layout, 4D files, quirks; and the real hippocampus."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion import main
from nnunet_ssl.errors import UserError

from .conftest import names

HIPPOCAMPUS = Path(__file__).parents[3] / "shared" / "data" / "hippocampus" / "Task04_Hippocampus"


@pytest.fixture
def task(tmp_path, write, make_case) -> Path:
    """Task05_Prostate with two channels in 4D, a float mask, hidden twins, two test images."""
    folder = tmp_path / "Task05_Prostate"
    for seed in range(5):
        image, mask = make_case(seed)
        image = sitk.JoinSeries([sitk.GetImageFromArray(i) for i in (image, image + 1000)])
        image.SetSpacing((0.6, 0.6, 4, 1))
        image.SetOrigin((5, 6, 7, 0))
        path = folder / "imagesTr" / f"prostate_{seed:02d}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(path))
        kind = np.float32 if seed == 2 else np.uint8
        write(mask.astype(kind), folder / "labelsTr" / path.name, (0.6, 0.6, 4), (5, 6, 7))
        (folder / "imagesTr" / f"._{path.name}").write_text("junk")
    (folder / "imagesTs").mkdir()
    for seed, source in ((7, 4), (8, 8)):  # 07 is a copy of an annotated image
        image = make_case(source)[0]
        image = sitk.JoinSeries([sitk.GetImageFromArray(i) for i in (image, image + 1000)])
        sitk.WriteImage(image, str(folder / "imagesTs" / f"prostate_{seed:02d}.nii.gz"))
    about = {
        "name": "PROSTATE",
        "licence": "CC-BY-SA 4.0",
        "modality": {"1": "ADC", "0": "T2"},
        "labels": {"0": "background", "1": "PZ", "2": "TZ"},
        "training": [
            {"image": f"./imagesTr/prostate_{i:02d}.nii.gz", "label": ""} for i in range(5)
        ],
        "test": ["./imagesTs/prostate_07.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


def run(task, *options):
    return main(["MSD", "-i", str(task), "-d", "5", "-np", "1", *map(str, options)])


def test_channels_labels_and_test_set(task, raw_root, heldout, make_case):
    run(task, "--test", 2, "--labeled", 2)
    folder = raw_root / "Dataset005_PROSTATE_2labeled"
    assert names(folder / "imagesTr") == [
        f"prostate_{i:02d}_{c:04d}.nii.gz" for i in (0, 1) for c in (0, 1)
    ]
    assert names(folder / "imagesUn") == [f"prostate_02_{c:04d}.nii.gz" for c in (0, 1)]
    assert names(heldout / folder.name / "test_labels") == [
        "prostate_03.nii.gz",
        "prostate_04.nii.gz",
    ]
    about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert about["channel_names"] == {"0": "T2", "1": "ADC"}
    assert about["labels"] == {"background": 0, "PZ": 1, "TZ": 2}
    assert about["licence"] == "CC-BY-SA 4.0" and about["file_ending"] == ".nii.gz"
    second = sitk.ReadImage(str(folder / "imagesUn" / "prostate_02_0001.nii.gz"))
    np.testing.assert_allclose(
        sitk.GetArrayFromImage(second), make_case(2)[0] + 1000, rtol=0, atol=1e-3
    )
    np.testing.assert_allclose(second.GetSpacing(), (0.6, 0.6, 4), rtol=1e-6)
    np.testing.assert_allclose(second.GetOrigin(), (5, 6, 7), rtol=1e-6)
    hidden = sitk.ReadImage(str(heldout / folder.name / "hidden_labels" / "prostate_02.nii.gz"))
    assert hidden.GetPixelID() == sitk.sitkUInt8
    np.testing.assert_array_equal(sitk.GetArrayFromImage(hidden), make_case(2)[1])


def test_test_images_as_unlabeled_ones(task, raw_root, capsys):
    run(task.parent, "--use-test-images")  # the folder around the task will do
    folder = raw_root / "Dataset005_PROSTATE"
    record = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
    assert record["dropped"] == ["prostate_07"], "a copy of an annotated image"
    assert record["unlabeled"] == ["prostate_08"]
    assert "mask" not in record["sources"]["prostate_08"]
    assert len(record["labeled"]) == 5


def test_files_in_no_list_are_reported(task, raw_root, capsys):
    for part in ("imagesTr", "labelsTr"):
        shutil.copy(task / part / "prostate_00.nii.gz", task / part / "prostate_99.nii.gz")
    run(task)
    assert "in no list, not converted: prostate_99" in capsys.readouterr().out


def test_refusals(task, raw_root, tmp_path):
    (task / "labelsTr" / "prostate_01.nii.gz").unlink()
    with pytest.raises(UserError, match="lacks the masks of prostate_01"):
        run(task)
    (task / "imagesTr" / "prostate_01.nii.gz").unlink()
    with pytest.raises(UserError, match=r"not in the source: prostate_01.*--allow-missing"):
        run(task)
    (task / "dataset.json").write_text('{"channel_names": {}}')
    with pytest.raises(UserError, match="nnU-Net v2 already"):
        run(task)
    (task / "dataset.json").write_text('{"name": "x"')
    with pytest.raises(UserError, match=r"dataset.json is not valid JSON"):
        run(task)
    (task / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"holds no dataset.json, but .*\.nii\.gz"):
        run(task)
    assert names(raw_root) == []


def test_several_tasks_are_refused_by_name(task, raw_root):
    shutil.copytree(task, task.parent / "Task09_Spleen")
    with pytest.raises(UserError, match="Task05_Prostate, Task09_Spleen"):
        run(task.parent)


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the hippocampus data are not here")
def test_real_hippocampus_becomes_trainable(raw_root, tmp_path):
    """Twelve cases, among them hippocampus_003 with a float mask; planning accepts the result."""
    from nnunet_ssl.planning.api import plan_and_preprocess

    task = tmp_path / HIPPOCAMPUS.name
    images = sorted((HIPPOCAMPUS / "imagesTr").glob("hippo*"))[:12]
    for part in ("imagesTr", "labelsTr"):
        (task / part).mkdir(parents=True)
        for image in images:
            shutil.copy(HIPPOCAMPUS / part / image.name, task / part)
    shutil.copy(HIPPOCAMPUS / "dataset.json", task)
    run(task, "--allow-missing", "--test", 4, "--labeled", 3, "--draw", 1)
    folder = raw_root / "Dataset005_Hippocampus_3labeled_draw1"
    assert (len(names(folder / "imagesTr")), len(names(folder / "imagesUn"))) == (3, 5)
    plans = plan_and_preprocess(5, ["3d_fullres"], num_processes=1, fingerprint_processes=1)
    made = raw_root.parent / "nnUNet_preprocessed" / folder.name
    assert (made / f"{plans}.json").is_file()
