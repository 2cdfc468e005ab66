"""Losses against the tokens trained on, for runs of one experiment: checkpoints, extensions or `rope-probe distill`.

python -m figures.loss_curves figure.html runs/teacher-0 runs/base-0
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(out: Path, runs: list[Path]) -> None:
    """Draw the runs together into the page `out`."""
    frame = read_tables(runs)["losses"]
    print(write_figure(plots.loss_curves(frame), out))


if __name__ == "__main__":
    typer.run(draw)
