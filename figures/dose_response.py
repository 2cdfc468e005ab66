"""Dose-response: logit KL against the size of the shift, queries only, keys only and both.

python -m figures.dose_response runs/propagation-0 figure.html --model teacher --arm "packed documents"
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(run: Path, out: Path, model: str = "teacher", arm: str = "packed documents") -> None:
    """Draw one model and arm of a propagation run into the page `out`."""
    frame = read_tables([run])["deltas"]
    chosen = frame[(frame["model"] == model) & (frame["arm"] == arm)]
    print(write_figure(plots.dose_response(chosen, f"{model}, {arm}"), out))


if __name__ == "__main__":
    typer.run(draw)
