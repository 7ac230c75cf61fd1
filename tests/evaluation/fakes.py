"""Stand-ins for nnU-Net's commands, which leave the files that the runner looks for.

Programs of the tests import this; what takes long to import is imported where it is used.
"""

import json
import shutil
from pathlib import Path

PLANS = {
    "plans_name": "nnUNetPlans",
    "configurations": {
        "2d": {
            "batch_size": 2,
            "patch_size": [8, 8],
            "architecture": {
                "arch_kwargs": {
                    "n_stages": 3,
                    "strides": [[1, 1], [2, 2], [2, 2]],
                    "kernel_sizes": [[3, 3]] * 3,
                }
            },
        }
    },
}
EPOCH = {
    "seconds": 2.0,
    "lr": 0.01,
    "terms": {"sup": -0.5},
    "pseudo_labels": {},
    "shares": {},
    "pseudo_dice": {"student": [0.5, 0.6]},
    "patches": {"labeled": 4, "unlabeled": 6},
    "gpu_peak_mb": 70,
    "precision": "float16",
}


def option(command: list[str], name: str) -> str:
    """Value of an option."""
    return command[command.index(name) + 1]


def dataset(root: str, number: str) -> Path:
    """Folder of an id below one of nnU-Net's folders."""
    (found,) = Path(root).glob(f"Dataset{int(number):03d}_*")
    return found


def run_fake(command: list[str], environment: dict[str, str]) -> None:
    """Do what a command leaves behind: plans, a model, segmentations equal to the annotations."""
    raw = environment["nnUNet_raw"]
    if "plan_and_preprocess" in command[0] + command[1]:
        base = Path(environment["nnUNet_preprocessed"]) / dataset(raw, option(command, "-d")).name
        base.mkdir(parents=True, exist_ok=True)
        (base / "nnUNetPlans.json").write_text(json.dumps(PLANS))
    elif command[0] == "nnUNetv2_train":
        number, configuration, fold = command[1:4]
        name = f"{option(command, '-tr')}__{option(command, '-p')}__{configuration}"
        model = Path(environment["nnUNet_results"]) / dataset(raw, number).name / name
        (model / f"fold_{fold}").mkdir(parents=True, exist_ok=True)
        base = Path(environment["nnUNet_preprocessed"]) / dataset(raw, number).name
        shutil.copy(base / f"{option(command, '-p')}.json", model / "plans.json")
        shutil.copy(dataset(raw, number) / "dataset.json", model)
        if option(command, "-tr") != "nnUNetTrainer":
            lines = [json.dumps(EPOCH | {"epoch": k, "progress": (k + 1) / 2}) for k in range(2)]
            (model / f"fold_{fold}" / "ssl_log.jsonl").write_text("\n".join(lines) + "\n")
        (model / f"fold_{fold}" / "checkpoint_final.pth").touch()
        if fold != "all":
            validate(model / f"fold_{fold}", dataset(raw, number), environment, int(fold))
    elif command[0] == "nnUNetv2_predict":
        images, output = Path(option(command, "-i")), Path(option(command, "-o"))
        output.mkdir(parents=True, exist_ok=True)
        for mask in (images.parent / "labels").iterdir():
            shutil.copy(mask, output)


def validate(model: Path, raw: Path, environment: dict[str, str], fold: int) -> None:
    """Leave segmentations of a fold's validation cases."""
    base = Path(environment["nnUNet_preprocessed"]) / raw.name
    splits = json.loads((base / "splits_final.json").read_text(encoding="utf-8"))
    (model / "validation").mkdir(exist_ok=True)
    for case in splits[fold]["val"]:
        shutil.copy(raw / "labelsTr" / f"{case}.nii.gz", model / "validation")


class Commands:
    """Takes the place of `run_command`; counts, and breaks off where asked to.

    Attributes:
        ran: the commands that came to their end.
        events: beginnings and ends of commands, and files written by the tasks.
        kill_at: number of the event at which everything ends.
        broken: a word of commands that fail.
    """

    def __init__(self, monkeypatch):
        from nnunet_ssl.evaluation import tasks

        self.ran, self.events, self.kill_at, self.broken = [], 0, None, None
        write = tasks.write_json

        def counted_write(*args):
            self.event()
            write(*args)

        monkeypatch.setattr(tasks, "run_command", self)
        monkeypatch.setattr(tasks, "write_json", counted_write)

    def event(self) -> None:
        """Count, and die like a killed process."""
        self.events += 1
        if self.events == self.kill_at:
            raise Killed

    def __call__(self, command, log, environment):
        from nnunet_ssl.errors import UserError

        self.event()
        with log.open("a") as file:
            file.write(" ".join(command) + "\nEpoch time: 2.5 s\n")
        if self.broken and self.broken in " ".join(command):
            raise UserError("The command failed with code 1: no such thing")
        run_fake(list(command), environment)
        self.event()
        self.ran.append(" ".join(command))


class Killed(BaseException):
    """As if the process were gone."""


class InProcess:
    """Runs tasks in this process, one after the other."""

    slots = 1

    def start(self, folder):
        """Run it."""
        from nnunet_ssl.evaluation import tasks

        return tasks.run_task(folder)

    def ended(self, handle):
        """At once."""
        return True

    def stop(self, handle):
        """Nothing is left."""

    def log(self, folder, handle):
        """What it printed, were it a process."""
        return folder / "logs" / "task.log"
