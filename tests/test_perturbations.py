import math

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge

from rope_probe import (
    AttentionTemperature,
    DocumentOffset,
    InputError,
    PairFreeze,
    PairTurn,
    PositionJitter,
    PositionShift,
    ThetaSwap,
    load_model,
    pack,
    repeated_window,
    rope,
)
from rope_probe.models.checkpoints import with_rope
from tests import zoo

SHIFTED = ["llama", "mistral_sliding", "qwen3", "gemma3", "phi3_partial", "gpt_neox", "glm", "cohere2_nope_layer"]


def logits(model, window, perturbation=None, masked=False):
    hooks = [] if perturbation is None else perturbation.hooks(model, window)
    with torch.no_grad():
        return model.run_with_hooks(window, masked=masked, fwd_hooks=hooks)


def packed(positions="continuous"):
    documents = [zoo.tokens(1, n, seed=n)[0] for n in (10, 13, 7)]
    return pack(documents, 30, positions=positions, target_window=60)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SHIFTED)
def test_shifting_q_on_is_shifting_k_back_and_shifting_both_is_nothing(name, masked):
    model = load_model(zoo.model(zoo.CONFIGS[name]()).double())
    window = packed()
    clean = logits(model, window, masked=masked)
    q = logits(model, window, PositionShift("q", 5.5), masked)
    k = logits(model, window, PositionShift("k", -5.5), masked)
    both = logits(model, window, PositionShift("qk", 5.5), masked)
    torch.testing.assert_close(q, k, rtol=0, atol=1e-10)
    torch.testing.assert_close(both, clean, rtol=0, atol=1e-10)
    assert (q - clean).abs().max() > 1e-3


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.floats(-2000, 2000).filter(lambda t: abs(t) > 1e-3),
    layers=st.sampled_from([None, 0, [1]]),
    heads=st.sampled_from([None, 0, [1]]),
    pairs=st.sampled_from([None, 0, [1, 3]]),
    kernel=st.sampled_from(["sdpa", "eager"]),
)
def test_a_shift_of_both_sides_is_nothing_under_any_restriction_that_keeps_them_together(
    tokens, layers, heads, pairs, kernel
):
    model = load_model(zoo.llama().double(), attn=kernel)
    window = packed()
    shift = PositionShift("qk", tokens, layers=layers, heads=heads, pairs=pairs)
    torch.testing.assert_close(logits(model, window, shift), logits(model, window), rtol=0, atol=1e-10)


def test_a_shift_is_what_the_model_would_have_computed_further_on():
    model = load_model(zoo.llama().double())
    window = repeated_window(zoo.tokens(1, 10)[0], 2)
    later = type(window)(window.tokens, window.cu_seqlens, window.position_ids + 7)
    shifted = {}
    for name, turn in PositionShift("qk", 7.0).hooks(model, window):
        model.run_with_hooks(
            window, fwd_hooks=[(name, lambda x, hook, t=turn: shifted.update({hook.name: t(x, hook)}))]
        )
    _, cache = model.run_with_cache(later)
    for name, state in shifted.items():
        if name.startswith("blocks.0"):
            torch.testing.assert_close(state, cache[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", ["q", "k", "qk"])
@pytest.mark.parametrize("rope_type", ["default", "yarn", "llama3"])
def test_theta_swap_is_the_model_with_that_theta(side, rope_type):
    plain = zoo.llama(rope_parameters=zoo.ROPE_TYPES[rope_type])
    other = with_rope(plain, 300.0).double()
    model, target = load_model(plain.double()), load_model(other)
    _, expected = target.run_with_cache(packed())
    swapped = {}

    def keep(x, hook):
        swapped[hook.name] = x

    names = [f"blocks.0.attn.hook_rot_{s}" for s in "qk"]
    hooks = ThetaSwap(side, 300.0).hooks(model, packed())
    model.run_with_hooks(packed(), fwd_hooks=[*hooks, *((name, keep) for name in names)])
    _, untouched = model.run_with_cache(packed())
    for name in names:
        right = expected if name[-1] in side else untouched
        torch.testing.assert_close(swapped[name], right[name], rtol=0, atol=1e-10)
    if side == "qk":
        torch.testing.assert_close(
            logits(model, packed(), ThetaSwap(side, 300.0)), target(packed()), rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("rope_type", zoo.ROPE_TYPES)
def test_a_theta_swap_keeps_the_rope_type(rope_type):
    """It was plain RoPE whatever the model's type: a llama3 model swapped to its own theta turned by up to 8 rad."""
    plain = zoo.llama(rope_parameters=zoo.ROPE_TYPES[rope_type])
    model, target = load_model(plain).double(), load_model(with_rope(plain, 300.0)).double()
    own = ThetaSwap("qk", zoo.ROPE_TYPES[rope_type]["rope_theta"])
    assert not any(turn.changes.any() for turn in own.turns(model.original_model, 30).values())
    assert torch.equal(logits(model, packed(), own), logits(model, packed()))
    swapped = logits(model, packed(), ThetaSwap("qk", 300.0))
    torch.testing.assert_close(swapped, target(packed()), rtol=0, atol=1e-10)
    assert (swapped - logits(model, packed())).abs().max() > 1e-3


LOCAL_AND_GLOBAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}


def local_and_global(**thetas):
    """Gemma 3's two kinds of layers, rotating by parameters of their own; `thetas` by kind."""
    config = zoo.CONFIGS["gemma3"]()
    config.rope_parameters = {
        kind: {**parameters, "rope_theta": thetas.get(kind, parameters["rope_theta"])}
        for kind, parameters in LOCAL_AND_GLOBAL.items()
    }
    return load_model(zoo.model(config)).double()


def test_a_theta_swap_is_of_each_kind_of_layer_by_its_own_parameters():
    model = local_and_global()
    for layer, kind in enumerate(LOCAL_AND_GLOBAL):
        own = ThetaSwap("qk", LOCAL_AND_GLOBAL[kind]["rope_theta"], layers=layer)
        assert not any(turn.changes.any() for turn in own.turns(model.original_model, 30).values())
        swapped = logits(model, packed(), ThetaSwap("qk", 300.0, layers=layer))
        expected = logits(local_and_global(**{kind: 300.0}), packed())
        torch.testing.assert_close(swapped, expected, rtol=0, atol=1e-10)
    both = logits(model, packed(), ThetaSwap("qk", 300.0))
    expected = logits(local_and_global(sliding_attention=300.0, full_attention=300.0), packed())
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-10)


def test_a_theta_swap_refuses_frequencies_that_no_theta_made():
    plain = zoo.llama()
    rotary = plain.model.rotary_emb
    rotary.inv_freq.mul_(1.5)
    rotary.original_inv_freq.mul_(1.5)
    with pytest.raises(InputError, match="not those that its config makes"):
        ThetaSwap("q", 300.0).hooks(load_model(plain))[0][1](torch.zeros(1, 4, 4, 8), None)


def test_a_turn_of_a_pair_is_a_shift_by_that_angle_in_its_wavelength():
    model = load_model(zoo.llama().double())
    window = packed()
    for pair, frequency in enumerate(model.rotary[0].inv_freq.tolist()):
        turned = logits(model, window, PairTurn("q", 0.7, pairs=pair))
        shifted = logits(model, window, PositionShift("q", 0.7 / frequency, pairs=pair))
        torch.testing.assert_close(turned, shifted, rtol=0, atol=1e-10)
        back = logits(model, window, PairTurn("k", -0.7, pairs=pair))
        torch.testing.assert_close(turned, back, rtol=0, atol=1e-10)
    both = logits(model, window, PairTurn("qk", 0.7))
    torch.testing.assert_close(both, logits(model, window), rtol=0, atol=1e-10)


def test_freezing_every_pair_takes_position_away():
    model = load_model(zoo.llama().double())
    document = zoo.tokens(1, 10)[0]
    window = repeated_window(document, 3)
    freeze = PairFreeze("qk", pairs=range(4))
    hooked = {}
    hooks = [*freeze.hooks(model, window), ("blocks.0.attn.hook_rot_q", lambda x, hook: hooked.update(q=x[0]))]
    model.run_with_hooks(window, fwd_hooks=hooks)
    copies = hooked["q"].view(3, 10, 4, 8)
    torch.testing.assert_close(copies[1:], copies[:1].expand(2, -1, -1, -1), rtol=0, atol=1e-12)


def test_freezing_at_another_position_is_freezing_and_shifting():
    model = load_model(zoo.llama().double())
    here, there = PairFreeze("qk", [1, 2]), PairFreeze("qk", [1, 2], at=100.0)
    torch.testing.assert_close(logits(model, packed(), here), logits(model, packed(), there), rtol=0, atol=1e-10)
    assert (logits(model, packed(), here) - logits(model, packed())).abs().max() > 1e-3


def test_jitter_is_a_function_of_its_seed_and_bounded():
    model = load_model(zoo.llama().double())
    one, same, other = (logits(model, packed(), PositionJitter("q", 2.0, seed=s)) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    still = logits(model, packed(), PositionJitter("q", 0.0))
    torch.testing.assert_close(still, logits(model, packed()), rtol=0, atol=1e-12)
    both = logits(model, packed(), PositionJitter("qk", 2.0, positions=4))
    alone = logits(model, packed(), PositionJitter("q", 2.0, positions=4))
    assert not torch.allclose(both, alone)


@pytest.mark.parametrize("scheme", ["continuous", "reset", "skipped"])
def test_offsetting_a_document_is_nothing_when_masked_and_something_when_not(scheme):
    model = load_model(zoo.llama().double())
    window = packed(scheme)
    offset = DocumentOffset([1, 2], 50.0)
    torch.testing.assert_close(
        logits(model, window, offset, masked=True), logits(model, window, masked=True), rtol=0, atol=1e-10
    )
    assert (logits(model, window, offset) - logits(model, window)).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["q", "k", "qk"])
def test_restrictions_touch_what_they_name_and_nothing_else(side):
    model = load_model(zoo.llama().double())
    window = packed()
    shift = PositionShift(side, 3.0, layers=0, heads=1, pairs=2, positions=[4, 5])
    _, clean = model.run_with_cache(window)
    seen = {}
    reads = [(f"blocks.0.attn.hook_rot_{s}", lambda x, hook: seen.update({hook.name[-1]: x})) for s in "qk"]
    model.run_with_hooks(window, fwd_hooks=[*shift.hooks(model, window), *reads])
    for s in "qk":
        changed = (seen[s] - clean[f"blocks.0.attn.hook_rot_{s}"])[0].abs() > 1e-9
        expected = torch.zeros_like(changed)
        if s in side:
            heads = [2, 3] if side == "qk" and s == "q" else [1]  # key-value head 1 serves query heads 2 and 3
            for head in heads:
                expected[4:6, head, [2, 6]] = True
        assert torch.equal(changed, expected)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = Tokenizer(models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    hf.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="1", eos_token="2", pad_token="3").save_pretrained(
        folder
    )
    return hf.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("perturbation", [
    PositionShift("q", 3.5), PositionShift("k", -2.0, layers=1, pairs=[0, 3]), ThetaSwap("qk", 300.0),
    PositionJitter("q", 4.0, heads=[0]), PairFreeze("k", [0, 1]), PairTurn("q", 1.0, pairs=1), DocumentOffset(1, 9.0),
    AttentionTemperature(1.5),
], ids=lambda p: type(p).__name__ + p.side)  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_perturbations_do_the_same_on_transformer_bridge(name, perturbation, tokenizer):
    window = packed()
    plain = zoo.model(zoo.CONFIGS[name](), attn="eager", scale=0.15)
    plain.config.architectures = [type(plain).__name__]
    bridge = TransformerBridge.boot_transformers("tiny/model", hf_model=plain, tokenizer=tokenizer, device="cpu")
    model = load_model(zoo.model(zoo.CONFIGS[name](), scale=0.15), attn="eager")
    seen = {model: {}, bridge: {}}
    sites = [f"blocks.{i}.hook_resid_{at}" for i in (0, 1) for at in ("pre", "mid", "post")]
    got = {}
    for one, run in ((model, window), (bridge, window.tokens)):
        reads = [(site, lambda x, hook, to=seen[one], site=site: to.update({site: x})) for site in sites]
        with torch.no_grad():
            got[one] = one.run_with_hooks(run, fwd_hooks=[*perturbation.hooks(one, window), *reads])
    torch.testing.assert_close(got[model], got[bridge], rtol=0, atol=1e-5)
    assert (got[model] - model(window)).abs().max() > 1e-3
    for site in sites:
        torch.testing.assert_close(seen[model][site], seen[bridge][site], rtol=0, atol=1e-5)


def test_a_bridge_without_hooks_after_rotation_is_refused(tokenizer):
    plain = zoo.model(zoo.CONFIGS["gpt_neox"](), attn="eager")
    plain.config.architectures = [type(plain).__name__]
    bridge = TransformerBridge.boot_transformers("tiny/model", hf_model=plain, tokenizer=tokenizer, device="cpu")
    with pytest.raises(InputError, match="load_model"):
        PositionShift("q", 1.0).hooks(bridge)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_a_temperature_is_queries_or_keys_scaled(name):
    """Partial rotary too: the part of a head that does not rotate counts in the score."""
    model = load_model(zoo.model(zoo.CONFIGS[name](), scale=0.15).double())

    def scaled(*sides):
        hooks = [
            (f"blocks.{layer}.attn.hook_rot_{side}", lambda x, hook: 1.7 * x) for layer in (0, 1) for side in sides
        ]
        with torch.no_grad():
            return model.run_with_hooks(packed(), fwd_hooks=hooks)

    for side in ("q", "k", "qk"):
        ours = logits(model, packed(), AttentionTemperature(1.7, side))
        torch.testing.assert_close(ours, scaled(*side), rtol=0, atol=1e-12)
    one_side = logits(model, packed(), AttentionTemperature(1.7))
    torch.testing.assert_close(one_side, logits(model, packed(), AttentionTemperature(1.7, "k")), rtol=0, atol=1e-12)
    assert torch.equal(logits(model, packed(), AttentionTemperature(1.0)), model(packed()).detach())


def test_a_temperature_is_query_weights_scaled():
    plain = zoo.llama().double()
    model, weights = load_model(plain), load_model(zoo.llama().double())
    with torch.no_grad():
        weights.original_model.model.layers[1].self_attn.q_proj.weight[8:16] *= 0.4  # head 1 of width 8
    ours = logits(model, packed(), AttentionTemperature(0.4, layers=1, heads=1))
    torch.testing.assert_close(ours, weights(packed()), rtol=0, atol=1e-12)


def test_a_temperature_of_all_pairs_is_a_temperature_where_all_of_a_head_rotates():
    model = load_model(zoo.llama().double())
    whole = logits(model, packed(), AttentionTemperature(2.0))
    torch.testing.assert_close(
        logits(model, packed(), AttentionTemperature(2.0, pairs=range(4))), whole, rtol=0, atol=1e-12
    )
    some = [logits(model, packed(), AttentionTemperature(2.0, pairs=pair)) for pair in range(4)]
    assert all((one - whole).abs().max() > 1e-6 for one in some)


def test_log_n_grows_from_the_reference_on():
    factors = AttentionTemperature("log_n", reference=8).factors(torch.arange(64).double())
    assert torch.equal(factors[:8], torch.ones(8, dtype=torch.float64))
    np.testing.assert_allclose(factors[[15, 63]], [math.log(16) / math.log(8), 2.0], rtol=1e-15)
    model = load_model(zoo.llama().double())
    clean, warmer = model(packed()), logits(model, packed(), AttentionTemperature("log_n", reference=8))
    assert (clean - warmer).abs()[0, :8].max() == 0 < (clean - warmer).abs()[0, 8:].max()


def test_yarns_temperature_is_that_of_transformers():
    parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
    assert rope.yarn_temperature(8.0) == pytest.approx(rope.attention_scaling(parameters, 8) ** 2, rel=1e-15)
    with pytest.raises(InputError, match=r"but it is 0\.5"):
        rope.yarn_temperature(0.5)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: AttentionTemperature(-1.0), "0 or more, but it is -1"),
        (lambda: AttentionTemperature("ln"), "'log_n', but it is 'ln'"),
        (lambda: AttentionTemperature("log_n"), "reference"),
        (lambda: AttentionTemperature(2.0, reference=64), "reference"),
        (lambda: AttentionTemperature("log_n", reference=1), "2 tokens or more, but it is 1"),
        (lambda: AttentionTemperature(math.nan), "finite"),
    ],
)
def test_temperatures_that_make_no_sense_are_refused(make, told):
    with pytest.raises(InputError, match=told):
        make()


@pytest.mark.parametrize("tokens", [math.nan, math.inf, -math.inf])
def test_shifts_that_are_no_number_are_refused(tokens):
    with pytest.raises(InputError, match="finite"):
        PositionShift("q", tokens)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PositionShift("q", np.float32("nan")),
        lambda: PositionJitter("q", -1.0),
        lambda: PositionJitter("q", 1.0, seed=-1),
    ],
)
def test_sizes_that_make_no_sense_are_refused(make):
    with pytest.raises(InputError):
        make()


def test_selections_can_come_from_numpy():
    model = load_model(zoo.llama())
    ours, theirs = (PositionShift("q", 1.0, layers=layers, pairs=pairs) for layers, pairs in
                    ((1, [0, 2]), (np.int64(1), np.array([0, 2]))))  # fmt: skip
    assert torch.equal(logits(model, packed(), ours), logits(model, packed(), theirs))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PositionShift("v", 1.0), "'v'"),
        (lambda: PositionShift("q", 1.0, layers=2), "layer 2 .* layers 0 to 1"),
        (lambda: PositionShift("q", 1.0, heads=[4]), "head 4 .* heads 0 to 3"),
        (lambda: PositionShift("k", 1.0, heads=[2]), "key-value head 2 .* heads 0 to 1"),
        (lambda: PositionShift("qk", 1.0, heads=[2]), "key-value head 2"),
        (lambda: PositionShift("q", 1.0, pairs=4), "pair 4 .* pairs 0 to 3"),
        (lambda: PositionShift("q", 1.0, layers=-1), "layer -1"),
        (lambda: DocumentOffset(0, 1.0), "window"),
        (lambda: ThetaSwap("q", -5.0), "-5.0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(make, named):
    model = load_model(zoo.llama())
    with pytest.raises(InputError, match=named):
        model.run_with_hooks(zoo.tokens(), fwd_hooks=make().hooks(model))


def test_positions_and_documents_out_of_range_are_refused():
    model = load_model(zoo.llama())
    for perturbation, named in (
        (PositionShift("q", 1.0, positions=30), "position 30"),
        (DocumentOffset(3, 1.0), "document 3"),
    ):
        with pytest.raises(InputError, match=named):
            logits(model, packed(), perturbation)


def test_a_layer_without_rope_cannot_be_named():
    model = load_model(zoo.model(zoo.CONFIGS["smollm3_nope_layer"]()))
    bare = model.rotary.index(None)
    with pytest.raises(InputError, match=f"layer {bare} has no RoPE"):
        PositionShift("q", 1.0, layers=bare).hooks(model)
    names = [name for name, _ in PositionShift("q", 1.0).hooks(model)]
    assert f"blocks.{bare}.attn.hook_rot_q" not in names
    assert len(names) == 3
