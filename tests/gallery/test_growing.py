"""The gallery of a job that runs grows as its stages finish."""

from types import SimpleNamespace

from experiments import reproduce, stages
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.results import new_run
from rope_probe.runs.verdicts import Section, verdict, verdicts
from tests.gallery.pages import Page

SCRIPT = """
import sys
from rope_probe.runs.results import new_run
with new_run(sys.argv[1], "outside", {}) as run:
    pass
"""


def outside(folder):
    """An experiment of two stages, whose first run is there; and a function that makes the second."""

    def make(name):
        with new_run(folder / name, "outside", {}) as run:
            rows = [{"metric": "accuracy", "value": 0.42, "distance": distance, "seq_len": 64} for distance in (8, 16)]
            run.record(RETRIEVAL, rows, model=name, seed=0)

    def planned(options):
        return {
            name: stages.Stage(("outside.py", str(folder / name)), folder / name, dict) for name in ("first", "second")
        }

    def report(results):
        measured = results["outside"]["retrieval"]["value"].mean()
        return Section(verdicts([verdict(1, "the answer is below one half", measured, measured < 0.5)]))

    make("first")
    experiment = SimpleNamespace(
        __name__="outside", QUESTION="What is the answer?", PREDICTIONS={1: "Below .5."}, stages=planned, report=report
    )
    return experiment, make


def test_the_gallery_grows_and_judges_what_is_finished(tmp_path, capsys):
    experiment, make = outside(tmp_path)
    plan = stages.plan(stages.Options(tmp_path), [experiment])
    growing = reproduce.GrowingGallery(plan, [experiment], tmp_path / "gallery")
    assert not growing.redraw(set(), {})
    assert not (tmp_path / "gallery").exists()
    assert growing.redraw({"first"}, {})
    page = tmp_path / "gallery" / "outside.html"
    assert "1 of 2 stages done" in Page(page).text
    assert "Below .5." in Page(page).text
    assert "Not judged yet" in Page(page).text
    written = page.stat().st_mtime_ns
    assert growing.redraw({"first"}, {})  # nothing is new
    make("second")
    assert not growing.redraw({"first", "second"}, {})  # the last time is not long ago
    assert page.stat().st_mtime_ns == written
    assert growing.redraw({"first", "second"}, {}, at_once=True)
    assert "2 of 2 stages done" in Page(page).text
    assert "the answer is below one half" in Page(page).text
    assert capsys.readouterr().err == ""


def test_a_stage_without_a_result_adds_nothing_and_is_waited_for_no_more(tmp_path):
    experiment, _ = outside(tmp_path)
    plan = stages.plan(stages.Options(tmp_path), [experiment])
    growing = reproduce.GrowingGallery(plan, [experiment], tmp_path / "gallery")
    assert growing.redraw({"first", "second"}, {"second": "exit code 1"})
    assert "the answer is below one half" in Page(tmp_path / "gallery" / "outside.html").text


def test_what_cannot_be_drawn_ends_no_stage(tmp_path, capsys):
    experiment, _ = outside(tmp_path)
    plan = stages.plan(stages.Options(tmp_path), [experiment])
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "mine.txt").write_text("precious")
    growing = reproduce.GrowingGallery(plan, [experiment], tmp_path / "gallery")
    assert not growing.redraw({"first"}, {})
    assert "no gallery yet" in capsys.readouterr().err
    assert (tmp_path / "gallery" / "mine.txt").read_text() == "precious"


def test_whoever_watches_is_told_what_is_done(tmp_path):
    script = tmp_path / "outside.py"
    script.write_text(SCRIPT)
    plan = {
        name: stages.Stage((str(script), str(tmp_path / name)), tmp_path / name, dict, needs)
        for name, needs in (("one", ()), ("two", ("one",)))
    }
    told = []
    assert stages.run_all(plan, watch=lambda done, without: told.append((set(done), dict(without)))) == {}
    assert told[0] == (set(), {})
    assert told[-1] == ({"one"}, {})
