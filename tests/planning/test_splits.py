import json
import os
import shutil
from pathlib import Path

import pytest
from make_data import make_raw_dataset
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_ssl.errors import UserError
from nnunet_ssl.planning import splits as module
from nnunet_ssl.planning.splits import ensure_splits, make_splits, read_groups, split_dataset

# --- folds --------------------------------------------------------------------------------------


def test_one_case_validates_on_itself():
    assert make_splits(["a"]) == [{"train": ["a"], "val": ["a"]}]


@pytest.mark.parametrize("number", [2, 3, 4])
def test_few_cases_are_left_out_one_by_one(number):
    names = [f"case{i}" for i in range(number)]
    splits = make_splits(reversed(names))
    assert [fold["val"] for fold in splits] == [[n] for n in names]
    for fold in splits:
        assert sorted(fold["train"] + fold["val"]) == names


@pytest.mark.parametrize("number", [5, 6, 23])
def test_from_five_cases_on_the_folds_are_nnunets(number):
    names = [f"case{i}" for i in range(number)]
    expected = generate_crossval_split(sorted(names), seed=12345, n_splits=5)
    assert make_splits(reversed(names)) == expected
    json.dumps(make_splits(names))


@pytest.fixture
def folders(tmp_path):
    raw, preprocessed = tmp_path / "raw", tmp_path / "preprocessed"
    raw.mkdir()
    return raw, preprocessed


def stored(folder):
    return json.loads((folder / "splits_final.json").read_text(encoding="utf-8"))


def test_writes_both_files_and_says_when_validation_is_training(folders, capsys):
    splits = ensure_splits(*folders, ["a"])
    assert splits == stored(folders[0]) == stored(folders[1])
    assert "fold 0 validates on its training case" in capsys.readouterr().out


@pytest.mark.parametrize("where", [0, 1])
def test_keeps_the_users_splits_and_completes_the_other_folder(folders, where, capsys):
    own = [{"train": ["a"], "val": ["b", "c"]}]
    folders[1].mkdir()
    (folders[where] / "splits_final.json").write_text(json.dumps(own))
    assert ensure_splits(*folders, ["a", "b", "c", "d"]) == own
    assert stored(folders[0]) == stored(folders[1]) == own
    out = capsys.readouterr().out
    assert "leaves out 1 annotated case(s): d" in out
    assert "Delete splits_final.json" in out


def test_unlabelled_case_in_a_fold(folders):
    path = folders[0] / "splits_final.json"
    path.write_text(json.dumps([{"train": ["a"], "val": ["b"]}, {"train": ["un_1"], "val": []}]))
    with pytest.raises(UserError, match=rf"{path} names un_1 in fold 1.*delete {path}"):
        ensure_splits(*folders, ["a", "b"])
    assert not folders[1].exists()


@pytest.mark.parametrize("content", ["{", "{}1", '[{"train": []}]', "[3]"])
def test_damaged_splits(folders, content):
    path = folders[0] / "splits_final.json"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"{path} is not a list of folds.*Correct or delete it"):
        ensure_splits(*folders, ["a", "b"])


def test_raw_and_preprocessed_differ(folders):
    folders[1].mkdir()
    for folder, val in zip(folders, ("a", "b"), strict=True):
        splits = [{"train": ["c"], "val": [val]}]
        (folder / "splits_final.json").write_text(json.dumps(splits))
    with pytest.raises(UserError, match=r"splits_final.json differ. Delete the one"):
        ensure_splits(*folders, ["a", "b", "c"])


def test_raw_folder_not_writable(folders, monkeypatch, capsys):
    write = module.write_json

    def refusing(obj, path):
        if Path(path).parent == folders[0]:
            raise UserError(f"Cannot write {path}: the folder is not writable.")
        write(obj, path)

    monkeypatch.setattr(module, "write_json", refusing)
    splits = ensure_splits(*folders, ["a", "b"])
    assert stored(folders[1]) == splits
    assert f"The splits are in {folders[1]} only" in capsys.readouterr().out


# --- data sets with few masks -------------------------------------------------------------------


@pytest.fixture
def source(roots):
    """Fully annotated data set 901 of ten cases tr_000-tr_009."""
    return make_raw_dataset(
        roots / "raw", num_labeled=10, num_unlabeled=0, shape=(4, 8, 8), channels=2
    )


def cases(folder):
    names = {p.name.removesuffix(".nii.gz") for p in folder.glob("*.nii.gz")}
    return sorted({n[:6] for n in names})


def untouched(roots):
    assert sorted(p.name for p in (roots / "raw").iterdir()) == ["Dataset901_Toy"]
    heldout = roots / "nnunet_ssl_heldout"
    assert not heldout.exists() or not list(heldout.iterdir())


def test_split_by_name(source, roots, capsys):
    new = split_dataset(901, 902, labeled=3, test=2)
    assert new == roots / "raw" / "Dataset902_Toy_3labeled"
    held = roots / "nnunet_ssl_heldout" / "Dataset902_Toy_3labeled"
    first, rest = ["tr_000", "tr_001", "tr_002"], [f"tr_{i:03d}" for i in range(3, 8)]
    assert cases(new / "imagesTr") == cases(new / "labelsTr") == first
    assert cases(new / "imagesUn") == cases(held / "hidden_labels") == rest
    assert cases(held / "test_images") == cases(held / "test_labels") == ["tr_008", "tr_009"]
    assert len(list((new / "imagesUn").iterdir())) == 10  # two channels
    assert sorted(p.name for p in new.iterdir()) == [
        "dataset.json",
        "imagesTr",
        "imagesUn",
        "labelsTr",
        "split.json",
    ]
    link = new / "imagesUn" / "tr_005_0001.nii.gz"
    assert link.is_symlink()
    assert link.resolve() == (source / "imagesTr" / "tr_005_0001.nii.gz").resolve()

    content = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    assert json.loads((new / "dataset.json").read_text(encoding="utf-8")) == content | {
        "numTraining": 3
    }
    split = json.loads((new / "split.json").read_text(encoding="utf-8"))
    assert split["source"] == "Dataset901_Toy"
    assert (split["labeled"], split["unlabeled"]) == (first, rest)
    assert "3 annotated, 5 without masks, 2 for testing, 0 unused" in capsys.readouterr().out
    assert not list((roots / "raw").glob(".*"))


def test_split_by_list_with_test_file(source, roots, tmp_path):
    order, test = tmp_path / "train.list", tmp_path / "test.list"
    order.write_text("# seeded\ntr_007\n\ntr_002\ntr_009\n tr_000 \n")
    test.write_text("tr_001\ntr_009\n")
    new = split_dataset(901, 902, labeled=1, list_file=order, test=test, name="Few", copy=True)
    assert new.name == "Dataset902_Few"
    split = json.loads((new / "split.json").read_text(encoding="utf-8"))
    assert split["labeled"] == ["tr_007"]
    assert split["unlabeled"] == ["tr_002", "tr_000"]
    assert split["test"] == ["tr_001", "tr_009"]
    assert split["unused"] == ["tr_003", "tr_004", "tr_005", "tr_006", "tr_008"]
    copied = new / "imagesUn" / "tr_002_0000.nii.gz"
    assert not copied.is_symlink()
    assert copied.read_bytes() == (source / "imagesTr" / "tr_002_0000.nii.gz").read_bytes()


def test_draws_are_seeded_differ_and_share_their_test_cases(source, roots, tmp_path):
    first = split_dataset(901, 902, labeled=4, draw=1, test=3)
    assert first.name == "Dataset902_Toy_4labeled_draw1"
    other = split_dataset(901, 903, labeled=4, draw=2, test=3)
    again = split_dataset(901, 904, labeled=4, draw=1, test=3)
    more = split_dataset(901, 905, labeled=5, draw=1, test=3)
    a, b, c, d = (
        json.loads((f / "split.json").read_text(encoding="utf-8"))
        for f in (first, other, again, more)
    )
    assert a["labeled"] == c["labeled"] != b["labeled"]
    assert d["labeled"][:4] == a["labeled"]  # more labels extend fewer
    assert a["test"] == b["test"] == ["tr_007", "tr_008", "tr_009"]

    order = tmp_path / "train.list"
    order.write_text("tr_005\ntr_003\ntr_001\ntr_004\n")
    zero = split_dataset(source, 906, labeled=2, draw=0, list_file=order, test=1)  # by folder
    assert zero.name == "Dataset906_Toy_2labeled"
    split = json.loads((zero / "split.json").read_text(encoding="utf-8"))
    assert (split["labeled"], split["unlabeled"]) == (["tr_005", "tr_003"], ["tr_001"])


@pytest.mark.parametrize("draw", [0, 1, 2, 3])
def test_groups_are_counted_and_stay_whole(source, roots, draw):
    groups = {f"tr_{i:03d}": f"patient{i // 2}" for i in range(10)}
    new = split_dataset(901, 902, labeled=2, draw=draw, test=1, groups=groups)
    split = json.loads((new / "split.json").read_text(encoding="utf-8"))
    assert split["test"] == ["tr_008", "tr_009"]
    assert (len(split["labeled"]), len(split["unlabeled"])) == (4, 4)
    sides = [{groups[c] for c in split[side]} for side in ("labeled", "unlabeled", "test")]
    assert sum(map(len, sides)) == 5 == len(set.union(*sides))
    for side in ("labeled", "unlabeled"):  # scans of a patient keep their order
        names = split[side]
        assert all(a < b for a, b in zip(names[::2], names[1::2], strict=True))
    assert (draw == 0) == (split["labeled"] == ["tr_000", "tr_001", "tr_002", "tr_003"])


def test_values_per_case_go_with_their_cases(source, roots, base):
    rows = [f'tr_{i:03d},"site {i % 2}, old"' for i in range(10)]
    (source / "cases.csv").write_text("\n".join(["case,site", *rows]))
    new = split_dataset(901, 902, labeled=2, test=3)
    assert (new / "cases.csv").read_text(encoding="utf-8").splitlines() == ["case,site", *rows[:7]]
    assert not list((roots / "nnunet_ssl_heldout").rglob("cases.csv"))


def test_groups_that_do_not_fit(source, roots, tmp_path):
    groups = {f"tr_{i:03d}": f"patient{i // 2}" for i in range(10)}
    test = tmp_path / "test.list"
    test.write_text("tr_003\n")
    with pytest.raises(UserError, match="part group patient1: tr_003 is one, tr_002 is not"):
        split_dataset(901, 902, labeled=1, test=test, groups=groups)
    with pytest.raises(UserError, match="between 1 and 5, the number of groups"):
        split_dataset(901, 902, labeled=6, groups=groups)
    with pytest.raises(UserError, match="5 test groups are asked for, but there are 5 groups"):
        split_dataset(901, 902, labeled=1, test=5, groups=groups)
    del groups["tr_006"]
    with pytest.raises(UserError, match="Case tr_006 has no group"):
        split_dataset(901, 902, labeled=1, groups=groups)
    untouched(roots)


@pytest.mark.parametrize(
    "content, words",
    [
        ("case,group\na,1\na,2\n", "line 3: names a twice. Remove one"),
        ("case,patient\na,1\n", "line 2: needs a case and its group. Write a first line"),
        ("case,group\n", "names no case"),
        (None, "Cannot read the groups .*groups.csv.*Check the path"),
    ],
)
def test_bad_table_of_groups(tmp_path, content, words):
    path = tmp_path / "groups.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        read_groups(path)


def test_table_of_groups(tmp_path):
    (tmp_path / "groups.csv").write_text("case,group\na, p 1 \nb,p 1\nc,2\n")
    assert read_groups(tmp_path / "groups.csv") == {"a": "p 1", "b": "p 1", "c": "2"}


def test_split_data_set_can_be_planned(source, roots):
    from nnunet_ssl.planning.api import plan_and_preprocess

    split_dataset(901, 902, labeled=1, test=2)
    plan_and_preprocess(902, ["2d"], num_processes=1)
    base = roots / "preprocessed" / "Dataset902_Toy_1labeled"
    assert len(list((base / "nnUNetPlans_2d_unlabeled").glob("*.pkl"))) == 7
    assert stored(base) == [{"train": ["tr_000"], "val": ["tr_000"]}]


def test_all_cases_may_keep_their_masks(source, roots, capsys):
    new = split_dataset(901, 902, labeled=8, test=2)
    assert not (new / "imagesUn").exists()
    assert "no case is left for imagesUn" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, words",
    [
        ({"labeled": 0}, "--labeled 0 is not between 1 and 10"),
        ({"labeled": 11}, "--labeled 11 is not between 1 and 10"),
        (
            {"labeled": 7, "test": 4},
            "between 1 and 6, the number of cases that are not for testing",
        ),
        ({"labeled": 1, "draw": -1}, "--draw -1 is below 0. Give 0 for the order as it is"),
        (
            {"labeled": 1, "test": 10},
            "10 test cases are asked for, but there are 10 cases. Give a number from 0 to 9",
        ),
        ({"labeled": 1, "new_id": 1000}, "New id 1000 is not between 1 and 999"),
        ({"labeled": 1, "new_id": 901}, "Id 901 is taken by .*Dataset901_Toy.*another with -o"),
    ],
)
def test_bad_numbers(source, roots, options, words):
    with pytest.raises(UserError, match=words):
        split_dataset(901, **({"new_id": 902} | options))
    untouched(roots)


@pytest.mark.parametrize(
    "content, words",
    [
        ("tr_001\ntr_001\n", "names tr_001 twice. Remove one line"),
        ("tr_001\ntr_404\n", r"names 1 case\(s\) that .*Dataset901_Toy does not hold: tr_404"),
        ("\n", "names no case. Write one case per line"),
        (None, "Cannot read the list .*train.list.*Check the path"),
    ],
)
def test_bad_list(source, roots, tmp_path, content, words):
    path = tmp_path / "train.list"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        split_dataset(901, 902, labeled=1, list_file=path)
    untouched(roots)


def test_source_that_is_not_fully_annotated(source, roots):
    (source / "labelsTr" / "tr_004.nii.gz").unlink()
    with pytest.raises(UserError, match=r"tr_004.nii.gz is missing. Add the mask"):
        split_dataset(901, 902, labeled=1)
    untouched(roots)
    (source / "imagesUn").mkdir()
    (source / "imagesUn" / "un_000_0000.nii.gz").touch()
    with pytest.raises(UserError, match="imagesUn holds scans without masks"):
        split_dataset(901, 902, labeled=1)


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
def test_hidden_masks_inside_nnunets_folders(source, roots, variable):
    inside = Path(os.environ[variable]) / "sub" / "hidden"
    with pytest.raises(UserError, match=f"{inside} lies inside {variable}.*outside"):
        split_dataset(901, 902, labeled=1, hidden_folder=inside)
    untouched(roots)


def test_hidden_folder_that_exists(source, roots, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"mine exists already. Remove it or give another"):
        split_dataset(901, 902, labeled=1, hidden_folder=tmp_path / "mine")
    assert (tmp_path / "mine").exists()
    untouched(roots)


def test_full_disk_leaves_nothing(source, roots, monkeypatch):
    copied = []

    def full(*args):
        copied.append(args)
        if len(copied) == 12:
            raise OSError(28, "No space left on device")
        return original(*args)

    original = shutil.copy2
    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(UserError, match="the disk is full"):
        split_dataset(901, 902, labeled=1, copy=True)
    untouched(roots)


def test_file_system_without_links(source, monkeypatch):
    def refusing(self, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refusing)
    new = split_dataset(901, 902, labeled=1)
    assert (new / "imagesTr" / "tr_000_0000.nii.gz").stat().st_size > 0
    assert not (new / "imagesTr" / "tr_000_0000.nii.gz").is_symlink()
