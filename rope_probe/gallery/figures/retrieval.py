"""Retrieval by distance, with the lengths that training had as landmarks; and by task, where there is no distance."""

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.layout import ROOM, headroom_for, mark_at, panels, roomy, text_width
from rope_probe.gallery.figures.style import (
    GREY,
    drawing,
    joined,
    line_style,
    listed,
    seeds_of,
    short,
    styled,
    trials_of,
)
from rope_probe.runs.intervals import share_interval

_MARGIN = 1.15
_LONGEST_TASK = 24


def is_accuracy(frame: pd.DataFrame) -> pd.Series:
    """Rows with the accuracy of retrieval at a distance."""
    return (frame["metric"] == "accuracy") & (frame["distance"] > 0).fillna(False)


def is_accuracy_of_task(frame: pd.DataFrame) -> pd.Series:
    """Rows with the accuracy of a task that has no distance."""
    return (frame["metric"] == "accuracy") & frame["task"].notna() & frame["distance"].isna()


def is_document_length(frame: pd.DataFrame) -> pd.Series:
    """Rows with the length of the documents that a model was extended on, and its window as their `seq_len`."""
    return (frame["metric"] == "document_length") & (frame["phase"] == "extension").fillna(False)


@drawing
def retrieval_by_distance(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Accuracy of retrieval against distance, a line for each model: the mean over seeds, and every seed as a point.

    Bars are 95% intervals that carry seeds and trials, of one seed trials alone. The legend goes from the best to the
    worst at the farthest distance, and so do thick lines to thin ones: lines under others stay visible.
    Where the frame has document lengths, the one that most models trained on and their window stand as vertical lines.
    Raises InputError where the frame has no accuracy by distance.
    """
    rows = frame[is_accuracy(frame)]
    if rows.empty:
        raise InputError("these results hold no accuracy by distance; measure it with retrieval_accuracy")
    rows = rows.assign(model=rows["model"].fillna(""))
    styles = {model: line_style(i) for i, model in enumerate(sorted(rows["model"].unique()))}
    table = rows.pivot_table(values="value", index="model", columns="distance")
    distances = [int(distance) for distance in table.columns]
    ends = (distances[0] / _MARGIN, distances[-1] * _MARGIN)
    landmarks = [(tokens, text) for tokens, text in _landmarks(frame) if ends[0] <= tokens <= ends[1]]
    figure = panels([""], 400, headroom=headroom_for(len(landmarks)))
    order = table.sort_values(distances[::-1], ascending=False).index
    for model, thickness in zip(order, np.linspace(1, 0.4, len(order)), strict=True):
        part = rows[rows["model"] == model]
        colour, dash, symbol = styles[model]
        mean = pooled(part, "distance")
        one = part["seed"].nunique() <= 1
        bars = {
            "array": mean["high"] - mean["value"],
            "arrayminus": mean["value"] - mean["low"],
            "visible": bool(mean["low"].notna().any()),
        }
        figure.add_trace(
            go.Scatter(
                x=mean.index.to_numpy(),
                y=mean["value"],
                error_y={**bars, "thickness": 1, "width": 3},
                name=model,
                mode="lines+markers",
                line={"color": colour, "dash": dash, "width": 4 * thickness},
                marker={"symbol": symbol, "size": 13 * thickness},
                legendgroup=model,
            )
        )
        if not one:
            points = {"x": part["distance"], "y": part["value"], "mode": "markers", "showlegend": False}
            marker = {"color": colour, "size": 5, "opacity": 0.5}
            figure.add_trace(go.Scatter(**points, marker=marker, legendgroup=model, hoverinfo="skip"))
    ticks = roomy(distances, [f"{distance}" for distance in distances], np.log(distances))
    figure.update_xaxes(
        type="log",
        title="distance, tokens",
        tickvals=ticks,
        tickformat="~g",
        range=[math.log10(end) for end in ends],
    )
    for line, (tokens, text) in enumerate(landmarks):
        share = math.log(tokens / ends[0]) / math.log(ends[1] / ends[0])
        mark_at(figure, 1, math.log10(tokens), text, line, share=share, colour=GREY)
    figure.update_yaxes(title="accuracy", range=[-0.03, 1.03])
    seeds = rows.groupby("model")["seed"].nunique()
    uneven = f" ({seeds.min()} to {seeds.max()} of them for a model)" if seeds.min() < seeds.max() else ""
    what = joined(
        f"window {listed(rows['seq_len'])} tokens",
        f"{seeds_of(rows)}{uneven}",
        trials_of(rows, "distance, model and seed"),
    )
    note = f"{what}; lines: mean over seeds, points: seeds, bars: 95% over seeds and trials"
    if len(order) > 1:
        note += f"; listed from the best to the worst at {distances[-1]:,} tokens"
    return styled(figure, "Retrieval by distance", label, note)


@drawing
def retrieval_by_task(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Accuracy of tasks without a distance, points for each model: the mean over seeds, and every seed as a small one.

    Lines are 95% intervals that carry seeds and trials, of one seed trials alone. Raises InputError where the frame has
    no such accuracy.
    """
    rows = frame[is_accuracy_of_task(frame)]
    if rows.empty:
        raise InputError("these results hold no accuracy of tasks without a distance; measure vt, fwe or cwe")
    rows = rows.assign(model=rows["model"].fillna(""))
    tasks = sorted(rows["task"].unique())
    figure = panels([""], 340)
    for i, (model, part) in enumerate(rows.groupby("model")):
        colour, _, symbol = line_style(i)
        mean = pooled(part, "task")
        one = part["seed"].nunique() <= 1
        bars = {
            "array": mean["high"] - mean["value"],
            "arrayminus": mean["value"] - mean["low"],
            "visible": bool(mean["low"].notna().any()),
        }
        together = {"legendgroup": str(model), "offsetgroup": str(model), "mode": "markers"}
        figure.add_trace(
            go.Scatter(
                x=mean.index.to_numpy(),
                y=mean["value"],
                error_y={**bars, "thickness": 1.5, "width": 4},
                name=str(model),
                marker={"color": colour, "symbol": symbol, "size": 11},
                hovertemplate="%{x}: %{y:.3f}",
                showlegend=True,
                **together,
            )
        )
        if not one:
            marker = {"color": colour, "size": 5, "opacity": 0.5}
            seeds = {"x": part["task"], "y": part["value"], "showlegend": False, "hoverinfo": "skip"}
            figure.add_trace(go.Scatter(**seeds, marker=marker, **together))
    figure.update_layout(scattermode="group", scattergap=0.4)
    order = {"type": "category", "categoryorder": "array", "categoryarray": tasks, "range": [-0.5, len(tasks) - 0.5]}
    names = [short(task, _LONGEST_TASK) for task in tasks]
    is_tight = max(text_width(name) for name in names) + 8 > ROOM / len(tasks)
    figure.update_xaxes(**order, tickvals=tasks, ticktext=names, tickangle=-90 if is_tight else 0)
    figure.update_yaxes(title="accuracy", range=[-0.03, 1.03])
    several = rows.groupby("model")["seed"].nunique()
    note = "; ".join([
        joined(f"window {listed(rows['seq_len'])} tokens", seeds_of(rows), trials_of(rows, "task, model and seed")),
        *(["points: mean over seeds, small ones: seeds"] if several.max() > 1 else []),
        "lines: 95% over seeds and trials",
    ])  # fmt: skip
    return styled(figure, "Retrieval by task", label, note)


def pooled(rows: pd.DataFrame, by: str) -> pd.DataFrame:
    """`value`, `low` and `high` over seeds for each value of a column; of one seed they are its own.

    Several seeds have no interval where runs do not tell their trials, or hold what is no accuracy.
    """
    pooled = rows.groupby(by)[["value", "low", "high"]].mean()
    for key, part in rows.groupby(by):
        if part["seed"].nunique() > 1:
            known = "trials" in part and (part["trials"] > 0).fillna(False).all() and part["value"].between(0, 1).all()
            trials = part["trials"].to_numpy(float) if known else None
            interval = (math.nan, math.nan) if trials is None else share_interval(part["value"], trials)
            pooled.loc[key, ["low", "high"]] = interval
    return pooled


def _landmarks(frame: pd.DataFrame) -> list[tuple[float, str]]:
    """Where most models' documents and windows end, in tokens, and how to call it."""
    rows = frame[is_document_length(frame)]
    lengths = []
    for column, what in (("value", "documents of {} tokens"), ("seq_len", "training window of {} tokens")):
        models = rows.groupby(column)["model"].nunique()
        if models.empty:
            continue
        length, many, of = models.idxmax(), models.max(), rows["model"].nunique()
        some = f" ({many} of {of} trained models)" if many < of else ""
        lengths.append((float(length), what.format(f"{length:,.0f}") + some))
    return lengths
