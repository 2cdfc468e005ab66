"""Through which layers a shift of position reaches the logits.

python -m figures.layer_effects runs/trace figure.html --model MODEL
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(run: Path, out: Path, model: str) -> None:
    """Draw one model of a trace run into the page `out`."""
    frame = read_tables([run])["deltas"]
    print(write_figure(plots.layer_effects(frame[frame["model"] == model], model), out))


if __name__ == "__main__":
    typer.run(draw)
