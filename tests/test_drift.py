"""Drift against dense formulas from eager patterns; planted changes; the ranking; the command and its refusals."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
from torch.nn import functional
from transformers import ByT5Tokenizer

from rope_probe import InputError, cli, drift, load_model, pack
from rope_probe.gallery.figures.drift import drift_by_layer
from rope_probe.models.architectures import attention_modules
from rope_probe.models.attention import Scoring, plain_copy
from rope_probe.models.checkpoints import with_rope
from rope_probe.runs.results import read_run
from rope_probe.spans.drift import (
    ATTENTION_KL,
    COSINE_DISTANCE,
    DRIFT,
    EXTENDED_LOSS,
    FINAL_NORM,
    LOGIT_KL,
    ORIGINAL_LOSS,
    _Attention,
    _divergence,
    _sum_divergence,
    attention_by_layer,
    ranked_layers,
)
from rope_probe.tracing import patterns
from tests import every_type, zoo
from tests.memory import LargestTensor

ARCHITECTURES = ("llama", "mistral_sliding", "gemma2", "gemma3", "gpt_neox", "glm", "smollm3_nope_layer")


def packed_window(length=40, seed=0):
    """Three documents of unequal lengths."""
    tokens = zoo.tokens(1, length, seed)[0]
    return pack([tokens[:17], tokens[17:20], tokens[20:]], length)


def moved(plain, scale=0.1, seed=1):
    """A copy of a model, every weight moved a little."""
    other = plain_copy(plain)
    generator = torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += scale * noise.to(parameter.dtype)
    return other


def pair_of(name, dtype=torch.float64):
    plain = zoo.model(zoo.CONFIGS[name]()).to(dtype)
    return plain, moved(plain)


def activations(plain, window, masked):
    """All that eager attention shows at the hook points of a model, and its logits, in float64."""
    model = load_model(plain, attn="eager")
    read = {}
    wanted = ("hook_pattern", "hook_resid_post", FINAL_NORM)
    names = [name for name in model.hook_dict if name.endswith(wanted)]
    hooks = [(name, lambda x, hook: read.update({hook.name: x[0].double()})) for name in names]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        read["logits"] = model(window, masked=masked)[0].double()
    return read


def dense_divergence(p, q):
    """KL(p || q) of rows, by the definition; what both leave out adds nothing."""
    seen = p > 0
    return torch.where(seen, p * (p / q.where(seen, torch.ones_like(q))).log(), torch.zeros_like(p)).sum(-1)


def values(frame, site, metric):
    rows = frame[(frame["site"] == site) & (frame["metric"] == metric)]
    assert len(rows) > 0
    return rows["value"].to_numpy(float)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_drift_is_the_dense_formula_of_eager_patterns(name, masked, monkeypatch):
    monkeypatch.setattr(patterns, "BLOCK_ELEMENTS", 512)  # several blocks in every document
    window = packed_window()
    plain, other = pair_of(name)
    before, after = (activations(model, window, masked) for model in (plain, other))
    frame = drift(load_model(plain), load_model(other), window, masked=masked)
    for layer in range(plain.config.num_hidden_layers):
        site = f"blocks.{layer}.attn.hook_pattern"
        expected = dense_divergence(before[site], after[site]).mean(-1)  # [H]
        assert expected.min() > 1e-4, "the models must differ for this to be a test"
        np.testing.assert_allclose(values(frame, site, ATTENTION_KL), expected, rtol=0, atol=1e-10)
        rows = frame[frame["site"] == site]
        assert rows["head"].tolist() == list(range(4))
        assert set(rows["layer"]) == {layer}
        assert set(rows["positions"]) == {len(window)}
    for site in [*(f"blocks.{layer}.hook_resid_post" for layer in range(plain.config.num_hidden_layers)), FINAL_NORM]:
        cosine = functional.cosine_similarity(before[site], after[site], dim=-1)
        np.testing.assert_allclose(values(frame, site, COSINE_DISTANCE), 1 - cosine.mean(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_logits_are_compared_and_scored_without_the_first_tokens_of_documents(masked, monkeypatch):
    monkeypatch.setattr("rope_probe.spans.drift.logit_block", lambda model, rows: 7)
    window = packed_window()
    plain, other = pair_of("gemma2")
    before, after = (activations(model, window, masked)["logits"] for model in (plain, other))
    frame = drift(load_model(plain), load_model(other), window, masked=masked)
    expected = dense_divergence(before.softmax(-1), after.softmax(-1)).mean()
    assert values(frame, "logits", LOGIT_KL).item() == pytest.approx(expected.item(), abs=1e-10)
    tokens, document = window.tokens[0].tolist(), window.document_of.tolist()
    foreseeable = [t for t in range(len(tokens) - 1) if document[t] == document[t + 1]]
    assert len(foreseeable) == len(tokens) - 3
    for metric, logits in ((ORIGINAL_LOSS, before), (EXTENDED_LOSS, after)):
        log_p = logits.log_softmax(-1)
        loss = -np.mean([log_p[t, tokens[t + 1]].item() for t in foreseeable])
        assert values(frame, "logits", metric).item() == pytest.approx(loss, abs=1e-10)
        assert set(frame[frame["metric"] == metric]["positions"]) == {len(foreseeable)}


def test_values_are_means_over_the_positions_of_all_windows():
    plain, other = pair_of("llama")
    models = load_model(plain), load_model(other)
    windows = [packed_window(40, 0), packed_window(30, 1)]
    parts = [drift(*models, window) for window in windows]
    both = drift(*models, iter(windows))
    weights = np.stack([part["positions"].to_numpy(float) for part in parts])
    expected = (np.stack([part["value"] for part in parts]) * weights).sum(0) / weights.sum(0)
    np.testing.assert_allclose(both["value"], expected, rtol=1e-12)
    assert (both["positions"] == parts[0]["positions"] + parts[1]["positions"]).all()
    assert both["seq_len"].isna().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral_sliding"])
def test_a_model_does_not_drift_from_itself(name, dtype):
    model = load_model(zoo.model(zoo.CONFIGS[name]()).to(dtype))
    frame = drift(model, model, packed_window(), masked=True)
    losses = frame["metric"].isin([ORIGINAL_LOSS, EXTENDED_LOSS])
    assert (frame[~losses]["value"] == 0).all()
    assert frame[losses]["value"].nunique() == 1


def test_float32_keeps_the_digits_of_small_drifts():
    plain = zoo.llama()
    other = moved(plain, 1e-4)
    single = drift(load_model(plain), load_model(other), packed_window())
    double = drift(load_model(plain).double(), load_model(other).double(), packed_window())
    kl = double[double["metric"] == ATTENTION_KL]["value"]
    assert kl.max() < 1e-4
    np.testing.assert_allclose(single[single["metric"] == ATTENTION_KL]["value"], kl, rtol=0.1)


def test_divergence_stays_finite_where_attention_is_almost_none():
    q = torch.zeros(1, 1, 2)
    q[..., 0] = 1.0
    key = torch.tensor([[400.0, 0.0], [0.0, 400.0]]).view(2, 1, 2)
    scoring = Scoring(1.0, None, None, None)
    query = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).view(2, 1, 2)  # p = (1, e^-400)
    turned = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).view(2, 1, 2)  # q = (e^-400, 1)
    for dtype in (torch.float32, torch.float64):
        one, other = (_Attention(x.to(dtype), key.to(dtype), scoring) for x in (query, turned))
        assert _sum_divergence(0, one, other).item() == pytest.approx(400.0)


def test_what_sinks_take_counts_as_one_more_key():
    generator = torch.Generator().manual_seed(0)
    q, k, other_q = (torch.randn(6, heads, 8, generator=generator).double() for heads in (4, 2, 4))
    sinks = torch.tensor([-9.0, 0.0, 1.0, 9.0])
    scoring = Scoring(0.3, None, None, None, sinks)
    ((clean,), (drifted,)) = (patterns.blocks(query, k, scoring) for query in (q, other_q))
    whole = [torch.cat([b.pattern, 1 - b.pattern.sum(-1, keepdim=True)], -1) for b in (clean, drifted)]
    torch.testing.assert_close(_divergence(clean, drifted), dense_divergence(*whole), rtol=0, atol=1e-10)


@pytest.mark.parametrize("sliding", [False, True])
def test_no_tensor_holds_a_pattern_of_the_whole_window(sliding):
    changes = {"sliding_window": 256} if sliding else {}
    config = (hf.MistralConfig if sliding else hf.LlamaConfig)(
        **{**zoo.SIZES, "max_position_embeddings": 2048, "num_hidden_layers": 1}, **changes
    )
    plain = zoo.model(config)
    models = load_model(plain), load_model(moved(plain))
    window = pack([zoo.tokens(1, 2048)[0]], 2048)
    with LargestTensor() as largest:
        drift(*models, window)
    assert largest.elements <= 2 * patterns.BLOCK_ELEMENTS < 2048 * 2048


# Planted --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [0, 3])
def test_a_scaled_query_head_drifts_alone_in_its_layer(head):
    plain = zoo.llama(num_hidden_layers=3).double()
    other = plain_copy(plain)
    width = plain.config.hidden_size // plain.config.num_attention_heads
    attention_modules(other)[1].q_proj.weight.data[head * width : (head + 1) * width] *= 1.5
    frame = drift(load_model(plain), load_model(other), packed_window())
    assert (values(frame, "blocks.0.attn.hook_pattern", ATTENTION_KL) == 0).all()
    assert (values(frame, "blocks.0.hook_resid_post", COSINE_DISTANCE) == 0).all()
    in_layer = values(frame, "blocks.1.attn.hook_pattern", ATTENTION_KL)
    assert in_layer[head] > 1e-2
    assert (np.delete(in_layer, head) == 0).all()
    assert values(frame, "blocks.1.hook_resid_post", COSINE_DISTANCE) > 1e-6
    assert (values(frame, "blocks.2.attn.hook_pattern", ATTENTION_KL) > 0).all()
    assert ranked_layers(frame, 3)[-1] == 0


def test_the_direction_is_from_the_original_to_the_extended_model():
    plain, other = pair_of("llama")
    models = load_model(plain), load_model(other)
    forth, back = (attention_by_layer(drift(*pair, packed_window())) for pair in (models, models[::-1]))
    assert (forth["mean"] - back["mean"]).abs().max() > 1e-3


def test_layers_are_narrowed():
    plain, other = pair_of("smollm3_nope_layer")
    models = load_model(plain), load_model(other)
    steps = []
    frame = drift(*models, packed_window(), layers=[2, 0], progress=steps.append)
    assert set(frame["layer"].dropna()) == {0, 2}
    assert steps == [1, 1]
    whole = drift(*models, packed_window())
    kept = whole[whole["layer"].isna() | whole["layer"].isin([0, 2])].reset_index(drop=True)
    assert frame.equals(kept)


def test_layers_without_attention_drift_in_their_hidden_states_alone():
    plain = every_type.tiny_model("lfm2_moe")  # a convolution, then attention
    frame = drift(load_model(plain), load_model(moved(plain)), pack([zoo.tokens(1, 40)[0] % 16], 40))
    of_states = frame[frame["metric"] == COSINE_DISTANCE]
    assert of_states["layer"].dropna().tolist() == [0, 1]
    assert (of_states["value"] > 0).all()
    assert set(frame[frame["metric"] == ATTENTION_KL]["layer"]) == {1}
    assert ranked_layers(frame, 1) == [1]
    assert "(1 of 1): 1" in cli.drift._parts(frame)[-1].text


def ranking_of(*kl):
    """A frame of layers with these means of attention KL, two heads each."""
    rows = [
        {"layer": layer, "head": head, "metric": ATTENTION_KL, "value": mean + spread}
        for layer, mean in enumerate(kl)
        for head, spread in ((0, 0.5), (1, -0.5))
    ]
    return DRIFT.frame(rows)


def test_ranked_layers_are_the_largest_and_the_last():
    frame = ranking_of(3.0, 5.0, 1.0, 4.0, 2.0)
    assert ranked_layers(frame, 1) == [4]
    assert ranked_layers(frame, 2) == [1, 4]
    assert ranked_layers(frame, 3) == [1, 3, 4]
    assert ranked_layers(frame, 4) == [1, 3, 0, 4]
    assert ranked_layers(frame, 5) == [1, 3, 0, 4, 2]
    assert ranked_layers(ranking_of(1.0, 2.0, 9.0), 2) == [2, 1]
    last = {"layer": 9, "metric": COSINE_DISTANCE, "value": 0.1}  # it has no attention
    assert ranked_layers(pd.concat([frame, DRIFT.frame([last])]), 3) == [1, 3, 9]
    for count in (0, 6):
        with pytest.raises(InputError, match=f"count must be 1 to 5, the number of layers, but it is {count}"):
            ranked_layers(frame, count)
    with pytest.raises(InputError, match="no attention KL"):
        ranked_layers(frame[frame["metric"] == COSINE_DISTANCE], 1)


def test_what_cannot_be_compared_is_refused():
    plain, window = zoo.llama(), packed_window()
    model = load_model(plain)
    for changes, named in (
        ({"vocab_size": 65}, "vocab_size is 64 before and 65 after"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 2 before and 3 after"),
    ):
        with pytest.raises(InputError, match=named):
            drift(model, load_model(zoo.llama(**changes)), window)
    with pytest.raises(InputError, match="there are none"):
        drift(model, model, [])
    with pytest.raises(InputError, match=r"layer 2 is out of range; this model's layers are 0\.\.1"):
        drift(model, model, window, layers=2)
    spans = [zoo.model(hf.MistralConfig(**zoo.SIZES, sliding_window=n)) for n in (8, 16)]
    with pytest.raises(InputError, match="layer 0 looks back over 8 tokens in the original and 16 in the extended"):
        drift(*map(load_model, spans), window)


def test_the_figure_shows_the_numbers_of_the_frame():
    plain, other = pair_of("llama")
    frame = drift(load_model(plain), load_model(other), packed_window()).assign(model="longer")
    states, attention, heads = drift_by_layer(frame).data
    of_states = frame[(frame["metric"] == COSINE_DISTANCE) & frame["layer"].notna()]
    np.testing.assert_allclose(states.y, of_states["value"])
    np.testing.assert_allclose(attention.y, attention_by_layer(frame)["mean"])
    np.testing.assert_allclose(heads.y, frame[frame["metric"] == ATTENTION_KL]["value"])
    assert [states.name, attention.showlegend] == ["longer", False]
    with pytest.raises(InputError, match="no drift"):
        drift_by_layer(frame[frame["site"] == "logits"])


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The original, and one with another theta; with a tokenizer of 256 bytes and more."""
    folder = tmp_path_factory.mktemp("models")
    plain = zoo.llama(vocab_size=384)
    plain.save_pretrained(folder / "original")
    with_rope(moved(plain, 0.01), 1e5).save_pretrained(folder / "extended")
    zoo.llama(vocab_size=384, num_attention_heads=2).save_pretrained(folder / "other")
    for name in ("original", "extended", "other"):
        ByT5Tokenizer().save_pretrained(folder / name)
    return folder


def run_command(capsys, monkeypatch, *arguments):
    """Exit code, stdout and stderr of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["rope-probe", "drift", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def test_the_command_writes_a_run_and_prints_layers_and_ranking(checkpoints, tmp_path, capsys, monkeypatch):
    original, extended, out = checkpoints / "original", checkpoints / "extended", tmp_path / "run"
    options = ["--out", out, "--packed", "--window", "128", "--document-length", "32", "--masked"]
    code, stdout, _ = run_command(capsys, monkeypatch, original, extended, *options)
    assert code == 0
    assert stdout.splitlines()[-1] == str(out)
    assert "attention KL" in stdout
    tables, manifest = read_run(out)
    frame = tables["drift"]
    ranking = f"(2 of 2): {', '.join(map(str, ranked_layers(frame, 2)))}"
    assert ranking in stdout
    assert set(frame["model"]) == {str(extended)}
    assert frame["masked"].all()
    assert set(manifest["models"]) == {str(original), str(extended)}
    assert [read["masked"] for read in manifest["read"]["window"]] == [True]


def test_a_model_is_compared_with_itself_at_another_theta(checkpoints, tmp_path, capsys, monkeypatch):
    original, out = checkpoints / "original", tmp_path / "run"
    theta = ["--theta", "500000", "--window", "64"]
    code, _, _ = run_command(capsys, monkeypatch, original, "--out", out, "--random", *theta)
    assert code == 0
    tables, manifest = read_run(out)
    name = f"{original}, theta 500000"
    assert set(tables["drift"]["model"]) == {name}
    thetas = {key: model["rope_parameters"]["rope_theta"] for key, model in manifest["models"].items()}
    assert thetas == {str(original): 1e4, name: 5e5}
    assert manifest["models"][name]["weights_sha256"] == manifest["models"][str(original)]["weights_sha256"]
    assert tables["drift"]["value"].max() > 0
    own = ["--theta", "10000", "--window", "64", "--layer", "1", "--overwrite"]
    code, _, _ = run_command(capsys, monkeypatch, original, "--out", out, *own)
    assert code == 0
    frame = read_run(out)[0]["drift"]
    assert (frame[frame["metric"] == ATTENTION_KL]["value"] == 0).all()
    assert set(frame["layer"].dropna()) == {1}


REFUSED = {
    "one model": (["original"], "name the extended one too, or give --theta or --adapter"),
    "no such model": (["original", "/no/such/model"], "/no/such/model"),
    "another architecture": (["original", "other"], "num_attention_heads is 4 before and 2 after"),
    "a theta of nothing": (["original", "--theta", "0"], "rope_theta must be a positive finite number, but it is 0.0"),
    "a layer out of range": (["original", "extended", "--layer", "7"], "layer 7 is out of range"),
    "theta of a spread model": (["original", "--theta", "9", "--device-map", "auto"], "leave out --device-map"),
    "two sources": (["original", "extended", "--random", "--tokens", "x"], "both say what to read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(case, checkpoints, tmp_path, capsys, monkeypatch):
    arguments, named = REFUSED[case]
    folders = {name: checkpoints / name for name in ("original", "extended", "other")}
    arguments = [folders.get(argument, argument) for argument in arguments]
    code, stdout, stderr = run_command(capsys, monkeypatch, *arguments, "--out", tmp_path / "run")
    assert (code, stdout) == (2, "")
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert named in stderr
    assert list(tmp_path.iterdir()) == []
