"""What is left of a passkey when local or global layers are shifted, held at one position or silenced.

python -m figures.passkey_by_intervention figure.html runs/pretrained/kinds-* --model MODEL
"""

from pathlib import Path

import typer

from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import write_figure
from rope_probe.runs.results import read_tables


def draw(out: Path, runs: list[Path], model: str) -> None:
    """Draw one model of the runs into the page `out`."""
    frame = read_tables(runs)["passkeys"]
    print(write_figure(plots.passkey_by_intervention(frame[frame["model"] == model], model), out))


if __name__ == "__main__":
    typer.run(draw)
