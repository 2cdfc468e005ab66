"""The rivals: each arm differs in one thing, its lesson is what it says, and gains are parted by arithmetic."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import phase_scaling, rival_arms, rival_lessons, rival_verdicts, rivals
from experiments.toy_checkpoints import CE, LONG, SHORT, SHORT_DOCUMENTS, architecture
from rope_probe import load_model
from rope_probe.distillation import Divergence
from rope_probe.models import checkpoints
from rope_probe.runs.intervals import share_difference_interval
from rope_probe.runs.tables import Tables

KNOWN_TERMS = rival_arms.KD, CE


@pytest.fixture
def teacher():
    """Fresh for every test, since a disturbance stays. Weights large enough that attention is not flat."""
    model = checkpoints.build(architecture({"rope_type": "default", "rope_theta": 10_000.0}), seed=1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    return load_model(model)


def test_every_arm_differs_from_its_plain_one_in_what_its_control_says_alone():
    plain = {terms: phase_scaling.phase_of(phase_scaling.ARMS[name])
             for terms, name in ((rival_arms.KD, "kd_phase_wise"), (CE, "ce_phase_wise"))}  # fmt: skip
    differing = {
        "labels": {"terms"},
        "positions": {"terms"},
        "masks": {"masked", "teacher_masked"},
        "stream": {"data"},
        "rate": {"lr", "matrix_lr"},
        "width": set(),
        "disturbance": set(),
    }
    for name, arm in rivals.ARMS.items():
        mine, theirs = rivals.phase_of(name), plain.get(arm.terms, plain[rival_arms.KD])
        fields = {field.name for field in dataclasses.fields(mine)}
        differs = {field for field in fields if getattr(mine, field) != getattr(theirs, field)}
        assert differs <= differing[arm.control], name
        assert differs or arm.control in ("width", "disturbance"), name
    masks = {(rivals.ARMS[name].masked, rivals.ARMS[name].teacher_masked) for name in ("student_masked", "both_masked")}
    assert masks == {(True, False), (True, True)}
    assert phase_scaling.ARMS["kd_teacher_masked"].teacher_masked


def test_the_two_parts_of_the_divergence_add_up_to_it_and_part_by_the_next_token():
    generator = torch.Generator().manual_seed(0)
    logits, taught = (torch.randn(6, SHORT_DOCUMENTS.vocab_size, generator=generator) for _ in range(2))
    value, key = SHORT_DOCUMENTS.first_value, SHORT_DOCUMENTS.FIRST_KEY
    targets = torch.tensor([value, key, value + 5, key + 3, -100, value + 255])
    of_values, of_others = (
        rival_lessons.PartialDivergence(others=others).values(logits, targets, taught) for others in (False, True)
    )
    assert (of_values > 0).tolist() == [True, False, True, False, False, True]
    assert torch.allclose(of_values + of_others, Divergence().values(logits, targets, taught))


def test_labels_of_agreeing_streams_agree_in_a_window_and_else_nothing_changes():
    plain, agreeing = (
        SHORT_DOCUMENTS.batch(3, LONG, seed=1, index=2),
        rival_arms.AGREEING.batch(3, LONG, seed=1, index=2),
    )
    assert torch.equal(plain.tokens[:, ::2], agreeing.tokens[:, ::2])
    assert torch.equal(plain.cu_seqlens, agreeing.cu_seqlens)
    assert torch.equal(agreeing.tokens, rival_arms.AGREEING.batch(3, LONG, seed=1, index=2).tokens)

    def values_of_a_key(batch):
        pairs = [pd.DataFrame({"key": row[::2], "value": row[1::2]}) for row in batch.tokens.numpy()]
        return [pair.groupby("key")["value"].nunique().max() for pair in pairs]

    assert values_of_a_key(agreeing) == [1, 1, 1]
    assert min(values_of_a_key(plain)) > 1
    everywhere = agreeing.tokens[:, 1::2].unique()
    assert everywhere.min() >= SHORT_DOCUMENTS.first_value
    assert everywhere.max() < SHORT_DOCUMENTS.vocab_size
    first, second = (dict(zip(row[::2].tolist(), row[1::2].tolist(), strict=True)) for row in agreeing.tokens[:2])
    shared = first.keys() & second.keys()
    assert np.mean([first[key] == second[key] for key in shared]) < 0.1  # other windows, other values


@pytest.mark.parametrize("disturbance", ["noise", "flat"])
def test_other_disturbances_cost_what_the_shift_does(teacher, disturbance):
    batch = SHORT_DOCUMENTS.batch(1, 256, seed=5)

    def cost(kind, size):
        return rival_lessons.disturbed_kl(teacher, rival_lessons.disturbance_hooks(teacher, kind, size, 0), batch)

    wanted = cost("shift", rival_lessons.SHIFT) / 4
    size = rival_lessons.size_that_costs(
        wanted, {"noise": 20.0, "flat": 1.0}[disturbance], lambda x: cost(disturbance, x)
    )
    assert wanted > 1e-6
    assert cost(disturbance, 0.0) == pytest.approx(0, abs=1e-7)
    assert cost(disturbance, size) == pytest.approx(wanted, rel=0.1)


def test_the_size_is_found_and_the_most_where_none_costs_enough():
    assert rival_lessons.size_that_costs(9.0, 10.0, lambda size: size**2) == pytest.approx(3, abs=1e-3)
    assert rival_lessons.size_that_costs(9.0, 2.0, lambda size: size**2) == 2.0


def test_a_disturbance_stays_and_tells_its_cost(teacher, monkeypatch):
    monkeypatch.setattr(rival_lessons, "CALIBRATION_WINDOWS", 1)
    batch = SHORT_DOCUMENTS.batch(1, 128, seed=5)
    before = teacher.hidden(batch)
    table = rival_lessons.disturb(teacher, "shift", 0, (64,), trials=2)
    assert table.set_index("metric")["value"].loc["size"] == rival_lessons.SHIFT
    assert set(table["metric"]) == {"size", "kl_nats", "accuracy"}
    hooks = rival_lessons.disturbance_hooks(teacher, "shift", -rival_lessons.SHIFT, 0)
    assert not torch.allclose(teacher.hidden(batch), before, atol=1e-3)
    with teacher.hooks(fwd_hooks=hooks):
        assert torch.allclose(teacher.hidden(batch), before, atol=1e-3)


def test_temperatures_are_chosen_on_other_trials_than_they_are_judged_on(teacher):
    table = rivals.tempered(teacher, 0, rivals.Trials(2, 1))
    chosen, judged = (table[table["purpose"] == purpose] for purpose in (rivals.SELECTION, rivals.JUDGING))
    assert set(chosen["temperature"]) == set(rivals.TEMPERATURES)
    assert set(judged["temperature"]) == {*rivals.ALWAYS_JUDGED, rivals.best_temperature(table)}
    assert set(judged["seq_len"]) == {LONG, SHORT}
    assert chosen["seed"].iloc[0] != judged["seed"].iloc[0]
    assert judged["trials"].eq(1).all()


def rows_of(model, unscaled, tripled, *, seed=0, best="3", control="temperature"):
    """Rows of a model that finds so much unscaled and at 3, at all distances; trials to choose by say `best`."""
    at = {"model": model, "seed": seed, "seq_len": LONG, "control": control, "trials": 64}
    rows = []
    for temperature, share in ((rivals.UNSCALED, unscaled), ("3", tripled)):
        for distance in rivals.DISTANCES:
            place = {**at, "temperature": temperature, "distance": distance}
            chosen = 0.9 if temperature == best else 0.1
            rows.append({**place, "purpose": rivals.SELECTION, "metric": "accuracy", "value": chosen})
            rows.append({**place, "purpose": rivals.SELECTION, "metric": "answer_logprob_nats", "value": -chosen})
            rows.append({**place, "purpose": rivals.JUDGING, "metric": "accuracy", "value": share, "low": share,
                         "high": share})  # fmt: skip
    return rows


def table_of(*rows):
    return rivals.TEMPERED.frame([row for some in rows for row in some])


def test_a_gain_is_parted_into_temperatures_part_and_the_rest():
    seeds = range(3)
    frame = table_of(
        *(rows_of(rivals.UNTRAINED, 0.0, 0.75, seed=seed) for seed in seeds),
        *(rows_of("kd_phase_wise", 1.0, 0.5, seed=seed, best="1") for seed in seeds),
    )
    at = (rivals.UNSCALED, rival_verdicts.BEST)
    plain, scaled = (rival_verdicts.found(frame, rivals.UNTRAINED, temperature) for temperature in at)
    arm = rival_verdicts.found(frame, "kd_phase_wise", rival_verdicts.BEST)
    of_gain = rival_verdicts.parted(plain, scaled, arm)
    assert (of_gain.gain, of_gain.part, of_gain.rest) == (1.0, 0.75, 0.25)
    trials = 64 * len(rivals.FAR)
    apart = share_difference_interval([1.0] * 3, [0.75] * 3, trials, trials)
    assert of_gain.rest_interval == apart
    assert of_gain.gain_interval == share_difference_interval([1.0] * 3, [0.0] * 3, trials, trials)
    assert of_gain.part_interval[0] < 0.75 < of_gain.part_interval[1] < 1


def test_a_gain_is_parted_over_the_seeds_that_all_have():
    trials = np.full((2, 4), 64)
    plain = rival_verdicts.Found((0, 1), np.zeros((2, 4)), trials)
    scaled = rival_verdicts.Found((0, 1), np.array([[0.2] * 4, [0.9] * 4]), trials)
    arm = rival_verdicts.Found((1, 2), np.array([[1.0] * 4, [0.5] * 4]), trials)
    of_gain = rival_verdicts.parted(plain, scaled, arm)
    assert (of_gain.seeds, of_gain.gain, of_gain.rest) == (1, 1.0, pytest.approx(0.1))


def test_a_gain_that_is_none_is_not_parted():
    frame = table_of(rows_of(rivals.UNTRAINED, 0.0, 0.75), rows_of("ce_phase_wise", 0.0, 0.0, best="1"))
    table = rival_verdicts.decomposition(frame)
    assert table.loc["ce_phase_wise", "temperature's part"] == ""
    assert table.loc["ce_phase_wise", "rest, in accuracy"].startswith("-0.75")
    assert table.loc[rivals.UNTRAINED, "best temperatures"] == "3"


def test_gains_by_seed_are_those_of_each_seed_alone():
    seeds = {0: (0.75, 1.0), 3: (0.25, 0.5)}
    base = [rows_of(rivals.UNTRAINED, 0.0, share, seed=seed) for seed, (share, _) in seeds.items()]
    arms = [rows_of("kd_phase_wise", 0.0, share, seed=seed) for seed, (_, share) in seeds.items()]
    frame = table_of(*arms, *base, rows_of(rivals.UNTRAINED, 0.0, 0.5, seed=4))
    table = rival_verdicts.by_seed(frame)
    assert list(table.index) == [
        *((rivals.UNTRAINED, seed) for seed in (0, 3, 4)),
        ("kd_phase_wise", 0),
        ("kd_phase_wise", 3),
    ]
    assert table.loc[("kd_phase_wise", 0), "temperature's part"].startswith("0.75 [")
    assert table.loc[("kd_phase_wise", 3), "temperature's part"].startswith("0.50 [")
    assert table.loc[(rivals.UNTRAINED, 4), "gain"] == ""
    assert rival_verdicts.by_seed(frame[frame["seed"] == 0]).empty


def test_the_best_temperature_is_that_of_the_trials_to_choose_by():
    frame = table_of(rows_of("kd_phase_wise", 1.0, 0.0, best="3"))
    assert rival_verdicts.found(frame, "kd_phase_wise", rival_verdicts.BEST).mean == 0.0


def test_verdicts_are_decided_by_intervals_and_leave_out_what_was_not_run():
    seeds = range(3)
    frame = table_of(
        *(rows_of(rivals.UNTRAINED, 1 / 64, 0.75, seed=seed) for seed in seeds),
        *(rows_of("kd_phase_wise", 1.0, 1.0, seed=seed, best="1") for seed in seeds),
        *(rows_of("argmax_labels", 0.9, 0.9, seed=seed) for seed in seeds),
    )
    table = rival_verdicts.judged(Tables({"tempered_retrieval": frame})).set_index("claim")
    held = table["held"]
    assert held[f"{rivals.UNTRAINED}, queries as they are: accuracy 0.1 or less"] == "held"
    assert held["temperature's part of kd_phase_wise's gain .5 or more"] == "held"
    assert held["argmax_labels, queries as they are: accuracy 0.9 or more"] == "undecided"
    assert not any("masked" in claim for claim in table.index)
    assert table["n"].eq(3).all()


def test_a_student_is_held_beside_its_disturbed_teacher():
    costs = rival_lessons.DISTURBED.frame(
        {"model": "noisy_teacher", "seed": 0, "metric": "accuracy", "distance": distance, "value": 0.5}
        for distance in rivals.FAR
    )
    frame = table_of(rows_of("noisy_teacher", 0.9, 0.9))
    tables = Tables({"tempered_retrieval": frame, "disturbed_teachers": costs})
    table = rival_verdicts.judged(tables)
    row = table[table["claim"].str.contains("disturbed teacher")].iloc[0]
    assert (row["measured"], row["held"]) == (pytest.approx(0.4), "not as predicted")
