"""What a figure shows, in a sentence made of its rows: the text alternative for who does not see it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from rope_probe.gallery.figures.style import listed, short
from rope_probe.runs.tables import TABLES

_SIDES = {"q": "queries", "k": "keys", "qk": "queries and keys", "v": "values"}
_OF_SIDE = ("side", "states")
_PLAIN_FROM = 1e4
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
    "inject_layers": "shift in layers {}",
    "inject_layer": "shift in layer {}",
    "layer": "layer {}",
    "head": "head {}",
    "pair": "pair {}",
    "wavelength": "wavelength {} tokens",
    "site": "{}",
    "delta_tokens": "{} tokens",
    "radians": "{} radians",
    "rotation": "{}",
    "intervention": "{}",
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
BLOCK = 1024
"""Positions that losses by position are told as means over."""
LOSSES = {"ce_nats": "cross-entropy", "kd_nats": "divergence from the teacher"}


@dataclass(frozen=True)
class Extremes:
    """States where a metric is largest and where it is smallest, of means by the columns `by`.

    `metrics` are those to tell of, in order, and what a sentence calls each: a noun phrase that goes after "largest".
    Without them it tells of all that the rows have, by their names in the table. With `largest_dose`, rows of the
    largest shift or turn count alone, as in the figures that draw no others. With `share`, it is told what part of the
    sum over all places the largest one is.
    """

    by: Sequence[str]
    metrics: Mapping[str, str] = field(default_factory=dict)
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
        name, unit = self.metrics.get(metric) or _in_words(metric), _unit(rows, metric)
        start = f"{_capitalised(name)}: largest," if named else f"Largest {name}:"
        by = [column for column in self.by if column in rows and rows[column].nunique(dropna=False) > 1]
        if not by:
            return f"{_capitalised(name)}: {_number(rows['value'].mean(), unit)}."
        means = rows.groupby(by, dropna=False, sort=False)["value"].mean()
        if means.empty or not math.isfinite(means.max()):
            return ""
        most, least = means.idxmax(), means.idxmin()
        text = f"{start} {_place(by, most)}, {_number(means.max(), unit)}"
        if self.share and means.min() >= 0 and means.sum() > 0:
            text += f", {means.max() / means.sum():.0%} of the sum over {len(means)}"
        if means.max() > means.min():
            colon = "," if named else ":"
            text += f"; smallest{colon} {_place(by, least)}, {_number(means.min(), unit)}"
        return f"{text}."


def extremes(rows: pd.DataFrame) -> str:
    """States the extremes of each metric, whatever tells its numbers apart: for drawings that say no more."""
    return Extremes(tuple(WHERE))(rows)


def losses_in_the_end(rows: pd.DataFrame) -> str:
    """States which model ended with the largest loss in each phase, and which with the smallest."""
    keys = ["model", "seed", "phase", "metric"]
    last = rows.groupby(keys, dropna=False)["tokens"].transform("max")
    told = Extremes(("model", "phase"), LOSSES)(rows[(rows["tokens"] == last).fillna(False)])
    return f"At the end of training. {told}"


def losses_by_position(rows: pd.DataFrame) -> str:
    """States where the lines of a loss by position lie closest together, where farthest apart, and which is on top.

    Compared are the blocks of BLOCK positions that every line has. Without two lines and two such blocks it states
    which line has the largest loss.
    """
    arms = [column for column in ("model", "rotation", "temperature") if rows[column].nunique() > 1]
    blocks = (rows["position"] // BLOCK).astype("Int64")
    means = rows.groupby([blocks, *arms], dropna=False)["value"].mean() if arms else pd.Series(dtype=float)
    table = means.unstack(arms).dropna() if arms else pd.DataFrame()
    if len(table) < 2:
        return Extremes(("rotation", "temperature"), {"loss_nats": "loss of text"})(rows)
    apart = table.max(axis=1) - table.min(axis=1)
    told = [
        f"{what} at positions {block * BLOCK:,} to {(block + 1) * BLOCK - 1:,}: largest, "
        f"{_place(arms, table.loc[block].idxmax())}, {_number(table.loc[block].max(), 'nats')}; "
        f"smallest, {_place(arms, table.loc[block].idxmin())}, {_number(table.loc[block].min(), 'nats')}."
        for what, block in (
            ("The lines are closest together", apart.idxmin()),
            ("They are farthest apart", apart.idxmax()),
        )
    ]
    return f"{' '.join(told)} {_sample(rows)}"


def _of_largest_dose(rows: pd.DataFrame) -> pd.DataFrame:
    for column in ("delta_tokens", "radians"):
        if column in rows and rows[column].notna().any():
            return rows[rows[column] == rows[column].max()]
    return rows


def _unit(rows: pd.DataFrame, metric: str) -> str:
    """The unit of a metric, as the table declares it that has the metric and these columns."""
    declared = [table for table in TABLES.values() if metric in table.metrics]
    fitting = [table for table in declared if rows.columns[rows.notna().any()].isin(list(table.columns)).all()]
    return next((table.metrics[metric].unit for table in fitting or declared), "")


def _in_words(metric: str) -> str:
    """A metric's name in the table as words, without the unit at its end."""
    return short(metric.removesuffix("_nats").replace("_", " "), _LONGEST_VALUE)


def _place(columns: Sequence[str], values: object) -> str:
    """The place of a number: the values of the columns that tell it, in words."""
    row = values if isinstance(values, tuple) else (values,)
    words = []
    for column, value in zip(columns, row, strict=True):
        if pd.isna(value) or value == "" or (column == "temperature" and value == "none"):
            continue
        shown = _SIDES.get(str(value), str(value)) if column in _OF_SIDE else value
        text = _in_digits(shown) if isinstance(shown, float) else short(str(shown), _LONGEST_VALUE)
        words.append(WHERE.get(column, f"{column} {{}}").format(text))
    return ", ".join(words) or "elsewhere"


def _in_digits(value: float) -> str:
    """Four digits of a number that tells a place, without an exponent where it is a theta or a wavelength."""
    rounded = float(f"{value:.4g}")
    return f"{rounded:,.0f}" if _PLAIN_FROM <= rounded < 1e9 else f"{rounded:,.4g}"


def _number(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}".strip()


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
