"""Data sets some of whose masks a model made: which these are, and how training draws cases."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

PSEUDO_LABELS = "pseudo_labels.json"


def pseudo_labeled(preprocessed_base: str | Path) -> set[str]:
    """Return the cases among the annotated ones whose mask a model made; mostly none.

    Args:
        preprocessed_base: preprocessed folder of the data set.
    """
    path = Path(preprocessed_base) / PSEUDO_LABELS
    if not path.is_file():
        return set()
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    return {name for name, case in cases.items() if case["kept"]}


def balanced(cases: Sequence[str], made: Collection[str]) -> list[str]:
    """Repeat the cases with true masks until they are about as many as those with made ones.

    nnU-Net draws each case of a list alike, so true masks are then half of what training sees.

    Source: ST++, Yang et al. 2022, arXiv:2106.05095 (code).
    """
    true = [case for case in cases if case not in made]
    if not true:
        return list(cases)
    others = [case for case in cases if case in made]
    return sorted(true * max(1, round(len(others) / len(true))) + others)
