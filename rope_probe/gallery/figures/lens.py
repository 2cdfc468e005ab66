"""What the logit lens says of a perturbation: from which layer on the model would predict something else."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.kinds import global_layers
from rope_probe.gallery.figures.layout import ROOM, mark_layers, missing_is_grey, panels
from rope_probe.gallery.figures.propagation import SIDES, is_shift, sample
from rope_probe.gallery.figures.style import PLAIN, across, down, drawing, logarithmic, styled
from rope_probe.tracing.cone import LENS
from rope_probe.tracing.propagation import is_rounding

MOST_LINES = 100
"""Rows that a panel has room for; with more of them, single heads are left out."""
_LOWEST_PANEL, _HIGHEST_PANEL, _PIXELS_OF_LINE = 140, 460, 14
"""Pixels down of a panel at the least and at the most, and of one of its lines where there is room."""
_MOST_SPACED = 40
_MOST_DECADES = 4
"""What is smaller than the largest by more powers of ten than these is drawn like the smallest."""
_ALL_LAYERS = "all layers"


def is_of_lens(frame: pd.DataFrame) -> pd.Series:
    """Rows that `lens_by_layer` draws: KL at a logit lens of a shift in one layer, one head, or everywhere."""
    before, after = LENS.split("{}")
    of_lens = frame["site"] == before + frame["layer"].astype("string") + after
    one = frame["inject_layer"].notna()
    everywhere = frame["restriction"].fillna("") == ""
    rows = of_lens.fillna(False) & (frame["metric"] == "kl_nats") & is_shift(frame)
    return rows & frame["pair"].isna() & (one | everywhere)


@drawing
def lens_by_layer(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Where a shift is injected (all layers, one, or one head) x after which layer the logit lens reads it: KL in nats.

    By the largest dose there is; panels for queries, keys and both, one logarithmic colour scale. Means over documents
    and seeds. What is zero, or rounding by the float64 control, is grey. Raises InputError where the frame has none.
    """
    rows = frame[is_of_lens(frame)]
    if rows.empty:
        raise InputError("these results hold no logit lens of a PositionShift; trace some shifts with lens=True")
    dose = rows["delta_tokens"].max()
    rows = rows[rows["delta_tokens"] == dose]
    places = rows[["inject_layer", "head"]].drop_duplicates()
    left_out = int(places["head"].notna().sum()) if len(places) > MOST_LINES else 0
    is_cut = 0 < left_out < len(places)
    if is_cut:
        rows = rows[rows["head"].isna()]
    heads = rows["head"].map(lambda head: "" if pd.isna(head) else f", head {head}")
    layers = rows["inject_layer"].map(lambda layer: _ALL_LAYERS if pd.isna(layer) else f"layer {layer}")
    shown = rows["value"].where(~is_rounding(rows) & (rows["value"] > 0))
    rows = rows.assign(injected=layers.astype("string") + heads, shown=shown)
    order = rows.sort_values(["inject_layer", "head"], na_position="first")["injected"].unique().tolist()
    reads = sorted(rows["layer"].unique().tolist())
    sides = [side for side in SIDES if (rows["side"] == side).any()]
    height = max(_LOWEST_PANEL, min(_PIXELS_OF_LINE * len(order), _HIGHEST_PANEL))
    gap = 1 if max(len(order), len(reads)) <= _MOST_SPACED else 0
    figure = panels([SIDES[side][0] for side in sides], height, len(sides))
    at = rows.drop_duplicates("injected").set_index("injected").loc[order]
    kinds = global_layers(rows, "inject_layer")
    of_global = np.flatnonzero(at["inject_layer"].isin(kinds.layers)).tolist()
    ticks = across(reads, ROOM / len(sides))
    drawn = []
    for column, side in enumerate(sides, start=1):
        axes = {"index": "injected", "columns": "layer", "aggfunc": "mean", "dropna": False}
        table = rows[rows["side"] == side].pivot_table(values="shown", **axes).reindex(index=order, columns=reads)
        drawn.append(table.stack())
        trace = go.Heatmap(
            z=np.log10(table),
            x=reads,
            y=order,
            customdata=table,
            coloraxis="coloraxis",
            xgap=gap,
            ygap=gap,
            hovertemplate="shift in %{y}, lens after layer %{x}: %{customdata:.4g} nats<extra></extra>",
        )
        figure.add_trace(trace, row=1, col=column)
        mark_layers(figure, column, "y", of_global)
    missing_is_grey(figure)
    figure.update_layout(coloraxis=logarithmic(pd.concat(drawn), "KL, nats", _MOST_DECADES))
    names = {line: _short_name(*place) for line, place in zip(order, at[["inject_layer", "head"]].values, strict=True)}
    lines = down(order, height)
    figure.update_yaxes(
        type="category",
        range=[len(order) - 0.5, -0.5],
        tickvals=lines,
        ticktext=[names[line] for line in lines],
        **PLAIN,
    )
    figure.update_yaxes(title="layer.head of the shift" if at["head"].notna().any() else "layer of the shift", col=1)
    title = "lens after layer" if len(sides) < len(SIDES) else "after layer"
    figure.update_xaxes(title=title, tickvals=ticks, tickangle=0, range=[reads[0] - 0.5, reads[-1] + 0.5], **PLAIN)
    note = (
        f"shift of {dose:g} tokens, read by the logit lens after each layer; mean over documents; {sample(rows)}; "
        "grey: nothing, or rounding"
    )
    if is_cut:
        note += f"; {left_out} single heads are left out, whole layers drawn"
    title = "From which layer on a shift changes what the model would predict"
    return styled(figure, title, label, note + kinds.note)


def _short_name(layer: int | None, head: int | None) -> str:
    """What the axis calls a line: the layer, and its head where it is a head's."""
    if pd.isna(layer):
        return "all" if pd.isna(head) else f"all.{head}"
    return f"{layer}" if pd.isna(head) else f"{layer}.{head}"
