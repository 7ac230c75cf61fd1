"""How far several segmentations of a case agree."""

from collections.abc import Mapping, Sequence

import numpy as np

LabelSets = Mapping[str, Sequence[int]]  # class or region -> its labels


def agreement(
    labels: np.ndarray, others: Sequence[np.ndarray], label_sets: LabelSets
) -> dict[str, float | None]:
    """Return by class the mean Dice between one segmentation and the others.

    Args:
        labels: (*) integers.
        others: segmentations of the same shape, at least one.
        label_sets: classes or regions.

    Returns:
        Values in [0, 1]; None for a class that none of them shows. A pair in which neither shows
        the class does not count.

    Source: ST++, Yang et al. 2022, arXiv:2106.05095, eq. 4, with Dice for IoU.
    """
    found: dict[str, float | None] = {}
    for name, values in label_sets.items():
        own = np.isin(labels, values)
        size = np.count_nonzero(own)
        scores = []
        for other in others:
            mask = np.isin(other, values)
            total = size + np.count_nonzero(mask)
            if total:
                scores.append(2 * np.count_nonzero(own & mask) / total)
        found[name] = sum(scores) / len(scores) if scores else None
    return found


def stability(by_class: Mapping[str, float | None]) -> float:
    """Return the mean over classes; 1 if there is none: all agree that nothing is there."""
    known = [value for value in by_class.values() if value is not None]
    return sum(known) / len(known) if known else 1.0


def disagreement(labels: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """Return where any of the others differs, (*) bool."""
    unsure = np.zeros(labels.shape, dtype=bool)
    for other in others:
        unsure |= other != labels
    return unsure


def change(before: np.ndarray, after: np.ndarray) -> tuple[int, int]:
    """Return how many voxels changed, and how many were foreground before."""
    return int(np.count_nonzero(before != after)), int(np.count_nonzero(before))
