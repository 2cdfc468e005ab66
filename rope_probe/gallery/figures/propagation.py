"""How a perturbation travels: copies by layer, and the output against the size of a shift."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.kinds import global_layers
from rope_probe.gallery.figures.layout import mark_layers, missing_is_grey, panels, roomy
from rope_probe.gallery.figures.style import (
    GREY,
    PLAIN,
    down,
    drawing,
    listed,
    log_axis,
    logarithmic,
    seeds_of,
    styled,
)
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
_MOST_DECADES = 6
"""Powers of ten that an axis of KL goes below the largest; what lies lower would flatten all else."""
_LOWEST_PANEL, _HIGHEST_PANEL, _PIXELS_OF_LAYER = 24, 120, 10
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
    parts = [(title, rows[rows["site"].str.endswith(site)]) for site, title in PANELS.items()]
    layers = [part["layer"].nunique() for _, part in parts]
    gap = 0 if max(layers) > _MOST_SPACED else 1
    heights = [max(_LOWEST_PANEL, min(_PIXELS_OF_LAYER * count, _HIGHEST_PANEL)) for count in layers]
    figure = panels([title for title, _ in parts], heights, shared=True)
    kinds = global_layers(rows, "layer")
    for k, ((_, part), height) in enumerate(zip(parts, heights, strict=True), start=1):
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
            row=k,
            col=1,
        )
        order = {"type": "category", "categoryarray": names, "range": [len(names) - 0.5, -0.5]}
        figure.update_yaxes(**order, tickvals=down(names, height), row=k, col=1)
        mark_layers(figure, k, "y", [place for place, layer in enumerate(value.index) if layer in kinds.layers])
    missing_is_grey(figure)
    figure.update_layout(coloraxis=logarithmic(rows["shown"], "relative L2"))
    figure.update_yaxes(**PLAIN)
    copies = rows["document"].nunique()
    figure.update_xaxes(**PLAIN, title="copy of the document", **({"dtick": 1} if copies <= 8 else {"nticks": 8}))
    note = f"each cell: mean over the document's positions, against the first copy; {sample(rows)}"
    if rows["value_float64"].notna().any():
        note += "; grey: rounding, gone in float64"
    return styled(figure, "How copies of one document differ, by layer", label, note + kinds.note)


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
    figure = panels([""], 380)
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
                    line={"color": GREY, "dash": "dash"},
                    hovertemplate=hover,
                )
            )
    moved = rows[rows["side"] != "qk"] if cancels and (rows["side"] != "qk").any() else rows
    doses = sorted(rows["dose"].unique())
    is_log = doses[0] > 0
    places = np.log(doses) if is_log else np.asarray(doses)
    ticks = roomy(doses, [f"{dose:g}" for dose in doses], places)
    figure.update_xaxes(type="log" if is_log else "linear", title=KINDS[classes[0]], tickvals=ticks, tickformat="~g")
    axis = log_axis(moved["value"], _MOST_DECADES)
    figure.update_yaxes(title="KL(clean || perturbed), nats", **axis)
    note = f"lines: mean over documents, bands: smallest to largest document; {sample(rows)}"
    if "range" in axis and (below := rows[rows["value"] < 10 ** axis["range"][0]]["value"]).size:
        note += f"; below the axis: {below.size} of {len(rows)} values, {below.max():.1g} nats at most"
    return styled(figure, f"How {MOVES[classes[0]]} changes the output", label, note)


def sample(rows: pd.DataFrame) -> str:
    """Window, documents, seeds and noise floor, as a caption tells them; documents where they were measured singly."""
    told = [f"window {listed(rows['seq_len'])} tokens"]
    if documents := rows["document"].nunique():
        told.append(f"{documents} document{'s' if documents > 1 else ''}")
    if seeds := seeds_of(rows):
        told.append(seeds)
    off = (rows["value"] - rows["value_float64"]).abs()
    known = off.notna().any()
    told.append(f"noise floor {off.mean():.1g} (mean distance to float64)" if known else "no float64 control")
    return ", ".join(told)
