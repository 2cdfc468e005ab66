"""The experiment on LongReD: its arms have one budget, its control does what it says, its verdicts are arithmetic."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from experiments import longred
from rope_probe import load_model
from rope_probe.gallery import figures as plots
from rope_probe.models import checkpoints
from rope_probe.runs.intervals import share_interval
from tests.frames import rows_for

TRAINED = {name: arm for name, arm in longred.EVERY.items() if arm.streams}


@pytest.fixture(scope="module")
def model():
    rope = {"rope_type": "default", "rope_theta": longred.SMALL_THETA}
    return load_model(checkpoints.build(longred.architecture(rope), seed=0))


def test_every_trained_arm_has_the_same_tokens_steps_and_optimiser():
    phases = {name: longred.phase_of(arm) for name, arm in TRAINED.items()}
    assert set(longred.ARMS) - set(phases) == {"original", "theta_swapped"}
    for same in ("steps", "step_tokens", "theta", "lr", "matrix_lr", "warmup", "schedule", "weight_decay", "clip_norm"):
        assert len({getattr(phase, same) for phase in phases.values()}) == 1


def test_longred_has_the_published_mix_and_effective_weights():
    for name in ("longred_c", "longred_u"):
        phase = longred.phase_of(longred.ARMS[name])
        tokens = [stream.window * count for stream, count in zip(phase.mix, phase.windows, strict=True)]
        assert np.divide(tokens, tokens[2]).tolist() == [4, 3, 1]
        pairs = zip(phase.factors, phase.mix, strict=True)
        assert [factor * stream.terms[0].weight for factor, stream in pairs] == [0.5, 1.875, 1.25]


def test_an_ablation_differs_from_longred_u_in_what_its_name_says_alone():
    base = longred.ARMS["longred_u"].streams
    for name, arm in longred.ABLATIONS.items():
        assert (arm.streams[0], arm.streams[2]) == (base[0], base[2]), name
        mine, theirs = arm.streams[1], base[1]
        differs = {
            "weight": mine.terms[0].weight != theirs.terms[0].weight,
            "layers": mine.terms[0].sites != theirs.terms[0].sites,
            "short length": mine.window != theirs.window,
        }
        assert [what for what, does in differs.items() if does] == [arm.group], name
        assert mine.share == theirs.share


def test_skills_are_means_over_distances_with_intervals_over_all_trials(model):
    measured = longred.measure(model, 0, longred.FAR, trials=4)
    rows = pd.DataFrame(longred.skill_rows(measured, 1.0, trials=4)).set_index("metric")
    far = measured[(measured["seq_len"] == longred.LONG) & (measured["metric"] == "answer_logprob_nats")]
    assert rows.loc["long_loss_nats", "value"] == pytest.approx(-far["value"].mean())
    assert (rows["low"] <= rows["value"]).all()
    assert (rows["value"] <= rows["high"]).all()
    found = measured.assign(value=measured["value"].mask(measured["metric"] == "accuracy", 1.0))
    ((low, high),) = [
        (row["low"], row["high"])
        for row in longred.skill_rows(found, 1.0, trials=4)
        if row["metric"] == "long_accuracy"
    ]
    assert (low, high) == (pytest.approx(1 / (1 + 1.959964**2 / 12)), 1.0)  # Wilson's, 12 of 12


def test_drift_windows_are_short_documents_of_the_seed():
    first, again, other = (longred.drift_windows(seed) for seed in (0, 0, 1))
    assert {len(window) for window in first} == {longred.SHORT}
    assert len(first) == longred.DRIFT_WINDOWS
    assert torch.equal(first[3].tokens, again[3].tokens)
    assert not torch.equal(first[3].tokens, other[3].tokens)


def skilled(values, seeds=(0, 1, 2)):
    """Rows of skills and drift for arms, from their number for each metric, with a little noise over seeds."""
    return pd.DataFrame(
        {"model": model, "seed": seed, "metric": metric, "value": value + 0.001 * seed, "low": value - 0.01,
         "high": value + 0.01, "trials": 20_000}
        for (model, metric), value in values.items()
        for seed in seeds
    )  # fmt: skip


VALUES = {
    ("original", "short_accuracy"): 0.99,
    ("theta_swapped", "short_accuracy"): 0.5,
    ("theta_swapped", "long_accuracy"): 0.0,
    ("long_ce", "long_accuracy"): 0.5,
    ("mixed_ce", "short_accuracy"): 0.99,
    ("longred_u", "short_accuracy"): 0.98,
    ("mixed_ce", longred.LAST_STATE): 0.3,
    ("longred_u", longred.LAST_STATE): 0.4,
}
NOTHING_SCALED = pd.DataFrame(columns=["model", "seed", "metric", "value", "low", "high", "query_scale"])


def test_verdicts_are_decided_by_intervals():
    judged = longred.judged(skilled(VALUES), NOTHING_SCALED).set_index("claim")
    held = judged["held"]
    assert held["short_accuracy: theta_swapped less original, from -1 to -0.1"] == "held"
    assert held["theta_swapped: long_accuracy 0.1 or less"] == "held"
    assert held["long_ce: long_accuracy 0.9 or more"] == "not held"
    assert held["short_accuracy: longred_u less mixed_ce, from -0.05 to 0.05"] == "held"
    assert held[f"{longred.LAST_STATE}: longred_u less mixed_ce, from -2 to 0"] == "not held"
    assert not any("kd_packed" in claim for claim in judged.index)  # it was not run


def test_one_seed_decides_no_difference():
    judged = longred.judged(skilled(VALUES, seeds=(0,)), NOTHING_SCALED)
    differences = judged[judged["claim"].str.contains(" less ")]
    assert len(differences)
    assert (differences["held"] == "undecided").all()


def test_seeds_at_the_ceiling_do_not_decide_a_small_difference():
    """Two seeds of 512 right answers of 512 say that accuracies are alike, but not to a hundredth."""
    values = {(arm, "short_accuracy"): 1.0 for arm in ("original", "long_ce")}
    rows = skilled(values, seeds=(0, 1)).assign(value=1.0, trials=512)
    judged = longred.judged(rows, NOTHING_SCALED).set_index("claim")
    row = judged.loc["short_accuracy: long_ce less original, from -0.05 to 0.05"]
    assert row["held"] == "undecided"
    assert row["low"] < -0.05 < 0 < 0.05 < row["high"]


def test_the_order_of_weights_is_judged_by_its_largest_step():
    levels = {"weight_0": 0.4, "weight_2": 0.3, "longred_u": 0.2, "weight_10": 0.1}
    for last, held in ((0.1, "as predicted"), (0.25, "not as predicted")):
        values = {(name, longred.LAST_STATE): level for name, level in (levels | {"weight_10": last}).items()}
        (row,) = longred.judged(skilled(values), NOTHING_SCALED).itertuples()
        assert (row.prediction, row.held) == (11, held)


def test_ablations_of_layers_and_length_are_compared_with_longred_u_of_the_same_seed():
    values = {("longred_u", longred.LAST_STATE): 0.02, ("last_layer", longred.LAST_STATE): 0.025,
              ("first_layer", longred.LAST_STATE): 0.025, ("short_64", longred.LAST_STATE): 0.05}  # fmt: skip
    held = longred.judged(skilled(values), NOTHING_SCALED)["held"]
    assert held.tolist() == ["as predicted", "not as predicted", "as predicted"]


def test_the_trade_off_shows_means_and_intervals_over_seeds():
    rows = [
        {"model": "arm", "seed": seed, "arm": "arms", "metric": metric, "query_scale": scale, "value": value,
         "low": value - 0.02, "high": value + 0.02, "seq_len": 256, "trials": 500}
        for seed, short, long in ((0, 0.8, 0.1), (1, 0.9, 0.3))
        for scale, factor in ((1.0, 1.0), (3.0, 0.0))
        for metric, value in (("short_accuracy", short * factor), ("long_accuracy", long * factor))
    ]  # fmt: skip
    (point,) = plots.trade_off(rows_for("trade_off", rows)).data
    assert (point.x[0], point.y[0]) == (pytest.approx(0.85), pytest.approx(0.2))
    low, high = share_interval([0.8, 0.9], 500)
    assert 0 < low < high < 1
    assert point.error_x.arrayminus[0] == pytest.approx(0.85 - low)
    assert point.error_x.array[0] == pytest.approx(high - 0.85)


def test_the_trade_off_of_one_seed_has_intervals_over_trials_and_needs_both_skills():
    row = {"model": "arm", "seed": 0, "query_scale": 1.0, "value": 0.5, "trials": 100}
    rows = [{**row, "metric": metric} for metric in ("short_accuracy", "long_accuracy")]
    (point,) = plots.trade_off(rows_for("trade_off", rows)).data
    low, high = stats.binomtest(50, 100).proportion_ci(method="wilson")
    assert (point.error_y.array[0], point.error_y.arrayminus[0]) == (
        pytest.approx(high - 0.5),
        pytest.approx(0.5 - low),
    )
    with pytest.raises(longred.InputError, match="no model with skill in both"):
        plots.trade_off(rows_for("trade_off", rows[:1]))


def test_in_full_the_arms_are_run_for_every_seed_and_the_ablations_for_the_first():
    planned = longred.stages(longred.Options(longred.Path("runs"), 2, full=True))
    assert len(planned) == 2 * (1 + len(longred.ARMS)) + len(longred.ABLATIONS)
    assert not longred.stages(longred.Options(longred.Path("runs"), 2))
