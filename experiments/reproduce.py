"""The main job, end to end: every experiment of this folder, its tables and verdicts, the gallery. See `stages`.

python -m experiments.reproduce --out runs
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pandas as pd
import typer

from experiments.stages import Options, Stage, discover, plan, run_all
from rope_probe.errors import InputError
from rope_probe.gallery.report import gallery
from rope_probe.runs.results import read_tables
from rope_probe.runs.verdicts import Section


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
    lost = run_all(urgent, reuse_anyway=reuse_anyway, planned=stages)
    if first := [stage.run for name, stage in urgent.items() if name not in lost]:
        print(f"first figures: {gallery(first, out / 'gallery')}", flush=True)
    without = run_all(stages, reuse_anyway=reuse_anyway)
    runs = runs_of(stages, without)
    reports = report_all(discover(), runs)
    for name, section in reports.items():
        print(as_text(name, section))
    for name, why in without.items():
        print(f"without a result: {name}: {why}")
    print(gallery([run for folders in runs.values() for run in folders], out / "gallery", reports))
    if without:
        raise typer.Exit(1)


def runs_of(stages: dict[str, Stage], without: dict[str, str]) -> dict[str, list[Path]]:
    """The runs that have a result, by experiment."""
    runs: dict[str, list[Path]] = {}
    for name, stage in stages.items():
        if name not in without:
            runs.setdefault(stage.script, []).append(stage.run)
    return runs


def report_all(modules: Sequence[ModuleType], runs: Mapping[str, Sequence[Path]]) -> dict[str, Section]:
    """What each experiment that has runs says of them, by its name."""
    results = {experiment: read_tables(folders) for experiment, folders in runs.items()}
    named = {module.__name__.rpartition(".")[2]: module for module in modules}
    return {
        name: dataclasses.replace(module.report(results), question=module.QUESTION)
        for name, module in named.items()
        if name in results
    }


def as_text(name: str, section: Section) -> str:
    """A section as it is printed."""
    parts = [f"\n{name}: {section.question}"]
    for title, table in section.tables.items():
        parts.append(f"\n{title}\n{_table(table, index=True)}")
    parts.append(f"\npredictions, see PREDICTIONS of experiments/{name}.py\n{_table(section.verdicts, index=False)}")
    return "\n".join(parts)


def _table(frame: pd.DataFrame, *, index: bool) -> str:
    return frame.to_string(index=index, float_format="{:.4g}".format, na_rep="-")


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        sys.exit(f"error: {error}")
