"""What each head of a model attends to, and by which rotary pairs: maps of head scores and of contributions."""

import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.kinds import global_layers
from rope_probe.gallery.figures.layout import ROOM, mark_layers, missing_is_grey, panels
from rope_probe.gallery.figures.style import (
    PLAIN,
    SCALE,
    across,
    bar_of,
    down,
    drawing,
    joined,
    number_of,
    pair_ticks,
    seeds_of,
    signed,
    styled,
)
from rope_probe.tracing.heads import PAIR_METRIC

_COPIED = "retrieval_head"
PANELS = {
    "previous_token": "to the token before",
    "induction": "to what followed an earlier copy",
    "duplicate_token": "to an earlier copy",
    "sink": "to the first position",
    _COPIED: "answer tokens copied",
}
"""Scores that are shares, 0 to 1, and what they say attention goes to."""
SCORES = {
    metric: "share of answer tokens copied" if metric == _COPIED else f"attention {what}"
    for metric, what in PANELS.items()
}
"""The same as noun phrases, for a sentence."""
_COLUMNS = 2
_LOWEST_PANEL, _HIGHEST_PANEL = 120, 340
_MOST_HEADS, _PIXELS_OF_HEAD = 40, 15


def is_head_score(frame: pd.DataFrame) -> pd.Series:
    """Rows that `head_map` draws."""
    of_head = frame["layer"].notna() & frame["head"].notna()
    return frame["metric"].isin(list(PANELS)).fillna(False) & of_head


@drawing
def head_map(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Layer x head heatmaps of the shares among `head_scores` and `retrieval_head_scores`, one scale for all of them.

    Each is the mean over what else the frame tells apart: windows, distances of a needle. Raises InputError where the
    frame has no such scores.
    """
    rows = frame[is_head_score(frame)]
    if rows.empty:
        raise InputError("these results hold no scores of heads; make them with head_scores")
    metrics = [metric for metric in PANELS if (rows["metric"] == metric).any()]
    columns = min(_COLUMNS, len(metrics))
    height = max(_LOWEST_PANEL, min(14 * int(rows["layer"].nunique()), _HIGHEST_PANEL))
    figure = panels([PANELS[metric] for metric in metrics], height, columns)
    kinds = global_layers(rows, "layer")
    for k, metric in enumerate(metrics, start=1):
        table = rows[rows["metric"] == metric].pivot_table(index="layer", columns="head", values="value")
        trace = go.Heatmap(
            z=table.to_numpy(dtype=float),
            x=table.columns.tolist(),
            y=table.index.tolist(),
            coloraxis="coloraxis",
            hovertemplate="layer %{y}, head %{x}: %{z:.3f}<extra></extra>",
        )
        at = {"row": (k - 1) // columns + 1, "col": (k - 1) % columns + 1}
        figure.add_trace(trace, **at)
        is_last = k + columns > len(metrics)
        title = "head" if is_last else None
        figure.update_xaxes(tickvals=across(table.columns, ROOM / columns), title=title, **PLAIN, **at)
        title = "layer" if at["col"] == 1 else None
        figure.update_yaxes(tickvals=down(table.index, height), title=title, autorange="reversed", **PLAIN, **at)
        mark_layers(figure, k, "y", kinds.layers)
    missing_is_grey(figure)
    figure.update_layout(
        coloraxis={"colorscale": SCALE, "cmin": 0, "cmax": 1, "colorbar": bar_of("share")},
    )
    note = f"share of a query's attention, mean over {_of_several(rows, 'queries')}"
    if _COPIED in metrics:
        note += "; last panel: share of a needle's tokens that the head copies into the answer, mean over "
        note += _of_several(rows[rows["metric"] == _COPIED], "trials")
    note = joined(note, seeds_of(rows), by="; ")
    return styled(figure, "What each head attends to", label, note + kinds.note)


def _of_several(rows: pd.DataFrame, what: str) -> str:
    """Queries or trials with their number, where the rows tell it."""
    return joined(number_of(rows, what), what, by=" ")


def is_contribution(frame: pd.DataFrame) -> pd.Series:
    """Rows that `head_pairs` draws: what a pair adds to the score of attended keys at all distances."""
    of_pair = frame[["layer", "head", "pair"]].notna().all(axis=1)
    return (frame["metric"] == PAIR_METRIC).fillna(False) & of_pair & frame["distance"].isna()


@drawing
def head_pairs(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Head x pair map of what each rotary pair adds to the score of attended keys, from `pair_contributions`.

    Zero is the middle of the scale: a pair may hold a head back. Of many heads those are drawn whose pairs add and take
    most. Means over seeds. Raises InputError where the frame has no such contributions.
    """
    rows = frame[is_contribution(frame)]
    if rows.empty:
        raise InputError("these results hold no contributions of pairs; make them with pair_contributions")
    table = rows.pivot_table(index=["layer", "head"], columns="pair", values="value")
    count = len(table)
    if count > _MOST_HEADS:
        table = table.loc[table.abs().sum(axis=1).nlargest(_MOST_HEADS).index].sort_index()
    names = [f"{layer}.{head}" for layer, head in table.index]
    height = max(_LOWEST_PANEL, _PIXELS_OF_HEAD * len(names))
    figure = panels([""], height)
    figure.add_trace(
        go.Heatmap(
            z=table.to_numpy(dtype=float),
            x=table.columns.tolist(),
            y=names,
            coloraxis="coloraxis",
            hovertemplate="layer.head %{y}, pair %{x}: %{z:.3g}<extra></extra>",
        )
    )
    title = "rotary pair, 0 fastest<br>its wavelength in tokens"
    figure.update_xaxes(**pair_ticks(rows), tickangle=0, title=title, **PLAIN)
    figure.update_yaxes(
        type="category", autorange="reversed", tickvals=down(names, height), title="layer.head", **PLAIN
    )
    missing_is_grey(figure)
    figure.update_layout(coloraxis=signed(table, "added to the score"))
    note = (
        "what a pair adds to the score of attended keys, less its mean over all keys; mean over queries; "
        "e to that power is what it multiplies attention by"
    )
    if count > _MOST_HEADS:
        note += f"; the {_MOST_HEADS} of {count} heads whose pairs add and take most"
    note = joined(note, seeds_of(rows), by="; ")
    return styled(figure, "By which rotary pairs heads attend", label, note)
