"""What a distillation run is: its student, teachers and phases; read from TOML, with every key checked."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from rope_probe.distillation.loop import ITSELF, ORIGINAL
from rope_probe.distillation.phase import Phase
from rope_probe.errors import InputError
from rope_probe.ranges import Count, Positive, Seed, in_words, require_ranges

_INSTEAD = {
    "objective": 'an objective is now a list of terms: terms = [{ kind = "cross_entropy", weight = 1.0 }, '
    '{ kind = "kd", weight = 1.0, divergence = "forward_kl" }, { kind = "hidden", distance = "cosine" }], of which '
    "those that are wanted; chunk is a key beside it"
}
"""What to write instead of a key that there no longer is."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class DistillConfig:
    """A run of `distill`.

    `student` and each of `teachers` are checkpoint folders or hub ids; a student can also be a table of transformers'
    config with its `model_type`, and then starts from random weights. Terms call teachers by their names. One more is
    always there, "original": a frozen copy of the student as the run began or, with `original` "phase", as the phase
    before left it; it rotates as it did then, before the phase's theta. It is made where a term reads it. "itself" is
    the student of the step under way, read without a gradient. `out` is the
    run directory. `dtype` "bfloat16" computes under autocast, the student's weights staying float32, and reads teachers
    in bfloat16. Every `log_every` steps are measured in full; every `save_every` steps, every `save_minutes` minutes,
    and when the run is asked to stop, a snapshot is taken, and the last `keep` are kept. `mirror` shows the log in
    TensorBoard or Weights & Biases ("wandb") too, as it is written.

    Raises InputError for values that cannot be.
    """

    student: str | dict[str, Any]
    phases: tuple[Phase, ...]
    out: str
    teachers: dict[str, str] = field(default_factory=dict)
    original: Literal["run", "phase"] = "run"
    seed: Seed = 0
    device: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn: str = "sdpa"
    log_every: Count = 10
    save_every: Count = 500
    save_minutes: Positive = 5.0
    keep: Count = 2
    mirror: Literal["tensorboard", "wandb"] | None = None

    def __post_init__(self) -> None:
        require_ranges(self, "a run")
        if not self.phases:
            raise InputError("a run needs one phase or more")
        names = [phase.name for phase in self.phases]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"two phases are called {name!r}; give each its own name")
        if ORIGINAL in self.teachers:
            raise InputError(f"no teacher can be called {ORIGINAL!r}: that is the student's frozen copy")
        if ITSELF in self.teachers:
            raise InputError(f"no teacher can be called {ITSELF!r}: that is the student of the step under way")
        for phase in self.phases:
            for name in (name for stream in phase.mix for name in stream.teachers):
                if name not in (*self.teachers, ORIGINAL, ITSELF):
                    raise InputError(
                        f"a term of phase {phase.name!r} reads the teacher {name!r}, so the run needs a teacher of "
                        f"that name; it has {', '.join((*self.teachers, ORIGINAL, ITSELF))}"
                    )


def _shown(value: Any) -> str:
    """A value as a line of a message has room for it."""
    try:
        return f"{value!r:.100}"
    except RecursionError:  # tables in tables, thousands deep
        return f"a {type(value).__name__}"


def recorded(config: DistillConfig) -> dict[str, Any]:
    """The configuration as a manifest holds it: what decides what is trained, not where and when it is kept."""
    aside = ("out", "keep", "save_every", "save_minutes", "mirror")
    return {key: value for key, value in asdict(config).items() if key not in aside}


def read_config(source: str | os.PathLike[str] | Mapping[str, Any], **changes: Any) -> DistillConfig:
    """A configuration from a TOML file or a mapping of the same shape, `changes` taking the place of its keys.

    `teacher = "path"` is short for a single one of that name, `teachers = {teacher = "path"}`. Terms are of any kind
    that is known by now, those that the user has defined among them.
    Raises InputError, naming the key, for one that is unknown or missing and for a value that does not fit it.
    """
    if isinstance(source, Mapping):
        table, where = source, "config"
    else:
        where = os.fspath(source)
        try:
            table = tomllib.loads(Path(source).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read config {where!r}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where!r} is not TOML: {error}") from error
    table = {**table, **changes}
    if (teacher := table.pop("teacher", None)) is not None:
        if table.get("teachers"):
            raise InputError(f"{where}: teacher and teachers both say who teaches; give teachers alone")
        table["teachers"] = {"teacher": teacher}
    try:
        return TypeAdapter(DistillConfig).validate_python(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "unexpected_keyword_argument":
            reason = _INSTEAD.get(str(first["loc"][-1]), "there is no such key")
        elif first["type"] == "union_tag_invalid":
            reason = f"kind {first['ctx']['tag']!r} is unknown; known are {first['ctx']['expected_tags']}"
        elif first["type"] == "union_tag_not_found":
            reason = "it has no kind, which says what it is"
        elif first["type"] == "value_error":
            reason = first["msg"].removeprefix("Value error, ")
        else:
            reason = f"it must be {in_words(dict(first))}, but it is {_shown(first['input'])}"
        raise InputError(f"{where}: {key + ': ' if key else ''}{reason}") from error
