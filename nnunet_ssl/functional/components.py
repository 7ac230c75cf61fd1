"""Largest connected component. It waits: the labels travel to the CPU and back."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def largest_component(
    labels: Tensor, num_classes: int, classes: Sequence[int] | None = None
) -> Tensor:
    """Keep each foreground class's largest component per sample; the others become 0.

    Waits for the device; in 3D it takes some hundredths of a second per patch. Wrong for classes
    that come in several parts, and a patch may cut one organ in two.

    Args:
        labels: (B, 1, *) integers in [0, num_classes).
        num_classes: classes with background.
        classes: classes to filter; None filters all but background.

    Returns:
        (B, 1, *), dtype and device kept. Diagonal neighbours connect. Of components of the same
        size one stays.

    Source: Bai et al. 2023, arXiv:2305.00673 (code).
    """
    classes = range(1, num_classes) if classes is None else classes
    small = labels[:, 0].to(torch.uint8 if num_classes <= 256 else torch.int32)  # travels faster
    dropped = np.stack([_smaller_pieces(sample, classes) for sample in small.cpu().numpy()])
    gone = torch.from_numpy(dropped).to(labels.device, non_blocking=True)[:, None]
    return torch.where(gone, 0, labels)


def largest_component_regions(mask: Tensor) -> Tensor:
    """Keep the largest component per sample and region; see `largest_component`.

    Args:
        mask: (B, R, *) bool.

    Returns:
        (B, R, *) bool, a subset of `mask`.
    """
    flat = mask.flatten(0, 1)[:, None].to(torch.uint8)
    return largest_component(flat, num_classes=2).bool().view(mask.shape)


def _smaller_pieces(labels: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    import cc3d  # comes with nnU-Net; imported where needed because few methods filter

    components, number = cc3d.connected_components(
        labels, connectivity=8 if labels.ndim == 2 else 26, return_N=True
    )
    foreground = np.flatnonzero(labels)  # mostly few voxels
    component, label = components.ravel()[foreground], labels.ravel()[foreground]
    sizes = np.bincount(component, minlength=number + 1)
    class_of = np.zeros(number + 1, dtype=labels.dtype)
    class_of[component] = label
    drop = np.zeros(number + 1, dtype=bool)
    for k in classes:
        members = np.flatnonzero(class_of == k)
        if len(members):
            drop[members] = True
            drop[members[sizes[members].argmax()]] = False
    dropped = np.zeros(labels.size, dtype=bool)
    dropped[foreground[drop[component]]] = True
    return dropped.reshape(labels.shape)
