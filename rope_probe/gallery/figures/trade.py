"""What extension buys and costs: skill far away in the long window against skill in the short one."""

import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.layout import panels
from rope_probe.gallery.figures.style import drawing, joined, line_style, listed, seeds_of, styled, trials_of
from rope_probe.runs.intervals import share_interval

_SHORT, _LONG = "short_accuracy", "long_accuracy"


def is_skill(frame: pd.DataFrame) -> pd.Series:
    """Rows with the accuracy of a model in one of the two windows, its queries as they are."""
    return frame["metric"].isin([_SHORT, _LONG]) & (frame["query_scale"] == 1).fillna(False)


@drawing
def trade_off(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Accuracy far away against accuracy in the short window, a point for each model: the mean over seeds.

    Bars are 95% intervals over seeds and trials, by `share_interval`. Raises InputError where no model has both.
    """
    rows = frame[is_skill(frame)]
    rows = rows.assign(model=rows["model"].fillna(""))
    points = {
        model: (_pooled(part, _SHORT), _pooled(part, _LONG))
        for model, part in rows.groupby("model")
        if {_SHORT, _LONG} <= set(part["metric"])
    }
    if not points:
        raise InputError("these results hold no model with skill in both windows; run experiments.longred")
    figure = panels([""], 400)
    for i, (model, (short, long)) in enumerate(points.items()):
        colour, _, symbol = line_style(i)
        figure.add_trace(
            go.Scatter(
                x=[short[0]],
                y=[long[0]],
                error_x=_bars(short),
                error_y=_bars(long),
                name=model,
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 12},
                hovertemplate="short %{x:.3f}, long %{y:.3f}",
                showlegend=True,
            )
        )
    windows = {metric: listed(rows.loc[rows["metric"] == metric, "seq_len"]) for metric in (_SHORT, _LONG)}
    figure.update_xaxes(title=f"accuracy in a window of {windows[_SHORT]} tokens", range=[-0.03, 1.03])
    figure.update_yaxes(title=f"accuracy far away in a window<br>of {windows[_LONG]} tokens", range=[-0.03, 1.03])
    several = rows.groupby("model")["seed"].nunique().max() > 1
    bars = "over seeds and trials" if several else "over trials"
    what = joined(seeds_of(rows), trials_of(rows, "window, model and seed"))
    note = joined("points: means over distances and seeds", f"bars: 95%, {bars}", what, by="; ")
    return styled(figure, "Long skill against short skill", label, note)


def _pooled(rows: pd.DataFrame, metric: str) -> tuple[float, float, float]:
    """Mean over seeds with its interval."""
    part = rows[rows["metric"] == metric]
    return float(part["value"].mean()), *share_interval(part["value"], part["trials"])


def _bars(pooled: tuple[float, float, float]) -> dict:
    mean, low, high = pooled
    return {"array": [max(high - mean, 0.0)], "arrayminus": [max(mean - low, 0.0)], "thickness": 1, "width": 3}
