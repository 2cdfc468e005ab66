"""The logit lens: by hand from transformers' modules, against the logits, in blocks, and from disk."""

import numpy as np
import pytest
import torch

from rope_probe import InputError, PositionShift, copy_deltas, load_model, pack, repeated_window, trace
from rope_probe.gallery import figures as plots
from rope_probe.models import checkpoints
from rope_probe.models.architectures import final_norm_of
from rope_probe.precision import promote_float32
from rope_probe.runs.tables import TABLES
from rope_probe.tracing import cone, propagation
from rope_probe.tracing.deltas import LOGIT_METRICS
from tests import zoo
from tests.frames import rows_of

SHIFTS = [PositionShift("q", 3.0), PositionShift("k", -2.0, layers=1, positions=[12, 13])]


def window():
    return pack([zoo.tokens(1, n, seed=n)[0] for n in (10, 13, 7)], 30)


def by_hand(model, resid_post):
    """Logits of a residual stream by transformers' own modules, with what each type's forward does after the head."""
    plain, kind = model.original_model, model.config.model_type
    with promote_float32():
        state = final_norm_of(plain)(resid_post)
        logits = plain.get_output_embeddings()(state)
    if kind == "gemma2":
        logits = torch.tanh(logits / 30.0) * 30.0
    if kind in ("cohere", "cohere2"):
        logits = logits * model.config.logit_scale
    return logits


def values(frame, site, metric, **chosen):
    rows = frame[(frame["site"] == site) & (frame["metric"] == metric)]
    for column, value in chosen.items():
        rows = rows[rows[column] == value]
    return rows["value"].to_numpy()


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "gpt_neox", "olmo2", "smollm3_nope_layer"])
def test_the_lens_of_every_layer_is_what_the_models_own_modules_make_of_it(name):
    model = load_model(zoo.model(zoo.CONFIGS[name]()).double())
    layers = range(len(model.blocks))
    lenses = [f"blocks.{layer}.lens" for layer in layers]
    frame = trace(model, window(), SHIFTS, sites=lenses, by="position")
    assert len(frame) == len(SHIFTS) * len(lenses) * len(LOGIT_METRICS) * 30
    assert frame["layer"].tolist() == [int(site.split(".")[1]) for site in frame["site"]]
    for shift in SHIFTS:
        streams = []
        for hooks in ([], shift.hooks(model, window())):
            kept = {}
            reads = [
                (f"blocks.{i}.hook_resid_post", lambda x, hook, kept=kept: kept.update({hook.layer(): x}))
                for i in layers
            ]
            with torch.no_grad():
                model.run_with_hooks(window(), fwd_hooks=[*hooks, *reads])
            streams.append(kept)
        for layer, site in enumerate(lenses):
            with torch.no_grad():
                a, b = (by_hand(model, stream[layer])[0].numpy() for stream in streams)
            log_p, log_q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (a, b))
            kl = (np.exp(log_p) * (log_p - log_q)).sum(1)
            got = {metric: values(frame, site, metric, perturbation=str(shift)) for metric in LOGIT_METRICS}
            np.testing.assert_allclose(got["kl_nats"], kl, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(got["l2"], np.linalg.norm(b - a, axis=1), rtol=1e-9, atol=1e-12)
            np.testing.assert_array_equal(got["top1_flips"], a.argmax(1) != b.argmax(1))
            if layer >= 1:
                assert kl.max() > 1e-6


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_the_last_layers_lens_is_the_logits(name):
    model = load_model(zoo.model(zoo.CONFIGS[name]()).double())
    last = f"blocks.{len(model.blocks) - 1}.lens"
    frame = trace(model, window(), SHIFTS, sites=[last, "logits"], by="position")
    copies = copy_deltas(model, repeated_window(zoo.tokens(1, 10)[0], 3), lens=True)
    for table in (frame, copies):
        for metric in LOGIT_METRICS:
            logits = values(table, "logits", metric)
            assert metric == "top1_flips" or logits.max() > 1e-6
            np.testing.assert_allclose(values(table, last, metric), logits, rtol=1e-9, atol=1e-12)


def test_the_lens_of_copies_is_what_a_cache_says():
    model = load_model(zoo.model(zoo.CONFIGS["gemma2"]()).double())
    repeated = repeated_window(zoo.tokens(1, 10)[0], 3)
    frame = copy_deltas(model, repeated, lens=True)
    _, cache = model.run_with_cache(repeated)
    with torch.no_grad():
        logits = by_hand(model, cache["blocks.0.hook_resid_post"])[0].view(3, 10, -1)
    for copy in (1, 2):
        expected = (logits[copy] - logits[0]).norm(dim=1).mean().item()
        assert values(frame, "blocks.0.lens", "l2", document=copy) == pytest.approx(expected, abs=1e-12)
    bare = copy_deltas(model, repeated)
    assert set(frame["site"]) - set(bare["site"]) == {"blocks.0.lens", "blocks.1.lens"}
    same = frame[frame["site"].isin(bare["site"])]
    assert sorted(same["value"]) == sorted(bare["value"])


def test_the_lens_is_asked_for_by_name_or_by_a_flag_and_is_no_default():
    model = load_model(zoo.llama())
    lenses = {"blocks.0.lens", "blocks.1.lens"}
    default = trace(model, window(), SHIFTS)
    assert not lenses & set(default["site"])
    flagged = trace(model, window(), SHIFTS, lens=True, masked=True)
    assert set(flagged["site"]) == set(default["site"]) | lenses
    assert flagged["value_float64"].notna().all()
    one = trace(model, window(), SHIFTS, sites=["blocks.0.lens", "blocks.0.lens"], lens=True)
    assert set(one["site"]) == lenses
    assert len(one) == len(SHIFTS) * 2 * len(LOGIT_METRICS) * 3
    assert TABLES["deltas"].columns["site"].meaning
    for call in (lambda: trace(model, window(), SHIFTS, sites=["blocks.2.lens"]),):
        with pytest.raises(InputError, match=r"'blocks\.2\.lens' is unknown.*'blocks\.0\.lens' to 'blocks\.1\.lens'"):
            call()


def test_a_perturbation_above_a_layer_leaves_its_lens_alone():
    model = load_model(zoo.llama())
    frame = trace(model, window(), PositionShift("q", 3.0, layers=1), lens=True, by="position")
    assert (values(frame, "blocks.0.lens", "l2") == 0).all()
    assert values(frame, "blocks.1.lens", "l2").max() > 1e-3


def test_no_hook_fires_for_a_lens():
    model = load_model(zoo.llama())
    fired = []
    reads = [(name, lambda x, hook: fired.append(hook.name)) for name in model.hook_dict]

    def count(**options):
        fired.clear()
        with model.hooks(fwd_hooks=reads):
            trace(model, window(), SHIFTS, sites=["logits"], **options)
        return sorted(fired)

    assert count() == count(lens=True)


def test_no_more_logits_than_a_block_are_held_and_progress_counts_every_head(monkeypatch):
    model = load_model(zoo.llama())
    monkeypatch.setitem(cone.LOGIT_ELEMENTS, "cpu", 64 * 3 * 4)
    monkeypatch.setattr(cone, "LOGIT_TOKENS", 1)
    sizes, done = [], []
    unembed = model.unembed
    monkeypatch.setattr(model, "unembed", lambda hidden: sizes.append(hidden[..., 0].numel()) or unembed(hidden))
    whole = PositionShift("q", 3.0), PositionShift("k", 3.0)
    frame = trace(model, window(), whole, lens=True, control=False, progress=done.append)
    assert max(sizes) <= 2 * 4
    assert sum(sizes) == 3 * 3 * 30  # three sites; the clean pass once, each perturbed one once
    assert sum(done) == propagation.trace_work(model, 2, lens=True) == 2 * (2 + 3 * cone._work_of_head(model))
    monkeypatch.undo()
    np.testing.assert_allclose(frame["value"], trace(model, window(), whole, lens=True)["value"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_lens_of_weights_on_disk_reads_them_in_place(tmp_path, tied):
    checkpoints.save(zoo.llama(tie_word_embeddings=tied), tmp_path / "model")
    disk, memory = load_model(tmp_path / "model", device_map="disk"), load_model(tmp_path / "model")
    frames = [trace(model, window(), SHIFTS, lens=True) for model in (disk, memory)]
    assert (frames[0]["value"] == frames[1]["value"]).all()
    repeated = repeated_window(zoo.tokens(1, 10)[0], 3)
    frames = [copy_deltas(model, repeated, lens=True) for model in (disk, memory)]
    assert (frames[0]["value"] == frames[1]["value"]).all()
    assert all(weight.is_meta for weight in disk.original_model.parameters())


def lens_rows(layers, injected, value=lambda layer, place: 1.0 + layer):
    """Rows of shifts of q and k in all layers and in single ones (`injected`: layer and head), read by every lens."""
    row = {"run_id": "a", "seq_len": 64, "document": 0, "kind": "PositionShift", "delta_tokens": 16.0, "seed": 0,
           "metric": "kl_nats", "perturbation": "x"}  # fmt: skip
    return rows_of("deltas", rows=[
        {**row, "side": side, "layer": layer, "site": f"blocks.{layer}.lens", "inject_layer": place[0],
         "head": place[1], "restriction": None if place[0] is None else "one", "value": value(layer, place)}
        for side in "qk" for place in injected for layer in range(layers)
    ])  # fmt: skip


def test_the_figure_shows_the_numbers_of_the_frame():
    model, repeated = load_model(zoo.llama()), repeated_window(zoo.tokens(1, 10)[0], 3)
    shifts = [
        PositionShift(side, dose, layers=layers) for side in "qk" for dose in (1.0, 4.0) for layers in (None, 0, 1)
    ]
    frame = trace(model, repeated, shifts, lens=True)
    figure = plots.lens_by_layer(frame)
    panel = figure.data[0]
    assert list(panel.y) == ["all layers", "layer 0", "layer 1"]
    assert list(panel.x) == [0, 1]
    rows = frame[(frame["metric"] == "kl_nats") & (frame["side"] == "q") & (frame["delta_tokens"] == 4.0)]
    shown = np.asarray(panel.customdata, dtype=float)
    for line, layer in ((0, None), (1, 0), (2, 1)):
        injected = rows[rows["inject_layer"].isna() if layer is None else rows["inject_layer"] == layer]
        for read in (0, 1):
            expected = injected[injected["site"] == f"blocks.{read}.lens"]["value"].mean()
            assert shown[line, read] == pytest.approx(expected) or (expected == 0 and np.isnan(shown[line, read]))
    assert np.isnan(shown[2, 0])
    assert "grey" in figure.layout.annotations[-1].text
    # the figures of the logits leave a lens out
    bare = frame[frame["layer"].isna() | (frame["metric"] != "kl_nats")]
    assert (
        plots.propagation.is_dose(frame.assign(run_id="a")).sum()
        == plots.propagation.is_dose(bare.assign(run_id="a")).sum()
    )


def test_the_figure_has_room_for_deep_models_and_for_two_layers():
    deep = plots.lens_by_layer(lens_rows(80, [(None, None), *((layer, None) for layer in range(80))]))
    assert deep.layout.height < 1300
    assert len(deep.layout.yaxis.tickvals) <= 50
    assert len(deep.layout.xaxis.tickvals) <= 10
    heads = plots.lens_by_layer(lens_rows(30, [(layer, head) for layer in range(30) for head in (None, *range(9))]))
    assert list(heads.data[0].y) == [f"layer {layer}" for layer in range(30)]
    assert "270 single heads are left out" in heads.layout.annotations[-1].text.replace("<br>", " ")
    assert plots.lens_by_layer(lens_rows(2, [(None, None), (0, None), (1, None)])).layout.height > 300
