import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer

from experiments import (
    longred,
    phase_scaling,
    positional_channel,
    propagation,
    query_span_verdicts,
    query_spans,
    rival_spans,
    stages,
    theta_grid,
    toy_checkpoints,
)
from experiments.toy_checkpoints import SHORT
from rope_probe import InputError, KeyValueTask, Span, load_model
from rope_probe.distillation import Gate
from rope_probe.distillation.signal import SIGNAL
from rope_probe.models import checkpoints
from rope_probe.names import MISSED_GATE
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.intervals import share_interval
from rope_probe.runs.results import is_complete, new_run, read_run, source_hash
from rope_probe.runs.tables import Tables
from rope_probe.runs.verdicts import verdict
from rope_probe.seeds import derive
from rope_probe.spans.causal import SPAN_EFFECTS
from rope_probe.spans.causal import query_spans as spans_of
from rope_probe.spans.weights import SPANS
from tests import zoo


@pytest.mark.parametrize("full", [False, True])
def test_every_stage_needs_stages_that_are_planned_and_has_a_place_of_its_own(full):
    planned = stages.plan(stages.Options(Path("runs"), 2, full))
    assert len(planned) == len({stage.run for stage in planned.values()})
    assert all(need in planned for stage in planned.values() for need in stage.needs)
    scripts = {stage.script for stage in planned.values()}
    experiments = {module.__name__.removeprefix("experiments.") for module in stages.discover()}
    only_in_full = {"theta_grid", "longred", "positional_channel", "predecessor", "restoration", "rival_spans"}
    only_reported = {"beyond_train"}
    assert scripts == experiments - only_reported - (set() if full else only_in_full)
    assert all(stage.file.is_file() for stage in planned.values())


def test_every_experiment_keeps_the_contract():
    assert len(stages.discover()) >= 7
    for module in stages.discover():
        assert module.QUESTION.endswith("?")
        assert list(module.PREDICTIONS) == list(range(1, len(module.PREDICTIONS) + 1))
        assert all(text.endswith(".") for text in module.PREDICTIONS.values())
        assert callable(module.report)


def test_stages_with_the_longest_wait_behind_them_come_first():
    plan = stages.plan(stages.Options(Path("runs")))
    urgent = [name for name, stage in plan.items() if stage.urgent]
    planned = list(plan)
    assert planned[: len(urgent)] == urgent
    assert planned[len(urgent)] == "teacher-0"
    assert planned.index("phase_scaling/kd_phase_wise-0") < planned.index("text")


def test_a_run_is_reused_only_if_its_sources_are_unchanged(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("one")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    with new_run(tmp_path / "run", "test", {"steps": 1}):
        pass
    assert is_complete(tmp_path / "run", {"steps": 1}, sources=source_hash(script))
    script.write_text("another")
    assert not is_complete(tmp_path / "run", {"steps": 1}, sources=source_hash(script))
    assert is_complete(tmp_path / "run", {"steps": 1})


def test_every_arm_that_trains_has_the_same_budget_and_says_in_its_name_what_else_differs():
    arms = {name: arm for name, arm in phase_scaling.ARMS.items() if arm.objective is not None}
    phases = {name: phase_scaling.phase_of(arm) for name, arm in arms.items()}
    assert len(phases) == 13
    for same in ("steps", "batch_tokens", "schedule", "warmup", "weight_decay", "clip_norm"):
        assert len({getattr(phase, same) for phase in phases.values()}) == 1
    for name, phase in phases.items():
        assert (phase.matrix_lr is None) == name.endswith("adamw")
        assert phase.window == (64 if "more_short" in name else 1024)
    assert len({(phase.lr, phase.matrix_lr) for phase in phases.values()}) == 2


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

    planned = {
        "broken": stages.Stage(("text", "--no-such-option"), tmp_path / "run", dict),
        "after": stages.Stage(("text",), tmp_path / "after", dict, ("there", "broken")),
        "far after": stages.Stage(("text",), tmp_path / "far", dict, ("after",)),
        "there": stages.Stage(("text",), tmp_path / "there", dict),
        "missed": stages.Stage(("text",), tmp_path / "missed", dict),
        "unknown": stages.Stage(("text",), tmp_path / "unknown", no_config),
    }
    without = stages.run_all(planned, reuse_anyway=True)
    assert without.pop("broken").startswith("exit code 2: ")
    assert without == {
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


@pytest.fixture(scope="module")
def untrained():
    config = toy_checkpoints.architecture({"rope_type": "default", "rope_theta": 300.0})
    frame = propagation.identities(checkpoints.build(config, seed=3), 0)
    return frame.assign(model=propagation.UNTRAINED, seed=0)


def test_identities_hold_on_weights_that_were_never_trained(untrained):
    table = propagation.judged(untrained, SIGNAL.frame([]))
    identities = table[table["kind"] == "identity"]
    assert identities["prediction"].tolist() == [1, 3, 4, 7]
    assert (identities["held"] == "held").all()
    contrasts = table[table["kind"].isna()]
    assert len(contrasts) == 2
    assert (contrasts["measured"] > 100 * propagation.FLOOR).all()


def test_what_is_no_identity_is_found_out_on_such_weights(untrained):
    other = untrained.assign(masked=~untrained["masked"].fillna(False))  # takes copies that see each other for masked
    table = propagation.judged(
        other[other["arm"] != propagation.DOSES_ARM].pipe(
            lambda copies: pd.concat([copies, untrained[untrained["arm"] == propagation.DOSES_ARM]])
        ),
        SIGNAL.frame([]),
    )
    masked = table[table["claim"].str.contains("masked")]
    assert (masked["kind"].item(), masked["held"].item()) == ("identity", "not held")


def test_verdicts_of_phase_scaling_are_arithmetic():
    far = {
        "kd_phase_wise": (1, 0.9, 0.98),
        "ce_phase_wise": (2 / 128, 3 / 128, 2 / 128),
        "kd_large_theta": (0.5, 0.4, 0.48),
    }
    far |= {"theta_swapped": (0.5, 0.6, 0.55)}
    at = {"seq_len": 1024, "distance": 512, "metric": "accuracy", "low": 0.0, "high": 1.0, "trials": 128}
    rows = [
        {**at, "value": value, "model": arm, "seed": seed}
        for arm, values in far.items()
        for seed, value in enumerate(values)
    ]
    table = phase_scaling.judged(RETRIEVAL.frame(rows)).set_index("prediction")
    assert table.loc[1, "measured"] == pytest.approx(0.96)
    assert table.loc[1, "held"] == "undecided"  # the mean is above .95, and the interval crosses it
    assert table.loc[7, "held"] == "not held"
    assert (table.loc[1, "low"], table.loc[1, "high"]) == share_interval([1, 0.9, 0.98], 128)
    assert table.loc[2, "held"] == "held"
    assert table.loc[4, "measured"] == pytest.approx(0.5)
    assert table.loc[4, "held"] == "not held"
    assert table.loc[4, "low"] > phase_scaling.TIE
    few = phase_scaling.judged(RETRIEVAL.frame([row for row in rows if row["seed"] == 0])).set_index("prediction")
    assert few.loc[4, "held"] == "undecided"
    one = phase_scaling.judged(RETRIEVAL.frame(rows[:1])).iloc[0]
    assert (one["n"], one["low"], one["high"]) == (1, 0.0, 1.0)


def spans_and_effects(seeds=(0, 1)):
    """Tables of query_spans for one arm whose W_Q changed twice as much as its W_K, and whose curves are known."""
    spans, rows = [], []
    for seed in seeds:
        model = {"model": "kd_adamw", "seed": seed}
        at = {**model, "seq_len": 1024}
        for layer in (0, 1):
            for part, value in (("W_Q", 0.4), ("W_K", 0.2 + 0.1 * seed), ("W_V", 0.8)):
                place = {"layer": layer, "site": f"blocks.{layer}.attn.{part}"}
                spans.append({**model, **place, "metric": "rel_change", "value": value})
        accuracy = {**at, "metric": "accuracy", "distance": 128}
        for what, into_start, into_end in (("nothing", 0.1, 0.9), ("W_Q", 0.5, 0.3), ("everything", 0.9, 0.1)):
            group = {**accuracy, "arm": query_spans.GROUPS, "group": what}
            rows.append({**group, "into": query_spans.START, "value": into_start})
            rows.append({**group, "into": query_spans.END, "value": into_end})
        for order, draw, values in (
            ("greedy", None, (0.1, 0.5, 0.9)),
            ("random", 0, (0.1, 0.1, 0.7)),
            ("random", 1, (0.1, 0.1, 0.5)),
        ):
            curve = {**accuracy, "arm": query_spans.CURVE, "span_set": query_spans.WITH_KEYS, "movable": 64}
            curve |= {"order": order, "draw": draw}
            rows += [{**curve, "moved": n, "value": value} for n, value in zip((0, 32, 64), values, strict=True)]
    return SPANS.frame(spans), SPAN_EFFECTS.frame(rows)


def test_what_is_said_of_query_spans_is_arithmetic():
    spans, effects = spans_and_effects()
    changes = query_span_verdicts.part_changes(spans)
    np.testing.assert_allclose(changes["W_Q"], 0.4)
    np.testing.assert_allclose(changes["W_K"], [0.2, 0.3])
    brought, left = (query_span_verdicts.gains(effects, arm) for arm in (query_spans.START, query_spans.END))
    np.testing.assert_allclose(brought["W_Q"], 0.5)
    np.testing.assert_allclose(left["W_Q"], 0.25)
    curves = query_span_verdicts.curves(effects, query_spans.WITH_KEYS)
    np.testing.assert_allclose(curves.loc["kd_adamw", 0, "random", 0], [0.1, 0.1, 0.7])
    table = query_span_verdicts.carrying(effects).set_index("what")
    greedy, random = (table.loc[f"{query_spans.WITH_KEYS}, {order}"] for order in ("greedy", "random"))
    assert greedy["half"] == "0.50 [0.50, 0.50]"
    assert greedy["90%"] == "0.90 [0.90, 0.90]"
    assert random["half"] == "0.92 [0.92, 0.92]"  # the mean of 5/6 and 1, each order by itself
    assert random["90%"] == "not on 2 of 2"
    assert random["most"].startswith("0.62")


def test_the_query_spans_of_a_toy_model_go_in_bands_and_parts():
    model = load_model(zoo.model(toy_checkpoints.architecture({"rope_type": "default", "rope_theta": 20_000.0})))
    bands = query_spans._bands(model)
    assert (bands["fast"], bands["slow"][0]) == ([0, 1, 2, 3], 9)
    groups = query_spans._groups(model)
    assert [span.part for span in groups["all but W_Q, W_K"]] == ["W_V", "W_O", "mlp", "norms", "W_E", "W_U"]
    assert groups["W_Q, W_K, layer 1 head 0"] == [Span(1, 0), Span(1, 0, part="W_K")]
    assert sum(len(groups[f"W_Q, {band} pairs"]) for band in bands) == 16


def test_query_spans_are_told_of_where_no_transplants_came_out():
    spans, _ = spans_and_effects(seeds=(0,))
    results = Tables({"spans": spans.assign(model="ce_phase_wise")})
    shown = query_span_verdicts.shown(results)
    assert "relative change of each part, mean over layers" in shown
    assert not [title for title in shown if "transplants" in title]
    assert query_span_verdicts.judged(results).empty


def test_predictions_on_query_spans_are_judged_by_the_interval_and_not_by_the_mean():
    """W_Q over W_K is 2 and 4/3 on two seeds: outside .8 to 1.25 both, and their interval reaches far into it."""
    spans, _ = spans_and_effects()
    others = [spans.assign(site=f"blocks.0.{name}") for name in ("attn.W_V", "attn.W_O", "mlp")]
    spans = pd.concat([spans, *others], ignore_index=True)
    verdicts = query_span_verdicts.judged(Tables({"spans": spans}))
    row = verdicts[verdicts["claim"].str.contains("W_Q over W_K")].iloc[0]
    assert row["measured"] == pytest.approx(5 / 3)
    assert row["low"] < 1 < row["high"]
    assert row["held"] == "undecided"
    norms = pd.concat([spans, spans.assign(metric="change_norm", value=spans["value"] ** 2)], ignore_index=True)
    beside = query_span_verdicts.judged(Tables({"spans": norms})).query("prediction.isna()")
    assert beside["measured"].iloc[0] == pytest.approx((4 + 16 / 9) / 2)
    one = query_span_verdicts.judged(Tables({"spans": spans[spans["seed"] == 0]}))
    assert one[one["claim"].str.contains("W_Q over W_K")].iloc[0]["held"] == "not as predicted"


@pytest.fixture
def extended(tmp_path):
    """Untrained checkpoints under the names of a teacher, a base and what it was extended to."""
    thetas = {"teacher-0": 10_000.0, "base-0": 300.0, "phase_scaling/kd_phase_wise-0": 20_000.0}
    for number, (name, theta) in enumerate(thetas.items()):
        rope = {"rope_type": "default", "rope_theta": theta}
        with new_run(tmp_path / name, "toy_checkpoints", {}) as made:
            model = checkpoints.build(toy_checkpoints.architecture(rope), seed=number)
            checkpoints.save(model, made.folder / "checkpoint")
            made.provenance.add_model(name.removesuffix("-0"), model)
    return tmp_path


@pytest.mark.parametrize(
    ("interval", "kind", "held", "word"),
    [
        ({"low": 0.4, "high": 0.6}, "prediction", True, "held"),
        ({"low": 0.4, "high": 0.6}, "prediction", False, "not held"),
        ({"low": 0.4, "high": 0.6}, "prediction", None, "undecided"),
        ({}, "prediction", True, "as predicted"),
        ({}, "prediction", False, "not as predicted"),
        ({"low": -np.inf, "high": np.inf}, "prediction", True, "as predicted"),  # Student's, of one seed
        ({}, "identity", True, "held"),
    ],
)
def test_a_prediction_is_held_by_an_interval_alone(interval, kind, held, word):
    assert verdict(1, "a claim", 0.5, held, kind=kind, **interval)["held"] == word


@pytest.mark.parametrize(
    ("make", "role"),
    [(toy_checkpoints.make, "teacher"), (positional_channel.run, "teacher"), (longred.run, "base")],
    ids=["a toy checkpoint", "the NoPE teacher", "LongReD's base"],
)
@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_a_checkpoint_is_trained_through_its_phases_and_recorded(make, role, accuracy, tmp_path, monkeypatch):
    gate = Gate(SHORT, (8,), accuracy=accuracy, every=1, trials=2)
    plain = longred.base_phases() if make is longred.run else toy_checkpoints.PHASES[role]
    phases = tuple(dataclasses.replace(phase, steps=1, gate=gate) for phase in plain)
    monkeypatch.setattr(toy_checkpoints, "PHASES", {role: phases})
    monkeypatch.setattr(longred, "base_phases", lambda: phases)
    if accuracy:
        with pytest.raises(typer.Exit) as ended:
            make(role, 0, tmp_path / "out")
        assert ended.value.exit_code == MISSED_GATE
    else:
        make(role, 0, tmp_path / "out")
    tables, manifest = read_run(tmp_path / "out")
    trained = [phase.name for phase in phases][: 1 if accuracy else 2]  # a missed gate ends it
    assert tables["losses"]["phase"].unique().tolist() == trained
    assert tables["retrieval"]["phase"].unique().tolist() == trained
    assert list(manifest["read"]) == trained
    assert (manifest["missed_gate"] is not None) == bool(accuracy)
    assert (tmp_path / "out" / "checkpoint" / "config.json").exists()


def test_transplants_are_measured_and_recorded(extended, monkeypatch):
    few = query_spans.Budget(trials=1, ranking_trials=1, orders=1, sizes=(0, 2), greedy=1, greedy_trials=1, path=1)
    monkeypatch.setattr(query_spans, "THOROUGH", few)
    monkeypatch.setattr(query_spans, "DISTANCES", (128, 256))
    monkeypatch.setattr(query_spans, "query_spans", lambda model: spans_of(model)[:3])
    query_spans.measure("kd_phase_wise", 0, extended / "out", extended)
    tables, manifest = read_run(extended / "out")
    assert manifest["status"] == "complete"
    effects = tables["span_effects"]
    assert set(effects["arm"]) == {query_spans.GROUPS, query_spans.SELECTION, query_spans.ALONE,
                                   query_spans.TOGETHER_ALONE, query_spans.CURVE}  # fmt: skip
    assert effects["value"].notna().all()
    assert set(tables["span_predictors"]["metric"]) >= {"greedy_rank", "greedy_rank_together"}


def test_rivals_of_spans_are_measured_and_recorded(extended, monkeypatch):
    few = {"TRIALS": 1, "SELECTION_TRIALS": 1, "CHOSEN": 2, "DRAWS": 1, "PATH_TRIALS": 1, "PATH_POINTS": 1}
    for name, value in {**few, "FACTORS": (1.0, 3.0), "DISTANCES": (128,)}.items():
        monkeypatch.setattr(rival_spans, name, value)
    rival_spans.measure("kd_phase_wise", 0, extended / "out", extended)
    rows = read_run(extended / "out")[0]["rival_spans"]
    assert {"accuracy", "previous_token"} <= set(rows["metric"])
    assert rows.loc[rows["metric"] == "accuracy", "state"].nunique() == 8


def test_the_theta_grid_is_judged_over_seeds():
    """Of three seeds two sort every cell by the base bound, and one half of them: their mean is above .8, no more."""
    few, many = theta_grid.BUDGETS
    at = {
        "model": "student",
        "head_dim": 32,
        "short_theta": 300.0,
        "phase": "extension",
        "metric": "accuracy",
        "seq_len": 1024,
    }
    rows = [
        {
            **at,
            "steps": steps,
            "seed": seed,
            "long_theta": theta,
            "distance": 512,
            "value": value if steps == many else 0.0,
        }
        for steps in (few, many)
        for seed, values in enumerate(((0.0, 1.0), (0.0, 1.0), (1.0, 1.0)))
        for theta, value in zip((300.0, 20_000.0), values, strict=True)
    ]
    frame = theta_grid.THETA_GRID.frame(rows)
    table = theta_grid.judged(frame)
    bound = table[table["prediction"] == 1].iloc[0]
    assert (bound["measured"], bound["n"], bound["held"]) == (pytest.approx(5 / 6), 3, "undecided")
    assert bound["low"] < 0.8 < bound["high"]
    fewer = table[table["prediction"] == 4].iloc[0]
    assert (fewer["measured"], fewer["held"]) == (pytest.approx(-4 / 3), "undecided")
    one = theta_grid.judged(frame[frame["seed"] == 0])
    assert set(one.query("prediction in (1, 4)")["held"]) == {"as predicted"}


def test_a_row_of_the_theta_grid_is_trained_and_recorded(extended, monkeypatch):
    gate = Gate(SHORT, (8,), accuracy=0.0, every=1, trials=2)
    short = dataclasses.replace(toy_checkpoints.short_phase(300.0), steps=1, gate=gate)
    monkeypatch.setattr(toy_checkpoints, "short_phase", lambda theta: short)
    monkeypatch.setattr(phase_scaling, "TRIALS", 2)
    for name, value in {"BUDGETS": (5,), "LONG_THETAS": (2e4, 1e5), "DISTANCES": (128,)}.items():
        monkeypatch.setattr(theta_grid, name, value)
    theta_grid.make_row(32, 300.0, 0, extended / "out", extended)
    rows = read_run(extended / "out")[0]["theta_grid"]
    assert set(rows["metric"]) == {"gate_accuracy", "accuracy", "answer_logprob_nats"}
    assert set(rows["long_theta"].dropna()) == {2e4, 1e5}


def test_trials_that_select_share_none_with_those_that_judge():
    purposes = ("transplants", "ranking", "selection")
    for seed in (0, 1):
        task = KeyValueTask(query_spans.SHORT_DOCUMENTS, query_spans.LONG)
        drawn = [
            {tuple(row) for d in query_spans.DISTANCES
             for row in task.trials(d, 32, seed=query_spans.trials_seed(seed, purpose)).tolist()}
            for purpose in purposes
        ]  # fmt: skip
        assert [len(rows) for rows in drawn] == [128] * 3
        assert not any(one & other for one, other in itertools.combinations(drawn, 2))


def test_the_causal_head_is_selected_on_one_set_of_trials_and_judged_on_the_other():
    at = {"model": "kd_adamw", "seed": 0, "seq_len": 1024, "distance": 128}
    ends = {"nothing": 0.0, "everything": 1.0}
    judging = {"head 0": (0.9, 0.1), "head 1": (0.4, 0.5), "head 2": (0.3, 0.7)}  # head 2 stands out by chance
    rows = []
    for into, place in ((query_spans.END, 0), (query_spans.START, 1)):
        values = {name: both[place] for name, both in judging.items()}
        values |= ends if into == query_spans.START else {"nothing": 1.0, "everything": 0.0}
        rows += [
            {**at, "arm": query_spans.GROUPS, "into": into, "group": name, "metric": "accuracy", "value": value}
            for name, value in values.items()
        ]
    rows += [
        {**at, "arm": query_spans.SELECTION, "into": query_spans.END, "group": name, "metric": "answer_logprob_nats",
         "value": value}
        for name, value in {"head 0": -0.1, "head 1": -5.0, "head 2": -1.0}.items()
    ]  # fmt: skip
    found = query_span_verdicts.causal_heads(SPAN_EFFECTS.frame(rows)).loc["kd_adamw", 0]
    assert found["head"] == "head 1"
    assert (found["left"], found["brings"]) == (0.4, 0.5)
    assert (found["left, other heads"], found["brings, other heads"]) == pytest.approx((0.6, 0.4))
