"""Through which part of a model a shift of position acts: one layer, one head, one rotary pair at a time."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.kinds import global_layers
from rope_probe.gallery.figures.layout import (
    ROOM,
    headroom_for,
    mark_at,
    mark_layers,
    missing_is_grey,
    panels,
    roomy,
)
from rope_probe.gallery.figures.propagation import SIDES, is_shift, sample
from rope_probe.gallery.figures.style import (
    GREY,
    PLAIN,
    across,
    down,
    drawing,
    in_short,
    log_axis,
    logarithmic,
    pair_ticks,
    short,
    styled,
    ticks_of,
)
from rope_probe.tracing.propagation import is_rounding

MOST_INJECTED = 64
"""Lines that `injected_by_read` has room for; with more of them it draws whole layers alone."""
_READ = ("hook_resid_post", "logits")
_SECOND_KIND = {"q": ("triangle-up", "dot"), "k": ("triangle-down", "dashdot"), "qk": ("star", "dot")}
_LONGEST_KIND = 40
_LOWEST_PANEL, _HIGHEST_PANEL, _PIXELS_OF_LINE = 140, 460, 14
"""Pixels down of a panel of a map at the least and at the most, and of one of its lines where there is room."""
_MOST_SPACED = 40
_WIDE = 1e4
_MOST_DECADES = 4
"""What is smaller than the largest by more powers of ten than these is drawn like the smallest."""
_MOST_DECADES_OF_AXIS = 8


def is_of_pair(frame: pd.DataFrame) -> pd.Series:
    """Rows that `sensitivity_by_pair` draws: logit KL of a shift or turn of one pair, in all heads of its layers."""
    narrow = frame["pair"].notna() & frame["inject_layer"].isna() & frame["head"].isna()
    of_logits = (frame["metric"] == "kl_nats") & frame["layer"].isna()  # not of a logit lens
    return (is_shift(frame) | _is_turn(frame)) & narrow & of_logits


def is_effect_of_pair(frame: pd.DataFrame) -> pd.Series:
    """Rows that `pair_effects` draws: logit KL of a turn of one pair, in all heads of one layer."""
    narrow = frame["inject_layer"].notna() & frame["pair"].notna() & frame["head"].isna()
    return _is_turn(frame) & frame["radians"].notna() & narrow & _is_logit_kl(frame)


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
    return is_shift(frame) & _is_logit_kl(frame) & frame["inject_layer"].notna() & frame["pair"].isna()


def _is_turn(frame: pd.DataFrame) -> pd.Series:
    return (frame["kind"] == "PairTurn").fillna(False) & frame["side"].isin(SIDES)


def _is_logit_kl(frame: pd.DataFrame) -> pd.Series:
    return (frame["site"] == "logits").fillna(False) & (frame["metric"] == "kl_nats")


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
        how = f"every pair turned by {_radians(angle)}"
    else:
        rows, dose = _of_largest_dose(rows)
        how = f"shift of {dose:g} tokens"
    rows = rows.assign(of_layers=rows["inject_layers"].fillna(""))
    kinds = rows.sort_values("pair", kind="stable")["of_layers"].unique().tolist()
    lengths = _lengths(rows)
    figure = panels([""], 380, headroom=headroom_for(len(lengths)))
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
    note = f"{how}; bars: smallest to largest document; {sample(rows)}"
    distance = (rows["value"] - rows["value_float64"]).abs()
    for i, kind in enumerate(kinds):
        of_kind = rows["of_layers"] == kind
        floor = distance[of_kind].groupby(rows["wavelength"][of_kind]).mean()
        if floor.gt(0).any():
            shared = {"name": "noise floor: distance to float64", "legendgroup": "floor", "showlegend": i == 0}
            figure.add_trace(go.Scatter(x=floor.index, y=floor, line={"color": GREY, "dash": "dot"}, **shared))
    figure.update_xaxes(type="log")
    shown = rows.loc[rows["wavelength"] > 0, "wavelength"]
    shortest, longest = min([shown.min(), *lengths]), max([shown.max(), *lengths])
    if np.isfinite([shortest, longest]).all() and 0 < shortest < longest:
        ends = np.log10([shortest, longest])
        margin = 0.03 * (ends[1] - ends[0])
        figure.update_xaxes(range=[ends[0] - margin, ends[1] + margin])
        for line, (length, what) in enumerate(lengths.items()):
            place = np.log10(length)
            share = float((place - ends[0]) / (ends[1] - ends[0]))
            mark_at(figure, 1, place, f"{what}, {length:,} tokens", line, share=share, dash="dash", colour=GREY)
    ticks = _pair_ticks(rows) if len(kinds) == 1 else {}
    is_wide = longest / shortest > _WIDE if shortest > 0 else False  # no room for 1, 2, 5 and 10
    title = "wavelength in tokens, and pair" if ticks else "wavelength of the pair, tokens"
    if not ticks:
        ticks = {"dtick": 1, "tickformat": "~s"} if is_wide else {"tickformat": "~g"}
    figure.update_xaxes(title=title, tickangle=0, **ticks)
    values = pd.concat([rows["value"], distance[distance > 0]])
    figure.update_yaxes(title="KL(clean || perturbed), nats", **log_axis(values, _MOST_DECADES_OF_AXIS))
    return styled(figure, "Which rotary pairs are sensitive to position", label, note)


def _pair_ticks(rows: pd.DataFrame) -> dict[str, Any]:
    """Ticks that tell the wavelength, and below it the pair, of as many pairs as there is room for."""
    pairs = rows[rows["wavelength"] > 0].groupby("wavelength")["pair"].first()
    texts = {wavelength: f"{in_short(wavelength)}<br>pair {pair}" for wavelength, pair in pairs.items()}
    return ticks_of(texts, np.log10(list(texts)))


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
    height = _height(len(order))
    gap = 1 if max(len(order), len(reads)) <= _MOST_SPACED else 0
    figure = panels([SIDES[side][0] for side in sides], height, len(sides))
    places = rows.drop_duplicates("injected").set_index("injected").loc[order]
    short_names = [
        f"{layer}" if pd.isna(head) else f"{layer}.{head}"
        for layer, head in zip(places["inject_layer"], places["head"], strict=True)
    ]
    kinds = global_layers(rows, "inject_layer")
    of_global = [place for place, layer in enumerate(places["inject_layer"]) if layer in kinds.layers]
    texts = dict(zip(order, short_names, strict=True))
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
        mark_layers(figure, column, "y", of_global)
    missing_is_grey(figure)
    figure.update_layout(coloraxis=logarithmic(rows["shown"], "relative L2", _MOST_DECADES))
    ticks = down(order, height)
    figure.update_yaxes(
        type="category", autorange="reversed", tickvals=ticks, ticktext=[texts[tick] for tick in ticks], **PLAIN
    )
    what = "layer.head of the shift" if places["head"].notna().any() else "layer of the shift"
    figure.update_yaxes(title=what, col=1)
    layers = [read for read in reads if read != "logits"]
    read_layer = rows.dropna(subset=["layer"]).drop_duplicates("read").set_index("read")["layer"]
    names = {read: "out" if read == "logits" else f"{read_layer[read]}" for read in reads}
    room = ROOM / len(sides) - 30
    ticks = across(layers, 0) if len(layers) > 1 and room < 40 else layers
    ticks = roomy(ticks, [names[read] for read in ticks], [reads.index(read) for read in ticks], room)
    if "logits" in reads:
        ticks = [read for read in ticks if (len(reads) - 1 - reads.index(read)) * room / len(reads) > 26]
        ticks.append("logits")
    figure.update_xaxes(type="category", tickvals=ticks, ticktext=[names[tick] for tick in ticks], tickangle=0, **PLAIN)
    figure.update_xaxes(title="read after layer" if len(sides) < 3 else "read after")
    note = f"shift of {dose:g} tokens; mean over documents; {sample(rows)}; grey: nothing, or rounding"
    if "logits" in reads:
        note += "; out: the logits, whose KL can differ a thousandfold where relative L2 hardly does"
    if left_out:
        note += f"; {left_out} single heads are left out, whole layers drawn"
    note += kinds.note
    title = "Where a shift is injected, and where it is read"
    return styled(figure, title, label, note)


@drawing
def layer_effects(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Logit KL of a shift in one layer at a time, a point for each layer and side.

    By the largest dose there is. Points are means over documents and seeds, bars their range. Raises InputError where
    the frame has no such shifts.
    """
    rows = frame[is_effect_of_layer(frame)]
    if rows.empty:
        raise InputError("these results hold no logit KL of shifts in single layers; trace some with layers=l")
    rows, dose = _of_largest_dose(rows)
    layers = sorted(rows["inject_layer"].unique())
    figure = panels([""], 340)
    for i, side in enumerate(SIDES):
        if (part := rows[rows["side"] == side]).empty:
            continue
        by_layer = part.groupby("inject_layer")["value"].agg(["mean", "min", "max"]).reindex(layers)
        bars = {"array": by_layer["max"] - by_layer["mean"], "arrayminus": by_layer["mean"] - by_layer["min"]}
        hollow = is_rounding(part).groupby(part["inject_layer"]).all().reindex(layers, fill_value=False)
        name, colour, symbol, _ = SIDES[side]
        filled = symbol.removesuffix("-open")
        figure.add_trace(
            go.Scatter(
                x=layers,
                y=by_layer["mean"],
                error_y={**bars, "width": 0, "thickness": 1},
                name=name,
                mode="lines+markers",
                line={"color": colour, "width": 1},
                marker={"color": colour, "symbol": np.where(hollow, f"{filled}-open", filled), "size": 8},
                hovertemplate="shift in layer %{x}: %{y:.3g} nats<extra></extra>",
                showlegend=True,
            )
        )
        off = (part["value"] - part["value_float64"]).abs().groupby(part["inject_layer"]).mean()
        if off.gt(0).any():
            floor = {"name": "noise floor: distance to float64", "legendgroup": "floor", "showlegend": i == 0}
            figure.add_trace(go.Scatter(x=off.index, y=off, line={"color": GREY, "dash": "dot"}, **floor))
    kinds = global_layers(rows, "inject_layer")
    mark_layers(figure, 1, "x", kinds.layers)
    figure.update_xaxes(title="layer of the shift", **({"dtick": 1} if len(layers) <= 10 else {"nticks": 10}))
    figure.update_yaxes(title="KL(clean || perturbed), nats", **log_axis(rows["value"], _MOST_DECADES_OF_AXIS))
    note = f"shift of {dose:g} tokens in one layer; points: mean, bars: smallest to largest document; {sample(rows)}"
    return styled(figure, "Which layers are sensitive to position", label, note + kinds.note)


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
    heads = sorted(rows["head"].unique())
    sides = rows["side"].nunique()
    ticks = {"tickvals": across([str(head) for head in heads], ROOM / sides), "title": "head"}
    return _map_by_layer(rows, "head", ticks, f"shift of {dose:g} tokens in one head", label)


@drawing
def pair_effects(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Layer x rotary pair map of the logit KL of a turn of one pair in one layer at a time, a panel for each side.

    By the largest angle there is, the same for all pairs; one logarithmic colour scale, the mean over documents and
    seeds. What is zero, or rounding by the float64 control, is grey. Raises InputError where the frame has no such
    turns.
    """
    rows = frame[is_effect_of_pair(frame)]
    if rows.empty:
        raise InputError(
            "these results hold no logit KL of turns of single pairs of a layer; trace PairTurn(layers=l, pairs=p)"
        )
    angle = rows["radians"].max()
    rows = rows[rows["radians"] == angle]
    ticks = pair_ticks(rows, ROOM / rows["side"].nunique())
    ticks = {**ticks, "tickvals": [str(pair) for pair in ticks["tickvals"]], "title": "pair<br>wavelength"}
    how = f"one pair of one layer turned by {_radians(angle)}; below each pair its wavelength in tokens"
    return _map_by_layer(rows, "pair", ticks, how, label)


def _map_by_layer(rows: pd.DataFrame, what: str, ticks: dict[str, Any], how: str, label: str) -> go.Figure:
    """Logit KL of something done in one layer, and in one of the column `what`; a panel for each side."""
    rows = rows.assign(shown=rows["value"].where(~is_rounding(rows) & (rows["value"] > 0)))
    sides = [side for side in SIDES if (rows["side"] == side).any()]
    layers = sorted(rows["inject_layer"].unique())
    height = _height(len(layers))
    names = [str(layer) for layer in layers]
    figure = panels([SIDES[side][0] for side in sides], height, len(sides))
    kinds = global_layers(rows, "inject_layer")
    largest = []
    for column, side in enumerate(sides, start=1):
        axes = {"index": "inject_layer", "columns": what, "dropna": False}
        part = rows[rows["side"] == side]
        table = part.pivot_table(values="shown", **axes).reindex(layers)
        parts = [str(number) for number in table.columns]
        gap = 1 if max(len(parts), len(layers)) <= _MOST_SPACED else 0
        trace = go.Heatmap(
            z=np.log10(table),
            x=parts,
            y=names,
            customdata=table,
            coloraxis="coloraxis",
            xgap=gap,
            ygap=gap,
            hovertemplate=f"layer %{{y}}, {what} %{{x}}: %{{customdata:.4g}} nats<extra></extra>",
        )
        figure.add_trace(trace, row=1, col=column)
        figure.update_xaxes(type="category", tickangle=0, **ticks, row=1, col=column)
        mark_layers(figure, column, "y", [place for place, layer in enumerate(layers) if layer in kinds.layers])
        effects = part.groupby(["inject_layer", what])["value"].mean()
        layer, number = effects.idxmax()
        share = f", {effects.max() / effects.sum():.0%} of the sum over {what}s" if effects.sum() > 0 else ""
        largest.append(
            f"{SIDES[side][0]}: the largest is {what} {number} of layer {layer}, {effects.max():.2g} nats{share}"
        )
    figure.update_yaxes(type="category", autorange="reversed", tickvals=down(names, height), **PLAIN)
    figure.update_yaxes(title="layer", col=1)
    figure.update_xaxes(**PLAIN)
    missing_is_grey(figure)
    figure.update_layout(coloraxis=logarithmic(rows["shown"], "KL, nats", _MOST_DECADES))
    note = f"{how}; mean over documents; {sample(rows)}; grey: nothing, or rounding"
    note = "; ".join([note, *largest]) + kinds.note
    return styled(figure, f"Which {what}s are sensitive to position", label, note)


def _radians(angle: float) -> str:
    return f"{angle:g} radian" if angle == 1 else f"{angle:g} radians"


def _height(lines: int) -> int:
    """Pixels down of a map with so many lines."""
    return max(_LOWEST_PANEL, min(_PIXELS_OF_LINE * lines, _HIGHEST_PANEL))


def _of_largest_dose(rows: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    dose = rows["delta_tokens"].max()
    return rows[rows["delta_tokens"] == dose], dose
