"""Through which rotary pairs of which layers a turn reaches the logits.

python -m figures.pair_effects runs/pairs figure.html --model MODEL
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(run: Path, out: Path, model: str) -> None:
    """Draw one model of a trace run into the page `out`."""
    frame = read_tables([run])["deltas"]
    print(write_figure(plots.pair_effects(frame[frame["model"] == model], model), out))


if __name__ == "__main__":
    typer.run(draw)
