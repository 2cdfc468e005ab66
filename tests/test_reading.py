"""A text read once and asked about at any place says what whole passes say."""

import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig

from rope_probe import AttentionTemperature, InputError, PositionJitter, PositionShift, load_model
from rope_probe.models import checkpoints
from rope_probe.retrieval import haystacks
from rope_probe.retrieval.reading import Reading
from rope_probe.windows.packing import pack
from tests import zoo

ROPES = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.0,
    },
]
SHARPER = [
    (),
    (AttentionTemperature(1.7),),
    (AttentionTemperature("log_n", reference=12),),
    (AttentionTemperature(1.3, side="qk"), PositionShift("k", 3.0, heads=1)),
]


def whole(model, tokens, perturbations):
    """Final states of one plain pass over all tokens."""
    window = pack([tokens.tolist()], len(tokens))
    hooks = [hook for perturbation in perturbations for hook in perturbation.hooks(model, window)]
    with torch.no_grad(), model.measuring(), model.hooks(fwd_hooks=hooks):
        return model.hidden(window)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("perturbations", SHARPER, ids=["plain", "factor", "log_n", "both sides and a shift"])
def test_continuations_equal_whole_passes(rope, perturbations):
    plain = checkpoints.with_rope(zoo.llama(), rope)
    model = load_model(plain, dtype=torch.float64)
    text, question = zoo.tokens(2, 40)[0], zoo.tokens(2, 9, seed=1)[0]
    reading = Reading(model, perturbations)
    pieces = [reading.read(piece) for piece in text.split([7, 20, 13])]
    assert len(reading) == 40
    expected = whole(model, text, perturbations)
    assert torch.allclose(torch.cat(pieces, 1), expected, rtol=0, atol=1e-12)
    for at in (40, 23, 5):
        asked = reading.ask(question, at)
        expected = whole(model, torch.cat([text[:at], question]), perturbations)[:, at:]
        assert torch.allclose(asked, expected, rtol=0, atol=1e-12)
    assert len(reading) == 40  # asking keeps nothing


@pytest.mark.parametrize("name", ["mistral_sliding", "qwen3", "gemma2", "gpt_neox", "smollm3_nope_layer", "cohere"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_every_kind_of_attention_reads_on(name, attn):
    model = load_model(zoo.model(zoo.CONFIGS[name]()), attn=attn, dtype=torch.float64)
    text = zoo.tokens(2, 30)[0]
    reading = Reading(model)
    reading.read(text[:17])
    assert torch.allclose(reading.ask(text[17:]), whole(model, text, ())[:, 17:], rtol=0, atol=1e-11)


def test_a_temperature_by_position_counts_from_the_beginning_of_the_text():
    model = load_model(zoo.llama(), dtype=torch.float64)
    text, question = zoo.tokens(2, 30)[0], zoo.tokens(2, 6, seed=1)[0]
    perturbation = AttentionTemperature("log_n", reference=8)
    reading = Reading(model, [perturbation])
    reading.read(text)
    plain = Reading(model)
    plain.read(text)
    assert (reading.ask(question) - plain.ask(question)).abs().max() > 1e-3
    # Keys and values of plain reading with the question alone sharper are another thing: the text's states differ too.
    assert (reading.ask(question) - plain.branch(perturbations=[perturbation]).ask(question)).abs().max() > 1e-3


def test_a_branch_goes_on_by_itself_under_its_own_perturbations():
    model = load_model(zoo.llama(), dtype=torch.float64)
    text, more, question = zoo.tokens(2, 20)[0], zoo.tokens(2, 8, seed=1)[0], zoo.tokens(2, 5, seed=2)[0]
    log_n = AttentionTemperature("log_n", reference=20)  # does nothing to the first 20 positions
    trunk = Reading(model)
    trunk.read(text)
    branch = trunk.branch(20, [log_n])
    branch.read(more)
    assert (len(trunk), len(branch)) == (20, 28)
    sharper, plain = (whole(model, torch.cat([text, more, question]), p)[:, 28:] for p in ([log_n], ()))
    assert torch.allclose(branch.ask(question), sharper, rtol=0, atol=1e-12)
    trunk.read(more)
    assert torch.allclose(trunk.ask(question), plain, rtol=0, atol=1e-12)
    assert (sharper - plain).abs().max() > 1e-4


def test_hooks_see_new_positions_after_perturbations_and_keys_are_those_of_a_whole_pass():
    model = load_model(zoo.llama(), dtype=torch.float64)
    text = zoo.tokens(2, 24)[0]
    seen, expected = [], []
    name = "blocks.1.attn.hook_rot_k"
    reading = Reading(model, [AttentionTemperature(2.0, side="qk")])
    for piece in text.split(10):
        reading.read(piece, reads=[(name, lambda x, hook: seen.append(x))])
    window = pack([text.tolist()], 24)
    hooks = [*AttentionTemperature(2.0, side="qk").hooks(model, window), (name, lambda x, hook: expected.append(x))]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model.hidden(window)
    assert torch.allclose(torch.cat(seen, 1), expected[0], rtol=0, atol=1e-12)
    assert torch.allclose(reading.keys(1), expected[0][0], rtol=0, atol=1e-12)
    assert reading.keys(1, 9).shape[0] == 9


def test_what_cannot_be_read_in_pieces_is_refused():
    model = load_model(zoo.llama())
    for perturbation in (PositionJitter("q", 2.0), AttentionTemperature(2.0, positions=[3])):
        with pytest.raises(InputError, match="in pieces"):
            Reading(model, [perturbation])
    reading = Reading(model)
    with pytest.raises(InputError, match=r"at must be in 1\.\.0"):
        reading.ask(torch.tensor([1]))
    reading.read(torch.tensor([1, 2, 3]))
    with pytest.raises(InputError, match=r"at must be in 1\.\.3, .* but it is 4"):
        reading.ask(torch.tensor([1]), 4)
    with pytest.raises(InputError, match="one or more"):
        reading.read(torch.tensor([], dtype=torch.long))
    with pytest.raises(InputError, match=r"layers 0\.\.1"):
        model.hidden_after({0: reading._kept[0]}, torch.tensor([1]))


# Haystacks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_bytes():
    """A model of bytes: lines are long in its tokens, so windows are too."""
    config = LlamaConfig(**{**zoo.SIZES, "vocab_size": 384, "max_position_embeddings": 4096})
    model = load_model(zoo.model(config), dtype=torch.float64)
    model.tokenizer = ByT5Tokenizer()
    return model


@pytest.mark.parametrize("kind", haystacks.KINDS)
def test_needles_stand_where_they_say(of_bytes, kind):
    stack = haystacks.haystack(kind, of_bytes.tokenizer, 6000, seed=2, every=700)
    text = of_bytes.tokenizer.decode(stack.tokens)
    assert 5000 < len(stack.tokens) <= 6000
    assert len({needle.key for needle in stack.needles}) == len(stack.needles) >= 5
    for needle in stack.needles:
        said = of_bytes.tokenizer.decode(stack.tokens[needle.place : needle.end])
        assert said.lstrip().startswith(needle.value)
        assert f"of {needle.key}" in text
    assert not stack.is_text[[needle.place for needle in stack.needles]].any()
    if kind == "passkey":
        assert stack.is_text.double().mean() > 0.7


@pytest.mark.parametrize("kind", haystacks.KINDS)
def test_questions_fit_their_window_and_know_their_distance(of_bytes, kind):
    stack = haystacks.haystack(kind, of_bytes.tokenizer, 6000, every=700)
    for window in (2500, 6000):
        at = stack.cut(window)
        questions = stack.questions(at, 4)
        assert len(questions) == min(4, questions[0].keys)
        distances = [question.distance for question in questions]
        assert distances == sorted(distances, reverse=True)
        assert distances[0] > 0.5 * window
        for question in questions:
            whole_text = torch.cat([stack.tokens[:at], question.prompt, question.answer])
            assert len(whole_text) <= window
            assert question.needle.end <= at
            assert whole_text[-len(question.answer) - question.distance :][:1] == stack.tokens[question.needle.place]
            assert of_bytes.tokenizer.decode(question.answer).strip() == question.needle.value


def test_haystacks_are_pure_functions_of_the_seed_and_longer_ones_begin_alike(of_bytes):
    for kind in haystacks.KINDS:
        short, long, other = (
            haystacks.haystack(kind, of_bytes.tokenizer, length, seed=seed)
            for length, seed in ((3000, 1), (5000, 1), (3000, 2))
        )
        assert torch.equal(long.tokens[: len(short.tokens)], short.tokens)
        assert not torch.equal(short.tokens[:500], other.tokens[:500])


@pytest.mark.parametrize("kind", haystacks.KINDS)
def test_answers_are_scored_as_by_a_pass_over_the_whole_window(of_bytes, kind):
    stack = haystacks.haystack(kind, of_bytes.tokenizer, 2400, every=500)
    reading = Reading(of_bytes, [AttentionTemperature(1.5)])
    reading.read(stack.tokens)
    for question in stack.questions(stack.cut(2000), 3):
        hit, logprob = haystacks.answered(reading, question)
        tokens = torch.cat([stack.tokens[: question.at], question.prompt, question.answer])
        states = whole(of_bytes, tokens, [AttentionTemperature(1.5)])
        logits = of_bytes.unembed(states[:, -1 - len(question.answer) : -1])[0]
        expected = logits.log_softmax(-1).gather(1, question.answer.unsqueeze(1)).mean().item()
        assert logprob == pytest.approx(expected, abs=1e-5)
        assert hit == torch.equal(logits.argmax(-1), question.answer)


def test_a_model_that_copies_the_needle_is_right():
    """Planted: a head that knows nothing but the answer makes it the most likely, and `answered` says so."""
    stack = haystacks.haystack("passkey", ByT5Tokenizer(), 2400, every=500)
    question = stack.questions(stack.cut(2000), 1)[0]
    model = load_model(zoo.model(LlamaConfig(**{**zoo.SIZES, "vocab_size": 384, "max_position_embeddings": 4096})))
    model.tokenizer = ByT5Tokenizer()
    reading = Reading(model)
    reading.read(stack.tokens)
    told = torch.full((1, len(question.answer), 384), -20.0)
    told[0, torch.arange(len(question.answer)), question.answer] = 20.0
    unembed = model.unembed
    try:
        model.unembed = lambda states: told
        assert haystacks.answered(reading, question) == (True, pytest.approx(0.0, abs=1e-6))
        told[0, 1] = told[0, 1].roll(1)
        hit, logprob = haystacks.answered(reading, question)
        assert not hit
        assert logprob == pytest.approx(-40 / len(question.answer), rel=1e-3)
    finally:
        model.unembed = unembed


def test_what_does_not_fit_is_refused(of_bytes):
    tokenizer = of_bytes.tokenizer
    with pytest.raises(InputError, match="kind must be one of passkey, niah_multikey_2, but it is 'vt'"):
        haystacks.haystack("vt", tokenizer, 2000)
    with pytest.raises(InputError, match="hold a needle"):
        haystacks.haystack("passkey", tokenizer, 120)
    stack = haystacks.haystack("passkey", tokenizer, 3000, every=500)
    with pytest.raises(InputError, match="at most"):
        stack.cut(4000)
    with pytest.raises(InputError, match="at least"):
        stack.cut(300)
    with pytest.raises(InputError, match="must be a cut"):
        stack.questions(stack.cuts[3] + 1, 2)
