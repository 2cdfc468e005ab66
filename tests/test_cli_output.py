"""What is printed: the bare call, --help, tables on a terminal and elsewhere, JSON."""

import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from transformers import ByT5Tokenizer

from experiments import reproduce
from rope_probe import cli
from rope_probe.cli import failures, options, output
from rope_probe.models.pretrained import MODELS
from rope_probe.names import MIRRORS, PRETRAINED, SWEEPS
from rope_probe.runs.provenance import hash_tokens
from rope_probe.runs.results import read_run
from rope_probe.runs.verdicts import Section
from rope_probe.windows.packing import pack
from tests import zoo
from tests.test_cli import is_refused, rope_probe

COMMANDS = {name: module for modules in cli.QUESTIONS.values() for name, module in modules.items()}
QUICK = ("--window", "20", "--document-length", "10", "--no-control")
ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A checkpoint with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("model") / "reader"
    zoo.llama(vocab_size=259).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


class Terminal(io.StringIO):
    """A stdout that says it is a terminal; what is printed is in it."""

    encoding = "utf-8"

    def isatty(self):
        return True


def on_a_terminal(monkeypatch, *parts):
    """What is printed of some parts on a terminal of 80 columns."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Terminal())
        output.show("runs/x", parts, command="spans")
        return sys.stdout.getvalue()


# The bare call, and help


def test_the_bare_call_shows_each_question_with_a_command_to_copy(capsys, narrow):
    code, stdout, stderr = rope_probe(capsys)
    assert (code, stderr) == (0, "")
    assert ESCAPE not in stdout
    for question, modules in cli.QUESTIONS.items():
        assert question in stdout
        for module in modules.values():
            assert f"  {module.EXAMPLES[0]}\n" in stdout
    assert len(cli.QUESTIONS) >= 4
    assert max(map(len, stdout.splitlines())) <= 80


def test_help_of_the_whole_groups_commands_by_question(capsys, narrow):
    code, stdout, _ = rope_probe(capsys, "--help")
    assert code == 0
    assert all(question in stdout for question in cli.QUESTIONS)
    assert "--install-completion" in stdout
    assert "<" not in stdout  # no name of a Python type


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_is_grouped_has_its_examples_whole_and_fits_80_columns(capsys, narrow, command):
    code, stdout, _ = rope_probe(capsys, command, "--help")
    assert code == 0
    assert ESCAPE not in stdout
    lines = stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in stdout
    assert not re.search(r"<(str|bool|path|list)", stdout)
    for example in COMMANDS[command].EXAMPLES:
        assert f" {example}" in map(str.rstrip, lines)
    groups = re.findall(r"─ ([A-Z][\w ]+) ─", stdout)
    assert {"Arguments", "Output", "Machine"} <= set(groups)
    assert "Options" not in groups


@pytest.mark.parametrize(("command", "example"), [(name, one) for name, of in COMMANDS.items() for one in of.EXAMPLES])
def test_examples_are_commands_that_parse(command, example):
    words = example.split()
    assert words[:2] == ["rope-probe", command]
    typed = cli.typer.main.get_command(cli.app)
    parsed = typed.commands[command].make_context(command, words[2:])
    assert parsed.params


def complete(words):
    """What bash is offered for the last word of a command line."""
    script = "from rope_probe.cli import main; import sys; sys.argv[0] = 'rope-probe'; main()"
    environment = {"_ROPE_PROBE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    return done.stdout.split()


def test_a_shell_completes_commands_models_sweeps_tasks_and_mirrors():
    assert set(complete("rope-probe ")) == set(COMMANDS)
    assert complete("rope-probe trace smol") == ["smollm2-135m"]
    assert set(complete("rope-probe trace m --sweep ")) == set(SWEEPS)
    assert complete("rope-probe retrieval m --task niah_s") == ["niah_single_1"]
    assert set(complete("rope-probe distill c --mirror ")) == set(MIRRORS)


def test_names_of_models_complete_and_so_do_folders_and_gguf_files(tmp_path, monkeypatch):
    assert set(PRETRAINED) == set(MODELS)
    monkeypatch.chdir(tmp_path)
    for name in ("small", "runs"):
        (tmp_path / name).mkdir()
    for name in ("small.gguf", "small.txt"):
        (tmp_path / name).touch()
    assert options.complete_model("sm") == ["smollm2-135m", "small/", "small.gguf"]
    assert options.complete_model("nowhere/x") == []
    (tmp_path / "runs" / "mine").mkdir()
    assert options.complete_model("runs/") == ["runs/mine/"]


def test_every_command_that_runs_a_model_says_what_needs_less_memory():
    assert set(failures._NEEDS_LESS_MEMORY) == set(COMMANDS) - {"report"}


# Tables


FRAME = pd.DataFrame(
    {"site": ["[bold]a[/]", "bb"], "head": [1, 12], "value": [0.123456, np.nan], "seen": pd.array([1, pd.NA], "Int64")}
)


def test_elsewhere_tables_are_aligned_text(capsys):
    output.show("runs/x", [output.Table("t", "A title", FRAME, names={"value": "KL"})], command="trace")
    printed = capsys.readouterr().out
    assert printed == (
        "A title\n"
        "site        head     KL  seen\n"
        "[bold]a[/]     1  0.123     1\n"
        "bb            12      -     -\n"
        "runs/x\n"
    )  # fmt: skip


def test_on_a_terminal_tables_are_rich_and_names_are_no_markup(monkeypatch, narrow):
    printed = on_a_terminal(monkeypatch, output.Table("t", "A title", FRAME))
    assert ESCAPE in printed
    assert "━" in printed or "─" in printed
    assert "[bold]a[/]" in printed
    assert printed.endswith("runs/x\n")


def test_a_table_wider_than_80_columns_is_cut_into_several_and_loses_no_digit(monkeypatch, narrow):
    wide = pd.DataFrame({"layer": [10, 11], **{f"some_metric_{i}": [i + 0.123456, i / 1e7] for i in range(9)}})
    printed = on_a_terminal(monkeypatch, output.Table("t", "Wide", wide, "{:.6g}"))
    lines = re.sub(r"\x1b\[[\d;]*m", "", printed).splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    assert all(f"{value:.6g}" in words for value in wide.drop(columns="layer").to_numpy().ravel())
    assert words.count("layer") >= 2
    assert not any("…" in word for word in words)


def test_long_text_is_written_in_several_lines_beside_its_numbers(monkeypatch, narrow):
    claims = pd.DataFrame({"prediction": [1], "claim": ["every word of a long claim stands here " * 3], "n": [3]})
    printed = on_a_terminal(monkeypatch, output.Table("t", "Claims", claims))
    lines = re.sub(r"\x1b\[[\d;]*m", "", printed).splitlines()
    assert max(map(len, lines)) <= 80
    (header,) = [line for line in lines if "prediction" in line]
    assert header.split() == ["prediction", "claim", "n"]


def test_tables_of_an_experiment_have_their_index_as_columns():
    cells = pd.MultiIndex.from_product([["kl"], ["q", "k"]], names=["metric", "side"])
    of_two = pd.DataFrame(
        [[0.12345678, np.nan]], pd.MultiIndex.from_tuples([(2, "base")], names=["seed", "arm"]), cells
    )
    plain = pd.DataFrame({"value": [2.0]})
    text = reproduce.as_text("name", Section(pd.DataFrame({"claim": ["c"]}), {"two": of_two, "plain": plain}, "Why?"))
    assert text == (
        "\nname: Why?\n\n"
        "two\nseed  arm     kl q  kl k\n   2  base  0.1235  -\n\n"
        "plain\nvalue\n    2\n\n"
        "predictions, see PREDICTIONS of experiments/name.py\nclaim\nc"
    )


def test_what_a_stream_cannot_write_is_written_otherwise(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    output.show("runs/x", [output.Fact("a", "1 \u2212 cosine", 1)], command="drift")
    assert stream.buffer.getvalue() == b"1 \\u2212 cosine\nruns/x\n"


# JSON


def printed_json(capsys, *arguments):
    code, stdout, stderr = rope_probe(capsys, *arguments, "--json")
    assert code == 0, stderr
    assert stdout.count("\n") == 1
    return json.loads(stdout)


def test_json_of_trace_is_its_run_and_what_it_prints(reader, tmp_path, capsys):
    told = printed_json(capsys, "trace", reader, "--out", tmp_path / "run", *QUICK, "--shift", "1", "--turn", "2")
    assert (told["command"], told["run"]) == ("trace", str(tmp_path / "run"))
    assert {row["arm"] for row in told["logit_kl_nats"]} == {"dose", "turn"}
    deltas = read_run(tmp_path / "run")[0]["deltas"].query("metric == 'kl_nats'")
    means = deltas.groupby(["arm", "perturbation"])["value"].mean()
    rows = {(row["arm"], row["perturbation"]): row["value"] for row in told["logit_kl_nats"]}
    assert rows == pytest.approx(means.to_dict())


def test_json_of_the_other_commands(reader, tmp_path, capsys):
    read = ("--window", "40", "--document-length", "20")
    heads = printed_json(capsys, "heads", reader, "--out", tmp_path / "heads", *read)
    assert {"metric", "layer", "head", "value"} == set(heads["largest"][0])
    drift = printed_json(capsys, "drift", reader, "--theta", "1e6", "--out", tmp_path / "drift", *read)
    assert len(drift["by_layer"]) == 2
    assert drift["final_cosine_distance"] > 0
    assert len(drift["largest_attention_kl_layers"]) == 2
    spans = printed_json(capsys, "spans", reader, reader, "--out", tmp_path / "spans")
    assert {"rel_change_by_layer", "spread", "landmarks", "largest"} <= set(spans)
    trials = ("--task", "key_value", "--keys", "9", "--values", "9", "--window", "32", "--trials", "2")
    retrieval = printed_json(capsys, "retrieval", reader, "--out", tmp_path / "retrieval", *trials)
    assert {row["metric"] for row in retrieval["retrieval"]} == {"accuracy", "answer_logprob_nats"}
    report = printed_json(capsys, "report", tmp_path / "drift", "--out", tmp_path / "gallery")
    assert report == {"command": "report", "gallery": str(tmp_path / "gallery" / "index.html")}


def test_trace_with_lens_reads_every_layer(reader, tmp_path, capsys):
    told = printed_json(capsys, "trace", reader, "--out", tmp_path / "run", *QUICK, "--shift", "4", "--lens")
    deltas = read_run(tmp_path / "run")[0]["deltas"]
    rows = deltas[(deltas["metric"] == "kl_nats") & (deltas["side"] == "q")]
    by_site = rows.groupby("site")["value"].mean()
    assert set(by_site.index) == {"blocks.0.lens", "blocks.1.lens", "logits"}
    assert by_site["blocks.1.lens"] == pytest.approx(by_site["logits"], rel=1e-3)
    assert by_site["blocks.0.lens"] > 0
    (printed,) = [row for row in told["logit_kl_nats"] if "'q'" in row["perturbation"]]
    assert printed["value"] == pytest.approx(by_site["logits"])  # the table holds no lens


def test_heads_with_massive_tells_the_longest_pairs(reader, tmp_path, capsys):
    read = ("--window", "40", "--document-length", "20", "--layer", "1")
    told = printed_json(capsys, "heads", reader, "--out", tmp_path / "run", *read, "--massive")
    frame = read_run(tmp_path / "run")[0]["massive_values"]
    assert set(frame["layer"]) == {1}
    ratios = frame[(frame["metric"] == "ratio") & frame["pair"].notna()]
    for states in "qkv":
        shown = [row["value"] for row in told["massive"] if row["states"] == states]
        assert shown == pytest.approx(ratios[ratios["states"] == states]["value"].nlargest(5).tolist())
    assert rope_probe(capsys, "heads", reader, "--out", tmp_path / "plain", *read)[0] == 0
    assert "massive_values" not in read_run(tmp_path / "plain")[0]


MAP = ("--task", "key_value", "--keys", "9", "--values", "9", "--trials", "2", "--map")


def test_a_map_of_retrieval_has_every_distance_in_every_window_with_room(reader, tmp_path, capsys):
    given = (*MAP, "--window", "32", "--window", "16", "--distance", "8", "--distance", "16")
    told = printed_json(capsys, "retrieval", reader, "--out", tmp_path / "run", *given)
    tables, manifest = read_run(tmp_path / "run")
    cells = set(tables["retrieval"][["seq_len", "distance"]].itertuples(index=False, name=None))
    assert cells == {(16, 8), (32, 8), (32, 16)}
    assert {(row["seq_len"], row["distance"]) for row in told["retrieval"]} == cells
    assert manifest["config"]["window"] == [16, 32]
    whole = printed_json(capsys, "retrieval", reader, "--out", tmp_path / "whole", *MAP, "--window", "32")
    assert {row["distance"] for row in whole["retrieval"]} == {8, 16}


def test_temperature_acts_while_retrieval_is_measured(reader, tmp_path, capsys):
    given = (*MAP[:-1], "--window", "32", "--distance", "8")
    asked = {"none": (), "one": ("--temperature", "1"), "flat": ("--temperature", "0")}
    asked["log_n"] = ("--temperature", "log_n", "--reference", "4")
    values, told = {}, {}
    for name, added in asked.items():
        rows = printed_json(capsys, "retrieval", reader, "--out", tmp_path / name, *given, *added)["retrieval"]
        values[name] = next(row["value"] for row in rows if row["metric"] == "answer_logprob_nats")
        told[name] = read_run(tmp_path / name)[0]["retrieval"]["perturbation"].fillna("").unique().tolist()
    assert values["one"] == pytest.approx(values["none"], rel=1e-5)
    assert len({round(values[name], 7) for name in ("none", "flat", "log_n")}) == 3
    assert told["none"] == [""]
    assert "log_n" in told["log_n"][0]


@pytest.mark.parametrize(("options", "named"), [
    (("--window", "32", "--window", "16"), "--map"), (("--map", "--task", "fwe"), "needs distances"),
    (("--temperature", "warm"), "'warm'"), (("--temperature", "log_n"), "reference"),
    (("--reference", "64"), "--temperature log_n"), (("--temperature=-1",), "0 or more"),
])  # fmt: skip
def test_bad_maps_and_temperatures_are_one_line(reader, tmp_path, capsys, options, named):
    is_refused(capsys, tmp_path, "retrieval", [reader, *options], named)


def test_bad_input_with_json_is_a_line_on_stderr_and_nothing_on_stdout(reader, tmp_path, capsys):
    is_refused(capsys, tmp_path, "trace", [reader, "--json", "--layer", "9"], "layers 0 to 1")


def test_json_has_no_number_that_is_none(capsys):
    frame = pd.DataFrame({"value": [np.nan, np.inf, 1.5], "n": np.array([1, 2, 3])})
    output.show("x", [output.Table("t", "", frame)], command="trace", as_json=True)
    rows = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["t"]
    assert rows == [{"value": None, "n": 1}, {"value": "inf", "n": 2}, {"value": 1.5, "n": 3}]


# What trace perturbs


def traced(capsys, model, out, *arguments):
    code, _, stderr = rope_probe(capsys, "trace", model, "--out", out, *QUICK, *arguments)
    assert code == 0, stderr
    return read_run(out)[0]["deltas"]


def test_every_kind_is_reached_by_an_option(reader, tmp_path, capsys):
    options = "--shift 2 --jitter 3 --theta 5e4 --turn 1 --freeze 0 --offset 7 --temperature 1.5 --side k --pair 1"
    frame = traced(capsys, reader, tmp_path / "run", *options.split(), "--seed", "5")
    told = frame.groupby("arm")["perturbation"].unique().map(list).to_dict()
    assert told == {
        "dose": ["PositionShift(side='k', tokens=2.0, pairs=[1])"],
        "jitter": ["PositionJitter(side='k', tokens=3.0, seed=5, pairs=[1])"],
        "theta": ["ThetaSwap(side='k', theta=50000.0, pairs=[1])"],
        "turn": ["PairTurn(side='k', radians=1.0, pairs=[1])"],
        "freeze": ["PairFreeze(side='k', pairs=[1], at=0.0)"],
        "offset": ["DocumentOffset(documents=(0,), tokens=7.0, side='k', pairs=[1])"],
        "temperature": ["AttentionTemperature(factor=1.5, side='k', pairs=[1])"],
    }


def test_kinds_have_sides_of_their_own_where_none_is_named(reader, tmp_path, capsys):
    options = "--turn 1 --theta 5e4 --offset 7 --offset-document 1 --temperature 1.5"
    frame = traced(capsys, reader, tmp_path / "run", *options.split())
    sides = frame.groupby("arm")["side"].unique().map(set).to_dict()
    assert sides == {"turn": {"q", "k", "qk"}, "theta": {"qk"}, "offset": {"qk"}, "temperature": {"q"}}
    assert any("documents=(1,)" in told for told in frame["perturbation"].unique())


def mine(tmp_path, text='kind = "freeze"\nside = "q"\npairs = [2, 3]\narm = "slow"'):
    (tmp_path / "mine.toml").write_text(f"[[perturbations]]\n{text}\n")
    return tmp_path / "mine.toml"


def test_a_file_of_perturbations_is_traced_alone_or_beside_others(reader, tmp_path, capsys):
    frame = traced(capsys, reader, tmp_path / "alone", "--perturbations", mine(tmp_path))
    assert set(frame["arm"]) == {"slow"}
    assert read_run(tmp_path / "alone")[1]["config"]["perturbations"] == {
        "slow": ["PairFreeze(side='q', pairs=(2, 3), at=0.0)"]
    }
    beside = ("--sweep", "layer", "--layer", "1", "--perturbations", mine(tmp_path))
    assert set(traced(capsys, reader, tmp_path / "beside", *beside)["arm"]) == {"slow", "layer"}


@pytest.mark.parametrize(("arguments", "named"), [
    (lambda t: ["--perturbations", mine(t), "--layer", "1"], "--layer narrow what options ask for"),
    (lambda t: ["--perturbations", mine(t, 'kind = "shift"')], "perturbations.0.side: it is missing"),
    (lambda t: ["--perturbations", t / "absent.toml"], "absent.toml"),
    (lambda t: ["--perturbations", mine(t, 'kind = "turn"\nside = "q"\nradians = 1\nlayers = 7')], "layers 0 to 1"),
    (lambda t: ["--sweep", "dose", "--turn", "1"], "leave out --turn"),
    (lambda t: ["--offset-document", "1"], "--offset-document says which documents --offset moves"),
    (lambda t: ["--offset", "4", "--offset-document", "5"], "document"),
    (lambda t: ["--temperature", "-1"], "factor must be 0 or more"),
    (lambda t: ["--freeze", "nan"], "at must be a finite number"),
    (lambda t: ["--theta", "0"], "theta"),
])  # fmt: skip
def test_bad_perturbations_are_one_line(reader, tmp_path, capsys, arguments, named):
    given = arguments(tmp_path)
    is_refused(capsys, tmp_path, "trace", [reader, *QUICK, *given], named)


# Text where token ids were wanted


def read_by(capsys, model, out, *arguments):
    code, _, stderr = rope_probe(capsys, "trace", model, "--out", out, "--shift", "1", "--no-control", *arguments)
    assert code == 0, stderr
    (read,) = read_run(out)[1]["read"]["window"]
    return read["tokens_sha256"]


def bytes_of(text):
    return ByT5Tokenizer(extra_ids=0)(text, add_special_tokens=False).input_ids


def test_tokens_takes_documents_as_text_or_as_ids(reader, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("1984 was a year of text.\n\nSo was the next, 1985.\n")
    (tmp_path / "ids.txt").write_text("5 6 7 8\n9 10 11\n")
    documents = [bytes_of("1984 was a year of text."), bytes_of("So was the next, 1985.")]
    as_text = read_by(capsys, reader, tmp_path / "a", "--tokens", tmp_path / "text.txt")
    assert as_text == hash_tokens(pack(documents, sum(map(len, documents))).tokens)
    as_ids = read_by(capsys, reader, tmp_path / "b", "--tokens", tmp_path / "ids.txt")
    assert as_ids == hash_tokens(pack([[5, 6, 7, 8], [9, 10, 11]], 7).tokens)


def test_a_document_is_text_or_ids(reader, tmp_path, capsys):
    as_text = read_by(capsys, reader, tmp_path / "a", "--document", "a cat", "--window", "10")
    assert as_text == hash_tokens(pack([bytes_of("a cat")] * 2, 10).tokens)
    as_ids = read_by(capsys, reader, tmp_path / "b", "--document", "5,6", "--window", "4")
    assert as_ids == hash_tokens(pack([[5, 6]] * 2, 4).tokens)


@pytest.mark.parametrize(("content", "named"), [
    ("5 6 7\n8 cat", "line 2: token ids are whole numbers, but 'cat' is not"),
    ("5,6,7", "token ids are whole numbers"), ("5 6.5", "token ids are whole numbers"), ("", "holds no documents"),
])  # fmt: skip
def test_a_slip_in_a_list_of_ids_is_not_read_as_text(reader, tmp_path, capsys, content, named):
    (tmp_path / "ids.txt").write_text(content)
    is_refused(capsys, tmp_path, "trace", [reader, "--tokens", tmp_path / "ids.txt"], named)


def test_documents_of_text_need_a_tokenizer(tmp_path, capsys):
    zoo.llama().save_pretrained(tmp_path / "bare")
    (tmp_path / "text.txt").write_text("words alone")
    is_refused(capsys, tmp_path, "trace", [tmp_path / "bare", "--tokens", tmp_path / "text.txt"], "needs a tokenizer")
