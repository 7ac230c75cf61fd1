"""What a benchmark does in processes of their own: make a data set, or train and score a cell.

A task is a folder with task.json (what to do), state.json (which stages are done) and logs. Each
stage is done once; a task that was killed goes on with the stage it was in.

    python -m nnunet_ssl.evaluation.tasks FOLDER
"""

import csv
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import nnunet_ssl
from nnunet_ssl.commands import EPOCH_ENDS, run_command
from nnunet_ssl.errors import UserError
from nnunet_ssl.io import atomic_path, write_json, write_text
from nnunet_ssl.planning.workers import available_cpus
from nnunet_ssl.two_stages import FINAL

TASK, STATE, LOGS = "task.json", "state.json", "logs"
CHECKPOINTS = "checkpoint_*.pth"
MOST_SCORERS = 8  # processes that score the cases of a task; each holds a case
PROCESSES = ("nnUNet_n_proc_DA", "nnUNet_def_n_proc")  # nnU-Net's variables: loading, the rest
WORKERS = "NNUNET_SSL_WORKERS"  # variable: tasks that share the CPUs of a machine
PACKAGES = ("nnunet-ssl", "nnunetv2", "torch", "numpy", "batchgeneratorsv2")


def read_state(folder: Path) -> dict:
    """Return {"stages": {stage: facts}, "error": message or None} of a task."""
    path = folder / STATE
    return (
        json.loads(path.read_text(encoding="utf-8"))
        if path.is_file()
        else {"stages": {}, "error": None}
    )


def read_task(folder: Path) -> dict:
    """Return what the task is to do."""
    return json.loads((folder / TASK).read_text(encoding="utf-8"))


def stages_of(task: dict) -> list[str]:
    """Return the stages of a task in order."""
    return [stage for stage in STAGES if task.get(stage) is not None]


def is_done(folder: Path) -> bool:
    """Tell whether all stages of a task are done."""
    return set(stages_of(read_task(folder))) <= set(read_state(folder)["stages"])


def run_task(folder: Path, *, alone: bool = False) -> int:
    """Do the stages of a task that are not done yet.

    Args:
        folder: of the task.
        alone: it shares its CPUs with no other task, whatever its environment says.

    Returns:
        0, or 1 if a stage failed; state.json then holds its error.
    """
    folder = Path(folder)
    (folder / LOGS).mkdir(exist_ok=True)
    with FileLock(folder / ".lock"):  # a task of an earlier runner may still be at work
        task, state = read_task(folder), read_state(folder)
        os.environ.update(task["environment"] | ({WORKERS: "1"} if alone else {}))
        os.environ.update(processes_of_nnunet(besides=task["environment"]))
        for stage in stages_of(task):
            if stage in state["stages"]:
                continue
            start = time.monotonic()
            try:
                facts = STAGES[stage](task, folder)
            except Exception as error:
                traceback.print_exc()
                told = str(error) if isinstance(error, UserError) else repr(error)
                state["error"] = f"{stage}: {told}"
                write_json(state, folder / STATE)
                return 1
            seconds = {"seconds": round(time.monotonic() - start, 1)}
            state["stages"][stage] = seconds | (facts or {})
            state["error"] = None
            write_json(state, folder / STATE)
    return 0


def own_cpus() -> int:
    """Return the CPUs of a task: those that it may use here, shared by the tasks beside it."""
    return max(1, available_cpus() // int(os.environ.get(WORKERS, "1")))


def processes_of_nnunet(besides: Container[str]) -> dict[str, str]:
    """Return the variables that tell nnU-Net how many processes to start, but those set already."""
    numbers = (max(2, min(12, own_cpus())), min(8, available_cpus()))
    processes = dict(zip(PROCESSES, map(str, numbers), strict=True))
    return {name: number for name, number in processes.items() if name not in besides}


# --- stages of a data set -------------------------------------------------------------------------


def split(task: dict, folder: Path) -> None:
    """Make the raw data set; test cases are not in it."""
    from nnunet_ssl.planning.splits import split_dataset

    options = task["split"]
    for root in options["inside"]:  # what an interrupted attempt left
        shutil.rmtree(root, ignore_errors=True)
    for root in result_folders(options):  # and trainings on it that ended before a checkpoint
        if not any(root.rglob(CHECKPOINTS)):
            shutil.rmtree(root, ignore_errors=True)
    order = folder / "cases.txt"
    write_text("\n".join([*options["labeled"], *options["unlabeled"]]) + "\n", order)
    made = split_dataset(
        Path(options["source"]),
        options["id"],
        labeled=len(options["labeled"]),
        list_file=order,
        name=options["name"],
    )
    assert str(made) == options["inside"][0], made


def result_folders(options: Mapping[str, Any]) -> list[Path]:
    """Return the folders that hold trainings on a data set.

    Args:
        options: of the split.
    """
    results, name = Path(options["results"]), Path(options["inside"][0]).name
    return [p for p in (results / name, *results.glob(f"seed*/{name}")) if p.is_dir()]


def plan(task: dict, folder: Path) -> dict:
    """Plan and preprocess; write plans of a small network beside the planned ones if asked for."""
    from nnunet_ssl.planning.small import shrink_plans

    options = task["plan"]
    processes = str(min(4, own_cpus()))
    command = [*options["command"], "-np", processes, "-npfp", processes]
    run_stage(command, folder, "plan")
    small = options["small"]
    if small:
        base = Path(options["preprocessed"])
        plans = json.loads((base / f"{options['planned']}.json").read_text(encoding="utf-8"))
        try:
            made = shrink_plans(
                plans,
                options["configuration"],
                small["features"],
                small["patch"],
                small["batch"],
                small["convs_per_stage"],
            )
        except ValueError as error:
            raise UserError(f"The plans of the spec do not fit: {error}.") from error
        write_json({**made, "plans_name": options["plans"]}, base / f"{options['plans']}.json")
    return {"commands": [command]}


# --- stages of a cell -----------------------------------------------------------------------------


def train(task: dict, folder: Path) -> dict:
    """Train to the final checkpoint, from an earlier attempt's latest one if there is any."""
    options, started_at = task["train"], commit()  # the code may change while it runs
    command, commands = list(options["command"]), [options["command"]]
    first = options.get("pretrain")
    if first:
        weights = Path(first["model"]) / FINAL
        weights.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{first['model']}.lock"):  # cells may share it
            if not weights.is_file():
                begun = any(weights.parent.glob(CHECKPOINTS))
                run_stage(first["command"] + ["--c"] * begun, folder, "pretrain")
        commands.insert(0, first["command"])
    model = Path(options["model"])
    with claimed(model):
        if any(model.glob(CHECKPOINTS)):
            command.append("--c")
        elif first:
            command += ["-pretrained_weights", str(weights)]
        run_stage(command, folder, "train")
    return {"commands": commands, "commit": started_at, **training_facts(task, folder)}


@contextmanager
def claimed(model: Path) -> Iterator[None]:
    """Keep other tasks from training into the folder of a model.

    Raises:
        UserError: one does, as `compare` may with another folder of its own.
    """
    model.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{model}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"Another runner trains {model}. Wait for its end; the same command then goes on with "
            f"what it left."
        ) from None
    try:
        yield
    finally:
        lock.release()


def training_facts(task: dict, folder: Path) -> dict:
    """Return what the training cost and on what it ran."""
    from nnunet_ssl.history import LOG_NAME, read_log

    options = task["train"]
    stages = [options, options["pretrain"]] if options.get("pretrain") else [options]
    records = [r for stage in stages for r in read_log(Path(stage["model"]) / LOG_NAME)]
    patches = {kind: sum(r["patches"][kind] for r in records) for kind in ("labeled", "unlabeled")}
    seconds = sum(r["seconds"] for r in records)
    peaks = [r["gpu_peak_mb"] for r in records if "gpu_peak_mb" in r]
    # a continued run may have changed its machine; runs of earlier versions do not tell
    precisions = sorted({r["precision"] for r in records if "precision" in r})
    if not records:  # nnU-Net's own trainer
        log = (folder / LOGS / "train.log").read_text(errors="replace")
        seconds = sum(float(s) for s in re.findall(rf"{EPOCH_ENDS}([\d.]+)", log))
        patches["labeled"] = options["stock_steps"] * batch_size(options)
    return {
        "train_seconds": round(seconds, 1),
        "patches": patches,
        "patches_per_second": round(sum(patches.values()) / seconds, 2) if seconds else None,
        "peak_memory_mb": {"gpu": max(peaks, default=None), "host": peak_of_children()},
        "versions": {p: version(p) for p in PACKAGES} | {"python": platform.python_version()},
        "hardware": hardware(options["device"]),
        "precision": ", ".join(precisions) or None,
    }


def batch_size(options: dict) -> int:
    """Patches of a training step, from the plans in the model's folder."""
    plans = json.loads((Path(options["model"]).parent / "plans.json").read_text(encoding="utf-8"))
    return plans["configurations"][options["configuration"]]["batch_size"]


def predict(task: dict, folder: Path) -> dict:
    """Segment the test cases with the final checkpoint."""
    command = with_exporters(task["predict"]["command"])
    run_stage(command, folder, "predict")
    return {"commands": [command]}


def with_exporters(command: Sequence[str]) -> list[str]:
    """Add to a prediction how many processes read and write."""
    processes = str(max(1, min(3, own_cpus() // 2)))
    return [*command, "-npp", processes, "-nps", processes]


def evaluate(task: dict, folder: Path) -> None:
    """Score the segmentations."""
    score(task["evaluate"], folder / "evaluation")


def score(options: dict, output: Path) -> None:
    """Score one folder of segmentations against annotations."""
    from nnunet_ssl.evaluation.evaluate import evaluate_folder

    evaluate_folder(
        Path(options["ground_truth"]),
        Path(options["predictions"]),
        output,
        dataset_json=Path(options["dataset_json"]),
        units=options["units"],
        tolerance=options["tolerance"],
        circumference=options.get("circumference", ()),
        processes=min(MOST_SCORERS, own_cpus()),
        quiet=True,
    )


def pseudo_labels(task: dict, folder: Path) -> dict:
    """Score the deployed network on scans without masks, at some moments of training."""
    rows = []
    commands = []
    for moment in task["pseudo_labels"]["moments"]:
        commands.append(with_exporters(moment["command"]))
        run_stage(commands[-1], folder, "pseudo_labels")
        output = folder / "pseudo_labels" / f"evaluation_{100 * moment['progress']:g}"
        score({**task["evaluate"], **moment["evaluate"]}, output)
        with (output / "cases.csv").open(encoding="utf-8", newline="") as file:
            rows += [
                [moment["progress"], row["case"], row["class"], row["metric"], row["value"]]
                for row in csv.DictReader(file)
                if row["metric"] == "dice"
            ]
    write_csv(["progress", "case", "class", "metric", "value"], rows, folder / "pseudo_labels.csv")
    return {"commands": commands}


def label(task: dict, folder: Path) -> dict:
    """Label a part of the scans without masks."""
    from nnunet_ssl.offline.predict import label_part

    return label_part(task["label"])


def write_csv(header: Sequence[str], rows: Sequence[Sequence[Any]], path: Path) -> None:
    """Write a table atomically."""
    with atomic_path(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


STAGES: dict[str, Callable[[dict, Path], dict | None]] = {
    "split": split,
    "plan": plan,
    "train": train,
    "predict": predict,
    "evaluate": evaluate,
    "pseudo_labels": pseudo_labels,
    "label": label,
}


def run_stage(command: Sequence[str], folder: Path, stage: str) -> None:
    """Run a command of a stage."""
    run_command(command, folder / LOGS / f"{stage}.log", os.environ)


# --- where it ran ---------------------------------------------------------------------------------


def peak_of_children() -> int | None:
    """Peak memory in MB of the largest process that this one has waited for."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return round(peak / 2 ** (20 if sys.platform == "darwin" else 10))


def commit() -> str | None:
    """Commit of the package's checkout, `-dirty` after it if files differ; None if installed."""
    package = Path(nnunet_ssl.__file__).parent
    git = ["git", "-C", str(package)]
    try:
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True
        )
        describe = [*git, "describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*"]
        return subprocess.run(describe, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware(device: str) -> dict[str, Any]:
    """Processor, cores and the GPU that was used."""
    gpu = None
    if device == "cuda" and shutil.which("nvidia-smi"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        query = ["nvidia-smi", "-i", visible, "--query-gpu=name", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip() or None
    return {"cpu": processor(), "cores": os.cpu_count(), "gpu": gpu}


def processor() -> str:
    """Name of the processor, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    found = (
        re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8"))
        if info.is_file()
        else None
    )
    return found[1].strip() if found else platform.processor() or platform.machine()


def end_with_runner() -> None:
    """Wait until the runner ends, then end this process and all that it started."""
    os.read(0, 1)  # not through sys.stdin, which Python locks at its own end
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=end_with_runner, daemon=True).start()
    sys.exit(run_task(Path(sys.argv[1])))
