import copy
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from rope_probe import InputError, TextCorpus, TextTask, cli, load_model, retrieval_accuracy
from rope_probe.distillation import Training, distill, read_config
from rope_probe.models import checkpoints
from rope_probe.runs.results import read_run
from rope_probe.seeds import derive
from tests import zoo

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["rope_probe.distillation", "tests.test_job"])
STREAM = {"kind": "key_value", "document_length": 16, "distinct": [1, 4], "keys": 20, "values": 20}
LAUNCH = Path(__file__).parents[1] / "examples" / "launch" / "cpu.yaml"
BYTES = {**zoo.SIZES, "model_type": "llama", "vocab_size": 259}


def config(folder, **changes):
    """A student that learns in a short window, then from a teacher in a longer one; small and quick."""
    if not (folder / "teacher").exists():
        checkpoints.save(zoo.llama(attention_dropout=0.1), folder / "teacher")
    short = {
        "name": "short",
        "window": 16,
        "steps": 16,
        "batch_tokens": 128,
        "lr": 3e-3,
        "theta": 300.0,
        "data": STREAM,
    }
    short |= {"warmup": 3, "terms": [{"kind": "cross_entropy"}]}
    long = {**short, "name": "long", "window": 32, "theta": 1e4, "steps": 32, "matrix_lr": 0.01, "accumulate": 2}
    long["terms"] = [{"kind": "cross_entropy", "weight": 0.5}, {"kind": "kd"}]
    student = {"model_type": "llama", **zoo.SIZES, "attention_dropout": 0.1}
    table = {"student": student, "teacher": str(folder / "teacher"), "out": str(folder / "run"), "log_every": 2}
    return copy.deepcopy({**table, "save_every": 2, "phases": [short, long], **changes})


def toml(value):
    """A table of the standard library's types as TOML."""
    lines = [f"{key} = {inline(one)}" for key, one in value.items() if key != "phases"]
    for phase in value["phases"]:
        lines += ["[[phases]]", *(f"{key} = {inline(one)}" for key, one in phase.items())]
    return "\n".join(lines)


def inline(value):
    if isinstance(value, list):
        return f"[{', '.join(map(inline, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(one)}" for key, one in value.items()) + "}"
    return json.dumps(value)


def no_dropout(table):
    """Processes that draw dropout of their own have losses of their own."""
    return {**table, "student": {**table["student"], "attention_dropout": 0.0}}


def weights(run, phase="long"):
    return load_file(Path(run) / "checkpoints" / phase / "model.safetensors")


def log(run):
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in ("time", "tokens_per_s")} for line in lines]


def resumed(table, kill_at=None, delay=0.0):
    """Resume a run in this process, which a SIGKILL ends `delay` seconds after its `kill_at`-th step began."""
    torch.set_num_threads(1)
    steps = iter(range(1, 1000))
    plain = Training.advance

    def advance(self, **options):
        if next(steps) == kill_at:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return plain(self, **options)

    Training.advance = advance
    distill(table, resume=True)


def in_a_process(table, *arguments):
    child = FORK.Process(target=resumed, args=(table, *arguments))
    child.start()
    child.join()
    return child.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing cut short."""
    folder = tmp_path_factory.mktemp("whole")
    assert in_a_process(config(folder)) == 0
    return folder / "run"


def test_killed_twenty_times_and_resumed_weights_and_log_are_those_of_an_uninterrupted_run(tmp_path, whole):
    rng, table, found = random.Random(0), config(tmp_path, keep=1), set()
    for _ in range(20):
        assert in_a_process(table, rng.randint(1, 3), rng.uniform(0, 0.08)) == -signal.SIGKILL
        found.add(tuple(sorted(path.name for path in (tmp_path / "run").glob("[cs]*/*"))))
        assert not (tmp_path / "run" / "metrics.parquet").exists()
    assert len(found) >= 8  # it was cut short in different places
    assert in_a_process(table) == 0
    for phase in ("short", "long"):
        ours, theirs = weights(tmp_path / "run", phase), weights(whole, phase)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert log(tmp_path / "run") == log(whole)
    assert len(list((tmp_path / "run" / "snapshots").iterdir())) == 1


def asked_to_stop(config_file, out, signal_number, at_step, delay):
    """Resume a run by the command line, which a signal reaches `delay` seconds after its `at_step`-th step began."""
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    steps = iter(range(1, 1000))
    plain = Training.advance

    def advance(self, **options):
        if next(steps) == at_step:
            threading.Timer(delay, os.kill, (os.getpid(), signal_number)).start()
        record = plain(self, **options)
        with (out / "finished").open("a") as file:
            file.write(f"{self.phase.name}-{record['step']:06d}\n")
        return record

    Training.advance = advance
    sys.argv = ["rope-probe", "distill", str(config_file), "--resume"]
    sys.stdout = sys.stderr = (out / "told").open("w")
    cli.main()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_ten_times_and_resumed_no_finished_step_is_lost(tmp_path, whole, signal_number):
    table = config(tmp_path, save_every=1000)
    (tmp_path / "config.toml").write_text(toml(table))
    rng, stops = random.Random(0), 0
    for _ in range(10):
        (tmp_path / "finished").write_text("")
        arguments = (tmp_path / "config.toml", tmp_path, signal_number, rng.randint(1, 4), rng.uniform(0, 0.03))
        child = FORK.Process(target=asked_to_stop, args=arguments)
        child.start()
        child.join()
        assert child.exitcode == cli.STOPPED, (tmp_path / "told").read_text()
        *_, told = (tmp_path / "told").read_text().splitlines()
        assert told.startswith(f"stopped by {signal_number.name} after step")
        assert "with --resume" in told
        last = (tmp_path / "finished").read_text().split()[-1]
        if last != "short-000016":  # the end of a phase, which has a checkpoint
            assert (tmp_path / "run" / "snapshots" / last).is_dir()
            stops += 1
    assert stops >= 8
    assert in_a_process(table) == 0
    for phase in ("short", "long"):
        ours, theirs = weights(tmp_path / "run", phase), weights(whole, phase)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert log(tmp_path / "run") == log(whole)
    assert read_run(tmp_path / "run")[1]["wall_s"] > 0


def test_snapshots_are_taken_by_time_too(tmp_path):
    table = config(tmp_path, save_every=1000, save_minutes=1e-9)
    assert in_a_process(table, 7, 0.0) == -signal.SIGKILL
    assert len(list((tmp_path / "run" / "snapshots").iterdir())) == 2


def standing_still(table, at_step):
    """A run that stops in the middle of a step, and stays there."""
    steps, plain = iter(range(1, 1000)), Training.advance

    def advance(self, **options):
        if next(steps) == at_step:
            (Path(table["out"]) / "standing").touch()
            time.sleep(60)
        return plain(self, **options)

    Training.advance = advance
    distill(table, resume=True)


def test_a_second_writer_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path, whole):
    table = config(tmp_path)
    child = FORK.Process(target=standing_still, args=(table, 7))
    child.start()
    while not (tmp_path / "run" / "standing").exists():
        time.sleep(0.05)
    with pytest.raises(InputError, match=f"is being written by process {child.pid} on "):
        distill(table, resume=True)
    child.kill()
    child.join()
    (tmp_path / "run" / "standing").unlink()
    assert in_a_process(table) == 0
    ours, theirs = weights(tmp_path / "run"), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_is_gone_on_with_only_by_the_teacher_and_data_it_began_with(tmp_path):
    table = cut_short(tmp_path)
    other = zoo.llama(attention_dropout=0.1)
    other.lm_head.weight.data[0, 0] += 1e-3
    checkpoints.save(other, tmp_path / "teacher")
    with pytest.raises(InputError, match="was started with other inputs"):
        distill(table, resume=True)


def test_text_that_changed_is_found_at_a_resumption(tmp_path):
    (tmp_path / "text").write_text("one two three four " * 50)
    corpus = TextCorpus(files=(str(tmp_path / "text"),))
    before = corpus.source_hash()
    (tmp_path / "text").write_text("one two three four " * 49 + "five")
    assert corpus.source_hash() != before
    assert TextCorpus().source_hash() == TextCorpus().source_hash()


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ({"phase": "short", "step": -1}, "step -1"),
        ({"phase": "short", "step": "6"}, "'6'"),
        ({"phase": "short", "step": 16}, "step 16"),
        ({"phase": "none", "step": 4}, "'none'"),
        ([], "list indices"),
    ],
)
def test_a_tampered_snapshot_is_told(tmp_path, place, named):
    table = cut_short(tmp_path)
    last = sorted((tmp_path / "run" / "snapshots").iterdir())[-1]
    (last / "training.json").write_text(json.dumps({**place, "names": ""} if isinstance(place, dict) else place))
    with pytest.raises(InputError, match=f"{last.name}.*{named}"):
        distill(table, resume=True)


@pytest.mark.parametrize("how", ["less", "reshaped", "renamed", "no random numbers"])
def test_tampered_state_of_the_optimizers_is_told(tmp_path, how):
    table = cut_short(tmp_path)
    file = sorted((tmp_path / "run" / "snapshots").iterdir())[-1] / "training.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("q_proj.weight/exp_avg"))
    if how == "less":
        del state[name]
    elif how == "reshaped":
        state[name] = state[name][:1]
    elif how == "renamed":
        state["model.layers.9.weight/exp_avg"] = state.pop(name)
    else:
        state["rng/0/cpu"] = torch.zeros(3, dtype=torch.uint8)
    save_file(state, file)
    with pytest.raises(InputError, match=r"is damaged: training\.safetensors"):
        distill(table, resume=True)


@pytest.mark.parametrize("line", ["nonsense", "[]", "{}", '{"phase": "short", "step": "x", "tokens": 1}', "7"])
def test_a_bad_line_in_the_log_is_told_by_number(tmp_path, line):
    table = cut_short(tmp_path)
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=r"line \d+ of .*log\.jsonl"):
        distill(table, resume=True)


def test_a_resumed_run_that_is_complete_is_left_as_it_is(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    table = json.loads((whole / "manifest.json").read_text())["config"]
    assert distill({**table, "out": str(whole)}, resume=True) == whole
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_run_holds_what_the_next_stage_needs(whole):
    tables, manifest = read_run(whole)
    frame = tables["losses"]
    assert manifest["status"] == "complete"
    assert manifest["models"]["short"]["rope_parameters"]["rope_theta"] == 300.0
    assert manifest["models"]["long"]["rope_parameters"]["rope_theta"] == 10_000.0
    metrics = set(frame["metric"])
    assert {"loss", "ce_nats", "kd_nats", "grad_norm", "grad_norm_q", "grad_norm_k", "grad_norm_v"} <= metrics
    assert {"tokens_per_s", "lr", "kd_nats_by_distance"} <= metrics
    last = frame[(frame["metric"] == "kd_nats") & (frame["phase"] == "long")]
    assert last["tokens"].iloc[-1] == 32 * 128
    by_distance = frame[frame["metric"] == "kd_nats_by_distance"]
    assert set(by_distance["distance"].dropna()) <= {1, 2, 4, 8, 16, 32}
    assert set(by_distance["occurrence"]) == {"new", "again"}
    trained = {name for name in weights(whole) if "teacher" not in name}
    assert trained == set(load_file(whole.parent / "teacher" / "model.safetensors"))
    assert load_model(whole / "checkpoints" / "long").config.rope_parameters["rope_theta"] == 10_000.0


def test_the_log_tells_the_losses_of_the_models_as_they_were(tmp_path):
    table = no_dropout(config(tmp_path))
    checkpoints.save(zoo.model(zoo.CONFIGS["llama"](), seed=1), tmp_path / "student")
    checkpoints.save(zoo.llama(), tmp_path / "teacher")
    long = {**table["phases"][1], "steps": 1, "teacher_masked": True}
    table |= {"student": str(tmp_path / "student"), "phases": [long]}
    (line,) = log(distill(table))
    tokens = read_config(table).phases[0].batch(derive(0, "long"), 0).tokens
    student, teacher = (checkpoints.load(tmp_path / name) for name in ("student", "teacher"))
    with torch.no_grad():
        q = student(tokens).logits.log_softmax(-1)
        p = teacher(tokens.reshape(-1, 16)).logits.log_softmax(-1).reshape(q.shape)
    assert line["ce_nats"] == pytest.approx(student(tokens, labels=tokens).loss.item(), rel=1e-5)
    assert line["kd_nats"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert line["loss"] == pytest.approx(0.5 * line["ce_nats"] + line["kd_nats"], rel=1e-5)


def test_two_processes_have_the_losses_of_one(tmp_path, whole):
    table = no_dropout(config(tmp_path))
    del table["phases"][1]["matrix_lr"]  # Muon rounds to bfloat16, which makes 1e-7 in a gradient 1e-4 in a loss
    one = distill({**table, "out": str(tmp_path / "one")})
    (tmp_path / "config.toml").write_text(toml({**table, "out": str(tmp_path / "two")}))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(LAUNCH),
        "--main_process_port",
        "0",
    ]
    command = [*launch, "-m", "rope_probe", "distill", str(tmp_path / "config.toml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_run(tmp_path / "two")[1]["processes"] == 2
    for ours, theirs in zip(log(tmp_path / "two"), log(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm_q"] == pytest.approx(theirs["grad_norm_q"], abs=1e-5)
        assert ours["kd_nats_by_distance"] == pytest.approx(theirs["kd_nats_by_distance"], abs=1e-5)


def test_a_missed_gate_ends_the_run_and_is_told(tmp_path):
    table = config(tmp_path)
    table["phases"][0]["gate"] = {"window": 16, "distances": [2, 8], "accuracy": 1.0, "every": 8, "trials": 16}
    tables, manifest = read_run(distill(table))
    assert "missed its gate" in manifest["missed_gate"]
    assert set(manifest["models"]) == {"short"}
    assert set(manifest["teachers"]) == {"teacher"}
    gates = tables["retrieval"]
    assert gates["tokens"].tolist() == [8 * 128] * 2 + [16 * 128] * 2
    assert gates["distance"].tolist() == [2, 8, 2, 8]


def test_a_gate_that_passes_ends_its_phase_and_the_next_one_follows(tmp_path):
    table = config(tmp_path)
    table["phases"][0]["gate"] = {"window": 16, "distances": [2], "accuracy": 0.0, "every": 4, "trials": 16}
    run = distill(table)
    assert max(line["step"] for line in log(run) if line["phase"] == "short") == 4
    assert "missed_gate" not in read_run(run)[1]


def test_tied_weights_and_random_numbers_survive_a_resumption(tmp_path):
    table = config(tmp_path, save_every=8)
    table["student"]["tie_word_embeddings"] = True
    assert in_a_process(table, 12, 0.0) == -signal.SIGKILL
    assert in_a_process({**table, "out": str(tmp_path / "whole")}) == in_a_process(table) == 0
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "lm_head.weight" not in theirs


def cut_short(tmp_path, **changes):
    table = config(tmp_path, **changes)
    assert in_a_process(table, 7, 0.0) == -signal.SIGKILL
    return table


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "training.json", "config.json"])
def test_a_truncated_snapshot_is_told_by_name_and_without_it_the_one_before_is_gone_on_with(tmp_path, whole, file):
    table = cut_short(tmp_path)
    one, two = sorted((tmp_path / "run" / "snapshots").iterdir())
    (two / file).write_bytes((two / file).read_bytes()[:-30])
    with pytest.raises(InputError, match=rf"{two.name}.*"):
        distill(table, resume=True)
    assert one.exists()
    shutil.rmtree(two)
    assert in_a_process(table) == 0
    ours, theirs = weights(tmp_path / "run"), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def on_a_full_disk(table, bytes_left):
    """A file that grows beyond `bytes_left` fails, as on a disk that has no more room."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, bytes_left))
    sys.argv = ["rope-probe", "distill", str(table), "--resume"]
    cli.main()


@pytest.mark.parametrize("bytes_left", [20_000, 100_000])  # no room for the weights; or for the optimizers' state
def test_a_full_disk_is_told_and_what_was_complete_stays(tmp_path, whole, bytes_left):
    table = cut_short(tmp_path)
    (tmp_path / "config.toml").write_text(toml(table))
    snapshots = sorted(path.name for path in (tmp_path / "run" / "snapshots").iterdir())
    child = FORK.Process(target=on_a_full_disk, args=(tmp_path / "config.toml", bytes_left))
    child.start()
    child.join()
    assert child.exitcode == 2
    assert sorted(path.name for path in (tmp_path / "run" / "snapshots").iterdir()) == snapshots
    assert in_a_process(table) == 0
    ours, theirs = weights(tmp_path / "run"), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def bytes_tokenizer(folder, extra=()):
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.add_tokens(list(extra))
    tokenizer.save_pretrained(folder)


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path):
    table = config(tmp_path)
    table["student"] = str(tmp_path / "student")
    checkpoints.save(zoo.llama(), tmp_path / "student")
    bytes_tokenizer(tmp_path / "student", ["one", "two"])
    bytes_tokenizer(tmp_path / "teacher", ["one", "three"])
    with pytest.raises(InputError, match=r"teacher .* another tokenizer than student .* 'two' is no token there"):
        distill(table)
    assert not (tmp_path / "run").exists()


def change(table, path, value):
    *outer, last = path
    for key in outer:
        table = table[key]
    table[last] = value


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("keep",), 0, "keep: it must be 1 or more, but it is 0"),
        (("steps",), 3, "steps: there is no such key"),
        (("phases", 0, "learning_rate"), 3, r"phases.0.learning_rate: there is no such key"),
        (("phases", 0, "data", "length"), 3, "length: there is no such key"),
        (("phases", 0, "theta"), 0, r"phases.0.theta: it must be above 0, but it is 0"),
        (("phases", 0, "theta"), float("nan"), r"phases.0.theta: it must be .* but it is nan"),
        (("phases", 0, "lr"), "fast", r"phases.0.lr: .* valid number"),
        (("phases", 0, "window"), 8, "window of 8 tokens does not hold whole documents of 16"),
        (("phases", 0, "name"), "a/b", "a/b"),
        (("phases", 1, "name"), "short", "two phases are called 'short'"),
        (("phases", 0, "rope_parameters"), {"rope_theta": 1e4}, "both theta and rope_parameters"),
        (("phases", 1, "accumulate"), 3, "4 windows, which 1 processes cannot share in 3 parts"),
        (("phases", 0, "data", "keys"), 60, "84 token ids, but the student's vocabulary has 64"),
        (("phases",), [], "one phase"),
        (("teacher",), None, "reads the teacher 'teacher', so the run needs a teacher of that name; it has original"),
        (("teachers",), {"long": "x"}, "teacher and teachers both say"),
        (("teacher",), "no/such/folder/there", "no folder at"),
        (("student",), {"model_type": "lama"}, "'lama' is unknown"),
        (("student",), {"model_type": "llama", "hidden": 3}, "no entry 'hidden'"),
        (("student",), "no/such/folder/there", "no folder at"),
        (("seed",), -1, "-1"),
        (("seed",), 2**63, "9223372036854775808"),
        (("device",), "nonsense", "nonsense"),
        (("phases", 0, "weight_decay"), -1.0, r"phases.0.weight_decay: it must be 0 or more"),
        (("phases", 0, "matrix_lr"), 0.0, r"phases.0.matrix_lr: it must be above 0"),
        (("phases", 1, "terms", 0, "weight"), float("nan"), r"weight: it must be a finite number, but it is nan"),
        (("phases", 1, "terms", 0, "weight"), -1, "weight: it must be 0 or more, but it is -1"),
        (("phases", 1, "terms", 0, "teacher"), "teacher", r"phases.1.terms.0.cross_entropy.teacher"),
        (("phases", 1, "terms", 1, "temp"), 2.0, r"phases.1.terms.1.kd.temp: there is no such key"),
        (("phases", 1, "terms"), [{"kind": "kd", "weight": 0}], "one of a weight above 0"),
        (
            ("phases", 1, "terms"),
            [{"kind": "entropic"}],
            "terms.0: kind 'entropic' is unknown; known are 'cross_entropy', 'kd', 'hard_labels', 'hid",
        ),
        (("phases", 1, "terms"), [{"weight": 1.0}], r"phases.1.terms.0: it has no kind"),
        (("phases", 1, "terms"), [{"kind": "hidden", "sites": ["blocks.9.hook_resid_post"]}], "no site 'blocks.9"),
        (
            ("phases", 1, "objective"),
            {"ce_weight": 1.0},
            r"phases.1.objective: .* terms = \[\{ kind = \"cross_entropy\"",
        ),
        (("phases", 1, "steps"), None, "steps"),
        (
            ("phases", 0, "gate"),
            {"window": 16, "distances": [2], "accuracy": 1.0, "every": 0},
            "every: it must be 1 or more",
        ),
        (("phases", 0, "gate"), {"window": 16, "distances": [], "accuracy": 1.0, "every": 1}, "a distance"),
        (("phases", 0, "gate"), {"window": 16, "distances": [3], "accuracy": 1.0, "every": 1}, "must be even"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, path, value, named):
    table = config(tmp_path)
    change(table, path, value)
    with pytest.raises(InputError, match=named):
        distill(table)
    assert not (tmp_path / "run").exists()


def test_rope_parameters_that_transformers_does_not_take_are_refused(tmp_path):
    table = config(tmp_path)
    del table["phases"][1]["theta"]
    for parameters in ({"rope_type": "spiral", "rope_theta": 1e4}, {"rope_type": "yarn", "rope_theta": 1e4}):
        table["phases"][1]["rope_parameters"] = parameters
        with pytest.raises(InputError, match="rope_parameters"):
            distill(table)
    table["phases"][1]["rope_parameters"] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    run = distill(table)
    assert read_run(run)[1]["models"]["long"]["rope_parameters"]["factor"] == 2.0


def test_positions_past_which_a_model_changes_are_refused_before_anything_is_written(tmp_path):
    table = config(tmp_path)
    del table["phases"][1]["theta"]
    table["student"]["max_position_embeddings"] = 16
    table["phases"][1]["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(InputError, match="positions up to 31, but the student's rope type changes"):
        distill(table)
    assert not (tmp_path / "run").exists()


def test_an_extended_model_says_how_far_it_reads(tmp_path):
    table = config(tmp_path)
    table["student"]["max_position_embeddings"] = 16
    for phase in table["phases"]:
        phase["steps"] = 1
    run = distill(table)
    reach = [checkpoints.load(run / "checkpoints" / name).config.max_position_embeddings for name in ("short", "long")]
    assert reach == [16, 32]


@pytest.mark.parametrize("name", ["gpt_neox", "phi", "glm"])
def test_other_rope_parameters_leave_how_much_of_a_head_rotates(tmp_path, name):
    model = checkpoints.with_rope(
        zoo.model(zoo.CONFIGS[name]()), {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    )
    again = checkpoints.load(checkpoints.save(model, tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(model(zoo.tokens()).logits, again(zoo.tokens()).logits)


def test_rope_parameters_that_a_model_type_does_not_take_are_refused():
    with pytest.raises(InputError, match="longrope"):
        checkpoints.with_rope(
            zoo.model(zoo.CONFIGS["phi3"]()), {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
        )


def test_a_run_is_gone_on_with_wherever_it_lies_and_whatever_it_keeps(tmp_path, whole, monkeypatch):
    cut_short(tmp_path)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = tmp_path / "moved"
    killed = ["checkpoints/.short.partial-0123abcd/.rope_probe.lock", "snapshots/.short-000002.removed-0123abcd/a"]
    others = ["snapshots/.git/HEAD", "snapshots/.DS_Store", "checkpoints/.DS_Store", "snapshots/notes/mine.txt"]
    for file in (*killed, *others):
        (moved / file).parent.mkdir(parents=True, exist_ok=True)
        (moved / file).touch()
    monkeypatch.chdir(tmp_path)
    distill(config(tmp_path, out="moved", keep=1), resume=True)
    ours, theirs = weights(tmp_path / "moved"), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not [file for file in killed if (moved / file).exists()]
    assert all((moved / file).exists() for file in others)


def test_a_gate_that_was_tried_before_a_resumption_is_remembered(tmp_path):
    table = config(tmp_path, save_every=8)
    table["phases"][0]["gate"] = {"window": 16, "distances": [2], "accuracy": 1.0, "every": 8, "trials": 16}
    table["phases"][0]["steps"] = 15
    assert in_a_process(table, 12, 0.0) == -signal.SIGKILL
    assert in_a_process(table) == 0
    assert in_a_process({**table, "out": str(tmp_path / "whole")}) == 0
    assert log(tmp_path / "run") == log(tmp_path / "whole")
    assert "at 2" in log(tmp_path / "run")[-1]["missed_gate"]


def test_training_that_leaves_the_numbers_is_stopped(tmp_path):
    table = config(tmp_path)
    table["phases"][0]["lr"] = 1e30
    with pytest.raises(InputError, match="try a lower lr than 1e"):
        distill(table)


def test_what_accelerate_finds_in_the_environment_changes_nothing(tmp_path, whole, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert in_a_process(config(tmp_path)) == 0
    ours, theirs = weights(tmp_path / "run"), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_is_there_is_neither_overwritten_nor_gone_on_with_differently(tmp_path, whole):
    table = cut_short(tmp_path)
    with pytest.raises(InputError, match="already, and it is not; resume it"):
        distill(table)
    change(table, ("phases", 1, "lr"), 0.5)
    with pytest.raises(InputError, match=r"phases\.1\.lr was 0.003 and is 0.5"):
        distill(table, resume=True)
    with pytest.raises(InputError, match="is complete; choose another place"):
        distill(config(whole.parent))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not touched"):
        distill({**table, "out": str(tmp_path / "mine")}, resume=True)


def test_text_from_end_to_end(tmp_path):
    data = {"kind": "text", "longest": 64}
    phase = {"name": "bytes", "window": 256, "steps": 30, "batch_tokens": 1024, "lr": 1e-2, "theta": 1e4, "data": data}
    phase |= {"terms": [{"kind": "cross_entropy"}], "masked": True, "positions": "reset", "warmup": 5}
    table = {"student": BYTES, "phases": [phase], "out": str(tmp_path / "run"), "log_every": 1}
    losses = [line["ce_nats"] for line in log(distill(table))]
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0
    folder = tmp_path / "run" / "checkpoints" / "bytes"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    written = model.generate(**tokenizer("The", return_tensors="pt", add_special_tokens=False), max_new_tokens=5)
    assert written.shape == (1, 8)
    frame = retrieval_accuracy(load_model(folder), TextTask("passkey", tokenizer, 512), [128], trials=2)
    assert set(frame["metric"]) == {"accuracy", "answer_logprob_nats"}
