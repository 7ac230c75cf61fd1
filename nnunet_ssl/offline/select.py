"""Which models may teach, and which of their pseudo-labels training gets."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_ssl.history import LOG_NAME, read_log

LAST_EPOCHS = 5
LOST = 0.01  # pseudo-Dice up to which a class counts as lost
MOST_UNSURE = 0.5  # share of a case's foreground, as any of the masks has it


def collapse_of(fold: Path, classes: Sequence[str], true_volumes: bool) -> str | None:
    """Return why a trained model must not teach, from the log of its training; None if it may.

    Models without our log (stock trainers) are judged by their masks alone: a case that lacks a
    class which all annotated cases have is rejected in any case.

    Args:
        fold: folder of the training.
        classes: names in the order of the log.
        true_volumes: all masks it trained on were whole and made by hand, so that volumes of
            pseudo-labels can be compared with theirs.
    """
    records = read_log(fold / LOG_NAME)
    if not records:
        return None
    last = records[-1]
    if not last["terms"] or any(value is None for value in last["terms"].values()):
        return "its loss was not a finite number at the end of training"
    brake = last["pseudo_labels"].get("brake")
    if true_volumes and brake is not None and brake < 1 - 1e-3:
        return (
            f"its pseudo-labels had lost a class at the end of training (the brake stood at "
            f"{brake:.2f}; 1 is open)"
        )
    for number, name in enumerate(classes):
        best = best_dice(records[-LAST_EPOCHS:], number)
        if best is not None and best <= LOST:
            return (
                f"it does not find {name}: pseudo-Dice {best:.2f} in its last "
                f"{min(LAST_EPOCHS, len(records))} epochs"
            )
    return None


def best_dice(records: Sequence[Mapping[str, Any]], number: int) -> float | None:
    """Return the highest pseudo-Dice of a class, of any network; None if it was never measured."""
    known = [
        values[number]
        for record in records
        for values in record["pseudo_dice"].values()
        if number < len(values) and values[number] is not None
    ]
    return max(known, default=None)


def kind_of(reason: str) -> str:
    """Return a reason without what is of one case only, which stands behind a colon."""
    return reason.partition(":")[0]


def choose(
    rows: Sequence[Mapping[str, Any]], everywhere: Sequence[str], drop: float
) -> dict[str, str | None]:
    """Return by case why training does not get its pseudo-label; None if it does.

    Out are cases that could not be read, that lack a class which all annotated cases have, that a
    check of the anatomy refuses, of which more is unsure than sure, and the least stable share. At
    least one case stays without mask, for the online teacher.

    Args:
        rows: of `predict.read_rows`.
        everywhere: classes that all annotated cases have.
        drop: share of the readable cases to leave out as least stable, in [0, 1).
    """
    readable = [row for row in rows if "error" not in row]
    ranked = sorted(readable, key=lambda row: (row["stability"], row["case"]))
    least = {row["case"] for row in ranked[: math.floor(drop * len(ranked) + 1e-6)]}
    reasons: dict[str, str | None] = {}
    for row in rows:
        if "error" in row:
            reasons[row["case"]] = f"cannot be read: {row['error']}"
            continue
        missing = [name for name in everywhere if not row["voxels"][name]]
        if missing:
            reason: str | None = f"no {missing[0]}, which every annotated case has"
        elif row["implausible"]:
            reason = row["implausible"]
        elif row["unsure"] > MOST_UNSURE:
            reason = f"more of it is unsure than sure: {100 * row['unsure']:.0f} %"
        elif row["case"] in least:
            reason = f"among the least stable {100 * drop:g} %"
        else:
            reason = None
        reasons[row["case"]] = reason
    if ranked and all(reasons[row["case"]] is None for row in ranked):
        reasons[ranked[0]["case"]] = "the least stable; one case stays without mask"
    return reasons
