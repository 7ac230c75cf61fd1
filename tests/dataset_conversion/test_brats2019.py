"""BraTS 2019 and 2020: files, regions, published lists, the FLAIR protocol."""

import json

import h5py
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion import main
from nnunet_ssl.dataset_conversion.reading import published_list
from nnunet_ssl.dataset_conversion.selection import by_hash
from nnunet_ssl.errors import UserError

from .conftest import names

LISTS = {k: published_list(f"BraTS2019_{k}.txt") for k in ("train", "val", "test")}
SOME = [*LISTS["train"][:4], LISTS["val"][0], LISTS["test"][0]]
KINDS = ("flair", "t1", "t1ce", "t2")
MASK = np.array([0, 1, 2, 4] * 4, np.uint8).reshape(2, 2, 4)


@pytest.fixture
def put(tmp_path, write):
    """Return a function that writes the files of one scan; image values tell the channel."""

    def put_scan(place, name, seed, ending=".nii.gz", mask=MASK, kinds=KINDS):
        folder = tmp_path / "src" / place
        for number, kind in enumerate(kinds):
            image = np.random.default_rng(seed).integers(0, 90, (2, 2, 4)) + 100 * number
            write(image.astype(np.int16), folder / f"{name}_{kind}{ending}", origin=(0, -239, 0))
        if mask is not None:
            write(mask, folder / f"{name}_seg{ending}", origin=(0, -239, 0))
        return folder

    return put_scan


@pytest.fixture
def release(tmp_path, put):
    """Six scans of 2019, in HGG, LGG and beside them; a validation scan and junk."""
    for seed, name in enumerate(SOME):
        place = ("HGG", "LGG", "")[seed % 3]
        put(f"{place}/{name}" if place else "", name, seed, (".nii", ".nii.gz")[seed % 2])
    put("Validation/BraTS19_CBICA_AAM_1", "BraTS19_CBICA_AAM_1", 9, mask=None)
    (tmp_path / "src" / "HGG" / f"._{SOME[0]}_flair.nii").write_text("junk")
    return tmp_path / "src"


def run(source, *options):
    return main(["BraTS2019", "-i", str(source), "-d", "5", "-np", "1", *map(str, options)])


def array(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_lists_are_those_of_ssl4mis():
    assert [len(v) for v in LISTS.values()] == [250, 25, 60]
    assert len({c for names in LISTS.values() for c in names}) == 335
    assert LISTS["train"][:2] == ["BraTS19_TCIA02_370_1", "BraTS19_CBICA_ASA_1"]
    assert LISTS["train"][-1] == "BraTS19_TCIA10_346_1"


def test_channels_regions_and_splits(release, raw_root, heldout, capsys):
    with pytest.raises(UserError, match=r"329 case\(s\) .*SSL4MIS.*--allow-missing"):
        run(release)
    run(release, "--allow-missing", "--labeled", 2)
    told = capsys.readouterr().out
    assert "1 scans without masks are skipped: BraTS19_CBICA_AAM_1" in told
    folder, hidden = (r / "Dataset005_BraTS2019_2labeled" for r in (raw_root, heldout))
    record = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
    assert record["order"] == LISTS["train"][:4]
    assert record["labeled"] == LISTS["train"][:2]
    assert names(folder / "imagesTr") == sorted(
        f"{c}_{i:04d}.nii.gz" for c in SOME[:2] for i in range(4)
    )
    for number in range(4):
        values = array(folder / "imagesTr" / f"{SOME[0]}_{number:04d}.nii.gz")
        assert (values // 100 == number).all()
    mask = sitk.ReadImage(str(folder / "labelsTr" / f"{SOME[0]}.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask), np.where(MASK == 4, 3, MASK))
    assert mask.GetOrigin() == (0, -239, 0)
    assert names(hidden / "test_labels") == [f"{LISTS['test'][0]}.nii.gz"]
    assert names(hidden / "val_labels") == [f"{LISTS['val'][0]}.nii.gz"]
    rows = (folder / "cases.csv").read_text(encoding="utf-8").split()
    assert rows == ["case,high_grade", f"{SOME[0]},1.0", f"{SOME[1]},0.0", f"{SOME[2]},", rows[4]]


def test_nnunet_restores_the_labels_from_the_regions(release, raw_root):
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # slow import

    run(release, "--allow-missing")
    about = json.loads(
        (raw_root / "Dataset005_BraTS2019" / "dataset.json").read_text(encoding="utf-8")
    )
    manager = PlansManager({}).get_label_manager(about)
    assert manager.has_regions
    labels = np.where(MASK == 4, 3, MASK)
    regions = np.stack([np.isin(labels, r) for r in manager.foreground_regions])
    restored = manager.convert_probabilities_to_segmentation(regions.astype(np.float32))
    np.testing.assert_array_equal(restored, labels)


def test_flair_protocol_and_h5_give_the_same_masks(release, raw_root, tmp_path):
    run(release, "--allow-missing", "--flair-whole-tumour")
    folder = raw_root / "Dataset005_BraTS2019FlairWT"
    packed = tmp_path / "h5" / "data"
    packed.mkdir(parents=True)
    for name in SOME:
        with h5py.File(packed / f"{name}.h5", "w") as file:
            rng = np.random.default_rng(len(names(packed)))
            file["image"] = rng.normal(size=MASK.shape).astype(np.float32)
            file["label"] = (MASK > 0).astype(np.uint8)
    with pytest.raises(UserError, match=r"h5 files.*Add --flair-whole-tumour"):
        run(packed, "-d", 6, "--allow-missing")
    run(packed, "-d", 6, "--allow-missing", "--flair-whole-tumour")
    cropped = raw_root / "Dataset006_BraTS2019FlairWT_cropped"
    for data, kind in ((folder, "raw"), (cropped, "cropped-literature")):
        assert names(data / "imagesTr") == sorted(f"{c}_0000.nii.gz" for c in SOME[:4])
        np.testing.assert_array_equal(array(data / "labelsTr" / f"{SOME[0]}.nii.gz"), MASK > 0)
        assert (
            json.loads((data / "conversion.json").read_text(encoding="utf-8"))["protocol"] == kind
        )
        about = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
        assert about["labels"] == {"background": 0, "whole tumour": 1}
        assert "regions_class_order" not in about


def test_2020_with_the_mask_of_355(put, raw_root, tmp_path, capsys):
    for seed, number in enumerate((1, 2, 3, 355)):
        name = f"BraTS20_Training_{number:03d}"
        folder = put(name, name, seed, ".nii", mask=None if number == 355 else MASK)
    (folder.parent / "BraTS20_Training_001" / "BraTS20_Training_001_seg.nii").replace(
        folder / "W39_1998.09.19_Segm.nii"
    )
    (folder.parent / "name_mapping.csv").write_text("Grade\n")
    with pytest.raises(UserError, match=r"missing: BraTS20_Training_001_seg\. Unpack"):
        run(tmp_path / "src")
    put("BraTS20_Training_001", "BraTS20_Training_001", 0, ".nii")
    run(tmp_path / "src")
    assert "W39_1998.09.19_Segm.nii is taken as the mask of BraTS20_Training_355" in (
        capsys.readouterr().out
    )
    record = json.loads(
        (raw_root / "Dataset005_BraTS2020" / "conversion.json").read_text(encoding="utf-8")
    )
    cases = [f"BraTS20_Training_{n:03d}" for n in (1, 2, 3, 355)]
    assert record["order"] == by_hash(cases)
    assert record["sources"][cases[3]]["label"].endswith("W39_1998.09.19_Segm.nii")


def test_refusals(put, raw_root, tmp_path):
    with pytest.raises(UserError, match=r"missing: BraTS20_Training_001_t2\. Unpack"):
        run(put("", "BraTS20_Training_001", 0, kinds=KINDS[:3]))
    put("", "BraTS20_Training_001", 0)
    with pytest.raises(UserError, match=r"flair.nii and .*flair.nii.gz are the same image"):
        run(put("", "BraTS20_Training_001", 0, ending=".nii"))
    for place, name, told in (
        ("b", "BraTS2021_00000", r"BraTS2021\.\.\.\. Give a folder with those of 2019"),
        ("b", "BraTS19_CBICA_AAB_1", r"BraTS19\.\.\., BraTS2021\.\.\."),
    ):
        with pytest.raises(UserError, match=told):
            run(put(place, name, 1))
    with pytest.raises(UserError, match=r"BraTS20_Training_002: the mask holds 3,.* is 4 there"):
        run(put("c", "BraTS20_Training_002", 2, mask=np.full_like(MASK, 3)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "patient001_4d.nii.gz").write_text("")
    with pytest.raises(UserError, match="looks like the challenge's release of ACDC"):
        run(tmp_path / "other")
