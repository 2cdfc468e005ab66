"""What heads attend to, against eager patterns; heads planted in closed form; heads silenced."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers as hf
from transformers import ByT5Tokenizer

from rope_probe import InputError, KeyValueStream, KeyValueTask, PositionShift, load_model, pack, rope, trace
from rope_probe.gallery.figures.heads import PANELS, head_map
from rope_probe.models.architectures import attention_modules
from rope_probe.models.attention import Scoring
from rope_probe.retrieval.heads import needle_of, retrieval_head_scores
from rope_probe.retrieval.probe import retrieval_accuracy
from rope_probe.retrieval.tasks import TextTask
from rope_probe.tracing import patterns
from rope_probe.tracing.heads import distance_edges, head_scores, pair_contributions
from rope_probe.tracing.silence import silenced
from tests import every_type, zoo
from tests.memory import LargestTensor

ARCHITECTURES = (
    "llama",
    "mistral_sliding",
    "gemma2",
    "gemma3",
    "gpt_neox",
    "glm",
    "cohere2_nope_layer",
)


def window_of_copies(length=40, seed=0):
    """Three documents of unequal lengths with few distinct tokens, so that some repeat, also side by side."""
    tokens = torch.randint(3, 12, (length,), generator=torch.Generator().manual_seed(seed))
    return pack([tokens[:17], tokens[17:20], tokens[:17], tokens[20:]], length)


def eager_states(plain, window, masked):
    """Of every layer: pattern [H, T, T], where a query may look [T, T], rotated q and k; in float64."""
    model = load_model(plain, attn="eager")
    names = ("hook_pattern", "hook_attn_scores", "hook_rot_q", "hook_rot_k")
    layers = [[f"blocks.{i}.attn.{name}" for name in names] for i in range(len(model.blocks))]
    read = {}
    hooks = [(name, lambda x, hook: read.update({hook.name: x[0].double()})) for layer in layers for name in layer]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model.hidden(window, masked=masked)
    states = [[read[name] for name in layer] for layer in layers]
    return [(pattern, scores[0].isfinite(), q, k) for pattern, scores, q, k in states]


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
        for low, high in pairwise(edges):
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
    for layer, (pattern, _, _, _) in enumerate(states):
        rows = frame[frame["layer"] == layer]
        compared = 0
        for (metric, distance), (value, queries) in expected_scores(pattern, window, masked).items():
            in_bin = rows["distance"].isna() if distance is None else rows["distance"] == distance
            part = rows[(rows["metric"] == metric) & in_bin]
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
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "phi3_partial", "glm", "smollm3_nope_layer"])
def test_pair_contributions_are_those_of_eager_patterns(name, dtype, masked, monkeypatch):
    monkeypatch.setattr(patterns, "BLOCK_ELEMENTS", 512)
    window = window_of_copies()
    plain = zoo.model(zoo.CONFIGS[name]()).to(dtype)
    states = eager_states(plain, window, masked)
    model = load_model(plain)
    frame = pair_contributions(model, window, masked=masked)
    scaling = attention_modules(plain)[0].scaling
    positions = torch.arange(len(window))
    apart = positions.unsqueeze(1) - positions
    edges = [*distance_edges(len(window)), len(window)]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for layer, (pattern, visible, q, k) in enumerate(states):
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
            for low, high in [(None, None), *pairwise(edges)]:
                weight = pattern if low is None else pattern * ((apart >= low) & (apart < high))
                expected = (weight * contrast).sum((1, 2)) / weight.sum((1, 2))
                part = rows[rows["distance"].isna() if low is None else rows["distance"] == low]
                np.testing.assert_allclose(part["value"].to_numpy(float), expected, rtol=0, atol=tolerance)


def test_pair_contributions_add_up_to_the_score():
    window = window_of_copies()
    plain = zoo.model(zoo.CONFIGS["phi3_partial"]()).double()
    (pattern, visible, q, k), _ = eager_states(plain, window, False)
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, 1)) * attention_modules(plain)[0].scaling
    contrast = scores - ((scores * visible).sum(-1) / visible.sum(-1)).unsqueeze(-1)
    expected = (pattern * contrast).sum((1, 2)) / len(window)
    frame = pair_contributions(load_model(plain), window, layers=0)
    total = frame[frame["distance"].isna()].groupby("head")["value"].sum()
    np.testing.assert_allclose(total, expected, atol=1e-10)


def test_sinks_take_attention_from_every_key():
    q, k, sinks = torch.randn(6, 4, 8).double(), torch.randn(6, 2, 8).double(), torch.tensor([-9.0, 0.0, 1.0, 9.0])
    (without,) = patterns.blocks(q, k, Scoring(0.3, None, None, None))
    (block,) = patterns.blocks(q, k, Scoring(0.3, None, None, None, sinks))
    weights = without.scores.exp()
    expected = weights / (weights.sum(-1, keepdim=True) + sinks.exp().view(4, 1, 1))
    torch.testing.assert_close(block.pattern, expected.double(), rtol=0, atol=1e-7)


def test_half_precision_is_scored_in_float32():
    plain = zoo.llama().bfloat16()
    window = window_of_copies()
    model = load_model(plain)
    frame = head_scores(model, window, layers=[1, 1])
    assert set(frame["layer"]) == {1}
    read = {}
    hooks = [(f"blocks.1.attn.hook_rot_{side}", lambda x, hook: read.update({hook.name[-1]: x[0]})) for side in "qk"]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model.hidden(window)
    q, k = read["q"].float(), read["k"].float().repeat_interleave(2, 1)
    scores = torch.einsum("thd,shd->hts", q, k) * attention_modules(plain)[1].scaling
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    pattern = scores.masked_fill(later, float("-inf")).softmax(-1).double()
    entropy = torch.special.entr(pattern).sum(-1).mean(-1)
    np.testing.assert_allclose(frame[frame["metric"] == "entropy"]["value"], entropy, atol=1e-5)


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
    assert largest.elements <= 2 * patterns.BLOCK_ELEMENTS < 2048 * 2048


# Heads planted in closed form -----------------------------------------------------------------------------------------

TOKENS, WIDTH = 20, 32
CURRENT, PREVIOUS, COPIED = (slice(start, start + TOKENS) for start in (0, TOKENS, 2 * TOKENS))
"""Parts of the residual stream, a dimension for each token."""
SLOW = [*range(6, 16), *range(22, 32)]
"""Dimensions of the ten slowest pairs, which hardly turn in a window: what is matched there is matched anywhere."""
PREVIOUS_TOKEN, INDUCTION, DUPLICATE = (0, 2), (1, 1), (1, 3)


def planted():
    """Two layers that do induction, all weights in closed form; float64.

    Head 2 of layer 0 scores a key by how far back it is alone, through its fast pairs, most at one token; it writes the
    token that it finds to PREVIOUS. Head 1 of layer 1 matches the current token with PREVIOUS, and writes the token
    that it finds to COPIED, which the head reads. Head 3 of layer 1 matches the token itself. Others match at random.
    """
    config = hf.LlamaConfig(
        vocab_size=TOKENS, hidden_size=64, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=WIDTH, attention_bias=True, max_position_embeddings=128, rms_norm_eps=1e-12,
        rope_parameters={"rope_type": "default", "rope_theta": 1e10}, tie_word_embeddings=False,
    )  # fmt: skip
    plain = zoo.model(config, scale=0.02).double()
    weights = dict(plain.named_parameters())
    for name, weight in weights.items():
        if "q_proj.weight" not in name and "k_proj.weight" not in name:
            weight.data.fill_(1.0 if "norm" in name else 0.0)

    def of_head(layer, head, name, kind="weight"):
        rows = slice(head * WIDTH, (head + 1) * WIDTH)
        weight = weights[f"model.layers.{layer}.self_attn.{name}_proj.{kind}"].data
        return weight[:, rows] if name == "o" else weight[rows]

    one_of_each = torch.eye(TOKENS, dtype=torch.float64)
    weights["model.embed_tokens.weight"].data[:, CURRENT] = one_of_each
    weights["lm_head.weight"].data[:, COPIED] = one_of_each

    layer, head = PREVIOUS_TOKEN
    fast = torch.arange(6)
    turn = rope.inv_freq(config.rope_parameters, WIDTH, dtype=torch.float64)[fast]
    of_head(layer, head, "q").zero_()
    of_head(layer, head // 2, "k").zero_()
    for part, values in ((fast, turn.cos()), (fast + WIDTH // 2, -turn.sin())):
        of_head(layer, head, "q", "bias")[part] = 20.0 * values
    of_head(layer, head // 2, "k", "bias")[fast] = 20.0
    of_head(layer, head // 2, "v")[:TOKENS, CURRENT] = one_of_each / 8  # the norm makes 8 of 1
    of_head(layer, head, "o")[PREVIOUS, :TOKENS] = one_of_each

    for (layer, head), matched in ((INDUCTION, PREVIOUS), (DUPLICATE, CURRENT)):
        of_head(layer, head, "q").zero_()
        of_head(layer, head // 2, "k").zero_()
        of_head(layer, head, "q")[SLOW, CURRENT] = 3 * one_of_each
        of_head(layer, head // 2, "k")[SLOW, matched] = 3 * one_of_each
    layer, head = INDUCTION
    of_head(layer, head // 2, "v")[:TOKENS, CURRENT] = one_of_each
    of_head(layer, head, "o")[COPIED, :TOKENS] = one_of_each
    return plain


def top(frame, metric):
    """The head with the highest score, that score, and the next one."""
    rows = frame[frame["metric"] == metric].sort_values("value", ascending=False)
    first, second = rows.iloc[0], rows.iloc[1]
    return (first["layer"], first["head"]), first["value"], second["value"]


def test_planted_heads_are_found_with_the_scores_that_their_weights_give():
    document = torch.arange(4, TOKENS)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    frame = head_scores(load_model(planted()), pack([document] * 4, 64))
    head, score, runner_up = top(frame, "previous_token")
    assert head == PREVIOUS_TOKEN
    assert score > 1 - 1e-9
    assert runner_up < 0.2
    head, score, runner_up = top(frame, "induction")
    assert head == INDUCTION
    # The first position has no token before it and finds itself, so the document's first token matches it as well.
    assert score == pytest.approx((45 + 1 / 2 + 2 / 3 + 3 / 4) / 48, abs=1e-3)
    assert runner_up < 0.2
    head, score, runner_up = top(frame, "duplicate_token")
    assert head == DUPLICATE
    assert score == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3, abs=1e-3)  # itself is as good a match as each copy
    assert runner_up < 0.2
    match = frame[(frame["metric"] == "match") & frame["value"].notna()].set_index(["layer", "head", "distance"])[
        "value"
    ]
    assert match[*DUPLICATE, 16] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3, abs=1e-3)
    assert match[*DUPLICATE, 32] == pytest.approx((1 / 3 + 2 / 4) / 2, abs=1e-3)


def test_pairs_of_planted_heads_are_those_that_were_planted():
    document = torch.arange(4, TOKENS)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    frame = pair_contributions(load_model(planted()), pack([document] * 4, 64))
    whole = frame[frame["distance"].isna()].set_index(["layer", "head", "pair"])["value"]
    assert whole[PREVIOUS_TOKEN].loc[:2].min() > 10 * whole[PREVIOUS_TOKEN].loc[6:].abs().max()
    assert whole[INDUCTION].loc[6:].sum() > 1e6 * whole[INDUCTION].loc[:5].abs().sum()
    # The fastest pair sets the token one back apart: 400 / sqrt(32) * (1 - mean of cos over what a query sees).
    wavelengths = frame[frame["pair"] == 0]["wavelength"]
    assert set(wavelengths.round(9)) == {round(2 * np.pi, 9)}
    expected = np.mean([1 - np.cos(np.arange(t + 1) - 1).mean() for t in range(1, 64)]) * 400 / np.sqrt(32)
    one_back = frame[(frame["distance"] == 1) & (frame["pair"] == 0)].set_index(["layer", "head"])["value"]
    assert one_back[PREVIOUS_TOKEN] == pytest.approx(expected, rel=1e-6)


KEY_VALUE = KeyValueTask(KeyValueStream(16, (2, 4), keys=8, values=8), 32)


def test_the_planted_induction_head_is_the_retrieval_head_and_retrieval_goes_with_it():
    model = load_model(planted())
    frame = retrieval_head_scores(model, KEY_VALUE, [8, 20], trials=16)
    for distance in (8, 20):
        head, score, runner_up = top(frame[frame["distance"] == distance], "retrieval_head")
        assert head == INDUCTION
        assert score == 1.0
        assert runner_up < 0.5

    def accuracy():
        rows = retrieval_accuracy(model, KEY_VALUE, [8], trials=32)
        return rows.set_index("metric")["value"]["accuracy"]

    assert accuracy() == 1.0
    for needed in (PREVIOUS_TOKEN, INDUCTION):
        with silenced(model, [needed]):
            assert accuracy() < 0.3
    with silenced(model, [DUPLICATE, (0, 0), (0, 1)]):
        assert accuracy() == 1.0
    assert accuracy() == 1.0


@pytest.mark.parametrize("forced", [False, True])
def test_retrieval_head_scores_are_those_of_eager_patterns(forced):
    stream = KeyValueStream(16, (2, 4), keys=24, values=4)
    passkey = TextTask("passkey", ByT5Tokenizer(extra_ids=0), 500)
    for task, vocabulary in ((KeyValueTask(stream, 30), 64), (passkey, 259)):
        plain = zoo.llama(vocab_size=vocabulary, max_position_embeddings=512)
        distance = task.distances()[-1]
        frame = retrieval_head_scores(load_model(plain), task, [distance], trials=3, forced=forced)
        eager = load_model(plain, attn="eager")
        expected = torch.zeros(2, 4)
        for trial in task.draw(distance, 3, seed=0):
            tokens, where = trial.prompt.unsqueeze(0), set(needle_of(trial).nonzero().flatten().tolist())
            for answer in trial.answer.tolist():  # step by step, as a model writes
                patterns_of = {}
                hooks = [
                    (f"blocks.{i}.attn.hook_pattern", lambda x, hook, of=patterns_of: of.update({hook.layer(): x[0]}))
                    for i in range(2)
                ]
                with torch.no_grad(), eager.hooks(fwd_hooks=hooks):
                    logits = eager(tokens)[0, -1]
                token = answer if forced else int(logits.argmax())
                for layer, pattern in patterns_of.items():
                    for head, key in enumerate(pattern[:, -1].argmax(-1).tolist()):
                        copied = key in where and int(tokens[0, key]) == token
                        expected[layer, head] += copied / len(trial.answer) / 3
                tokens = torch.cat([tokens, torch.tensor([[token]])], 1)
        np.testing.assert_allclose(frame["value"].to_numpy().reshape(2, 4), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["passkey", "niah_single_1", "niah_multikey_2", "niah_multikey_3"])
def test_a_needle_is_where_the_prompt_holds_the_answer(name):
    task = TextTask(name, ByT5Tokenizer(extra_ids=0), 1700)
    for trial in task.draw(task.distances()[-1], 3, seed=0):
        text = task.tokenizer.decode(trial.prompt[needle_of(trial)])
        assert text == f" {trial.references[0]}" * (2 if name == "passkey" else 1)


# Silenced heads -------------------------------------------------------------------------------------------------------


def without(plain, heads):
    """The model with the columns of o_proj that read these heads set to zero."""
    plain = copy.deepcopy(plain)
    width = plain.model.layers[0].self_attn.head_dim
    for layer, head in heads:
        plain.model.layers[layer].self_attn.o_proj.weight.data[:, head * width : (head + 1) * width] = 0
    return plain


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_silencing_heads_is_zeroing_what_reads_them(name):
    plain = zoo.model(zoo.CONFIGS[name]()).double()
    heads = [(0, 1), (1, 0), (1, 3)]
    window = window_of_copies()
    other = load_model(without(plain, heads))
    model = load_model(plain)
    with torch.no_grad():
        before = model(window)
        with silenced(model, heads):
            torch.testing.assert_close(model(window), other(window), rtol=0, atol=1e-12)
            prompt = window.tokens[0, :9]
            assert model.greedy(prompt, 8).tolist() == other.greedy(prompt, 8).tolist()
        torch.testing.assert_close(model(window), before, rtol=0, atol=0)


def test_a_silenced_head_passes_on_no_shift_of_its_own():
    model = load_model(zoo.llama().double())
    shift = PositionShift("q", 3.0, layers=0, heads=2)
    window = window_of_copies()

    def moved(site):
        frame = trace(model, window, shift, sites=["blocks.0.attn.hook_rot_q", "logits"], control=False)
        return frame[(frame["site"] == site) & (frame["metric"] == "l2")]["value"].max()

    assert moved("logits") > 0.1
    with silenced(model, [(0, 2)]):
        assert moved("blocks.0.attn.hook_rot_q") > 0.1
        assert moved("logits") == 0
    with silenced(model, [(0, 1)]):
        assert moved("logits") > 0.1


def test_a_head_can_be_silenced_by_its_mean():
    model = load_model(zoo.llama().double())
    window = window_of_copies()
    read = {}

    def keep(z, hook):
        read[hook.name, len(read)] = z

    sites = ["blocks.0.attn.hook_z", "blocks.0.hook_attn_out"]
    with torch.no_grad(), model.hooks(fwd_hooks=[(site, keep) for site in sites]):
        model.hidden(window)
    with (
        torch.no_grad(),
        silenced(model, [(0, 1)], mean_over=window),
        model.hooks(fwd_hooks=[(site, keep) for site in sites]),
    ):
        model.hidden(window)
    z, _, silent, _ = read.values()
    torch.testing.assert_close(silent[0, :, 1], z[0, :, 1].mean(0).expand(len(window), -1), rtol=0, atol=1e-12)
    torch.testing.assert_close(silent[:, :, [0, 2, 3]], z[:, :, [0, 2, 3]], rtol=0, atol=0)


def test_what_is_out_of_range_is_refused():
    model = load_model(zoo.llama())
    window = window_of_copies()
    for measure in (head_scores, pair_contributions):
        with pytest.raises(InputError, match=r"layer 2 is out of range; this model's layers are 0\.\.1"):
            measure(model, window, layers=2)
    for head in ((0, 4), (2, 0), (-1, 0)):
        with pytest.raises(InputError, match=r"layers are 0\.\.1 and heads 0\.\.3"), silenced(model, [head]):
            pass
    with pytest.raises(InputError, match="there are 0 and 1"):
        retrieval_head_scores(model, KEY_VALUE, [8], trials=0)


def test_the_head_map_shows_the_numbers_of_the_frame():
    frame = head_scores(load_model(zoo.llama()), window_of_copies())
    figure = head_map(frame)
    titles = [note.text for note in figure.layout.annotations]
    for panel, metric in enumerate(metric for metric in PANELS if metric in set(frame["metric"])):
        assert titles[panel].replace("<br>", " ") == PANELS[metric]
        table = frame[frame["metric"] == metric].pivot(index="layer", columns="head", values="value")
        np.testing.assert_allclose(np.asarray(figure.data[panel].z, dtype=float), table)
    with pytest.raises(InputError, match="no scores of heads"):
        head_map(frame[frame["metric"] == "match"])


def test_layers_without_attention_have_no_heads_to_score_or_silence():
    model = load_model(every_type.tiny_model("lfm2_moe"))
    window = pack([list(range(4, 20))], 16)
    attending = model.attending_layers
    assert 0 < len(attending) < len(model.blocks)
    assert head_scores(model, window)["layer"].unique().tolist() == attending
    without = next(layer for layer in range(len(model.blocks)) if layer not in attending)
    with pytest.raises(InputError, match=f"layer {without} of this model has no attention"):
        head_scores(model, window, layers=without)
    with pytest.raises(InputError, match="no heads to silence"), silenced(model, [(without, 0)]):
        pass
