"""The verdict, against cases computed by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nnunet_ssl.evaluation import statistics
from nnunet_ssl.evaluation.statistics import (
    HELPED,
    HURT,
    OPEN,
    SAME,
    gap_closed,
    judge,
    mean_sd,
    t_interval,
    units_needed,
    units_of,
)


def test_interval_equals_the_closed_form_and_scipy():
    values = [0.01, 0.03, 0.02, 0.06]
    mean, low, high = t_interval(values)
    # mean 0.03, sd sqrt(0.0014 / 3) = 0.021602, t(3) = 3.182446: half 0.034374
    assert (mean, low, high) == pytest.approx((0.03, -0.004374, 0.064374), abs=1e-6)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("differences", "outcome"),
    [
        ([0.02, 0.03, 0.04], HELPED),  # t(2) = 4.30, half 0.0248: 0.0052 to 0.0548
        ([-0.02, -0.03, -0.04], HURT),
        ([0.001, -0.001, 0.0], SAME),  # half 0.0025
        ([0.02, -0.01, 0.0], OPEN),  # half 0.038
        ([0.02, 0.03], OPEN),
        ([], OPEN),
        ([0.0, 0.0, 0.0], SAME),
        ([0.05, 0.05, 0.05], HELPED),
    ],
)
def test_outcomes(differences, outcome):
    assert judge(differences).outcome == outcome


def test_a_clear_but_tiny_gain_is_called_small():
    tiny, large = judge([0.0019, 0.002, 0.0021]), judge([0.019, 0.02, 0.021])
    assert (tiny.outcome, tiny.small) == (HELPED, True)
    assert (large.outcome, large.small) == (HELPED, False)
    assert not judge([0.001, -0.001, 0.0]).small


def test_an_interval_that_just_leaves_the_margin_is_open():
    half = stats.t.ppf(0.975, 2) * stats.sem([-1.0, 0, 1])
    inside, outside = 0.0099 / half, 0.0101 / half
    assert judge([-inside, 0, inside]).outcome == SAME
    assert judge([-outside, 0, outside]).outcome == OPEN


def test_seeds_are_averaged_within_three_draws():
    pairs = pd.DataFrame(
        [(0, 1, 0.01), (0, 2, 0.03), (1, 1, 0.04), (1, 2, 0.06), (2, 1, -0.01)],
        columns=["draw", "seed", "difference"],
    )
    units, kind = units_of(pairs)
    assert kind == "draws"
    assert units.tolist() == pytest.approx([0.02, 0.05, -0.01])
    fewer, kind = units_of(pairs[pairs["draw"] < 2])
    assert kind == "runs"
    assert fewer.tolist() == [0.01, 0.03, 0.04, 0.06]


def test_two_draws_of_two_seeds_can_carry_a_verdict_and_one_draw_of_two_cannot():
    pairs = pd.DataFrame({"draw": [0, 0, 1, 1], "seed": [1, 2, 1, 2], "difference": [0.03] * 4})
    assert judge(*units_of(pairs)).outcome == HELPED
    assert judge(*units_of(pairs[:2])).outcome == OPEN


def test_folds_are_units():
    pairs = pd.DataFrame({"draw": [0] * 5, "seed": [1] * 5, "difference": [0.01] * 5})
    units, kind = units_of(pairs, folds=True)
    assert (len(units), kind) == (5, "folds")


def test_needed_units_would_decide():
    verdict = judge([0.05, -0.01, 0.02])  # mean 0.02, sd 0.03
    assert verdict.outcome == OPEN
    n = verdict.needed
    half = [stats.t.ppf(0.975, k - 1) * 0.03 / math.sqrt(k) for k in (n - 1, n)]
    assert half[0] >= 0.02 > half[1]
    assert judge([0.5, -0.49, 0.005]).needed == math.inf
    assert judge([0.02, 0.03, 0.04]).needed is None


def test_sd_is_that_of_a_sample_and_missing_values_do_not_count():
    assert mean_sd([1.0, math.nan, 3.0]) == (2.0, pytest.approx(math.sqrt(2)), 2)
    mean, sd, n = mean_sd([5.0])
    assert (mean, n) == (5.0, 1) and math.isnan(sd)
    mean, sd, n = mean_sd([math.nan])
    assert math.isnan(mean) and n == 0


def test_gap_closed():
    assert gap_closed(0.05, gap=0.2) == pytest.approx(0.25)
    assert gap_closed(-0.05, gap=0.2) == pytest.approx(-0.25)
    assert math.isnan(gap_closed(0.05, gap=0.0))
    assert math.isnan(gap_closed(0.05, gap=-0.1))
    assert math.isnan(gap_closed(0.05, gap=math.nan))


def test_the_printed_rule_names_the_constants():
    text = " ".join(statistics.RULE)
    assert "Fewer than 3 units" in text and "95 % t-interval" in text and "±1 Dice point" in text


def test_only_small_effects_are_called_small():
    assert not judge([-0.05, -0.04, -0.06]).small and not judge([0.05, 0.04, 0.06]).small
    assert judge([-0.0049, -0.005, -0.0051]).small


def test_no_difference_may_be_the_nearer_verdict():
    # sd 0.01: the half width falls below 0.009 = MARGIN - |mean| long before it falls below 0.001
    n = units_needed(0.001, 0.01, 3)
    assert n < 10 and n == units_needed(-0.001, 0.01, 3)
