"""AttentionTemperature where it is easily misread: layers without RoPE, keys that masks hide, controls, retrieval."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from rope_probe import AttentionTemperature, InputError, load_model, pack, retrieval_accuracy, retrieval_trials, trace
from rope_probe.retrieval.probe import KeyValueTask
from rope_probe.retrieval.tasks import TextTask
from rope_probe.tracing.propagation import attribute
from rope_probe.tracing.sweeps import sweep
from rope_probe.windows.corpora import KeyValueStream
from tests import zoo

TASK = KeyValueTask(KeyValueStream(32, distinct=(2, 8), keys=20, values=20), 16)
BYTES = ByT5Tokenizer(extra_ids=0)
WITHOUT_ROPE = {"smollm3_nope_layer": [3], "cohere2_nope_layer": [3]}


def packed(positions="continuous"):
    documents = [zoo.tokens(1, n, seed=n)[0] for n in (10, 13, 7)]
    return pack(documents, 30, positions=positions, target_window=60)


def logits(model, window, perturbation=None, masked=False):
    hooks = [] if perturbation is None else perturbation.hooks(model, window)
    with torch.no_grad():
        return model.run_with_hooks(window, masked=masked, fwd_hooks=hooks)


def with_scaled_queries(plain, factor, layers):
    """A model whose W_Q is `factor` times as large in these layers, which is a temperature where q has no norm."""
    for layer in layers:
        plain.model.layers[layer].self_attn.q_proj.weight.data *= factor
    return plain


@pytest.mark.parametrize("name", WITHOUT_ROPE)
def test_it_acts_in_layers_without_rope_too(name):
    def make():
        return zoo.model(zoo.CONFIGS[name](), scale=0.2).double()

    model, bare = load_model(make()), WITHOUT_ROPE[name]
    assert [layer for layer, rotary in enumerate(model.rotary) if rotary is None] == bare
    clean = logits(model, packed())
    for layers, scaled in ((None, range(4)), (bare, bare), ([0, 3], [0, 3])):
        ours = logits(model, packed(), AttentionTemperature(2.5, layers=layers))
        expected = load_model(with_scaled_queries(make(), 2.5, scaled))(packed())
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)
        assert (ours - clean).abs().max() > 1e-4
    heads = logits(model, packed(), AttentionTemperature(2.5, layers=bare, heads=range(4)))
    torch.testing.assert_close(
        heads, logits(model, packed(), AttentionTemperature(2.5, layers=bare)), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", WITHOUT_ROPE)
def test_a_trace_of_it_equals_two_plain_passes_in_layers_without_rope(name):
    model = load_model(zoo.model(zoo.CONFIGS[name](), scale=0.2).double())
    for temperature in (AttentionTemperature(2.5), AttentionTemperature(2.5, layers=3, positions=[12])):
        frame = trace(model, packed(), temperature, sites=["logits"], by="position")
        apart = logits(model, packed(), temperature) - logits(model, packed())
        l2 = frame[frame["metric"] == "l2"]["value"].to_numpy()
        np.testing.assert_allclose(l2, apart[0].norm(dim=1).numpy(), rtol=0, atol=1e-10)
        assert l2.max() > 1e-4


def test_of_some_pairs_it_leaves_layers_without_rope_alone_and_refuses_them_by_name():
    model = load_model(zoo.model(zoo.CONFIGS["smollm3_nope_layer"]()).double())
    every = AttentionTemperature(2.0, pairs=range(4))
    rotating = AttentionTemperature(2.0, layers=range(3))
    torch.testing.assert_close(
        logits(model, packed(), every), logits(model, packed(), rotating), rtol=0, atol=1e-12
    )  # all of a head rotates there
    for make, told in (
        (AttentionTemperature(2.0, pairs=0, layers=3), "layer 3 has no RoPE"),
        (AttentionTemperature(2.0, layers=4), "layer 4 is out of range"),
        (AttentionTemperature(2.0, layers=3, heads=4), "head 4 is out of range"),
    ):
        with pytest.raises(InputError, match=told):
            make.hooks(model)
        with pytest.raises(InputError, match=told):
            make.require_fit(model.original_model)


def test_its_sweep_takes_layers_without_rope():
    model = load_model(zoo.model(zoo.CONFIGS["smollm3_nope_layer"]()))
    assert {one.layers for one in sweep("temperature", model, 30, layers=3)} == {(3,)}
    with pytest.raises(InputError, match="layer 3 has no RoPE"):
        sweep("dose", model, 30, layers=3)


@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "cohere2_nope_layer"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("positions", ["continuous", "reset"])
def test_log_n_counts_positions_and_not_the_keys_that_masks_leave(name, masked, positions):
    """The sliding window is 8 and documents are 10, 13 and 7 long; the factor is that of the position all the same."""
    model, window = load_model(zoo.model(zoo.CONFIGS[name]()).double()), packed(positions)
    queries = {}
    reads = [(f"blocks.{layer}.attn.hook_rot_q", lambda x, hook: queries.setdefault(hook.layer(), []).append(x[0]))
             for layer in range(len(model.blocks))]  # fmt: skip
    with torch.no_grad():
        model.run_with_hooks(window, masked=masked, fwd_hooks=reads)
        temperature = AttentionTemperature("log_n", reference=6, layers=0)
        model.run_with_hooks(window, masked=masked, fwd_hooks=[*temperature.hooks(model, window), *reads])
    clean, warmer = queries[0]
    place = torch.arange(30) if positions == "continuous" else torch.cat([torch.arange(n) for n in (10, 13, 7)])
    assert torch.equal(window.position_ids[0], place)
    expected = (torch.log(place + 1.0) / math.log(6)).clamp(min=1.0).double()
    found = warmer.norm(dim=(1, 2)) / clean.norm(dim=(1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    keys_left = torch.cat([torch.arange(1, n + 1) for n in (10, 13, 7)]) if masked else torch.arange(1, 31)
    by_keys = (torch.log(keys_left.double()) / math.log(6)).clamp(min=1.0)
    assert np.allclose(found, by_keys, rtol=1e-6) == ((positions == "reset") == masked)


@pytest.mark.parametrize("name", ["llama", "smollm3_nope_layer"])
def test_its_control_tells_rounding_from_signal(name):
    model = load_model(zoo.model(zoo.CONFIGS[name](), scale=0.2))
    temperatures = [AttentionTemperature(2.0), AttentionTemperature(1.0), AttentionTemperature(1.0 + 1e-9, layers=1)]
    frame = trace(model, packed(), temperatures, control=True)
    at_logits = frame[(frame["site"] == "logits") & (frame["metric"] == "kl_nats")].groupby("perturbation")
    found = at_logits[["value", "value_float64"]].mean()
    sharp, none, _ = (found.loc[str(temperature)] for temperature in temperatures)
    assert sharp["value"] == pytest.approx(sharp["value_float64"], rel=1e-3)
    assert sharp["value_float64"] > 1e-4
    assert (none == 0).all()
    verdicts = attribute(frame).set_index(["perturbation", "site", "metric"])["verdict"]
    assert verdicts[str(temperatures[0]), "logits", "kl_nats"] == "signal"
    assert verdicts[str(temperatures[1]), "logits", "kl_nats"] == "none"
    exact = trace(model.double(), packed(), AttentionTemperature(2.0), control=False)
    mine = frame[frame["perturbation"] == str(temperatures[0])]
    np.testing.assert_allclose(mine["value_float64"], exact["value"], rtol=1e-12, atol=1e-15)


def test_retrieval_under_it_is_that_of_scaled_query_weights():
    plain, scaled = load_model(zoo.llama()), load_model(with_scaled_queries(zoo.llama(), 3.0, range(2)))
    warmer = AttentionTemperature(3.0)
    ours = retrieval_accuracy(plain, TASK, [4, 8], trials=12, perturbation=warmer)
    expected = retrieval_accuracy(scaled, TASK, [4, 8], trials=12)
    np.testing.assert_allclose(ours["value"], expected["value"], rtol=1e-4)
    assert set(ours["perturbation"]) == {str(warmer)}
    assert expected["perturbation"].isna().all()
    bare = retrieval_accuracy(plain, TASK, [4, 8], trials=12)
    assert abs(ours["value"] - bare["value"]).max() > 1e-3
    assert not plain.has_hooks


def test_text_is_written_under_it_too(tmp_path):
    sizes = {"vocab_size": 259, "max_position_embeddings": 512}
    plain, scaled = load_model(zoo.llama(**sizes)), load_model(with_scaled_queries(zoo.llama(**sizes), 3.0, range(2)))
    task, file = TextTask("passkey", BYTES, 330), tmp_path / "trials.jsonl"
    asked = {"trials": 2, "trials_file": file}
    warmer = retrieval_trials(plain, task, [128], perturbation=AttentionTemperature(3.0), **asked)
    expected, bare = retrieval_trials(scaled, task, [128], trials=2), retrieval_trials(plain, task, [128], **asked)
    assert warmer["written"].tolist() == expected["written"].tolist() != bare["written"].tolist()
    np.testing.assert_allclose(warmer["answer_logprob_nats"], expected["answer_logprob_nats"], rtol=1e-4)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row.get("perturbation") for row in rows] == [str(AttentionTemperature(3.0))] * 2 + [None] * 2
    again = retrieval_trials(plain, task, [128], perturbation=AttentionTemperature(3.0), **asked)
    assert again["written"].tolist() == warmer["written"].tolist()
    assert len(file.read_text().splitlines()) == 4
