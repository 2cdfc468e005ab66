"""Retrieval by window and by distance at once, which a curve over distances in one window confounds."""

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.layout import ROOM, missing_is_grey, panels, roomy
from rope_probe.gallery.figures.style import PLAIN, SCALE, bar_of, down, drawing, joined, seeds_of, styled
from rope_probe.runs.intervals import share_interval

_PIXELS_OF_LINE, _LOWEST_PANEL, _HIGHEST_PANEL = 30, 140, 460
"""Pixels down of a distance where there is room, and of the panel at the least and at the most."""
_WIDTH_OF_TEXT, _HEIGHT_OF_TEXT = 38, 18
"""Pixels that a cell needs for its number."""


def is_map(frame: pd.DataFrame) -> pd.Series:
    """Rows that `retrieval_map` draws: accuracy by distance, of what was measured in several windows and distances."""
    rows = (frame["metric"] == "accuracy") & (frame["distance"] > 0).fillna(False) & frame["seq_len"].notna()
    alike = [frame[column] for column in ("run_id", "model", "task", "phase", "perturbation")]
    for column in ("seq_len", "distance"):
        rows &= frame[column].where(rows).groupby(alike, dropna=False).transform("nunique") > 1
    return rows


@drawing
def retrieval_map(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Accuracy of retrieval, window x distance: along a row the window grows, up a column the distance.

    Cells are means over seeds; the hover has 95% intervals over seeds and trials, of one seed over trials. A cell is
    empty where the distance has no room in the window, or was not measured. Raises InputError where the frame has no
    map, or those of several models, tasks or perturbations.
    """
    rows = frame[is_map(frame)]
    if rows.empty:
        raise InputError("these results hold no accuracy in several windows at several distances; see retrieval_map")
    for column in ("model", "task", "phase", "perturbation"):
        if len(several := rows[column].fillna("").unique()) > 1:
            raise InputError(f"these results hold maps of the {column}s {', '.join(several)}; draw one at a time")
    cells = pd.DataFrame(
        [{"seq_len": window, "distance": distance, **_pooled(part)}
         for (window, distance), part in rows.groupby(["seq_len", "distance"])]
    )  # fmt: skip
    axes = {"index": "distance", "columns": "seq_len"}
    table = cells.pivot(values="value", **axes)
    hover = [cells.pivot(values=column, **axes).to_numpy(dtype=float) for column in ("value", "low", "high", "trials")]
    windows, distances = ([f"{tokens:,}" for tokens in axis] for axis in (table.columns, table.index))
    height = max(_LOWEST_PANEL, min(_PIXELS_OF_LINE * len(distances), _HIGHEST_PANEL))
    has_room = len(windows) * _WIDTH_OF_TEXT <= ROOM and len(distances) * _HEIGHT_OF_TEXT <= height
    gap = 1 if has_room else 0
    figure = panels([""], height)
    figure.add_trace(
        go.Heatmap(
            z=table.to_numpy(dtype=float),
            x=windows,
            y=distances,
            customdata=np.stack(hover, -1),
            texttemplate="%{z:.2f}" if has_room else None,
            coloraxis="coloraxis",
            xgap=gap,
            ygap=gap,
            hoverongaps=False,
            hovertemplate=(
                "window %{x}, distance %{y}: %{customdata[0]:.3f}<br>95%: %{customdata[1]:.3f} to "
                "%{customdata[2]:.3f}, %{customdata[3]} trials<extra></extra>"
            ),
        )
    )
    missing_is_grey(figure)
    figure.update_layout(coloraxis={"colorscale": SCALE, "cmin": 0, "cmax": 1, "colorbar": bar_of("accuracy")})
    ticks = roomy(windows, windows, range(len(windows)))
    figure.update_xaxes(
        type="category",
        categoryarray=windows,
        categoryorder="array",
        title="window, tokens",
        tickvals=ticks,
        tickangle=0,
        **PLAIN,
    )
    figure.update_yaxes(
        type="category",
        categoryarray=distances,
        categoryorder="array",
        title="distance, tokens",
        tickvals=down(distances, height),
        **PLAIN,
    )
    trials = [f"{count:.0f}" for count in (cells["trials"].min(), cells["trials"].max()) if math.isfinite(count)]
    note = f"{' to '.join(dict.fromkeys(trials)) or 'unknown numbers of'} trials a cell"
    note = joined(note, seeds_of(rows))
    note += "; intervals in the hover; grey: the distance has no room in the window, or was not measured"
    return styled(figure, "Retrieval by window and distance", label, note)


def _pooled(rows: pd.DataFrame) -> dict[str, float]:
    """A cell's mean over seeds, its interval, and its trials; of one seed they are its own."""
    counts = rows["trials"].to_numpy(float, na_value=np.nan) if "trials" in rows else np.full(len(rows), np.nan)
    known = bool((counts > 0).all())
    values = rows["value"].to_numpy(float)
    low, high = rows["low"].mean(), rows["high"].mean()
    if len(rows) > 1:
        low, high = share_interval(values, counts) if known and ((values >= 0) & (values <= 1)).all() else (np.nan,) * 2
    mean = float(np.average(values, weights=counts)) if known else float(values.mean())
    return {"value": mean, "low": low, "high": high, "trials": float(counts.sum()) if known else math.nan}
