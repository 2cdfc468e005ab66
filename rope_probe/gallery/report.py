"""Run directories in, an offline HTML gallery out: one page per figure, one shared plotly script, an index."""

import html
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery import figures as plots
from rope_probe.runs.folders import whole_folder
from rope_probe.runs.results import read_run

_LONGEST_NAME = 60
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { margin-bottom: 0; } h2 { margin: 2.5rem 0 .3rem; border-top: 1px solid #ddd; padding-top: 1.5rem; }
iframe { width: 100%; border: 0; } p.what { color: #555; margin-top: .2rem; }
table { border-collapse: collapse; font-size: .85rem; } td { padding: .1rem .8rem .1rem 0; vertical-align: top; }
td:first-child { color: #555; } code { font-size: .85em; }
"""


def write_figure(figure: go.Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as a page that works offline; figures in one folder share one plotly script."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs="directory", full_html=True, config={"displaylogo": False})
    return path


def gallery(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Draw every figure that the runs hold and an index.html over them; returns the index.

    Experiments that no figure is drawn from are listed with how they were made. An older gallery at `out` is replaced.
    Raises InputError for a run that is not complete, runs that all hold nothing to draw, or an `out` that is something
    else than a gallery or cannot be written.
    """
    runs = list(dict.fromkeys(str(run) for run in runs))  # each once
    experiments: dict[str, list[tuple[pd.DataFrame, dict[str, Any]]]] = {}
    for frame, manifest in map(read_run, runs):
        experiments.setdefault(manifest["experiment"], []).append((frame, manifest))
    sections = []
    for experiment, read in experiments.items():
        figures = _figures(pd.concat([frame for frame, _ in read], ignore_index=True))
        sections.append((experiment, [manifest for _, manifest in read], figures))
    if not any(figures for *_, figures in sections):
        raise InputError("these runs hold nothing that a figure is drawn from; trace some perturbations first")
    with whole_folder(out, kind="gallery", overwrite=True, inputs=runs) as folder:
        numbers = itertools.count(1)  # over the whole gallery, so that no two pages have one name
        body = "".join(_section(*section, folder, numbers) for section in sections)
        page = f"<!doctype html><meta charset=utf-8><title>rope_probe</title><style>{_STYLE}</style>"
        (folder / "index.html").write_text(f"{page}<h1>rope_probe</h1>{body}\n")
    return Path(out) / "index.html"


def _figures(frame: pd.DataFrame) -> list[tuple[str, str, go.Figure]]:
    """(drawing, label, figure) for each drawing, and each of what it is split by, that the frame has rows for."""
    figures: list[tuple[str, str, go.Figure]] = []
    for drawing in plots.DRAWINGS:
        rows, context = frame[drawing.rows(frame)], frame[drawing.context(frame)]
        split = drawing.split(rows)
        parts = rows.groupby(split, dropna=False, sort=False) if split else [((), rows)]
        for labels, part in parts:
            if part.empty:
                continue
            label = ", ".join(str(value) for value in labels if pd.notna(value) and value != "")
            figures.append((drawing.name, label, drawing.draw(pd.concat([part, context]), label)))
    return figures


def _section(
    experiment: str,
    manifests: list[dict[str, Any]],
    figures: list[tuple[str, str, go.Figure]],
    folder: Path,
    numbers: Iterator[int],
) -> str:
    """The first figure of each drawing, and the others folded away below it."""
    frames, before = [], ""
    for drawing, label, figure in figures:
        name = f"{next(numbers)}-{_slug(f'{experiment} {drawing} {label}')}"
        page = write_figure(figure, folder / f"{name}.html")
        size = f'height="{figure.layout.height + 20}" title="{html.escape(name)}" loading="lazy"'
        frame = f'<iframe src="{page.name}" {size}></iframe>'
        told = html.escape(f"{drawing.replace('_', ' ')}: {label}")
        frames.append(frame if drawing != before else f"<details><summary>{told}</summary>{frame}</details>")
        before = drawing
    made = "".join(map(_how_it_was_made, manifests))
    many = f"{len(manifests)} run{'s' if len(manifests) > 1 else ''}{'' if figures else ', nothing to draw'}"
    return (
        f"<h2>{html.escape(experiment)}</h2><p class=what>{many}</p>{''.join(frames)}"
        f"<details><summary>how it was made</summary>{made}</details>"
    )


def _how_it_was_made(manifest: dict[str, Any]) -> str:
    git = manifest["git"] or {}
    facts = {
        "config": manifest["config"],
        "command": " ".join(map(str, manifest["argv"][1:])),
        "wall time": f"{manifest['wall_s']:.0f} s",
        "commit": f"{git.get('commit', 'unknown')}{' with local changes' if git.get('dirty') else ''}",
        "packages": ", ".join(f"{name} {version}" for name, version in manifest["packages"].items()),
    }
    rows = (f"<tr><td>{key}</td><td><code>{html.escape(str(value))}</code></td></tr>" for key, value in facts.items())
    return f"<h3>{html.escape(manifest['run_id'])}</h3><table>{''.join(rows)}</table>"


def _slug(text: str) -> str:
    """The letters and digits of a name, as far as a file's name has room for them."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
    return "-".join(words)[:_LONGEST_NAME].strip("-")
