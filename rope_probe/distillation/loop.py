"""The training loop: one phase of one model.

- Muon turns the matrices inside the layers, AdamW the rest: with AdamW alone, small models with a small theta settle on
  copying from fixed offsets, and content-matched retrieval never emerges on some seeds (see docs/log.md).
- Batch i is a pure function of (seed, i). Weights stay float32, under bfloat16 autocast too.
"""

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rope_probe.distillation.phase import GateError, Phase
from rope_probe.errors import InputError
from rope_probe.hooked import HookedCausalLM

OnStep = Callable[[dict[str, float]], Any]


def train_phase(
    model: HookedCausalLM, phase: Phase, *, seed: int, on_step: OnStep | None = None
) -> tuple[list[dict[str, float]], pd.DataFrame]:
    """Train `model` in place through `phase`; returns the losses, and the gate's last measurement.

    `on_step({"step", "tokens", "ce_nats"})` hears of every step. Ends early when the gate passes.
    Raises InputError for a model with another theta than the phase's, and GateError, naming distance, accuracy and
    budget, when the gate is not passed within the phase's steps.
    """
    theta = model.config.rope_parameters.get("rope_theta")
    if theta != phase.theta:
        raise InputError(
            f"phase {phase.name!r} wants theta {phase.theta:g}, but the model's is {theta}: see checkpoints.with_rope"
        )
    optimizers = _optimizers(model.original_model, phase)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(one, phase.learning_rate_factor) for one in optimizers]
    gate, history, measured, passed = phase.gate, [], pd.DataFrame(), phase.gate is None
    for step in range(phase.steps):
        loss = _step(model, phase.batch(seed, step).to(model.device), optimizers, phase)
        for scheduler in schedulers:
            scheduler.step()
        history.append({"step": step, "tokens": (step + 1) * phase.batch_tokens, "ce_nats": loss})
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
            f"within {phase.steps} steps of {phase.batch_tokens} tokens: {seen or 'it was never tried'}"
        )
    return history, measured


def _step(model: HookedCausalLM, tokens: Tensor, optimizers: list[torch.optim.Optimizer], phase: Phase) -> float:
    model.original_model.train()
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=phase.autocast):
        logits = model(tokens)[:, :-1]
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.original_model.parameters(), phase.clip_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    model.original_model.eval()
    return loss.item()


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
