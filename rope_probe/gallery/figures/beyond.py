"""A model beyond its window: loss of text by position, and retrieval by window x distance."""

from bisect import bisect_right
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.layout import ROOM, missing_is_grey, panels
from rope_probe.gallery.figures.style import PLAIN, SCALE, across, bar_of, drawing, line_style, listed, styled
from rope_probe.runs.intervals import share_interval

_EDGES = (0, 2048, 4096, 8192, 12_288, 16_384)
_COLUMNS = 2
_LOWEST_PANEL, _PIXELS_OF_WINDOW = 120, 40
_ARM = ["model", "rotation", "temperature"]
"""What a line, or a panel, is of."""
_TEXT = [*_ARM, "task", "seed"]
_QUESTION = [*_TEXT, "seq_len", "distance", "unit"]
_BIN = 1024
"""Positions that a point of a line is a mean over."""


def is_asked(frame: pd.DataFrame) -> pd.Series:
    """Rows with what came of a question, at a known window and distance, by a rotation and a temperature."""
    placed = frame[["rotation", "temperature", "seq_len", "distance"]].notna().all(axis=1)
    return placed & (frame["metric"] == "hit") & frame["value"].between(0, 1) & (frame["distance"] >= 0).fillna(False)


@drawing
def window_by_distance(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Heatmaps of the share of answers found, a window a row and a bin of distances a column, for each rotation.

    A rotation with a temperature is a panel of its own. A cell says how many were found of how many; the hover tells
    the 95% interval, over seeds and questions. Cells that nothing was asked in are empty, and a question that a longer
    reading of the same text asked again counts once. Raises InputError where the frame has no answers.
    """
    rows = frame[is_asked(frame)].drop_duplicates(_QUESTION)
    if rows.empty:
        raise InputError("these results hold no answers by window and distance; run experiments.beyond")
    edges = [edge for edge in _EDGES if edge <= int(rows["distance"].max())]
    rows = rows.assign(bin=[bisect_right(edges, int(distance)) - 1 for distance in rows["distance"]])
    arms = list(rows.groupby(_ARM, sort=False, dropna=False))
    windows = sorted(rows["seq_len"].unique().tolist())
    names = [_between(edges, i) for i in range(len(edges))]
    columns = min(_COLUMNS, len(arms))
    of_several = _has_several_models(rows)
    titles = [_name(arm, of_several) for arm, _ in arms]
    height = max(_LOWEST_PANEL, _PIXELS_OF_WINDOW * len(windows))
    figure = panels(titles, height, columns)
    for panel, (_, part) in enumerate(arms):
        cells = [[_cell(part, window, i) for i in range(len(edges))] for window in windows]
        at = {"row": panel // columns + 1, "col": panel % columns + 1}
        figure.add_trace(
            go.Heatmap(
                z=[[share for share, _, _ in line] for line in cells],
                x=names,
                y=[f"{window:,}" for window in windows],
                text=[[found for _, found, _ in line] for line in cells],
                customdata=[[interval for _, _, interval in line] for line in cells],
                texttemplate="%{text}",
                coloraxis="coloraxis",
                xgap=2,
                ygap=2,
                hoverongaps=False,
                hovertemplate="window %{y}, distance %{x}: %{text} found, %{z:.2f} %{customdata}<extra></extra>",
            ),
            **at,
        )
        is_last = panel + columns >= len(arms)
        title = "distance" if is_last else None
        figure.update_xaxes(type="category", tickvals=across(names, ROOM / columns), title=title, **PLAIN, **at)
        title = "window, tokens" if at["col"] == 1 else None
        figure.update_yaxes(type="category", title=title, **PLAIN, **at)
    missing_is_grey(figure)
    figure.update_layout(coloraxis={"colorscale": SCALE, "cmin": 0, "cmax": 1, "colorbar": bar_of("share found")})
    note = (
        "each cell: answers found of those asked for, in windows of one text read once; "
        "distances in thousands of tokens; grey: nothing is so far away"
    )
    if tasks := listed(rows["task"]):
        note += f"; task {tasks}"
    if seeds := listed(rows["seed"]):
        note += f"; texts are seeds {seeds}"
    return styled(figure, "Retrieval by window and distance", label, note)


def is_loss(frame: pd.DataFrame) -> pd.Series:
    """Rows with the loss of a block of text, by a rotation and a temperature."""
    placed = frame[["rotation", "temperature"]].notna().all(axis=1)
    return placed & (frame["metric"] == "loss_nats") & (frame["position"] >= 0).fillna(False)


@drawing
def loss_by_position(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Loss of natural text against position, a line for each rotation and temperature, means over 1,024 positions.

    All lines are of the same text, so that they can be compared at a position; along a line the text changes too.
    A point needs the positions that any line has there. Several readings of one text count once. Raises InputError
    where the frame has no loss by position.
    """
    rows = frame[is_loss(frame)].drop_duplicates([*_TEXT, "position"])
    if rows.empty:
        raise InputError("these results hold no loss of text by position; run experiments.beyond")
    of_several = _has_several_models(rows)
    figure = panels([""], 380)
    rows = rows.assign(middle=rows["position"] // _BIN * _BIN + _BIN // 2)
    arms = rows.groupby(_ARM, sort=False, dropna=False)
    size = arms["middle"].transform(lambda middle: middle.map(middle.value_counts()))
    rows = rows[size == size.groupby(rows["middle"]).transform("max")]
    seeds = rows["seed"].fillna(0)
    for i, (arm, part) in enumerate(rows.groupby(_ARM, sort=False, dropna=False)):
        mean = part.groupby("middle")["value"].mean()
        colour, dash, symbol = line_style(i)
        figure.add_trace(
            go.Scatter(
                x=mean.index.to_numpy(),
                y=mean,
                name=_name(arm, of_several),
                mode="lines+markers",
                line={"color": colour, "dash": dash, "width": 2},
                marker={"symbol": symbol, "size": 6},
                hovertemplate="position %{x:,}: %{y:.3f} nats",
                showlegend=True,
            )
        )
    figure.update_xaxes(title="position, tokens", tickformat=",", tick0=0, dtick=4 * _BIN)
    figure.update_yaxes(title="loss, nats a token")
    note = f"means over {_BIN:,} positions of the same text, needles left out; texts are seeds {listed(seeds)}"
    return styled(figure, "Loss of text by position", label, note)


def _has_several_models(rows: pd.DataFrame) -> bool:
    return rows["model"].nunique(dropna=False) > 1


def _name(arm: Any, of_several: bool) -> str:
    """What an arm is called, by its values of `_ARM`; its model is named only where there are several."""
    model, rotation, sharp = arm
    parts = [] if not of_several else ["unnamed" if pd.isna(model) else model]
    parts += [rotation] if sharp == "none" else [rotation, f"temperature {sharp}"]
    return ", ".join(parts)


def _between(edges: list[int], i: int) -> str:
    """A bin of distances in thousands of tokens of 1,024."""
    low = edges[i] // 1024
    return f"{low} to {_EDGES[_EDGES.index(edges[i]) + 1] // 1024}" if edges[i] < _EDGES[-1] else f"{low} to "


def _cell(rows: pd.DataFrame, window: int, number: int) -> tuple[float, str, str]:
    """Share found, found of asked, and the interval as text; a gap where nothing was asked."""
    chosen = rows[(rows["seq_len"] == window) & (rows["bin"] == number)]
    if chosen.empty:
        return np.nan, "", ""
    by_seed = chosen.groupby(chosen["seed"].fillna(0))["value"]
    low, high = share_interval(by_seed.mean().tolist(), by_seed.size().tolist())
    share = float(chosen["value"].mean())
    return share, f"{chosen['value'].sum():g}/{len(chosen)}", f"[{low:.2f}, {high:.2f}]"
