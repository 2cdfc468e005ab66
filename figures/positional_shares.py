"""Shares of content, position and interaction by layer, of one model in the runs.

python -m figures.positional_shares figure.html runs/injection/full-0 full
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(out: Path, run: Path, model: str) -> None:
    """Draw the states of one model of a run into the page `out`."""
    frame = read_tables([run])["positional_parts"]
    print(write_figure(plots.positional_shares(frame[frame["model"] == model], model), out))


if __name__ == "__main__":
    typer.run(draw)
