"""`nnunet_ssl evaluate`: numbers, the rule of empty masks, and what is refused."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from medpy.metric import binary
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from skimage import io

from nnunet_ssl.cli import main
from nnunet_ssl.ellipse import head_circumference
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.evaluate import CIRCUMFERENCE, RULE, evaluate_folder

SPACING = (0.5, 0.75, 2.0)  # x, y, z
SHAPE = (8, 20, 24)
LABELS = {"background": 0, "organ": 1, "lesion": 2}


def write(array, path, spacing=SPACING, origin=(5.0, -3.0, 1.0), direction=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[: array.ndim])
    image.SetOrigin(origin[: array.ndim])
    if direction:
        image.SetDirection(direction)
    sitk.WriteImage(image, str(path), True)


def make_mask(shift=0):
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:6, 4 + shift : 15 + shift, 3:12] = 1
    mask[2:5, 6:10, 14 + shift : 20 + shift] = 2
    return mask


def write_dataset_json(folder, labels=LABELS, **more):
    folder.mkdir(parents=True, exist_ok=True)
    content = {"labels": labels, "file_ending": ".nii.gz"} | more
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.fixture
def folders(tmp_path):
    """Annotations and segmentations of cases a, b, c; segmentations shifted by 0, 1 and 2 rows."""
    truth, found = tmp_path / "truth", tmp_path / "found"
    for shift, case in enumerate("abc"):
        write(make_mask(), truth / f"{case}.nii.gz")
        write(make_mask(shift), found / f"{case}.nii.gz")
    write_dataset_json(found)
    return truth, found, tmp_path / "scores"


def evaluate(folders, **options):
    return evaluate_folder(*folders, **({"processes": 1, "quiet": True} | options))


def read_rows(folder):
    with open(folder / "cases.csv", newline="") as file:
        return {
            (r["case"], r["class"], r["metric"], r["unit"]): r["value"]
            for r in csv.DictReader(file)
        }


def test_scores_equal_medpy_case_by_case(folders):
    summary = evaluate(folders, units="both")
    rows = read_rows(folders[2])
    assert len(rows) == 3 * 2 * (2 + 2 * 4)
    for shift, case in enumerate("abc"):
        for name, label in (("organ", 1), ("lesion", 2)):
            found, truth = make_mask(shift) == label, make_mask() == label
            assert float(rows[case, name, "dice", ""]) == pytest.approx(binary.dc(found, truth))
            for unit, spacing in (("mm", SPACING[::-1]), ("voxel", (1, 1, 1))):
                for metric in ("hd95", "assd", "asd"):
                    expected = getattr(binary, metric)(found, truth, voxelspacing=spacing)
                    assert float(rows[case, name, metric, unit]) == pytest.approx(expected)
    dice = [float(rows[case, "organ", "dice", ""]) for case in "abc"]
    assert summary["classes"]["organ"]["metrics"]["dice"] == {
        "mean": pytest.approx(np.mean(dice)),
        "sd": pytest.approx(np.std(dice, ddof=1)),
        "n": 3,
    }
    assert summary == json.loads((folders[2] / "summary.json").read_text(encoding="utf-8"))


def test_processes_and_the_command_give_the_same_files(folders, capsys):
    evaluate(folders)
    files = {n: (folders[2] / n).read_bytes() for n in ("cases.csv", "summary.json")}
    truth, found, scores = map(str, folders)
    shutil.rmtree(scores)
    assert main(["evaluate", "-g", truth, "-p", found, "-o", scores, "-np", "2"]) == 0
    assert {n: (folders[2] / n).read_bytes() for n in files} == files
    printed = capsys.readouterr().out
    assert re.search(r"^organ +3 +0\.9091 ± 0\.0909 ", printed, re.M)
    assert RULE in " ".join(printed.split())


def test_quiet_prints_nothing(folders, capfd):
    evaluate(folders)
    assert capfd.readouterr() == ("", "")


def test_rule_of_empty_masks(folders, capsys):
    truth, found, scores = folders
    whole, no_lesion = make_mask(), np.where(make_mask() == 2, 0, make_mask()).astype(np.uint8)
    write(no_lesion, truth / "a.nii.gz")  # a: both without lesion
    write(no_lesion, found / "a.nii.gz")
    write(no_lesion, found / "b.nii.gz")  # b: lesion missed
    write(no_lesion, truth / "c.nii.gz")  # c: lesion invented
    write(whole, found / "c.nii.gz")
    summary = evaluate(folders, quiet=False)
    lesion = summary["classes"]["lesion"]
    assert {which: entry["cases"] for which, entry in lesion["empty"].items()} == {
        "both": ["a"],
        "annotation": ["c"],
        "segmentation": ["b"],
    }
    assert lesion["metrics"]["dice"] == {"mean": 0.0, "sd": 0.0, "n": 2}
    assert lesion["metrics"]["nsd_mm"]["n"] == 2
    assert lesion["metrics"]["hd95_mm"] == {"mean": None, "sd": None, "n": 0}
    assert summary["rule"] == RULE
    rows = read_rows(scores)
    assert [rows["a", "lesion", m, ""] for m in ("dice", "jaccard")] == ["", ""]
    assert [rows["b", "lesion", m, "mm"] for m in ("hd95", "assd", "asd")] == ["", "", ""]
    assert rows["b", "lesion", "nsd", "mm"] == "0.0"
    printed = " ".join(capsys.readouterr().out.split())
    assert RULE in printed
    assert "lesion: neither annotated nor segmented in 1 case(s), left out: a." in printed
    assert "lesion: annotated but not segmented in 1 case(s), distances missing: b." in printed
    assert "lesion: segmented but not annotated in 1 case(s), distances missing: c." in printed


def test_regions_and_ignored_voxels(folders):
    truth, found, scores = folders
    write_dataset_json(found, {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3})
    for case in "abc":
        mask = make_mask()
        mask[:, 12:] = 3
        write(mask, truth / f"{case}.nii.gz")
    evaluate(folders)
    rows = read_rows(scores)
    a, b = make_mask(1)[:, :12] > 0, make_mask()[:, :12] > 0
    assert float(rows["a", "whole", "dice", ""]) == 1
    assert float(rows["a", "whole", "hd95", "mm"]) == 0
    assert float(rows["b", "whole", "dice", ""]) == pytest.approx(binary.dc(a, b))
    assert {key[1] for key in rows} == {"whole", "core"}


def test_labels_from_elsewhere(folders, tmp_path):
    truth, found, _ = folders
    (found / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"no dataset\.json in .*--labels 1 2"):
        evaluate(folders)
    assert list(evaluate(folders, labels=[1, 2])["classes"]) == ["1", "2"]
    # above the annotations, as in a data set of MSD: value -> name
    write_dataset_json(tmp_path, {"0": "background", "1": "front", "2": "back"})
    assert list(evaluate(folders)["classes"]) == ["front", "back"]
    write_dataset_json(truth, {"background": 0, "near": [1, 2]})
    assert list(evaluate(folders)["classes"]) == ["near"]
    write_dataset_json(tmp_path / "other", LABELS)
    given = evaluate(folders, dataset_json=tmp_path / "other" / "dataset.json")
    assert list(given["classes"]) == ["organ", "lesion"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"dataset\.json lacks labels.*--labels 1 2"),
        ({"background": 0}, r"names no label but background"),
        ({"background": 0, "a": "x"}, r"label a is 'x'. Write an integer"),
        ({"background": 0, "a": [0, 1]}, r"region a is \[0, 1\].*without background"),
    ],
)
def test_labels_that_cannot_be_used(folders, labels, message):
    write_dataset_json(folders[1], labels)
    with pytest.raises(UserError, match=message):
        evaluate(folders)


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii", ".mhd"])
def test_other_endings_than_the_annotations(folders, ending):
    expected = evaluate(folders)["classes"]
    for path in folders[1].glob("*.nii.gz"):
        image = sitk.ReadImage(str(path))
        path.unlink()
        sitk.WriteImage(image, str(path).replace(".nii.gz", ending))
    assert evaluate(folders)["classes"] == expected


def test_reader_named_in_dataset_json(folders):
    expected = evaluate(folders)["classes"]
    write_dataset_json(folders[1], overwrite_image_reader_writer=NibabelIO.__name__)
    assert evaluate(folders)["classes"]["organ"]["metrics"] == {
        metric: pytest.approx(values) for metric, values in expected["organ"]["metrics"].items()
    }
    write(make_mask(), folders[1] / "b.nii.gz", origin=(5.0, -3.0, 4.0))
    with pytest.raises(UserError, match=r"b\.nii\.gz has origin \(-5, 3, 4\)"):
        evaluate(folders)


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_flat_images_are_scored_in_2d_and_in_voxels(tmp_path, ending, capsys):
    folders = tmp_path / "truth", tmp_path / "found", tmp_path / "scores"
    truth, found = make_mask()[3], make_mask(2)[3]
    for folder, mask in zip(folders, (truth, found), strict=False):
        folder.mkdir()
        io.imsave(folder / f"x{ending}", mask, check_contrast=False)
    summary = evaluate(folders, labels=[1, 2], units="both", quiet=False)
    assert summary["settings"]["units"] == ["voxel"]
    value = float(read_rows(folders[2])["x", "1", "assd", "voxel"])
    assert value == pytest.approx(binary.assd(found == 1, truth == 1))
    assert "hold no spacing: distances are in voxels" in capsys.readouterr().out


def test_one_slice_of_a_3d_format_is_scored_in_2d(tmp_path):
    folders = tmp_path / "truth", tmp_path / "found", tmp_path / "scores"
    for folder, mask in zip(folders, (make_mask(), make_mask(2)), strict=False):
        write(mask[3:4], folder / "x.mha")
    evaluate(folders, labels=[1, 2])
    value = float(read_rows(folders[2])["x", "1", "asd", "mm"])
    expected = binary.asd(make_mask(2)[3] == 1, make_mask()[3] == 1, (0.75, 0.5))
    assert value == pytest.approx(expected)


def test_tiff_has_its_spacing_beside_it(tmp_path):
    folders = tmp_path / "truth", tmp_path / "found", tmp_path / "scores"
    for folder, mask in zip(folders, (make_mask(), make_mask(2)), strict=False):
        folder.mkdir()
        tifffile.imwrite(folder / "x.tif", mask)
        (folder / "x.json").write_text(json.dumps({"spacing": SPACING[::-1]}))
    evaluate(folders, labels=[1, 2])
    value = float(read_rows(folders[2])["x", "1", "asd", "mm"])
    expected = binary.asd(make_mask(2) == 1, make_mask() == 1, SPACING[::-1])
    assert value == pytest.approx(expected)
    (folders[1] / "x.json").write_text(json.dumps({"spacing": (2, 1, 1)}))
    with pytest.raises(
        UserError, match=r"found/x\.tif has spacing \(2, 1, 1\).*\(2, 0\.75, 0\.5\)"
    ):
        evaluate(folders, labels=[1, 2])


def make_head(axes, center=(60, 80), shape=(120, 160)):
    distance = np.hypot(
        *((g - c) / a for g, c, a in zip(np.indices(shape), center, axes, strict=True))
    )
    mask = (distance <= 1).astype(np.uint8)
    mask[2:6, 2:9] = 2  # another class
    return mask


PIXEL = (0.4, 0.5)  # x, y


@pytest.fixture
def heads(tmp_path):
    """Heads that are larger than annotated, smaller, cut by the frame, without ellipse."""
    folders = tmp_path / "hc" / "truth", tmp_path / "hc" / "found", tmp_path / "hc" / "scores"
    cases = {
        "large": (make_head((40, 50)), make_head((44, 55))),
        "small": (make_head((40, 50)), make_head((36, 45))),
        "cut": (make_head((40, 50), (10, 80)), make_head((40, 50), (10, 80))),
        "missed": (make_head((40, 50)), make_head((0.1, 0.1))),
    }
    for case, (truth, found) in cases.items():
        write(truth, folders[0] / f"{case}.nii.gz", PIXEL)
        write(found, folders[1] / f"{case}.nii.gz", PIXEL)
    write_dataset_json(folders[1], {"background": 0, "head": 1, "symphysis": 2})
    return folders


def test_circumference_of_named_classes(heads, capsys):
    summary = evaluate(heads, circumference=["head"], units="both", quiet=False)
    rows = read_rows(heads[2])
    full = head_circumference(make_head((40, 50)) == 1, PIXEL[::-1])
    error = float(rows["large", "head", "hc_error", "mm"])
    assert error == pytest.approx(0.1 * full, rel=0.02)
    assert float(rows["large", "head", "hc_abs_error", "mm"]) == error
    smaller = float(rows["small", "head", "hc_error", "mm"])
    assert smaller == pytest.approx(-0.1 * full, rel=0.02)
    assert float(rows["small", "head", "hc_abs_error", "mm"]) == -smaller
    assert rows["cut", "head", "hc_error", "mm"] == rows["cut", "head", "hc_abs_error", "mm"]
    assert float(rows["cut", "head", "hc_error", "mm"]) == 0
    assert rows["missed", "head", "hc_error", "mm"] == ""
    assert not [key for key in rows if key[1] == "symphysis" and key[2].startswith("hc")]
    assert not [key for key in rows if key[2].startswith("hc") and key[3] != "mm"]
    metrics = summary["classes"]["head"]["metrics"]
    assert metrics["hc_error_mm"]["n"] == metrics["hc_abs_error_mm"]["n"] == 3
    assert metrics["hc_abs_error_mm"]["mean"] == pytest.approx((error - smaller) / 3)
    assert metrics["hc_error_mm"]["mean"] == pytest.approx((error + smaller) / 3)
    assert "hc_error_mm" not in summary["classes"]["symphysis"]["metrics"]
    assert summary["settings"]["circumference"] == ["head"]
    printed = capsys.readouterr().out
    titles = [line for line in printed.splitlines() if line.startswith("class ")]
    assert [("HC error mm" in line, "|HC error| mm" in line) for line in titles] == [
        (True, True),
        (False, False),
    ]
    assert re.search(r"^head .*\(n=3\) +\d+\.\d\d ± \d+\.\d\d \(n=3\)$", printed, re.M)
    assert CIRCUMFERENCE in " ".join(printed.split())


def test_circumference_by_the_command_and_not_unasked(heads):
    truth, found, scores = map(str, heads)
    assert (
        main(["evaluate", "-g", truth, "-p", found, "-o", scores, "--circumference", "head"]) == 0
    )
    assert ("large", "head", "hc_error", "mm") in read_rows(heads[2])
    summary = evaluate(heads)
    assert CIRCUMFERENCE not in summary["definitions"]
    assert not [key for key in read_rows(heads[2]) if key[2].startswith("hc")]


def test_circumference_without_ignored_pixels(heads):
    """Half of the head is not annotated; what is said there does not count."""
    truth, found = make_head((40, 50)), make_head((40, 50))
    truth[:, 90:] = 3
    found[:, 95:] = 0
    write(truth, heads[0] / "large.nii.gz", PIXEL)
    write(found, heads[1] / "large.nii.gz", PIXEL)
    write_dataset_json(heads[1], {"background": 0, "head": 1, "symphysis": 2, "ignore": 3})
    evaluate(heads, circumference=["head"])
    assert float(read_rows(heads[2])["large", "head", "hc_error", "mm"]) == 0


def test_circumference_where_it_cannot_be_measured(heads, folders, tmp_path):
    with pytest.raises(UserError, match=r"--circumference brain: no such class.* head, symphysis"):
        evaluate(heads, circumference=["brain"])
    with pytest.raises(UserError, match=r"told in mm.* Give --units mm or both"):
        evaluate(heads, circumference=["head"], units="voxel")
    with pytest.raises(UserError, match=r"a\.nii\.gz is not 2D.* Leave out --circumference"):
        evaluate(folders, circumference=["organ"])
    for folder, axes in (("png", (40, 50)), ("png2", (36, 45))):
        (tmp_path / folder).mkdir()
        io.imsave(tmp_path / folder / "a.png", make_head(axes), check_contrast=False)
    flat = tmp_path / "png", tmp_path / "png2", tmp_path / "scores"
    with pytest.raises(UserError, match=r"png hold no spacing.* or leave out --circumference"):
        evaluate(flat, labels=[1, 2], circumference=["1"])
    assert not (tmp_path / "scores").exists()


def test_missing_and_extra_predictions_are_named_together(folders):
    truth, found, scores = folders
    (found / "b.nii.gz").rename(found / "d.nii.gz")
    with pytest.raises(UserError) as error:
        evaluate(folders)
    assert f"{truth / 'b.nii.gz'} has no segmentation in {found}. Predict it" in str(error.value)
    assert f"{found / 'd.nii.gz'} has no annotation in {truth}" in str(error.value)
    assert not scores.exists()


def test_every_bad_file_is_told_and_nothing_written(folders):
    truth, found, scores = folders
    for case in "defghij":
        shutil.copy(truth / "a.nii.gz", truth / f"{case}.nii.gz")
    mask = make_mask()
    write(mask, found / "b.nii.gz", spacing=(0.5, 0.75, 3.0))
    write(mask, found / "c.nii.gz", origin=(5.0, -3.0, 1.5))
    write(mask, found / "d.nii.gz", direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1))
    write(mask[:, :-1], found / "e.nii.gz")
    write(mask * 2, found / "f.nii.gz")
    data = (truth / "g.nii.gz").read_bytes()
    (found / "g.nii.gz").write_bytes(data[: len(data) * 2 // 3])
    (found / "h.nii.gz").write_bytes(b"")
    broken = mask.astype(np.float32)
    broken[0, 0, 0] = np.nan
    write(broken, found / "i.nii.gz")
    broken[0, 0, 0] = 0.5
    write(broken, found / "j.nii.gz")
    with pytest.raises(UserError) as error:
        evaluate(folders)
    lines = {
        Path(w).name[0]: line
        for line in str(error.value).splitlines()
        for w in line.split()
        if w.strip(":").startswith(str(found))
    }
    assert "spacing (0.5, 0.75, 3), but" in lines["b"] and "(0.5, 0.75, 2)" in lines["b"]
    assert "origin (5, -3, 1.5), but" in lines["c"] and "(5, -3, 1)" in lines["c"]
    assert "direction (-1, 0, 0, 0, -1, 0, 0, 0, 1), but" in lines["d"]
    assert "shape (8, 19, 24), but" in lines["e"] and "(8, 20, 24)" in lines["e"]
    assert "value(s) 4, outside the set 0, 1, 2" in lines["f"]
    assert "Cannot read" in lines["g"] and "cut short" in lines["g"]
    assert "Cannot read" in lines["h"]
    assert "NaN" in lines["i"]
    assert "value(s) 0.5, outside" in lines["j"]
    assert "Resample" in lines["e"] and "Correct the header" in lines["b"]
    assert not scores.exists()


def test_rounding_of_the_header_is_no_mismatch(folders):
    mask = make_mask()
    write(mask, folders[1] / "a.nii.gz", spacing=(0.50001, 0.75, 2.0), origin=(5.0001, -3.0, 1.0))
    evaluate(folders)


def test_long_lists_are_cut(folders):
    truth, _, _ = folders
    for i in range(12):
        shutil.copy(truth / "a.nii.gz", truth / f"more_{i:02d}.nii.gz")
    with pytest.raises(UserError, match=r"more_09.*\nand 2 more\."):
        evaluate(folders)


def test_the_ignore_value_is_no_segmentation(folders):
    write_dataset_json(folders[1], LABELS | {"ignore": 3})
    mask = make_mask()
    mask[0, 0, 0] = 3
    write(mask, folders[0] / "a.nii.gz")
    evaluate(folders)
    write(mask, folders[1] / "b.nii.gz")
    with pytest.raises(UserError, match=r"found/b\.nii\.gz holds the value\(s\) 3, outside"):
        evaluate(folders)


def test_folders_that_cannot_be_used(folders, tmp_path):
    truth, found, scores = folders
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "._a.nii.gz").touch()
    with pytest.raises(UserError, match=r"empty holds no mask. Put one file per case"):
        evaluate((truth, tmp_path / "empty", scores), labels=[1])
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        evaluate((tmp_path / "nowhere", found, scores))
    with pytest.raises(UserError, match=r"-g and -p are both"):
        evaluate((found, found, scores))
    with pytest.raises(UserError, match=r"a\.nii\.gz is a file. Give another folder with -o"):
        evaluate((truth, found, truth / "a.nii.gz"))
    (found / "a.png").touch()  # a picture beside the masks
    evaluate(folders)
    write_dataset_json(found, file_ending=".mha")
    with pytest.raises(UserError, match=r"several kinds: \.nii\.gz, \.png.*file_ending"):
        evaluate(folders)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [0, 1]}, "give each value once, 1 or more"),
        ({"labels": [1, 1]}, "give each value once, 1 or more"),
        ({"tolerance": -1.0}, "--tolerance 0 or more"),
        ({"tolerance": float("nan")}, "--tolerance 0 or more"),
        ({"processes": 0}, "-np 1 or more"),
        ({"dataset_json": Path("nowhere.json")}, "nowhere.json does not exist"),
    ],
)
def test_options_that_cannot_be_used(folders, options, message):
    with pytest.raises(UserError, match=message):
        evaluate(folders, **options)


def test_old_scores_survive_an_error(folders):
    evaluate(folders)
    before = {p.name: p.read_bytes() for p in folders[2].iterdir()}
    (folders[1] / "c.nii.gz").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"Cannot read .*c\.nii\.gz"):
        evaluate(folders)
    assert {p.name: p.read_bytes() for p in folders[2].iterdir()} == before


def test_an_output_folder_that_cannot_be_made(folders):
    with pytest.raises(UserError, match=r"Cannot write .*a\.nii\.gz/scores"):
        evaluate((*folders[:2], folders[0] / "a.nii.gz" / "scores"))
