"""Where the parts of a figure lie, in pixels, so that none covers another at any width from NARROW on.

From top to bottom: the title, the panels row by row, the legend, the colour bars, the caption. Heights and margins are
computed from the text; only the panels grow with the page. Text is wrapped for the width that a figure is fitted to,
and holds at every larger one. Widths of letters are those of a wide font (DejaVu Sans), so that others fit too.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rope_probe.gallery.figures.letters import letters_of

NARROW = 390
"""Pixels of the narrowest page that a figure holds on: a telephone."""
ROOM = 230
"""Pixels across that a panel has for its ticks, alone in its row, on the page of a gallery on a telephone."""
TITLE, PANEL, TEXT = 16, 13, 12
"""Font sizes in pixels."""
_LINE = 1.3
"""Height of a line of text over its font size; plotly's own."""
_EDGE = 10
_TICK_GAP = 6
_STANDOFF = 4
"""Pixels between an x axis and its ticks' texts, so that they keep off those of the y axis."""
_NUMBER = 50
"""Pixels that the numbers along an axis take at most."""
_BAR = 12
_MARK = 40
"""Pixels across of a legend's line and what surrounds an entry."""
_MOST_LEGEND = 420
_GREY = "#9a9a9a"
"""What holds no number, light enough on a dark page and dark enough on a light one."""
_ENDS = "-/_,"
_EM = {"ijl.,:;'|!()[]ft-/ r": 0.42, "mwMW@%…—": 1.0, "0123456789": 0.65}
_EM_OF = {letter: em for letters, em in _EM.items() for letter in letters}


def text_width(text: str, size: float = TEXT) -> float:
    """Pixels that the longest line of a text takes; lines are parted by `<br>`."""
    return max(sum(_em(letter) for letter in letters_of(line)) for line in text.split("<br>")) * size


def _em(letter: str) -> float:
    """The width of a letter over its font size."""
    if letter in _EM_OF:
        return _EM_OF[letter]
    if unicodedata.east_asian_width(letter[0]) in "WF":
        return 1.05
    return 0.8 if letter.isupper() or len(letter) > 1 or ord(letter) > 0x24F else 0.65


def wrapped(text: str, width: float, size: float = TEXT) -> str:
    """The text in lines of at most so many pixels, broken after words, else after hyphens and the like, else inside."""
    lines, line = [], ""
    for word in text.split():
        for i, piece in enumerate(_pieces(word, width, size)):
            longer = f"{line}{'' if i else ' '}{piece}" if line else piece
            if line and text_width(longer, size) > width:
                lines.append(line)
                line = piece
            else:
                line = longer
    return "<br>".join([*lines, line])


def _pieces(word: str, width: float, size: float) -> Iterator[str]:
    """A word in pieces that each fit into a line, the ends of its parts where they do."""
    piece, letters = "", letters_of(word)
    for letter, following in zip(letters, [*letters[1:], ""], strict=True):
        piece += letter
        is_end = letter in _ENDS and not (letter == "," and following.isdigit())  # no number is cut in two
        if is_end or text_width(piece + following, size) > width:
            yield piece
            piece = ""
    if piece:
        yield piece


def lines_of(text: str) -> int:
    """How many lines a text has; none where it is empty."""
    return text.count("<br>") + 1 if text else 0


def roomy(
    values: Sequence[Any], texts: Sequence[str], places: Sequence[float] | np.ndarray, room: float = ROOM
) -> list[Any]:
    """Those of the values whose texts do not touch along an axis of so many pixels; the first and the last are kept.

    `places` say where along the axis the values are, in any unit and in order.
    """
    if len(values) < 2 or places[-1] == places[0]:
        return list(values[:1])
    at = (np.asarray(places, dtype=float) - places[0]) / (places[-1] - places[0]) * room
    half = [text_width(text) / 2 + 3 for text in texts]
    last = len(values) - 1
    kept = [0]
    for i in range(1, last):
        free_before = at[i] - half[i] >= at[kept[-1]] + half[kept[-1]]
        if free_before and at[i] + half[i] <= at[last] - half[last]:
            kept.append(i)
    return [values[i] for i in [*kept, last]]


def panels(
    titles: Sequence[str],
    height: int | Sequence[int],
    columns: int = 1,
    *,
    headroom: int = 0,
    shared: bool = False,
) -> go.Figure:
    """An empty figure of panels, row by row; panel k has the axes x{k + 1} and y{k + 1}, and row and column as usual.

    `height` is that of each row, in pixels, or of all of them; `headroom` is kept above each panel for `mark_at`. With
    `shared`, the panels of a column have one x axis: its ticks are under the last of them, the headroom over the first.
    """
    rows = -(-len(titles) // columns)
    heights = [height] * rows if isinstance(height, int) else list(height)
    free = rows * columns - len(titles)
    specs: list[list[dict | None]] = [[{} for _ in range(columns)] for _ in range(rows)]
    if free:
        specs[-1][-free:] = [None] * free
    figure = make_subplots(rows=rows, cols=columns, specs=specs)
    plan = {"heights": heights, "columns": columns, "panels": list(titles), "headroom": headroom, "shared": shared}
    figure.update_layout(meta=plan)
    for k, title in enumerate(titles, start=1):
        if title:
            figure.add_annotation(
                name="panel",
                text=title,
                xref=f"{_axis('x', k)} domain",
                yref=f"{_axis('y', k)} domain",
                x=0,
                y=1,
                xanchor="left",
                yanchor="bottom",
                yshift=2 + (headroom if not shared or k <= columns else 0),
                align="left",
                showarrow=False,
                font={"size": PANEL},
            )
    return figure


def _axis(letter: str, k: int) -> str:
    return letter if k == 1 else f"{letter}{k}"


def missing_is_grey(figure: go.Figure) -> None:
    """Lay grey under every panel of a map: what has no number is grey in every theme."""
    for k in range(1, len(figure.layout.meta["panels"]) + 1):
        refs = {"xref": f"{_axis('x', k)} domain", "yref": f"{_axis('y', k)} domain"}
        whole = {"x0": 0, "x1": 1, "y0": 0, "y1": 1}
        figure.add_shape(
            type="rect", **refs, **whole, layer="below", fillcolor=_GREY, line={"width": 0}, name="missing"
        )


def mark_at(
    figure: go.Figure, k: int, place: float, text: str, line: int, *, share: float, dash: str = "dot", colour: str
) -> None:
    """A vertical line in panel k, with its text above the panel in one of the lines that `headroom` keeps.

    `place` is in the axis's own coordinates: the logarithm, on an axis that is logarithmic already. `share` says how
    far along the panel that is, from 0 to 1: in the right half the text ends at the line, in the left one it begins
    there, so that none leaves the panel.
    """
    axis = getattr(figure.layout, f"xaxis{'' if k == 1 else k}")
    at = round(10**place, 6) if axis.type == "log" else place
    refs = {"xref": _axis("x", k), "yref": f"{_axis('y', k)} domain"}
    style = {"color": colour, "width": 2, "dash": dash}
    figure.add_shape(type="line", **refs, x0=at, x1=at, y0=0, y1=1, line=style, name="mark")
    if not text:
        return
    anchor = "right" if share > 0.5 else "left"
    text = f"{text} ▾" if share > 0.5 else f"▾ {text}"
    figure.add_annotation(
        name="mark",
        **refs,
        x=place,
        y=1,
        yshift=2 + line * round(TEXT * _LINE),
        xanchor=anchor,
        yanchor="bottom",
        text=text,
        showarrow=False,
        font={"size": 11},
    )


def headroom_for(lines: int) -> int:
    """Pixels above a panel for so many lines of `mark_at`."""
    return lines * round(TEXT * _LINE) + (2 if lines else 0)


def mark_layers(figure: go.Figure, k: int, at: str, places: Sequence[float]) -> None:
    """A bar at the far edge of panel k beside each of these layers, which lie along its `at` axis, "x" or "y"."""
    along, across = (at, "y" if at == "x" else "x")
    refs = {f"{along}ref": _axis(along, k), f"{across}ref": f"{_axis(across, k)} domain"}
    edges = {f"{across}0": 1.0, f"{across}1": 1.02 if at == "y" else 1.03}
    for first, last in _runs(places):
        ends = {f"{along}0": first - 0.5, f"{along}1": last + 0.5}
        figure.add_shape(
            type="rect", **refs, **edges, **ends, fillcolor="#d55e00", line={"width": 0}, name="global layer"
        )


def _runs(places: Sequence[float]) -> list[tuple[float, float]]:
    """First and last of each run of neighbours."""
    runs: list[tuple[float, float]] = []
    for place in sorted(places):
        if runs and place - runs[-1][1] <= 1:
            runs[-1] = (runs[-1][0], place)
        else:
            runs.append((place, place))
    return runs


def fitted(figure: go.Figure, width: int = NARROW, *, words: bool = True) -> go.Figure:
    """A copy of a drawn figure, laid out anew for a page of so many pixels; it holds on every wider one.

    Without `words` it has neither title nor caption nor room for them: for pages that show those of
    `figure.layout.meta` themselves. A figure that was not made by `panels` is copied as it is.
    """
    copied = go.Figure(figure)
    if isinstance(copied.layout.meta, dict) and "heights" in copied.layout.meta:
        lay_out(copied, width, words=words)
    return copied


def lay_out(figure: go.Figure, width: int, *, words: bool = True) -> None:
    """Give every part of the figure its place, for a page of so many pixels."""
    layout = figure.layout
    plan = layout.meta
    titles, columns, heights = plan["panels"], plan["columns"], plan["heights"]
    rows = len(heights)
    inner_width = width - 2 * _EDGE
    title = wrapped(plan["title"], inner_width, TITLE) if words else ""
    caption = wrapped(plan["caption"], inner_width, TEXT) if words else ""

    # across: margins, and the gaps between columns
    axes = [(layout[f"xaxis{'' if k == 1 else k}"], layout[f"yaxis{'' if k == 1 else k}"]) for k in
            range(1, len(titles) + 1)]  # fmt: skip
    if plan["shared"]:
        _share(axes, columns)
    left_of = [0.0] * columns
    for k, (_, y) in enumerate(axes):
        left_of[k % columns] = max(left_of[k % columns], _room_left(figure, k + 1, y))
    overhang = max(_half_of_last(figure, k + 1, x) for k, (x, _) in enumerate(axes))
    left, right = round(_EDGE + left_of[0]), round(max(22.0, overhang + 8))
    inside = width - left - right
    gaps = [max(room, overhang) + overhang + 6 for room in left_of[1:]]
    panel_width = (inside - sum(gaps)) / columns
    starts = [sum(gaps[:column]) + panel_width * column for column in range(columns)]

    # down: what is above and below each row
    above, below = [], []
    for row in range(rows):
        mine = range(row * columns, min(len(titles), (row + 1) * columns))
        texts = [wrapped(titles[k], panel_width, PANEL) if titles[k] else "" for k in mine]
        headroom = 0 if plan["shared"] and row else plan["headroom"]
        above.append(headroom + max(map(lines_of, texts)) * PANEL * _LINE + 6)
        below.append(max(_room_below(figure, k + 1, axes[k][0]) for k in mine))
    inside_height = sum(heights) + sum(above[1:]) + sum(below[:-1])
    legend_height = _lay_legend(figure, inner_width, inside)
    bars = _bars(figure)
    bars_height = sum(height for _, height in bars)
    caption_height = lines_of(caption) * TEXT * _LINE + (8 if caption else 0)
    top = round((_EDGE + lines_of(title) * TITLE * _LINE + 6 if title else 4) + above[0])
    bottom = round(below[-1] + legend_height + bars_height + caption_height + 6)
    height = round(top + inside_height + bottom)

    offset = 0.0
    for row in range(rows):
        ends = (1 - (offset + heights[row]) / inside_height, 1 - offset / inside_height)
        for k in range(row * columns, min(len(titles), (row + 1) * columns)):
            start = starts[k % columns] / inside
            axes[k][0].domain = (_clipped(start), _clipped(start + panel_width / inside))
            axes[k][1].domain = tuple(map(_clipped, ends))
        offset += heights[row] + below[row] + (above[row + 1] if row + 1 < rows else 0)

    notes = [note for note in layout.annotations if note.name not in ("bar", "caption")]
    for note, text in zip((n for n in notes if n.name == "panel"), filter(None, titles), strict=True):
        note.text = wrapped(text, panel_width, PANEL)
    at = bottom - below[-1]  # pixels above the lower edge, from the legend on down
    layout.legend.update(y=at / height, maxheight=max(30, legend_height))
    at -= legend_height
    for name, bar_height in bars:
        notes.append(_line_of_text("bar", plan["bars"][name], 0, at - bottom))
        at -= TEXT * _LINE + 4
        layout[name].colorbar.update(y=(at - bottom) / inside_height)
        at -= bar_height - TEXT * _LINE - 4
    if caption:
        notes.append(_line_of_text("caption", caption, _EDGE - left, at - bottom - 2))
    layout.annotations = notes
    layout.title = {
        "text": title,
        "x": 0,
        "xref": "container",
        "xanchor": "left",
        "y": 1,
        "yref": "container",
        "yanchor": "top",
        "pad": {"t": _EDGE + TITLE - 1, "l": _EDGE},
        "font": {"size": TITLE},
        "automargin": False,
    }
    layout.update(height=height, margin={"t": top, "b": bottom, "l": left, "r": right, "autoexpand": False, "pad": 0})


def _line_of_text(name: str, text: str, right: float, up: float) -> go.layout.Annotation:
    """Text that begins so many pixels right of the lower left corner of the panels, and above it."""
    corner = {"xref": "paper", "yref": "paper", "x": 0, "y": 0, "xanchor": "left", "yanchor": "top"}
    look = {"align": "left", "showarrow": False, "font": {"size": TEXT}, "borderpad": 0}
    return go.layout.Annotation(name=name, text=text, xshift=right, yshift=up, **corner, **look)


def _clipped(share: float) -> float:
    return min(1.0, max(0.0, share))


def _share(axes: Sequence[tuple[Any, Any]], columns: int) -> None:
    """Panels of one column move together, with ticks under the last of them."""
    for k, (x, _) in enumerate(axes):
        if k + columns < len(axes):
            x.update(showticklabels=False, title={"text": ""})
        if k >= columns:
            x.matches = _axis("x", k % columns + 1)


def _labels(figure: go.Figure, k: int, axis: Any, letter: str) -> list[str] | None:
    """The texts along an axis, where they are known beforehand; None for numbers that plotly picks."""
    if axis.showticklabels is False:
        return []
    if axis.ticktext is not None:
        return [str(text) for text in axis.ticktext]
    if axis.tickvals is not None:
        return [f"{value:g}" if isinstance(value, (int, float)) else str(value) for value in axis.tickvals]
    if axis.type == "category":
        mine = [trace for trace in figure.data if (trace[f"{letter}axis"] or letter) == _axis(letter, k)]
        return [str(value) for trace in mine for value in (() if trace[letter] is None else trace[letter])]
    return None


def _room_left(figure: go.Figure, k: int, axis: Any) -> float:
    """Pixels that the ticks and the title of a y axis take."""
    labels = _labels(figure, k, axis, "y")
    ticks = _NUMBER if labels is None else max((text_width(text) for text in labels), default=0.0)
    title = lines_of(axis.title.text or "") * TEXT * _LINE
    axis.update(automargin=False, title={"standoff": round(ticks + _TICK_GAP)})
    axis.title.standoff = None  # plotly keeps it beside the ticks by itself
    return ticks + (_TICK_GAP if ticks else 0) + (title + _TICK_GAP if title else 0)


def _room_below(figure: go.Figure, k: int, axis: Any) -> float:
    """Pixels that the ticks and the title of an x axis take."""
    labels = _labels(figure, k, axis, "x")
    if labels is None:
        ticks = TEXT * _LINE
    elif not labels:
        ticks = 0.0
    elif axis.tickangle in (90, -90):
        ticks = max(map(text_width, labels))
    else:
        ticks = max(map(lines_of, labels)) * TEXT * _LINE
    title = lines_of(axis.title.text or "") * TEXT * _LINE
    axis.update(automargin=False, ticklabelstandoff=_STANDOFF, title={"standoff": 4})
    return ticks + (_TICK_GAP + _STANDOFF if ticks else 0) + (title + _TICK_GAP if title else 0) + 4


def _half_of_last(figure: go.Figure, k: int, axis: Any) -> float:
    """How far the last text along an x axis may stand out to the right of its panel."""
    labels = _labels(figure, k, axis, "x")
    if labels is None:
        return 14.0
    if not labels or axis.tickangle in (90, -90):
        return 8.0
    return text_width(labels[-1]) / 2


def _lay_legend(figure: go.Figure, width: float, inside: float) -> float:
    """Wrap what the legend lists, and return how high it is on a page of this width, with so much for the plots."""
    named = [trace for trace in figure.data if trace.name is not None and trace.showlegend is not False
             and trace.type not in ("heatmap",)]  # fmt: skip
    if figure.layout.showlegend is False or (len(named) < 2 and figure.layout.showlegend is not True
                                             and not any(trace.showlegend for trace in named)):  # fmt: skip
        return 0.0
    names = figure.layout.meta["names"]
    for trace, name in zip(figure.data, names, strict=True):
        if name is not None:
            trace.name = wrapped(name, width - _MARK - 4)
    widest = max(text_width(trace.name) for trace in named) + _MARK
    across = max(1, int(inside // widest))  # plotly makes rows as wide as the plots
    heights = [max(19.0, lines_of(trace.name) * TEXT * _LINE + 4) for trace in named]
    lines = [max(heights[i : i + across]) for i in range(0, len(heights), across)]
    figure.update_layout(
        legend={
            "orientation": "h",
            "traceorder": "normal",
            "tracegroupgap": 0,
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "yref": "container",
            "yanchor": "top",
            "bgcolor": "rgba(0,0,0,0)",
            "font": {"size": TEXT},
        }
    )
    return min(_MOST_LEGEND, sum(lines) + 10)


def _bars(figure: go.Figure) -> list[tuple[str, float]]:
    """Each colour axis that traces have, with the pixels down that its bar takes."""
    used = {trace.coloraxis for trace in figure.data if trace.type == "heatmap"} - {None}
    bars = []
    for name in sorted(used, key=lambda name: int(name.removeprefix("coloraxis") or 1)):
        bar = figure.layout[name].colorbar
        bar.update(
            orientation="h",
            x=0,
            xref="paper",
            xanchor="left",
            xpad=0,
            yref="paper",
            yanchor="top",
            ypad=0,
            len=1,
            thickness=_BAR,
            thicknessmode="pixels",
            outlinewidth=0,
            tickfont={"size": TEXT},
            tickangle=0,
        )
        bars.append((name, TEXT * _LINE + 4 + _BAR + TEXT * _LINE + 14))
    return bars


def even(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the values, evenly spaced from the first on."""
    return list(values[:: max(1, -(-len(values) // max(1, most)))])
