"""Run directories in, an offline HTML gallery out: one page per figure, one shared plotly script, an index."""

import itertools
import json
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
from rope_probe.gallery.figures.style import LONGEST_LABEL, LONGEST_NAME, listed, measured, short
from rope_probe.runs.folders import whole_folder
from rope_probe.runs.results import read_manifest, read_tables
from rope_probe.runs.tables import Tables
from rope_probe.runs.verdicts import Section

_LONGEST_SLUG = 60
_LEAST_OF_MODEL = 20
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
    Runs of one model that differ in nothing but their seed are pooled, as its seeds; others are told apart by what
    differs in their configurations. A run given twice is there once. An older gallery at `out` is replaced.

    Raises InputError for a run that is not complete, runs that all hold nothing to draw, or an `out` that is something
    else than a gallery or cannot be written.
    """
    runs = list({os.path.realpath(run): run for run in runs}.values())  # each once
    experiments: dict[str, list[tuple[str | os.PathLike[str], dict[str, Any]]]] = {}
    for run in runs:
        manifest = read_manifest(run)
        experiments.setdefault(manifest["experiment"], []).append((run, manifest))
    drawn = {}
    for experiment, made in experiments.items():
        configs = {manifest["run_id"]: manifest["config"] for _, manifest in made}
        drawn[experiment] = _figures(read_tables([run for run, _ in made]), configs)
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


def _figures(
    tables: Tables, configs: Mapping[str, dict[str, Any]]
) -> tuple[list[tuple[str, str, go.Figure]], list[str]]:
    """(drawing, label, figure) for each drawing, and each of what it is split by, that the tables have rows for.

    And what is to be remarked: how many rows measure nothing, and what cannot be drawn and why. `configs` are the
    runs' configurations, by run id.
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
        drawn = drawing.rows(frame)
        frame = _told_apart(frame, frame[drawn], configs)
        rows, context = frame[drawn], frame[drawing.context(frame)]
        split = [*([rows["model"]] if drawing.per_model else []), *drawing.split(rows)]
        parts = rows.groupby(split, dropna=False, sort=False) if split else [((), rows)]
        for labels, part in parts:
            if part.empty:
                continue
            label = ", ".join(str(value) for value in labels if pd.notna(value) and value != "")
            beside = context[context["run_id"].isin(part["run_id"])]
            if drawing.per_model:
                beside = beside[beside["model"].isin(part["model"])]
            try:
                figures.append((drawing.name, label, drawing.draw(pd.concat([part, beside]), label)))
            except InputError as error:
                runs = short(listed(part["run_id"]), LONGEST_LABEL)
                remarks.append(f"{_summary(drawing.name, label)} cannot be drawn from {runs}: {error}")
    return figures, remarks


def _told_apart(frame: pd.DataFrame, drawn: pd.DataFrame, configs: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    """The frame, its models named so that rows of one name may be pooled.

    Where a model's runs were made in several ways, judged by the rows that are drawn, what sets a run apart is added to
    the model's name.
    """
    names = frame["model"].copy()
    for model, rows in drawn.groupby("model", dropna=False, sort=False):
        ways = _ways(rows, configs)
        if len(ways) == 1:
            continue
        named = frame["model"].isna() if pd.isna(model) else (frame["model"] == model).fillna(False)
        for runs, difference in zip(ways, _differences(ways, configs), strict=True):
            if pd.isna(model):
                name = short(difference)
            else:
                room = max(_LEAST_OF_MODEL, LONGEST_NAME - len(" ()") - len(difference))
                name = f"{short(model, room)} ({short(difference, LONGEST_NAME - _LEAST_OF_MODEL - len(' ()'))})"
            names[named & frame["run_id"].isin(runs)] = name
    return frame.assign(model=names)


def _ways(rows: pd.DataFrame, configs: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    """Run ids of a model's rows, those together whose runs are seeds of one another.

    Such runs have the same configuration but for the seed and the hashes of what was trained by it, and no seed twice.
    """
    alike: dict[str, list[str]] = {}
    for run in rows["run_id"].unique():
        alike.setdefault(json.dumps(_settings(configs.get(run, {})), sort_keys=True), []).append(run)
    ways = []
    for runs in alike.values():
        seeds = rows.loc[rows["run_id"].isin(runs), ["run_id", "seed"]].drop_duplicates()["seed"]
        ways += [[run] for run in runs] if seeds.duplicated().any() else [runs]
    return ways


def _differences(ways: Sequence[Sequence[str]], configs: Mapping[str, dict[str, Any]]) -> list[str]:
    """What each of several sets of runs has otherwise than the others, in a few words; at the least the run's id."""
    settings = [_settings(configs.get(runs[0], {})) for runs in ways]
    keys = dict.fromkeys(key for one in settings for key in one)
    differing = [key for key in keys if len({one.get(key) for one in settings}) > 1]
    texts = [", ".join(f"{key}={one.get(key, 'none')}" for key in differing) for one in settings]
    told = []
    for runs, text in zip(ways, texts, strict=True):
        of_run = f"run {str(runs[0]).rpartition('-')[2]}"
        told.append(text if texts.count(text) == 1 else f"{of_run}, {text}" if text else of_run)
    return told


def _settings(config: Any, key: str = "") -> dict[str, str]:
    """A configuration by dotted keys, as text, without seeds and hashes."""
    if isinstance(config, list) and any(isinstance(value, dict) for value in config):
        config = {str(i): value for i, value in enumerate(config)}
    if not isinstance(config, dict):
        return {key: str(config)}
    flat: dict[str, str] = {}
    for name, value in config.items():
        if name != "seed" and not name.endswith("sha256"):
            flat |= _settings(value, f"{key}.{name}" if key else name)
    return flat


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
    return "-".join(words)[:_LONGEST_SLUG].strip("-")
