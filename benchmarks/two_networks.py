"""What the mean of two networks gives and costs: both networks alone and their mean, on test cases.

For trained runs of a method that predicts with two networks (C3S3, MEDL). "student" is the network
that `nnunet_ssl export --network student` takes out, "peer" the other one, "mean" what the method
predicts with. Each predicts in a process of its own with nnU-Net's predictor, as nnUNetv2_predict
does, one case after the other; the first case is predicted once more before, for warming up.

    python benchmarks/two_networks.py FOLD_FOLDER [FOLD_FOLDER ...] --images DIR --labels DIR

FOLD_FOLDER is .../TRAINER__PLANS__CONFIGURATION/fold_X of nnUNet_results, with
checkpoint_final.pth. Results: benchmarks/results/two_networks.json.
"""

import argparse
import gc
import multiprocessing
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tqdm import tqdm

from nnunet_ssl.checkpoint import load_checkpoint
from nnunet_ssl.duo import TwoNetworkTrainer
from nnunet_ssl.errors import UserError
from nnunet_ssl.evaluation.evaluate import evaluate_folder
from nnunet_ssl.evaluation.tasks import PACKAGES, commit, hardware
from nnunet_ssl.io import silence, write_json
from nnunet_ssl.naming import discovery_folder, resolve
from nnunet_ssl.planning.raw import list_cases

NETWORKS = ("student", "peer", "mean")
CHECKPOINT = "checkpoint_final.pth"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux
RESULTS = Path(__file__).parent / "results" / "two_networks.json"


def main() -> None:
    """Predict and score with every network of every run; write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folds", type=Path, nargs="+", help="fold folders of trained runs")
    parser.add_argument("--images", type=Path, required=True, help="test images, as in imagesTs")
    parser.add_argument("--labels", type=Path, required=True, help="their masks")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("-o", type=Path, default=RESULTS, help="results file")
    args = parser.parse_args()
    os.environ["nnUNet_extTrainer"] = str(discovery_folder())
    try:
        content = {
            "what": __doc__.splitlines()[0],
            "seconds": "of a case, median: whole = with reading, resampling and writing; network = "
            "sliding window alone; wall clock and processor time of the process",
            "memory": "MB; host_peak = of the process while it predicts, host_growth = of that, "
            "beyond what it held with the network loaded; gpu_peak = allocated by PyTorch",
            "runs": [
                measure_run(fold, args.images, args.labels, args.device) for fold in args.folds
            ],
            "command": shlex.join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
            "commit": commit(),
            "hardware": hardware(args.device),
            "threads": torch.get_num_threads(),
            "versions": {p: version(p) for p in PACKAGES} | {"python": platform.python_version()},
        }
    except UserError as error:
        parser.error(str(error))
    args.o.parent.mkdir(parents=True, exist_ok=True)
    write_json(content, args.o)
    for run in content["runs"]:
        for name, found in run["networks"].items():
            dice = {k: round(m["dice"]["mean"], 4) for k, m in found["scores"].items()}
            print(run["trainer"], name, dice, found["seconds"], found["memory"])


def measure_run(fold: Path, images: Path, labels: Path, device: str) -> dict[str, Any]:
    """Return scores and costs of the networks of one trained run.

    Raises:
        UserError: the run predicts with one network, or images and masks do not fit together.
    """
    facts = facts_of(fold)
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for name in tqdm(NETWORKS, desc=facts["trainer"].partition("+")[0]):
            output = Path(place) / name
            output.mkdir()
            # a process of its own: what one network took must not count for the next
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                cost = process.submit(predict, fold, name, images, device, output).result()
            summary = evaluate_folder(labels, output, output / "scores", processes=1, quiet=True)
            scores = {
                label: {metric: rounded(v) for metric, v in content["metrics"].items()}
                for label, content in summary["classes"].items()
            }
            found[name] = cost | {"scores": scores}
    return facts | {"cases": summary["cases"], "networks": found}


def facts_of(fold: Path) -> dict[str, Any]:
    """Return which run this is.

    Raises:
        UserError: it has no final checkpoint, or predicts with one network.
    """
    checkpoint = load_checkpoint(fold / CHECKPOINT)
    state = checkpoint.get("ssl_state")
    if state is None or not issubclass(resolve(state["trainer"]), TwoNetworkTrainer):
        raise UserError(f"{fold / CHECKPOINT} does not predict with the mean of two networks.")
    return {
        "trainer": state["trainer"],
        "dataset": fold.resolve().parent.parent.name,
        "configuration": checkpoint["init_args"]["configuration"],
        "fold": fold.name.removeprefix("fold_"),
        "seed": state["settings"]["seed"],
        "epochs": checkpoint["current_epoch"],
    }


def predict(fold: Path, name: str, images: Path, device: str, output: Path) -> dict[str, Any]:
    """Segment all images with one network; return what it cost.

    Args:
        fold: folder with the final checkpoint.
        name: of `NETWORKS`.
        images: folder of test images.
        device: "cpu" or "cuda".
        output: folder for the segmentations, which exists.
    """
    with silence():
        predictor = TimedPredictor(device=torch.device(device), allow_tqdm=False)
        use_fold = (fold.name.removeprefix("fold_"),)
        predictor.initialize_from_trained_model_folder(str(fold.parent), use_fold, CHECKPOINT)
        choose(predictor, name)
    gc.collect()
    if CLEAR.exists():
        CLEAR.write_text("5")  # the peak starts anew
    held = status("VmRSS")
    dataset_json = predictor.dataset_json
    channels = len(dataset_json["channel_names"])
    cases = list_cases(images, dataset_json["file_ending"], channels)
    jobs = [(list(map(str, paths)), str(output / case)) for case, paths in cases.items()]
    predictor.segment(*jobs[0])
    times = [predictor.segment(*job) for job in tqdm(jobs, name, leave=False)]
    peak = status("VmHWM")
    gpu = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    keys = ("whole_wall", "whole_cpu", "network_wall", "network_cpu")
    return {
        "parameters": sum(p.numel() for p in predictor.network.parameters()),
        "seconds": {
            key: float(f"{statistics.median(column):.3g}")
            for key, column in zip(keys, zip(*times, strict=True), strict=True)
        },
        "memory": {
            "host_peak": peak and round(peak),
            "host_growth": peak and held and round(peak - held),
            "gpu_peak": gpu and round(gpu),
        },
    }


class TimedPredictor(nnUNetPredictor):
    """nnU-Net's predictor with a clock."""

    def segment(self, channels: list[str], output: str) -> tuple[float, ...]:
        """Segment one case as nnU-Net does; return wall and processor time, then the network's.

        Args:
            channels: the case's files.
            output: file for the segmentation, without ending.
        """
        start = now()
        with silence():
            self.predict_from_files_sequential([channels], [output])
        return *(now() - start), *self.network_seconds

    def predict_logits_from_preprocessed_data(self, data: torch.Tensor) -> torch.Tensor:
        """Run the network as nnU-Net does."""
        start = now()
        logits = super().predict_logits_from_preprocessed_data(data)
        self.network_seconds = now() - start
        return logits


def choose(predictor: nnUNetPredictor, name: str) -> None:
    """Leave the predictor one of the two networks, or both."""
    if name != "mean":
        predictor.network = predictor.network.a if name == "student" else predictor.network.b
        predictor.list_of_parameters = [predictor.network.state_dict()]


def now() -> np.ndarray:
    """Wall clock and processor time in seconds."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def status(key: str) -> float | None:
    """Return an entry of this process's status in MB; None where the system has none."""
    found = re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    return int(found[1]) / 1024 if found else None


def rounded(statistic: dict[str, float | None]) -> dict[str, float | None]:
    """Round mean and sd to five digits."""
    return {k: v if not isinstance(v, float) else float(f"{v:.5g}") for k, v in statistic.items()}


if __name__ == "__main__":
    main()
