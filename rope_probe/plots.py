"""Tidy frame in, plotly figure out. One function per figure; each says in its caption what n and the seeds were."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rope_probe.errors import InputError

SIDES = {"q": ("#0072b2", "queries only"), "k": ("#d55e00", "keys only"), "qk": ("#009e73", "both, which cancels")}
_FLOOR_COLOUR = "#888888"
_PANELS = {
    "unrotated_q": "queries, rotation undone",
    "unrotated_k": "keys, rotation undone",
    "hook_resid_post": "residual stream",
    "logits": "logits",
}


def _is_copy(frame: pd.DataFrame) -> pd.Series:
    return (frame["perturbation"] == "Copy").fillna(False) & (frame["metric"] == "rel_l2")


def _is_dose(frame: pd.DataFrame) -> pd.Series:
    return frame["perturbation"].str.startswith("PositionShift").fillna(False) & (frame["metric"] == "kl_nats")


def copy_heatmap(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Layer x copy heatmaps of rel_l2 against the first copy, from `copy_deltas`: q, k, residual stream, logits.

    One colour scale for all panels, logarithmic. Raises InputError where the frame has no copy deltas.
    """
    rows = frame[_is_copy(frame)]
    if rows.empty:
        raise InputError("these results hold no copy deltas; make them with copy_deltas")
    panels = {}
    for site in _PANELS:
        chosen = rows[rows["site"].str.endswith(site)]
        table = chosen.assign(layer=chosen["layer"].fillna(-1)).pivot_table(
            index="layer", columns="document", values="value", aggfunc="mean"
        )
        panels[site] = table
    positive = np.concatenate([table.to_numpy(float).ravel() for table in panels.values()])
    positive = positive[positive > 0]
    low, high = (np.log10(positive.min()), np.log10(positive.max())) if len(positive) else (-8.0, 0.0)
    heights = [max(len(table), 1) for table in panels.values()]
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        row_heights=heights,
        vertical_spacing=0.09,
        subplot_titles=list(_PANELS.values()),
    )
    for row, (site, table) in enumerate(panels.items(), start=1):
        values = table.to_numpy(float)
        labels = ["output" if layer < 0 else f"layer {layer}" for layer in table.index]
        figure.add_trace(
            go.Heatmap(
                z=np.log10(np.where(values > 0, values, np.nan)),
                x=table.columns.tolist(),
                y=labels,
                customdata=values,
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
                name=_PANELS[site],
                hovertemplate="%{y}, copy %{x}<br>relative L2 %{customdata:.4g}<extra>%{fullData.name}</extra>",
            ),
            row=row,
            col=1,
        )
    ticks = np.arange(np.floor(low), np.ceil(high) + 1)
    figure.update_layout(
        coloraxis={
            "colorscale": "Viridis",
            "cmin": low,
            "cmax": high,
            "colorbar": {"title": "relative L2", "tickvals": ticks, "ticktext": [_power(tick) for tick in ticks]},
        }
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(showgrid=False)
    figure.update_xaxes(title="copy of the document (the first is the reference)", row=len(panels), col=1)
    note = f"each cell: mean over the document's positions; {_sample(rows)}"
    return _styled(
        figure,
        "How copies of one document differ, by layer",
        label,
        note,
        height=170 + 34 * sum(heights) + 60 * len(panels),
    )


def dose_response(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """KL of the logits against the tokens shifted, q only, k only and both, with the float64 control as dashed lines.

    Raises InputError where the frame has no logit KL of a PositionShift.
    """
    rows = frame[_is_dose(frame)]
    if rows.empty:
        raise InputError("these results hold no logit KL of a PositionShift; trace some shifts first")
    figure = go.Figure()
    for side, (colour, label) in SIDES.items():
        chosen = rows[rows["side"] == side]
        if chosen.empty:
            continue
        curve = chosen.groupby("delta_tokens")[["value", "value_float64"]].agg(["mean", "min", "max"])
        dose, value = curve.index.to_numpy(), curve["value"]
        band = {"x": [*dose, *dose[::-1]], "y": [*value["max"], *value["min"][::-1]]}
        figure.add_trace(
            go.Scatter(
                **band,
                fill="toself",
                fillcolor=colour,
                opacity=0.15,
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
                legendgroup=side,
            )
        )
        figure.add_trace(
            go.Scatter(
                x=dose,
                y=value["mean"],
                name=label,
                mode="lines+markers",
                line={"color": colour},
                legendgroup=side,
                hovertemplate="%{x} tokens: %{y:.3g} nats",
            )
        )
        exact = curve["value_float64"]["mean"]
        if side == "qk" and exact.notna().any():
            figure.add_trace(
                go.Scatter(
                    x=dose,
                    y=exact,
                    name="both, in float64",
                    mode="lines+markers",
                    marker={"symbol": "circle-open"},
                    hovertemplate="%{x} tokens: %{y:.3g} nats",
                    line={"color": _FLOOR_COLOUR, "dash": "dash"},
                )
            )
    figure.update_xaxes(type="log", title="shift, tokens", dtick=np.log10(4), tickformat="~g")
    figure.update_yaxes(type="log", title="KL(clean || shifted), nats", exponentformat="power", dtick=4)
    span = "lines: mean over documents, bands: smallest to largest document"
    title = "How a shift of position changes the output"
    return _styled(figure, title, label, f"{span}; {_sample(rows)}", height=520)


@dataclass(frozen=True)
class Drawing:
    """A figure by name: which rows of a frame it draws, and how, given those rows and a label for its title."""

    name: str
    rows: Callable[[pd.DataFrame], pd.Series]
    draw: Callable[[pd.DataFrame, str], go.Figure]


DRAWINGS = (
    Drawing("copy_heatmap", _is_copy, copy_heatmap),
    Drawing("dose_response", _is_dose, dose_response),
)


def _sample(rows: pd.DataFrame) -> str:
    seeds = sorted(rows["seed"].dropna().unique().tolist())
    lengths = sorted(rows["seq_len"].dropna().unique().tolist())
    told = f"window {', '.join(map(str, lengths))} tokens, {rows['document'].nunique()} documents"
    return f"{told}, seeds {', '.join(map(str, seeds))}" if seeds else told


def _power(exponent: float) -> str:
    return f"10<sup>{int(exponent)}</sup>"


def _styled(figure: go.Figure, title: str, label: str, caption: str, height: int) -> go.Figure:
    wrapped = re.sub(r"(.{90}\S*)\s", r"\1<br>", caption)
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"t": 90, "b": 110, "l": 90, "r": 40},
        title={"text": f"{title}: {label}" if label else title, "x": 0.01, "xanchor": "left"},
        font={"family": "system-ui, sans-serif", "size": 14},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    figure.add_annotation(
        text=wrapped,
        xref="paper",
        yref="paper",
        x=0,
        y=0,
        yshift=-62,
        yanchor="top",
        xanchor="left",
        align="left",
        showarrow=False,
        font={"size": 12, "color": "#555555"},
    )
    return figure
