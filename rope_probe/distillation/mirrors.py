"""The training log shown elsewhere while it is written: TensorBoard or Weights & Biases. log.jsonl stays the record.

A value is called PHASE/METRIC, and stands at its step of the phase. Both are optional: pip install
'rope_probe[tensorboard]' or 'rope_probe[wandb]'.
"""

import importlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rope_probe.errors import InputError, reason
from rope_probe.names import MIRRORS

Line = Mapping[str, Any]
_NOT_VALUES = ("phase", "step", "time", "missed_gate")
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


class Mirror(ABC):
    """Somewhere that lines of the log are shown."""

    @abstractmethod
    def restart(self, lines: Sequence[Line]) -> None:
        """Show these lines, those of the log as it stands now that a run begins or goes on."""

    @abstractmethod
    def write(self, line: Line) -> None:
        """Show one more line."""

    @abstractmethod
    def close(self) -> None:
        """Write out what is still held back."""


def require_mirror(kind: str | None) -> None:
    """Raises InputError, with what to install, where what a mirror needs is not there."""
    if kind is not None:
        _import(kind)


def open_mirror(kind: str, out: Path, config: Mapping[str, Any]) -> Mirror:
    """The mirror of a run at `out`, whose configuration is shown too where there is a place for it.

    Raises InputError as `require_mirror`, and where Weights & Biases refuses (without a login, WANDB_MODE=offline
    keeps it on the disk).
    """
    return _TensorBoard(out / "tensorboard") if kind == "tensorboard" else _WeightsAndBiases(out, config)


def values_of(line: Line) -> Iterator[tuple[str, float]]:
    """The numbers of a line by name: PHASE/METRIC, and PHASE/METRIC/PART where a metric has parts."""
    phase = line["phase"]
    for name, value in line.items():
        if name == "gate":
            for tried in value:
                yield f"{phase}/gate_accuracy/{tried['distance']}", float(tried["value"])
        elif isinstance(value, Mapping):
            for part, number in value.items():
                yield f"{phase}/{name}/{part}", float(number)
        elif name not in _NOT_VALUES:
            yield f"{phase}/{name}", float(value)


def _import(kind: str) -> Any:
    if kind not in MIRRORS:
        raise InputError(f"mirror must be {' or '.join(map(repr, MIRRORS))}, but it is {kind!r}")
    try:
        return importlib.import_module(_MODULES[kind])
    except ImportError as error:
        raise InputError(
            f"mirror {kind!r} needs the package {kind}, which is not installed; pip install 'rope_probe[{kind}]'"
        ) from error


class _TensorBoard(Mirror):
    """Event files in a folder; they are written anew where the log was rewound."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer_type = _import("tensorboard").SummaryWriter
        self._writer: Any = None
        self._written: list[Line] | None = None

    def restart(self, lines: Sequence[Line]) -> None:
        """As `Mirror`; nothing to do where they are what was written."""
        if self._written == list(lines):
            return
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._writer, self._written = self._writer_type(str(self._folder)), []
        for line in lines:
            self.write(line)

    def write(self, line: Line) -> None:
        """As `Mirror`."""
        assert self._writer is not None
        assert self._written is not None
        for name, value in values_of(line):
            self._writer.add_scalar(name, value, global_step=line["step"], walltime=line.get("time"))
        self._writer.flush()
        self._written.append(dict(line))

    def close(self) -> None:
        """As `Mirror`."""
        if self._writer is not None:
            self._writer.close()


class _WeightsAndBiases(Mirror):
    """A run of Weights & Biases, its files in a folder of the run directory.

    What it was sent cannot be taken back, so a resumed run is a new one there, with the whole log.
    """

    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        wandb = _import("wandb")
        try:
            self._run = wandb.init(
                project="rope_probe",
                name=out.name,
                dir=str(out),
                config=dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise InputError(f"Weights & Biases refuses: {reason(error)}; log in, or set WANDB_MODE=offline") from error
        self._phases: set[str] = set()
        self._sent = 0

    def restart(self, lines: Sequence[Line]) -> None:
        """As `Mirror`: send those that this process has not sent."""
        for line in lines[self._sent :]:
            self.write(line)

    def write(self, line: Line) -> None:
        """As `Mirror`."""
        phase = line["phase"]
        if phase not in self._phases:
            self._run.define_metric(f"{phase}/step", hidden=True)
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
            self._phases.add(phase)
        self._run.log({f"{phase}/step": line["step"], **dict(values_of(line))})
        self._sent += 1

    def close(self) -> None:
        """As `Mirror`."""
        self._run.finish()
