"""What a large pool of scans without masks costs: start-up, loader, memory of the process.

Pools of any size are made of links to one small preprocessed case and one raw file, with a valid
manifest, so the disk's own speed is not in the numbers. Each start is a process of its own, whose
imports are done. Start-up is the time from making the trainer to its first batch, checks of all
cases included; nnU-Net's own trainer on the same annotated cases is measured beside it and taken
off. Unlabelled patches are loaded from the first step on (`+warmup=0`). The loader runs in the same
process.

    python benchmarks/pool_scaling.py

Target: no growth, and below 10 s of start-up beyond nnU-Net's own with 10 000 cases. Linux only.
Results: benchmarks/results/pool_scaling.json, and a plot of it beside it.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gauges import MB, RESULTS, provenance, status
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tqdm import tqdm
from workbench import build, prepare, read_plans, resized, set_up

from nnunet_ssl.data.unlabeled import manifest_path, unlabeled_folder
from nnunet_ssl.io import silence, write_json

STOCK = "nnUNetTrainer"
TRAINER = "SSLTrainer+warmup=0+rampup_end=0"
CONFIGURATION = "3d_fullres"
SHAPE, FEATURES, BATCH = (16, 32, 32), (4, 8, 8), 2
TARGET = 10.0  # seconds
IMPORTED = ("nnunet_ssl.base", "nnunet_ssl.trainers", "nnunet_ssl.planning.api", "pytest")
CASE_FILES = (".b2nd", "_seg.b2nd", ".pkl")
SEED = 1


def main() -> None:
    """Make pools, start on each of them, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pools", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--draws", type=int, default=100, help="batches of each start")
    parser.add_argument("--repeats", type=int, default=3, help="starts of each size")
    parser.add_argument("-o", type=Path, default=RESULTS / "pool_scaling.json")
    args = parser.parse_args()

    starts: dict[Any, list[dict]] = {}
    with tempfile.TemporaryDirectory() as place:
        set_up(Path(place))
        base = prepare(901, CONFIGURATION, SHAPE, num_unlabeled=1)
        plans = resized(read_plans(base), CONFIGURATION, FEATURES, SHAPE, BATCH)
        write_json(plans, base / "nnUNetPlans.json")
        pools = {n: make_pool(base, 902 + k, n) for k, n in enumerate(args.pools)}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        jobs = [(STOCK, next(iter(pools.values()))), *pools.items()] * args.repeats
        for key, folder in tqdm(jobs, desc="Starts"):
            name = STOCK if key == STOCK else f"{TRAINER}+seed={SEED}"
            with ProcessPoolExecutor(1, context) as process:
                found = process.submit(run, folder, name, args.draws).result()
            starts.setdefault(key, []).append(found)
    content = summarize(starts) | {
        "trainer": TRAINER,
        "patch": SHAPE,
        "batch": BATCH,
        "draws": args.draws,
        "repeats": args.repeats,
        "seed": SEED,
        **provenance("cpu"),
    }
    args.o.parent.mkdir(parents=True, exist_ok=True)
    write_json(content, args.o)
    draw(content, args.o.with_suffix(".png"))
    for number, row in content["pools"].items():
        print(number, row)


def make_pool(base: Path, number: int, cases: int) -> Path:
    """Make a data set with so many unlabelled cases out of one that has one; return its folder.

    Args:
        base: preprocessed, in nnU-Net's folder; its raw images lie in nnU-Net's, too.
        number: of the new data set.
        cases: in its pool.
    """
    made = base.with_name(f"Dataset{number:03d}_Pool{cases}")
    plans = read_plans(base)
    identifier = plans["configurations"][CONFIGURATION]["data_identifier"]
    source, manifest = unlabeled_folder(base, identifier), manifest_path(base, identifier)
    shutil.copytree(base, made, ignore=shutil.ignore_patterns(source.name, manifest.name))
    write_json(plans | {"dataset_name": made.name}, made / "nnUNetPlans.json")

    content = json.loads(manifest.read_text(encoding="utf-8"))
    ((case, facts),) = content["cases"].items()
    names = [f"scan_{k:06d}" for k in range(cases)]
    content["cases"] = dict.fromkeys(names, facts)
    write_json(content, manifest_path(made, identifier))

    raw = Path(os.environ["nnUNet_raw"])
    images = raw / made.name / "imagesUn"
    (raw_image,) = (raw / base.name / "imagesUn").glob(f"{case}_0000.*")
    ending = raw_image.name.removeprefix(case)
    pool = unlabeled_folder(made, identifier)
    for folder in (images, pool):
        folder.mkdir(parents=True)
    for name in names:
        link(raw_image, images / f"{name}{ending}")
        for file in CASE_FILES:
            link(source / f"{case}{file}", pool / f"{name}{file}")
    return made


def link(source: Path, target: Path) -> None:
    """Link a file, or copy it where the file system takes no (more) links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def run(folder: Path, name: str, draws: int) -> dict[str, Any]:
    """Start a training and draw batches; return what it took, in seconds and MB."""
    torch.set_num_threads(1)
    plans, device = read_plans(folder), torch.device("cpu")
    times: list[float] = []
    with silence():
        start, own_start = time.perf_counter(), time.process_time()
        if name == STOCK:
            dataset_json = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
            fresh = plans | {"continue_training": False}
            trainer: Any = nnUNetTrainer(fresh, CONFIGURATION, "all", dataset_json, device)
        else:
            trainer = build(name, folder, plans, CONFIGURATION, device)
        trainer.on_train_start()
        batch = next(trainer.dataloader_train)
        wall, own = time.perf_counter() - start, time.process_time() - own_start
        if name != STOCK and "unlabeled" not in batch:
            raise RuntimeError(f"The first batch of {name} has no unlabelled patches.")
        for _ in range(draws):
            own_start = time.process_time()
            next(trainer.dataloader_train)
            times.append(time.process_time() - own_start)
    return {
        "start": wall,
        "start_processor": own,
        "batch": times,
        "memory": status("VmRSS") / MB,
        "peak": status("VmHWM") / MB,
    }


def summarize(starts: dict[Any, list[dict]]) -> dict[str, Any]:
    """Return the table: medians over starts, and over all batches of a size."""

    def median(key: Any, name: str) -> float:
        return float(np.median([found[name] for found in starts[key]]))

    stock = {name: median(STOCK, name) for name in ("start", "start_processor", "memory")}
    pools = {}
    for key in (k for k in starts if k != STOCK):
        times = 1000 * np.concatenate([found["batch"] for found in starts[key]])
        low, middle, high = np.quantile(times, (0.25, 0.5, 0.75))
        pools[str(key)] = {
            "start_beyond_nnunet_s": round(median(key, "start") - stock["start"], 2),
            "start_beyond_nnunet_processor_s": round(
                median(key, "start_processor") - stock["start_processor"], 2
            ),
            "batch_ms": [round(float(value), 2) for value in (middle, low, high)],
            "memory_mb": round(median(key, "memory"), 1),
            "peak_mb": round(median(key, "peak"), 1),
        }
    return {
        "what": (__doc__ or "").splitlines()[0],
        "columns": {
            "start_beyond_nnunet_s": "wall clock, median over the starts, less nnU-Net's median",
            "start_beyond_nnunet_processor_s": "the same in processor time of the process",
            "batch_ms": "processor time of both streams' patches: median, lower, upper quartile",
            "memory_mb": "resident, after the last batch; peak_mb at most",
        },
        "target": f"start_beyond_nnunet_s below {TARGET:g} with 10 000 cases; no growth elsewhere",
        "nnunet": {name: round(value, 2) for name, value in stock.items()},
        "pools": pools,
    }


def draw(content: dict[str, Any], picture: Path) -> None:
    """Draw the three columns over the size of the pool."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    sizes = [int(number) for number in content["pools"]]
    rows = list(content["pools"].values())
    with plt.style.context("default"):
        figure, axes = plt.subplots(1, 3, figsize=(9, 2.7), layout="constrained")
        start, batch, memory = axes
        for name, label in (("s", "wall clock"), ("processor_s", "processor")):
            values = [row[f"start_beyond_nnunet_{name}"] for row in rows]
            start.plot(sizes, values, marker="o", label=label)
        start.axhline(TARGET, color="tab:red", ls=":", label="target")
        start.set_title("start-up beyond nnU-Net's, s", fontsize=10)
        start.legend(frameon=False, fontsize=8)
        middle, low, high = np.array([row["batch_ms"] for row in rows]).T
        batch.errorbar(sizes, middle, (middle - low, high - middle), marker="o", capsize=3)
        batch.set_title("a batch, ms of the processor", fontsize=10)
        memory.plot(sizes, [row["memory_mb"] for row in rows], marker="o")
        memory.set_title("memory of the process, MB", fontsize=10)
        for axis in axes:
            axis.set(xscale="log", xlabel="scans without masks")
            axis.set_ylim(min(0, axis.get_ylim()[0]), 1.1 * axis.get_ylim()[1])
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(picture, dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    main()
