"""How much of a state is content, position and their interaction, layer by layer."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.layout import panels, roomy
from rope_probe.gallery.figures.style import drawing, line_style, listed, seeds_of, styled
from rope_probe.tracing.cone import LOGITS
from rope_probe.tracing.positional import BY_CHANCE, SHARES

_NAMES = dict(zip(SHARES, ("content", "position", "interaction"), strict=True))
_PANELS = {
    "hook_resid_post": "residual stream after a layer; the logits last",
    "hook_attn_out": "what attention adds",
    "attn.unrotated_q": "queries, rotation undone",
    "attn.unrotated_k": "keys, rotation undone",
}
_SMALLEST = 1e-6
"""Shares below it are drawn there."""
_PANEL_HEIGHT = 190


def is_share(frame: pd.DataFrame) -> pd.Series:
    """Rows that `positional_shares` draws: of models that were read at some layer, not at the logits alone."""
    drawn = frame["metric"].isin([*SHARES, BY_CHANCE]) & _panel(frame).notna()
    in_layers = drawn & frame["layer"].notna()
    of_model = [frame[column] for column in ("run_id", "model", "role", "seed")]
    return drawn & in_layers.groupby(of_model, dropna=False).transform("any")


def _panel(frame: pd.DataFrame) -> pd.Series:
    """The panel that a row is drawn in: its site without the layer; the logits stand with the residual stream."""
    shown_in = pd.Series(pd.NA, index=frame.index, dtype="string")
    sites = frame["site"].fillna("")
    for site in _PANELS:
        shown_in[sites.str.endswith(f".{site}")] = site
    shown_in[sites == LOGITS] = "hook_resid_post"
    return shown_in


@drawing
def positional_shares(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Shares by layer on a log scale: content, position, interaction, and what of position chance would leave.

    A panel for each kind of site; the logits stand after the last layer. Means over seeds. Raises InputError where the
    frame has no shares.
    """
    rows = frame[is_share(frame)]
    if rows.empty:
        raise InputError("these results hold no shares of position; make them with positional_parts")
    last = int(rows["layer"].max())
    rows = rows.assign(panel=_panel(rows), layer=rows["layer"].fillna(last + 1))
    shown = [panel for panel in _PANELS if (rows["panel"] == panel).any()]
    figure = panels([_PANELS[panel] for panel in shown], _PANEL_HEIGHT, shared=True)
    for number, panel in enumerate(shown, 1):
        part = rows[rows["panel"] == panel]
        for i, (metric, name) in enumerate([*_NAMES.items(), (BY_CHANCE, "position by chance")]):
            curve = part[part["metric"] == metric].groupby("layer")["value"].mean().clip(lower=_SMALLEST)
            colour, _, symbol = line_style(1 if metric == BY_CHANCE else i)
            trace = go.Scatter(
                x=curve.index.astype(int),
                y=curve,
                mode="lines" if metric == BY_CHANCE else "lines+markers",
                line={"color": colour, "dash": "dot" if metric == BY_CHANCE else "solid"},
                marker={"symbol": symbol, "size": 7},
                name=name,
                legendgroup=name,
                showlegend=number == 1,
            )
            figure.add_trace(trace, number, 1)
        lowest = min(0.01, part["value"].clip(lower=_SMALLEST).min())
        span = [np.log10(lowest) - 0.15, 0.15]
        figure.update_yaxes(title="share", type="log", dtick=1, exponentformat="power", range=span, row=number, col=1)
    of_logits = (rows["site"] == LOGITS).any()
    layers = sorted(int(layer) for layer in rows.loc[rows["site"] != LOGITS, "layer"].unique())
    names = {layer: f"{layer}" for layer in layers} | ({last + 1: "logits"} if of_logits else {})
    kept = roomy(list(names), list(names.values()), list(names))
    figure.update_xaxes(tickvals=kept, ticktext=[names[layer] for layer in kept], tickangle=0)
    figure.update_xaxes(title="layer", row=len(shown), col=1)
    note = (
        f"{listed(rows['contents'])} contents of {listed(rows['content_length'])} tokens at {listed(rows['places'])} "
        f"places of a window of {listed(rows['seq_len'])} tokens, {seeds_of(rows)}; shares of the sum of "
        f"squares about the mean, below {_SMALLEST:g} drawn there. By chance: interaction / (contents - 1)"
    )
    return styled(figure, "Content, position, interaction", label, note)
