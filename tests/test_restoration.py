"""Multiple choice made of text, and what is said of a real model's drift and restoration, on planted rows."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import ByT5Tokenizer, LlamaConfig

from experiments import cloze, restoration
from experiments import restoration_verdicts as said
from experiments.stages import Options
from rope_probe import InputError, load_model
from rope_probe.models import checkpoints
from rope_probe.models.pretrained import is_available
from rope_probe.spans.drift import ATTENTION_KL, COSINE_DISTANCE
from rope_probe.windows.corpora import TextCorpus
from rope_probe.windows.embedded_text import documents

TEXTS = [text for text in documents() if len(text) > 6000]


@pytest.fixture(scope="module")
def asked():
    return cloze.questions(TEXTS, 60, seed=3)


def spoken(text):
    """Words with single spaces between, and the place in `text` of every character that is kept."""
    return " ".join(text.split())


def test_the_truth_is_what_the_text_says_next(asked):
    for question in asked:
        text = TEXTS[question.document]
        truth = question.choices[question.truth]
        assert f"{question.context} {truth}" in spoken(text)
        assert spoken(text[question.places[question.truth] :]).startswith(truth)


def test_distractors_are_said_elsewhere_in_the_same_document(asked):
    for question in asked:
        text = TEXTS[question.document]
        assert len(set(question.choices)) == cloze.CHOICES
        ending = question.places[question.truth]
        shown_from = ending - len(question.context)
        for number, (choice, place) in enumerate(zip(question.choices, question.places, strict=True)):
            assert spoken(text[place:]).startswith(choice)
            if number != question.truth:
                before = place + len(choice) <= shown_from
                behind = place >= ending + len(question.choices[question.truth])
                assert before or behind


def test_questions_are_a_pure_function_of_the_seed_and_ask_once(asked):
    assert cloze.questions(TEXTS, 60, seed=3) == asked
    assert cloze.questions(TEXTS, 60, seed=4) != asked
    places = {(question.document, question.places[question.truth]) for question in asked}
    assert len(places) == len(asked)
    counts = np.bincount([question.truth for question in asked], minlength=cloze.CHOICES)
    assert counts.min() >= 5  # a place that is never true would give answers away


def test_more_questions_than_sentences_are_refused():
    with pytest.raises(InputError, match="count must be 1 to"):
        cloze.questions(TEXTS, 10**6)


def test_scores_are_mean_log_probabilities_of_each_choice_alone(asked):
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = load_model(checkpoints.build(config, seed=0))
    model.tokenizer = ByT5Tokenizer(extra_ids=0)
    question = asked[0]
    scores = cloze._scores(model, question)
    context = [byte + 3 for byte in question.context.encode()]
    for score, choice in zip(scores, question.choices, strict=True):
        ending = [byte + 3 for byte in f" {choice}".encode()]
        with torch.no_grad():
            logprobs = model(torch.tensor([*context, *ending]))[0].double().log_softmax(-1)
        expected = [logprobs[len(context) + i - 1, token] for i, token in enumerate(ending)]
        torch.testing.assert_close(score, torch.stack(expected).mean(), rtol=0, atol=1e-5)
    right = dataclasses.replace(question, truth=int(scores.argmax()))
    wrong = dataclasses.replace(question, truth=int(scores.argmin()))
    assert cloze.answered(model, [right, wrong])["correct"].tolist() == [1.0, 0.0]


def test_training_reads_no_document_that_is_held_out(tmp_path):
    read = {Path(file).read_text(encoding="utf-8") for file in restoration.written_texts(tmp_path / "texts")}
    held_out = set(restoration.held_out_texts())
    assert len(read) + len(held_out) == len(restoration.all_texts()) < len(set(documents()))
    learnt, asked = (set().union(*map(restoration.long_paragraphs, texts)) for texts in (read, held_out))
    assert len(learnt) > 300
    assert not learnt & asked


def test_the_arms_read_as_much_and_longred_in_its_published_mix():
    corpus = TextCorpus()
    ce, longred, control = (restoration.phase_of(arm, corpus, ("ln_final.hook_out",)) for arm in restoration.ARMS)
    assert dataclasses.replace(control, name=ce.name, theta=ce.theta) == ce
    assert control.theta == restoration.ORIGINAL_THETA
    assert ce.step_tokens == longred.step_tokens == restoration.STEP_TOKENS
    assert (ce.lr, ce.steps, ce.warmup, ce.weight_decay) == (
        longred.lr,
        longred.steps,
        longred.warmup,
        longred.weight_decay,
    )
    tokens = [count * stream.window for count, stream in zip(longred.windows, longred.mix, strict=True)]
    assert tokens == [4 * tokens[2], 3 * tokens[2], tokens[2]]
    weights = [factor * stream.terms[0].weight for factor, stream in zip(longred.factors, longred.mix, strict=True)]
    assert weights == [0.5, 1.875, 1.25]
    with pytest.raises(InputError, match="--drifted"):
        restoration.phase_of("longred_u", corpus, None)


def test_it_is_planned_in_full_alone():
    assert restoration.stages(Options(Path("runs"))) == {}
    planned = restoration.stages(Options(Path("runs"), full=True))
    assert len(planned) == (2 * len(restoration.THETAS) + 3 + 10 if is_available(restoration.MODEL) else 0)


LAYER_THAT_KNOWS = 2
COSTS = np.array([0.3, 0.9, 0.5, 0.7, 0.4, 0.8, 0.6, 1.0, 0.35, 0.95])
"""What ten documents lose for each step of theta."""


def untrained_rows():
    """Loss rises by a document's cost with log theta; the attention of one layer says so, that of others nothing."""
    rng = np.random.default_rng(0)
    rows = []
    for theta in restoration.THETAS:
        steps = np.log10(theta / restoration.ORIGINAL_THETA)
        for unit, cost in enumerate(COSTS):
            place = {"theta": theta, "unit": unit, "seq_len": 512}
            for scale in (1.0, 1.1, 1.2, 1.3):
                left = 0.9 if scale == 1.2 else 1.0
                rows.append({**place, "query_scale": scale, "metric": "loss_nats", "value": 2 + left * cost * steps})
            for layer in range(4):
                known = cost if layer == LAYER_THAT_KNOWS else rng.random()
                rows.append({**place, "layer": layer, "metric": ATTENTION_KL, "value": steps * known})
            for question in range(5):
                wrong = float(question == 0)
                rows.append(
                    {"theta": theta, "unit": 5 * unit + question, "metric": "choice_correct", "value": 1 - wrong}
                )
    return pd.DataFrame(rows).assign(model=said.PRETRAINED, distance=pd.NA)


def test_verdicts_of_drift_are_arithmetic():
    rows = untrained_rows()
    rise = said.rise_of_loss(rows)
    np.testing.assert_allclose(rise[1e6], COSTS)
    assert said.best_layer(rows, range(0, 10, 2)) == LAYER_THAT_KNOWS
    assert said.at_one_theta(said.attention_drift(rows, LAYER_THAT_KNOWS), rise) == pytest.approx(1.0)
    scale, losses = said.restored_by_scaling(rows, restoration.TRAINED_THETA)
    assert (scale, said.share_restored(losses)) == (1.2, pytest.approx(0.1))
    assert losses.index.tolist() == [1, 3, 5, 7, 9]
    table = said.judged(rows).dropna(subset=["prediction"]).set_index("prediction")
    assert table.loc[1, "measured"] == pytest.approx(COSTS.mean() * np.log10(50))
    assert table.loc[1, "held"] == "held"
    assert table.loc[2, "measured"] <= 1
    assert table.loc[5, "held"] == "not held"  # the layer that knows is better than the mean with three that do not
    assert (table.loc[6, "measured"], table.loc[6, "held"]) == (pytest.approx(0.1), "held")
    assert (table.loc[7, "measured"], table.loc[7, "held"]) == (0, "undecided")  # 10 questions say little
    assert table.loc[7, "low"] < 0 < table.loc[7, "high"]  # though both answered all alike


def test_theta_itself_says_nothing_of_documents():
    """A drift that only grows with theta is perfect over thetas, and tells documents apart by nothing."""
    rise = said.rise_of_loss(untrained_rows())
    of_theta = pd.DataFrame([np.log(rise.columns)] * len(rise), index=rise.index, columns=rise.columns)
    np.testing.assert_allclose(said.over_thetas(of_theta, rise), 1.0)
    assert np.isnan(said.at_one_theta(of_theta, rise))


def trained_rows():
    rows = []
    losses = {"original": 2.0, "swapped": 3.0, "longred_u": 2.25, "long_ce": 1.75, "ce_own_theta": 1.5}
    for model, loss in losses.items():
        for unit in range(6):
            place = {"model": model, "theta": 5e6, "unit": unit}
            rows.append(
                {**place, "seq_len": 256, "query_scale": 1.0, "metric": "loss_nats", "value": loss + 0.01 * unit}
            )
            rows.append({**place, "seq_len": 512, "layer": 3, "metric": COSINE_DISTANCE, "value": abs(loss - 2)})
            rows.append({**place, "metric": "choice_correct", "value": float(unit % 2)})
            logprob = -20.0 if model == "original" else -12.0 - unit / 10
            rows.append(
                {**place, "seq_len": 12_288, "distance": 10_000, "metric": "passkey_logprob_nats", "value": logprob}
            )
    return pd.DataFrame(rows)


def test_verdicts_of_training_are_arithmetic():
    rows = trained_rows()
    table = said.judged(rows)
    beside = table[table["prediction"].isna()]
    assert beside["measured"].tolist() == [pytest.approx(1.25)]
    table = table.dropna(subset=["prediction"]).set_index("prediction")
    assert (table.loc[8, "measured"], table.loc[8, "held"]) == (pytest.approx(0.75), "held")
    assert (table.loc[9, "measured"], table.loc[9, "held"]) == (pytest.approx(0.5), "held")
    assert (table.loc[10, "measured"], table.loc[10, "held"]) == (0, "not held")  # both .25 away: 0 is not above 0
    assert (table.loc[11, "measured"], table.loc[11, "held"]) == (0, "undecided")
    assert table.loc[12, "held"] == "held"
    assert (table.loc[13, "measured"], table.loc[13, "held"]) == (pytest.approx(0.5), "held")
    assert (table.loc[14, "measured"], table.loc[14, "held"]) == (pytest.approx(0.25), "held")
    shown = said.tables_of(rows)["after training"]
    assert len(shown) == 5


def test_a_part_that_was_left_out_is_not_judged():
    table = said.judged(trained_rows().query("seq_len != 12288"))
    assert 12 not in table["prediction"].dropna().tolist()
    assert said.judged(trained_rows().iloc[:0]).empty
    rows = untrained_rows()
    assert said.judged(rows[rows["theta"] > said.ORIGINAL_THETA]).empty  # nothing to compare with
    few = said.judged(rows[rows["theta"].isin([said.ORIGINAL_THETA, said.TRAINED_THETA])])
    assert few["prediction"].tolist() == [1, 6, 7]
