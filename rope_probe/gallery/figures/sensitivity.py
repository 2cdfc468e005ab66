"""Through which part of a model a shift of position acts: one layer, one head, one rotary pair at a time."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rope_probe.errors import InputError
from rope_probe.gallery.figures.propagation import SIDES, is_shift, sample
from rope_probe.gallery.figures.style import BESIDE, drawing, short, spaced, styled
from rope_probe.tracing.propagation import is_rounding

MOST_INJECTED = 64
"""Lines that `injected_by_read` has room for; with more of them it draws whole layers alone."""
_READ = ("hook_resid_post", "logits")
_SECOND_KIND = {"q": ("triangle-up", "dot"), "k": ("triangle-down", "dashdot"), "qk": ("star", "dot")}
_LONGEST_KIND = 40
_LOWEST_CELL, _HIGHEST_PANEL = 6, 900
"""Pixels of a line of a heatmap at the least, and of a panel at the most."""
_ROOM_FOR_TICK = 18
_WIDE = 1e4
_MOST_TICKS, _MOST_TICKS_OF_PANELS = 32, 20
_PLAIN: dict[str, Any] = {"showgrid": False, "zeroline": False}
_MOST_DECADES = 4
"""What is smaller than the largest by more powers of ten than these is drawn like the smallest."""


def is_of_pair(frame: pd.DataFrame) -> pd.Series:
    """Rows that `sensitivity_by_pair` draws: logit KL of a shift or turn of one pair, in all heads of its layers."""
    narrow = frame["pair"].notna() & frame["inject_layer"].isna() & frame["head"].isna()
    turn = (frame["kind"] == "PairTurn").fillna(False) & frame["side"].isin(SIDES)
    of_logits = (frame["metric"] == "kl_nats") & frame["layer"].isna()  # not of a logit lens
    return (is_shift(frame) | turn) & narrow & of_logits


def is_of_layer(frame: pd.DataFrame) -> pd.Series:
    """Rows that `injected_by_read` draws: relative L2, at residual stream and logits, of a shift in a layer or head.

    Runs that shift more than MOST_INJECTED heads and no whole layer have none.
    """
    read = frame["site"].str.endswith(_READ).fillna(False)
    narrow = frame["inject_layer"].notna() & frame["pair"].isna()
    rows = is_shift(frame) & narrow & read & (frame["metric"] == "rel_l2")
    runs = [frame["run_id"], frame["model"]]
    injected = (frame["inject_layer"].astype("string") + "." + frame["head"].astype("string").fillna("")).where(rows)
    few = injected.groupby(runs, dropna=False).transform("nunique") <= MOST_INJECTED
    has_whole_layers = (rows & frame["head"].isna()).groupby(runs, dropna=False).transform("any")
    return rows & (few | has_whole_layers)


def is_effect_of_layer(frame: pd.DataFrame) -> pd.Series:
    """Rows that `layer_effects` draws: logit KL of a shift in one whole layer."""
    return _is_effect(frame) & frame["head"].isna()


def is_effect_of_head(frame: pd.DataFrame) -> pd.Series:
    """Rows that `head_effects` draws: logit KL of a shift in one head of one layer."""
    return _is_effect(frame) & frame["head"].notna()


def _is_effect(frame: pd.DataFrame) -> pd.Series:
    of_logits = (frame["site"] == "logits").fillna(False) & (frame["metric"] == "kl_nats")
    return is_shift(frame) & of_logits & frame["inject_layer"].notna() & frame["pair"].isna()


@drawing
def sensitivity_by_pair(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Logit KL of shifting one rotary pair, against its wavelength; the window and its documents drawn in.

    A line for each side, and for each kind of layers where pairs are shifted in several, since a pair has another
    wavelength in each. By the largest dose there is. Points are means over documents, bars their range. What the
    float64 control shows to be rounding is drawn hollow, and where there is a control, its mean distance is the noise
    floor. Raises InputError where the frame has no such shifts.
    """
    rows = frame[is_of_pair(frame)]
    if rows.empty:
        raise InputError("these results hold no shifts of single pairs; trace some with pairs=p")
    if (classes := rows["kind"].unique()).size > 1:
        raise InputError(f"these results hold {' and '.join(classes)} of single pairs; draw one at a time")
    if classes[0] == "PairTurn":
        angle = rows["radians"].max()
        rows = rows[rows["radians"] == angle]
        how = f"every pair turned by {angle:g} radians"
    else:
        rows, dose = _of_largest_dose(rows)
        how = f"shift of {dose:g} tokens"
    rows = rows.assign(of_layers=rows["inject_layers"].fillna(""))
    kinds = rows.sort_values("pair", kind="stable")["of_layers"].unique().tolist()
    figure = go.Figure()
    for side in SIDES:
        for i, kind in enumerate(kinds):
            if (part := rows[(rows["side"] == side) & (rows["of_layers"] == kind)]).empty:
                continue
            name, colour, symbol, dash = SIDES[side]
            if len(kinds) > 1:
                name = f"{name},<br>{f'layers {short(kind, _LONGEST_KIND)}' if kind else 'all layers'}"
            if i % 2:
                symbol, dash = _SECOND_KIND[side]
            curve = part.groupby("wavelength")["value"].agg(["mean", "min", "max"])
            bars = {"array": curve["max"] - curve["mean"], "arrayminus": curve["mean"] - curve["min"], "width": 0}
            hollow = is_rounding(part).groupby(part["wavelength"]).all()
            filled = symbol.removesuffix("-open")
            figure.add_trace(
                go.Scatter(
                    x=curve.index,
                    y=curve["mean"],
                    error_y=bars,
                    name=name,
                    mode="lines+markers",
                    line={"color": colour, "dash": dash},
                    marker={"symbol": np.where(hollow, f"{filled}-open", filled), "size": 9},
                    customdata=part.groupby("wavelength")["pair"].first(),
                    hovertemplate="pair %{customdata}, wavelength %{x:,.4g} tokens: %{y:.3g} nats<extra></extra>",
                )
            )
    for length, what in _lengths(rows).items():
        figure.add_vline(x=length, line={"color": "#555555", "dash": "dash"})
        anchor = {"x": np.log10(length), "y": 1, "yref": "paper", "xanchor": "left", "yanchor": "top"}
        figure.add_annotation(text=f" {what}", showarrow=False, **anchor)
    note = f"{how}; bars: smallest to largest document; {sample(rows)}"
    distance = (rows["value"] - rows["value_float64"]).abs()
    for i, kind in enumerate(kinds):
        of_kind = rows["of_layers"] == kind
        floor = distance[of_kind].groupby(rows["wavelength"][of_kind]).mean()
        if floor.gt(0).any():
            shared = {"name": "noise floor: distance to float64", "legendgroup": "floor", "showlegend": i == 0}
            figure.add_trace(go.Scatter(x=floor.index, y=floor, line={"color": "#999999", "dash": "dot"}, **shared))
    shortest, longest = rows["wavelength"].min(), rows["wavelength"].max()
    is_wide = shortest > 0 and longest / shortest > _WIDE  # more than there is room for 1, 2, 5 and 10
    ticks = {"dtick": 1, "tickformat": "~s"} if is_wide else {"tickformat": "~g"}
    figure.update_xaxes(type="log", title="wavelength of the pair, tokens", **ticks)
    figure.update_yaxes(type="log", title="KL(clean || perturbed), nats", exponentformat="power")
    figure = styled(figure, "Which rotary pairs carry position to the output", label, note, height=520)
    return figure.update_layout(legend=BESIDE) if len(kinds) > 1 else figure


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
    rows, dose = _of_largest_dose(rows)
    left_out = 0
    if len(injected := rows[["inject_layer", "head"]].drop_duplicates()) > MOST_INJECTED:
        left_out = int(injected["head"].notna().sum())
        rows = rows[rows["head"].isna()]
    if rows.empty:
        raise InputError(
            f"these results hold no shifts of {dose:g} tokens in whole layers; draw their heads one by one"
        )
    heads = rows["head"].map(lambda head: "" if pd.isna(head) else f", head {head}")
    rows = rows.assign(
        injected="layer " + rows["inject_layer"].astype(str) + heads,
        read=rows["layer"].map(lambda layer: "logits" if pd.isna(layer) else f"after layer {layer}"),
        shown=rows["value"].where(~is_rounding(rows) & (rows["value"] > 0)),
    )
    order = rows.sort_values(["inject_layer", "head"], na_position="first")["injected"].unique().tolist()
    reads = rows.sort_values("layer", na_position="last")["read"].unique().tolist()
    sides = [side for side in SIDES if (rows["side"] == side).any()]
    cell = max(_LOWEST_CELL, min(34, _HIGHEST_PANEL // len(order)))
    gap = 1 if cell > 2 * _LOWEST_CELL and len(reads) <= MOST_INJECTED else 0
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
            xgap=gap,
            ygap=gap,
            hovertemplate="shift in %{y}, read %{x}: %{customdata:.4g}<extra></extra>",
        )
        figure.add_trace(trace, row=1, col=column)
    figure.update_layout(coloraxis=_logarithmic(rows["shown"], "relative L2"), plot_bgcolor="#d8d8d8")
    figure.update_yaxes(
        autorange="reversed",
        tickvals=spaced(order, max(1, cell * len(order) // _ROOM_FOR_TICK)),
        **_PLAIN,
    )
    layers = [read for read in reads if read != "logits"]
    most = _MOST_TICKS_OF_PANELS // len(sides)
    ticks = [*spaced(layers, most), *(read for read in reads if read == "logits")]
    if len(ticks) > 2 and reads.index(ticks[-1]) - reads.index(ticks[-2]) < len(reads) / (most + 1):
        del ticks[-2]  # it would lie under the last one
    figure.update_xaxes(
        tickvals=ticks, ticktext=[tick.removeprefix("after layer ") for tick in ticks], tickangle=0, **_PLAIN
    )
    figure.update_xaxes(title="read after layer")
    note = f"shift of {dose:g} tokens; mean over documents; {sample(rows)}; grey: nothing, or rounding"
    if left_out:
        note += f"; {left_out} single heads are left out, whole layers drawn"
    title = "Where a shift is injected, and where it is read"
    return styled(figure, title, label, note, height=250 + cell * len(order))


@drawing
def layer_effects(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Logit KL of a shift in one layer at a time, a bar for each layer and side.

    By the largest dose there is. Bars are means over documents and seeds, lines their range. Raises InputError where
    the frame has no such shifts.
    """
    rows = frame[is_effect_of_layer(frame)]
    if rows.empty:
        raise InputError("these results hold no logit KL of shifts in single layers; trace some with layers=l")
    rows, dose = _of_largest_dose(rows)
    layers = sorted(rows["inject_layer"].unique())
    names = [str(layer) for layer in layers]
    figure = go.Figure()
    for side in SIDES:
        if (part := rows[rows["side"] == side]).empty:
            continue
        by_layer = part.groupby("inject_layer")["value"].agg(["mean", "min", "max"]).reindex(layers)
        bars = {"array": by_layer["max"] - by_layer["mean"], "arrayminus": by_layer["mean"] - by_layer["min"]}
        figure.add_trace(
            go.Bar(
                x=names,
                y=by_layer["mean"],
                error_y={**bars, "width": 0, "thickness": 1},
                name=SIDES[side][0],
                marker={"color": SIDES[side][1]},
                hovertemplate="shift in layer %{x}: %{y:.3g} nats<extra></extra>",
            )
        )
    figure.update_layout(barmode="group", bargap=0.25, showlegend=True)
    figure.update_xaxes(type="category", title="layer of the shift", tickvals=spaced(names, _MOST_TICKS), tickangle=0)
    figure.update_yaxes(title="KL(clean || perturbed), nats", rangemode="tozero")
    note = f"shift of {dose:g} tokens in one layer; bars: mean, lines: smallest to largest document; {sample(rows)}"
    return styled(figure, "Which layers carry position to the output", label, note, height=480)


@drawing
def head_effects(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Layer x head map of the logit KL of a shift in one head at a time, a panel for each side.

    By the largest dose there is; one logarithmic colour scale, the mean over documents and seeds. What is zero, or
    rounding by the float64 control, is grey. Raises InputError where the frame has no such shifts.
    """
    rows = frame[is_effect_of_head(frame)]
    if rows.empty:
        raise InputError("these results hold no logit KL of shifts in single heads; trace some with layers=l, heads=h")
    rows, dose = _of_largest_dose(rows)
    rows = rows.assign(shown=rows["value"].where(~is_rounding(rows) & (rows["value"] > 0)))
    sides = [side for side in SIDES if (rows["side"] == side).any()]
    layers = sorted(rows["inject_layer"].unique())
    cell = max(_LOWEST_CELL, min(24, _HIGHEST_PANEL // len(layers)))
    names = [str(layer) for layer in layers]
    titles = [SIDES[side][0] for side in sides]
    figure = make_subplots(rows=1, cols=len(sides), subplot_titles=titles, horizontal_spacing=0.08)
    largest = []
    for column, side in enumerate(sides, start=1):
        axes = {"index": "inject_layer", "columns": "head", "dropna": False}
        part = rows[rows["side"] == side]
        table = part.pivot_table(values="shown", **axes).reindex(layers)
        heads = [str(head) for head in table.columns]
        gap = 1 if cell > 2 * _LOWEST_CELL and len(heads) <= MOST_INJECTED else 0
        trace = go.Heatmap(
            z=np.log10(table),
            x=heads,
            y=names,
            customdata=table,
            coloraxis="coloraxis",
            xgap=gap,
            ygap=gap,
            hovertemplate="layer %{y}, head %{x}: %{customdata:.4g} nats<extra></extra>",
        )
        figure.add_trace(trace, row=1, col=column)
        ticks = spaced(heads, _MOST_TICKS_OF_PANELS // len(sides))
        figure.update_xaxes(type="category", tickvals=ticks, tickangle=0, title="head", row=1, col=column)
        effects = part.groupby(["inject_layer", "head"])["value"].mean()
        layer, head = effects.idxmax()
        share = f", {effects.max() / effects.sum():.0%} of the sum over heads" if effects.sum() > 0 else ""
        largest.append(
            f"{SIDES[side][0]}: the largest is head {head} of layer {layer}, {effects.max():.2g} nats{share}"
        )
    ticks = spaced(names, max(1, cell * len(names) // _ROOM_FOR_TICK))
    figure.update_yaxes(type="category", autorange="reversed", tickvals=ticks, **_PLAIN)
    figure.update_yaxes(title="layer", col=1)
    figure.update_xaxes(**_PLAIN)
    figure.update_layout(coloraxis=_logarithmic(rows["shown"], "KL, nats"), plot_bgcolor="#d8d8d8")
    note = f"shift of {dose:g} tokens in one head; mean over documents; {sample(rows)}; grey: nothing, or rounding"
    note = "; ".join([note, *largest])
    return styled(
        figure, "Which heads carry position to the output", label, note, height=250 + max(160, cell * len(names))
    )


def _of_largest_dose(rows: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    dose = rows["delta_tokens"].max()
    return rows[rows["delta_tokens"] == dose], dose


def _logarithmic(shown: pd.Series, title: str) -> dict[str, Any]:
    """A colour axis for the logarithms of these numbers, ticks at powers of ten; the least colour is for all below."""
    logs = np.log10(shown.dropna())
    if logs.empty:
        return {"colorscale": "Viridis", "colorbar": {"title": title}}
    lowest = max(logs.min(), logs.max() - _MOST_DECADES)
    powers = np.arange(np.ceil(lowest), np.ceil(logs.max()) + 1)
    bar = {"title": title, "tickvals": powers, "ticktext": [f"{10.0**power:g}" for power in powers]}
    return {"colorscale": "Viridis", "cmin": lowest, "cmax": logs.max(), "colorbar": bar}
