import math

import pandas as pd
import pytest
import torch

from rope_probe import InputError, KeyValueStream, load_model
from rope_probe.retrieval import KeyValueTask, retrieval_accuracy, student_interval
from tests import zoo

STREAM = KeyValueStream(32, distinct=(2, 8), keys=30, values=30)
TASK = KeyValueTask(STREAM, window=32)


@pytest.mark.parametrize("distance", [2, 8, 30])
def test_a_trial_binds_its_key_once_at_its_distance(distance):
    for trial in TASK.trials(distance, 20, seed=0).tolist():
        query, answer = trial[-2], trial[-1]
        places = [i for i in range(0, 30, 2) if trial[i] == query]
        assert places == [30 - distance]
        assert trial[30 - distance + 1] == answer
        bound = dict(zip(trial[0::2], trial[1::2], strict=True))
        assert [bound[key] for key in trial[0::2]] == trial[1::2]


def test_trials_are_a_pure_function_of_seed_and_distance():
    assert torch.equal(TASK.trials(8, 5, seed=1), TASK.trials(8, 5, seed=1))
    assert not torch.equal(TASK.trials(8, 5, seed=1), TASK.trials(8, 5, seed=2))


def test_accuracy_and_logprob_are_those_of_plain_forward_passes():
    model = load_model(zoo.llama())
    frame = retrieval_accuracy(model, TASK, [4, 8], trials=40, seed=3)
    tokens = TASK.trials(8, 40, seed=3)
    with torch.no_grad():
        logits = model(tokens)[:, -2]
    expected = (logits.argmax(-1) == tokens[:, -1]).double().mean().item()
    logprob = logits.log_softmax(-1).gather(1, tokens[:, -1:]).mean().item()
    at = frame[frame["distance"] == 8].set_index("metric")["value"]
    assert at["accuracy"] == pytest.approx(expected)
    assert at["answer_logprob_nats"] == pytest.approx(logprob, abs=1e-5)
    assert (frame["low"] <= frame["value"]).all()
    assert (frame["value"] <= frame["high"]).all()


def test_a_model_that_knows_the_answer_scores_one(monkeypatch):
    model = load_model(zoo.llama())

    def look_up(tokens):
        found = [row.tolist()[row.tolist().index(row[-1].item()) + 1] for row in tokens]
        return torch.nn.functional.one_hot(torch.tensor(found), 64).float().unsqueeze(1).expand(-1, tokens.shape[1], -1)

    monkeypatch.setattr(model, "hidden", look_up)
    monkeypatch.setattr(model, "unembed", lambda hidden: 50 * hidden)
    frame = retrieval_accuracy(model, TASK, [2, 16, 30], trials=30)
    assert (frame[frame["metric"] == "accuracy"]["value"] == 1).all()


def test_intervals_have_their_textbook_values():
    model = load_model(zoo.llama())
    frame = retrieval_accuracy(model, TASK, [4], trials=100).set_index("metric").loc["accuracy"]
    hits, z = round(100 * frame["value"]), 1.959964
    middle, half = (hits + z**2 / 2) / (100 + z**2), z * (hits * (100 - hits) / 100 + z**2 / 4) ** 0.5 / (100 + z**2)
    assert (frame["low"], frame["high"]) == pytest.approx((max(0, middle - half), middle + half), abs=1e-6)
    low, high = student_interval(pd.Series([0.9, 1.0, 0.8]))
    assert (low, high) == pytest.approx((0.9 - 4.302653 * 0.1 / 3**0.5, 0.9 + 4.302653 * 0.1 / 3**0.5), abs=1e-6)
    assert student_interval(pd.Series([0.9])) == (-math.inf, math.inf)


def test_odd_windows_are_refused():
    with pytest.raises(InputError, match="33"):
        KeyValueTask(STREAM, window=33)


@pytest.mark.parametrize(("distance", "named"), [(3, "3"), (0, "0"), (32, "2..30")])
def test_distances_that_do_not_fit_are_refused(distance, named):
    with pytest.raises(InputError, match=named):
        retrieval_accuracy(load_model(zoo.llama()), TASK, [distance])
    with pytest.raises(InputError, match="trials"):
        retrieval_accuracy(load_model(zoo.llama()), TASK, [4], trials=0)
