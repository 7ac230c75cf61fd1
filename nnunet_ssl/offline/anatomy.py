"""Is a pseudo-label plausible? Ready checks by what the annotated cases look like, or one's own.

A check is a function of a segmentation, its spacing and the annotated cases. It returns voxels that
are not plausible, which training then ignores, and why the whole case is not, if so.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from nnunet_ssl.data.components import count_pieces
from nnunet_ssl.ellipse import Ellipse, mask_ellipse
from nnunet_ssl.errors import UserError
from nnunet_ssl.functional import largest_component
from nnunet_ssl.offline.stability import LabelSets
from nnunet_ssl.planning.raw import RawDataset, silence
from nnunet_ssl.planning.workers import Workers

SINGLE = 0.95  # share of annotated masks that are one piece where a class is one
# Few annotated cases do not show the whole range: volumes may lie this factor outside of it, and
# an ellipse may fit this much worse than the worst annotated mask.
WIDER = 1.5
LOOSER = 0.05


@dataclass(frozen=True)
class Anatomy:
    """What the annotated cases show.

    Attributes:
        label_sets: class or region -> its labels.
        everywhere: classes that all of them have.
        single: classes that are one piece in nearly all.
        volumes: class -> smallest and largest volume, mm³ (mm² times thickness in 2D).
        ellipses: class -> smallest Dice of a mask and its ellipse; single slices only.
    """

    label_sets: dict[str, list[int]]
    everywhere: list[str]
    single: list[str]
    volumes: dict[str, list[float]]
    ellipses: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Return what `Anatomy(**...)` takes."""
        return asdict(self)


Check = Callable[[np.ndarray, Sequence[float], Anatomy], tuple[np.ndarray | None, str | None]]


def study(raw: RawDataset, label_sets: LabelSets, workers: Workers) -> Anatomy:
    """Measure the annotated masks."""
    reader = raw.reader_writer()
    jobs = [(str(mask), reader, label_sets) for mask in raw.masks.values()]
    facts = workers.map(measure, jobs, "Annotated cases")
    having = {name: [f[name] for f in facts if f[name]["voxels"]] for name in label_sets}
    return Anatomy(
        {name: [int(v) for v in values] for name, values in label_sets.items()},
        everywhere=[name for name, found in having.items() if len(found) == len(facts)],
        single=[
            name
            for name, found in having.items()
            if found and sum(f["pieces"] == 1 for f in found) >= SINGLE * len(found)
        ],
        volumes={
            name: [min(f["volume"] for f in found), max(f["volume"] for f in found)]
            for name, found in having.items()
            if found
        },
        ellipses={
            name: min(f["ellipse"] for f in found)
            for name, found in having.items()
            if found and all(f["ellipse"] is not None for f in found)
        },
    )


def measure(mask: str, reader: type, label_sets: LabelSets) -> dict[str, dict[str, Any]]:
    """Return by class voxels, volume, pieces and Dice with its ellipse of one annotated mask."""
    with silence():
        array, properties = reader().read_seg(mask)
    labels, facts = array[0], {}
    pieces = count_pieces(labels.astype(np.int32), list(label_sets.values()))
    for (name, values), parts in zip(label_sets.items(), pieces, strict=True):
        found = np.isin(labels, values)
        voxels = int(np.count_nonzero(found))
        facts[name] = {
            "voxels": voxels,
            "volume": voxels * math.prod(properties["spacing"]),
            "pieces": int(parts),
            "ellipse": None,
        }
        if voxels and len(labels) == 1 and (inside := inside_ellipse(found[0])) is not None:
            facts[name]["ellipse"] = dice(found[0], inside)
    return facts


def largest(
    labels: np.ndarray, spacing: Sequence[float], anatomy: Anatomy
) -> tuple[np.ndarray | None, str | None]:
    """Doubt all but the largest piece of each class that is one piece in annotated cases."""
    doubted = np.zeros(labels.shape, dtype=bool)
    for name in anatomy.single:
        mask = np.isin(labels, anatomy.label_sets[name])
        kept = largest_component(torch.from_numpy(mask.astype(np.uint8))[None, None], 2)
        doubted |= mask & ~kept[0, 0].bool().numpy()
    return doubted, None


def volume(
    labels: np.ndarray, spacing: Sequence[float], anatomy: Anatomy
) -> tuple[np.ndarray | None, str | None]:
    """Refuse a class that is much smaller or larger than in all annotated cases."""
    for name, (low, high) in anatomy.volumes.items():
        size = math.prod(spacing) * np.count_nonzero(np.isin(labels, anatomy.label_sets[name]))
        if size and not low / WIDER <= size <= high * WIDER:
            return None, (
                f"{name} has an unusual volume: {size:.4g} mm³, over {WIDER:g} times outside the "
                f"{low:.4g} to {high:.4g} of annotated cases"
            )
    return None, None


def ellipse(
    labels: np.ndarray, spacing: Sequence[float], anatomy: Anatomy
) -> tuple[np.ndarray | None, str | None]:
    """Doubt what differs from the ellipse that fits a class; refuse what is none.

    For classes that are one piece in annotated cases, on single slices.

    Source: Zhou et al. 2025 (ERSR), arXiv:2508.19815, there on the patches of training.
    """
    doubted = np.zeros(labels.shape, dtype=bool)
    for name in anatomy.single:
        mask = np.isin(labels[0], anatomy.label_sets[name])
        if name not in anatomy.ellipses or not mask.any():
            continue
        inside = inside_ellipse(mask)
        fit = 0.0 if inside is None else dice(mask, inside)
        if inside is None or fit < anatomy.ellipses[name] - LOOSER:
            return None, (
                f"{name} is no ellipse: Dice {fit:.2f} with the one that fits best, at least "
                f"{anatomy.ellipses[name]:.2f} in annotated cases"
            )
        doubted[0] |= mask ^ inside
    return doubted, None


CHECKS: dict[str, Check] = {"largest": largest, "ellipse": ellipse, "volume": volume}


def find_check(name: str) -> Check:
    """Return a ready check, or the function that `module:function` names.

    Raises:
        UserError: neither.
    """
    if name in CHECKS:
        return CHECKS[name]
    module, colon, function = name.partition(":")
    try:
        if colon:
            return getattr(importlib.import_module(module), function)
        reason = "it is none of the ready ones"
    except (ImportError, AttributeError) as error:
        reason = str(error)
    raise UserError(
        f"--shape {name}: {reason}. Give {', '.join(CHECKS)}, or module:function that Python can "
        f"import."
    )


def inside_ellipse(mask: np.ndarray) -> np.ndarray | None:
    """Return the ellipse that fits a mask (H, W), as a mask; None if none fits."""
    found = mask_ellipse(mask)
    return None if found is None else fill(found, mask.shape)


def fill(found: Ellipse, shape: Sequence[int]) -> np.ndarray:
    """Return the pixels (H, W) whose centre lies inside an ellipse."""
    row = np.arange(shape[0])[:, None] - found.center[0]
    column = np.arange(shape[1])[None] - found.center[1]
    cosine, sine = math.cos(found.angle), math.sin(found.angle)
    along, across = row * cosine + column * sine, column * cosine - row * sine
    return (along / found.long) ** 2 + (across / found.short) ** 2 <= 1


def dice(mask: np.ndarray, other: np.ndarray) -> float:
    """Dice of two masks that are not both empty."""
    return 2 * np.count_nonzero(mask & other) / (np.count_nonzero(mask) + np.count_nonzero(other))
