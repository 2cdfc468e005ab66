"""How far extended models are from the original, layer by layer.

python -m figures.drift_by_layer figure.html runs/drift-*
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(out: Path, runs: list[Path]) -> None:
    """Draw the models of the runs together into the page `out`."""
    print(write_figure(plots.drift_by_layer(read_tables(runs)["drift"]), out))


if __name__ == "__main__":
    typer.run(draw)
