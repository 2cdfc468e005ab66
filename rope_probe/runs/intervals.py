"""95% intervals: of accuracies pooled over seeds, of differences of two of these, and of unbounded means over seeds.

An accuracy varies twice: seeds differ, and each was measured by so many trials. `share_interval` carries both. It was
chosen by simulated coverage (benchmarks/interval_coverage.py); docs/statistics.md has the table of all candidates.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from rope_probe.errors import InputError

LEAST_ERRORS = 1.2
"""However alike seeds are, an interval reaches this many standard errors of the trials alone.

Fewer would let chance agreement make it a point. The trials' own 1.96 would cover 98 to 99%, as seeds vary too."""
UNSEEN_CORRELATION = 0.02
"""Correlation of trials of one seed that is assumed where every trial of every seed came out alike.

Such trials tell no spread, and seeds of rare failures (or hits) look just so."""


def share_interval(shares: npt.ArrayLike, trials: npt.ArrayLike) -> tuple[float, float]:
    """95% interval of a share over seeds, each measured by `trials`: `shares` [seeds], `trials` [seeds] or one for all.

    Wilson's interval with the binomial variance multiplied by a dispersion (quasi-likelihood), estimated between the
    seeds by Pearson's statistic, and Student's quantile for its degrees of freedom in place of the normal one. It lies
    in [0, 1] and is never a point. The share that it is of is the mean over seeds, weighted by their trials. With one
    seed it is Wilson's over the trials and says nothing of other seeds.

    Raises InputError for no seeds, for shares outside 0..1, and for seeds without trials.
    """
    values = np.asarray(shares, float)
    counts = np.broadcast_to(np.asarray(trials, float), values.shape)
    _require_shares(values, counts)
    low, high = share_intervals(values[None], counts)
    return float(low[0]), float(high[0])


def share_intervals(shares: np.ndarray, trials: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """`share_interval` of many measurements: `shares` [N, seeds], `trials` [seeds] or one for all; unchecked."""
    seeds = shares.shape[1]
    counts = np.broadcast_to(np.asarray(trials, float), (seeds,))
    total = counts.sum()
    mean = (shares * counts).sum(1) / total  # [N]
    binomial = mean * (1 - mean)
    if seeds == 1:
        squared_quantile = np.full(len(shares), stats.norm.ppf(0.975) ** 2)
    else:
        apart = (counts * (shares - mean[:, None]) ** 2).sum(1)
        dispersion = np.divide(apart, (seeds - 1) * binomial, out=np.zeros_like(apart), where=binomial > 0)
        unseen = 1 + (total / seeds - 1) * UNSEEN_CORRELATION
        dispersion = np.where(binomial > 0, dispersion, unseen)
        squared_quantile = np.maximum(stats.t.ppf(0.975, seeds - 1) ** 2 * dispersion, LEAST_ERRORS**2)
    part = squared_quantile / total
    middle = (mean + part / 2) / (1 + part)
    half = np.sqrt(part * (binomial + part / 4)) / (1 + part)
    return np.clip(middle - half, 0, mean), np.clip(middle + half, mean, 1)  # rounding may leave out a 0 or a 1


def share_difference_interval(
    first: npt.ArrayLike, second: npt.ArrayLike, first_trials: npt.ArrayLike, second_trials: npt.ArrayLike
) -> tuple[float, float]:
    """95% interval of one pooled share less another, from the interval of each (Newcombe's square-and-add).

    Seeds are not paired: where the two go up and down with the seed, it is wider than it need be. It lies in [-1, 1]
    and is never a point. Raises InputError as `share_interval`.
    """
    bounds = []
    for shares, trials in ((first, first_trials), (second, second_trials)):
        values = np.asarray(shares, float)
        low, high = share_interval(values, trials)
        mean = float(np.average(values, weights=np.broadcast_to(np.asarray(trials, float), values.shape)))
        bounds.append((low, mean, high))
    (low, mean, high), (other_low, other_mean, other_high) = bounds
    apart = mean - other_mean
    below = math.hypot(mean - low, other_high - other_mean)
    above = math.hypot(high - mean, other_mean - other_low)
    return apart - below, apart + above


def student_interval(values: pd.Series | Sequence[float]) -> tuple[float, float]:
    """95% interval of an unbounded mean over seeds, Student's t; without bounds for one value, which tells no spread.

    Not for shares: it leaves [0, 1], and is a point where seeds agree.
    """
    series = pd.Series(values, dtype=float)
    if len(series) < 2:
        return -math.inf, math.inf
    if not series.std(ddof=1):
        return float(series.mean()), float(series.mean())
    low, high = stats.t.interval(0.95, len(series) - 1, loc=series.mean(), scale=series.sem())
    return float(low), float(high)


def _require_shares(values: np.ndarray, counts: np.ndarray) -> None:
    if values.ndim != 1 or not len(values):
        raise InputError(f"an interval needs the shares of one seed or more in a row, but they are {values.tolist()}")
    if not ((values >= 0) & (values <= 1)).all():
        raise InputError(f"shares must be in 0..1, but they are {values.tolist()}")
    if not (counts > 0).all():
        raise InputError(f"every seed needs trials, 1 or more, but they are {counts.tolist()}")
