"""Which classes are one piece in the annotated cases."""

from collections.abc import Sequence
from typing import Literal

import cc3d
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from scipy.ndimage import find_objects


def single_piece(
    dataset: nnUNetBaseDataset,
    label_sets: Sequence[Sequence[int]],
    slices: bool,
    share: float,
    least: int = 1,
) -> list[int]:
    """Return the label sets that are one connected component in nearly all annotated cases.

    Args:
        dataset: preprocessed annotated cases.
        label_sets: the labels of each class or region.
        slices: look at each slice along the first axis instead of whole cases (2D patches).
        share: share of the cases, or slices, with the class that must show a single component.
        least: so many of them must show the class; fewer do not tell.

    Returns:
        Indices into `label_sets`, ascending.
    """
    if not slices and len(dataset.identifiers) < least:
        return []
    single = np.zeros(len(label_sets), dtype=int)
    present = np.zeros(len(label_sets), dtype=int)
    for case in dataset.identifiers:
        _, seg, _, _ = dataset.load_case(case)
        labels = np.maximum(np.asarray(seg[:])[0], 0)  # -1 is padding
        box = find_objects((labels > 0).astype(np.uint8))
        labels = labels[box[0]] if box else labels[:0]  # mostly a small part of the case
        for part in labels if slices else [labels]:
            counts = count_pieces(part, label_sets)
            present += counts > 0
            single += counts == 1
    enough = present >= max(1, least)
    return [int(i) for i in np.flatnonzero(enough & (single >= share * present))]


def count_pieces(labels: np.ndarray, label_sets: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the number of connected components of each label set; diagonal neighbours connect.

    Args:
        labels: 2D or 3D, integers of 0 and above.
        label_sets: the labels of each class or region.
    """
    counts = np.zeros(len(label_sets), dtype=int)
    if not labels.any():
        return counts
    connectivity: Literal[8, 26] = 8 if labels.ndim == 2 else 26
    components, number = cc3d.connected_components(labels, connectivity=connectivity, return_N=True)
    label_of = np.zeros(number + 1, dtype=int)
    label_of[components] = labels
    pieces = np.bincount(label_of[1:])
    for i, label_set in enumerate(label_sets):
        if len(label_set) == 1:
            counts[i] = pieces[label_set[0]] if label_set[0] < len(pieces) else 0
        else:  # parts of a region touch each other
            mask = np.isin(labels, list(label_set)).astype(np.uint8)
            _, counts[i] = cc3d.connected_components(mask, connectivity=connectivity, return_N=True)
    return counts
