"""Plotly figures as a page of the gallery embeds them: JSON that cannot end its script element, without what HTML says.

Title and caption of a figure stand beside it as text, so they are taken out of the picture, and so is the template:
a page has a light and a dark one, which its script puts in.
"""

import base64
import copy
import html
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from markupsafe import Markup
from plotly.offline import get_plotlyjs

CAPTION = "caption"
"""The name of the annotation that a figure's caption is, and its key in `layout.meta`."""
_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_FLOAT32 = np.finfo(np.float32)
_ROOM_FOR_TITLE, _ROOM_FOR_CAPTION = 50, 12
_LOWEST = 260
_INK = {"light": ("#1d2430", "#dfe3e8", "#8a94a3"), "dark": ("#e6e9ef", "#343b47", "#8a94a3")}
"""Of each theme: the colour of text, of grid lines, and of axes."""


@dataclass(frozen=True)
class Embedded:
    """A figure as a page shows it: its JSON, its height in pixels, its title and caption as plain text."""

    data: Markup
    height: int
    title: str
    caption: str
    is_wide: bool
    """Whether panels stand side by side in it, so that it needs the width of the page."""


def embedded(figure: go.Figure) -> Embedded:
    """A figure as it is embedded. The figure itself stays as it is."""
    title = (figure.layout.title.text or "") if figure.layout.title else ""
    spec = json.loads(figure.to_json(validate=False))
    layout = spec["layout"]
    meta = layout.get("meta") if isinstance(layout.get("meta"), dict) else {}
    height = int(layout.get("height") or 450)
    margin = {"t": 60, "b": 60, "l": 70, "r": 30} | layout.get("margin", {})
    captions = [note for note in layout.get("annotations", []) if note.get("name") == CAPTION]
    layout["annotations"] = [note for note in layout.get("annotations", []) if note.get("name") != CAPTION]
    for note in captions:
        below = max(-note.get("yshift", 0), 0) + _ROOM_FOR_CAPTION
        freed = max(margin["b"] - below, 0)
        height, margin["b"] = height - freed, margin["b"] - freed
    if title:
        freed = min(_ROOM_FOR_TITLE, max(margin["t"] - 30, 0))
        height, margin["t"] = height - freed, margin["t"] - freed
    for key in ("template", "title", "width"):
        layout.pop(key, None)
    height = max(height, _LOWEST)
    layout |= {"height": height, "margin": margin, "autosize": True}
    caption = meta.get("caption") or "; ".join(note.get("text", "") for note in captions)
    text = as_json({"data": [_compact(trace) for trace in spec["data"]], "layout": _compact(layout)})
    return Embedded(
        Markup(text), height, _plain(str(meta.get("title") or title)), _plain(str(caption)), _is_wide(layout)
    )


def _plain(text: str) -> str:
    """What plotly shows for a text, as plain text."""
    return html.unescape(text.replace("<br>", " "))


def as_json(value: Any) -> str:
    """JSON that stays inside a script element whatever its strings say."""
    text = json.dumps(value, separators=(",", ":"))
    return text.translate({ord(character): escape for character, escape in _ESCAPED.items()})


def plotly_script() -> str:
    """The plotly script that all pages of a gallery share."""
    return get_plotlyjs()


def templates() -> dict[str, dict[str, Any]]:
    """The light and the dark template, on the page's own background."""
    made = {}
    for theme, base in (("light", "plotly_white"), ("dark", "plotly_dark")):
        template = copy.deepcopy(pio.templates[base]).to_plotly_json()
        ink, grid, axis = _INK[theme]
        clear = "rgba(0,0,0,0)"
        template["layout"] |= {"paper_bgcolor": clear, "plot_bgcolor": clear}
        template["layout"]["font"] = {"color": ink, "family": "system-ui, sans-serif", "size": 14}
        template["layout"]["annotationdefaults"] = {"font": {"color": ink}}
        for name in ("xaxis", "yaxis"):
            template["layout"][name] = template["layout"].get(name, {}) | {
                "gridcolor": grid,
                "zerolinecolor": grid,
                "linecolor": axis,
            }
        made[theme] = template
    return made


def _is_wide(layout: Mapping[str, Any]) -> bool:
    """Whether there are panels side by side: x axes that begin at different places."""
    axes = [axis for name, axis in layout.items() if name.startswith("xaxis") and isinstance(axis, dict)]
    starts = {round(axis.get("domain", [0.0])[0], 2) for axis in axes}
    return len(starts) > 1


def _compact(value: Any) -> Any:
    """The same with arrays of float64 in float32 where these have room for them: what a screen can show."""
    if isinstance(value, list):
        return [_compact(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("dtype") == "f8" and isinstance(value.get("bdata"), str):
        return _in_float32(value)
    return {key: _compact(item) for key, item in value.items()}


def _in_float32(stored: dict[str, Any]) -> dict[str, Any]:
    array = np.frombuffer(base64.b64decode(stored["bdata"]), dtype="<f8")
    sizes = np.abs(array[np.isfinite(array) & (array != 0)])
    if sizes.size and (sizes.max() > _FLOAT32.max or sizes.min() < _FLOAT32.tiny):
        return stored
    return {**stored, "dtype": "f4", "bdata": base64.b64encode(array.astype("<f4").tobytes()).decode()}
