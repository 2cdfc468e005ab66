"""What a trace costs, against window, depth and number of perturbations.

python -m figures.trace_cost runs/trace_cost figure.html
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(run: Path, out: Path) -> None:
    """Draw a run of benchmarks/trace_cost.py into the page `out`."""
    print(write_figure(plots.trace_cost(read_tables([run])["trace_cost"]), out))


if __name__ == "__main__":
    typer.run(draw)
