"""95% intervals: of accuracies pooled over seeds, of their differences and ratios, and of unbounded means over seeds.

An accuracy varies twice: seeds differ, and each was measured by so many trials. `share_interval` carries both. It was
chosen by simulated coverage (benchmarks/interval_coverage.py); docs/statistics.md has the table of all candidates.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats
from scipy.special import betaln, expit, gammaln, logit

from rope_probe.errors import InputError

LARGEST_CORRELATION = 0.3
"""The largest correlation of the trials of one seed that is reckoned with. At an accuracy of .5 seeds then differ by a
standard deviation of .27. Without a limit three seeds that always hit could be three that always or never hit, and
their interval would begin at .43."""
LEAST_DISPERSION = 0.1
"""However alike seeds are, their variance counts as this much of the binomial one."""
_CORRELATIONS = np.geomspace(1e-4, LARGEST_CORRELATION, 40)
_MANY_SEEDS = 32
"""Beyond so many seeds 1,024 draws are simulated in place of 4,096, as each draw costs more."""
_FARTHEST_LOGIT = 12.0
_HALVINGS = 15


def share_interval(shares: npt.ArrayLike, trials: npt.ArrayLike) -> tuple[float, float]:
    """95% interval of a share over seeds, each measured by `trials`: `shares` [seeds], `trials` [seeds] or one for all.

    It ends where `share_p_values` falls below .05. It lies in [0, 1] and is never a point. The share that it is of is
    the mean over seeds, weighted by their trials. Shares are rounded to whole hits. With one seed it is Wilson's
    interval over the trials and says nothing of other seeds.

    Raises InputError for no seeds, for shares outside 0..1, and for seeds without trials.
    """
    values = np.asarray(shares, float)
    counts = np.broadcast_to(np.asarray(trials, float), values.shape)
    _require_shares(values, counts)
    hits = np.rint(values * counts)
    measured = sorted(zip(hits.astype(int).tolist(), counts.astype(int).tolist(), strict=True))
    return _share_interval(*map(tuple, zip(*measured, strict=True)))


@lru_cache(maxsize=4096)
def _share_interval(hits: tuple[int, ...], trials: tuple[int, ...]) -> tuple[float, float]:
    if len(hits) == 1:
        wilson = stats.binomtest(hits[0], trials[0]).proportion_ci(method="wilson")
        return float(wilson.low), float(wilson.high)
    mean = sum(hits) / sum(trials)
    if mean > 0.5:  # simulated as misses, so that intervals of misses and of hits mirror each other
        low, high = _share_interval(tuple(n - hit for hit, n in zip(hits, trials, strict=True)), trials)
        return 1 - high, 1 - low
    low = 0.0 if mean == 0 else min(mean, _end(hits, trials, mean, -_FARTHEST_LOGIT))
    return low, max(mean, _end(hits, trials, mean, _FARTHEST_LOGIT))


def _end(hits: tuple[int, ...], trials: tuple[int, ...], mean: float, outside: float) -> float:
    """Where p-values fall below .05 between the mean and a logit far outside, by halving."""
    measured, counts = np.array([hits]), np.array(trials)
    inside = float(np.clip(logit(mean), -_FARTHEST_LOGIT, _FARTHEST_LOGIT))
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        if share_p_values(measured, counts, float(expit(middle)))[0] > 0.05:
            inside = middle
        else:
            outside = middle
    return float(expit(inside))


def share_p_values(hits: np.ndarray, trials: np.ndarray, share: float) -> np.ndarray:
    """How well each of N measurements agrees with a true share: `hits` [N, seeds] of `trials` [seeds]; p-values [N].

    Hits of a seed are beta-binomial: its own share varies around the true one, so its trials are correlated. The
    correlation is the likeliest one for these hits and this share, up to `LARGEST_CORRELATION`. The statistic is
    Wilson's, (mean - share) / its standard error at that share, with the dispersion between the seeds. Its distribution
    is simulated. A p-value is Blaker's (2000, Canadian Journal of Statistics 28): the probability of a tail as small as
    this one, on either side. Where one tail cannot be that small, the other has all of it.
    """
    likeliest = _log_likelihoods(hits, trials, share).argmax(1)  # [N]
    observed = _statistics(hits, trials, share)
    p_values = np.empty(len(hits))
    for number in np.unique(likeliest):
        rows = likeliest == number
        simulated = np.sort(_statistics(_drawn(trials, share, _CORRELATIONS[number]), trials, share))
        tails = np.sort(_smaller_tails(simulated, simulated))
        as_small = np.searchsorted(tails, _smaller_tails(observed[rows], simulated), side="right")
        p_values[rows] = as_small / len(tails)
    return p_values


def _log_likelihoods(hits: np.ndarray, trials: np.ndarray, share: float) -> np.ndarray:
    """Of the hits [N, seeds] by correlation, [N, correlations]; less a constant of the hits."""
    alpha, beta = _beta_parameters(share, _CORRELATIONS)
    found, missed = hits[:, :, None], (trials - hits)[:, :, None]
    return (betaln(found + alpha, missed + beta) - betaln(alpha, beta)).sum(1)


def _beta_parameters(share: float, correlation: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    concentration = 1 / np.asarray(correlation) - 1
    return share * concentration, (1 - share) * concentration


def _statistics(hits: np.ndarray, trials: np.ndarray, share: float) -> np.ndarray:
    """Signed distance of the mean from the share, in standard errors; `hits` [N, seeds], result [N].

    Rounded, so that equal hits in another order are equal."""
    mean = hits.sum(1) / trials.sum()
    apart = ((hits - mean[:, None] * trials) ** 2 / trials).sum(1) / (len(trials) - 1)
    binomial = mean * (1 - mean)
    dispersion = np.divide(apart, binomial, out=np.zeros_like(apart), where=binomial > 0)
    variance = share * (1 - share) / trials.sum() * np.maximum(dispersion, LEAST_DISPERSION)
    return np.round((mean - share) / np.sqrt(variance), 9)


@lru_cache(maxsize=8)
def _uniforms(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spread points of the unit cube, each coordinate in order, and the place of each point in that order.

    Both [draws, seeds]; the same in every call.
    """
    points = stats.qmc.Sobol(seeds, seed=0).random_base2(12 if seeds <= _MANY_SEEDS else 10)
    return np.sort(points, 0), points.argsort(0).argsort(0)


def _drawn(trials: np.ndarray, share: float, correlation: float) -> np.ndarray:
    """Hits [draws, seeds] of seeds with this true share and correlation, by the inverse of their distribution."""
    alpha, beta = _beta_parameters(share, correlation)
    uniforms, places = _uniforms(len(trials))
    drawn = np.empty(uniforms.shape)
    for count in np.unique(trials):
        number = np.arange(count + 1)
        choices = gammaln(count + 1) - gammaln(number + 1) - gammaln(count - number + 1)
        at_most = np.cumsum(np.exp(choices + betaln(number + alpha, count - number + beta) - betaln(alpha, beta)))
        for seed in np.flatnonzero(trials == count):
            ends = np.searchsorted(uniforms[:, seed], at_most[:-1])
            in_order = np.repeat(number, np.diff(ends, prepend=0, append=len(uniforms)))
            drawn[:, seed] = in_order[places[:, seed]]
    return drawn


def _smaller_tails(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """The share of `ordered` that is at most, or at least, each value: whichever is less."""
    at_most = np.searchsorted(ordered, values, side="right")
    at_least = len(ordered) - np.searchsorted(ordered, values, side="left")
    return np.minimum(at_most, at_least) / len(ordered)


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


def ratio_interval(
    top: float, top_interval: tuple[float, float], bottom: float, bottom_interval: tuple[float, float]
) -> tuple[float, float]:
    """95% interval of top / bottom from the interval of each, taken as independent (MOVER-R, Newcombe 2016).

    Newcombe (2016), Statistical Methods in Medical Research 25: 1774. Raises InputError where the interval of `bottom`
    reaches 0: the ratio then has no bounds.
    """
    (low, high), (other_low, other_high) = top_interval, bottom_interval
    if other_low <= 0:
        raise InputError(
            f"a ratio needs a divisor whose interval is above 0, but it is [{other_low:g}, {other_high:g}]"
        )

    def end(of_top: float, of_bottom: float, sign: int) -> float:
        inside = (top * bottom) ** 2 - of_top * of_bottom * (2 * top - of_top) * (2 * bottom - of_bottom)
        return (top * bottom + sign * math.sqrt(max(inside, 0))) / (of_bottom * (2 * bottom - of_bottom))

    return end(low, other_high, -1), end(high, other_low, 1)


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
