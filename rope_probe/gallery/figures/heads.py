"""What each head of a model attends to: layer x head maps of head scores."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rope_probe.errors import InputError
from rope_probe.gallery.figures.style import drawing, listed, spaced, styled

PANELS = {
    "previous_token": "to the token before",
    "induction": "to what followed an earlier copy",
    "duplicate_token": "to an earlier copy",
    "sink": "to the first position",
    "retrieval_head": "answer tokens copied",
}
"""Scores that are shares, 0 to 1, and what they say attention goes to."""
_COLUMNS = 3
_MOST_TICKS, _ROOM_FOR_TICK = 9, 18


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
    lines = -(-len(metrics) // columns)
    layers = int(rows["layer"].nunique())
    panel_height = max(160, min(16 * layers, 900))
    height = lines * panel_height + (lines - 1) * 90
    figure = make_subplots(
        rows=lines,
        cols=columns,
        subplot_titles=[PANELS[metric] for metric in metrics],
        horizontal_spacing=0.07,
        vertical_spacing=90 / height if lines > 1 else 0,
    )
    for panel, metric in enumerate(metrics):
        table = rows[rows["metric"] == metric].pivot_table(index="layer", columns="head", values="value")
        trace = go.Heatmap(
            z=table.to_numpy(dtype=float),
            x=table.columns.tolist(),
            y=table.index.tolist(),
            coloraxis="coloraxis",
            hovertemplate="layer %{y}, head %{x}: %{z:.3f}<extra></extra>",
        )
        at = {"row": panel // columns + 1, "col": panel % columns + 1}
        figure.add_trace(trace, **at)
        figure.update_xaxes(tickvals=spaced(table.columns, _MOST_TICKS), **at)
        figure.update_yaxes(tickvals=spaced(table.index, panel_height // _ROOM_FOR_TICK), **at)
    figure.update_layout(
        coloraxis={"colorscale": "Viridis", "cmin": 0, "cmax": 1, "colorbar": {"title": "share"}},
        plot_bgcolor="#d8d8d8",
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, zeroline=False)
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(title="layer", col=1)
    figure.update_xaxes(title="head", row=lines)
    note = "share of a query's attention, mean over queries"
    if "retrieval_head" in metrics:
        note += "; last panel: share of a needle's tokens that the head copies into the answer, mean over trials"
    if seeds := listed(rows["seed"]):
        note += f"; seeds {seeds}"
    return styled(figure, "What each head attends to", label, note, height=height + 240)
