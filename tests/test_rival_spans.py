"""Rivals of the causal spans, on a planted case: the head that matters is found, and gains are arithmetic."""

import pandas as pd
import pytest
import torch

from experiments import rival_spans
from experiments.toy_checkpoints import architecture
from rope_probe import AttentionTemperature, Span, load_model, transplant_spans
from rope_probe.models import checkpoints
from rope_probe.runs.tables import Tables


@pytest.fixture(scope="module")
def start():
    model = checkpoints.build(architecture({"rope_type": "default", "rope_theta": 20_000.0}), seed=0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    return load_model(model)


def test_a_scaled_head_is_one_whose_query_weights_are_multiplied(start):
    tokens = torch.arange(4, 68).unsqueeze(0)
    other = checkpoints.build(start.config, seed=0)
    other.load_state_dict(start.original_model.state_dict())
    with torch.no_grad():
        other.get_parameter("model.layers.0.self_attn.q_proj.weight")[32:64] *= 3
    with torch.no_grad():
        plain = start(tokens)
        with rival_spans.scaled(start, (0, 1), 3.0):
            found = start(tokens)
        expected = load_model(other)(tokens)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_the_head_that_matters_and_the_factor_that_helps_are_found(start):
    """The only head that differs is the causal one; `select` likes outputs that are near those with queries tripled."""
    donor = checkpoints.build(start.config, seed=9)
    with torch.no_grad():
        for weight in donor.parameters():
            weight.mul_(4)
    end = load_model(transplant_spans(start, donor, [Span(1, 0), Span(1, 0, part="W_K")]))
    tokens = torch.arange(4, 68).unsqueeze(0)

    def near(wanted):
        def select(model):
            with torch.no_grad():
                apart = (model(tokens) - wanted).square().mean().item()
            return pd.DataFrame({"metric": ["accuracy", "answer_logprob_nats"], "value": [0.5, -apart]})

        return select

    with torch.no_grad():
        assert rival_spans.causal_head(start, end, near(end(tokens))) == (1, 0)
        hooks = AttentionTemperature(3.0, layers=1, heads=0).hooks(start)
        wanted = start.run_with_hooks(tokens, fwd_hooks=hooks)
    assert rival_spans.best_factor(start, (1, 0), near(wanted)) == 3.0


def rows(seed, **accuracy_of):
    names = {"spans": rival_spans.SPANS, "all_scaled": rival_spans.ALL_SCALED, "by_path": rival_spans.BY_PATH}
    names |= {"random": rival_spans.RANDOM, "reverted": rival_spans.REVERTED}
    at = {"model": "kd_adamw", "seed": seed}
    found = []
    for name, value in accuracy_of.items():
        state = names.get(name, name)
        for distance in rival_spans.DISTANCES:
            place = {"distance": distance, "trials": 500, "seq_len": 1024, "metric": "accuracy", "value": value}
            found.append({**at, "state": state, **place})
        looks = {"layer": 0, "head": 1, "metric": "previous_token", "value": value}
        found.append({**at, "state": state, **looks})
    return found


def test_gains_and_verdicts_are_arithmetic():
    shares = {"start": 0.0, "end": 0.8, "spans": 0.4, "scaled": 0.42, "all_scaled": 0.7, "by_path": 0.5, "random": 0.45,
              "reverted": 0.2}  # fmt: skip
    frame = rival_spans.RIVAL_SPANS.frame([row for seed in range(3) for row in rows(seed, **shares)])
    gains = rival_spans.gains(frame).set_index(["state", "seed"])["share"]
    assert gains[rival_spans.SPANS, 0] == pytest.approx(0.5)
    assert (gains[rival_spans.START, 1], gains[rival_spans.END, 2]) == (0, 1)
    section = rival_spans.report({"rival_spans": Tables({"rival_spans": frame})})
    held = section.verdicts.set_index("claim")["held"]
    assert held["kd_adamw: accuracy of scaled less head's weights in [-0.15, 0.15]"] == "held"
    assert held["kd_adamw: accuracy of all scaled less head's weights in [0.05, 1]"] == "held"
    assert held["kd_adamw: accuracy of chosen spans less random spans in [0.1, 1]"] == "not held"
    assert held["kd_adamw: attention to the token before, start over end, below .5"] == "held"
    assert held["kd_adamw: the same, scaled less end, within .15"] == "not held"
    assert len(section.tables) == 2


def test_draws_share_their_trials_and_one_seed_decides_no_mean():
    of_draws = [{**row, "draw": draw} for draw in range(3) for row in rows(0, random=0.5)]
    frame = rival_spans.RIVAL_SPANS.frame(of_draws)
    assert rival_spans.accuracies(frame)["trials"].item() == 500 * len(rival_spans.DISTANCES)
    names = ("start", "end", "spans", "scaled", "all_scaled", "by_path", "random", "reverted")
    judged = rival_spans.judged(rival_spans.RIVAL_SPANS.frame(rows(0, **dict.fromkeys(names, 0.5))))
    of_heads = judged[judged["claim"].str.contains("token before|scaled less end")]
    assert set(of_heads["held"]) == {"not as predicted", "as predicted"}
