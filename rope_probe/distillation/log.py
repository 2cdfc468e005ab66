"""The log of a run, log.jsonl: a line for every measured step and every try of a gate."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from rope_probe.results import tidy

Line = dict[str, Any]
_ONCE = ("phase", "step", "tokens", "time", "kd_nats_by_distance", "gate", "missed_gate")


class Log:
    """Lines of JSON, on disk as soon as they are written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[Line]:
        """All whole lines; one that was cut short is not there."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, phase: str, step: int) -> None:
        """Forget what was written of `phase` after `step`."""
        kept = [line for line in self.lines() if line["phase"] != phase or line["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(self.path)

    @property
    def missed_gate(self) -> str | None:
        """What a phase's gate asked for and was not reached."""
        return next((line["missed_gate"] for line in self.lines() if "missed_gate" in line), None)

    def last_gate(self, phase: str) -> pd.DataFrame:
        """What a phase's gate measured last; empty where it was not tried yet."""
        tries = [line["gate"] for line in self.lines() if "gate" in line and line["phase"] == phase]
        return pd.DataFrame(tries[-1] if tries else [])

    def frame(self) -> pd.DataFrame:
        """The log as a tidy frame: `position` counts tokens trained on, `distance` is the upper end of its bin."""
        rows = []
        for line in self.lines():
            at = {"phase": line["phase"], "position": line["tokens"]}
            rows += [{**at, "metric": name, "value": line[name]} for name in line if name not in _ONCE]
            for distance, value in line.get("kd_nats_by_distance", {}).items():
                reach = 0 if distance == "new" else int(distance)
                rows.append({**at, "metric": "kd_nats_by_distance", "distance": reach, "value": value})
            rows += [{**at, "metric": "gate_accuracy", **measured} for measured in line.get("gate", [])]
        return tidy(rows)
