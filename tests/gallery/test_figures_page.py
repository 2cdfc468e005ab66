"""The page of figures and their command."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from rope_probe import InputError
from rope_probe.gallery import figures as plots
from rope_probe.gallery.figures import static
from rope_probe.runs.results import new_run
from rope_probe.tracing.propagation import DELTAS
from tests.gallery import browser
from tests.gallery.sized import LONG_NAME, frame_for

ROOT = Path(__file__).parents[2]


def test_the_page_of_figures_is_what_the_drawings_say():
    page = runpy.run_path(str(ROOT / "docs" / "generate_figures.py"))["page"]()
    assert page == (ROOT / "docs" / "figures.md").read_text(), "run python docs/generate_figures.py"
    assert [f"## {drawing.name}" in page for drawing in plots.DRAWINGS] == [True] * len(plots.DRAWINGS)


def written(run):
    """A run with the effect of shifts of single layers."""
    frame = frame_for("layer_effects", 4, 2, 8)
    with new_run(run, "trace", {}) as made:
        made.record(DELTAS, frame.drop(columns=["run_id", "experiment"]))
    return run


def figures_all(*arguments, **environment):
    command = [sys.executable, "-m", "figures.all", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment or None)


@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs the browser chromium")
def test_figures_are_written_as_svg_pdf_and_png(tmp_path):
    pytest.importorskip("kaleido")
    figure = plots.layer_effects(frame_for("layer_effects", 4, 2, 8), LONG_NAME)
    files = plots.save_figures([(figure, tmp_path / f"a.{kind}") for kind in static.FORMATS], width=700)
    starts = [file.read_bytes()[:5] for file in files]
    assert starts == [b"<svg ", b"%PDF-", b"\x89PNG\r"]
    assert 'width="700"' in (tmp_path / "a.svg").read_text()[:400]
    assert figure.layout.width is None


def test_one_line_says_what_is_missing(tmp_path):
    run = written(tmp_path / "run")
    python = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": "/nowhere", "BROWSER_PATH": "/nowhere/chromium"}
    failed = figures_all(run, "--out", tmp_path / "paper", **python)
    assert failed.returncode == 2
    (line,) = failed.stderr.strip().splitlines()
    assert line.startswith("error: static figures ")
    assert "browser" in line or "pip install" in line
    unknown = figures_all(run, "--out", tmp_path / "paper", "--only", "nothing", **python)
    assert (unknown.returncode, unknown.stderr.startswith("error: there is no drawing 'nothing'")) == (2, True)


def test_kaleido_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    figure = plots.layer_effects(frame_for("layer_effects", 4, 2, 8), "")
    with pytest.raises(InputError, match="need kaleido; install it with: pip install"):
        plots.save_figure(figure, tmp_path / "a.svg")
    with pytest.raises(InputError, match="ends in none of svg, pdf, png"):
        plots.save_figure(figure, tmp_path / "a.gif")
