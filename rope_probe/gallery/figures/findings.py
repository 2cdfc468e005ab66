"""What a figure shows, in a sentence made of its rows: the text alternative for who does not see it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from rope_probe.gallery.figures.style import listed, short
from rope_probe.runs.tables import TABLES

_SIDES = {"q": "queries", "k": "keys", "qk": "queries and keys"}
_LONGEST_VALUE = 60
WHERE: Mapping[str, str] = {
    "model": "{}",
    "phase": "{} phase",
    "arm": "{}",
    "task": "{}",
    "kind": "{}",
    "restriction": "{}",
    "perturbation": "{}",
    "side": "{}",
    "inject_layers": "layers {}",
    "inject_layer": "layer {}",
    "layer": "layer {}",
    "head": "head {}",
    "pair": "pair {}",
    "wavelength": "wavelength {} tokens",
    "site": "{}",
    "delta_tokens": "{} tokens",
    "radians": "{} radians",
    "rotation": "{}",
    "temperature": "temperature {}",
    "distance": "distance {} tokens",
    "document": "document {}",
    "seq_len": "window {} tokens",
    "tokens": "after {} tokens",
    "occurrence": "{} tokens",
    "group": "{}",
    "states": "{}",
    "into": "into the {}",
    "order": "order {}",
    "span_set": "{}",
    "moved": "{} spans moved",
    "short_theta": "short theta {}",
    "long_theta": "long theta {}",
    "head_dim": "head dim {}",
    "steps": "{} steps",
    "layers": "{} layers",
    "perturbations": "{} perturbations",
}
"""How a finding tells the place of a number, by column."""


@dataclass(frozen=True)
class Extremes:
    """States where a metric is largest and where it is smallest, of means by the columns `by`.

    `metrics` are those to tell of, in order; all that the rows have where it is empty. With `largest_dose`, rows of
    the largest shift or turn count alone, as in the figures that draw no others. With `share`, it is told what part of
    the sum over all places the largest one is.
    """

    by: Sequence[str]
    metrics: Sequence[str] = ()
    largest_dose: bool = False
    share: bool = False
    most: int = 3

    def __call__(self, rows: pd.DataFrame) -> str:
        """The finding of some rows; "" where they hold no number."""
        if self.largest_dose:
            rows = _of_largest_dose(rows)
        rows = rows[rows["value"].notna()]
        there = list(dict.fromkeys(rows["metric"].dropna()))
        metrics = [metric for metric in self.metrics or there if metric in there][: self.most]
        told = [self._of_metric(rows[rows["metric"] == metric], metric, named=len(metrics) > 1) for metric in metrics]
        if not told:
            return ""
        return f"{' '.join(told)} {_sample(rows)}".strip()

    def _of_metric(self, rows: pd.DataFrame, metric: str, *, named: bool) -> str:
        meaning, unit = _described(rows, metric)
        start = f"{meaning}: largest" if named else f"Largest {_lowered(meaning)}:"
        by = [column for column in self.by if column in rows and rows[column].nunique(dropna=False) > 1]
        if not by:
            start = f"{meaning}: " if named else f"{_capitalised(meaning)}: "
            return f"{start}{_number(rows['value'].mean(), unit)}."
        means = rows.groupby(by, dropna=False, sort=False)["value"].mean()
        if means.empty or not math.isfinite(means.max()):
            return ""
        most, least = means.idxmax(), means.idxmin()
        text = f"{start} {_place(by, most)}, {_number(means.max(), unit)}"
        if self.share and means.min() >= 0 and means.sum() > 0:
            text += f", {means.max() / means.sum():.0%} of the sum over {len(means)}"
        if means.max() > means.min():
            text += f"; smallest: {_place(by, least)}, {_number(means.min(), unit)}"
        return f"{text}."


def extremes(rows: pd.DataFrame) -> str:
    """States the extremes of each metric, whatever tells its numbers apart: for drawings that say no more."""
    return Extremes(tuple(WHERE))(rows)


def losses_in_the_end(rows: pd.DataFrame) -> str:
    """States which model ended with the largest loss in each phase, and which with the smallest."""
    keys = ["model", "seed", "phase", "metric"]
    last = rows.groupby(keys, dropna=False)["tokens"].transform("max")
    return f"At the end of training. {Extremes(('model', 'phase'))(rows[(rows['tokens'] == last).fillna(False)])}"


def _of_largest_dose(rows: pd.DataFrame) -> pd.DataFrame:
    for column in ("delta_tokens", "radians"):
        if column in rows and rows[column].notna().any():
            return rows[rows[column] == rows[column].max()]
    return rows


def _described(rows: pd.DataFrame, metric: str) -> tuple[str, str]:
    """What a metric is, and its unit, as the table declares it that has the metric and these columns."""
    declared = [table for table in TABLES.values() if metric in table.metrics]
    fitting = [table for table in declared if rows.columns[rows.notna().any()].isin(list(table.columns)).all()]
    for table in fitting or declared:
        return table.metrics[metric].meaning, table.metrics[metric].unit
    return short(metric, _LONGEST_VALUE), ""


def _place(columns: Sequence[str], values: object) -> str:
    """The place of a number: the values of the columns that tell it, in words."""
    row = values if isinstance(values, tuple) else (values,)
    words = []
    for column, value in zip(columns, row, strict=True):
        if pd.isna(value) or value == "":
            continue
        shown = _SIDES.get(str(value), str(value)) if column == "side" else value
        text = f"{shown:,.4g}" if isinstance(shown, float) else short(str(shown), _LONGEST_VALUE)
        words.append(WHERE.get(column, f"{column} {{}}").format(text))
    return ", ".join(words) or "elsewhere"


def _number(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}".strip()


def _lowered(text: str) -> str:
    """The text to go on with in a sentence: its first letter small, unless the word is written in capitals."""
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sample(rows: pd.DataFrame) -> str:
    """How much was measured: runs of which models, seeds, documents."""
    parts = []
    if "model" in rows and rows["model"].nunique() == 1:
        parts.append(short(str(rows["model"].dropna().iloc[0]), _LONGEST_VALUE))
    if "document" in rows and (documents := rows["document"].nunique()) > 1:
        parts.append(f"{documents} documents")
    if "seed" in rows and (seeds := listed(rows["seed"])):
        count = rows["seed"].nunique()
        parts.append(f"{count} seed{'s' if count > 1 else ''} ({seeds})")
    parts.append(f"n = {len(rows):,} numbers")
    return f"Means over what is not named; {', '.join(parts)}."
