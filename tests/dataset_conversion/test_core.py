"""The shared part: selection, checks, writing, restart, refusals."""

import contextlib
import csv
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import types
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ssl.dataset_conversion import core, main, reading, scripts, selection, target, writing
from nnunet_ssl.dataset_conversion.core import Case, Release, Scan
from nnunet_ssl.errors import UserError

from .conftest import names

SPLITS = {"train": ["c", "a", "d", "b"], "val": ["e"], "test": ["f"]}


@pytest.fixture
def source(tmp_path, write, make_case) -> Path:
    """Six scans, a to f, with masks of values 1 and 2; `patient` of a and b is one."""
    for seed, case in enumerate("abcdef"):
        image, mask = make_case(seed)
        write(image, tmp_path / "src" / f"{case}.nrrd", (0.5, 0.5, 2))
        write(mask, tmp_path / "src" / f"{case}_mask.nrrd", (0.5, 0.5, 2))
    return tmp_path / "src"


@pytest.fixture
def script(monkeypatch):
    """A script whose release can be changed through `changes`; it counts what it reads."""
    module = types.ModuleType("toy_script")
    module.__doc__ = "toy: for tests."
    module.changes, module.reads = {}, []

    def find(folder, options):
        cases = [
            Case(
                p.stem,
                (p,),
                p.with_name(f"{p.stem}_mask.nrrd"),
                {"a": "p1", "b": "p1"}.get(p.stem, ""),
            )
            for p in reading.files_below(folder, ".nrrd")
            if not p.stem.endswith("_mask")
        ]
        labels = {"background": 0, "one": 1, "two": 2}
        return Release("Toy", cases, ["MRI"], labels, splits=SPLITS, **module.changes)

    def read(case, options):
        module.reads.append(case.name)
        return Scan([reading.read_image(case.images[0])], reading.read_image(case.mask), {"n": 1})

    module.find, module.read = find, read
    module.add_options = core.add_split_options
    monkeypatch.setitem(sys.modules, "toy_script", module)
    return module


def run(script, source, *options) -> int:
    return core.convert(script, ["-i", str(source), "-d", "5", "-np", "1", *map(str, options)])


def load(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------- selection


def test_labeled_takes_whole_groups_in_published_order():
    groups = {"c": "c", "a": "p1", "d": "d", "b": "p1"}
    order = ["c", "a", "d", "b"]
    assert selection.choose_labeled(order, groups, order, 2, 0) == ["c", "a", "b"]
    assert selection.choose_labeled(order, groups, order, 3, 0, "images") == ["c", "a", "b"]
    assert selection.choose_labeled(order, groups, order, 2, 0, "images") == ["c", "d"]
    assert set(selection.choose_labeled(order, groups, order, None, 0, "images")) == set(order)
    with pytest.raises(UserError, match=r"--labeled 4 is not between 1 and 3"):
        selection.choose_labeled(order, groups, order, 4, 0)
    with pytest.raises(UserError, match="--labeled 0"):
        selection.choose_labeled(order, groups, order, 0, 0)
    with pytest.raises(UserError, match="smallest group has 2 images"):
        selection.choose_labeled(["a", "b"], groups, order, 1, 0, "images")


@pytest.mark.parametrize("draw", [0, 1, 2])
def test_labeled_images_come_close_to_the_number(draw):
    """Group sizes 1, 5, 1, 5, ...: a large group that does not fit ends nothing."""
    groups = {f"g{g}_{i}": f"g{g}" for g in range(10) for i in range(5 if g % 2 else 1)}
    for number in range(1, 31):
        cases = selection.choose_labeled(list(groups), groups, groups, number, draw, "images")
        again = selection.choose_labeled(list(groups), groups, groups, number, draw, "images")
        assert cases == again
        kept = {groups[c] for c in cases}
        assert {c for c in groups if groups[c] in kept} == set(cases)
        left = [g for g in set(groups.values()) - kept]
        sizes = [sum(g == group for group in groups.values()) for g in left]
        assert len(cases) <= number and all(len(cases) + size > number for size in sizes)


def test_number_of_labeled_images_is_told(script, source, raw_root, capsys):
    script.changes["counts"] = "images"
    run(script, source, "--labeled", 3)
    assert "keep their masks, not" not in capsys.readouterr().out
    release = script.find(source, None)
    groups = {"a": "p1", "b": "p1", "c": "p2", "d": "p2"}
    release.cases = [Case(c.name, c.images, c.mask, groups.get(c.name)) for c in release.cases]
    script.find = lambda *_: release
    run(script, source, "-d", 6, "--labeled", 3)
    told = capsys.readouterr().out
    assert "NOTE: 2 images keep their masks, not 3: groups stay whole" in told


def test_draws_are_seeded_and_keep_patients_whole():
    groups = {f"{p}{i}": p for p in "abcdefgh" for i in range(2)}
    draws = [selection.choose_labeled(list(groups), groups, groups, 3, k) for k in range(5)]
    assert draws[1] == selection.choose_labeled(list(groups), groups, groups, 3, 1)
    assert len({tuple(d) for d in draws}) > 3
    for cases in draws:
        assert len(cases) == 6
        assert len({groups[c] for c in cases}) == 3


def test_cases_without_masks_are_never_labeled():
    groups = {c: c for c in "abcd"}
    assert selection.choose_labeled("abcd", groups, {"b", "d"}, None, 0) == ["b", "d"]
    with pytest.raises(UserError, match="No training case has a mask"):
        selection.choose_labeled("abcd", groups, set(), None, 0)


def test_test_set_by_number_takes_last_annotated_groups():
    groups = {"a": "1", "b": "2", "c": "2", "d": "3"}
    splits = selection.choose_splits(groups, {"a", "b", "c"}, None, "by name", test="1")
    assert (splits.train, splits.test) == (["a", "d"], ["b", "c"])
    with pytest.raises(UserError, match="--test 2 is not below 2"):
        selection.choose_splits(groups, {"a", "b", "c"}, None, "by name", test="2")


def test_lists_replace_and_are_checked(tmp_path):
    groups = {c: c for c in "abcd"}
    order, tests = tmp_path / "order.txt", tmp_path / "tests.txt"
    order.write_text("c\n\n# remark\na  # first\n")
    tests.write_text("d\n")
    splits = selection.choose_splits(
        groups, groups, None, "by name", list_file=order, test=str(tests)
    )
    assert (splits.train, splits.test) == (["c", "a"], ["d"])
    only_test = selection.choose_splits(groups, groups, None, "by name", test=str(tests))
    assert only_test.train == ["a", "b", "c"]
    order.write_text("c\nx\n")
    with pytest.raises(UserError, match=r"order.txt.* not in the source: x.*--allow-missing"):
        selection.choose_splits(groups, groups, None, "by name", list_file=order)
    order.write_text("c\nd\n")
    with pytest.raises(UserError, match=r"d is in both lists, train and test. Take .* one\.$"):
        selection.choose_splits(groups, groups, None, "by name", list_file=order, test=str(tests))
    order.write_text("c\nc\n")
    with pytest.raises(UserError, match="names c twice"):
        reading.read_list(order)


def test_patients_on_both_sides_and_blind_tests_are_refused():
    groups = {"a": "p", "b": "p", "c": "c"}
    with pytest.raises(UserError, match=r"b .test. and a .train. belong together .group p."):
        selection.choose_splits(groups, groups, {"train": ["a", "c"], "test": ["b"]}, "list")
    with pytest.raises(UserError, match="have no mask: c"):
        selection.choose_splits(groups, {"a", "b"}, {"train": ["a"], "test": ["c"]}, "list")


def test_groups_that_only_look_alike_yield_to_a_test_list(tmp_path):
    groups = {"a": "p", "b": "p", "c": "c", "d": "d"}
    order, tests = tmp_path / "order.txt", tmp_path / "tests.txt"
    order.write_text("a\nc\n")
    tests.write_text("b\nd\n")
    lists = {"list_file": order, "test": str(tests)}
    with pytest.raises(UserError, match="belong together"):
        selection.choose_splits(groups, groups, None, "by name", **lists)
    splits = selection.choose_splits(groups, groups, None, "by name", inferred=True, **lists)
    assert (splits.train, splits.test) == (["a", "c"], ["b", "d"])
    assert selection.find_parted(splits, groups) == {"b": ["a"]}
    rest = selection.choose_splits(groups, groups, None, "by name", inferred=True, test=str(tests))
    assert rest.train == ["a", "c"]
    numbered = selection.choose_splits(groups, groups, None, "by name", inferred=True, test="2")
    assert (numbered.train, numbered.test) == (["a", "b"], ["c", "d"])
    tests.write_text("a\nd\n")
    with pytest.raises(UserError, match="a is in both lists, train and test"):
        selection.choose_splits(groups, groups, None, "by name", inferred=True, **lists)
    published = {"train": ["a"], "test": ["b"]}
    with pytest.raises(UserError, match="belong together"):
        selection.choose_splits(groups, groups, published, "list", inferred=True)


def test_test_cases_alone_are_told_how_to_go_on(tmp_path):
    published = {"train": ["a", "b"], "val": ["e"], "test": ["c", "d"]}
    groups = {"c": "c", "d": "d"}
    words = r"None of the 2 training cases.*\(c, d\).*--list FILE --test 0 --allow-missing"
    for missing in (False, True):
        with pytest.raises(UserError, match=words):
            selection.choose_splits(groups, groups, published, "list", allow_missing=missing)
    tests = tmp_path / "tests.txt"
    tests.write_text("c\nd\n")
    with pytest.raises(UserError, match=r"c is in both lists, train and test.*--test 0 drops it"):
        selection.choose_splits(
            groups, groups, published, "list", list_file=tests, allow_missing=True
        )
    splits = selection.choose_splits(
        groups, groups, published, "list", list_file=tests, test="0", allow_missing=True
    )
    assert (splits.train, splits.val, splits.test) == (["c", "d"], [], [])


def test_own_test_set_replaces_the_published_one(tmp_path):
    groups = {c: c for c in "abcd"}
    published = {"train": list("abcd"), "val": [], "test": ["absent"]}
    splits = selection.choose_splits(groups, groups, published, "list", test="1")
    assert (splits.train, splits.test, splits.missing) == (["a", "b", "c"], ["d"], [])


def test_lists_may_name_groups(tmp_path):
    groups = {"a1": "a", "b2": "b", "b1": "b", "c": "c", "d1": "c1", "c1": "d"}
    (tmp_path / "order.txt").write_text("b\na1\nc1\n")  # c1 is a case, and a group
    (tmp_path / "test.txt").write_text("c\n")
    splits = selection.choose_splits(
        groups,
        groups,
        None,
        "by name",
        list_file=tmp_path / "order.txt",
        test=str(tmp_path / "test.txt"),
    )
    assert (splits.train, splits.test) == (["b2", "b1", "a1", "c1"], ["c"])
    assert selection.choose_labeled(splits.train, groups, groups, ["b"], 0) == ["b2", "b1"]
    masked = {"b1", "a1"}
    assert selection.choose_labeled(splits.train, groups, masked, ["b", "a1"], 0) == ["b1", "a1"]
    with pytest.raises(UserError, match="annotated training case: c"):
        selection.choose_labeled(splits.train, groups, groups, ["c"], 0)


def test_withdrawn_cases_are_skipped():
    published = {"train": ["a", "b"], "test": ["c"]}
    groups = {"a": "a", "c": "c"}
    splits = selection.choose_splits(groups, groups, published, "list", withdrawn=("b",))
    assert (splits.train, splits.missing) == (["a"], ["b"])


def test_duplicates_stay_on_one_side():
    splits = selection.Splits(["a", "b", "c", "d"], ["e"], ["f"])
    groups = {c: c for c in "abcdef"}
    voxels = {"a": "1", "b": "2", "c": "2", "d": "3", "e": "1", "f": "3"}
    found = selection.separate_duplicates(splits, groups, set("abcdef"), voxels)
    assert sorted(map(sorted, found[0])) == [["a", "e"], ["b", "c"], ["d", "f"]]
    assert sorted(found[1]) == ["a", "d"]
    assert (splits.train, splits.val, splits.test) == (["b", "c"], ["e"], ["f"])
    assert groups["b"] == groups["c"]
    splits = selection.Splits(["a", "b"])
    found = selection.separate_duplicates(splits, groups, {"b"}, {"a": "1", "b": "1"})
    assert splits.train == ["b"], "the copy without mask goes"


def test_copies_alone_leave_where_groups_only_look_alike():
    splits = selection.Splits(["a", "b", "c"], [], ["f", "g"])
    groups = {"a": "a", "b": "a", "c": "c", "f": "a", "g": "c"}
    voxels = {c: c for c in groups} | {"b": "f"}
    found = selection.separate_duplicates(splits, groups, set(groups), voxels, bind=False)
    assert found == ([["f", "b"]], ["b"])
    assert (splits.train, splits.test) == (["a", "c"], ["f", "g"])


def test_copies_take_their_patients_along():
    """Train b1 is test f; b2 is of b1's patient; val e is b2, so that e and e2 are f's, too."""
    splits = selection.Splits(["a", "b1", "b2"], ["e", "e2", "g"], ["f"])
    groups = {"a": "a", "b1": "b", "b2": "b", "e": "e", "e2": "e", "g": "g", "f": "f"}
    voxels = {c: c for c in groups} | {"b1": "f", "e": "b2"}
    found = selection.separate_duplicates(splits, groups, set(groups), voxels)
    assert (splits.train, splits.val, splits.test) == (["a"], ["g"], ["f"])
    assert sorted(found[1]) == ["b1", "b2", "e", "e2"]


# ----------------------------------------------------------------------------- checks and writing


def test_labels_are_mapped_and_unknown_ones_named(make_case):
    mask = sitk.GetImageFromArray(make_case(0)[1].astype(np.float32) * 100 + np.float32(1e-5))
    mask.SetSpacing((1, 2, 3))
    mapped, counts = writing.map_labels(mask, {0: 0, 100: 2, 200: 1}, "scan7")
    expected = np.array([0, 2, 1])[make_case(0)[1]]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mapped), expected)
    assert mapped.GetPixelID() == sitk.sitkUInt8 and mapped.GetSpacing() == (1, 2, 3)
    assert counts == {v: int((expected == v).sum()) for v in (0, 1, 2)}
    with pytest.raises(UserError, match=r"scan7: the mask holds 200, expected are 0, 100"):
        writing.map_labels(mask, {0: 0, 100: 1}, "scan7")
    with pytest.raises(UserError, match=r"holds 0.5"):
        writing.map_labels(sitk.GetImageFromArray(np.full((2, 2), 0.5)), {0: 0, 1: 1}, "scan7")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": (5, 4, 3)}, r"scan7: the mask has size 5x4x3, the image 4x4x3"),
        ({"spacing": (1, 1, 1.01)}, "mask has spacing .1, 1, 1.01., the image .1, 1, 1."),
        ({"origin": (0, 0.1, 0)}, "origin"),
        ({"direction": (1, 0, 0, 0, -1, 0, 0, 0, 1)}, "direction"),
        ({"origin": (0, 0.0001, 0)}, None),
    ],
)
def test_geometry_is_compared(change, words):
    def image(size=(4, 4, 3), spacing=(1, 1, 1), origin=(0, 0, 0), direction=None):
        made = sitk.Image(size, sitk.sitkUInt8)
        made.SetSpacing(spacing)
        made.SetOrigin(origin)
        if direction:
            made.SetDirection(direction)
        return made

    if words is None:
        writing.check_geometry(image(), image(**change), "scan7", "mask")
        return
    with pytest.raises(UserError, match=words):
        writing.check_geometry(image(), image(**change), "scan7", "mask")


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "float32", "float64"])
def test_written_images_keep_values_and_geometry(tmp_path, dtype):
    array = (np.random.default_rng(0).random((3, 4, 5)) * 100).astype(dtype)
    image = reading.image_from_array(array, (0.3, 0.4, 2))
    image.SetOrigin((1, -2, 3))
    writing.write_image(image, tmp_path / "x" / "a_0000.nii.gz")
    back = sitk.ReadImage(str(tmp_path / "x" / "a_0000.nii.gz"))
    np.testing.assert_allclose(sitk.GetArrayFromImage(back), array, rtol=1e-6)
    np.testing.assert_allclose(back.GetSpacing(), (0.3, 0.4, 2), rtol=1e-6)
    np.testing.assert_allclose(back.GetOrigin(), (1, -2, 3), rtol=1e-6)
    assert "64" not in back.GetPixelIDTypeAsString()
    assert names(tmp_path / "x") == ["a_0000.nii.gz"]


def test_2d_images_reach_nnunet_with_their_spacing(tmp_path):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    image = reading.image_from_array(np.arange(20, dtype=np.uint8).reshape(4, 5), (0.1, 0.2))
    writing.write_image(image, tmp_path / "a_0000.nii.gz")
    array, properties = SimpleITKIO().read_images([str(tmp_path / "a_0000.nii.gz")])
    assert array.shape == (1, 1, 4, 5)
    np.testing.assert_allclose(properties["spacing"][1:], (0.2, 0.1), rtol=1e-6)
    SimpleITKIO().write_seg(array[0] > 3, str(tmp_path / "seg.nii.gz"), properties)
    np.testing.assert_allclose(
        sitk.ReadImage(str(tmp_path / "seg.nii.gz")).GetSpacing(), (0.1, 0.2), rtol=1e-6
    )


def test_full_disk_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    noise = np.random.default_rng(0).random((20, 64, 64)).astype(np.float32)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        with pytest.raises(UserError, match=r"a.nii.gz.*disk"):
            writing.write_image(sitk.GetImageFromArray(noise), tmp_path / "a.nii.gz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == []


# ------------------------------------------------------------------------------------- reading


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "nrrd", "mha", "png", "tif"])
def test_truncated_files_are_refused(tmp_path, write, ending):
    noise = (np.random.default_rng(0).random((8, 16, 16)) * 255).astype(np.uint8)
    path = write(noise[0] if ending == "png" else noise, tmp_path / f"a.{ending}")
    reading.read_image(path)
    cut(path)
    with pytest.raises(UserError, match=rf"Cannot read .*a.{ending}.*copy or export it again"):
        reading.read_image(path)


def test_header_and_data_file_belong_together(tmp_path, write):
    path = write(np.ones((2, 3, 4), np.uint8), tmp_path / "a.mhd")
    assert reading.companion_files(path) == [path, tmp_path / "a.raw"]
    before = reading.hash_source(path)
    (tmp_path / "a.raw").write_bytes(b"\2" * 24)
    assert reading.hash_source(path) != before
    (tmp_path / "a.raw").unlink()
    with pytest.raises(UserError, match=r"a.mhd.*a.raw, which is not beside it"):
        reading.read_image(path)


def test_skewed_axes_are_no_damage(tmp_path):
    """SimpleITK refuses them; the way out that the message tells works."""
    path = tmp_path / "a.nii.gz"
    affine = np.diag([1.0, 1, 3, 1])
    affine[0, 1] = 0.02
    image = nibabel.Nifti1Image(np.ones((4, 5, 6), np.float32), None)
    image.set_sform(affine, 1)
    nibabel.save(image, path)
    with pytest.raises(UserError, match=r"a.nii.gz.*sform or qform.* not orthonormal") as caught:
        reading.read_image(path)
    assert "damaged" not in str(caught.value)
    image = nibabel.load(path)
    image.set_qform(image.affine)
    image.set_sform(image.get_qform())
    nibabel.save(image, tmp_path / "b.nii.gz")
    assert reading.read_image(tmp_path / "b.nii.gz").GetSize() == (4, 5, 6)


def test_nan_is_refused_though_itk_hides_it(tmp_path, write):
    array = np.ones((2, 3, 4), np.float32)
    array[0, 0, 0] = np.nan
    for ending in ("nii.gz", "nrrd"):
        with pytest.raises(UserError, match=r"a.* holds NaN"):
            reading.read_image(write(array, tmp_path / f"a.{ending}"))


def test_listing_skips_junk_and_ignores_case(tmp_path):
    for name in ("b/X.NII.GZ", "a.nii", "._a.nii", "__MACOSX/a.nii", "desktop.ini", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    found = reading.files_below(tmp_path, ".nii", ".nii.gz")
    assert [p.name for p in found] == ["a.nii", "X.NII.GZ"]
    assert "1 .nii.gz" in reading.describe_folder(tmp_path)


# ------------------------------------------------------------------------------------ whole runs


def test_places_and_record(script, source, raw_root, heldout, capsys):
    assert run(script, source, "--labeled", 2) == 0
    folder, hidden = (r / "Dataset005_Toy_2labeled" for r in (raw_root, heldout))
    assert names(folder / "imagesTr") == ["a_0000.nii.gz", "b_0000.nii.gz", "c_0000.nii.gz"]
    assert names(folder / "labelsTr") == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    assert names(folder / "imagesUn") == ["d_0000.nii.gz"]
    assert names(hidden / "hidden_labels") == ["d.nii.gz"]
    assert names(hidden / "test_images") == ["f_0000.nii.gz"]
    assert names(hidden / "test_labels") == ["f.nii.gz"]
    assert names(hidden / "val_labels") == ["e.nii.gz"]
    record = load(folder / "conversion.json")
    assert record["order"] == SPLITS["train"] and record["splits"] == SPLITS
    assert record["labeled"] == ["c", "a", "b"] and record["unlabeled"] == ["d"]
    assert record["groups"]["a"] == record["groups"]["b"] == "p1"
    assert record["sources"]["a"] == {
        "image": "a.nrrd",
        "image_sha256": reading.hash_source(source / "a.nrrd"),
        "label": "a_mask.nrrd",
        "label_sha256": reading.hash_source(source / "a_mask.nrrd"),
    }
    told = {"labeled": 2, "draw": 0, "list": None, "test": None, "allow_missing": False}
    assert record["options"] == told
    assert record["notes"]["a"] == {"n": 1} and record["heldout"] == str(hidden)
    assert load(folder / "dataset.json")["numTraining"] == 3
    original = sitk.ReadImage(str(source / "d_mask.nrrd"))
    converted = sitk.ReadImage(str(hidden / "hidden_labels" / "d.nii.gz"))
    np.testing.assert_array_equal(*map(sitk.GetArrayFromImage, (original, converted)))
    assert not [p for p in (*raw_root.iterdir(), *heldout.iterdir()) if p.name.startswith(".")]
    assert "plan_and_preprocess -d 5 -c 2d 3d_fullres" in capsys.readouterr().out


def test_interrupted_run_goes_on_where_it_stopped(script, source, raw_root, heldout):
    normal = script.read

    def interrupted(case, options):
        if len(script.reads) == 3:
            raise KeyboardInterrupt
        return normal(case, options)

    script.read = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(script, source)
    assert [p.name for p in raw_root.iterdir()] == [".Dataset005_Toy.part"]
    script.read = normal
    first, script.reads[:] = list(script.reads), []
    run(script, source)
    assert not set(first) & set(script.reads) and len(first) + len(script.reads) == 6
    assert len(names(raw_root / "Dataset005_Toy" / "imagesTr")) == 4
    assert len(names(heldout / "Dataset005_Toy" / "test_labels")) == 1


class Stop:
    """Stops the program at a step of `target` that changes files; half of a folder is gone then."""

    def __init__(self, monkeypatch, step):
        self.left = step
        for module, name in ((target.shutil, "move"), (target.shutil, "rmtree"), (os, "replace")):
            monkeypatch.setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, normal):
        def step(path, *args, **kwargs):
            self.left -= 1
            if self.left < 0:
                found = [p for p in Path(path).rglob("*") if p.is_file()]
                for file in found[::2] if normal.__name__ == "rmtree" else []:
                    file.unlink()
                raise KeyboardInterrupt
            return normal(path, *args, **kwargs)

        return step


@pytest.mark.parametrize("step", [0, 9, 18, *range(21, 31)])
def test_stopped_at_any_step_of_replacing(script, source, raw_root, heldout, tmp_path, step):
    run(script, source)
    (tmp_path / "order.txt").write_text("d\na\n")
    new = ("--list", tmp_path / "order.txt", "--overwrite")
    with pytest.MonkeyPatch.context() as patch:
        stop = Stop(patch, step)
        with contextlib.suppress(KeyboardInterrupt):
            run(script, source, *new)
    assert stop.left < 0, "there are fewer steps"
    # no mask but those of annotated cases is where nnU-Net looks
    folder = raw_root / "Dataset005_Toy"
    masks = {p.name[0] for p in raw_root.rglob("*.nii.gz") if not p.name.endswith("_0000.nii.gz")}
    assert masks <= set("acdb")
    assert run(script, source, *new) == 0
    assert names(folder / "labelsTr") == ["a.nii.gz", "d.nii.gz"]
    assert names(heldout / folder.name / "test_labels") == ["f.nii.gz"]
    assert load(folder / "conversion.json")["unused"] == ["b", "c"]
    assert names(raw_root) == names(heldout) == ["Dataset005_Toy"]
    assert run(script, source, *new[:2]) == 0, "complete"


def test_changed_source_is_converted_again(script, source, raw_root, write, make_case):
    write(make_case(0)[1] * 0 + 9, source / "f_mask.nrrd", (0.5, 0.5, 2))
    with pytest.raises(UserError, match=r"f: the mask holds 9.*\s*5 finished case"):
        run(script, source)
    write(make_case(9)[0], source / "a.nrrd", (0.5, 0.5, 2))
    write(make_case(9)[1], source / "f_mask.nrrd", (0.5, 0.5, 2))
    script.reads.clear()
    run(script, source)
    assert sorted(script.reads) == ["a", "f"]


def test_finished_data_set_is_left_alone(script, source, raw_root, write, make_case, capsys):
    run(script, source)
    script.reads.clear()
    assert run(script, source) == 0
    assert "complete already" in capsys.readouterr().out and script.reads == []
    write(make_case(9)[0], source / "a.nrrd", (0.5, 0.5, 2))
    with pytest.raises(UserError, match=r"Dataset005_Toy was made from other files.*--overwrite"):
        run(script, source)
    run(script, source, "--overwrite")
    (raw_root / "Dataset005_Toy" / "labelsTr" / "a.nii.gz").unlink()
    with pytest.raises(UserError, match="is incomplete"):
        run(script, source)
    run(script, source, "--overwrite")
    assert (raw_root / "Dataset005_Toy" / "labelsTr" / "a.nii.gz").is_file()


def test_other_data_are_not_overwritten(script, source, raw_root, tmp_path):
    run(script, source)
    with pytest.raises(UserError, match=r"Id 5 is taken by .*Dataset005_Toy\..*-d"):
        run(script, source, "--labeled", 2)
    (tmp_path / "test.txt").write_text("d\nf\n")
    with pytest.raises(UserError, match=r"was made with test = None.*--overwrite"):
        run(script, source, "--test", tmp_path / "test.txt")
    (raw_root / "Dataset005_Toy" / "conversion.json").unlink()
    with pytest.raises(UserError, match=r"not made by convert.*--overwrite"):
        run(script, source)
    results = raw_root.parent / "nnUNet_results" / "Dataset005_Other"
    results.mkdir()
    with pytest.raises(UserError, match=r"taken by .*Dataset005_Other"):
        run(script, source, "--overwrite")


def test_changed_lists_and_groups_are_noticed(script, source, raw_root, tmp_path):
    listed = tmp_path / "labeled.txt"
    listed.write_text("d\n")
    run(script, source, "--labeled", listed)
    listed.write_text("c\n")
    with pytest.raises(
        UserError, match=r"1labeled exists and was made with labeled = .*labeled.txt"
    ):
        run(script, source, "--labeled", listed)
    listed.write_text("d\n")
    assert run(script, source, "--labeled", listed) == 0
    normal = script.find

    def find(folder, options):
        release = normal(folder, options)
        release.cases = [Case(c.name, c.images, c.mask, "p2") for c in release.cases[:4]]
        release.splits = {"train": SPLITS["train"]}
        return release

    script.find = find
    with pytest.raises(UserError, match=r"was made with other cases, groups, lists.*--overwrite"):
        run(script, source, "--labeled", listed)


def test_two_runs_at_once_are_refused(script, source, raw_root):
    normal, refused = script.read, []

    def read(case, options):
        with pytest.raises(UserError, match=r"to id 5 is running\. Wait for it.*-d") as caught:
            run(script, source, "--labeled", 1)
        refused.append(caught)
        return normal(case, options)

    script.read = read
    run(script, source)
    assert len(refused) == 6 and names(raw_root) == ["Dataset005_Toy"]


def test_lock_of_a_killed_run_is_no_lock(script, source, raw_root):
    (raw_root / ".convert_005.lock").write_text("")
    run(script, source)
    assert names(raw_root) == ["Dataset005_Toy"]


def test_conversion_needs_no_module_that_windows_lacks():
    code = (
        "import sys, importlib\n"
        "from nnunet_ssl.dataset_conversion import core\n"
        "used = {n for m in sys.modules.values() if 'dataset_conversion' in m.__name__\n"
        "        for n in vars(m)}\n"
        "print(used & {'fcntl', 'resource', 'pwd', 'grp', 'termios'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_heldout_must_lie_outside(script, source, raw_root, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(raw_root.parent))
    with pytest.raises(UserError, match="lies inside nnUNet_results; masks there are not hidden"):
        run(script, source)


def test_copies_across_splits_and_cases_in_no_list(script, source, raw_root, write, capsys):
    shape = sitk.ReadImage(str(source / "f.nrrd"))
    sitk.WriteImage(sitk.Cast(shape, sitk.sitkFloat64), str(source / "d.nrrd"))
    sitk.WriteImage(shape, str(source / "g.nrrd"))
    sitk.WriteImage(sitk.ReadImage(str(source / "f_mask.nrrd")), str(source / "g_mask.nrrd"))
    run(script, source)
    record = load(raw_root / "Dataset005_Toy" / "conversion.json")
    assert record["duplicates"] == [["f", "d"]] and record["dropped"] == ["d"]
    assert record["unused"] == ["g"] and "d" not in record["order"]
    told = capsys.readouterr().out
    assert record["groups"] == {"c": "c", "a": "p1", "b": "p1", "e": "e", "f": "f"}
    assert "f = d" in told and "in no list, not converted: g" in told


def test_all_bad_cases_are_named_at_once(script, source, raw_root, write):
    cut(source / "a.nrrd")
    write(np.zeros((4, 8, 9), np.uint8), source / "d_mask.nrrd", (0.5, 0.5, 2))
    with pytest.raises(UserError) as caught:
        run(script, source)
    assert "a.nrrd" in str(caught.value) and "d: the mask" in str(caught.value)
    assert "9x8x4" in str(caught.value)


def test_error_of_simpleitk_hides_no_other_bad_case(script, source, raw_root):
    normal = script.read

    def read(case, options):
        if case.name == "d":
            sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines((1, 0, 0, 1))
        return normal(case, options)

    script.read = read
    cut(source / "f.nrrd")
    with pytest.raises(UserError) as caught:
        run(script, source)
    assert "d: " in str(caught.value) and "d.nrrd" in str(caught.value)
    assert "f.nrrd" in str(caught.value) and "4 finished case(s)" in str(caught.value)


def test_case_table_and_regions(script, source, raw_root):
    def find(folder, options):
        release = normal(folder, options)
        release.cases = [
            Case(c.name, c.images, c.mask, c.group, {"phase": i % 2, "age": 40.5})
            for i, c in enumerate(release.cases)
        ]
        release.labels = {"background": 0, "all": [1, 2], "two": 2}
        release.about = {"regions_class_order": [1, 2], "licence": "CC0"}
        release.protocol = "cropped-literature"
        return release

    normal, script.find = script.find, find
    run(script, source)
    folder = raw_root / "Dataset005_Toy_cropped"
    rows = list(csv.DictReader((folder / "cases.csv").read_text(encoding="utf-8").splitlines()))
    assert [r["case"] for r in rows] == SPLITS["train"]
    assert rows[1] == {"case": "a", "phase": "0", "age": "40.5"}
    assert load(folder / "dataset.json")["labels"]["all"] == [1, 2]
    assert load(folder / "dataset.json")["regions_class_order"] == [1, 2]
    assert load(folder / "conversion.json")["protocol"] == "cropped-literature"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-d", "1000"], "-d 1000"),
        (["--draw", "1"], "--draw 1 has no effect"),
        (["--labeled", "9"], "--labeled 9 is not between 1 and 3"),
        (["-i", "nowhere"], "nowhere does not exist"),
        (["-np", "0"], "-np 1"),
    ],
)
def test_bad_options_write_nothing(script, source, raw_root, heldout, options, words):
    with pytest.raises(UserError, match=words):
        run(script, source, *options)
    assert names(raw_root) == [] and names(heldout) == []


def test_empty_source_and_unset_variable(script, source, raw_root, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is empty"):
        run(script, tmp_path / "empty")
    (tmp_path / "a.zip").write_text("")
    with pytest.raises(UserError, match=r"a.zip is no folder. Unpack it"):
        run(script, tmp_path / "a.zip")
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(UserError, match="nnUNet_raw is not set"):
        run(script, source)


def test_labeled_by_file(script, source, raw_root, tmp_path):
    (tmp_path / "labeled.txt").write_text("d\n")
    run(script, source, "--labeled", tmp_path / "labeled.txt")
    folder = raw_root / "Dataset005_Toy_1labeled"
    assert names(folder / "labelsTr") == ["d.nii.gz"] and len(names(folder / "imagesUn")) == 3
    (tmp_path / "labeled.txt").write_text("f\n")
    with pytest.raises(UserError, match=r"no annotated training case: f"):
        run(script, source, "--labeled", tmp_path / "labeled.txt")


# -------------------------------------------------------------------------------------- command


def test_command_lists_scripts(capsys):
    assert main([]) == 0
    told = capsys.readouterr().out
    for name, text in scripts().items():
        assert name in told and text and text in told
    table = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")
    assert [n for n in scripts() if n != "folder" and f"`convert {n} -i " not in table] == []
    with pytest.raises(UserError, match=r"no conversion 'XYZ'.*MSD.*folder"):
        main(["XYZ"])


@pytest.mark.parametrize("name", scripts())
def test_every_script_has_help_and_the_shared_options(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "-h"])
    told = capsys.readouterr().out
    assert caught.value.code == 0 and "--labeled" in told and "xample" in told


def test_no_torch_in_a_fresh_process():
    code = (
        "import sys, importlib\n"
        "from nnunet_ssl.dataset_conversion import scripts\n"
        "for n in scripts(): importlib.import_module('nnunet_ssl.dataset_conversion.' + n)\n"
        "print([m for m in sys.modules if m.split('.')[0] == 'torch'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_script_runs_as_a_file(source, raw_root):
    file = Path(target.__file__).with_name("folder.py")
    command = [sys.executable, str(file), "-i", str(source), "-d", "7", "--images", "*.nrrd"]
    command += ["--masks", "*_mask.nrrd", "--labels", "x=1,2", "--channels", "MRI", "-np", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(names(raw_root / "Dataset007_src" / "imagesTr")) == 6
    done = subprocess.run([*command, "--labeled", "99"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("Error: --labeled 99")


def test_gzip_that_holds_a_cut_nifti(tmp_path, write):
    path = write(np.ones((8, 16, 16), np.float32), tmp_path / "a.nii")
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(path.read_bytes()[:4000]))
    with pytest.raises(UserError, match=r"b.nii.gz.*4000 bytes of"):
        reading.read_image(tmp_path / "b.nii.gz")


def test_killed_command_leaves_no_worker_behind(tmp_path):
    code = (
        "import sys, time\n"
        "from nnunet_ssl.planning.workers import Workers\n"
        "if __name__ == '__main__':\n"
        "    with Workers(2) as workers:\n"
        "        workers.map(abs, [(1,), (2,)], '')\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
    )
    (tmp_path / "run.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "run.py"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.communicate(timeout=30)  # the pipe closes when the last worker has ended
