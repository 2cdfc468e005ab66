"""The gallery's pages as they are written: whole, linked, with every figure's numbers and words; then in a browser."""

import base64
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from experiments import beyond, longred, phase_scaling, rivals, theta_grid  # noqa: F401 (tables that drawings read)
from rope_probe.gallery import figures as plots
from rope_probe.gallery.drawn import Drawn
from rope_probe.gallery.embedded import as_json, embedded
from rope_probe.gallery.figures.findings import losses_by_position
from rope_probe.gallery.numbers import MOST_ROWS, numbers, write_numbers
from rope_probe.gallery.report import Stages, _command, gallery
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.results import new_run
from tests.frames import rows_of
from tests.gallery.pages import HOSTILE, Page, hostile_gallery, pages_of
from tests.gallery.sized import frame_for

MEGABYTES = 1e6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    return hostile_gallery(folder).parent


def test_pages_parse_their_links_lead_somewhere_and_their_ids_are_their_own(made):
    pages = pages_of(made)
    assert len(pages) == 3
    for name, page in pages.items():
        assert page.odd == [], name
        assert len(set(page.ids)) == len(page.ids), name
        assert set(page.referred) <= set(page.ids), name
        for link in page.links:
            path, _, anchor = link.partition("#")
            assert not path or (made / path).is_file(), (name, link)
            if anchor:
                assert anchor in pages[path or name].ids, (name, link)
    used = {link.partition("#")[0] for page in pages.values() for link in page.links}
    files = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    assert files - used == {".rope_probe"} | ({"index.html"} - used)


def test_a_gallery_is_small(made):
    assert sum(path.stat().st_size for path in made.rglob("*") if path.is_file()) < 10 * MEGABYTES


def test_hostile_names_are_text(made):
    pages = pages_of(made)
    for page in pages.values():
        assert page.tags.count("script") == page.tags.count("link") + 1 + len(page.pictures) + 2 * bool(page.pictures)
        assert "img" not in page.tags
    page = next(page for name, page in pages.items() if name.startswith("propagation"))
    for what in ("question", "prediction", "claim", "told beside", "config"):
        assert HOSTILE[what].split()[0] in page.text, what
        assert HOSTILE[what] in page.text, what


def test_json_in_a_page_cannot_end_its_script():
    text = as_json({"</script>": ["<!--", "&amp;", "\u2028\u2029", "\ud800"]})
    assert not set("<>&\u2028\u2029\ud800") & set(text)
    assert json.loads(text) == {"</script>": ["<!--", "&amp;", "\u2028\u2029", "\ud800"]}


def test_figures_are_embedded_as_they_are_but_for_title_caption_and_template():
    rows = [{"metric": "kl_nats", "site": "logits", "kind": "PositionShift", "side": "q", "delta_tokens": 4.0,
             "inject_layer": layer, "value": 1.0 + layer / 3, "seq_len": 64, "document": 0, "seed": 0}
            for layer in range(30)]  # fmt: skip
    figure = plots.layer_effects(rows_of("deltas", rows=rows), "a <b> & c")
    before = figure.to_json()
    shown = embedded(figure)
    assert figure.to_json() == before
    spec = json.loads(shown.data)
    assert shown.title == "Which layers are sensitive to position: a <b> & c"
    assert "window 64 tokens" in shown.caption
    assert "seed 0" in shown.caption
    for width, height in (("wide", shown.height), ("narrow", shown.narrow_height)):
        layout = spec[width]["layout"]
        assert not {"template", "title", "width", "meta"} & set(layout)
        assert layout["height"] == height
        assert [note for note in layout.get("annotations", []) if note.get("name") == "caption"] == []
    stored = spec["data"][0]["y"]
    values = np.frombuffer(base64.b64decode(stored["bdata"]), dtype=f"<{stored['dtype']}")
    np.testing.assert_allclose(values, figure.data[0].y, rtol=1e-6)


def test_numbers_that_float32_has_no_room_for_stay_as_they_are():
    import plotly.graph_objects as go

    values = np.array([1e-60, 1.0, np.nan])
    stored = json.loads(embedded(go.Figure(go.Scatter(y=values))).data)["data"][0]["y"]
    assert stored["dtype"] == "f8"


def test_the_table_tells_means_and_the_files_hold_all_rows(made, tmp_path):
    rows = [{"metric": "accuracy", "value": value, "distance": d, "seed": seed, "model": "m", "seq_len": 64}
            for d in (8, 16) for seed, value in ((0, 0.25), (1, 0.75))]  # fmt: skip
    table = numbers(rows_of("retrieval", rows=rows))
    assert table.columns == ["distance", "value", "min", "max", "n"]
    assert [[cell.number for cell in row] for row in table.rows] == [[8, 0.5, 0.25, 0.75, 2], [16, 0.5, 0.25, 0.75, 2]]
    assert table.same == {"model": "m", "metric": "accuracy", "seq_len": "64"}
    assert (table.of, table.measured) == (2, 4)
    many = [{"metric": "accuracy", "value": d / 1000, "distance": d} for d in range(MOST_ROWS + 7)]
    table = numbers(rows_of("retrieval", rows=many))
    assert (len(table.rows), table.of) == (MOST_ROWS, MOST_ROWS + 7)
    assert min(row[0].number for row in table.rows) == 7  # the largest are shown
    csv, parquet = write_numbers(rows_of("retrieval", rows=many * 30), tmp_path / "many")
    assert csv.name == "many.csv.gz"
    assert len(pd.read_csv(csv)) == len(pd.read_parquet(parquet)) == 30 * len(many)
    for csv in sorted((made / "tables").glob("*.csv")):
        text, stored = pd.read_csv(csv), pd.read_parquet(csv.with_suffix(".parquet"))
        assert list(text.columns) == list(stored.columns)
        np.testing.assert_allclose(text["value"], stored["value"], rtol=1e-5)
        assert set(stored["model"].dropna()) <= {HOSTILE["model"], HOSTILE["other model"]}


def test_text_alternatives_state_the_finding():
    rows = [{"metric": "kl_nats", "site": "logits", "kind": "PositionShift", "side": "q", "delta_tokens": dose,
             "inject_layer": layer, "value": (3.0 if layer == 16 else 0.1) * dose / 4, "seed": seed, "model": "m",
             "document": 0} for layer in range(30) for dose in (1.0, 4.0) for seed in (0, 1)]  # fmt: skip
    (drawing,) = [one for one in plots.DRAWINGS if one.name == "layer_effects"]
    said = drawing.finding(rows_of("deltas", rows=rows))
    assert "layer 16, 3 nats, 51% of the sum over 30" in said
    assert "smallest: shift in layer 0, 0.1 nats" in said
    assert "2 seeds (0, 1)" in said
    assert "n = 60 numbers" in said  # of the largest dose alone


@pytest.mark.parametrize("drawing", plots.DRAWINGS, ids=lambda drawing: drawing.name)
def test_every_drawing_says_how_it_is_read_and_what_it_finds(drawing):
    assert 40 < len(drawing.how_to_read) < 260
    assert drawing.how_to_read.endswith(".")
    metric = next(iter(getattr(drawing.finding, "metrics", {})), "") or frame_for(drawing.name, 2, 2, 8)["metric"][0]
    rows = [
        {"metric": metric, "value": value, "seed": 3, "tokens": 8, "model": model}
        for value, model in ((0.5, "a"), (0.25, "b"))
    ]
    said = drawing.finding(rows_of(*drawing.tables, rows=rows))
    assert "1 seed (3)" in said
    assert "0.5" in said or "0.375" in said
    assert isinstance(drawing.finding(rows_of(*drawing.tables, rows=[])), str)


@pytest.mark.parametrize("drawing", plots.DRAWINGS, ids=lambda drawing: drawing.name)
def test_findings_are_sentences(drawing):
    rows = frame_for(drawing.name, 4, 2, 8)
    drawn = rows[drawing.rows(rows)]
    said = drawing.finding(drawn)
    assert said[0].isupper()
    assert all(sentence[:1].isupper() for sentence in re.split(r"(?<=[a-z)])\. ", said))
    for fragment in ("that norm", "that over", "1 where", "else 0", "`", "_nats", ": :", "largest:"):
        assert fragment not in said, fragment
    assert set(getattr(drawing.finding, "metrics", {})) <= set(drawn["metric"]), "it tells of what is not drawn"


def test_the_finding_of_losses_by_position_says_where_lines_part():
    rows = [{"metric": "loss_nats", "rotation": rotation, "temperature": "none", "seed": 0, "position": position,
             "value": 3.0 + (rotation == "YaRN") * position / 8192} for rotation in ("own", "YaRN")
            for position in range(0, 4096, 256)]  # fmt: skip
    said = losses_by_position(rows_of("beyond", rows=rows))
    assert "closest together at positions 0 to 1,023: largest, YaRN, 3.05 nats; smallest, own, 3 nats." in said
    assert "farthest apart at positions 3,072 to 4,095: largest, YaRN, 3.42 nats; smallest, own, 3 nats." in said
    assert "largest, own" not in said


def test_a_figure_without_a_finding_refers_to_none(tmp_path, monkeypatch):
    monkeypatch.setattr(Drawn, "finding", "")
    rows = [{"metric": "accuracy", "value": 0.5, "distance": distance, "seq_len": 64} for distance in (8, 16)]
    with new_run(tmp_path / "run", "trace", {}) as run:
        run.record(RETRIEVAL, rows, model="tiny", seed=0)
    gallery([tmp_path / "run"], tmp_path / "gallery")
    for page in pages_of(tmp_path / "gallery").values():
        assert set(page.referred) <= set(page.ids)


def test_claims_stand_with_their_prediction_figure_numbers_and_command(made):
    (page,) = [page for name, page in pages_of(made).items() if name.startswith("propagation")]
    text = page.path.read_text()
    order = [text.index(f'id="{anchor}"') for anchor in
             ("prediction-1", "layer-effects", "copy-heatmap", "prediction-2", "further", "runs")]  # fmt: skip
    assert order == sorted(order)
    assert "held" in page.text
    assert "0.4 to 0.6" in page.text
    assert "Not judged yet" in page.text
    assert "python -m experiments.propagation" in page.text
    assert any(link.startswith("manifests/") for link in page.links)
    manifest = json.loads((made / next(link for link in page.links if link.startswith("manifests/"))).read_text())
    assert manifest["config"]["note"] == HOSTILE["config"]


def test_the_front_page_has_the_question_the_counts_and_the_strongest_claims(made):
    page = Page(made / "index.html")
    assert HOSTILE["question"] in page.text
    for count in ("held1", "not held1", "undecided1", "as predicted1", "identity1"):
        assert count in "".join(page.text.split("\n")).replace("  ", "") or count in page.text, count
    strongest = page.text[page.text.index("The strongest claims") : page.text.index("All experiments")]
    assert HOSTILE["claim"] in strongest
    assert "identity" not in strongest
    assert "undecided" not in strongest
    assert "Losses in training" in page.text  # where nothing was predicted, what the figures show


def test_commands_are_told_as_one_types_them():
    assert _command(["/a/experiments/pretrained.py", "layers", "x y"]) == (
        "python -m experiments.pretrained layers 'x y'"
    )
    assert _command(["/a/bin/rope-probe", "trace", "m"]) == "rope-probe trace m"
    assert _command(["/a/rope_probe/__main__.py", "trace"]) == "rope-probe trace"
    assert _command(["mine.py", 3]) == "python mine.py 3"
    assert _command([]) == "''"


def test_pages_of_a_job_that_runs_say_how_far_it_is_and_the_last_ones_do_not(tmp_path):
    rows = [{"metric": "accuracy", "value": 0.5, "distance": distance, "seq_len": 64} for distance in (8, 16)]
    with new_run(tmp_path / "run", "trace", {}) as run:
        run.record(RETRIEVAL, rows, model="tiny", seed=0)
    index = gallery([tmp_path / "run"], tmp_path / "gallery", stages=Stages(3, 22))
    for page in pages_of(index.parent).values():
        assert "3 of 22 stages done" in page.text
        assert 'data-reload-seconds="20"' in page.path.read_text()
        assert 'http-equiv="refresh"' not in page.path.read_text()
    gallery([tmp_path / "run"], tmp_path / "gallery")
    for page in pages_of(index.parent).values():
        assert "stages done" not in page.text
        assert "data-reload" not in page.path.read_text()


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRAWN = """[...document.querySelectorAll('.plot')].filter(plot => plot.offsetParent)
           .every(plot => plot.dataset.drawn && plot.querySelector('.main-svg'))"""

OPEN_ALL = "document.querySelectorAll('[role=tabpanel]').forEach(panel => { panel.hidden = false; })"
SHOWN_TABLES = "[...document.querySelectorAll('table')].filter(table => table.offsetParent).length"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs chromium, and there is none here")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright, which the extra dev installs")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def seen(browser, made):
    """A function that opens a page of the gallery, all of it unfolded and drawn; and what the console said."""
    contexts = {}

    def open_page(name, width=1400, scheme="light"):
        if (width, scheme) not in contexts:
            context = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, reduced_motion="reduce"
            )
            context.set_default_timeout(120_000)
            page = context.new_page()
            page.said = []
            page.on("console", lambda message: page.said.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: page.said.append(str(error)))
            page.on("requestfailed", lambda request: page.said.append(f"failed: {request.url}"))
            contexts[width, scheme] = page
        page = contexts[width, scheme]
        page.goto((made / name).as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(folded => { folded.open = true; })")
        for plot in page.locator(".plot").all():
            if plot.is_visible():
                plot.scroll_into_view_if_needed()
        page.wait_for_function(DRAWN, timeout=120_000)
        return page

    return open_page


@pytest.fixture(scope="module")
def names(made):
    return sorted(path.name for path in made.glob("*.html"))


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_every_figure_is_drawn_without_an_error_and_nothing_runs_over_the_side(seen, names, width, scheme):
    for name in names:
        page = seen(name, width, scheme)
        page.evaluate(OPEN_ALL)
        assert page.said == []
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        over = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg, pre, .skip') &&
                  e.getBoundingClientRect().right > innerWidth + 1).map(e => e.className || e.tagName)"""
        assert page.evaluate(over) == [], name
        count = page.locator(".plot").count()
        assert count == len(Page(page.evaluate("decodeURI(location.pathname)")).pictures)
        expected = "narrow" if width < 600 else "wide"
        assert page.evaluate(
            f"[...document.querySelectorAll('.plot')].every(e => e.dataset.drawn.endsWith('{expected}'))"
            if width < 600
            else "true"
        )


def test_hostile_names_are_shown_as_they_are_written(seen, names):
    page = seen(next(name for name in names if name.startswith("propagation")))
    assert HOSTILE["prediction"] in page.locator("#prediction-1 blockquote").inner_text()
    assert page.locator("img").count() == 0
    labels = page.locator(".picture h4").all_inner_texts()
    assert any(HOSTILE["model"] in label for label in labels)
    page = seen("training.html")
    legend = page.locator(".legendtext").all_text_contents()
    assert any("</script><script>" in name for name in legend)


def test_tooltips_appear_over_a_figure(seen):
    page = seen("training.html")
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    point = plot.locator(".point, .points path").first.bounding_box()
    page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    page.wait_for_selector(".hoverlayer .hovertext", timeout=60_000)


def test_tabs_by_keyboard(seen, names):
    page = seen(next(name for name in names if name.startswith("propagation")))
    tabs = page.locator("#layer-effects [role=tab]")
    tabs.nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert tabs.nth(1).get_attribute("aria-selected") == "true"
    assert page.evaluate("document.activeElement.id") == "layer-effects-numbers-tab"
    assert page.locator("#layer-effects-numbers").is_visible()
    assert not page.locator("#layer-effects-figure").is_visible()
    page.keyboard.press("End")
    assert page.locator("#layer-effects-made").is_visible()
    page.keyboard.press("Home")
    assert page.locator("#layer-effects-figure").is_visible()


def test_a_table_sorts_by_keyboard(seen, names):
    page = seen(next(name for name in names if name.startswith("propagation")))
    page.locator("#layer-effects-numbers-tab").click()
    head = page.locator("#layer-effects-numbers th", has_text="value").first
    column = head.evaluate("head => head.cellIndex")
    head.locator("button").focus()
    cells = page.locator(f"#layer-effects-numbers tbody td:nth-child({column + 1})")
    for direction in ("descending", "ascending"):
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == direction
        values = [float(cell) for cell in cells.evaluate_all("cells => cells.map(cell => cell.dataset.value)")]
        assert values == sorted(values, reverse=direction == "descending")


def test_the_theme_by_keyboard_is_kept_and_figures_follow_it(seen):
    page = seen("training.html")
    ink = "document.querySelector('.plot')._fullLayout.font.color"
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ink), page.evaluate(background)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator("#theme").focus()
    page.keyboard.press("Enter")  # light
    page.keyboard.press("Enter")  # dark
    assert "dark" in page.locator("#theme").inner_text()
    page.wait_for_function("[...document.querySelectorAll('.plot')].every(e => e.dataset.drawn.startsWith('dark'))")
    dark = page.evaluate(ink), page.evaluate(background)
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    page = seen("training.html")
    assert (page.evaluate(ink), page.evaluate(background)) == dark
    page.locator("#theme").click()  # back to the system's
    assert page.evaluate(background) == light[1]


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_axe_finds_nothing_serious(seen, names, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    for name in names:
        page = seen(name, width, scheme)
        page.evaluate(OPEN_ALL)
        assert page.evaluate(SHOWN_TABLES) == page.locator("table").count()
        found = axe.run(page).response["violations"]
        grave = [
            f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:200]}"
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert grave == [], name
