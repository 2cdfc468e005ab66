import html
import itertools
import json
import re
import shutil
import subprocess
from contextlib import suppress

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from experiments import phase_scaling
from experiments.beyond_verdicts import BEYOND
from experiments.longred import SKILLS
from experiments.pretrained import PASSKEYS
from experiments.rivals import TEMPERED
from experiments.theta_grid import THETA_GRID, cells
from rope_probe import InputError, PairTurn, PositionShift, copy_deltas, load_model, repeated_window, rope, trace
from rope_probe.distillation import distillation_signal
from rope_probe.distillation.log import LOSSES
from rope_probe.gallery import figures as plots
from rope_probe.gallery.drawn import draw_all
from rope_probe.gallery.figures import style
from rope_probe.gallery.report import _free_slug, gallery, write_figure
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.intervals import share_interval
from rope_probe.runs.results import new_run, read_manifest, read_run, read_tables
from rope_probe.runs.tables import TABLES
from rope_probe.spans.statistics import LANDMARKS
from rope_probe.spans.weights import SPANS
from rope_probe.tracing import positional
from rope_probe.tracing.heads import HEADS
from rope_probe.tracing.propagation import DELTAS
from tests import zoo
from tests.frames import rows_for, rows_of
from tests.gallery.pages import Page, pages_of


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = load_model(zoo.llama())
    window = repeated_window(zoo.tokens(1, 10)[0], 4)
    shifts = [PositionShift(side, dose) for side in ("q", "k", "qk") for dose in (0.25, 1.0, 4.0)]
    with new_run(folder, "propagation", {"note": "<script>alert(1)</script>"}) as made:
        made.record(DELTAS, copy_deltas(model, window), model="tiny", seed=0, arm="repeated document")
        made.record(DELTAS, trace(model, window, shifts, control=True), model="tiny", seed=0, arm="repeated document")
    return folder


def test_the_heatmap_shows_the_numbers_of_the_frame(run):
    frame = read_run(run)[0]["deltas"]
    figure = plots.copy_heatmap(frame)
    titles = [note.text for note in figure.layout.annotations]
    panel = titles.index("residual stream")
    assert panel == 5
    shown = np.asarray(figure.data[panel].customdata)[..., 0]
    assert shown.shape == (2, 3)
    rows = frame[(frame["site"] == "blocks.1.hook_resid_post") & (frame["metric"] == "rel_l2")]
    rows = rows[rows["perturbation"] == "Copy"].sort_values("document")
    np.testing.assert_allclose(shown[1], rows["value"])
    np.testing.assert_allclose(np.asarray(figure.data[panel].z)[1], np.log10(rows["value"]))


def test_dose_response_shows_the_numbers_of_the_frame(run):
    frame = read_run(run)[0]["deltas"]
    figure = plots.dose_response(frame)
    lines = {line.name: line for line in figure.data if line.name}
    exact = next(name for name in lines if name.startswith("both, in float64"))
    assert set(lines) == {"queries only", "keys only", "both, which cancels", exact}
    q = frame[(frame["metric"] == "kl_nats") & (frame["side"] == "q")].groupby("delta_tokens")["value"].mean()
    np.testing.assert_allclose(lines["queries only"].x, q.index)
    np.testing.assert_allclose(lines["queries only"].y, q)
    assert max(lines[exact].y) < 1e-20 < min(lines["queries only"].y)
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"


def test_captions_say_what_was_drawn(run):
    frame = read_run(run)[0]["deltas"]
    for draw in (plots.copy_heatmap, plots.dose_response):
        caption = draw(frame).layout.annotations[-1].text.replace("<br>", " ")
        assert "seed 0" in caption
        assert "window 40 tokens" in caption


def test_shifts_that_are_restricted_differently_are_not_pooled(tmp_path):
    model, window = load_model(zoo.llama()), repeated_window(zoo.tokens(1, 10)[0], 2)
    shifts = [PositionShift("q", dose, layers=layer) for layer in (0, 1) for dose in (1.0, 4.0)]
    frame = trace(model, window, shifts)
    with pytest.raises(InputError, match="2 ways, layers=0, layers=1"):
        plots.dose_response(frame)
    with new_run(tmp_path / "run", "trace", {}) as made:
        made.record(DELTAS, frame, model="a b")
        made.record(DELTAS, frame, model="a-b")
    index = gallery([tmp_path / "run"], tmp_path / "gallery")
    page = Page(index.parent / "trace.html")
    assert len([name for name in page.pictures if name.startswith("dose-response")]) == 4
    assert len([name for name in page.pictures if name.startswith("injected-by-read")]) == 2
    assert "a b, layers=1" in page.text


def test_shifts_back_and_by_nothing_are_drawn():
    frame = trace(load_model(zoo.llama()), repeated_window(3, 4), [PositionShift("q", d) for d in (-4.0, 0.0, 4.0)])
    assert plots.dose_response(frame).layout.xaxis.type == "linear"


def test_turns_by_one_angle_are_drawn_against_the_angle():
    turns = [PairTurn("q", radians) for radians in (0.1, 1.0)]
    frame = trace(load_model(zoo.llama()), repeated_window(zoo.tokens(1, 10)[0], 2), turns)
    figure = plots.dose_response(frame)
    kl = frame[frame["metric"] == "kl_nats"].groupby("radians")["value"].mean()
    line = next(line for line in figure.data if line.name == "queries only")
    np.testing.assert_allclose(line.x, kl.index)
    np.testing.assert_allclose(line.y, kl)
    assert figure.layout.xaxis.title.text == "turn of every pair, radians"
    lowest, highest = figure.layout.yaxis.range
    assert lowest < np.log10(kl.min()) < np.log10(kl.max()) < highest < lowest + 6  # no room down to rounding


@pytest.mark.parametrize("drawing", plots.DRAWINGS, ids=lambda drawing: drawing.name)
def test_frames_without_the_rows_are_refused(drawing):
    frame = rows_for(drawing.name, [{"metric": "accuracy", "value": 1.0}, {"metric": "ce_nats", "value": 1.0}])
    assert not drawing.rows(frame).any()
    with pytest.raises(InputError, match="these results hold no"):
        drawing.draw(frame, "")


def test_what_is_rounding_is_left_grey():
    frame = copy_deltas(load_model(zoo.llama()), repeated_window(zoo.tokens(1, 10)[0], 4), masked=True)
    figure = plots.copy_heatmap(frame)
    rotated, residual = (np.asarray(figure.data[panel].z, dtype=float) for panel in (0, 5))
    assert np.isfinite(rotated).all()
    assert np.isnan(residual).all()
    assert "grey: rounding" in figure.layout.annotations[-1].text.replace("<br>", " ")


@given(st.lists(st.text(max_size=300), min_size=2, max_size=4), st.text(max_size=300))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pages_have_short_names_of_their_own_whatever_experiments_and_models_are_called(tmp_path, experiments, model):
    taken = {"index"}
    names = [_free_slug(f"{experiment} {model}", taken) for experiment in experiments]
    assert len(set(names)) == len(names)
    assert all(name.isascii() and 0 < len(name) <= 70 and not set(name) & set("/\\ .") for name in names)


@pytest.mark.parametrize("experiments", [("a b", "a-b"), ("", ".."), ("x" * 3000, "x" * 3001), ("größe", "размер")])
def test_odd_names_of_experiments_make_pages_that_can_be_opened(tmp_path, experiments):
    rows = [{"metric": "accuracy", "value": 0.5, "distance": d, "seq_len": 64, "model": "m" * 3000} for d in (8, 16)]
    for i, experiment in enumerate(experiments):
        with new_run(tmp_path / str(i), experiment, {}) as made:
            made.record(RETRIEVAL, rows)
    gallery([tmp_path / "0", tmp_path / "1", tmp_path / "1"], tmp_path / "gallery")
    pages = pages_of(tmp_path / "gallery")
    links = [link for link in pages["index.html"].links if link.endswith(".html") and link != "index.html"]
    assert len(set(links)) == len(links) == 2
    assert all(len(pages[name].pictures) == 1 and len(name) < 80 for name in links)


ODD = {"run_id": (None, 5, {}), "experiment": (5, [], None), "argv": (5, {}), "packages": (True, 5), "git": ("x", True)}
ODD |= {"wall_s": (None, "x", True), "config": (5, None)}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ODD.items() for value in values])
def test_manifests_that_no_run_writes_are_refused_by_name(run, tmp_path, key, value):
    copied = shutil.copytree(run, tmp_path / "run")
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, key: value}))
    with pytest.raises(InputError, match=f"{key} in the manifest of .*run' is "):
        gallery([copied], tmp_path / "gallery")


def test_the_gallery_works_offline_and_links_what_is_there(run, tmp_path):
    index = gallery([run], tmp_path / "gallery")
    pages = pages_of(index.parent)
    assert len(pages["propagation.html"].pictures) == 2
    assert "assets/plotly.min.js" in pages["propagation.html"].links
    for page in pages.values():
        assert not [link for link in page.links if ":" in link]
        assert all((index.parent / link.partition("#")[0]).exists() for link in page.links)
        assert "<script>alert" not in page.path.read_text()


def test_an_older_gallery_is_replaced_and_nothing_else(run, tmp_path):
    gallery([run], tmp_path / "gallery")
    gallery([run], tmp_path / "gallery")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("my home page")
    with pytest.raises(InputError, match="not replaced"):
        gallery([run], tmp_path / "site")
    with pytest.raises(InputError, match="not replaced"):
        gallery([run], run)
    assert read_run(run)[1]["status"] == "complete"


def test_runs_with_nothing_to_draw_are_refused(tmp_path):
    with new_run(tmp_path / "run", "test", {}) as made:
        made.record(LOSSES, [{"metric": "ce_nats", "value": 1.0}])
    with pytest.raises(InputError, match="nothing"):
        gallery([tmp_path / "run"], tmp_path / "gallery")
    assert not (tmp_path / "gallery").exists()


def test_figures_are_written_where_asked(run, tmp_path):
    page = write_figure(plots.dose_response(read_run(run)[0]["deltas"]), tmp_path / "deep" / "figure.html")
    assert page.is_file()
    assert isinstance(read_run(run)[0]["deltas"], pd.DataFrame)


def only(table, frame):
    """The columns of a table."""
    return frame[[column for column in frame.columns if column in TABLES[table].columns]]


def accuracy(model, seed, values):
    rows = [{"seq_len": 64, "distance": d, "metric": "accuracy", "value": v, "low": v - 0.1, "high": v + 0.1}
            for d, v in zip((8, 16, 32), values, strict=True)]  # fmt: skip
    return rows_of("retrieval", "geometry", rows=rows).assign(model=model, seed=seed)


def test_retrieval_shows_means_and_seeds(tmp_path):
    frame = pd.concat(
        [accuracy("kd", 0, (1, 0.8, 0.6)), accuracy("kd", 1, (0.8, 0.6, 0.2)), accuracy("ce", 0, (1, 0, 0))]
    )
    figure = plots.retrieval_by_distance(frame)
    lines = {line.name: line for line in figure.data if line.name}
    np.testing.assert_allclose(lines["kd"].y, [0.9, 0.7, 0.4])
    np.testing.assert_allclose(lines["ce"].error_y.array, 0.1)
    assert (lines["kd"].error_y.visible, lines["ce"].error_y.visible) == (False, True)
    assert "seeds 0, 1 (1 to 2 of them for a model)" in notes(figure)[-1]
    assert "bars: 95% over seeds and trials" in notes(figure)[-1]
    line = {line.name: line for line in plots.retrieval_by_distance(frame.assign(trials=128)).data}["kd"]
    low, high = share_interval([1, 0.8], 128)
    assert (line.y[0] - line.error_y.arrayminus[0], line.y[0] + line.error_y.array[0]) == pytest.approx((low, high))
    odd = frame.assign(trials=128, value=frame["value"] + 5)
    line = {line.name: line for line in plots.retrieval_by_distance(odd).data}["kd"]
    assert not line.error_y.visible
    points = next(line for line in figure.data if line.name is None)
    assert sorted(points.y) == [0.2, 0.6, 0.6, 0.8, 0.8, 1]


def test_runs_of_one_experiment_are_drawn_together(tmp_path):
    for model in ("kd", "ce"):
        with new_run(tmp_path / model, "phase_scaling", {}) as made:
            made.record(RETRIEVAL, only("retrieval", accuracy(model, 0, (1, 0.8, 0.6))))
    gallery([tmp_path / "kd", tmp_path / "ce"], tmp_path / "gallery")
    page = Page(tmp_path / "gallery" / "phase-scaling.html")
    (name,) = page.pictures
    drawn = page.data[f"{name}-data"]
    assert '"name":"kd"' in drawn
    assert '"name":"ce"' in drawn
    assert len([anchor for anchor in page.ids if anchor.startswith("run-") and not anchor.endswith("title")]) == 2


def drawn_from(runs):
    """(drawing, label, figure) of each figure that the gallery draws of these runs."""
    configs = {manifest["run_id"]: manifest["config"] for manifest in map(read_manifest, runs)}
    return [(one.drawing.name, one.label, one.figure) for one in draw_all(read_tables(runs), configs)[0]]


def doses(value, **columns):
    """Logit KL of shifts by 1 and 4 tokens, the same for both."""
    row = {"site": "logits", "metric": "kl_nats", "kind": "PositionShift", "side": "q", "document": 0, "seq_len": 64}
    return [{**row, "delta_tokens": dose, "value": value, **columns} for dose in (1.0, 4.0)]


def traced_runs(folder, made):
    """A trace run of one model for each (config, value)."""
    runs = []
    for config, value in made:
        run = folder / f"run-{len(runs)}"
        with new_run(run, "trace", config) as recorded:
            recorded.record(DELTAS, doses(value), model="tiny", seed=config.get("seed", 0))
        runs.append(run)
    return runs


def test_runs_of_one_model_that_differ_in_more_than_the_seed_are_not_averaged(tmp_path):
    settings = [{"window": 64, "text": None}, {"window": 128, "text": None}, {"window": 64, "text": "prose.txt"}]
    runs = traced_runs(tmp_path, zip(settings, (9.0, 3.8, 4.4), strict=True))
    figures = {label: figure for _, label, figure in drawn_from(runs)}
    assert {label: figure.data[-1].y[0] for label, figure in figures.items()} == {
        "tiny (window=64, text=None)": 9.0,
        "tiny (window=128, text=None)": 3.8,
        "tiny (window=64, text=prose.txt)": 4.4,
    }
    gallery(runs, tmp_path / "gallery")
    assert len(Page(tmp_path / "gallery" / "trace.html").pictures) == 3


def test_runs_that_differ_in_the_seed_and_what_was_trained_by_it_are_pooled(tmp_path):
    settings = [{"window": 64, "seed": seed, "teacher": {"weights_sha256": f"{seed}"}} for seed in (0, 1)]
    runs = traced_runs(tmp_path, zip(settings, (9.0, 4.0), strict=True))
    ((name, label, figure),) = drawn_from(runs)
    assert (name, label) == ("dose_response", "tiny")
    assert list(figure.data[-1].y) == [6.5, 6.5]
    assert "seeds 0, 1" in notes(figure)[-1]


def test_runs_of_one_configuration_and_seed_are_told_apart_by_their_ids(tmp_path):
    runs = traced_runs(tmp_path, [({"window": 64}, 9.0), ({"window": 64}, 4.0)])
    ids = [read_manifest(run)["run_id"].rpartition("-")[2] for run in runs]
    assert [label for _, label, _ in drawn_from(runs)] == [f"tiny (run {run})" for run in ids]


def test_one_part_of_a_model_is_not_called_by_what_only_others_differ_in(tmp_path):
    """Runs that no figure shares need no telling apart."""
    runs = traced_runs(tmp_path, [({"part": "doses"}, 9.0)])
    with new_run(tmp_path / "other", "trace", {"part": "losses"}) as other:
        other.record(LOSSES, losses("tiny", 0, (2, 1)))
    assert [label for _, label, _ in drawn_from([*runs, tmp_path / "other"])] == ["", "tiny"]


def test_lines_of_runs_of_one_model_are_not_averaged(tmp_path):
    for steps, values in ((75, (1, 0.8, 0.6)), (250, (0.2, 0.1, 0))):
        with new_run(tmp_path / str(steps), "distill", {"steps": steps, "phases": [{"steps": steps}]}) as made:
            made.record(RETRIEVAL, only("retrieval", accuracy("student", 0, values)))
            made.record(LOSSES, losses("student", 0, (2, 1)))
    figures = {name: figure for name, _, figure in drawn_from([tmp_path / "75", tmp_path / "250"])}
    for figure in figures.values():
        assert [line.name for line in figure.data] == [
            f"student (steps={steps}, phases.0.steps={steps})" for steps in (75, 250)
        ]
    np.testing.assert_allclose(figures["retrieval_by_distance"].data[0].y, (1, 0.8, 0.6))


def test_the_landmarks_in_a_figure_are_those_of_its_run_and_model(tmp_path):
    def record(run, model, turning):
        change = {"site": "blocks.0.attn.W_Q", "layer": 0, "head": 0, "wavelength": 6.0, "wavelength_after": 9.0}
        rows = [{**change, "pair": pair, "metric": "rel_change", "value": 0.1} for pair in range(4)]
        run.record(SPANS, rows, model=model)
        ends = {"metric": "turning_pairs", "seq_len": 64, "phase": "after"}
        run.record(LANDMARKS, [{**ends, "value": turning}], model=model)

    with new_run(tmp_path / "0", "spans", {"before": "a"}) as run:
        record(run, "one", 1.0)
        record(run, "other", 2.0)
    with new_run(tmp_path / "1", "spans", {"before": "b"}) as run:
        record(run, "one", 3.0)
    figures = [(label, figure) for name, label, figure in drawn_from([tmp_path / "0", tmp_path / "1"])
               if name == "span_heatmap"]  # fmt: skip
    upright = {label: {shape.x0 for shape in figure.layout.shapes if shape.x0 == shape.x1} for label, figure in figures}
    assert upright == {
        "one (before=a)": {0.5}, "other": {1.5}, "one (before=b)": {2.5},
    }  # fmt: skip


def geometry(arm, seed=0):
    return phase_scaling.geometry(phase_scaling.ARMS[arm]).assign(model=arm, seed=seed)


def notes(figure):
    return [note.text.replace("<br>", " ") for note in figure.layout.annotations]


def test_retrieval_marks_the_documents_and_the_window_that_most_models_trained_on():
    arms = ("kd_phase_wise", "ce_phase_wise", "ce_long_documents")
    frames = [part for arm in arms for part in (accuracy(arm, 0, (1, 0.8, 0.6)), geometry(arm))]
    frame = pd.concat(frames, ignore_index=True)
    assert not plots.retrieval_by_distance(frame).layout.shapes
    farther = frame.assign(distance=frame["distance"] * 30)
    figure = plots.retrieval_by_distance(farther)
    assert [shape.x0 for shape in figure.layout.shapes] == [1024]
    near = plots.retrieval_by_distance(frame.assign(distance=frame["distance"] * 2))
    assert [shape.x0 for shape in near.layout.shapes] == [64]
    assert any("documents of 64 tokens (2 of 3 trained models)" in note for note in notes(near))
    assert "training window of 1,024 tokens" in notes(figure)[0]


def test_retrieval_lists_fifteen_arms_from_best_to_worst_and_no_two_look_alike():
    arms = sorted(phase_scaling.ARMS)
    frame = pd.concat([accuracy(arm, 0, (1, 1, i / 10)) for i, arm in enumerate(arms)])
    lines = plots.retrieval_by_distance(frame).data
    assert [line.name for line in lines] == arms[::-1]
    assert len({(line.line.color, line.line.dash) for line in lines}) == 15


def test_rotations_are_drawn_once_for_every_geometry():
    frame = pd.concat([geometry(arm, seed) for arm in phase_scaling.ARMS for seed in (0, 1)])
    figure = plots.rotations_by_pair(frame)
    lines = [line.name.replace("<br>", " ") for line in figure.data]
    assert lines == [
        "short phase, window 64, theta 300: 7 of 16 pairs turn",
        "short phase, window 64, theta 20,000: 4 of 16 pairs turn",
        "extension phase, window 1,024, theta 300: 15 of 16 pairs turn",
        "extension phase, window 1,024, theta 20,000: 9 of 16 pairs turn",
        "extension phase, window 64, theta 300: 7 of 16 pairs turn",
    ]
    turns = rope.rotations(rope.inv_freq({"rope_type": "default", "rope_theta": 300.0}, 32), 64)
    np.testing.assert_allclose(figure.data[0].y, turns)
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.shapes[0].y0 == 1
    assert len({(line.line.color, line.line.dash) for line in figure.data}) == 5
    assert "15 models" in notes(figure)[-1]


def test_wavelengths_of_no_theta_are_named_by_the_slowest_pair():
    lengths = rope.wavelengths(rope.inv_freq({"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0}, 8)).tolist()
    at = {"phase": "long", "seq_len": 64, "metric": "rotations"}
    rows = [{**at, "pair": i, "wavelength": length, "value": 64 / length} for i, length in enumerate(lengths)]
    (line,) = plots.rotations_by_pair(rows_of("geometry", rows=rows)).data
    assert line.name == f"long phase, window 64, slowest pair {lengths[-1]:,.4g} tokens"


def losses(model, seed, values, *, metric="ce_nats", phase="short", run_id="a"):
    rows = [{"tokens": 8 * (i + 1), "value": value} for i, value in enumerate(values)]
    return rows_of("losses", rows=rows).assign(model=model, seed=seed, phase=phase, metric=metric, run_id=run_id)


def test_losses_have_a_panel_for_each_phase_and_kind_and_means_where_all_seeds_are():
    frame = pd.concat([
        losses("base", 0, (3, 2, 1)), losses("base", 1, (5, 4)), losses("teacher", 0, (4, 4)),
        losses("teacher", 0, (2, 1), phase="long"), losses("teacher", 0, (0.5, 0.1), phase="long", metric="kd_nats"),
    ])  # fmt: skip
    figure = plots.loss_curves(frame)
    assert notes(figure)[:3] == [
        "cross-entropy, nats: short phase", "cross-entropy, nats: long phase", "KD divergence, nats: long phase"
    ]  # fmt: skip
    assert [line.name for line in figure.data if line.showlegend] == ["base", "teacher"]
    base = [line for line in figure.data if line.legendgroup == "base"]
    assert [list(line.y) for line in base] == [[3, 2, 1], [5, 4], [4, 3]]
    assert base[-1].line.width > base[0].line.width
    divergence = figure.data[-1]
    assert (divergence.name, divergence.showlegend, list(divergence.x)) == ("teacher", False, [8, 16])
    assert "seeds 0, 1" in notes(figure)[-1]


def test_runs_of_one_name_and_seed_are_lines_of_their_own():
    figure = plots.loss_curves(pd.concat([losses("student", 0, (2, 1), run_id=run) for run in ("run-1", "run-2")]))
    assert [line.name for line in figure.data] == ["student of run-1", "student of run-2"]


def grid_rows(missed=()):
    rows = []
    for head_dim in (16, 32):
        for short in (300.0, 20_000.0, 1e6):
            base = {"model": "base", "head_dim": head_dim, "short_theta": short}
            at = {**base, "phase": "short", "metric": "gate_accuracy"}
            gate = 0.9 if (head_dim, short) in missed else 1.0
            rows += [{**at, "seed": seed, "seq_len": 64, "distance": 8, "value": gate} for seed in (0, 1)]
            for i, long in enumerate((300.0, 20_000.0, 1e6)):
                at = {**base, "model": "student", "long_theta": long, "phase": "extension", "metric": "accuracy"}
                rows += [
                    {**at, "seq_len": 1024, "steps": steps, "seed": seed, "distance": distance, "value": value}
                    for steps in (75, 250)
                    for seed in (0, 1)
                    for distance, value in ((256, 1.0), (512, (head_dim + 10 * i + steps / 50 + seed) / 100))
                ]
    return rows_of("theta_grid", rows=rows)


def test_passkeys_under_interventions_are_ordered_by_likelihood_with_intervals_over_seeds():
    planted = {"clean": (-1.0, -1.5, -0.5), "silenced": (-40.0, -44.0, -36.0), "shifted": (-2.0, -2.0, -2.0)}
    rows = [
        {"metric": metric, "value": value if metric != "hit" else float(value > -1.2), "intervention": what}
        | {"seed": seed, "seq_len": 1024, "distance": 768, "model": "tiny"}
        for what, values in planted.items()
        for seed, value in enumerate(values)
        for metric in ("answer_logprob_nats", "hit")
    ]
    figure = plots.passkey_by_intervention(PASSKEYS.frame(pd.DataFrame(rows)))
    nats, found = (trace for trace in figure.data if trace.marker.size == 11)
    assert list(nats.y) == list(found.y) == ["clean", "shifted", "silenced"]
    np.testing.assert_allclose(nats.x, [-1, -2, -40])
    np.testing.assert_allclose(found.x, [2 / 3, 0, 0])
    half = stats.t.ppf(0.975, 2) / np.sqrt(3)
    np.testing.assert_allclose(nats.error_x.array, [0.5 * half, 0, 4 * half])
    assert not found.error_x.visible
    with pytest.raises(InputError, match="no passkeys under interventions"):
        plots.passkey_by_intervention(PASSKEYS.frame([]))


@pytest.mark.parametrize("values", [[3.16], [1e-9, 3.0], [0.2, 21.0], [0.0]])
def test_a_logarithmic_axis_is_marked_at_round_numbers_within_its_range(values):
    axis = style.log_axis(pd.Series(values), 8)
    low, high = axis.get("range", (0.0, 0.0))
    ticks = np.log10(axis.get("tickvals", []))
    assert ((low <= ticks) & (ticks <= high)).all()
    assert len(ticks) <= 8
    assert len(ticks) > 1 or len(values) == 1  # of one value, plotly chooses


def test_retrieval_by_temperature_has_a_panel_a_distance_and_its_factors_in_order():
    rows = [
        {"model": model, "seed": seed, "temperature": factor, "distance": distance, "metric": "accuracy",
         "purpose": purpose, "trials": 64, "seq_len": 1024, "value": 0.5 * (purpose == "judging") + 0.1 * seed}
        for model in ("base", "kd") for seed in (0, 1) for factor in ("log_n", "10", "1.5", "1")
        for distance in (512, 64) for purpose in ("selection", "judging")
    ]  # fmt: skip
    figure = plots.retrieval_by_temperature(TEMPERED.frame(pd.DataFrame(rows).assign(low=0.0, high=1.0)))
    assert figure.layout.meta["panels"] == ["distance 64 tokens", "distance 512 tokens"]
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len(lines) == 4
    for line in lines:
        assert list(line.x) == ["1", "1.5", "10", "log n"]
        np.testing.assert_allclose(line.y, 0.55)  # judging alone, the mean of two seeds
    low, high = share_interval([0.5, 0.6], [64, 64])
    np.testing.assert_allclose(lines[0].error_y.array, high - 0.55)
    np.testing.assert_allclose(lines[0].error_y.arrayminus, 0.55 - low)
    with pytest.raises(InputError, match="no accuracy by temperature"):
        plots.retrieval_by_temperature(TEMPERED.frame([]))


def test_the_theta_grid_shows_the_means_that_the_verdicts_speak_of():
    frame = grid_rows()
    figure = plots.theta_grid(frame)
    assert notes(figure)[:4] == [f"head dim {dim}, {steps} steps" for dim in (16, 32) for steps in (75, 250)]
    table = cells(frame)
    for panel, ((_, _), part) in zip(figure.data, table.groupby(["head_dim", "steps"]), strict=True):
        np.testing.assert_allclose(panel.z, part.pivot_table("accuracy", "short_theta", "long_theta"))
    assert list(figure.data[0].text[0]) == ["0.18", "0.28", "0.38"]
    assert figure.layout.xaxis.ticktext == ("300<br>8/8", "20k<br>5/8", "1M<br>3/8")
    assert figure.layout.yaxis3.ticktext == ("300<br>7/16", "20k<br>4/16", "1M<br>3/16")
    assert "seeds 0, 1" in notes(figure)[-1]
    assert "missed" not in notes(figure)[-1]


def test_the_theta_grid_outlines_the_diagonal_and_draws_the_base_bound_between_cells():
    figure = plots.theta_grid(grid_rows())
    first = [shape for shape in figure.layout.shapes if shape.xref == "x"]
    assert [(shape.x0, shape.y0) for shape in first if shape.type == "rect"] == [(-0.5, -0.5), (0.5, 0.5), (1.5, 1.5)]
    bounds = {shape.xref: shape.x0 for shape in figure.layout.shapes if shape.type == "line"}
    assert bounds == {"x": 1.5, "x2": 1.5, "x3": 0.5, "x4": 0.5}
    assert any("base bound 12.5k" in note for note in notes(figure))


def test_the_theta_grid_marks_cells_whose_base_missed_its_gate():
    figure = plots.theta_grid(grid_rows(missed={(16, 1e6)}))
    marked = [[all(text.endswith("*") for text in row) for row in panel.text] for panel in figure.data]
    assert marked == [[False, False, True]] * 2 + [[False] * 3] * 2
    assert "missed its gate" in notes(figure)[-1]


def test_a_theta_grid_without_the_distance_is_refused():
    frame = grid_rows()
    with pytest.raises(InputError, match="no accuracy at 512 tokens"):
        plots.theta_grid(frame[frame["distance"] != 512])


def test_the_gallery_draws_every_figure_of_its_experiment(tmp_path):
    for arm in ("kd_phase_wise", "kd_small_theta"):
        with new_run(tmp_path / arm, "phase_scaling", {}) as made:
            made.record(RETRIEVAL, only("retrieval", accuracy(arm, 0, (1, 0.8, 0.6))))
            made.record(RETRIEVAL, only("retrieval", accuracy(arm, 0, (1, 0.8, 0.6)).assign(seq_len=128)))
            made.record(phase_scaling.GEOMETRY, geometry(arm))
            made.record(LOSSES, losses(arm, 0, (2, 1), metric="kd_nats", phase="extension"))
    with new_run(tmp_path / "grid", "theta_grid", {}) as made:
        made.record(THETA_GRID, grid_rows())
    with new_run(tmp_path / "arm", "longred", {}) as made:
        made.record(SKILLS, only("skills", rows_for("trade_off", what_each_drawing_draws("arm")["trade_off"])))
    with new_run(tmp_path / "far", "beyond", {}) as made:
        drawn = what_each_drawing_draws("task")["window_by_distance"]
        made.record(BEYOND, only("beyond", rows_for("window_by_distance", drawn)))
    with new_run(tmp_path / "other", "other", {"note": "no figure"}) as made:
        made.record(LOSSES, [{"metric": "loss", "value": 1.0}])
    page = gallery(
        map(tmp_path.joinpath, ("kd_phase_wise", "kd_small_theta", "grid", "arm", "far", "other")), tmp_path / "out"
    )
    pages = pages_of(page.parent)
    assert {name: page.pictures for name, page in pages.items()} == {
        "index.html": [],
        "phase-scaling.html": [
            "retrieval-by-distance-1", "retrieval-by-distance-2", "retrieval-map-1", "retrieval-map-2",
            "rotations-by-pair-1", "loss-curves-1",
        ],
        "theta-grid.html": ["theta-grid-1"],
        "longred.html": ["trade-off-1"],
        "beyond.html": ["window-by-distance-1"],
        "other.html": [],
    }  # fmt: skip
    assert "window 128" in pages["phase-scaling.html"].text
    assert "1 run, nothing to draw" in pages["index.html"].text
    assert "no figure" in pages["other.html"].text


def test_accuracy_after_several_phases_is_drawn_phase_by_phase(tmp_path):
    with new_run(tmp_path / "run", "distill", {}) as made:
        for phase in ("short", "long"):
            made.record(RETRIEVAL, only("retrieval", accuracy("student", 0, (1, 0.8, 0.6)).assign(phase=phase)))
            made.record(LOSSES, losses("student", 0, (2, 1), phase=phase))
    gallery([tmp_path / "run"], tmp_path / "gallery")
    page = Page(tmp_path / "gallery" / "distill.html")
    assert page.pictures == ["retrieval-by-distance-1", "retrieval-by-distance-2", "loss-curves-1"]
    assert page.text.index("short, window 64") < page.text.index("long, window 64")


@pytest.fixture(scope="module")
def narrow():
    model = load_model(zoo.llama())
    window = repeated_window(zoo.tokens(1, 10)[0], 4)
    shifts = [
        PositionShift(side, 4.0, **where)
        for side in ("q", "k")
        for where in (*({"layers": i} for i in (0, 1)), {"layers": 1, "heads": 0}, *({"pairs": p} for p in range(4)))
    ]
    return trace(model, window, shifts, control=True).assign(model="tiny", seed=0)


def test_sensitivity_by_pair_shows_the_numbers_of_the_frame(narrow):
    figure = plots.sensitivity_by_pair(narrow)
    lines = {line.name: line for line in figure.data}
    rows = narrow[(narrow["metric"] == "kl_nats") & (narrow["side"] == "k") & narrow["pair"].notna()]
    expected = rows.groupby("wavelength")["value"].mean()
    np.testing.assert_allclose(lines["keys only"].x, expected.index)
    np.testing.assert_allclose(lines["keys only"].y, expected)
    assert list(lines["queries only"].customdata) == [0, 1, 2, 3]
    assert not [
        symbol for line in ("queries only", "keys only") for symbol in lines[line].marker.symbol if "open" in symbol
    ]
    rounding = plots.sensitivity_by_pair(narrow.assign(value_float64=0.0)).data[1]
    assert set(rounding.marker.symbol) == {"diamond-open"}
    floor = next(line for name, line in lines.items() if name.startswith("noise floor"))
    assert (np.asarray(floor.y) < expected.to_numpy()).all()


def test_injected_by_read_shows_the_numbers_of_the_frame(narrow):
    figure = plots.injected_by_read(narrow)
    panel = figure.data[0]
    assert list(panel.y) == ["layer 0", "layer 1", "layer 1, head 0"]
    assert list(panel.x) == ["after layer 0", "after layer 1", "logits"]
    table = np.asarray(panel.customdata, dtype=float)
    assert np.isnan(table[1:, 0]).all()
    rows = narrow[(narrow["side"] == "q") & (narrow["inject_layer"] == 1) & narrow["head"].notna()]
    value = rows[(rows["site"] == "logits") & (rows["metric"] == "rel_l2")]["value"].mean()
    assert table[2, 2] == pytest.approx(value)


def shifted_heads(layers, heads, *, whole_layers=True, value=1.0):
    """Rows of a shift of q in each head of each layer, read after the last layer and at the logits."""
    row = {"run_id": "a", "seq_len": 64, "document": 0, "side": "q", "kind": "PositionShift", "delta_tokens": 16.0}
    reads = [
        {"site": f"blocks.{layers - 1}.hook_resid_post", "layer": layers - 1, "metric": "rel_l2"},
        {"site": "logits", "metric": "rel_l2"},
        {"site": "logits", "metric": "kl_nats"},
    ]
    injected = [(layer, head) for layer in range(layers) for head in [*[None] * whole_layers, *range(heads)]]
    return rows_of("deltas", rows=[
        {**row, **read, "inject_layer": layer, "head": head, "value": value + layer + (head or 0) / 100}
        for layer, head in injected for read in reads
    ])  # fmt: skip


def test_injected_by_read_has_room_for_deep_models():
    figure = plots.injected_by_read(shifted_heads(30, 9))
    assert list(figure.data[0].y) == [f"layer {layer}" for layer in range(30)]
    assert figure.layout.height < 1200
    assert "270 single heads are left out" in notes(figure)[-1]
    assert "left out" not in notes(plots.injected_by_read(shifted_heads(6, 9)))[-1]
    assert plots.injected_by_read(shifted_heads(80, 0)).layout.height < 1200
    assert len(plots.injected_by_read(shifted_heads(80, 0)).layout.yaxis.tickvals) <= 45


def test_many_heads_and_no_whole_layer_are_left_to_the_map_of_heads():
    frame = shifted_heads(30, 9, whole_layers=False)
    assert not plots.sensitivity.is_of_layer(frame).any()
    assert plots.sensitivity.is_effect_of_head(frame).sum() == 270
    with pytest.raises(InputError, match="these results hold no"):
        plots.injected_by_read(frame)
    assert plots.sensitivity.is_of_layer(shifted_heads(6, 9, whole_layers=False)).sum() == 2 * 54


def test_effects_of_heads_show_the_numbers_of_the_frame():
    frame = pd.concat([shifted_heads(30, 9), shifted_heads(30, 9, value=3.0).assign(document=1)])
    frame = pd.concat([frame, frame.assign(delta_tokens=1.0, value=0.1)])  # only the largest dose is drawn
    figure = plots.head_effects(frame, "tiny")
    (panel,) = figure.data
    assert (len(panel.y), len(panel.x)) == (30, 9)
    table = np.asarray(panel.customdata, dtype=float)
    assert table[19, 8] == pytest.approx(2 + 19 + 0.08)
    np.testing.assert_allclose(np.asarray(panel.z, dtype=float), np.log10(table))
    assert "head 8 of layer 29, 31 nats" in notes(figure)[-1]
    rounding = plots.head_effects(frame.assign(value_float64=0.0)).data[0]
    assert np.isnan(np.asarray(rounding.z, dtype=float)).all()


def test_effects_of_pairs_show_the_numbers_of_the_frame_and_wavelengths():
    """Of the largest angle, the mean over documents."""
    rows = [
        {"kind": "PairTurn", "side": "q", "radians": radians, "inject_layer": layer, "pair": pair, "document": document,
         "wavelength": 6.0 * 10**pair, "site": "logits", "metric": "kl_nats", "model": "tiny", "seq_len": 96,
         "value": radians * (1 + layer + 10 * pair + document)}
        for radians in (0.1, 1.0) for layer in range(3) for pair in range(2) for document in range(2)
    ]  # fmt: skip
    figure = plots.pair_effects(rows_for("pair_effects", rows), "tiny")
    (panel,) = figure.data
    np.testing.assert_allclose(panel.customdata, [[1.5, 11.5], [2.5, 12.5], [3.5, 13.5]])
    assert list(figure.layout.xaxis.ticktext) == ["0<br>6", "1<br>60"]
    assert "pair 1 of layer 2" in notes(figure)[-1]
    with pytest.raises(InputError, match="single pairs of a layer"):
        plots.pair_effects(rows_for("pair_effects", rows[:0]))


def test_effects_of_heads_have_room_for_large_models():
    rows = shifted_heads(80, 128)
    figure = plots.head_effects(rows)
    assert figure.layout.height < 1300
    assert len(figure.layout.xaxis.tickvals) <= 20
    assert len(figure.layout.yaxis.tickvals) <= 60


def test_effects_of_layers_show_the_numbers_of_the_frame():
    frame = pd.concat([shifted_heads(30, 2), shifted_heads(30, 2, value=3.0).assign(document=1)])
    keys = frame.assign(side="k", value=0.5)
    figure = plots.layer_effects(pd.concat([frame, keys]))
    bars = {bar.name: bar for bar in figure.data}
    np.testing.assert_allclose(bars["queries only"].y, 2.0 + np.arange(30))
    np.testing.assert_allclose(bars["queries only"].error_y.array, 1.0)
    np.testing.assert_allclose(bars["keys only"].y, 0.5)
    assert len(plots.layer_effects(shifted_heads(80, 0)).data[0].x) == 80


def test_the_gallery_maps_heads_and_layers_of_real_shifts(tmp_path):
    model, window = load_model(zoo.llama()), repeated_window(zoo.tokens(1, 10)[0], 2)
    shifts = [PositionShift("q", 4.0, layers=layer, **heads) for layer in (0, 1) for heads in ({}, {"heads": 1})]
    with new_run(tmp_path / "run", "trace", {}) as made:
        frame = made.record(DELTAS, trace(model, window, shifts), model="tiny", seed=0)
    figures = {name: figure for name, _, figure in drawn_from([tmp_path / "run"])}
    rows = frame[(frame["site"] == "logits") & (frame["metric"] == "kl_nats")]
    value = rows["value"].groupby([rows["inject_layer"], rows["head"].fillna(-1)]).mean()
    np.testing.assert_allclose(figures["layer_effects"].data[0].y, [value[0, -1], value[1, -1]])
    np.testing.assert_allclose(figures["head_effects"].data[0].customdata, [[value[0, 1]], [value[1, 1]]])


def test_pairs_of_two_kinds_of_layers_are_two_lines():
    local, whole = "0-4, 6-10, 12-16", "5, 11, 17"
    row = {
        "kind": "PairTurn",
        "side": "q",
        "site": "logits",
        "metric": "kl_nats",
        "document": 0,
        "seq_len": 64,
        "radians": 1.0,
    }
    rows = [
        {**row, "pair": pair, "wavelength": 2 * np.pi * theta ** (pair / 4), "value": value + pair,
         "inject_layers": layers}
        for layers, theta, value in ((local, 1e4, 1.0), (whole, 1e6, 10.0))
        for pair in range(4)
    ]  # fmt: skip
    lines = plots.sensitivity_by_pair(rows_of("deltas", rows=rows)).data
    assert [line.name for line in lines] == [
        "queries only,<br>layers 0-4, 6-10, 12-16", "queries only,<br>layers 5, 11, 17"
    ]  # fmt: skip
    np.testing.assert_allclose(lines[0].y, [1, 2, 3, 4])
    np.testing.assert_allclose(lines[1].y, [10, 11, 12, 13])
    assert lines[0].line.dash != lines[1].line.dash
    (line,) = plots.sensitivity_by_pair(rows_of("deltas", rows=rows[:4])).data
    assert line.name == "queries only"


def test_tasks_without_a_distance_are_points_with_their_intervals(tmp_path):
    rows = [
        {"task": task, "metric": "accuracy", "value": value, "low": value - 0.1, "high": value + 0.2, "seq_len": 2048}
        for task, value in (("vt", 0.5), ("fwe", 0.25))
    ]
    passkey = {"task": "passkey", "metric": "accuracy", "value": 1.0, "distance": 64, "seq_len": 2048}
    with new_run(tmp_path / "run", "retrieval", {}) as made:
        made.record(RETRIEVAL, [*rows, passkey], model="one", seed=0)
        for seed in (0, 1):
            made.record(RETRIEVAL, [{**row, "value": row["value"] + seed / 5} for row in rows], model="two", seed=seed)
    figures = {(name, label): figure for name, label, figure in drawn_from([tmp_path / "run"])}
    assert set(figures) == {("retrieval_by_distance", "passkey, window 2048"), ("retrieval_by_task", "window 2048")}
    one, two, seeds = figures["retrieval_by_task", "window 2048"].data
    assert (one.name, list(one.x)) == ("one", ["fwe", "vt"])
    np.testing.assert_allclose(one.y, [0.25, 0.5])
    np.testing.assert_allclose(one.error_y.array, 0.2)
    np.testing.assert_allclose(one.error_y.arrayminus, 0.1)
    np.testing.assert_allclose(two.y, [0.35, 0.6])
    assert not two.error_y.visible
    assert sorted(seeds.y) == pytest.approx([0.25, 0.45, 0.5, 0.7])


def test_figures_of_deep_models_have_a_height_that_can_be_read():
    layers, documents = range(80), [1, 2]
    row = {"kind": ["Copy"], "metric": ["rel_l2"], "document": documents, "layer": layers, "seq_len": [64]}
    copies = rows_of("deltas", rows=every(1, **row, site=[f"blocks.0.{site}" for site in plots.propagation.PANELS]))
    assert plots.copy_heatmap(copies).layout.height < 2400
    heads = rows_of(HEADS.name, rows=every(0, metric=["sink"], layer=layers, head=range(128)))
    assert len(plots.head_map(heads).layout.yaxis.tickvals) <= 50


def test_single_shifts_of_parts_are_no_dose_response(narrow):
    with pytest.raises(InputError, match="PositionShift"):
        plots.dose_response(narrow)


def test_the_signal_shows_the_numbers_of_the_frame():
    teacher, student = load_model(zoo.llama()), load_model(zoo.model(zoo.CONFIGS["llama"](), seed=1))
    window = repeated_window(zoo.tokens(1, 10)[0], 4)
    shifts = [PositionShift("q", 0.1), PositionShift("q", 4.0)]
    frame = distillation_signal(teacher, student, window, shifts).assign(model="tiny", seed=0)
    figure = plots.signal_of_distillation(frame)
    assert str(shifts[1]) in figure.layout.annotations[-1].text.replace("<br>", " ")
    lines = {line.name: line for line in figure.data}
    loss = frame[(frame["metric"] == "loss_kl_nats") & frame["occurrence"].notna()]
    assert lines["loss of tiny"].x[0] == "new"
    np.testing.assert_allclose(lines["loss of tiny"].y, loss["value"])
    at = (frame["perturbation"] == str(shifts[1])) & (frame["site"] == "blocks.1.attn.W_K")
    of_keys = frame[at].set_index("metric")["value"]
    sizes, cosines = (
        [line for line in figure.data if line.name == "tiny" and line.xaxis == axis] for axis in ("x2", "x3")
    )
    marks, along = (dict(zip(lines[0].x, lines[0].y, strict=True)) for lines in (sizes, cosines))
    assert list(marks) == list(along) == [f"{i}, W_{matrix}" for i in (0, 1) for matrix in "QKV"]
    assert along["1, W_K"] == pytest.approx(of_keys["remaining_gradient_cosine"])
    remaining = frame[(frame["metric"] == "remaining_kl_nats") & frame["occurrence"].notna()]
    remaining = remaining[remaining["perturbation"] == str(shifts[1])]
    np.testing.assert_allclose(lines["loss of tiny, teacher perturbed"].y, remaining["value"])
    assert marks["1, W_K"] == pytest.approx(of_keys["signal_gradient"] / of_keys["loss_gradient"])


def test_head_maps_say_what_they_are_means_over():
    rows = every(0, metric=["previous_token"], layer=[0, 1], head=[0, 1], seed=[0, 3])
    figure = plots.head_map(rows_of(HEADS.name, rows=rows))
    np.testing.assert_allclose(figure.data[0].z, [[0.05, 0.25], [0.45, 0.65]])
    assert "seeds 0, 3" in notes(figure)[-1]


HOSTILE = "<a href='http://127.0.0.1/'>x</a><b>bold</b>&amp;%{y}$x$<br>"
SHOWN = ("name", "text", "ticktext", "hovertemplate", "customdata", "x", "y", "title", "categoryarray")


def texts_of(value, key=""):
    """Every text in a figure's JSON that plotly shows."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from texts_of(inner, name if name in SHOWN else key)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_of(inner, key)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("field", ["model", "arm", "phase"])
def test_names_are_text_in_plotly_too(run, field):
    rows = [{"metric": "accuracy", "value": 0.5, "distance": d, "seq_len": 64, "seed": 0} for d in (8, 16)]
    frame = rows_of("retrieval", "geometry", rows=rows).assign(**{field: HOSTILE}, low=0.4, high=0.6)
    figures = [plots.retrieval_by_distance(frame, HOSTILE)]
    losses_of = losses("student", 0, (2, 1)).assign(**{field: HOSTILE})
    figures.append(plots.loss_curves(losses_of, HOSTILE))
    traced = read_run(run)[0]["deltas"].assign(**{field: HOSTILE})
    figures += [plots.copy_heatmap(traced, HOSTILE), plots.dose_response(traced, HOSTILE)]
    for figure in figures:
        texts = list(texts_of(json.loads(figure.to_json())))
        assert any("&lt;a href" in text for text in texts)
        assert not [text for text in texts if "<a" in text or "<b>" in text or "bold</b>" in text]
        assert not [text for text in texts if "%{y}$x" in text]


def every(first, **columns):
    """Rows for every combination of what the columns hold; their values count up from the first."""
    combined = itertools.product(*columns.values())
    return [
        dict(zip(columns, row, strict=True)) | {"value": first + i / 10, "value_float64": 0.0}
        for i, row in enumerate(combined)
    ]


def what_each_drawing_draws(name):
    """Rows for every drawing, by its name, with `name` wherever a row may hold any text."""
    runs = {"run_id": [name], "experiment": [name], "model": [name], "seed": [0, 1]}
    accuracies = {**runs, "metric": ["accuracy"], "seq_len": [64], "distance": [8, 16], "low": [0.0], "high": [1.0]}
    shifts = {**runs, "seq_len": [64], "document": [0, 1], "side": ["q", "qk"], "kind": ["PositionShift"]}
    weights = {**runs, "metric": ["rel_change"], "layer": [0, 1]}
    matrices = {"site": ["blocks.0.attn.W_Q", "blocks.0.attn.W_K"], "wavelength": [6.0], "wavelength_after": [9.0]}
    pairs = every(1, **weights, **matrices, head=[0, 1], pair=[0, 1]) + every(
        1, **runs, metric=["turning_pairs"], phase=["before", name], seq_len=[64]
    )
    base = {**runs, "head_dim": [16], "short_theta": [300.0, 20_000.0]}
    curves = {**accuracies, "into": [name], "span_set": [name], "moved": [0, 4], "movable": [4]}
    signal = {**runs, "metric": ["loss_kl_nats", "signal_kl_nats"], "perturbation": [name], "seq_len": [64]}
    gradients = {**signal, "metric": ["loss_gradient", "signal_gradient"]}
    return {
        "retrieval_by_distance": every(0, **accuracies)
        + every(16, **runs, metric=["document_length"], phase=["extension"], seq_len=[16]),
        "trade_off": every(
            0, **runs, metric=["short_accuracy", "long_accuracy"], arm=[name], seq_len=[64], query_scale=[1.0],
            trials=[512], low=[0.0], high=[1.0],
        ),
        "theta_grid": every(0, **{**base, **accuracies, "distance": [512]}, phase=[name], steps=[75],
                            long_theta=[300.0, 20_000.0])
        + every(1, **base, metric=["gate_accuracy"], phase=["short"], seq_len=[64]),
        "retrieval_by_temperature": every(
            0, **accuracies, temperature=["1", "1.5", "log_n"], purpose=["judging"], control=[name],
        ),
        "loss_by_position": every(
            0, **runs, metric=["loss_nats"], rotation=[name, "own"], temperature=["none", name], task=[name],
            position=[0, 256, 1024],
        ),
        "window_by_distance": every(
            0, **runs, metric=["hit"], rotation=[name, "own"], temperature=["none", name], task=[name],
            seq_len=[4096, 8192], distance=[100, 3000], unit=[0],
        ),
        "rotations_by_pair": every(1, **runs, phase=[name], seq_len=[64], metric=["rotations"], pair=[0, 1, 2],
                                   wavelength=[6.0])
        + every(1, **runs, phase=[name], seq_len=[64], metric=["spectrum_use"]),
        "loss_curves": every(1, **runs, phase=[name, "short"], metric=["ce_nats", "kd_nats"], tokens=[8, 16]),
        "copy_heatmap": every(
            1, **runs, arm=[name], kind=["Copy"], metric=["rel_l2"], document=[1, 2], layer=[0, 1], seq_len=[64],
            site=[f"blocks.0.{site}" for site in plots.propagation.PANELS],
        ),
        "dose_response": every(1, **shifts, metric=["kl_nats"], delta_tokens=[1.0, 4.0], restriction=[name]),
        "drift_by_layer": every(0, **runs, metric=["cosine_distance"], layer=[0, 1], seq_len=[64], positions=[64])
        + every(0, **runs, metric=["attention_kl_nats"], layer=[0, 1], head=[0, 1], seq_len=[64], positions=[64]),
        "positional_shares": every(
            1, **runs, metric=[*positional.SHARES, positional.BY_CHANCE], layer=[0, 1], seq_len=[64], contents=[4],
            site=["blocks.0.hook_resid_post", "blocks.1.attn.unrotated_q"], places=[3], content_length=[8],
        )
        + every(1, **runs, metric=["position_share"], site=["logits"], seq_len=[64]),
        "injected_by_read": every(
            1, **shifts, metric=["rel_l2"], site=["logits", "blocks.0.hook_resid_post"], inject_layer=[0, 1],
            head=[None, 0], layer=[0, None], delta_tokens=[4.0],
        ),
        "lens_by_layer": [
            row
            for layer in (0, 1)
            for row in every(
                1, **shifts, metric=["kl_nats"], site=[f"blocks.{layer}.lens"], layer=[layer],
                inject_layer=[None, 0, 1], head=[None, 0], delta_tokens=[4.0],
            )
        ],
        "sensitivity_by_pair": every(1, **shifts, metric=["kl_nats"], pair=[0], wavelength=[6.0], delta_tokens=[4.0]),
        "layer_effects": every(
            1, **shifts, metric=["kl_nats"], site=["logits"], inject_layer=[0, 1], delta_tokens=[4.0]
        ),
        "head_effects": every(
            1, **shifts, metric=["kl_nats"], site=["logits"], inject_layer=[0, 1], head=[0, 1], delta_tokens=[4.0]
        ),
        "pair_effects": every(
            1, **{**shifts, "kind": ["PairTurn"]}, metric=["kl_nats"], site=["logits"], inject_layer=[0, 1],
            pair=[0, 1], wavelength=[6.0], radians=[1.0],
        ),
        "passkey_by_intervention": every(
            -1, **runs, metric=["answer_logprob_nats", "hit"], intervention=["clean", name], seq_len=[64],
            distance=[16],
        ),
        "retrieval_by_task": every(
            0, **runs, metric=["accuracy"], task=[name, "vt"], seq_len=[64], low=[0.0], high=[1.0]
        ),
        "retrieval_map": every(0, **{**accuracies, "seq_len": [64, 128]}, task=["passkey"], trials=[8]),
        "head_map": every(0, **runs, metric=list(plots.heads.PANELS), layer=[0, 1], head=[0, 1]),
        "massive_map": every(1, **runs, metric=["ratio"], states=["q", "k", "v"], layer=[0, 1], head=[0, 1],
                             pair=[0, 1], wavelength=[6.0], seq_len=[64]),
        "head_pairs": every(
            1, **runs, metric=["pair_contribution"], layer=[0, 1], head=[0, 1], pair=[0, 1], wavelength=[6.0]
        ),
        "transplants": every(0, **accuracies, into=[name], group=[name, "nothing"]),
        "causal_curves": every(0, **curves, order=[name, "greedy"])
        + every(0, **curves, order=["random"], draw=[0, 1]),
        "change_by_part": every(1, **weights, site=["blocks.0.attn.W_Q", "blocks.0.mlp", name]),
        "span_heatmap": pairs,
        "span_heads": pairs,
        "signal_of_distillation": every(1, **signal)
        + every(1, **signal, occurrence=["new"])
        + every(1, **signal, occurrence=["again"], distance=[1, 8])
        + every(1, **gradients, site=[f"blocks.{layer}.attn.W_{matrix}" for layer in (0, 1) for matrix in "QKV"]),
        "trace_cost": every(1, **{**runs, "seed": [None]}, metric=["seconds", "seconds_fitted"], layers=[4],
                            perturbations=[8], seq_len=[64, 128]),
    }  # fmt: skip


def contents(part, kind):
    """All that is of a kind in a figure's JSON, without the template that all figures share."""
    if isinstance(part, kind):
        return [part]
    if isinstance(part, dict):
        part = [value for key, value in part.items() if key != "template"]
    return [found for inner in part for found in contents(inner, kind)] if isinstance(part, list) else []


def numbers(figure):
    data = json.loads(json.dumps([trace.to_plotly_json() for trace in figure.data], default=np.ndarray.tolist))
    return [contents([trace.get(key) for key in "xyz"], float) for trace in data]


ODD_NAME = '<a href="#">odd</a>&lt;%{y}$z$'
ODD_NAME_AS_TEXT = '&lt;a href="#"&gt;odd&lt;/a&gt;&amp;lt;&#37;{y}&#36;z&#36;'
NAMELESS = {"theta_grid", "copy_heatmap", "dose_response", "injected_by_read", "sensitivity_by_pair", "change_by_part",
            "positional_shares", "trace_cost", "head_map", "layer_effects", "head_effects", "pair_effects",
            "lens_by_layer", "massive_map", "retrieval_map", "head_pairs"}  # fmt: skip


@pytest.mark.parametrize("drawing", plots.DRAWINGS, ids=lambda drawing: drawing.name)
def test_names_are_shown_as_text(drawing):
    figure = drawing.draw(rows_for(drawing.name, what_each_drawing_draws(ODD_NAME)[drawing.name]), ODD_NAME)
    spec = json.loads(figure.to_json())
    assert spec["layout"]["meta"]["title"].endswith(ODD_NAME_AS_TEXT)
    spec["layout"].pop("meta")
    texts = ["".join(text.replace("<br>", " ").split()) for text in contents(spec, str)]  # however it is wrapped
    named = [text for text in texts if "odd" in text]
    assert all("<a" not in text for text in named)
    whole = [text for text in named if "…" not in text]  # a name that is cut ends with a digest
    assert all("odd" not in text.replace("".join(ODD_NAME_AS_TEXT.split()), "") for text in whole)
    assert len(named) == 1 if drawing.name in NAMELESS else len(named) > 1
    assert html.unescape(ODD_NAME_AS_TEXT) == ODD_NAME
    plain = drawing.draw(rows_for(drawing.name, what_each_drawing_draws("plain")[drawing.name]), "plain")
    assert numbers(figure) == numbers(plain)


def test_what_cannot_be_seen_in_a_name_is_shown_by_its_code():
    figure = plots.loss_curves(pd.concat([losses("a\n\u202e", 0, (2, 1)), losses("a\\n\\u202e", 0, (2, 1))]))
    shown = [html.unescape(line.name) for line in figure.data]
    assert shown == ["a\\n\\u202e", "a\\n\\u202e"]
    assert len({line.legendgroup for line in figure.data}) == 2


def test_long_names_are_cut_and_still_told_apart():
    names = ["<&" * 5000 + end for end in "ab"]
    figure = plots.retrieval_by_distance(pd.concat([accuracy(name, 0, (1, 1, 1)) for name in names]), names[0])
    shown = [html.unescape(line.name.replace("<br>", "")) for line in figure.data]
    assert [len(name) for name in shown] == [60, 60]
    assert len(set(shown)) == 2
    assert all(name.startswith("<&<&") for name in shown)
    assert len(html.unescape(figure.layout.meta["title"])) < 130
    curves = what_each_drawing_draws(names[0])["causal_curves"] + what_each_drawing_draws(names[1])["causal_curves"]
    shown = {
        html.unescape(line.name.replace("<br>", ""))
        for line in plots.causal_curves(rows_of("span_effects", rows=curves)).data
        if line.name
    }
    assert max(map(len, shown)) == 60
    assert len(shown) == 4  # two long ones, greedy and random


ODD_VALUES = {
    "string": ("", "a" * 10_000, "a\x00\n\x1b", "2020-01-01", "5"),
    "Int64": (0, -1, 2**40, 2**62),
    "float64": (np.inf, -np.inf, 0.0, -1.0, 1e308),
}


def odd_frames(name):
    """A drawing's frame with each column that it uses emptied, and with odd values in every second row of it."""
    frame = rows_for(name, what_each_drawing_draws("tiny")[name])
    for column in frame.columns[frame.notna().any()].drop(["run_id", "experiment"]):
        yield frame.assign(**{column: pd.Series(None, frame.index, frame[column].dtype)})
        odd = frame.copy()
        values = itertools.cycle(ODD_VALUES[str(frame[column].dtype)])
        odd.loc[::2, column] = list(itertools.islice(values, len(odd.loc[::2])))
        yield odd


@pytest.mark.parametrize("drawing", plots.DRAWINGS, ids=lambda drawing: drawing.name)
def test_odd_rows_are_drawn_or_refused(drawing):
    for frame in odd_frames(drawing.name):
        with suppress(InputError):
            drawing.draw(frame, "").to_json()


@pytest.mark.parametrize(("column", "value"), [
    ("head_dim", 2), ("head_dim", 7), ("head_dim", 2**40), ("short_theta", 0.0), ("long_theta", np.inf),
    ("long_theta", -1.0), ("distance", 2**40), ("distance", 0), ("steps", None), ("seq_len", None),
])  # fmt: skip
def test_rows_that_no_formula_tells_a_bound_for_are_no_cells_of_the_theta_grid(column, value):
    frame = rows_for("theta_grid", what_each_drawing_draws("tiny")["theta_grid"])
    assert plots.grid.is_cell(frame).any()
    assert not plots.grid.is_cell(rows_of("theta_grid", rows=frame.assign(**{column: value}))).any()


def test_rows_that_measure_nothing_are_left_out_and_told(tmp_path):
    frame = pd.concat([losses("tiny", 0, (2, 1, np.nan)), losses("tiny", 0, (np.inf,), phase="long")])
    nameless = losses("tiny", 0, (1,)).assign(metric=None)
    with new_run(tmp_path / "run", "test", {}) as made:
        made.record(LOSSES, pd.concat([frame, nameless]))
    gallery([tmp_path / "run"], tmp_path / "gallery")
    page = (tmp_path / "gallery" / "test.html").read_text()
    assert "without 3 rows that have no metric or no finite value" in page
    (line,) = plots.loss_curves(frame).data
    assert list(line.y) == [2, 1]


def test_what_cannot_be_drawn_is_told_with_its_run(tmp_path):
    cells = grid_rows()
    with new_run(tmp_path / "run", "theta_grid", {}) as made:
        made.record(THETA_GRID, cells[cells["metric"] == "accuracy"])
    with pytest.raises(InputError, match=f"theta grid cannot be drawn from {made.manifest['run_id']}: these results"):
        gallery([tmp_path / "run"], tmp_path / "gallery")
    with new_run(tmp_path / "other", "other", {}) as other:
        other.record(LOSSES, losses("tiny", 0, (2, 1)))
    gallery([tmp_path / "run", tmp_path / "other"], tmp_path / "gallery")
    pages = pages_of(tmp_path / "gallery")
    assert f"theta grid cannot be drawn from {made.manifest['run_id']}: these results" in pages["theta-grid.html"].text
    assert len(pages["other.html"].pictures) == 1


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "run"
    with new_run(folder, "training", {}) as made:
        made.record(LOSSES, losses("tiny", 0, (2, 1)))
    return folder


def test_a_run_given_twice_is_there_once(small_run, tmp_path):
    (tmp_path / "link").symlink_to(small_run)
    runs = [small_run, str(small_run), small_run / ".." / small_run.name, tmp_path / "link"]
    index = gallery(iter(runs), tmp_path / "gallery")
    assert len(list((tmp_path / "gallery" / "manifests").iterdir())) == 1
    assert "1 experiment, 1 run, 1 figure" in Page(index).text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_a_browser_makes_no_link_of_a_name(tmp_path):
    name = """<a href="http://127.0.0.1/">x</a><img src=x onerror=document.title='pwned'>"""
    with new_run(tmp_path / "run", "training", {}) as made:
        both = pd.concat([accuracy(name, 0, (1, 0.8, 0.6)), accuracy("other", 0, (1, 0, 0))])
        made.record(RETRIEVAL, only("retrieval", both).assign(phase=name))
        made.record(LOSSES, losses(name, 0, (2, 1), phase=name))
        made.record(LOSSES, losses("other", 0, (2, 1), phase="long"))
    index = gallery([tmp_path / "run"], tmp_path / "gallery")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/browser"]
    for page in pages_of(index.parent):
        command = ["chromium", *options, "--virtual-time-budget=5000", "--dump-dom", f"file://{index.parent / page}"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        shown = re.sub(r"<script.*?</script>", "", shown, flags=re.DOTALL)
        assert page == index.name or "&lt;a href=" in shown, page
        assert not re.search('<[^>]*href="http', shown)
        assert "<img" not in shown
        assert "pwned</title>" not in shown
