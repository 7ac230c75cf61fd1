"""Small folders of runs, as the benchmark runner writes them, with numbers chosen by the test."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk

CLASSES = {"anterior": 1, "posterior": 2}
PLACE = ["name", "role", "budget", "draw", "seed", "fold"]
COLUMNS = ["cell", *PLACE, "case", "class", "metric", "unit", "value"]


def make_cell(
    name: str,
    role: str,
    budget: int = 4,
    draw: int = 0,
    seed: int = 1,
    fold: str = "all",
    state: str = "done",
    twin: str | None = "SSLTrainerSupervised",
    **more,
) -> dict:
    """A cell of runs.json; `twin` is the name of its twin of the same budget, draw, seed, fold."""

    def cell_id(of: str) -> str:
        return f"{of}_n{budget}_d{draw}_s{seed}_f{fold}"

    cell = {
        "id": cell_id(name),
        "trainer": name,
        "name": name,
        "role": role,
        "twin": None if role in ("twin", "bound") else cell_id(twin or ""),
        "budget": budget,
        "budget_name": "all" if role == "bound" else str(budget),
        "draw": draw,
        "seed": seed,
        "fold": fold,
        "state": state,
        "error": "out of memory" if state == "failed" else None,
        "predictions": f"predictions/{cell_id(name)}",
        "ssl_log": None,
        "pseudo_labels": None,
        "log": f"logs/{cell_id(name)}",
        "seconds": {"train": 60.0 if role == "twin" else 150.0, "predict": 5.0, "evaluate": 1.0},
        "peak_memory_mb": {"gpu": None, "host": 1500},
        "patches_per_second": 120.5,
        "patches": {"labeled": 32000, "unlabeled": 0 if role == "twin" else 32000},
        "step_cost": 1.0 if role == "twin" else 7 / 3,
        "commit": "0123abc",
        "versions": {"nnunetv2": "2.8.1", "torch": "2.5"},
        "hardware": {"cpu": "test machine"},
        "commands": [f"nnUNetv2_train 104 2d all -tr {name}"],
    }
    return cell | more


def make_folder(
    folder: Path,
    cells: list[dict],
    dice: Callable[[dict, int, str], float],
    cases: int = 5,
    classes: dict | None = None,
    distances: bool = False,
    **info,
) -> Path:
    """Write runs.json and results.csv; `dice(cell, case, class)` gives scores, NaN = missing."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = classes or CLASSES
    runs = {
        "format": 1,
        "name": "toy",
        "about": "A toy benchmark.",
        "protocol": "raw",
        "dataset": "Dataset901_Toy",
        "configuration": "2d",
        "command": "nnunet_ssl benchmark toy.yaml -o runs",
        "labels": classes,
        "test": {"images": "test_images", "labels": "test_labels"},
        "units": "draws and seeds",
        "cells": cells,
    } | info
    (folder / "runs.json").write_text(json.dumps(runs))
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for cell in cells:
            if cell["state"] != "done":
                continue
            for k in range(cases):
                for name in classes:
                    value = dice(cell, k, name)
                    row = cell | {"cell": cell["id"], "case": f"case_{k:02d}", "class": name}
                    metrics = [("dice", "", value)]
                    if distances:
                        far = math.nan if math.isnan(value) or value == 0 else 10 * (1 - value)
                        metrics += [("hd95", "mm", far), ("assd", "mm", far / 3)]
                        metrics += [("nsd", "mm", value)]
                    for metric, unit, number in metrics:
                        text = "" if math.isnan(number) else repr(float(number))
                        writer.writerow(row | {"metric": metric, "unit": unit, "value": text})
    return folder


def add_images(folder: Path, cases: int = 5, dim: int = 3) -> None:
    """Write test images, annotations and the predictions of all finished cells."""
    runs = json.loads((folder / "runs.json").read_text(encoding="utf-8"))
    rng = np.random.default_rng(0)
    shape = (12, 40, 30) if dim == 3 else (40, 30)
    spacing = (1.0, 1.0, 3.0) if dim == 3 else (1.0, 2.0)
    grid = np.indices(shape)
    for k in range(cases):
        center = [s / 2 for s in shape]
        radius = 0.25 + 0.03 * k
        distance = sum(
            ((g - c) / (radius * s)) ** 2 for g, c, s in zip(grid, center, shape, strict=True)
        )
        truth = (distance < 1).astype(np.uint8)
        truth[(distance < 1) & (grid[-1] > center[-1])] = 2
        image = rng.normal(100, 10, shape) + 60 * truth
        write(image.astype(np.float32), folder / f"test_images/case_{k:02d}_0000.nii.gz", spacing)
        write(truth, folder / f"test_labels/case_{k:02d}.nii.gz", spacing)
        for cell in runs["cells"]:
            if cell["state"] == "done":
                path = folder / cell["predictions"] / f"case_{k:02d}.nii.gz"
                write(np.roll(truth, cell["seed"], -1), path, spacing)


def write(array: np.ndarray, path: Path, spacing: tuple[float, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


def add_logs(folder: Path, epochs: int = 12) -> None:
    """Write training logs and the quality of pseudo-labels, and name them in runs.json."""
    runs = json.loads((folder / "runs.json").read_text(encoding="utf-8"))
    for cell in runs["cells"]:
        if cell["state"] != "done":
            continue
        logs = folder / "logs" / cell["id"]
        logs.mkdir(parents=True, exist_ok=True)
        cell["ssl_log"] = f"logs/{cell['id']}/ssl_log.jsonl"
        lines = []
        for epoch in range(epochs):
            progress = (epoch + 1) / epochs
            record = {
                "epoch": epoch,
                "progress": progress,
                "seconds": 3.0,
                "lr": 0.01,
                "terms": {"sup": 1 - progress},
                "pseudo_labels": {},
                "shares": {"labels": [0.1, 0.2]},
                "pseudo_dice": {"student": [0.5 * progress, None]},
            }
            if cell["role"] == "method":
                record["terms"]["unsup_ce"] = 0.2 * progress
                record["pseudo_labels"] = {"coverage": progress, "confidence": 0.5 + progress / 2}
                record["pseudo_dice"]["teacher"] = [0.6 * progress, 0.7 * progress]
            lines.append(json.dumps(record))
        (folder / cell["ssl_log"]).write_text("\n".join(lines) + "\n")
        if cell["role"] == "method":
            cell["pseudo_labels"] = f"logs/{cell['id']}/pseudo_labels.csv"
            rows = ["progress,case,class,metric,value"]
            for progress in (0.4, 0.7, 1.0):
                for name in runs["labels"]:
                    value = 0.5 + 0.3 * progress + 0.02 * cell["draw"]
                    rows.append(f"{progress},un_00,{name},dice,{value}")
            (folder / cell["pseudo_labels"]).write_text("\n".join(rows) + "\n")
    (folder / "runs.json").write_text(json.dumps(runs))
