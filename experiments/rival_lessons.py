"""What students of `rivals` learn from instead of the teacher's logits everywhere: labels, a part, agreeing streams."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from experiments.toy_checkpoints import SHORT_DOCUMENTS
from rope_probe import KeyValueStream
from rope_probe.distillation import Divergence, LogitTerm
from rope_probe.windows.packing import Batch


@dataclass(frozen=True)
class HardLabels(LogitTerm):
    """Cross-entropy with a token of the teacher's: its most likely one, or one `drawn` from its distribution.

    The draw is seeded by the logits themselves, so that a lesson is the same whatever was taught before it.
    """

    teacher: str = "teacher"
    drawn: bool = False
    kind: Literal["hard_labels"] = "hard_labels"

    metric: ClassVar[str] = "hard_label_nats"

    def values(
        self, logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], taught: Float[Tensor, "n W"] | None
    ) -> Float[Tensor, " n"]:
        """Nats at each position."""
        assert taught is not None
        return nn.functional.cross_entropy(logits, self.labels(taught), reduction="none")

    def labels(self, taught: Float[Tensor, "n W"]) -> Int[Tensor, " n"]:
        """The teacher's tokens."""
        if not self.drawn:
            return taught.argmax(-1)
        bits = taught.detach().float().contiguous().view(torch.int32)
        generator = torch.Generator().manual_seed(int(bits.long().sum()))
        return torch.multinomial(taught.float().softmax(-1), 1, generator=generator).squeeze(1)


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
