"""Sweeps of perturbations that answer one question each: how much, in which layer, head, pair, and of what kind.

dose         shifts of q, k and both, by 1/4 token, 1, 4, ... and the window
layer        a shift by 16 tokens in one layer at a time, of q and of k
head         ... in one head of one layer at a time
pair         one rotary pair at a time, turned by 1 radian, whatever its wavelength
pair-tokens  ... shifted by 16 tokens: a turn of many radians for fast pairs, and next to none for slow ones; a pair
             whose wavelength divides the shift looks as if it did nothing
jitter       every position moved by its own random amount, up to 1/4 token, 1, 4, ... and the window
theta        rotation by 1/4, 1/2, 2 and 4 times the model's theta
temperature  attention scores times 1/2, 3/4, 1 1/4, 1 1/2, 2 and 3, without moving any position: what sharper or
             flatter attention alone would do

Each can be narrowed to layers and heads. A pair has one wavelength only among layers that rotate alike, and a theta is
that of one kind of layers. Where a model has several kinds (Gemma 3: local and global), the sweeps of pairs and thetas
go through each kind by itself, its layers named in the perturbations.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import get_args

from rope_probe.errors import InputError
from rope_probe.models.architectures import heads_of
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.models.rotation import Rotation, rotations_of
from rope_probe.names import SWEEPS
from rope_probe.tracing.perturbations import (
    AttentionTemperature,
    PairTurn,
    Perturbation,
    PositionJitter,
    PositionShift,
    Selection,
    Side,
    ThetaSwap,
)

SIZE = 16.0
RADIANS = 1.0
THETA_FACTORS = (0.25, 0.5, 2.0, 4.0)
TEMPERATURE_FACTORS = (0.5, 0.75, 1.25, 1.5, 2.0, 3.0)
Layers = tuple[int, ...]


def doses(window: int) -> list[float]:
    """Tokens to shift by: 1/4, 1, 4, ... below the window, and the window."""
    below = []
    dose = 0.25
    while dose < window:
        below.append(dose)
        dose *= 4
    return [*below, float(window)]


def sweep(
    kind: str,
    model: HookedCausalLM,
    window: int,
    *,
    size: float = SIZE,
    radians: float = RADIANS,
    sides: Sequence[Side] = get_args(Side),
    layers: Selection = None,
    heads: Selection = None,
) -> list[Perturbation]:
    """The perturbations of one sweep (see the module) of `model`, on windows of `window` tokens.

    `size` is what sweeps of parts shift each of them by, in tokens, and `radians` what "pair" turns each pair by; they
    leave out side "qk", which changes nothing. `layers` and `heads` narrow any sweep to these: "layer" and "head" go
    through no others, and what the others perturb lies in these alone. Heads are those of the side, as in
    `Perturbation`: query heads for q, key-value heads for k and qk.

    Raises InputError for a sweep that is unknown, and for a layer or head that is out of range or has no RoPE; that of
    temperatures takes layers without RoPE too.
    """
    if kind not in SWEEPS:
        raise InputError(f"sweep {kind!r} is unknown; known are {', '.join(SWEEPS)}")
    chosen = _Chosen(model, window, size, radians, sides, _indices(layers), _indices(heads))
    moves_positions = kind != "temperature"  # which acts in layers without RoPE too
    if moves_positions:
        PositionShift("q", 0.0, layers=chosen.layers).require_fit(model.original_model)
    perturbations = _SWEEPS[kind](chosen)
    for perturbation in perturbations:
        perturbation.require_fit(model.original_model)
    return perturbations


@dataclass(frozen=True)
class _Chosen:
    """What a sweep goes through."""

    model: HookedCausalLM
    window: int
    size: float
    radians: float
    sides: Sequence[Side]
    layers: Layers | None
    heads: Layers | None

    @property
    def single_sides(self) -> list[Side]:
        """Those that change something alone: q and k moved together by one amount are as they were."""
        return [side for side in self.sides if side != "qk"]

    @property
    def each_layer(self) -> Layers:
        """The layers named, or those that rotate."""
        if self.layers is not None:
            return self.layers
        return tuple(layer for layer, rotary in enumerate(self.model.rotary) if rotary is not None)

    def each_head(self, side: Side) -> Layers:
        """The heads named, or all of this side."""
        if self.heads is not None:
            return self.heads
        heads = heads_of(self.model.config)
        return tuple(range(heads.query if side == "q" else heads.key))

    def kinds(self, of: Callable[[Rotation], Hashable]) -> list[tuple[Rotation, Layers | None]]:
        """The layers that are alike by `of`, and the rotation of the first of them.

        Where all that were chosen are alike, their layers are those that were named, if any.
        """
        rotations = rotations_of(self.model.original_model)
        first: dict[Hashable, Rotation] = {}
        alike: dict[Hashable, list[int]] = {}
        for layer in self.each_layer:
            rotation = rotations[layer]
            assert rotation is not None
            key = of(rotation)
            first.setdefault(key, rotation)
            alike.setdefault(key, []).append(layer)
        if len(alike) == 1:
            return [(rotation, self.layers) for rotation in first.values()]
        return [(first[key], tuple(layers)) for key, layers in alike.items()]


def _dose(chosen: _Chosen) -> list[Perturbation]:
    return [
        PositionShift(side, dose, layers=chosen.layers, heads=chosen.heads)
        for side in chosen.sides
        for dose in doses(chosen.window)
    ]


def _layer(chosen: _Chosen) -> list[Perturbation]:
    return [
        PositionShift(side, chosen.size, layers=layer, heads=chosen.heads)
        for side in chosen.single_sides
        for layer in chosen.each_layer
    ]


def _head(chosen: _Chosen) -> list[Perturbation]:
    return [
        PositionShift(side, chosen.size, layers=layer, heads=head)
        for side in chosen.single_sides
        for layer in chosen.each_layer
        for head in chosen.each_head(side)
    ]


def _pair(chosen: _Chosen) -> list[Perturbation]:
    return [
        PairTurn(side, chosen.radians, layers=layers, heads=chosen.heads, pairs=pair)
        for side in chosen.single_sides
        for layers, pair in _pairs_of_kinds(chosen)
    ]


def _pair_tokens(chosen: _Chosen) -> list[Perturbation]:
    return [
        PositionShift(side, chosen.size, layers=layers, heads=chosen.heads, pairs=pair)
        for side in chosen.single_sides
        for layers, pair in _pairs_of_kinds(chosen)
    ]


def _pairs_of_kinds(chosen: _Chosen) -> list[tuple[Layers | None, int]]:
    kinds = chosen.kinds(lambda rotation: tuple(rotation.inv_freq.tolist()))
    return [(layers, pair) for rotation, layers in kinds for pair in range(len(rotation.inv_freq))]


def _jitter(chosen: _Chosen) -> list[Perturbation]:
    return [
        PositionJitter(side, dose, layers=chosen.layers, heads=chosen.heads)
        for side in chosen.sides
        for dose in doses(chosen.window)
    ]


def _theta(chosen: _Chosen) -> list[Perturbation]:
    return [
        ThetaSwap("qk", rotation.theta * factor, layers=layers, heads=chosen.heads)
        for rotation, layers in chosen.kinds(lambda rotation: rotation.theta)
        for factor in THETA_FACTORS
    ]


def _temperature(chosen: _Chosen) -> list[Perturbation]:
    return [AttentionTemperature(factor, layers=chosen.layers, heads=chosen.heads) for factor in TEMPERATURE_FACTORS]


def _indices(selection: Selection) -> Layers | None:
    if selection is None:
        return None
    return tuple(map(index, selection)) if isinstance(selection, Iterable) else (index(selection),)


_SWEEPS: dict[str, Callable[[_Chosen], list[Perturbation]]] = {
    "dose": _dose,
    "layer": _layer,
    "head": _head,
    "pair": _pair,
    "pair-tokens": _pair_tokens,
    "jitter": _jitter,
    "theta": _theta,
    "temperature": _temperature,
}
