"""What the figures look like alike: colours, lines, scales of colour, titles and captions."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from rope_probe.gallery.figures.layout import NARROW, ROOM, even, lay_out, roomy, text_width
from rope_probe.gallery.figures.letters import LONGEST_LABEL, LONGEST_NAME, literal, short

__all__ = ["LONGEST_LABEL", "LONGEST_NAME", "PALETTE", "drawing", "listed", "literal", "measured", "short", "styled"]

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8833dd")
"""Told apart by the colour-blind too, at the least its first five; each shows on a light page and on a dark one."""
GREY = "#888888"
"""Of references, on light and dark pages."""
DASHES = ("solid", "dash", "dot")
SYMBOLS = ("circle", "square-open", "triangle-up")
SCALE, SIGNED_SCALE = "Viridis", "RdBu_r"
"""Scales of colour: of amounts, and of numbers with a sign, whose middle is zero."""
PLAIN: dict[str, Any] = {"showgrid": False, "zeroline": False}
"""An axis of a map."""
_TAKEN_APART = ("site", "restriction")
_ROOM_FOR_LINE = 17
_MOST_BAR_TICKS, _MOST_LOG_TICKS = 6, 8
_LEAST_POWER = -307


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


def down(names: Sequence[str], height: int, each: int = _ROOM_FOR_LINE) -> list[str]:
    """Those of a map's lines that have room for their names in so many pixels, where each takes `each`."""
    return even(names, max(1, height // each))


def across(names: Sequence[str], room: float = ROOM) -> list[str]:
    """Those of a map's columns that have room for their names, in so many pixels across."""
    widest = max((text_width(str(name)) for name in names), default=1.0) + 10
    return even(names, max(1, int(room // widest)))


def bar_of(title: str, ticks: Mapping[float, str] | None = None) -> dict[str, Any]:
    """The bar of a colour axis; of the ticks, value and text, at most so many as have room."""
    if ticks is None:
        return {"title": {"text": title}, "nticks": _MOST_BAR_TICKS}
    kept = even(list(ticks), _MOST_BAR_TICKS)
    return {"title": {"text": title}, "tickvals": kept, "ticktext": [ticks[value] for value in kept]}


def logarithmic(shown: pd.Series, title: str, most_decades: float = math.inf) -> dict[str, Any]:
    """A colour axis for the logarithms of these numbers; what is below the last of so many decades has one colour."""
    logs = np.log10(shown.dropna().astype(float))
    logs = logs[np.isfinite(logs)]
    title = f"{title} (logarithmic)"
    if logs.empty:
        return {"colorscale": SCALE, "cmin": -1, "cmax": 0, "colorbar": bar_of(title)}
    highest = float(logs.max())
    lowest = max(float(logs.min()), highest - most_decades)
    ticks = {math.log10(value): f"{value:g}" for value in _log_steps(lowest, highest)}
    if not ticks:  # all within a step
        ticks = {log: f"{10**log:.3g}" for log in dict.fromkeys([lowest, highest])}
    return {"colorscale": SCALE, "cmin": lowest, "cmax": highest, "colorbar": bar_of(title, ticks)}


def in_short(number: float) -> str:
    """A theta or a wavelength in few letters: 6.28, 12.6k, 3M."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if unit <= number < 1e9:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.3g}"


def ticks_of(texts: Mapping[Any, str], places: Sequence[float] | np.ndarray = (), room: float = ROOM) -> dict[str, Any]:
    """Ticks of an axis with these texts by value, as many as `room` pixels hold; `places` as in `roomy`, or values."""
    values = list(texts)
    kept = roomy(values, list(texts.values()), values if len(places) == 0 else places, room)
    return {"tickvals": kept, "ticktext": [texts[value] for value in kept]}


def pair_ticks(rows: pd.DataFrame, room: float = ROOM) -> dict[str, Any]:
    """Ticks that tell a rotary pair, and below it its wavelength, of as many pairs as `room` pixels hold."""
    lengths = rows.groupby("pair")["wavelength"].first()
    texts = {
        pair: f"{pair}<br>{in_short(tokens)}" if pd.notna(tokens) else f"{pair}" for pair, tokens in lengths.items()
    }
    return ticks_of(texts, room=room)


def log_axis(values: pd.Series, most_decades: float) -> dict[str, Any]:
    """A logarithmic axis that holds the positive ones of these, but no more decades than so many.

    It is marked at 1, 2 and 5 where it is short, else at powers of 10, and at every second one where it is long. Where
    it is so short that none of these lies in it, its marks are left to plotly.
    """
    axis: dict[str, Any] = {"type": "log", "exponentformat": "power"}
    span = _log_range(values, most_decades)
    if span is None:
        return axis
    axis["range"] = span
    if steps := _log_steps(*span):
        axis["tickvals"] = steps[:: math.ceil(len(steps) / _MOST_LOG_TICKS)]
    return axis


def _log_steps(lowest: float, highest: float) -> list[float]:
    """Round numbers whose logarithms lie between the two: 1, 2 and 5 times powers of 10, or the powers alone."""
    steps = (1, 2, 5) if highest - lowest < 1.5 else (1,)
    powers = range(max(_LEAST_POWER, math.floor(lowest)), min(-_LEAST_POWER, math.ceil(highest)) + 1)
    numbers = [step * 10.0**power for power in powers for step in steps]
    return [number for number in numbers if lowest - 1e-9 <= math.log10(number) <= highest + 1e-9]


def _log_range(values: pd.Series, most_decades: float) -> tuple[float, float] | None:
    """The logarithms that such an axis reaches from and to; None where no value is positive."""
    logs = np.log10(values[values > 0].astype(float))
    logs = logs[np.isfinite(logs)]
    if logs.empty:
        return None
    lowest = max(logs.min(), logs.max() - most_decades)
    margin = max(0.15, 0.05 * (logs.max() - lowest))
    return float(lowest - margin), float(logs.max() + margin)


def signed(values: Sequence[float], title: str) -> dict[str, Any]:
    """A colour axis for numbers with a sign: zero lies in its middle."""
    largest = float(np.nanmax(np.abs(values))) if np.size(values) else 0.0
    largest = largest if largest > 0 else 1.0
    return {"colorscale": SIGNED_SCALE, "cmin": -largest, "cmax": largest, "colorbar": bar_of(title)}


def listed(values: pd.Series) -> str:
    """The distinct values of a column in order, as a caption lists them; "" where all are null."""
    return ", ".join(map(str, sorted(values.dropna().unique().tolist())))


def seeds_of(rows: pd.DataFrame) -> str:
    """The seeds of some rows, as a caption tells them: "seed 0", "seeds 0, 1"; "" where none is told."""
    seeds = listed(rows["seed"])
    return f"{'seeds' if rows['seed'].nunique() > 1 else 'seed'} {seeds}" if seeds else ""


def number_of(rows: pd.DataFrame, column: str) -> str:
    """How many of something each row is a mean over, "64" or "16 to 64", by the column; "" where none is told."""
    told = rows[column].dropna() if column in rows else rows["value"].iloc[:0]
    return " to ".join(dict.fromkeys(f"{int(count):,}" for count in (told.min(), told.max()))) if len(told) else ""


def trials_of(rows: pd.DataFrame, of: str) -> str:
    """How many trials each number is of, as a caption tells it; "" where the rows do not tell. `of` is one number."""
    trials = number_of(rows, "trials")
    return f"n = {trials} trials for each {of}" if trials else ""


def joined(*parts: str, by: str = ", ") -> str:
    """Those parts of a caption that are not empty, one after the other."""
    return by.join(part for part in parts if part)


def styled(figure: go.Figure, title: str, label: str, caption: str) -> go.Figure:
    """Give a figure that `panels` made its title, its caption, the fonts of all, and every part its place.

    `figure.layout.meta` holds "title" and "caption" as plain text of one line, for pages that show them themselves.
    """
    text = f"{title}: {label}" if label else title
    figure.update_layout(
        template="plotly_white",
        meta={
            **figure.layout.meta,
            "title": text,
            "caption": caption,
            "names": [trace.name for trace in figure.data],
            "bars": _untitled_bars(figure),
        },
        font={"family": "system-ui, sans-serif", "size": 12},
        hoverlabel={"namelength": -1},
        autosize=True,
    )
    lay_out(figure, NARROW)
    return figure


def _untitled_bars(figure: go.Figure) -> dict[str, str]:
    """What the bar of each colour axis is called; taken from the bars, over which `lay_out` writes it."""
    bars = {}
    for axis in {trace.coloraxis for trace in figure.data if trace.type == "heatmap"} - {None}:
        bar = figure.layout[axis].colorbar
        bars[axis] = bar.title.text or ""
        bar.title.text = None
    return bars


def themed(figure: go.Figure, theme: str) -> go.Figure:
    """A copy for a page that is "light" or "dark"; raises KeyError for another theme.

    Nothing that a drawing sets has a colour of text or of the page, so that the template of plotly decides.
    """
    template = {"light": "plotly_white", "dark": "plotly_dark"}[theme]
    return go.Figure(figure).update_layout(template=template)
