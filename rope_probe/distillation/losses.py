"""What a student is trained on: cross-entropy, divergence from the teacher's distribution, its hidden states, any mix.

- A `Divergence` compares next-token distributions: forward KL(teacher || student), reverse KL(student || teacher) or
  Jensen-Shannon, at a temperature, over the whole vocabulary or the teacher's top k. Nats, times T^2, so that the size
  of the gradient does not depend on the temperature (Hinton et al., arXiv 1503.02531).
- `Objective.loss` never holds the logits of a window: heads of student and teacher are applied to `chunk` positions at
  a time, and the chunk's gradients are taken on the spot, while its logits are there, straight into the gradient of the
  head's weight.
- `HiddenMatch` compares hidden states at TransformerLens sites, as LongReD does (arXiv 2502.07365).
- Vocabularies of different padded size are cut to the shared part.

Shape letters: N positions of all windows together, V vocabulary, M width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rope_probe.errors import InputError

IGNORED = -100


@dataclass(frozen=True)
class Divergence:
    """How far the student's next-token distribution is from the teacher's.

    `top_k` keeps the teacher's k most likely tokens: with `tail` all others become one more outcome, without it both
    distributions are renormalised over the k. None keeps the whole vocabulary.
    Raises InputError for a temperature that is not positive and finite, or a top_k below 1.
    """

    kind: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    temperature: float = 1.0
    top_k: int | None = None
    tail: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("forward_kl", "reverse_kl", "jensen_shannon"):
            raise InputError(f"divergence must be forward_kl, reverse_kl or jensen_shannon, but it is {self.kind!r}")
        if not 1e-3 <= self.temperature <= 1e3:
            raise InputError(f"temperature must be a positive finite number in 1e-3..1e3, but it is {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be 1 or more, but it is {self.top_k}")

    def __call__(self, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N W"]) -> Float[Tensor, " N"]:
        """Divergence in nats times T^2, of logits over vocabularies that share their first min(V, W) tokens.

        A token to which both give no probability (logits of -inf) adds nothing; one to which only the second argument
        of a KL gives none makes it as large as numbers get.
        """
        shared = min(student.shape[-1], teacher.shape[-1])
        student, teacher = student[..., :shared], teacher[..., :shared]
        if self.kind == "forward_kl" and (self.top_k is None or self.top_k >= shared):
            return _ForwardKL.apply(student, teacher, self)
        q, p = (self._log_probabilities(logits) for logits in (student, teacher))
        if self.top_k is not None and self.top_k < shared:
            top = p.topk(self.top_k, -1).indices
            q, p = self._outcomes(q, top), self._outcomes(p, top)
        if self.kind == "forward_kl":
            divergence = _kl(p, q)
        elif self.kind == "reverse_kl":
            divergence = _kl(q, p)
        else:
            middle = torch.logaddexp(p, q) - math.log(2)
            divergence = (_kl(p, middle) + _kl(q, middle)) / 2
        return divergence * self.temperature**2

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


@dataclass(frozen=True)
class HiddenMatch:
    """How far the student's hidden states are from the teacher's at `sites`, summed over sites.

    `cosine` is 1 - cosine similarity; `mse` the mean over the width of the squared difference, in squared units of the
    residual stream. Sites are TransformerLens hook names of [B, T, M], "blocks.3.hook_resid_post".
    """

    weight: float = 1.0
    kind: Literal["cosine", "mse"] = "cosine"
    sites: tuple[str, ...] = ("ln_final.hook_out",)

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "mse"):
            raise InputError(f"hidden states are compared by cosine or mse, but kind is {self.kind!r}")
        if not (math.isfinite(self.weight) and self.weight > 0 and self.sites):
            raise InputError(f"hidden states need a positive weight and a site, but have {self.weight}, {self.sites}")

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Float[Tensor, " N"]:
        """Distance at each position, of states [..., M] site by site. Raises InputError where widths differ."""
        total = torch.zeros((), device=student[0].device)
        for site, mine, taught in zip(self.sites, student, teacher, strict=True):
            if mine.shape != taught.shape:
                raise InputError(f"{site} is {mine.shape[-1]} wide in the student, {taught.shape[-1]} in the teacher")
            wide = torch.promote_types(mine.dtype, torch.float32)
            a, b = mine.flatten(0, -2).to(wide), taught.flatten(0, -2).to(wide)
            if self.kind == "cosine":
                total = total + (1 - nn.functional.cosine_similarity(a, b, dim=-1))
            else:
                total = total + (a - b).square().mean(-1)
        return total


@dataclass(frozen=True)
class Head:
    """How hidden states become logits: a projection [V, M], and what comes `after` it, a soft cap or a scale.

    `after` works on the logits of any number of positions, and must have no trainable parameters.
    """

    projection: nn.Linear
    after: Callable[[Tensor], Tensor] = lambda projected: projected

    def __call__(self, hidden: Float[Tensor, "n M"]) -> Float[Tensor, "n V"]:
        """Logits."""
        return self.after(self.projection(hidden))


@dataclass
class Terms:
    """The parts of one loss at each position, detached, not weighted; None where the objective has no such part.

    Cross-entropy and divergence are in nats; cross-entropy is 0 where there is no target.
    """

    cross_entropy: Float[Tensor, " N"] | None = None
    divergence: Float[Tensor, " N"] | None = None
    hidden: Float[Tensor, " N"] | None = None


@dataclass(frozen=True)
class Objective:
    """`ce_weight` x cross-entropy with the next token + `kd_weight` x divergence from the teacher + `hidden`.

    Each term is averaged over its positions: those with a target, and all. Raises InputError for weights that are
    negative, or all zero.
    """

    ce_weight: float = 0.0
    kd_weight: float = 1.0
    divergence: Divergence = field(default_factory=Divergence)
    hidden: HiddenMatch | None = None
    chunk: int = 256

    def __post_init__(self) -> None:
        weights = (self.ce_weight, self.kd_weight)
        nothing = sum(weights) == 0 and self.hidden is None
        if not math.isfinite(sum(weights)) or min(weights) < 0 or nothing or self.chunk < 1:
            raise InputError(
                "an objective needs weights of 0 or more, one of them above it, and a chunk of 1 or more, but they are "
                f"ce_weight {self.ce_weight}, kd_weight {self.kd_weight}, chunk {self.chunk}"
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether any part of it compares with a teacher."""
        return self.kd_weight > 0 or self.hidden is not None

    def loss(
        self,
        hidden: Float[Tensor, "N M"],
        head: Head,
        targets: Int[Tensor, " N"],
        teacher_hidden: Float[Tensor, "N K"] | None = None,
        teacher_head: Head | None = None,
        *,
        over: tuple[int, int] | None = None,
        measure: bool = False,
    ) -> tuple[Float[Tensor, ""], Terms]:
        """Cross-entropy and divergence, differentiable in `hidden` and in the head's projection, and both by position.

        `hidden` are final hidden states; -100 in `targets` is no target. The teacher gets no gradient. `over` are the
        targets and positions to average over, where these are part of a larger batch. With `measure`, terms of weight 0
        are told too, as far as there is a teacher.
        """
        if self.kd_weight > 0 and (teacher_hidden is None or teacher_head is None):
            raise InputError("kd_weight is above 0, so the objective needs a teacher")
        counted, positions = over or (int((targets != IGNORED).sum()), len(hidden))
        terms: dict[str, list[Tensor]] = {"cross_entropy": [], "divergence": []}

        def of_chunk(projected: Tensor, rows: slice) -> Tensor:
            logits = head.after(projected)
            total = projected.new_zeros((), dtype=torch.promote_types(projected.dtype, torch.float32))
            if self.ce_weight > 0 or measure:
                precise = logits.to(total.dtype)
                ce = nn.functional.cross_entropy(precise, targets[rows], ignore_index=IGNORED, reduction="none")
                terms["cross_entropy"].append(ce.detach())
                if self.ce_weight > 0:
                    total = total + self.ce_weight * ce.sum() / max(counted, 1)
            if (self.kd_weight > 0 or measure) and teacher_hidden is not None and teacher_head is not None:
                with torch.no_grad():
                    taught = teacher_head(teacher_hidden[rows])
                kd = self.divergence(logits, taught)
                terms["divergence"].append(kd.detach())
                if self.kd_weight > 0:
                    total = total + self.kd_weight * kd.sum() / positions
            return total

        projection = head.projection
        wanted = torch.is_grad_enabled() and self.ce_weight + self.kd_weight > 0
        loss = _InChunks.apply(of_chunk, self.chunk, wanted, hidden, projection.weight, projection.bias)
        return loss, Terms(**{name: torch.cat(parts) for name, parts in terms.items() if parts})


class _InChunks(torch.autograd.Function):
    """A sum over chunks of positions of a projection of them, whose gradients are taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        of_chunk: Callable[[Tensor, slice], Tensor],
        chunk: int,
        wanted: bool,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        inputs = (hidden, weight, bias)
        sums = [
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
            if x is not None and wanted and needed
            else None
            for x, needed in zip(inputs, ctx.needs_input_grad[3:], strict=True)
        ]
        d_hidden, d_weight, d_bias = sums
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            projected = nn.functional.linear(hidden[rows], weight, bias)
            with torch.set_grad_enabled(wanted):
                part = of_chunk(projected.requires_grad_(wanted), rows)
            total += part.detach()
            if not wanted:
                continue
            (d_projected,) = torch.autograd.grad(part, projected)
            del part, projected
            if d_hidden is not None:
                d_hidden[rows] = (d_projected @ weight.to(d_projected.dtype)).to(d_hidden.dtype)
            if d_weight is not None:
                _add_product(d_weight, d_projected.T, hidden[rows].to(d_projected.dtype))
            if d_bias is not None:
                d_bias += d_projected.sum(0)
        ctx.gradients = [None if d is None or x is None else d.to(x.dtype) for d, x in zip(sums, inputs, strict=True)]
        return total

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return (None, None, None, *(None if d is None else d.mul_(d_loss) for d in gradients))  # large, and read once


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in place; the product in its own dtype, the sum in the total's."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
