"""The training loop: one phase of one model, on one process or several (accelerate: CPU, one GPU, DDP, FSDP2).

- Muon turns the matrices inside the layers where a phase says so, AdamW the rest: with AdamW alone, small models with a
  small theta settle on copying from fixed offsets, and content-matched retrieval never emerges on some seeds.
- Every process draws the whole batch, a pure function of (seed, step), and reads its share of the windows; losses are
  averaged over the whole batch, so they do not depend on how many share it. `streams` says how they add up.
- The streams of a step are read one after the other, so that no more than one part of one stream is in memory.
- Weights are float32, under bfloat16 autocast too; others are refused.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from rope_probe.distillation.phase import GateError, Phase
from rope_probe.distillation.student import Lesson, Student, Taught, by_distance, taught_by
from rope_probe.distillation.terms import labels, with_measured
from rope_probe.errors import InputError
from rope_probe.models.architectures import layers_of
from rope_probe.models.hooked import HookedCausalLM, load_model
from rope_probe.models.parameters import query_key_value_rows

ORIGINAL = "original"
"""The teacher that is always there: a frozen copy of the student."""
ITSELF = "itself"
"""The teacher that is the student as it is in this step, read without a gradient."""
BY_DISTANCE = "_by_distance"
"""How the name of what is told by distance ends."""

Record = dict[str, Any]
OnStep = Callable[[Record], Any]


def train_phase(
    model: HookedCausalLM,
    phase: Phase,
    *,
    seed: int,
    teacher: HookedCausalLM | None = None,
    teachers: Mapping[str, HookedCausalLM] | None = None,
    autocast: bool = False,
    on_step: OnStep | None = None,
) -> tuple[list[Record], pd.DataFrame]:
    """Train `model` in place through `phase`; returns the losses of every step, and the gate's last measurement.

    A record is that of `Training.advance`, and `on_step` hears of each. Ends early when the gate passes. `teacher` is
    the one that terms call "teacher"; `teachers` are more of them by name, read and never changed. Raises InputError as
    `Training` does, and GateError, naming distance, accuracy and budget, when the gate is not passed within the phase's
    steps.
    """
    named = ({} if teacher is None else {"teacher": teacher}) | dict(teachers or {})
    training = Training(model, phase, seed=seed, teachers=named, autocast=autocast)
    history: list[Record] = []
    while training.step < phase.steps and not training.passed:
        history.append(training.advance())
        if on_step is not None:
            on_step(history[-1])
        training.try_gate()
    if phase.gate is not None and not training.passed:
        raise GateError(training.missed, history, training.gate)
    return history, training.gate


class Training:
    """One phase of one model under way. `advance` does a step; `state` and `restore` let another process go on.

    `teachers` are models by the names that terms call them. "original" need not be among them: where a term reads it,
    it is a frozen copy of the model as it is given. Nor need "itself", which is the model under way. A measured step of
    a stream that reads no teacher tells the divergence from the first one given.

    Raises InputError for a model with another theta than the phase's, weights that are not float32, a teacher that is
    missing, and a batch that the processes cannot share; `advance` for a gradient that is not finite.
    """

    def __init__(
        self,
        model: HookedCausalLM,
        phase: Phase,
        *,
        seed: int,
        teachers: Mapping[str, HookedCausalLM] | None = None,
        autocast: bool = False,
        accelerator: Accelerator | None = None,
    ) -> None:
        theta = model.config.rope_parameters.get("rope_theta")
        if phase.theta is not None and theta != phase.theta:
            raise InputError(
                f"phase {phase.name!r} wants theta {phase.theta:g}, but the model's is {theta}: "
                "see checkpoints.with_rope"
            )
        if model.dtype not in (torch.float32, torch.float64):
            raise InputError(f"weights are trained in float32, but the model's are {model.dtype}; use autocast")
        self.model, self.phase, self.seed = model, phase, seed
        self.teachers = dict(teachers or {})
        self._copied_original = ORIGINAL in _names_read(phase) and ORIGINAL not in self.teachers
        if self._copied_original:
            self.teachers[ORIGINAL] = frozen_copy(model)
        if ITSELF in _names_read(phase):
            self.teachers[ITSELF] = model
        for name in _names_read(phase):
            if name not in self.teachers:
                raise InputError(
                    f"phase {phase.name!r} distils, so it needs a teacher {name!r}; it has {sorted(self.teachers)}"
                )
        self.step, self.passed, self.gate = 0, False, pd.DataFrame()
        self._accelerator = accelerator or Accelerator(cpu=model.device.type == "cpu", mixed_precision="no")
        self._windows = phase.windows_of_a_part(self._accelerator.num_processes)
        self._autocast = partial(torch.autocast, model.device.type, torch.bfloat16, enabled=autocast)
        self._optimizers = _optimizers(model.original_model, phase)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]
        student = Student(model)
        self._student = self._accelerator.prepare(
            student, *self._optimizers, device_placement=[False] * (1 + len(self._optimizers))
        )[0]

    def advance(self, *, measure: bool = False) -> Record:
        """One step: `{"step", "tokens", "loss"}` and the mean of every term of a weight above 0, under its metric.

        Steps and tokens count what is done. A metric that several terms of a stream share is followed by the teacher's
        name or a number; where a phase has several streams, the stream's name stands before it, "long/kd_nats". With
        `measure`, terms of weight 0 are told too; cross-entropy and divergence (where there is a teacher) are told
        whatever the terms; and with them `lr`, the `grad_norm` before clipping, those of all W_Q, W_K and W_V together
        (`grad_norm_q|k|v`), and `kd_nats_by_distance`: the divergence at tokens that last occurred so many tokens ago,
        up to powers of two ("new" for the first occurrence in a window).

        Raises InputError for a gradient or a term that is not finite.
        """
        phase, accelerator = self.phase, self._accelerator
        factor = phase.learning_rate_factor(self.step)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        pieces = list(self._pieces(measure))
        self.model.original_model.train()
        sums: dict[str, Tensor] = {}
        for i, (lesson, rows) in enumerate(pieces):
            part = lesson.batch.rows(rows.start, rows.stop)
            with accelerator.no_sync(self._student) if i + 1 < len(pieces) else nullcontext():
                with self._autocast():
                    loss, values = self._student(part, lesson, self._taught(lesson, rows))
                (loss * accelerator.num_processes).backward()  # gradients are averaged over processes
            for name, value in self._told(lesson, loss, values, part.tokens if measure else None).items():
                sums[name] = sums.get(name, 0) + value
        norms = self._gradient_norms() if measure else {}
        norm = _whole(accelerator.clip_grad_norm_(self._student.parameters(), phase.clip_norm)).item()
        if not math.isfinite(norm):
            raise InputError(
                f"the gradient of phase {phase.name!r} is {norm} at step {self.step + 1}, so training cannot go on; "
                f"try a lower lr than {phase.lr:g}"
            )
        if measure:
            norms = {"lr": phase.lr * factor, "grad_norm": norm, **norms}
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.model.original_model.eval()
        self.step += 1
        return {"step": self.step, "tokens": self.step * phase.step_tokens, **self._together(sums), **norms}

    def _pieces(self, measure: bool) -> Iterator[tuple[Lesson, slice]]:
        """What this process reads in a step: every stream's lesson, and windows of it, part by part."""
        phase = self.phase
        first = self._accelerator.process_index * phase.accumulate
        of_streams = zip(phase.mix, phase.batches(self.seed, self.step), phase.seeds(self.seed), strict=True)
        for index, (stream, batch, seed) in enumerate(of_streams):
            terms = stream.terms
            if measure:
                others = (name for name in self.teachers if name not in (ORIGINAL, ITSELF))
                terms = with_measured(terms, next(iter((*stream.teachers, *others)), None))
            else:
                terms = tuple(term for term in terms if term.weight > 0)
            teachers_batch = stream.as_teachers_read(batch, seed=seed, step=self.step)
            lesson = Lesson.of(stream, terms, batch, teachers_batch, phase.factors[index])
            count = self._windows[index]
            for part in range(first, first + phase.accumulate):
                yield lesson, slice(part * count, (part + 1) * count)

    @torch.no_grad()
    def _taught(self, lesson: Lesson, rows: slice) -> dict[str, Taught]:
        """What every teacher that the lesson's terms read makes of the windows `rows`."""
        part = lesson.teachers_batch.rows(rows.start, rows.stop)
        taught = {}
        for name in dict.fromkeys(term.teacher for term in lesson.terms if term.teacher is not None):
            of_teacher = [term for term in lesson.terms if term.teacher == name]
            taught[name] = taught_by(self.teachers[name], part, lesson.stream.teacher_masked, of_teacher)
        return taught

    def _told(self, lesson: Lesson, loss: Tensor, values: list[Tensor], tokens: Tensor | None) -> dict[str, Tensor]:
        """The loss of a part and its terms, as shares of the whole step's; with `tokens`, by distance too."""
        record = {"loss": loss.detach()}
        prefix = f"{lesson.stream.name}/" if len(self.phase.mix) > 1 else ""
        for term, label, value in zip(lesson.terms, labels(lesson.terms), values, strict=True):
            record[prefix + label] = term.mean(value, lesson.counts)
            if term.by_distance and tokens is not None:
                record[prefix + label + BY_DISTANCE] = by_distance(value, tokens).to(loss)
        return record

    def try_gate(self) -> None:
        """Measure the gate where one is due, and note whether it is `passed`."""
        gate, data = self.phase.gate, self.phase.probed
        if gate is not None and data is not None and self.step % gate.every == 0:
            self.gate = gate.measure(self.model, data)
            self.passed = bool((self.gate["value"] >= gate.accuracy).all())

    @property
    def missed(self) -> str:
        """What the gate asked for and was not reached."""
        phase, wanted = self.phase, self.phase.gate.accuracy if self.phase.gate else None
        seen = ", ".join(f"{row.value:.2f} at {row.distance}" for row in self.gate.itertuples())
        return (
            f"phase {phase.name!r} with seed {self.seed} missed its gate, accuracy {wanted} at every distance, within "
            f"{phase.steps} steps of {phase.step_tokens} tokens: {seen or 'it was never tried'}"
        )

    def weights(self) -> dict[str, Tensor]:
        """The student's whole state dict, on the CPU of the main process; nothing on the others, which must ask too.

        Raises InputError where a weight is not finite.
        """
        kept = {}
        for name, weight in self.model.original_model.state_dict().items():
            whole = _whole(weight)
            if not whole.isfinite().all():
                raise InputError(
                    f"{name} is not finite after step {self.step} of phase {self.phase.name!r}; try a lower lr than "
                    f"{self.phase.lr:g}, or less weight decay than {self.phase.weight_decay:g}"
                )
            if self._accelerator.is_main_process:
                kept[name] = whole.cpu()
        return kept

    def state(self) -> dict[str, Tensor]:
        """What the optimizers remember, whole, where `weights` are; every process must ask for it."""
        kept = {}
        for name, optimizer, parameter in self._optimized():
            for key, value in optimizer.state[parameter].items():
                whole = _whole(value)
                if self._accelerator.is_main_process:
                    kept[f"{name}/{key}"] = whole.cpu()
        return kept

    def restore(self, step: int, state: dict[str, Tensor]) -> None:
        """Go on after `step` steps, as the training whose `state` this was; its weights are the model's already.

        Raises InputError for a state that is not of these optimizers' parameters, and where a copy of the model as it
        is now would stand for the original.
        """
        if self._copied_original:
            raise InputError(f"the model no longer is the {ORIGINAL!r} that terms read; give it among the teachers")
        of_parameter: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, what = key.rpartition("/")
            of_parameter.setdefault(name, {})[what] = value
        for name, optimizer, parameter in self._optimized():
            remembered = of_parameter.pop(name, {})
            for what, value in remembered.items():
                if not value.isfinite().all():
                    raise InputError(f"{what} of {name} is not finite")
                if value.numel() != 1 and value.shape != parameter.shape:
                    raise InputError(f"{what} of {name} is {list(value.shape)}, but the weight {list(parameter.shape)}")
            optimizer.state[parameter] = {what: _like(parameter, value) for what, value in remembered.items()}
        if of_parameter:
            raise InputError(f"it remembers {next(iter(of_parameter))!r}, which is not trained here")
        self.step = step

    def _optimized(self) -> Iterator[tuple[str, torch.optim.Optimizer, nn.Parameter]]:
        names = {parameter: name for name, parameter in self.model.original_model.named_parameters()}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                yield from ((names[parameter], optimizer, parameter) for parameter in group["params"])

    def _together(self, sums: dict[str, Tensor]) -> Record:
        """Sums over all processes, as numbers."""
        record: Record = {name: value.tolist() for name, value in self._accelerator.reduce(sums, "sum").items()}
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):  # of weight 0, else the gradient had told
                raise InputError(f"{name} of phase {self.phase.name!r} is {value} at step {self.step}; leave it out")
        for name in [name for name in record if name.endswith(BY_DISTANCE)]:
            totals, counts = record[name]
            ends = ["new", *(2**k for k in range(len(counts) - 1))]
            means = zip(ends, totals, counts, strict=True)
            record[name] = {str(end): total / n for end, total, n in means if n}
        return record

    def _gradient_norms(self) -> dict[str, float]:
        squares: dict[str, float] = dict.fromkeys("qkv", 0.0)
        for layer in range(len(layers_of(self.model.original_model))):
            for name, part in query_key_value_rows(self.model.original_model, layer).items():
                gradient = part.weight.grad
                if gradient is not None:
                    squares[name] += _whole(gradient)[part.rows.to(gradient.device)].square().sum().item()
        return {f"grad_norm_{name}": square**0.5 for name, square in squares.items()}


def frozen_copy(model: HookedCausalLM) -> HookedCausalLM:
    """A copy of a model that is only read."""
    copy = load_model(model.plain_copy(), attn=model.attn)
    copy.original_model.requires_grad_(False)
    return copy


def _names_read(phase: Phase) -> list[str]:
    return list(dict.fromkeys(name for stream in phase.mix for name in stream.teachers))


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A value that an optimizer remembers, laid out as its parameter is; step counts stay as they are."""
    if value.shape != parameter.shape:
        return value
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)


def _optimizers(model: PreTrainedModel, phase: Phase) -> list[torch.optim.Optimizer]:
    parameters = list(model.parameters())
    if phase.matrix_lr is None:
        return [_adamw(parameters, phase)]
    inside = {id(p) for p in layers_of(model).parameters() if p.ndim == 2}
    matrices = [p for p in parameters if id(p) in inside]
    rest = [p for p in parameters if id(p) not in inside]
    return [_adamw(rest, phase), torch.optim.Muon(matrices, lr=phase.matrix_lr, weight_decay=phase.weight_decay)]


def _adamw(parameters: list[nn.Parameter], phase: Phase) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=phase.lr, weight_decay=phase.weight_decay, betas=(0.9, 0.95))
