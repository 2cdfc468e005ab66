"""Run directories in, an offline HTML gallery out: a front page of claims, and a page for every experiment.

A page of an experiment has its question, and for each prediction its text, the verdicts, the figures that show it, the
numbers behind these, and how the runs were made. Every figure has a text that states what it shows. All pages share one
plotly script; nothing is fetched from anywhere.
"""

import json
import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined

from rope_probe.errors import InputError
from rope_probe.gallery import figures as plots
from rope_probe.gallery.drawn import Drawn, draw_all
from rope_probe.gallery.embedded import Embedded, as_json, embedded, plotly_script, templates
from rope_probe.gallery.figures.style import LONGEST_LABEL, short
from rope_probe.gallery.numbers import Numbers, numbers, write_numbers
from rope_probe.runs.folders import whole_folder
from rope_probe.runs.results import read_manifest, read_tables
from rope_probe.runs.verdicts import Section

INDEX, ASSETS, TABLES, MANIFESTS = "index", "assets", "tables", "manifests"
RELOAD_S = 20
"""Seconds after which a page of a job that runs is loaded anew."""
HELD = ("held", "not held", "undecided", "as predicted", "not as predicted")
IDENTITY = "identity"
_LONGEST_SLUG = 60
_SHOWN_AT_ONCE = 4
"""Figures of one drawing that a page shows unfolded."""
_STRONGEST, _STRONGEST_OF_ONE = 8, 2
_FINDINGS = 5
_PAGES = Environment(
    loader=PackageLoader("rope_probe.gallery"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)


@dataclass(frozen=True)
class Stages:
    """How far the job is that the runs come from, of which the gallery is drawn while it runs."""

    done: int
    planned: int


@dataclass(frozen=True)
class Run:
    """How a run was made, as a page tells it."""

    name: str
    anchor: str
    command: str
    manifest: str
    """Path of the copy of its manifest, from the page."""
    facts: dict[str, str]
    config: str


@dataclass(frozen=True)
class Picture:
    """One figure on a page."""

    anchor: str
    label: str
    embedded: Embedded
    finding: str


@dataclass(frozen=True)
class Group:
    """The figures of one drawing, with the numbers behind all of them and the runs that these are of."""

    drawing: plots.Drawing
    anchor: str
    title: str
    pictures: list[Picture]
    numbers: Numbers
    files: list[tuple[str, str, str]]
    """Kind, path from the page, and size of each file that holds the numbers."""
    runs: list[Run]

    @property
    def shown(self) -> list[Picture]:
        """The figures that are unfolded."""
        return self.pictures[:_SHOWN_AT_ONCE]

    @property
    def folded(self) -> list[Picture]:
        """The rest of them."""
        return self.pictures[_SHOWN_AT_ONCE:]

    @property
    def is_wide(self) -> bool:
        """Whether its figures take the width of a page each."""
        return any(picture.embedded.is_wide for picture in self.pictures)


@dataclass(frozen=True)
class Claim:
    """A verdict as a page shows it."""

    text: str
    held: str
    """One of `HELD`; "" for what is told beside the claims."""
    kind: str
    measured: str
    interval: str
    n: str
    strength: tuple[bool, int] = (False, 0)
    """By which the front page chooses: whether it has an interval, and over how many seeds."""

    @property
    def chip(self) -> str:
        """How its chip is coloured and what it says: an identity holds for any weights, so it is no finding."""
        return IDENTITY if self.kind == "identity" and self.held == "held" else self.held


@dataclass(frozen=True)
class Prediction:
    """A prediction by its number, with its verdicts and the drawings that show it."""

    number: int
    text: str
    claims: list[Claim]
    groups: list[Group]
    """Drawings that stand here, first."""
    seen: list[Group]
    """Drawings that stand with an earlier prediction."""

    @property
    def chips(self) -> list[str]:
        """Each way in which its claims came out, once."""
        there = {claim.chip for claim in self.claims}
        return [chip for chip in (*HELD, IDENTITY) if chip in there]


@dataclass(frozen=True)
class Page:
    """An experiment, as its page and the front page show it."""

    name: str
    file: str
    question: str
    predictions: list[Prediction]
    beside: list[Claim]
    further: list[Group]
    remarks: list[str]
    runs: list[Run]
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def groups(self) -> list[Group]:
        """All drawings of the page, as they stand there."""
        return [*(group for prediction in self.predictions for group in prediction.groups), *self.further]

    @property
    def figures(self) -> int:
        """How many figures it has."""
        return sum(len(group.pictures) for group in self.groups)

    @property
    def run_count(self) -> int:
        """How many runs it is made of."""
        return len(self.runs)

    @property
    def findings(self) -> list[tuple[Group, Picture]]:
        """Where nothing was predicted: what the first figure of each drawing shows, of the first few."""
        if self.predictions:
            return []
        first = [(group, group.pictures[0]) for group in self.groups if group.pictures[0].finding]
        return first[:_FINDINGS]


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
    *,
    stages: Stages | None = None,
) -> Path:
    """Draw every figure that the runs hold, a page for each experiment and an index.html over them; returns the index.

    `reports` are what experiments say of their runs, by name: questions, predictions and verdicts. Experiments that no
    figure is drawn from are listed with how they were made; what a drawing refuses is listed too. Runs of one model
    that differ in nothing but their seed are pooled, as its seeds; others are told apart by what differs in their
    configurations. A run given twice is there once. An older gallery at `out` is replaced. With `stages`, pages say how
    far the job is, and load themselves anew while it runs.

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
        drawn[experiment] = draw_all(read_tables([run for run, _ in made]), configs)
    if not any(figures for figures, _ in drawn.values()):
        refused = [refusal for _, remarks in drawn.values() for refusal in remarks]
        why = refused[0] if refused else "trace some perturbations first"
        raise InputError(f"these runs hold nothing that a figure is drawn from; {why}")
    with whole_folder(out, kind="gallery", overwrite=True, inputs=runs) as folder:
        _write_assets(folder / ASSETS)
        taken = {INDEX}
        pages = []
        for experiment, made in experiments.items():
            slug = _free_slug(experiment, taken)
            figures, remarks = drawn[experiment]
            report = (reports or {}).get(experiment)
            pages.append(_page(experiment, slug, [manifest for _, manifest in made], figures, remarks, report, folder))
        of_all: dict[str, Any] = {"pages": pages, "stages": stages, "reload_s": RELOAD_S, "drawn_at": _now()}
        for page in pages:
            _write(folder / page.file, "experiment.html.jinja", page=page, **of_all)
        _write(folder / f"{INDEX}.html", "index.html.jinja", strongest=_strongest(pages), counts=_sum(pages), **of_all)
    return Path(out) / f"{INDEX}.html"


def _write(path: Path, template: str, **shown: Any) -> None:
    text = _PAGES.get_template(template).render(**shown)
    path.write_text(text + "\n", encoding="utf-8", errors="replace")


def _write_assets(folder: Path) -> None:
    """The scripts and styles that all pages share."""
    folder.mkdir()
    static = resources.files("rope_probe.gallery") / "static"
    for name in ("gallery.css", "gallery.js", "theme.js"):
        (folder / name).write_text((static / name).read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "templates.js").write_text(f"window.galleryTemplates={as_json(templates())};\n", encoding="utf-8")
    (folder / "plotly.min.js").write_text(plotly_script(), encoding="utf-8")


def _page(
    experiment: str,
    slug: str,
    manifests: Sequence[dict[str, Any]],
    drawn: Sequence[Drawn],
    remarks: list[str],
    report: Section | None,
    folder: Path,
) -> Page:
    """An experiment's page; its tables and manifests are written to the folder."""
    runs = [_run(manifest, f"{slug}-{i}", folder) for i, manifest in enumerate(manifests, 1)]
    by_id = dict(zip((manifest["run_id"] for manifest in manifests), runs, strict=True))
    parts: dict[str, list[Drawn]] = {}
    for one in drawn:
        parts.setdefault(one.drawing.name, []).append(one)
    groups = {name: _group(name, of_drawing, slug, by_id, folder) for name, of_drawing in parts.items()}
    section = Section(pd.DataFrame()) if report is None else report
    claims = _claims(section.verdicts)
    predictions = []
    placed: set[str] = set()
    for number in sorted({*section.predictions, *(number for number in claims if number is not None)}):
        wanted = [name for name in section.figures.get(number, ()) if name in groups]
        here = [name for name in wanted if name not in placed]
        placed.update(here)
        predictions.append(
            Prediction(
                number,
                section.predictions.get(number, ""),
                claims.get(number, []),
                [groups[name] for name in here],
                [groups[name] for name in wanted if name not in here],
            )
        )
    further = [group for name, group in groups.items() if name not in placed]
    every = [claim for of_one in claims.values() for claim in of_one if claim.chip]
    counts = {chip: sum(claim.chip == chip for claim in every) for chip in (*HELD, IDENTITY)}
    return Page(
        short(experiment) or "experiment without a name",
        f"{slug}.html",
        section.question,
        predictions,
        claims.get(None, []),
        further,
        remarks,
        runs,
        counts,
    )


def _group(name: str, drawn: Sequence[Drawn], slug: str, runs: Mapping[str, Run], folder: Path) -> Group:
    """The figures of one drawing; the rows of all of them are written to the folder."""
    anchor = _slug(name)
    rows = pd.concat([one.rows for one in drawn], ignore_index=True)
    files = write_numbers(rows, folder / TABLES / f"{slug}-{anchor}")
    pictures = [
        Picture(f"{anchor}-{i}", short(one.label, LONGEST_LABEL), embedded(one.figure), one.finding)
        for i, one in enumerate(drawn, 1)
    ]
    title = pictures[0].embedded.title
    if drawn[0].label:
        title = title.partition(": ")[0]
    return Group(
        drawn[0].drawing,
        anchor,
        title or name,
        pictures,
        numbers(rows),
        [(file.name.partition(".")[2], f"{TABLES}/{file.name}", _size(file)) for file in files],
        [runs[run] for run in rows["run_id"].unique() if run in runs],
    )


def _run(manifest: dict[str, Any], name: str, folder: Path) -> Run:
    """How a run was made; its whole manifest is written to the folder."""
    copy = folder / MANIFESTS / f"{name}.json"
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(json.dumps(manifest, indent=2, default=str) + "\n", encoding="utf-8", errors="replace")
    git = manifest["git"] or {}
    wall = manifest["wall_s"]
    facts = {
        "wall time": f"{wall:,.0f} s" if isinstance(wall, float) else f"{wall} s",
        "commit": f"{git.get('commit', 'unknown')}{' with local changes' if git.get('dirty') else ''}",
        "packages": ", ".join(f"{name} {version}" for name, version in manifest["packages"].items()),
    }
    config = json.dumps(manifest["config"], indent=2, default=str, ensure_ascii=False)
    anchor = f"run-{name}"
    return Run(short(manifest["run_id"]), anchor, _command(manifest["argv"]), f"{MANIFESTS}/{copy.name}", facts, config)


def _command(argv: Sequence[Any]) -> str:
    """The command by which a run was made, as one types it."""
    words = [str(word) for word in argv] or [""]
    program = Path(words[0])
    if program.parent.name == "experiments":
        start = ["python", "-m", f"experiments.{program.stem}"]
    elif program.name == "__main__.py":
        start = ["rope-probe"]
    else:
        start = [program.name] if program.suffix != ".py" else ["python", program.name]
    return shlex.join([*start, *words[1:]])


def _claims(verdicts: pd.DataFrame) -> dict[int | None, list[Claim]]:
    """Verdicts by the number of their prediction; None for what is told beside the predictions."""
    claims: dict[int | None, list[Claim]] = {}
    for row in verdicts.itertuples():
        number = None if pd.isna(row.prediction) else int(row.prediction)
        has_interval = math.isfinite(row.low + row.high)
        claim = Claim(
            str(row.claim),
            "" if pd.isna(row.held) else str(row.held),
            "" if pd.isna(row.kind) else str(row.kind),
            f"{row.measured:.4g}",
            f"{row.low:.4g} to {row.high:.4g}" if has_interval else "",
            "" if pd.isna(row.n) else str(row.n),
            (has_interval, 0 if pd.isna(row.n) else int(row.n)),
        )
        claims.setdefault(number if claim.held else None, []).append(claim)
    return claims


def _strongest(pages: Sequence[Page]) -> list[tuple[Page, Prediction, Claim]]:
    """Decided predictions with an interval first, then those of most seeds; few of each experiment.

    Identities are left out: they hold for any weights.
    """
    found: list[tuple[Page, Prediction, Claim]] = []
    for page in pages:
        decided = [
            (page, prediction, claim)
            for prediction in page.predictions
            for claim in prediction.claims
            if claim.chip not in ("undecided", IDENTITY, "")
        ]
        ordered = sorted(decided, key=lambda one: one[2].strength, reverse=True)
        different = {id(prediction): (where, prediction, claim) for where, prediction, claim in reversed(ordered)}
        kept = sorted(different.values(), key=lambda one: one[2].strength, reverse=True)
        found += kept[:_STRONGEST_OF_ONE]
    return sorted(found, key=lambda one: one[2].strength, reverse=True)[:_STRONGEST]


def _sum(pages: Sequence[Page]) -> dict[str, int]:
    return {chip: sum(page.counts[chip] for page in pages) for chip in (*HELD, IDENTITY)}


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def _size(file: Path) -> str:
    size = file.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{max(1, round(size / 1e3)):,} kB"


def _free_slug(text: str, taken: set[str]) -> str:
    """A name for a page that no other page has; it is added to those that are taken."""
    slug = start = _slug(text) or "experiment"
    number = 1
    while slug in taken:
        number += 1
        slug = f"{start}-{number}"
    taken.add(slug)
    return slug


def _slug(text: str) -> str:
    """The letters and digits of a name, as far as a file's name has room for them."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
    return "-".join(words)[:_LONGEST_SLUG].strip("-")


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


_PAGES.globals["counted"] = _counted
