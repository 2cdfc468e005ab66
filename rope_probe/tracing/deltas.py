"""What differs between a clean and a perturbed activation: a number per position and metric.

l2               |b - a|, a: clean, b: perturbed vector at a site, heads side by side
rel_l2           |b - a| / |a|
cosine_distance  1 - cos(a, b), computed as |a/|a| - b/|b||^2 / 2, which does not cancel
kl_nats          KL(softmax a || softmax b), logits only
top1_flips       share of positions whose most likely token changes, logits only
"""

import math

import torch
from jaxtyping import Float, Int
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


def _by_block(kind: type["_Vectors"], clean: Tensor, perturbed: Tensor) -> Deltas:
    """In blocks of positions that stay in the processor's cache, in memory that is taken once."""
    precise = torch.promote_types(clean.dtype, torch.float32)
    shape = perturbed.shape[: perturbed.ndim - clean.ndim + 1]  # of the rows, and T
    clean, perturbed = clean.flatten(1), perturbed.reshape(-1, len(clean), clean[0].numel())
    size = max(1, _BLOCK_ELEMENTS // clean.shape[1]) if clean.device.type == "cpu" else len(clean)
    against = kind(clean[:size].to(precise))
    found: list[list[Deltas]] = [[] for _ in perturbed]
    for a, rows in zip(clean.split(size), perturbed.split(size, 1), strict=True):
        against.begin(a.to(precise))
        for blocks, b in zip(found, rows, strict=True):
            blocks.append(against.measure(b.to(precise)))
    return {
        metric: torch.cat([block[metric] for blocks in found for block in blocks]).view(shape)
        for metric in kind.metrics
    }


class _Vectors:
    """Deltas against a block of clean vectors. Blocks like `largest`, or shorter, are taken one after another.

    What is as large as a block goes into memory that all blocks share: taking it anew for each costs more than the
    arithmetic.
    """

    metrics: tuple[str, ...] = VECTOR_METRICS

    def __init__(self, largest: Float[Tensor, "n width"]) -> None:
        self.tiny = torch.finfo(largest.dtype).tiny
        self.shared_difference = torch.empty_like(largest)
        self.shared_scratch = torch.empty_like(largest)

    def begin(self, a: Float[Tensor, "n width"]) -> None:
        """Take these as the clean ones."""
        self.a = a
        self.norm = vector_norm(a, dim=1).clamp_min_(self.tiny)
        self.difference, self.scratch = self.shared_difference[: len(a)], self.shared_scratch[: len(a)]

    def measure(self, b: Float[Tensor, "n width"]) -> Deltas:
        """Compare the clean ones with these. Leaves b - a in `difference`."""
        l2 = vector_norm(torch.sub(b, self.a, out=self.difference), dim=1)
        longer = self.norm / vector_norm(b, dim=1).clamp_min_(self.tiny)
        as_long = torch.mul(b, longer.unsqueeze(1), out=self.scratch)
        apart = vector_norm(as_long.sub_(self.a), dim=1) / self.norm
        return {"l2": l2, "rel_l2": l2 / self.norm, "cosine_distance": apart.square() / 2}


class _Logits(_Vectors):
    metrics = LOGIT_METRICS

    def __init__(self, largest: Float[Tensor, "n V"]) -> None:
        super().__init__(largest)
        self.shared_p = torch.empty_like(largest)
        self.overflows = 0.7 * math.log(torch.finfo(largest.dtype).max)  # d from which e^d, or its sum, nears it

    def begin(self, a: Float[Tensor, "n V"]) -> None:
        super().begin(a)
        self.p = torch.softmax(a, -1, out=self.shared_p[: len(a)])
        self.top1 = _most_likely(a)

    def measure(self, b: Float[Tensor, "n V"]) -> Deltas:
        deltas = super().measure(b)
        d, scratch = self.difference, self.scratch
        deltas["top1_flips"] = (b.gather(-1, self.top1)[:, 0] < b.amax(-1)).to(b.dtype)
        d -= torch.mul(self.p, d, out=scratch).sum(-1, keepdim=True)
        low, high = d.aminmax()
        if low > -_SERIES_BELOW and high < _SERIES_BELOW:
            excess = _series(d, scratch)
        else:
            excess = torch.expm1(d, out=scratch).sub_(d)  # e^d - 1 - d, whose difference cancels where d is small
        kl = excess.mul_(self.p).sum(-1).log1p()
        if high > self.overflows:
            far = d.amax(-1) > self.overflows
            kl[far] = (self.a[far].log_softmax(-1) + d[far]).logsumexp(-1)
        deltas["kl_nats"] = kl
        return deltas


def _most_likely(logits: Float[Tensor, "n V"]) -> Int[Tensor, "n 1"]:
    """The most likely token of each row; on a processor by NumPy, whose argmax is ten times as fast as torch's."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1, keepdims=True))
    return logits.argmax(-1, keepdim=True)


def _series(d: Tensor, out: Tensor) -> Tensor:
    """e^d - 1 - d by its first six terms, into `out`."""
    torch.mul(d, 1 / math.factorial(6), out=out)
    for n in (5, 4, 3):
        out.add_(1 / math.factorial(n)).mul_(d)
    return out.add_(1 / 2).mul_(d).mul_(d)
