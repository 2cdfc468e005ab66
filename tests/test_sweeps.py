import math

import pytest
import torch

from rope_probe import InputError, PairTurn, PositionShift, ThetaSwap, load_model, repeated_window, trace
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
    counts = {kind: len(sweep(kind, model, 30)) for kind in ("layer", "head", "pair", "pair-tokens")}
    assert counts == {"layer": 2 * 2, "head": 2 * 4 + 2 * 2, "pair": 2 * 4, "pair-tokens": 2 * 4}
    assert {one.side for one in sweep("layer", model, 30, sides=["k"])} == {"k"}


def test_an_unknown_sweep_is_refused():
    with pytest.raises(InputError, match="dose, layer, head"):
        sweep("chapter", load_model(zoo.llama()), 30)


def test_thetas_are_those_of_each_kind_of_layer():
    """Gemma 3's global layers, at a theta of a million, got the factors of the local layers' ten thousand."""
    model = load_model(zoo.model(zoo.CONFIGS["gemma3"]()))
    swaps = sweep("theta", model, 30)
    assert swaps == [
        ThetaSwap("qk", theta * factor, layers=layers)
        for theta, layers in ((1e4, (0,)), (1e6, (1,)))
        for factor in (0.25, 0.5, 2.0, 4.0)
    ]
    assert sweep("theta", model, 30, layers=[1]) == swaps[4:]
    plain = load_model(zoo.llama(rope_parameters=zoo.ROPE_TYPES["llama3"]))
    assert [swap.theta for swap in sweep("theta", plain, 30)] == [5e5 * factor for factor in (0.25, 0.5, 2.0, 4.0)]


def test_every_pair_is_turned_alike_whatever_its_wavelength():
    """A shift by 16 tokens turns a pair of wavelength 16 by nothing at all, so that it looks innocent."""
    pairs = 4
    model = load_model(zoo.llama())
    rotary = model.original_model.model.rotary_emb
    rotary.inv_freq[1] = rotary.original_inv_freq[1] = 2 * math.pi / 16
    model = load_model(model.release()).double()
    by_tokens = sweep("pair-tokens", model, 30, sides=["q"])
    by_angle = sweep("pair", model, 30, sides=["q"])
    assert by_angle == [PairTurn("q", 1.0, pairs=pair) for pair in range(pairs)]
    assert by_tokens == [PositionShift("q", 16.0, pairs=pair) for pair in range(pairs)]
    frame = trace(model, repeated_window(range(3, 13), 3), by_tokens + by_angle, sites=["logits"], by="window")
    effect = frame[frame["metric"] == "kl_nats"].pivot(index="pair", columns="kind", values="value")
    assert effect.loc[1, "PositionShift"] < 1e-12
    assert (effect["PairTurn"] > 1e-4).all()
    assert (frame["wavelength"].notna()).all()


def test_pairs_are_gone_through_by_kind_of_layer_where_layers_rotate_differently():
    model = load_model(zoo.model(zoo.CONFIGS["gemma3"]()))
    turns = sweep("pair", model, 30, sides=["q"])
    assert turns == [PairTurn("q", 1.0, layers=(layer,), pairs=pair) for layer in (0, 1) for pair in range(4)]
    frame = trace(model, repeated_window(range(3, 13), 3), turns, sites=["logits"], by="window")
    wavelengths = frame.groupby("inject_layer")["wavelength"].unique()
    for layer in (0, 1):
        expected = 2 * math.pi / model.rotary[layer].inv_freq
        torch.testing.assert_close(torch.tensor(sorted(wavelengths[layer])).double(), expected, rtol=1e-6, atol=0)


def test_sweeps_can_be_narrowed_to_layers_and_heads():
    model = load_model(zoo.llama())
    narrowed = sweep("head", model, 30, sides=["q"], layers=1, heads=[0, 3])
    assert narrowed == [PositionShift("q", 16.0, layers=1, heads=head) for head in (0, 3)]
    assert sweep("layer", model, 30, sides=["k"], layers=[1]) == [PositionShift("k", 16.0, layers=1)]
    for kind in SWEEPS:
        for perturbation in sweep(kind, model, 30, layers=[1], heads=[0]):
            turns = perturbation.turns(model.original_model, 30)
            assert {layer for _, layer in turns} == {1}
            assert all(turn.heads in ([0], [0, 1]) for turn in turns.values())
    for where, named in (({"layers": 2}, "layer 2"), ({"heads": 4}, "head 4"), ({"heads": 2}, "key-value head 2")):
        with pytest.raises(InputError, match=named):
            sweep("head", model, 30, **where)
    bare = load_model(zoo.model(zoo.CONFIGS["smollm3_nope_layer"]()))
    with pytest.raises(InputError, match="has no RoPE"):
        sweep("layer", bare, 30, layers=bare.rotary.index(None))
    with pytest.raises(InputError, match="has no RoPE"):
        sweep("theta", bare, 30, layers=bare.rotary.index(None))
