"""Several streams in a step, teachers by name, terms of one's own."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F  # noqa: N812

from rope_probe import InputError, KeyValueStream, load_model
from rope_probe.distillation import (
    CrossEntropy,
    Divergence,
    HiddenStates,
    LogitTerm,
    Phase,
    StateTerm,
    Stream,
    Training,
    distill,
    read_config,
    train_phase,
)
from rope_probe.distillation import student as student_module
from rope_probe.models import checkpoints
from rope_probe.precision import promote_float32
from rope_probe.runs.results import read_run
from tests import zoo
from tests.leaving import leave

DATA = KeyValueStream(16, distinct=(1, 4), keys=20, values=20)
OTHER = dataclasses.replace(DATA, distinct=(2, 8))
SITES = ("blocks.0.hook_resid_post", "ln_final.hook_out")
MIXED = Phase(
    "mixed",
    steps=3,
    batch_tokens=1024,
    lr=3e-3,
    warmup=1,
    streams=(
        Stream(DATA, 64, 4, name="long", terms=(CrossEntropy(0.5), Divergence(1.0, "long"))),
        Stream(OTHER, 32, 3, name="skipping", positions="skipped", target_window=64, teacher_positions="continuous",
               terms=(Divergence(2.0, "short"), HiddenStates(5.0, "original", sites=SITES))),
        Stream(DATA, 16, 1, masked=True, terms=(CrossEntropy(),)),
    ),
)  # fmt: skip
TOKENS = {"long": 512, "skipping": 384, "2": 128}


def fresh(seed=0):
    return load_model(zoo.model(zoo.CONFIGS["llama"](), seed=seed, scale=0.05))


def teachers():
    return {"long": load_model(zoo.llama()), "short": load_model(zoo.model(zoo.CONFIGS["llama"](), seed=1))}


def counted(monkeypatch):
    """How many tokens of each stream the student reads."""
    read, plain = Counter(), student_module.Student.forward

    def forward(self, part, lesson, taught):
        read[lesson.stream.name] += part.tokens.numel()
        return plain(self, part, lesson, taught)

    monkeypatch.setattr(student_module.Student, "forward", forward)
    return read


def trained(accumulate=1, measure=True):
    training = Training(fresh(), dataclasses.replace(MIXED, accumulate=accumulate), seed=0, teachers=teachers())
    return training, [training.advance(measure=measure) for _ in range(3)]


@pytest.fixture(scope="module")
def in_one_part():
    torch.manual_seed(0)
    return trained()[1]


def require_close(records, others):
    for ours, theirs in zip(records, others, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5), key


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_streams_share_the_tokens_of_every_step_in_any_parts(accumulate, in_one_part, monkeypatch):
    read = counted(monkeypatch)
    _, records = trained(accumulate)
    assert dict(read) == {name: 3 * count for name, count in TOKENS.items()}
    assert [record["tokens"] for record in records] == [1024, 2048, 3072]
    require_close(records, in_one_part)


def test_two_processes_read_the_same_tokens_and_have_the_losses_of_one(in_one_part):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, "-m", "tests.test_streams"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["tokens"] == [{name: 3 * count // 2 for name, count in TOKENS.items()}] * 2
    require_close(told["records"], in_one_part)


def test_every_term_is_told_under_its_stream(in_one_part):
    terms = {"long/ce_nats", "long/kd_nats", "skipping/kd_nats", "skipping/hidden", "2/ce_nats"}
    for record in trained(measure=False)[1]:
        assert record.keys() == {"step", "tokens", "loss"} | terms
    measured = {"skipping/ce_nats", "2/kd_nats"}
    by_distance = {f"{name}/kd_nats_by_distance" for name in TOKENS}
    norms = {"lr", "grad_norm", "grad_norm_q", "grad_norm_k", "grad_norm_v"}
    for record in in_one_part:
        assert record.keys() == {"step", "tokens", "loss"} | terms | measured | by_distance | norms


def test_the_loss_weighs_means_by_share_and_weight(in_one_part):
    for record in in_one_part:
        long = 0.5 * record["long/ce_nats"] + record["long/kd_nats"]
        skipping = 2 * record["skipping/kd_nats"] + 5 * record["skipping/hidden"]
        assert record["loss"] == pytest.approx((4 * long + 3 * skipping + record["2/ce_nats"]) / 8, rel=1e-5)


def test_the_mix_of_longred_is_one_of_shares_and_weights():
    streams = (
        Stream(DATA, 64, 8, terms=(CrossEntropy(),)),
        Stream(DATA, 16, 6, terms=(HiddenStates(5.0, "original"),)),
        Stream(DATA, 16, 2, terms=(HiddenStates(10.0, "original"),)),
    )
    phase = Phase("longred", steps=1, batch_tokens=2048, lr=1e-3, streams=streams)
    effective = [factor * stream.terms[0].weight for factor, stream in zip(phase.factors, phase.mix, strict=True)]
    assert effective == [0.5, 1.875, 1.25]
    assert phase.windows == (16, 48, 16)
    apart = dataclasses.replace(
        phase, streams=tuple(dataclasses.replace(s, tokens=t) for s, t in zip(streams, (4, 3, 1), strict=True))
    )
    assert apart.factors == phase.factors
    assert apart.windows == (16, 48, 16)
    equal = dataclasses.replace(phase, streams=tuple(dataclasses.replace(s, tokens=1) for s in streams))
    assert equal.factors == phase.factors
    assert equal.windows == (11, 42, 42)  # one part in three of 2,048 tokens is 682.67


@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.sampled_from([16, 32, 48, 64])), min_size=1, max_size=4),
    st.integers(1, 40),
)
def test_tokens_are_in_the_ratio_of_shares_to_one_window(streams, size):
    mixed = tuple(Stream(DATA, window, share) for share, window in streams)
    try:
        phase = Phase("any", steps=1, batch_tokens=64 * size, lr=1e-3, streams=mixed)
    except InputError as error:
        assert "make batch_tokens a multiple of" in str(error)  # noqa: PT017
        assume(False)
    total = sum(share for share, _ in streams)
    for count, (share, window) in zip(phase.windows, streams, strict=True):
        assert abs(count * window - 64 * size * share / total) < window
    assert 0 <= phase.batch_tokens - phase.step_tokens < max(window for _, window in streams)


def test_batch_tokens_that_streams_cannot_share_are_refused_with_those_that_they_can():
    with pytest.raises(InputError, match=r"gets no window .* make batch_tokens a multiple of 256"):
        dataclasses.replace(MIXED, batch_tokens=80)
    with pytest.raises(InputError, match=r"'long' has 2 windows, .* 1 processes .* 4 parts each; .* multiple of 1024"):
        dataclasses.replace(MIXED, batch_tokens=256, accumulate=4)
    with pytest.raises(InputError, match=r"multiple of 1024"):
        dataclasses.replace(MIXED, batch_tokens=256).windows_of_a_part(4)
    assert dataclasses.replace(MIXED, accumulate=4).windows == (8, 12, 8)


def test_a_stream_of_its_own_is_the_flat_phase_bit_for_bit():
    reading = {"terms": (CrossEntropy(0.3), Divergence(0.7)), "teacher_masked": True}
    shared = {"steps": 3, "batch_tokens": 256, "lr": 3e-3, "matrix_lr": 0.01}
    flat = Phase("one", DATA, 32, **shared, **reading)
    mixed = Phase("one", **shared, streams=(Stream(DATA, 32, 7.0, name="only", **reading),))
    histories, weights = [], []
    for phase in (flat, mixed):
        model = fresh()
        histories.append(train_phase(model, phase, seed=0, teacher=load_model(zoo.llama()))[0])
        weights.append(model.original_model.state_dict())
    assert histories[0] == histories[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def plain(model, batch):
    """States after layer 0, final states and logits, by transformers alone with an explicit causal mask, in float64."""
    length = batch.tokens.shape[1]
    mask = torch.full((length, length), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
    with promote_float32(), torch.no_grad():
        out = model(
            input_ids=batch.tokens,
            position_ids=batch.position_ids,
            attention_mask=mask.expand(len(batch.tokens), 1, -1, -1),
            use_cache=False,
            output_hidden_states=True,
        )
    return out.hidden_states[1], out.hidden_states[-1], out.logits


def test_a_skipping_student_beside_a_teacher_that_does_not_skip_has_the_loss_of_plain_models():
    models = [zoo.model(zoo.CONFIGS["llama"](), attn="eager", seed=seed).double() for seed in (0, 1)]
    stream = Stream(
        DATA,
        32,
        positions="skipped",
        target_window=100,
        teacher_positions="continuous",
        terms=(CrossEntropy(0.5), Divergence(2.0), HiddenStates(3.0, distance="mse", sites=SITES)),
    )
    phase = Phase("skipping", steps=1, batch_tokens=256, lr=1e-3, streams=(stream,))
    read = phase.batches(4, 0)[0]
    taught = phase.mix[0].as_teachers_read(read, seed=4, step=0)
    assert read.position_ids.max() == 99
    assert torch.equal(taught.position_ids, torch.arange(32).expand(8, -1))
    (first, last, logits), (teacher_first, teacher_last, teacher_logits) = (
        plain(model, batch) for model, batch in zip(models, (read, taught), strict=True)
    )
    q, p = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    ce = F.nll_loss(q[:, :-1].flatten(0, 1), read.tokens[:, 1:].flatten()).item()
    kd = (p.exp() * (p - q)).sum(-1).mean().item()
    hidden = ((first - teacher_first).square().mean() + (last - teacher_last).square().mean()).item()
    student, teacher = map(load_model, models)
    (record,), _ = train_phase(student, phase, seed=4, teacher=teacher)
    assert record["ce_nats"] == pytest.approx(ce, rel=1e-12)
    assert record["kd_nats"] == pytest.approx(kd, rel=1e-12)
    assert record["hidden"] == pytest.approx(hidden, rel=1e-12)
    assert record["loss"] == pytest.approx(0.5 * ce + 2 * kd + 3 * hidden, rel=1e-12)


def test_the_original_is_the_model_as_it_was_and_no_part_of_what_is_trained_or_saved():
    start = {name: weight.clone() for name, weight in fresh().original_model.state_dict().items()}
    training, records = trained()
    original = training.teachers["original"].original_model
    assert records[0]["skipping/hidden"] > 0  # it skips, the original does not
    for name, weight in original.state_dict().items():
        assert torch.equal(weight, start[name])
    assert any(not torch.equal(weight, start[name]) for name, weight in training.weights().items())
    assert training.weights().keys() == start.keys()
    optimized = {
        id(p) for optimizer in training._optimizers for group in optimizer.param_groups for p in group["params"]
    }
    assert optimized == {id(parameter) for parameter in training.model.original_model.parameters()}
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in original.parameters())
    with pytest.raises(InputError, match="give it among the teachers"):
        training.restore(3, training.state())


def test_no_original_is_made_where_no_term_reads_it():
    phase = Phase("plain", DATA, 32, 1, 256, 1e-3, terms=(CrossEntropy(),))
    training = Training(fresh(), phase, seed=0)
    assert training.teachers == {}
    assert "kd_nats" not in training.advance(measure=True)


@dataclass(frozen=True)
class EntropyGap(LogitTerm):
    """Squared difference of the entropies of student and teacher."""

    teacher: str = "teacher"
    power: float = 2.0
    kind: Literal["test_entropy_gap"] = "test_entropy_gap"

    averaged_over = "targets"

    def values(self, logits, targets, taught):
        entropies = [torch.special.entr(x.softmax(-1)).sum(-1) for x in (logits, taught)]
        return (entropies[0] - entropies[1]).abs() ** self.power


@dataclass(frozen=True)
class StateSize(StateTerm):
    """Mean square of the student's states."""

    kind: Literal["test_state_size"] = "test_state_size"

    metric = "state_size"

    def values(self, states, taught):
        assert taught is None
        return sum(state.square().mean(-1).flatten() for state in states)


def table(folder, **changes):
    checkpoints.save(zoo.llama(), folder / "teacher")
    checkpoints.save(zoo.model(zoo.CONFIGS["llama"](), scale=0.05), folder / "student")
    data = {"kind": "key_value", "document_length": 16, "distinct": [1, 4], "keys": 20, "values": 20}
    phase = {"name": "own", "window": 32, "steps": 20, "batch_tokens": 256, "lr": 1e-2, "data": data, "warmup": 1}
    phase["terms"] = [
        {"kind": "test_entropy_gap", "power": 1.0, "teacher": "long"},
        {"kind": "test_state_size", "weight": 0.5, "sites": list(SITES)},
    ]
    run = {"student": str(folder / "student"), "teachers": {"long": str(folder / "teacher")}}
    return {**run, "out": str(folder / "run"), "log_every": 5, "phases": [phase], **changes}


def test_terms_defined_by_a_user_train_a_run_and_are_logged(tmp_path):
    config = table(tmp_path)
    toml = tmp_path / "config.toml"
    (phase,) = config.pop("phases")
    lines = [f"{key} = {json.dumps(value)}" for key, value in config.items() if key != "teachers"]
    lines += ["[teachers]", f"long = {json.dumps(config['teachers']['long'])}", "[[phases]]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in phase.items() if key not in ("data", "terms")]
    lines += ["[phases.data]", *(f"{key} = {json.dumps(value)}" for key, value in phase["data"].items())]
    for term in phase["terms"]:
        lines += ["[[phases.terms]]", *(f"{key} = {json.dumps(value)}" for key, value in term.items())]
    toml.write_text("\n".join(lines))
    config = read_config(toml)
    assert config.phases[0].terms == (EntropyGap(1.0, "long", 1.0), StateSize(0.5, sites=SITES))
    run = distill(toml)
    tables, manifest = read_run(run)
    frame = tables["losses"]
    losses = {
        metric: frame[frame["metric"] == metric]["value"] for metric in ("test_entropy_gap", "state_size", "loss")
    }
    assert all(len(values) == 5 for values in losses.values())
    assert losses["loss"].iloc[-1] < 0.8 * losses["loss"].iloc[0]
    torch.testing.assert_close(
        torch.tensor(losses["loss"].values),
        torch.tensor(losses["test_entropy_gap"].values + 0.5 * losses["state_size"].values),
    )
    assert {"ce_nats", "kd_nats", "kd_nats_by_distance"} <= set(frame["metric"])  # measured whatever the terms
    assert read_config({**manifest["config"], "out": str(run)}) == dataclasses.replace(config, out=str(run))


def with_streams(folder, original):
    """A student that learns alone, then from streams of which one reads the original."""
    config = table(folder, original=original, log_every=1)
    own = config["phases"][0] | {"steps": 2, "terms": [{"kind": "cross_entropy"}]}
    streams = [
        {"data": own["data"], "window": 32, "share": 3, "name": "new", "terms": [{"kind": "kd", "teacher": "long"}]},
        {"data": own["data"], "window": 16, "terms": [{"kind": "kd", "teacher": "original", "weight": 0.5}]},
    ]
    mixed = {key: value for key, value in own.items() if key not in ("data", "window", "terms")}
    return {**config, "phases": [own, {**mixed, "name": "mixed", "steps": 3, "streams": streams}]}


@pytest.mark.parametrize("original", ["run", "phase"])
def test_a_resumed_run_has_the_original_that_it_began_with(tmp_path, original, monkeypatch):
    config = with_streams(tmp_path, original) | {"save_every": 1}
    whole = distill({**config, "out": str(tmp_path / "whole")})
    plain_advance = Training.advance

    def advance(self, **options):
        if self.phase.name == "mixed" and self.step == 2:
            raise KeyboardInterrupt
        return plain_advance(self, **options)

    monkeypatch.setattr(Training, "advance", advance)
    with pytest.raises(KeyboardInterrupt):
        distill(config)
    monkeypatch.undo()
    run = distill(config, resume=True)
    ours, theirs = (load_file(place / "checkpoints/mixed/model.safetensors") for place in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("original", ["run", "phase"])
def test_a_run_with_streams_logs_every_term_and_its_original_is_that_of_the_run_or_phase(tmp_path, original):
    run = distill(with_streams(tmp_path, original))
    tables, manifest = read_run(run)
    frame = tables["losses"]
    told = frame[frame["phase"] == "mixed"]
    for metric in ("loss", "new/kd_nats", "1/kd_nats", "new/ce_nats", "1/ce_nats"):
        assert len(told[told["metric"] == metric]) == 3
    by_distance = told[told["metric"] == "1/kd_nats_by_distance"]
    assert set(by_distance["distance"].dropna()) <= {1, 2, 4, 8, 16}
    assert set(by_distance["occurrence"]) == {"new", "again"}
    apart = told[told["metric"] == "1/kd_nats"]["value"].iloc[0]
    assert abs(apart) < 1e-6 if original == "phase" else apart > 1e-4
    assert manifest["teacher_positions"] == dict.fromkeys(("own", "mixed/new", "mixed/1"), "continuous")
    assert set(manifest["read"]) == {"own", "mixed/new", "mixed/1"}
    saved, start = (
        load_file(place / "model.safetensors") for place in (run / "checkpoints/mixed", tmp_path / "student")
    )
    assert saved.keys() == start.keys()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"window": 32}, "phase 'mixed' has streams, so window is a key of each of them"),
        ({"streams": (Stream(DATA, 16, name="a"), Stream(DATA, 16, name="a"))}, "two streams .* called 'a'"),
        ({"streams": ()}, "phase 'mixed' has no data"),
    ],
)
def test_phases_of_streams_that_make_no_sense_are_refused(changes, named):
    with pytest.raises(InputError, match=named):
        dataclasses.replace(MIXED, **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"share": 0}, "share of a stream must be above 0"),
        ({"tokens": -1.0}, "tokens of a stream must be above 0"),
        ({"window": 0}, "window of a stream must be 1 or more"),
        ({"chunk": 0}, "chunk of a stream must be 1 or more"),
        ({"name": "a/b"}, "a/b"),
        ({"terms": ()}, "one of a weight above 0"),
    ],
)
def test_streams_that_make_no_sense_are_refused(changes, named):
    with pytest.raises(InputError, match=named):
        dataclasses.replace(MIXED.streams[0], **changes)


def test_a_measured_term_that_is_no_number_is_told(monkeypatch):
    phase = Phase("one", DATA, 32, 1, 256, 1e-3, terms=(CrossEntropy(), EntropyGap(0.0)))
    monkeypatch.setattr(EntropyGap, "values", lambda self, logits, targets, taught: logits.sum(-1) * float("nan"))
    training = Training(fresh(), phase, seed=0, teachers={"teacher": load_model(zoo.llama())})
    with pytest.raises(InputError, match="test_entropy_gap of phase 'one' is nan at step 1"):
        training.advance(measure=True)


def test_a_teacher_cannot_take_the_name_of_the_original(tmp_path):
    with pytest.raises(InputError, match="no teacher can be called 'original'"):
        read_config(table(tmp_path, teachers={"original": "x"}))


def in_a_process():
    torch.set_num_threads(1)
    accelerator, read = Accelerator(cpu=True), counted(pytest.MonkeyPatch())
    training = Training(fresh(), MIXED, seed=0, teachers=teachers(), accelerator=accelerator)
    records = [training.advance(measure=True) for _ in range(3)]
    tokens = gather_object([dict(read)])
    if accelerator.is_main_process:
        print(json.dumps({"records": records, "tokens": tokens}), flush=True)
    leave(accelerator)


if __name__ == "__main__":
    in_a_process()
