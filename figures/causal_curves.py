"""Accuracy against the share of query spans transplanted, by order.

python -m figures.causal_curves figure.html runs/query_spans/kd_adamw-*
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(out: Path, runs: list[Path]) -> None:
    """Draw one model, all seeds of it together, into the page `out`."""
    frame = read_tables(runs)["span_effects"]
    print(write_figure(plots.causal_curves(frame, ", ".join(frame["model"].dropna().unique())), out))


if __name__ == "__main__":
    typer.run(draw)
