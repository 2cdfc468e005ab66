"""Full turns of every rotary pair over the window of each phase, for the arms of the phase-scaling experiment.

python -m figures.rotations_by_pair figure.html runs/phase_scaling/*
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(out: Path, runs: list[Path]) -> None:
    """Draw the runs together into the page `out`."""
    frame = read_tables(runs)["geometry"]
    print(write_figure(plots.rotations_by_pair(frame), out))


if __name__ == "__main__":
    typer.run(draw)
