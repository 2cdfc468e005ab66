"""Tables and verdicts of experiments/beyond.py: plain arithmetic on its rows, which experiments/beyond_train.py shares.

An arm is a model, its rotation and its temperature. Rows of two readings that begin alike are the same measurement,
and count once. Losses of two arms are compared block of positions by block, and log-probabilities question by question,
since the text is the same.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from rope_probe.runs.intervals import share_difference_interval, share_interval, student_interval
from rope_probe.runs.tables import Column, Metric, declare
from rope_probe.runs.verdicts import mean_beside, verdict, verdicts

BEYOND = declare(
    "beyond",
    "A pretrained model inside and beyond its window, untrained, with other rotations and temperatures. A row is of "
    "one question, block of text, or head.",
    ("rotation", "temperature", "task", "seq_len", "distance", "keys", "unit", "position", "layer", "head"),
    {
        "hit": Metric("1 where the model would write just the answer by greedy decoding, else 0"),
        "answer_logprob_nats": Metric("log-probability of the answer, mean over its tokens", "nats"),
        "loss_nats": Metric(
            "loss of natural text, mean over every eighth position from `position` to the next", "nats"
        ),
        "previous_token": Metric("a head's attention to the token before, of queries from `position` on"),
        "induction": Metric("its attention to what followed earlier copies of the query's token, of the same queries"),
        "retrieval_head": Metric("share of an answer that a head copies from the needle, mean over questions"),
    },
    own={
        "rotation": Column("string", "what the model's rotary frequencies are"),
        "temperature": Column("string", "what attention is sharpened by: none, log_n beyond the window, or yarn"),
        "task": Column("string", "passkey or niah_multikey_2"),
        "keys": Column("Int64", "needles before the question"),
        "unit": Column("Int64", "which question, the farthest needle 0"),
    },
)
EDGES = (0, 2048, 4096, 8192, 12_288, 16_384)
"""Bins of positions and of distances."""
ARM = ["model", "rotation", "temperature"]
"""What tells arms apart."""
Arm = tuple[str, str, str]
"""An arm: its values of `ARM`."""
MODEL = "smollm2-135m"
"""The model of experiments/beyond.py, untrained."""
OWN, YARN = (MODEL, "own", "none"), (MODEL, "yarn_2", "none")
BEYOND_WINDOW, INSIDE_WINDOW = (8192, 12_288), (4096, 8192)
LONG, MIDDLE, SHORT = 12_288, 4096, 2048
RESAMPLES = 2000


def once(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows without those that a longer reading of the same text by the same arm measured again."""
    return rows.drop_duplicates([*ARM, "task", "seed", "seq_len", "unit", "position", "layer", "head", "metric"])


# Numbers --------------------------------------------------------------------------------------------------------------


def losses(rows: pd.DataFrame, arm: Arm, span: tuple[int, int]) -> pd.Series:
    """Loss of each block of positions in a span, by seed and position."""
    chosen = _of(rows, arm, "loss_nats")
    chosen = chosen[chosen["position"].between(span[0], span[1] - 1)]
    return chosen.set_index(["seed", "position"])["value"].sort_index()


def hits(rows: pd.DataFrame, arm: Arm, window: int, *, below: int | None = None, task: str = "passkey") -> pd.Series:
    """Hits of each question of a window, by seed and unit; of needles nearer than `below` alone, where it is given."""
    return _questions(rows, arm, "hit", window, below, task)


def logprobs(rows: pd.DataFrame, arm: Arm, window: int, *, task: str = "passkey") -> pd.Series:
    """Log-probability of each answer, nats a token, by seed and unit."""
    return _questions(rows, arm, "answer_logprob_nats", window, None, task)


def share(found: pd.Series) -> tuple[list[float], list[int]]:
    """Shares and trials of each seed, as intervals of shares take them."""
    by_seed = found.groupby(level="seed")
    return by_seed.mean().tolist(), by_seed.size().tolist()


def paired(first: pd.Series, second: pd.Series) -> pd.Series:
    """The first less the second where both were measured."""
    return (first - second).dropna()


def apart(first: pd.Series, second: pd.Series) -> tuple[float, float, float]:
    """Difference of two means with Welch's 95% interval: different text, so not paired."""
    interval = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    return first.mean() - second.mean(), interval.low, interval.high


def given_back(own: pd.Series, changed: pd.Series, reference: pd.Series) -> tuple[float, float, float]:
    """What part of the gain of `reference` over `own` `changed` has too, in nats; its interval by resampling blocks."""
    table = pd.DataFrame({"own": own, "changed": changed, "reference": reference}).dropna().to_numpy()
    gains = np.stack([table[:, 0] - table[:, 1], table[:, 0] - table[:, 2]])  # [2, blocks]
    drawn = np.random.default_rng(0).integers(0, len(table), (RESAMPLES, len(table)))
    resampled = gains[:, drawn].sum(-1)
    low, high = np.quantile(resampled[0] / resampled[1], [0.025, 0.975])
    total = gains.sum(1)
    return total[0] / total[1], float(low), float(high)


def _questions(rows: pd.DataFrame, arm: Arm, metric: str, window: int, below: int | None, task: str) -> pd.Series:
    chosen = _of(rows, arm, metric)
    chosen = chosen[(chosen["seq_len"] == window) & (chosen["task"] == task)]
    chosen = chosen if below is None else chosen[chosen["distance"] < below]
    return chosen.set_index(["seed", "unit"])["value"].sort_index()


def _of(rows: pd.DataFrame, arm: Arm, metric: str) -> pd.DataFrame:
    model, rotation, temperature = arm
    is_of_arm = (rows["model"] == model) & (rows["rotation"] == rotation) & (rows["temperature"] == temperature)
    return rows[is_of_arm & (rows["metric"] == metric)]


# Verdicts -------------------------------------------------------------------------------------------------------------


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """Every prediction that these rows can judge; it holds, or not, only where the interval says so."""
    rows = once(rows)
    told: list[dict] = []

    def judge(
        number: int, claim: str, found: tuple[float, float, float], n: int, low: float = -np.inf, high: float = np.inf
    ) -> None:
        value, bottom, top = found
        inside, outside = low <= bottom and top <= high, top < low or bottom > high
        held = True if inside else False if outside else None
        told.append(verdict(number, claim, value, held, n=n, low=bottom, high=top))

    inside, beyond = losses(rows, OWN, INSIDE_WINDOW), losses(rows, OWN, BEYOND_WINDOW)
    of_yarn = losses(rows, YARN, BEYOND_WINDOW)
    if len(beyond):
        claim = "own theta: loss at 8,192 to 12,288 above that at 4,096 to 8,192, 1 nat or more"
        judge(1, claim, apart(beyond, inside), len(beyond), low=1)
    for number, arm, most in ((2, YARN, 0.3), (3, (MODEL, "theta_500000", "none"), 0.5)):
        changed = losses(rows, arm, BEYOND_WINDOW)
        if len(changed) and len(inside):
            claim = f"{arm[1]}: loss at 8,192 to 12,288 above the own theta's at 4,096 to 8,192, {most:g} or less"
            judge(number, claim, apart(changed, inside), len(changed), high=most)
    cost = paired(losses(rows, (MODEL, "linear_2", "none"), (0, SHORT)), losses(rows, YARN, (0, SHORT)))
    if len(cost) > 1:
        judge(
            4, "linear_2 less yarn_2: loss at 0 to 2,048, .2 nats or more", mean_and_interval(cost), len(cost), low=0.2
        )
    at_own, at_yarn = hits(rows, OWN, LONG), hits(rows, YARN, LONG)
    if len(at_own) and len(at_yarn):
        claim = "passkeys in 12,288 tokens: yarn_2 less own theta, .3 or more"
        judge(5, claim, _difference(at_yarn, at_own), len(at_own), low=0.3)
    near, near_in_long = (hits(rows, OWN, window, below=SHORT) for window in (MIDDLE, LONG))
    if len(near) and len(near_in_long):
        claim = "own theta, distances below 2,048: windows of 4,096 less 12,288, .3 or more"
        judge(6, claim, _difference(near, near_in_long), len(near_in_long), low=0.3)
    for temperature in ("log_n", "yarn"):
        changed = losses(rows, (MODEL, "own", temperature), BEYOND_WINDOW)
        if len(changed) and len(of_yarn):
            claim = f"own theta, temperature {temperature}: share of the gain of yarn_2 in loss, below .1"
            judge(7, claim, given_back(beyond, changed, of_yarn), len(changed), high=0.1)
    change = paired(losses(rows, (MODEL, "yarn_2", "yarn"), BEYOND_WINDOW), of_yarn)
    if len(change) > 1:
        claim = "yarn_2: loss at 8,192 to 12,288 with YaRN's temperature less without, within .1"
        judge(8, claim, mean_and_interval(change), len(change), low=-0.1, high=0.1)
    back = _of(rows, OWN, "previous_token").query("layer == 16 and head == 0")
    back = back.pivot_table(index="seed", columns="seq_len", values="value")
    if {SHORT, LONG} <= set(back.columns):
        fall = back[SHORT] - back[LONG]
        claim = "own theta, layer 16 head 0: fall of its attention to the token before, below .1"
        judge(9, claim, mean_and_interval(fall), len(fall), high=0.1)
    own_short = hits(rows, OWN, SHORT)
    for rotation in sorted(set(rows["rotation"].dropna()) - {"own"}):
        changed = hits(rows, (MODEL, rotation, "none"), SHORT)
        if len(changed) and len(own_short):
            claim = f"passkeys in 2,048 tokens: {rotation} less own theta, below .1"
            judge(10, claim, _difference(changed, own_short), len(changed), high=0.1)
    return verdicts([*told, *gains(rows, OWN)])


def gains(rows: pd.DataFrame, reference: Arm) -> list[dict]:
    """Beside the predictions: what every arm gains over `reference`, in nats, on the same text and questions.

    A model's name is told only where there are several.
    """
    told = []
    arms = rows[ARM].drop_duplicates().itertuples(index=False, name=None)
    of_several = rows["model"].nunique() > 1
    for arm in arms:
        if arm == reference:
            continue
        model, rotation, temperature = arm
        name = f"{model}, {rotation}" if of_several else rotation
        name = f"{name}, temperature {temperature}"
        for low, high in itertools.pairwise(EDGES):
            gain = paired(losses(rows, reference, (low, high)), losses(rows, arm, (low, high)))
            if len(gain) > 1:
                told.append(mean_beside(f"{name}: nats of text saved at {low:,} to {high:,}", gain))
        for task in sorted(rows["task"].dropna().unique()):
            for window in EDGES[1:]:
                gain = paired(logprobs(rows, arm, window, task=task), logprobs(rows, reference, window, task=task))
                if len(gain) > 1:
                    told.append(mean_beside(f"{name}: nats a token gained in {task}, window {window:,}", gain))
    return told


def mean_and_interval(values: pd.Series) -> tuple[float, float, float]:
    """Mean with Student's 95% interval."""
    return float(values.mean()), *student_interval(values)


def _difference(first: pd.Series, second: pd.Series) -> tuple[float, float, float]:
    """Difference of two shares, with its interval over seeds and trials."""
    (shares, trials), (other, other_trials) = share(first), share(second)
    low, high = share_difference_interval(shares, other, trials, other_trials)
    return float(first.mean() - second.mean()), low, high


# Tables ---------------------------------------------------------------------------------------------------------------


def tables_of(rows: pd.DataFrame, reference: Arm = OWN) -> dict[str, pd.DataFrame]:
    """Means with 95% intervals by arm; the heads that copy answers are those of `reference`."""
    rows = once(rows)
    asked = rows[rows["metric"] == "hit"]
    by_distance = asked.assign(distance=_binned(asked["distance"]))
    text = rows[rows["metric"] == "loss_nats"]
    heads = rows[rows["metric"].isin(["previous_token", "induction"])]
    tables = {
        "answers found, by window": _cells(asked, [*ARM, "task"], "seq_len", shares=True),
        "log-probability of answers, nats a token, by window": _cells(
            rows[rows["metric"] == "answer_logprob_nats"], [*ARM, "task"], "seq_len"
        ),
        "answers found of asked, by window and distance": _counts(by_distance),
        "loss of natural text, nats a token, by position": _cells(
            text.assign(position=_binned(text["position"])), ARM, "position"
        ),
        "two heads by window, of the queries read last": heads.pivot_table(
            index=[*ARM, "layer", "head"], columns=["metric", "seq_len"], values="value"
        ),
        "heads that copy answers, share of the answer's tokens": _copying(rows, reference),
    }
    return {title: table for title, table in tables.items() if len(table)}


def _copying(rows: pd.DataFrame, reference: Arm) -> pd.DataFrame:
    """The eight heads that copy most in the shortest window by `reference`."""
    found = rows[(rows["metric"] == "retrieval_head") & (rows["task"] == "passkey")]
    if found.empty:
        return found
    table = found.pivot_table(index=["layer", "head"], columns=[*ARM, "seq_len"], values="value")
    first = (*reference, SHORT)
    return table.nlargest(8, [first]) if first in table.columns else table.head(0)


def _binned(places: pd.Series) -> pd.Series:
    """The lower edge of the bin that each place is in."""
    edges = np.array(EDGES)
    return pd.Series(edges[np.searchsorted(edges, places.to_numpy(float), side="right") - 1], index=places.index)


def _cells(rows: pd.DataFrame, index: Sequence[str], by: str, *, shares: bool = False) -> pd.DataFrame:
    """A row for each arm, a column for each value of `by`: mean [low, high] and how many."""
    cells: dict[tuple, dict[int, str]] = {}
    for (*key, column), part in rows.groupby([*index, by], sort=False):
        values = part.set_index("seed")["value"]
        low, high = share_interval(*share(values)) if shares else student_interval(values)
        interval = f" [{low:.2f}, {high:.2f}]" if np.isfinite([low, high]).all() else ""
        cells.setdefault(tuple(key), {})[int(column)] = f"{values.mean():.2f}{interval} n={len(values)}"
    table = pd.DataFrame.from_dict(cells, orient="index")
    table.index = pd.MultiIndex.from_tuples(table.index, names=list(index)) if len(table) else table.index
    return table.reindex(columns=sorted(table.columns)).fillna("")


def _counts(rows: pd.DataFrame) -> pd.DataFrame:
    """Found of asked."""
    grouped = rows.groupby([*ARM, "task", "seq_len", "distance"])["value"]
    text = grouped.agg(lambda values: f"{int(values.sum())}/{len(values)}")
    return text.unstack("distance").fillna("")
