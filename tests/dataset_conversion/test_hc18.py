"""HC18: the contour and its oddities, pixel sizes, examinations, test images."""

import json
import math
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion import main
from nnunet_ssl.dataset_conversion.HC18 import fill_contour
from nnunet_ssl.dataset_conversion.selection import by_hash
from nnunet_ssl.errors import UserError

from .conftest import names

CASES = ["004_HC", "010_2HC", "010_HC", "186_HC", "300_HC", "301_HC"]
SHAPE = (60, 80)


def ellipse(centre, axes, shape=SHAPE):
    """Filled ellipse and its outline, cut by the border of the image."""
    y, x = np.indices(shape)
    distance = np.hypot((y - centre[0]) / axes[0], (x - centre[1]) / axes[1])
    return distance <= 1, (distance <= 1) & (distance > 1 - 2.5 / min(axes))


@pytest.fixture
def release(tmp_path, write):
    """Six training images, nested as some copies are, and two test images."""
    source = tmp_path / "HC18"
    folder = source / "training_set" / "training_set"
    lines = ["filename,pixel size(mm),head circumference (mm)"]
    for seed, name in enumerate(CASES):
        image = np.random.default_rng(seed).integers(0, 255, SHAPE, np.uint8)
        write(image, folder / f"{name}.png")
        line = ellipse((30, 40), (20, 25))[1]
        write(line.astype(np.uint8) * 255, folder / f"{name}_Annotation.png")
        lines.append(f"{name}.png,{0.1 + seed / 100},{60 + seed}")
    (source / "training_set_pixel_size_and_HC.csv").write_text("\n".join(lines))
    for seed, name in enumerate(("000_HC", "010_HC")):
        image = np.random.default_rng(50 + seed).integers(0, 255, SHAPE, np.uint8)
        write(image, source / "test_set" / f"{name}.png")
    (source / "test_set_pixel_size.csv").write_text(
        "filename,pixel size(mm)\n000_HC.png,0.3\n010_HC.png,0.31\n"
    )
    return source


def annotation(release, name):
    return release / "training_set" / "training_set" / f"{name}_Annotation.png"


def run(source, *options):
    return main(["HC18", "-i", str(source), "-d", "5", "-np", "1", *map(str, options)])


def load(folder):
    return json.loads((folder / "conversion.json").read_text(encoding="utf-8"))


def test_order_by_hash_never_changes_and_holds_for_every_part():
    order = by_hash(c[:3] for c in dict.fromkeys(CASES) if c != "010_HC")
    assert order == ["010", "186", "300", "004", "301"]
    assert by_hash(order[:3]) == order[:3]


@pytest.mark.parametrize(
    ("centre", "kind"),
    [
        ((30, 40), "closed"),
        ((12, 40), "closed along the image border"),  # the top is cut off
        ((48, 40), "closed along the image border"),
        ((12, 66), "closed along the image border"),  # a corner
        ((-2, 40), "closed along the image border"),  # less than half is left
    ],
)
def test_contour_is_filled_up_to_the_border(tmp_path, centre, kind):
    wanted, line = ellipse(centre, (20, 25))
    filled, told = fill_contour(line, tmp_path)
    np.testing.assert_array_equal(filled, wanted)
    assert told == kind
    again, told = fill_contour(filled, tmp_path)
    np.testing.assert_array_equal(again, wanted)
    assert told == "filled already"


def test_head_between_two_borders(tmp_path):
    wanted, line = ellipse((30, 40), (35, 30))
    np.testing.assert_array_equal(fill_contour(line, tmp_path)[0], wanted)


def test_gap_and_empty_contour_are_refused(tmp_path):
    line = ellipse((30, 40), (20, 25))[1]
    line[:, 38:42] = False
    with pytest.raises(UserError, match=r"a\.png: the contour has a gap.*Close the line"):
        fill_contour(line, tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png is empty"):
        fill_contour(line & False, tmp_path / "a.png")


def test_pixel_size_groups_and_table(release, raw_root):
    run(release, "--labeled", 3)
    folder = raw_root / "Dataset005_HC18_3labeled"
    record = load(folder)
    order = [c for g in by_hash({c[:3] for c in CASES}) for c in CASES if c[:3] == g]
    assert record["order"] == order
    assert record["groups"]["010_2HC"] == record["groups"]["010_HC"] == "010"
    assert 2 <= len(record["labeled"]) <= 3
    assert record["labeled"] == order[: len(record["labeled"])]
    assert ("010_HC" in record["labeled"]) == ("010_2HC" in record["labeled"])
    name = record["labeled"][0]
    image, mask = (
        sitk.ReadImage(str(folder / part))
        for part in (f"imagesTr/{name}_0000.nii.gz", f"labelsTr/{name}.nii.gz")
    )
    size = 0.1 + CASES.index(name) / 100
    assert image.GetDimension() == 2
    np.testing.assert_allclose(image.GetSpacing(), (size, size), rtol=1e-5)
    np.testing.assert_allclose(mask.GetSpacing(), (size, size), rtol=1e-5)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask), ellipse((30, 40), (20, 25))[0])
    rows = (folder / "cases.csv").read_text(encoding="utf-8").split()
    assert rows[0] == "case,pixel_size", "the circumference comes from the annotation"
    assert f"{name},{size}" in rows


def test_copies_in_colour_and_filled(release, raw_root):
    inside, line = ellipse((30, 40), (20, 25))
    colour = np.zeros((*SHAPE, 4), np.uint8)
    colour[..., 3] = 255  # opacity is no line
    colour[line, 0] = 255
    grey = sitk.ReadImage(str(annotation(release, "010_HC").with_name("010_HC.png")))
    for path, array in (
        (annotation(release, "004_HC"), colour),
        (annotation(release, "300_HC"), np.stack([inside * np.uint8(255)] * 3, -1)),
        (annotation(release, "301_HC"), ellipse((12, 40), (20, 25))[1] * np.uint8(1)),
        (
            annotation(release, "010_HC").with_name("010_HC.png"),
            np.stack([sitk.GetArrayFromImage(grey)] * 3, -1),
        ),
    ):
        sitk.WriteImage(sitk.GetImageFromArray(array, isVector=array.ndim == 3), str(path))
    run(release)
    folder = raw_root / "Dataset005_HC18"
    for name in ("004_HC", "300_HC", "010_HC"):
        mask = sitk.ReadImage(str(folder / "labelsTr" / f"{name}.nii.gz"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(mask), inside)
    image = sitk.ReadImage(str(folder / "imagesTr" / "010_HC_0000.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(grey))
    assert load(folder)["notes"] == {
        "300_HC": {"contour": "filled already"},
        "301_HC": {"contour": "closed along the image border"},
    }


def test_test_images_are_another_numbering(release, raw_root, heldout):
    run(release, "--use-test-images", "--test", 2)
    folder = raw_root / "Dataset005_HC18"
    record = load(folder)
    assert record["unlabeled"] == ["test_000_HC", "test_010_HC"]
    assert record["groups"]["test_010_HC"] != record["groups"].get("010_HC")
    image = sitk.ReadImage(str(folder / "imagesUn" / "test_010_HC_0000.nii.gz"))
    np.testing.assert_allclose(image.GetSpacing(), (0.31, 0.31), rtol=1e-5)
    assert len(names(heldout / "Dataset005_HC18" / "test_labels")) == len(record["splits"]["test"])
    groups = {k: {record["groups"][c] for c in record["splits"][k]} for k in ("train", "test")}
    assert len(groups["test"]) == 2
    assert not groups["test"] & groups["train"]
    assert (folder / "cases.csv").read_text(encoding="utf-8").split()[-1] == "test_010_HC,0.31"


def held_out(release, folder, name="029_HC", table="training_set_pixel_size_and_HC.csv"):
    """Put an annotated image into another folder, with a csv file of its own."""
    train = annotation(release, "300_HC").parent
    (release / folder).mkdir(exist_ok=True, parents=True)
    image = sitk.InvertIntensity(sitk.ReadImage(str(train / "300_HC.png")))
    sitk.WriteImage(image, str(release / folder / f"{name}.png"))
    shutil.copy(annotation(release, "300_HC"), release / folder / f"{name}_Annotation.png")
    text = f"filename,pixel size(mm),head circumference (mm)\n{name}.png,0.2,50\n"
    if "HC" not in table:
        text = f"filename,pixel size(mm)\n{name}.png,0.2\n"
    (release / folder / table).write_text(text)


def test_annotated_images_in_a_test_folder_are_test_cases(release, raw_root, heldout, capsys):
    held_out(release, "test_set")  # beside 000_HC and 010_HC, which are the challenge's
    run(release, "--labeled", 3, "--use-test-images")
    record = load(raw_root / "Dataset005_HC18_3labeled")
    assert record["splits"]["test"] == ["029_HC"]
    assert sorted(record["order"]) == [*CASES, "test_000_HC", "test_010_HC"]
    hidden = heldout / "Dataset005_HC18_3labeled"
    assert names(hidden / "test_labels") == ["029_HC.nii.gz"]
    image = sitk.ReadImage(str(hidden / "test_images" / "029_HC_0000.nii.gz"))
    np.testing.assert_allclose(image.GetSpacing(), (0.2, 0.2), rtol=1e-6)
    assert "2 image(s) beside annotated ones have no annotation" in capsys.readouterr().out
    run(release, "-d", 6, "--test", 2)
    record = load(raw_root / "Dataset006_HC18")
    assert record["unused"] == ["029_HC"], "held out, whatever the test set is"


def test_lists_and_held_out_images(release, raw_root, tmp_path):
    held_out(release, "testing/images")
    (tmp_path / "train.list").write_text("301_HC\n010_HC\n")
    (tmp_path / "test.list").write_text("029_HC\n")
    lists = ("--list", tmp_path / "train.list", "--test", tmp_path / "test.list")
    run(release, *lists)
    splits = load(raw_root / "Dataset005_HC18")["splits"]
    assert splits == {"train": ["301_HC", "010_HC"], "val": [], "test": ["029_HC"]}
    (tmp_path / "train.list").write_text("301_HC\n029_HC\n")
    with pytest.raises(UserError, match=r"029_HC is in both lists, train and test.*--test FILE"):
        run(release, *lists[:2], "-d", 6)
    held_out(release, "test_set", "010_3HC")
    with pytest.raises(UserError, match=r"010_3HC .test. and 010_2?HC .train. belong together"):
        run(release, "-d", 6)


@pytest.mark.parametrize("table", ["training_set_pixel_size_and_HC.csv", "test_set_pixel_size.csv"])
def test_held_out_images_alone(release, raw_root, table):
    shutil.rmtree(release / "test_set")
    held_out(release, "test_set", table=table)
    run(release / "test_set")
    folder = raw_root / "Dataset005_HC18"
    assert names(folder / "labelsTr") == ["029_HC.nii.gz"]
    image = sitk.ReadImage(str(folder / "imagesTr" / "029_HC_0000.nii.gz"))
    np.testing.assert_allclose(image.GetSpacing(), (0.2, 0.2), rtol=1e-6)


def test_pixel_sizes_of_the_challenge_s_test_images_are_no_other_s(release, raw_root):
    held_out(release, "test_set", "000_2HC")
    (release / "test_set" / "training_set_pixel_size_and_HC.csv").unlink()
    table = release / "test_set_pixel_size.csv"
    table.write_text(table.read_text(encoding="utf-8") + "000_2HC.png,0.4\n")
    with pytest.raises(UserError, match=r"No csv file tells the pixel size of .*000_2HC.png"):
        run(release)


def test_annotated_image_in_both_folders_is_refused(release, raw_root):
    held_out(release, "test_set", "300_HC")
    with pytest.raises(UserError, match=r"300_HC.png are the same case. Remove one copy"):
        run(release)


def test_refusals(release, raw_root, tmp_path):
    table = release / "training_set_pixel_size_and_HC.csv"
    text = table.read_text(encoding="utf-8")
    for new, told in (
        (
            text.replace("010_HC.png", "011_HC.png"),
            r"pixel size of .*010_HC.png\. Put",
        ),
        (text.replace("0.1,60", "0,60"), r"004_HC.png has no pixel size above 0"),
        (
            text.replace("pixel size", "size"),
            r"Put training_set_pixel_size_and_HC.csv of",
        ),
    ):
        table.write_text(new)
        with pytest.raises(UserError, match=told):
            run(release)
    table.write_text(text)
    with pytest.raises(UserError, match="Drop --use-test-images"):
        shutil.rmtree(release / "test_set")
        run(release, "--use-test-images")
    path = annotation(release, "300_HC")
    path.rename(tmp_path / path.name)
    with pytest.raises(UserError, match=r"annotation is missing for 300_HC\."):
        run(release)
    shutil.copy(tmp_path / path.name, path)
    shutil.copy(tmp_path / path.name, release / path.name)
    with pytest.raises(UserError, match=r"are the same case. Remove one copy"):
        run(release)
    (release / path.name).unlink()
    sitk.WriteImage(sitk.Image(80, 59, sitk.sitkUInt8) + 255, str(path))
    with pytest.raises(UserError, match=r"300_HC: the mask .* has size 80x59, the image 80x60"):
        run(release)
    with pytest.raises(UserError, match=r"no XXX_HC.png .* 1 .png"):
        run(raw_folder_with_one_png(tmp_path))
    assert names(raw_root) in ([], [".Dataset005_HC18.part"])


def raw_folder_with_one_png(tmp_path):
    (tmp_path / "other").mkdir()
    sitk.WriteImage(sitk.Image(4, 4, sitk.sitkUInt8), str(tmp_path / "other" / "a.png"))
    return tmp_path / "other"


def test_ellipse_of_the_tests_has_the_right_size():
    assert abs(ellipse((30, 40), (20, 25))[0].sum() / (math.pi * 20 * 25) - 1) < 0.01
