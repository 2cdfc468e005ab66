"""What differs between a clean and a perturbed activation: a number per position and metric.

l2               |b - a|, a: clean, b: perturbed vector at a site, heads side by side
rel_l2           |b - a| / |a|
cosine_distance  1 - cos(a, b), computed as |a/|a| - b/|b||^2 / 2, which does not cancel
kl_nats          KL(softmax a || softmax b), logits only
top1_flips       share of positions whose most likely token changes, logits only
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm

VECTOR_METRICS = ("l2", "rel_l2", "cosine_distance")
LOGIT_METRICS = (*VECTOR_METRICS, "kl_nats", "top1_flips")
_BLOCK_ELEMENTS = 2**17
_SERIES_BELOW = 0.02

Deltas = dict[str, Float[Tensor, " T"]]


def vector_deltas(clean: Float[Tensor, "T *shape"], perturbed: Float[Tensor, "..."]) -> Deltas:
    """l2, rel_l2 and cosine_distance between two vectors at each position.

    `perturbed` is [T, *shape], or [rows, T, *shape] for several passes against one; deltas are [T] or [rows, T].
    """
    return _by_block(_Vectors, clean, perturbed)


def logit_deltas(clean: Float[Tensor, "T V"], perturbed: Float[Tensor, "..."]) -> Deltas:
    """The metrics of `vector_deltas`, and kl_nats and top1_flips.

    With d = b - a, less its mean under p = softmax a, KL is log(1 + sum p (e^d - 1 - d)): terms that are never negative
    and small where d is, so that it holds its digits down to the square of the logits' rounding, where -sum p log(q/p)
    would cancel. Where e^d would overflow, it is log sum e^(log p + d), which does not.
    """
    return _by_block(_Logits, clean, perturbed)


def _by_block(against: type["_Vectors"], clean: Tensor, perturbed: Tensor) -> Deltas:
    """In blocks of positions that stay in the processor's cache."""
    precise = torch.promote_types(clean.dtype, torch.float32)
    shape = perturbed.shape[: perturbed.ndim - clean.ndim + 1]  # of the rows, and T
    clean, perturbed = clean.flatten(1), perturbed.reshape(-1, len(clean), clean[0].numel())
    size = max(1, _BLOCK_ELEMENTS // clean.shape[1]) if clean.device.type == "cpu" else len(clean)
    found: list[list[Deltas]] = [[] for _ in perturbed]
    for a, rows in zip(clean.split(size), perturbed.split(size, 1), strict=True):
        measure = against(a.to(precise))
        for blocks, b in zip(found, rows, strict=True):
            blocks.append(measure(b.to(precise)))
    return {
        metric: torch.cat([block[metric] for blocks in found for block in blocks]).view(shape)
        for metric in against.metrics
    }


class _Vectors:
    """Deltas against some clean vectors."""

    metrics: tuple[str, ...] = VECTOR_METRICS

    def __init__(self, a: Float[Tensor, "n width"]) -> None:
        self.a, self.tiny = a, torch.finfo(a.dtype).tiny
        self.norm = vector_norm(a, dim=1).clamp_min_(self.tiny)

    def __call__(self, b: Float[Tensor, "n width"]) -> Deltas:
        return self.of_difference(b, b - self.a)

    def of_difference(self, b: Tensor, d: Tensor) -> Deltas:
        l2 = vector_norm(d, dim=1)
        longer = self.norm / vector_norm(b, dim=1).clamp_min_(self.tiny)
        apart = vector_norm((b * longer.unsqueeze(1)).sub_(self.a), dim=1) / self.norm
        return {"l2": l2, "rel_l2": l2 / self.norm, "cosine_distance": apart.square() / 2}


class _Logits(_Vectors):
    metrics = LOGIT_METRICS

    def __init__(self, a: Float[Tensor, "n V"]) -> None:
        super().__init__(a)
        self.p = a.softmax(-1)
        self.overflows = 0.7 * math.log(torch.finfo(a.dtype).max)  # d from which e^d, or its sum, comes near to it
        rows, tokens = (a == a.amax(-1, keepdim=True)).nonzero(as_tuple=True)  # many times faster than argmax
        self.top1 = torch.zeros_like(a[:, :1], dtype=torch.long)
        self.top1[rows, 0] = tokens

    def __call__(self, b: Float[Tensor, "n V"]) -> Deltas:
        d = b - self.a
        deltas = self.of_difference(b, d)
        deltas["top1_flips"] = (b.gather(-1, self.top1)[:, 0] < b.amax(-1)).to(b.dtype)
        d -= (self.p * d).sum(-1, keepdim=True)
        low, high = d.aminmax()
        small = low > -_SERIES_BELOW and high < _SERIES_BELOW
        excess = _series(d) if small else d.expm1().sub_(d)  # e^d - 1 - d, whose difference cancels where d is small
        kl = excess.mul_(self.p).sum(-1).log1p()
        if high > self.overflows:
            far = d.amax(-1) > self.overflows
            kl[far] = (self.a[far].log_softmax(-1) + d[far]).logsumexp(-1)
        deltas["kl_nats"] = kl
        return deltas


def _series(d: Tensor) -> Tensor:
    total = d * (1 / math.factorial(6))
    for n in (5, 4, 3):
        total.add_(1 / math.factorial(n)).mul_(d)
    return total.add_(1 / 2).mul_(d).mul_(d)
