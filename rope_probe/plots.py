"""Tidy frame in, plotly figure out. One function per figure; each says in its caption what n and the seeds were."""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rope_probe.errors import InputError
from rope_probe.propagation import is_rounding

SIDES = {
    "q": ("queries only", "#0072b2", "circle", "solid"),
    "k": ("keys only", "#d55e00", "diamond-open", "dash"),
    "qk": ("both, which cancels", "#009e73", "square", "solid"),
}
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
PANELS = {
    "hook_rot_q": "queries as rotated",
    "unrotated_q": "queries, rotation undone",
    "hook_rot_k": "keys as rotated",
    "unrotated_k": "keys, rotation undone",
    "hook_attn_out": "attention output",
    "hook_resid_post": "residual stream",
    "logits": "logits",
}
_LOWEST_KL = 1e-16


def _is_copy(frame: pd.DataFrame) -> pd.Series:
    return (frame["perturbation"] == "Copy").fillna(False) & (frame["metric"] == "rel_l2")


def _is_dose(frame: pd.DataFrame) -> pd.Series:
    return frame["perturbation"].str.startswith("PositionShift").fillna(False) & (frame["metric"] == "kl_nats")


def _is_accuracy(frame: pd.DataFrame) -> pd.Series:
    return (frame["metric"] == "accuracy") & frame["distance"].notna()


def _task(frame: pd.DataFrame) -> pd.Series:
    """The task that `rope-probe retrieval` measured; "" in other experiments, whose arms are lines of one figure."""
    return frame["arm"].where(frame["experiment"] == "retrieval", "").fillna("")


def restriction(frame: pd.DataFrame) -> pd.Series:
    """How each row's perturbation is restricted: its text without side and size, "" where it is not."""
    text = frame["perturbation"].str.extract(r"\((.*)\)", expand=False).fillna("")
    return text.str.replace(r"(side|tokens)=[^,]*(, )?", "", regex=True).str.rstrip(", ")


def copy_heatmap(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Layer x copy heatmaps of rel_l2 between copies, from `copy_deltas`: q, k, attention, residual stream, logits.

    One logarithmic colour scale for all panels. What the float64 control shows to be rounding is left grey.
    Raises InputError where the frame has no copy deltas.
    """
    rows = frame[_is_copy(frame)]
    if rows.empty:
        raise InputError("these results hold no copy deltas; make them with copy_deltas")
    rows = rows.assign(
        layer=rows["layer"].fillna(-1), shown=rows["value"].where(~is_rounding(rows) & (rows["value"] > 0))
    )
    shown = np.log10(rows["shown"].dropna())
    low, high = (shown.min(), shown.max()) if len(shown) else (-1.0, 0.0)
    panels = {site: rows[rows["site"].str.endswith(site)] for site in PANELS}
    layers = max(part["layer"].nunique() for part in panels.values())
    height = max(9, min(30, 240 // layers))
    heights = [height * part["layer"].nunique() for part in panels.values()]
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        row_heights=heights,
        vertical_spacing=34 / (sum(heights) + 34 * 6),
        subplot_titles=list(PANELS.values()),
    )
    for row, part in enumerate(panels.values(), start=1):
        at = {"index": "layer", "columns": "document", "dropna": False}
        table, value, exact = (part.pivot_table(values=v, **at) for v in ("shown", "value", "value_float64"))
        told = np.stack([value, exact.reindex_like(value)], -1)
        names = ["output" if layer < 0 else f"layer {layer}" for layer in value.index]
        figure.add_trace(
            go.Heatmap(
                z=np.log10(table.reindex_like(value)),
                x=value.columns.tolist(),
                y=names,
                customdata=told,
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
                hoverongaps=True,
                hovertemplate="%{y}, copy %{x}: %{customdata[0]:.4g}<br>float64: %{customdata[1]:.4g}<extra></extra>",
            ),
            row=row,
            col=1,
        )
        figure.update_yaxes(type="category", categoryarray=names, range=[len(names) - 0.5, -0.5], row=row, col=1)
    steps = (1, 2, 5) if high - low < 2 else (1,)
    ticks = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    bar = {"title": "relative L2", "tickvals": np.log10(ticks), "ticktext": [f"{tick:g}" for tick in ticks]}
    figure.update_layout(
        coloraxis={"colorscale": "Viridis", "cmin": low, "cmax": high, "colorbar": bar}, plot_bgcolor="#d8d8d8"
    )
    figure.update_yaxes(showgrid=False, zeroline=False)
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_xaxes(title="copy of the document", row=len(panels), col=1)
    note = f"each cell: mean over the document's positions, against the first copy; {_sample(rows)}"
    if rows["value_float64"].notna().any():
        note += "; grey: rounding, gone in float64"
    title = "How copies of one document differ, by layer"
    return _styled(figure, title, label, note, height=200 + sum(heights) + 34 * 6)


def dose_response(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """KL of the logits against the tokens shifted, q only, k only and both; the float64 control of both dashed grey.

    Raises InputError where the frame has no logit KL of a PositionShift, or of ones that are restricted differently.
    """
    rows = frame[_is_dose(frame)]
    if rows.empty:
        raise InputError("these results hold no logit KL of a PositionShift; trace some shifts first")
    if (kinds := restriction(rows).unique()).size > 1:
        raise InputError(
            f"these shifts are restricted in {kinds.size} ways, {', '.join(kinds)}; draw one way at a time"
        )
    figure = go.Figure()
    for side, (name, colour, symbol, dash) in SIDES.items():
        chosen = rows[rows["side"] == side]
        if chosen.empty:
            continue
        curve = chosen.groupby("delta_tokens")[["value", "value_float64"]].agg(["mean", "min", "max"])
        dose, value, exact = curve.index.to_numpy(), curve["value"], curve["value_float64"]["mean"]
        hover = "%{x} tokens: %{y:.3g} nats"
        figure.add_trace(
            go.Scatter(
                x=[*dose, *dose[::-1]],
                y=[*value["max"], *value["min"][::-1]],
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
                name=name,
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                marker={"symbol": symbol, "size": 8},
                legendgroup=side,
                hovertemplate=hover,
            )
        )
        if side == "qk" and exact.notna().any():
            figure.add_trace(
                go.Scatter(
                    x=dose,
                    y=exact,
                    name=f"both, in float64: {exact.max():.0e} at most",
                    mode="lines+markers",
                    marker={"symbol": "circle-open"},
                    line={"color": "#888888", "dash": "dash"},
                    hovertemplate=hover,
                )
            )
    highest = np.log10(max(rows["value"].max(), 10 * _LOWEST_KL))
    doses = sorted(rows["delta_tokens"].unique())
    figure.update_xaxes(
        type="log" if doses[0] > 0 else "linear", title="shift, tokens", tickvals=doses, tickformat="~g"
    )
    figure.update_yaxes(
        type="log",
        title="KL(clean || shifted), nats",
        exponentformat="power",
        dtick=2,
        range=[np.log10(_LOWEST_KL), highest + 0.5],
    )
    note = f"lines: mean over documents, bands: smallest to largest document; {_sample(rows)}"
    return _styled(figure, "How a shift of position changes the output", label, note, height=540)


def retrieval_by_distance(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Accuracy of retrieval against distance, a line for each model: the mean over seeds, and every seed as a point.

    With one seed the bars are its 95% intervals.
    Raises InputError where the frame has no accuracy by distance.
    """
    rows = frame[_is_accuracy(frame)]
    if rows.empty:
        raise InputError("these results hold no accuracy by distance; measure it with retrieval_accuracy")
    figure = go.Figure()
    for i, (model, part) in enumerate(rows.groupby("model", sort=False, dropna=False)):
        colour, dash = PALETTE[i % len(PALETTE)], ("solid", "dash", "dot")[i // len(PALETTE) % 3]
        mean = part.groupby("distance")[["value", "low", "high"]].mean()
        one = part["seed"].nunique() <= 1
        bars = {"array": mean["high"] - mean["value"], "arrayminus": mean["value"] - mean["low"], "visible": one}
        figure.add_trace(
            go.Scatter(
                x=mean.index.to_numpy(),
                y=mean["value"],
                error_y={**bars, "thickness": 1, "width": 3},
                name=str(model),
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                legendgroup=str(model),
            )
        )
        if not one:
            points = {"x": part["distance"], "y": part["value"], "mode": "markers", "showlegend": False}
            marker = {"color": colour, "size": 5, "opacity": 0.5}
            figure.add_trace(go.Scatter(**points, marker=marker, legendgroup=str(model), hoverinfo="skip"))
    distances = sorted(rows["distance"].unique())
    figure.update_xaxes(type="log", title="distance, tokens", tickvals=distances, tickformat="~g")
    figure.update_yaxes(title="accuracy", range=[-0.03, 1.03])
    seeds = ", ".join(map(str, sorted(rows["seed"].dropna().unique())))
    lengths = ", ".join(map(str, sorted(rows["seq_len"].dropna().unique())))
    note = f"window {lengths} tokens, seeds {seeds}; lines: mean over seeds, points: seeds, bars: 95% over trials"
    figure = _styled(figure, "Retrieval by distance", label, note, height=560)
    return figure.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"})


@dataclass(frozen=True)
class Drawing:
    """A figure by name: which rows of a frame it draws, and how, given those rows and a label for its title.

    `split` says what it is drawn once for, beside the experiment: rows with other values there get their own figure.
    """

    name: str
    rows: Callable[[pd.DataFrame], pd.Series]
    draw: Callable[[pd.DataFrame, str], go.Figure]
    split: Callable[[pd.DataFrame], list[pd.Series]] = lambda rows: []


DRAWINGS = (
    Drawing(
        "retrieval_by_distance",
        _is_accuracy,
        retrieval_by_distance,
        lambda rows: [_task(rows), "window " + rows["seq_len"].astype("string")],
    ),
    Drawing("copy_heatmap", _is_copy, copy_heatmap, lambda rows: [rows["model"], rows["arm"]]),
    Drawing("dose_response", _is_dose, dose_response, lambda rows: [rows["model"], rows["arm"], restriction(rows)]),
)


def _sample(rows: pd.DataFrame) -> str:
    seeds = sorted(rows["seed"].dropna().unique().tolist())
    lengths = sorted(rows["seq_len"].dropna().unique().tolist())
    told = f"window {', '.join(map(str, lengths))} tokens, {rows['document'].nunique()} documents"
    return f"{told}, seeds {', '.join(map(str, seeds))}" if seeds else told


def _styled(figure: go.Figure, title: str, label: str, caption: str, height: int) -> go.Figure:
    wrapped = "<br>".join(textwrap.wrap(caption, 125))
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
