"""PancreasCT: three releases, orientation of the masks, withdrawn scans, published splits."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion import main
from nnunet_ssl.dataset_conversion.PancreasCT import orient
from nnunet_ssl.dataset_conversion.reading import published_list
from nnunet_ssl.errors import UserError

from .conftest import names

TRAIN, TEST = (published_list(f"PancreasCT_{k}.txt") for k in ("train", "test"))
SPACING = (0.75, 0.75, 1.5)


def make_abdomen(seed: int = 0, shape=(10, 24, 20)) -> tuple[np.ndarray, np.ndarray]:
    """Fat with a pancreas, a spine and bowel gas; in HU, (z, y, x), y pointing to the back."""
    rng = np.random.default_rng(seed)
    depth, height, width = shape
    hu = rng.normal(-110, 10, shape)
    hu[:, -height // 4 :, width // 3 : width // 2] = 400
    hu[:2, : height // 3, :] = -900
    mask = np.zeros(shape, np.uint8)
    mask[-depth // 3 :, height // 4 : height // 2, width // 4 : 3 * width // 4] = 1
    hu[mask > 0] = rng.normal(90, 15, int(mask.sum()))
    return np.rint(hu).astype(np.int16), mask


def write_series(hu: np.ndarray, folder: Path) -> None:
    """DICOM slices; InstanceNumber counts from the head, as the positions fall."""
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, (plane, z) in enumerate(zip(hu[::-1], range(len(hu))[::-1], strict=True)):
        image = sitk.GetImageFromArray(plane[None])
        image.SetSpacing((*SPACING[:2], 1.0))
        tags = {
            "0008|0060": "CT",
            "0020|000d": "1.2.3",
            "0020|000e": "1.2.3.4",
            "0008|0018": f"1.2.3.4.{number}",
            "0020|0032": f"0\\0\\{z * SPACING[2]}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(number),
            "0028|1052": "-1024",
            "0028|1053": "1",
        }
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"1-{number:03d}.dcm"))
        writer.Execute(image)


def write_mask(mask: np.ndarray, path: Path) -> None:
    """A mask of TCIA: mirrored in y, its own header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(mask[:, ::-1])
    image.SetSpacing(SPACING)
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(path))


def write_tcia(source: Path, name: str, seed: int, shape=(10, 24, 20)) -> Path:
    number = name[-4:]
    hu, mask = make_abdomen(seed, shape)
    folder = source / "manifest-1" / "Pancreas-CT" / f"PANCREAS_{number}" / "11-24-2015" / "s1"
    write_series(hu, folder)
    write_mask(mask, source / "TCIA_pancreas_labels-02-05-2017" / f"label{number}.nii.gz")
    return folder


@pytest.fixture
def tcia(tmp_path) -> Path:
    """Two training scans and a test scan."""
    for seed, name in enumerate((*TRAIN[:2], TEST[0])):
        write_tcia(tmp_path / "download", name, seed)
    return tmp_path / "download"


def write_packed(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    mask = np.zeros((6, 5, 4), np.float32)  # x, y, z
    mask[4, 1:3, 2] = 1
    with h5py.File(path, "w") as file:
        file["image"] = rng.normal(0, 1, mask.shape).astype(np.float32)
        file["label"] = mask


def run(source, *options):
    return main(["PancreasCT", "-i", str(source), "-d", "5", "-np", "1", *map(str, options)])


def record(raw_root, name):
    return json.loads((raw_root / name / "conversion.json").read_text(encoding="utf-8"))


def load(path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_published_lists():
    assert (len(TRAIN), len(TEST)) == (62, 20)
    assert sorted(TRAIN + TEST) == [f"image{i:04d}" for i in range(1, 83)]
    assert TRAIN.index("image0070") == 10
    assert "image0025" in TEST


@pytest.mark.parametrize(("axes", "name"), [((), "none"), (1, "y"), (0, "z"), ((0, 1), "y and z")])
def test_orientation(axes, name):
    hu, mask = make_abdomen()
    found, notes = orient(hu, np.flip(mask, axes))
    np.testing.assert_array_equal(found, mask)
    assert notes["mask_mirrored_in"] == name
    assert notes["mean_hu"] == pytest.approx(hu[mask > 0].mean(), abs=0.1)
    assert notes["share_below_-100_hu"] == 0
    assert 150 < notes["step_hu"] < 250


def test_orientation_by_border():
    """Where the mirrored mask lies within the liver, both are soft tissue; the border decides."""
    hu, mask = make_abdomen()
    hu[:, 11:, :] = 100  # mirrored in y, the mask is all in there
    stored = mask[:, ::-1]
    assert (hu[stored > 0] == 100).all()
    found, notes = orient(hu, stored)
    np.testing.assert_array_equal(found, mask)
    assert notes["mask_mirrored_in"] == "y"


def test_orientation_that_never_fits():
    hu, mask = make_abdomen()
    with pytest.raises(UserError, match=r"in no orientation .*y and z: mean .*same number"):
        orient(np.full_like(hu, -500), mask)
    with pytest.raises(UserError, match=r"mask is empty"):
        orient(hu, np.zeros_like(mask))


def test_tcia_release(tcia, raw_root, heldout):
    run(tcia, "--allow-missing", "--labeled", 1)
    folder = raw_root / "Dataset005_PancreasCT_1labeled"
    made = record(raw_root, folder.name)
    assert made["labeled"] == TRAIN[:1]
    assert (made["protocol"], made["spacing_known"]) == ("raw", True)
    assert len(made["missing"]) == 79
    assert {made["notes"][n]["mask_mirrored_in"] for n in made["order"]} == {"y"}
    image = sitk.ReadImage(str(folder / "imagesTr" / f"{TRAIN[0]}_0000.nii.gz"))
    hu, mask = make_abdomen(0)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), hu)
    np.testing.assert_allclose(image.GetSpacing(), SPACING)
    np.testing.assert_array_equal(load(folder / "labelsTr" / f"{TRAIN[0]}.nii.gz"), mask)
    hidden = heldout / folder.name
    np.testing.assert_array_equal(
        load(hidden / "test_labels" / f"{TEST[0]}.nii.gz"), make_abdomen(2)[1]
    )
    assert json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["channel_names"] == {
        "0": "CT"
    }


def naive_mc_net(hu, mask):
    """MC-Net's resampling, window and crop, on (z, y, x)."""

    def resample(array, interpolator):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(SPACING)
        size = [int(n * s) for n, s in zip(image.GetSize(), SPACING, strict=True)]
        return sitk.GetArrayFromImage(
            sitk.Resample(image, size, sitk.Transform(), interpolator, (0, 0, 0), (1, 1, 1))
        )

    image = np.clip(resample(hu.astype(np.float32), sitk.sitkBSpline), -125, 275)
    mask = resample(mask, sitk.sitkNearestNeighbor)
    _, y, x = np.nonzero(mask)
    cut = []
    for where, length in ((y, mask.shape[1]), (x, mask.shape[2])):
        pad = max(96 - (where.max() - where.min()), 0) // 2
        cut.append(slice(max(where.min() - pad - 25, 0), min(where.max() + pad + 25, length)))
    return image[:, cut[0], cut[1]], mask[:, cut[0], cut[1]]


def test_cropped_as_published(tmp_path, raw_root):
    write_tcia(tmp_path / "download", TRAIN[0], 0, (4, 230, 200))
    run(tmp_path / "download", "--protocol", "cropped-literature", "--allow-missing")
    folder = raw_root / "Dataset005_PancreasCT_cropped"
    image, mask = naive_mc_net(*make_abdomen(0, (4, 230, 200)))
    assert image.shape[2] < 150  # something was cut
    np.testing.assert_allclose(
        load(folder / "imagesTr" / f"{TRAIN[0]}_0000.nii.gz"), image, atol=1e-3
    )
    np.testing.assert_array_equal(load(folder / "labelsTr" / f"{TRAIN[0]}.nii.gz"), mask)
    made = record(raw_root, folder.name)
    assert made["protocol"] == "cropped-literature"
    assert made["notes"][TRAIN[0]]["mask_mirrored_in"] == "y"
    channels = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["channel_names"]
    assert channels == {"0": "windowed CT"}  # z-scored by nnU-Net


def test_mc_net_release(tmp_path, raw_root, heldout, capsys):
    for seed, name in enumerate([*TRAIN, *TEST]):
        if name not in ("image0025", "image0070"):
            write_packed(tmp_path / "Pancreas_h5" / f"{name}_norm.h5", seed)
    run(tmp_path / "Pancreas_h5", "--labeled", 12)
    assert "2 named by the list but not in the source: image0070, image0025" in (
        capsys.readouterr().out
    )
    folder = raw_root / "Dataset005_PancreasCT_cropped_12labeled"
    made = record(raw_root, folder.name)
    assert (made["protocol"], made["spacing_known"]) == ("cropped-literature", True)
    assert made["missing"] == ["image0070", "image0025"]
    assert made["labeled"] == [*TRAIN[:10], *TRAIN[11:13]]
    assert [len(made["splits"][k]) for k in ("train", "val", "test")] == [61, 0, 19]
    image = load(folder / "imagesTr" / f"{TRAIN[0]}_0000.nii.gz")
    with h5py.File(tmp_path / "Pancreas_h5" / f"{TRAIN[0]}_norm.h5") as file:
        np.testing.assert_array_equal(image, file["image"][()].transpose(2, 1, 0))
    assert load(folder / "labelsTr" / f"{TRAIN[0]}.nii.gz")[2, 1, 4] == 1


def test_withdrawn_scan_that_is_here(tmp_path, raw_root, capsys):
    for seed, name in enumerate([*TRAIN, *TEST]):
        write_packed(tmp_path / "Pancreas_h5" / f"{name}_norm.h5", seed)
    run(tmp_path / "Pancreas_h5", "--labeled", 12)
    assert "image0070 is here, but was withdrawn" in capsys.readouterr().out
    made = record(raw_root, "Dataset005_PancreasCT_cropped_12labeled")
    assert made["labeled"] == TRAIN[:12]
    assert [len(made["splits"][k]) for k in ("train", "test")] == [62, 20]


def test_coranet_release(tmp_path, raw_root):
    for i in range(1, 83):
        if i not in (25, 70):
            write_packed(tmp_path / "coranet" / f"{i:04d}.h5", i)
    run(tmp_path / "coranet", "--split", "coranet", "--labeled", 6)
    made = record(raw_root, "Dataset005_PancreasCT_cropped_6labeled")
    assert made["spacing_known"] is False
    assert made["labeled"] == [f"image{i:04d}" for i in range(1, 7)]
    assert made["order"][-1] == "image0063"
    assert made["splits"]["test"] == [f"image{i:04d}" for i in range(64, 83) if i != 70]
    assert len(made["order"]) == 62


def test_h5_is_never_raw(tmp_path, raw_root):
    write_packed(tmp_path / "h5" / "image0001_norm.h5", 0)
    with pytest.raises(UserError, match=r"MC-Net's h5 files, which are cropped already.*TCIA"):
        run(tmp_path / "h5", "--protocol", "raw")
    with pytest.raises(UserError, match=r"--spacing: that of MC-Net's h5 files is known"):
        run(tmp_path / "h5", "--spacing", 1, 1, 1)


def test_two_releases(tcia, raw_root):
    write_packed(tcia / "image0001_norm.h5", 0)
    with pytest.raises(UserError, match=r"TCIA's DICOM series and MC-Net's h5 files. Give"):
        run(tcia)


def test_missing_mask(tcia, raw_root):
    (tcia / "TCIA_pancreas_labels-02-05-2017" / f"label{TRAIN[1][-4:]}.nii.gz").unlink()
    with pytest.raises(UserError, match=rf"lacks the masks label{TRAIN[1][-4:]}.*TCIA's labels"):
        run(tcia, "--allow-missing")


def test_second_series(tcia, raw_root):
    number = TRAIN[0][-4:]
    write_series(make_abdomen(9)[0], tcia / "copy" / f"PANCREAS_{number}" / "study" / "s2")
    with pytest.raises(UserError, match=rf"are both series of PANCREAS_{number}. Remove one"):
        run(tcia)
    write_series(make_abdomen(9)[0], tcia / "a_copy" / "study")
    with pytest.raises(UserError, match=r"a_copy/study holds DICOM files, but no folder above"):
        run(tcia)


def test_mask_of_another_scan(tcia, raw_root):
    labels = tcia / "TCIA_pancreas_labels-02-05-2017"
    write_mask(make_abdomen(0, (9, 24, 20))[1], labels / f"label{TRAIN[0][-4:]}.nii.gz")
    with pytest.raises(UserError, match=rf"{TRAIN[0]}.*size .*Slices are missing or doubled"):
        run(tcia, "--allow-missing")


def test_lost_slice(tcia, raw_root):
    folder = next(tcia.rglob(f"PANCREAS_{TRAIN[0][-4:]}")) / "11-24-2015" / "s1"
    (folder / "1-004.dcm").unlink()
    with pytest.raises(UserError, match=r"lie 3 mm apart, others 1.5 mm. A slice is missing"):
        run(tcia, "--allow-missing")
    assert names(raw_root) == []


def test_mask_off_the_pancreas(tcia, raw_root):
    labels = tcia / "TCIA_pancreas_labels-02-05-2017"
    mask = np.zeros((10, 24, 20), np.uint8)
    mask[4:6, 10:13, 2:4] = 1
    write_mask(mask, labels / f"label{TRAIN[0][-4:]}.nii.gz")
    with pytest.raises(UserError, match=rf"{TRAIN[0]}: the mask lies in soft tissue in no orient"):
        run(tcia, "--allow-missing")


def test_wrong_release(tmp_path, raw_root):
    path = tmp_path / "Training" / "Case00_segmentation.mhd"
    path.parent.mkdir()
    path.write_text("")
    with pytest.raises(UserError, match=r"no DICOM files below PANCREAS_XXXX.*like PROMISE12"):
        run(path.parent)
