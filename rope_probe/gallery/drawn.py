"""Which figures some runs hold: each drawing, and each part that it is drawn once for, with the rows behind it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery import figures as plots
from rope_probe.gallery.figures.style import LONGEST_LABEL, LONGEST_NAME, listed, measured, short
from rope_probe.runs.tables import Tables

_LEAST_OF_MODEL = 20


@dataclass(frozen=True)
class Drawn:
    """A figure that was drawn, the drawing and label that it is of, and the rows that it shows."""

    drawing: plots.Drawing
    label: str
    figure: go.Figure
    rows: pd.DataFrame

    @property
    def finding(self) -> str:
        """What the figure shows, in words, from its rows."""
        return self.drawing.finding(self.rows)


def draw_all(tables: Tables, configs: Mapping[str, dict[str, Any]]) -> tuple[list[Drawn], list[str]]:
    """Every figure that the tables have rows for: for each drawing, one for each part that it is split by.

    And what is to be remarked: how many rows measure nothing, and what cannot be drawn and why. `configs` are the
    runs' configurations, by run id.
    """
    finite = Tables({name: measured(frame) for name, frame in tables.items()})
    figures: list[Drawn] = []
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
                figures.append(Drawn(drawing, label, drawing.draw(pd.concat([part, beside]), label), part))
            except InputError as error:
                runs = short(listed(part["run_id"]), LONGEST_LABEL)
                remarks.append(f"{summary(drawing.name, label)} cannot be drawn from {runs}: {error}")
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


def summary(drawing: str, label: str) -> str:
    """The name of a drawing in words, with the label of one of its figures."""
    words = drawing.replace("_", " ")
    return f"{words}: {short(label, LONGEST_LABEL)}" if label else words
