"""Every figure of some runs as files for a paper: SVG, PDF or PNG.

python -m figures.all runs/trace runs/heads --out paper --format svg --format pdf --width 700
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from rope_probe.errors import InputError
from rope_probe.gallery import figures as plots
from rope_probe.gallery.drawn import draw_all
from rope_probe.gallery.figures.static import FORMATS, WIDTH
from rope_probe.runs.results import read_manifest, read_tables

_LONGEST_NAME = 60


def draw(
    runs: list[Path],
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    format: Annotated[
        list[str] | None, typer.Option(help="svg, pdf or png; may be given several times; default svg.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Drawings by name; default: all.")] = None,
    width: Annotated[int, typer.Option(help="Pixels across.")] = WIDTH,
) -> None:
    """Write every figure of these runs into the folder `out`, DRAWING-LABEL.FORMAT, and print the files."""
    known = [drawing.name for drawing in plots.DRAWINGS]
    if unknown := sorted(set(only or []) - set(known)):
        raise InputError(f"there is no drawing {unknown[0]!r}; there are {', '.join(known)}")
    configs = {manifest["run_id"]: manifest["config"] for manifest in map(read_manifest, runs)}
    figures, remarks = draw_all(read_tables(runs), configs)
    for remark in remarks:
        print(remark, file=sys.stderr)
    chosen = [one for one in figures if not only or one.drawing.name in only]
    if not chosen:
        raise InputError("these runs hold nothing that such a figure is drawn from")
    files = []
    for number, one in enumerate(chosen, start=1):
        stem = _file_name(f"{one.drawing.name} {one.label}")
        files += [(one.figure, out / f"{number:02d}-{stem}.{kind}") for kind in format or FORMATS[:1]]
    for file in plots.save_figures(files, width):
        print(file)


def _file_name(text: str) -> str:
    """The letters and digits of a text, as far as a file's name has room for them."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
    return "-".join(words)[:_LONGEST_NAME].strip("-")


if __name__ == "__main__":
    try:
        typer.run(draw)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
