"""What a trace costs, against window, depth and number of perturbations.

python -m figures.trace_cost runs/trace_cost figure.html
"""

from pathlib import Path

import typer

from rope_probe import plots
from rope_probe.report import write_figure
from rope_probe.results import read_run


def draw(run: Path, out: Path) -> None:
    """Draw a run of benchmarks/trace_cost.py into the page `out`."""
    print(write_figure(plots.trace_cost(read_run(run)[0]), out))


if __name__ == "__main__":
    typer.run(draw)
