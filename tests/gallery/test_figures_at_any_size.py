"""Every drawing holds from 2 layers, 2 heads and 8 pairs to 80, 128 and 128, on a telephone and on a wide page."""

import json
import re
from functools import cache

import pytest

from rope_probe.gallery import embedded
from rope_probe.gallery import figures as plots
from rope_probe.gallery.figures.layout import NARROW, fitted, roomy, text_width, wrapped
from rope_probe.gallery.figures.letters import letters_of
from tests.gallery import browser
from tests.gallery.sized import LONG_NAME, frame_for

SMALL, SMOLLM, LARGE = (2, 2, 8), (30, 9, 32), (80, 128, 128)
WIDE = 1100
HIGHEST = 1600
_MOST_TICKS = 45
_WEIGHTS = {"head_pairs", "massive_map", "span_heatmap", "span_heads"}
"""Their tables have a row for each pair of each head: at the largest size, of eight heads here."""
_TOLD_BY_THE_PANELS = {"transplants", "retrieval_map", "trade_off", "trace_cost"}
"""Axes or titles of panels tell their windows."""
_WITHOUT_A_KEY = {"theta_grid", "passkey_by_intervention"}
"""Drawings of one kind of mark, which need neither a legend nor a colour bar."""
FIRST_DRAWINGS = list(plots.DRAWINGS)


@cache
def drawn(name, size):
    """A drawing of a model of this size, under a name of 64 letters."""
    (drawing,) = [one for one in plots.DRAWINGS if one.name == name]
    layers, heads, pairs = size
    heads = min(heads, 8) if name in _WEIGHTS and size == LARGE else heads
    return drawing.draw(frame_for(name, layers, heads, pairs), LONG_NAME)


def axes_of(figure):
    return [*figure.select_xaxes(), *figure.select_yaxes()]


@pytest.mark.parametrize("size", [SMALL, SMOLLM, LARGE], ids=str)
@pytest.mark.parametrize("name", [drawing.name for drawing in FIRST_DRAWINGS])
def test_heights_ticks_and_margins_hold_at_any_size(name, size):
    figure = drawn(name, size)
    layout = figure.layout
    assert len(LONG_NAME) >= 60
    assert layout.width is None
    assert layout.height <= HIGHEST
    assert all(len(axis.tickvals) <= _MOST_TICKS for axis in axes_of(figure) if axis.tickvals is not None)
    assert layout.margin.autoexpand is False
    (caption,) = [note for note in layout.annotations if note.name == "caption"]
    assert "".join(caption.text.replace("<br>", " ").split()) == "".join(layout.meta["caption"].split())
    lines = caption.text.count("<br>") + 1
    assert -caption.yshift + lines * 12 * 1.3 <= layout.margin.b
    assert all(text_width(line) <= NARROW - 20 for line in caption.text.split("<br>"))
    assert all(text_width(line, 16) <= NARROW - 20 for line in layout.title.text.split("<br>"))
    assert layout.meta["title"].endswith(LONG_NAME) or "…" in layout.meta["title"]
    assert NARROW - layout.margin.l - layout.margin.r > 150  # what is left for the plots


@pytest.mark.parametrize("name", [drawing.name for drawing in FIRST_DRAWINGS])
def test_captions_say_what_a_figure_is_a_sample_of(name):
    """Seeds and n, each where the rows have it."""
    caption = drawn(name, SMOLLM).layout.meta["caption"]
    (drawing,) = [one for one in FIRST_DRAWINGS if one.name == name]
    frame = frame_for(name, *SMOLLM)
    rows = frame[drawing.rows(frame)]
    seeds = [f"{seed}" for seed in sorted(rows["seed"].dropna().unique())]
    if name != "trace_cost":  # a time has no seed
        assert f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(seeds)}" in caption
    for column in ("trials", "queries"):
        if column in rows and rows[column].notna().any():
            assert re.search(rf"\d {column}", caption), column
    for column, what in (("document", "document"), ("seq_len", "window")):
        if column in rows and rows[column].notna().any() and name not in _TOLD_BY_THE_PANELS:
            assert what in caption, column
    assert rows["seed"].nunique() > 1 or "seeds" not in caption


@pytest.mark.parametrize("name", ["copy_heatmap", "dose_response", "layer_effects", "head_effects",
                                  "injected_by_read", "lens_by_layer", "sensitivity_by_pair"])  # fmt: skip
def test_captions_tell_the_noise_floor(name):
    assert "noise floor" in drawn(name, SMOLLM).layout.meta["caption"]


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs the browser chromium")
@pytest.mark.parametrize("size", [SMOLLM, LARGE], ids=str)
def test_nothing_covers_anything_in_a_browser(size, tmp_path):
    figures = {drawing.name: json.loads(drawn(drawing.name, size).to_json()) for drawing in FIRST_DRAWINGS}
    found = browser.parts_of(figures, (NARROW, WIDE), tmp_path)
    assert len(found) == 2 * len(figures)
    for name, one in found.items():
        kinds = {part["kind"] for part in one["parts"]}
        assert {"title", "caption", "plot", "tick"} <= kinds, name
        assert kinds & {"legend", "colour bar"} or name.split("@")[0] in _WITHOUT_A_KEY, name
        assert "scrollbar" not in kinds, name
    assert {name: faults for name, one in found.items() if (faults := browser.collisions(one))} == {}


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs the browser chromium")
@pytest.mark.parametrize("size", [SMOLLM, LARGE], ids=str)
def test_nothing_covers_anything_in_the_layouts_of_a_gallery(size, tmp_path):
    found = {}
    for width, shown_at in ((embedded.NARROW, 350), (embedded.WIDE, embedded.WIDE)):
        figures = {one.name: embedded.laid_out(drawn(one.name, size), width) for one in FIRST_DRAWINGS}
        found |= browser.parts_of(figures, (shown_at,), tmp_path)
    assert len(found) == 2 * len(FIRST_DRAWINGS)
    assert {name: faults for name, one in found.items() if (faults := browser.collisions(one))} == {}


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs the browser chromium")
def test_the_browser_finds_what_covers_something(tmp_path):
    figure = fitted(drawn("head_effects", SMALL))
    moved = figure.layout.annotations[-1]
    assert moved.name == "caption"
    moved.update(yshift=100, xshift=0)
    figure.layout.annotations[0].update(x=2)
    faults = " ".join(
        browser.collisions(browser.parts_of({"a": json.loads(figure.to_json())}, (NARROW,), tmp_path)["a@390"])
    )
    assert "lies over" in faults
    assert "is outside" in faults


def test_a_figure_is_fitted_to_a_width_and_stays_as_it_was():
    figure = drawn("dose_response", SMOLLM)
    before = figure.to_json()
    wide = fitted(figure, WIDE)
    assert figure.to_json() == before
    assert wide.layout.title.text.count("<br>") < figure.layout.title.text.count("<br>")
    assert wide.layout.height < figure.layout.height
    assert json.loads(fitted(wide, NARROW).to_json()) == json.loads(
        before
    )  # what was wrapped is wrapped anew, and no more
    bare = fitted(figure, words=False)
    assert "caption" not in {note.name for note in bare.layout.annotations}
    assert not bare.layout.title.text
    assert bare.layout.height < figure.layout.height
    assert bare.layout.meta["caption"] == figure.layout.meta["caption"]


def test_text_is_wrapped_after_words_then_hyphens_then_anywhere():
    assert wrapped("one two", 1e6) == "one two"
    assert wrapped("one two", 1.2 * text_width("one")) == "one<br>two"
    assert wrapped("one-two", 1.2 * text_width("one-")) == "one-<br>two"
    assert wrapped("theta 10,000", 1.2 * text_width("theta 10,")) == "theta<br>10,000"
    letters = wrapped("x" * 50, 100).split("<br>")
    assert "".join(letters) == "x" * 50
    assert max(map(text_width, letters)) <= 100
    assert wrapped("&lt;" * 30, 100).replace("<br>", "") == "&lt;" * 30  # no entity is cut in two
    assert letters_of("a&lt;b") == ["a", "&lt;", "b"]


def test_ticks_that_would_touch_are_left_out_but_for_the_ends():
    values = [1, 2, 3, 4, 100]
    assert roomy(values, [f"{value}" for value in values], values, 1500) == [1, 2, 3, 4, 100]
    assert roomy(values, [f"{value}" for value in values], values, 100) == [1, 100]
    assert roomy([7], ["7"], [7.0]) == [7]
    assert roomy([], [], []) == []


@pytest.mark.parametrize("name", ["head_pairs", "massive_map", "rotations_by_pair", "sensitivity_by_pair",
                                  "span_heads", "span_heatmap"])  # fmt: skip
def test_the_wavelength_stands_beside_the_pair(name):
    figure = drawn(name, SMOLLM)
    texts = [text for axis in figure.select_xaxes() if axis.showticklabels is not False for text in axis.ticktext]
    assert {"0", "31"} <= {word for text in texts for word in text.replace("pair ", "").split("<br>")}
    assert all("<br>" in text for text in texts)
    assert any("6.28" in text for text in texts)
    assert "wavelength" in " ".join(axis.title.text or "" for axis in figure.select_xaxes())


@pytest.mark.parametrize("name", ["head_effects", "head_map", "layer_effects", "injected_by_read", "copy_heatmap",
                                  "lens_by_layer"])  # fmt: skip
def test_global_layers_are_marked_and_told(name):
    figure = drawn(name, SMOLLM)
    marks = [shape for shape in figure.layout.shapes if shape.name == "global layer"]
    axis = "x" if name == "layer_effects" else "y"
    first = [shape for shape in marks if shape.xref.startswith("x" if axis == "x" else "x domain")]
    places = [(shape[f"{axis}0"] + shape[f"{axis}1"]) / 2 for shape in first if shape.yref in ("y", "y domain")]
    above = 1 if name == "lens_by_layer" else 0  # the line of shifts in all layers
    assert places[:5] == [layer + above for layer in (5, 11, 17, 23, 29)]
    assert "global layers (5, 11, 17, 23, 29)" in figure.layout.meta["caption"]
    plain = frame_for(name, *SMALL).assign(attention="full_attention")
    (drawing,) = [one for one in plots.DRAWINGS if one.name == name]
    alike = drawing.draw(plain, "")
    assert "global" not in alike.layout.meta["caption"]
    assert not [shape for shape in alike.layout.shapes if shape.name == "global layer"]
