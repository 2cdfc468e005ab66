"""Relative change of W_Q, W_K, W_V, W_O and MLP by layer.

python -m figures.change_by_part figure.html runs/query_spans/kd_adamw-*
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(out: Path, runs: list[Path]) -> None:
    """Draw one model, all seeds of it together, into the page `out`."""
    frame = read_tables(runs)["spans"]
    print(write_figure(plots.change_by_part(frame, ", ".join(frame["model"].dropna().unique())), out))


if __name__ == "__main__":
    typer.run(draw)
