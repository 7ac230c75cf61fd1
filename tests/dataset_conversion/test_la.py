"""LA: both releases, their quirks, the published split; and the real h5 files."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion import main
from nnunet_ssl.dataset_conversion.reading import published_list
from nnunet_ssl.errors import UserError

from .conftest import names

DATA = Path(__file__).parents[3] / "shared" / "data"
TRAIN, TEST = published_list("LA_train.txt"), published_list("LA_test.txt")
SPACING = (0.625, 0.625, 0.7)
SHAPE = (3, 10, 8)  # z, y, x


def write_nrrd(folder: Path, seed: int, shape=SHAPE) -> None:
    """One scan of the challenge; direction and origin as MR scanners give them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, np.uint8)
    mask[1:, shape[1] // 3 : shape[1] // 2, shape[2] // 2 : shape[2] // 2 + 3] = 255
    for array, name in ((rng.integers(0, 255, shape, np.uint8), "lgemri"), (mask, "laendo")):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(SPACING)
        image.SetOrigin((3.0, -4.0, 5.0))
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
        sitk.WriteImage(image, str(folder / f"{name}.nrrd"))


def write_h5(folder: Path, seed: int, **arrays) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    mask = np.zeros((8, 10, 3), np.uint8)  # x, y, z
    mask[5, 2:4, 1] = 1
    arrays = arrays or {"image": rng.normal(0, 1, mask.shape).astype(np.float32), "label": mask}
    with h5py.File(folder / "mri_norm2.h5", "w") as file:
        for key, value in arrays.items():
            file[key] = value


@pytest.fixture
def challenge(tmp_path) -> Path:
    """All 100 scans, in the folder of the challenge, and one of its test scans."""
    source = tmp_path / "download"
    for seed, name in enumerate([*TRAIN, *TEST]):
        write_nrrd(source / "2018LA_Seg_Training Set" / name, seed)
    write_nrrd(source / "Testing Set" / "0ABCDEFGHIJKLMNOPQRS", 100)
    (source / "2018LA_Seg_Training Set" / TRAIN[3] / "desktop.ini").write_text("junk")
    return source


@pytest.fixture
def small(tmp_path) -> Path:
    """Two training scans and a test scan of the challenge."""
    source = tmp_path / "download"
    for seed, name in enumerate([*TRAIN[:2], TEST[0]]):
        write_nrrd(source / "2018LA_Seg_Training Set" / name, seed)
    return source


@pytest.fixture
def few(tmp_path):
    """Options for two training scans and a test scan."""
    (tmp_path / "train.txt").write_text("\n".join(TRAIN[:2]))
    (tmp_path / "test.txt").write_text(TEST[0])
    return ["--list", tmp_path / "train.txt", "--test", tmp_path / "test.txt"]


def run(source, *options):
    return main(["LA", "-i", str(source), "-d", "5", "-np", "1", *map(str, options)])


def record(raw_root, name):
    return json.loads((raw_root / name / "conversion.json").read_text(encoding="utf-8"))


def test_published_lists():
    assert len(TRAIN) == 80
    assert len(TEST) == 20
    assert not set(TRAIN) & set(TEST)
    assert (TRAIN[0], TRAIN[79], TEST[0]) == (
        "06SR5RBREL16DQ6M8LWS",
        "UZUZZT2W9IUSHL6ASOX3",
        "UPT6DX9IQY9JAZ7HJKA7",
    )


def test_challenge_release(challenge, raw_root, heldout, capsys):
    odd = challenge / "2018LA_Seg_Training Set" / TRAIN[0] / "laendo.nrrd"
    mask = sitk.ReadImage(str(odd))
    mask[0, 0, 0], mask[1, 0, 0] = 7, 254
    sitk.WriteImage(mask, str(odd))
    run(challenge, "--labeled", 8)
    folder, hidden = raw_root / "Dataset005_LA_8labeled", heldout / "Dataset005_LA_8labeled"
    assert names(folder / "imagesTr") == sorted(f"{n}_0000.nii.gz" for n in TRAIN[:8])
    assert names(folder / "imagesUn") == sorted(f"{n}_0000.nii.gz" for n in TRAIN[8:])
    assert names(hidden / "hidden_labels") == sorted(f"{n}.nii.gz" for n in TRAIN[8:])
    assert names(hidden / "test_labels") == sorted(f"{n}.nii.gz" for n in TEST)
    assert not (hidden / "val_images").exists()
    made = record(raw_root, folder.name)
    assert (made["protocol"], made["spacing_known"]) == ("raw", True)
    assert made["order"] == TRAIN
    assert made["unused"] == ["0ABCDEFGHIJKLMNOPQRS"]
    assert made["notes"] == {TRAIN[0]: {"voxels_neither_0_nor_255_as_background": 2}}
    assert "1 in the source but in no list" in capsys.readouterr().out

    image = sitk.ReadImage(str(folder / "imagesTr" / f"{TRAIN[0]}_0000.nii.gz"))
    original = sitk.ReadImage(str(odd.with_name("lgemri.nrrd")))
    np.testing.assert_allclose(image.GetSpacing(), SPACING, atol=1e-6)
    np.testing.assert_allclose(image.GetOrigin(), (3, -4, 5), atol=1e-6)
    np.testing.assert_allclose(image.GetDirection(), original.GetDirection(), atol=1e-6)
    np.testing.assert_array_equal(*map(sitk.GetArrayFromImage, (image, original)))
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / f"{TRAIN[0]}.nii.gz")))
    np.testing.assert_array_equal(array, sitk.GetArrayFromImage(mask) == 255)
    assert array.sum() == 2 * 2 * 3


@pytest.mark.parametrize(("labeled", "draw"), [(16, 0), (4, 1)])
def test_labeled_scans(challenge, raw_root, labeled, draw):
    run(challenge, "--labeled", labeled, "--draw", draw)
    name = f"Dataset005_LA_{labeled}labeled" + "_draw1" * draw
    made = record(raw_root, name)
    assert (len(made["labeled"]), len(made["unlabeled"])) == (labeled, 80 - labeled)
    assert (made["labeled"] == TRAIN[:labeled]) == (draw == 0)


def test_spacing_override(small, raw_root, few):
    run(small, "--spacing", 0.5, 0.6, 0.7, *few)
    for name in ("imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz"):
        image = sitk.ReadImage(str(raw_root / "Dataset005_LA" / name.format(TRAIN[0])))
        np.testing.assert_allclose(image.GetSpacing(), (0.5, 0.6, 0.7), atol=1e-6)


def naive_box(mask, margins, least=112):
    """UA-MT's covert_h5 on (x, y, z), with its four random numbers given."""
    box = []
    for axis in (0, 1):
        low, high = (int(f(np.nonzero(mask)[axis])) for f in (np.min, np.max))
        pad = max(least - (high - low), 0) // 2
        box.append(max(low - margins[2 * axis] - pad, 0))
        box.append(min(high + margins[2 * axis + 1] + pad, mask.shape[axis]))
    return box


def test_cropped_as_published(tmp_path, raw_root, heldout, few):
    source = tmp_path / "download"
    for seed, name in enumerate([*TRAIN[:2], TEST[0]]):
        write_nrrd(source / name, seed, (3, 240, 300))
    run(source, "--protocol", "cropped-literature", *few)
    folder = raw_root / "Dataset005_LA_cropped"
    made = record(raw_root, folder.name)
    assert made["protocol"] == "cropped-literature"
    assert made["spacing_known"]
    homes = {n: folder / "imagesTr" for n in TRAIN[:2]}
    homes[TEST[0]] = heldout / folder.name / "test_images"
    for name, home in homes.items():
        original = sitk.ReadImage(str(source / name / "lgemri.nrrd"))
        mask = sitk.GetArrayFromImage(sitk.ReadImage(str(source / name / "laendo.nrrd")))
        notes = made["notes"][name]
        assert all(10 <= m < 20 for m in notes["margins"])
        x0, x1, y0, y1 = naive_box(mask.transpose(2, 1, 0), notes["margins"])
        assert notes["box_x_y"] == [x0, x1, y0, y1]
        cut = sitk.ReadImage(str(home / f"{name}_0000.nii.gz"))
        expected = sitk.GetArrayFromImage(original)[:, y0:y1, x0:x1]
        np.testing.assert_array_equal(sitk.GetArrayFromImage(cut), expected)
        origin = original.TransformIndexToPhysicalPoint((x0, y0, 0))
        np.testing.assert_allclose(cut.GetOrigin(), origin, atol=1e-4)
        cut_mask = sitk.ReadImage(
            str(home.with_name(home.name.replace("images", "labels")) / f"{name}.nii.gz")
        )
        assert sitk.GetArrayFromImage(cut_mask).sum() == (mask == 255).sum()
    assert made["notes"][TRAIN[0]]["margins"] != made["notes"][TRAIN[1]]["margins"]


def test_h5_release(tmp_path, raw_root, few):
    source = tmp_path / "data" / "2018LA_Seg_Training Set"
    for seed, name in enumerate([*TRAIN[:2], TEST[0]]):
        write_h5(source / name, seed)
    (source / TRAIN[0] / "desktop.ini").write_text("junk")
    run(source.parent, *few)
    folder = raw_root / "Dataset005_LA_cropped"
    made = record(raw_root, folder.name)
    assert (made["protocol"], made["spacing_known"]) == ("cropped-literature", False)
    image = sitk.ReadImage(str(folder / "imagesTr" / f"{TRAIN[0]}_0000.nii.gz"))
    assert image.GetSize() == (8, 10, 3)
    assert image.GetSpacing() == (1, 1, 1)
    with h5py.File(source / TRAIN[0] / "mri_norm2.h5") as file:
        stored = file["image"][()]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), stored.transpose(2, 1, 0))
    mask = sitk.ReadImage(str(folder / "labelsTr" / f"{TRAIN[0]}.nii.gz"))
    assert mask[5, 2, 1] == mask[5, 3, 1] == 1

    run(source.parent, *few, "--overwrite", "--spacing", 0.625, 0.625, 0.625)
    assert record(raw_root, folder.name)["spacing_known"]
    image = sitk.ReadImage(str(folder / "imagesTr" / f"{TRAIN[0]}_0000.nii.gz"))
    np.testing.assert_allclose(image.GetSpacing(), (0.625,) * 3, atol=1e-6)


def test_releases_side_by_side(tmp_path, raw_root, few):
    source = tmp_path / "data"
    for seed, name in enumerate([*TRAIN[:2], TEST[0]]):
        write_nrrd(source / name, seed)
        write_h5(source / name, seed)
    run(source, *few)
    run(source, *few, "-d", 6, "--protocol", "cropped-literature")
    sources = [
        record(raw_root, n)["sources"][TRAIN[0]]["image"]
        for n in ("Dataset005_LA", "Dataset006_LA_cropped")
    ]
    assert sources == [f"{TRAIN[0]}/lgemri.nrrd", f"{TRAIN[0]}/mri_norm2.h5"]


def test_h5_is_never_raw(tmp_path, raw_root):
    write_h5(tmp_path / "data" / TRAIN[0], 0)
    with pytest.raises(UserError, match=r"mri_norm2.h5, which is cropped already. Drop --protocol"):
        run(tmp_path / "data", "--protocol", "raw")


def test_absent_scans_are_named(tmp_path, raw_root, capsys):
    for seed, name in enumerate(TRAIN):
        write_h5(tmp_path / "data" / name, seed)
    with pytest.raises(UserError, match=rf"20 case\(s\).*{TEST[0]}.*--allow-missing"):
        run(tmp_path / "data")
    run(tmp_path / "data", "--allow-missing")
    assert "20 named by the list but not in the source" in capsys.readouterr().out
    assert record(raw_root, "Dataset005_LA_cropped")["missing"] == TEST


@pytest.mark.parametrize("kind", ["nrrd", "h5"])
def test_test_scans_alone(tmp_path, raw_root, kind):
    for seed, name in enumerate(TEST):
        (write_nrrd if kind == "nrrd" else write_h5)(tmp_path / "data" / name, seed)
    with pytest.raises(UserError, match=r"None of the 80 training cases.*--list FILE --test 0\."):
        run(tmp_path / "data")
    (tmp_path / "test.list").write_text("\n".join(TEST))
    options = ["--list", tmp_path / "test.list"]
    with pytest.raises(UserError, match=rf"{TEST[0]} is in both lists, train and test.*--test 0"):
        run(tmp_path / "data", *options)
    run(tmp_path / "data", *options, "--test", 0)
    folder = raw_root / ("Dataset005_LA" if kind == "nrrd" else "Dataset005_LA_cropped")
    assert record(raw_root, folder.name)["labeled"] == TEST
    assert names(folder / "labelsTr") == sorted(f"{n}.nii.gz" for n in TEST)


def test_masks_of_another_kind(small, raw_root, few):
    path = small / "2018LA_Seg_Training Set" / TRAIN[1] / "laendo.nrrd"
    sitk.WriteImage(sitk.ReadImage(str(path)) / 255, str(path))
    with pytest.raises(UserError, match=rf"{TRAIN[1]}/laendo.nrrd holds no 255, but 0, 1"):
        run(small, *few)


def test_missing_mask(small, raw_root):
    (small / "2018LA_Seg_Training Set" / TRAIN[1] / "laendo.nrrd").unlink()
    with pytest.raises(UserError, match=rf"laendo.nrrd is missing for {TRAIN[1]}"):
        run(small)


@pytest.mark.parametrize("protocol", ["raw", "cropped-literature"])
def test_mask_of_another_scan(small, raw_root, few, protocol):
    folder = small / "2018LA_Seg_Training Set" / TRAIN[1]
    write_nrrd(small / "other", 1, (3, 12, 8))
    (small / "other" / "laendo.nrrd").replace(folder / "laendo.nrrd")
    with pytest.raises(UserError, match=rf"{TRAIN[1]}.*size 8x12x3, the image 8x10x3"):
        run(small, *few, "--protocol", protocol)


def test_empty_mask_can_not_be_cut_around(small, raw_root, few):
    path = small / "2018LA_Seg_Training Set" / TRAIN[1] / "laendo.nrrd"
    sitk.WriteImage(sitk.ReadImage(str(path)) * 0, str(path))
    with pytest.raises(UserError, match=rf"{TRAIN[1]}: The mask is empty"):
        run(small, *few, "--protocol", "cropped-literature")


def test_damaged_files(tmp_path, small, raw_root, few):
    packed = tmp_path / "data" / TRAIN[0] / "mri_norm2.h5"
    for seed, name in enumerate([*TRAIN[:2], TEST[0]]):
        write_h5(tmp_path / "data" / name, seed)
    content = packed.read_bytes()
    packed.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"{TRAIN[0]}/mri_norm2.h5.*cut short; copy it again"):
        run(tmp_path / "data", *few)
    write_h5(packed.parent, 0, image=np.zeros((2, 2, 2)))
    with pytest.raises(UserError, match=r"mri_norm2.h5 has no label, only image"):
        run(tmp_path / "data", *few)
    write_h5(packed.parent, 0, image=np.full((2, 2, 2), np.nan), label=np.zeros((2, 2, 2)))
    with pytest.raises(UserError, match=r"mri_norm2.h5 holds NaN"):
        run(tmp_path / "data", *few)
    write_h5(packed.parent, 0, image=np.zeros((2, 2)), label=np.zeros((2, 2)))
    with pytest.raises(UserError, match=r"mri_norm2.h5 is 2D, not a volume"):
        run(tmp_path / "data", *few)
    scan = small / "2018LA_Seg_Training Set" / TRAIN[0] / "lgemri.nrrd"
    scan.write_bytes(scan.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"Cannot read .*{TRAIN[0]}/lgemri.nrrd"):
        run(small, *few)


def test_wrong_release(tmp_path, raw_root):
    other = tmp_path / "training" / "patient001" / "patient001_frame01.nii.gz"
    other.parent.mkdir(parents=True)
    other.write_text("")
    with pytest.raises(
        UserError, match=r"neither lgemri.nrrd.*1 .nii.gz: looks like the challenge's release of AC"
    ):
        run(tmp_path / "training")


def test_bad_spacing(small, raw_root):
    with pytest.raises(UserError, match=r"--spacing has 2 number\(s\). Give three"):
        run(small, "--spacing", 1, 1)


@pytest.mark.skipif(not (DATA / "LA").is_dir(), reason="the real LA is not here")
def test_real_h5_files(tmp_path, raw_root, few):
    cases = [*TRAIN[:2], TRAIN[79]]
    subprocess.run(
        [sys.executable, DATA / "unpack.py", "LA", tmp_path / "LA", "--cases", ",".join(cases)],
        check=True,
    )
    (tmp_path / "test.txt").write_text(TRAIN[79])
    run(tmp_path / "LA", *few)
    folder = raw_root / "Dataset005_LA_cropped"
    assert (
        published_list("LA_train.txt")
        == (DATA / "LA" / "train.list").read_text(encoding="utf-8").split()
    )
    assert (
        published_list("LA_test.txt")
        == (DATA / "LA" / "test.list").read_text(encoding="utf-8").split()
    )
    for name in TRAIN[:2]:
        with h5py.File(tmp_path / "LA" / "2018LA_Seg_Training Set" / name / "mri_norm2.h5") as file:
            image, label = (file[k][()].transpose(2, 1, 0) for k in ("image", "label"))
        made = [
            sitk.GetArrayFromImage(sitk.ReadImage(str(folder / p)))
            for p in (f"imagesTr/{name}_0000.nii.gz", f"labelsTr/{name}.nii.gz")
        ]
        np.testing.assert_array_equal(made[0], image)
        np.testing.assert_array_equal(made[1], label)
        assert made[0].shape[0] == 88
