"""What differs between a clean and a perturbed activation: a number per position and metric.

    l2               |b - a|, a: clean, b: perturbed vector at a site, heads side by side
    rel_l2           |b - a| / |a|
    cosine_distance  1 - cos(a, b), computed as |a/|a| - b/|b||^2 / 2, which does not cancel
    kl_nats          KL(softmax a || softmax b), logits only
    top1_flips       share of positions whose most likely token changes, logits only
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

VECTOR_METRICS = ("l2", "rel_l2", "cosine_distance")
LOGIT_METRICS = (*VECTOR_METRICS, "kl_nats", "top1_flips")
_BLOCK_ELEMENTS = 2**17
_SERIES_BELOW = 0.1

Deltas = dict[str, Float[Tensor, " T"]]


def vector_deltas(clean: Float[Tensor, "T *shape"], perturbed: Float[Tensor, "T *shape"]) -> Deltas:
    """l2, rel_l2 and cosine_distance between two vectors at each position."""
    return _by_block(_vector_deltas, clean.flatten(1), perturbed.flatten(1))


def logit_deltas(clean: Float[Tensor, "T V"], perturbed: Float[Tensor, "T V"]) -> Deltas:
    """The metrics of `vector_deltas`, and kl_nats and top1_flips.

    With d = b - a, less its mean under p = softmax a, KL is log(1 + sum p (e^d - 1 - d)): terms that are never negative
    and small where d is, so that it holds its digits down to the square of the logits' rounding, where -sum p log(q/p)
    would cancel.
    """
    return _by_block(_logit_deltas, clean, perturbed)


def _by_block(measure: Callable[[Tensor, Tensor], Deltas], clean: Tensor, perturbed: Tensor) -> Deltas:
    """In blocks of positions that stay in the processor's cache."""
    size = max(1, _BLOCK_ELEMENTS // clean.shape[1]) if clean.device.type == "cpu" else len(clean)
    precise = torch.promote_types(clean.dtype, torch.float32)
    blocks = [
        measure(a.to(precise), b.to(precise)) for a, b in zip(clean.split(size), perturbed.split(size), strict=True)
    ]
    return {metric: torch.cat([block[metric] for block in blocks]) for metric in blocks[0]}


def _vector_deltas(a: Tensor, b: Tensor) -> Deltas:
    return _of_difference(a, b, b - a)


def _of_difference(a: Tensor, b: Tensor, d: Tensor) -> Deltas:
    tiny = torch.finfo(a.dtype).tiny
    a_norm, b_norm = a.norm(dim=1).clamp_min_(tiny), b.norm(dim=1).clamp_min_(tiny)
    l2 = d.norm(dim=1)
    apart = (b * (a_norm / b_norm).unsqueeze(1)).sub_(a).norm(dim=1) / a_norm
    return {"l2": l2, "rel_l2": l2 / a_norm, "cosine_distance": apart.square() / 2}


def _logit_deltas(a: Tensor, b: Tensor) -> Deltas:
    d = b - a
    deltas = _of_difference(a, b, d)
    top1 = a.argmax(-1, keepdim=True)
    deltas["top1_flips"] = (b.gather(-1, top1)[:, 0] < b.amax(-1)).to(a.dtype)
    p = a.softmax(-1)
    d -= (p * d).sum(-1, keepdim=True)
    deltas["kl_nats"] = p.mul_(_exp_less_line(d)).sum(-1).log1p()
    return deltas


def _exp_less_line(d: Tensor) -> Tensor:
    """e^d - 1 - d; by its series where all of d is small, as there the difference would cancel."""
    low, high = d.aminmax()
    return _series(d) if -_SERIES_BELOW < low and high < _SERIES_BELOW else d.expm1().sub_(d)


def _series(d: Tensor) -> Tensor:
    total = d * (1 / math.factorial(8)) + 1 / math.factorial(7)
    for n in (6, 5, 4, 3, 2):
        total.mul_(d).add_(1 / math.factorial(n))
    return total.mul_(d).mul_(d)
