"""Figures as files for papers: SVG, PDF and PNG, by kaleido and a browser that is installed."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.layout import fitted

Format = Literal["svg", "pdf", "png"]
FORMATS: tuple[str, ...] = get_args(Format)
WIDTH = 1000
_OFFLINE = {"mathjax": False, "timeout": 300}
_SCALE = 2
"""Pixels of a PNG for one of the figure's."""


def save_figure(figure: go.Figure, path: str | os.PathLike[str], width: int = WIDTH) -> Path:
    """Write one figure as SVG, PDF or PNG, by the ending of `path`, laid out for `width` pixels across; returns it.

    Raises InputError for another ending, and where kaleido or a browser is missing.
    """
    return save_figures([(figure, path)], width)[0]


def save_figures(figures: Sequence[tuple[go.Figure, str | os.PathLike[str]]], width: int = WIDTH) -> list[Path]:
    """Write several figures, each to its path, with one start of the browser; otherwise as `save_figure`."""
    paths = [Path(path) for _, path in figures]
    for path in paths:
        if path.suffix.removeprefix(".") not in FORMATS:
            raise InputError(f"{str(path)!r} ends in none of {', '.join(FORMATS)}; give it one of these endings")
    if width < 1:
        raise InputError(f"a figure is {width} pixels wide; give it at least 1")
    kaleido = _kaleido()
    specs = [_spec(fitted(figure, width), path, width) for (figure, _), path in zip(figures, paths, strict=True)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        kaleido.write_fig_from_object_sync(specs, kopts=_OFFLINE)
    except kaleido.errors.ChromeNotFoundError as error:
        raise InputError(
            "static figures are drawn by a browser, and none was found; install Chromium or Chrome, or set "
            "BROWSER_PATH to one"
        ) from error
    except (kaleido.errors.BrowserFailedError, kaleido.errors.BrowserClosedError, TimeoutError) as error:
        raise InputError("the browser that draws static figures did not start; set BROWSER_PATH to another") from error
    return paths


def _kaleido() -> Any:
    try:
        import kaleido
        import kaleido.errors
    except ImportError as error:
        raise InputError("static figures need kaleido; install it with: pip install 'rope_probe[static]'") from error
    return kaleido


def _spec(figure: go.Figure, path: Path, width: int) -> dict[str, Any]:
    """One figure as kaleido takes it."""
    kind = path.suffix.removeprefix(".")
    size = {"width": width, "height": figure.layout.height or 450, "scale": _SCALE if kind == "png" else 1}
    return {"fig": figure.to_plotly_json(), "path": path, "opts": {"format": kind, **size}}
