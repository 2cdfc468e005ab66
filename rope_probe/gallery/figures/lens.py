"""What the logit lens says of a perturbation: from which layer on the model would predict something else."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rope_probe.errors import InputError
from rope_probe.gallery.figures.propagation import SIDES, is_shift, sample
from rope_probe.gallery.figures.style import drawing, spaced, styled
from rope_probe.tracing.cone import LENS
from rope_probe.tracing.propagation import is_rounding

MOST_LINES = 100
"""Rows that a panel has room for; with more of them, single heads are left out."""
_HIGHEST_PANEL, _HIGHEST_CELL, _ROOM_FOR_TICK = 900, 34, 18
_MOST_TICKS = 20
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
    if left_out and left_out < len(places):
        rows = rows[rows["head"].isna()]
    heads = rows["head"].map(lambda head: "" if pd.isna(head) else f", head {head}")
    layers = rows["inject_layer"].map(lambda layer: _ALL_LAYERS if pd.isna(layer) else f"layer {layer}")
    shown = rows["value"].where(~is_rounding(rows) & (rows["value"] > 0))
    rows = rows.assign(injected=layers.astype("string") + heads, shown=shown)
    order = rows.sort_values(["inject_layer", "head"], na_position="first")["injected"].unique().tolist()
    reads = sorted(rows["layer"].unique().tolist())
    sides = [side for side in SIDES if (rows["side"] == side).any()]
    figure = make_subplots(
        rows=1, cols=len(sides), shared_yaxes=True, subplot_titles=[SIDES[side][0] for side in sides]
    )
    cell = max(1, min(_HIGHEST_CELL, _HIGHEST_PANEL // len(order)))
    gap = 1 if cell > 12 and len(reads) <= 64 else 0
    tables = []
    for column, side in enumerate(sides, start=1):
        axes = {"index": "injected", "columns": "layer", "aggfunc": "mean", "dropna": False}
        table = rows[rows["side"] == side].pivot_table(values="shown", **axes).reindex(index=order, columns=reads)
        tables.append(table)
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
    height = max(120, cell * len(order))
    figure.update_layout(coloraxis=_colours(pd.concat([table.stack() for table in tables])), plot_bgcolor="#d8d8d8")
    figure.update_yaxes(
        range=[len(order) - 0.5, -0.5],
        type="category",
        tickvals=spaced(order, max(1, height // _ROOM_FOR_TICK)),
        showgrid=False,
        zeroline=False,
    )
    ticks = spaced(reads, max(1, _MOST_TICKS // len(sides)))
    plain = {"range": [reads[0] - 0.5, reads[-1] + 0.5], "showgrid": False, "zeroline": False}
    figure.update_xaxes(title="lens after layer", tickvals=ticks, tickangle=0, **plain)
    note = f"shift of {dose:g} tokens; mean over documents; {sample(rows)}; grey: nothing, or rounding"
    if left_out and left_out < len(places):
        note += f"; {left_out} single heads are left out, whole layers drawn"
    title = "From which layer on a shift changes what the model would predict"
    return styled(figure, title, label, note, height=250 + height)


def _colours(shown: pd.Series) -> dict:
    """A colour axis for the logarithms of these numbers; the least colour is for all that is far smaller."""
    title = {"title": "KL, nats"}
    logs = np.log10(shown.dropna().astype(float))
    if logs.empty:
        return {"colorscale": "Viridis", "cmin": -1, "cmax": 0, "colorbar": title}
    lowest, highest = max(logs.min(), logs.max() - _MOST_DECADES), logs.max()
    ticks = np.arange(np.ceil(lowest), np.floor(highest) + 1)
    if len(ticks) < 2:  # no two powers of ten in it
        ticks = np.linspace(lowest, highest, 3)
    bar = {**title, "tickvals": ticks, "ticktext": [f"{10.0**tick:.2g}" for tick in ticks]}
    return {"colorscale": "Viridis", "cmin": lowest, "cmax": highest, "colorbar": bar}
