"""Massive values: planted in one pair of one head, against norms by hand, whatever the layout."""

import numpy as np
import pytest
import torch

from rope_probe import InputError, PositionShift, load_model, massive_values, pack, rope
from rope_probe.gallery import figures as plots
from tests import zoo
from tests.frames import rows_of


def window():
    return pack([zoo.tokens(1, n, seed=n)[0] for n in (10, 13, 7)], 30)


def value(frame, states, layer, head, metric="ratio"):
    rows = frame[(frame["states"] == states) & (frame["layer"] == layer) & (frame["head"] == head)]
    return rows[rows["metric"] == metric].set_index("pair")["value"]


@pytest.mark.parametrize("states", ["q", "k"])
def test_what_is_planted_in_a_pair_of_a_head_is_found_there_and_nowhere_else(states):
    plain = zoo.llama(num_hidden_layers=3)
    before = massive_values(load_model(plain), window())
    projection = plain.model.layers[1].self_attn.get_submodule(f"{states}_proj")
    rows = rope.rows_of_pair("half", 1, 2, head_dim=8, rotary_dim=8)  # head 1, pair 2
    projection.weight.data[list(rows)] *= 100
    after = massive_values(load_model(plain), window())
    ratio = value(after, states, 1, 1)
    assert ratio[2] > 40
    assert ratio.drop(2).max() < 3
    np.testing.assert_allclose(
        value(after, states, 1, 1, "norm")[2], 100 * value(before, states, 1, 1, "norm")[2], rtol=1e-5
    )
    at_planted = (after["states"] == states) & (after["layer"] == 1) & (after["head"] == 1)
    upstream = after["layer"] <= 1
    same = upstream & ~at_planted
    np.testing.assert_allclose(after[same]["value"], before[same]["value"], rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "glm", "phi3_partial", "gpt_neox", "gemma3", "cohere2_nope_layer"])
def test_norms_are_those_of_each_pairs_two_numbers(name):
    model = load_model(zoo.model(zoo.CONFIGS[name]()).double())
    frame = massive_values(model, window(), first=2)
    _, cache = model.run_with_cache(window())
    for layer, rotary in enumerate(model.rotary):
        for states, hook in (("q", "hook_rot_q"), ("k", "hook_rot_k"), ("v", "hook_v")):
            x = cache[f"blocks.{layer}.attn.{hook}"][0, 2:].numpy()  # [t, H, D]
            rows = frame[(frame["layer"] == layer) & (frame["states"] == states)]
            norms = rows[rows["metric"] == "norm"]
            at = norms["head"].to_numpy(), norms["dimension"].to_numpy(), norms["partner"].to_numpy()
            expected = np.hypot(x[:, at[0], at[1]], x[:, at[0], at[2]]).mean(0)
            np.testing.assert_allclose(norms["value"], expected, rtol=1e-12)
            assert len(norms) == x.shape[1] * x.shape[2] // 2
            every = norms[norms["head"] == 0][["dimension", "partner"]].to_numpy().flatten()
            assert sorted(every) == list(range(x.shape[2]))
            medians = norms.groupby("head")["value"].transform("median")
            np.testing.assert_allclose(
                rows[rows["metric"] == "ratio"]["value"], norms["value"] / medians.to_numpy(), rtol=1e-12
            )
            pairs = 0 if rotary is None else len(rotary.inv_freq)
            assert norms["pair"].nunique() == pairs
            if pairs:
                first = norms[(norms["head"] == 0) & (norms["pair"] == pairs - 1)]
                assert first["wavelength"].item() == pytest.approx(2 * np.pi / rotary.inv_freq[-1].item())


def test_a_rotation_leaves_the_norms_of_the_first_layer_as_they_are():
    model = load_model(zoo.llama().double())
    still = massive_values(model, window(), layers=0)
    with model.hooks(fwd_hooks=PositionShift("qk", 11.5).hooks(model, window())):
        moved = massive_values(model, window(), layers=0)
    np.testing.assert_allclose(moved["value"], still["value"], rtol=1e-12)
    assert set(still["layer"]) == {0}


def test_text_progress_and_what_is_refused():
    model, done = load_model(zoo.llama()), []
    massive_values(model, window(), progress=done.append)
    assert sum(done) == 2
    one = massive_values(model, window(), first=29)
    assert one["value"].notna().all()
    for call, named in (
        (lambda: massive_values(model, window(), first=30), r"0\.\.29"),
        (lambda: massive_values(model, window(), layers=5), "layer 5"),
    ):
        with pytest.raises(InputError, match=named):
            call()
    broken = zoo.llama()
    broken.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.k_proj\.weight is not finite"):
        massive_values(load_model(broken), window())


def test_a_head_whose_median_is_nothing_has_no_ratio():
    plain = zoo.llama()
    plain.model.layers[0].self_attn.v_proj.weight.data[:8] = 0
    frame = massive_values(load_model(plain), window(), masked=True)
    assert value(frame, "v", 0, 0).isna().all()
    assert (value(frame, "v", 0, 0, "norm") == 0).all()
    assert value(frame, "v", 0, 1).notna().all()


def test_the_figure_shows_the_mean_over_heads():
    frame = massive_values(load_model(zoo.model(zoo.CONFIGS["phi3_partial"]())), window())
    figure = plots.massive_map(frame, "tiny")
    assert [note.text for note in figure.layout.annotations[:3]] == ["queries", "keys", "values"]
    rows = frame[(frame["metric"] == "ratio") & (frame["states"] == "k") & frame["pair"].notna()]
    shown = np.asarray(figure.data[1].customdata)[..., 0].astype(float)
    for layer in (0, 1):
        expected = rows[rows["layer"] == layer].groupby("pair")["value"].mean()
        np.testing.assert_allclose(shown[layer], expected)
    np.testing.assert_allclose(np.asarray(figure.data[1].z, dtype=float), np.log10(shown))
    assert figure.layout.coloraxis.cmid == 0


def test_the_figure_has_room_for_deep_models_and_wide_heads():
    rows = [
        {"metric": "ratio", "states": states, "layer": layer, "head": 0, "pair": pair, "wavelength": 6.3 * 1.1**pair,
         "value": 1.0 + pair, "seq_len": 64, "dimension": pair, "partner": pair + 128}
        for states in "qkv" for layer in range(80) for pair in range(128)
    ]  # fmt: skip
    figure = plots.massive_map(rows_of("massive_values", rows=rows))
    assert figure.layout.height < 1300
    assert len(figure.layout.xaxis.tickvals) <= 8
    assert len(figure.layout.yaxis.tickvals) <= 50
    assert torch.isfinite(torch.tensor(figure.layout.coloraxis.cmax))
