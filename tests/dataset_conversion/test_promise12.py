"""PROMISE12: header and data in two files, folders of all kinds, numbers used twice, split."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion import main
from nnunet_ssl.errors import UserError

from .conftest import names

SPACING, ORIGIN = (0.4, 0.5, 3.6), (-70.0, 5.0, -20.0)


def make_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros((2, 6, 5), np.int8)
    mask[1, 2:4, 1:3] = 1
    return np.random.default_rng(seed).integers(0, 900, mask.shape).astype(np.int16), mask


def write_case(folder: Path, number: int, seed: int | None = None, mask: bool = True) -> None:
    """CaseXX.mhd and .raw, and the same of its mask."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = make_case(number if seed is None else seed)
    for array, end in list(zip(arrays, ("", "_segmentation"), strict=True))[: 1 + mask]:
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(SPACING)
        image.SetOrigin(ORIGIN)
        sitk.WriteImage(image, str(folder / f"Case{number:02d}{end}.mhd"))


@pytest.fixture
def challenge(tmp_path) -> Path:
    """50 scans in three parts, and three test scans with numbers that training has, too."""
    source = tmp_path / "promise"
    for number in range(50):
        write_case(source / f"TrainingData_Part{1 + number // 20}", number)
    for number in range(3):
        write_case(source / "TestData", number, 100 + number, mask=False)
    (source / "TestData" / "._Case00.mhd").write_text("junk")
    return source


@pytest.fixture
def part(tmp_path) -> Path:
    """Two scans for training."""
    for number in (0, 1):
        write_case(tmp_path / "promise" / "TrainingData_Part1", number)
    return tmp_path / "promise" / "TrainingData_Part1"


def run(source, *options):
    return main(["PROMISE12", "-i", str(source), "-d", "5", "-np", "1", *map(str, options)])


def record(raw_root, name):
    return json.loads((raw_root / name / "conversion.json").read_text(encoding="utf-8"))


def cases(*numbers: int) -> list[str]:
    return [f"Case{i:02d}" for i in range(*numbers)]


def test_split_by_number(challenge, raw_root, heldout, capsys):
    run(challenge, "--labeled", 7)
    folder, hidden = (r / "Dataset005_PROMISE12_7labeled" for r in (raw_root, heldout))
    assert names(folder / "imagesTr") == [f"{c}_0000.nii.gz" for c in cases(7)]
    assert names(folder / "imagesUn") == [f"{c}_0000.nii.gz" for c in cases(7, 35)]
    assert names(hidden / "hidden_labels") == [f"{c}.nii.gz" for c in cases(7, 35)]
    assert names(hidden / "val_labels") == [f"{c}.nii.gz" for c in cases(35, 40)]
    assert names(hidden / "test_images") == [f"{c}_0000.nii.gz" for c in cases(40, 50)]
    assert "NOTE: 3 test scan(s) of the challenge left out" in capsys.readouterr().out
    image = sitk.ReadImage(str(folder / "imagesTr" / "Case03_0000.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), make_case(3)[0])
    np.testing.assert_allclose(image.GetSpacing(), SPACING, atol=1e-6)
    np.testing.assert_allclose(image.GetOrigin(), ORIGIN, atol=1e-5)
    made = record(raw_root, folder.name)
    assert made["protocol"] == "raw"
    assert made["sources"]["Case25"]["label"] == "TrainingData_Part2/Case25_segmentation.mhd"

    run(challenge, "--labeled", 3, "--draw", 1, "-d", 6)
    drawn = record(raw_root, "Dataset006_PROMISE12_3labeled_draw1")
    assert len(drawn["labeled"]) == 3
    assert drawn["labeled"] != cases(3)
    assert set(drawn["labeled"]) <= set(cases(35))


def test_test_images_without_masks(challenge, raw_root):
    run(challenge, "--use-test-images", "--labeled", 3)
    folder = raw_root / "Dataset005_PROMISE12_3labeled"
    made = record(raw_root, folder.name)
    assert made["order"] == [*cases(35), *(f"test_{c}" for c in cases(3))]
    image = sitk.ReadImage(str(folder / "imagesUn" / "test_Case00_0000.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), make_case(100)[0])


def test_other_folders(tmp_path, raw_root):
    """Masks away from the scans, small letters, test scans in a folder that doesn't say so."""
    source = tmp_path / "training_data"
    write_case(source / "a", 0)
    (source / "masks").mkdir()
    for end in ("mhd", "raw"):
        (source / "a" / f"Case00_segmentation.{end}").rename(
            source / "masks" / f"Case00_segmentation.{end}"
        )
    (source / "a" / "Case00.mhd").rename(source / "a" / "case00.mhd")
    write_case(source / "b", 1)
    write_case(source / "hidden", 1, 101, mask=False)
    run(source, "--use-test-images", "--allow-missing")
    folder = raw_root / "Dataset005_PROMISE12"
    assert names(folder / "imagesTr") == ["Case00_0000.nii.gz", "Case01_0000.nii.gz"]
    assert names(folder / "imagesUn") == ["test_Case01_0000.nii.gz"]
    for name, seed in (("imagesTr/Case01", 1), ("imagesUn/test_Case01", 101)):
        image = sitk.ReadImage(str(folder / f"{name}_0000.nii.gz"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), make_case(seed)[0])


def test_own_lists(challenge, raw_root, tmp_path):
    (tmp_path / "train.txt").write_text("Case44\nCase02\n")
    (tmp_path / "test.txt").write_text("Case01\n")
    options = ("--list", tmp_path / "train.txt", "--test", tmp_path / "test.txt")
    run(challenge, *options, "--labeled", 1)
    made = record(raw_root, "Dataset005_PROMISE12_1labeled")
    assert made["order"] == ["Case44", "Case02"]
    assert made["splits"]["test"] == ["Case01"]
    assert made["labeled"] == ["Case44"]


def test_one_part_only(part, raw_root):
    with pytest.raises(UserError, match=r"48 case\(s\) of the list \(Chi.*Case02.*--allow-missing"):
        run(part)


def test_raw_file_left_behind(part, raw_root):
    (part / "Case01.raw").unlink()
    with pytest.raises(UserError, match=r"Case01.*Case01.raw, which is not beside it: copy both"):
        run(part, "--allow-missing")


def test_raw_file_cut_short(part, raw_root):
    path = part / "Case01_segmentation.raw"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"Case01_segmentation.mhd.*damaged or cut short"):
        run(part, "--allow-missing")


def test_missing_files(part, raw_root):
    (part / "Case01.mhd").unlink()
    with pytest.raises(UserError, match=r"The scan beside .*Case01_segmentation.mhd is missing"):
        run(part)
    (part / "Case00_segmentation.mhd").unlink()
    (part / "Case01_segmentation.mhd").unlink()
    with pytest.raises(UserError, match=r"holds 0 CaseXX.mhd for training and 0 CaseXX_segm"):
        run(part)


def test_copies(part, raw_root):
    write_case(part.parent / "copy", 1)
    with pytest.raises(UserError, match=r"are both Case01. Remove one copy"):
        run(part.parent)


def test_unexpected_label(part, raw_root):
    path = part / "Case01_segmentation.mhd"
    mask = sitk.ReadImage(str(path))
    mask[0, 0, 0] = 2
    sitk.WriteImage(mask, str(path))
    with pytest.raises(UserError, match=r"Case01: the mask holds 2, expected are 0, 1"):
        run(part, "--allow-missing")


def test_no_test_images(part, raw_root):
    with pytest.raises(UserError, match=r"no test scans. Drop --use-test-images"):
        run(part, "--use-test-images")
