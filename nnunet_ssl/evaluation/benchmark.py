"""`nnunet_ssl benchmark`: a spec's cells, each split, planned, trained, predicted and evaluated."""

import json
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation import evaluate
from nnunet_ssl.evaluation.cells import (
    NOT_TOLD,
    STOCK,
    STOCK_EPOCHS,
    STOCK_ITERATIONS,
    Cell,
    chosen,
    expand,
    pretraining_task,
)
from nnunet_ssl.evaluation.runner import (
    Launcher,
    LocalLauncher,
    SubmititLauncher,
    check_folder,
    environment,
    has_device,
    locked,
    print_table,
    run_cells,
    short,
    warn_of_shared_cores,
    write_task,
)
from nnunet_ssl.evaluation.spec import PSEUDO_LABELS_AT, Spec, count, read_spec
from nnunet_ssl.evaluation.tasks import (
    CHECKPOINTS,
    TASK,
    read_state,
    read_task,
    result_folders,
)
from nnunet_ssl.io import write_json, write_text
from nnunet_ssl.planning.api import plans_name_of
from nnunet_ssl.planning.raw import RawDataset, inspect_case, list_cases
from nnunet_ssl.planning.splits import (
    Record,
    draw_labeled,
    members_of,
    place_once,
    read_annotated,
    read_case_list,
    read_groups,
    read_record,
    take_test,
)
from nnunet_ssl.planning.workers import Workers, processes_for

FORMAT = 1
SMALL_PLANS = "nnUNetSmallPlans"
CHECKED = "hashes.json"  # files that were read -> hash of an image, or that a mask fits


@dataclass(frozen=True)
class Data:
    """The fully annotated source of a benchmark, parted into training and test cases.

    Attributes:
        raw: the source.
        training: cases in order.
        test: case -> image files.
        groups: case -> group, or None.
        test_images: folder; None: to be made from cases of the source.
        test_labels: folder; None likewise.
    """

    raw: RawDataset
    training: list[str]
    test: dict[str, list[Path]]
    groups: dict[str, str] | None
    test_images: Path | None
    test_labels: Path | None

    def count(self) -> int:
        """Training cases, or groups of them."""
        return len(members_of(self.training, self.groups))


def run_benchmark(
    spec: Path,
    folder: Path,
    *,
    workers: int = 1,
    launcher: str = "local",
    only: Sequence[str] | None = None,
    dry_run: bool = False,
) -> int:
    """Run what a spec asks for and is not there yet.

    Writes runs.json and results.csv into `folder`, and beside them the folders of nnU-Net, of the
    test cases and of each cell.

    Args:
        spec: YAML file, see docs/benchmark.md.
        folder: made, or that of an earlier run of the same spec.
        workers: cells at a time on this machine.
        launcher: "local", or "slurm" for a job per cell.
        only: words; cells whose id contains one of them.
        dry_run: print the cells, run and write nothing.

    Returns:
        0, or 1 if a cell failed.

    Raises:
        UserError: the spec, the data or the folder do not fit; before anything runs.
    """
    if workers < 1:
        raise UserError(f"--workers is {workers}; give 1 or more.")
    checked, folder = read_spec(spec), Path(folder).resolve()
    data = read_data(checked)
    cells = expand(checked, data.count())
    wanted = chosen(cells, only)
    plan = build_tasks(checked, data, cells, folder, workers)
    check_folder(folder, plan)
    check_checkpoints(plan)
    print_table(folder, cells, wanted)
    if dry_run:
        return 0
    if launcher == "local" and not has_device(checked.device):
        raise checked.error("device", f"{checked.device}, but none is found here. Set cpu.")
    if launcher == "local":
        warn_of_shared_cores(workers, checked.device)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        where: Launcher = (
            SubmititLauncher(folder / "submitit", checked.device)
            if launcher == "slurm"
            else LocalLauncher(workers)
        )
        check_images(data, folder)
        write_text(checked.text, folder / "spec.yaml")
        if not data.test_images:
            place_once(data.raw, list(data.test), folder / "test")
        for task_folder, task in plan.items():
            renew_if_changed(task_folder, task)
            write_task(task_folder, task)
            hidden = task["split"]["unlabeled"][: checked.pseudo_labels] if "split" in task else []
            if hidden:
                place_once(data.raw, hidden, folder / "pseudo_labels" / task_folder.name)
        failed = run_cells(
            folder,
            describe(checked, data, folder),
            [folder / "cells" / cell.id for cell in cells],
            order_tasks(folder, wanted, plan),
            where,
        )
    if not failed:
        print(f"Next: nnunet_ssl report {shlex.quote(str(folder))} -o report.html")
    return int(failed)


# --- the data -----------------------------------------------------------------------------------


def read_data(spec: Spec) -> Data:
    """Find source, order, groups and test cases of a spec; at most one mask is opened.

    Raises:
        UserError: names the spec's line and key, or the file.
    """
    source = find_source(spec)
    raw = read_annotated(source)
    record = read_record(source)
    if record and record.protocol and record.protocol != spec.protocol:
        raise spec.error(
            "protocol",
            f"is {spec.protocol}, but {source} was converted as {record.protocol}. Correct "
            f"one of them; the two are never mixed.",
        )
    if record and not record.spacing_known and spec.units != "voxel":
        raise spec.error(
            "evaluate",
            f"distances in mm, but {source} was converted from files without spacing. Write "
            f"evaluate: {{units: voxel}}.",
        )
    if spec.circumference:
        check_heads(spec, raw)
    order = (
        read_case_list(spec.order, raw)
        if spec.order
        else list((record and record.order) or sorted(raw.labeled))
    )
    absent = [case for case in order if case not in raw.labeled]
    if absent:
        raise UserError(
            f"{source / 'conversion.json'} orders {absent[0]}, which is not in imagesTr. Convert "
            f"the data set again, without --labeled."
        )
    groups = read_groups(spec.groups) if spec.groups else (record and record.groups) or None
    images = labels = None
    training, names = take_test(order, 0, groups)
    try:
        if spec.test.last is not None:
            number = count(spec.test.last, len(members_of(order, groups)))
            training, names = take_test(order, number, groups)
        elif spec.test.names is not None:
            training, names = take_test(order, read_case_list(spec.test.names, raw), groups)
        else:
            images, labels = held_out_folders(spec, source, record)
    except UserError as error:
        raise spec.error("test", str(error)) from error
    if images and labels:
        channels = len(next(iter(raw.labeled.values())))
        test = list_cases(images, raw.file_ending, channels)
        for case in test:
            if not (labels / f"{case}{raw.file_ending}").is_file():
                raise UserError(f"{labels / (case + raw.file_ending)} is missing. Add the mask.")
        for mask in labels.glob(f"*{raw.file_ending}"):
            case = mask.name.removesuffix(raw.file_ending)
            if case not in test and not case.startswith("."):
                raise UserError(f"{mask} has no image in {images}. Add it, or move the mask away.")
    else:
        test = {case: raw.labeled[case] for case in names}
    data = Data(raw, training, test, groups, images, labels)
    budgets = [count(amount, data.count()) for amount in spec.labeled]
    for budget in budgets:
        if budgets.count(budget) > 1:
            raise spec.error("labeled", f"names {budget} twice, as number or share. Remove one.")
        if budget >= data.count():
            raise spec.error(
                "labeled",
                f"{budget} leaves nothing unlabelled: {data.count()} "
                f"{'groups' if groups else 'cases'} are for training. Give fewer.",
            )
    return data


def check_heads(spec: Spec, raw: RawDataset) -> None:
    """Raise UserError unless the classes exist whose circumference is wanted, and are 2D."""
    key = "evaluate.circumference"
    known = [name for name in raw.dataset_json["labels"] if name not in ("background", "ignore")]
    unknown = [name for name in spec.circumference if name not in known]
    if unknown:
        raise spec.error(key, f"{unknown[0]} is no class. There are: {', '.join(known)}.")
    mask, _ = raw.reader_writer()().read_seg(str(next(iter(raw.masks.values()))))
    if sum(size > 1 for size in mask.shape) > 2:
        raise spec.error(key, f"is for 2D images, but {raw.folder} is 3D. Leave it out.")


def find_source(spec: Spec) -> Path:
    """Return the folder of the source: a path, seen from the spec, or a name below nnUNet_raw."""
    below = os.environ.get("nnUNet_raw")
    places = [spec.file.parent / spec.source, *([Path(below) / spec.source] if below else [])]
    for place in places:
        if (place / "dataset.json").is_file():
            return place.resolve()
    raise spec.error(
        "dataset.source",
        f"no dataset.json in {' or '.join(map(str, places))}. Convert the data set (the spec's "
        f"comment tells the command), or set nnUNet_raw to the folder that holds it.",
    )


def held_out_folders(spec: Spec, source: Path, record: Record | None) -> tuple[Path, Path]:
    """Return folders with images and masks of test cases that are not in the source."""
    if spec.test.folders:
        return spec.test.folders
    part = spec.test.part
    if record is None or record.heldout is None:
        raise UserError(
            f"{source} has no conversion.json, which tells where its {part} cases are. Make it "
            f"with nnunet_ssl convert, or use last, list, or images and labels."
        )
    images, labels = (record.heldout / f"{part}_{kind}" for kind in ("images", "labels"))
    if not images.is_dir():
        raise UserError(f"{images} does not exist. Convert the data set again.")
    return images, labels


def check_images(data: Data, folder: Path) -> None:
    """Compare the content of all images, and test masks with their images.

    What was read is noted for the next start.

    Raises:
        UserError: a test image is also a training image, a file cannot be read, or the evaluation
            would refuse test masks.
    """
    path = folder / CHECKED
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    paths = {case: data.raw.labeled[case] for case in data.training}
    sides = [paths, data.test]
    keys = [{case: _stamp(files) for case, files in side.items()} for side in sides]
    missing = {
        key: side[case]
        for side, stamps in zip(sides, keys, strict=True)
        for case, key in stamps.items()
        if key not in known
    }
    masks, dataset_json = test_masks(data), data.raw.folder / "dataset.json"
    pairs = {c: _stamp([*files, masks[c], dataset_json]) for c, files in data.test.items()}
    unchecked = {case: data.test[case][0] for case, key in pairs.items() if key not in known}
    with Workers(processes_for(len(missing) + len(unchecked))) as workers:
        if missing:
            reader = data.raw.reader_writer()
            jobs = [(files, reader, data.raw.num_channels) for files in missing.values()]
            infos = workers.map(inspect_case, jobs, "Comparing test and training images")
            known |= {key: info.content for key, info in zip(missing, infos, strict=True)}
            write_json(known, path)
        trained = {known[key]: case for case, key in keys[0].items()}
        for case, key in keys[1].items():
            if known[key] in trained:
                twin = trained[known[key]]
                raise UserError(
                    f"The test image {data.test[case][0]} is the same as the training image "
                    f"{paths[twin][0]}. Take one of {case} and {twin} out of order and test."
                )
        if unchecked:
            reader = data.raw.reader_writer()
            evaluate.check_annotations(masks, unchecked, reader, dataset_json, workers)
            write_json(known | dict.fromkeys(pairs.values(), "fits"), path)


def test_masks(data: Data) -> dict[str, Path]:
    """Case -> mask, of the test cases."""
    if data.test_labels:
        return {c: data.test_labels / f"{c}{data.raw.file_ending}" for c in data.test}
    return {case: data.raw.masks[case] for case in data.test}


def _stamp(files: Sequence[Path]) -> str:
    """Path, size and time of the files: the same stamp means the same content."""
    stats = [(str(f.resolve()), f.stat()) for f in files]
    return "|".join(f"{name}:{s.st_size}:{s.st_mtime_ns}" for name, s in stats)


def test_folders(data: Data, folder: Path) -> tuple[Path, Path]:
    """Return the folders of test images and masks."""
    if data.test_images and data.test_labels:
        return data.test_images, data.test_labels
    return folder / "test" / "images", folder / "test" / "labels"


# --- the tasks ----------------------------------------------------------------------------------


def build_tasks(
    spec: Spec, data: Data, cells: Sequence[Cell], folder: Path, workers: int
) -> dict[Path, dict]:
    """Return task folder -> task, of the data sets and the cells; nothing is written."""
    built: dict[Path, dict] = {}
    for cell in cells:
        place = folder / "datasets" / dataset_name(data, cell)
        if place not in built:
            built[place] = dataset_task(spec, data, cell, place, folder, built)
        built[folder / "cells" / cell.id] = cell_task(
            spec, data, cell, built[place], place.name, folder, workers
        )
    return built


def dataset_name(data: Data, cell: Cell) -> str:
    """Name of the data set a cell trains on: one per budget and draw, own ones for extra rows."""
    parts = [data.raw.folder.name.split("_", 1)[-1]]
    if cell.role in ("stock", "bound"):
        parts.append(cell.role)
    parts.append("all" if cell.role == "bound" else f"{cell.budget}labeled")
    if cell.draw:
        parts.append(f"draw{cell.draw}")
    return "_".join(parts)


def dataset_task(
    spec: Spec, data: Data, cell: Cell, place: Path, folder: Path, built: Mapping[Path, dict]
) -> dict:
    """Split and plan; stock rows and the bound see annotated cases only, and stock planning."""
    labeled, unlabeled = draw_labeled(data.training, cell.budget, cell.draw, data.groups)
    supervised = cell.role in ("stock", "bound")
    if supervised:
        unlabeled = []
    number = dataset_id(place, built)
    name = f"Dataset{number:03d}_{place.name}"
    stock = cell.role == "stock"
    planner = "ExperimentPlanner" if stock else spec.planner
    planned = plans_name_of(planner)
    small = spec.plans if not stock else None
    program = ["nnUNetv2_plan_and_preprocess"]
    if not supervised:
        program = ["nnunet_ssl", "plan_and_preprocess"]
    command = [*program, "-d", str(number), "-c", spec.configuration, "-pl", planner]
    return {
        "definition": {
            "dataset": str(data.raw.folder),
            "annotated cases": labeled,
            "cases without masks": unlabeled,
            "configuration": spec.configuration,
            "planner": planner,
            "plans": small and vars(small),
        },
        # nothing is loaded here, and nnU-Net's planner takes this for its threads and refuses 0
        "environment": {**environment(own_folders(folder), 1), "nnUNet_n_proc_DA": "1"},
        "split": {
            "source": str(data.raw.folder),
            "id": number,
            "name": place.name,
            "labeled": labeled,
            "unlabeled": unlabeled,
            "inside": [
                str(folder / "nnUNet_raw" / name),
                str(folder / "nnunet_ssl_heldout" / name),
                str(folder / "nnUNet_preprocessed" / name),
            ],
            "results": str(folder / "nnUNet_results"),
        },
        "plan": {
            "command": command,
            "preprocessed": str(folder / "nnUNet_preprocessed" / name),
            "configuration": spec.configuration,
            "planned": planned,
            "plans": SMALL_PLANS if small else planned,
            "small": small and vars(small),
        },
    }


def dataset_id(place: Path, built: Mapping[Path, dict]) -> int:
    """Id of a data set: the one it has, else the first free one."""
    if (place / TASK).is_file():
        return read_task(place)["split"]["id"]
    taken = {task["split"]["id"] for task in built.values() if "split" in task}
    if place.parent.is_dir():
        taken |= {read_task(p.parent)["split"]["id"] for p in place.parent.glob(f"*/{TASK}")}
    return next(number for number in range(1, 1000) if number not in taken)


def own_folders(folder: Path, results: str = "nnUNet_results") -> dict[str, Path]:
    """nnU-Net's folders inside ours."""
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    return {name: folder / name for name in names} | {"nnUNet_results": folder / results}


def cell_task(
    spec: Spec,
    data: Data,
    cell: Cell,
    dataset: dict,
    dataset_place: str,
    folder: Path,
    workers: int,
) -> dict:
    """Train, predict and evaluate."""
    place = folder / "cells" / cell.id
    number, plans = str(dataset["split"]["id"]), dataset["plan"]["plans"]
    name = Path(dataset["split"]["inside"][0]).name
    # nnU-Net's own trainer has no seed in its name, so its runs need folders of their own
    results = f"nnUNet_results/seed{cell.seed}" if cell.role == "stock" else "nnUNet_results"
    model = folder / results / name / f"{cell.trainer}__{plans}__{spec.configuration}"
    options = ["-tr", cell.trainer, "-p", plans, "-device", spec.device]
    train = ["nnUNetv2_train", number, spec.configuration, cell.fold, *options]
    images, labels = test_folders(data, folder)

    def predict(images: Path, output: Path, checkpoint: str, mirroring: bool) -> list[str]:
        command = ["nnUNetv2_predict", "-i", str(images), "-o", str(output), "-d", number]
        command += ["-c", spec.configuration, "-f", cell.fold, *options, "-chk", checkpoint]
        command += ["-step_size", f"{spec.step_size:g}"]
        return command if mirroring else [*command, "--disable_tta"]

    hidden = dataset["split"]["unlabeled"][: spec.pseudo_labels]
    pseudo_labels = None
    if hidden and cell.role in ("method", "twin"):
        held = folder / "pseudo_labels" / dataset_place
        checkpoints = {at: f"checkpoint_at_{100 * at:g}.pth" for at in PSEUDO_LABELS_AT}
        moments = []
        for progress, checkpoint in {**checkpoints, 1.0: "checkpoint_final.pth"}.items():
            output = place / "pseudo_labels" / f"at_{100 * progress:g}"
            moments.append(
                {
                    "progress": progress,
                    # as in training: no mirroring
                    "command": predict(held / "images", output, checkpoint, False),
                    "evaluate": {
                        "ground_truth": str(held / "labels"),
                        "predictions": str(output),
                    },
                }
            )
        pseudo_labels = {"moments": moments}
    return {
        "definition": {
            **dataset["definition"],
            "protocol": spec.protocol,
            "test cases": sorted(data.test),
            "trainer": cell.trainer,
            "predict": {"mirroring": spec.mirroring, "step_size": spec.step_size},
            "evaluate": {"units": spec.units, "tolerance": spec.tolerance}
            | ({"circumference": list(spec.circumference)} if spec.circumference else {}),
            "pseudo_labels": len(hidden) if pseudo_labels else 0,
        },
        "environment": environment(own_folders(folder, results), workers),
        "row": {k: v for k, v in vars(cell).items() if k not in NOT_TOLD},
        "train": {
            "command": train,
            "model": str(model / f"fold_{cell.fold}"),
            "pretrain": pretraining_task(cell, train, model / f"fold_{cell.fold}"),
            "epochs": cell.epochs,
            "configuration": spec.configuration,
            "device": spec.device,
            "stock_steps": STOCK_EPOCHS * STOCK_ITERATIONS if cell.trainer == STOCK else None,
        },
        "predict": {
            "command": predict(
                images, place / "predictions", "checkpoint_final.pth", spec.mirroring
            )
        },
        "evaluate": {
            "ground_truth": str(labels),
            "predictions": str(place / "predictions"),
            "dataset_json": str(data.raw.folder / "dataset.json"),
            "units": spec.units,
            "tolerance": spec.tolerance,
            "circumference": list(spec.circumference),
        },
        "pseudo_labels": pseudo_labels,
    }


def order_tasks(
    folder: Path, cells: Sequence[Cell], plan: Mapping[Path, dict]
) -> dict[Path, Path | None]:
    """Return the tasks of some cells, each with the data set it needs, which comes first."""
    needs: dict[Path, Path | None] = {}
    for cell in cells:
        place = folder / "cells" / cell.id
        wanted = plan[place]["train"]["command"][1]
        dataset = next(
            p for p, t in plan.items() if "split" in t and str(t["split"]["id"]) == wanted
        )
        needs.setdefault(dataset, None)
        needs[place] = dataset
    return needs


def check_checkpoints(plan: Mapping[Path, dict]) -> None:
    """Check that no training has begun on a data set that is to be made, or made anew.

    The cells of the plan have been checked; this finds pre-trainings and cells of an earlier spec.

    Raises:
        UserError: names the training, and what has changed.
    """
    for place, task in plan.items():
        if "split" not in task:
            continue
        changed = changes(place, task)
        if not changed and "split" in read_state(place)["stages"]:
            continue
        begun = [p for root in result_folders(task["split"]) for p in root.rglob(CHECKPOINTS)]
        if not begun:
            continue
        model, why, back = begun[0].parent, "is to be made again", ""
        if changed:
            key, (before, now) = next(iter(changed.items()))
            why = f"was made with another spec: {key} was {short(before)}, now it is {short(now)}"
            back = f", put {key} back"
        raise UserError(
            f"{model} holds a training on {place.name}, which {why}. Give a new folder with -o"
            f"{back}, or remove {model}."
        )


def changes(place: Path, task: dict) -> dict[str, tuple[Any, Any]]:
    """Return what a data set was made for and what now differs: key -> before, now."""
    if "split" not in task or not (place / TASK).is_file():
        return {}
    before, now = read_task(place)["definition"], json.loads(json.dumps(task["definition"]))
    return {k: (before.get(k), now.get(k)) for k in before | now if before.get(k) != now.get(k)}


def renew_if_changed(place: Path, task: dict) -> None:
    """Throw away a data set that was made for another spec; no cell has begun to use it."""
    if changes(place, task):
        for root in read_task(place)["split"]["inside"]:
            shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(place)


# --- what is told -------------------------------------------------------------------------------


def describe(spec: Spec, data: Data, folder: Path) -> dict[str, Any]:
    """Return what runs.json says beside the cells."""
    images, labels = test_folders(data, folder)
    known = data.raw.dataset_json["labels"]
    file = spec.file.name if spec.file.is_absolute() else str(spec.file)
    command = ["nnunet_ssl", "benchmark", file, "-o", folder.name]
    return {
        "format": FORMAT,
        "name": spec.name,
        "about": spec.about,
        "protocol": spec.protocol,
        "dataset": data.raw.folder.name,
        "configuration": spec.configuration,
        "command": shlex.join(command),
        "labels": {k: v for k, v in known.items() if k not in ("background", "ignore")},
        "test": {
            name: os.path.relpath(p, folder) if p.is_relative_to(folder) else str(p)
            for name, p in (("images", images), ("labels", labels))
        },
        "units": "draws and seeds",
        "budget_unit": "group" if data.groups else "case",
    }
