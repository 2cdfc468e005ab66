"""Whether two folders of runs hold the same numbers, bit for bit: what a change of structure must leave as it is.

    python benchmarks/same_numbers.py runs-before runs-after

Rows are compared in the order of their places and values. Runs of either layout are read: one metrics.parquet, or a
folder of tables. Speeds are left out. Ends with exit code 1 where numbers differ.
"""

import sys
from pathlib import Path

import pandas as pd

NUMBERS = ("value", "value_float64", "low", "high")
PLACES = ("metric", "site", "layer", "head", "pair", "seed")
WHOLE = ("layer", "head", "pair", "seed")
SPEEDS = ("tokens_per_s",)


def rows_of(run: Path) -> pd.DataFrame:
    """All that a run measured, in an order of its own: by place, then by value."""
    files = sorted([*run.glob("metrics.parquet"), *run.glob("tables/*.parquet")])
    columns = [*PLACES, *NUMBERS]
    types = dict.fromkeys(WHOLE, "Int64") | dict.fromkeys(NUMBERS, "float64")
    frame = pd.concat([pd.read_parquet(file).reindex(columns=columns).astype(types) for file in files])
    frame = frame[~frame["metric"].isin(SPEEDS)]
    named = frame[list(PLACES)].astype("string").fillna("-")
    return frame.assign(**named).sort_values(columns, ignore_index=True)


def differences(before: pd.DataFrame, after: pd.DataFrame) -> list[str]:
    """In which columns two frames of one run differ, and in how many rows."""
    if len(before) != len(after):
        return [f"{len(before)} rows before, {len(after)} after"]
    found = []
    for column in (*PLACES, *NUMBERS):
        same = (before[column] == after[column]).fillna(False) | (before[column].isna() & after[column].isna())
        if not same.all():
            found.append(f"{column} in {(~same).sum()} rows")
    return found


def main(before: Path, after: Path) -> int:
    """Compare every run of `before` with that of the same place in `after`; returns the exit code."""
    rows, wrong = 0, 0
    for manifest in sorted(before.rglob("manifest.json")):
        run = manifest.parent.relative_to(before)
        if not (after / run / manifest.name).exists():
            print(f"{run}: not in {after}")
            wrong += 1
            continue
        ours, theirs = rows_of(before / run), rows_of(after / run)
        rows += len(ours)
        for difference in differences(ours, theirs):
            print(f"{run}: {difference}")
            wrong += 1
    print(f"{rows} rows compared, {wrong} differences")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
