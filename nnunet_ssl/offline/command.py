"""`nnunet_ssl pseudo_label`: label scans without masks, train on them, and again.

    teacher -> masks and their stability -> a new data set -> its plans and data -> student

The student of a round is the teacher of the next one. Each round has a data set of its own, which
is never changed once it is there, so a run that was killed goes on with what is missing.
"""

import json
import math
import os
import random
import shlex
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunet_ssl.data.unlabeled import read_manifest
from nnunet_ssl.errors import MAX_LISTED, UserError
from nnunet_ssl.evaluation.cells import join, parts_of
from nnunet_ssl.evaluation.runner import (
    Launcher,
    LocalLauncher,
    SubmititLauncher,
    environment,
    has_device,
    locked,
    run_tasks,
    warn_of_shared_cores,
    write_task,
)
from nnunet_ssl.evaluation.tasks import TASK, is_done, read_state
from nnunet_ssl.io import environment_folder, explain_os_error, write_json
from nnunet_ssl.naming import resolve
from nnunet_ssl.offline.anatomy import Anatomy, find_check, study
from nnunet_ssl.offline.predict import (
    KEEP_AT,
    MASKS,
    kept_checkpoints,
    label_sets_of,
    read_rows,
)
from nnunet_ssl.offline.select import choose, collapse_of, kind_of
from nnunet_ssl.offline.stability import change
from nnunet_ssl.offline.write import Chosen, new_dataset_json, preprocess, write_dataset
from nnunet_ssl.planning.api import read_plans
from nnunet_ssl.planning.raw import CaseInfo, RawDataset, read_raw_dataset, silence
from nnunet_ssl.planning.splits import Splits, check_id_free, ensure_splits
from nnunet_ssl.planning.workers import Workers, processes_for
from nnunet_ssl.two_stages import FINAL, pretraining_of

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
WORK = "self_training"  # in the results folder of the first round's data set
SETTINGS, ROUNDS, ANATOMY = "settings.json", "rounds.json", "anatomy.json"
ANNOTATED = "annotated"  # key in settings.json
PROBES, PROBE_SEED = 20, 0
LEAST_CHANGE = 0.01  # of the probes' foreground, below which another round is not worth it


@dataclass(frozen=True)
class Run:
    """What was asked for, checked.

    Attributes:
        raw: the data set that all rounds start from.
        splits: of its annotated cases.
        folders: nnU-Net's.
        configuration: of nnU-Net.
        plans: plans identifier.
        trainer: full name of the students', and of the first teacher's unless `model` is given.
        folds: that are trained, or ("all",).
        joint: the folds label together, and fold "all" is trained on it.
        rounds: at most.
        new_id: of the first round's data set.
        model: folder of a finished first teacher, or None.
        drop: share of cases to leave out as least stable.
        shapes: checks of the anatomy, by name.
        device: "cuda", "cpu" or "mps".
        mirroring: the teacher averages over mirrored views.
        workers: tasks at a time.
        parts: of the prediction of a fold.
        launcher: "local" or "slurm".
        hidden: masks of scans without masks, for the report alone.
    """

    raw: RawDataset
    splits: Splits
    folders: dict[str, Path]
    configuration: str
    plans: str
    trainer: str
    folds: tuple[str, ...]
    joint: bool
    rounds: int
    new_id: int
    model: Path | None
    drop: float
    shapes: tuple[str, ...]
    device: str
    mirroring: bool
    workers: int
    parts: int
    launcher: str
    hidden: Path | None

    @property
    def base(self) -> Path:
        """Preprocessed folder of the data set that all rounds start from."""
        return self.folders["nnUNet_preprocessed"] / self.raw.folder.name

    def dataset(self, number: int) -> str:
        """Name of a round's data set; round 0 is the one that all start from."""
        if number == 0:
            return self.raw.folder.name
        stem = self.raw.folder.name.split("_", 1)[-1]
        return f"Dataset{self.new_id + number - 1:03d}_{stem}_round{number}"

    @property
    def work(self) -> Path:
        """Folder of tasks, labels and report."""
        return self.folders["nnUNet_results"] / self.dataset(1) / WORK

    def teacher(self, number: int) -> Path:
        """Model folder of the teacher that round `number` trained; 0 is the first one."""
        if number == 0 and self.model is not None:
            return self.model
        name = f"{self.trainer}__{self.plans}__{self.configuration}"
        return self.folders["nnUNet_results"] / self.dataset(number) / name

    def sets(self, number: int) -> dict[str, tuple[str, ...]]:
        """Return by fold of the student which folds of teacher `number` label for it."""
        if self.joint:
            return {"all": self.folds if number == 0 else ("all",)}
        return {fold: (fold,) for fold in self.folds}

    def labels(self, number: int, fold: str) -> Path:
        """Folder of what teacher `number` made for a fold."""
        return self.work / f"teacher{number}" / f"fold_{fold}"

    @cached_property
    def checksums(self) -> dict[str, int]:
        """Checksum of each annotated case's mask file."""
        return {case: zlib.crc32(mask.read_bytes()) for case, mask in self.raw.masks.items()}

    def settings(self) -> dict[str, Any]:
        """Return what a run that goes on must have in common with its beginning."""
        names = ["configuration", "plans", "trainer", "folds", "joint", "new_id"]
        names += ["drop", "shapes", "mirroring"]
        found = {name: getattr(self, name) for name in names}
        found |= {"dataset": self.raw.folder.name, "model": self.model and str(self.model)}
        return json.loads(json.dumps(found))


def pseudo_label(
    dataset_id: int,
    configuration: str,
    new_id: int,
    *,
    trainer: str = "SSLTrainer",
    plans: str = "nnUNetPlans",
    rounds: int = 2,
    folds: Sequence[str] = ("all",),
    joint: bool = False,
    model: Path | None = None,
    drop: float = 0.2,
    shapes: Sequence[str] = (),
    device: str = "cuda",
    mirroring: bool = True,
    workers: int = 1,
    parts: int | None = None,
    launcher: str = "local",
    hidden: Path | None = None,
) -> int:
    """Train by rounds of pseudo-labels; the same call goes on where it was.

    Args:
        dataset_id: planned and preprocessed with its scans without masks.
        configuration: "2d", "3d_fullres" or "3d_lowres".
        new_id: free id of the first round's data set; further rounds take the next ones.
        trainer: of all models, with settings.
        plans: plans identifier.
        rounds: at most.
        folds: "all", or numbers: each fold then gets pseudo-labels by its own model.
        joint: several folds label together, and fold "all" is trained on that.
        model: folder of a finished first teacher; None trains one, or takes a finished one of
            this trainer.
        drop: share of cases to leave out as least stable.
        shapes: checks of the anatomy.
        device: "cuda", "cpu" or "mps".
        mirroring: the teacher averages over mirrored views.
        workers: tasks at a time, on this machine.
        parts: tasks that a fold's prediction is spread over; None is one a worker.
        launcher: "local", or "slurm" for a job per task.
        hidden: masks of scans without masks, for the report alone.

    Returns:
        0, or 1 if no pseudo-label was good enough.

    Raises:
        UserError: bad input, before anything runs; a model that must not teach; a task that failed.
    """
    run = check(
        dataset_id,
        configuration,
        new_id,
        trainer=trainer,
        plans=plans,
        rounds=rounds,
        folds=tuple(folds),
        joint=joint,
        model=model,
        drop=drop,
        shapes=tuple(shapes),
        device=device,
        mirroring=mirroring,
        workers=workers,
        parts=parts or max(1, workers),
        launcher=launcher,
        hidden=hidden,
    )
    make_folder(run.work)
    with locked(run.work):
        write_json({**run.settings(), ANNOTATED: run.checksums}, run.work / SETTINGS)
        where: Launcher = (
            SubmititLauncher(run.work / "submitit", run.device)
            if run.launcher == "slurm"
            else LocalLauncher(run.workers)
        )
        return rounds_of(run, where)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(explain_os_error(error, folder)) from error


def rounds_of(run: Run, launcher: Launcher) -> int:
    """Run the rounds; return 1 if the first one had nothing to train on."""
    anatomy = anatomy_of(run)
    if run.model is None:
        train(run, launcher, 0)
    for number in range(1, run.rounds + 1):
        print(f"\nRound {number}: teacher {run.teacher(number - 1)}", flush=True)
        refuse_collapsed(run, number - 1)
        label(run, launcher, anatomy, number - 1, sorted(run.raw.unlabeled), "all")
        chosen = [choose_for(run, number - 1, fold, anatomy) for fold in run.sets(number)]
        if not all(one.kept for one in chosen):
            tell_all_rejected(run, number, chosen)
            if number == 1:
                return 1
            number -= 1
            break
        make_dataset(run, number, chosen)
        train(run, launcher, number)
        label(run, launcher, anatomy, number, probes_of(run), "probes")
        changed = change_of(run, number)
        note_round(run, number, chosen, changed)
        report(run)
        if changed < LEAST_CHANGE:
            print(f"The masks have settled, no further round ({100 * changed:.2f} % changed).")
            break
    tell_end(run, number)
    return 0


# --- checks before anything runs ------------------------------------------------------------------


def check(dataset_id: int, configuration: str, new_id: int, **asked: Any) -> Run:
    """Check all that can be checked without running anything.

    Raises:
        UserError: names the option or file and the fix.
    """
    for name in ("rounds", "workers", "parts"):
        if asked[name] < 1:
            raise UserError(f"--{name} is {asked[name]}; give 1 or more.")
    if not 0 <= asked["drop"] < 1:
        raise UserError(f"--drop is {asked['drop']:g}; give a share from 0 to below 1.")
    if not 1 <= new_id <= 1000 - asked["rounds"]:
        raise UserError(f"-o {new_id}: each round takes an id, up to 999. Give another.")
    folders = {name: environment_folder(name) for name in FOLDERS}
    raw = read_raw_dataset(dataset_id)
    base = folders["nnUNet_preprocessed"] / raw.folder.name
    model = asked["model"] and Path(asked["model"]).resolve()
    trainer = with_checkpoints(asked.pop("trainer"))
    if model:
        plans = read_model(model, raw, configuration)
        asked["plans"] = plans["plans_name"]
    else:
        plans = read_plans(base, asked["plans"], configuration)
    known = read_manifest(base, plans, configuration)["cases"]
    changed = sorted(known.keys() ^ raw.unlabeled.keys())
    if changed:
        raise UserError(
            f"imagesUn of {raw.folder} has changed since preprocessing: {changed[0]} and "
            f"{len(changed) - 1} more. Run: nnunet_ssl plan_and_preprocess -d {dataset_id} "
            f"-c {configuration} --keep_plans"
        )
    splits = ensure_splits(raw.folder, base, list(raw.labeled))
    check_folds(asked["folds"], asked["joint"], splits)
    try:
        student: Any = resolve(trainer)
        student.refuse_unsupported(plans, configuration, new_dataset_json(raw.dataset_json, 0))
    except NotImplementedError as error:
        raise UserError(f"{error} Self-training marks unsure voxels with it.") from error
    check_shapes(asked["shapes"], raw)
    if asked["launcher"] == "local" and not has_device(asked["device"]):
        raise UserError("-device cuda (the default): no CUDA GPU found here. Add: -device cpu")
    if asked["hidden"] and not Path(asked["hidden"]).is_dir():
        raise UserError(f"--hidden {asked['hidden']} is no folder. Leave it out, or correct it.")
    asked["model"] = model
    run = Run(raw, splits, folders, configuration, trainer=trainer, new_id=new_id, **asked)
    check_folders(run)
    check_first_teacher(run)
    if run.launcher == "local":
        warn_of_shared_cores(run.workers, run.device)
    return run


def with_checkpoints(trainer: str) -> str:
    """Let a trainer keep its weights on the way; they tell which cases are stable."""
    name, settings = parts_of(trainer)
    wanted = ",".join(f"{fraction:g}" for fraction in KEEP_AT)
    kept: tuple[float, ...] = resolve(trainer).keep_at  # type: ignore[attr-defined]
    if kept and not set(KEEP_AT) <= set(kept):
        raise UserError(f"{trainer}: keep_at must hold {wanted}, or be left out.")
    return trainer if kept else join(name, {**settings, "keep_at": wanted})


def read_model(model: Path, raw: RawDataset, configuration: str) -> dict[str, Any]:
    """Return the plans of a finished model, if it is one of this data set.

    Raises:
        UserError: no model there, or one of another data set or configuration.
    """
    for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
        if not (model / name).is_file():
            raise UserError(
                f"No finished model in {model}: {name} is missing. Give --model a folder like "
                f"$nnUNet_results/{raw.folder.name}/SSLTrainer__nnUNetPlans__{configuration}, or "
                f"leave it out to have one trained."
            )
    plans, dataset = (
        json.loads((model / name).read_text(encoding="utf-8"))
        for name in ("plans.json", "dataset.json")
    )
    if plans["dataset_name"] != raw.folder.name:
        raise UserError(
            f"{model} is a model of {plans['dataset_name']}, not of {raw.folder.name}. Give -d "
            f"{int(plans['dataset_name'][7:10])}, or another --model."
        )
    if dataset["labels"] != raw.dataset_json["labels"]:
        raise UserError(
            f"{model} was trained with labels {dataset['labels']}; {raw.folder / 'dataset.json'} "
            f"names {raw.dataset_json['labels']}. Train it again."
        )
    own = model.name.rpartition("__")[2]
    if own != configuration or configuration not in plans["configurations"]:
        raise UserError(f"{model} is a model of configuration {own}, not {configuration}.")
    return plans


def check_folds(folds: Sequence[str], joint: bool, splits: Splits) -> None:
    """Check the folds that were asked for."""
    known = [str(number) for number in range(len(splits))]
    if len(set(folds)) < len(folds):
        raise UserError(f"--folds {' '.join(folds)} names a fold twice.")
    if list(folds) != ["all"]:
        for fold in folds:
            if fold not in known:
                raise UserError(f"--folds {fold}: give all alone, or some of {' '.join(known)}.")
    if joint and len(folds) < 2:
        raise UserError("--joint lets several folds label together. Give them: --folds 0 1 2 3 4")


def check_shapes(shapes: Sequence[str], raw: RawDataset) -> None:
    """Check that the checks of the anatomy exist and can judge this data set."""
    for name in shapes:
        find_check(name)
    if shapes and "ignore" in raw.dataset_json["labels"]:
        raise UserError(
            f"--shape {shapes[0]}: {raw.folder.name} has the ignore label, and partly annotated "
            f"cases do not show whole shapes. Leave it out."
        )
    if "ellipse" in shapes:
        with silence():
            image, _ = raw.reader_writer()().read_images([str(next(iter(raw.labeled.values()))[0])])
        if image.shape[1] > 1:
            raise UserError("--shape ellipse judges single slices; these images are 3D.")


def check_folders(run: Run) -> None:
    """Check that ids are free, or were taken by this run.

    Raises:
        UserError: an id is taken, or a run there was begun otherwise or with other annotations.
    """
    path, begun = run.work / SETTINGS, run.work.is_dir()
    if path.is_file():
        before, now = json.loads(path.read_text(encoding="utf-8")), run.settings()
        for key, value in now.items():
            if before[key] != value:
                raise UserError(
                    f"The run in {run.work} has begun with {key} {before[key]}, now it is {value}. "
                    f"Give another id with -o, or put {key} back."
                )
        known = before.get(ANNOTATED, run.checksums)
        changed = sorted(set(run.checksums.items()) ^ set(known.items()))
        if changed:
            raise UserError(
                f"The annotation of {changed[0][0]} in {run.raw.folder} is not the one that the "
                f"run in {run.work} has begun with; its models do not know the new one. "
                f"Preprocess again and give another id with -o, or put the annotation back."
            )
    for number in range(1, run.rounds + 1):
        ours = begun and (number == 1 or (run.folders["nnUNet_raw"] / run.dataset(number)).is_dir())
        if not ours:
            check_id_free(run.new_id + number - 1)


def check_first_teacher(run: Run) -> None:
    """Check the folds of a finished first teacher.

    Raises:
        UserError: a fold is missing, or was trained with another split.
    """
    model = run.teacher(0)
    there = sorted(path.parent.name.removeprefix("fold_") for path in model.glob(f"fold_*/{FINAL}"))
    if run.model is not None:
        for fold in run.folds:
            if fold not in there:
                raise UserError(
                    f"{model} has no finished fold {fold}. Folds there: "
                    f"{' '.join(there) or 'none'}. Train it, or give those with --folds."
                )
        if len(kept_checkpoints([model / f"fold_{fold}" for fold in run.folds])) < len(KEEP_AT):
            print(
                f"WARNING: {model} kept no weights at 40 and 70 % of training. Stability is told "
                f"by mirrored views{' and folds' if run.joint else ''} alone; train with "
                f"+keep_at=0.4,0.7 for more.",
                flush=True,
            )
    else:
        plain = join(*without_checkpoints(run.trainer))
        other = model.with_name(f"{plain}__{run.plans}__{run.configuration}")
        finished = [fold for fold in run.folds if (other / f"fold_{fold}" / FINAL).is_file()]
        if other != model and finished and not there:
            print(
                f"NOTE: {other} is finished but kept no weights on the way, so {run.trainer} is "
                f"trained. To start from the finished one: --model {shlex.quote(str(other))}",
                flush=True,
            )
    for fold in there:
        masks = {p.name for p in (model / f"fold_{fold}" / "validation").glob("*")}
        masks = {m for m in masks if m.endswith(run.raw.file_ending)}
        if fold != "all" and fold in run.folds and masks:
            wanted = {f"{case}{run.raw.file_ending}" for case in run.splits[int(fold)]["val"]}
            if masks != wanted:
                odd = sorted(masks ^ wanted)[0].removesuffix(run.raw.file_ending)
                raise UserError(
                    f"{model / f'fold_{fold}'} was trained with another split than fold {fold} "
                    f"has now ({odd}): it may know cases that validate. Train it again."
                )


def without_checkpoints(trainer: str) -> tuple[str, dict[str, str]]:
    """Return name and settings of a trainer without `keep_at`."""
    name, settings = parts_of(trainer)
    return name, {key: value for key, value in settings.items() if key != "keep_at"}


# --- tasks ----------------------------------------------------------------------------------------


def run_all(
    run: Run, launcher: Launcher, wanted: Mapping[Path, dict], what: str, unit: str
) -> None:
    """Run tasks that are not done.

    Raises:
        UserError: one failed.
    """
    for folder, task in wanted.items():
        write_task(folder, task)
    left = [folder for folder in wanted if not is_done(folder)]
    if not left:
        return
    print(f"{what}: {len(left)} of {len(wanted)} {unit} to do", flush=True)
    run_tasks(dict.fromkeys(wanted), launcher, lambda: None, unit)
    failed = [folder for folder in wanted if not is_done(folder)]
    if failed:
        raise UserError(
            f"{what} failed: {read_state(failed[0])['error']}\n"
            f"Logs: {failed[0] / 'logs'}. The same command goes on where it was."
        )


def task_environment(run: Run, number: int) -> dict[str, str]:
    """Variables of a task; on a machine with several GPUs the tasks take turns among them."""
    variables = environment(run.folders, run.workers)
    if run.launcher == "local" and run.device == "cuda" and run.workers > 1:
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(k) for k in range(torch.cuda.device_count())]
        variables["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return variables


def train(run: Run, launcher: Launcher, number: int) -> None:
    """Train the models of a round, 0 being the first teacher; finished ones are taken."""
    model = run.teacher(number)
    folds = run.folds if number == 0 else tuple(run.sets(number))
    tasks: dict[Path, dict] = {}
    for position, fold in enumerate(folds):
        folder = run.work / "tasks" / f"train{number}_fold_{fold}"
        if (model / f"fold_{fold}" / FINAL).is_file() and not (folder / TASK).is_file():
            print(f"Finished already: {model / f'fold_{fold}'}", flush=True)
            continue
        dataset = str(int(run.dataset(number)[7:10]))
        command = ["nnUNetv2_train", dataset, run.configuration, fold, "-tr", run.trainer]
        command += ["-p", run.plans, "-device", run.device]
        first, pretrain = pretraining_of(run.trainer), None
        if first:
            before = model.with_name(model.name.replace(run.trainer, first, 1))
            pretrain = {
                "command": [first if word == run.trainer else word for word in command],
                "model": str(before / f"fold_{fold}"),
            }
        epochs: int = resolve(run.trainer).num_epochs  # type: ignore[attr-defined]
        tasks[folder] = {
            "environment": task_environment(run, position),
            "train": {
                "command": command,
                "model": str(model / f"fold_{fold}"),
                "pretrain": pretrain,
                "epochs": epochs,
                "configuration": run.configuration,
                "device": run.device,
                "stock_steps": None,
            },
        }
    run_all(run, launcher, tasks, f"Training on {run.dataset(number)}", "trainings")


def label(
    run: Run,
    launcher: Launcher,
    anatomy: Anatomy,
    number: int,
    cases: Sequence[str],
    name: str,
) -> None:
    """Let teacher `number` label cases, in parts as nnU-Net deals them out.

    Args:
        run: what was asked for.
        launcher: where tasks run.
        anatomy: of the annotated cases.
        number: of the teacher.
        cases: to label; those that are labelled already are left out.
        name: of this piece of work: "all", or "probes".
    """
    tasks: dict[Path, dict] = {}
    parts = 1 if name == "probes" else min(run.parts, len(cases))
    for fold, makers in run.sets(number).items():
        make_folder(run.labels(number, fold))
        for part in range(parts):
            title = f"{name}_{part}of{parts}"
            folder = run.work / "tasks" / f"label{number}_fold_{fold}_{title}"
            own = cases[part::parts]  # -part_id, -num_parts
            tasks[folder] = {
                "environment": task_environment(run, len(tasks)),
                "label": {
                    "model": str(run.teacher(number)),
                    "folds": list(makers),
                    "configuration": run.configuration,
                    "preprocessed": str(run.base),
                    "cases": own,
                    "images": {case: [str(p) for p in run.raw.unlabeled[case]] for case in own},
                    "channels": run.raw.num_channels,
                    "output": str(run.labels(number, fold)),
                    "lines": str(run.labels(number, fold) / f"part_{title}.jsonl"),
                    "ignore": new_dataset_json(run.raw.dataset_json, 0)["labels"]["ignore"],
                    "anatomy": anatomy.as_json(),
                    "shapes": list(run.shapes),
                    "device": run.device,
                    "mirroring": run.mirroring,
                },
            }
    run_all(run, launcher, tasks, f"Labelling {len(cases)} cases", "parts")


# --- a round --------------------------------------------------------------------------------------


def anatomy_of(run: Run) -> Anatomy:
    """Return what the annotated cases show; measured once."""
    path = run.work / ANATOMY
    if not path.is_file():
        with Workers(processes_for(len(run.raw.labeled))) as workers:
            found = study(run.raw, label_sets_of(run.raw.dataset_json), workers)
        write_json(found.as_json(), path)
    return Anatomy(**json.loads(path.read_text(encoding="utf-8")))


def refuse_collapsed(run: Run, number: int) -> None:
    """Raise UserError if a teacher has lost a class."""
    model = run.teacher(number)
    folds = run.folds if number == 0 else tuple(run.sets(number))
    whole = number == 0 and "ignore" not in run.raw.dataset_json["labels"]
    for fold in folds:
        reason = collapse_of(
            model / f"fold_{fold}", list(label_sets_of(run.raw.dataset_json)), whole
        )
        if reason is not None:
            stays = f" The data sets up to round {number} stay as they are." if number else ""
            raise UserError(
                f"{model / f'fold_{fold}'} must not teach: {reason}. Its pseudo-labels would teach "
                f"the same fault. Compare with SSLTrainerSupervised, annotate more cases, or give "
                f"another model with --model.{stays}"
            )


def choose_for(run: Run, number: int, fold: str, anatomy: Anatomy) -> Chosen:
    """Choose among what teacher `number` made for a fold, and tell the numbers."""
    labels = run.labels(number, fold)
    rows = {row["case"]: row for row in read_rows(labels)}
    reasons = choose(list(rows.values()), anatomy.everywhere, run.drop)
    chosen = Chosen(fold, labels, rows, reasons)
    told = f"fold {fold}: {len(chosen.kept)} of {len(rows)} pseudo-labels kept"
    skipped = [case for case, row in rows.items() if "error" in row]
    print(told + (f", {len(skipped)} scans skipped:" if skipped else ""), flush=True)
    for case in skipped[:MAX_LISTED]:
        print(f"  {rows[case]['error']}")
    return chosen


def tell_all_rejected(run: Run, number: int, chosen: Sequence[Chosen]) -> None:
    """Say that nothing was kept, and why."""
    for one in chosen:
        if one.kept:
            continue
        reasons = Counter(kind_of(reason) for reason in one.reasons.values() if reason)
        print(
            f"All {len(one.rows)} pseudo-labels for fold {one.fold} were rejected: "
            + "; ".join(f"{count} times {reason}" for reason, count in reasons.most_common(5))
        )
    print(f"Nothing was changed: no data set is made for round {number}.", flush=True)


def make_dataset(run: Run, number: int, chosen: Sequence[Chosen]) -> None:
    """Write and preprocess the data set of a round, unless it is there."""
    target = run.folders["nnUNet_raw"] / run.dataset(number)
    teacher = run.teacher(number - 1)
    if not target.is_dir():
        members = [row["members"] for row in chosen[0].rows.values() if "members" in row]
        about = {
            "dataset": run.raw.folder.name,
            "round": number,
            "teacher": str(teacher),
            "folds": {one.fold: list(run.sets(number - 1)[one.fold]) for one in chosen},
            "stability": {
                "members": members[0],
                "drop": run.drop,
                "shapes": list(run.shapes),
            },
            "validation": "none: the teacher saw all annotated cases"
            if chosen[0].fold == "all"
            else "by fold: each fold's pseudo-labels come from its own model",
        }
        write_dataset(run.raw, target, run.splits, chosen, about)
        print(f"{target}", flush=True)
    base = run.folders["nnUNet_preprocessed"] / target.name
    if not (base / f"{run.plans}.json").is_file():
        infos = {
            case: CaseInfo(row["content"], (), tuple(row["spacing"]), 1.0, False)
            for one in chosen
            for case, row in one.rows.items()
            if "error" not in row
        }
        processes = processes_for(len(run.raw.labeled) + sum(len(one.kept) for one in chosen))
        preprocess(target, run.base, teacher, run.configuration, infos, processes)


def probes_of(run: Run) -> list[str]:
    """Return the cases by which rounds are compared: the same in each round."""
    cases = sorted(run.raw.unlabeled)
    return sorted(random.Random(PROBE_SEED).sample(cases, min(PROBES, len(cases))))


def change_of(run: Run, number: int) -> float:
    """Return by what part of their foreground the masks of the probes changed in a round."""
    reader = run.raw.reader_writer()
    changed, shown = 0, 0
    for fold in run.sets(number):
        before, after = (run.labels(n, fold) / MASKS for n in (number - 1, number))
        for case in probes_of(run):
            paths = [folder / f"{case}{run.raw.file_ending}" for folder in (before, after)]
            if all(path.is_file() for path in paths):
                with silence():
                    masks = [reader().read_seg(str(path))[0] for path in paths]
                pair = change(*masks)
                changed, shown = changed + pair[0], shown + pair[1]
    return changed / shown if shown else math.inf


def note_round(run: Run, number: int, chosen: Sequence[Chosen], changed: float) -> None:
    """Add a round to rounds.json."""
    path = run.work / ROUNDS
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    note = {
        "round": number,
        "dataset": run.dataset(number),
        "teacher": str(run.teacher(number - 1)),
        "student": str(run.teacher(number)),
        "changed": changed if math.isfinite(changed) else None,
        "probes": len(probes_of(run)),
        "labels": {one.fold: str(one.labels) for one in chosen},
    }
    write_json([*(r for r in known if r["round"] < number), note], path)
    print(f"Round {number}: {100 * changed:.2f} % of the probes' foreground changed", flush=True)


def report(run: Run) -> None:
    """Write the page."""
    from nnunet_ssl.offline.report import write_report

    rounds = json.loads((run.work / ROUNDS).read_text(encoding="utf-8"))
    write_report(run.raw, run.folders["nnUNet_raw"], rounds, run.work / "report.html", run.hidden)
    print(f"Report: {run.work / 'report.html'}", flush=True)


def tell_end(run: Run, number: int) -> None:
    """Print what came out and how to predict with it."""
    folds = list(run.sets(number))
    command = ["nnUNetv2_predict", "-d", str(run.new_id + number - 1), "-c", run.configuration]
    command += ["-tr", run.trainer, "-p", run.plans, "-f", *folds, "-i", "INPUT", "-o", "OUTPUT"]
    command += [] if run.device == "cuda" else ["-device", run.device]
    print(f"\nModel of round {number}: {run.teacher(number)}\nPredict with stock nnU-Net:")
    print(f"  {shlex.join(command)}", flush=True)
