"""The experiment on a real model: its measurements on a tiny one, and its verdicts on planted rows."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import ByT5Tokenizer

from experiments import pretrained
from rope_probe import PositionShift, load_model, repeated_window, silenced, trace
from rope_probe.models import checkpoints
from rope_probe.tracing.cone import LOGITS
from rope_probe.tracing.heads import HEADS
from rope_probe.tracing.propagation import DELTAS
from tests import zoo

LOCAL_GLOBAL = [pretrained.LOCAL, pretrained.GLOBAL]


@pytest.fixture
def model(monkeypatch):
    """Two layers, a local and a global one, that read bytes; passkeys in 400 bytes."""
    config = zoo.hf.Gemma3TextConfig(
        **{**zoo.SIZES, "vocab_size": 259, "max_position_embeddings": 640},
        head_dim=8,
        sliding_window=64,
        layer_types=LOCAL_GLOBAL,
    )
    built = load_model(checkpoints.build(config, seed=0))
    built.tokenizer = ByT5Tokenizer(extra_ids=0)
    for name in ("PASSKEY_WINDOW", "KINDS_WINDOW"):
        monkeypatch.setattr(pretrained, name, 400)
    for name in ("PASSKEY_DISTANCE", "KINDS_DISTANCE"):
        monkeypatch.setattr(pretrained, name, 100)
    for name in ("PASSKEY_TRIALS", "KINDS_TRIALS"):
        monkeypatch.setattr(pretrained, name, 2)
    return built


def test_the_gain_of_copies_is_the_loss_on_the_first_less_that_on_the_later(model):
    tokens = [5, 6, 7, 8]
    window = repeated_window(tokens, 3)
    with torch.no_grad():
        logits = model.original_model(window.tokens).logits[0].double()
    losses = -logits.log_softmax(-1)[torch.arange(11), window.tokens[0, 1:]]  # of tokens 1 to 11
    expected = losses[:3].mean() - torch.cat([losses[4:7], losses[8:11]]).mean()
    assert pretrained.copy_gain(model, window) == pytest.approx(expected.item(), abs=1e-5)


def test_with_heads_silenced_every_ability_is_measured_as_with_them_silenced_by_hand(model):
    window = pretrained.repeated_document(model, 0)
    frame = pretrained.silencing(model, window, [(0, 1), (1, 2)], seed=0)
    assert frame.groupby("silenced")["draw"].nunique().to_dict() == {
        "largest effect": 0, "none": 0, "random": pretrained.DRAWS,
    }  # fmt: skip
    got = frame.set_index(["silenced", "metric"])["value"]
    shift = PositionShift("q", pretrained.SHIFT)
    with silenced(model, [(0, 1), (1, 2)]):
        expected = trace(model, window, shift, sites=[LOGITS], by="window").query("metric == 'kl_nats'")["value"].item()
        gain = pretrained.copy_gain(model, window)
    assert got["largest effect", "shift_kl_nats"] == pytest.approx(expected)
    assert got["largest effect", "copy_gain_nats"] == pytest.approx(gain)
    assert got["none", "shift_kl_nats"] != pytest.approx(expected)


def test_random_heads_are_other_heads_of_the_same_layers():
    rng = np.random.default_rng(0)
    drawn = {pretrained._other_head(3, [(3, 0), (3, 2), (4, 1)], 4, rng) for _ in range(50)}
    assert drawn == {(3, 1), (3, 3)}


def test_a_passkey_is_read_with_each_kind_of_layers_meddled_with(model):
    frame = pretrained.passkeys_of_kinds(model, seed=0)
    assert frame["intervention"].nunique() == 6
    logprob = frame[frame["metric"] == "answer_logprob_nats"].set_index("intervention")["value"]
    assert logprob["clean"] != logprob["global silenced"]
    assert logprob["clean"] != logprob["local shifted"]
    assert (logprob < 0).all()


def test_the_parts_perturb_what_they_say(model):
    pairs = pretrained._perturbations(model, "pairs", 96)[pretrained.LAYER_PAIR]
    assert len(pairs) == 2 * 4  # layers by pairs
    assert {(perturbation.layers, perturbation.pairs) for perturbation in pairs} == {
        ((layer,), pair) for layer in range(2) for pair in range(4)
    }
    longer = pretrained._perturbations(model, "long", 576)
    assert {arm: len(perturbations) for arm, perturbations in longer.items()} == {
        "long, layer": 2, "long, sliding_attention": 1, "long, full_attention": 1,
    }  # fmt: skip
    alike = pretrained._perturbations(load_model(zoo.llama()), "long", 576)
    assert {arm: len(perturbations) for arm, perturbations in alike.items()} == {"long, layer": 2, "long, head": 8}
    assert len(pretrained.repeated_document(model, 0, pretrained.LONG_DOCUMENT)) == 576
    copied = pretrained.copied_passkeys(model, 0)
    assert len(copied) == 8
    assert copied["value"].between(0, 1).all()


SMOLLM, GEMMA = pretrained.MODELS


def of_logits(arm, values, model=SMOLLM, seeds=(0, 1, 2)):
    """Rows of `deltas` at the logits: columns and value, a little more with the seed."""
    at = {"model": model, "arm": arm, "site": LOGITS, "metric": "kl_nats"}
    return [
        {**at, **place, "seed": seed, "value": value * (1 + 0.01 * seed)} for place, value in values for seed in seeds
    ]


def by_head(of_carriers, others):
    """Of 30 layers of 2 heads each, but that the carriers' layers have heads up to theirs."""
    places = [(layer, head) for layer in range(30) for head in (0, 8)]
    return [
        ({"inject_layer": layer, "head": head}, of_carriers if (layer, head) in pretrained.CARRIERS else others)
        for layer, head in places
    ]


def judged(deltas=(), heads=(), silence=()):
    tables = pretrained.Tables(
        {
            "deltas": DELTAS.frame(list(deltas)),
            "heads": HEADS.frame(list(heads)),
            "silence": pretrained.SILENCE.frame(list(silence)),
            "passkeys": pretrained.PASSKEYS.frame([]),
        }
    )
    return pretrained.judged(tables)


def test_layers_and_heads_are_judged_in_both_documents():
    layers = [({"inject_layer": layer}, 3.0 if layer in (16, 19) else 0.2) for layer in range(30)]
    rows = of_logits("layer", layers) + of_logits("long, layer", [(place, 4 - value) for place, value in layers])
    rows += of_logits("head", by_head(5.0, 0.1)) + of_logits("long, head", by_head(0.1, 0.1))
    table = judged(rows)
    held = {
        (row.prediction, row.claim.startswith("longer")): row.held for row in table.itertuples() if "KL of" in row.claim
    }
    assert held == {(1, False): "held", (14, True): "not held"}
    shares = table[table["claim"].str.contains("share of the two heads")].set_index("prediction")
    assert shares["measured"].to_dict() == {2: pytest.approx(10 / 15.8), 14: pytest.approx(2 / 60)}


def test_an_effect_that_goes_with_one_score_is_told_from_one_that_goes_with_another():
    """What a head's shift costs rises with attention to the token before, and falls with what it copies."""
    effects = [({"inject_layer": layer, "head": head}, 0.1 + layer + head) for layer in range(30) for head in (0, 8)]
    heads = [
        {"model": SMOLLM, "seed": seed, "layer": layer, "head": head, "metric": metric, "value": value}
        for seed in range(3)
        for layer in range(30)
        for head in (0, 8)
        for metric, value in (
            ("previous_token", (layer + head) / 40), ("retrieval_head", 0.5 - (layer + head) / 80),
            ("induction", 0.1 * (layer % 2)),
        )
    ]  # fmt: skip
    no_scores_yet = of_logits("head", effects, seeds=(3,))  # a document whose scores were not read does not matter
    table = judged([*of_logits("head", effects), *no_scores_yet], heads)
    of_copying = table[table["prediction"] == 12].set_index("claim")
    apart = of_copying[of_copying.index.str.startswith("rank correlation")].iloc[0]
    assert (apart["measured"], apart["held"]) == (pytest.approx(2.0), "held")
    copies = of_copying[of_copying.index.str.startswith("share of a passkey")]
    assert copies["measured"].tolist() == pytest.approx([0.5 - 27 / 80, 0.5 - 16 / 80])
    assert set(copies["held"]) == {"not held"}


def test_what_goes_with_silenced_heads_is_a_share_of_what_was_there():
    values = {
        "shift_kl_nats": {"none": 4.0, "largest effect": 2.0, "random": 3.9},
        "copy_gain_nats": {"none": 2.0, "largest effect": 0.5, "random": 1.9},
        "passkey_logprob_nats": {"none": -0.5, "largest effect": -4.0, "random": -0.6},
    }
    rows = [
        {"model": SMOLLM, "seed": seed, "metric": metric, "silenced": which, "value": value * (1 + 0.001 * seed)}
        for metric, of_which in values.items()
        for which, value in of_which.items()
        for seed in range(3)
    ]
    table = judged(silence=rows)
    measured = table.groupby("prediction")["measured"].apply(list)
    np.testing.assert_allclose(measured[5], [0.75, 0.05])
    np.testing.assert_allclose(measured[13], [0.5, 0.025])
    np.testing.assert_allclose(measured[6], [3.4], rtol=0.01)
    assert set(table["held"]) == {"held"}


def test_fast_pairs_of_a_layer_are_told_by_their_wavelength_and_kinds_by_their_ratio():
    pairs = [
        ({"inject_layer": layer, "pair": pair, "wavelength": wavelength}, value)
        for layer in (16, 19)
        for pair, wavelength, value in ((0, 6.0, 0.6), (1, 64.0, 0.2), (2, 900.0, 0.2))
    ]
    kinds = [
        *of_logits("long, sliding_attention", [({}, 3.0)], GEMMA),
        *of_logits("long, full_attention", [({}, 0.1)], GEMMA),
    ]
    table = judged(of_logits(pretrained.LAYER_PAIR, pairs) + kinds).set_index("prediction")
    assert table.loc[15, "measured"].tolist() == pytest.approx([0.8, 0.8])
    assert (table.loc[16, "measured"], table.loc[16, "held"]) == (pytest.approx(30), "held")


def test_the_tables_of_a_report_are_told_where_there_is_something_to_tell():
    rows = of_logits("head", by_head(5.0, 0.1)) + of_logits("dose", [({"side": "q", "delta_tokens": 1.0}, 2.0)])
    results = pretrained.Tables({"deltas": DELTAS.frame(rows)})
    section = pretrained.report({"pretrained": results})
    assert len(section.tables) == 2
    carriers = next(iter(section.tables.values()))
    assert isinstance(carriers, pd.DataFrame)
    assert carriers["share"].sum() <= 1
    assert set(carriers.index[:2]) == {(SMOLLM, layer, head) for layer, head in pretrained.CARRIERS}
