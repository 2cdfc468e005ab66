"""What position contributes to the signal that distils a teacher into its students.

python -m figures.signal_of_distillation figure.html runs/propagation-0 runs/propagation-1
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(out: Path, runs: list[Path]) -> None:
    """Draw the students of some propagation runs into the page `out`."""
    print(write_figure(plots.signal_of_distillation(read_tables(runs)["signal"]), out))


if __name__ == "__main__":
    typer.run(draw)
