"""First look at real data: the trainers on MSD hippocampus with few labels, on a CPU.

A sanity check of the whole chain (split, plan, train, predict, evaluate through the stock
commands), not a benchmark: one order of cases, a small 2D network, short training. The last cases
of the list are a test set that training never sees; the others without masks are unlabelled.

    python benchmarks/first_look.py --source Task04_Hippocampus --list train.list --work DIR

Finished trainers are not run again. Results: benchmarks/results/hippocampus_first_look.json.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from nnunet_ssl.demo import Runner, demo_environment
from nnunet_ssl.history import LOG_NAME, read_log
from nnunet_ssl.io import write_json
from nnunet_ssl.planning.small import shrink_plans

TRAINERS = (
    "SSLTrainerSupervised",
    "SSLTrainer",
    "SSLTrainerMeanTeacher",
    "SSLTrainerFixMatch",
    "SSLTrainerBCP",
)
LABELED, TEST = 4, 40
CONFIGURATION, PLANS = "2d", "nnUNetSmallPlans"
FEATURES, BATCH = (16, 32, 64, 128), 16
SETTINGS = {
    "num_epochs": 40,
    "num_iterations_per_epoch": 50,
    "num_val_iterations_per_epoch": 4,
    "bf16_on_cpu": "true",
}
CLASSES = {"1": "anterior", "2": "posterior"}
COMMIT = subprocess.check_output(
    ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True
).strip()
RESULTS = Path(__file__).parent / "results" / "hippocampus_first_look.json"


def main() -> None:
    """Run what is not in the results file yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="MSD folder Task04_Hippocampus")
    parser.add_argument("--list", type=Path, required=True, help="order of its cases")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    args = parser.parse_args()

    RESULTS.parent.mkdir(exist_ok=True)
    work = args.work.resolve()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "logs"):
        (work / name).mkdir(parents=True, exist_ok=True)
    run = Runner(work, demo_environment(work))
    data = prepare(work, args.source, args.list, run)

    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": []}
    results |= {"what": __doc__.splitlines()[0], "cases": data, "settings": describe()}
    done = {(r["trainer"], r["seed"]) for r in results["runs"]}
    for seed in args.seeds:
        for trainer in TRAINERS:
            if (trainer, seed) not in done:
                results["runs"].append(train_and_score(work, trainer, seed, run))
                write_json(results, RESULTS)
                print(json.dumps(results["runs"][-1]["mean_dice"]), flush=True)


def prepare(work: Path, source: Path, order: Path, run: Runner) -> dict:
    """Convert, split, plan; return how many cases of each kind there are."""
    name = f"Dataset104_Hippocampus_{LABELED}labeled"
    if not (work / "nnUNet_preprocessed" / name / f"{PLANS}.json").is_file():
        copy = work / "source" / source.name
        shutil.copytree(source, copy, dirs_exist_ok=True)
        convert = ["nnUNetv2_convert_MSD_dataset", "-i", str(copy), "-overwrite_id", "4"]
        run("convert", [*convert, "-np", "2"])
        split = ["nnunet_ssl", "split", "-d", "4", "-o", "104", "--labeled", str(LABELED)]
        run("split", [*split, "--list", str(order.resolve()), "--test", str(TEST)])
        plan = ["nnunet_ssl", "plan_and_preprocess", "-d", "104", "-c", CONFIGURATION]
        run("plan", [*plan, "-np", "2", "-npfp", "2"])
        folder = work / "nnUNet_preprocessed" / name
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        small = shrink_plans(plans, CONFIGURATION, FEATURES, None, BATCH, convs_per_stage=2)
        write_json({**small, "plans_name": PLANS}, folder / f"{PLANS}.json")
    raw = work / "nnUNet_raw" / name
    return {
        "labeled": sorted(p.name.split("_0000")[0] for p in (raw / "imagesTr").iterdir()),
        "unlabeled": len(list((raw / "imagesUn").iterdir())),
        "test": TEST,
    }


def train_and_score(work: Path, trainer: str, seed: int, run: Runner) -> dict:
    """Train, predict the test cases with the final checkpoint, return what came out."""
    held_out = work / "nnunet_ssl_heldout" / f"Dataset104_Hippocampus_{LABELED}labeled"
    name = "+".join([trainer, *(f"{k}={v}" for k, v in SETTINGS.items()), f"seed={seed}"])
    model = ["-tr", name, "-p", PLANS, "-device", "cpu"]
    command = ["nnUNetv2_train", "104", CONFIGURATION, "all", *model]
    predictions = work / "predictions" / f"{trainer}_{seed}"
    model_folder = f"{name}__{PLANS}__{CONFIGURATION}/fold_all"
    fold = work / "nnUNet_results" / held_out.name / model_folder
    if not (fold / "checkpoint_final.pth").is_file():
        run(f"train_{trainer}_{seed}", command, epochs=int(SETTINGS["num_epochs"]))
    predict = ["nnUNetv2_predict", "-i", str(held_out / "test_images"), "-o", str(predictions)]
    predict += ["-d", "104", "-c", CONFIGURATION, "-f", "all", *model, "--disable_tta"]
    run(f"predict_{trainer}_{seed}", [*predict, "-npp", "1", "-nps", "1"])
    evaluate = ["nnUNetv2_evaluate_simple", str(held_out / "test_labels"), str(predictions)]
    run(f"evaluate_{trainer}_{seed}", [*evaluate, "-l", *CLASSES, "-np", "2"])
    cases = json.loads((predictions / "summary.json").read_text())["metric_per_case"]
    dice = {
        c: [round(float(case["metrics"][label]["Dice"]), 4) for case in cases]
        for label, c in CLASSES.items()
    }
    return {
        "trainer": trainer,
        "seed": seed,
        "draw": "order of the list",
        "mean_dice": {
            **{c: round(float(np.mean(v)), 4) for c, v in dice.items()},
            "mean": round(float(np.mean(list(dice.values()))), 4),
        },
        "dice_per_case": dice,
        "train_seconds": round(sum(r["seconds"] for r in read_log(fold / LOG_NAME))),
        "command": " ".join(command),
        "commit": COMMIT,
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {
            p: version(p) for p in ("nnunet-ssl", "nnunetv2", "torch", "batchgeneratorsv2")
        }
        | {"python": platform.python_version()},
    }


def describe() -> dict:
    """Return what all runs share."""
    return {
        **SETTINGS,
        "steps": SETTINGS["num_epochs"] * SETTINGS["num_iterations_per_epoch"],  # type: ignore
        "configuration": CONFIGURATION,
        "network": f"PlainConvUNet, features {FEATURES}",
        "batch": BATCH,
        "fold": "all",
        "checkpoint": "final",
        "mirroring at test": False,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
