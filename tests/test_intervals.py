"""Intervals of accuracies over seeds and trials: textbook values where they exist, and simulated coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from rope_probe import InputError
from rope_probe.runs.intervals import (
    LEAST_ERRORS,
    share_difference_interval,
    share_interval,
    share_intervals,
    student_interval,
)


def test_of_one_seed_it_is_wilsons():
    wilson = stats.binomtest(37, 128).proportion_ci(method="wilson")
    assert share_interval([37 / 128], 128) == pytest.approx((wilson.low, wilson.high), abs=1e-12)


def test_of_seeds_that_differ_it_is_wilsons_with_the_trials_of_their_dispersion():
    shares = np.array([0.3, 0.5, 0.7])
    pearson = (100 * (shares - 0.5) ** 2 / 0.25).sum() / 2
    part = 4.302652730**2 * pearson / 300
    half = math.sqrt(part * 0.25 + part**2 / 4) / (1 + part)
    assert share_interval(shares, 100) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-8)


def test_it_is_student_s_where_trials_are_many_and_seeds_are_close():
    shares = np.array([0.499, 0.5, 0.501])
    assert share_interval(shares, 10**9) == pytest.approx(student_interval(shares), abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5, 1 / 128])
@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_it_stays_inside_and_is_never_a_point(value, seeds):
    low, high = share_interval([value] * seeds, 128)
    assert 0 <= low <= value <= high <= 1
    errors = math.sqrt(max(value * (1 - value), 1 / 128) / (128 * seeds))
    assert high - low > LEAST_ERRORS * errors


def test_seeds_with_more_trials_weigh_more():
    low, high = share_interval([0.2, 0.8], [10_000, 1])
    assert low <= 0.2 <= high < 0.5


@pytest.mark.parametrize(
    ("shares", "trials", "named"),
    [([], 128, "one seed"), ([1.1], 128, "1.1"), ([0.5], 0, "trials"), ([math.nan], 9, "nan")],
)
def test_what_is_no_share_is_refused(shares, trials, named):
    with pytest.raises(InputError, match=named):
        share_interval(shares, trials)


def test_the_difference_of_one_seed_each_is_newcombes():
    # Newcombe (1998), table II, method 10: 56/70 - 48/80 = .2, [.0524, .3339]
    assert share_difference_interval([56 / 70], [48 / 80], 70, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_the_difference_of_two_that_always_hit_is_no_point():
    low, high = share_difference_interval([1.0] * 3, [1.0] * 3, 128, 128)
    assert -0.2 < low < 0 < high < 0.2
    assert low == pytest.approx(-high)


def test_students_interval_has_its_textbook_values():
    half = 4.302653 * 0.1 / 3**0.5
    assert student_interval([0.9, 1.0, 0.8]) == pytest.approx((0.9 - half, 0.9 + half), abs=1e-6)
    assert student_interval([0.9]) == (-math.inf, math.inf)


def covered(probability, correlation, *, of=share_intervals, seeds=3, trials=128, draws=4000):
    """Share of simulated measurements whose interval holds the true accuracy."""
    rng = np.random.default_rng(14)
    size = (draws, seeds)
    if correlation:
        spread = 1 / correlation - 1
        accuracy = rng.beta(probability * spread, (1 - probability) * spread, size)
    else:
        accuracy = np.full(size, probability)
    low, high = of(rng.binomial(trials, accuracy) / trials, trials)
    return np.mean((low <= probability) & (probability <= high))


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("correlation", [0.0, 0.01, 0.1])
def test_95_percent_intervals_cover_93_to_97_percent(probability, correlation):
    assert 0.93 <= covered(probability, correlation) <= 0.975  # .005 for the simulation's own error


@pytest.mark.parametrize("probability", [0.02, 0.98])
@pytest.mark.parametrize("correlation", [0.0, 0.02, 0.1, 0.3])
def test_at_the_ends_they_cover_more_rather_than_less(probability, correlation):
    assert covered(probability, correlation) >= 0.945


def test_students_would_have_failed_that():
    def students(shares, trials):
        half = stats.t.ppf(0.975, 2) * shares.std(1, ddof=1) / 3**0.5
        return shares.mean(1) - half, shares.mean(1) + half

    assert covered(0.98, 0.1, of=students) < 0.7
