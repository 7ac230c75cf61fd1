"""Own scans: patterns, tables, formats, channels, labels, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion import main
from nnunet_ssl.errors import UserError

from .conftest import names

LABELS = ["--labels", "left=1", "right=2"]
MRI = ["--channels", "MRI"]
PAIRS = ["--images", "images/*.nii.gz", "--masks", "masks/*_seg.nii.gz", *MRI, *LABELS]


def run(source, *options):
    return main(["folder", "-i", str(source), "-d", "5", "-np", "1", *map(str, options)])


def load(raw_root, file="conversion.json"):
    (folder,) = raw_root.glob("Dataset005_*")
    return json.loads((folder / file).read_text(encoding="utf-8"))


def voxels(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.fixture
def scans(tmp_path, write, make_case) -> Path:
    """Two visits of three patients, masks for the first visits only."""
    for seed, case in enumerate(["p1_a", "p1_b", "p2_a", "p2_b", "p3_a", "p3_b"]):
        image, mask = make_case(seed)
        write(image, tmp_path / "scans" / "images" / f"{case}.nii.gz", (1, 1, 3))
        if case.endswith("a"):
            write(mask, tmp_path / "scans" / "masks" / f"{case}_seg.nii.gz", (1, 1, 3))
    return tmp_path / "scans"


# ------------------------------------------------------------------------------------ patterns


def test_scans_without_masks_are_the_unlabeled_ones(scans, raw_root, capsys):
    run(scans, *PAIRS)
    folder = raw_root / "Dataset005_scans"
    assert names(folder / "labelsTr") == ["p1_a.nii.gz", "p2_a.nii.gz", "p3_a.nii.gz"]
    assert names(folder / "imagesUn") == [f"p{i}_b_0000.nii.gz" for i in (1, 2, 3)]
    told = capsys.readouterr().out
    assert "3 of 6 scans have no mask" in told and "each case counts as one patient" in told


def test_patients_stay_together(scans, raw_root, heldout):
    run(scans, *PAIRS, "--group", "^p[0-9]+", "--labeled", 1, "--name", "My scans")
    record = load(raw_root)
    assert record["name"] == "Dataset005_Myscans_1labeled"
    assert record["labeled"] == ["p1_a"] and record["groups"]["p1_b"] == "p1"
    assert names(heldout / record["name"] / "hidden_labels") == ["p2_a.nii.gz", "p3_a.nii.gz"]
    with pytest.raises(UserError, match=r"--group '\^q' matches nothing in 'p1_a'"):
        run(scans, *PAIRS, "--group", "^q")


def test_folders_name_cases_and_patterns_name_channels(tmp_path, raw_root, write, make_case):
    for seed, case in enumerate(["anna 1", "bert"]):
        image, mask = make_case(seed)
        for channel, name in enumerate(("t1.nrrd", "T2.mha")):
            write(image + channel, tmp_path / "s" / "deep" / case / name)
        write(mask, tmp_path / "s" / "deep" / case / "seg.nii")
    patterns = ["--images", "**/*/t1.nrrd", "**/*/T2.mha", "--masks", "**/*/seg.nii"]
    run(tmp_path / "s", *patterns, "--channels", "T1", "T2", *LABELS)
    folder = raw_root / "Dataset005_s"
    assert names(folder / "labelsTr") == ["anna_1.nii.gz", "bert.nii.gz"]
    np.testing.assert_allclose(
        voxels(folder / "imagesTr" / "bert_0001.nii.gz"), make_case(1)[0] + 1, rtol=1e-5
    )
    (tmp_path / "s" / "deep" / "bert" / "T2.mha").unlink()
    with pytest.raises(UserError, match=r"No file matches '\*\*/\*/T2.mha' for bert"):
        run(tmp_path / "s", *patterns, "--channels", "T1", "T2", *LABELS)
    with pytest.raises(UserError, match="2 patterns, --channels names 1"):
        run(tmp_path / "s", *patterns, *MRI, *LABELS)


@pytest.mark.parametrize("channels", [1, 2])
def test_numbered_channels(tmp_path, raw_root, write, make_case, channels):
    image, mask = make_case(0)
    for case in ("a_0001", "b"):
        for c in range(channels):
            write(image + c + len(case), tmp_path / "s" / f"{case}_{c:04d}.nii.gz")
        write(mask, tmp_path / "s" / "m" / f"{case}.nii.gz")
    options = ["--images", "*.nii.gz", "--masks", "m/*.nii.gz", *LABELS]
    run(tmp_path / "s", *options, "--channels", *"xy"[:channels])
    assert load(raw_root)["labeled"] == ["a_0001", "b"]
    assert len(names(raw_root / "Dataset005_s" / "imagesTr")) == 2 * channels
    if channels == 2:
        (tmp_path / "s" / "b_0001.nii.gz").unlink()
        with pytest.raises(UserError, match="b: a channel is missing"):
            run(tmp_path / "s", *options, "--channels", "x", "y")


def test_case_numbers_are_no_channels(tmp_path, raw_root, write, make_case):
    for seed in range(3):
        image, mask = make_case(seed)
        write(image, tmp_path / "s" / f"scan_{seed:04d}.mha")
        write(mask, tmp_path / "s" / f"scan_{seed:04d}_seg.mha")
    run(tmp_path / "s", "--images", "*.mha", "--masks", "*_seg.mha", *MRI, *LABELS)
    assert load(raw_root)["labeled"] == ["scan_0000", "scan_0001", "scan_0002"]


# --------------------------------------------------------------------------------------- table


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_table(scans, raw_root, tmp_path, separator):
    rows = [
        ["Image", "mask", "group", "age", "site"],
        ["scans/images/p2_a.nii.gz", "scans/masks/p2_a_seg.nii.gz", "p2", "61", "x"],
        ["scans\\images\\p1_a.nii.gz", "scans/masks/p1_a_seg.nii.gz", "p1", "62.5", "x"],
        ["scans/images/p2_b.nii.gz", "", "p2", "63", "y"],
        ["scans/images/p3_a.nii.gz", "scans/masks/p3_a_seg.nii.gz", "p3", "64", "y"],
    ]
    table = tmp_path / "study.csv"
    text = "\r\n".join(separator.join(row) for row in rows)
    table.write_text("\ufeff" + text, encoding="utf-8")
    run(table, *MRI, *LABELS, "--test", 1, "--labeled", 1)
    record = load(raw_root)
    assert record["order"] == ["p2_a", "p1_a", "p2_b"] and record["splits"]["test"] == ["p3_a"]
    assert record["labeled"] == ["p2_a"] and record["unlabeled"] == ["p1_a", "p2_b"]
    assert record["sources"]["p2_a"]["image"] == "scans/images/p2_a.nii.gz"
    lines = (raw_root / record["name"] / "cases.csv").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["case,age", "p2_a,61.0"]


def test_table_with_channels_and_equal_file_names(tmp_path, raw_root, write, make_case):
    lines = ["image_0,image_1,mask"]
    for seed, case in enumerate(["p1", "p2"]):
        image, mask = make_case(seed)
        for name, array in (("t1", image), ("t2", image + 1), ("seg", mask)):
            write(array, tmp_path / case / f"{name}.nrrd")
        lines.append(f"{case}/t1.nrrd,{case}/t2.nrrd,{case}/seg.nrrd")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    run(tmp_path / "t.csv", "--channels", "T1", "T2", *LABELS)
    assert load(raw_root)["labeled"] == ["p1_t1", "p2_t1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,mask\nscans/images/p1_a.nii.gz,x.nii", r"line 2: mask .*x.nii does not exist"),
        ("image,mask\n,", "line 2: image is empty"),
        ("file,mask\na,b", "no column image, only file, mask"),
        ("image,mask\n", "has no rows"),
        ("", "no column image, only nothing"),
    ],
)
def test_table_faults(scans, raw_root, text, words):
    (scans.parent / "t.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        run(scans.parent / "t.csv", *MRI, *LABELS)


# ------------------------------------------------------------------------------------- formats


def test_png_gets_its_pixel_size_and_labels(tmp_path, raw_root, write):
    rng = np.random.default_rng(0)
    for case in ("1", "2"):
        image = (rng.random((12, 10)) * 255).astype(np.uint8)
        mask = np.zeros((12, 10), np.uint8)
        mask[3:8, 2:6] = 255
        colour = sitk.GetImageFromArray(np.stack([image] * 3, -1), isVector=True)
        (tmp_path / "us").mkdir(exist_ok=True)
        sitk.WriteImage(colour, str(tmp_path / "us" / f"{case}.png"))
        write(mask, tmp_path / "us" / f"{case}_mask.png")
    options = ["--images", "*.png", "--masks", "*_mask.png", "--channels", "US"]
    with pytest.raises(UserError, match=r"first masks hold 0, 255.*--labels name1=255"):
        run(tmp_path / "us", *options)
    with pytest.raises(UserError, match=r"1: the mask holds 255.*background=0,VALUE"):
        run(tmp_path / "us", *options, "--labels", "head=1")
    with pytest.raises(UserError, match=r"--spacing has 3 numbers, but .*1.png is 2D"):
        run(tmp_path / "us", *options, "--labels", "head=255", "--spacing", 1, 1, 1)
    run(tmp_path / "us", *options, "--labels", "head=255", "--spacing", 0.1, 0.2)
    folder = raw_root / "Dataset005_us"
    image = sitk.ReadImage(str(folder / "imagesTr" / "2_0000.nii.gz"))
    assert image.GetDimension() == 2
    np.testing.assert_allclose(image.GetSpacing(), (0.1, 0.2), rtol=1e-6)
    np.testing.assert_array_equal(np.unique(voxels(folder / "labelsTr" / "2.nii.gz")), [0, 1])
    assert load(raw_root)["spacing_known"] is True


def test_colour_needs_three_channels(tmp_path, raw_root, write):
    rng = np.random.default_rng(0)
    array = (rng.random((12, 10, 3)) * 255).astype(np.uint8)
    image = sitk.GetImageFromArray(array, isVector=True)
    (tmp_path / "s").mkdir()
    sitk.WriteImage(image, str(tmp_path / "s" / "a.png"))
    write((array[..., 0] > 9).astype(np.uint8), tmp_path / "s" / "a_m.png")
    options = ["--images", "*.png", "--masks", "*_m.png", "--labels", "x=1", "--channels"]
    with pytest.raises(UserError, match=r"a.png is a colour image.*red green blue"):
        run(tmp_path / "s", *options, "photo")
    run(tmp_path / "s", *options, "red", "green", "blue")
    folder = raw_root / "Dataset005_s" / "imagesTr"
    np.testing.assert_array_equal(voxels(folder / "a_0002.nii.gz"), array[..., 2])
    assert load(raw_root)["spacing_known"] is False


def write_series(array: np.ndarray, folder: Path, positions) -> None:
    """One DICOM file a slice, in an order unlike that of the positions."""
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, (plane, z) in enumerate(zip(array, positions, strict=True)):
        image = sitk.GetImageFromArray(plane[None].astype(np.int16))
        image.SetSpacing((0.5, 0.5, 1.0))
        tags = {
            "0008|0060": "CT",
            "0020|000d": "1.2.3",
            "0020|000e": f"1.2.3.{abs(hash(folder)) % 10**8}",
            "0008|0018": f"1.2.3.4.{number}",
            "0020|0032": f"0\\0\\{z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(number),
            "0028|1052": "-1024",
            "0028|1053": "1",
        }
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{97 - number}.dcm"))
        writer.Execute(image)


def test_dicom_series(tmp_path, raw_root, write, make_case):
    image, mask = make_case(0)
    for case in ("p1", "p2"):
        write_series(image + len(names(tmp_path)), tmp_path / "s" / case / "CT", [0, 2, 4, 6])
    write(mask[:, ::-1], tmp_path / "s" / "p1" / "seg.nii.gz", (0.5, 0.5, 2))
    path = tmp_path / "s" / "p1" / "seg.nii.gz"  # stored from another corner, as dcm2niix does
    flipped = sitk.ReadImage(str(path))
    flipped.SetOrigin((0, 0.5 * 7, 0))
    flipped.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(flipped, str(path))
    options = ["--images", "*/CT", "--masks", "*/seg.nii.gz", "--channels", "CT", *LABELS]
    run(tmp_path / "s", *options)
    folder = raw_root / "Dataset005_s"
    stored = sitk.ReadImage(str(folder / "imagesTr" / "p1_0000.nii.gz"))
    np.testing.assert_allclose(stored.GetSpacing(), (0.5, 0.5, 2), rtol=1e-6)
    np.testing.assert_allclose(sitk.GetArrayFromImage(stored), image.astype(np.int16), atol=3)
    np.testing.assert_array_equal(voxels(folder / "labelsTr" / "p1.nii.gz"), mask)
    assert "mask_axes" in load(raw_root)["notes"]["p1"]
    assert names(folder / "imagesUn") == ["p2_0000.nii.gz"]


def test_dicom_faults(tmp_path, raw_root, write, make_case):
    image, mask = make_case(0)
    write_series(image, tmp_path / "s" / "p1" / "CT", [0, 2, 4, 8])
    write(mask, tmp_path / "s" / "p1" / "seg.nii.gz")
    options = ["--masks", "*/seg.nii.gz", "--channels", "CT", *LABELS]
    with pytest.raises(UserError, match=r"4 mm apart, others 2 mm.*slice is missing"):
        run(tmp_path / "s", "--images", "*/CT", *options)
    with pytest.raises(UserError, match=r"single DICOM slices in .*CT.*'\*/CT'"):
        run(tmp_path / "s", "--images", "*/CT/*.dcm", *options)
    for file in (tmp_path / "s" / "p1" / "CT").iterdir():
        file.write_text("no DICOM")
    with pytest.raises(UserError, match=r"holds no DICOM series .4 .dcm."):
        run(tmp_path / "s", "--images", "*/CT", *options)


def test_single_slices_become_2d(tmp_path, raw_root, write, make_case):
    for seed, case in enumerate("ab"):
        image, mask = make_case(seed, (1, 8, 8))
        write(image, tmp_path / "s" / f"{case}.nii.gz", (2, 2, 1))
        write(mask, tmp_path / "s" / f"{case}_m.nii.gz", (2, 2, 1))
    options = ["--images", "*.nii.gz", "--masks", "*_m.nii.gz", *MRI, *LABELS]
    run(tmp_path / "s", *options)
    image = sitk.ReadImage(str(raw_root / "Dataset005_s" / "imagesTr" / "a_0000.nii.gz"))
    assert image.GetDimension() == 2 and image.GetSpacing() == (2, 2)


# ---------------------------------------------------------------------------- labels, geometry


def test_labels_merge_and_come_from_dataset_json(scans, raw_root):
    about = {"labels": {"0": "background", "1": "l", "2": "r"}, "modality": {"0": "MRI"}}
    (scans / "dataset.json").write_text(json.dumps(about))
    run(scans, *PAIRS[:4])
    assert load(raw_root, "dataset.json")["labels"] == {"background": 0, "l": 1, "r": 2}
    run(scans, *PAIRS[:4], "--labels", "both=2,1", "--overwrite")
    assert load(raw_root, "dataset.json")["labels"] == {"background": 0, "both": 1}
    run(scans, *PAIRS[:4], "--labels", "background=0,1", "r=2", "--overwrite")
    stored = voxels(raw_root / "Dataset005_scans" / "labelsTr" / "p1_a.nii.gz")
    original = voxels(scans / "masks" / "p1_a_seg.nii.gz")
    np.testing.assert_array_equal(stored, original == 2)


def test_copy_geometry(scans, raw_root, write, make_case):
    write(make_case(0)[1], scans / "masks" / "p1_a_seg.nii.gz", (1, 1, 1))
    with pytest.raises(UserError, match=r"p1_a: the mask .* spacing .1, 1, 1.*--copy-geometry"):
        run(scans, *PAIRS)
    run(scans, *PAIRS, "--copy-geometry")
    mask = sitk.ReadImage(str(raw_root / "Dataset005_scans" / "labelsTr" / "p1_a.nii.gz"))
    assert mask.GetSpacing() == (1, 1, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([*MRI, *LABELS], r"--images is missing.*9 .nii.gz, for example images/p1_a.nii.gz"),
        (PAIRS[:4], "--channels is missing"),
        (["--images", "img/*.nii.gz", *MRI, *LABELS], r"matches --images 'img/\*.nii.gz'. There"),
        (["--images", "images/p1_a.nii.gz", *MRI, *LABELS], r"has no \*"),
        (["--images", "images/*.nii.gz", *MRI, *LABELS], "No training case has a mask"),
        (["--images", "images/*.nii.gz", *MRI], r"No scan has a mask.*--masks PATTERN"),
        (
            ["--images", "images/*.nii.gz", "--masks", "masks/*.nii.gz", *MRI, *LABELS],
            r"3 mask.s. belong to no image.*here 'p1_a_seg', in the images 'p1_a'",
        ),
        (["--images", "images/**/*_*.nii.gz", *PAIRS[2:], "--spacing", "1"], "own spacing"),
        ([*PAIRS[:6], "--labels", "left"], "--labels left: write NAME=VALUE"),
        ([*PAIRS[:6], "--labels", "a=1", "b=1"], "value 1 has two names"),
        ([*PAIRS, "--group", "("], "no regular expression"),
    ],
)
def test_refusals(scans, raw_root, heldout, options, words):
    with pytest.raises(UserError, match=words):
        run(scans, *options)
    assert names(raw_root) == [] and names(heldout) == []


@pytest.mark.parametrize(
    ("flat", "words"),
    [("a", r"size 10x12x3, the image 10x12\."), ("a_m", r"size 10x12, the image 10x12x3\.")],
)
def test_image_and_mask_of_unequal_dimensions(tmp_path, raw_root, write, flat, words):
    for name in ("a", "a_m"):
        shape = (12, 10) if name == flat else (3, 12, 10)
        write(np.ones(shape, np.uint8), tmp_path / "s" / f"{name}.nrrd")
    options = ["--images", "*.nrrd", "--masks", "*_m.nrrd", *MRI, "--labels", "x=1"]
    with pytest.raises(UserError, match=r"a: the mask .*a_m.nrrd has " + words):
        run(tmp_path / "s", *options)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"labels": {"background": 0, "l": 300}}, "label 'l' has the value 300, .* 0 to 255"),
        ({"labels": {"background": 0, "l": [1, -2]}}, "label 'l' has the value -2, .*--labels"),
        ({"labels": {"background": 0, "l": "1"}}, "label 'l' has the value \"1\""),
        ({"labels": {"0": "background", "256": "l"}}, "label 'l' has the value 256"),
        ({"labels": ["background", "l"]}, 'labels is not of the form {"NAME": value'),
        (
            {"channel_names": ["MRI"]},
            r'channel_names is not .*{"0": "NAME".* \["MRI"\].*--channels',
        ),
        ({"modality": {"zero": "MRI"}}, 'modality is not of the form {"0": "NAME"'),
        ([], "holds no object"),
    ],
)
def test_dataset_json_that_nnunet_would_not_read(scans, raw_root, about, words):
    if isinstance(about, dict):
        about = {"modality": {"0": "MRI"}, "labels": {"background": 0, "l": 1, "r": 2}, **about}
    (scans / "dataset.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"scans/dataset.json.*" + words):
        run(scans, *PAIRS[:4])
    if isinstance(about, dict):
        run(scans, *PAIRS)  # options replace it


def test_two_files_for_one_case(scans, raw_root, write, make_case):
    write(make_case(0)[0], scans / "images" / "more" / "p1_a.nii.gz")
    with pytest.raises(UserError, match=r"matches .*p1_a.nii.gz and .*p1_a.nii.gz for case 'p1_a'"):
        run(scans, "--images", "images/**/*.nii.gz", *PAIRS[2:])
