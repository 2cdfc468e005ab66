"""The log of a run, log.jsonl: a line for every measured step and every try of a gate."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from rope_probe.distillation.loop import BY_DISTANCE
from rope_probe.distillation.mirrors import Mirror
from rope_probe.errors import InputError
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.tables import Metric, declare

Line = dict[str, Any]
_ONCE = ("phase", "step", "tokens", "time", "gate", "missed_gate")
LOSSES = declare(
    "losses",
    "Losses and speeds while a model trains, by the tokens trained on.",
    ("phase", "seq_len", "tokens", "distance", "occurrence"),
    {
        "loss": Metric("what the step minimised"),
        "ce_nats": Metric("cross-entropy", "nats"),
        "kd_nats": Metric("divergence from the teacher", "nats"),
        "tokens_per_s": Metric("tokens trained on a second", "tokens/s"),
    },
    other_metrics="a term of the objective by its name; `..._by_distance` where it is parted by `distance`, the upper "
    "end of a bin of tokens since the token last occurred",
)
_GATE = {"distance", "value", "low", "high"}


def history_rows(history: Iterable[Mapping[str, Any]], *metrics: str) -> list[dict[str, Any]]:
    """Rows of `losses` made of the measured steps that `train_phase` returns: a row a step and metric.

    `metrics` are those wanted, as far as a step has them; by default all that it has.
    """
    return [
        {"tokens": step["tokens"], "metric": metric, "value": step[metric]}
        for step in history
        for metric in metrics or [name for name in step if name not in ("step", "tokens")]
        if metric in step
    ]


def _is_line(line: Line) -> bool:
    """Whether a line names its phase and step, and holds what the frame is made of."""
    counts = all(type(line.get(key)) is int for key in ("step", "tokens"))
    values = {key: value for key, value in line.items() if key not in _ONCE}
    tries = line.get("gate", [])
    return (
        isinstance(line.get("phase"), str)
        and counts
        and all(
            _is_by_distance(value) if key.endswith(BY_DISTANCE) else _is_number(value) for key, value in values.items()
        )
        and isinstance(tries, list)
        and all(isinstance(one, dict) and one.keys() == _GATE for one in tries)
        and isinstance(line.get("missed_gate", ""), str)
    )


def _is_by_distance(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(key == "new" or key.isdecimal() for key in value)
        and all(map(_is_number, value.values()))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class Log:
    """Lines of JSON, on disk as soon as they are written, and then shown in a mirror where there is one."""

    def __init__(self, path: Path, mirror: Mirror | None = None) -> None:
        self.path, self.mirror = path, mirror

    def lines(self) -> list[Line]:
        """All whole lines; one that was cut short is not there. Raises InputError for a line that is none of ours."""
        if not self.path.exists():
            return []
        try:
            texts = self.path.read_text().splitlines(keepends=True)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the log {str(self.path)!r}: {error}") from error
        return [self._read(number, text) for number, text in enumerate(texts, 1) if text.endswith("\n")]

    def _read(self, number: int, text: str) -> Line:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or not _is_line(line):
            raise InputError(
                f"line {number} of {str(self.path)!r} is no line of a training log; remove it, or remove the run"
            )
        return line

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.mirror is not None:
            self.mirror.write(line)

    def rewind(self, phase: str, step: int) -> None:
        """Forget what was written of `phase` after `step`."""
        kept = [line for line in self.lines() if line["phase"] != phase or line["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(self.path)
        if self.mirror is not None:
            self.mirror.restart(kept)

    @property
    def missed_gate(self) -> str | None:
        """What a phase's gate asked for and was not reached."""
        return next((line["missed_gate"] for line in self.lines() if "missed_gate" in line), None)

    def last_gate(self, phase: str) -> pd.DataFrame:
        """What a phase's gate measured last; empty where it was not tried yet."""
        tries = [line["gate"] for line in self.lines() if "gate" in line and line["phase"] == phase]
        return pd.DataFrame(tries[-1] if tries else [])

    def losses(self) -> pd.DataFrame:
        """The measured steps as rows of LOSSES."""
        rows = []
        for line in self.lines():
            place = {"phase": line["phase"], "tokens": line["tokens"]}
            for name in line:
                if name.endswith(BY_DISTANCE):
                    for end, value in line[name].items():
                        seen = {"occurrence": "new"} if end == "new" else {"occurrence": "again", "distance": int(end)}
                        rows.append({**place, **seen, "metric": name, "value": value})
                elif name not in _ONCE:
                    rows.append({**place, "metric": name, "value": line[name]})
        return LOSSES.frame(rows)

    def gates(self) -> pd.DataFrame:
        """What gates measured, as rows of the table of retrieval."""
        rows = [
            {"phase": line["phase"], "tokens": line["tokens"], "metric": "gate_accuracy", **measured}
            for line in self.lines()
            for measured in line.get("gate", [])
        ]
        return RETRIEVAL.frame(rows)
