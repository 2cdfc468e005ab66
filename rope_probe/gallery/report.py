"""Run directories in, an offline HTML gallery out: one page per figure, one shared plotly script, an index."""

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader

from rope_probe.errors import InputError
from rope_probe.gallery import figures as plots
from rope_probe.gallery.figures.style import LONGEST_LABEL, listed, measured, short
from rope_probe.runs.folders import whole_folder
from rope_probe.runs.results import read_manifest, read_tables
from rope_probe.runs.tables import Tables
from rope_probe.runs.verdicts import Section

_LONGEST_NAME = 60
_PAGE = Environment(
    loader=PackageLoader("rope_probe", "gallery"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def write_figure(figure: go.Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as a page that works offline; figures in one folder share one plotly script."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs="directory", full_html=True, config={"displaylogo": False})
    return path


def gallery(
    runs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    reports: Mapping[str, Section] | None = None,
) -> Path:
    """Draw every figure that the runs hold and an index.html over them; returns the index.

    `reports` are what experiments say of their runs, by name: question and verdicts stand above the figures.
    Experiments that no figure is drawn from are listed with how they were made; what a drawing refuses is listed too.
    A run given twice is there once. An older gallery at `out` is replaced.

    Raises InputError for a run that is not complete, runs that all hold nothing to draw, or an `out` that is something
    else than a gallery or cannot be written.
    """
    runs = list({os.path.realpath(run): run for run in runs}.values())  # each once
    experiments: dict[str, list[tuple[str | os.PathLike[str], dict[str, Any]]]] = {}
    for run in runs:
        manifest = read_manifest(run)
        experiments.setdefault(manifest["experiment"], []).append((run, manifest))
    drawn = {experiment: _figures(read_tables([run for run, _ in made])) for experiment, made in experiments.items()}
    if not any(figures for figures, _ in drawn.values()):
        refused = [refusal for _, remarks in drawn.values() for refusal in remarks]
        why = refused[0] if refused else "trace some perturbations first"
        raise InputError(f"these runs hold nothing that a figure is drawn from; {why}")
    with whole_folder(out, kind="gallery", overwrite=True, inputs=runs) as folder:
        numbers = itertools.count(1)  # over the whole gallery, so that no two pages have one name
        sections = []
        for experiment, made in experiments.items():
            report = (reports or {}).get(experiment)
            figures, remarks = drawn[experiment]
            sections.append({
                "experiment": short(experiment),
                "question": "" if report is None else report.question,
                "verdicts": [] if report is None else _verdicts(report.verdicts),
                "remarks": remarks,
                "frames": _frames(experiment, figures, folder, numbers),
                "manifests": [{"run_id": short(manifest["run_id"]), "facts": _facts(manifest)} for _, manifest in made],
            })  # fmt: skip
        page = _PAGE.get_template("index.html.jinja").render(sections=sections)
        (folder / "index.html").write_text(page + "\n", encoding="utf-8", errors="replace")
    return Path(out) / "index.html"


def _figures(tables: Tables) -> tuple[list[tuple[str, str, go.Figure]], list[str]]:
    """(drawing, label, figure) for each drawing, and each of what it is split by, that the tables have rows for.

    And what is to be remarked: how many rows measure nothing, and what cannot be drawn and why.
    """
    finite = Tables({name: measured(frame) for name, frame in tables.items()})
    figures: list[tuple[str, str, go.Figure]] = []
    remarks = []
    if left_out := sum(map(len, tables.values())) - sum(map(len, finite.values())):
        remarks.append(f"without {left_out} rows that have no metric or no finite value")
    for drawing in plots.DRAWINGS:
        frame = finite.joined(drawing.tables)
        if frame.empty:
            continue
        rows, context = frame[drawing.rows(frame)], frame[drawing.context(frame)]
        split = drawing.split(rows)
        parts = rows.groupby(split, dropna=False, sort=False) if split else [((), rows)]
        for labels, part in parts:
            if part.empty:
                continue
            label = ", ".join(str(value) for value in labels if pd.notna(value) and value != "")
            try:
                figures.append((drawing.name, label, drawing.draw(pd.concat([part, context]), label)))
            except InputError as error:
                runs = short(listed(part["run_id"]), LONGEST_LABEL)
                remarks.append(f"{_summary(drawing.name, label)} cannot be drawn from {runs}: {error}")
    return figures, remarks


def _frames(
    experiment: str, figures: list[tuple[str, str, go.Figure]], folder: Path, numbers: Iterator[int]
) -> list[dict[str, Any]]:
    """The pages of an experiment's figures; but for the first figure of each drawing they are folded away."""
    frames: list[dict[str, Any]] = []
    before = ""
    for drawing, label, figure in figures:
        name = f"{next(numbers)}-{_slug(f'{experiment} {drawing} {label}')}"
        page = write_figure(figure, folder / f"{name}.html")
        size = {"height": figure.layout.height + 20, "folded": drawing == before}
        frames.append({"page": page.name, "name": name, "summary": _summary(drawing, label), **size})
        before = drawing
    return frames


def _summary(drawing: str, label: str) -> str:
    words = drawing.replace("_", " ")
    return f"{words}: {short(label, LONGEST_LABEL)}" if label else words


def _verdicts(verdicts: pd.DataFrame) -> list[dict[str, str]]:
    """Verdicts as the page shows them."""
    return [
        {
            "prediction": "" if pd.isna(row.prediction) else str(row.prediction),
            "claim": row.claim,
            "kind": "" if pd.isna(row.kind) else row.kind,
            "measured": f"{row.measured:.4g}",
            "interval": f"{row.low:.4g} to {row.high:.4g}" if math.isfinite(row.low + row.high) else "",
            "n": str(row.n),
            "held": "" if pd.isna(row.held) else row.held,
        }
        for row in verdicts.itertuples()
    ]


def _facts(manifest: dict[str, Any]) -> dict[str, Any]:
    """How a run was made."""
    git = manifest["git"] or {}
    return {
        "config": manifest["config"],
        "command": " ".join(map(str, manifest["argv"][1:])),
        "wall time": f"{wall:.0f} s" if isinstance(wall := manifest["wall_s"], float) else f"{wall} s",
        "commit": f"{git.get('commit', 'unknown')}{' with local changes' if git.get('dirty') else ''}",
        "packages": ", ".join(f"{name} {version}" for name, version in manifest["packages"].items()),
    }


def _slug(text: str) -> str:
    """The letters and digits of a name, as far as a file's name has room for them."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
    return "-".join(words)[:_LONGEST_NAME].strip("-")
