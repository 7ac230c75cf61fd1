"""`nnunet_ssl demo`: a small data set, trained with and without its unlabelled scans, on the CPU.

Each step is a command that works the same on real data; it is printed before it runs.
"""

import csv
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_ssl.commands import run_command
from nnunet_ssl.doctor import trainer_path
from nnunet_ssl.errors import UserError
from nnunet_ssl.io import atomic_path, write_json
from nnunet_ssl.naming import VARIABLE
from nnunet_ssl.planning.small import shrink_plans
from nnunet_ssl.synthetic import ORGANS, write_dataset

DATASET = "Dataset999_Demo"
CONFIGURATION = "3d_fullres"
PLANS = "nnUNetSmallPlans"
FEATURES, PATCH = (8, 16, 32), (24, 40, 40)  # a small network, for the CPU
SETTINGS = {"num_epochs": 30, "num_iterations_per_epoch": 40, "num_val_iterations_per_epoch": 2}
# the twin first, with what makes it comparable
TRAINERS = {"SSLTrainerSupervised": {"labeled_mix": "auto"}, "SSLTrainer": {}}
MARKER = "nnunet_ssl_demo.json"
REMARK = (
    "A smoke test on synthetic data, one seed, short training: it shows that the parts work\n"
    "together, not which trainer is better."
)

Dice = dict[str, dict[str, float]]  # case -> organ -> Dice


def run_demo(folder: Path, seed: int = 0, device: str = "cpu") -> None:
    """Make data, plan, train twin and SSLTrainer alike, predict, evaluate, tell.

    Writes results.json, results.csv and demo.png into `folder`, logs of the commands into `logs`.

    Args:
        folder: made, or emptied if an earlier demo filled it.
        seed: of the data set and of both trainings.
        device: "cpu" or "cuda".

    Raises:
        UserError: `folder` holds something else, or a command failed.
    """
    start = time.monotonic()
    folder = prepare_folder(Path(folder).resolve(), seed)
    raw, test = folder / "nnUNet_raw" / DATASET, folder / "test"
    print(f"Making a data set in {folder}: 4 annotated scans, 24 without masks, 10 for testing.")
    write_dataset(raw, test, seed)

    run = Runner(folder, demo_environment(folder))
    plan = ["nnunet_ssl", "plan_and_preprocess", "-d", "999", "-c", CONFIGURATION]
    run("plan", [*plan, "-npfp", "2", "-np", "2"])
    write_small_plans(folder / "nnUNet_preprocessed" / DATASET)

    scores: dict[str, Dice] = {}
    for trainer, own in TRAINERS.items():
        settings = {**own, **SETTINGS, "seed": seed}
        name = "+".join([trainer, *(f"{k}={v}" for k, v in settings.items())])
        model = ["-tr", name, "-p", PLANS, "-device", device]
        train = ["nnUNetv2_train", "999", CONFIGURATION, "all", *model]
        run(f"train_{trainer}", train, epochs=SETTINGS["num_epochs"])
        predictions = folder / "predictions" / trainer
        predict = ["nnUNetv2_predict", "-i", str(test / "images"), "-o", str(predictions)]
        predict += ["-d", "999", "-c", CONFIGURATION, "-f", "all", *model, "-npp", "1", "-nps", "1"]
        run(f"predict_{trainer}", predict)
        labels = [str(label) for label in ORGANS.values()]
        evaluate = ["nnUNetv2_evaluate_simple", str(test / "labels"), str(predictions)]
        run(f"evaluate_{trainer}", [*evaluate, "-l", *labels, "-np", "2"])
        scores[trainer] = read_dice(predictions / "summary.json")

    seconds = time.monotonic() - start
    write_results(folder, scores, {"seed": seed, "device": device, **SETTINGS}, seconds)
    draw_picture(folder / "demo.png", test, folder / "predictions", scores)
    print(f"\n{dice_table(scores)}\n\n{REMARK}\n")
    print(f"{seconds / 60:.1f} minutes. Picture: {folder / 'demo.png'}")
    print(f"Numbers: {folder / 'results.csv'}, {folder / 'results.json'}")


def prepare_folder(folder: Path, seed: int) -> Path:
    """Make the folder, or empty it if the demo made it.

    Raises:
        UserError: it holds other files.
    """
    if folder.exists():
        if any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise UserError(f"{folder} holds other files. Give an empty or new folder with -o.")
        shutil.rmtree(folder)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "logs"):
        (folder / name).mkdir(parents=True)
    write_json({"seed": seed}, folder / MARKER)
    return folder


def demo_environment(folder: Path) -> dict[str, str]:
    """Environment of the commands: nnU-Net's folders inside the demo's, few processes."""
    paths = {
        name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    }
    return {
        **os.environ,
        **paths,
        VARIABLE: trainer_path(),
        "nnUNet_n_proc_DA": "2",
        "nnUNet_def_n_proc": "2",
        "PYTHONUNBUFFERED": "1",
    }


class Runner:
    """Runs the demo's commands one after the other.

    Args:
        folder: gets `logs/<step>.log`.
        environment: of the commands.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]):
        self.folder = folder
        self.environment = environment

    def __call__(self, step: str, command: Sequence[str], epochs: int | None = None) -> None:
        """Print the command and run it, with a bar over its epochs if it has any.

        Raises:
            UserError: it failed; tells its last lines and its log.
        """
        print(f"\n$ {shlex.join(command)}", flush=True)
        log = self.folder / "logs" / f"{step}.log"
        with tqdm(total=epochs, unit="epoch", disable=epochs is None, file=sys.stdout) as bar:
            run_command(command, log, self.environment, bar.update)


def write_small_plans(preprocessed: Path) -> None:
    """Write plans of a small network beside the planned ones; both share the preprocessed data."""
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text(encoding="utf-8"))
    small = shrink_plans(plans, CONFIGURATION, FEATURES, PATCH, batch_size=2)
    write_json({**small, "plans_name": PLANS}, preprocessed / f"{PLANS}.json")


def read_dice(summary: Path) -> Dice:
    """Dice of each case and organ from nnU-Net's summary.json."""
    names = {str(label): organ for organ, label in ORGANS.items()}
    scores = {}
    for case in json.loads(summary.read_text(encoding="utf-8"))["metric_per_case"]:
        name = Path(case["reference_file"]).name.removesuffix(".nii.gz")
        scores[name] = {names[k]: float(v["Dice"]) for k, v in case["metrics"].items()}
    return scores


def means(dice: Dice) -> dict[str, float]:
    """Mean over cases of each organ, and the mean of those."""
    organs = {o: float(np.mean([case[o] for case in dice.values()])) for o in ORGANS}
    return {**organs, "mean": float(np.mean(list(organs.values())))}


def dice_table(scores: Mapping[str, Dice]) -> str:
    """Mean Dice of twin and SSLTrainer with their differences."""
    twin, ssl = (means(scores[t]) for t in TRAINERS)
    first, second = TRAINERS
    n = len(scores[first])
    lines = [f"Mean Dice of {n} test cases", f"{'':10}{first:>22}{second:>12}{'+/-':>9}"]
    for organ in twin:
        difference = ssl[organ] - twin[organ]
        lines.append(f"{organ:10}{twin[organ]:22.3f}{ssl[organ]:12.3f}{difference:+9.3f}")
    return "\n".join(lines)


def write_results(
    folder: Path, scores: Mapping[str, Dice], settings: Mapping[str, Any], seconds: float
) -> None:
    """Write results.json (means, per case, settings) and results.csv (per case)."""
    write_json(
        {
            "remark": REMARK.replace("\n", " "),
            "settings": dict(settings),
            "seconds": round(seconds),
            "mean_dice": {trainer: means(dice) for trainer, dice in scores.items()},
            "dice": dict(scores),
        },
        folder / "results.json",
    )
    with (
        atomic_path(folder / "results.csv") as part,
        part.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["trainer", "case", *ORGANS])
        for trainer, dice in scores.items():
            for case, values in sorted(dice.items()):
                writer.writerow([trainer, case, *(f"{values[o]:.4f}" for o in ORGANS)])


def draw_picture(path: Path, test: Path, predictions: Path, scores: Mapping[str, Dice]) -> None:
    """Draw the first three test cases: image, truth, twin, SSLTrainer, in the same slice."""
    import SimpleITK as sitk
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    def read(file: Path) -> np.ndarray:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))

    cases = sorted(scores["SSLTrainer"])[:3]
    colours = ListedColormap(["#e6550d", "#31a354", "#3182bd"])
    figure = Figure(figsize=(10, 2.7 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cases), 2 + len(TRAINERS), squeeze=False)
    for row, case in zip(axes, cases, strict=True):
        image = read(test / "images" / f"{case}_0000.nii.gz")
        truth = read(test / "labels" / f"{case}.nii.gz")
        z = int((truth > 0).sum((1, 2)).argmax())
        panels = {"image": np.zeros_like(truth), "truth": truth}
        for trainer in TRAINERS:
            dice = np.mean(list(scores[trainer][case].values()))
            title = f"{trainer.replace('SSLTrainerSupervised', 'supervised twin')}, Dice {dice:.2f}"
            panels[title] = read(predictions / trainer / f"{case}.nii.gz")
        for axis, (title, labels) in zip(row, panels.items(), strict=True):
            axis.imshow(image[z], cmap="gray")
            shown = np.ma.masked_equal(labels[z], 0)
            axis.imshow(shown, cmap=colours, vmin=1, vmax=3, alpha=0.6, interpolation="nearest")
            axis.set_title(title, fontsize=9)
            axis.axis("off")
        row[0].set_title(f"{case}, slice {z}", fontsize=9)
    figure.suptitle("nnunet_ssl demo: synthetic data, short training, one seed", fontsize=10)
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=120)
