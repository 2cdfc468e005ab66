"""Exports: RULER's data files and predictions, and lm-eval's JSON, held to the shapes that these tools read."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from transformers import ByT5Tokenizer

from rope_probe import InputError, lm_eval_results, load_model, retrieval_trials, ruler_lines, write_ruler
from rope_probe.retrieval.probe import KeyValueTask
from rope_probe.retrieval.tasks import TextTask
from rope_probe.windows.corpora import KeyValueStream
from tests import zoo

BYTES = ByT5Tokenizer(extra_ids=0)
PASSKEY, FWE = TextTask("passkey", BYTES, 400), TextTask("fwe", BYTES, 400)
RULERS = {"index": int, "input": str, "outputs": list, "length": int}


@pytest.fixture(scope="module")
def trials():
    model = load_model(zoo.llama(vocab_size=259, max_position_embeddings=1024))
    return pd.concat([retrieval_trials(model, PASSKEY, [128, 200], trials=3), retrieval_trials(model, FWE, trials=2)])


def test_lines_are_rulers_and_hold_the_trials():
    lines = ruler_lines(PASSKEY, [128, 200], trials=2, seed=5)
    drawn = [trial for distance in (128, 200) for trial in PASSKEY.draw(distance, 2, seed=5)]
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert [line["distance"] for line in lines] == [128, 128, 200, 200]
    for line, trial in zip(lines, drawn, strict=True):
        assert {key: type(line[key]) for key in RULERS} == RULERS
        assert all(isinstance(output, str) and output in line["input"] for output in line["outputs"])
        assert PASSKEY._encode(line["input"]) == trial.prompt.tolist()
        assert line["length"] == len(trial.prompt) + len(trial.answer) <= 400
        assert line["needle_distance"] == trial.distance
        assert "pred" not in line
    assert [len(line["outputs"]) for line in ruler_lines(FWE, trials=1)] == [3]


def test_results_make_predictions_of_lines(trials):
    lines = ruler_lines(PASSKEY, [128, 200], trials=3, results=trials)
    of_passkey = trials[trials["task"] == "passkey"]
    assert [line["pred"] for line in lines] == of_passkey["written"].tolist()
    assert [line["accuracy"] for line in lines] == of_passkey["accuracy"].tolist()
    assert {(line["truncation"], str(line["others"])) for line in lines} == {(-1, "{}")}
    # RULER's string_match_all, on the lines alone, is the accuracy that was measured
    scores = [np.mean([output.lower() in line["pred"].lower() for output in line["outputs"]]) for line in lines]
    assert scores == pytest.approx(of_passkey["accuracy"].tolist())
    with pytest.raises(InputError, match="trial 3 of passkey at distance 128 in window 400 is there 0 times"):
        ruler_lines(PASSKEY, [128], trials=4, results=trials)
    with pytest.raises(InputError, match="is there 0 times"):
        ruler_lines(PASSKEY, [128], trials=3, seed=1, results=trials)
    with pytest.raises(InputError, match="is there 2 times"):
        ruler_lines(PASSKEY, [128], trials=3, results=pd.concat([trials, trials]))


def test_files_lie_where_ruler_looks_and_replace_nothing(tmp_path):
    lines = [
        *ruler_lines(PASSKEY, [128], trials=2),
        *ruler_lines(FWE, trials=1),
        *ruler_lines(PASSKEY, [200], trials=1),
    ]
    files = write_ruler(lines, tmp_path / "data")
    assert files == [tmp_path / "data" / task / "validation.jsonl" for task in ("passkey", "fwe")]
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert rows[2] == {**lines[3], "index": 2}
    with pytest.raises(InputError, match="is there already"):
        write_ruler(lines, tmp_path / "data")
    with pytest.raises(InputError, match="no trials"):
        write_ruler([], tmp_path / "data")


def test_token_ids_are_no_text():
    with pytest.raises(InputError, match="key_value has only token ids"):
        ruler_lines(KeyValueTask(KeyValueStream(32, distinct=(2, 8), keys=20, values=20), 16), [4])


def test_results_have_lm_evals_shape(trials):
    shape = lm_eval_results(trials, model="tiny", settings={"dtype": "float32"})
    assert json.loads(json.dumps(shape)) == shape
    names = ["passkey_400_128", "passkey_400_200", "fwe_400"]
    for part in ("results", "configs", "versions", "n-shot", "n-samples", "higher_is_better", "group_subtasks"):
        assert list(shape[part]) == names
    passkey = trials[(trials["task"] == "passkey") & (trials["distance"] == 128)]
    found = shape["results"]["passkey_400_128"]
    assert set(found) == {"alias", *(f"{metric}{what},none" for metric in ("accuracy", "answer_logprob_nats")
                                     for what in ("", "_stderr"))}  # fmt: skip
    logprobs = passkey["answer_logprob_nats"].to_numpy()
    assert found["answer_logprob_nats,none"] == pytest.approx(logprobs.mean())
    by_hand = math.sqrt(((logprobs - logprobs.mean()) ** 2).sum() / (len(logprobs) - 1)) / math.sqrt(len(logprobs))
    assert found["answer_logprob_nats_stderr,none"] == pytest.approx(by_hand)
    assert shape["n-samples"]["fwe_400"] == {"original": 2, "effective": 2}
    assert shape["configs"]["passkey_400_200"]["metadata"]["distance"] == 200
    assert shape["config"]["model_args"] == {"pretrained": "tiny"}
    assert shape["config"]["dtype"] == "float32"
    assert shape["configs"]["fwe_400"]["metadata"] == {
        "version": 1.0, "task": "fwe", "window": 400, "distance": None, "seeds": [0]
    }  # fmt: skip
    assert set(shape["versions"].values()) == {1.0}


def test_one_trial_has_no_error_and_mixtures_are_refused(trials):
    one = lm_eval_results(trials[trials["task"] == "fwe"].head(1), model="tiny")
    assert one["results"]["fwe_400"]["accuracy_stderr,none"] == "N/A"
    with pytest.raises(InputError, match="2 models"):
        lm_eval_results(pd.concat([trials, trials.assign(model="other")]), model="tiny")
    with pytest.raises(InputError, match="2 perturbations"):
        lm_eval_results(pd.concat([trials, trials.assign(perturbation="AttentionTemperature(2.0)")]), model="tiny")
    warmer = lm_eval_results(trials.assign(perturbation="x"), model="tiny")
    assert warmer["config"]["perturbation"] == "x"
    with pytest.raises(InputError, match="no trials to export"):
        lm_eval_results(trials.head(0), model="tiny")
    with pytest.raises(InputError, match="column 'trial'"):
        lm_eval_results(trials.drop(columns="trial"), model="tiny")
