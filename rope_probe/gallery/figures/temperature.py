"""Retrieval by what queries are multiplied by: how much of a skill is a sharper softmax?"""

import math

import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.layout import panels
from rope_probe.gallery.figures.retrieval import pooled
from rope_probe.gallery.figures.style import drawing, joined, line_style, listed, seeds_of, styled, trials_of

_HEIGHT = 150
JUDGING = "judging"


def is_judged(frame: pd.DataFrame) -> pd.Series:
    """Rows with the accuracy at a distance and a temperature, on trials that did not choose the temperature."""
    of_trials = (frame["metric"] == "accuracy") & (frame["purpose"] == JUDGING).fillna(False)
    return of_trials & frame["temperature"].notna() & (frame["distance"] > 0).fillna(False)


@drawing
def retrieval_by_temperature(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Accuracy against what queries are multiplied by, a panel for each distance and a line for each model.

    Lines are means over seeds, small points seeds, and bars 95% intervals over seeds and trials. A factor that only
    some seeds of a model were measured at is left out. Raises InputError where the frame has no such accuracy.
    """
    rows = frame[is_judged(frame)]
    rows = rows.assign(model=rows["model"].fillna(""))
    seeds = rows.groupby(["model", "temperature"])["seed"].transform("nunique")
    rows = rows[seeds == rows.groupby("model")["seed"].transform("nunique")]
    if rows.empty:
        raise InputError("these results hold no accuracy by temperature; run experiments.rivals")
    factors = sorted(rows["temperature"].unique(), key=_order)
    names = {factor: factor.replace("_", " ") for factor in factors}
    distances = sorted(rows["distance"].unique().tolist())
    figure = panels([f"distance {distance:,} tokens" for distance in distances], _HEIGHT, shared=True)
    for i, (model, of_model) in enumerate(rows.groupby("model")):
        colour, dash, symbol = line_style(i)
        for panel, distance in enumerate(distances):
            part = of_model[of_model["distance"] == distance]
            if part.empty:
                continue
            mean = pooled(part, "temperature").reindex([one for one in factors if one in set(part["temperature"])])
            at = {"row": panel + 1, "col": 1}
            figure.add_trace(
                go.Scatter(
                    x=[names[factor] for factor in mean.index],
                    y=mean["value"],
                    error_y={
                        "array": mean["high"] - mean["value"],
                        "arrayminus": mean["value"] - mean["low"],
                        "visible": bool(mean["low"].notna().any()),
                        "thickness": 1,
                        "width": 3,
                    },
                    name=str(model),
                    legendgroup=str(model),
                    showlegend=panel == 0,
                    mode="lines+markers",
                    line={"color": colour, "dash": dash, "width": 2},
                    marker={"symbol": symbol, "size": 8},
                    hovertemplate="queries times %{x}: %{y:.3f}",
                ),
                **at,
            )
            if part["seed"].nunique() > 1:
                seeds = {"x": part["temperature"].map(names), "y": part["value"], "mode": "markers"}
                marker = {"color": colour, "size": 4, "opacity": 0.5}
                hidden = {"legendgroup": str(model), "showlegend": False, "hoverinfo": "skip"}
                figure.add_trace(go.Scatter(**seeds, **hidden, marker=marker), **at)
    categories = list(names.values())
    figure.update_xaxes(
        type="category",
        categoryorder="array",
        categoryarray=categories,
        range=[-0.4, len(categories) - 0.6],
        title="queries multiplied by",
    )
    figure.update_yaxes(range=[-0.03, 1.03], title="accuracy")
    what = joined(f"window {listed(rows['seq_len'])} tokens", seeds_of(rows), trials_of(rows, "point of a seed"))
    note = f"{what}; lines: mean over seeds, points: seeds, bars: 95% over seeds and trials"
    return styled(figure, "Retrieval by temperature", label, note)


def _order(factor: str) -> tuple[float, str]:
    """Numbers in their order, then what is no number."""
    try:
        return float(factor), ""
    except ValueError:
        return math.inf, factor
