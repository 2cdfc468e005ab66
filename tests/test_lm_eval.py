"""The command line of lm-evaluation-harness for a checkpoint."""

import json
import shlex

import pytest
from transformers import ByT5Tokenizer

from rope_probe import InputError
from rope_probe.names import TEXT_TASKS
from rope_probe.retrieval.lm_eval import LM_EVAL_TASKS, lm_eval_command
from tests import zoo
from tests.test_cli import rope_probe


def checkpoint(folder, *, tokenizer=True):
    zoo.llama(vocab_size=259).save_pretrained(folder)
    if tokenizer:
        ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


def options_of(command):
    """What follows each option of a command line."""
    words = shlex.split(command)
    assert words[0] == "lm_eval"
    told, rest = {}, iter(words[1:])
    for word in rest:
        name, equals, value = word.partition("=")
        told[name] = value if equals else next(rest)
    return told


def test_the_command_survives_a_shell_and_says_what_lm_eval_needs(tmp_path):
    folder = checkpoint(tmp_path / "my model's")
    told = options_of(lm_eval_command(folder, [1024, 4096], dtype="bfloat16", tasks=["niah_single_1", "vt"]))
    assert told["--model"] == "hf"
    arguments = dict(pair.split("=") for pair in told["--model_args"].split(","))
    assert arguments == {"pretrained": str(folder), "dtype": "bfloat16", "max_length": "4096"}
    assert told["--tasks"] == "niah_single_1,ruler_vt"
    assert json.loads(told["--metadata"]) == {"max_seq_lengths": [1024, 4096]}


def test_tasks_are_ours_by_their_names_there(tmp_path):
    assert set(LM_EVAL_TASKS) == set(TEXT_TASKS) - {"passkey"}
    told = options_of(lm_eval_command(checkpoint(tmp_path / "m"), [1024]))
    assert told["--tasks"].split(",") == list(LM_EVAL_TASKS.values())


def test_what_lm_eval_could_not_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no tokenizer"):
        lm_eval_command(checkpoint(tmp_path / "bare", tokenizer=False), [64])
    with pytest.raises(InputError, match="takes model arguments apart at ','"):
        lm_eval_command(tmp_path / "a,b", [64])
    with pytest.raises(InputError, match="lm_eval has no task 'passkey'"):
        lm_eval_command(checkpoint(tmp_path / "m"), [64], tasks=["passkey"])


TOML = """
out = "run"
student = { model_type = "llama", vocab_size = 259, hidden_size = 32, intermediate_size = 32, num_hidden_layers = 1, num_attention_heads = 2, num_key_value_heads = 2 }
[[phases]]
name = "short"
window = 32
data = { kind = "text", longest = 32 }
terms = [{ kind = "cross_entropy" }]
steps = 1
batch_tokens = 64
lr = 1e-3
"""  # noqa: E501


def test_distill_ends_with_it_and_json_holds_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.toml").write_text(TOML)
    code, stdout, _ = rope_probe(capsys, "distill", "job.toml")
    assert code == 0
    lines = stdout.splitlines()
    assert lines[-1] == "run"
    told = options_of(lines[-2])
    assert told["--model_args"] == "pretrained=run/checkpoints/short,dtype=float32,max_length=32"
    code, stdout, _ = rope_probe(capsys, "distill", "job.toml", "--resume", "--json")
    assert code == 0
    assert json.loads(stdout) == {
        "command": "distill",
        "run": "run",
        "checkpoint": "run/checkpoints/short",
        "missed_gate": None,
        "lm_eval": lines[-2],
    }
