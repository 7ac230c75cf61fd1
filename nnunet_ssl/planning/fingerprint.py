"""The fingerprint: shapes and spacings of all scans, intensities from annotated foreground."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
    DatasetFingerprintExtractor,
)

from nnunet_ssl.errors import UserError
from nnunet_ssl.io import write_json
from nnunet_ssl.planning.raw import CaseInfo, RawDataset, silence
from nnunet_ssl.planning.workers import Workers

VOXELS_FOR_INTENSITIES = int(10e7)  # of the whole data set, as in nnU-Net
# nnU-Net draws 1e8 voxels (with replacement) even from a single case: over 1 GB and 10 s for
# nothing. A million is what it takes of each of 100 cases.
VOXELS_PER_CASE = 1_000_000


def extract_fingerprint(
    raw: RawDataset,
    labeled: Mapping[str, CaseInfo],
    unlabeled: Mapping[str, CaseInfo],
    workers: Workers,
    path: Path,
) -> dict:
    """Write dataset_fingerprint.json in nnU-Net's form.

    Args:
        raw: the data set.
        labeled: infos of the annotated cases.
        unlabeled: infos of the further cases that count; empty gives nnU-Net's own fingerprint
            (below 100 cases up to sampling noise in the intensities).
        workers: pool.
        path: file to write.

    Returns:
        The fingerprint. Its key "nnunet_ssl" tells what it was made from; nnU-Net ignores it.

    Raises:
        UserError: no voxel of any mask is foreground; file not writable.
    """
    reader = raw.reader_writer()
    samples = min(VOXELS_FOR_INTENSITIES // len(labeled), VOXELS_PER_CASE)
    jobs = [
        ([str(p) for p in raw.labeled[case]], str(raw.masks[case]), reader, samples)
        for case in labeled
    ]
    intensities = workers.map(foreground_intensities, jobs, "Fingerprint")
    per_channel = [np.concatenate(channel) for channel in zip(*intensities, strict=True)]
    if any(len(values) == 0 for values in per_channel):
        raise UserError(
            f"No mask in {next(iter(raw.masks.values())).parent} marks any foreground voxel, so "
            f"nnU-Net has no intensities to plan from. Add masks of the structures to segment."
        )
    infos = [*labeled.values(), *unlabeled.values()]
    fingerprint = {
        "spacings": [list(i.spacing) for i in infos],
        "shapes_after_crop": [list(i.shape_after_crop) for i in infos],
        "foreground_intensity_properties_per_channel": {
            str(c): _statistics(values) for c, values in enumerate(per_channel)
        },
        "median_relative_size_after_cropping": float(np.median([i.relative_size for i in infos])),
        "nnunet_ssl": {
            "plan_on": "all" if unlabeled else "labeled",
            "num_labeled": len(labeled),
            "num_unlabeled": len(unlabeled),
        },
    }
    write_json(fingerprint, path)
    return fingerprint


def foreground_intensities(
    images: Sequence[str], mask: str, reader: type, num_samples: int
) -> list[np.ndarray]:
    """Sample foreground intensities of one case with nnU-Net's extractor, one array a channel."""
    with silence():
        result = DatasetFingerprintExtractor.analyze_case(images, mask, reader, num_samples)
    return [np.asarray(channel, dtype=np.float32) for channel in result[2]]


def _statistics(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
    return {
        "mean": float(np.mean(values)),
        "median": float(median),
        "std": float(np.std(values)),
        "min": float(np.min(values)),
        "max": float(np.max(values)),
        "percentile_99_5": float(high),
        "percentile_00_5": float(low),
    }
