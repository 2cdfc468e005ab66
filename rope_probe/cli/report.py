"""`rope-probe report`: the figures of some runs, as an offline HTML gallery."""

from pathlib import Path
from typing import Annotated

import typer

from rope_probe.cli.options import OUTPUT, AsJson
from rope_probe.cli.output import show

EXAMPLES = ("rope-probe report runs/trace runs/heads --out gallery",)


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the gallery; an older gallery there is replaced.", rich_help_panel=OUTPUT)
    ],
    as_json: AsJson = False,
) -> None:
    """Draw the figures of some runs into an offline HTML gallery."""
    from rope_probe.gallery.report import gallery

    show(gallery(runs, out), command="report", as_json=as_json, made="gallery")
