"""Figures of changed and transplanted spans."""

import copy

import numpy as np
import pytest

from rope_probe import InputError, compare_spans
from rope_probe.gallery import figures as plots
from rope_probe.gallery.report import gallery
from rope_probe.runs.results import new_run, read_tables
from rope_probe.spans import landmarks
from rope_probe.spans.causal import SPAN_EFFECTS
from rope_probe.spans.statistics import LANDMARKS
from rope_probe.spans.weights import SPANS
from tests import zoo
from tests.frames import rows_of


def checkpoints(seed):
    before = zoo.model(zoo.CONFIGS["llama"](), seed=seed)
    after = copy.deepcopy(before)
    for name, parameter in after.named_parameters():
        if "q_proj" in name or "mlp" in name:
            parameter.data *= 1.5
    return before, after


def curve(order, values, draw=None, seed=0):
    return [
        {"arm": "curve", "into": "end", "span_set": "query spans kept in the end", "order": order, "draw": draw,
         "group": str(n), "moved": n, "movable": 4, "seq_len": 64, "distance": distance, "seed": seed, "model": "tiny",
         "metric": "accuracy", "value": value + 0.1 * k}
        for n, value in values.items()
        for k, distance in enumerate((8, 16))
    ]  # fmt: skip


TRANSPLANTS = [
    {"arm": "groups", "into": into, "group": group, "seq_len": window, "distance": 8, "seed": seed, "model": "tiny",
     "metric": "accuracy", "value": value + 0.1 * seed}
    for into in ("start", "end")
    for group, value in (("nothing", 0.1), ("W_Q", 0.6))
    for window in (16, 64)
    for seed in (0, 1)
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with new_run(folder, "query_spans", {}) as made:
        for seed in (0, 1):
            models = checkpoints(seed)
            made.record(SPANS, compare_spans(*models), model="tiny", seed=seed)
            made.record(LANDMARKS, landmarks(*models, short=16, long=128), model="tiny", seed=seed)
        made.record(SPAN_EFFECTS, TRANSPLANTS)
        made.record(SPAN_EFFECTS, curve("by single effect", {0: 0.0, 2: 0.5, 4: 0.8}))
        made.record(SPAN_EFFECTS, curve("random", {0: 0.0, 2: 0.1, 4: 0.8}, draw=0))
        made.record(SPAN_EFFECTS, curve("random", {0: 0.0, 2: 0.3, 4: 0.8}, draw=1))
    return folder


def test_the_heatmap_of_pairs_shows_the_mean_over_heads_and_where_windows_end(run):
    frame = read_tables([run]).joined(["spans", "landmarks"])
    figure = plots.span_heatmap(frame, "tiny")
    queries, keys, norms, norms_of_keys = figure.data
    np.testing.assert_allclose(queries.z, 0.5, rtol=1e-6)
    changed = frame[(frame["metric"] == "change_norm") & frame["site"].str.endswith("W_Q") & frame["pair"].notna()]
    np.testing.assert_allclose(norms.z, changed.pivot_table(index="layer", columns="pair", values="value"))
    assert (queries.coloraxis, norms.coloraxis) == ("coloraxis", "coloraxis2")
    assert (np.asarray(norms_of_keys.z) == 0).all()
    assert queries.z.shape == (2, 4)
    assert (np.asarray(keys.z) == 0).all()
    turning = frame[frame["metric"] == "turning_pairs"].groupby("phase")["value"].first()
    lines = sorted({shape.x0 for shape in figure.layout.shapes if shape.x0 == shape.x1})
    assert lines == sorted(turning - 0.5)
    assert figure.layout.xaxis.ticktext[0] == "0<br>6.28"  # the pair, and its wavelength
    texts = [note.text for note in figure.layout.annotations]
    assert any(text.endswith("window before: 16") for text in texts)
    assert any(text.endswith("window after: 128") for text in texts)
    assert "mean over heads; seeds 0, 1" in texts[-1].replace("<br>", " ")


def test_the_panel_of_heads_is_of_one_seed(run):
    frame = read_tables([run]).joined(["spans", "landmarks"])
    queries, keys, *norms = plots.span_heads(frame).data
    assert [panel.z.shape for panel in norms] == [queries.z.shape, keys.z.shape]
    assert queries.z.shape == (8, 4)
    assert keys.z.shape == (4, 4)
    assert [name.strip() for name in queries.y[:5]] == ["0.0", "0.1", "0.2", "0.3", "1.0"]


def test_parts_are_drawn_by_layer(run):
    frame = read_tables([run])["spans"]
    figure = plots.change_by_part(frame)
    lines = {line.name: line for line in figure.data if line.mode == "lines+markers" and line.xaxis == "x"}
    assert list(lines) == ["W_Q", "W_K", "W_V", "W_O", "MLP"]
    norms = {line.name: line for line in figure.data if line.mode == "lines+markers" and line.xaxis == "x2"}
    changed = frame[(frame["metric"] == "change_norm") & frame["head"].isna() & frame["site"].str.endswith("mlp")]
    np.testing.assert_allclose(norms["MLP"].y, changed.groupby("layer")["value"].mean())
    for name, wanted in (("W_Q", 0.5), ("MLP", 0.5), ("W_V", 0.0)):
        np.testing.assert_allclose(lines[name].y, wanted, rtol=1e-6)


def test_curves_are_means_and_random_orders_a_band(run):
    frame = read_tables([run])["span_effects"]
    figure = plots.causal_curves(frame)
    lines = {line.name: line for line in figure.data if line.name}
    np.testing.assert_allclose(lines["by single effect"].x, [0, 0.5, 1])
    np.testing.assert_allclose(lines["by single effect"].y, [0.05, 0.55, 0.85])
    np.testing.assert_allclose(lines["random"].y, [0.05, 0.25, 0.85])
    band = next(line for line in figure.data if line.fill == "toself")
    np.testing.assert_allclose(sorted(band.y), sorted([0.05, 0.35, 0.85, 0.85, 0.15, 0.05]))


def test_transplants_are_bars_with_the_range_of_seeds(run):
    frame = read_tables([run])["span_effects"]
    figure = plots.transplants(frame)
    assert [note.text for note in figure.layout.annotations][:2] == ["window of 64 tokens", "window of 16 tokens"]
    bars = figure.data[0]
    assert (bars.name, list(bars.y)) == ("into the start", ["nothing", "W_Q"])
    np.testing.assert_allclose(bars.x, [0.15, 0.65])
    np.testing.assert_allclose(bars.error_x.array, 0.05)


@pytest.mark.parametrize("draw", [plots.span_heatmap, plots.span_heads, plots.change_by_part, plots.causal_curves,
                                  plots.transplants])  # fmt: skip
def test_frames_without_the_rows_are_refused(draw):
    with pytest.raises(InputError, match="these results hold no"):
        draw(rows_of("spans", "landmarks", "span_effects", rows=[{"metric": "loss", "value": 1.0}]))


def test_the_gallery_has_these_figures_and_no_retrieval_of_perturbed_models(run, tmp_path):
    gallery([run], tmp_path / "gallery")
    (page,) = [page for page in (tmp_path / "gallery").glob("*.html") if page.name != "index.html"]
    drawn = page.read_text()
    for name in ("transplants", "causal-curves", "change-by-part", "span-heatmap", "span-heads"):
        assert f'id="{name}-1-data"' in drawn
    assert "retrieval-by-distance" not in drawn
