"""`nnunet_ssl compare`: does it help on my data? Cross-validation of trainers and their twins."""

import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_ssl.data.unlabeled import read_manifest
from nnunet_ssl.errors import UserError
from nnunet_ssl.estimate import measure_elsewhere
from nnunet_ssl.evaluation.cells import (
    NOT_TOLD,
    Cell,
    Place,
    parts_of,
    pretraining_task,
    twin_of,
    with_twins,
)
from nnunet_ssl.evaluation.runner import (
    LocalLauncher,
    check_folder,
    duration,
    environment,
    has_device,
    locked,
    print_table,
    run_cells,
    warn_of_shared_cores,
    write_task,
)
from nnunet_ssl.evaluation.tasks import TASK, read_state
from nnunet_ssl.io import environment_folder
from nnunet_ssl.naming import resolve
from nnunet_ssl.planning.api import read_plans
from nnunet_ssl.planning.raw import RawDataset, read_raw_dataset
from nnunet_ssl.planning.splits import (
    Record,
    Splits,
    ensure_splits,
    groups_of,
    place_once,
    read_record,
)

FORMAT = 1
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def compare(
    dataset_id: int,
    configuration: str,
    trainers: Sequence[str],
    folder: Path,
    *,
    plans: str,
    device: str,
    workers: int,
    ask: bool,
) -> int:
    """Cross-validate trainers and their supervised twins on the annotated cases of a data set.

    Trains in the user's own nnU-Net folders; each fold's validation, by nnU-Net with the final
    checkpoint, is scored against labelsTr. Writes runs.json, results.csv and report.html into
    `folder`. Trainings that are finished are not run again, those begun go on.

    Args:
        dataset_id: planned and preprocessed with its scans without masks.
        configuration: "2d", "3d_fullres" or "3d_lowres".
        trainers: names for `-tr`.
        folder: made, or that of an earlier call.
        plans: plans identifier.
        device: "cuda", "cpu" or "mps".
        workers: trainings at a time.
        ask: ask before a start, after the estimate of time.

    Returns:
        0, or 1 if a training failed.

    Raises:
        UserError: nothing to validate on, not planned, folds that part a group of cases, or an
            unknown trainer; before anything runs.
    """
    if workers < 1:
        raise UserError(f"--workers is {workers}; give 1 or more.")
    folder = Path(folder).resolve()
    raw = read_raw_dataset(dataset_id)
    folders = {name: environment_folder(name) for name in FOLDERS}
    base = folders["nnUNet_preprocessed"] / raw.folder.name
    record = read_record(raw.folder)
    check_ready(raw, record)
    pool = pool_of(base, configuration, plans)
    units = "voxel" if record and not record.spacing_known else "mm"
    if not has_device(device):
        raise UserError("-device cuda (the default): no CUDA GPU found here. Add: -device cpu")
    splits = ensure_splits(raw.folder, base, list(raw.labeled), for_scores=True)
    cells = expand(trainers, splits, len(raw.labeled))
    plan = {
        folder / "cells" / cell.id: cell_task(
            cell, raw, splits, configuration, plans, device, folder, folders, workers, pool, units
        )
        for cell in cells
    }
    check_folder(folder, plan)
    for place, task in plan.items():
        check_trainings(place, task, base, raw.file_ending)
    warn_of_shared_cores(workers, device)
    print_table(folder, cells, cells)
    left = [c for c in cells if "train" not in stages_done(folder / "cells" / c.id)]
    if left:
        tell_time(left, len(splits), dataset_id, configuration, plans, device, workers)
    if ask and left:
        confirm()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        for place, task in plan.items():
            write_task(place, task)
        for number, fold in enumerate(splits):
            place_once(raw, fold["val"], folder / "folds" / str(number))
        command = ["nnunet_ssl", "compare", "-d", str(dataset_id), "-c", configuration]
        command += ["-tr", *trainers, "-p", plans, "-device", device, "-o", folder.name]
        head = describe(raw, record, configuration, shlex.join(command))
        failed = run_cells(folder, head, list(plan), dict.fromkeys(plan), LocalLauncher(workers))
        from nnunet_ssl.evaluation.report import write_report

        write_report(folder, folder / "report.html")
    print(f"Report: {folder / 'report.html'}")
    return int(failed)


def check_ready(raw: RawDataset, record: Record | None) -> None:
    """Raise UserError unless there is something to validate on."""
    if len(raw.labeled) < 2:
        raise UserError(
            f"{raw.folder} has 1 annotated case, so nothing is left to validate on. Annotate at "
            f"least one more scan; five or more make the answer worth more."
        )
    groups = set(groups_of(raw.labeled, record).values())
    if record and len(groups) < 2:
        raise UserError(
            f"{record.path} counts all {len(raw.labeled)} annotated cases as one group (patient), "
            f"{groups.pop()}, so nothing is left to validate on. Annotate a scan of another one."
        )


def pool_of(base: Path, configuration: str, plans: str) -> str:
    """Return a hash of the unlabelled scans.

    Raises:
        UserError: not preprocessed.
    """
    manifest = read_manifest(base, read_plans(base, plans, configuration), configuration)
    pool = json.dumps(manifest["cases"], sort_keys=True)
    return hashlib.sha256(pool.encode()).hexdigest()[:12]


def check_trainings(place: Path, task: Mapping[str, Any], base: Path, file_ending: str) -> None:
    """Check that trainings which are there already are of these plans, data and folds.

    Those that this folder began have their cases in its task; others show them by what they
    validated on.

    Args:
        place: of the cell.
        task: of the cell.
        base: preprocessed folder of the data set.
        file_ending: of masks.

    Raises:
        UserError: names the folder of a training that cannot count.
    """
    definition = task["definition"]
    files = {"plans.json": f"{definition['plans']}.json", "dataset.json": "dataset.json"}
    for stage in filter(None, (task["train"]["pretrain"], task["train"])):
        model = Path(stage["model"])
        if not any(model.glob("checkpoint_*.pth")):
            continue
        other = [name for name in files if _json(model.parent / name) != _json(base / files[name])]
        if not other and not (place / TASK).is_file():
            validated = {p.name for p in (model / "validation").glob(f"*{file_ending}")}
            if validated != {f"{case}{file_ending}" for case in definition["validation cases"]}:
                other = ["validation cases"]
        if other:
            raise UserError(
                f"{model} holds a training with other {' and '.join(other)} than fold "
                f"{model.name.removeprefix('fold_')} has now, or one that was begun elsewhere, "
                f"whose cases cannot be told before its validation. Move it away, or train under "
                f"another name: -tr {definition['trainer']}+seed=2"
            )


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def expand(trainers: Sequence[str], splits: Splits, annotated: int) -> list[Cell]:
    """Return a cell for each fold, trainer and twin."""
    settings = [parts_of(trainer)[1].items() for trainer in trainers]
    common = dict(i for i in settings[0] if all(i in other for other in settings))
    known = [resolve(twin_of(trainer)[0]).settings() for trainer in trainers]  # type: ignore
    common = {k: v for k, v in common.items() if all(k in twin for twin in known)}
    cells: list[Cell] = []
    for number in range(len(splits)):
        place = Place(f"fold{number}", annotated, str(annotated), fold=str(number))
        twins, methods = with_twins(trainers, common, place)
        cells += twins + methods
    return cells


def cell_task(
    cell: Cell,
    raw: RawDataset,
    splits: Splits,
    configuration: str,
    plans: str,
    device: str,
    folder: Path,
    folders: Mapping[str, Path],
    workers: int,
    pool: str,
    units: str,
) -> dict[str, Any]:
    """Train one fold, score its validation; `pool` tells the unlabelled scans apart."""
    name = raw.folder.name
    model = folders["nnUNet_results"] / name / f"{cell.trainer}__{plans}__{configuration}"
    fold = splits[int(cell.fold)]
    train = ["nnUNetv2_train", str(int(name[7:10])), configuration, cell.fold]
    train += ["-tr", cell.trainer, "-p", plans, "-device", device]
    return {
        "definition": {
            "dataset": name,
            "configuration": configuration,
            "plans": plans,
            "trainer": cell.trainer,
            "training cases": sorted(fold["train"]),
            "validation cases": sorted(fold["val"]),
            "scans in imagesUn (hash)": pool if cell.role == "method" else None,
        },
        "environment": environment(folders, workers),
        "row": {k: v for k, v in vars(cell).items() if k not in NOT_TOLD},
        "train": {
            "command": train,
            "model": str(model / f"fold_{cell.fold}"),
            "pretrain": pretraining_task(cell, train, model / f"fold_{cell.fold}"),
            "epochs": cell.epochs,
            "configuration": configuration,
            "device": device,
        },
        "evaluate": {
            "ground_truth": str(folder / "folds" / cell.fold / "labels"),
            "predictions": str(model / f"fold_{cell.fold}" / "validation"),
            "dataset_json": str(raw.folder / "dataset.json"),
            "units": units,
            "tolerance": 1.0,
        },
    }


def stages_done(place: Path) -> set[str]:
    """Stages of a cell that are done."""
    return set(read_state(place)["stages"]) if (place / TASK).is_file() else set()


def tell_time(
    cells: Sequence[Cell],
    folds: int,
    dataset_id: int,
    configuration: str,
    plans: str,
    device: str,
    workers: int,
) -> None:
    """Measure a step and print how long the trainings take; what goes wrong is told, too."""
    trained = [n for cell in cells for n in (cell.pretraining, cell.trainer) if n]
    names = list(dict.fromkeys(trained))
    print(f"\n{folds} folds, {len(cells)} trainings to run. Measuring a training step ...")
    try:
        told = measure_elsewhere(str(dataset_id), configuration, plans, names, device)
    except UserError as error:
        print(f"no estimate: {error}")
        return
    for name in names:
        print(f"  {name}: {told[name][1]}")
    total = sum(told[name][0] for name in trained)
    shared = f", if {workers} at a time do not slow each other" if workers > 1 else ""
    print(f"In all about {duration(total / workers)}, validation not counted{shared}.", flush=True)


def confirm() -> None:
    """Ask whether to start.

    Raises:
        UserError: no, or nobody is there to answer.
    """
    if not sys.stdin.isatty():
        raise UserError("Nobody is there to be asked whether to start. Add --yes.")
    if input("Start? [y/n] ").strip().lower() not in ("y", "yes"):
        raise UserError(
            "Not started. Fewer trainers or epochs (-tr NAME+num_epochs=100) are faster."
        )


def describe(
    raw: RawDataset, record: Record | None, configuration: str, command: str
) -> dict[str, Any]:
    """Return what runs.json says beside the cells."""
    labels = raw.dataset_json["labels"]
    return {
        "format": FORMAT,
        "name": f"compare_{raw.folder.name}_{configuration}",
        "about": f"Cross-validation on {len(raw.labeled)} annotated scans of {raw.folder.name}.",
        "protocol": record.protocol if record else "",
        "dataset": raw.folder.name,
        "configuration": configuration,
        "command": command,
        "labels": {k: v for k, v in labels.items() if k not in ("background", "ignore")},
        "test": {
            "images": str(raw.folder / "imagesTr"),
            "labels": str(raw.folder / "labelsTr"),
        },
        "units": "folds",
        "budget_unit": "case",
    }
