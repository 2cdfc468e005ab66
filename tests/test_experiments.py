from pathlib import Path

import pytest

from experiments import phase_scaling, propagation, reproduce, toy_checkpoints
from rope_probe import InputError
from rope_probe.results import tidy


@pytest.mark.parametrize("arms", [reproduce.QUICK_ARMS, tuple(phase_scaling.ARMS)])
def test_every_stage_needs_stages_that_are_planned_and_has_a_place_of_its_own(arms):
    stages = reproduce.plan(Path("runs"), 2, arms)
    assert len(stages) == len({stage.run for stage in stages.values()})
    assert all(need in stages for stage in stages.values() for need in stage.needs)
    assert {stage.command[0] for stage in stages.values()} == set(reproduce.SCRIPTS)
    scripts = Path(reproduce.__file__).parent
    assert all((scripts / f"{stage.command[0]}.py").is_file() for stage in stages.values())


def test_every_arm_that_trains_has_the_same_budget_and_optimiser():
    phases = [phase_scaling.phase_of(arm) for arm in phase_scaling.ARMS.values() if arm.objective is not None]
    assert len(phases) == 9
    for name in ("window", "steps", "batch_tokens", "lr", "matrix_lr", "schedule", "warmup", "weight_decay"):
        assert len({getattr(phase, name) for phase in phases}) == 1


def test_every_base_has_one_stopping_rule():
    (small,), (large,) = toy_checkpoints.PHASES["base"], toy_checkpoints.PHASES["base_large_theta"]
    assert small.theta < large.theta
    assert (small.gate, small.steps, small.data) == (large.gate, large.steps, large.data)


def test_a_stage_that_fails_is_named(tmp_path):
    broken = reproduce.Stage(("no_such_script",), tmp_path / "run", dict)
    after = reproduce.Stage(("no_such_script",), tmp_path / "after", dict, ("broken",))
    with pytest.raises(InputError, match="stage broken failed"):
        reproduce.run_all({"broken": broken, "after": after})


def test_the_repeated_windows_are_what_the_predictions_speak_of():
    arms = {arm.name: arm for arm in propagation.copy_arms(0)}
    token, after = arms["repeated token"].window, arms["repeated token after another"]
    assert (token.tokens == token.tokens[0, 0]).all()
    assert (after.window.tokens[0, 1:] == token.tokens[0, 0]).all()
    assert after.window.tokens[0, 0] != token.tokens[0, 0]
    assert len(arms["repeated document"].window) == len(propagation.packed_documents(0)) == propagation.WINDOW


def test_verdicts_of_phase_scaling_are_arithmetic():
    far = {"kd_phase_wise": (1.0, 0.9), "ce_phase_wise": (0.0, 0.1), "kd_large_theta": (0.5, 0.4)}
    at = {"seq_len": 1024, "distance": 512, "metric": "accuracy", "low": 0.0, "high": 1.0}
    rows = [
        {**at, "value": value, "model": arm, "seed": seed}
        for arm, values in far.items()
        for seed, value in enumerate(values)
    ]
    table = phase_scaling.verdicts(tidy(rows)).set_index("prediction")
    assert table.loc[1, "mean"] == pytest.approx(0.95)
    assert table.loc[1, "held"] == "yes"
    assert table.loc[2, "held"] == "yes"
    assert table.loc[4, "mean"] == pytest.approx(0.5)
    assert table.loc[4, "held"] == "undecided"
    one = phase_scaling.verdicts(tidy(rows[:1])).iloc[0]
    assert (one["seeds"], one["low"], one["high"]) == (1, 0.0, 1.0)
