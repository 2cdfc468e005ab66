"""Long skill against short skill, a point for each arm of the LongReD experiment.

python -m figures.trade_off figure.html runs/longred/*
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(out: Path, runs: list[Path], group: str = "arms") -> None:
    """Draw the runs of one group, the arms or an ablation, into the page `out`."""
    frame = read_tables(runs)["skills"]
    print(write_figure(plots.trade_off(frame[frame["arm"] == group], group), out))


if __name__ == "__main__":
    typer.run(draw)
