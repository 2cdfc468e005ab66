"""What the figures look like alike: colours, lines, titles and captions, and names as plotly shows them."""

import functools
import hashlib
import re
import textwrap
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
import plotly.graph_objects as go

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("solid", "dash", "dot")
SYMBOLS = ("circle", "square-open", "triangle-up")
BESIDE: dict[str, Any] = {"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top", "tracegroupgap": 0}
"""A legend to the right of the plot, for many or long names."""
LONGEST_NAME, LONGEST_LABEL = 60, 100
_TAKEN_APART = ("site", "restriction")
_MARKUP = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "%": "&#37;", "$": "&#36;"}
_UNSEEN = (*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_LITERAL = str.maketrans(_MARKUP | {chr(c): "&#92;" + chr(c).encode("unicode_escape").decode()[1:] for c in _UNSEEN})
_DIGEST = 8


class Draw(Protocol):
    """A tidy frame in, a figure out; the label goes into its title."""

    def __call__(self, frame: pd.DataFrame, label: str = "") -> go.Figure:
        """Draw the frame."""


def drawing(draw: Draw) -> Draw:
    """Every public drawing function is one: what the frame and the label call things is shown just as it is written.

    It draws a frame whose text is `literal` and `short`, but for sites and restrictions: these are literal alone, since
    drawings look for parts of them. Rows that are not `measured` are left out.
    """

    @functools.wraps(draw)
    def drawn(frame: pd.DataFrame, label: str = "") -> go.Figure:
        with np.errstate(all="ignore"):  # numbers too large to add up are drawn as far as they can be
            return draw(_as_shown(measured(frame)), short(literal(label), LONGEST_LABEL))

    return drawn


def literal(text: str) -> str:
    """The text by which plotly shows `text` itself: no markup, no template, no TeX; what cannot be seen by its code."""
    return text.translate(_LITERAL)


def short(text: str, longest: int = LONGEST_NAME) -> str:
    """The text, literal or not, in at most `longest` letters: a digest after an ellipsis tells long ones apart."""
    letters = re.findall(r"&#?\w{1,6};|.", text, flags=re.DOTALL)
    if len(letters) <= longest:
        return text
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:_DIGEST]
    return f"{''.join(letters[: longest - 1 - _DIGEST])}…{digest}"


def measured(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that name a metric and have a finite number as its value."""
    finite = np.isfinite(frame["value"].to_numpy(dtype=float, na_value=np.nan))
    return frame[finite & frame["metric"].notna().to_numpy()]


def _as_shown(frame: pd.DataFrame) -> pd.DataFrame:
    shown = {}
    for column in frame.select_dtypes(include=["object", "string"]):
        names = [name for name in frame[column].dropna().unique() if isinstance(name, str)]
        names_shown = {name: literal(name) if column in _TAKEN_APART else short(literal(name)) for name in names}
        if any(name != text for name, text in names_shown.items()):
            shown[column] = frame[column].map(
                lambda name, names_shown=names_shown: names_shown.get(name, name), na_action="ignore"
            )
    return frame.assign(**{column: names.astype(frame[column].dtype) for column, names in shown.items()})


def line_style(i: int) -> tuple[str, str, str]:
    """Colour, dash and marker symbol of the i-th line; the first 21 differ."""
    again = i // len(PALETTE) % len(DASHES)
    return PALETTE[i % len(PALETTE)], DASHES[again], SYMBOLS[again]


def spaced(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the values, evenly spaced from the first on: ticks that have room."""
    return list(values[:: max(1, -(-len(values) // most))])


def listed(values: pd.Series) -> str:
    """The distinct values of a column in order, as a caption lists them; "" where all are null."""
    return ", ".join(map(str, sorted(values.dropna().unique().tolist())))


def styled(figure: go.Figure, title: str, label: str, caption: str, height: int, *, below: int = 62) -> go.Figure:
    """Give a figure its title, its caption (`below` pixels under the lowest axis), and the margins and fonts of all."""
    wrapped = "<br>".join(textwrap.wrap(caption, 125, break_long_words=False))
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"t": 90, "b": below + 48, "l": 90, "r": 40},
        title={"text": f"{title}: {label}" if label else title, "x": 0.01, "xanchor": "left"},
        font={"family": "system-ui, sans-serif", "size": 14},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"namelength": -1},
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
