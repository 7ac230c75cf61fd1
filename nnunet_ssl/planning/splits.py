"""Cross-validation splits for few annotated cases, and data sets with few annotated cases."""

import json
import os
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_ssl.errors import UserError
from nnunet_ssl.io import explain_os_error, write_json
from nnunet_ssl.planning.raw import (
    MAX_LISTED,
    RawDataset,
    environment_folder,
    find_raw_dataset,
    read_raw_dataset,
)

SPLITS_FILE = "splits_final.json"
Splits = list[dict[str, list[str]]]


def make_splits(labeled: Iterable[str]) -> Splits:
    """Split annotated cases into folds.

    Args:
        labeled: names of the annotated cases, at least one.

    Returns:
        From 5 cases on nnU-Net's own five folds; 2-4 cases: one fold per case, which validates on
        it; 1 case: one fold that trains and validates on it.
    """
    names = sorted(labeled)
    if len(names) >= 5:
        splits = generate_crossval_split(names, seed=12345, n_splits=5)
        return [{k: [str(c) for c in fold[k]] for k in ("train", "val")} for fold in splits]
    if len(names) == 1:
        return [{"train": names, "val": names}]
    return [{"train": [c for c in names if c != val], "val": [val]} for val in names]


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


def ensure_splits(raw_folder: Path, preprocessed_folder: Path, labeled: Sequence[str]) -> Splits:
    """Keep valid splits, make missing ones, and write them into both folders.

    nnU-Net's planner copies the raw file into the preprocessed folder, and its trainer crashes on
    fewer than five cases where there is none. A raw folder that cannot be written to is left out.

    Raises:
        UserError: as `read_splits`; preprocessed folder not writable.
    """
    splits = read_splits(raw_folder, preprocessed_folder, labeled)
    if splits is None:
        splits = make_splits(labeled)
        if len(labeled) == 1:
            print(f"One annotated case ({labeled[0]}): fold 0 validates on its training case.")
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
    return splits


def _parse_splits(path: Path) -> Splits:
    try:
        splits = json.loads(path.read_text())
        return [{k: [str(c) for c in fold[k]] for k in ("train", "val")} for fold in splits]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a list of folds with 'train' and 'val'. Correct or delete it."
        ) from error


def _as_sets(fold: Mapping[str, list[str]]) -> tuple[set[str], set[str]]:
    return set(fold["train"]), set(fold["val"])


def split_dataset(
    dataset_id: int,
    new_id: int,
    *,
    labeled: int,
    draw: int | None = None,
    list_file: Path | None = None,
    test: int | Path | None = None,
    hidden_folder: Path | None = None,
    copy: bool = False,
    name: str | None = None,
) -> Path:
    """Make a data set with few masks from a fully annotated one.

    The order of the cases is that of `list_file`, else by name. Test cases leave it first; a draw
    then shuffles the rest, so that all draws share their test cases. The first `labeled` cases
    keep their masks, the images of the others go to imagesUn. Cases that a list does not name are
    left out.

    Args:
        dataset_id: fully annotated data set.
        new_id: free id, 1-999.
        labeled: cases that keep their mask.
        draw: seed of the shuffle; None keeps the order.
        list_file: one case per line; empty lines and `#` comments do not count.
        test: test cases, as a number (the last ones of the order) or a file like `list_file`.
        hidden_folder: where test cases and hidden masks go, outside every nnU-Net folder; default
            `<parent of nnUNet_raw>/nnunet_ssl_heldout/<new name>`.
        copy: copy files instead of linking to them.
        name: replaces the NAME part of the source in the new name.

    Returns:
        The new raw folder. Its split.json tells where every case came from and went.

    Raises:
        UserError: bad id, number, list or folder; nothing is written then.
    """
    raw_root = environment_folder("nnUNet_raw")
    if not 1 <= new_id <= 999:
        raise UserError(f"New id {new_id} is not between 1 and 999. Give another with -o.")
    source_folder = find_raw_dataset(dataset_id)
    unmasked = source_folder / "imagesUn"
    if unmasked.is_dir() and any(unmasked.iterdir()):
        raise UserError(
            f"{unmasked} holds scans without masks; a fully annotated data set is needed. Move "
            f"them away or split another data set."
        )
    source = read_raw_dataset(source_folder, unlabeled=False)
    _check_id_free(new_id)

    order = _read_names(list_file, source) if list_file else sorted(source.labeled)
    if isinstance(test, int):
        if not 0 <= test < len(order):
            raise UserError(
                f"--test {test} is not between 0 and {len(order) - 1}; there are {len(order)} "
                f"cases. Give another number."
            )
        test_cases = order[len(order) - test :]
    else:
        test_cases = _read_names(test, source) if test else []
    rest = [case for case in order if case not in set(test_cases)]
    if draw is not None:
        random.Random(draw).shuffle(rest)
    if not 1 <= labeled <= len(rest):
        raise UserError(
            f"--labeled {labeled} is not between 1 and {len(rest)}: of {len(order)} cases, "
            f"{len(order) - len(rest)} are for testing. Give another number."
        )
    keep, hide = rest[:labeled], rest[labeled:]

    stem = name or source_folder.name.split("_", 1)[1]
    drawn = "" if draw is None else f"_draw{draw}"
    new_name = f"Dataset{new_id:03d}_{stem}_{labeled}labeled{drawn}"
    target = raw_root / new_name
    if hidden_folder is None:
        hidden_folder = raw_root.resolve().parent / "nnunet_ssl_heldout" / new_name
    hidden = Path(hidden_folder).resolve()
    _check_outside(hidden)

    new_json = {k: v for k, v in source.dataset_json.items() if k != "dataset"}
    new_json["numTraining"] = len(keep)
    unused = sorted(set(source.labeled) - {*keep, *hide, *test_cases})
    provenance = {
        "source": source_folder.name,
        "order": str(list_file) if list_file else "by name",
        "draw": draw,
        "heldout": str(hidden),
        "labeled": keep,
        "unlabeled": hide,
        "test": test_cases,
        "unused": unused,
    }
    parts = [f.with_name(f".{f.name}.part") for f in (target, hidden)]
    try:
        for part in parts:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        new, held = parts
        _place(source, keep, new / "imagesTr", new / "labelsTr", copy)
        _place(source, hide, new / "imagesUn", held / "hidden_labels", copy)
        _place(source, test_cases, held / "test_images", held / "test_labels", copy)
        write_json(new_json, new / "dataset.json")
        write_json(provenance, new / "split.json")
        os.replace(held, hidden)
        os.replace(new, target)
    except BaseException as error:
        for folder in parts if target.exists() else [*parts, hidden]:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(explain_os_error(error, error.filename or target)) from error
        raise
    print(
        f"{target}: {len(keep)} annotated, {len(hide)} without masks, {len(test_cases)} for "
        f"testing, {len(unused)} unused. Test cases and hidden masks: {hidden}"
    )
    if not hide:
        print("NOTE: no case is left for imagesUn; this is a data set for supervised training.")
    return target


def _check_id_free(new_id: int) -> None:
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


def _read_names(path: Path, source: RawDataset) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
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


def _place(source: RawDataset, cases: Sequence[str], images: Path, masks: Path, copy: bool) -> None:
    """Link or copy images and masks of the cases under nnU-Net's names."""
    if not cases:
        return
    ending = source.file_ending
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        for channel, path in enumerate(source.labeled[case]):
            _link(path, images / f"{case}_{channel:04d}{ending}", copy)
        _link(source.masks[case], masks / f"{case}{ending}", copy)
        for path, folder in ((source.labeled[case][0], images), (source.masks[case], masks)):
            spacing = path.with_name(f"{case}.json")  # beside TIFF images and masks
            if spacing.is_file():
                _link(spacing, folder / spacing.name, copy)


def _link(source: Path, target: Path, copy: bool) -> None:
    if not copy:
        try:
            target.symlink_to(source.resolve())
            return
        except OSError:  # file systems without links
            pass
    shutil.copy2(source, target)
