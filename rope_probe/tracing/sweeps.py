"""Sweeps of perturbations that answer one question each: how much, in which layer, head, pair, and of what kind.

dose     shifts of q, k and both, by 1/4 token, 1, 4, ... and the window
layer    a shift in one layer at a time, of q and of k
head     ... in one head of one layer at a time
pair     ... of one rotary pair at a time, in all layers
jitter   every position moved by its own random amount, up to 1/4 token, 1, 4, ... and the window
theta    rotation by 1/4, 1/2, 2 and 4 times the model's theta
"""

from collections.abc import Callable, Sequence
from typing import get_args

from rope_probe.errors import InputError
from rope_probe.models.architectures import heads_of
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.names import SWEEPS
from rope_probe.tracing.perturbations import Perturbation, PositionJitter, PositionShift, Side, ThetaSwap

SIZE = 16.0
THETA_FACTORS = (0.25, 0.5, 2.0, 4.0)


def doses(window: int) -> list[float]:
    """Tokens to shift by: 1/4, 1, 4, ... below the window, and the window."""
    below = []
    dose = 0.25
    while dose < window:
        below.append(dose)
        dose *= 4
    return [*below, float(window)]


def sweep(
    kind: str, model: HookedCausalLM, window: int, *, size: float = SIZE, sides: Sequence[Side] = get_args(Side)
) -> list[Perturbation]:
    """The perturbations of one sweep (see the module) of `model`, on windows of `window` tokens.

    `size` is what sweeps of parts shift by, in tokens; they leave out "qk", which changes nothing. Raises InputError
    for a sweep that is unknown.
    """
    if kind not in SWEEPS:
        raise InputError(f"sweep {kind!r} is unknown; known are {', '.join(SWEEPS)}")
    return _SWEEPS[kind](model, window, size, sides)


def _dose(model: HookedCausalLM, window: int, size: float, sides: Sequence[Side]) -> list[Perturbation]:
    return [PositionShift(side, dose) for side in sides for dose in doses(window)]


def _layer(model: HookedCausalLM, window: int, size: float, sides: Sequence[Side]) -> list[Perturbation]:
    return [PositionShift(side, size, layers=layer) for side in _one(sides) for layer in _rotating(model)]


def _head(model: HookedCausalLM, window: int, size: float, sides: Sequence[Side]) -> list[Perturbation]:
    heads = heads_of(model.config)
    counts = {"q": heads.query, "k": heads.key}
    return [
        PositionShift(side, size, layers=layer, heads=head)
        for side in _one(sides)
        for layer in _rotating(model)
        for head in range(counts[side])
    ]


def _pair(model: HookedCausalLM, window: int, size: float, sides: Sequence[Side]) -> list[Perturbation]:
    pairs = min(len(rotary.inv_freq) for rotary in model.rotary if rotary is not None)
    return [PositionShift(side, size, pairs=pair) for side in _one(sides) for pair in range(pairs)]


def _jitter(model: HookedCausalLM, window: int, size: float, sides: Sequence[Side]) -> list[Perturbation]:
    return [PositionJitter(side, dose) for side in sides for dose in doses(window)]


def _theta(model: HookedCausalLM, window: int, size: float, sides: Sequence[Side]) -> list[Perturbation]:
    parameters = model.config.rope_parameters
    nested = [parameters, *(one for one in parameters.values() if isinstance(one, dict))]
    theta = next(one["rope_theta"] for one in nested if "rope_theta" in one)
    return [ThetaSwap("qk", theta * factor) for factor in THETA_FACTORS]


def _one(sides: Sequence[Side]) -> list[Side]:
    return [side for side in sides if side != "qk"]


def _rotating(model: HookedCausalLM) -> list[int]:
    return [layer for layer, rotary in enumerate(model.rotary) if rotary is not None]


_SWEEPS: dict[str, Callable[[HookedCausalLM, int, float, Sequence[Side]], list[Perturbation]]] = {
    "dose": _dose,
    "layer": _layer,
    "head": _head,
    "pair": _pair,
    "jitter": _jitter,
    "theta": _theta,
}
