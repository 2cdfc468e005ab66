import dataclasses

import pytest
import torch

from rope_probe import InputError, KeyValueStream, load_model
from rope_probe.distillation import (
    CrossEntropy,
    Divergence,
    Gate,
    GateError,
    Head,
    HiddenStates,
    Phase,
    Training,
    train_phase,
)
from rope_probe.distillation.student import by_distance
from rope_probe.distillation.terms import loss_in_chunks
from tests import zoo

STREAM = KeyValueStream(16, distinct=(1, 4), keys=20, values=20)
CE, KD = (CrossEntropy(),), (Divergence(),)
PHASE = Phase(
    "tiny", STREAM, window=32, steps=30, batch_tokens=256, lr=3e-3, matrix_lr=0.01, theta=1e4, terms=CE,
    schedule="constant", warmup=5,
)  # fmt: skip


def fresh():
    return load_model(zoo.model(zoo.CONFIGS["llama"](), scale=0.05))


@pytest.mark.parametrize("matrix_lr", [0.01, None])
def test_training_lowers_the_loss_and_moves_every_weight(matrix_lr):
    model = fresh()
    before = {name: p.clone() for name, p in model.original_model.named_parameters()}
    heard = []
    phase = dataclasses.replace(PHASE, matrix_lr=matrix_lr, weight_decay=0.0)
    history, gate = train_phase(model, phase, seed=0, on_step=heard.append)
    losses = [numbers["ce_nats"] for numbers in history]
    assert sum(losses[-5:]) < sum(losses[:5]) - 1.0
    assert heard == history
    assert [numbers["tokens"] for numbers in history] == [256 * (i + 1) for i in range(30)]
    assert gate.empty
    assert all(not torch.equal(p, before[name]) for name, p in model.original_model.named_parameters())
    assert not model.original_model.training


def test_the_first_loss_is_the_cross_entropy_of_the_model_as_it_was():
    model = fresh()
    tokens = STREAM.batch(8, 32, seed=4, index=0).tokens
    expected = model.original_model(tokens, labels=tokens).loss.item()
    history, _ = train_phase(model, dataclasses.replace(PHASE, steps=1), seed=4)
    assert history[0]["ce_nats"] == pytest.approx(expected, rel=1e-5)


def test_training_is_a_pure_function_of_the_seed():
    weights = []
    for seed in (0, 0, 1):
        model = fresh()
        train_phase(model, dataclasses.replace(PHASE, steps=3), seed=seed)
        weights.append(model.original_model.lm_head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("teacher_masked", [False, True])
def test_distilling_brings_the_student_to_the_teacher_and_leaves_the_teacher(teacher_masked):
    student, teacher = fresh(), load_model(zoo.llama(vocab_size=70))
    before = {name: p.clone() for name, p in teacher.original_model.named_parameters()}
    phase = dataclasses.replace(PHASE, steps=100, terms=KD, chunk=100, teacher_masked=teacher_masked)
    history, _ = train_phase(student, phase, seed=0, teacher=teacher)
    assert history[-1]["kd_nats"] < 0.8 * history[0]["kd_nats"]
    assert "ce_nats" not in history[0]
    for name, parameter in teacher.original_model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_the_loss_is_the_divergence_from_the_teacher_as_it_reads_the_window():
    student, teacher = fresh(), load_model(zoo.llama())
    tokens = PHASE.batch(4, 0).tokens
    with torch.no_grad():
        q = student(tokens).log_softmax(-1)
        whole = teacher(tokens).log_softmax(-1)
        documents = teacher(tokens.reshape(-1, 16)).reshape(8, 32, -1).log_softmax(-1)
    for masked, p in ((False, whole), (True, documents)):
        phase = dataclasses.replace(PHASE, steps=1, terms=(CrossEntropy(0.5), Divergence(2.0)), teacher_masked=masked)
        history, _ = train_phase(fresh(), phase, seed=4, teacher=teacher)
        kd = (p.exp() * (p - q)).sum(-1).mean().item()
        ce = torch.nn.functional.nll_loss(q[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
        assert history[0]["kd_nats"] == pytest.approx(kd, rel=1e-4)
        assert history[0]["ce_nats"] == pytest.approx(ce, rel=1e-4)
        assert history[0]["loss"] == pytest.approx(0.5 * ce + 2 * kd, rel=1e-4)


def test_autocast_trains_float32_weights_and_other_weights_are_refused():
    model = fresh()
    history, _ = train_phase(model, PHASE, seed=0, autocast=True)
    assert history[-1]["ce_nats"] < history[0]["ce_nats"] - 0.3
    assert model.dtype == torch.float32
    with pytest.raises(InputError, match="bfloat16; use autocast"):
        train_phase(load_model(zoo.llama().to(torch.bfloat16)), PHASE, seed=0)


def test_tied_embeddings_get_both_gradients():
    tokens = PHASE.batch(0, 0).tokens
    grads = []
    for chunk in (7, 10_000):
        torch.manual_seed(0)
        plain = zoo.llama(tie_word_embeddings=True)
        model = load_model(plain)
        targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100).flatten()
        head = Head(plain.get_output_embeddings())
        loss, _ = loss_in_chunks(CE, model.hidden(tokens).flatten(0, 1), head, targets, chunk=chunk)
        loss.backward()
        grads.append(plain.model.embed_tokens.weight.grad.clone())
        plain.zero_grad()
    plain(tokens, labels=tokens).loss.backward()
    for grad in grads:
        torch.testing.assert_close(grad, plain.model.embed_tokens.weight.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_hidden_states_alone_bring_a_student_to_its_teacher(kind):
    student, teacher = fresh(), load_model(zoo.llama())
    match = HiddenStates(2.0, distance=kind, sites=("blocks.0.hook_resid_post", "ln_final.hook_out"))
    phase = dataclasses.replace(PHASE, steps=60, matrix_lr=None, terms=(match,))
    tokens = phase.batch(0, 0)
    apart = match.values(*(of_sites(model, tokens, match.sites) for model in (student, teacher))).mean().item()
    history, _ = train_phase(student, phase, seed=0, teacher=teacher)
    assert history[0]["hidden"] == pytest.approx(apart, rel=1e-5)
    assert history[0]["loss"] == pytest.approx(2 * apart, rel=1e-5)
    assert history[-1]["hidden"] < 0.85 * apart
    with pytest.raises(InputError, match="distils, so it needs a teacher"):
        train_phase(student, phase, seed=0)


def test_only_what_a_hidden_state_depends_on_is_trained():
    student, teacher = fresh(), load_model(zoo.llama())
    match = HiddenStates(sites=("blocks.0.hook_resid_post",))
    phase = dataclasses.replace(PHASE, steps=2, matrix_lr=None, terms=(match,))
    training = Training(student, phase, seed=0, teachers={"teacher": teacher})
    before = student.original_model.model.layers[1].mlp.up_proj.weight.clone()
    assert training.advance(measure=True)["grad_norm_q"] > 0
    assert torch.equal(student.original_model.model.layers[1].mlp.up_proj.weight, before)


def of_sites(model, tokens, sites):
    cache = model.run_with_cache(tokens.tokens, names_filter=list(sites))[1]
    return [cache[site] for site in sites]


def test_parts_of_a_step_give_the_step():
    told = []
    for accumulate in (1, 4):
        student, teacher = fresh(), load_model(zoo.llama())
        phase = dataclasses.replace(
            PHASE, matrix_lr=None, steps=4, accumulate=accumulate, terms=(CrossEntropy(0.3), Divergence(0.7))
        )
        history, _ = train_phase(student, phase, seed=0, teacher=teacher)
        told.append((history, list(student.original_model.parameters())))
    for ours, theirs in zip(told[0][0], told[1][0], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    for ours, theirs in zip(told[0][1], told[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_masked_documents_are_learnt_as_if_alone():
    alone = dataclasses.replace(PHASE, window=16, matrix_lr=None, steps=5)
    masked = dataclasses.replace(PHASE, masked=True, matrix_lr=None, steps=5)
    histories = [train_phase(fresh(), phase, seed=3)[0] for phase in (alone, masked)]
    for ours, theirs in zip(*histories, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_divergence_is_told_by_how_long_ago_its_token_occurred():
    tokens = torch.tensor([[5, 6, 5, 5, 7, 6], [1, 1, 2, 3, 4, 2]])
    values = torch.arange(12.0)
    totals, counts = by_distance(values, tokens)
    distances = {0: [0, 1, 4, 6, 8, 9, 10], 1: [3, 7], 2: [2], 4: [5, 11]}  # of each position; 3 goes with 4
    assert counts.tolist() == [7, 2, 1, 2, 0]
    assert totals.tolist() == [sum(distances[0]), 10, 2, 16, 0]


def test_distilling_needs_a_teacher():
    with pytest.raises(InputError, match="teacher"):
        train_phase(fresh(), dataclasses.replace(PHASE, terms=KD), seed=0)


def test_a_gate_that_passes_ends_the_phase():
    phase = dataclasses.replace(PHASE, gate=Gate(16, (2, 8), accuracy=0.0, every=4, trials=8))
    history, gate = train_phase(fresh(), phase, seed=0)
    assert len(history) == 4
    assert gate["distance"].tolist() == [2, 8]


@pytest.mark.parametrize("every", [4, 100])
def test_a_gate_that_is_missed_fails_loudly(every):
    phase = dataclasses.replace(PHASE, steps=8, gate=Gate(16, (2, 8), accuracy=1.0, every=every, trials=8))
    with pytest.raises(GateError, match=r"phase 'tiny' with seed 5 missed its gate, accuracy 1.0 .* 8 steps of 256"):
        train_phase(fresh(), phase, seed=5)


def test_schedules_rise_then_stay_or_fall_to_a_tenth():
    constant = [PHASE.learning_rate_factor(step) for step in (0, 4, 29)]
    assert constant == [0.2, 1.0, 1.0]
    cosine = dataclasses.replace(PHASE, schedule="cosine")
    assert cosine.learning_rate_factor(15) == pytest.approx(0.55)
    assert cosine.learning_rate_factor(30) == pytest.approx(0.1)


def test_a_model_with_another_theta_is_refused():
    with pytest.raises(InputError, match="wants theta 300, but the model's is 10000"):
        train_phase(fresh(), dataclasses.replace(PHASE, theta=300.0), seed=0)


def test_a_batch_that_holds_no_whole_windows_is_refused():
    with pytest.raises(InputError, match="multiple of the window, 32, but it is 100"):
        dataclasses.replace(PHASE, batch_tokens=100)
