import pytest

from rope_probe import InputError, load_model
from rope_probe.names import SWEEPS
from rope_probe.tracing.sweeps import doses, sweep
from tests import zoo


@pytest.mark.parametrize(
    ("window", "expected"), [(1, [0.25, 1]), (64, [0.25, 1, 4, 16, 64]), (100, [0.25, 1, 4, 16, 64, 100])]
)
def test_doses_go_from_a_quarter_token_to_the_window(window, expected):
    assert doses(window) == expected


@pytest.mark.parametrize("name", ["llama", "smollm3_nope_layer", "gemma3", "phi3_partial", "glm"])
@pytest.mark.parametrize("kind", SWEEPS)
def test_every_perturbation_of_a_sweep_fits_the_model_and_is_another_one(name, kind):
    model = load_model(zoo.model(zoo.CONFIGS[name]()))
    found = sweep(kind, model, 30)
    assert len(set(found)) == len(found) > 0
    for perturbation in found:
        turns = perturbation.turns(model.original_model, 30)
        assert any(turn.changes.any() for turn in turns.values())


def test_parts_are_gone_through_once_for_q_and_once_for_k():
    model = load_model(zoo.llama())
    counts = {kind: len(sweep(kind, model, 30)) for kind in ("layer", "head", "pair")}
    assert counts == {"layer": 2 * 2, "head": 2 * 4 + 2 * 2, "pair": 2 * 4}
    assert {one.side for one in sweep("layer", model, 30, sides=["k"])} == {"k"}


def test_an_unknown_sweep_is_refused():
    with pytest.raises(InputError, match="dose, layer, head"):
        sweep("chapter", load_model(zoo.llama()), 30)
