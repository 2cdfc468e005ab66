"""What a training phase is: its window, theta, data, budget and the gate it must pass."""

import math
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd
from jaxtyping import Int
from torch import Tensor

from rope_probe.distillation.losses import Objective
from rope_probe.errors import InputError
from rope_probe.hooked import HookedCausalLM
from rope_probe.packing import KeyValueStream
from rope_probe.retrieval import KeyValueTask, retrieval_accuracy


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

    def measure(self, model: HookedCausalLM, data: KeyValueStream) -> pd.DataFrame:
        """Accuracy by distance."""
        task = KeyValueTask(data, self.window)
        frame = retrieval_accuracy(model, task, self.distances, trials=self.trials, seed=self.seed)
        return frame[frame["metric"] == "accuracy"]


@dataclass(frozen=True)
class Phase:
    """One stage of training on windows of packed documents, by cross-entropy on all tokens unless told otherwise.

    `objective` mixes cross-entropy and distillation. `teacher_masked` keeps the teacher's attention inside documents,
    so that its logits know nothing of what came before one; the student's attention crosses them in any case.
    `matrix_lr` is Muon's learning rate for the matrices inside the layers, `lr` AdamW's for embeddings, head and norms;
    None trains everything with AdamW. Both rise over `warmup` steps, then stay ("constant") or fall to a tenth at
    `steps` ("cosine"). `steps` is the cap when there is a gate. `autocast` computes in bfloat16, where that is faster.
    """

    name: str
    data: KeyValueStream
    window: int
    theta: float
    steps: int
    batch_tokens: int
    lr: float = 3e-3
    matrix_lr: float | None = 0.01
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 50
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    autocast: bool = False
    gate: Gate | None = None
    objective: Objective = field(default_factory=lambda: Objective(ce_weight=1.0, kd_weight=0.0, chunk=8192))
    teacher_masked: bool = False

    def __post_init__(self) -> None:
        if self.warmup < 1 or self.steps < 1:
            raise InputError(f"warmup and steps must be 1 or more, but they are {self.warmup} and {self.steps}")
        if self.batch_tokens % self.window:
            raise InputError(
                f"batch_tokens must be a multiple of the window, {self.window}, but it is {self.batch_tokens}"
            )

    def batch(self, seed: int, step: int) -> Int[Tensor, "windows window"]:
        """The windows of one step, a pure function of (seed, step)."""
        return self.data.windows(self.batch_tokens // self.window, self.window, seed=seed, index=step)

    def learning_rate_factor(self, step: int) -> float:
        """Factor on the learning rates at a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup)
        if self.schedule == "constant":
            return rise
        return rise * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / self.steps))))
