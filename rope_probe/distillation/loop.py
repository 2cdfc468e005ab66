"""The training loop: one phase of one model.

- Muon turns the matrices inside the layers, AdamW the rest: with AdamW alone, small models with a small theta settle on
  copying from fixed offsets, and content-matched retrieval never emerges on some seeds (see docs/log.md).
- Batch i is a pure function of (seed, i). Weights are float32, under bfloat16 autocast too; others are refused.
"""

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rope_probe.distillation.losses import IGNORED, Head
from rope_probe.distillation.phase import GateError, Phase
from rope_probe.errors import InputError
from rope_probe.hooked import HookedCausalLM
from rope_probe.packing import Window

OnStep = Callable[[dict[str, float]], Any]


def train_phase(
    model: HookedCausalLM,
    phase: Phase,
    *,
    seed: int,
    teacher: HookedCausalLM | None = None,
    on_step: OnStep | None = None,
) -> tuple[list[dict[str, float]], pd.DataFrame]:
    """Train `model` in place through `phase`; returns the losses of every step, and the gate's last measurement.

    A loss is `{"step", "tokens", "loss", "ce_nats", "kd_nats"}`, the last two where the objective has them, and
    `on_step` hears of each. Ends early when the gate passes. The teacher is read, never changed.
    Raises InputError for a model with another theta than the phase's or a teacher that is missing, and GateError,
    naming distance, accuracy and budget, when the gate is not passed within the phase's steps.
    """
    theta = model.config.rope_parameters.get("rope_theta")
    if theta != phase.theta:
        raise InputError(
            f"phase {phase.name!r} wants theta {phase.theta:g}, but the model's is {theta}: see checkpoints.with_rope"
        )
    if model.dtype not in (torch.float32, torch.float64):
        raise InputError(f"weights are trained in float32, but the model's are {model.dtype}; use the phase's autocast")
    if phase.objective.kd_weight > 0 and teacher is None:
        raise InputError(f"phase {phase.name!r} distils, so it needs a teacher")
    optimizers = _optimizers(model.original_model, phase)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(one, phase.learning_rate_factor) for one in optimizers]
    gate, history, measured, passed = phase.gate, [], pd.DataFrame(), phase.gate is None
    for step in range(phase.steps):
        losses = _step(model, teacher, phase.batch(seed, step).to(model.device), optimizers, phase)
        for scheduler in schedulers:
            scheduler.step()
        history.append({"step": step, "tokens": (step + 1) * phase.batch_tokens, **losses})
        if on_step is not None:
            on_step(history[-1])
        if gate is not None and (step + 1) % gate.every == 0:
            measured = gate.measure(model, phase.data)
            passed = bool((measured["value"] >= gate.accuracy).all())
            if passed:
                break
    if gate is not None and not passed:
        seen = ", ".join(f"{row.value:.2f} at {row.distance}" for row in measured.itertuples())
        raise GateError(
            f"phase {phase.name!r} with seed {seed} missed its gate, accuracy {gate.accuracy} at every distance, "
            f"within {phase.steps} steps of {phase.batch_tokens} tokens: {seen or 'it was never tried'}",
            history,
            measured,
        )
    return history, measured


def _step(
    model: HookedCausalLM,
    teacher: HookedCausalLM | None,
    tokens: Tensor,
    optimizers: list[torch.optim.Optimizer],
    phase: Phase,
) -> dict[str, float]:
    teacher = teacher if phase.objective.kd_weight > 0 else None
    targets = nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORED)
    model.original_model.train()
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=phase.autocast):
        taught = None if teacher is None else _teacher_hidden(teacher, tokens, phase).flatten(0, 1)
        loss, terms = phase.objective.loss(
            model.hidden(tokens).flatten(0, 1),
            _head(model),
            targets.flatten(),
            taught,
            None if teacher is None else _head(teacher),
        )
    loss.backward()
    nn.utils.clip_grad_norm_(model.original_model.parameters(), phase.clip_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    model.original_model.eval()
    losses = {"loss": loss.item()}
    if terms.cross_entropy is not None:
        losses["ce_nats"] = (terms.cross_entropy.sum() / (targets != IGNORED).sum()).item()
    if terms.divergence is not None:
        losses["kd_nats"] = terms.divergence.mean().item()
    return losses


@torch.no_grad()
def _teacher_hidden(teacher: HookedCausalLM, tokens: Tensor, phase: Phase) -> Tensor:
    if not phase.teacher_masked:
        return teacher.hidden(tokens)
    length = phase.data.document_length
    bounds = torch.arange(0, tokens.numel() + 1, length, dtype=torch.int32)
    positions = torch.arange(tokens.shape[1]).repeat(len(tokens)).unsqueeze(0)
    packed = Window(tokens.reshape(1, -1), bounds, positions)  # the windows end to end: masked, they do not meet
    return teacher.hidden(packed, masked=True).view(*tokens.shape, -1)


def _head(model: HookedCausalLM) -> Head:
    def after(projected: Tensor) -> Tensor:
        return model.after_projection(projected.unsqueeze(0)).squeeze(0)

    return Head(model.original_model.get_output_embeddings(), after)


def _optimizers(model: PreTrainedModel, phase: Phase) -> list[torch.optim.Optimizer]:
    parameters = list(model.parameters())
    if phase.matrix_lr is None:
        return [_adamw(parameters, phase)]
    inside = {id(p) for p in model.base_model.layers.parameters() if p.ndim == 2}
    matrices = [p for p in parameters if id(p) in inside]
    rest = [p for p in parameters if id(p) not in inside]
    return [_adamw(rest, phase), torch.optim.Muon(matrices, lr=phase.matrix_lr, weight_decay=phase.weight_decay)]


def _adamw(parameters: list[nn.Parameter], phase: Phase) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=phase.lr, weight_decay=phase.weight_decay, betas=(0.9, 0.95))
