"""Cross-entropy with the next token."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rope_probe.distillation.terms.base import IGNORED, LogitTerm


@dataclass(frozen=True)
class CrossEntropy(LogitTerm):
    """Cross-entropy with the next token, in nats, averaged over the positions that have one. It reads no teacher."""

    teacher: None = None
    kind: Literal["cross_entropy"] = "cross_entropy"

    metric: ClassVar[str] = "ce_nats"
    averaged_over: ClassVar[Literal["positions", "targets"]] = "targets"

    def values(
        self, logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], taught: Float[Tensor, "n W"] | None
    ) -> Float[Tensor, " n"]:
        """Nats at each position; 0 where there is no target."""
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(precise, targets, ignore_index=IGNORED, reduction="none")
