"""Where a shift of position is injected, layer or head, and where it is read.

python -m figures.injected_by_read runs/propagation-0 figure.html --model teacher
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(run: Path, out: Path, model: str = "teacher") -> None:
    """Draw one model of a propagation run into the page `out`."""
    frame = read_tables([run])["deltas"]
    print(write_figure(plots.injected_by_read(frame[frame["model"] == model], model), out))


if __name__ == "__main__":
    typer.run(draw)
