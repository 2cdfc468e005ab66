"""Training of a student through one phase, as every experiment does it."""

from typing import Any

from rope_probe import HookedCausalLM
from rope_probe.distillation import Phase, train_phase
from rope_probe.distillation.loop import Record
from rope_probe.runs.progress import progress


def trained(what: str, student: HookedCausalLM, phase: Phase, *, seed: int, **teachers: Any) -> list[Record]:
    """Train `student` in place under a progress bar called `what`, and return the losses of every step.

    `seed` is that of the data, and `teachers` are those of `train_phase`: `teacher=`, or several by name, `teachers=`.
    """
    with progress(f"{what}, tokens", phase.steps * phase.step_tokens) as advance:
        history, _ = train_phase(
            student,
            phase,
            seed=seed,
            on_step=lambda record: advance(phase.step_tokens, f"loss {record['loss']:.3f}"),
            **teachers,
        )
    return history
