"""What a distillation run is: its student, teacher and phases; read from TOML, with every key checked."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from rope_probe.distillation.phase import Phase
from rope_probe.errors import InputError


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class DistillConfig:
    """A run of `distill`.

    `student` and `teacher` are checkpoint folders or hub ids; a student can also be a table of transformers' config
    with its `model_type`, and then starts from random weights. `out` is the run directory. `dtype` "bfloat16" computes
    under autocast, the student's weights staying float32, and reads the teacher in bfloat16. Every `log_every` steps
    are measured in full; every `save_every` steps, every `save_minutes` minutes, and when the run is asked to stop, a
    snapshot is taken, and the last `keep` are kept.

    Raises InputError for values that cannot be.
    """

    student: str | dict[str, Any]
    phases: tuple[Phase, ...]
    out: str
    teacher: str | None = None
    seed: int = 0
    device: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn: str = "sdpa"
    log_every: int = 10
    save_every: int = 500
    save_minutes: float = 5.0
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, but it is {getattr(self, name)}")
        if not self.save_minutes > 0:
            raise InputError(f"save_minutes must be above 0, but it is {self.save_minutes}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be in 0..2^63-1, but it is {self.seed}")
        if not self.phases:
            raise InputError("a run needs one phase or more")
        names = [phase.name for phase in self.phases]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"two phases are called {name!r}; give each its own name")
        if self.teacher is None:
            for phase in self.phases:
                if phase.objective.needs_teacher:
                    raise InputError(f"phase {phase.name!r} distils (kd_weight or hidden), so the run needs a teacher")


def recorded(config: DistillConfig) -> dict[str, Any]:
    """The configuration as a manifest holds it: what decides what is trained, not where and when it is kept."""
    return {
        key: value for key, value in asdict(config).items() if key not in ("out", "keep", "save_every", "save_minutes")
    }


def read_config(source: str | os.PathLike[str] | Mapping[str, Any], **changes: Any) -> DistillConfig:
    """A configuration from a TOML file or a mapping of the same shape, `changes` taking the place of its keys.

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
    try:
        return TypeAdapter(DistillConfig).validate_python({**table, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "unexpected_keyword_argument":
            reason = "there is no such key"
        else:
            reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{where}: {key + ': ' if key else ''}{reason}") from error
