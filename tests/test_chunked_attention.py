"""Layers that attend in chunks, as Llama 4's do: windows of several chunks, beside transformers and dense attention.

The tiny models also have layers without RoPE whose temperature rises every 21 positions.
"""

import copy

import numpy as np
import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from rope_probe import AttentionTemperature, InputError, PositionShift, head_scores, load_model, pack, trace
from rope_probe.models import attention, measured
from rope_probe.models.configs import text_config_of
from rope_probe.models.measured import to_double
from rope_probe.precision import promote_float32
from rope_probe.retrieval.reading import Reading
from rope_probe.spans.drift import drift
from rope_probe.tracing import patterns
from rope_probe.windows.packing import Batch
from tests import every_type, zoo
from tests.test_heads import eager_states, expected_scores, window_of_copies
from tests.test_hooked import reference_flash

CHUNK = 10
LAYERS = ["chunked_attention", "full_attention", "chunked_attention", "full_attention"]
DOCUMENTS = (7, 14, 6)
BLOCKS = range(len(LAYERS))


def llama4(chunk=CHUNK, model_type="llama4_text"):
    """Rotating layers in chunks, and two global ones: one with RoPE, one without and with a temperature."""
    config = every_type.tiny_config(model_type)
    text = text_config_of(config)
    text.attention_chunk_size, text.floor_scale, text.attn_scale = chunk, 21, 0.5
    text.layer_types, text.no_rope_layers = LAYERS, [1, 1, 1, 0]
    return to_double(zoo.model(config, attn="eager"))


@torch.no_grad()
def transformers_logits(plain, tokens, mask=None):
    with promote_float32():
        return plain(input_ids=tokens, attention_mask=mask, use_cache=False).logits


def visible(length, chunk=None, bounds=None):
    """Where a query may look, [T, T], place by place; chunks are counted from the start of a document."""
    bounds = [0, length] if bounds is None else bounds
    document = [n for n, size in enumerate(np.diff(bounds)) for _ in range(size)]
    chunk_of = [(t - bounds[document[t]]) // (chunk or 1) for t in range(length)]
    return torch.tensor(
        [
            [
                s <= t and document[s] == document[t] and (chunk is None or chunk_of[s] == chunk_of[t])
                for s in range(length)
            ]
            for t in range(length)
        ]
    )


def masks_of(window, masked, chunk=CHUNK):
    """Masks of hand for transformers' own layers, by kind of layer: 0 where a query may look, else -inf."""
    bounds = window.cu_seqlens.tolist() if masked else None
    seen = {
        "full_attention": visible(len(window), None, bounds),
        "chunked_attention": visible(len(window), chunk, bounds),
    }
    return {kind: torch.zeros(x.shape).double().masked_fill(~x, -torch.inf)[None, None] for kind, x in seen.items()}


def packed(sizes=DOCUMENTS, seed=0):
    return pack([zoo.tokens(1, n, seed=seed + n)[0] for n in sizes], sum(sizes))


def assert_close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("model_type", ["llama4_text", "llama4"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_logits_are_transformers_own(model_type, attn):
    plain = llama4(model_type=model_type)
    for length in (3 * CHUNK, 27):
        tokens = zoo.tokens(2, length)
        wanted = transformers_logits(plain, tokens)
        model = load_model(plain, attn=attn)
        assert_close(model(tokens), wanted)
        assert_close(model.run_with_hooks(tokens, fwd_hooks=PositionShift("q", 0.0).hooks(model)), wanted)
        model.release()
        text_config_of(plain.config).attention_chunk_size = 100
        assert (transformers_logits(plain, tokens)[:, CHUNK:] - wanted[:, CHUNK:]).abs().max() > 1e-2
        text_config_of(plain.config).attention_chunk_size = CHUNK


def test_a_type_that_heeds_no_chunks_is_read_without():
    plain = zoo.llama(layer_types=["chunked_attention"] * 2, attention_chunk_size=CHUNK).double()
    assert_close(load_model(plain)(zoo.tokens()), transformers_logits(plain, zoo.tokens()))


@pytest.mark.parametrize("attn", ["sdpa", "eager", "flash_attention_2"])
def test_packed_documents_are_masked_as_by_hand(attn, monkeypatch):
    monkeypatch.setattr(attention, "_flash_attention_forward", reference_flash)
    monkeypatch.setattr(attention, "_require_flash", lambda model, kernel: None)
    plain, window = llama4(), packed()
    for masked in (False, True):
        wanted = transformers_logits(plain, window.tokens, masks_of(window, masked))
        model = load_model(plain, attn=attn)
        assert_close(model(window, masked=masked), wanted)
        model.release()


def test_transformers_too_counts_chunks_from_the_start_of_a_packed_document():
    plain, window = llama4(), pack([zoo.tokens(1, n)[0] for n in DOCUMENTS], 27, positions="reset")
    with torch.no_grad(), promote_float32():
        wanted = plain(input_ids=window.tokens, position_ids=window.position_ids, use_cache=False).logits
    assert_close(load_model(plain)(window, masked=True), wanted)


def test_a_masked_batch_reads_its_windows_as_they_are_read_one_by_one():
    windows = [packed(seed=seed) for seed in (0, 50)]
    bounds = torch.cat([windows[0].cu_seqlens, windows[1].cu_seqlens[1:] + 27])
    batch = Batch.continuous(torch.cat([window.tokens for window in windows]), bounds)
    model = load_model(llama4())
    with torch.no_grad():
        assert_close(model(batch, masked=True), torch.cat([model(window, masked=True) for window in windows]))


# Deltas, beside dense attention whose queries are turned by hand ------------------------------------------------------

turns = {}
"""By layer: the radians of each position and pair, [T, P]."""


def dense(module, query, key, value, mask, **told):
    if (angles := turns.get(module.layer_idx)) is not None:
        pairs = torch.view_as_complex(query.unflatten(-1, (-1, 2)).contiguous())  # Llama 4's pairs lie side by side
        query = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    pattern = (query @ key.transpose(-1, -2) * module.scaling + mask).softmax(-1)
    return (pattern @ value).transpose(1, 2), None


AttentionInterface.register("test_dense_turned", dense)
AttentionMaskInterface.register("test_dense_turned", eager_mask)


@torch.no_grad()
def dense_states(plain, window, masked, turned):
    """What each layer writes, and the logits, of attention by whole masks; `turned` are its queries' angles."""
    states = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: states.append(output[0]))
        for layer in plain.model.layers
    ]
    plain.set_attn_implementation("test_dense_turned")
    turns.update(turned)
    try:
        logits = transformers_logits(plain, window.tokens, masks_of(window, masked))[0]
    finally:
        turns.clear()
        plain.set_attn_implementation("eager")
        for handle in handles:
            handle.remove()
    return [*states, logits]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layers", [None, 0, 1])
def test_deltas_of_a_shift_are_those_of_dense_attention(layers, masked):
    """The queries from the middle of the second chunk on are moved: of the window, or of a document."""
    plain, window, moved = llama4(), packed(), range(13, 27)
    rotated = [0, 1, 2] if layers is None else [layers]
    inv_freq = plain.model.rotary_emb.inv_freq.double()
    angles = torch.zeros(27, len(inv_freq)).double()
    angles[13:] = 3.0 * inv_freq
    clean = dense_states(plain, window, masked, {})
    shifted = dense_states(plain, window, masked, dict.fromkeys(rotated, angles))
    sites = [*(f"blocks.{layer}.hook_resid_post" for layer in BLOCKS), "logits"]
    frame = trace(
        load_model(plain), window, PositionShift("q", 3.0, layers=layers, positions=moved), sites=sites, masked=masked,
        by="position",
    )  # fmt: skip
    for site, before, after in zip(sites, clean, shifted, strict=True):
        rows = frame[(frame["site"] == site) & (frame["metric"] == ("l2" if site != "logits" else "kl_nats"))]
        if site == "logits":
            log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
            wanted = (log_p.exp() * (log_p - log_q)).sum(-1)
        else:
            wanted = (after - before).norm(dim=-1)
        np.testing.assert_allclose(rows.sort_values("position")["value"], wanted, rtol=0, atol=1e-9)
    assert (shifted[-1] - clean[-1])[13:].abs().max() > 1e-3


def test_a_change_reaches_later_chunks_through_global_layers_alone():
    model = load_model(llama4())
    shift = PositionShift("q", 3.0, layers=0, positions=[13])
    frame = trace(model, packed(), shift, sites=[f"blocks.{i}.hook_resid_post" for i in BLOCKS], by="position")
    changed = [set(frame[(frame["layer"] == i) & (frame["value"] > 1e-12)]["position"]) for i in (0, 1)]
    assert changed == [{13}, set(range(13, 27))]
    of_keys = trace(
        model, packed(), PositionShift("k", 3.0, layers=0, positions=[13]), sites=["blocks.0.hook_resid_post"],
        by="position",
    )  # fmt: skip
    assert set(of_keys[of_keys["value"] > 1e-12]["position"]) == set(range(13, 20))


def test_a_temperature_acts_on_the_queries_of_a_chunk_as_hooks_on_whole_windows_do():
    model, window = load_model(llama4()), packed()
    sharper = AttentionTemperature(2.0, positions=range(15, 27))
    with torch.no_grad():
        wanted = model.run_with_hooks(window, fwd_hooks=sharper.hooks(model, window))[0]
        clean = model(window)[0]
    frame = trace(model, window, sharper, sites=["logits"], by="position")
    wanted_flips = (wanted.argmax(-1) != clean.argmax(-1)).double()
    log_p, log_q = clean.log_softmax(-1), wanted.log_softmax(-1)
    for metric, values in (("top1_flips", wanted_flips), ("kl_nats", (log_p.exp() * (log_p - log_q)).sum(-1))):
        rows = frame[frame["metric"] == metric].sort_values("position")
        np.testing.assert_allclose(rows["value"], values, rtol=0, atol=1e-9)


# What reads patterns, and what reads on -------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_head_scores_are_those_of_eager_patterns(masked, monkeypatch):
    monkeypatch.setattr(patterns, "BLOCK_ELEMENTS", 64)  # several blocks in every chunk
    plain, window = llama4(), window_of_copies()
    states = eager_states(plain, window, masked)
    bounds = window.cu_seqlens.tolist() if masked else None
    for layer, kind in enumerate(LAYERS):
        chunk = CHUNK if kind == "chunked_attention" else None
        assert torch.equal(states[layer][1], visible(40, chunk, bounds))
    frame = head_scores(load_model(plain), window, masked=masked)
    for layer, (pattern, *_) in enumerate(states):
        rows = frame[frame["layer"] == layer]
        for (metric, distance), (value, _) in expected_scores(pattern, window, masked).items():
            in_bin = rows["distance"].isna() if distance is None else rows["distance"] == distance
            part = rows[(rows["metric"] == metric) & in_bin]
            np.testing.assert_allclose(part["value"], value, rtol=0, atol=1e-10, err_msg=f"{metric} {distance}")


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_reading_on_and_writing_cross_chunks(attn):
    model, text = load_model(llama4(), attn=attn), zoo.tokens(1, 34)[0]
    with torch.no_grad():
        whole = model.hidden(text)
    reading = Reading(model)
    pieces = [reading.read(part) for part in text.split([4, 9, 7, 1, 13])]
    assert_close(torch.cat(pieces, 1), whole)
    written = model.greedy(text[:8], 15)
    with torch.no_grad():
        again = model(torch.cat([text[:8], written]))[0].argmax(-1)
    assert torch.equal(again[7:-1], written)


def test_gradients_are_transformers_own():
    plain, tokens = llama4(), zoo.tokens(2, 27)

    def gradients(logits):
        plain.zero_grad()
        logits.logsumexp(-1).sum().backward()
        return [weight.grad.clone() for weight in plain.parameters() if weight.grad is not None]

    with promote_float32():
        wanted = gradients(plain(input_ids=tokens, use_cache=False).logits)
    model = load_model(plain)
    for got, of_transformers in zip(gradients(model(tokens)), wanted, strict=True):
        assert_close(got, of_transformers)


def test_drift_compares_layers_with_the_same_chunks():
    one, window = llama4(), packed()
    other = copy.deepcopy(one)
    frame = drift(load_model(one), load_model(other), [window], masked=True)
    assert (frame[frame["metric"] == "attention_kl_nats"]["value"] == 0).all()
    other = llama4(chunk=5)
    with pytest.raises(InputError, match="layer 0 looks back over chunks of 10 tokens in the original and chunks of 5"):
        drift(load_model(one), load_model(other), [window])


def test_a_type_that_counts_chunks_otherwise_is_refused(monkeypatch):
    config = every_type.tiny_config("llama4_text")
    config.attn_scale = 0.123  # measured by no other test
    monkeypatch.setattr(measured, "chunk_of_layer", lambda config, layer: 5)
    with pytest.raises(InputError, match="mask of layer 0 differs"):
        measured.measure(config)
