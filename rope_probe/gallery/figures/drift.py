"""How far an extended model has drifted from the original, layer by layer."""

import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.layout import panels
from rope_probe.gallery.figures.style import drawing, line_style, listed, seeds_of, styled
from rope_probe.spans.drift import ATTENTION_KL, COSINE_DISTANCE

_PANELS = {
    COSINE_DISTANCE: ("1 - cosine of the residual stream after a layer", "1 - cosine"),
    ATTENTION_KL: ("KL of attention, original to extended: mean over heads (line), each head (points)", "nats"),
}
MEASURES = {COSINE_DISTANCE: "change of the residual stream (1 - cosine)", ATTENTION_KL: "change of attention (KL)"}
"""What a sentence calls them."""


def is_drift(frame: pd.DataFrame) -> pd.Series:
    """Rows that `drift_by_layer` draws."""
    return frame["metric"].isin(list(_PANELS)) & frame["layer"].notna()


@drawing
def drift_by_layer(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """By layer, of each extended model: drift of hidden states (above), attention KL with heads as points (below).

    Means over seeds, that is over windows. Raises InputError where the frame has no drift.
    """
    rows = frame[is_drift(frame)]
    if rows.empty:
        raise InputError("these results hold no drift; make them with drift")
    rows = rows.assign(model=rows["model"].fillna(""))
    titles = [title for title, _ in _PANELS.values()]
    figure = panels(titles, 260, shared=True)
    for i, (model, of_model) in enumerate(rows.groupby("model", sort=False)):
        colour, dash, symbol = line_style(i)
        for panel, metric in enumerate(_PANELS, 1):
            part = of_model[of_model["metric"] == metric]
            curve = part.groupby("layer")["value"].mean()
            line = go.Scatter(
                x=curve.index,
                y=curve,
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                marker={"symbol": symbol, "size": 7},
                name=str(model),
                legendgroup=str(model),
                showlegend=panel == 1 or not (of_model["metric"] == COSINE_DISTANCE).any(),
            )
            figure.add_trace(line, panel, 1)
        figure.add_trace(_heads(of_model, str(model), colour), 2, 1)
    for panel, (_, unit) in enumerate(_PANELS.values(), 1):
        figure.update_yaxes(title=unit, rangemode="tozero", row=panel, col=1)
    figure.update_xaxes(title="layer", row=2, col=1)
    note = (
        f"windows of {listed(rows['seq_len']) or 'several lengths of'} tokens, {seeds_of(rows)}; "
        f"means over {listed(rows['positions'])} positions"
    )
    return styled(figure, "Drift from the original model", label, note)


def _heads(rows: pd.DataFrame, model: str, colour: str) -> go.Scatter:
    """The attention KL of each head."""
    table = rows[rows["metric"] == ATTENTION_KL].groupby(["layer", "head"], as_index=False)["value"].mean()
    return go.Scatter(
        x=table["layer"],
        y=table["value"],
        customdata=table["head"],
        mode="markers",
        marker={"color": colour, "size": 5, "opacity": 0.35},
        name=model,
        legendgroup=model,
        showlegend=False,
        hovertemplate="layer %{x}, head %{customdata}: %{y:.3g} nats<extra></extra>",
    )
