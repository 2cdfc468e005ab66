"""Accuracy of retrieval by what queries are multiplied by, of the arms of experiments.rivals.

python -m figures.retrieval_by_temperature figure.html runs/rivals/*
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(out: Path, runs: list[Path]) -> None:
    """Draw the runs into the page `out`."""
    print(write_figure(plots.retrieval_by_temperature(read_tables(runs)["tempered_retrieval"]), out))


if __name__ == "__main__":
    typer.run(draw)
