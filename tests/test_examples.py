"""The configurations in examples/ are read as they stand, and say what their comments say."""

from pathlib import Path

import pytest

from rope_probe import load_model, repeated_window, rope, trace
from rope_probe.distillation import read_config
from rope_probe.tracing.perturbation_files import SHORT_NAMES, read_perturbations
from tests import zoo

FOLDER = Path(__file__).parents[1] / "examples"
PERTURBATIONS = FOLDER / "perturbations.toml"
EXAMPLES = sorted(set(FOLDER.glob("*.toml")) - {PERTURBATIONS})


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_read(example):
    config = read_config(example)
    assert config.phases
    assert all(phase.steps for phase in config.phases)


def test_the_llama_is_a_short_model_and_its_theta_is_above_the_base_bound():
    """It was Llama 3.2 1B, which is a model of 128k already."""
    example = FOLDER / "llama.toml"
    config = read_config(example)
    (phase,) = config.phases
    bound = rope.base_bound(64, phase.window)
    assert bound <= phase.theta <= 1.1 * bound
    assert "Llama-3" not in example.read_text()


def test_the_perturbations_hold_every_kind_and_each_changes_the_logits():
    arms = read_perturbations(PERTURBATIONS)
    listed = [one for perturbations in arms.values() for one in perturbations]
    assert {type(one) for one in listed} == set(SHORT_NAMES.values())
    window = repeated_window(list(range(5, 53)), 2)  # 96 positions: beyond the reference of log_n
    frame = trace(load_model(zoo.llama()), window, listed, sites=["logits"], control=False)
    changed = frame[frame["metric"] == "kl_nats"].groupby("perturbation")["value"].max()
    assert len(changed) == len(listed) == 8
    assert (changed > 0).all()
