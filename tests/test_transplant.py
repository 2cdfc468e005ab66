"""Transplants of spans between checkpoints, and what is found by them."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf

from rope_probe import (
    InputError,
    KeyValueStream,
    KeyValueTask,
    compare_spans,
    load_model,
    retrieval_accuracy,
    transplant_spans,
)
from rope_probe.spans import (
    Span,
    fraction_to_reach,
    gradient_times_change,
    query_spans,
    span_effects,
    spans_of,
    transplanted,
    whole,
)
from tests import zoo


def pair_of(name, theta=500.0):
    """Two models of one architecture that differ in every weight, norms and biases too, and rotate differently."""
    models = [zoo.model(zoo.CONFIGS[name](), seed=seed) for seed in (0, 1)]
    for seed, model in enumerate(models):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    if "rope_type" in models[1].config.rope_parameters:
        parameters = {**models[1].config.rope_parameters, "rope_theta": theta}
        models[1].config.rope_parameters = parameters
        rotary = models[1].base_model.rotary_emb
        models[1].base_model.rotary_emb = type(rotary)(config=models[1].config)
    return models


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_transplanting_everything_makes_the_other_model_bit_for_bit(name):
    before, after = pair_of(name)
    kept = weights(before), weights(after)
    made = transplant_spans(before, after, whole(before))
    assert same(weights(made), kept[1])
    ids = zoo.tokens()
    with torch.no_grad():
        assert torch.equal(made(ids).logits, after(ids).logits)
        assert not torch.equal(made(ids).logits, before(ids).logits)
    assert same(weights(before), kept[0])
    assert same(weights(after), kept[1])


def test_rotation_comes_with_all_that_it_depends_on():
    before = zoo.model(zoo.CONFIGS["phi3"]())
    longer = {**zoo.ROPE_TYPES["longrope"], "original_max_position_embeddings": 32}
    after = zoo.model(hf.Phi3Config(**{**zoo.SIZES, "max_position_embeddings": 512}, rope_parameters=longer), seed=1)
    made = transplant_spans(before, after, whole(before))
    assert made.model.rotary_emb.attention_scaling == after.model.rotary_emb.attention_scaling > 1
    assert made.config.max_position_embeddings == 512
    with torch.no_grad():
        for length in (20, 60):
            ids = zoo.tokens(2, length)
            assert torch.equal(made(ids).logits, after(ids).logits)
    with pytest.raises(InputError, match="layer 0 rotates 8 dimensions of a head before and 4 after"):
        transplant_spans(before, zoo.model(zoo.CONFIGS["phi3_partial"]()), [Span(part="rope")])


def test_a_donor_without_the_weights_is_refused():
    before = zoo.model(hf.LlamaConfig(**zoo.SIZES, attention_bias=True))
    with pytest.raises(InputError, match=r"q_proj.bias is not in both models in one shape; W_Q cannot"):
        transplant_spans(before, zoo.llama(), [Span()])


def test_what_stands_out_in_a_comparison_can_be_transplanted():
    before, after = pair_of("llama")
    frame = compare_spans(before, after)
    top = frame[frame["pair"].notna() & (frame["metric"] == "rel_change")].nlargest(3, "value")
    spans = spans_of(top)
    assert [span.layer for span in spans] == top["layer"].tolist()
    assert {span.part for span in spans} <= {"W_Q", "W_K"}
    made = compare_spans(before, transplant_spans(before, after, spans))
    changed = made[made["pair"].notna() & (made["metric"] == "rel_change") & (made["value"] > 0)]
    assert set(spans_of(changed)) == set(spans)
    parts = frame[frame["head"].isna() & (frame["site"] != "ln_final")]
    assert Span(1, part="norms") in spans_of(parts)
    assert Span(part="W_E") in spans_of(parts)
    with pytest.raises(InputError, match="'ln_final' are of no span"):
        spans_of(frame)


def test_transplanting_nothing_leaves_a_copy():
    before, after = pair_of("llama")
    made = transplant_spans(before, after, [])
    assert same(weights(made), weights(before))
    made.lm_head.weight.data.zero_()
    assert before.lm_head.weight.abs().sum() > 0


def test_rotation_stays_unless_it_is_asked_for():
    before, after = pair_of("llama")
    assert transplant_spans(before, after, [Span()]).config.rope_parameters == before.config.rope_parameters
    turned = transplant_spans(before, after, [Span(part="rope")])
    assert turned.config.rope_parameters == after.config.rope_parameters
    assert torch.equal(turned.model.rotary_emb.inv_freq, after.model.rotary_emb.inv_freq)
    assert same(weights(turned), weights(before))


def test_a_plain_tuple_is_a_span_of_the_queries():
    before, after = pair_of("llama")
    made = transplant_spans(before, after, [(1, 2, 3)])
    name = "model.layers.1.self_attn.q_proj.weight"
    changed = [n for n in weights(made) if not torch.equal(weights(made)[n], weights(before)[n])]
    assert changed == [name]
    rows = [2 * 8 + 3, 2 * 8 + 7]
    moved = (made.get_parameter(name) != before.get_parameter(name)).any(1).nonzero().flatten().tolist()
    assert moved == rows
    assert torch.equal(made.get_parameter(name)[rows], after.get_parameter(name)[rows])


def test_a_head_of_the_output_projection_is_its_columns():
    before, after = pair_of("llama")
    made = transplant_spans(before, after, [Span(0, 3, part="W_O")])
    weight, donor, own = (m.model.layers[0].self_attn.o_proj.weight for m in (made, after, before))
    assert torch.equal(weight[:, 24:], donor[:, 24:])
    assert torch.equal(weight[:, :24], own[:, :24])


@pytest.mark.parametrize("name", ["starcoder2_sliding", "phi", "gpt_neox"])
def test_biases_go_with_their_rows(name):
    before, after = pair_of(name)
    made = transplant_spans(before, after, [Span(0, 1, 0, "W_K")])
    changed = {n: (weights(made)[n] != weights(before)[n]).sum().item() for n in weights(made)}
    assert {n.rpartition(".")[2]: count for n, count in changed.items() if count} == {"weight": 2 * 32, "bias": 2}


def test_checkpoints_and_hooked_models_are_taken_too(tmp_path):
    before, after = pair_of("llama")
    after.save_pretrained(tmp_path / "after")
    hooked = load_model(before)
    made = transplant_spans(hooked, tmp_path / "after", [Span(part="mlp")])
    wanted = transplant_spans(hooked.release(), after, [Span(part="mlp")])
    assert same(weights(made), weights(wanted))
    ids = zoo.tokens()
    with torch.no_grad():
        assert torch.equal(made(ids).logits, wanted(ids).logits)


def test_a_copy_of_a_hooked_model_by_its_inside_has_no_hooks():
    before, after = pair_of("llama")
    hooked = load_model(before)
    heard = []
    hooked.add_hook("blocks.0.hook_resid_post", lambda x, hook: heard.append(hook.name))
    copied = transplant_spans(before, after, [])
    copied(zoo.tokens())
    assert heard == []
    hooked(zoo.tokens())
    assert heard == ["blocks.0.hook_resid_post"]


@pytest.mark.parametrize(
    ("span", "told"),
    [
        (Span(part="W_X"), "'W_X' is no part of the weights; parts are W_Q, "),
        (Span(2), "W_Q has layers 0 to 1"),
        (Span(0, 4), "W_Q has heads 0 to 3"),
        (Span(0, 2, part="W_K"), "W_K has heads 0 to 1"),
        (Span(0, 0, 4), "has pairs 0 to 3"),
        (Span(pair=-1), "has pairs 0 to 3"),
        (Span(0, 0, 0, "W_V"), "has no pairs"),
        (Span(0, 0, part="mlp"), "mlp has no heads and no pairs"),
        (Span(0, part="W_E"), "W_E has no layers|W_E has layers"),
    ],
)
def test_a_span_that_is_not_there_is_refused(span, told):
    before, after = pair_of("llama")
    kept = weights(before)
    with pytest.raises(InputError, match=told):
        transplant_spans(before, after, [span])
    assert same(weights(before), kept)


def test_a_layer_without_rope_has_no_pairs_but_pairs_of_all_layers_pass_it_by():
    before, after = pair_of("smollm3_nope_layer")
    with pytest.raises(InputError, match="has no pairs"):
        transplant_spans(before, after, [Span(3, 0, 0)])
    made = transplant_spans(before, after, [Span(pair=0)])
    changed = [n for n in weights(made) if not torch.equal(weights(made)[n], weights(before)[n])]
    assert changed == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]


def test_other_shapes_are_refused():
    with pytest.raises(InputError, match="num_attention_heads is 4 before and 2 after"):
        transplant_spans(zoo.llama(), zoo.llama(num_attention_heads=2), [])


def test_a_donor_of_another_model_type_is_refused():
    donor = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64))
    with pytest.raises(InputError, match="model_type is llama before and gpt2 after"):
        transplant_spans(zoo.llama(), donor, [Span()])


@pytest.mark.parametrize("fails", [False, True])
def test_within_a_transplant_the_host_differs_and_then_is_itself_again(fails):
    before, after = pair_of("phi3")
    wanted = transplant_spans(before, after, [Span(0), Span(1, 1, 2, "W_K"), Span(part="norms")])
    host, kept = load_model(before), weights(before)
    try:
        with transplanted(host, after, [Span(0), (1, 1, 2, "W_K"), Span(part="norms")]):
            assert same(weights(before), weights(wanted))
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert same(weights(before), kept)


def test_rotation_is_no_weight():
    before, after = pair_of("llama")
    with (
        pytest.raises(InputError, match="'rope' is no part of the weights"),
        transplanted(load_model(before), after, [Span(part="rope")]),
    ):
        pass


def test_effects_are_those_of_the_transplanted_models():
    before, after = pair_of("llama")
    task = KeyValueTask(KeyValueStream(16, (1, 4), keys=20, values=20), 16)

    def measure(model):
        return retrieval_accuracy(model, task, [4, 8], trials=8, seed=0)

    groups = {"nothing": [], "queries": [Span()], "one": [Span(0, 0, 0)], "all": whole(before)[:-1]}
    assert whole(before)[-1].part == "rope"
    frame = span_effects(load_model(copy.deepcopy(before)), after, groups, measure)
    for name, spans in groups.items():
        wanted = measure(load_model(transplant_spans(before, after, spans)))
        found = frame[frame["group"] == name].reset_index(drop=True)
        pd.testing.assert_series_equal(found["value"], wanted["value"])


def test_gradient_times_change_is_the_first_order_of_a_small_transplant():
    before = zoo.llama().double()
    after = copy.deepcopy(before)
    torch.manual_seed(1)
    for parameter in after.parameters():
        parameter.data += 1e-6 * torch.randn_like(parameter)
    host, ids = load_model(before), zoo.tokens(2, 12)

    def loss(model):
        return model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None]).mean().neg()

    spans = [*query_spans(before)[::5], Span(1, 0, 2, "W_K"), Span(0, 3, part="W_O"), Span(part="mlp"), Span(1)]
    found = gradient_times_change(host, after, spans, loss)
    with torch.no_grad():
        clean = loss(host).item()
        for span, value in zip(spans, found, strict=True):
            with transplanted(host, after, [span]):
                assert clean - loss(host).item() == pytest.approx(value, rel=1e-3, abs=1e-12)


def test_contributions_along_the_path_add_up_to_what_the_loss_falls_by():
    before, after = (zoo.model(zoo.CONFIGS["llama"](), seed=seed).double() for seed in (0, 1))
    for one, other in zip(after.parameters(), before.parameters(), strict=True):
        one.data.mul_(0.1).add_(other.data)
    host, kept, ids = load_model(before), weights(before), zoo.tokens(2, 12)

    def loss(model):
        return model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None]).mean().neg()

    parts = [span for span in whole(before) if span.part != "rope"]
    with torch.no_grad():
        falls = (loss(host) - loss(load_model(copy.deepcopy(after)))).item()
    assert sum(gradient_times_change(host, after, parts, loss, steps=32)) == pytest.approx(falls, rel=1e-3)
    assert abs(sum(gradient_times_change(host, after, parts, loss)) - falls) > 0.05 * abs(falls)
    one, *others = gradient_times_change(host, after, [Span(), *query_spans(before)], loss, steps=4)
    assert one == pytest.approx(sum(others), rel=1e-9)
    assert same(weights(before), kept)
    for parameter in before.parameters():
        parameter.requires_grad_(False)
    assert gradient_times_change(host, load_model(after), [Span()], loss, steps=4) == pytest.approx([one])
    assert not any(parameter.requires_grad for parameter in before.parameters())
    assert gradient_times_change(host, after, [], loss) == []
    with pytest.raises(InputError, match="steps must be 0 or more, but it is -1"):
        gradient_times_change(host, after, parts, loss, steps=-1)
    with pytest.raises(InputError, match="there are no groups"):
        span_effects(host, after, {}, loss)


def test_query_spans_are_all_there_are():
    assert len(query_spans(zoo.llama())) == 2 * 4 * 4
    assert len(query_spans(zoo.model(zoo.CONFIGS["smollm3_nope_layer"]()))) == 3 * 4 * 4
    assert query_spans(zoo.model(zoo.CONFIGS["phi3_partial"]()))[-1] == Span(1, 3, 1)


def test_the_fraction_at_which_a_curve_reaches_a_level():
    fractions = [0, 0.25, 0.5, 1]
    assert fraction_to_reach(fractions, [0, 0, 1, 1], 0.5) == 0.375
    assert fraction_to_reach(fractions, [0, 0.9, 0.4, 1.0], 0.9) == 0.25
    assert fraction_to_reach(np.array(fractions), np.array([0, 1, 1, 1]), 0.9) == pytest.approx(0.225)
    assert fraction_to_reach(fractions, [0.5, 0, 0, 1], 0.5) == 0
    assert fraction_to_reach(fractions, [0, 0.2, 0.3, 0.4], 0.5) == np.inf
    with pytest.raises(InputError, match="which rise"):
        fraction_to_reach([0, 0.5, 0.5], [0, 1, 1], 0.5)


def test_models_of_other_precision_give_their_values_rounded():
    before, after = pair_of("llama")
    made = transplant_spans(before, after.to(torch.bfloat16), [Span(part="W_V")])
    assert made.dtype == torch.float32
    donor = after.model.layers[0].self_attn.v_proj.weight
    assert torch.equal(made.model.layers[0].self_attn.v_proj.weight, donor.float())


def test_tied_embeddings_move_as_one():
    before, after = (zoo.model(hf.LlamaConfig(**zoo.SIZES, tie_word_embeddings=True), seed=s) for s in (0, 1))
    assert "W_U" not in {span.part for span in whole(before)}
    made = transplant_spans(before, after, [Span(part="W_E")])
    assert torch.equal(made.lm_head.weight, after.lm_head.weight)
    with pytest.raises(InputError, match="no such weights of their own"):
        transplant_spans(before, after, [Span(part="W_U")])
