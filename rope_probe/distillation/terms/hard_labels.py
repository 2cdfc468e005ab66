"""Cross-entropy with one token of the teacher's in place of its distribution: are logits needed at all?"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rope_probe.distillation.terms.base import LogitTerm


@dataclass(frozen=True)
class HardLabels(LogitTerm):
    """Cross-entropy with a token of the teacher's, in nats, averaged over all positions.

    The token is the teacher's most likely one, or with `sampled` one drawn from its distribution at each position. The
    draw is seeded by the logits themselves: the same lesson has the same labels, whatever was taught before it.
    Vocabularies of different padded size are cut to the shared part.
    """

    teacher: str = "teacher"
    sampled: bool = False
    kind: Literal["hard_labels"] = "hard_labels"

    metric: ClassVar[str] = "hard_label_nats"

    def values(
        self, logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], taught: Float[Tensor, "n W"] | None
    ) -> Float[Tensor, " n"]:
        """Nats at each position."""
        assert taught is not None
        shared = min(logits.shape[-1], taught.shape[-1])
        precise = logits[:, :shared].to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(precise, self.labels(taught[:, :shared]), reduction="none")

    def labels(self, taught: Float[Tensor, "n W"]) -> Int[Tensor, " n"]:
        """The teacher's tokens."""
        if not self.sampled:
            return taught.argmax(-1)
        precise = taught.detach().float()
        bits = precise.contiguous().view(torch.int32)
        generator = torch.Generator(taught.device).manual_seed(int(bits.sum(dtype=torch.int64)))
        return torch.multinomial(precise.softmax(-1), 1, generator=generator).squeeze(1)
