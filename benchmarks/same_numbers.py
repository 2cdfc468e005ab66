"""Whether two folders of runs hold the same numbers, bit for bit: what a change of structure must leave as it is.

    python benchmarks/same_numbers.py runs-before runs-after

Rows are compared in the order in which they were recorded. Speeds are left out. Ends with exit code 1 where numbers
differ.
"""

import sys
from pathlib import Path

import pandas as pd

NUMBERS = ("value", "value_float64", "low", "high")
PLACES = ("metric", "site", "layer", "head", "pair", "seed")
SPEEDS = ("tokens_per_s",)


def differences(before: pd.DataFrame, after: pd.DataFrame) -> list[str]:
    """In which columns two frames of one run differ, and in how many rows."""
    before, after = (frame[~frame["metric"].isin(SPEEDS)].reset_index(drop=True) for frame in (before, after))
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
    for file in sorted(before.rglob("metrics.parquet")):
        run = file.parent.relative_to(before)
        other = after / run / file.name
        if not other.exists():
            print(f"{run}: not in {after}")
            wrong += 1
            continue
        frame = pd.read_parquet(file)
        rows += len(frame)
        for difference in differences(frame, pd.read_parquet(other)):
            print(f"{run}: {difference}")
            wrong += 1
    print(f"{rows} rows compared, {wrong} differences")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
