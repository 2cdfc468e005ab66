"""The training log in TensorBoard and Weights & Biases: the same numbers as log.jsonl."""

import importlib.util
import json
import struct
import sys

import pytest

from rope_probe import InputError
from rope_probe.distillation import distill, mirrors, read_config
from rope_probe.distillation.config import recorded
from rope_probe.distillation.log import Log
from tests import zoo

DATA = {"kind": "key_value", "document_length": 16, "distinct": [1, 4], "keys": 20, "values": 20}
PHASE = {"window": 16, "steps": 4, "batch_tokens": 64, "lr": 1e-2, "warmup": 1, "data": DATA}


def config(out, **changes):
    phases = [
        {"name": name, **PHASE, "terms": [{"kind": "kd", "teacher": "original"}, {"kind": "cross_entropy"}]}
        for name in ("one", "two")
    ]
    student = {"model_type": "llama", **zoo.SIZES}
    return {"student": student, "phases": phases, "out": str(out), "log_every": 2, **changes}


def logged(run):
    """(step, value) by name, as log.jsonl has them."""
    told = {}
    for text in (run / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        for name, value in mirrors.values_of(line):
            told.setdefault(name, []).append((line["step"], value))
    return told


def in_tensorboard(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


def assert_same(shown, told):
    assert shown.keys() == told.keys()
    for name, points in told.items():
        assert shown[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], name


def test_tensorboard_shows_every_number_of_the_log(tmp_path):
    run = distill(config(tmp_path / "run", mirror="tensorboard"))
    told = logged(run)
    assert {"one/loss", "two/loss", "one/kd_nats", "two/ce_nats", "one/tokens_per_s"} <= set(told)
    assert any(name.startswith("one/kd_nats_by_distance/") for name in told)
    assert [step for step, _ in told["two/loss"]] == [1, 2, 4]
    assert_same(in_tensorboard(run), told)


def test_a_log_that_is_rewound_is_shown_as_it_is_then(tmp_path):
    mirror = mirrors.open_mirror("tensorboard", tmp_path, {})
    log = Log(tmp_path / "log.jsonl", mirror)
    log.rewind("one", 0)  # as a phase begins
    for step in (1, 2, 3):
        log.write({"phase": "one", "step": step, "tokens": 64 * step, "loss": 1 / step, "time": 1.0 * step})
    log.rewind("one", 1)
    log.write({"phase": "one", "step": 2, "tokens": 128, "loss": 7.0, "time": 9.0})
    gate = [{"distance": 4, "value": 0.5, "low": 0.1, "high": 0.9}]
    log.write({"phase": "one", "step": 2, "tokens": 128, "gate": gate})
    mirror.close()
    shown = in_tensorboard(tmp_path)
    assert shown["one/loss"] == [(1, 1.0), (2, 7.0)]
    assert shown["one/gate_accuracy/4"] == [(2, 0.5)]
    assert_same(shown, logged(tmp_path))


def test_a_new_process_shows_the_whole_log_again(tmp_path):
    for step in (1, 2):
        mirror = mirrors.open_mirror("tensorboard", tmp_path, {})
        log = Log(tmp_path / "log.jsonl", mirror)
        log.rewind("one", step - 1)
        log.write({"phase": "one", "step": step, "tokens": 64 * step, "loss": 1 / step})
        mirror.close()
    assert in_tensorboard(tmp_path)["one/loss"] == [(1, 1.0), (2, 0.5)]


def test_a_mirror_decides_nothing_that_is_trained(tmp_path):
    plain, mirrored = (read_config(config(tmp_path, **more)) for more in ({}, {"mirror": "tensorboard"}))
    assert recorded(plain) == recorded(mirrored)


def records(file):
    """The records of a .wandb file: a header, then blocks of 32 KiB of pieces (checksum, length, kind, data)."""
    data, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # too little is left of the block
            place += 2**15 - place % 2**15
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield record
            record = b""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_offline_holds_every_number_of_the_log(tmp_path, monkeypatch):
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = distill(config(tmp_path / "run", mirror="wandb"))
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    shown = {}
    for data in records(file):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") != "history":
            continue
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        steps = {name.partition("/")[0]: value for name, value in items.items() if name.endswith("/step")}
        for name, value in items.items():
            phase = name.partition("/")[0]
            if phase in steps and name != f"{phase}/step":
                shown.setdefault(name, []).append((steps[phase], value))
    assert_same(shown, logged(run))


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_mirror_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch, kind):
    for name in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"pip install 'rope_probe\[{kind}\]'") as refused:
        distill(config(tmp_path / "run", mirror=kind))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_another_mirror_is_refused_by_its_key(tmp_path):
    with pytest.raises(InputError, match="mirror: it must be 'tensorboard' or 'wandb'"):
        read_config(config(tmp_path, mirror="mlflow"))
