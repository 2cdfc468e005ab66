"""What students of `rivals` learn from in place of plain logits: labels, a part, other streams, a disturbed teacher."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from experiments.toy_checkpoints import LONG, SHORT_DOCUMENTS
from rope_probe import (
    AttentionTemperature,
    HookedCausalLM,
    KeyValueStream,
    KeyValueTask,
    PositionShift,
    retrieval_accuracy,
)
from rope_probe.distillation import Divergence, LogitTerm
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.tables import Column, Metric, declare
from rope_probe.seeds import derive
from rope_probe.windows.packing import Batch

SHIFT = 16.0
"""Tokens by which the teacher's queries are shifted, as in `propagation`."""
CALIBRATION_WINDOWS, HALVINGS = 4, 14


@dataclass(frozen=True)
class PartialDivergence(LogitTerm):
    """KL from the teacher at some positions, 0 at the others: those whose next token is a value, or all `others`.

    The mean is over all positions, so the two parts add up to the whole divergence.
    """

    teacher: str = "teacher"
    first_value: int = SHORT_DOCUMENTS.first_value
    others: bool = False
    kind: Literal["partial_kd"] = "partial_kd"

    metric: ClassVar[str] = "partial_kd_nats"

    def values(
        self, logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], taught: Float[Tensor, "n W"] | None
    ) -> Float[Tensor, " n"]:
        """Nats at each position."""
        nats = Divergence(teacher=self.teacher).values(logits, targets, taught)
        counted = (targets >= self.first_value) != self.others
        return nats.where(counted, 0)


@dataclass(frozen=True)
class AgreeingStream(KeyValueStream):
    """Key-value documents that agree: in a window a key has the same value in every document."""

    kind: Literal["agreeing_key_value"] = "agreeing_key_value"  # type: ignore[assignment]

    def batch(self, count: int, window: int, *, seed: int, index: int = 0) -> Batch:
        """As `KeyValueStream.batch`: the same keys at the same places, with values drawn for each window."""
        plain = super().batch(count, window, seed=seed, index=index)
        drawn = np.random.default_rng([seed, index, self.values]).integers(0, self.values, (count, self.keys))
        keys = plain.tokens[:, ::2] - self.FIRST_KEY  # [B, T / 2]
        tokens = plain.tokens.clone()
        tokens[:, 1::2] = torch.from_numpy(drawn).gather(1, keys) + self.first_value
        return dataclasses.replace(plain, tokens=tokens)


DISTURBED = declare(
    "disturbed_teachers",
    "What a disturbance costs a teacher.",
    ("disturbance", "seq_len", "distance", "trials", "low", "high"),
    {
        "size": Metric("size of the disturbance, in its own unit"),
        "kl_nats": Metric("KL of the teacher's distribution from the disturbed teacher's, mean over windows", "nats"),
        "accuracy": Metric("share of values that the disturbed teacher finds"),
    },
    own={
        "disturbance": Column("string", "shift (in tokens), noise (in RMS of the queries), or flat (1 - the factor)"),
        "trials": RETRIEVAL.columns["trials"],
    },
)  # fmt: skip
Hook = tuple[str, Callable[..., Any]]
Disturbance = Literal["shift", "noise", "flat"]


def disturbance_hooks(model: HookedCausalLM, disturbance: Disturbance, size: float, seed: int) -> list[Hook]:
    """Hooks that disturb a teacher for good: by `size` tokens, by noise of `size` RMS, or to 1 - `size` of the scores.

    Noise is drawn anew for every query, head and pass.
    """
    if disturbance == "shift":
        return PositionShift("q", size).hooks(model)
    if disturbance == "flat":
        return AttentionTemperature(1 - size).hooks(model)
    generator = torch.Generator().manual_seed(derive(seed, "noise"))

    def add_noise(q: Float[Tensor, "B T H D"], hook: Any) -> Float[Tensor, "B T H D"]:
        return q + size * q.square().mean().sqrt() * torch.randn(q.shape, generator=generator).to(q)

    return [(f"blocks.{layer}.attn.hook_rot_q", add_noise) for layer in range(len(model.blocks))]


@torch.no_grad()
def disturbed_kl(model: HookedCausalLM, hooks: list[Hook], batch: Batch) -> float:
    """KL of the model's distribution from what it is with `hooks`, in nats, the mean over all positions."""
    with model.measuring():
        clean = model.unembed(model.hidden(batch))
        with model.hooks(fwd_hooks=hooks):
            disturbed = model.unembed(model.hidden(batch))
    return Divergence().nats(disturbed.flatten(0, 1), clean.flatten(0, 1)).mean().item()


def size_that_costs(kl: float, most: float, cost: Callable[[float], float]) -> float:
    """The size, from 0 to `most`, at which a disturbance costs `kl`, by halving; `most` where none costs as much."""
    if cost(most) <= kl:
        return most
    low, high = 0.0, most
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < kl else (low, middle)
    return (low + high) / 2


def disturb(
    teacher: HookedCausalLM, disturbance: Disturbance, seed: int, distances: Sequence[int], *, trials: int
) -> pd.DataFrame:
    """Disturb a teacher for good, at the cost in KL of a shift of its queries by SHIFT tokens; what that costs it.

    Rows of DISTURBED but their model: size, KL, and what is found at `distances`, each on `trials`.
    """
    batch = SHORT_DOCUMENTS.batch(CALIBRATION_WINDOWS, LONG, seed=derive(seed, "calibration"))

    def cost(kind: Disturbance, size: float) -> float:
        return disturbed_kl(teacher, disturbance_hooks(teacher, kind, size, seed), batch)

    size = SHIFT
    if disturbance != "shift":
        most = {"noise": 20.0, "flat": 1.0}[disturbance]
        size = size_that_costs(cost("shift", SHIFT), most, partial(cost, disturbance))
    rows: list[dict[str, Any]] = [
        {"metric": "size", "value": size},
        {"metric": "kl_nats", "value": cost(disturbance, size)},
    ]
    for name, hook in disturbance_hooks(teacher, disturbance, size, seed):
        teacher.add_hook(name, hook)
    task = KeyValueTask(SHORT_DOCUMENTS, LONG)
    found = retrieval_accuracy(teacher, task, distances, trials=trials, seed=derive(seed, "disturbed"))
    found = found[found["metric"] == "accuracy"]
    return DISTURBED.frame(pd.concat([pd.DataFrame(rows), found[found.columns.intersection(list(DISTURBED.columns))]]))
