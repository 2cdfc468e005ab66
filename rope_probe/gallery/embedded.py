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

from rope_probe.gallery.figures.layout import fitted

NARROW, WIDE = 340, 600
"""Pixels across that a figure has at the least: on a telephone, and elsewhere, where two stand side by side."""
_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_FLOAT32 = np.finfo(np.float32)
_HEIGHT = 450
_INK = {"light": ("#1d2430", "#dfe3e8", "#8a94a3"), "dark": ("#e6e9ef", "#343b47", "#8a94a3")}
"""Of each theme: the colour of text, of grid lines, and of axes."""


@dataclass(frozen=True)
class Embedded:
    """A figure as a page shows it: its JSON, its heights in pixels, its title and caption as plain text."""

    data: Markup
    height: int
    narrow_height: int
    title: str
    caption: str
    is_wide: bool
    """Whether panels stand side by side in it, so that it needs the width of the page."""


def embedded(figure: go.Figure) -> Embedded:
    """A figure as it is embedded, with a layout for each width. The figure itself stays as it is."""
    meta = figure.layout.meta if isinstance(figure.layout.meta, dict) else {}
    title = meta.get("title") or (figure.layout.title.text if figure.layout.title else "") or ""
    wide, narrow = (laid_out(figure, width) for width in (WIDE, NARROW))
    text = as_json({
        "data": [_compact(trace) for trace in wide["data"]],
        "wide": {"layout": _compact(wide["layout"]), "names": _names(wide)},
        "narrow": {"layout": _compact(narrow["layout"]), "names": _names(narrow)},
    })  # fmt: skip
    return Embedded(
        Markup(text),
        int(wide["layout"]["height"]),
        int(narrow["layout"]["height"]),
        _plain(str(title)),
        _plain(str(meta.get("caption") or "")),
        meta.get("columns", 1) > 1,
    )


def laid_out(figure: go.Figure, width: int) -> dict[str, Any]:
    """The figure in plotly's JSON, for so many pixels and more, without what the page says or decides."""
    spec = json.loads(fitted(figure, width, words=False).to_json(validate=False))
    layout = spec["layout"]
    for key in ("template", "title", "width", "meta"):
        layout.pop(key, None)
    if "orientation" not in layout.get("legend", {}) and isinstance(figure.layout.meta, dict):
        layout["showlegend"] = False  # a layout without room for one
    spec["layout"] = {"height": _HEIGHT} | layout | {"autosize": True}
    return spec


def _names(spec: Mapping[str, Any]) -> list[str | None]:
    """What each trace is called, in lines for this layout."""
    return [trace.get("name") for trace in spec["data"]]


def as_json(value: Any) -> str:
    """JSON that stays inside a script element whatever its strings say."""
    text = json.dumps(value, separators=(",", ":"))
    return text.translate({ord(character): escape for character, escape in _ESCAPED.items()})


def plotly_script() -> str:
    """The plotly script that all pages of a gallery share."""
    return get_plotlyjs()


def _plain(text: str) -> str:
    """What plotly shows for a text, as plain text."""
    return html.unescape(text.replace("<br>", " "))


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
