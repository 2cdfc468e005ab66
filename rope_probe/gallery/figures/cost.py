"""What a trace costs, measured and fitted."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.layout import panels, roomy
from rope_probe.gallery.figures.style import drawing, line_style, styled
from rope_probe.runs.tables import Column, Metric, declare

TRACE_COST = declare(
    "trace_cost",
    "Seconds that a trace takes, by its size.",
    ("seq_len", "layers", "perturbations"),
    {"seconds": Metric("measured", "s"), "seconds_fitted": Metric("by the fit", "s")},
    own={
        "layers": Column("Int64", "layers of the model"),
        "perturbations": Column("Int64", "perturbations of the trace"),
    },
)
"""Made by benchmarks/trace_cost.py."""
_METRICS = list(TRACE_COST.metrics)


def is_cost(frame: pd.DataFrame) -> pd.Series:
    """Rows that `trace_cost` draws."""
    return frame["metric"].isin(_METRICS)


@drawing
def trace_cost(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Seconds against the window (points), and their fit (lines), for each depth and number of perturbations.

    Raises InputError where the frame has no costs.
    """
    rows = frame[is_cost(frame)]
    sizes = ["layers", "perturbations"]
    table = rows.pivot_table(index=[*sizes, "seq_len"], columns="metric", values="value")
    table = table.reindex(columns=_METRICS).dropna().reset_index()
    if table.empty:
        raise InputError("these results hold no costs with their fit; make them with benchmarks/trace_cost.py")
    figure = panels([""], 380)
    for i, ((layers, perturbations), part) in enumerate(table.groupby(sizes)):
        colour, dash, symbol = line_style(i)
        name = f"{layers} layers, {perturbations} perturbations"
        shared = {"x": part["seq_len"], "legendgroup": name}
        marks = {"color": colour, "symbol": symbol, "size": 9}
        figure.add_trace(go.Scatter(y=part["seconds"], name=name, mode="markers", marker=marks, **shared))
        line = {"color": colour, "dash": dash}
        fit = go.Scatter(
            y=part["seconds_fitted"], mode="lines", line=line, showlegend=False, hoverinfo="skip", **shared
        )
        figure.add_trace(fit)
    windows = sorted(int(window) for window in table["seq_len"].unique())
    ticks = roomy(windows, [f"{window}" for window in windows], np.log(windows))
    figure.update_xaxes(type="log", title="window, tokens", tickvals=ticks)
    figure.update_yaxes(type="log", title="seconds", dtick=1)
    off = (table["seconds_fitted"] / table["seconds"] - 1).abs()
    note = (
        f"points: measured; lines: fitted to FLOPs and positions read, n = {len(table)}, off by {off.median():.0%} "
        f"(median), {off.max():.0%} at most"
    )
    return styled(figure, "What a trace costs", label, note)
