"""Accuracy of tasks without a distance, model by model.

python -m figures.retrieval_by_task figure.html runs/retrieval-*
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(out: Path, runs: list[Path]) -> None:
    """Draw the models of the runs together into the page `out`."""
    print(write_figure(plots.retrieval_by_task(read_tables(runs)["retrieval"]), out))


if __name__ == "__main__":
    typer.run(draw)
