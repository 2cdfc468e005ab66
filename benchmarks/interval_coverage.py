"""How often nominal 95% intervals of an accuracy over seeds hold the true one, by simulation.

A seed's accuracy is drawn from a beta distribution around the true one, and its hits from a binomial of `--trials`. The
spread between seeds is none, a standard deviation of .02, or a correlation rho of the trials of a seed of .1, .3 or .5
(the beta's alpha + beta is 1 / rho - 1). "logits 2" is no beta: logits of seeds are normal with a standard deviation
of 2. Rows of the printed table are methods and spreads, columns are true accuracies; `width` is the mean width at .5.
An asterisk marks cells outside 93 to 97%, the target.

A second table has seeds of two kinds: one in five, four or three finds less. Some measurements then see one kind only.

- share_interval: ours, rope_probe.runs.intervals; it holds an accuracy where the p-value of that one is above .05;
- wilson, dispersion: Wilson's with the binomial variance times Pearson's dispersion between the seeds, and Student's
  quantile; at least 1.2 standard errors wide, and with a correlation of .02 where every trial came out alike;
- student: over the seeds' accuracies, as they are; on their logits (with 1/2 added); on arcsines of their roots;
- wilson: over all trials, as if there were no seeds;
- bootstrap: seeds drawn anew, then the trials of each, percentiles of 400 means;
- profile: the beta-binomial's profile likelihood, chi-squared's cut;
- bayes: the beta-binomial on a grid, Jeffreys' prior of the accuracy, Beta(1/2, 3) of rho, equal tails.

    python benchmarks/interval_coverage.py
"""

from collections.abc import Callable
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from scipy import stats
from scipy.optimize import brentq
from scipy.special import betaln, expit, logit

from rope_probe.runs.intervals import share_interval, share_p_values

ACCURACIES = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98)
SPREADS = {"none": None, "sd .02": 0.02, "rho .1": 0.1, "rho .3": 0.3, "rho .5": 0.5, "logits 2": 2.0}
TWO_KINDS = ((1 / 5, 0.2, 0.85), (1 / 4, 0.0, 0.9), (1 / 3, 0.05, 0.95))
"""How often a seed is of the lesser kind, what that kind finds, and what the other does."""
TARGET = (0.93, 0.97)
_MEANS, _RHOS = expit(np.linspace(-8, 8, 129)), expit(np.linspace(-9, 2.5, 36))
_DRAWS = 400

Interval = tuple[np.ndarray, np.ndarray]
Method = Callable[[np.ndarray, int], Interval]


def simulated(accuracy: float, spread: str, shape: tuple[int, int], trials: int, seed: int) -> np.ndarray:
    """Hits [draws, seeds] of simulated measurements."""
    rng = np.random.default_rng([seed, round(1000 * accuracy), list(SPREADS).index(spread)])
    amount = SPREADS[spread]
    if amount is None:
        return rng.binomial(trials, accuracy, shape)
    if spread.startswith("logits"):
        return rng.binomial(trials, expit(_middle_logit(accuracy, amount) + amount * rng.normal(size=shape)))
    variance = accuracy * (1 - accuracy)
    rho = amount**2 / variance if spread.startswith("sd") else amount
    concentration = 1 / rho - 1
    of_seed = rng.beta(accuracy * concentration, (1 - accuracy) * concentration, shape)
    return rng.binomial(trials, of_seed)


def _middle_logit(accuracy: float, deviation: float) -> float:
    """The mean of normal logits whose accuracies have this mean."""
    points, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    return float(brentq(lambda middle: weights @ expit(middle + deviation * points) - accuracy, -30, 30))


def wilson_dispersion(hits: np.ndarray, trials: int) -> Interval:
    """Wilson's by quasi-likelihood."""
    seeds = hits.shape[1]
    shares, total = hits / trials, seeds * trials
    mean = shares.mean(1)
    binomial = mean * (1 - mean)
    apart = trials * shares.var(1, ddof=1)
    dispersion = np.divide(apart, binomial, out=np.full(len(hits), 1 + 0.02 * (trials - 1)), where=binomial > 0)
    return _wilsons(mean, np.maximum(stats.t.ppf(0.975, seeds - 1) ** 2 * dispersion, 1.2**2) / total)


def student(hits: np.ndarray, trials: int) -> Interval:
    """Student's on the shares."""
    return _students(hits / trials)


def student_logit(hits: np.ndarray, trials: int) -> Interval:
    """Student's on logits."""
    low, high = _students(logit((hits + 0.5) / (trials + 1)))
    return expit(low), expit(high)


def student_arcsine(hits: np.ndarray, trials: int) -> Interval:
    """Student's on arcsines of roots, by Anscombe."""
    ends = _students(np.arcsin(np.sqrt((hits + 0.375) / (trials + 0.75))))
    low, high = (np.sin(np.clip(end, 0, np.pi / 2)) ** 2 for end in ends)
    return low, high


def wilson(hits: np.ndarray, trials: int) -> Interval:
    """Wilson's over all trials together."""
    return _wilsons(hits.mean(1) / trials, stats.norm.ppf(0.975) ** 2 / (hits.shape[1] * trials))


def bootstrap(hits: np.ndarray, trials: int) -> Interval:
    """Nested bootstrap."""
    rng = np.random.default_rng(0)
    picked = rng.integers(0, hits.shape[1], (len(hits), _DRAWS, hits.shape[1]))
    of_picked = np.take_along_axis(hits[:, None, :].repeat(_DRAWS, 1), picked, 2)
    means = rng.binomial(trials, of_picked / trials).mean(2) / trials
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    return low, high


def profile(hits: np.ndarray, trials: int) -> Interval:
    """Profile likelihood of the beta-binomial's mean."""
    likelihood = _log_likelihood(hits, trials).max(2)
    inside = likelihood >= likelihood.max(1, keepdims=True) - stats.chi2.ppf(0.95, 1) / 2
    low, high = _MEANS[inside.argmax(1)], _MEANS[len(_MEANS) - 1 - inside[:, ::-1].argmax(1)]
    return np.where(inside[:, 0], 0, low), np.where(inside[:, -1], 1, high)


def bayes(hits: np.ndarray, trials: int) -> Interval:
    """Posterior of the beta-binomial's mean; densities on the grids of logits."""
    prior = (0.5 * np.log(_MEANS * (1 - _MEANS)))[:, None] + 0.5 * np.log(_RHOS) + 3 * np.log1p(-_RHOS)
    joint = _log_likelihood(hits, trials) + prior
    density = np.exp(joint - joint.max((1, 2), keepdims=True)).sum(2)
    cumulative = np.cumsum(density, 1) / density.sum(1, keepdims=True)
    low, high = ([np.interp(q, row, _MEANS) for row in cumulative] for q in (0.025, 0.975))
    return np.array(low), np.array(high)


METHODS: dict[str, Method] = {
    "wilson, dispersion": wilson_dispersion,
    "student": student,
    "student, logit": student_logit,
    "student, arcsine": student_arcsine,
    "wilson": wilson,
    "bootstrap": bootstrap,
    "profile": profile,
    "bayes": bayes,
}
DRAWS_OF = {"bootstrap": 1000, "profile": 2000, "bayes": 2000}
"""Fewer draws for what is slow."""
WIDTHS = 100
"""Draws whose width is measured for `share_interval`."""


def _wilsons(mean: np.ndarray, part: npt.ArrayLike) -> Interval:
    """Wilson's ends for a squared quantile divided by the trials."""
    middle = (mean + np.asarray(part) / 2) / (1 + np.asarray(part))
    half = np.sqrt(part * (mean * (1 - mean) + np.asarray(part) / 4)) / (1 + np.asarray(part))
    return np.clip(middle - half, 0, mean), np.clip(middle + half, mean, 1)


def _students(values: np.ndarray) -> Interval:
    seeds = values.shape[1]
    half = stats.t.ppf(0.975, seeds - 1) * values.std(1, ddof=1) / np.sqrt(seeds)
    return values.mean(1) - half, values.mean(1) + half


def _log_likelihood(hits: np.ndarray, trials: int) -> np.ndarray:
    """The beta-binomial's [draws, means, rhos], by a table of every number of hits."""
    concentration = 1 / _RHOS - 1
    alpha, beta = np.multiply.outer(_MEANS, concentration), np.multiply.outer(1 - _MEANS, concentration)
    number = np.arange(trials + 1)[:, None, None]
    table = betaln(number + alpha, trials - number + beta) - betaln(alpha, beta)
    return sum(table[hits[:, seed]] for seed in range(hits.shape[1]))


def coverage(name: str, hits: np.ndarray, trials: int, accuracy: float) -> float:
    """The share of measurements whose interval holds the true accuracy."""
    if name not in METHODS:
        return float((share_p_values(hits, np.full(hits.shape[1], trials), accuracy) > 0.05).mean())
    low, high = METHODS[name](hits, trials)
    return float(((low <= accuracy) & (accuracy <= high)).mean())


def mean_width(name: str, hits: np.ndarray, trials: int) -> float:
    """Mean width of the intervals; of the first `WIDTHS` measurements for `share_interval`."""
    if name not in METHODS:
        return float(np.mean([np.diff(share_interval(row / trials, trials)) for row in hits[:WIDTHS]]))
    low, high = METHODS[name](hits, trials)
    return float((high - low).mean())


def main(
    seeds: Annotated[int, typer.Option(help="Seeds of a measurement.")] = 3,
    trials: Annotated[int, typer.Option(help="Trials of a seed.")] = 128,
    draws: Annotated[int, typer.Option(help="Simulated measurements of a cell.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the simulation.")] = 0,
) -> None:
    """Print the table, in Markdown."""
    print(f"| {seeds} seeds x {trials} trials | spread |", " | ".join(f"{p:g}" for p in ACCURACIES), "| width |")
    print("|---|---|" + "---|" * (len(ACCURACIES) + 1))
    for name in ("share_interval", *METHODS):
        for spread in SPREADS:
            cells, width = [], 0.0
            for accuracy in ACCURACIES:
                hits = simulated(accuracy, spread, (min(draws, DRAWS_OF.get(name, draws)), seeds), trials, seed)
                covered = coverage(name, hits, trials, accuracy)
                cells.append(f"{100 * covered:.1f}" + ("" if TARGET[0] <= covered <= TARGET[1] else "*"))
                if accuracy == 0.5:
                    width = mean_width(name, hits, trials)
            print(f"| {name} | {spread} |", " | ".join(cells), f"| {width:.2f} |", flush=True)
    print(
        "\n| seeds of two kinds |",
        " | ".join(f"{q:.0%} find {few:g}, others {many:g}" for q, few, many in TWO_KINDS),
        "|",
    )
    print("|---|" + "---|" * len(TWO_KINDS))
    for name in ("share_interval", *METHODS):
        rng = np.random.default_rng(seed)
        cells = []
        for lesser, few, many in TWO_KINDS:
            shape = (min(draws, DRAWS_OF.get(name, draws)), seeds)
            hits = rng.binomial(trials, np.where(rng.random(shape) < lesser, few, many))
            cells.append(f"{100 * coverage(name, hits, trials, lesser * few + (1 - lesser) * many):.1f}")
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    typer.run(main)
