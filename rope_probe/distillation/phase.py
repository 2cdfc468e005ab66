"""What a training phase is: its data, window, theta, objective, budget and the gate it must pass."""

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Discriminator

from rope_probe.distillation.losses import Objective
from rope_probe.errors import InputError
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.names import LONGEST_WINDOW
from rope_probe.retrieval.probe import KeyValueTask, retrieval_accuracy
from rope_probe.seeds import derive
from rope_probe.windows.corpora import KeyValueStream, TextCorpus
from rope_probe.windows.packing import Batch, Positions

_LARGEST = 1e30
"""What float32 can still compute with."""


class GateError(RuntimeError):
    """A phase used its whole budget and its model still does not retrieve what its gate asks for.

    Carries what was seen: the losses of every step, and the gate's last measurement.
    """

    def __init__(self, message: str, history: list[dict[str, float]], measured: pd.DataFrame) -> None:
        super().__init__(message)
        self.history, self.measured = history, measured


@dataclass(frozen=True)
class Gate:
    """A retrieval probe that a phase must pass: at every distance, `accuracy` or more.

    It is tried every `every` steps and ends the phase when it passes, so models are compared at equal skill.
    """

    window: int
    distances: tuple[int, ...]
    accuracy: float
    every: int
    trials: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.accuracy <= 1:
            raise InputError(f"the accuracy that a gate asks for must be in 0..1, but it is {self.accuracy}")
        if min(self.every, self.trials) < 1 or not self.distances or not 0 <= self.seed < 2**63:
            raise InputError(
                "a gate needs `every` and `trials` of 1 or more, a distance, and a seed in 0..2^63-1, but they are "
                f"{self.every}, {self.trials}, {self.distances}, {self.seed}"
            )

    def measure(self, model: HookedCausalLM, data: KeyValueStream) -> pd.DataFrame:
        """Accuracy by distance."""
        task = KeyValueTask(data, self.window)
        frame = retrieval_accuracy(model, task, self.distances, trials=self.trials, seed=self.seed)
        return frame[frame["metric"] == "accuracy"]


@dataclass(frozen=True)
class Phase:
    """One stage of training on windows of packed documents.

    What is read: `batch_tokens` a step in windows of `window`, positions by `positions` (`target_window` is what
    skipped ones are spread over). `masked` and `teacher_masked` keep the attention of student and teacher inside
    documents; where the student's is, tokens that begin a document are no targets, since nothing foretells them.

    How the student rotates: `theta`, or full transformers `rope_parameters`; as it did before where both are None.

    How it learns: by `objective`, in `accumulate` parts a step. `matrix_lr` is Muon's learning rate for the matrices
    inside the layers, `lr` AdamW's for the rest; without it AdamW trains everything. Both rise over `warmup` steps,
    then stay ("constant") or fall to a tenth at `steps` ("cosine"). Gradients are clipped at the norm `clip_norm`. With
    a `gate`, `steps` is the cap. Raises InputError for values that cannot be.
    """

    name: str
    data: Annotated[KeyValueStream | TextCorpus, Discriminator("kind")]
    window: int
    steps: int
    batch_tokens: int
    lr: float
    theta: float | None = None
    rope_parameters: dict[str, Any] | None = None
    objective: Objective = field(default_factory=Objective)
    matrix_lr: float | None = None
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: int = 50
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    accumulate: int = 1
    masked: bool = False
    teacher_masked: bool = False
    positions: Positions = "continuous"
    target_window: int | None = None
    gate: Gate | None = None

    def __post_init__(self) -> None:
        for name in ("window", "steps", "batch_tokens", "warmup", "accumulate", "lr", "clip_norm"):
            value = getattr(self, name)
            if not 0 < value <= _LARGEST:
                raise InputError(f"{name} of phase {self.name!r} must be above 0 (to {_LARGEST:g}), but it is {value}")
        if not 0 <= self.weight_decay <= _LARGEST:
            decay = f"0 or more (to {_LARGEST:g}), but it is {self.weight_decay}"
            raise InputError(f"weight_decay of phase {self.name!r} must be {decay}")
        if self.matrix_lr is not None and not 0 < self.matrix_lr <= _LARGEST:
            raise InputError(
                f"matrix_lr of phase {self.name!r} must be above 0 (to {_LARGEST:g}), but it is {self.matrix_lr}"
            )
        for name in ("window", "target_window"):
            if (getattr(self, name) or 1) > LONGEST_WINDOW:
                raise InputError(f"{name} of phase {self.name!r} must be at most {LONGEST_WINDOW} tokens")
        if not re.fullmatch(r"\w[\w.-]{,99}", self.name):
            raise InputError(
                f"a phase's name becomes a folder's: up to 100 letters, digits, dots, dashes; not {self.name!r}"
            )
        if self.theta is not None and self.rope_parameters is not None:
            raise InputError(f"phase {self.name!r} has both theta and rope_parameters; give one of them")
        if self.theta is not None and not (math.isfinite(self.theta) and self.theta > 0):
            raise InputError(f"theta of phase {self.name!r} must be positive and finite, but it is {self.theta}")
        if self.batch_tokens % self.window:
            raise InputError(
                f"batch_tokens of phase {self.name!r} must be a multiple of the window, {self.window}, but it is "
                f"{self.batch_tokens}"
            )
        self.windows_of_a_part(1)
        if self.gate is not None and not isinstance(self.data, KeyValueStream):
            raise InputError(f"phase {self.name!r} has a gate, which probes key-value retrieval, on other data")

    @property
    def rope(self) -> float | dict[str, Any] | None:
        """What the student is to rotate by, as `checkpoints.with_rope` takes it; None leaves it as it is."""
        return self.rope_parameters if self.theta is None else self.theta

    def batch(self, seed: int, step: int) -> Batch:
        """The windows of one step, a pure function of (seed, step)."""
        batch = self.data.batch(self.batch_tokens // self.window, self.window, seed=seed, index=step)
        return batch.placed(self.positions, target_window=self.target_window, seed=derive(seed, str(step)))

    def windows_of_a_part(self, processes: int) -> int:
        """How many windows each of `accumulate` parts of a step has on each process. Raises InputError unless whole."""
        windows, parts = self.batch_tokens // self.window, processes * self.accumulate
        if windows % parts:
            raise InputError(
                f"a batch of phase {self.name!r} has {windows} windows, which {processes} processes cannot share in "
                f"{self.accumulate} parts each; make batch_tokens a multiple of {self.window * parts}"
            )
        return windows // parts

    def learning_rate_factor(self, step: int) -> float:
        """Factor on the learning rates at a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup)
        if self.schedule == "constant":
            return rise
        return rise * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / self.steps))))
