"""From which layer on a shift of position changes what the logit lens reads.

python -m figures.lens_by_layer runs/lens figure.html --model MODEL
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(run: Path, out: Path, model: str) -> None:
    """Draw one model of a trace run into the page `out`."""
    frame = read_tables([run])["deltas"]
    print(write_figure(plots.lens_by_layer(frame[frame["model"] == model], model), out))


if __name__ == "__main__":
    typer.run(draw)
