"""What is left of an answer when some layers are meddled with."""

import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.layout import TEXT, lines_of, panels, wrapped
from rope_probe.gallery.figures.style import drawing, joined, line_style, listed, seeds_of, short, styled
from rope_probe.runs.intervals import student_interval

PANELS = {"answer_logprob_nats": "log-probability of the answer, nats", "hit": "share of answers found"}
_LONGEST_NAME, _LONGEST_LINE = 40, 110
"""Letters of an intervention's name, and pixels of a line of it."""
_LINE, _BETWEEN = 16, 14
"""Pixels down of a line of text, and between two interventions."""


def is_answer(frame: pd.DataFrame) -> pd.Series:
    """Rows with a mean over passkeys under an intervention."""
    return frame["metric"].isin(PANELS) & frame["intervention"].notna()


@drawing
def passkey_by_intervention(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Log-probability of a passkey and the share found, a line for each intervention; the likeliest is on top.

    Small points are seeds, large ones their means. Bars are Student's 95% intervals over seeds, of the log-probability
    alone, since a share has bounds. Raises InputError where the frame has no passkeys under interventions.
    """
    rows = frame[is_answer(frame)]
    if rows.empty:
        raise InputError("these results hold no passkeys under interventions; run experiments.pretrained kinds")
    means = rows.pivot_table(index="intervention", columns="metric", values="value", dropna=False)
    shown = [metric for metric in PANELS if metric in means]
    means = means.sort_values(shown, ascending=False)
    names = {name: wrapped(short(str(name), _LONGEST_NAME), _LONGEST_LINE, TEXT) for name in means.index}
    height = len(names) * (max(map(lines_of, names.values())) * _LINE + _BETWEEN)
    colour, _, symbol = line_style(0)
    figure = panels([PANELS[metric] for metric in shown], max(height, 120))
    for row, metric in enumerate(shown, start=1):
        of_metric = rows[rows["metric"] == metric]
        points = {"mode": "markers", "showlegend": False}
        if of_metric["seed"].nunique() > 1:
            seeds = {"x": of_metric["value"], "y": of_metric["intervention"], "hoverinfo": "skip"}
            figure.add_trace(
                go.Scatter(**seeds, **points, marker={"color": colour, "size": 5, "opacity": 0.5}), row=row, col=1
            )
        bars = {}  # a share has bounds, which Student's interval does not know
        if metric != "hit":
            half = of_metric.groupby("intervention")["value"].agg(_half_of_interval).reindex(means.index)
            bars = {"array": half, "visible": bool(half.notna().any()), "thickness": 1.5, "width": 4}
        figure.add_trace(
            go.Scatter(
                x=means[metric],
                y=list(means.index),
                error_x=bars,
                marker={"color": colour, "symbol": symbol, "size": 11},
                hovertemplate="%{y}: %{x:.3g}<extra></extra>",
                **points,
            ),
            row=row,
            col=1,
        )
        figure.update_yaxes(
            type="category",
            categoryorder="array",
            categoryarray=list(means.index),
            range=[len(means) - 0.5, -0.5],
            tickvals=list(names),
            ticktext=list(names.values()),
            row=row,
            col=1,
        )
        if metric == "hit":
            figure.update_xaxes(range=[-0.03, 1.03], row=row, col=1)
    place = f"window {listed(rows['seq_len'])} tokens, passkey {listed(rows['distance'])} tokens back"
    marks = "small points: seeds, bars: 95% over seeds" if rows["seed"].nunique() > 1 else ""
    return styled(figure, "A passkey under interventions", label, joined(place, seeds_of(rows), marks))


def _half_of_interval(values: pd.Series) -> float:
    low, high = student_interval(values)
    return (high - low) / 2
