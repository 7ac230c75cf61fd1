"""Cross-validation splits for few annotated cases, and data sets with few annotated cases."""

import csv
import io
import json
import os
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_ssl.data.loader import CASE_TABLE, read_csv
from nnunet_ssl.errors import UserError
from nnunet_ssl.io import explain_os_error, write_json, write_text
from nnunet_ssl.planning.raw import (
    MAX_LISTED,
    RawDataset,
    environment_folder,
    find_raw_dataset,
    read_raw_dataset,
)

SPLITS_FILE = "splits_final.json"
RECORDS = ("conversion.json", "split.json")
FOLDS = 5
SEED = 12345  # nnU-Net's, for its folds
Splits = list[dict[str, list[str]]]


@dataclass(frozen=True)
class Record:
    """What conversion.json or split.json, beside dataset.json, tells of the cases.

    Attributes:
        path: the file.
        groups: case -> group (patient), test cases included; empty if it tells none.
        order: training cases in their order; empty if it tells none.
        protocol: "raw", or how images were cut with the help of an annotation; empty if not told.
        spacing_known: False where spacings are made up.
        heldout: folder with the test cases; None if not told.
    """

    path: Path
    groups: dict[str, str]
    order: list[str]
    protocol: str = ""
    spacing_known: bool = True
    heldout: Path | None = None


def read_record(raw_folder: Path) -> Record | None:
    """Read what the data set was made with; None if nothing tells groups, order or protocol.

    Raises:
        UserError: the file cannot be read.
    """
    for name in RECORDS:
        path = Path(raw_folder) / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"Cannot read {path}, which tells whose cases belong together: {error}. Make the "
                f"data set again, or delete the file: each case is a patient of its own then."
            ) from error
        told = content if isinstance(content, dict) else {}  # else not ours
        groups, order = told.get("groups"), told.get("order")
        groups = {c: str(g) for c, g in groups.items()} if isinstance(groups, dict) else {}
        order = [str(c) for c in order] if isinstance(order, list) else []
        protocol = str(told.get("protocol") or "")
        if groups or order or protocol:
            return Record(
                path,
                groups,
                order,
                protocol,
                spacing_known=bool(told.get("spacing_known", True)),
                heldout=Path(told["heldout"]) if told.get("heldout") else None,
            )
    return None


def groups_of(cases: Iterable[str], record: Record | None) -> dict[str, str]:
    """Return the group of each case: the recorded one, else its own name."""
    return {c: record.groups.get(c, c) if record else c for c in cases}


def make_splits(labeled: Iterable[str], groups: Mapping[str, str] | None = None) -> Splits:
    """Split annotated cases into folds.

    Args:
        labeled: names of the annotated cases, at least one.
        groups: case -> group, for every case; None: each case is its own.

    Returns:
        Folds with no group on both sides. From 5 groups on five folds: nnU-Net's own if each case
        is its own group, else with as equal numbers of validation cases as whole groups allow.
        2-4 groups: one fold per group, which validates on it; 1 group: one fold that trains and
        validates on it.
    """
    names = sorted(labeled)
    members = list(members_of(names, groups).values())
    if len(members) == 1:
        return [{"train": names, "val": names}]
    if FOLDS <= len(members) == len(names):
        splits = generate_crossval_split(names, seed=SEED, n_splits=FOLDS)
        return [{k: [str(c) for c in fold[k]] for k in ("train", "val")} for fold in splits]
    folds = members
    if len(members) > FOLDS:
        random.Random(SEED).shuffle(members)
        folds = [[] for _ in range(FOLDS)]
        for group in sorted(members, key=len, reverse=True):
            min(folds, key=len).extend(group)
    return [{"train": [c for c in names if c not in val], "val": sorted(val)} for val in folds]


def read_splits(
    raw_folder: Path, preprocessed_folder: Path, labeled: Iterable[str]
) -> Splits | None:
    """Read existing splits, those of the preprocessed folder first, and check them.

    Returns:
        The splits, or None if neither folder holds any. Annotated cases in no fold are printed.

    Raises:
        UserError: not valid JSON, an unknown or unlabelled case in a fold, or both folders hold
            different splits (nnU-Net's planner would stop with a bare assertion).
    """
    files = [Path(f) / SPLITS_FILE for f in (preprocessed_folder, raw_folder)]
    found = {path: _parse_splits(path) for path in files if path.is_file()}
    if not found:
        return None
    names = set(labeled)
    for path, splits in found.items():
        for number, fold in enumerate(splits):
            for case in [*fold["train"], *fold["val"]]:
                if case not in names:
                    raise UserError(
                        f"{path} names {case} in fold {number}, which is no annotated case of this "
                        f"data set. Correct the file, or delete {' and '.join(map(str, found))} to "
                        f"have new splits made."
                    )
    path, splits = next(iter(found.items()))
    other = found.get(files[1], splits)
    if [_as_sets(f) for f in other] != [_as_sets(f) for f in splits[: len(other)]]:
        raise UserError(f"{files[0]} and {files[1]} differ. Delete the one that is not to be used.")
    unused = sorted(names - {c for fold in splits for k in ("train", "val") for c in fold[k]})
    if unused:
        print(
            f"WARNING: {path} leaves out {len(unused)} annotated case(s): {', '.join(unused)}. "
            f"Folds will not use them (fold all will). Delete {SPLITS_FILE} in the raw and the "
            f"preprocessed folder to have new splits made."
        )
    return splits


def ensure_splits(
    raw_folder: Path, preprocessed_folder: Path, labeled: Sequence[str], for_scores: bool = False
) -> Splits:
    """Keep valid splits, make missing ones, and write them into both folders.

    nnU-Net's planner copies the raw file into the preprocessed folder, and its trainer crashes on
    fewer than five cases where there is none. A raw folder that cannot be written to is left out.
    New folds keep the groups of conversion.json or split.json whole. Old ones that part a group
    are kept, since models may have been trained on them, with a warning.

    Args:
        raw_folder: of the data set.
        preprocessed_folder: of the data set; made if missing.
        labeled: names of the annotated cases.
        for_scores: the folds will be compared by their scores: refuse those that part a group or
            validate on a training case.

    Raises:
        UserError: as `read_splits` and `read_record`; preprocessed folder not writable; refused.
    """
    record = read_record(raw_folder)
    groups = groups_of(labeled, record)
    splits = read_splits(raw_folder, preprocessed_folder, labeled)
    if splits is None:
        splits = make_splits(labeled, groups)
        _tell_new_folds(groups, record)
    Path(preprocessed_folder).mkdir(parents=True, exist_ok=True)
    for folder in (Path(preprocessed_folder), Path(raw_folder)):
        if (folder / SPLITS_FILE).is_file():
            continue
        try:
            write_json(splits, folder / SPLITS_FILE)
        except UserError as error:
            if folder == Path(preprocessed_folder):
                raise
            print(f"NOTE: {error} The splits are in {preprocessed_folder} only.")
    parted = _parted(splits, groups)
    if parted and (for_scores or _shared(groups)):
        files = [Path(f) / SPLITS_FILE for f in (preprocessed_folder, raw_folder)]
        found = [str(path) for path in files if path.is_file()]
        group, how = next(iter(parted.items()))
        text = (
            f"{found[0]} parts {len(parted)} group(s) (patients): {how}, both of {group}. Such "
            f"folds score too high. Delete {' and '.join(found)} and run the same command again "
            f"for new folds, which have to be trained anew; fold all is not concerned."
        )
        if for_scores:
            raise UserError(text)
        print(f"WARNING: {text}")
    return splits


def _shared(groups: Mapping[str, str]) -> bool:
    """Tell whether a group has several cases."""
    return len(set(groups.values())) < len(groups)


def _tell_new_folds(groups: Mapping[str, str], record: Record | None) -> None:
    number = len(set(groups.values()))
    if len(groups) == 1:
        print(f"One annotated case ({next(iter(groups))}): fold 0 validates on its training case.")
    elif record and number == 1:
        print(
            f"All {len(groups)} annotated cases are of group {next(iter(groups.values()))} "
            f"({record.path}): fold 0 validates on its training cases."
        )
    elif record and _shared(groups):
        print(f"Folds keep the {number} groups (patients) of {record.path} whole.")
        _tell_unknown(groups, record)


def _tell_unknown(cases: Iterable[str], record: Record) -> None:
    unknown = [c for c in cases if c not in record.groups]
    if unknown:
        print(
            f"NOTE: {record.path} tells no group of {len(unknown)} case(s), so each is its own: "
            f"{', '.join(unknown[:MAX_LISTED])}. If that is wrong, add them to its groups."
        )


def _parted(splits: Splits, groups: Mapping[str, str]) -> dict[str, str]:
    """Return the groups that a fold has on both sides -> how; none if there is but one group."""
    parted: dict[str, str] = {}
    for number, fold in enumerate(splits if len(set(groups.values())) > 1 else []):
        trained = {groups[case]: case for case in fold["train"]}
        for case in fold["val"]:
            if groups[case] in trained:
                how = f"fold {number} trains on {trained[groups[case]]} and validates on {case}"
                parted.setdefault(groups[case], how)
    return parted


def _parse_splits(path: Path) -> Splits:
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
        return [{k: [str(c) for c in fold[k]] for k in ("train", "val")} for fold in splits]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a list of folds with 'train' and 'val'. Correct or delete it."
        ) from error


def _as_sets(fold: Mapping[str, list[str]]) -> tuple[set[str], set[str]]:
    return set(fold["train"]), set(fold["val"])


def split_dataset(
    source: int | Path,
    new_id: int,
    *,
    labeled: int,
    draw: int = 0,
    list_file: Path | None = None,
    test: int | Path | None = None,
    groups: Mapping[str, str] | None = None,
    follow_record: bool = False,
    hidden_folder: Path | None = None,
    copy: bool = False,
    name: str | None = None,
) -> Path:
    """Make a data set with few masks from a fully annotated one.

    The order of the cases is that of `list_file`, else by name. Test cases leave it first; a draw
    then shuffles the rest, so that all draws share their test cases. The first `labeled` cases
    keep their masks, the images of the others go to imagesUn. Cases that a list does not name are
    left out. With groups (scans of one patient) all this counts and moves whole groups, in the
    order of their first cases.

    Args:
        source: fully annotated data set, its id or its folder.
        new_id: free id, 1-999.
        labeled: cases (groups) that keep their mask.
        draw: 0 keeps the order, K > 0 is the seed of a shuffle.
        list_file: one case per line; empty lines and `#` comments do not count.
        test: test cases, as a number of cases (groups; the last ones of the order) or a file like
            `list_file`.
        groups: case -> group, for every case of the order and every test case.
        follow_record: take an order or groups that are not given from the conversion.json or
            split.json of the source, and say so.
        hidden_folder: where test cases and hidden masks go, outside every nnU-Net folder; default
            `<parent of nnUNet_raw>/nnunet_ssl_heldout/<new name>`.
        copy: copy files instead of linking to them.
        name: NAME part of the new name; default: the source's, number of labels and draw.

    Returns:
        The new raw folder. Its split.json tells where every case came from and went.

    Raises:
        UserError: bad id, number, list, group or folder; nothing is written then.
    """
    raw_root = environment_folder("nnUNet_raw")
    if not 1 <= new_id <= 999:
        raise UserError(f"New id {new_id} is not between 1 and 999. Give another with -o.")
    raw = read_annotated(find_raw_dataset(source) if isinstance(source, int) else Path(source))
    source_folder = raw.folder
    check_id_free(new_id)

    order = read_case_list(list_file, raw) if list_file else sorted(raw.labeled)
    order_name = str(list_file) if list_file else "by name"
    record = read_record(source_folder)
    if record and follow_record:
        recorded = [case for case in record.order if case in raw.labeled]
        if recorded and not list_file:
            order, order_name = recorded, record.path.name
            print(f"Order of the cases: that of {record.path}.")
            if len(order) < len(raw.labeled):
                print(
                    f"NOTE: it lacks {len(raw.labeled) - len(order)} case(s) of imagesTr, which "
                    f"are left out. Give an order with --list to use them."
                )
        known = groups_of(raw.labeled, record)
        if groups is None and _shared(known):
            groups = known
            print(
                f"Groups (patients): those of {record.path}; numbers count the "
                f"{len(members_of(order, groups))} groups, which stay whole."
            )
            _tell_unknown(order, record)
    chosen = read_case_list(test, raw) if isinstance(test, Path) else test or 0
    rest, test_cases = take_test(order, chosen, groups)
    keep, hide = draw_labeled(rest, labeled, draw, groups)

    if name is None:
        stem = source_folder.name.split("_", 1)[-1]
        name = f"{stem}_{labeled}labeled" + (f"_draw{draw}" if draw else "")
    new_name = f"Dataset{new_id:03d}_{name}"
    target = raw_root / new_name
    if hidden_folder is None:
        hidden_folder = raw_root.resolve().parent / "nnunet_ssl_heldout" / new_name
    hidden = Path(hidden_folder).resolve()
    _check_outside(hidden)

    new_json = {k: v for k, v in raw.dataset_json.items() if k != "dataset"}
    new_json["numTraining"] = len(keep)
    unused = sorted(set(raw.labeled) - {*keep, *hide, *test_cases})
    provenance = {
        "source": source_folder.name,
        "order": order_name,
        "draw": draw,
        "heldout": str(hidden),
        "labeled": keep,
        "unlabeled": hide,
        "test": test_cases,
        "unused": unused,
    }
    if record and record.protocol:
        provenance |= {"protocol": record.protocol, "spacing_known": record.spacing_known}
    if groups:
        provenance["groups"] = {c: groups[c] for c in [*keep, *hide, *test_cases]}
    with atomic_folders(hidden, target) as (held, new):
        place_cases(raw, keep, new / "imagesTr", new / "labelsTr", copy)
        place_cases(raw, hide, new / "imagesUn", held / "hidden_labels", copy)
        place_cases(raw, test_cases, held / "test_images", held / "test_labels", copy)
        write_json(new_json, new / "dataset.json")
        write_json(provenance, new / "split.json")
        copy_case_table(source_folder, new, [*keep, *hide])
    print(
        f"{target}: {len(keep)} annotated, {len(hide)} without masks, {len(test_cases)} for "
        f"testing, {len(unused)} unused. Test cases and hidden masks: {hidden}"
    )
    if not hide:
        print("NOTE: no case is left for imagesUn; this is a data set for supervised training.")
    return target


def copy_case_table(source: Path, target: Path, cases: Sequence[str] | None = None) -> None:
    """Copy the table of values per case into another folder, if there is one.

    Args:
        source: raw folder.
        target: folder to copy to.
        cases: whose rows are copied; None copies all.

    Raises:
        UserError: the file is no UTF-8 text, or `target` not writable.
    """
    path = source / CASE_TABLE
    if path.is_file():
        reader = read_csv(path)
        text = io.StringIO()
        columns = reader.fieldnames or []
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in reader if cases is None or row.get("case") in cases)
        write_text(text.getvalue(), target / CASE_TABLE)


def read_annotated(folder: Path) -> RawDataset:
    """Read the file lists of a fully annotated data set.

    Raises:
        UserError: it holds scans without masks, or as `read_raw_dataset`.
    """
    unmasked = folder / "imagesUn"
    if unmasked.is_dir() and any(unmasked.iterdir()):
        raise UserError(
            f"{unmasked} holds scans without masks; a fully annotated data set is needed. Move "
            f"them away or split another data set."
        )
    return read_raw_dataset(folder, unlabeled=False)


def take_test(
    order: Sequence[str], test: int | Sequence[str], groups: Mapping[str, str] | None = None
) -> tuple[list[str], list[str]]:
    """Part the order into training cases and test cases.

    Args:
        order: case names.
        test: number of cases (groups) at the end of the order, or names, also of cases outside it.
        groups: case -> group, for every case of the order and every test case.

    Raises:
        UserError: number too large, a case without group, or a group on both sides.
    """
    named = [] if isinstance(test, int) else test
    members = members_of(list(dict.fromkeys([*order, *named])), groups)
    what = "groups" if groups else "cases"
    if isinstance(test, int):
        if not 0 <= test < len(members):
            raise UserError(
                f"{test} test {what} are asked for, but there are {len(members)} {what}. Give a "
                f"number from 0 to {len(members) - 1}."
            )
        last = list(members.values())[len(members) - test :]
        chosen = [case for group in last for case in group]
    else:
        chosen = list(test)
    tested = set(chosen)
    for group, cases in members.items():
        inside = [c for c in cases if c in tested]
        if inside and len(inside) < len(cases):
            other = next(c for c in cases if c not in tested)
            raise UserError(
                f"The test cases part group {group}: {inside[0]} is one, {other} is not. Take "
                f"both or none."
            )
    return [c for c in order if c not in tested], chosen


def draw_labeled(
    rest: Sequence[str], labeled: int, draw: int, groups: Mapping[str, str] | None = None
) -> tuple[list[str], list[str]]:
    """Part the training cases into those that keep their mask and those that lose it.

    Args:
        rest: training cases in order.
        labeled: cases (groups) that keep their mask, from the start of the drawn order.
        draw: 0 keeps the order, K > 0 is the seed of a shuffle.
        groups: case -> group, for every case.

    Raises:
        UserError: number too large or not above 0, negative draw, or a case without group.
    """
    if draw < 0:
        raise UserError(f"--draw {draw} is below 0. Give 0 for the order as it is, or a seed.")
    members = list(members_of(rest, groups).values())
    if draw:
        random.Random(draw).shuffle(members)
    if not 1 <= labeled <= len(members):
        raise UserError(
            f"--labeled {labeled} is not between 1 and {len(members)}, the number of "
            f"{'groups' if groups else 'cases'} that are not for testing. Give another number."
        )
    return (
        [case for group in members[:labeled] for case in group],
        [case for group in members[labeled:] for case in group],
    )


def members_of(order: Sequence[str], groups: Mapping[str, str] | None) -> dict[str, list[str]]:
    """Group -> its cases, groups in the order of their first cases; each its own without groups."""
    members: dict[str, list[str]] = {}
    for case in order:
        if groups and case not in groups:
            raise UserError(f"Case {case} has no group. Add it to the table of groups.")
        members.setdefault(groups[case] if groups else case, []).append(case)
    return members


def read_groups(path: Path) -> dict[str, str]:
    """Read a table of groups, CSV with the columns `case` and `group`.

    Raises:
        UserError: unreadable, a column missing, a case twice or without group.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"Cannot read the groups {path}: {error}. Check the path.") from error
    groups: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        case, group = ((row.get(column) or "").strip() for column in ("case", "group"))
        if not case or not group:
            raise UserError(
                f"{path}, line {number}: needs a case and its group. Write a first line "
                f"'case,group' and then one case a line."
            )
        if case in groups:
            raise UserError(f"{path}, line {number}: names {case} twice. Remove one line.")
        groups[case] = group
    if not groups:
        raise UserError(f"{path} names no case. Write 'case,group' and then one case a line.")
    return groups


@contextmanager
def atomic_folders(*targets: Path) -> Iterator[list[Path]]:
    """Yield an empty folder `.<name>.part` for each target; all take their places at the end.

    Raises:
        UserError: disk full or not writable; no target is left then.
    """
    parts = [target.with_name(f".{target.name}.part") for target in targets]
    moved: list[Path] = []
    try:
        for part in parts:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        yield parts
        for part, target in zip(parts, targets, strict=True):
            os.replace(part, target)
            moved.append(target)
    except BaseException as error:
        for folder in (*parts, *moved):
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(explain_os_error(error, error.filename or targets[-1])) from error
        raise


def check_id_free(new_id: int) -> None:
    """Raise UserError if any of nnU-Net's folders holds a data set of this id."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        root = os.environ.get(variable)
        taken = sorted(Path(root).glob(f"Dataset{new_id:03d}_*")) if root else []
        if taken:
            raise UserError(f"Id {new_id} is taken by {taken[0]}. Give another with -o.")


def _check_outside(hidden: Path) -> None:
    if hidden.exists():
        raise UserError(f"{hidden} exists already. Remove it or give another folder.")
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        root = os.environ.get(variable)
        if root and hidden.is_relative_to(Path(root).resolve()):
            raise UserError(
                f"{hidden} lies inside {variable}; masks there are not hidden. Give a folder "
                f"outside {root}."
            )


def read_case_list(path: Path, source: RawDataset) -> list[str]:
    """Read case names, one a line; empty lines and `#` comments do not count.

    Raises:
        UserError: unreadable, empty, a name twice, or a case that the data set does not hold.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the list {path}: {error}. Check the path.") from error
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise UserError(f"The list {path} names no case. Write one case per line.")
    doubled = sorted({n for n in names if names.count(n) > 1})
    if doubled:
        raise UserError(f"{path} names {', '.join(doubled[:MAX_LISTED])} twice. Remove one line.")
    absent = [n for n in names if n not in source.labeled]
    if absent:
        raise UserError(
            f"{path} names {len(absent)} case(s) that {source.folder} does not hold: "
            f"{', '.join(absent[:MAX_LISTED])}. Write names without channel number and file ending."
        )
    return names


def place_cases(
    source: RawDataset, cases: Sequence[str], images: Path, masks: Path, copy: bool = False
) -> None:
    """Link or copy images and masks of the cases under nnU-Net's names."""
    if not cases:
        return
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for target, path in _places(source, cases, images, masks).items():
        link(path, target, copy)


def _places(
    source: RawDataset, cases: Sequence[str], images: Path, masks: Path
) -> dict[Path, Path]:
    """Return where files of the cases go -> where they are."""
    ending = source.file_ending
    places: dict[Path, Path] = {}
    for case in cases:
        for channel, path in enumerate(source.labeled[case]):
            places[images / f"{case}_{channel:04d}{ending}"] = path
        places[masks / f"{case}{ending}"] = source.masks[case]
        for path, folder in ((source.labeled[case][0], images), (source.masks[case], masks)):
            spacing = path.with_name(f"{case}.json")  # beside TIFF images and masks
            if spacing.is_file():
                places[folder / spacing.name] = spacing
    return places


def place_once(raw: RawDataset, cases: Sequence[str], target: Path) -> None:
    """Link cases into `target/images` and `target/labels`; nothing happens if they are there."""
    places = _places(raw, cases, target / "images", target / "labels")
    if target.is_dir():
        there = {p for name in ("images", "labels") for p in (target / name).glob("*")}
        if there == places.keys() and all(_is_placed(*pair) for pair in places.items()):
            return
        shutil.rmtree(target)
    with atomic_folders(target) as (part,):
        place_cases(raw, cases, part / "images", part / "labels")


def _is_placed(target: Path, source: Path) -> bool:
    """Tell whether a file is a link to another one, or an unchanged copy of it."""
    if target.is_symlink():
        return target.resolve() == source.resolve()
    ours, theirs = target.stat(), source.stat()
    return (ours.st_size, ours.st_mtime_ns) == (theirs.st_size, theirs.st_mtime_ns)


def link(source: Path, target: Path, copy: bool = False) -> None:
    """Link a file to where it really is; copy it if asked to, or where links cannot be made."""
    if not copy:
        try:
            target.symlink_to(source.resolve())
            return
        except OSError:  # file systems without links
            pass
    shutil.copy2(source, target)
