"""ACDC: both releases, their quirks, the published split by patient; and the real h5 files."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ssl.data.loader import read_case_table
from nnunet_ssl.dataset_conversion import main
from nnunet_ssl.dataset_conversion.reading import published_list
from nnunet_ssl.errors import UserError

from .conftest import names

DATA = Path(__file__).parents[3] / "shared" / "data"
TRAIN, VAL, TEST = (published_list(f"ACDC_{k}.txt") for k in ("train", "val", "test"))
SHAPE = (2, 7, 6)  # z, y, x
SPACING = (1.5, 1.6, 10.0)


def make_frame(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = np.zeros(SHAPE, np.uint8)
    mask[0, 1, :3] = mask[1, 2, 3:] = (1, 2, 3)
    return rng.integers(0, 500, SHAPE).astype(np.int16), mask


def write_patient(folder: Path, number: int, ed: int = 1, es: int = 12, masks: bool = True) -> Path:
    """A patient of the challenge, frames of one number in place of the 4D file's many."""
    folder = folder / f"patient{number:03d}"
    folder.mkdir(parents=True)
    group = ("NOR", "MINF", "DCM", "HCM", "RV")[number % 5]
    (folder / "Info.cfg").write_text(
        f"ED: {ed}\nES: {es}\nGroup: {group}\nHeight: 184.0\nNbFrame: 30\nWeight: {number}.5\n"
    )
    for frame in (ed, es):
        image, mask = make_frame(1000 * number + frame)
        for array, end in ((image, ""), (mask, "_gt"))[: 1 + masks]:
            scan = sitk.GetImageFromArray(array)
            scan.SetSpacing(SPACING)
            sitk.WriteImage(scan, str(folder / f"{folder.name}_frame{frame:02d}{end}.nii.gz"))
    (folder / f"{folder.name}_4d.nii.gz").write_text("never opened")
    return folder


def write_packed(folder: Path, number: int, frame: int) -> Path:
    path = folder / f"patient{number:03d}_frame{frame:02d}.h5"
    folder.mkdir(parents=True, exist_ok=True)
    image, mask = make_frame(1000 * number + frame)
    with h5py.File(path, "w") as file:
        file["image"] = (image / image.max()).astype(np.float32)
        file["label"] = mask
        file["scribble"] = mask
    return path


@pytest.fixture
def challenge(tmp_path) -> Path:
    """100 patients for training and one for testing, below database/; in 3, ED comes after ES."""
    source = tmp_path / "ACDC" / "database"
    for number in range(1, 101):
        write_patient(source / "training", number, *((10, 1) if number == 3 else (1, 12)))
    write_patient(source / "testing", 101, masks=False)
    (source / "training" / "patient001" / "._patient001_frame01.nii.gz").write_text("junk")
    return source.parent


@pytest.fixture
def small(tmp_path) -> Path:
    """The first two patients of the list."""
    for patient in TRAIN[:2]:
        write_patient(tmp_path / "ACDC" / "training", int(patient[-3:]))
    return tmp_path / "ACDC"


def run(source, *options):
    return main(["ACDC", "-i", str(source), "-d", "5", "-np", "1", *map(str, options)])


def record(raw_root, name):
    return json.loads((raw_root / name / "conversion.json").read_text(encoding="utf-8"))


def load(path) -> sitk.Image:
    return sitk.ReadImage(str(path))


def test_published_lists():
    assert [len(x) for x in (TRAIN, VAL, TEST)] == [70, 10, 20]
    assert sorted(TRAIN + VAL + TEST) == [f"patient{i:03d}" for i in range(1, 101)]
    assert TRAIN[:3] == ["patient099", "patient038", "patient050"]


def test_challenge_release(challenge, raw_root, heldout):
    run(challenge, "--labeled", 7)
    folder, hidden = raw_root / "Dataset005_ACDC_7labeled", heldout / "Dataset005_ACDC_7labeled"
    first = sorted(f"{p}_frame{f}_0000.nii.gz" for p in TRAIN[:7] for f in ("01", "12"))
    assert names(folder / "imagesTr") == first
    counts = {p: len(names(hidden / p)) for p in ("val_labels", "test_labels", "hidden_labels")}
    assert counts == {"val_labels": 20, "test_labels": 40, "hidden_labels": 126}
    assert len(names(folder / "imagesUn")) == 126
    assert {n[:10] for n in names(hidden / "test_images")} == set(TEST)
    made = record(raw_root, folder.name)
    assert made["unused"] == ["patient101_frame01", "patient101_frame12"]
    assert len(set(made["groups"].values())) == 100
    assert (made["protocol"], made["spacing_known"]) == ("raw", True)

    order = [c for c in made["order"] if c.startswith("patient003")]
    assert order == ["patient003_frame10", "patient003_frame01"]  # ED first
    columns = ["patient", "phase", "frame", "group", "height", "weight"]
    table = read_case_table(folder / "cases.csv", columns, made["order"])
    assert list(table["patient003_frame10"].values()) == [3, 0, 10, 3, 184, 3.5]
    assert list(table["patient003_frame01"].values()) == [3, 1, 1, 3, 184, 3.5]
    assert list(table["patient099_frame12"].values()) == [99, 1, 12, 4, 184, 99.5]

    image, mask = make_frame(99012)
    made_image = load(folder / "imagesTr" / "patient099_frame12_0000.nii.gz")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(made_image), image)
    np.testing.assert_allclose(made_image.GetSpacing(), SPACING, atol=1e-6)
    made_mask = load(folder / "labelsTr" / "patient099_frame12.nii.gz")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(made_mask), mask)
    about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert about["labels"]["left ventricle"] == 3
    assert about["numTraining"] == 14


def test_h5_release(tmp_path, raw_root, heldout):
    source = tmp_path / "SSL4MIS"
    for number in range(1, 101):
        for frame in (1, 2):
            write_packed(source / "data", number, frame)
    (source / "data" / "slices").mkdir()
    (source / "data" / "slices" / "patient099_frame01_slice_1.h5").write_text("never opened")
    run(source, "--labeled", 3)
    folder = raw_root / "Dataset005_ACDC_3labeled"
    made = record(raw_root, folder.name)
    assert made["labeled"] == [f"{p}_frame0{f}" for p in TRAIN[:3] for f in (1, 2)]
    assert [len(made["splits"][k]) for k in ("train", "val", "test")] == [140, 20, 40]
    assert made["spacing_known"] is False
    table = read_case_table(folder / "cases.csv", ["patient", "phase"], made["order"])
    assert table["patient050_frame02"] == {"patient": 50, "phase": 1}
    image = load(folder / "imagesTr" / "patient050_frame02_0000.nii.gz")
    stored = make_frame(50002)[0]
    np.testing.assert_allclose(sitk.GetArrayFromImage(image), stored / stored.max(), rtol=1e-6)
    assert image.GetSpacing() == (1, 1, 1)

    run(source, "--labeled", 14, "-d", 6, "--draw", 2, "--spacing", 1.5, 1.5, 10)
    made = record(raw_root, "Dataset006_ACDC_14labeled_draw2")
    patients = [c[:10] for c in made["labeled"]]
    assert patients == [p for p in dict.fromkeys(patients) for _ in range(2)]  # both frames
    assert len(set(patients)) == 14
    assert made["spacing_known"] is True


def test_user_list(small, raw_root, tmp_path):
    (tmp_path / "list.txt").write_text(f"{TRAIN[1]}_frame12\n{TRAIN[1]}_frame01\n")
    run(small, "--list", tmp_path / "list.txt", "--allow-missing")
    assert record(raw_root, "Dataset005_ACDC")["order"] == [
        f"{TRAIN[1]}_frame12",
        f"{TRAIN[1]}_frame01",
    ]


def test_lists_of_patients(small, raw_root, tmp_path):
    for name, patient in (("list.txt", TRAIN[1]), ("test.txt", TRAIN[0])):
        (tmp_path / name).write_text(f"{patient}\n")
    lists = ("--list", tmp_path / "list.txt", "--test", tmp_path / "test.txt")
    run(small, *lists, "--allow-missing")
    splits = record(raw_root, "Dataset005_ACDC")["splits"]
    for part, patient in (("train", TRAIN[1]), ("test", TRAIN[0])):
        assert splits[part] == [f"{patient}_frame01", f"{patient}_frame12"]


@pytest.mark.parametrize("kind", ["challenge", "h5"])
def test_test_patients_alone(tmp_path, raw_root, kind):
    for patient in TEST:
        number = int(patient[-3:])
        if kind == "challenge":
            write_patient(tmp_path / "data", number)
        else:
            for frame in (1, 2):
                write_packed(tmp_path / "data", number, frame)
    with pytest.raises(UserError, match=r"None of the 70 .*--list FILE --test 0 --allow-missing"):
        run(tmp_path / "data")
    (tmp_path / "test.txt").write_text("\n".join(TEST))
    options = ["--list", tmp_path / "test.txt"]
    with pytest.raises(UserError, match=rf"{TEST[0]}_frame01 is in both lists.*--test 0"):
        run(tmp_path / "data", *options, "--allow-missing")
    run(tmp_path / "data", *options, "--test", 0, "--allow-missing")
    frames = ("01", "12" if kind == "challenge" else "02")
    made = record(raw_root, "Dataset005_ACDC")
    assert made["labeled"] == [f"{p}_frame{f}" for p in TEST for f in frames]
    assert made["missing"] == VAL


def test_absent_patients_are_named(small, raw_root):
    with pytest.raises(UserError, match=rf"98 case\(s\).*{TRAIN[2]}.*--allow-missing"):
        run(small)


def test_phase_unknown_without_info(small, raw_root, capsys):
    (small / "training" / TRAIN[0] / "Info.cfg").unlink()
    run(small, "--allow-missing")
    assert f"NOTE: Info.cfg with ED and ES is missing for {TRAIN[0]}" in capsys.readouterr().out
    folder = raw_root / "Dataset005_ACDC"
    case = f"{TRAIN[0]}_frame01"
    assert read_case_table(folder / "cases.csv", ["frame"], [case])[case] == {"frame": 1}
    with pytest.raises(UserError, match=rf"{case}.*phase"):
        read_case_table(folder / "cases.csv", ["phase"], [case])


def test_bad_info(small, raw_root):
    (small / "training" / TRAIN[0] / "Info.cfg").write_text("ED: one\nES: 12\n")
    with pytest.raises(UserError, match=r"Info.cfg: ED is 'one', not a number. Correct it"):
        run(small)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("_frame12.nii.gz", r"_frame12.nii.gz is missing. Unpack"),
        ("_frame12_gt.nii.gz", r"_gt files are missing for {}_frame12. Unpack"),
    ],
)
def test_missing_file(small, raw_root, lost, words):
    (small / "training" / TRAIN[0] / f"{TRAIN[0]}{lost}").unlink()
    with pytest.raises(UserError, match=words.format(TRAIN[0])):
        run(small, "--allow-missing")


def test_unexpected_label_and_grid(small, raw_root):
    path = small / "training" / TRAIN[0] / f"{TRAIN[0]}_frame01_gt.nii.gz"
    mask = load(path)
    mask[0, 0, 0] = 4
    sitk.WriteImage(mask, str(path))
    with pytest.raises(
        UserError, match=rf"{TRAIN[0]}_frame01: the mask holds 4, expected are 0, 1"
    ):
        run(small, "--allow-missing")
    mask[0, 0, 0] = 0
    mask.SetSpacing((1.5, 1.6, 5))
    sitk.WriteImage(mask, str(path))
    with pytest.raises(UserError, match=rf"{TRAIN[0]}_frame01: the mask .* has spacing"):
        run(small, "--allow-missing")


def test_same_frame_twice(small, raw_root):
    write_patient(small / "copy", int(TRAIN[0][-3:]))
    with pytest.raises(UserError, match=r"are the same frame. Remove one copy"):
        run(small)


def test_two_releases(small, raw_root):
    write_packed(small, 99, 1)
    with pytest.raises(UserError, match=r"holds two releases.*Give the folder of one"):
        run(small)


def test_h5_with_other_frames(tmp_path, raw_root):
    write_packed(tmp_path / "data", 99, 12)
    with pytest.raises(UserError, match=r"patient099_frame12.h5: frame 12 .* 01 and 02 only"):
        run(tmp_path / "data")


def test_wrong_release(tmp_path, raw_root):
    (tmp_path / "slices").mkdir()
    (tmp_path / "slices" / "patient099_frame01_slice_1.h5").write_text("")
    with pytest.raises(UserError, match=r"1 .h5: looks like the h5 release of ACDC.*whole volumes"):
        run(tmp_path / "slices")
    (tmp_path / "la" / "X").mkdir(parents=True)
    (tmp_path / "la" / "X" / "mri_norm2.h5").write_text("")
    with pytest.raises(UserError, match=r"looks like the h5 release of LA"):
        run(tmp_path / "la")


def test_spacing_of_nifti(small, raw_root):
    with pytest.raises(UserError, match=r"own spacing. Drop --spacing"):
        run(small, "--spacing", 1, 1, 10)


@pytest.mark.skipif(not (DATA / "ACDC").is_dir(), reason="the real ACDC is not here")
def test_real_h5_files(tmp_path, raw_root, capsys):
    patients = [*TRAIN[:2], "patient074", "patient076", VAL[0]]
    arguments = ["ACDC", tmp_path / "ACDC", "--no-slices", "--cases", ",".join(patients)]
    subprocess.run([sys.executable, DATA / "unpack.py", *arguments], check=True)
    run(tmp_path / "ACDC", "--labeled", 2, "--allow-missing")
    folder = raw_root / "Dataset005_ACDC_2labeled"
    made = record(raw_root, folder.name)
    assert made["labeled"] == (DATA / "ACDC" / "train.list").read_text(encoding="utf-8").split()[:4]
    # two patients are one: the same scans, annotated twice
    assert made["duplicates"] == [[f"patient07{i}_frame0{f}" for i in (4, 6)] for f in (1, 2)]
    assert made["groups"]["patient074_frame01"] == made["groups"]["patient076_frame01"]
    with h5py.File(tmp_path / "ACDC" / "data" / f"{TRAIN[0]}_frame02.h5") as file:
        image, label = (file[k][()] for k in ("image", "label"))
    for stored, path in (
        (image, folder / "imagesTr" / f"{TRAIN[0]}_frame02_0000.nii.gz"),
        (label, folder / "labelsTr" / f"{TRAIN[0]}_frame02.nii.gz"),
    ):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(load(path)), stored)
    for key, patients in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        lines = (DATA / "ACDC" / f"{key}.list").read_text(encoding="utf-8").split()
        assert lines == [f"{p}_frame0{f}" for p in patients for f in (1, 2)]
