"""What each head attends to.

python -m figures.head_map runs/heads figure.html --model MODEL
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(run: Path, out: Path, model: str) -> None:
    """Draw one model of a heads run into the page `out`."""
    frame = read_tables([run])["heads"]
    print(write_figure(plots.head_map(frame[frame["model"] == model], model), out))


if __name__ == "__main__":
    typer.run(draw)
