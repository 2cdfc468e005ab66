"""What `rope-probe trace` perturbs: sweeps, sizes given as options, and files, by arm."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rope_probe.cli.options import Side, Sweep
from rope_probe.errors import InputError

if TYPE_CHECKING:
    from rope_probe.models.hooked import HookedCausalLM
    from rope_probe.tracing.perturbations import Perturbation

Arms = dict[str, "Sequence[Perturbation]"]
_EACH: tuple[Side, ...] = tuple(Side)
_DEFAULT_SIDES: dict[str, tuple[Side, ...]] = {"theta": (Side.QK,), "offset": (Side.QK,), "temperature": (Side.Q,)}
"""Sides of the kinds that are not tried on each."""
_ARM_OF = {"shift": "dose"}
"""Arms that are not called as the option is."""


@dataclass(frozen=True)
class Asked:
    """The options that say what to perturb.

    `sizes` are by kind: "shift", "jitter" (tokens), "theta", "turn" (radians), "freeze" (a position), "offset" (tokens)
    and "temperature" (a factor). `documents` are those that an offset moves, `of_file` what a file holds, by arm.
    """

    sweeps: list[Sweep] | None
    sizes: Mapping[str, list[float]]
    sides: list[Side] | None
    layers: list[int] | None
    heads: list[int] | None
    pairs: list[int] | None
    documents: list[int] | None
    seed: int
    of_file: "dict[str, list[Perturbation]] | None"

    def __post_init__(self) -> None:
        sized = [f"--{kind}" for kind in self.sizes]
        if self.sweeps and (sized or self.pairs is not None):
            clash = [*sized, *(["--pair"] if self.pairs is not None else [])]
            raise InputError(f"--sweep goes through sizes and pairs itself; leave out {' and '.join(clash)}")
        if self.documents is not None and "offset" not in self.sizes:
            raise InputError("--offset-document says which documents --offset moves; give both, or neither")
        if self.of_file is not None and self.restrictions and not (self.sweeps or sized):
            raise InputError(
                f"{' and '.join(self.restrictions)} narrow what options ask for, not --perturbations; say it in the "
                "file, as layers = [1, 2]"
            )

    @property
    def restrictions(self) -> list[str]:
        """The options given that narrow others."""
        given = {"--side": self.sides, "--layer": self.layers, "--head": self.heads, "--pair": self.pairs}
        return [name for name, value in given.items() if value is not None]


def perturbations_of(model: "HookedCausalLM", window: int, asked: Asked) -> Arms:
    """What was asked for, by arm, of a model on a window of so many tokens.

    Sweeps of doses and of layers where nothing is named, one dose-response of the parts where only these are.
    Raises InputError for what the model does not have.
    """
    arms: dict[str, list[Perturbation]] = {}
    for more in (_of_options(model, window, asked), asked.of_file or {}):
        for name, perturbations in more.items():
            arms.setdefault(name, []).extend(perturbations)
    return dict(arms)


def _of_options(model: "HookedCausalLM", window: int, asked: Asked) -> Arms:
    from rope_probe.tracing.sweeps import doses

    named_parts = any(part is not None for part in (asked.layers, asked.heads, asked.pairs))
    if asked.sizes:
        return {_ARM_OF.get(kind, kind): _of_kind(kind, sizes, asked) for kind, sizes in asked.sizes.items()}
    if asked.sweeps:
        return _swept(model, window, list(dict.fromkeys(map(str, asked.sweeps))), asked)
    if asked.of_file is not None:
        return {}
    if named_parts:
        return {"dose": _of_kind("shift", doses(window), asked)}
    return _swept(model, window, ["dose", "layer"], asked)


def _swept(model: "HookedCausalLM", window: int, kinds: list[str], asked: Asked) -> Arms:
    from rope_probe.tracing.sweeps import sweep

    sides: list[Any] = [side.value for side in asked.sides or _EACH]
    narrowed: dict[str, Any] = {"sides": sides, "layers": asked.layers, "heads": asked.heads}
    swept = {kind: sweep(kind, model, window, **narrowed) for kind in kinds}
    if not any(swept.values()):
        raise InputError(f"--sweep {' and '.join(kinds)} moves q or k alone, so it has nothing for --side qk alone")
    return {kind: perturbations for kind, perturbations in swept.items() if perturbations}


def _of_kind(kind: str, sizes: Sequence[float], asked: Asked) -> "list[Perturbation]":
    """One perturbation a side and size."""
    from rope_probe.tracing import perturbations

    documents = tuple(asked.documents or (0,))
    make: dict[str, Callable[..., Perturbation]] = {
        "shift": perturbations.PositionShift,
        "jitter": lambda side, size, **parts: perturbations.PositionJitter(side, size, asked.seed, **parts),
        "theta": perturbations.ThetaSwap,
        "turn": perturbations.PairTurn,
        "freeze": lambda side, size, **parts: perturbations.PairFreeze(side, at=size, **parts),
        "offset": lambda side, size, **parts: perturbations.DocumentOffset(documents, size, side, **parts),
        "temperature": lambda side, size, **parts: perturbations.AttentionTemperature(size, side, **parts),
    }
    parts = {"layers": asked.layers, "heads": asked.heads, "pairs": asked.pairs}
    sides = asked.sides or _DEFAULT_SIDES.get(kind, _EACH)
    return [make[kind](side.value, size, **parts) for side in sides for size in sizes]
