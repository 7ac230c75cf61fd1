"""The conversions on real releases, which may lie beside the repository: counts, order, values."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion import PSFHS, main
from nnunet_ssl.dataset_conversion.selection import by_hash

from .conftest import names

DATA = Path(__file__).parents[3] / "shared" / "data"


def release(name, tmp_path, *options) -> Path:
    """The release's folder, unpacked where the data are packed."""
    if not (DATA / name).is_dir():
        pytest.skip(f"the data of {name} are not beside the repository")
    if not (DATA / name / "packed").is_dir():
        return DATA / name
    command = [sys.executable, DATA / "unpack.py", name, tmp_path / "release", *options]
    subprocess.run(command, check=True, capture_output=True)
    return tmp_path / "release"


def convert(name, source, *options):
    assert main([name, "-i", str(source), "-d", "5", "-np", "2", *map(str, options)]) == 0


def lines(path) -> list[str]:
    return path.read_text(encoding="utf-8").split()


class Result:
    """A converted data set, and what holds for each."""

    def __init__(self, raw_root, name, values, train, missing=()):
        self.raw = raw_root / name
        self.hidden = raw_root.parent / "nnunet_ssl_heldout" / name
        self.record = json.loads((self.raw / "conversion.json").read_text(encoding="utf-8"))
        record = self.record
        assert record["order"] == train
        assert record["missing"] == list(missing)
        labeled = set(record["labeled"])
        assert record["unlabeled"] == [c for c in train if c not in labeled]
        groups = record["groups"]
        assert not {groups[c] for c in labeled} & {groups[c] for c in record["unlabeled"]}
        for folder, cases, ending in (
            (self.raw / "imagesTr", record["labeled"], "_0000.nii.gz"),
            (self.raw / "labelsTr", record["labeled"], ".nii.gz"),
            (self.raw / "imagesUn", record["unlabeled"], "_0000.nii.gz"),
            (self.hidden / "hidden_labels", record["unlabeled"], ".nii.gz"),
        ):
            assert names(folder) == sorted(f"{c}{ending}" for c in cases)
        masks = [*(self.raw / "labelsTr").iterdir(), *(self.hidden / "hidden_labels").iterdir()]
        found = [np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(m)))) for m in masks]
        assert set(np.concatenate(found).tolist()) == set(values)

    def read(self, case) -> tuple[sitk.Image, sitk.Image]:
        """Image and mask of a training case."""
        inside = case in self.record["labeled"]
        images = self.raw / ("imagesTr" if inside else "imagesUn")
        masks = self.raw / "labelsTr" if inside else self.hidden / "hidden_labels"
        paths = images / f"{case}_0000.nii.gz", masks / f"{case}.nii.gz"
        image, mask = (sitk.ReadImage(str(p)) for p in paths)
        return image, mask


@pytest.mark.slow
def test_la(tmp_path, raw_root):
    source = release("LA", tmp_path)
    convert("LA", source, "--labeled", 8, "--allow-missing")
    train, test = (lines(source / f"{k}.list") for k in ("train", "test"))
    result = Result(raw_root, "Dataset005_LA_cropped_8labeled", {0, 1}, train, test)
    assert result.record["labeled"] == train[:8]
    assert len(result.record["unlabeled"]) == 72
    assert result.record["duplicates"] == []
    for case in (train[0], train[-1]):
        image, mask = result.read(case)
        assert image.GetSpacing() == (1, 1, 1)
        with h5py.File(source / "2018LA_Seg_Training Set" / case / "mri_norm2.h5") as file:
            np.testing.assert_array_equal(
                sitk.GetArrayFromImage(image).transpose(2, 1, 0), file["image"]
            )
            np.testing.assert_array_equal(
                sitk.GetArrayFromImage(mask).transpose(2, 1, 0), file["label"]
            )


@pytest.mark.slow
def test_acdc(tmp_path, raw_root):
    source = release("ACDC", tmp_path, "--no-slices")
    convert("ACDC", source, "--labeled", 7, "--allow-missing")
    train, val, test = (lines(source / f"{k}.list") for k in ("train", "val", "test"))
    absent = list(dict.fromkeys(c.partition("_")[0] for c in test))
    result = Result(raw_root, "Dataset005_ACDC_7labeled", {0, 1, 2, 3}, train, absent)
    assert result.record["labeled"] == train[:14]
    assert result.record["splits"]["val"] == val
    assert names(result.hidden / "val_labels") == sorted(f"{c}.nii.gz" for c in val)
    image, mask = result.read(train[-1])
    with h5py.File(source / "data" / f"{train[-1]}.h5") as file:
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), file["image"])
        np.testing.assert_array_equal(sitk.GetArrayFromImage(mask), file["label"])


@pytest.mark.slow
def test_hippocampus(tmp_path, raw_root):
    source = release("hippocampus", tmp_path)
    options = ("--list", source / "train.list", "--labeled", 10)
    convert("MSD", source / "Task04_Hippocampus", *options)
    train = lines(source / "train.list")
    result = Result(raw_root, "Dataset005_Hippocampus_10labeled", {0, 1, 2}, train)
    assert result.record["labeled"] == train[:10]
    for case in ("hippocampus_003", train[0]):  # the first has a float mask
        image, mask = result.read(case)
        assert image.GetSpacing() == mask.GetSpacing() == (1, 1, 1)
        assert mask.GetPixelID() == sitk.sitkUInt8


def circumference(mask, size) -> float:
    """Length around the ellipse with the second moments of a filled mask, in the unit of `size`."""
    a, b = 2 * np.sqrt(np.linalg.eigvalsh(np.cov(np.nonzero(mask))))
    return np.pi * (3 * (a + b) - np.sqrt((3 * a + b) * (a + 3 * b))) * size  # Ramanujan


@pytest.mark.slow
def test_hc18(tmp_path, raw_root):
    source = release("HC18", tmp_path)
    convert("HC18", source, "--list", source / "train.list", "--labeled", 20)
    train = lines(source / "train.list")
    result = Result(raw_root, "Dataset005_HC18_20labeled", {0, 1}, train)
    assert result.record["labeled"] == train[:20]
    opened = {"186_HC", "346_HC", "628_2HC", "787_HC"}
    assert result.record["notes"] == {
        c: {"contour": "closed along the image border"} for c in train if c in opened
    }
    with open(source / "training_set_pixel_size_and_HC.csv", newline="") as file:
        rows = {row["filename"].removesuffix(".png"): row for row in csv.DictReader(file)}
    errors = {}
    for case in train:
        image, mask = result.read(case)
        sizes = [float(rows[case]["pixel size(mm)"])] * 2
        np.testing.assert_allclose(image.GetSpacing(), sizes, rtol=1e-6)
        length = circumference(sitk.GetArrayFromImage(mask), sizes[0])
        errors[case] = length / float(rows[case]["head circumference (mm)"]) - 1
    assert max(abs(e) for c, e in errors.items() if c not in opened) < 0.015
    assert 0 < np.median(list(errors.values())) < 0.008  # the drawn line is a part of the mask
    assert all(abs(errors[c]) < 0.04 for c in opened)  # cut by the border


@pytest.mark.slow
def test_psfhs(tmp_path, raw_root):
    source = release("PSFHS", tmp_path)
    convert("PSFHS", source, "--list", source / "train.list", "--labeled", 140)
    train = lines(source / "train.list")
    result = Result(raw_root, "Dataset005_PSFHS_140labeled", {0, 1, 2}, train)
    record = result.record
    assert len(train) == 700
    assert (record["duplicates"], record["notes"]) == ([], {})
    assert 135 < len(record["labeled"]) <= 140
    assert (
        record["labeled"][:100]
        == [
            c
            for g in dict.fromkeys(map(record["groups"].get, train))
            for c in train
            if record["groups"][c] == g
        ][:100]
    )
    image, mask = result.read(train[0])
    assert image.GetSize() == mask.GetSize() == (256, 256)
    planes = sitk.GetArrayFromImage(sitk.ReadImage(str(source / "image_mha" / f"{train[0]}.mha")))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), planes[2])


@pytest.mark.slow
def test_psfhs_split_by_another_likeness(tmp_path, raw_root, monkeypatch):
    """Test cases chosen by groups above 0.95 are all converted, though they part groups at 0.9."""
    source = release("PSFHS", tmp_path)
    train = lines(source / "train.list")
    with monkeypatch.context() as patch:
        patch.setattr(PSFHS, "ALIKE", 0.95)
        paths = [source / "image_mha" / f"{c}.mha" for c in sorted(train)]
        groups = dict(zip(sorted(train), PSFHS.group_frames(paths), strict=True))
    held = set(by_hash(groups.values())[-140:])
    sides = {
        k: [c for c in train if (groups[c] in held) == (k == "test")] for k in ("train", "test")
    }
    for part, cases in sides.items():
        (tmp_path / f"{part}.list").write_text("\n".join(cases))
    lists = ("--list", tmp_path / "train.list", "--test", tmp_path / "test.list")
    convert("PSFHS", source, *lists, "--labeled", 56)
    result = Result(raw_root, "Dataset005_PSFHS_56labeled", {0, 1, 2}, sides["train"])
    assert result.record["splits"]["test"] == sides["test"]
    assert result.record["dropped"] == []
    assert len(result.record["labeled"]) == 56
    assert len(result.record["notes"]) > 5
