"""Perturbations of position: what an intervention does to rotated q or k, each a small frozen dataclass.

They turn rotary pairs by extra angles at `blocks.{i}.attn.hook_rot_q` and `hook_rot_k`; AttentionTemperature, a rival
explanation of what they do, scales instead. Turning a rotated query by d * inv_freq is exactly what the model would
have computed had it stood d tokens further on, so no perturbation touches `position_ids`, and each runs on any model
with those hook points, TransformerLens' TransformerBridge included.

All of them can be restricted: `side` "q", "k" or "qk"; `layers`; `heads` (of that side: query heads for q, key-value
heads for k; for "qk" key-value heads with the query heads they serve); `pairs`, 0 fastest; `positions`, indices into
the window.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from numbers import Real
from operator import index
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from rope_probe.errors import InputError
from rope_probe.models.architectures import Rotary, architecture_of, heads_of
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.models.rotation import Rotation, rotations_of
from rope_probe.windows.packing import Window

WHOLE = slice(None)
Side = Literal["q", "k", "qk"]
Selection = int | Sequence[int] | None
Hook = tuple[str, Callable[..., Tensor]]
Site = tuple[str, int]
"""A side, "q" or "k", and a layer."""


@dataclass(frozen=True)
class Turn:
    """What a perturbation does to rotated q or k of one layer.

    It turns pairs by `angles` (radians), times `scale`, and multiplies whole vectors by `stretch`. In a layer without
    RoPE there are no pairs, P = 0, and `rotary` is None.
    """

    angles: Float[Tensor, "T P"]
    scale: Float[Tensor, "T P"]
    stretch: Float[Tensor, " T"]
    heads: list[int] | None
    rotary: Rotary | None

    def __call__(self, x: Float[Tensor, "B n N D"], at: slice | Int[Tensor, " n"] = WHOLE) -> Float[Tensor, "B n N D"]:
        """`x`, whose positions are those of the window `at` these indices, turned."""
        turned = x if self.heads is None else x[:, :, self.heads]
        if self.rotary is not None:
            angles, scale = (table[at].unsqueeze(1).to(x.device) for table in (self.angles, self.scale))  # [n, 1, P]
            turned = self.rotary.turn(turned, angles, scale)
        if (self.stretch != 1).any():
            turned = turned * self.stretch[at].to(turned)[:, None, None]  # [n, 1, 1]
        if self.heads is None:
            return turned
        changed = x.clone()
        changed[:, :, self.heads] = turned
        return changed

    @property
    def changes(self) -> Bool[Tensor, " T"]:
        """Where it does anything at all."""
        return ((self.angles != 0) | (self.scale != 1)).any(1) | (self.stretch != 1)


class Perturbation(ABC):
    """Extra angles on rotary pairs, restricted by side, layers, heads, pairs and positions (None: all of them)."""

    side: Side
    layers: Selection
    heads: Selection
    pairs: Selection
    positions: Selection

    def __post_init__(self) -> None:
        if self.side not in get_args(Side):
            raise InputError(f"side must be 'q', 'k' or 'qk', but it is {self.side!r}")
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Real) and not math.isfinite(value):
                raise InputError(f"{type(self).__name__}.{field.name} must be a finite number, but it is {value}")

    @property
    def delta_tokens(self) -> float | None:
        """Size in tokens, where the perturbation has one."""
        return None

    def __str__(self) -> str:
        """What it does, without the restrictions that are not set, as written to results."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        parts = (f"{name}={value!r}" for name, value in told.items() if value is not None)
        return f"{type(self).__name__}({', '.join(parts)})"

    @property
    def restriction(self) -> str | None:
        """The layers, heads, pairs and positions that it is restricted to, as text; None where it is not."""
        named = {name: getattr(self, name) for name in ("layers", "heads", "pairs", "positions")}
        parts = [f"{name}={value!r}" for name, value in named.items() if value is not None]
        return ", ".join(parts) or None

    @abstractmethod
    def angles(self, rotary: Rotation, positions: Float[Tensor, " T"], window: Window | None) -> Float[Tensor, "T P"]:
        """Radians by which each position's pairs turn onward, float64."""

    def scaling(self, rotary: Rotation) -> float:
        """Factor on what is turned; not 1 only where another rope type scales its cos and sin."""
        return 1.0

    def hooks(self, model: Any, window: Window | str | Tensor | None = None) -> list[Hook]:
        """TransformerLens `(name, hook function)` pairs for `model`, a HookedCausalLM or a TransformerBridge.

        `window` gives the positions the model reads (0, 1, 2, ... without one) and, for DocumentOffset, its documents.
        A HookedCausalLM takes text and token ids for one too.
        Raises InputError for a layer, head, pair or position that is out of range, for a layer without RoPE that is
        named, and for a bridge without hooks after rotation.
        """
        read: Window | None = window if isinstance(window, Window | None) else model.as_window(window)
        turns_of = lru_cache(maxsize=1)(lambda length: self.turns(model.original_model, length, read))

        def hook_of(site: Site) -> Hook:
            side, layer = site
            return f"blocks.{layer}.attn.hook_rot_{side}", lambda x, hook: turns_of(x.shape[1])[site](x)

        sites = [(side, layer) for layer in self._acting(model.original_model) for side in self.side]
        self._check_fires(model, sites)
        return [hook_of(site) for site in sites]

    def require_fit(self, model: PreTrainedModel) -> None:
        """Raises InputError for layers, heads or pairs that this model does not have, or that do not rotate."""
        self._acting(model)

    def turns(self, model: PreTrainedModel, length: int, window: Window | None = None) -> dict[Site, "Turn"]:
        """What to do to rotated "q" or "k" of each layer, for windows of `length` positions; errors as `hooks`."""
        positions = torch.arange(length) if window is None else window.position_ids[0].cpu()
        tables: dict[tuple, tuple[Tensor, Tensor, Tensor]] = {}

        def turn(side: str, rotary: Rotation | None) -> Turn:
            key = () if rotary is None else (rotary.inv_freq.numpy().tobytes(), rotary.scaling)
            if key not in tables:
                tables[key] = self._tables(rotary, positions.double(), window)
            return Turn(*tables[key], self._heads(side, model.config), rotary)

        acting = self._acting(model)
        return {(side, layer): turn(side, rotary) for layer, rotary in acting.items() for side in self.side}

    def _acting(self, model: PreTrainedModel) -> Mapping[int, Rotation | None]:
        """The layers that are acted in, and their rotation: those that have one, and with None any others."""
        return self._rotating(model)

    def _rotating(self, model: PreTrainedModel) -> dict[int, Rotation]:
        """The layers that are perturbed, and their rotation."""
        rotary = rotations_of(model)
        layers = _select("layer", self.layers, len(rotary))
        rotating = {layer: one for layer in layers if (one := rotary[layer]) is not None}
        if self.layers is not None and (bare := [layer for layer in layers if layer not in rotating]):
            raise InputError(f"layer {bare[0]} has no RoPE, so there is no position in it to perturb")
        for one in rotating.values():
            _select("pair", self.pairs, len(one.inv_freq))
        for side in self.side:
            self._heads(side, model.config)
        return rotating

    def _tables(
        self, rotary: Rotation | None, positions: Tensor, window: Window | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Angles and scale, [T, P], and stretch, [T], in float64."""
        if rotary is None:
            no_pairs = positions.new_zeros(len(positions), 0)  # [T, 0]
            return no_pairs, no_pairs, torch.ones_like(positions)
        where = torch.tensor(_select("position", self.positions, len(positions))).unsqueeze(1)
        pairs = _select("pair", self.pairs, len(rotary.inv_freq))
        angles = torch.zeros(len(positions), len(rotary.inv_freq), dtype=torch.float64)
        scale = torch.ones_like(angles)
        angles[where, pairs] = self.angles(rotary, positions, window)[where, pairs]
        scale[where, pairs] = self.scaling(rotary)
        return angles, scale, torch.ones_like(positions)

    def _check_fires(self, model: Any, sites: list[Site]) -> None:
        """A bridge can have hook points that never fire, and a perturbation there would silently do nothing."""
        if isinstance(model, HookedCausalLM):
            return
        fired = set()
        names = {f"blocks.{layer}.attn.hook_rot_{side}" for side, layer in sites}
        reads = [(name, lambda x, hook, name=name: fired.add(name)) for name in names if name in model.hook_dict]
        with torch.no_grad():
            model.run_with_hooks(torch.zeros(1, 2, dtype=torch.long), fwd_hooks=reads)
        if silent := sorted(names - fired):
            raise InputError(f"the hook {silent[0]} never fires on this model; load it with rope_probe.load_model")

    def _heads(self, side: str, config: Any) -> list[int] | None:
        if self.heads is None:
            return None
        query_heads, key_heads, _ = heads_of(config)
        if self.side != "qk":
            return _select(
                *(("head", self.heads, query_heads) if side == "q" else ("key-value head", self.heads, key_heads))
            )
        chosen = _select("key-value head", self.heads, key_heads)
        group = query_heads // key_heads
        return chosen if side == "k" else [head * group + i for head in chosen for i in range(group)]


def _select(what: str, selection: Selection, count: int) -> list[int]:
    if selection is None:
        return list(range(count))
    chosen = [index(i) for i in selection] if isinstance(selection, Iterable) else [index(selection)]
    for i in chosen:
        if not 0 <= i < count:
            raise InputError(f"{what} {i} is out of range: there are {what}s 0 to {count - 1}")
    return chosen


@dataclass(frozen=True)
class PositionShift(Perturbation):
    """Move queries or keys `tokens` positions onward (fractions and negative numbers too).

    A shift of q by d equals a shift of k by -d, and a shift of both changes nothing: scores see relative position only.
    """

    side: Side
    tokens: float
    layers: Selection = None
    heads: Selection = None
    pairs: Selection = None
    positions: Selection = None

    @property
    def delta_tokens(self) -> float:
        """Tokens moved."""
        return self.tokens

    def angles(self, rotary: Rotary, positions: Float[Tensor, " T"], window: Window | None) -> Float[Tensor, "T P"]:
        """The same turn everywhere, tokens * inv_freq."""
        return torch.outer(torch.full_like(positions, self.tokens), rotary.inv_freq)


@dataclass(frozen=True)
class PairTurn(Perturbation):
    """Turn every chosen pair of queries or keys onward by the same `radians`, whatever its wavelength.

    A shift by a number of tokens turns fast pairs far and slow ones hardly; this is the same angle for each, so that
    pairs can be compared. A turn of q equals one of k by -radians, and a turn of both changes nothing.
    """

    side: Side
    radians: float
    layers: Selection = None
    heads: Selection = None
    pairs: Selection = None
    positions: Selection = None

    def angles(self, rotary: Rotary, positions: Float[Tensor, " T"], window: Window | None) -> Float[Tensor, "T P"]:
        """The same turn everywhere."""
        return torch.full((len(positions), len(rotary.inv_freq)), float(self.radians), dtype=torch.float64)


@dataclass(frozen=True)
class PositionJitter(Perturbation):
    """Move every position by its own random amount, uniform in [-tokens, tokens]; one move for q, k and all layers."""

    side: Side
    tokens: float
    seed: int = 0
    layers: Selection = None
    heads: Selection = None
    pairs: Selection = None
    positions: Selection = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 0 or self.seed < 0:
            raise InputError(
                f"tokens and seed of a jitter must be 0 or more, but they are {self.tokens} and {self.seed}"
            )

    @property
    def delta_tokens(self) -> float:
        """Largest move in tokens."""
        return self.tokens

    def angles(self, rotary: Rotary, positions: Float[Tensor, " T"], window: Window | None) -> Float[Tensor, "T P"]:
        """A move per position, a function of the seed and the position's index in the window."""
        moves = np.random.default_rng(self.seed).uniform(-self.tokens, self.tokens, len(positions))
        return torch.outer(torch.from_numpy(moves), rotary.inv_freq)


@dataclass(frozen=True)
class ThetaSwap(Perturbation):
    """Rotate as the model would with another theta, its rope type and all other rope parameters as they are.

    Frequencies, and the scaling of cos and sin where the type has one, come from the model's own rotary module with
    this theta in its config. On a model whose kinds of layers have parameters of their own, each kind keeps them and
    gets this theta; name `layers` to swap those of one kind. A swap to the layers' own theta is exactly no change.
    """

    side: Side
    theta: float
    layers: Selection = None
    heads: Selection = None
    pairs: Selection = None
    positions: Selection = None

    def angles(self, rotary: Rotation, positions: Float[Tensor, " T"], window: Window | None) -> Float[Tensor, "T P"]:
        """The difference between the other theta's angle and the model's, at each position.

        Raises InputError for a theta that is not positive and finite, and as `Rotation.with_theta` does.
        """
        return torch.outer(positions, rotary.with_theta(self.theta).inv_freq - rotary.inv_freq)

    def scaling(self, rotary: Rotation) -> float:
        """What the other theta's scaling of cos and sin is of the model's: 1 for every type there is."""
        return rotary.with_theta(self.theta).scaling / rotary.scaling


@dataclass(frozen=True)
class AttentionTemperature(Perturbation):
    """Multiply attention scores by `factor`: above 1 attention is sharper, below 1 flatter. It moves no position.

    "log_n" is log(i + 1) / log(`reference`) for position i, and 1 up to the reference, the window that a model was
    trained on: the factor that keeps the entropy of attention as it was while the number of keys grows (arXiv
    2202.12172). YaRN's is `rope.yarn_temperature(extension)`. On one `side` scores are multiplied once, on "qk" twice.
    `pairs` restrict it to what these pairs add to the score; without them the part of a head that does not rotate is
    scaled too.

    Raises InputError for a factor that is negative, or neither a number nor "log_n", and for a reference below 2
    tokens, or one that is given without "log_n" or is lacking with it; for layers without attention that are named, and
    for layers without RoPE that are named with `pairs`.

    It acts in layers without RoPE too, but for one restricted to `pairs`. "log_n" counts positions, not the keys that
    masks leave: a sliding window, chunks and masked documents let a query see fewer than i + 1 keys, and its factor is
    that of i + 1 all the same. Restrict it to the global `layers` of a model with local ones, and reset the positions
    of masked documents: it then counts from the start of each.
    """

    factor: float | Literal["log_n"]
    side: Side = "q"
    reference: int | None = None
    layers: Selection = None
    heads: Selection = None
    pairs: Selection = None
    positions: Selection = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.factor, str) and self.factor != "log_n":
            raise InputError(f"factor must be a number or 'log_n', but it is {self.factor!r}")
        if not isinstance(self.factor, str) and self.factor < 0:
            raise InputError(f"factor must be 0 or more, but it is {self.factor}")
        if (self.reference is None) == (self.factor == "log_n"):
            raise InputError("reference, the window a model was trained on, goes with factor 'log_n' alone")
        if self.reference is not None and self.reference < 2:
            raise InputError(f"reference must be 2 tokens or more, but it is {self.reference}")

    def angles(self, rotary: Rotary, positions: Float[Tensor, " T"], window: Window | None) -> Float[Tensor, "T P"]:
        """None at all."""
        return torch.zeros(len(positions), len(rotary.inv_freq), dtype=torch.float64)

    def factors(self, positions: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
        """What scores are multiplied by at each position, float64."""
        if self.reference is None:
            return torch.full_like(positions, float(self.factor))
        return (torch.log1p(positions) / math.log(self.reference)).clamp(min=1.0)

    def _acting(self, model: PreTrainedModel) -> Mapping[int, Rotation | None]:
        if self.pairs is not None:
            return self._rotating(model)
        rotations, attends = rotations_of(model), architecture_of(model.config).attends
        layers = _select("layer", self.layers, len(rotations))
        if self.layers is not None and (bare := [layer for layer in layers if not attends(layer)]):
            raise InputError(f"layer {bare[0]} has no attention, so there are no scores in it to multiply")
        for side in self.side:
            self._heads(side, model.config)
        return {layer: rotations[layer] for layer in layers if attends(layer)}

    def _tables(
        self, rotary: Rotation | None, positions: Tensor, window: Window | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        angles, scale, stretch = super()._tables(rotary, positions, window)
        chosen = _select("position", self.positions, len(positions))
        factors = torch.ones_like(positions)
        factors[chosen] = self.factors(positions)[chosen]
        if self.pairs is None:
            return angles, scale, factors
        scale[:, _select("pair", self.pairs, scale.shape[1])] = factors.unsqueeze(1)
        return angles, scale, stretch


@dataclass(frozen=True)
class PairFreeze(Perturbation):
    """Hold a band of pairs at one position `at`, so that they carry content but no position."""

    side: Side
    pairs: Selection
    at: float = 0.0
    layers: Selection = None
    heads: Selection = None
    positions: Selection = None

    def angles(self, rotary: Rotary, positions: Float[Tensor, " T"], window: Window | None) -> Float[Tensor, "T P"]:
        """Back from each position to `at`."""
        return torch.outer(self.at - positions, rotary.inv_freq)


@dataclass(frozen=True)
class DocumentOffset(Perturbation):
    """Move whole documents `tokens` positions onward, each as one piece; both sides by default.

    Distances inside a document stay as they are, so with masked documents nothing changes.
    """

    documents: int | Sequence[int]
    tokens: float
    side: Side = "qk"
    layers: Selection = None
    heads: Selection = None
    pairs: Selection = None
    positions: Selection = None

    @property
    def delta_tokens(self) -> float:
        """Tokens moved."""
        return self.tokens

    def angles(self, rotary: Rotary, positions: Float[Tensor, " T"], window: Window | None) -> Float[Tensor, "T P"]:
        """tokens * inv_freq inside the documents, 0 outside. Raises InputError without a window."""
        if window is None:
            raise InputError("DocumentOffset needs to know the documents: pass the window to hooks()")
        documents = torch.tensor(_select("document", self.documents, window.documents))
        inside = torch.isin(window.document_of, documents).double()
        return torch.outer(self.tokens * inside, rotary.inv_freq)
