"""What docs/extending.md tells, done from outside the package, through what it offers in public."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import plotly.graph_objects as go
import pytest
import torch
from transformers import CONFIG_MAPPING

from experiments import reproduce, stages
from rope_probe import InputError, PositionShift, compare_spans, load_model, repeated_window, trace
from rope_probe.distillation import LogitTerm, distill
from rope_probe.gallery import figures
from rope_probe.gallery.report import gallery
from rope_probe.models import architectures
from rope_probe.runs.results import new_run, read_run
from rope_probe.runs.tables import TABLES, Column, Metric, declare
from rope_probe.runs.verdicts import Section, verdict, verdicts
from rope_probe.tracing.perturbations import Perturbation
from tests import zoo

WINDOW = repeated_window([5, 6, 7, 8], 4)


def test_an_architecture():
    """Of a type that is only measured, weights are not compared by head and pair; with an entry they are."""
    config = CONFIG_MAPPING["phimoe"](**zoo.SIZES, num_local_experts=4)
    plain = zoo.model(config)
    turned = copy.deepcopy(plain)
    with torch.no_grad():
        turned.get_parameter("model.layers.1.self_attn.q_proj.weight")[8:16] *= 1.5  # head 1
    with pytest.raises(InputError, match="phimoe"):
        compare_spans(plain, turned)
    architectures.register("phimoe", architectures.Architecture())
    try:
        wanted = plain(zoo.tokens(), use_cache=False).logits
        torch.testing.assert_close(load_model(plain)(zoo.tokens()), wanted, rtol=0, atol=1e-5)
        assert (trace(load_model(plain), WINDOW, PositionShift("q", 2.0))["value"] > 0).any()
        spans = compare_spans(plain, turned).query("metric == 'rel_change' and pair.notna()")
        changed = spans[spans["value"] > 0]
        assert set(zip(changed["layer"], changed["head"], strict=True)) == {(1, 1)}
        assert changed["value"].to_numpy() == pytest.approx(0.5)
    finally:
        del architectures.ARCHITECTURES["phimoe"]


@dataclass(frozen=True)
class Mirror(Perturbation):
    """Turn q or k back to where it stands in a window read from its end."""

    side: Literal["q", "k", "qk"]
    layers: int | None = None
    heads: int | None = None
    pairs: int | None = None
    positions: int | None = None

    def angles(self, rotary, positions, window):
        return torch.outer(positions.flip(0) - positions, rotary.inv_freq)


def test_a_perturbation():
    frame = trace(load_model(zoo.llama()).double(), WINDOW, [Mirror("q"), Mirror("k"), Mirror("q", layers=1)])
    logits = frame[(frame["site"] == "logits") & (frame["metric"] == "kl_nats")]
    assert set(logits["kind"]) == {"Mirror"}
    assert set(logits["restriction"].dropna()) == {"layers=1"}
    assert (logits.groupby("perturbation")["value"].mean() > 1e-6).all()


@dataclass(frozen=True)
class Confidence(LogitTerm):
    """Entropy of the student's next-token distribution, in nats."""

    kind: Literal["test_confidence"] = "test_confidence"

    def values(self, logits, targets, taught):
        return torch.special.entr(logits.softmax(-1)).sum(-1)


def test_a_loss_term(tmp_path):
    data = {"kind": "key_value", "document_length": 16, "distinct": [1, 4], "keys": 20, "values": 20}
    phase = {"name": "sure", "window": 16, "steps": 12, "batch_tokens": 128, "lr": 1e-2, "warmup": 1, "data": data}
    phase["terms"] = [{"kind": "test_confidence"}]
    student = {"model_type": "llama", **zoo.SIZES}
    run = distill({"student": student, "phases": [phase], "out": str(tmp_path / "run"), "log_every": 1})
    losses = read_run(run)[0]["losses"]
    entropy = losses[losses["metric"] == "test_confidence"]["value"]
    assert len(entropy) == 12
    assert entropy.iloc[-1] < entropy.iloc[0]


def declared():
    """A table of the largest deltas, which nothing in the package makes."""
    return declare(
        "test_largest",
        "The largest delta at each site, of one kind of perturbation.",
        ("site", "test_tries"),
        {"test_rel_l2": Metric("largest relative L2")},
        own={"test_tries": Column("Int64", "how many perturbations there were")},
    )


def largest_delta(frame, label=""):
    """A bar for each site: the largest delta that was read there."""
    largest = frame.groupby("site")["value"].max()
    return go.Figure(go.Bar(x=largest.index, y=largest), {"height": 400, "title": label})


def is_largest(frame):
    return frame["metric"] == "test_rel_l2"


def test_a_table_with_its_figure(tmp_path):
    table = declared()
    figures.register(figures.Drawing("test_largest_delta", (table.name,), is_largest, largest_delta))
    try:
        with new_run(tmp_path / "run", "test", {}) as run:
            rows = [{"metric": "test_rel_l2", "site": "logits", "test_tries": 3, "value": 0.5}]
            run.record(table, rows, model="tiny")
        page = gallery([tmp_path / "run"], tmp_path / "gallery")
        assert read_run(tmp_path / "run")[0][table.name]["test_tries"].tolist() == [3]
    finally:
        figures.DRAWINGS.pop()
        del TABLES[table.name]
    assert (page.parent / "test.html").read_text().count('id="test-largest-delta-1-data"') == 1
    assert "0.5" in (page.parent / "test.html").read_text()


SCRIPT = """
import sys
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.results import new_run
with new_run(sys.argv[1], "outside", {"answer": 42}) as run:
    rows = [{"metric": "accuracy", "value": 0.42, "distance": distance, "seq_len": 64} for distance in (8, 16)]
    run.record(RETRIEVAL, rows, model="tiny")
"""


def test_an_experiment(tmp_path):
    script = tmp_path / "outside.py"
    script.write_text(SCRIPT)

    def planned(options):
        run = options.out / "outside"
        return {"outside": stages.Stage((str(script), str(run)), run, lambda: {"answer": 42})}

    def report(results):
        measured = results["outside"]["retrieval"]["value"].mean()
        return Section(verdicts([verdict(1, "the answer is below one half", measured, measured < 0.5)]))

    experiment = SimpleNamespace(
        __name__="outside", QUESTION="What is the answer?", PREDICTIONS={1: "Below .5."}, stages=planned, report=report
    )
    plan = stages.plan(stages.Options(tmp_path / "runs"), [experiment])
    assert stages.run_all(plan) == {}
    runs = reproduce.runs_of(plan, {})
    reports = reproduce.report_all([experiment], runs)
    front = gallery(runs["outside"], tmp_path / "gallery", reports).read_text()
    page = (tmp_path / "gallery" / "outside.html").read_text()
    assert "What is the answer?" in front
    chip = '<span class="chip as-predicted">'
    for told in ("What is the answer?", "Below .5.", "the answer is below one half", chip):
        assert told in page
    written = (tmp_path / "runs" / "outside" / "manifest.json").stat().st_mtime_ns
    assert stages.run_all(plan) == {}  # and a second time it is reused
    assert (tmp_path / "runs" / "outside" / "manifest.json").stat().st_mtime_ns == written
