"""Colours are told apart by the colour-blind, and show on light and dark pages."""

import json
from itertools import combinations

import numpy as np
import pytest

from rope_probe.gallery import figures as plots
from rope_probe.gallery.figures.style import GREY, PALETTE, SIGNED_SCALE, line_style, signed
from tests.gallery.test_figures_at_any_size import SMALL, drawn

MACHADO = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""Machado, Oliveira and Fernandes 2009, severity 1: linear RGB as the colour-blind see it."""
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
WHITE = [0.95047, 1.0, 1.08883]
LIGHT, DARK = "#ffffff", "#14171c"


def linear(colour):
    """Linear RGB of an sRGB colour as #rrggbb."""
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of linear RGB."""
    ratio = np.array(TO_XYZ) @ np.clip(rgb, 0, 1) / WHITE
    x, y, z = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(one, other, blindness):
    seen = [lab(np.array(MACHADO[blindness]) @ linear(colour)) for colour in (one, other)]
    return np.linalg.norm(seen[0] - seen[1])


def contrast(one, other):
    """WCAG's ratio of luminances."""
    low, high = sorted(float(np.array(TO_XYZ[1]) @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_the_formulas_are_right():
    assert lab(linear("#ffffff")) == pytest.approx([100, 0, 0], abs=0.02)
    assert lab(linear("#ff0000")) == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert distance("#ff0000", "#00a000", "deuteranopia") < 0.5 * distance("#ff0000", "#00a000", "none")


@pytest.mark.parametrize("blindness", MACHADO)
def test_lines_are_told_apart_by_the_colour_blind(blindness):
    first = [distance(*pair, blindness) for pair in combinations(PALETTE[:5], 2)]
    every = [distance(*pair, blindness) for pair in combinations(PALETTE, 2)]
    assert min(first) > 15  # 2.3 is the least that is seen at all
    assert min(every) > 14
    sides = [
        distance(*pair, blindness) for pair in combinations([c for _, c, _, _ in plots.propagation.SIDES.values()], 2)
    ]
    assert min(sides) > 15
    assert len({line_style(i) for i in range(21)}) == 21


@pytest.mark.parametrize("colour", [*PALETTE, GREY])
def test_colours_show_on_light_and_dark_pages(colour):
    assert contrast(colour, LIGHT) > 2.2
    assert contrast(colour, DARK) > 2.2


def colours_of(value):
    if isinstance(value, dict):
        return [found for key, inner in value.items() if key != "template" for found in colours_of(inner)]
    if isinstance(value, list):
        return [found for inner in value for found in colours_of(inner)]
    return [value] if isinstance(value, str) and value.startswith("#") and len(value) == 7 else []


@pytest.mark.parametrize("name", [drawing.name for drawing in plots.DRAWINGS])
def test_figures_have_no_colour_that_one_theme_hides(name):
    figure = drawn(name, SMALL)
    spec = json.loads(figure.to_json())
    colours = set(colours_of([trace | {"colorscale": None} for trace in spec["data"]]))
    colours |= set(colours_of({key: part for key, part in spec["layout"].items() if not key.startswith("coloraxis")}))
    assert all(contrast(colour, page) > 2.2 for colour in colours for page in (LIGHT, DARK)), colours
    assert "black" not in figure.to_json().split('"template"')[0]
    assert all(note.font.color is None for note in figure.layout.annotations)
    dark = plots.themed(figure, "dark")
    assert dark.layout.template.layout.paper_bgcolor != figure.layout.template.layout.paper_bgcolor


def test_scales_of_signed_numbers_are_centred_at_zero():
    axis = signed([-0.2, 0.1, np.nan], "score")
    assert (axis["cmin"], axis["cmax"], axis["colorscale"]) == (-0.2, 0.2, SIGNED_SCALE)
    assert (signed([], "score")["cmin"], signed([0.0], "score")["cmax"]) == (-1, 1)
