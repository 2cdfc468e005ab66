"""The numbers behind a figure: a table for the page, with what all rows share told once; and all of them as files."""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

MOST_ROWS = 200
"""Rows that a page has room for; the files hold all."""
_AVERAGED = ("run_id", "experiment", "seed", "document", "position", "value", "value_float64", "low", "high", "trials")
"""Columns over which, or of which, the page tells means."""
_LONGEST_CELL = 80
_MOST_PLAIN_ROWS = 1_000
"""Rows of a CSV file that is not compressed, so that a gallery stays small."""


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the number that it is sorted by; None for text."""

    text: str
    number: float | None


@dataclass(frozen=True)
class Numbers:
    """A table as a page shows it.

    `same` are the columns that are alike in all rows. `of` is the number of rows that there are, of which the page has
    the largest.
    """

    columns: list[str]
    rows: list[list[Cell]]
    same: dict[str, str]
    of: int
    measured: int


def numbers(frame: pd.DataFrame) -> Numbers:
    """Means of a figure's rows over documents and seeds, with their range and how many numbers each is the mean of."""
    kept = frame.dropna(axis="columns", how="all")
    constant = [column for column in kept.columns if kept[column].nunique(dropna=False) == 1]
    same = {column: _shown(kept[column].iloc[0]) for column in constant if column not in ("experiment", "value")}
    keys = [column for column in kept.columns if column not in constant and column not in _AVERAGED]
    intervals = [column for column in ("low", "high", "value_float64") if column in kept and column not in constant]
    if not keys:
        keys = [column for column in ("seed", "document", "metric") if column in kept][:1]
    groups = kept.groupby(keys, dropna=False, sort=False, observed=True)
    table = groups["value"].agg(["mean", "min", "max", "size"]).rename(columns={"mean": "value", "size": "n"})
    for column in intervals:
        table[column] = groups[column].mean()
    if (table["n"] == 1).all():
        table = table.drop(columns=["min", "max", "n"])
    table = table.reset_index()
    order = [*keys, *(column for column in table.columns if column not in keys)]
    largest = table.sort_values("value", ascending=False, kind="stable").head(MOST_ROWS).sort_index()
    rows = [[_cell(value) for value in row] for row in largest[order].itertuples(index=False)]
    return Numbers(order, rows, same, len(table), len(frame))


def write_numbers(frame: pd.DataFrame, stem: Path) -> tuple[Path, Path]:
    """The whole rows as `stem`.csv (or .csv.gz, of many) and `stem`.parquet, without columns that hold nothing."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    kept = frame.dropna(axis="columns", how="all")
    is_large = len(kept) > _MOST_PLAIN_ROWS
    csv = stem.with_name(f"{stem.name}.csv{'.gz' if is_large else ''}")
    parquet = stem.with_name(f"{stem.name}.parquet")
    text = kept.to_csv(index=False, float_format="%.6g").encode("utf-8", "replace")
    csv.write_bytes(gzip.compress(text, mtime=0) if is_large else text)
    with parquet.open("wb") as file:
        kept.to_parquet(file, index=False, compression="zstd")
    return csv, parquet


def _cell(value: Any) -> Cell:
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    is_number = is_number and not pd.isna(value)
    return Cell(_shown(value), float(value) if is_number else None)


def _shown(value: Any) -> str:
    if pd.isna(value):
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= _LONGEST_CELL else f"{text[: _LONGEST_CELL - 1]}…"
