from pathlib import Path

import pytest

from experiments import phase_scaling, propagation, reproduce, toy_checkpoints
from rope_probe import InputError
from rope_probe.results import new_run, tidy
from rope_probe.seeds import derive


@pytest.mark.parametrize("full", [False, True])
def test_every_stage_needs_stages_that_are_planned_and_has_a_place_of_its_own(full):
    stages = reproduce.plan(Path("runs"), 2, full)
    assert len(stages) == len({stage.run for stage in stages.values()})
    assert all(need in stages for stage in stages.values() for need in stage.needs)
    assert {stage.command[0] for stage in stages.values()} == set(reproduce.SCRIPTS) - (
        set() if full else {"theta_grid"}
    )
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


def test_a_stage_that_fails_is_told_and_takes_only_its_dependents_along(tmp_path):
    with new_run(tmp_path / "there", "test", {}):
        pass
    with new_run(tmp_path / "missed", "test", {}) as run:
        run.manifest["missed_gate"] = "0.94 at 60"

    def no_config():
        raise InputError("no such parent")

    stages = {
        "broken": reproduce.Stage(("no_such_script",), tmp_path / "run", dict),
        "after": reproduce.Stage(("no_such_script",), tmp_path / "after", dict, ("there", "broken")),
        "far after": reproduce.Stage(("no_such_script",), tmp_path / "far", dict, ("after",)),
        "there": reproduce.Stage(("no_such_script",), tmp_path / "there", dict),
        "missed": reproduce.Stage(("no_such_script",), tmp_path / "missed", dict),
        "unknown": reproduce.Stage(("no_such_script",), tmp_path / "unknown", no_config),
    }
    assert reproduce.run_all(stages) == {
        "broken": "exit code 1, see above",
        "after": "needs broken",
        "far after": "needs after",
        "missed": "0.94 at 60",
        "unknown": "no such parent",
    }


def test_a_teacher_and_a_base_of_one_seed_share_nothing():
    seeds = [derive(0, role, purpose) for role in ("teacher", "base") for purpose in ("weights", "short", "long")]
    seeds += [derive(0, "extension"), derive(0, "probe"), derive(1, "extension"), 0]
    assert len(set(seeds)) == len(seeds)
    assert derive(0, "extension") == derive(0, "extension")


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
    assert table.loc[4, "held"] == "no"
    few = phase_scaling.verdicts(tidy([row for row in rows if row["seed"] == 0])).set_index("prediction")
    assert few.loc[4, "held"] == "undecided"
    one = phase_scaling.verdicts(tidy(rows[:1])).iloc[0]
    assert (one["seeds"], one["low"], one["high"]) == (1, 0.0, 1.0)
