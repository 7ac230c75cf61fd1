"""Which classes are one piece in the annotated cases."""

from collections.abc import Sequence

import cc3d
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset


def single_piece(
    dataset: nnUNetBaseDataset,
    label_sets: Sequence[Sequence[int]],
    slices: bool,
    share: float = 0.95,
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
    single = np.zeros(len(label_sets), dtype=int)
    present = np.zeros(len(label_sets), dtype=int)
    for case in dataset.identifiers:
        _, seg, _, _ = dataset.load_case(case)
        labels = np.asarray(seg[:])[0]
        for i, label_set in enumerate(label_sets):
            mask = np.isin(labels, list(label_set)).astype(np.uint8)
            for part in mask if slices else [mask]:
                if part.any():
                    _, count = cc3d.connected_components(
                        part, connectivity=8 if slices else 26, return_N=True
                    )
                    present[i] += 1
                    single[i] += count == 1
    enough = present >= max(1, least)
    return [int(i) for i in np.flatnonzero(enough & (single >= share * present))]
