"""How a perturbation travels: copies by layer, and the output against the size of a shift."""

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rope_probe.errors import InputError
from rope_probe.gallery.figures.style import drawing, listed, styled
from rope_probe.tracing.propagation import COPY, is_rounding

SIDES = {
    "q": ("queries only", "#0072b2", "circle", "solid"),
    "k": ("keys only", "#d55e00", "diamond-open", "dash"),
    "qk": ("both", "#009e73", "square", "solid"),
}
KINDS = {
    "PositionShift": "shift, tokens",
    "PositionJitter": "largest move of a position, tokens",
    "PairTurn": "turn of every pair, radians",
}
MOVES = {
    "PositionShift": "a shift of position",
    "PositionJitter": "jitter of positions",
    "PairTurn": "one angle for all pairs",
}
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
_MOST_SPACED = 40
"""Layers that a panel of `copy_heatmap` has room for with lines between them."""


def is_copy(frame: pd.DataFrame) -> pd.Series:
    """Rows that `copy_heatmap` draws."""
    read = frame["site"].str.endswith(tuple(PANELS)).fillna(False)
    return (frame["kind"] == COPY).fillna(False) & read & (frame["metric"] == "rel_l2")


def is_shift(frame: pd.DataFrame) -> pd.Series:
    """Rows of position shifts."""
    return (frame["kind"] == "PositionShift").fillna(False) & _is_sized(frame)


def _is_sized(frame: pd.DataFrame) -> pd.Series:
    """Rows that say by how much and on which side positions were moved."""
    return np.isfinite(frame["delta_tokens"]) & frame["side"].isin(SIDES)


def is_dose(frame: pd.DataFrame) -> pd.Series:
    """Rows that `dose_response` draws: shifts, jitter or turns, of several sizes or of the whole model."""
    sized = np.isfinite(_dose(frame)) & frame["side"].isin(SIDES)
    of_logits = (frame["metric"] == "kl_nats") & frame["layer"].isna()  # not of a logit lens
    rows = frame["kind"].isin(list(KINDS)).fillna(False) & of_logits & sized
    alike = [frame[column] for column in ("run_id", "model", "arm", "masked", "kind", "restriction")]
    doses = _dose(frame).where(rows).groupby(alike, dropna=False).transform("nunique")
    return rows & ((doses > 1) | (frame["restriction"].fillna("") == ""))


def _dose(frame: pd.DataFrame) -> pd.Series:
    """How large a move is, in tokens, or in radians where it is one angle for all pairs."""
    return frame["delta_tokens"].mask((frame["kind"] == "PairTurn").fillna(False), frame["radians"])


@drawing
def copy_heatmap(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Layer x copy heatmaps of rel_l2 between copies, from `copy_deltas`: q, k, attention, residual stream, logits.

    One logarithmic colour scale for all panels. What the float64 control shows to be rounding is left grey.
    Raises InputError where the frame has no copy deltas.
    """
    rows = frame[is_copy(frame)]
    if rows.empty:
        raise InputError("these results hold no copy deltas; make them with copy_deltas")
    rows = rows.assign(
        layer=rows["layer"].fillna(-1), shown=rows["value"].where(~is_rounding(rows) & (rows["value"] > 0))
    )
    shown = np.log10(rows["shown"].dropna())
    low, high = (shown.min(), shown.max()) if len(shown) else (-1.0, 0.0)
    panels = {site: rows[rows["site"].str.endswith(site)] for site in PANELS}
    layers = max(part["layer"].nunique() for part in panels.values())
    is_deep = layers > _MOST_SPACED
    height = max(3 if is_deep else 9, min(30, 240 // layers))
    gap = 0 if is_deep else 1
    heights = [max(9, height * part["layer"].nunique()) for part in panels.values()]
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        row_heights=heights,
        vertical_spacing=34 / (sum(heights) + 34 * 6),
        subplot_titles=list(PANELS.values()),
    )
    for row, part in enumerate(panels.values(), start=1):
        axes = {"index": "layer", "columns": "document", "dropna": False}
        table, value, exact = (part.pivot_table(values=v, **axes) for v in ("shown", "value", "value_float64"))
        hover_values = np.stack([value, exact.reindex_like(value)], -1)
        names = ["output" if layer < 0 else f"layer {layer}" for layer in value.index]
        figure.add_trace(
            go.Heatmap(
                z=np.log10(table.reindex_like(value)),
                x=value.columns.tolist(),
                y=names,
                customdata=hover_values,
                coloraxis="coloraxis",
                xgap=gap,
                ygap=gap,
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
    copies = rows["document"].nunique()
    figure.update_xaxes(dtick=1 if copies <= 16 else None)
    figure.update_xaxes(title="copy of the document", row=len(panels), col=1)
    note = f"each cell: mean over the document's positions, against the first copy; {sample(rows)}"
    if rows["value_float64"].notna().any():
        note += "; grey: rounding, gone in float64"
    title = "How copies of one document differ, by layer"
    return styled(figure, title, label, note, height=200 + sum(heights) + 34 * 6)


@drawing
def dose_response(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """KL of the logits against the tokens shifted, q only, k only and both; the float64 control of both dashed grey.

    Or of jitter against its size, or of a turn of every pair against its angle. Raises InputError where the frame has
    none of these, several, or ones restricted differently.
    """
    rows = frame[is_dose(frame)]
    if rows.empty:
        raise InputError("these results hold no logit KL of a PositionShift; trace some shifts first")
    if (classes := rows["kind"].unique()).size > 1:
        raise InputError(f"these results hold {' and '.join(classes)}; draw one at a time")
    if (kinds := rows["restriction"].fillna("").unique()).size > 1:
        raise InputError(
            f"these shifts are restricted in {kinds.size} ways, {', '.join(kinds)}; draw one way at a time"
        )
    cancels = classes[0] in ("PositionShift", "PairTurn")
    unit = "radians" if classes[0] == "PairTurn" else "tokens"
    rows = rows.assign(dose=_dose(rows))
    figure = go.Figure()
    for side, (name, colour, symbol, dash) in SIDES.items():
        chosen = rows[rows["side"] == side]
        if chosen.empty:
            continue
        name = f"{name}, which cancels" if side == "qk" and cancels else name
        curve = chosen.groupby("dose")[["value", "value_float64"]].agg(["mean", "min", "max"])
        dose, value, exact = curve.index.to_numpy(), curve["value"], curve["value_float64"]["mean"]
        hover = f"%{{x}} {unit}: %{{y:.3g}} nats"
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
        if side == "qk" and cancels and exact.notna().any():
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
    positive = rows["value"].where(rows["value"] > _LOWEST_KL)
    highest = np.log10(max(positive.max(), 10 * _LOWEST_KL)) if positive.notna().any() else -15.0
    lowest = np.log10(positive.min()) if (rows["value"] > _LOWEST_KL).all() else np.log10(_LOWEST_KL)
    doses = sorted(rows["dose"].unique())
    figure.update_xaxes(
        type="log" if doses[0] > 0 else "linear", title=KINDS[classes[0]], tickvals=doses, tickformat="~g"
    )
    figure.update_yaxes(
        type="log",
        title="KL(clean || perturbed), nats",
        exponentformat="power",
        dtick=2 if highest - lowest > 6 else 1,
        range=[lowest - 0.5, highest + 0.5],
    )
    note = f"lines: mean over documents, bands: smallest to largest document; {sample(rows)}"
    return styled(figure, f"How {MOVES[classes[0]]} changes the output", label, note, height=540)


def sample(rows: pd.DataFrame) -> str:
    """Window, number of documents and seeds, as a caption tells them; documents where they were measured one by one."""
    caption = f"window {listed(rows['seq_len'])} tokens"
    if documents := rows["document"].nunique():
        caption += f", {documents} documents"
    return f"{caption}, seeds {seeds}" if (seeds := listed(rows["seed"])) else caption
