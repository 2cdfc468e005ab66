import re

import numpy as np
import pandas as pd
import pytest

from rope_probe import InputError, PositionShift, copy_deltas, load_model, plots, repeated_window, trace
from rope_probe.report import gallery, write_figure
from rope_probe.results import new_run, read_run, tidy
from tests import zoo


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = load_model(zoo.llama())
    window = repeated_window(zoo.tokens(1, 10)[0], 4)
    shifts = [PositionShift(side, dose) for side in ("q", "k", "qk") for dose in (0.25, 1.0, 4.0)]
    with new_run(folder, "propagation", {"note": "<script>alert(1)</script>"}) as made:
        made.record(copy_deltas(model, window), model="tiny", seed=0, arm="repeated document")
        made.record(trace(model, window, shifts, control=True), model="tiny", seed=0, arm="repeated document")
    return folder


def test_the_heatmap_shows_the_numbers_of_the_frame(run):
    frame, _ = read_run(run)
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
    frame, _ = read_run(run)
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
    frame, _ = read_run(run)
    for draw in (plots.copy_heatmap, plots.dose_response):
        caption = draw(frame).layout.annotations[-1].text.replace("<br>", " ")
        assert "seeds 0" in caption
        assert "window 40 tokens" in caption


def test_shifts_that_are_restricted_differently_are_not_pooled(tmp_path):
    model, window = load_model(zoo.llama()), repeated_window(zoo.tokens(1, 10)[0], 2)
    shifts = [PositionShift("q", dose, layers=layer) for layer in (0, 1) for dose in (1.0, 4.0)]
    frame = trace(model, window, shifts)
    with pytest.raises(InputError, match="2 ways, layers=0, layers=1"):
        plots.dose_response(frame)
    with new_run(tmp_path / "run", "trace", {}) as made:
        made.record(frame, model="a b")
        made.record(frame, model="a-b")
    page = gallery([tmp_path / "run"], tmp_path / "gallery").read_text()
    pages = re.findall(r'<iframe src="([^"]+)"', page)
    assert len(set(pages)) == 4
    assert "layers=1" in (tmp_path / "gallery" / pages[1]).read_text()


def test_shifts_back_and_by_nothing_are_drawn():
    frame = trace(load_model(zoo.llama()), repeated_window(3, 4), [PositionShift("q", d) for d in (-4.0, 0.0, 4.0)])
    assert plots.dose_response(frame).layout.xaxis.type == "linear"


@pytest.mark.parametrize("draw", [plots.copy_heatmap, plots.dose_response])
def test_frames_without_the_rows_are_refused(draw):
    with pytest.raises(InputError, match="hold no"):
        draw(tidy([{"metric": "accuracy", "value": 1.0}]))


def test_what_is_rounding_is_left_grey():
    frame = copy_deltas(load_model(zoo.llama()), repeated_window(zoo.tokens(1, 10)[0], 4), masked=True)
    figure = plots.copy_heatmap(frame)
    rotated, residual = (np.asarray(figure.data[panel].z, dtype=float) for panel in (0, 5))
    assert np.isfinite(rotated).all()
    assert np.isnan(residual).all()
    assert "grey: rounding" in figure.layout.annotations[-1].text.replace("<br>", " ")


def test_the_gallery_works_offline_and_links_what_is_there(run, tmp_path):
    index = gallery([run], tmp_path / "gallery")
    page = index.read_text()
    pages = re.findall(r'<iframe src="([^"]+)"', page)
    assert len(pages) == 2
    for name in pages:
        figure = (tmp_path / "gallery" / name).read_text()
        assert 'src="plotly.min.js"' in figure
        assert not re.search(r"(src|href)=[\"']https?://", figure + page)
    assert (tmp_path / "gallery" / "plotly.min.js").exists()
    assert "<script>alert" not in page


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
        made.record(tidy([{"metric": "ce_nats", "value": 1.0}]))
    with pytest.raises(InputError, match="nothing"):
        gallery([tmp_path / "run"], tmp_path / "gallery")
    assert not (tmp_path / "gallery").exists()


def test_figures_are_written_where_asked(run, tmp_path):
    page = write_figure(plots.dose_response(read_run(run)[0]), tmp_path / "deep" / "figure.html")
    assert page.is_file()
    assert isinstance(read_run(run)[0], pd.DataFrame)


def accuracy(model, seed, values):
    rows = [{"seq_len": 64, "distance": d, "metric": "accuracy", "value": v, "low": v - 0.1, "high": v + 0.1}
            for d, v in zip((8, 16, 32), values, strict=True)]  # fmt: skip
    return tidy(rows).assign(model=model, seed=seed)


def test_retrieval_shows_means_and_seeds(tmp_path):
    frame = pd.concat(
        [accuracy("kd", 0, (1, 0.8, 0.6)), accuracy("kd", 1, (0.8, 0.6, 0.2)), accuracy("ce", 0, (1, 0, 0))]
    )
    figure = plots.retrieval_by_distance(frame)
    lines = {line.name: line for line in figure.data if line.name}
    np.testing.assert_allclose(lines["kd"].y, [0.9, 0.7, 0.4])
    np.testing.assert_allclose(lines["ce"].error_y.array, 0.1)
    assert (lines["kd"].error_y.visible, lines["ce"].error_y.visible) == (False, True)
    points = next(line for line in figure.data if line.name is None)
    assert sorted(points.y) == [0.2, 0.6, 0.6, 0.8, 0.8, 1]


def test_runs_of_one_experiment_are_drawn_together(tmp_path):
    for model in ("kd", "ce"):
        with new_run(tmp_path / model, "phase_scaling", {}) as made:
            made.record(accuracy(model, 0, (1, 0.8, 0.6)))
    page = gallery([tmp_path / "kd", tmp_path / "ce"], tmp_path / "gallery").read_text()
    (name,) = re.findall(r'<iframe src="([^"]+)"', page)
    drawn = (tmp_path / "gallery" / name).read_text()
    assert '"name":"kd"' in drawn
    assert '"name":"ce"' in drawn
    assert page.count("<h3>phase_scaling") == 2
