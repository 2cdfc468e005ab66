"""Accuracy far beyond the document length for every pair of short and long theta, from the theta-grid experiment.

python -m figures.theta_grid figure.html runs/theta_grid/*
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(out: Path, runs: list[Path]) -> None:
    """Draw the runs together into the page `out`."""
    frame = read_tables(runs)["theta_grid"]
    print(write_figure(plots.theta_grid(frame), out))


if __name__ == "__main__":
    typer.run(draw)
