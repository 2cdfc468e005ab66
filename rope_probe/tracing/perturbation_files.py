"""Perturbations read from TOML: a list of any of them, every key checked.

    [[perturbations]]
    kind = "shift"        # or the name of its class, "PositionShift"
    side = "q"
    tokens = 16
    layers = "4-9"        # a number, a list, a range, or "all"
    arm = "early layers"  # what it is grouped under [default: "perturbations"]

Keys are the fields of the class. Kinds that the user has defined go by the names of their classes.
"""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rope_probe.errors import InputError
from rope_probe.names import LONGEST_WINDOW
from rope_probe.ranges import wanted
from rope_probe.tracing.perturbations import (
    AttentionTemperature,
    DocumentOffset,
    PairFreeze,
    PairTurn,
    Perturbation,
    PositionJitter,
    PositionShift,
    Selection,
    Side,
    ThetaSwap,
)

ARM = "perturbations"
"""The arm of a perturbation that names none."""
SHORT_NAMES: dict[str, type[Perturbation]] = {
    "shift": PositionShift,
    "jitter": PositionJitter,
    "theta": ThetaSwap,
    "turn": PairTurn,
    "freeze": PairFreeze,
    "offset": DocumentOffset,
    "temperature": AttentionTemperature,
}
_SELECTED = 'a whole number, a list of them, a range like "4-9"'
_WORDS: dict[Any, str] = {
    float: "a number",
    int: "a whole number",
    str: "text",
    int | None: "a whole number",
    Side: "'q', 'k' or 'qk'",
    float | Literal["log_n"]: "a number or 'log_n'",
    Selection: f'{_SELECTED}, or "all"',
    int | Sequence[int]: _SELECTED,
}
"""What a field must be, by its type."""
_RANGE = re.compile(r"(\d{1,9})-(\d{1,9})")


def read_perturbations(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, list[Perturbation]]:
    """The perturbations of a TOML file, or of a mapping of the same shape, by arm and in their order.

    Raises InputError, naming the file and the key, for a kind or a key that is unknown, for one that is missing, and
    for a value that does not fit.
    """
    table, where = (source, "perturbations") if isinstance(source, Mapping) else _read_toml(source)
    if unknown := [key for key in table if key != "perturbations"]:
        raise InputError(f"{where}: {unknown[0]}: there is no such key; perturbations stand under [[perturbations]]")
    entries = table.get("perturbations")
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise InputError(f"{where}: perturbations: it must be a list of tables, each under [[perturbations]]")
    arms: dict[str, list[Perturbation]] = {}
    for number, entry in enumerate(entries):
        arm, perturbation = _read_entry(entry, f"{where}: perturbations.{number}")
        arms.setdefault(arm, []).append(perturbation)
    return arms


def _read_toml(source: str | os.PathLike[str]) -> tuple[dict[str, Any], str]:
    where = os.fspath(source)
    try:
        return tomllib.loads(Path(source).read_text(encoding="utf-8")), where
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the perturbations {where!r}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where!r} is not TOML: {error}") from error


def _read_entry(entry: Any, where: str) -> tuple[str, Perturbation]:
    """The arm and the perturbation of one table."""
    if not isinstance(entry, Mapping):
        raise InputError(f"{where}: it must be a table, but it is {_shown(entry)}")
    values = dict(entry)
    if "kind" not in values:
        raise InputError(f"{where}: it has no kind, which says what it is; kinds are {', '.join(SHORT_NAMES)}")
    kind = values.pop("kind")
    known = _kinds()
    if not isinstance(kind, str) or kind not in known:
        raise InputError(f"{where}: kind {_shown(kind)} is unknown; kinds are {', '.join(known)}")
    arm = values.pop("arm", ARM)
    if not isinstance(arm, str) or not arm:
        raise InputError(f"{where}.arm: it must be text, but it is {_shown(arm)}")
    return arm, _build(known[kind], kind, values, where)


def _kinds() -> dict[str, type[Perturbation]]:
    """Every kind by its names, those that the user has defined among them."""
    named: dict[str, type[Perturbation]] = dict(SHORT_NAMES)
    waiting = list(Perturbation.__subclasses__())
    while waiting:
        one = waiting.pop(0)
        waiting += one.__subclasses__()
        named[one.__name__] = one
    return named


def _build(cls: type[Perturbation], kind: str, values: dict[str, Any], where: str) -> Perturbation:
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := [key for key in values if key not in known]:
        raise InputError(f"{where}.{unknown[0]}: there is no such key; {kind} has {', '.join(known)}")
    if absent := [name for name, field in known.items() if _is_required(field) and name not in values]:
        raise InputError(f"{where}.{absent[0]}: it is missing, and {kind} needs it")
    hints = get_type_hints(cls)
    checked = {key: _checked(value, hints[key], f"{where}.{key}") for key, value in values.items()}
    try:
        return cls(**checked)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _checked(value: Any, hint: Any, where: str) -> Any:
    """A value as a field of this type holds it. Raises InputError for one that does not fit."""
    given = _spelled_out(value) if int in get_args(hint) and Sequence[int] in get_args(hint) else value
    if given == "all" and type(None) in get_args(hint):
        return None
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(given)
    except ValidationError as error:
        right = _WORDS.get(hint, wanted(error))
        raise InputError(f"{where}: it must be {right}, but it is {_shown(value)}") from error


def _spelled_out(value: Any) -> Any:
    """A selection with its range spelled out, both ends included, and its list as a tuple."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str) or (bounds := _RANGE.fullmatch(value)) is None:
        return value
    first, last = int(bounds[1]), int(bounds[2])
    return tuple(range(first, last + 1)) if first <= last < LONGEST_WINDOW else value


def _shown(value: Any) -> str:
    """A value as a line of a message has room for it."""
    try:
        return f"{value!r:.100}"
    except RecursionError:  # lists in lists, thousands deep
        return f"a {type(value).__name__}"
