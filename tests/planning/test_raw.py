import json
import re
import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from make_data import make_raw_dataset, write_image
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_ssl.errors import UserError
from nnunet_ssl.planning.api import plan_and_preprocess
from nnunet_ssl.planning.raw import inspect_case, inspect_dataset, list_cases, read_raw_dataset
from nnunet_ssl.planning.workers import Workers


def refused(base, *words):
    """Planning stops with one message that holds all words, and leaves nothing behind."""
    with pytest.raises(UserError) as caught:
        plan_and_preprocess(901, ["3d_fullres"], num_processes=1)
    for word in words:
        assert str(word) in str(caught.value)
    assert not base.exists()
    assert not list(base.parents[1].glob("raw/*/splits_final.json"))


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


# --- file lists ---------------------------------------------------------------------------------


def test_lists_cases_with_channels_in_order_and_skips_hidden_files(tmp_path):
    for name in ("b_0001", "b_0000", "a_x_0000", "a_x_0001"):
        (tmp_path / f"{name}.nii.gz").touch()
    (tmp_path / ".DS_Store").touch()
    found = list_cases(tmp_path, ".nii.gz", 2)
    assert list(found) == ["a_x", "b"]
    assert [p.name for p in found["b"]] == ["b_0000.nii.gz", "b_0001.nii.gz"]


def test_no_imagesun(toy, base):
    shutil.rmtree(toy / "imagesUn")
    refused(base, toy / "imagesUn", "does not exist", "Put scans without masks there")


def test_empty_imagesun(toy, base):
    shutil.rmtree(toy / "imagesUn")
    (toy / "imagesUn").mkdir()
    (toy / "imagesUn" / ".hidden").touch()
    refused(base, toy / "imagesUn", "is empty", "Put scans without masks there")


@pytest.mark.parametrize("folder, case", [("imagesUn", "un_002"), ("imagesTr", "tr_001")])
def test_missing_channel(roots, base, folder, case):
    missing = make_raw_dataset(roots / "raw", channels=2) / folder / f"{case}_0001.nii.gz"
    missing.unlink()
    refused(base, missing, "is missing", "Add the file or remove the case")


def test_channel_too_many(toy, base):
    extra = toy / "imagesUn" / "un_001_0001.nii.gz"
    shutil.copy(toy / "imagesUn" / "un_001_0000.nii.gz", extra)
    refused(base, extra, "too many", "Remove the file")


@pytest.mark.parametrize("name", ["un_009_0000.nii", "notes.txt", "un_009_0000.mha"])
def test_wrong_file_ending(toy, base, name):
    (toy / "imagesUn" / name).touch()
    refused(base, toy / "imagesUn" / name, "does not end with .nii.gz", "Convert")


def test_no_channel_number(toy, base):
    (toy / "imagesUn" / "scan.nii.gz").touch()
    refused(base, toy / "imagesUn" / "scan.nii.gz", "Rename it to scan_0000.nii.gz")


@pytest.mark.parametrize("folder, case", [("imagesUn", "un_002"), ("imagesTr", "tr_001")])
def test_case_name_that_is_taken_by_a_preprocessed_mask(toy, base, folder, case):
    path = toy / folder / f"{case}_0000.nii.gz"
    renamed = path.rename(path.with_name("tr_000_seg_0000.nii.gz"))
    refused(base, renamed, "X_seg", "Rename the case with all its files, e.g. to tr_000-seg")


def test_case_name_in_both_folders(toy, base):
    (toy / "imagesUn" / "un_000_0000.nii.gz").rename(toy / "imagesUn" / "tr_001_0000.nii.gz")
    refused(base, "Case tr_001 is in imagesTr and in imagesUn", "Remove or rename one")


def test_image_without_mask(toy, base):
    mask = toy / "labelsTr" / "tr_002.nii.gz"
    mask.unlink()
    refused(base, mask, "is missing", "move its images to", toy / "imagesUn")


def test_unknown_id(toy):
    with pytest.raises(UserError, match=r"No data set with id 7.*Check -d.*Dataset901_Toy"):
        read_raw_dataset(7)


def test_id_with_two_names(toy, roots):
    (roots / "results" / "Dataset901_Other").mkdir()
    with pytest.raises(UserError, match=r"Dataset901_Other, Dataset901_Toy.*Rename or remove"):
        read_raw_dataset(901)


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_variable_unset(toy, monkeypatch, variable):
    monkeypatch.delenv(variable)
    with pytest.raises(UserError, match=f"{variable} is not set.*export {variable}="):
        plan_and_preprocess(901, ["2d"], num_processes=1)


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "not valid JSON"),
        ("[]", "holds no JSON object"),
        ('{"labels": {}, "numTraining": 3}', "lacks file_ending, channel_names"),
        (None, "is missing"),
    ],
)
def test_bad_dataset_json(toy, base, content, words):
    path = toy / "dataset.json"
    path.unlink() if content is None else path.write_text(content)
    refused(base, path, words)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("labels", {"background": 0, "x": 1, "y": 3}, "[0, 1, 3], but nnU-Net needs consecutive"),
        ("labels", {"background": 0, "x": [1, 3], "y": 3}, "regions_class_order"),
        ("labels", {"background": 0, "x": 1, "ignore": 3}, "[0, 1, 3], but nnU-Net needs"),
        ("labels", {"background": 0, "x": 2, "ignore": 1}, "[0, 2, 1], but nnU-Net needs"),
        ("labels", {"background": 1, "x": 0}, "Background label must be 0"),
        ("labels", {"background": 0, "x": None}, "nnU-Net refuses labels"),
        ("labels", {"0": "background", "1": "x"}, 'does not name "background"'),
        ("labels", {"x": 1}, '"background": 0'),
        ("labels", ["background", "x"], "Write names before values"),
        ("channel_names", ["MRI"], 'channel_names is ["MRI"]. Write number and name'),
        ("channel_names", {"MRI": 0}, "Write number and name of each channel"),
    ],
)
def test_labels_and_channels_that_nnunet_does_not_take(toy, base, key, value, words):
    content = json.loads((toy / "dataset.json").read_text(encoding="utf-8"))
    (toy / "dataset.json").write_text(json.dumps(content | {key: value}))
    refused(base, toy / "dataset.json", key, words)


def test_regions_with_gaps_in_their_values(roots, base):
    path = make_raw_dataset(roots / "raw", regions=True, shape=(4, 8, 8)) / "dataset.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["labels"] = {"background": 0, "whole": [1, 2, 4], "core": 4}
    path.write_text(json.dumps(content))
    refused(base, path, "[0, 1, 2, 4], but nnU-Net needs consecutive")


def test_wrong_number_of_annotated_cases(toy, base):
    content = json.loads((toy / "dataset.json").read_text(encoding="utf-8"))
    (toy / "dataset.json").write_text(json.dumps(content | {"numTraining": 7}))
    refused(base, toy / "dataset.json", "numTraining 7", "there are 3 annotated", "Correct")


def test_reads_the_dataset_key(toy, roots):
    content = json.loads((toy / "dataset.json").read_text(encoding="utf-8"))
    (toy / "imagesTr").rename(toy / "elsewhere")
    content["dataset"] = {
        f"case{i}": {
            "images": [f"elsewhere/tr_{i:03d}_0000.nii.gz"],
            "label": f"labelsTr/tr_{i:03d}.nii.gz",
        }
        for i in range(3)
    }
    (toy / "dataset.json").write_text(json.dumps(content))
    raw = read_raw_dataset(901)
    assert list(raw.labeled) == ["case0", "case1", "case2"]
    assert raw.labeled["case1"] == [toy / "elsewhere" / "tr_001_0000.nii.gz"]
    assert len(raw.unlabeled) == 5

    renamed = {f"{case}_seg": files for case, files in content["dataset"].items()}
    (toy / "dataset.json").write_text(json.dumps(content | {"dataset": renamed}))
    with pytest.raises(UserError, match=r"dataset.json names the case case0_seg, but nnU-Net"):
        read_raw_dataset(901)
    (toy / "dataset.json").write_text(json.dumps(content))
    (toy / "elsewhere" / "tr_001_0000.nii.gz").unlink()
    with pytest.raises(UserError, match=r"tr_001_0000.nii.gz is missing.*dataset.json lists it"):
        read_raw_dataset(901)


def test_one_file_with_all_channels(roots):
    """RGB images: three channels in dataset.json, one file per case."""
    folder = roots / "raw" / "Dataset901_Toy"
    rng = np.random.default_rng(0)
    for sub, case in (("imagesTr", "a"), ("imagesUn", "b")):
        (folder / sub).mkdir(parents=True)
        rgb = sitk.GetImageFromArray(rng.integers(0, 255, (8, 9, 3), np.uint8), isVector=True)
        sitk.WriteImage(rgb, str(folder / sub / f"{case}_0000.png"))
    (folder / "labelsTr").mkdir()
    mask = sitk.GetImageFromArray(rng.integers(0, 2, (8, 9)).astype(np.uint8))
    sitk.WriteImage(mask, str(folder / "labelsTr" / "a.png"))
    content = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "road": 1},
        "numTraining": 1,
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    labeled, unlabeled = inspect_dataset(read_raw_dataset(901), Workers(1))
    assert labeled["a"].shape_after_crop == (1, 8, 9)
    assert unlabeled["b"].is_2d


# --- images -------------------------------------------------------------------------------------


def test_truncated_gzip_which_simpleitk_would_read_silently(toy, base):
    path = toy / "imagesUn" / "un_003_0000.nii.gz"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    sitk.ReadImage(str(path))  # no error: why the check is ours
    refused(base, path, "Cannot read", "cut short", "copy or export it again")


@pytest.mark.parametrize("folder, name", [("imagesTr", "tr_000"), ("imagesUn", "un_000")])
def test_unreadable_image(toy, base, folder, name):
    path = toy / folder / f"{name}_0000.nii.gz"
    path.write_bytes(b"no image")
    refused(base, path, "Cannot read", "damaged")


def test_dangling_link(toy, base):
    path = toy / "imagesUn" / "un_000_0000.nii.gz"
    path.unlink()
    path.symlink_to("nowhere.nii.gz")
    refused(base, path, "Cannot read", "missing")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(toy, base, value):
    path = toy / "imagesUn" / "un_001_0000.nii.gz"
    array = read(path)
    array[3, 4, 5] = value
    write_image(array, path)
    refused(base, path, "NaN or infinite", "Replace them")


def test_channels_of_different_shape(roots, base):
    folder = make_raw_dataset(roots / "raw", channels=2) / "imagesUn"
    write_image(read(folder / "un_004_0001.nii.gz")[:-1], folder / "un_004_0001.nii.gz")
    first, second = (folder / f"un_004_000{c}.nii.gz" for c in (0, 1))
    refused(base, second, "shape (15, 32, 32)", first, "(16, 32, 32)", "Resample")


def test_channels_of_different_spacing(roots, base):
    folder = make_raw_dataset(roots / "raw", channels=2) / "imagesUn"
    path = folder / "un_004_0001.nii.gz"
    write_image(read(path), path, spacing=(1, 1, 2))
    refused(base, path, "spacing (2, 1, 1) mm", folder / "un_004_0000.nii.gz", "header")


def test_2d_image_in_3d_set_and_back(toy, roots, base):
    path = toy / "imagesUn" / "un_002_0000.nii.gz"
    write_image(read(path)[:1], path)
    refused(base, path, "is 2D", "tr_000, is 3D", "data set of its own")

    shutil.rmtree(toy)
    make_raw_dataset(roots / "raw", dim=2)
    write_image(np.ones((4, 32, 32), np.float32), path)
    refused(base, path, "is 3D", "tr_000, is 2D")


def test_mask_that_does_not_fit(toy, base):
    mask = toy / "labelsTr" / "tr_001.nii.gz"
    array = read(mask)
    write_image(array[:, :-2], mask)
    refused(base, mask, "shape (16, 30, 32)", "tr_001_0000.nii.gz")
    array[0, 0, 0] = 9
    write_image(array, mask)
    refused(base, mask, "values [9", "Correct the mask or add the labels")


TURNED = {"nii.gz": "RAS", "nrrd": "RAS", "mha": "ASL"}  # two axes mirrored, or all exchanged


@pytest.mark.parametrize("ending", TURNED)
def test_mask_in_another_orientation(roots, base, ending):
    """The same place in the scanner, but nnU-Net reads the voxels as they are stored."""
    toy = make_raw_dataset(roots / "raw", ending=f".{ending}")
    mask, image = toy / "labelsTr" / f"tr_001.{ending}", toy / f"imagesTr/tr_001_0000.{ending}"
    sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(mask)), TURNED[ending]), str(mask))
    refused(base, mask, TURNED[ending], f"against {image} (LPS)", "convert folder", "copy that of")


def test_mask_in_another_orientation_read_by_nibabel(roots, base):
    """Also where that reader turns both: then nothing is wrong."""
    toy = make_raw_dataset(roots / "raw", ending=".nii")
    mask = toy / "labelsTr" / "tr_001.nii"
    sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(mask)), "LAS"), str(mask))
    refused(base, mask, "orientation LAS", "tr_001_0000.nii (LPS)", "nnunet_ssl convert folder")
    path = toy / "dataset.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["overwrite_image_reader_writer"] = "NibabelIOWithReorient"
    path.write_text(json.dumps(content))
    labeled, _ = inspect_dataset(read_raw_dataset(901), Workers(1))
    assert not any(info.misplaced for info in labeled.values())


def test_channel_in_another_orientation(roots, base):
    folder = make_raw_dataset(roots / "raw", channels=2) / "imagesUn"
    first, second = (folder / f"un_004_000{c}.nii.gz" for c in (0, 1))
    sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(second)), "LPI"), str(second))
    refused(base, second, "LPI", f"against {first} (LPS)", "Turn one of them")


def rotated(path, degrees, shift=(0, 0, 0)):
    """Write an image anew as if it lay elsewhere in the scanner."""
    image = sitk.ReadImage(str(path))
    turn = sitk.Euler3DTransform((0, 0, 0), 0, 0, np.deg2rad(degrees))
    image.SetDirection(turn.GetMatrix())
    image.SetOrigin(shift)
    sitk.WriteImage(image, str(path))


def test_orientation_is_compared_with_the_image_not_with_the_scanner(toy, capsys):
    """Around 45 degrees a rounded digit changes the nearest axes of the scanner."""
    for i in range(3):
        rotated(toy / "imagesTr" / f"tr_{i:03d}_0000.nii.gz", 44.999)
        rotated(toy / "labelsTr" / f"tr_{i:03d}.nii.gz", 45.001)
    inspect_dataset(read_raw_dataset(901), Workers(1))
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize("degrees, shift, voxels", [(0, (0, 0, -2.5), 2.5), (5, (0, 0, 0), 2.82)])
def test_mask_in_another_place_gives_one_warning(toy, capsys, degrees, shift, voxels):
    for i in range(2):
        rotated(toy / "labelsTr" / f"tr_{i:03d}.nii.gz", degrees, shift)
    rotated(toy / "labelsTr" / "tr_002.nii.gz", 1e-4, (1e-4, 0, 0))  # rounding
    inspect_dataset(read_raw_dataset(901), Workers(1))
    out = capsys.readouterr().out
    assert out.count("WARNING") == 1
    assert "In 2 case(s) the headers place mask and image, or two channels, apart" in out
    mask, image = toy / "labelsTr" / "tr_000.nii.gz", toy / "imagesTr" / "tr_000_0000.nii.gz"
    assert f"e.g. {mask} by {voxels} voxels against {image}" in out
    inspect_dataset(read_raw_dataset(901), Workers(1), check_masks=False)
    assert "WARNING" not in capsys.readouterr().out


def test_image_with_channels_in_a_fourth_axis(tmp_path):
    image = sitk.GetImageFromArray(np.zeros((2, 4, 5, 6), np.float32), isVector=False)
    image.SetOrigin((10, 20, 30, 0))
    path, mask = tmp_path / "a_0000.nii.gz", tmp_path / "a.nii.gz"
    sitk.WriteImage(image, str(path))
    sitk.WriteImage(image[..., 0], str(mask))
    assert inspect_case([path], SimpleITKIO, 2, mask, [0]).misplaced == ""
    sitk.WriteImage(image[::-1, :, :, 0], str(mask))
    with pytest.raises(UserError, match=r"a.nii.gz has its axes turned \(orientation RPS\)"):
        inspect_case([path], SimpleITKIO, 2, mask, [0])
    with pytest.raises(UserError, match=r"hold 2 channel.*names 1\. If a file is 4D or in colour"):
        inspect_case([path], SimpleITKIO, 1)
    with pytest.raises(UserError, match=r"names 3\. Add the missing files"):
        inspect_case([path], SimpleITKIO, 3)


def test_masks_that_mark_nothing_are_named(toy, capsys):
    inspect_dataset(read_raw_dataset(901), Workers(1))
    assert "mark nothing" not in capsys.readouterr().out
    path = toy / "labelsTr" / "tr_001.nii.gz"
    mask = sitk.ReadImage(str(path))
    sitk.WriteImage(mask * 0, str(path))
    inspect_dataset(read_raw_dataset(901), Workers(1))
    assert "WARNING: 1 of 3 masks mark nothing: tr_001. They teach" in capsys.readouterr().out


def test_flat_images_with_a_direction(tmp_path):
    path, mask = tmp_path / "a_0000.mha", tmp_path / "a.mha"
    image = sitk.GetImageFromArray(np.zeros((5, 6), np.uint8))
    sitk.WriteImage(image, str(path))
    sitk.WriteImage(image, str(mask))
    assert inspect_case([path], SimpleITKIO, 1, mask, [0]).misplaced == ""
    sitk.WriteImage(image[:, ::-1], str(mask))
    with pytest.raises(UserError, match=r"a.mha has its axes turned \(orientation LAS\)"):
        inspect_case([path], SimpleITKIO, 1, mask, [0])


def test_direction_that_is_not_orthonormal(toy, base):
    """The advice of the message makes the file readable and keeps its voxels."""
    path = toy / "imagesUn" / "un_001_0000.nii.gz"
    array = read(path)
    sheared = np.eye(4)
    sheared[0, 1] = 1e-2
    image = nibabel.Nifti1Image(array.T, sheared)
    image.set_qform(None, code=0)
    nibabel.save(image, path)
    refused(base, path, "sform/qform) is not orthonormal", "intact", "Mend the header")
    with pytest.raises(UserError) as caught:
        inspect_case([path], SimpleITKIO, 1)
    assert "damaged" not in str(caught.value)

    image = nibabel.load(path)
    image.set_qform(image.affine)
    image.set_sform(image.get_qform())
    nibabel.save(image, mended := path.with_name("mended.nii.gz"))
    np.testing.assert_array_equal(read(mended), array)


def test_same_image_annotated_and_not(toy, base):
    twin = toy / "imagesUn" / "un_002_0000.nii.gz"
    image = sitk.ReadImage(str(toy / "imagesTr" / "tr_001_0000.nii.gz"))
    sitk.WriteImage(image, str(twin), True, 9)  # other bytes, same voxels
    refused(base, twin, "same image as", toy / "imagesTr" / "tr_001_0000.nii.gz", "Remove one")


def test_all_bad_cases_in_one_message(roots, base):
    folder = make_raw_dataset(roots / "raw", num_unlabeled=13, shape=(4, 8, 8)) / "imagesUn"
    for i in range(12):
        (folder / f"un_{i:03d}_0000.nii.gz").write_bytes(b"no image")
    refused(base, "un_000_0000", "un_009_0000", "and 2 more")


def test_masks_of_regions_and_ignore_label_are_accepted(roots):
    make_raw_dataset(roots / "raw", regions=True, ignore=True, shape=(4, 8, 8))
    labeled, unlabeled = inspect_dataset(read_raw_dataset(901), Workers(1))
    assert (len(labeled), len(unlabeled)) == (3, 5)


def test_case_info(tmp_path):
    array = np.zeros((6, 8, 10), np.float32)
    array[1:4, 2:7, 3:9] = 5
    path = tmp_path / "a_0000.nii.gz"
    write_image(array, path, spacing=(0.5, 1, 2))
    info = inspect_case([path], SimpleITKIO, 1)
    assert info.shape_after_crop == (3, 5, 6)
    assert info.spacing == (2, 1, 0.5)
    assert info.relative_size == pytest.approx(90 / 480)
    assert re.fullmatch("[0-9a-f]{64}", info.content)
    write_image(array.reshape(6, 10, 8), path)
    assert inspect_case([path], SimpleITKIO, 1).content != info.content
