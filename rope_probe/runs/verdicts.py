"""What became of a claim: one row of one schema, whatever the experiment."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from rope_probe.runs.intervals import student_interval

Kind = Literal["prediction", "identity"]
COLUMNS = {
    "prediction": "Int64",
    "claim": "string",
    "kind": "string",
    "measured": "float64",
    "low": "float64",
    "high": "float64",
    "n": "Int64",
    "held": "string",
}
"""`prediction` is the number of the prediction that the claim belongs to. A prediction was written before the run and
could have come out otherwise; an identity holds for any weights. `measured` is what was found, from `low` to `high`
where there is an interval, over `n` seeds. `held` is "held", "not held" or "undecided": what the interval says. A
prediction without an interval came out "as predicted" or "not as predicted", which says nothing of other seeds. `kind`
and `held` are null for what is told beside the claims."""
ABOVE_0, BELOW_0 = float(np.nextafter(0, 1)), float(np.nextafter(0, -1))
"""Bounds for claims of "above 0" and "below 0", which exactly 0 does not meet."""
_HELD = {True: "held", False: "not held", None: "undecided"}
_WITHOUT_INTERVAL = {True: "as predicted", False: "not as predicted", None: "undecided"}


@dataclass(frozen=True)
class Section:
    """What an experiment reports: its verdicts, tables by title, and the question that they answer.

    `predictions` are the texts that were written before the run, by number. `figures` names the drawings that show what
    a prediction is about, by its number.
    """

    verdicts: pd.DataFrame
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    question: str = ""
    predictions: Mapping[int, str] = field(default_factory=dict)
    figures: Mapping[int, Sequence[str]] = field(default_factory=dict)


def decided(low: float, high: float, least: float = -math.inf, most: float = math.inf) -> bool | None:
    """Whether an interval lies within `least` and `most`: True where all of it does, False where none, else None."""
    if low >= least and high <= most:
        return True
    return False if high < least or low > most else None


def in_words(least: float = -math.inf, most: float = math.inf) -> str:
    """Bounds as a claim tells them: "0.5 or more", "0.1 or less", "from -0.1 to 0.1"."""
    if math.isinf(most):
        return f"{least:g} or more"
    return f"{most:g} or less" if math.isinf(least) else f"from {least:g} to {most:g}"


def decided_or_met(
    value: float, low: float, high: float, least: float = -math.inf, most: float = math.inf
) -> bool | None:
    """As `decided`; without an interval, as of one seed, whether the value itself lies within the bounds."""
    if math.isfinite(low) and math.isfinite(high):
        return decided(low, high, least, most)
    return bool(least <= value <= most)


def verdict(
    prediction: int | None,
    claim: str,
    measured: float,
    held: bool | None,
    *,
    n: int = 1,
    low: float = math.nan,
    high: float = math.nan,
    kind: Kind = "prediction",
) -> dict[str, Any]:
    """A verdict as a row of `verdicts`; `held` is None where the interval says neither."""
    has_interval = math.isfinite(low) or math.isfinite(high)  # of one seed, Student's is infinite
    words = _HELD if has_interval or kind == "identity" else _WITHOUT_INTERVAL
    return {
        "prediction": prediction,
        "claim": claim,
        "kind": kind,
        "measured": float(measured),
        "low": low,
        "high": high,
        "n": n,
        "held": words[None if held is None else bool(held)],
    }


def beside(claim: str, measured: float, *, n: int = 1, low: float = math.nan, high: float = math.nan) -> dict[str, Any]:
    """A row for what is told beside the claims, to compare them with."""
    return {**verdict(None, claim, measured, None, n=n, low=low, high=high), "kind": None, "held": None}


def mean_beside(claim: str, values: pd.Series | Sequence[float]) -> dict[str, Any]:
    """A mean over seeds, or other units, to compare claims with, and Student's interval of it."""
    series = pd.Series(values, dtype=float)
    low, high = student_interval(series)
    return beside(claim, series.mean(), n=len(series), low=low, high=high)


def verdicts(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows in the schema's columns and types, by the number of their prediction."""
    frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)
    return frame.sort_values("prediction", kind="stable", na_position="first", ignore_index=True)
