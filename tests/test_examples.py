"""The configurations in examples/ are read as they stand, and say what their comments say."""

from pathlib import Path

import pytest

from rope_probe import rope
from rope_probe.distillation import read_config

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.toml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_read(example):
    config = read_config(example)
    assert config.phases
    assert all(phase.steps for phase in config.phases)


def test_the_llama_is_a_short_model_and_its_theta_is_above_the_base_bound():
    """It was Llama 3.2 1B, which is a model of 128k already."""
    example = Path(__file__).parents[1] / "examples" / "llama.toml"
    config = read_config(example)
    (phase,) = config.phases
    bound = rope.base_bound(64, phase.window)
    assert bound <= phase.theta <= 1.1 * bound
    assert "Llama-3" not in example.read_text()
