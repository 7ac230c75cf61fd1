import json
import os
import re
import shutil
from pathlib import Path

import pytest
from make_data import make_raw_dataset
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_ssl import cli
from nnunet_ssl.errors import UserError
from nnunet_ssl.planning import splits as module
from nnunet_ssl.planning.raw import read_raw_dataset
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


# --- folds that keep groups whole ---------------------------------------------------------------


def grouped(*sizes):
    """Case -> group, groups of these sizes; names of cases do not tell them."""
    order = [f"p{group}" for group, size in enumerate(sizes) for _ in range(size)]
    return {f"case{i * 7 % 100:02d}": group for i, group in enumerate(order)}


def record(folder, groups, name="conversion.json", **more):
    (folder / name).write_text(json.dumps({"groups": groups, **more}), encoding="utf-8")


SIZES = [(2, 2), (1, 3), (3, 1, 2, 2), (2,) * 5, (2,) * 20, (9, 1, 1, 1, 1, 1), (27, 6, 6, 4, 1, 1)]


@pytest.mark.parametrize("sizes", SIZES)
def test_no_group_is_on_both_sides_and_every_case_is_validated_once(sizes):
    groups = grouped(*sizes)
    splits = make_splits(groups, groups)
    assert len(splits) == min(len(sizes), 5)
    for fold in splits:
        assert fold["train"] and fold["val"]
        assert not {groups[c] for c in fold["train"]} & {groups[c] for c in fold["val"]}
        assert sorted(fold["train"] + fold["val"]) == sorted(groups)
    assert sorted(c for fold in splits for c in fold["val"]) == sorted(groups)
    validated = [len(fold["val"]) for fold in splits]
    assert max(validated) - min(validated) <= max(sizes)
    if len(set(sizes)) == 1 and len(sizes) >= 5:
        assert len(set(validated)) == 1
    backwards = dict(reversed(groups.items()))
    renamed = {c: f"patient {9 - int(g[1:])}" for c, g in groups.items()}
    assert splits == make_splits(backwards, backwards) == make_splits(renamed, renamed)


@pytest.mark.parametrize("number", [1, 2, 4, 5, 23])
def test_groups_of_one_case_change_no_fold(folders, number):
    names = [f"case{i}" for i in range(number)]
    record(folders[0], {n: f"p{number - i}" for i, n in enumerate(names)} | {"test_1": "p0"})
    assert ensure_splits(*folders, names) == make_splits(names)


@pytest.mark.parametrize("name", ["conversion.json", "split.json"])
def test_folds_follow_the_groups_of_the_record(folders, name, capsys):
    groups = grouped(*[2] * 6)
    record(folders[0], groups | {"hidden": "p1"}, name, order="by name")
    splits = ensure_splits(*folders, sorted(groups))
    assert splits == stored(folders[1]) == make_splits(groups, groups) != make_splits(groups)
    out = capsys.readouterr().out
    assert f"Folds keep the 6 groups (patients) of {folders[0] / name} whole" in out
    assert "NOTE" not in out
    assert ensure_splits(*folders, sorted(groups), for_scores=True) == splits
    assert capsys.readouterr().out == ""


def test_cases_that_the_record_does_not_know_are_told(folders, capsys):
    record(folders[0], {"a": "p", "b": "p", "c": "q"})
    splits = ensure_splits(*folders, ["a", "b", "c", "new"])
    assert [fold["val"] for fold in splits] == [["a", "b"], ["c"], ["new"]]
    assert "no group of 1 case(s), so each is its own: new. If" in capsys.readouterr().out


def test_one_group_can_be_planned(folders, capsys):
    record(folders[0], {"a": "p", "b": "p"})
    names = ["a", "b"]
    assert ensure_splits(*folders, names) == [{"train": names, "val": names}]
    out = capsys.readouterr().out
    assert "All 2 annotated cases are of group p" in out and "validates on its training" in out
    assert ensure_splits(*folders, names) and capsys.readouterr().out == ""
    record(folders[0], {"a": "p", "b": "p", "c": "q"})  # a patient more
    ensure_splits(*folders, [*names, "c"])
    assert "parts 1 group(s) (patients)" in capsys.readouterr().out


def test_old_folds_that_part_a_group_are_kept_with_a_warning_and_not_compared(folders, capsys):
    groups = grouped(*[2] * 6)
    old = make_splits(groups)
    files = [folder / "splits_final.json" for folder in folders]
    files[0].write_text(json.dumps(old))
    record(folders[0], groups)
    assert ensure_splits(*folders, list(groups)) == old == stored(folders[1])
    out = capsys.readouterr().out
    words = rf"{files[1]} parts \d group\(s\) \(patients\): fold \d trains on case.*, both of p"
    fix = f"Delete {files[1]} and {files[0]} and run the same command again"
    assert out.count("WARNING") == 1
    assert re.search(words, out) and fix in out
    with pytest.raises(UserError, match=rf"{words}.*{fix}"):
        ensure_splits(*folders, list(groups), for_scores=True)
    assert capsys.readouterr().out == ""
    for file in files:
        file.unlink()
    assert ensure_splits(*folders, list(groups), for_scores=True) == make_splits(groups, groups)


def test_folds_made_of_a_single_case_are_not_compared_later(folders):
    ensure_splits(*folders, ["a"])
    with pytest.raises(UserError, match="fold 0 trains on a and validates on a"):
        ensure_splits(*folders, ["a", "b"], for_scores=True)


def test_record_that_is_damaged_or_of_another_program(folders):
    path = folders[0] / "split.json"
    for foreign in ('[{"groups": 1}]', '{"groups": ["a"], "order": {}}'):
        path.write_text(foreign)
        assert ensure_splits(*folders, ["a", "b"]) == make_splits(["a", "b"])
    path.write_text('{"groups": {')
    with pytest.raises(UserError, match=f"Cannot read {path}, which tells.* delete the file"):
        ensure_splits(*folders, ["a", "b"])


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


@pytest.fixture
def converted(source):
    """The source as `convert` leaves it: five patients of two cases, in an order of its own."""
    names = [f"tr_{i:03d}" for i in range(10)]
    groups = {n: f"patient{i % 5}" for i, n in enumerate(names)}
    order = [*names[7:], *names[:7]]
    record(source, groups | {"ts_000": "patient9"}, order=order)
    return source


def split_by_command(roots, *options):
    """Return split.json of `nnunet_ssl split`."""
    assert cli.main(["split", "-d", "901", "-o", "902", "--labeled", "2", *options]) == 0
    (new,) = (roots / "raw").glob("Dataset902_*")
    return json.loads((new / "split.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("options", [[], ["--draw", "1"], ["--list"]])
def test_command_keeps_the_groups_of_the_conversion(converted, roots, tmp_path, options, capsys):
    if options == ["--list"]:
        (tmp_path / "mine.txt").write_text("\n".join(f"tr_{i:03d}" for i in range(10)))
        options = ["--list", str(tmp_path / "mine.txt")]
    split = split_by_command(roots, "--test", "1", *options)
    sides = [{int(c[3:]) % 5 for c in split[side]} for side in ("labeled", "unlabeled", "test")]
    assert list(map(len, sides)) == [2, 2, 1] and len(set.union(*sides)) == 5
    assert sum(len(split[side]) for side in ("labeled", "unlabeled", "test")) == 10
    assert split["groups"]["tr_007"] == "patient2"
    path = converted / "conversion.json"
    out = capsys.readouterr().out
    assert f"Groups (patients): those of {path}; numbers count the 5 groups" in out
    if not options:
        assert f"Order of the cases: that of {path}." in out
        assert split["labeled"] == ["tr_007", "tr_002", "tr_008", "tr_003"]
        assert (split["test"], split["order"]) == (["tr_001", "tr_006"], "conversion.json")
    elif "--list" in options:
        assert "Order of the cases" not in out
        assert split["labeled"] == ["tr_000", "tr_005", "tr_001", "tr_006"]


def test_a_split_says_what_the_conversion_said_of_its_images(converted, roots):
    path = converted / "conversion.json"
    told = {"protocol": "cropped-literature", "spacing_known": False}
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | told))
    split = split_by_command(roots)
    assert {k: split[k] for k in told} == told
    (new,) = (roots / "raw").glob("Dataset902_*")
    record = module.read_record(new)
    assert (record.protocol, record.spacing_known) == ("cropped-literature", False)


def test_command_takes_groups_from_a_file_instead(converted, roots, tmp_path, capsys):
    rows = [f"tr_{i:03d},own{i}" for i in range(10)]
    (tmp_path / "groups.csv").write_text("\n".join(["case,group", *rows]))
    split = split_by_command(roots, "--test", "1", "--groups", str(tmp_path / "groups.csv"))
    assert (split["labeled"], split["test"]) == (["tr_007", "tr_008"], ["tr_006"])
    assert "Groups (patients)" not in capsys.readouterr().out


def test_command_counts_cases_where_each_is_its_own_group(source, roots, capsys):
    names = [f"tr_{i:03d}" for i in range(10)]
    record(source, {n: n for n in names}, order=[*names[9:0:-1], "moved"])
    split = split_by_command(roots, "--test", "3")
    assert split["labeled"] == ["tr_009", "tr_008"] and "groups" not in split
    out = capsys.readouterr().out
    assert "it lacks 1 case(s) of imagesTr" in out and "Groups" not in out


def test_a_split_data_set_is_split_again_by_its_groups(converted, roots):
    split_by_command(roots, "--labeled", "5")  # nothing hidden
    args = ["split", "-d", "902", "-o", "903", "--labeled", "1", "--test", "1"]
    assert cli.main(args) == 0
    (new,) = (roots / "raw").glob("Dataset903_*")
    split = json.loads((new / "split.json").read_text(encoding="utf-8"))
    assert (split["labeled"], split["test"]) == (["tr_000", "tr_005"], ["tr_004", "tr_009"])


def test_without_being_asked_the_record_is_not_followed(converted, roots):
    """The benchmark hands over cases that are chosen already."""
    new = split_dataset(901, 902, labeled=1)
    assert cases(new / "imagesTr") == ["tr_000"]


def test_test_cases_outside_the_order_part_no_group(converted, roots, tmp_path, capsys):
    (tmp_path / "train.list").write_text("tr_000\ntr_001\ntr_002\n")
    (tmp_path / "test.list").write_text("tr_005\n")
    lists = ["--list", str(tmp_path / "train.list"), "--test", str(tmp_path / "test.list")]
    assert cli.main(["split", "-d", "901", "-o", "902", "--labeled", "1", *lists]) == 2
    assert "part group patient0: tr_005 is one, tr_000 is not" in capsys.readouterr().err
    untouched(roots)


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


@pytest.mark.parametrize("links", [True, False])
def test_test_cases_are_placed_anew_only_if_they_are_others(source, tmp_path, links, monkeypatch):
    """A spec may name another data set with the same case names, e.g. cut images."""
    if not links:
        monkeypatch.setattr(module, "link", lambda a, b, copy=False: shutil.copy2(a, b))
    (source / "imagesTr" / "tr_001.json").write_text('{"spacing": [1, 1, 1]}')  # as beside TIFF
    names, target = ["tr_000", "tr_001"], tmp_path / "test"

    def place(folder):
        module.place_once(read_raw_dataset(folder, unlabeled=False), names, target)
        return target.stat().st_ino

    first = place(source)
    assert {p.name for p in (target / "images").iterdir()} == {
        *(f"{name}_000{channel}.nii.gz" for name in names for channel in (0, 1)),
        "tr_001.json",
    }
    assert place(source) == first
    other = source.with_name("Dataset902_Other")
    shutil.copytree(source, other, copy_function=shutil.copy2)
    os.utime(other / "labelsTr" / "tr_001.nii.gz", (1, 1))
    place(other)
    placed = target / "labels" / "tr_001.nii.gz"
    assert placed.resolve().is_relative_to(other) if links else placed.stat().st_mtime == 1
