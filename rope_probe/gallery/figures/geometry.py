"""How a phase uses the rotary spectrum: the turns that each pair makes over its window."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.layout import panels
from rope_probe.gallery.figures.style import (
    DASHES,
    GREY,
    PALETTE,
    SYMBOLS,
    drawing,
    in_short,
    joined,
    listed,
    seeds_of,
    styled,
    ticks_of,
)

_MOST_SPECTRA = 3
"""Of so many at the most the axis tells the wavelengths, of more the hover alone."""
_PHASE = ["model", "phase", "seq_len"]


def is_rotations(frame: pd.DataFrame) -> pd.Series:
    """Rows that `rotations_by_pair` draws as lines."""
    return (frame["metric"] == "rotations") & frame[["pair", "seq_len"]].notna().all(axis=1)


def is_spectrum_use(frame: pd.DataFrame) -> pd.Series:
    """Rows with the share of pairs that complete a turn."""
    return frame["metric"] == "spectrum_use"


@drawing
def rotations_by_pair(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Full turns of each rotary pair over the window of each phase, a line for each geometry that the models have.

    Models whose phase has the same window and wavelengths share a line. Colours tell the wavelengths apart, dashes and
    markers the phases and windows. Raises InputError where the frame has no rotations by pair.
    """
    frame = frame.assign(**{name: frame[name].fillna("") for name in ("model", "phase")})
    rows = frame[is_rotations(frame)]
    if rows.empty:
        raise InputError("these results hold no rotations by pair; record those of rope.rotations")
    use = frame[is_spectrum_use(frame)].groupby(_PHASE, dropna=False)["value"].first()
    lines: dict[tuple, list[tuple]] = {}
    for at, part in rows.groupby(_PHASE, dropna=False, sort=False):
        pairs = part.drop_duplicates("pair").sort_values("pair")
        line = (*at[1:], *(tuple(pairs[column]) for column in ("pair", "wavelength", "value")))
        lines.setdefault(line, []).append(at)
    phases = list(dict.fromkeys(line[:2] for line in lines))
    pairs_of = {line[3]: line[2] for line in sorted(lines, key=lambda line: line[3])}
    spectra = list(pairs_of)
    figure = panels([""], 380)
    ordered = sorted(lines.items(), key=lambda line: (phases.index(line[0][:2]), line[0][3]))
    for (phase, window, pairs, lengths, turns), shared in ordered:
        turning = f": {use[shared[0]] * len(pairs):.0f} of {len(pairs)} pairs turn" if shared[0] in use.index else ""
        models = "<br>".join(str(model) for model, *_ in shared)
        look = phases.index((phase, window)) % len(DASHES)
        figure.add_trace(
            go.Scatter(
                x=pairs,
                y=turns,
                name=f"{phase} phase, window {window:,}, {_spectrum(lengths)}{turning}",
                mode="lines+markers",
                line={"color": PALETTE[spectra.index(lengths) % len(PALETTE)], "dash": DASHES[look]},
                marker={"symbol": SYMBOLS[look], "size": 8},
                customdata=lengths,
                hovertemplate=f"pair %{{x}}, wavelength %{{customdata:,.4g}} tokens: %{{y:.3g}} turns<br>{models}",
            )
        )
    figure.add_hline(y=1, line={"color": GREY, "width": 1})
    at = {"x": 0.005, "xref": "paper", "xanchor": "left", "y": 0, "yanchor": "bottom", "showarrow": False}
    figure.add_annotation(text="one full turn", font={"size": 12}, **at)
    figure.update_xaxes(**_pair_axis(pairs_of), tickangle=0)
    figure.update_yaxes(type="log", title="full turns over the window", exponentformat="power", dtick=1)
    note = (
        f"turns over the window of each phase ({listed(rows['seq_len'])} tokens); a pair under the line does not "
        f"complete one there; {rows['model'].nunique()} models, those with the same window and wavelengths share a line"
    )
    note = joined(note, seeds_of(rows), by="; ")
    return styled(figure, "Rotations by pair", label, note)


def _pair_axis(pairs_of: Mapping[Sequence[float], Sequence[int]]) -> dict[str, Any]:
    """Ticks and title of an axis of pairs: each with its wavelength in every spectrum, where these are few."""
    pairs = sorted({pair for pairs in pairs_of.values() for pair in pairs})
    spectra = [dict(zip(pairs, lengths, strict=True)) for lengths, pairs in pairs_of.items()]
    if len(spectra) > _MOST_SPECTRA:
        spectra = []
    texts = {
        pair: "<br>".join([f"{pair}", *(in_short(one[pair]) if pd.notna(one.get(pair)) else "-" for one in spectra)])
        for pair in pairs
    }
    title = "rotary pair, 0 fastest"
    if len(spectra) == 1:
        title += "<br>its wavelength in tokens"
    elif spectra:
        title += f"<br>its wavelength in tokens:<br>{'<br>'.join(map(_spectrum, pairs_of))}"
    return {**ticks_of(texts), "title": title}


def _spectrum(wavelengths: Sequence[float]) -> str:
    """The theta that gives these wavelengths, 2 pi theta^(p/P); the slowest pair's where no theta does."""
    steps = np.diff(np.log(wavelengths))
    if len(steps) and np.isclose(wavelengths[0], 2 * np.pi) and np.allclose(steps, steps[0], rtol=1e-3):
        theta = np.exp(steps.mean() * len(wavelengths))
        return f"theta {float(f'{theta:.4g}'):,g}"
    return f"slowest pair {float(f'{wavelengths[-1]:.4g}'):,g} tokens"
