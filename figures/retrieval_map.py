"""Accuracy of retrieval by window and distance.

python -m figures.retrieval_map runs/map figure.html --model MODEL
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(run: Path, out: Path, model: str) -> None:
    """Draw one model of a retrieval run into the page `out`."""
    frame = read_tables([run])["retrieval"]
    print(write_figure(plots.retrieval_map(frame[frame["model"] == model], model), out))


if __name__ == "__main__":
    typer.run(draw)
