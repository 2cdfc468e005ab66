"""A student held to itself while its positions are perturbed (arXiv 2604.14339)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor

from rope_probe.distillation.terms.base import LogitTerm
from rope_probe.distillation.terms.divergence import Divergence


@dataclass(frozen=True)
class SelfDistillation(LogitTerm):
    """KL(student || teacher) in nats, averaged over the positions at which the two do not stand alike.

    The teacher "itself" is the student of this very step, without a gradient, at the stream's `teacher_positions`. With
    positions "rope_perturbed" the student stands at i before a random s and at i + y from there on, as if
    `PositionShift("qk", y, positions=range(s, T))` were applied; the mean is over positions from s on.
    """

    teacher: str = "itself"
    kind: Literal["self_kd"] = "self_kd"

    metric: ClassVar[str] = "self_kd_nats"
    averaged_over: ClassVar[Literal["positions", "targets", "moved"]] = "moved"

    def values(
        self, logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], taught: Float[Tensor, "n W"] | None
    ) -> Float[Tensor, " n"]:
        """Nats at each position."""
        assert taught is not None
        return Divergence(divergence="reverse_kl").nats(logits, taught)
