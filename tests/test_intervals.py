"""Intervals of accuracies over seeds and trials: textbook values where they exist, and simulated coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rope_probe import InputError
from rope_probe.runs.intervals import (
    ratio_interval,
    share_difference_interval,
    share_interval,
    share_p_values,
    student_interval,
)


def test_of_one_seed_it_is_wilsons():
    share, trials, z = 37 / 128, 128, 1.959963985
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    middle = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    assert share_interval([share], trials) == pytest.approx((middle - half, middle + half), abs=1e-8)


def exact_p_value(hits, trials, share, correlation):
    """The same test with every possible outcome of two seeds counted, in place of simulated ones."""
    alpha, beta = share * (1 / correlation - 1), (1 - share) * (1 / correlation - 1)
    numbers = np.arange(trials + 1)
    probability = np.outer(*[stats.betabinom.pmf(numbers, trials, alpha, beta)] * 2).ravel()

    def statistic(first, second):
        mean = (first + second) / (2 * trials)
        apart = trials * (first / trials - mean) ** 2 + trials * (second / trials - mean) ** 2
        dispersion = max(apart / (mean * (1 - mean)), 0.1) if 0 < mean < 1 else 0.1
        return round((mean - share) / math.sqrt(share * (1 - share) / (2 * trials) * dispersion), 9)

    values = np.array([statistic(first, second) for first in numbers for second in numbers])

    def tail(value):
        return min(probability[values <= value].sum(), probability[values >= value].sum())

    tails = np.array([tail(value) for value in values])
    return probability[tails <= tail(statistic(*hits)) + 1e-12].sum()


@pytest.mark.parametrize(
    ("hits", "share"), [((5, 7), 0.5), ((12, 11), 0.6), ((1, 9), 0.8), ((0, 3), 0.05), ((0, 0), 0.2)]
)
def test_p_values_are_those_of_all_outcomes_at_the_likeliest_correlation(hits, share):
    def likelihood(correlation):
        alpha, beta = share * (1 / correlation - 1), (1 - share) * (1 / correlation - 1)
        return stats.betabinom.logpmf(hits, 12, alpha, beta).sum()

    likeliest = max(np.geomspace(1e-4, 0.3, 40), key=likelihood)
    simulated = share_p_values(np.array([hits]), np.array([12, 12]), share)[0]
    assert simulated == pytest.approx(exact_p_value(hits, 12, share, likeliest), abs=0.02)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 64), min_size=2, max_size=4))
def test_it_holds_what_the_test_does_not_reject_and_is_mirrored(hits):
    shares, trials = np.array(hits) / 64, np.full(len(hits), 64)
    low, high = share_interval(shares, 64)
    assert 0 <= low <= shares.mean() <= high <= 1
    assert high - low > 0.01
    for share in np.linspace(0.02, 0.98, 9):
        if min(abs(share - low), abs(share - high)) > 0.02:
            assert (share_p_values(np.array([hits]), trials, share)[0] > 0.05) == (low < share < high)
    assert share_interval(1 - shares, 64) == pytest.approx((1 - high, 1 - low), abs=0.02)  # .02: a mean of exactly .5
    assert share_interval(shares[::-1], 64) == (low, high)


def test_it_is_near_student_s_where_trials_are_many_and_seeds_are_close():
    shares = np.array([0.49, 0.5, 0.51])
    assert share_interval(shares, 100_000) == pytest.approx(student_interval(shares), abs=0.002)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5, 1 / 128])
@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_it_stays_inside_and_is_never_a_point(value, seeds):
    low, high = share_interval([value] * seeds, 128)
    assert 0 <= low <= value <= high <= 1
    errors = math.sqrt(max(value * (1 - value), 1 / 128) / (128 * seeds))
    assert high - low > errors


def test_three_seeds_that_always_hit_have_the_interval_that_the_pages_tell():
    low, high = share_interval([1.0] * 3, 128)
    assert round(low, 2) == 0.88
    assert high == 1


def test_seeds_with_more_trials_weigh_more():
    low, high = share_interval([0.2, 0.8, 0.2], [1000, 100, 1000])
    assert low <= 480 / 2100 <= high
    assert share_interval([0.2, 0.8, 0.8], [1000, 1000, 100])[1] > high
    assert share_interval([0.8, 0.2, 0.8], [1000, 100, 1000]) == pytest.approx((1 - high, 1 - low), abs=1e-12)


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


def test_a_ratio_of_two_that_are_normal_has_fiellers_interval():
    # Fieller: the ratios r for which (top - r bottom)^2 <= z^2 (var_top + r^2 var_bottom)
    top, of_top, bottom, of_bottom = 2.0, 0.5, 4.0, 0.8
    quadratic = [bottom**2 - of_bottom**2, -2 * top * bottom, top**2 - of_top**2]
    low, high = sorted(np.roots(quadratic).real)
    ends = ratio_interval(top, (top - of_top, top + of_top), bottom, (bottom - of_bottom, bottom + of_bottom))
    assert ends == pytest.approx((low, high), abs=1e-12)


def test_a_ratio_needs_a_divisor_that_is_not_nothing():
    with pytest.raises(InputError, match=r"\[-0.1, 0.5\]"):
        ratio_interval(1.0, (0.9, 1.1), 0.2, (-0.1, 0.5))


def test_students_interval_has_its_textbook_values():
    half = 4.302653 * 0.1 / 3**0.5
    assert student_interval([0.9, 1.0, 0.8]) == pytest.approx((0.9 - half, 0.9 + half), abs=1e-6)
    assert student_interval([0.9]) == (-math.inf, math.inf)


def simulated(share, correlation, *, seeds=3, trials=128, draws=4000):
    """Hits of seeds whose own shares are beta-distributed, [draws, seeds]."""
    rng = np.random.default_rng(14)
    size = (draws, seeds)
    if not correlation:
        return rng.binomial(trials, share, size)
    spread = 1 / correlation - 1
    return rng.binomial(trials, rng.beta(share * spread, (1 - share) * spread, size))


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98])
@pytest.mark.parametrize("correlation", [0.0, 0.01, 0.1, 0.3])
def test_95_percent_intervals_cover_93_to_97_percent(share, correlation):
    p_values = share_p_values(simulated(share, correlation), np.full(3, 128), share)
    assert 0.93 <= (p_values > 0.05).mean() <= 0.97


def test_students_would_have_failed_that():
    shares = simulated(0.98, 0.1) / 128
    half = stats.t.ppf(0.975, 2) * shares.std(1, ddof=1) / 3**0.5
    assert (abs(shares.mean(1) - 0.98) <= half).mean() < 0.7
