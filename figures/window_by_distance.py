"""Answers found by window and distance, a panel for each model, rotation and temperature beyond the window.

python -m figures.window_by_distance figure.html runs/beyond/*
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(out: Path, runs: list[Path], task: str = "passkey") -> None:
    """Draw the runs of one task into the page `out`."""
    frame = read_tables(runs)["beyond"]
    print(write_figure(plots.window_by_distance(frame[frame["task"] == task], task), out))


if __name__ == "__main__":
    typer.run(draw)
