"""Through which part of a model a shift of position acts: one layer, one head, one rotary pair at a time."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rope_probe.errors import InputError
from rope_probe.gallery.figures.propagation import SIDES, is_shift, sample
from rope_probe.gallery.figures.style import drawing, styled
from rope_probe.tracing.propagation import is_rounding

_READ = ("hook_resid_post", "logits")


def is_of_pair(frame: pd.DataFrame) -> pd.Series:
    """Rows that `sensitivity_by_pair` draws: logit KL of a shift of one pair, in all layers and heads."""
    narrow = frame["pair"].notna() & frame["inject_layer"].isna() & frame["head"].isna()
    return is_shift(frame) & narrow & (frame["metric"] == "kl_nats")


def is_of_layer(frame: pd.DataFrame) -> pd.Series:
    """Rows that `injected_by_read` draws: relative L2, at residual stream and logits, of a shift in a layer or head."""
    read = frame["site"].str.endswith(_READ).fillna(False)
    narrow = frame["inject_layer"].notna() & frame["pair"].isna()
    return is_shift(frame) & narrow & read & (frame["metric"] == "rel_l2")


@drawing
def sensitivity_by_pair(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Logit KL of shifting one rotary pair, against its wavelength; the window and its documents drawn in.

    By the largest dose there is. Points are means over documents, bars their range. What the float64 control shows to
    be rounding is drawn hollow, and where there is a control, its mean distance is the noise floor. Raises InputError
    where the frame has no such shifts.
    """
    rows = frame[is_of_pair(frame)]
    if rows.empty:
        raise InputError("these results hold no shifts of single pairs; trace some with pairs=p")
    dose = rows["delta_tokens"].max()
    rows = rows[rows["delta_tokens"] == dose]
    figure = go.Figure()
    for side in SIDES:
        if (part := rows[rows["side"] == side]).empty:
            continue
        name, colour, symbol, dash = SIDES[side]
        curve = part.groupby("wavelength")["value"].agg(["mean", "min", "max"])
        hollow = is_rounding(part).groupby(part["wavelength"]).all()
        figure.add_trace(
            go.Scatter(
                x=curve.index,
                y=curve["mean"],
                error_y={"array": curve["max"] - curve["mean"], "arrayminus": curve["mean"] - curve["min"], "width": 0},
                name=name,
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                marker={"symbol": np.where(hollow, f"{symbol.removesuffix('-open')}-open", symbol), "size": 9},
                customdata=part.groupby("wavelength")["pair"].first(),
                hovertemplate="pair %{customdata}, wavelength %{x:,.4g} tokens: %{y:.3g} nats<extra></extra>",
            )
        )
    for length, what in _lengths(rows).items():
        figure.add_vline(x=length, line={"color": "#555555", "dash": "dash"})
        anchor = {"x": np.log10(length), "y": 1, "yref": "paper", "xanchor": "left", "yanchor": "top"}
        figure.add_annotation(text=f" {what}", showarrow=False, **anchor)
    note = f"shift of {dose:g} tokens; bars: smallest to largest document; {sample(rows)}"
    floor = (rows["value"] - rows["value_float64"]).abs().groupby(rows["wavelength"]).mean()
    if floor.gt(0).any():
        grey = {"color": "#999999", "dash": "dot"}
        figure.add_trace(go.Scatter(x=floor.index, y=floor, name="noise floor: distance to float64", line=grey))
    figure.update_xaxes(type="log", title="wavelength of the pair, tokens", tickformat="~g")
    figure.update_yaxes(type="log", title="KL(clean || shifted), nats", exponentformat="power")
    return styled(figure, "Which rotary pairs carry position to the output", label, note, height=520)


def _lengths(rows: pd.DataFrame) -> dict[int, str]:
    """Of a document and of the window, in tokens, as far as they are told."""
    window, documents = rows["seq_len"].max(), rows["document"].nunique()
    if pd.isna(window) or window < 1:
        return {}
    return ({max(1, int(window) // documents): "document"} if documents else {}) | {int(window): "window"}


@drawing
def injected_by_read(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Where a shift is injected (layer, or head of a layer) x where it is read (residual stream by layer, logits).

    By the largest dose there is; panels for queries and keys, one logarithmic colour scale. What is zero, or rounding
    by the float64 control, is grey. Raises InputError where the frame has no such shifts.
    """
    rows = frame[is_of_layer(frame)]
    if rows.empty:
        raise InputError("these results hold no shifts in single layers; trace some with layers=l")
    dose = rows["delta_tokens"].max()
    rows = rows[rows["delta_tokens"] == dose]
    heads = rows["head"].map(lambda head: "" if pd.isna(head) else f", head {head}")
    rows = rows.assign(
        injected="layer " + rows["inject_layer"].astype(str) + heads,
        read=rows["layer"].map(lambda layer: "logits" if pd.isna(layer) else f"after layer {layer}"),
        shown=rows["value"].where(~is_rounding(rows) & (rows["value"] > 0)),
    )
    order = rows.sort_values(["inject_layer", "head"], na_position="first")["injected"].unique().tolist()
    reads = rows.sort_values("layer", na_position="last")["read"].unique().tolist()
    sides = [side for side in SIDES if (rows["side"] == side).any()]
    figure = make_subplots(
        rows=1, cols=len(sides), shared_yaxes=True, subplot_titles=[SIDES[side][0] for side in sides]
    )
    for column, side in enumerate(sides, start=1):
        part = rows[rows["side"] == side]
        table = part.pivot_table(index="injected", columns="read", values="shown", aggfunc="mean", dropna=False)
        table = table.reindex(index=order, columns=reads)
        trace = go.Heatmap(
            z=np.log10(table),
            x=reads,
            y=order,
            customdata=table,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hovertemplate="shift in %{y}, read %{x}: %{customdata:.4g}<extra></extra>",
        )
        figure.add_trace(trace, row=1, col=column)
    shown = np.log10(rows["shown"].dropna())
    ticks = np.arange(np.floor(shown.min()), np.ceil(shown.max()) + 1) if len(shown) else np.zeros(0)
    bar = {"title": "relative L2", "tickvals": ticks, "ticktext": [f"{10.0**tick:g}" for tick in ticks]}
    figure.update_layout(coloraxis={"colorscale": "Viridis", "colorbar": bar}, plot_bgcolor="#d8d8d8")
    figure.update_yaxes(autorange="reversed", showgrid=False, zeroline=False)
    figure.update_xaxes(showgrid=False, zeroline=False)
    note = f"shift of {dose:g} tokens; mean over documents; {sample(rows)}; grey: nothing, or rounding"
    title = "Where a shift is injected, and where it is read"
    return styled(figure, title, label, note, height=250 + 34 * len(order))
