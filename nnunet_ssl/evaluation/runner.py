"""Runs the tasks of a folder: several at a time, each in a process of its own, with progress."""

import csv
import getpass
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from tqdm import tqdm

from nnunet_ssl.doctor import trainer_path
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation import tasks
from nnunet_ssl.evaluation.cells import Cell
from nnunet_ssl.evaluation.tasks import LOGS, STATE, TASK, is_done, read_state, read_task
from nnunet_ssl.history import LOG_NAME
from nnunet_ssl.io import write_json, write_text
from nnunet_ssl.naming import VARIABLE

LOCK = ".lock"
TASK_LOG = "task.log"
POLL = 0.5  # seconds between two looks at the tasks
ASK = 60  # seconds between two looks at Slurm's queue
VANISHED = 300  # seconds that Slurm may not know a job; longer than shared file systems lag behind
LAST_LINES = 15
# what training tells, beside its seconds
FACTS = (
    "peak_memory_mb",
    "patches_per_second",
    "patches",
    "commit",
    "versions",
    "hardware",
    "precision",
)


class Launcher(Protocol):
    """Starts tasks somewhere."""

    slots: int  # tasks at a time

    def start(self, folder: Path) -> Any:
        """Start a task; return its handle."""

    def ended(self, handle: Any) -> bool:
        """Tell whether it has ended, well or not."""

    def stop(self, handle: Any) -> None:
        """End it, since the runner ends."""

    def log(self, folder: Path, handle: Any) -> Path:
        """Return the file that holds what a task printed."""


class LocalLauncher:
    """Tasks as processes of this machine, which end when the runner does, however it ends.

    Args:
        workers: tasks at a time.
    """

    def __init__(self, workers: int):
        self.slots = workers

    def start(self, folder: Path) -> subprocess.Popen:
        """Start a task."""
        (folder / LOGS).mkdir(exist_ok=True)
        with (folder / LOGS / TASK_LOG).open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, "-m", tasks.__name__, str(folder)],
                # not the current folder: in a checkout it hides the installed package
                env={**os.environ, "PYTHONSAFEPATH": "1"},
                stdin=subprocess.PIPE,  # closes with the runner, which the task notices
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ended(self, process: subprocess.Popen) -> bool:
        """Tell whether a task has ended; whatever it left running ends, too."""
        if process.poll() is None:
            return False
        self._end_group(process)
        return True

    def stop(self, process: subprocess.Popen) -> None:
        """End a task and all that it started."""
        self._end_group(process)
        process.wait()

    def log(self, folder: Path, process: subprocess.Popen) -> Path:
        """Return the file that holds what a task printed."""
        return folder / LOGS / TASK_LOG

    def _end_group(self, process: subprocess.Popen) -> None:
        with suppress(ProcessLookupError, PermissionError):  # macOS: the latter for ended groups
            os.killpg(process.pid, signal.SIGKILL)


class SubmititLauncher:
    """Tasks as jobs of a cluster. They go on when the runner ends; the next one finds them again.

    Args:
        folder: for submitit's files.
        device: "cuda" asks for one GPU a job.
        cluster: "slurm"; "local" for tests.
    """

    slots = sys.maxsize  # the queue decides

    def __init__(self, folder: Path, device: str, cluster: str = "slurm"):
        try:
            import submitit
        except ImportError as error:
            raise UserError(
                "--launcher slurm needs submitit. Run: pip install 'nnunet-ssl[slurm]'"
            ) from error
        self.folder = folder / "%j"
        self.known: dict[str, float] = {}  # id of a job -> when Slurm last knew it
        self.asked: float | None = None  # when the queue was looked at
        self.queue: set[str] | None = None
        self.job_class = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}[cluster]
        try:
            self.executor = submitit.AutoExecutor(
                self.folder, cluster=cluster, slurm_max_num_timeout=100
            )
        except RuntimeError as error:  # no sbatch here
            raise UserError(
                f"--launcher slurm: {error}. Start the runner where sbatch is, or leave the option "
                f"out to run on this machine."
            ) from error
        self.executor.update_parameters(
            name="nnunet_ssl",
            timeout_min=24 * 60,
            cpus_per_task=8,
            gpus_per_node=1 if device == "cuda" else 0,
        )

    def start(self, folder: Path) -> Any:
        """Submit a task, unless an earlier runner's job for it is still there."""
        note = folder / "job.txt"
        if note.is_file():
            job = self.job_class(self.folder, note.read_text(encoding="utf-8").strip())
            if not job.done() and not self._is_unknown(job):
                return job
        job = self.executor.submit(ClusterTask(folder))
        write_text(job.job_id, note)
        return job

    def ended(self, job: Any) -> bool:
        """Tell whether a job has ended, or Slurm has not known it for some minutes.

        To submitit, one that has vanished (killed, and not in the accounting) runs for ever.
        """
        if job.done():
            return True
        now = time.monotonic()
        if not self._is_unknown(job):
            self.known[job.job_id] = now
        return now - self.known.setdefault(job.job_id, now) > VANISHED

    def stop(self, job: Any) -> None:
        """Let it go on."""

    def log(self, folder: Path, job: Any) -> Path:
        """Return the file that holds what a job printed."""
        return job.paths.stderr

    def _is_unknown(self, job: Any) -> bool:
        """Tell whether neither the accounting nor the queue knows a job without result."""
        if job.state.upper() not in ("UNKNOWN", "PREEMPTED"):
            return False
        now = time.monotonic()
        if self.asked is None or now - self.asked > ASK:
            self.asked, self.queue = now, queued_jobs()
        return self.queue is not None and job.job_id not in self.queue


def queued_jobs() -> set[str] | None:
    """Return the ids of the user's jobs that wait or run in Slurm; None if it does not answer."""
    command = ["squeue", "--noheader", "--format=%A", f"--user={getpass.getuser()}"]
    try:
        told = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return set(told.stdout.split())


class ClusterTask:
    """A task that submitit queues again when its time is over; it then goes on where it was."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self) -> int:
        """Run the task, on the CPUs of its job."""
        return tasks.run_task(self.folder, alone=True)

    def checkpoint(self) -> Any:
        """Return what to queue again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runners out of a folder.

    Raises:
        UserError: one is at work there.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"Another runner works in {folder}. Wait for it, end it, or give another folder with "
            f"-o; --workers N runs several cells at a time."
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_task(folder: Path, task: Mapping[str, Any]) -> None:
    """Make the folder of a task."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(task, folder / TASK)


def environment(folders: Mapping[str, Path], workers: int) -> dict[str, str]:
    """Variables of the commands: nnU-Net's folders, and numbers of processes that the user set.

    A task works out the other numbers where it runs, from `workers` and the CPUs there.
    """
    return {
        **{name: str(path) for name, path in folders.items()},
        **{name: os.environ[name] for name in tasks.PROCESSES if name in os.environ},
        tasks.WORKERS: str(workers),
        VARIABLE: trainer_path(),
        "PYTHONUNBUFFERED": "1",
    }


def has_device(device: str) -> bool:
    """Tell whether there is a GPU, if one is asked for."""
    import torch

    return device != "cuda" or torch.cuda.is_available()


def warn_of_shared_cores(workers: int, device: str) -> None:
    """Say that trainings on a CPU get into each other's way."""
    if device == "cpu" and workers > 1:
        print(
            f"NOTE: nnU-Net lets each training on a CPU use all cores. {workers} at a time make "
            f"each other many times slower; --workers 1 ends sooner.",
            flush=True,
        )


def run_cells(
    folder: Path,
    head: Mapping[str, Any],
    cells: Sequence[Path],
    needs: Mapping[Path, Path | None],
    launcher: Launcher,
) -> bool:
    """Run tasks, keep runs.json and results.csv up to date, and tell how it ended.

    Args:
        folder: of the benchmark.
        head: what runs.json says beside the cells.
        cells: all cells, for the tables.
        needs: what to run, see `run_tasks`.
        launcher: where.

    Returns:
        True if a cell failed.
    """

    def write() -> None:
        write_tables(folder, head, cells)

    write()
    run_tasks(needs, launcher, write)
    write()
    wanted = [place for place in needs if place in cells]
    failed = [place.name for place in wanted if not is_done(place)]
    print(f"{len(wanted) - len(failed)} of {len(wanted)} cells are done: {folder / 'results.csv'}")
    if failed:
        print(f"Failed: {', '.join(failed)}. The same command tries them again.")
    return bool(failed)


def run_tasks(
    needs: Mapping[Path, Path | None],
    launcher: Launcher,
    changed: Callable[[], None],
    unit: str = "cells",
) -> None:
    """Run tasks; each starts when the one that it needs is done.

    Args:
        needs: folder of a task -> folder of the one it needs, in the order of their start.
        launcher: where they run.
        changed: called whenever a task has ended.
        unit: what those tasks are called whose progress is shown.
    """
    cells = [folder for folder in needs if {"train", "label"} & read_task(folder).keys()]
    waiting = [folder for folder in needs if not is_done(folder)]
    told = {folder: set(read_state(folder)["stages"]) for folder in waiting}
    running: dict[Path, Any] = {}
    ended = len(cells) - sum(folder in waiting for folder in cells)
    layout = f"{{percentage:3.0f}}%|{{bar}}| {{n:.1f}}/{{total}} {unit} [{{elapsed}}<{{remaining}}]"
    with tqdm(total=len(cells), initial=ended, bar_format=layout, disable=None) as bar:
        try:
            while waiting or running:
                failed = {f for f in needs if f not in waiting and f not in running}
                for folder in list(waiting):
                    need = needs[folder]
                    if need in failed and not is_done(need):
                        fail(folder, f"{need.name} was not made: {read_state(need)['error']}")
                        tqdm.write(f"{folder.name}: left out, {need.name} was not made")
                    elif len(running) >= launcher.slots or (need and not is_done(need)):
                        continue
                    else:
                        clear_error(folder)
                        running[folder] = launcher.start(folder)
                    waiting.remove(folder)
                time.sleep(POLL)
                for folder, handle in list(running.items()):
                    over = launcher.ended(handle)
                    tell_stages(folder, told[folder])
                    if over:
                        del running[folder]
                        close(folder, launcher.log(folder, handle))
                        ended += folder in cells
                        changed()
                bar.n = ended + sum(progress(f) for f in running if f in cells)
                bar.refresh()
        except KeyboardInterrupt:
            raise UserError("Stopped. The same command goes on where it was.") from None
        finally:
            for handle in running.values():
                launcher.stop(handle)


def clear_error(folder: Path) -> None:
    """Forget the error of an earlier attempt."""
    state = read_state(folder)
    if state["error"]:
        write_json({**state, "error": None}, folder / STATE)


def fail(folder: Path, error: str) -> None:
    """Note why a task did not end well."""
    write_json({**read_state(folder), "error": error}, folder / STATE)


def close(folder: Path, log: Path) -> None:
    """Look at a task that has ended; tell its error.

    Args:
        folder: of the task.
        log: what it printed.
    """
    state = read_state(folder)
    if is_done(folder):
        return
    if not state["error"]:  # it could not even say so itself
        lines = ["It was ended from outside, most likely for lack of memory or time."]
        if log.is_file():
            lines += [f"Its last lines in {log}:"]
            lines += log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        fail(folder, "\n".join(lines))
        state = read_state(folder)
    tqdm.write(f"{folder.name}: FAILED, {state['error']}\n  logs: {folder / LOGS}")


def tell_stages(folder: Path, told: set[str]) -> None:
    """Print a line for each stage that has been done since the last look."""
    for stage, facts in read_state(folder)["stages"].items():
        if stage not in told:
            told.add(stage)
            tqdm.write(f"{folder.name}: {stage} done, {duration(facts['seconds'])}")


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def progress(folder: Path) -> float:
    """Share of a running task that is done, by the epochs of its training or the lines of cases."""
    if "train" in read_state(folder)["stages"]:
        return 0.95
    task = read_task(folder)
    if "label" in task:
        lines, cases = Path(task["label"]["lines"]), task["label"]["cases"]
        labeled = lines.read_bytes().count(b"\n") if lines.is_file() else 0
        return 0.95 * min(1, labeled / max(1, len(cases)))
    options = task["train"]
    log = Path(options["model"]) / LOG_NAME
    epochs = log.read_bytes().count(b"\n") if log.is_file() else 0
    return 0.95 * min(1, epochs / options["epochs"])


# --- an existing folder -------------------------------------------------------------------------


def check_folder(folder: Path, plan: Mapping[Path, dict]) -> None:
    """Check that a folder is empty, or ours and made with settings that its cells still fit.

    Raises:
        UserError: names the key that differs and both values.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / LOCK).is_file():
        raise UserError(f"{folder} holds other files. Give an empty or new folder with -o.")
    for place, task in plan.items():
        if "train" not in task or not (place / TASK).is_file() or not has_begun(place):
            continue
        before = read_task(place)["definition"]
        for key, value in json.loads(json.dumps(task["definition"])).items():
            if before.get(key, value) != value:
                raise UserError(
                    f"Cell {place.name} in {folder} has begun with another spec: {key} was "
                    f"{short(before[key])}, now it is {short(value)}. Give a new folder with "
                    f"-o, or put {key} back."
                )


def has_begun(place: Path) -> bool:
    """Tell whether a cell's training has left anything."""
    stages = read_state(place)["stages"]
    model = Path(read_task(place)["train"]["model"])
    return bool(stages) or any(model.glob("checkpoint_*.pth"))


def short(value: Any) -> str:
    """A value for a message."""
    shown = json.dumps(value)
    return shown if len(shown) <= 120 else f"{shown[:117]}..."


# --- tables -------------------------------------------------------------------------------------


def write_tables(folder: Path, head: Mapping[str, Any], cells: Sequence[Path]) -> None:
    """Write runs.json and results.csv from what the tasks have left.

    Args:
        folder: of the benchmark.
        head: what runs.json says beside the cells.
        cells: their task folders.
    """
    records = [record(folder, cell) for cell in cells]
    rows: list[list[Any]] = []
    keys = ("id", "name", "role", "budget", "draw", "seed", "fold")
    for cell, run in zip(cells, records, strict=True):
        if run["state"] == "done":
            rows += [[run[k] for k in keys] + scores for scores in read_scores(cell)]
    header = ["cell", *keys[1:], "case", "class", "metric", "unit", "value"]
    tasks.write_csv(header, rows, folder / "results.csv")
    write_json({**head, "cells": records}, folder / "runs.json")


def read_scores(cell: Path) -> list[list[str]]:
    """Return the rows of a cell's evaluation."""
    with (cell / "evaluation" / "cases.csv").open(encoding="utf-8", newline="") as file:
        return [
            [row[k] for k in ("case", "class", "metric", "unit", "value")]
            for row in csv.DictReader(file)
        ]


def record(folder: Path, cell: Path) -> dict[str, Any]:
    """Return what runs.json tells of a cell; paths inside the folder are relative to it."""
    task, state = read_task(cell), read_state(cell)
    stages = state["stages"]
    facts = stages.get("train", {})
    ssl_log = Path(task["train"]["model"]) / LOG_NAME
    pseudo = cell / "pseudo_labels.csv"

    def inside(path: Path) -> str:
        return os.path.relpath(path, folder) if path.is_relative_to(folder) else str(path)

    return {
        **task["row"],
        "state": "failed" if state["error"] else "done" if is_done(cell) else "waiting",
        "error": state["error"],
        "predictions": inside(Path(task["evaluate"]["predictions"])),
        "ssl_log": inside(ssl_log) if ssl_log.is_file() else None,
        "pseudo_labels": inside(pseudo) if pseudo.is_file() else None,
        "log": inside(cell / LOGS),
        "seconds": {
            "train": facts.get("train_seconds"),
            "predict": stages.get("predict", {}).get("seconds"),
            "evaluate": stages.get("evaluate", {}).get("seconds"),
        },
        **{key: facts.get(key) for key in FACTS},
        # as they would be typed in the folder
        "commands": [
            shlex.join(word.replace(f"{folder}/", "") for word in command)
            for facts in stages.values()
            for command in facts.get("commands", [])
        ],
    }


def print_table(folder: Path, cells: Sequence[Cell], wanted: Sequence[Cell]) -> None:
    """Print each cell with its state and its time, known or expected from cells like it."""
    taken: dict[str, float] = {}
    states: dict[str, str] = {}
    for cell in cells:
        place = folder / "cells" / cell.id
        if not (place / TASK).is_file():
            states[cell.id] = "waiting"
            continue
        state = read_state(place)
        done = is_done(place)
        states[cell.id] = "failed" if state["error"] else "done" if done else "waiting"
        if done:
            taken[cell.id] = sum(facts["seconds"] for facts in state["stages"].values())
    like: dict[str, list[float]] = {}
    for cell in cells:
        if cell.id in taken:
            like.setdefault(cell.name, []).append(taken[cell.id])
    width = max(len(cell.id) for cell in wanted)
    left = 0.0
    for cell in wanted:
        time = ""
        if cell.id in taken:
            time = duration(taken[cell.id])
        elif cell.name in like:
            expected = sum(like[cell.name]) / len(like[cell.name])
            left += expected
            time = f"about {duration(expected)}"
        line = f"{cell.id:{width}}  {cell.role:13}  {states[cell.id]:7}  {time}"
        print(line.rstrip())
    count = sum(states[cell.id] != "done" for cell in wanted)
    unknown = sum(states[c.id] != "done" and c.name not in like for c in wanted)
    text = f"{len(wanted)} cells, {count} to run"
    if count > unknown:
        text += f", about {duration(left)}"
        text += f" and {unknown} of unknown time" if unknown else ""
    print(text, flush=True)
