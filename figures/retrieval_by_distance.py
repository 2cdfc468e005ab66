"""Accuracy of retrieval against distance for every arm of the phase-scaling experiment.

python -m figures.retrieval_by_distance figure.html runs/phase_scaling/*
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(out: Path, runs: list[Path], window: int = 1024) -> None:
    """Draw the runs together into the page `out`, as probed in windows of `window` tokens."""
    frame = read_tables(runs).joined(("retrieval", "geometry"))
    chosen = frame[(frame["seq_len"] == window) | (frame["metric"] == "document_length")]
    print(write_figure(plots.retrieval_by_distance(chosen, f"window {window}"), out))


if __name__ == "__main__":
    typer.run(draw)
