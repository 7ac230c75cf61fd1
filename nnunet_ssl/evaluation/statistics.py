"""The verdict on a method, by a rule fixed before any run, and the numbers of the tables.

Differences are paired: a run minus its supervised twin of the same budget, draw and seed (or fold).
Dice lies in [0, 1] here; the report prints percent, and a Dice point is 0.01.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

CONFIDENCE = 0.95  # of the intervals
MIN_UNITS = 3  # fewer paired differences carry no verdict
MIN_DRAWS = 3  # from here on seeds of a draw are averaged and draws are the units
MARGIN = 0.01  # Dice; an interval wholly inside +-MARGIN means no difference
MOST_UNITS = 100  # the estimate of needed units stops here

HELPED = "helped"
HURT = "hurt"
SAME = "no difference"
OPEN = "too few runs to say"

UnitKind = Literal["draws", "runs", "folds"]

RULE = [
    "The unit is one paired difference: mean foreground Dice of a run minus that of its twin, the "
    "same network trained on the annotated scans alone, with the same budget, draw and seed (the "
    "same fold in a cross-validation). It is over the cases and classes that both have a score of.",
    f"With {MIN_DRAWS} or more draws of annotated cases, the seeds of a draw are averaged and the "
    "draws are the units. With fewer draws each run is a unit, and the verdict holds for these "
    "draws alone. Cases are never units.",
    f"Fewer than {MIN_UNITS} units: {OPEN}, and no interval is given.",
    f"Otherwise the {100 * CONFIDENCE:g} % t-interval of the mean difference decides. Wholly above "
    f"0: {HELPED}. Wholly below 0: {HURT}. Wholly within ±{100 * MARGIN:g} Dice point: {SAME}. "
    f"Anything else: {OPEN}.",
    f"{HELPED.capitalize()} or {HURT} by less than {100 * MARGIN:g} Dice point on average is said "
    "so: the sign is then clear, but the effect is small.",
]


@dataclass(frozen=True)
class Verdict:
    """What a method did at one budget.

    Attributes:
        outcome: one of HELPED, HURT, SAME, OPEN.
        mean: mean paired difference in Dice; NaN without a pair.
        low, high: interval of the mean difference; NaN with fewer than MIN_UNITS units.
        units: number of paired differences that decided.
        kind: what a unit is.
        needed: units that would probably decide it, if mean and spread stay as they are; None where
            decided or not to be estimated, infinite beyond MOST_UNITS.
    """

    outcome: str
    mean: float
    low: float
    high: float
    units: int
    kind: UnitKind
    needed: float | None

    @property
    def small(self) -> bool:
        """Whether the sign is clear but the mean effect is below the margin."""
        return self.outcome in (HELPED, HURT) and abs(self.mean) < MARGIN


def t_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Mean and two-sided t-interval at CONFIDENCE.

    Returns:
        Mean, low, high; the bounds are NaN with fewer than MIN_UNITS values, all without any.
    """
    x = np.asarray(values, dtype=float)
    if len(x) < MIN_UNITS:
        return (float(x.mean()) if len(x) else math.nan), math.nan, math.nan
    mean = float(x.mean())
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * stats.sem(x))
    return mean, mean - half, mean + half


def units_of(pairs: pd.DataFrame, folds: bool = False) -> tuple[np.ndarray, UnitKind]:
    """Turn paired differences into the units of the rule.

    Args:
        pairs: one row a run, columns `draw`, `seed`, `difference` (no NaN).
        folds: the runs are folds of one cross-validation.

    Returns:
        Differences, one a unit, and what a unit is.
    """
    if folds:
        return pairs["difference"].to_numpy(float), "folds"
    if pairs["draw"].nunique() >= MIN_DRAWS:
        return pairs.groupby("draw")["difference"].mean().to_numpy(float), "draws"
    return pairs["difference"].to_numpy(float), "runs"


def judge(differences: Sequence[float] | np.ndarray, kind: UnitKind = "runs") -> Verdict:
    """Apply RULE to the paired differences in Dice, one a unit, in [-1, 1]."""
    mean, low, high = t_interval(differences)
    units = len(differences)
    needed: float | None = None
    if units < MIN_UNITS:
        outcome = OPEN
    elif low > 0:
        outcome = HELPED
    elif high < 0:
        outcome = HURT
    elif low > -MARGIN and high < MARGIN:
        outcome = SAME
    else:
        outcome = OPEN
        needed = units_needed(mean, float(np.std(differences, ddof=1)), units)
    return Verdict(outcome, mean, low, high, units, kind, needed)


def units_needed(mean: float, sd: float, units: int) -> float:
    """Units after which the interval would decide, if `mean` and `sd` stayed as they are.

    Either it would leave 0 (half width below |mean|) or fit into the margin (half width below
    MARGIN - |mean|), whichever comes first. Infinite beyond MOST_UNITS.
    """
    reach = max(abs(mean), MARGIN - abs(mean))
    for n in range(units + 1, MOST_UNITS + 1):
        if stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * sd / math.sqrt(n) < reach:
            return n
    return math.inf


def mean_sd(values: Sequence[float] | np.ndarray) -> tuple[float, float, int]:
    """Mean, sample standard deviation (n - 1) and number of the values that are not missing.

    Missing values are left out, never counted as 0. The sd is NaN for a single value.
    """
    x = np.asarray(values, dtype=float)
    x = x[~np.isnan(x)]
    if not len(x):
        return math.nan, math.nan, 0
    return float(x.mean()), (float(x.std(ddof=1)) if len(x) > 1 else math.nan), len(x)


def gap_closed(gain: float, gap: float) -> float:
    """Share of the gap from twin to all-label bound that the gain closes; 1 = the bound.

    NaN where the bound is not above the twin: there is no gap to close.
    """
    return gain / gap if gap > 0 else math.nan
