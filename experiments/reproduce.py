"""The main job, end to end: every experiment of this folder, its tables and verdicts, the gallery. See `stages`.

python -m experiments.reproduce --out runs
"""

import dataclasses
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pandas as pd
import typer

from experiments.stages import Options, Stage, discover, plan, run_all
from rope_probe.cli.output import Table, as_texts
from rope_probe.errors import InputError
from rope_probe.gallery.report import Stages, gallery
from rope_probe.runs.results import read_tables
from rope_probe.runs.verdicts import Section, verdicts

REDRAWN_EVERY_S = 20.0
"""Seconds between two drawings of the gallery while stages run, at the least."""
_SHARE_OF_TIME = 0.1
"""Drawing takes at most this share of the time."""
_NUMBER = "{:.4g}"


def main(
    out: Annotated[Path, typer.Option(help="Folder for all run directories.")] = Path("runs"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 1,
    full: Annotated[bool, typer.Option("--full", help="Every arm of every experiment, and the larger sweeps.")] = False,
    reuse_anyway: Annotated[
        bool, typer.Option("--reuse-anyway", help="Reuse complete runs of other sources, too.")
    ] = False,
) -> None:
    """Run what is missing under `out`, print tables, verdicts and the path of the gallery."""
    stages = plan(Options(out, seeds, full))
    urgent = {name: stage for name, stage in stages.items() if stage.urgent}
    growing = GrowingGallery(stages, discover(), out / "gallery")
    lost = run_all(urgent, reuse_anyway=reuse_anyway, planned=stages, watch=growing.redraw)
    if growing.redraw(set(urgent), lost, at_once=True):
        print(f"first figures: {out / 'gallery' / 'index.html'}", flush=True)
    without = run_all(stages, reuse_anyway=reuse_anyway, watch=growing.redraw)
    runs = runs_of(stages, without)
    reports = report_all(discover(), runs)
    for name, section in reports.items():
        print(as_text(name, section))
    for name, why in without.items():
        print(f"without a result: {name}: {why}")
    print(gallery([run for folders in runs.values() for run in folders], out / "gallery", reports))
    if without:
        raise typer.Exit(1)


class GrowingGallery:
    """The gallery of a job that runs, drawn anew as its stages finish, so that it can be watched.

    Verdicts are shown of experiments all of whose stages are through; of the others, figures and predictions.
    """

    def __init__(self, stages: Mapping[str, Stage], modules: Sequence[ModuleType], out: Path) -> None:
        self.stages, self.modules, self.out = stages, modules, out
        self.done: set[str] = set()
        self.drawn: set[str] = set()
        self.next_time = 0.0

    def redraw(self, done: Collection[str], without: Mapping[str, str], *, at_once: bool = False) -> bool:
        """Draw what the stages that are `done` have made, if that is more than before and the last time is a while ago.

        `without` are those of them that made nothing. Returns whether there is a gallery of all that is done.
        """
        self.done |= set(done)
        made = self.done - set(without)
        if made <= self.drawn:
            return bool(self.drawn)
        if time.monotonic() < self.next_time and not at_once:
            return False
        began = time.monotonic()
        there = {name: stage for name, stage in self.stages.items() if name in made}
        runs = runs_of(there, {})
        unfinished = {stage.script for name, stage in self.stages.items() if name not in self.done}
        folders = [run for folders in runs.values() for run in folders]
        try:
            reports = report_all(self.modules, runs, unfinished)
            gallery(folders, self.out, reports, stages=Stages(len(self.done), len(self.stages)))
        except Exception as error:  # whatever it is, the stages go on, and it shows again in the end
            print(f"no gallery yet: {error}", file=sys.stderr, flush=True)
            return False
        finally:
            took = time.monotonic() - began
            self.next_time = time.monotonic() + max(REDRAWN_EVERY_S, took / _SHARE_OF_TIME)
        self.drawn = made
        return True


def runs_of(stages: Mapping[str, Stage], without: Mapping[str, str]) -> dict[str, list[Path]]:
    """The runs that have a result, by experiment."""
    runs: dict[str, list[Path]] = {}
    for name, stage in stages.items():
        if name not in without:
            runs.setdefault(stage.script, []).append(stage.run)
    return runs


def report_all(
    modules: Sequence[ModuleType], runs: Mapping[str, Sequence[Path]], unfinished: Collection[str] = ()
) -> dict[str, Section]:
    """What each experiment that has runs says of them, by its name, with its question and its predictions.

    Of those that are `unfinished` nothing is judged yet.
    """
    results = {experiment: read_tables(folders) for experiment, folders in runs.items()}
    named = {module.__name__.rpartition(".")[2]: module for module in modules}
    return {
        name: dataclasses.replace(
            Section(verdicts([])) if name in unfinished else module.report(results),
            question=module.QUESTION,
            predictions=module.PREDICTIONS,
            figures=getattr(module, "FIGURES", {}),
        )
        for name, module in named.items()
        if name in results
    }


def as_text(name: str, section: Section) -> str:
    """A section as it is printed."""
    tables = [
        Table(title, title, _flat(table), _NUMBER, keys=table.index.nlevels) for title, table in section.tables.items()
    ]
    tables.append(
        Table("verdicts", f"predictions, see PREDICTIONS of experiments/{name}.py", section.verdicts, _NUMBER)
    )
    return "\n\n".join([f"\n{name}: {section.question}", *map(str.rstrip, as_texts(tables))])


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    """The index as columns, where it has names, and a column's names on several levels as one."""
    flat = frame.reset_index(drop=frame.index.names == [None])
    flat.columns = [
        " ".join(str(part) for part in name if part != "") if isinstance(name, tuple) else str(name) for name in flat
    ]
    return flat


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        sys.exit(f"error: {error}")
