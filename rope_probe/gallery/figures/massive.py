"""Where queries, keys and values are long: layer x rotary pair maps of massive values."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.layout import ROOM, missing_is_grey, panels
from rope_probe.gallery.figures.style import (
    PLAIN,
    SIGNED_SCALE,
    bar_of,
    down,
    drawing,
    joined,
    listed,
    pair_ticks,
    seeds_of,
    styled,
)
from rope_probe.tracing.massive import STATES

PANELS = dict(zip(STATES, ("queries", "keys", "values"), strict=True))
_LOWEST_PANEL, _HIGHEST_PANEL, _PIXELS_OF_LAYER = 140, 460, 14
"""Pixels down of a panel at the least and at the most, and of one of its layers where there is room."""
_BESIDE = 20
"""Pixels across that the layers' numbers take of a panel's share."""


def is_ratio(frame: pd.DataFrame) -> pd.Series:
    """Rows that `massive_map` draws: how long a rotary pair is against the median of its head."""
    return (frame["metric"] == "ratio") & frame["pair"].notna() & frame["layer"].notna() & frame["states"].isin(PANELS)


@drawing
def massive_map(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Layer x rotary pair maps of the length of queries, keys and values against their head's median, side by side.

    Each cell is the mean over heads and seeds; the colour is its logarithm, white where a pair is as long as the
    median. The largest head stands in the hover. Raises InputError where the frame has no massive values.
    """
    rows = frame[is_ratio(frame)]
    if rows.empty:
        raise InputError("these results hold no norms of pairs; make them with massive_values")
    layers = sorted(rows["layer"].unique().tolist())
    pairs = sorted(rows["pair"].unique().tolist())
    height = max(_LOWEST_PANEL, min(_PIXELS_OF_LAYER * len(layers), _HIGHEST_PANEL))
    figure = panels(list(PANELS.values()), height, len(PANELS))
    largest, shown = [], []
    for column, (states, name) in enumerate(PANELS.items(), start=1):
        part = rows[rows["states"] == states]
        axes = {"index": "layer", "columns": "pair", "dropna": False}
        mean = part.pivot_table(values="value", aggfunc="mean", **axes).reindex(index=layers, columns=pairs)
        most = part.pivot_table(values="value", aggfunc="max", **axes).reindex(index=layers, columns=pairs)
        wavelength = part.pivot_table(values="wavelength", aggfunc="mean", **axes)
        hover = [table.reindex(index=layers, columns=pairs).to_numpy(dtype=float) for table in (mean, most, wavelength)]
        shown.append(np.log10(np.where(hover[0] > 0, hover[0], np.nan)))
        trace = go.Heatmap(
            z=shown[-1],
            x=pairs,
            y=layers,
            customdata=np.stack(hover, -1),
            coloraxis="coloraxis",
            hovertemplate=(
                "layer %{y}, pair %{x}, wavelength %{customdata[2]:,.4g} tokens<br>%{customdata[0]:.3g} times the "
                "median, %{customdata[1]:.3g} in the largest head<extra></extra>"
            ),
        )
        figure.add_trace(trace, row=1, col=column)
        if not part.empty:
            top = part.loc[part["value"].idxmax()]
            largest.append(
                f"{name}: {top['value']:.1f} at most, in layer {top['layer']}, head {top['head']}, pair {top['pair']}"
            )
    finite = np.concatenate([table[np.isfinite(table)] for table in shown])
    limit = max(float(np.abs(finite).max()), 0.1) if finite.size else 1.0
    ticks = {log: f"{10.0**log:.2g}" for log in np.linspace(-limit, limit, 5).tolist()}
    bar = bar_of("times the median of the head (logarithmic)", ticks)
    missing_is_grey(figure)
    figure.update_layout(
        coloraxis={"colorscale": SIGNED_SCALE, "cmid": 0, "cmin": -limit, "cmax": limit, "colorbar": bar}
    )
    figure.update_yaxes(autorange="reversed", tickvals=down(layers, height), **PLAIN)
    figure.update_yaxes(title="layer", col=1)
    figure.update_xaxes(
        title="pair<br>wavelength", **pair_ticks(rows, ROOM / len(PANELS) - _BESIDE), tickangle=0, **PLAIN
    )
    note = (
        f"mean over heads and positions; window {listed(rows['seq_len'])} tokens; pair 0 is the fastest, and below "
        f"each pair is its wavelength in tokens; {joined(*largest, seeds_of(rows), by='; ')}"
    )
    return styled(figure, "Where queries, keys and values are long", label, note)
