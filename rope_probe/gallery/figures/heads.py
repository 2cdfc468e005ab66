"""What each head of a model attends to: layer x head maps of head scores."""

import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.kinds import global_layers
from rope_probe.gallery.figures.layout import ROOM, mark_layers, missing_is_grey, panels
from rope_probe.gallery.figures.style import PLAIN, SCALE, across, bar_of, down, drawing, listed, styled

PANELS = {
    "previous_token": "to the token before",
    "induction": "to what followed an earlier copy",
    "duplicate_token": "to an earlier copy",
    "sink": "to the first position",
    "retrieval_head": "answer tokens copied",
}
"""Scores that are shares, 0 to 1, and what they say attention goes to."""
_COLUMNS = 2
_LOWEST_PANEL, _HIGHEST_PANEL = 120, 340


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
    note = "share of a query's attention, mean over queries"
    if "retrieval_head" in metrics:
        note += "; last panel: share of a needle's tokens that the head copies into the answer, mean over trials"
    if seeds := listed(rows["seed"]):
        note += f"; seeds {seeds}"
    return styled(figure, "What each head attends to", label, note + kinds.note)
