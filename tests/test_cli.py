import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

import rope_probe as rope_probe_package
from rope_probe import cli
from rope_probe.models import checkpoints, weight_files
from rope_probe.names import SWEEPS
from rope_probe.retrieval import probe
from rope_probe.runs.provenance import hash_tokens
from rope_probe.runs.results import read_run
from rope_probe.windows.natural import text_window
from tests import zoo
from tests.gallery.pages import Page


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "llama"
    zoo.llama().save_pretrained(folder, max_shard_size="10KB")
    return folder


def rope_probe(capsys, *arguments):
    """Exit code, stdout and stderr of the command, run in this process."""
    argv, sys.argv = sys.argv, ["rope-probe", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = argv
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def is_refused(capsys, tmp_path, command, arguments, named):
    """Exit code 2, one line that names what is wrong, and nothing written."""
    before = sorted(tmp_path.iterdir())
    code, stdout, stderr = rope_probe(capsys, command, *arguments, "--out", tmp_path / "run")
    assert code == 2
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert named in stderr
    assert sorted(tmp_path.iterdir()) == before


def test_trace_writes_a_run_and_ends_with_its_path(checkpoint, tmp_path, capsys):
    out = tmp_path / "run"
    options = "--window 40 --document-length 10 --shift 0.5 --shift 4 --side q --side qk --masked"
    code, stdout, _ = rope_probe(capsys, "trace", checkpoint, "--out", out, *options.split())
    assert code == 0
    assert stdout.splitlines()[-1] == str(out)
    assert "rounding" in stdout
    assert "signal" in stdout
    tables, manifest = read_run(out)
    frame = tables["deltas"]
    assert set(frame["side"]) == {"q", "qk"}
    assert set(frame["delta_tokens"]) == {0.5, 4.0}
    assert frame["value_float64"].notna().all()
    assert manifest["config"]["window"] == 40
    (read,) = manifest["read"]["window"]
    assert (read["masked"], read["positions"], len(read["tokens_sha256"])) == (True, "continuous", 64)
    assert manifest["models"][str(checkpoint)]["attention_kernel"] == "sdpa"


def test_the_default_sweep_goes_from_a_quarter_token_to_the_window(checkpoint, tmp_path, capsys):
    code, _, _ = rope_probe(capsys, "trace", checkpoint, "--out", tmp_path / "run", "--window", "64",
                            "--document-length", "16", "--no-control")  # fmt: skip
    assert code == 0
    frame = read_run(tmp_path / "run")[0]["deltas"]
    dose, layer = (frame[frame["arm"] == arm] for arm in ("dose", "layer"))
    assert sorted(dose["delta_tokens"].unique()) == [0.25, 1, 4, 16, 64]
    assert set(dose["side"]) == {"q", "k", "qk"}
    assert dose["inject_layer"].isna().all()
    assert set(layer["inject_layer"]) == {0, 1}
    assert set(layer["side"]) == {"q", "k"}


def test_every_sweep_can_be_asked_for(checkpoint, tmp_path, capsys):
    sweeps = [word for kind in SWEEPS for word in ("--sweep", kind)]
    code, _, _ = rope_probe(capsys, "trace", checkpoint, "--out", tmp_path / "run", "--window", "20",
                            "--document-length", "10", "--no-control", *sweeps)  # fmt: skip
    assert code == 0
    assert list(read_run(tmp_path / "run")[0]["deltas"]["arm"].unique()) == list(SWEEPS)


def test_restrictions_reach_the_frame(checkpoint, tmp_path, capsys):
    options = "--window 20 --document-length 10 --shift 2 --layer 1 --head 0 --pair 2 --side k"
    code, _, _ = rope_probe(capsys, "trace", checkpoint, "--out", tmp_path / "run", *options.split())
    assert code == 0
    row = read_run(tmp_path / "run")[0]["deltas"].iloc[0]
    assert (row["inject_layer"], row["head"], row["pair"]) == (1, 0, 2)
    assert row["wavelength"] > 0


def test_trace_reads_documents_from_a_file(checkpoint, tmp_path, capsys):
    (tmp_path / "documents.txt").write_text("5 6 7 8\n\n9 10 11\n")
    code, _, _ = rope_probe(capsys, "trace", checkpoint, "--out", tmp_path / "run", "--shift", "1",
                            "--tokens", tmp_path / "documents.txt")  # fmt: skip
    assert code == 0
    frame = read_run(tmp_path / "run")[0]["deltas"]
    assert set(frame["document"]) == {0, 1}
    assert set(frame["seq_len"]) == {7}


def test_traces_are_the_same_for_the_same_seed(checkpoint, tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        rope_probe(capsys, "trace", checkpoint, "--out", tmp_path / name, "--seed", seed, "--window", "20",
                   "--document-length", "10", "--shift", "2", "--no-control")  # fmt: skip
    a, b, c = (read_run(tmp_path / name)[0]["deltas"]["value"] for name in "abc")
    assert a.equals(b)
    assert not a.equals(c)


def test_retrieval_measures_by_distance(checkpoint, tmp_path, capsys):
    options = "--window 32 --distance 4 --distance 16 --trials 10 --keys 20 --values 30"
    code, stdout, _ = rope_probe(capsys, "retrieval", checkpoint, "--out", tmp_path / "run", *options.split())
    assert code == 0
    assert stdout.splitlines()[-1] == str(tmp_path / "run")
    frame = read_run(tmp_path / "run")[0]["retrieval"]
    assert set(frame["distance"]) == {4, 16}
    assert set(frame["metric"]) == {"accuracy", "answer_logprob_nats"}
    assert frame[["low", "high"]].notna().all(axis=None)
    code, _, _ = rope_probe(capsys, "report", tmp_path / "run", "--out", tmp_path / "gallery")
    assert code == 0


@pytest.mark.parametrize(("options", "named"), [
    ("--distance 3", "even"), ("--distance 40", "2..30"), ("--keys 60", "vocabulary"), ("--trials 0", "--trials"),
    ("--window 31", "even"), ("--window 32 --keys 1", "--keys"),
])  # fmt: skip
def test_bad_retrieval_input_is_one_line(checkpoint, tmp_path, capsys, options, named):
    window = [] if "--window" in options else ["--window", "32"]
    given = [*window, "--keys", "20", "--values", "30", *options.split()]
    code, stdout, stderr = rope_probe(capsys, "retrieval", checkpoint, "--out", tmp_path / "run", *given)
    assert (code, stdout) == (2, "")
    assert stderr.count("\n") == 1
    assert named in stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A checkpoint with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("model") / "reader"
    zoo.llama(vocab_size=259).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


def test_retrieval_measures_text_tasks_by_the_models_own_tokenizer(reader, tmp_path, capsys):
    options = "--task passkey --task fwe --task key_value --keys 9 --values 9 --window 420 --distance 150 --trials 2"
    code, stdout, _ = rope_probe(capsys, "retrieval", reader, "--out", tmp_path / "run", *options.split(),
                                 "--distance", "200")  # fmt: skip
    assert code == 0
    assert stdout.splitlines()[-1] == str(tmp_path / "run")
    assert "passkey" in stdout
    tables, manifest = read_run(tmp_path / "run")
    rows = tables["retrieval"].query("metric == 'accuracy'")
    assert rows["task"].tolist() == ["passkey", "passkey", "fwe", "key_value", "key_value"]
    assert rows["distance"].fillna(0).tolist() == [150, 200, 0, 150, 200]
    assert {name: len(read) for name, read in manifest["read"].items()} == {"passkey": 2, "fwe": 1, "key_value": 2}
    code, _, _ = rope_probe(capsys, "report", tmp_path / "run", "--out", tmp_path / "gallery")
    assert code == 0
    page = Page(tmp_path / "gallery" / "retrieval.html")
    assert [name for name in page.pictures if "by-distance" in name] == [
        "retrieval-by-distance-1", "retrieval-by-distance-2"
    ]  # fmt: skip
    assert "passkey, window" in page.text
    assert "key_value, window" in page.text


def test_the_tasks_by_default_are_quick_ones_in_text_where_there_is_a_tokenizer(reader, checkpoint, tmp_path, capsys):
    code, _, _ = rope_probe(capsys, "retrieval", reader, "--out", tmp_path / "run", "--trials", 1)
    assert code == 0
    frame = read_run(tmp_path / "run")[0]["retrieval"]
    assert list(frame["task"].unique()) == ["passkey", "niah_single_1", "fwe"]
    assert set(frame["seq_len"]) == {1024}
    assert frame["distance"].nunique() <= 2 * 3
    assert cli.retrieval.tasks_of(str(checkpoint), None, 32, 20, 30)[0].name == "key_value"


QUICK_TRIALS = ("--window", "32", "--distance", "4", "--distance", "16", "--keys", "20", "--values", "30")


def transcripts(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_retrieval_that_is_cut_short_goes_on_where_it_was(checkpoint, tmp_path, capsys, monkeypatch):
    asked = (checkpoint, *QUICK_TRIALS, "--trials", "5")
    assert rope_probe(capsys, "retrieval", *asked, "--out", tmp_path / "whole")[0] == 0
    measured = probe._measured

    def cut_short(model, task, batch):
        if batch[0].distance == 16:
            raise KeyboardInterrupt
        yield from measured(model, task, batch)

    monkeypatch.setattr(probe, "_measured", cut_short)
    code, _, stderr = rope_probe(capsys, "retrieval", *asked, "--out", tmp_path / "run")
    kept = tmp_path / "run.trials.jsonl"
    assert code == 130
    assert str(kept) in stderr
    assert not (tmp_path / "run").exists()
    assert [trial["distance"] for trial in transcripts(kept)] == [4] * 5

    batches = []
    monkeypatch.setattr(probe, "_measured", lambda *given: batches.append(given[2]) or measured(*given))
    assert rope_probe(capsys, "retrieval", *asked, "--out", tmp_path / "run")[0] == 0
    assert [trial.distance for batch in batches for trial in batch] == [16] * 5
    resumed, whole = (read_run(tmp_path / run)[0]["retrieval"].drop(columns="run_id") for run in ("run", "whole"))
    pd.testing.assert_frame_equal(resumed, whole)
    assert not kept.exists()
    assert transcripts(tmp_path / "run" / "trials.jsonl") == transcripts(tmp_path / "whole" / "trials.jsonl")


def test_transcripts_of_retrieval_are_in_the_run(reader, tmp_path, capsys):
    options = "--task passkey --window 420 --distance 150 --trials 2"
    assert rope_probe(capsys, "retrieval", reader, "--out", tmp_path / "run", *options.split())[0] == 0
    trials = transcripts(tmp_path / "run" / "trials.jsonl")
    assert [trial["trial"] for trial in trials] == [0, 1]
    assert all(trial["references"] and isinstance(trial["written"], str) for trial in trials)
    assert not list(tmp_path.glob("*.jsonl"))


def test_retrieval_is_exported_for_ruler_and_lm_eval(reader, tmp_path, capsys):
    options = "--task passkey --task fwe --window 400 --distance 128 --trials 2 --temperature 1.5 --ruler --lm-eval"
    assert rope_probe(capsys, "retrieval", reader, "--out", tmp_path / "run", *options.split())[0] == 0
    lines = {
        task: [json.loads(line) for line in (tmp_path / "run" / "ruler" / task / "validation.jsonl").open()]
        for task in ("passkey", "fwe")
    }
    assert [len(found) for found in lines.values()] == [2, 2]
    kept = [json.loads(line) for line in (tmp_path / "run" / "trials.jsonl").open()]
    assert [line["pred"] for found in lines.values() for line in found] == [row["written"] for row in kept]
    shape = json.loads((tmp_path / "run" / "lm_eval.json").read_text())
    assert set(shape["results"]) == {"passkey_400_128", "fwe_400"}
    measured = read_run(tmp_path / "run")[0]["retrieval"].query("metric == 'accuracy' and task == 'passkey'")
    assert shape["results"]["passkey_400_128"]["accuracy,none"] == measured["value"].item()
    assert "1.5" in shape["config"]["perturbation"]
    assert shape["config"]["dtype"] == "torch.float32"
    code, _, stderr = rope_probe(
        capsys, "retrieval", reader, "--out", tmp_path / "ids", "--task", "key_value", "--window", 16, "--ruler"
    )
    assert code == 2
    assert "--ruler writes text, and key_value has none" in stderr
    assert not (tmp_path / "ids").exists()


def test_a_retrieval_that_is_refused_leaves_no_trials_but_those_that_were_there(checkpoint, tmp_path, capsys):
    asked = (broken(checkpoint, tmp_path, "nan"), *QUICK_TRIALS, "--out", tmp_path / "run")
    assert rope_probe(capsys, "retrieval", *asked)[0] == 2
    assert not list(tmp_path.glob("*.jsonl"))
    mine = tmp_path / "run.trials.jsonl"
    mine.write_text("my notes\n")
    code, _, stderr = rope_probe(capsys, "retrieval", checkpoint, *asked[1:])
    assert (code, stderr.count("\n")) == (2, 1)
    assert "line 1 is no trial" in stderr
    assert mine.read_text() == "my notes\n"


@pytest.mark.parametrize(("options", "named"), [
    ("--task passkey --window 90", "passkey needs a window"), ("--task passkey --distance 900", "900"),
    ("--task vt --task cwe --distance 64", "vt, cwe"), ("--task niah", "niah"),
    ("--task vt --window 600", "vt needs a window"), ("--window 300", "niah_single_1 needs a window"),
])  # fmt: skip
def test_bad_input_of_text_tasks_is_one_line(reader, tmp_path, capsys, options, named):
    window = [] if "--window" in options else ["--window", "800"]
    given = [*window, "--trials", "1", *options.split()]
    code, stdout, stderr = rope_probe(capsys, "retrieval", reader, "--out", tmp_path / "run", *given)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert named in stderr
    assert not (tmp_path / "run").exists()


def test_a_text_task_without_a_tokenizer_that_loads_is_bad_input(reader, checkpoint, tmp_path, capsys):
    broken_reader = shutil.copytree(reader, tmp_path / "broken")
    (broken_reader / "tokenizer_config.json").write_text("{")
    for folder, named in ((checkpoint, "has no tokenizer"), (broken_reader, "cannot load the tokenizer")):
        code, stdout, stderr = rope_probe(capsys, "retrieval", folder, "--task", "vt", "--out", tmp_path / "run")
        assert (code, stdout, stderr.count("\n")) == (2, "", 1)
        assert named in stderr


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "extended"
    zoo.llama(rope_parameters={"rope_type": "default", "rope_theta": 1e5}, max_position_embeddings=512).save_pretrained(
        folder, max_shard_size="10KB"
    )
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    weights = load_file(shard)
    save_file({name: x + 0.01 * torch.randn_like(x) for name, x in weights.items()}, shard, {"format": "pt"})
    return folder


def test_spans_writes_a_run_with_statistics_and_landmarks(checkpoint, extended, tmp_path, capsys):
    code, stdout, stderr = rope_probe(capsys, "spans", checkpoint, extended, "--out", tmp_path / "run", "--short", "16")
    assert code == 0, stderr
    assert stdout.splitlines()[-1] == str(tmp_path / "run")
    assert "The query spans that changed most" in stdout
    tables, manifest = read_run(tmp_path / "run")
    assert set(tables) == {"spans", "span_statistics", "landmarks"}
    frame = tables["spans"]
    pairs = frame[(frame["site"] == "blocks.0.attn.W_Q") & (frame["metric"] == "rel_change") & frame["pair"].notna()]
    assert len(pairs) == 16
    assert (pairs["wavelength_after"] >= pairs["wavelength"]).all()
    geometry = tables["landmarks"].set_index(["phase", "metric"])["value"]
    assert geometry["after", "rope_theta"] == 1e5
    assert tables["landmarks"].groupby("phase")["seq_len"].first().to_dict() == {
        "before": 16,
        "after": 512,
    }
    hashes = manifest["models"][str(extended)]["files_sha256"]
    assert len(hashes) > 1
    assert all(len(digest) == 64 for digest in hashes.values())


def test_spans_compares_states_if_asked(checkpoint, extended, tmp_path, capsys):
    code, _, _ = rope_probe(capsys, "spans", checkpoint, extended, "--out", tmp_path / "run", "--states", "--masked",
                            "--window", "32", "--document-length", "8")  # fmt: skip
    assert code == 0
    tables, manifest = read_run(tmp_path / "run")
    states = tables["span_states"]
    assert set(states["document"]) == {0, 1, 2, 3}
    assert (states["seq_len"] == 32).all()
    assert [read["masked"] for read in manifest["read"]["window"]] == [True]


def other(tmp_path, **changes):
    zoo.llama(**changes).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def stored_as(checkpoint, tmp_path, dtype):
    copy = shutil.copytree(checkpoint, tmp_path / "stored")
    shard = sorted(copy.glob("model-*.safetensors"))[1]
    save_file({name: x.to(dtype) for name, x in load_file(shard).items()}, shard, {"format": "pt"})
    return copy


BAD_SPANS = {
    "no checkpoint": (lambda c, t: [c, "/no/such/model"], "/no/such/model"),
    "missing shard": (lambda c, t: [c, broken(c, t, "missing")], "lacks 'model-00002-of"),
    "corrupt shard": (lambda c, t: [broken(c, t, "corrupt"), c], "is corrupt"),
    "NaN weights": (lambda c, t: [c, broken(c, t, "nan")], "tensor 'model.layers."),
    "quantised weights": (lambda c, t: [c, stored_as(c, t, torch.int8)], "is stored as I8, quantised"),
    "unknown layout": (lambda c, t: [gpt2(t), t / "gpt2"], "no rotary frequencies"),
    "another architecture": (lambda c, t: [c, gpt2(t)], "gpt2"),
    "other heads": (lambda c, t: [c, other(t, num_attention_heads=2)], "num_attention_heads is 4 before and 2 after"),
    "another width": (lambda c, t: [c, other(t, hidden_size=64)], "hidden_size is 32 before and 64 after"),
    "one checkpoint": (lambda c, t: [c], "'after'"),
    "a window for no states": (lambda c, t: [c, c, "--window", "64"], "need --states"),
    "a window of nothing": (lambda c, t: [c, c, "--long", "0"], "--long"),
    "broken documents": (lambda c, t: [c, c, "--states", "--window", "100"], "100"),
}


@pytest.mark.parametrize("case", BAD_SPANS)
def test_bad_input_to_spans_is_one_line_exit_code_2_and_nothing_written(case, checkpoint, tmp_path, capsys):
    arguments, named = BAD_SPANS[case]
    is_refused(capsys, tmp_path, "spans", arguments(checkpoint, tmp_path), named)


def test_report_draws_a_run(checkpoint, tmp_path, capsys):
    rope_probe(capsys, "trace", checkpoint, "--out", tmp_path / "run", "--window", "20", "--document-length", "10",
               "--shift", "2", "--shift", "4")  # fmt: skip
    code, stdout, _ = rope_probe(capsys, "report", tmp_path / "run", "--out", tmp_path / "gallery")
    assert code == 0
    assert stdout.strip() == str(tmp_path / "gallery" / "index.html")
    assert (tmp_path / "gallery" / "index.html").is_file()


def broken(checkpoint, tmp_path, how):
    copy = shutil.copytree(checkpoint, tmp_path / "broken")
    shard = sorted(copy.glob("model-*.safetensors"))[1]
    if how == "missing":
        shard.unlink()
    elif how == "nan":
        save_file(
            {name: torch.full_like(x, torch.nan) for name, x in load_file(shard).items()}, shard, {"format": "pt"}
        )
    else:
        shard.write_bytes(b"\0" * 100)
    return copy


def gpt2(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def documents(tmp_path, text):
    (tmp_path / "documents.txt").write_text(text)
    return tmp_path / "documents.txt"


BAD = {
    "path that does not exist": (lambda c, t: ["/no/such/model"], "/no/such/model"),
    "missing shard": (lambda c, t: [broken(c, t, "missing")], "model-00002-of"),
    "corrupt shard": (lambda c, t: [broken(c, t, "corrupt")], "corrupt"),
    "model without RoPE": (lambda c, t: [gpt2(t)], "gpt2"),
    "window longer than the tokens": (
        lambda c, t: [c, "--tokens", documents(t, "5 6 7\n8 9"), "--window", "6"],
        "window of 6 tokens is longer than the 5 tokens",
    ),
    "window of broken documents": (lambda c, t: [c, "--window", "100", "--document-length", "30"], "100"),
    "sweep with a pair": (lambda c, t: [c, "--sweep", "layer", "--pair", "0"], "--sweep"),
    "sweep of a layer that is not there": (lambda c, t: [c, "--sweep", "pair", "--layer", "2"], "layers 0 to 1"),
    "NaN shift": (lambda c, t: [c, "--shift", "nan"], "nan"),
    "infinite shift": (lambda c, t: [c, "--shift", "inf"], "inf"),
    "layer out of range": (lambda c, t: [c, "--layer", "2"], "layers 0 to 1"),
    "head out of range": (lambda c, t: [c, "--head", "9", "--side", "q"], "heads 0 to 3"),
    "pair out of range": (lambda c, t: [c, "--pair", "4"], "pairs 0 to 3"),
    "token outside the vocabulary": (lambda c, t: [c, "--document", "5,64", "--window", "4"], "ids run from 0 to 63"),
    "token that is no number": (lambda c, t: [c, "--document", "5,cat"], "cat"),
    "tokens file that is not there": (lambda c, t: [c, "--tokens", t / "absent.txt"], "absent.txt"),
    "two sources of tokens": (lambda c, t: [c, "--tokens", documents(t, "5"), "--document", "5"], "one of them"),
    "unknown option": (lambda c, t: [c, "--sidd", "q"], "--sidd"),
    "unknown side": (lambda c, t: [c, "--side", "v"], "'v'"),
    "unknown kernel": (lambda c, t: [c, "--attn", "quantum"], "quantum"),
    "kernel that is not installed": (lambda c, t: [c, "--attn", "flash_attention_2"], "flash_attention_2"),
    "dtype unknown": (lambda c, t: [c, "--dtype", "float7"], "float7"),
    "device unknown": (lambda c, t: [c, "--device", "abacus"], "abacus"),
    "dtype the device cannot do": (lambda c, t: [c, "--device", "meta"], "meta"),
    "empty document": (lambda c, t: [c, "--document", ""], "at least one token id"),
    "document of commas": (lambda c, t: [c, "--document", ",,"], "at least one token id"),
    "token past all bounds": (lambda c, t: [c, "--document", "9" * 30, "--window", "1"], "whole numbers"),
    "empty tokens file": (lambda c, t: [c, "--tokens", documents(t, "\n")], "documents.txt"),
    "folder of tokens": (lambda c, t: [c, "--tokens", t], "directory"),
    "window of nothing": (lambda c, t: [c, "--window", "0"], "--window"),
    "head that only queries have": (lambda c, t: [c, "--head", "3"], "key-value head 3"),
    "device of no name": (lambda c, t: [c, "--device", ""], "device"),
    "device of another world": (lambda c, t: [c, "--device", "hpu"], "hpu"),
    "seed past all bounds": (lambda c, t: [c, "--seed", "9" * 30], "--seed"),
    "checkpoint that is a file": (lambda c, t: [documents(t, "5")], "documents.txt"),
    "weights that are no numbers": (lambda c, t: [broken(c, t, "nan"), "--shift", "1"], "not finite"),
    "negative seed": (lambda c, t: [c, "--seed", "-1"], "greater than or equal to 0"),
    "missing argument": (lambda c, t: [], "model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(case, checkpoint, tmp_path, capsys):
    arguments, named = BAD[case]
    is_refused(capsys, tmp_path, "trace", arguments(checkpoint, tmp_path), named)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_gpu_that_is_not_there_is_bad_input(checkpoint, tmp_path, capsys):
    code, _, stderr = rope_probe(capsys, "trace", checkpoint, "--device", "cuda", "--out", tmp_path / "run")
    assert (code, stderr.count("\n")) == (2, 1)


def test_an_output_that_cannot_be_written_is_bad_input(checkpoint, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        code, _, stderr = rope_probe(capsys, "trace", checkpoint, "--out", out, "--shift", "1")
        assert (code, stderr.count("\n")) == (2, 1)
        assert "file" in stderr
    code, _, stderr = rope_probe(capsys, "report", tmp_path / "absent", "--out", tmp_path / "gallery")
    assert (code, stderr.count("\n")) == (2, 1)


def test_bad_input_is_one_line_in_a_process_of_its_own(checkpoint, tmp_path):
    """Nothing that is imported or logged adds a line: the whole stderr of a real process."""
    command = [sys.executable, "-c", "from rope_probe.cli import main; main()", "trace"]
    for arguments in ([broken(checkpoint, tmp_path, "missing")], ["tiny/absent-model"], [gpt2(tmp_path)]):
        done = subprocess.run(
            [*command, *map(str, arguments), "--out", tmp_path / "run"],
            capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "80"},
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith("error: ")


def test_help_names_the_commands(capsys):
    code, stdout, _ = rope_probe(capsys, "--help")
    assert code == 0
    assert "trace" in stdout
    assert "report" in stdout


def in_a_process(tmp_path, *arguments, **streams):
    """The command in a process of its own: exit code and stderr."""
    command = [sys.executable, "-m", "rope_probe", *map(str, arguments)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path, **streams)
    return done.returncode, done.stderr


QUICK = ("--window", "20", "--document-length", "10", "--shift", "2", "--no-control")


def test_a_pipe_that_is_closed_loses_no_run(checkpoint, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    code, stderr = in_a_process(tmp_path, "trace", checkpoint, "--out", "run", *QUICK, "--control", stdout=writing)
    os.close(writing)
    assert code == 0
    assert "error" not in stderr
    assert read_run(tmp_path / "run")[1]["status"] == "complete"


def test_a_full_stdout_loses_no_run(checkpoint, tmp_path):
    with open("/dev/full", "w") as full:
        code, stderr = in_a_process(tmp_path, "trace", checkpoint, "--out", "run", *QUICK, "--control", stdout=full)
    assert code == 2
    assert (
        stderr.splitlines(keepends=True)[-1]
        == "error: cannot print to stdout (No space left on device); the result is whole, at run\n"
    )
    assert read_run(tmp_path / "run")[1]["status"] == "complete"


@pytest.mark.parametrize("after_s", [0.1, 1.0, 2.0, 4.0])
def test_ctrl_c_while_things_are_imported_ends_without_a_traceback(checkpoint, tmp_path, after_s):
    """The seconds count from our first import on: Python's own start ends as Python has it."""
    arguments = ["-X", "importtime", "-m", "rope_probe", "trace", str(checkpoint), "--out", str(tmp_path / "run")]
    imports = tmp_path / "imports"
    with imports.open("w") as stderr, subprocess.Popen([sys.executable, *arguments], stderr=stderr) as process:
        while "rope_probe.names" not in imports.read_text():
            time.sleep(0.01)
        time.sleep(after_s)
        process.send_signal(signal.SIGINT)
    assert process.returncode in (0, 130, -signal.SIGINT)  # a shell tells the last two alike
    assert "Traceback" not in imports.read_text()


def without_memory(checkpoint, folder):
    """A trace whose scores, [T, T] a head, do not fit in what is left of the address space."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**30, in_use + 2**30))
    sys.stdout = sys.stderr = (folder / "told").open("w")
    sys.argv = ["rope-probe", "trace", str(checkpoint), "--out", str(folder / "run"), "--attn", "eager"]
    sys.argv += ["--window", "20000", "--document-length", "100", "--shift", "1", "--no-control"]
    cli.main()


def test_running_out_of_memory_is_one_line_that_says_what_needs_less(checkpoint, tmp_path):
    child = multiprocessing.get_context("forkserver").Process(target=without_memory, args=(checkpoint, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == 2
    (told,) = (tmp_path / "told").read_text().splitlines()
    assert told.startswith("error: out of memory when asked for ")
    assert "a shorter --window" in told
    assert not (tmp_path / "run").exists()


def test_memory_of_a_device_is_told_alike(monkeypatch, capsys):
    def run_out(standalone_mode):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
        )

    monkeypatch.setattr(cli, "app", run_out)
    code, _, stderr = rope_probe(capsys, "distill", "config.toml")
    assert code == 2
    assert stderr.startswith("error: out of memory when asked for 2.00 GiB; a smaller batch_tokens")


def test_a_path_is_a_path_and_not_asked_of_the_hub(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(weight_files, "cached_file", None)  # what asks the hub
    monkeypatch.setattr(checkpoints.AutoConfig, "from_pretrained", None)
    for model in ("runs/teacher-9", "./teacher-9", "../x/y", "/nowhere", "~/x", ".", "runs"):
        code, _, stderr = rope_probe(capsys, "trace", model, "--out", tmp_path / "run")
        assert (code, stderr.count("\n")) == (2, 1)
        if model not in (".", "runs"):
            assert f"no folder at '{model}'" in stderr
    assert weight_files.is_path("runs/teacher-9")
    assert not weight_files.is_path("org/teacher-9")
    assert not weight_files.is_path("gpt2")


def test_a_window_with_nothing_to_measure_is_bad_input(checkpoint, tmp_path, capsys):
    code, _, stderr = rope_probe(capsys, "retrieval", checkpoint, "--window", "8", "--keys", "20", "--values", "30",
                                 "--out", tmp_path / "run")  # fmt: skip
    assert (code, stderr.count("\n")) == (2, 1)
    assert "no distance to measure key_value at" in stderr
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_told_by_retrieval(checkpoint, tmp_path, capsys):
    options = "--window 32 --distance 4 --trials 2 --keys 20 --values 30"
    code, _, stderr = rope_probe(capsys, "retrieval", broken(checkpoint, tmp_path, "nan"), "--out", tmp_path / "run",
                                 *options.split())  # fmt: skip
    assert code == 2
    assert "not finite" in stderr


def test_an_older_run_is_replaced_only_with_overwrite_and_by_its_own_command(checkpoint, tmp_path, capsys):
    run = tmp_path / "run"
    assert rope_probe(capsys, "trace", checkpoint, "--out", run, *QUICK)[0] == 0
    first = read_run(run)[1]["run_id"]
    for command, named in (("trace", "--overwrite replaces it"), ("spans", "not a spans run")):
        models = [checkpoint] * (2 if command == "spans" else 1)
        code, _, stderr = rope_probe(capsys, command, *models, "--out", run)
        assert (code, stderr.count("\n")) == (2, 1)
        assert named in stderr
    assert read_run(run)[1]["run_id"] == first
    assert rope_probe(capsys, "trace", checkpoint, "--out", run, *QUICK, "--overwrite")[0] == 0
    assert read_run(run)[1]["run_id"] != first
    assert "overwrite" not in read_run(run)[1]["config"]


def test_a_model_inside_the_output_is_never_deleted(tmp_path, capsys):
    run = tmp_path / "RUN"
    shutil.copytree(checkpoints.save(zoo.llama(), tmp_path / "saved"), run / "checkpoint")
    (run / "notes.txt").write_text("mine")
    for command in ("trace", "retrieval", "spans"):
        models = [run / "checkpoint"] * (2 if command == "spans" else 1)
        for more in ([], ["--overwrite"]):
            code, _, stderr = rope_probe(capsys, command, *models, "--out", run, *more)
            assert (code, stderr.count("\n")) == (2, 1)
            assert "lies inside" in stderr
    assert (run / "notes.txt").read_text() == "mine"
    assert checkpoints.load(run / "checkpoint")


def test_help_loads_nothing_heavy():
    script = "import sys, rope_probe.cli; print(*{'torch', 'transformers', 'pandas', 'plotly'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert all(getattr(rope_probe_package, name) is not None for name in rope_probe_package.__all__)


# What a window is made of


def read_by(capsys, model, out, *options):
    """The hash of the tokens that trace read."""
    code, _, stderr = rope_probe(capsys, "trace", model, "--out", out, *QUICK, *options)
    assert code == 0, stderr
    (read,) = read_run(out)[1]["read"]["window"]
    return read["tokens_sha256"]


def text_hash(**options):
    window = text_window(ByT5Tokenizer(extra_ids=0), 20, document_length=10, **options)
    return hash_tokens(window.tokens)


WORDS = "The quick brown fox jumps over the lazy dog, and the dog does not so much as open an eye."


def test_natural_text_is_read_by_default_where_there_is_a_tokenizer(reader, tmp_path, capsys):
    assert read_by(capsys, reader, tmp_path / "run") == text_hash()
    assert read_by(capsys, reader, tmp_path / "other", "--seed", "1") == text_hash(seed=1) != text_hash()


def test_a_file_of_text_is_read_if_given(reader, tmp_path, capsys):
    (tmp_path / "words.txt").write_text(WORDS)
    assert read_by(capsys, reader, tmp_path / "run", "--text", tmp_path / "words.txt") == text_hash(text=WORDS)


def test_packed_text_is_different_documents(reader, tmp_path, capsys):
    (tmp_path / "words.txt").write_text(WORDS)
    given = ("--text", tmp_path / "words.txt", "--packed")
    assert read_by(capsys, reader, tmp_path / "run", *given) == text_hash(text=WORDS, packed=True)
    assert read_by(capsys, reader, tmp_path / "embedded", "--packed") == text_hash(packed=True) != text_hash()


def test_random_ids_are_read_if_asked_for_or_where_there_is_no_tokenizer(reader, checkpoint, tmp_path, capsys):
    ids = torch.randint(259, (10,), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    assert read_by(capsys, reader, tmp_path / "run", "--random") == hash_tokens(ids)
    ids = torch.randint(64, (10,), generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    assert read_by(capsys, checkpoint, tmp_path / "bare") == hash_tokens(ids)
    assert read_by(capsys, checkpoint, tmp_path / "asked", "--random") == hash_tokens(ids)


def binary(tmp_path):
    (tmp_path / "binary.dat").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    return tmp_path / "binary.dat"


def torn_gguf(tmp_path):
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + (9).to_bytes(8, "little"))
    return tmp_path / "torn.gguf"


BAD_SOURCES = {
    "binary text": (lambda r, c, t: [r, "--text", binary(t)], "is no text: byte 0 is not UTF-8"),
    "text that is not there": (lambda r, c, t: [r, "--text", t / "absent"], "cannot read the text"),
    "empty text": (lambda r, c, t: [r, "--text", documents(t, "")], "must have 64 tokens or more, but it has 0"),
    "text without a tokenizer": (lambda r, c, t: [c, "--text", documents(t, WORDS)], "--random reads random token ids"),
    "packed without a tokenizer": (lambda r, c, t: [c, "--packed"], "text needs a tokenizer"),
    "text and random ids": (lambda r, c, t: [r, "--text", documents(t, WORDS), "--random"], "--text and --random both"),
    "text and tokens": (
        lambda r, c, t: [r, "--text", documents(t, WORDS), "--tokens", documents(t, "5")],
        "--text and --tokens both",
    ),
    "packed random ids": (lambda r, c, t: [r, "--random", "--packed"], "--packed packs text, but --random is no text"),
    "torn .gguf": (lambda r, c, t: [torn_gguf(t)], "torn.gguf' is truncated or corrupt"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_sources_are_one_line_exit_code_2_and_nothing_written(case, reader, checkpoint, tmp_path, capsys):
    arguments, named = BAD_SOURCES[case]
    given = arguments(reader, checkpoint, tmp_path)
    is_refused(capsys, tmp_path, "trace", given, named)
    is_refused(capsys, tmp_path, "heads", given, named)


# Sweeps, and what is printed of them


def test_a_sweep_is_narrowed_to_the_layers_and_heads_named(checkpoint, tmp_path, capsys):
    options = "--sweep head --layer 1 --window 20 --document-length 10 --no-control"
    assert rope_probe(capsys, "trace", checkpoint, "--out", tmp_path / "run", *options.split())[0] == 0
    frame = read_run(tmp_path / "run")[0]["deltas"]
    assert set(frame["inject_layer"]) == {1}
    assert frame.groupby("side")["head"].nunique().to_dict() == {"k": 2, "q": 4}


def test_what_was_found_is_printed_without_the_control_too(checkpoint, tmp_path, capsys):
    code, stdout, _ = rope_probe(capsys, "trace", checkpoint, "--out", tmp_path / "run", *QUICK)
    assert code == 0
    lines = stdout.splitlines()
    assert lines[0] == "dose: KL of the logits, nats, mean over documents"
    assert lines[1].split() == ["perturbation", "KL"]
    deltas = read_run(tmp_path / "run")[0]["deltas"].query("metric == 'kl_nats'")
    printed = [float(line.split()[-1]) for line in lines[2:-1]]
    assert printed == pytest.approx(deltas.groupby("side", sort=False)["value"].mean().tolist(), rel=1e-2)


def test_a_deep_model_is_told_in_a_page(tmp_path, capsys):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    zoo.llama(num_hidden_layers=30, **sizes).save_pretrained(tmp_path / "deep")
    code, stdout, _ = rope_probe(capsys, "trace", tmp_path / "deep", "--out", tmp_path / "run", "--window", "16",
                                 "--document-length", "8", "--no-control")  # fmt: skip
    assert code == 0
    assert len(read_run(tmp_path / "run")[0]["deltas"]["inject_layer"].dropna().unique()) == 30
    assert len(stdout.splitlines()) <= 60
    assert "the 10 largest of 60 on each side" in stdout


# Heads


def test_heads_writes_what_each_head_does_and_prints_the_largest(reader, tmp_path, capsys):
    code, stdout, _ = rope_probe(capsys, "heads", reader, "--out", tmp_path / "run", "--window", "40",
                                 "--document-length", "20")  # fmt: skip
    assert code == 0
    assert stdout.splitlines()[-1] == str(tmp_path / "run")
    assert "previous_token, share of attention to" in stdout
    tables, manifest = read_run(tmp_path / "run")
    assert set(tables) == {"heads"}
    assert set(zip(tables["heads"]["layer"], tables["heads"]["head"], strict=True)) == {
        (layer, head) for layer in (0, 1) for head in range(4)
    }
    assert {"previous_token", "induction", "entropy", "sink"} <= set(tables["heads"]["metric"])
    assert "retrieval_head" not in set(tables["heads"]["metric"])
    assert manifest["models"][str(reader)]["attention_kernel"] == "sdpa"
    assert len(manifest["read"]["window"]) == 1


def test_heads_of_one_layer_and_their_pairs_if_asked(checkpoint, tmp_path, capsys):
    code, _, _ = rope_probe(capsys, "heads", checkpoint, "--out", tmp_path / "run", "--window", "40",
                            "--document-length", "20", "--layer", "1", "--pairs")  # fmt: skip
    assert code == 0
    tables = read_run(tmp_path / "run")[0]
    assert set(tables) == {"heads", "head_pairs"}
    assert set(tables["heads"]["layer"]) == {1}
    assert set(tables["head_pairs"]["layer"]) == {1}
    assert set(tables["head_pairs"]["pair"].dropna()) == set(range(4))


def test_heads_score_retrieval_heads_on_trials(reader, tmp_path, capsys):
    code, _, _ = rope_probe(capsys, "heads", reader, "--out", tmp_path / "run", "--window", "420",
                                 "--document-length", "42", "--trials", "2")  # fmt: skip
    assert code == 0
    copied = read_run(tmp_path / "run")[0]["heads"].query("metric == 'retrieval_head'")
    assert len(copied) == 2 * 4
    assert set(copied["trials"]) == {2}
    assert set(copied["distance"]) == {210}
    assert copied["value"].between(0, 1).all()


@pytest.mark.parametrize(("options", "named"), [
    ("--distance 16", "--distance is that of --trials"), ("--trials -1", "--trials"), ("--layer 2", "layers are 0..1"),
    ("--window 41", "whole documents of 20 tokens"), ("--trials 2", "passkey needs a window"),
    ("--document 5,6", "--document"),
])  # fmt: skip
def test_bad_input_to_heads_is_one_line(reader, tmp_path, capsys, options, named):
    given = [reader, "--window", "40", "--document-length", "20", *options.split()]
    is_refused(capsys, tmp_path, "heads", given, named)


def test_trials_of_heads_need_a_tokenizer(checkpoint, tmp_path, capsys):
    is_refused(capsys, tmp_path, "heads", [checkpoint, "--trials", "2"], "has no tokenizer")
