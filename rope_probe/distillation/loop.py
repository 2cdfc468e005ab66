"""The training loop: one phase of one model.

- Muon turns the matrices inside the layers, AdamW the rest: with AdamW alone, small models with a small theta settle on
  copying from fixed offsets, and content-matched retrieval never emerges on some seeds (see docs/log.md).
- Batch i is a pure function of (seed, i). bfloat16 autocast; weights stay float32.
"""

from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from rope_probe.distillation.phase import GateError, Phase
from rope_probe.hooked import HookedCausalLM

OnStep = Callable[[int, dict[str, float]], Any]


def train_phase(
    model: HookedCausalLM, phase: Phase, *, seed: int, on_step: OnStep | None = None
) -> tuple[list[dict[str, float]], pd.DataFrame | None]:
    """Train `model` in place through `phase`; returns the loss by step, and the gate's last measurement if there is one.

    `on_step(step, numbers)` hears of every step. Ends early when the gate passes.
    Raises GateError, naming distance, accuracy and budget, when the gate is not passed within the phase's steps.
    """
    optimizers = _optimizers(model.original_model, phase)
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / phase.warmup))
        for optimizer in optimizers
    ]
    history, measured = [], None
    for step in range(phase.steps):
        tokens = phase.data.windows(phase.batch_tokens // phase.window, phase.window, seed=seed, index=step)
        loss = _step(model, tokens.to(model.device), optimizers, phase.clip_norm)
        for scheduler in schedulers:
            scheduler.step()
        numbers = {"step": step, "tokens": (step + 1) * phase.batch_tokens, "ce_nats": loss}
        history.append(numbers)
        if phase.gate is not None and (step + 1) % phase.gate.every == 0:
            measured = phase.gate.measure(model, phase.data)
            numbers["gate"] = float(measured["value"].min())
        if on_step is not None:
            on_step(step, numbers)
        if numbers.get("gate", -1.0) >= (phase.gate.accuracy if phase.gate else 0.0):
            break
    if phase.gate is not None and (measured is None or measured["value"].min() < phase.gate.accuracy):
        seen = (
            "it was never tried"
            if measured is None
            else ", ".join(
                f"{accuracy:.2f} at {distance}"
                for distance, accuracy in zip(measured["distance"], measured["value"], strict=True)
            )
        )
        raise GateError(
            f"phase {phase.name!r} with seed {seed} missed its gate, accuracy {phase.gate.accuracy} at every distance, "
            f"within {phase.steps} steps of {phase.batch_tokens} tokens: {seen}"
        )
    return history, measured


def _step(model: HookedCausalLM, tokens: Tensor, optimizers: list[torch.optim.Optimizer], clip_norm: float) -> float:
    model.original_model.train()
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        logits = model(tokens[:, :-1])
    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.original_model.parameters(), clip_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    model.original_model.eval()
    return loss.item()


def _optimizers(model: nn.Module, phase: Phase) -> list[torch.optim.Optimizer]:
    inside = {id(p) for p in model.base_model.layers.parameters() if p.ndim == 2}
    matrices = [p for p in model.parameters() if id(p) in inside]
    rest = [p for p in model.parameters() if id(p) not in inside]
    if phase.matrix_lr is None:
        matrices, rest = [], list(model.parameters())
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=phase.lr, weight_decay=phase.weight_decay, betas=(0.9, 0.95))
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=phase.matrix_lr, weight_decay=phase.weight_decay))
    return optimizers
