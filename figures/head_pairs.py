"""By which rotary pairs heads attend.

python -m figures.head_pairs runs/heads figure.html --model MODEL
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(run: Path, out: Path, model: str) -> None:
    """Draw one model of a heads run into the page `out`."""
    frame = read_tables([run])["head_pairs"]
    print(write_figure(plots.head_pairs(frame[frame["model"] == model], model), out))


if __name__ == "__main__":
    typer.run(draw)
