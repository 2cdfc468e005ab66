"""Relations between positions, student's and teacher's, in memory that is linear in T (LinearARD, arXiv 2604.00004).

A head's queries make a matrix of relations among themselves: row i is softmax over j <= i of q_i . q_j / sqrt(d). Its
keys and its values make two more. The loss is the KL of each row of the teacher's from the student's. Rows are made in
blocks, and made again in backward, so no matrix of T x T is held.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rope_probe.distillation.terms.base import StateTerm
from rope_probe.errors import InputError
from rope_probe.models.architectures import heads_of
from rope_probe.models.hooked import HookedCausalLM

_SITE = re.compile(r"blocks\.\d+\.attn\.hook_(rot_q|rot_k|v)")
BLOCK = 128
"""Rows of a matrix of relations that are there at a time."""


@dataclass(frozen=True)
class Relations(StateTerm):
    """KL(teacher || student) of rows of relations, in nats: mean over heads, summed over `sites`, mean over positions.

    `sites` are queries, keys and values as attention reads them, so queries and keys after rotation; `relation_sites`
    names all three of some layers. A window is one causal context, whatever documents are in it. Widths of heads can
    differ between student and teacher, their number cannot.
    """

    teacher: str = "original"
    sites: tuple[str, ...] = ()
    kind: Literal["relations"] = "relations"

    metric: ClassVar[str] = "relations_nats"

    def __post_init__(self) -> None:
        if not self.sites:
            raise InputError(f"{self.kind} needs sites, such as {', '.join(relation_sites([0]))}, but has none")
        super().__post_init__()
        for site in self.sites:
            if not _SITE.fullmatch(site):
                raise InputError(
                    f"relations are among hook_rot_q, hook_rot_k or hook_v of a layer, such as "
                    f"blocks.0.attn.hook_rot_q, but a site is {site!r}"
                )

    def check(self, student: HookedCausalLM, teacher: HookedCausalLM | None) -> None:
        """Raises InputError for a site that a model does not have, and for models with other numbers of heads."""
        super().check(student, teacher)
        if teacher is not None:
            ours, theirs = heads_of(student.config)[:2], heads_of(teacher.config)[:2]
            if ours != theirs:
                raise InputError(
                    f"relations are compared head by head, but the student has {ours[0]} query and {ours[1]} key-value "
                    f"heads and the teacher {self.teacher!r} {theirs[0]} and {theirs[1]}"
                )

    def values(
        self, states: Sequence[Float[Tensor, "B T H D"]], taught: Sequence[Float[Tensor, "B T H E"]] | None
    ) -> Float[Tensor, " N"]:
        """Nats at each position, of queries, keys or values site by site. Raises InputError for other heads."""
        assert taught is not None
        total = torch.zeros((), device=states[0].device)
        for site, mine, teachers in zip(self.sites, states, taught, strict=True):
            if mine.shape[:3] != teachers.shape[:3]:
                raise InputError(
                    f"{site} has {mine.shape[2]} heads in the student and {teachers.shape[2]} in the teacher"
                )
            total = total + relation_kl(mine, teachers)
        return total.flatten()


def relation_sites(layers: Sequence[int]) -> tuple[str, ...]:
    """The sites of queries, keys and values of some layers."""
    return tuple(f"blocks.{layer}.attn.hook_{part}" for layer in layers for part in ("rot_q", "rot_k", "v"))


def relation_kl(
    student: Float[Tensor, "B T H D"], teacher: Float[Tensor, "B T H E"], *, block: int = BLOCK
) -> Float[Tensor, "B T"]:
    """KL(teacher || student) of each row of relations in nats, mean over heads; differentiable in the student's."""
    return _RelationKL.apply(student, teacher, block)


class _RelationKL(torch.autograd.Function):
    """Row by row KL of softmax(x x^T / sqrt(d)), `block` rows at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, block: int) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.block = block
        wide = torch.promote_types(student.dtype, torch.float32)
        mine, theirs = (x.detach().transpose(1, 2).to(wide) for x in (student, teacher))  # [B, H, T, D]
        nats = mine.new_empty(len(mine), mine.shape[2])
        for start in range(0, mine.shape[2], block):
            rows = slice(start, min(start + block, mine.shape[2]))
            q, p = _log_rows(mine, rows), _log_rows(theirs, rows)
            terms = p.exp().mul_(p.sub_(q))
            nats[:, rows] = terms.sum(-1).mean(1)
        return nats

    @staticmethod
    def backward(ctx: Any, d_nats: Tensor) -> tuple[Tensor | None, None, None]:
        student, teacher = ctx.saved_tensors
        wide = torch.promote_types(student.dtype, torch.float32)
        mine, theirs = (x.detach().transpose(1, 2).to(wide) for x in (student, teacher))
        gradient = torch.zeros_like(mine)
        heads, width = mine.shape[1], mine.shape[3]
        for start in range(0, mine.shape[2], ctx.block):
            rows = slice(start, min(start + ctx.block, mine.shape[2]))
            d_scores = _log_rows(mine, rows).exp_().sub_(_log_rows(theirs, rows).exp_())  # [B, H, b, j]
            d_scores *= d_nats[:, None, rows, None] / (heads * width**0.5)
            gradient[:, :, rows] += d_scores @ mine[:, :, : rows.stop]
            gradient[:, :, : rows.stop] += d_scores.transpose(-1, -2) @ mine[:, :, rows]
        return gradient.transpose(1, 2).to(student.dtype), None, None


def _log_rows(x: Float[Tensor, "B H T D"], rows: slice) -> Float[Tensor, "B H b j"]:
    """Logarithms of some rows of relations, up to the last column that any of them has.

    After a row's own position they are so low that their exponential is 0, and finite, since 0 x -inf is no number.
    """
    with torch.autocast(x.device.type, enabled=False):
        scores = x[:, :, rows] @ x[:, :, : rows.stop].transpose(-1, -2) / x.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu_(rows.start + 1)
    return scores.masked_fill_(later, float("-inf")).log_softmax(-1).clamp_min_(torch.finfo(scores.dtype).min / 4)
