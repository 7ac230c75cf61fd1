"""How far several segmentations of a case agree."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

LabelSets = Mapping[str, Sequence[int]]  # class or region -> its labels


class Committee:
    """Compares segmentations with a first one, one at a time; none of them is kept.

    Attributes:
        unsure: (*) bool, where any of them differs from the first.

    Args:
        labels: the first, (Z, *) integers.
        label_sets: classes or regions.

    Source: ST++, Yang et al. 2022, arXiv:2106.05095, eq. 4, with Dice for IoU.
    """

    def __init__(self, labels: np.ndarray, label_sets: LabelSets):
        self.labels, self.label_sets = labels, label_sets
        self.unsure = np.zeros(labels.shape, dtype=bool)
        self._scores: dict[str, list[float]] = {name: [] for name in label_sets}

    def add(self, other: np.ndarray) -> None:
        """Count another segmentation, of the same shape."""
        self.unsure |= other != self.labels
        pairs = self._pairs(other)
        for name, values in self.label_sets.items():
            chosen = list(values)
            total = pairs[chosen].sum() + pairs[:, chosen].sum()
            if total:
                self._scores[name].append(2 * float(pairs[np.ix_(chosen, chosen)].sum() / total))

    def _pairs(self, other: np.ndarray) -> np.ndarray:
        return count_pairs(self.labels, other, max(map(max, self.label_sets.values())) + 1)

    def voxels(self) -> dict[str, int]:
        """Return by class its voxels in the first segmentation."""
        counts = self._pairs(self.labels).diagonal()
        return {name: int(counts[list(values)].sum()) for name, values in self.label_sets.items()}

    def by_class(self) -> dict[str, float | None]:
        """Return by class the mean Dice with the first, in [0, 1].

        None for a class that none of them shows. A pair in which neither shows the class does not
        count.
        """
        return {
            name: sum(scores) / len(scores) if scores else None
            for name, scores in self._scores.items()
        }


def count_pairs(labels: np.ndarray, other: np.ndarray, least: int) -> np.ndarray:
    """Return how often each pair of labels meets: (K, K), rows are `labels`.

    Slice by slice, so that large images need little memory, and once for all classes.

    Args:
        labels: (Z, *) whole numbers from 0 on, in any type: nnU-Net reads masks as floats.
        other: same shape.
        least: labels from 0 on to make room for.
    """
    size = max(least, int(labels.max()) + 1, int(other.max()) + 1)
    counts = np.zeros(size * size, dtype=np.int64)
    for a, b in zip(labels, other, strict=True):
        pair = a.ravel().astype(np.int64) * size + b.ravel().astype(np.int64)
        counts += np.bincount(pair, minlength=size * size)
    return counts.reshape(size, size)


def agreement(
    labels: np.ndarray, others: Iterable[np.ndarray], label_sets: LabelSets
) -> dict[str, float | None]:
    """Return by class the mean Dice between one segmentation and others; see `Committee`."""
    committee = Committee(labels, label_sets)
    for other in others:
        committee.add(other)
    return committee.by_class()


def stability(by_class: Mapping[str, float | None]) -> float:
    """Return the mean over classes; 1 if there is none: all agree that nothing is there."""
    known = [value for value in by_class.values() if value is not None]
    return sum(known) / len(known) if known else 1.0


def change(before: np.ndarray, after: np.ndarray) -> tuple[int, int]:
    """Return how many voxels changed, and how many were foreground before."""
    return int(np.count_nonzero(before != after)), int(np.count_nonzero(before))
