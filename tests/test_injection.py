"""The experiment that injects position: its teachers are what their names say, its verdicts are arithmetic."""

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import injection, phase_scaling
from experiments.positional_channel import temperature_hooks
from experiments.toy_checkpoints import LONG, SHORT, SHORT_DOCUMENTS, architecture
from rope_probe import load_model, positional_part, positional_parts
from rope_probe.models import checkpoints
from rope_probe.runs.results import new_run
from rope_probe.spans.drift import FINAL_NORM
from rope_probe.tracing.positional import POSITIONAL_PARTS
from rope_probe.tracing.positional_transfer import POSITIONAL_ALIGNMENT

THETA = {"rope_type": "default", "rope_theta": 1e4}


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of an untrained teacher, as the stages leave them."""
    with new_run(tmp_path / "teacher-0", "toy_checkpoints", {}) as made:
        checkpoints.save(checkpoints.build(architecture(THETA), seed=3), made.folder / "checkpoint")
    return tmp_path


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(injection, "PART_CONTENTS", 3)


def logits(model, batch, masked):
    with torch.no_grad():
        return model(batch, masked=masked).double().log_softmax(-1)


@pytest.mark.parametrize("name", ["masked_plus_4", "full_less"])
def test_the_altered_teachers_logits_are_the_teachers_with_so_much_of_their_positional_part(folder, few, name):
    arm = injection.ARMS[name]
    contents = injection.placed(0, "part", 3)
    plain, teaches = injection.teacher_of(name, 0, folder)
    part = positional_part(plain, contents, ["logits"])["logits"].flatten(0, 1)  # [T, V]
    assert part.abs().max() > 1e-3
    batch = SHORT_DOCUMENTS.batch(2, LONG, seed=0, index=0)
    with torch.no_grad():
        clean = plain(batch, masked=arm.masked).double()
    expected = (clean + arm.amplitude * part).log_softmax(-1)
    torch.testing.assert_close(logits(teaches, batch, arm.masked), expected, rtol=0, atol=2e-5)
    assert (expected - clean.log_softmax(-1)).abs().max() > 1e-3


def test_what_is_taken_away_is_gone_and_what_is_injected_is_all_there_is(folder, few):
    contents = injection.placed(0, "part", 3)  # those that the part is a mean over

    def of_logits(name):
        plain, teaches = injection.teacher_of(name, 0, folder)
        frame = positional_parts(teaches, contents, sites=["logits"], masked=injection.ARMS[name].masked)
        return frame.set_index("metric")["value"], plain

    less, plain = of_logits("full_less")
    full = positional_parts(plain, contents, sites=["logits"]).set_index("metric")["value"]
    assert less["position_share"] < 1e-9 < 1e-5 < full["position_share"]
    assert less["interaction_share"] == pytest.approx(full["interaction_share"], rel=0.2)
    plus, _ = of_logits("masked_plus_4")
    assert plus["position_share"] > 1e-5
    assert plus["interaction_share"] < 1e-9
    squares = plus["position_share"] * plus["mean_square"], full["position_share"] * full["mean_square"]
    assert squares[0] / squares[1] == pytest.approx(16, rel=1e-3)


def test_shuffling_moves_every_place_and_changes_no_size():
    part = torch.arange(float(LONG)).unsqueeze(1).expand(-1, 2)
    moved = injection.shuffled(part, 5)
    assert not (moved == part).any()
    assert torch.equal(moved[:, 0].sort().values, part[:, 0])
    assert torch.equal(moved[:, 0].view(-1, SHORT).diff(), torch.ones(LONG // SHORT, SHORT - 1))


def test_students_of_all_arms_have_one_budget_data_and_optimiser():
    phases = {name: injection.phase_of(name) for name, arm in injection.ARMS.items() if arm.source}
    reference = phase_scaling.phase_of(phase_scaling.ARMS["kd_phase_wise"])
    for same in ("steps", "batch_tokens", "window", "data", "theta", "lr", "matrix_lr", "terms", "masked"):
        assert {getattr(phase, same) for phase in phases.values()} == {getattr(reference, same)}
    assert {name for name, phase in phases.items() if not phase.teacher_masked} == {"full", "full_less"}


def test_a_stronger_temperature_rises_faster():
    model = load_model(checkpoints.build(injection.positional_channel._nope_architecture(), seed=0))
    scaled = [temperature_hooks(model, *of)[0][1](torch.ones(1, LONG, 1, 1), None).flatten() for of in ((), (1.0,))]
    torch.testing.assert_close((scaled[1] - 1) / 10, scaled[0] - 1)


def test_contents_stand_where_packed_documents_do():
    placed = injection.placed(0, "measured", 4)
    assert placed.places == tuple(range(0, LONG, SHORT))
    assert placed.filler.shape == (4, LONG)
    other = injection.placed(0, "part", 4)
    assert not torch.equal(placed.contents, other.contents)


def test_retrieval_is_measured_at_every_scale():
    model = load_model(checkpoints.build(architecture(THETA), seed=3))
    frame = injection.measure(model, 0, trials=2)
    assert sorted(frame["query_scale"].unique()) == [1, 2, 3]
    assert frame.groupby("query_scale")["distance"].apply(tuple).to_dict() == injection.DISTANCES
    assert not model.has_hooks


def test_a_difference_is_that_of_the_seeds_that_both_have():
    def of(shares):
        return pd.DataFrame([{"seed": seed, "value": share, "trials": 128} for seed, share in shares.items()])

    difference = phase_scaling.difference_and_interval
    (mean, low, high), seeds = difference(of({2: 0.9, 0: 0.5}), of({0: 0.25, 1: 1.0, 2: 0.4}))
    assert (mean, seeds) == (0.375, 2)
    assert low < mean < high
    assert difference(of({0: 0.5}), of({1: 0.5}))[1] == 0


def test_verdicts_are_arithmetic_and_go_by_intervals():
    def accuracy(name, values, scale=1.0):
        told = {"model": name, "metric": "accuracy", "seq_len": LONG, "distance": injection.FAR, "query_scale": scale}
        return [{**told, "trials": 128, "seed": s, "value": v, "low": v, "high": v} for s, v in enumerate(values)]

    found = injection.INJECTION.frame(
        accuracy("full_less", [1.0, 1.0, 1.0]) + accuracy("masked_plus_4", [0.0, 0.1, 0.4])
        + accuracy("masked_plus_4", [0.9, 0.9, 0.9], 3.0) + accuracy("masked", [0.2, 0.2, 0.2], 3.0)
    )  # fmt: skip
    part = {"role": "teacher", "model": "full", "site": "logits"}
    metrics = {"position_kl_nats": 0.01, "position_share": 0.02, "position_by_chance": 0.001}
    parts = POSITIONAL_PARTS.frame(
        [{**part, "seed": s, "metric": m, "value": v * (1 + s / 10)} for m, v in metrics.items() for s in range(3)]
    )
    slopes = {"full": [0.9, 1.0, 1.1], "full_less": [0.9, 1.0, 1.1]}
    aligned = POSITIONAL_ALIGNMENT.frame(
        [
            {"model": "teacher", "other": name, "seed": seed, "metric": "slope", "value": value}
            for name, values in slopes.items()
            for seed, value in enumerate(values)
        ]
    )
    table = injection.judged(found, parts, aligned).set_index("claim")
    assert table.loc["full_less: accuracy 0.9 or more", "held"] == "undecided"  # three seeds reach down to .88
    assert table.loc["masked_plus_4: accuracy 0.1 or less", "held"] == "undecided"
    assert table.loc["queries x 3: accuracy of masked_plus_4 less that of masked, 0.1 or less", "held"] == "not held"
    assert table.loc["full: position_kl_nats of its teacher 0.05 or less", "held"] == "held"
    assert table.loc["positional share of the full logits, less chance, above 0", "held"] == "held"
    assert table.loc["full: slope of its positional part against its teacher's 0.5 or more", "held"] == "held"
    assert table.loc["full_less: slope of its positional part against its teacher's 0.25 or less", "held"] == "not held"
    beside = table.loc["accuracy of masked, queries x 3"]
    assert beside["measured"] == pytest.approx(0.2)
    assert pd.isna(beside["held"])
    report = injection.report(
        {"injection": {"injection": found, "positional_parts": parts, "positional_alignment": aligned}}
    )
    assert len(report.tables) == 4
    one = injection.judged(found[found["seed"] == 0], parts[parts["seed"] == 0], aligned[aligned["seed"] == 0])
    held = one.set_index("claim")["held"]
    assert held["full: position_kl_nats of its teacher 0.05 or less"] == "undecided"
    assert held["full_less: accuracy 0.9 or more"] == "held"
    assert np.isfinite(one["measured"]).all()


def test_what_is_added_follows_the_place_in_each_window():
    name, add = injection.adding(torch.arange(3.0).unsqueeze(1))
    assert name == FINAL_NORM
    assert add(torch.zeros(1, 7, 2), None)[0, :, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]
