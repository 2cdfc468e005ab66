"""Loss of natural text by position, a line for each model, rotation and temperature beyond the window.

python -m figures.loss_by_position figure.html runs/beyond/*
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(out: Path, runs: list[Path], task: str = "passkey") -> None:
    """Draw the readings between needles of one task into the page `out`."""
    frame = read_tables(runs)["beyond"]
    print(write_figure(plots.loss_by_position(frame[frame["task"] == task], task), out))


if __name__ == "__main__":
    typer.run(draw)
