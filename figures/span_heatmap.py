"""Relative change of W_Q and W_K by layer and rotary pair.

python -m figures.span_heatmap figure.html runs/query_spans/kd_adamw-*
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(out: Path, runs: list[Path]) -> None:
    """Draw one model, all seeds of it together, into the page `out`."""
    frame = read_tables(runs).joined(("spans", "landmarks"))
    print(write_figure(plots.span_heatmap(frame, ", ".join(frame["model"].dropna().unique())), out))


if __name__ == "__main__":
    typer.run(draw)
