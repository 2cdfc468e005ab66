"""The predecessor's kind in small: its models are what they are called, its arms run, its verdicts are arithmetic."""

import dataclasses

import pandas as pd
import pytest
import torch

from experiments import injection, phase_scaling, predecessor, toy_checkpoints
from experiments.stages import Options
from experiments.toy_checkpoints import LONG, SHORT, SHORT_DOCUMENTS
from rope_probe import InputError, load_model
from rope_probe.distillation import Gate
from rope_probe.models import checkpoints
from rope_probe.runs.results import read_run


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("role", predecessor.ROLES)
def test_the_local_layer_sees_so_far_and_the_teachers_global_one_does_not_rotate(role, chunked):
    model = load_model(checkpoints.build(predecessor.architecture(role, chunked), seed=0))
    assert [rotary is None for rotary in model.rotary] == [False, role == "teacher"]
    tokens = SHORT_DOCUMENTS.batch(1, LONG, seed=0).tokens
    changed = tokens.clone()
    changed[0, 100] = changed[0, 100] + 1
    with torch.no_grad():
        states = [model.run_with_cache(window)[1]["blocks.0.hook_resid_post"][0] for window in (tokens, changed)]
        logits = [model(window)[0] for window in (tokens, changed)]
    reached = (states[0] != states[1]).any(-1).nonzero().squeeze(1)
    local = predecessor.LOCAL[role]
    end = 100 // local * local + local if chunked else 100 + local
    assert (reached.min(), reached.max()) == (100, end - 1)
    assert (logits[0][-1] != logits[1][-1]).any()  # the global layer sees all of the window


def test_chunks_change_no_size():
    for role in predecessor.ROLES:
        models = [checkpoints.build(predecessor.architecture(role, chunked), seed=0) for chunked in (False, True)]
        sliding, chunked = ([weight.shape for weight in model.parameters()] for model in models)
        assert sliding == chunked


def test_only_the_masked_teacher_knows_its_place():
    batch = SHORT_DOCUMENTS.batch(1, LONG, seed=0)
    document = batch.tokens[0, :SHORT].repeat(LONG // SHORT)
    copies = dataclasses.replace(batch, tokens=document[None])
    for role, knows in (("teacher", True), ("base", False)):
        model = load_model(checkpoints.build(predecessor.architecture(role), seed=0)).double()
        for name, hook in predecessor.positional_channel.temperature_hooks(model):
            model.add_hook(name, hook)
        with torch.no_grad():
            first, *_, last = model(copies, masked=True).view(LONG // SHORT, SHORT, -1)
        assert ((first - last).abs().max() > 1e-6) == knows


@pytest.fixture
def small(monkeypatch):
    """Two steps a phase, few trials and few contents."""
    quick = {
        role: tuple(
            dataclasses.replace(phase, steps=2, gate=Gate(SHORT, (8,), accuracy=0.0, every=2, trials=4))
            for phase in toy_checkpoints.PHASES[role]
        )
        for role in predecessor.ROLES
    }
    monkeypatch.setattr(toy_checkpoints, "PHASES", quick)
    plain = phase_scaling.phase_of
    monkeypatch.setattr(phase_scaling, "phase_of", lambda arm: dataclasses.replace(plain(arm), steps=2))
    monkeypatch.setattr(injection, "DISTANCES", {1.0: (512,), 3.0: (512,)})
    monkeypatch.setattr(injection.measure, "__defaults__", (4,))
    monkeypatch.setattr(predecessor, "CONTENTS", 3)


def test_every_arm_runs_from_its_checkpoints_and_is_reported(small, tmp_path):
    for role in predecessor.ROLES:
        predecessor.run(role, 0, tmp_path / f"predecessor_{role}-0")
    folders = {name: tmp_path / "predecessor" / f"{name}-0" for name in predecessor.ARMS}
    for name, folder in folders.items():
        predecessor.run(name, 0, folder, tmp_path)
    runs = {name: read_run(folder) for name, folder in folders.items()}
    for name, (_, manifest) in runs.items():
        assert manifest["status"] == "complete"
        assert manifest["config"]["weights_sha256"] == predecessor.config_of(name, 0, tmp_path)["weights_sha256"]
    tables = {
        table: pd.concat([run[0][table] for run in runs.values()], ignore_index=True)
        for table in ("injection", "positional_parts")
    }
    section = predecessor.report({"predecessor": tables})
    judged = section.verdicts.set_index("prediction")
    assert set(judged.index.dropna()) >= {1, 2, 3, 4, 5, 6}
    assert judged.loc[6, "held"] == "held"  # untrained, as an identity must
    trained = {name: load_model(folder / "checkpoint").original_model for name, folder in folders.items()}
    swapped = trained["theta_swapped"].state_dict()
    for name in ("ce", "kd", "kd_masked"):
        assert any(not torch.equal(swapped[key], weight) for key, weight in trained[name].state_dict().items())
    weights = [trained[name].model.layers[0].self_attn.q_proj.weight for name in ("kd", "kd_masked")]
    assert not torch.equal(*weights)


def test_the_plan_is_for_a_full_run_and_has_what_arms_need(tmp_path):
    assert predecessor.stages(Options(tmp_path)) == {}
    planned = predecessor.stages(Options(tmp_path, seeds=2, full=True))
    assert len(planned) == 2 * (len(predecessor.ROLES) + len(predecessor.ARMS))
    assert all(need in planned for stage in planned.values() for need in stage.needs)
    assert predecessor.phase_of("kd_masked").masked
    assert predecessor.phase_of("kd_masked").teacher_masked
    assert not predecessor.phase_of("kd").masked


def test_an_arm_starts_from_checkpoints_with_chunks(small, tmp_path):
    predecessor.run("base", 0, tmp_path / "predecessor_base-0", chunked=True)
    predecessor.run("theta_swapped", 0, tmp_path / "theta_swapped-0", tmp_path)
    student = checkpoints.load(tmp_path / "theta_swapped-0" / "checkpoint")
    assert (student.config.model_type, student.config.attention_chunk_size) == ("llama4_text", SHORT)
    with pytest.raises(InputError, match="--chunked goes with teacher and base"):
        predecessor.run("kd_masked", 0, tmp_path / "other", tmp_path, chunked=True)
