"""What heads attend to, against eager patterns; heads planted in closed form; heads silenced."""

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rope_probe import InputError, KeyValueStream, KeyValueTask, PositionShift, load_model, pack, rope, trace
from rope_probe.retrieval.heads import needle_of, retrieval_head_scores
from rope_probe.retrieval.probe import retrieval_accuracy
from rope_probe.tracing import patterns
from rope_probe.tracing.heads import distance_edges, head_scores, pair_contributions
from rope_probe.tracing.silence import silenced
from tests import zoo

ARCHITECTURES = (
    "llama",
    "mistral_sliding",
    "gemma2",
    "gemma3",
    "gpt_neox",
    "phi3_partial",
    "glm",
    "qwen3",
    "smollm3_nope_layer",
    "cohere2_nope_layer",
)


def window_of_copies(length=40, seed=0):
    """Three documents of unequal lengths with few distinct tokens, so that some repeat, also side by side."""
    tokens = torch.randint(3, 12, (length,), generator=torch.Generator().manual_seed(seed))
    return pack([tokens[:17], tokens[17:20], tokens[:17], tokens[20:]], length)


def eager_states(plain, window, masked):
    """Patterns [L, H, T, T], and rotated q and k of every layer, in float64."""
    model = load_model(plain, attn="eager")
    layers = range(len(model.blocks))
    read = {}
    names = [f"blocks.{i}.attn.{name}" for i in layers for name in ("hook_pattern", "hook_rot_q", "hook_rot_k")]
    hooks = [(name, lambda x, hook: read.update({hook.name: x[0].double()})) for name in names]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model.hidden(window, masked=masked)
    return [[read[f"blocks.{i}.attn.{name}"] for name in ("hook_pattern", "hook_rot_q", "hook_rot_k")] for i in layers]


def expected_scores(pattern, window, masked):
    """The scores of one layer's [H, T, T] pattern, written down query by query."""
    tokens = window.tokens[0].tolist()
    document = window.document_of.tolist() if masked else [0] * len(tokens)
    edges = [*distance_edges(len(tokens)), len(tokens)]
    lists = {}
    for t, token in enumerate(tokens):
        seen = [s for s in range(t + 1) if document[s] == document[t]]
        attention = pattern[:, t]  # [H, T]

        def add(metric, keys, distance=None, attention=attention):
            lists.setdefault((metric, distance), []).append(attention[:, keys].sum(-1))

        if t - 1 in seen:
            add("previous_token", [t - 1])
            add("sink", [seen[0]])
        if copies := [s for s in seen if s < t and tokens[s] == token]:
            add("duplicate_token", copies)
        if after := [s + 1 for s in copies if s + 1 < t]:
            add("induction", after)
        for low, high in zip(edges, edges[1:], strict=False):
            in_bin = [s for s in seen if low <= t - s < high]
            add("attention_mass", in_bin, low)
            if alike := [s for s in in_bin if s in copies]:
                add("match", alike, low)
        lists.setdefault(("entropy", None), []).append(torch.special.entr(attention).sum(-1))
    return {key: (torch.stack(values).mean(0), len(values)) for key, values in lists.items()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_of_eager_patterns(name, dtype, masked, monkeypatch):
    monkeypatch.setattr(patterns, "BLOCK_ELEMENTS", 512)  # several blocks in every document
    window = window_of_copies()
    plain = zoo.model(zoo.CONFIGS[name]()).to(dtype)
    states = eager_states(plain, window, masked)
    frame = head_scores(load_model(plain), window, masked=masked)
    assert (frame["queries"] >= 0).all()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    for layer, (pattern, _, _) in enumerate(states):
        rows = frame[frame["layer"] == layer]
        compared = 0
        for (metric, distance), (value, queries) in expected_scores(pattern, window, masked).items():
            at = rows["distance"].isna() if distance is None else rows["distance"] == distance
            part = rows[(rows["metric"] == metric) & at]
            assert part["head"].tolist() == list(range(4))
            np.testing.assert_allclose(part["value"], value, rtol=0, atol=tolerance, err_msg=f"{metric} {distance}")
            assert set(part["queries"]) == {queries}
            compared += len(part)
        left = rows[rows["value"].notna()]
        assert compared == len(left), "a score that no query gives is null"
    mass = frame[frame["metric"] == "attention_mass"].groupby(["layer", "head"])["value"].sum()
    np.testing.assert_allclose(mass, 1, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_neox", "phi3_partial", "glm", "smollm3_nope_layer"])
def test_pair_contributions_are_those_of_eager_patterns(name, dtype, masked, monkeypatch):
    monkeypatch.setattr(patterns, "BLOCK_ELEMENTS", 512)
    window = window_of_copies()
    plain = zoo.model(zoo.CONFIGS[name]()).to(dtype)
    states = eager_states(plain, window, masked)
    model = load_model(plain)
    frame = pair_contributions(model, window, masked=masked)
    scaling = plain.model.layers[0].self_attn.scaling if name != "gpt_neox" else plain.config.head_dim**-0.5 \
        if getattr(plain.config, "head_dim", None) else 8**-0.5
    at = torch.arange(len(window))
    apart = at.unsqueeze(1) - at
    edges = [*distance_edges(len(window)), len(window)]
    document = window.document_of
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for layer, (pattern, q, k) in enumerate(states):
        visible = apart >= 0
        if masked:
            visible &= document.unsqueeze(1) == document
        visible &= (pattern > 0).any(0) | (apart < 8)  # a sliding window hides the rest
        if (pattern[:, apart >= 8] == 0).all():
            visible &= apart < 8
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        of_dimension = torch.einsum("thd,shd->hdts", q, k) * scaling
        rotary = model.rotary[layer]
        pairs = [] if rotary is None else rotary.pairs(q.shape[-1]).tolist()
        rest = [d for d in range(q.shape[-1]) if d not in {d for pair in pairs for d in pair}]
        for pair, dimensions in [*enumerate(pairs), (None, rest)]:
            of_layer = frame[frame["layer"] == layer]
            rows = of_layer[of_layer["pair"].isna() if pair is None else of_layer["pair"] == pair]
            if not dimensions:
                assert rows.empty
                continue
            of_pair = of_dimension[:, dimensions].sum(1)  # [H, T, S]
            contrast = of_pair - ((of_pair * visible).sum(-1) / visible.sum(-1)).unsqueeze(-1)
            for low, high in [(None, None), *zip(edges, edges[1:], strict=False)]:
                weight = pattern if low is None else pattern * ((apart >= low) & (apart < high))
                expected = (weight * contrast).sum((1, 2)) / weight.sum((1, 2))
                part = rows[rows["distance"].isna() if low is None else rows["distance"] == low]
                np.testing.assert_allclose(part["value"].to_numpy(float), expected, rtol=0, atol=tolerance)


def test_pair_contributions_add_up_to_the_score():
    window = window_of_copies()
    plain = zoo.model(zoo.CONFIGS["phi3_partial"]()).double()
    (pattern, q, k), _ = eager_states(plain, window, False)
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, 1)) * plain.model.layers[0].self_attn.scaling
    visible = torch.ones(len(window), len(window)).tril()
    contrast = scores - ((scores * visible).sum(-1) / visible.sum(-1)).unsqueeze(-1)
    expected = (pattern * contrast).sum((1, 2)) / len(window)
    frame = pair_contributions(load_model(plain), window, layers=0)
    total = frame[frame["distance"].isna()].groupby("head")["value"].sum()
    np.testing.assert_allclose(total, expected, atol=1e-10)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


@pytest.mark.parametrize("measure", [head_scores, pair_contributions])
@pytest.mark.parametrize("sliding", [False, True])
def test_no_tensor_holds_a_pattern_of_the_whole_window(measure, sliding):
    changes = {"sliding_window": 256} if sliding else {}
    config = (hf.MistralConfig if sliding else hf.LlamaConfig)(
        **{**zoo.SIZES, "max_position_embeddings": 2048}, **changes
    )
    model = load_model(zoo.model(config))
    window = pack([zoo.tokens(1, 2048)[0]], 2048)
    with LargestTensor() as largest:
        measure(model, window, layers=0)
    assert largest.elements <= patterns.BLOCK_ELEMENTS < 2048 * 2048
