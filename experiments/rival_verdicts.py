"""Tables and verdicts of `rivals`: retrieval by temperature, and what temperature explains of each gain.

The gain of an arm is its accuracy far away at its best temperature, less that of the untrained base with queries as
they are. Temperature's part is what the base gains by its own best temperature alone, over that gain; the rest is 1
less it. Best temperatures are chosen on trials of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.rival_arms import (
    ALWAYS_JUDGED,
    ARMS,
    CONTROL_OF,
    FAR,
    JUDGING,
    LOG_N,
    UNSCALED,
    UNTRAINED,
    best_temperature,
)
from experiments.toy_checkpoints import LONG, by_distance
from rope_probe.runs.intervals import ratio_interval, share_difference_interval, share_interval
from rope_probe.runs.tables import Tables
from rope_probe.runs.verdicts import decided, in_words, verdict, verdicts

BEST = "best"
LEAST_GAIN = 0.05
"""A gain whose interval reaches below this is too small to be parted."""


@dataclass(frozen=True)
class Found:
    """What a model found at one temperature: `shares` [seeds, distances], each over `trials` [seeds, distances]."""

    seeds: tuple[int, ...]
    shares: np.ndarray
    trials: np.ndarray

    def of_seeds(self, seeds: Sequence[int]) -> "Found":
        """The rows of some seeds."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return Found(tuple(seeds), self.shares[rows], self.trials[rows])

    @property
    def mean(self) -> float:
        """Mean over seeds and distances."""
        return float(self.shares.mean())

    def interval(self) -> tuple[float, float]:
        """95% interval of the mean, over seeds and trials."""
        return share_interval(self.shares.mean(1), self.trials.sum(1))

    def less(self, other: "Found") -> tuple[float, tuple[float, float]]:
        """The mean less another's, and its 95% interval over seeds and trials."""
        first, second = (one.shares.mean(1) for one in (self, other))
        return self.mean - other.mean, share_difference_interval(first, second, self.trials.sum(1), other.trials.sum(1))


def best_of(frame: pd.DataFrame) -> dict[tuple[str, int], str]:
    """The best temperature of each model and seed, on the trials to choose by."""
    return {key: best_temperature(part) for key, part in frame.groupby(["model", "seed"])}


def found(frame: pd.DataFrame, model: str, temperature: str, distances: Sequence[int] = FAR) -> Found | None:
    """What a model found at a temperature, or at the BEST of each seed; None where it was not measured."""
    rows = frame[(frame["model"] == model) & (frame["seq_len"] == LONG) & (frame["metric"] == "accuracy")]
    judged = rows[(rows["purpose"] == JUDGING) & rows["distance"].isin(distances)]
    if temperature == BEST:
        best = best_of(frame[frame["model"] == model])
        wanted = [best[model, seed] for seed in judged["seed"]]
        judged = judged[judged["temperature"] == wanted]
    else:
        judged = judged[judged["temperature"] == temperature]
    if judged.empty:
        return None
    shares = judged.pivot_table(index="seed", columns="distance", values="value")
    trials = judged.pivot_table(index="seed", columns="distance", values="trials")
    return Found(tuple(int(seed) for seed in shares.index), shares.to_numpy(float), trials.to_numpy(float))


@dataclass(frozen=True)
class Parted:
    """The gain of an arm over the unscaled base, temperature's part of it, and the rest in accuracy; with intervals."""

    seeds: int
    gain: float
    gain_interval: tuple[float, float]
    part: float
    part_interval: tuple[float, float]
    rest: float
    rest_interval: tuple[float, float]


def parted(plain: Found, scaled: Found, arm: Found) -> Parted:
    """Part the gain of `arm`, at its best, over the `plain` base, by what the base does `scaled`, at its best.

    Only seeds that all three have are taken. Intervals are made of those of the three accuracies, as if they were
    independent. All share their seeds and trials, so intervals are rather too wide. The part is nan where the gain is
    too small to be parted.
    """
    common = [one for one in arm.seeds if one in plain.seeds and one in scaled.seeds]
    plain, scaled, arm = (one.of_seeds(common) for one in (plain, scaled, arm))
    gain, gain_interval = arm.less(plain)
    rest, rest_interval = arm.less(scaled)
    part, part_interval = np.nan, (np.nan, np.nan)
    if gain_interval[0] >= LEAST_GAIN:
        of_temperature, its_interval = scaled.less(plain)
        part = of_temperature / gain
        part_interval = ratio_interval(of_temperature, its_interval, gain, gain_interval)
    return Parted(len(common), gain, gain_interval, part, part_interval, rest, rest_interval)


def _told(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]" if np.isfinite(value) else ""


def _models(frame: pd.DataFrame) -> list[str]:
    there = set(frame["model"])
    return [name for name in CONTROL_OF if name in there]


def decomposition(frame: pd.DataFrame, distances: Sequence[int] = FAR) -> pd.DataFrame:
    """A row for each trained model: what it finds unscaled and at its best, and the parts of its gain.

    `rest` is in accuracy: how far the arm at its best is ahead of the base at its own.
    """
    plain, scaled = (found(frame, UNTRAINED, temperature, distances) for temperature in (UNSCALED, BEST))
    best = best_of(frame)
    rows = {}
    for model in _models(frame):
        unscaled, at_best = (found(frame, model, temperature, distances) for temperature in (UNSCALED, BEST))
        if plain is None or scaled is None or unscaled is None or at_best is None:
            continue
        if not set(at_best.seeds) & set(plain.seeds):
            continue
        row = {"control": CONTROL_OF[model], "seeds": len(at_best.seeds)}
        row["best temperatures"] = ", ".join(best[model, seed] for seed in at_best.seeds)
        row["unscaled"] = _told(unscaled.mean, unscaled.interval())
        row["at its best"] = _told(at_best.mean, at_best.interval())
        if model != UNTRAINED:
            of_gain = parted(plain, scaled, at_best)
            row["gain"] = _told(of_gain.gain, of_gain.gain_interval)
            row["temperature's part"] = _told(of_gain.part, of_gain.part_interval)
            row["rest, in accuracy"] = _told(of_gain.rest, of_gain.rest_interval)
        rows[model] = row
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")


def by_seed(frame: pd.DataFrame, distances: Sequence[int] = FAR) -> pd.DataFrame:
    """The same for each seed of each model by itself; intervals are over trials, and say nothing of other seeds."""
    tables = {int(seed): decomposition(part, distances).drop(columns="seeds") for seed, part in frame.groupby("seed")}
    if len(tables) < 2:
        return pd.DataFrame()
    joined = pd.concat(tables, names=["seed", "model"]).swaplevel().fillna("")
    order = {name: place for place, name in enumerate(CONTROL_OF)}
    return joined.sort_index(level="model", key=lambda names: names.map(order), sort_remaining=True)


def by_temperature(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy by distance with queries times 1, 2 and 3 (the base: at all temperatures), mean over seeds."""
    rows = frame[(frame["purpose"] == JUDGING) & (frame["metric"] == "accuracy") & (frame["seq_len"] == LONG)]
    cells = []
    for (model, temperature, distance), part in rows.groupby(["model", "temperature", "distance"]):
        if temperature in ALWAYS_JUDGED or model == UNTRAINED:
            low, high = share_interval(part["value"], part["trials"].astype(float))
            cell = {"model": model, "queries times": temperature, "seeds": len(part), "distance": distance}
            cells.append({**cell, "value": part["value"].mean(), "low": low, "high": high})
    if not cells:
        return pd.DataFrame()
    return by_distance(pd.DataFrame(cells), ["model", "queries times", "seeds"])


def disturbances(costs: pd.DataFrame) -> pd.DataFrame:
    """Size of each disturbance, its cost in KL, and what the disturbed teacher itself finds far away; by seed."""
    if costs.empty:
        return pd.DataFrame()
    plain = costs[costs["metric"] != "accuracy"].pivot_table(index=["model", "seed"], columns="metric", values="value")
    return plain.assign(**{"teacher's accuracy, far": teachers_accuracy(costs)})


def teachers_accuracy(costs: pd.DataFrame) -> pd.Series:
    """What each disturbed teacher finds far away, by model and seed."""
    rows = costs[(costs["metric"] == "accuracy") & costs["distance"].isin(FAR)]
    return rows.groupby(["model", "seed"])["value"].mean()


def shown(results: Tables) -> dict[str, pd.DataFrame]:
    """What each model finds by temperature, the parts of gains, and what disturbances cost."""
    frame, costs = results["tempered_retrieval"], results["disturbed_teachers"]
    tables = {
        f"retrieval in a window of {LONG} tokens by queries' factor, accuracy by distance": by_temperature(frame),
        f"gain over the untrained base, and temperature's part of it; mean over {FAR} tokens": decomposition(frame),
        "the same at 1,000 tokens alone": decomposition(frame, (1000,)),
        f"the same by seed; mean over {FAR} tokens": by_seed(frame),
        "the same by seed, at 1,000 tokens alone": by_seed(frame, (1000,)),
        "disturbed teachers": disturbances(costs),
    }
    return {title: table for title, table in tables.items() if len(table)}


def judged(results: Tables) -> pd.DataFrame:
    """The predictions that these runs can judge.

    A claim holds where the whole interval does, fails where none of it does, and is undecided otherwise.
    """
    frame, costs = results["tempered_retrieval"], results["disturbed_teachers"]
    rows: list[dict] = []

    def bound(number: int, model: str, temperature: str, *, least: float = -np.inf, most: float = np.inf) -> None:
        one = found(frame, model, temperature)
        if one is not None:
            what = f"{model}, {_named(temperature)}: accuracy {in_words(least, most)}"
            _tell(rows, number, what, one.mean, one.interval(), len(one.seeds), least, most)

    def apart(
        number: int,
        first: tuple[str, str],
        second: tuple[str, str],
        least: float,
        most: float,
        distances: Sequence[int] = FAR,
    ) -> None:
        """The first less the second, each a model and a temperature, lies between the two."""
        one, other = (found(frame, *which, distances) for which in (first, second))
        if one is None or other is None or not set(one.seeds) & set(other.seeds):
            return
        common = [seed for seed in one.seeds if seed in other.seeds]
        difference, interval = one.of_seeds(common).less(other.of_seeds(common))
        where = "" if distances == FAR else f" at {distances[0]:,} tokens"
        named = (f"{model} ({_named(temperature)})" for model, temperature in (first, second))
        what = f"{' less '.join(named)}{where}: accuracy {in_words(least, most)}"
        _tell(rows, number, what, difference, interval, len(common), least, most)

    base = (UNTRAINED, BEST)
    bound(1, UNTRAINED, UNSCALED, most=0.10)
    bound(1, UNTRAINED, BEST, least=0.60)
    apart(1, (UNTRAINED, "3"), (UNTRAINED, LOG_N), 0.10, 1)
    _judge_part(frame, rows)
    apart(2, ("kd_phase_wise", BEST), base, 0.10, 1, (1000,))
    apart(3, ("kd_phase_wise", BEST), ("kd_phase_wise", UNSCALED), -0.05, 0.05)
    apart(4, ("ce_phase_wise", BEST), base, -1, -0.30)
    for name in ("argmax_labels", "sampled_labels"):
        bound(5, name, UNSCALED, least=0.90)
    for name in ("kd_teacher_masked", "student_masked", "both_masked"):
        bound(6, name, UNSCALED, most=0.10)
    for name in ("student_masked", "both_masked"):
        apart(6, (name, BEST), base, -0.15, 0.15)
    bound(6, "kd_teacher_masked", BEST, most=0.50)
    bound(7, "value_positions", UNSCALED, least=0.90)
    bound(7, "other_positions", UNSCALED, most=0.10)
    for name in ("ce_rate_0.1", "ce_rate_0.3", "ce_rate_3"):
        bound(8, name, UNSCALED, most=0.10)
    apart(8, ("ce_rate_0.1", BEST), ("ce_rate_3", BEST), 0.20, 1)
    for name in ("ce_agreeing", "kd_agreeing"):
        bound(9, name, UNSCALED, least=0.90)
    bound(10, "wide_teacher", UNSCALED, least=0.90)
    bound(11, "shifted_teacher", UNSCALED, most=0.10)
    for name in ("noisy_teacher", "flat_teacher"):
        bound(11, name, UNSCALED, least=0.50)
    _judge_disturbed(frame, costs, rows)
    return verdicts(rows)


def _judge_part(frame: pd.DataFrame, rows: list[dict]) -> None:
    """Prediction 2: temperature's part of KD's gain."""
    measured = [found(frame, *which) for which in ((UNTRAINED, UNSCALED), (UNTRAINED, BEST), ("kd_phase_wise", BEST))]
    plain, scaled, arm = measured
    if plain is None or scaled is None or arm is None:
        return
    of_gain = parted(plain, scaled, arm)
    if np.isfinite(of_gain.part):
        what = "temperature's part of kd_phase_wise's gain .5 or more"
        _tell(rows, 2, what, of_gain.part, of_gain.part_interval, of_gain.seeds, 0.5, np.inf)


def _judge_disturbed(frame: pd.DataFrame, costs: pd.DataFrame, rows: list[dict]) -> None:
    """Prediction 11: students beside their disturbed teachers, the largest difference of a seed."""
    if costs.empty:
        return
    own = teachers_accuracy(costs)
    for name in [name for name, arm in ARMS.items() if arm.disturbance is not None]:
        one = found(frame, name, UNSCALED)
        if one is not None:
            apart = [share - own[name, seed] for seed, share in zip(one.seeds, one.shares.mean(1), strict=True)]
            largest = max(apart, key=abs)
            what = f"{name}: student less its disturbed teacher within .2, the largest of the seeds"
            rows.append(verdict(11, what, largest, abs(largest) <= 0.2, n=len(apart)))


def _named(temperature: str) -> str:
    return {UNSCALED: "queries as they are", BEST: "at its best temperature", LOG_N: "queries times log n"}.get(
        temperature, f"queries times {temperature}"
    )


def _tell(
    rows: list[dict],
    number: int,
    what: str,
    mean: float,
    interval: tuple[float, float],
    seeds: int,
    least: float,
    most: float,
) -> None:
    low, high = interval
    rows.append(verdict(number, what, mean, decided(low, high, least, most), n=seeds, low=low, high=high))
