"""The pass over a head's logits that all logit terms of a stream share, a chunk of positions at a time.

The logits of a window are never held: heads of student and teachers are applied to `chunk` positions at a time, and the
chunk's gradients are taken on the spot, while its logits are there, straight into the gradient of the head's weight.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rope_probe.distillation.terms.base import IGNORED, Counts, LogitTerm
from rope_probe.errors import InputError


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


Taught = tuple[Float[Tensor, "N K"], Head]
"""Final hidden states of a teacher, and its head."""


def loss_in_chunks(
    terms: Sequence[LogitTerm],
    hidden: Float[Tensor, "N M"],
    head: Head,
    targets: Int[Tensor, " N"],
    taught: Mapping[str, Taught] | None = None,
    *,
    chunk: int = 256,
    counts: Counts | None = None,
    factor: float = 1.0,
) -> tuple[Float[Tensor, ""], list[Float[Tensor, " N"]]]:
    """What logit terms add to the loss of a step, and the value of each at each position, detached.

    The loss is differentiable in `hidden`, the final hidden states, and in the head's projection. -100 in `targets` is
    no target. `taught` are teachers by name; they get no gradient. `counts` are the positions to average over, where
    these are part of a larger batch; `factor` is what its stream counts for. Raises InputError for a teacher that a
    term reads and `taught` lacks.
    """
    taught = taught or {}
    counts = counts or Counts(len(targets), int((targets != IGNORED).sum()))
    for term in terms:
        if term.teacher is not None and term.teacher not in taught:
            raise InputError(f"{term.kind} reads the teacher {term.teacher!r}, which is not there")
    values: list[list[Tensor]] = [[] for _ in terms]

    def of_chunk(projected: Tensor, rows: slice) -> Tensor:
        logits = head.after(projected)
        total = projected.new_zeros((), dtype=torch.promote_types(projected.dtype, torch.float32))
        theirs: dict[str | None, Tensor | None] = {None: None}
        for term, kept in zip(terms, values, strict=True):
            if term.teacher is not None and term.teacher not in theirs:
                states, teacher_head = taught[term.teacher]
                with torch.no_grad():
                    theirs[term.teacher] = teacher_head(states[rows])
            read = logits if term.weight > 0 else logits.detach()
            value = term.values(read, targets[rows], theirs[term.teacher])
            value = term.of_counted(value, targets[rows] != IGNORED)
            kept.append(value.detach())
            if term.weight > 0:
                total = total + term.loss(value, counts, factor)
        return total

    wanted = torch.is_grad_enabled() and any(term.weight > 0 for term in terms)
    seen = hidden if terms else hidden[:0]  # without terms, no logits; but the head stays a part of the graph
    projection = head.projection
    loss = _InChunks.apply(of_chunk, chunk, wanted, seen, projection.weight, projection.bias)
    return loss, [torch.cat(parts) for parts in values]


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
