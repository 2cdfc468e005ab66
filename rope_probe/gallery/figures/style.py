"""What the figures look like alike: colours, lines, titles and captions."""

import textwrap
from typing import Any

import pandas as pd
import plotly.graph_objects as go

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("solid", "dash", "dot")
SYMBOLS = ("circle", "square-open", "triangle-up")
BESIDE: dict[str, Any] = {"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top", "tracegroupgap": 0}
"""A legend to the right of the plot, for many or long names."""


def line_style(i: int) -> tuple[str, str, str]:
    """Colour, dash and marker symbol of the i-th line; the first 21 differ."""
    again = i // len(PALETTE) % len(DASHES)
    return PALETTE[i % len(PALETTE)], DASHES[again], SYMBOLS[again]


def listed(values: pd.Series) -> str:
    """The distinct values of a column in order, as a caption lists them; "" where all are null."""
    return ", ".join(map(str, sorted(values.dropna().unique().tolist())))


def styled(figure: go.Figure, title: str, label: str, caption: str, height: int, *, below: int = 62) -> go.Figure:
    """Give a figure its title, its caption (`below` pixels under the lowest axis), and the margins and fonts of all."""
    wrapped = "<br>".join(textwrap.wrap(caption, 125))
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"t": 90, "b": below + 48, "l": 90, "r": 40},
        title={"text": f"{title}: {label}" if label else title, "x": 0.01, "xanchor": "left"},
        font={"family": "system-ui, sans-serif", "size": 14},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    figure.add_annotation(
        text=wrapped,
        xref="paper",
        yref="paper",
        x=0,
        y=0,
        yshift=-below,
        yanchor="top",
        xanchor="left",
        align="left",
        showarrow=False,
        font={"size": 12, "color": "#555555"},
    )
    return figure
