"""LongReD and its kin: terms by their formulas, the published mix, attention under skipped positions."""

import dataclasses
import json
import math
import tempfile
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F  # noqa: N812

from rope_probe import InputError, KeyValueStream, load_model
from rope_probe.distillation import (
    CrossEntropy,
    Divergence,
    HiddenStates,
    Phase,
    Stream,
    Training,
    distill,
    read_config,
    train_phase,
)
from rope_probe.distillation.sites import last_site, sites_by_drift, sites_evenly, sites_of_layers
from rope_probe.distillation.terms.projected_states import ProjectedStates, fit_projections
from rope_probe.distillation.terms.relations import Relations, relation_kl, relation_sites
from rope_probe.distillation.terms.self_distillation import SelfDistillation
from rope_probe.precision import promote_float32
from rope_probe.runs.results import read_run
from rope_probe.tracing.perturbations import PositionShift
from rope_probe.windows.packing import pack
from tests import zoo
from tests.memory import LargestTensor

EXAMPLES = Path(__file__).parents[1] / "examples"
DATA = KeyValueStream(36, distinct=(1, 4), keys=20, values=20)
SCHEMES = ("longred_uniform", "longred_cream", "cream", "pose", "rope_perturbed")


def states(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# relations (LinearARD)


def dense_relation_kl(student, teacher):
    """[B, T], written as the formula is."""

    def rows(x):
        x = x.transpose(1, 2)  # [B, H, T, D]
        scores = x @ x.transpose(-1, -2) / math.sqrt(x.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(later, float("-inf")).softmax(-1)

    q, p = rows(student), rows(teacher)
    inside = torch.ones(p.shape[-2:], dtype=torch.bool).tril()
    terms = torch.where(inside, p * (p.where(inside, 1).log() - q.where(inside, 1).log()), 0)
    return terms.sum(-1).mean(1)


@pytest.mark.parametrize("block", [1, 7, 32, 100])
def test_relations_and_their_gradients_are_those_of_the_dense_formula(block):
    teacher, weights = states(2, 33, 3, 12, seed=1), states(2, 33, seed=2)
    ours, dense = (states(2, 33, 3, 8).requires_grad_() for _ in range(2))
    values, expected = relation_kl(ours, teacher, block=block), dense_relation_kl(dense, teacher)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-10)
    (values * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, dense.grad, rtol=0, atol=1e-10)
    assert values.detach().min() > -1e-12


def test_relations_hold_no_matrix_of_t_by_t():
    """Their largest tensor grows with T, not with its square."""
    largest = []
    for length in (512, 1024, 2048):
        student, teacher = (states(1, length, 1, 4, seed=seed, dtype=torch.float32) for seed in (0, 1))
        with LargestTensor() as seen:
            relation_kl(student.requires_grad_(), teacher).sum().backward()
        largest.append(seen.elements)
    assert largest == [128 * 512, 128 * 1024, 128 * 2048]


def test_relations_of_a_model_with_itself_are_0_and_of_others_learnt():
    sites = relation_sites([0, 1])
    assert sites[:3] == ("blocks.0.attn.hook_rot_q", "blocks.0.attn.hook_rot_k", "blocks.0.attn.hook_v")
    model = load_model(zoo.llama().double())
    window = pack([zoo.tokens(1, 40)[0]], 40)
    _, cache = model.run_with_cache(window)
    read = [cache[site] for site in sites]
    term = Relations(sites=sites)
    assert term.values(read, read).abs().max() < 1e-13
    other = load_model(zoo.model(zoo.CONFIGS["llama"](), seed=1).double()).run_with_cache(window)[1]
    theirs = [other[site] for site in sites]
    expected = sum(dense_relation_kl(a, b) for a, b in zip(read, theirs, strict=True)).flatten()
    torch.testing.assert_close(term.values(read, theirs), expected, rtol=0, atol=1e-10)
    term.check(model, model)

    student = load_model(zoo.model(zoo.CONFIGS["llama"](), seed=2))
    phase = Phase("relations", DATA, 36, 8, 288, 1e-2, warmup=1, terms=(Relations(sites=sites, teacher="teacher"),))
    history, _ = train_phase(student, phase, seed=0, teacher=load_model(zoo.llama()))
    assert history[-1]["relations_nats"] < 0.7 * history[0]["relations_nats"]
    assert history[0]["loss"] == pytest.approx(history[0]["relations_nats"])


def test_relations_that_cannot_be_compared_are_refused():
    with pytest.raises(InputError, match=r"relations needs sites, such as blocks.0.attn.hook_rot_q"):
        Relations()
    with pytest.raises(InputError, match=r"but a site is 'ln_final.hook_out'"):
        Relations(sites=("ln_final.hook_out",))
    other = load_model(zoo.model(zoo.hf.LlamaConfig(**zoo.MHA)))
    with pytest.raises(InputError, match="4 query and 2 key-value heads and the teacher 'original' 4 and 4"):
        Relations(sites=relation_sites([0])).check(load_model(zoo.llama()), other)
    with pytest.raises(InputError, match=r"no site 'blocks.9.attn.hook_rot_q'"):
        Relations(sites=relation_sites([9])).check(load_model(zoo.llama()), None)
    with pytest.raises(InputError, match="has 3 heads in the student and 2 in the teacher"):
        Relations(sites=relation_sites([0])[:1]).values([states(1, 4, 3, 2)], [states(1, 4, 2, 2)])


# restoration


def test_restoration_is_the_sum_over_sites_of_one_minus_the_mean_cosine():
    sites = sites_of_layers([0, 1], 2)
    assert sites == ("blocks.0.hook_resid_post", "ln_final.hook_out")
    term = HiddenStates(5.0, "original", sites=sites)
    mine, theirs = ([states(2, 6, 8, seed=seed + 10 * which) for seed in (0, 1)] for which in (0, 1))
    by_hand = 0.0
    for a, b in zip(mine, theirs, strict=True):
        by_hand += 1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
    assert term.values(mine, theirs).mean() == pytest.approx(by_hand.item(), abs=1e-12)


def test_sites_are_chosen_by_hand_by_drift_evenly_or_last():
    paper = ["blocks.0", "blocks.8", "blocks.11", "blocks.13", "blocks.14"]
    expected = (*(f"{block}.hook_resid_post" for block in paper), "ln_final.hook_out")
    assert sites_of_layers([31, 0, 8, 11, 13, 14], 32) == expected
    drift = [0.0] * 32
    for rank, layer in enumerate((14, 0, 8, 13, 11)):
        drift[layer] = 1.0 - rank / 10
    assert sites_by_drift(drift, 6) == expected
    assert sites_by_drift([3.0, 1.0, 2.0, 9.0], 2) == ("blocks.0.hook_resid_post", "ln_final.hook_out")
    assert sites_by_drift([3.0, 1.0], 1) == last_site() == ("ln_final.hook_out",)
    assert sites_evenly(6, 3) == ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post", "ln_final.hook_out")
    assert len(sites_evenly(32, 6)) == 6
    assert sites_evenly(4, 4) == sites_of_layers(range(4), 4)
    for wrong in (lambda: sites_evenly(4, 5), lambda: sites_by_drift([1.0], 0), lambda: sites_of_layers([4], 4)):
        with pytest.raises(InputError, match=r"of 4, but 5|of 1, but 0|layers 0 to 3"):
            wrong()


# states of another width


def test_a_planted_map_between_states_is_found():
    student = load_model(zoo.llama().double())
    site = "blocks.0.hook_resid_post"
    planted, batch = states(24, 32, seed=5), DATA.batch(8, 36, seed=0)

    class Mapped:
        """A teacher whose states are the student's under the planted map."""

        measuring = student.measuring

        def run_with_cache(self, batch, names_filter):
            output, cache = student.run_with_cache(batch, names_filter=names_filter)
            return output, {name: state @ planted.T for name, state in cache.items()}

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/maps.safetensors"
        found = fit_projections(student, Mapped(), [batch], [site], file, ridge=1e-13)[site]
        torch.testing.assert_close(found, planted, rtol=0, atol=1e-6)
        mine = student.run_with_cache(batch)[1][site]
        for distance in ("cosine", "mse"):
            term = ProjectedStates(sites=(site,), projections=file, distance=distance)
            assert term.values([mine], [mine @ planted.T]).abs().max() < 1e-9


def test_a_student_is_held_to_states_of_another_width(tmp_path):
    wide = zoo.hf.LlamaConfig(**{**zoo.SIZES, "hidden_size": 48})
    student, teacher = load_model(zoo.llama()), load_model(zoo.model(wide))
    file = str(tmp_path / "maps.safetensors")
    sites = ("blocks.0.hook_resid_post", "ln_final.hook_out")
    before = {name: weight.clone() for name, weight in student.original_model.state_dict().items()}
    maps = fit_projections(student, teacher, [DATA.batch(8, 36, seed=9)], sites, file)
    assert all(torch.equal(weight, before[name]) for name, weight in student.original_model.state_dict().items())
    term = ProjectedStates(sites=sites, projections=file)
    term.check(student, teacher)
    assert maps[sites[0]].shape == (48, 32)
    phase = Phase("wide", DATA, 36, 30, 288, 1e-2, warmup=1, terms=(term,))
    history, _ = train_phase(student, phase, seed=0, teacher=teacher)
    assert history[-1]["projected_hidden"] < 0.95 * history[0]["projected_hidden"]
    with pytest.raises(InputError, match=r"must be \[32, 32\], the widths .* but it is \[48, 32\]"):
        term.check(student, student)
    with pytest.raises(InputError, match=r"has no map for 'blocks.1.hook_resid_post'"):
        dataclasses.replace(term, sites=("blocks.1.hook_resid_post",)).check(student, teacher)
    with pytest.raises(InputError, match="cannot read projections"):
        dataclasses.replace(term, projections=str(tmp_path / "none")).check(student, teacher)
    with pytest.raises(InputError, match="needs projections"):
        ProjectedStates()
    with pytest.raises(InputError, match="distance is 'l1'"):
        ProjectedStates(projections=file, distance="l1")


# RoPE-perturbed self-distillation


def perturbed(terms, **changes):
    stream = Stream(DATA, 36, positions="rope_perturbed", teacher_positions="continuous", terms=terms)
    return Phase("self", steps=2, batch_tokens=144, lr=1e-3, warmup=1, streams=(stream,), **changes)


def test_perturbed_positions_are_the_shift_of_the_tracer():
    model = load_model(zoo.llama().double())
    window = pack([zoo.tokens(1, 36)[0]], 36, positions="rope_perturbed", seed=1)
    positions = window.position_ids[0].tolist()
    first = next(i for i in range(36) if positions[i] != i)
    shift = PositionShift("qk", positions[first] - first, positions=range(first, 36))
    assert 0 < first < 35
    plain = dataclasses.replace(window, position_ids=torch.arange(36).unsqueeze(0))
    with torch.no_grad():
        shifted = model.run_with_hooks(plain, fwd_hooks=shift.hooks(model, plain))
        assert (shifted - model(plain)).abs().max() > 1e-3
        torch.testing.assert_close(model(window), shifted, rtol=0, atol=1e-10)


def test_self_distillation_is_the_mean_over_moved_positions_with_the_standard_pass_held_still():
    """KL(perturbed || stop-gradient of standard), and its gradient, against a pass with the tracer's hooks."""
    model = load_model(zoo.llama().double())
    phase = perturbed((SelfDistillation(),), accumulate=2)
    read = phase.batches(0, 0)[0]
    training = Training(model, dataclasses.replace(phase, clip_norm=1e9), seed=0)
    assert training.teachers["itself"] is model

    total, count = torch.zeros((), dtype=torch.float64), 0
    for tokens, positions in zip(read.tokens, read.position_ids, strict=True):
        moved = positions != torch.arange(36)
        first, y = int(moved.int().argmax()), int(positions[-1]) - 35
        plain = model.as_window(tokens)
        with torch.no_grad():
            p = model(plain)[0].log_softmax(-1)
        shift = PositionShift("qk", y, positions=range(first, 36))
        q = model.run_with_hooks(plain, fwd_hooks=shift.hooks(model, plain))[0].log_softmax(-1)
        nats = (q.exp() * (q - p)).sum(-1)
        assert first == 0 or nats[:first].abs().max() < 1e-12
        total, count = total + nats[first:].sum(), count + 36 - first
    expected = total / count
    queries = [layer.self_attn.q_proj.weight for layer in model.original_model.model.layers]
    gradients = torch.autograd.grad(expected, queries)
    norm = sum(gradient.square().sum() for gradient in gradients) ** 0.5
    record = training.advance(measure=True)
    assert record["self_kd_nats"] == pytest.approx(expected.item(), rel=1e-10)
    assert record["loss"] == pytest.approx(expected.item(), rel=1e-10)
    assert record["grad_norm_q"] == pytest.approx(norm.item(), rel=1e-8)


def test_self_distillation_runs_beside_cross_entropy_from_a_configuration(tmp_path):
    student = tmp_path / "student"
    zoo.model(zoo.CONFIGS["llama"](), seed=3).save_pretrained(student)
    data = {"kind": "key_value", "document_length": 36, "distinct": [1, 4], "keys": 20, "values": 20}
    streams = [
        {"name": "standard", "data": data, "window": 36, "terms": [{"kind": "cross_entropy"}]},
        {"name": "perturbed", "data": data, "window": 36, "positions": "rope_perturbed",
         "teacher_positions": "continuous", "terms": [{"kind": "self_kd"}]},
    ]  # fmt: skip
    phase = {"name": "both", "steps": 2, "batch_tokens": 288, "lr": 1e-3, "streams": streams}
    run = distill({"student": str(student), "out": str(tmp_path / "run"), "log_every": 1, "phases": [phase]})
    metrics = set(read_run(run)[0]["losses"]["metric"])
    assert {"standard/ce_nats", "perturbed/self_kd_nats", "perturbed/kd_nats"} <= metrics
    assert "standard/kd_nats" not in metrics
    with pytest.raises(InputError, match="no teacher can be called 'itself'"):
        read_config({"student": "x", "out": "y", "teachers": {"itself": "z"}, "phases": [phase]})
    with pytest.raises(InputError, match="both read rope_perturbed ones; give teacher_positions"):
        dataclasses.replace(perturbed((SelfDistillation(),)).streams[0], teacher_positions=None)


# attention under skipped positions


def by_hand(model, tokens, positions):
    """Logits [T, V] of a Llama in float64: every position attends to all before it, rotated by its own position."""
    config, decoder = model.config, model.model

    def norm(x, layer_norm):
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * layer_norm.weight

    theta, width, length = config.rope_parameters["rope_theta"], config.head_dim, len(tokens)
    inv_freq = (1 / theta ** (torch.arange(0, width, 2).float() / width)).double()  # float32, as models store them
    angles = torch.outer(positions.double(), inv_freq).unsqueeze(1)  # [T, 1, P]

    def rotate(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    x = decoder.embed_tokens.weight[tokens]
    for layer in decoder.layers:
        a, read = layer.self_attn, norm(x, layer.input_layernorm)
        q, k, v = (
            (read @ projection.weight.T).view(length, -1, width) for projection in (a.q_proj, a.k_proj, a.v_proj)
        )
        q, k = rotate(q), rotate(k)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / width**0.5
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        pattern = scores.masked_fill(~causal, float("-inf")).softmax(-1)
        x = x + torch.einsum("hij,jhd->ihd", pattern, v).flatten(1) @ a.o_proj.weight.T
        read, m = norm(x, layer.post_attention_layernorm), layer.mlp
        x = x + (F.silu(read @ m.gate_proj.weight.T) * (read @ m.up_proj.weight.T)) @ m.down_proj.weight.T
    return norm(x, decoder.norm) @ model.lm_head.weight.T


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_attention_under_skipped_positions_is_causal_and_transformers_finds_no_documents(scheme, kernel, monkeypatch):
    plain = zoo.llama().double()
    window = pack([zoo.tokens(1, 10)[0], zoo.tokens(1, 26, seed=1)[0]], 36, positions=scheme, target_window=144, seed=2)
    assert (window.position_ids.diff() > 1).any()
    with torch.no_grad():
        expected = by_hand(plain, window.tokens[0], window.position_ids[0])
    with torch.no_grad(), promote_float32():
        # transformers alone, without a mask or a cache, takes every jump for the end of a document
        detected = plain(input_ids=window.tokens, position_ids=window.position_ids, use_cache=False).logits[0]
    assert (detected - expected).abs().max() > 1e-3

    logits = {}
    for what in ("as it is", "one document", "a document for each token"):
        with monkeypatch.context() as patched, torch.no_grad():
            if what != "as it is":
                found = torch.arange(36).unsqueeze(0) * (what != "one document")
                patched.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda ids, f=found: f)
                with promote_float32():
                    alone = plain(input_ids=window.tokens, position_ids=window.position_ids, use_cache=False).logits[0]
                if what == "one document":
                    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-10)
                else:
                    assert (alone - detected).abs().max() > 1e-3
            model = load_model(plain, attn=kernel)
            logits[what] = model(window)[0]
            model.release()
    torch.testing.assert_close(logits["as it is"], expected, rtol=0, atol=1e-10)
    assert all(torch.equal(one, logits["as it is"]) for one in logits.values())  # what it finds reaches no layer


# the published mix


def llama3():
    (phase,) = read_config(EXAMPLES / "longred_llama3_8b.toml").phases
    return phase


@pytest.mark.parametrize("accumulate", [1, 2, 4, 8, 16])
def test_the_published_mix_is_4_to_3_to_1_in_tokens_in_any_parts(accumulate):
    phase = dataclasses.replace(llama3(), accumulate=accumulate)
    tokens = [count * stream.window for count, stream in zip(phase.windows, phase.mix, strict=True)]
    assert phase.windows == (8 * 4, 6 * 128, 2 * 16)
    assert tokens == [4 * 262_144, 3 * 262_144, 262_144]
    assert phase.step_tokens == 16 * 131_072
    assert [factor * stream.terms[0].weight for factor, stream in zip(phase.factors, phase.mix, strict=True)] == [
        0.5, 1.875, 1.25,
    ]  # fmt: skip
    for_parts = phase.windows_of_a_part(1)
    assert [accumulate * count for count in for_parts] == [*phase.windows]
    (restoration,) = phase.mix[1].terms
    assert restoration.sites == sites_of_layers([0, 8, 11, 13, 14, 31], 32)


def small_mix(accumulate, target="hidden"):
    """The published mix, with windows of 144, 18 and 36 tokens."""
    held = HiddenStates(10.0, "original") if target == "hidden" else Divergence(10.0, "original")
    sites = ("blocks.0.hook_resid_post", "ln_final.hook_out")
    short = KeyValueStream(18, distinct=(1, 4), keys=20, values=20)
    streams = (
        Stream(DATA, 144, 8, name="long", terms=(CrossEntropy(),)),
        Stream(short, 18, 6, name="short", terms=(HiddenStates(5.0, "original", sites=sites),)),
        Stream(DATA, 36, 2, name="short_to_long", positions="longred_cream", target_window=144,
               teacher_positions="continuous", terms=(held,)),
    )  # fmt: skip
    return Phase("mixed", steps=2, batch_tokens=16 * 144, lr=1e-3, warmup=1, accumulate=accumulate, streams=streams)


@pytest.mark.parametrize("target", ["hidden", "kd"])
def test_the_weights_of_the_loss_are_the_published_ones_whatever_the_parts_and_every_term_is_logged(target):
    records = {}
    for accumulate in (1, 2, 4):
        student = load_model(zoo.model(zoo.CONFIGS["llama"](), seed=0, scale=0.05).double())
        original = load_model(zoo.model(zoo.CONFIGS["llama"](), seed=1, scale=0.05).double())
        phase = small_mix(accumulate, target)
        training = Training(student, phase, seed=0, teachers={"original": original})
        records[accumulate] = [training.advance() for _ in range(2)]
    metric = "hidden" if target == "hidden" else "kd_nats"
    for record in records[1]:
        terms = [record[name] for name in ("long/ce_nats", "short/hidden", f"short_to_long/{metric}")]
        assert record.keys() == {"step", "tokens", "loss", "long/ce_nats", "short/hidden", f"short_to_long/{metric}"}
        expected = sum(weight * term for weight, term in zip((0.5, 1.875, 1.25), terms, strict=True))
        assert record["loss"] == pytest.approx(expected, rel=1e-12)
    for accumulate in (2, 4):
        for ours, theirs in zip(records[accumulate], records[1], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)


def test_the_toy_runs_and_its_original_is_nowhere_but_in_the_terms(tmp_path):
    """Three steps of each phase: every term is logged, the original is the phase before's, unchanged and not saved."""
    config = tomllib.loads((EXAMPLES / "longred_toy.toml").read_text())
    short, extended = config["phases"]
    for reading in (short, *extended["streams"]):
        reading["data"]["files"] = [str(EXAMPLES.parent / "README.md")]  # less text, so less time
    short |= {"steps": 3, "batch_tokens": 1024}
    extended |= {"steps": 3, "batch_tokens": 2048}
    run = distill({**config, "out": str(tmp_path / "run"), "log_every": 1, "device": "cpu"})
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["phase"] == "extended" and "loss" in line]
    assert len(steps) == 3
    for told in steps:
        expected = 0.5 * told["long/ce_nats"] + 1.875 * told["short/hidden"] + 1.25 * told["short_to_long/hidden"]
        assert told["loss"] == pytest.approx(expected, rel=1e-5)
    assert steps[0]["short/hidden"] > 0  # theta was swapped
    metrics = set(read_run(run)[0]["losses"]["metric"])
    assert {"long/ce_nats", "short/hidden", "short_to_long/hidden"} <= metrics
    before, after = (load_file(run / "checkpoints" / name / "model.safetensors") for name in ("short", "extended"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_original_is_in_no_optimizer_and_bit_for_bit_what_it_was():
    training = Training(load_model(zoo.model(zoo.CONFIGS["llama"](), seed=0)), small_mix(1), seed=0)
    original = training.teachers["original"].original_model
    start = {name: weight.clone() for name, weight in original.state_dict().items()}
    for _ in range(2):
        training.advance()
    assert all(torch.equal(weight, start[name]) for name, weight in original.state_dict().items())
    assert any(not torch.equal(weight, start[name]) for name, weight in training.weights().items())
    frozen = {id(parameter) for parameter in original.parameters()}
    groups = [group for optimizer in training._optimizers for group in optimizer.param_groups]
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in training.model.original_model.parameters()}
    assert not trained & frozen
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in original.parameters())
