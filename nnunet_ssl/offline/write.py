"""The data set of a round: annotated cases, pseudo-labels, and what stays without masks.

An ordinary nnU-Net data set. Plans and fingerprint are the teacher's: a fingerprint of this data
set would count voxels with the ignore label as foreground.
"""

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.loader import CASE_TABLE, read_csv
from nnunet_ssl.data.pseudo_labels import PSEUDO_LABELS, pseudo_labeled
from nnunet_ssl.data.unlabeled import unlabeled_folder
from nnunet_ssl.errors import UserError
from nnunet_ssl.io import explain_os_error, write_json, write_text
from nnunet_ssl.offline.predict import TARGETS
from nnunet_ssl.planning.preprocessing import (
    CASE_FILES,
    preprocess_labeled,
    preprocess_unlabeled,
)
from nnunet_ssl.planning.raw import CaseInfo, RawDataset, read_raw_dataset
from nnunet_ssl.planning.splits import (
    SPLITS_FILE,
    Splits,
    atomic_folders,
    link,
    place_cases,
)
from nnunet_ssl.planning.workers import Workers

FORMAT = 1


@dataclass(frozen=True)
class Chosen:
    """The pseudo-labels for one fold, or for fold "all".

    Attributes:
        fold: number, or "all".
        labels: folder with masks and targets.
        rows: scores by case.
        reasons: why a case has no mask in the new data set; None if it has.
    """

    fold: str
    labels: Path
    rows: Mapping[str, Mapping[str, Any]]
    reasons: Mapping[str, str | None]

    def name(self, case: str) -> str:
        """Return what a case is called: folds have pseudo-labels of their own, so own names."""
        return case if self.fold == "all" else f"{case}_fold{self.fold}"

    @property
    def kept(self) -> list[str]:
        """Cases that get their pseudo-label."""
        return [case for case, reason in self.reasons.items() if reason is None]


def new_dataset_json(source: Mapping[str, Any], cases: int) -> dict[str, Any]:
    """Return dataset.json with nnU-Net's ignore label, the highest label + 1 where it is new."""
    labels = dict(source["labels"])
    if "ignore" not in labels:
        values = [v if isinstance(v, list | tuple) else [v] for v in labels.values()]
        labels["ignore"] = max(int(i) for some in values for i in some) + 1
    kept = {k: v for k, v in source.items() if k != "dataset"}
    return {**kept, "labels": labels, "numTraining": cases}


def write_dataset(
    raw: RawDataset, target: Path, splits: Splits, chosen: Sequence[Chosen], about: Mapping
) -> None:
    """Write the raw data set; it appears when it is whole.

    Images are links. A case that some fold does not keep stays in imagesUn, unless it cannot be
    read.

    Args:
        raw: the data set that the round started from.
        target: new folder below nnUNet_raw.
        splits: of the annotated cases.
        chosen: pseudo-labels, of fold "all" or of each fold.
        about: what pseudo_labels.json says beside the cases.

    Raises:
        UserError: a name that is taken, or the disk is full; nothing is written then.
    """
    names = {one.name(case): (one, case) for one in chosen for case in one.kept}
    for name in sorted(names.keys() & raw.labeled.keys()):
        raise UserError(f"Case {name} is in {raw.folder / 'imagesTr'} already. Rename it there.")
    ending = raw.file_ending
    rest = sorted(
        {
            case
            for one in chosen
            for case, reason in one.reasons.items()
            if reason is not None and "error" not in one.rows[case]
        }
    )
    with atomic_folders(target) as (new,):
        place_cases(raw, list(raw.labeled), new / "imagesTr", new / "labelsTr")
        (new / "imagesUn").mkdir()
        for name, (one, case) in names.items():
            link_images(raw.unlabeled[case], name, new / "imagesTr", ending)
            mask = one.labels / TARGETS / f"{case}{ending}"
            shutil.copyfile(mask, new / "labelsTr" / f"{name}{ending}")
            if (spacing := mask.with_name(f"{case}.json")).is_file():  # beside TIFF masks
                shutil.copyfile(spacing, new / "labelsTr" / f"{name}.json")
        for case in rest:
            link_images(raw.unlabeled[case], case, new / "imagesUn", ending)
        write_json(
            new_dataset_json(raw.dataset_json, len(raw.labeled) + len(names)), new / "dataset.json"
        )
        write_json(new_splits(splits, chosen), new / SPLITS_FILE)
        copy_rows(raw.folder, new, {name: case for name, (_, case) in names.items()})
        write_json({**about, "format": FORMAT, "cases": table(raw, chosen)}, new / PSEUDO_LABELS)


def link_images(images: Sequence[Path], name: str, folder: Path, ending: str) -> None:
    """Link the channels of a case, with what lies beside TIFF images."""
    for channel, path in enumerate(images):
        link(path, folder / f"{name}_{channel:04d}{ending}")
    case = images[0].name.removesuffix(f"_0000{ending}")
    if (spacing := images[0].with_name(f"{case}.json")).is_file():
        link(spacing, folder / f"{name}.json")


def new_splits(splits: Splits, chosen: Sequence[Chosen]) -> Splits:
    """Add to each fold's training cases the pseudo-labels that its own model made.

    Those for fold "all" come into no fold: their maker saw every fold's validation cases.
    """
    own = {one.fold: sorted(map(one.name, one.kept)) for one in chosen}
    return [
        {"train": [*fold["train"], *own.get(str(number), [])], "val": list(fold["val"])}
        for number, fold in enumerate(splits)
    ]


def copy_rows(source: Path, target: Path, names: Mapping[str, str]) -> None:
    """Copy the table of values per case; pseudo-labelled cases get the rows of their scans."""
    path = source / CASE_TABLE
    if not path.is_file():
        return
    reader = read_csv(path)
    text = io.StringIO()
    writer = csv.DictWriter(text, reader.fieldnames or [], extrasaction="ignore")
    writer.writeheader()
    for row in reader:
        writer.writerow(row)
        writer.writerows(
            {**row, "case": name} for name, case in names.items() if case == row.get("case") != name
        )
    write_text(text.getvalue(), target / CASE_TABLE)


def table(raw: RawDataset, chosen: Sequence[Chosen]) -> dict[str, dict[str, Any]]:
    """Return the cases of pseudo_labels.json: source, scores, kept or not and why."""
    told = ("stability", "classes", "voxels", "unsure", "unsure_voxels", "foreground_voxels")
    return {
        one.name(case): {
            "source": str(raw.unlabeled[case][0]),
            "fold": one.fold,
            "kept": reason is None,
            "why": reason,
            **{key: one.rows[case][key] for key in told if key in one.rows[case]},
        }
        for one in chosen
        for case, reason in one.reasons.items()
    }


def preprocess(
    target: Path,
    source_base: Path,
    model: Path,
    configuration: str,
    infos: Mapping[str, CaseInfo],
    processes: int,
) -> Path:
    """Preprocess the new data set with the plans of the teacher.

    Args:
        target: its raw folder.
        source_base: preprocessed folder of the data set that the round started from; scans without
            masks are taken from there.
        model: of the teacher, with plans.json and dataset_fingerprint.json.
        configuration: the teacher's.
        infos: what is known of the scans without masks.
        processes: cases at once.

    Returns:
        The new preprocessed folder.

    Raises:
        UserError: disk full or a worker died; the same call goes on.
    """
    raw = read_raw_dataset(target)
    base = source_base.parent / target.name
    plans = json.loads((model / "plans.json").read_text(encoding="utf-8"))
    plans["dataset_name"] = target.name
    try:
        base.mkdir(exist_ok=True)
        shutil.copyfile(model / "dataset_fingerprint.json", base / "dataset_fingerprint.json")
        for name in ("dataset.json", SPLITS_FILE, PSEUDO_LABELS, CASE_TABLE):
            if (target / name).is_file():
                shutil.copyfile(target / name, base / name)
        link_preprocessed(source_base, base, plans, configuration, raw.unlabeled)
    except OSError as error:
        raise UserError(explain_os_error(error, base)) from error
    known = {case: infos[case] for case in raw.unlabeled}
    with Workers(processes) as workers:
        looks = preprocess_labeled(raw, base, plans, configuration, workers)
        made = pseudo_labeled(base)
        annotated = [
            look for case, look in zip(raw.labeled, looks, strict=True) if case not in made
        ]
        preprocess_unlabeled(raw, known, base, plans, configuration, workers, annotated)
    write_json(plans, base / f"{plans['plans_name']}.json")  # last: who has plans is ready
    return base


def link_preprocessed(
    source: Path, base: Path, plans: Mapping[str, Any], configuration: str, cases: Iterable[str]
) -> None:
    """Give the new data set the preprocessed scans that stay without masks, without a copy."""
    identifier = PlansManager(dict(plans)).get_configuration(configuration).data_identifier
    old, new = unlabeled_folder(source, identifier), unlabeled_folder(base, identifier)
    new.mkdir(exist_ok=True)
    for case in cases:
        for name in (f"{case}{ending}" for ending in CASE_FILES):
            if (old / name).is_file() and not (new / name).exists():
                try:
                    os.link(old / name, new / name)
                except OSError:  # another disk, or a file system without links
                    shutil.copyfile(old / name, new / name)
