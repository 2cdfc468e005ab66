"""Ranges that settings lie in: declared as types, checked by pydantic, told in one line."""

from dataclasses import fields
from functools import cache
from typing import Annotated, Any, get_type_hints

from annotated_types import Interval, IsFinite
from pydantic import TypeAdapter, ValidationError

from rope_probe.errors import InputError
from rope_probe.names import LONGEST_WINDOW

LARGEST = 1e30
"""What float32 can still compute with."""
Count = Annotated[int, Interval(ge=1, le=10**30)]
Positive = Annotated[float, Interval(gt=0, le=LARGEST), IsFinite]
NotNegative = Annotated[float, Interval(ge=0, le=LARGEST), IsFinite]
Share = Annotated[float, Interval(ge=0, le=1), IsFinite]
WindowLength = Annotated[int, Interval(ge=1, le=LONGEST_WINDOW)]
Seed = Annotated[int, Interval(ge=0, lt=2**63)]

_WORDS = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "below {lt:g}",
    "less_than_equal": "{le:g} or less",
    "finite_number": "a finite number",
}


def require_ranges(settings: Any, whose: str) -> None:
    """Check every field of a dataclass against the range that its type declares; `whose` says what it is a setting of.

    Raises InputError, naming the field, its value and what would be right, for the first that does not fit.
    """
    for name, adapter in _adapters(type(settings)).items():  # type: ignore[arg-type]
        value = getattr(settings, name)
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            raise InputError(f"{name} of {whose} must be {wanted(error)}, but it is {value!r}") from error


def wanted(error: ValidationError) -> str:
    """What the value would have to be, in words."""
    return in_words(dict(error.errors()[0]))


def in_words(problem: dict[str, Any]) -> str:
    """The same of one of pydantic's errors."""
    words = _WORDS.get(problem["type"])
    if words is None:
        return problem["msg"].removeprefix("Input should be ")
    return words.format(**problem.get("ctx", {}))


@cache
def _adapters(settings: Any) -> dict[str, TypeAdapter]:
    """A check for every field whose type declares a range."""
    hints = get_type_hints(settings, include_extras=True)
    ranged = {field.name: hints[field.name] for field in fields(settings) if "Interval" in repr(hints[field.name])}
    return {name: TypeAdapter(hint) for name, hint in ranged.items()}
