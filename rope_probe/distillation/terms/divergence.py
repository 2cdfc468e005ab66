"""Divergence of the student's next-token distribution from a teacher's, over the whole vocabulary or its top k."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Interval
from jaxtyping import Float, Int
from torch import Tensor, nn

from rope_probe.distillation.terms.base import LogitTerm
from rope_probe.errors import InputError
from rope_probe.ranges import Count


@dataclass(frozen=True)
class Divergence(LogitTerm):
    """How far the student's next-token distribution is from the teacher's, in nats, averaged over all positions.

    `divergence` is forward KL(teacher || student), reverse KL(student || teacher) or Jensen-Shannon, of distributions
    at a `temperature`, times its square, so that the size of the gradient does not depend on it (arXiv 1503.02531).
    Vocabularies of different padded size are cut to the shared part. `top_k` keeps the teacher's k most likely tokens:
    with `tail` all others become one more outcome, without it both distributions are renormalised over the k. None
    keeps the whole vocabulary. Raises InputError for a temperature that is not positive and finite, or a top_k below 1.
    """

    teacher: str = "teacher"
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    temperature: Annotated[float, Interval(ge=1e-3, le=1e3)] = 1.0
    top_k: Count | None = None
    tail: bool = True
    kind: Literal["kd"] = "kd"

    metric: ClassVar[str] = "kd_nats"
    by_distance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in ("forward_kl", "reverse_kl", "jensen_shannon"):
            raise InputError(
                f"divergence must be forward_kl, reverse_kl or jensen_shannon, but it is {self.divergence!r}"
            )

    def values(
        self, logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"], taught: Float[Tensor, "n W"] | None
    ) -> Float[Tensor, " n"]:
        """Nats times T^2 at each position."""
        assert taught is not None
        return self.nats(logits, taught)

    def nats(self, student: Float[Tensor, "n V"], teacher: Float[Tensor, "n W"]) -> Float[Tensor, " n"]:
        """Divergence in nats times T^2, of logits over vocabularies that share their first min(V, W) tokens.

        A token to which both give no probability (logits of -inf) adds nothing; one to which only the second argument
        of a KL gives none makes it as large as numbers get.
        """
        shared = min(student.shape[-1], teacher.shape[-1])
        student, teacher = student[..., :shared], teacher[..., :shared]
        if self.divergence == "forward_kl" and (self.top_k is None or self.top_k >= shared):
            return _ForwardKL.apply(student, teacher, self)
        q, p = (self._log_probabilities(logits) for logits in (student, teacher))
        if self.top_k is not None and self.top_k < shared:
            top = p.topk(self.top_k, -1).indices
            q, p = self._outcomes(q, top), self._outcomes(p, top)
        if self.divergence == "forward_kl":
            nats = _kl(p, q)
        elif self.divergence == "reverse_kl":
            nats = _kl(q, p)
        else:
            middle = torch.logaddexp(p, q) - math.log(2)
            nats = (_kl(p, middle) + _kl(q, middle)) / 2
        return nats * self.temperature**2

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logs = (precise if self.temperature == 1 else precise / self.temperature).log_softmax(-1)
        clamp = logs.clamp_min if logs.requires_grad else logs.clamp_min_
        return clamp(torch.finfo(logs.dtype).min / 4)  # 0 x -inf would be no number

    def _outcomes(self, log_probabilities: Tensor, top: Tensor) -> Tensor:
        kept = log_probabilities.gather(-1, top)
        if not self.tail:
            return kept.log_softmax(-1)
        rest = log_probabilities.scatter(-1, top, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([kept, rest], -1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


class _ForwardKL(torch.autograd.Function):
    """T^2 KL(teacher || student), its gradient T (q - p) taken on the spot, in a third less time than by autograd."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, divergence: Divergence) -> Tensor:
        q, p = (divergence._log_probabilities(logits) for logits in (student, teacher))
        probabilities = p.exp()
        nats = p.sub_(q).mul_(probabilities).sum(-1)
        if ctx.needs_input_grad[0]:
            ctx.gradient = q.exp_().sub_(probabilities).mul_(divergence.temperature).to(student.dtype)
        return nats * divergence.temperature**2

    @staticmethod
    def backward(ctx: Any, d_divergence: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient * d_divergence.unsqueeze(-1), None, None
