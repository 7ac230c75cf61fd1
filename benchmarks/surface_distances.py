"""Time of HD95, ASSD and ASD on atria in volumes of the original size, against medpy.

The masks are those of the UA-MT release of the 2018 Atrial Segmentation Challenge, which are
cropped, pasted into 576 x 576 x 88 or 640 x 640 x 88 voxels, the size of the scans. The second mask
is the first with a smoothly displaced surface (Dice about 0.9); in the last pair it lies in another
corner, as after a failed segmentation. medpy also gets the masks cropped to the box around both, as
a careful user would do; "distance transform" is our code with the transform of that box in place of
the search tree. Dice, Jaccard and NSD are part of our time, not of medpy's.

    python benchmarks/surface_distances.py --masks "2018LA_Seg_Training Set"

Results: benchmarks/results/surface_distances.json. Needs h5py and medpy.
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
from medpy.metric import binary
from scipy.ndimage import distance_transform_edt, gaussian_filter
from tqdm import tqdm

from nnunet_ssl.evaluation.metrics import bounding_box, score_masks, surface
from nnunet_ssl.io import write_json

SPACING = (0.625, 0.625, 0.625)  # mm
SIZES = (576, 640)
REPEATS = 5  # of the fast ones; medpy on whole volumes runs once
DISTANCES = ("hd95", "assd", "asd")
RESULTS = Path(__file__).parent / "results" / "surface_distances.json"


def main() -> None:
    """Time all pairs and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", type=Path, required=True, help="holds <case>/mri_norm2.h5")
    args = parser.parse_args()
    files = sorted(args.masks.glob("*/mri_norm2.h5"))[: len(SIZES)]
    if len(files) < len(SIZES):
        parser.error(f"{args.masks} holds {len(files)} <case>/mri_norm2.h5, needed: {len(SIZES)}")

    pairs = []
    for path, size in zip(files, SIZES, strict=True):
        with h5py.File(path) as file:
            mask = file["label"][()].astype(bool)
        pairs += [(path.parent.name, size, mask, False)]
    pairs.append((*pairs[0][:3], True))
    results = [time_pair(*pair) for pair in tqdm(pairs, desc="Timing pairs")]
    content = {
        "what": __doc__.splitlines()[0],
        "seconds": "CPU time of hd95 + assd + asd of one pair; median, medpy's once",
        "pairs": results,
        "command": shlex.join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
        "commit": subprocess.check_output(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True
        ).strip(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, one used",
        "versions": {p: version(p) for p in ("nnunet_ssl", "numpy", "scipy", "medpy")}
        | {"python": platform.python_version()},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(content, RESULTS)
    for pair in results:
        print(pair["pair"], pair["seconds"], f"{pair['times_as_fast_as_medpy']} x medpy")


def time_pair(case: str, size: int, mask: np.ndarray, far: bool) -> dict:
    """Score one pair in every way; return seconds, and how far the values are from medpy's."""
    moved = displace(mask)
    annotation, segmentation = np.zeros((2, size, size, mask.shape[2]), bool)
    annotation[paste(mask, 0.35, size)] = mask
    segmentation[paste(mask, 0.0 if far else 0.35, size)] = moved
    box = bounding_box(annotation | segmentation)
    crop = segmentation[box], annotation[box]
    calls: dict[str, tuple[Callable[[], list[float]], int]] = {
        "nnunet_ssl": (lambda: ours(segmentation, annotation), REPEATS),
        "distance transform": (lambda: transformed(segmentation, annotation), REPEATS),
        "medpy, cropped": (lambda: medpy(*crop), 1),
        "medpy": (lambda: medpy(segmentation, annotation), 1),
    }
    seconds, values = {}, {}
    for name, (call, repeats) in calls.items():
        times = []
        for _ in range(repeats):
            start = time.process_time()
            values[name] = call()
            times.append(time.process_time() - start)
        seconds[name] = float(f"{np.median(times):.3g}")
    errors = [np.abs(np.subtract(found, values["medpy"])).max() for found in values.values()]
    return {
        "pair": f"{size} x {size} x {mask.shape[2]}, " + ("far apart" if far else "overlapping"),
        "case": case,
        "dice": round(score_masks(segmentation, annotation, {})["dice", ""] or 0.0, 3),
        "surface_voxels": [len(surface(m)) for m in crop],
        "seconds": seconds,
        "times_as_fast_as_medpy": round(seconds["medpy"] / seconds["nnunet_ssl"]),
        "times_as_fast_as_medpy_cropped": round(
            seconds["medpy, cropped"] / seconds["nnunet_ssl"], 1
        ),
        "largest_difference_to_medpy": float(max(errors)),
    }


def displace(mask: np.ndarray) -> np.ndarray:
    """Return the mask with its surface moved by a smooth random field, a few voxels."""
    noise = gaussian_filter(np.random.default_rng(0).normal(size=mask.shape), 4)
    soft = gaussian_filter(mask.astype(float), 2) + 0.25 * noise / noise.std()
    return (soft > 0.5) & (gaussian_filter(mask.astype(float), 6) > 0.05)


def paste(mask: np.ndarray, position: float, size: int) -> tuple[slice, ...]:
    """Place of the mask in the volume, `position` of the way from its corner in x and y."""
    start = int(position * size)
    return tuple(slice(start, start + n) for n in mask.shape[:2])


def ours(segmentation: np.ndarray, annotation: np.ndarray) -> list[float]:
    """As `nnunet_ssl evaluate` does it."""
    scores = score_masks(segmentation, annotation, {"mm": SPACING})
    return [scores[name, "mm"] or 0.0 for name in DISTANCES]


def transformed(segmentation: np.ndarray, annotation: np.ndarray) -> list[float]:
    """Ours with a distance transform of the box in place of the search tree."""
    box = bounding_box(segmentation | annotation)
    borders = np.zeros((2, *annotation[box].shape), bool)
    for border, mask in zip(borders, (segmentation, annotation), strict=True):
        border[tuple(surface(mask[box]).T)] = True
    there = distance_transform_edt(~borders[1], sampling=SPACING)[borders[0]]
    back = distance_transform_edt(~borders[0], sampling=SPACING)[borders[1]]
    pooled = np.concatenate((there, back))
    return [float(np.percentile(pooled, 95)), float(pooled.mean()), float(there.mean())]


def medpy(segmentation: np.ndarray, annotation: np.ndarray) -> list[float]:
    """As the literature does it."""
    return [float(getattr(binary, name)(segmentation, annotation, SPACING)) for name in DISTANCES]


if __name__ == "__main__":
    main()
