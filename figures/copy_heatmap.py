"""Layer x copy heatmap: how the copies of one document differ in q, k, residual stream and logits.

python -m figures.copy_heatmap runs/propagation-0 figure.html --model teacher --arm "repeated document"
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(run: Path, out: Path, model: str = "teacher", arm: str = "repeated document") -> None:
    """Draw one model and arm of a propagation run into the page `out`."""
    frame = read_tables([run])["deltas"]
    chosen = frame[(frame["model"] == model) & (frame["arm"] == arm)]
    print(write_figure(plots.copy_heatmap(chosen, f"{model}, {arm}"), out))


if __name__ == "__main__":
    typer.run(draw)
