"""What differs between a clean and a perturbed activation: a number per position and metric.

    l2               |b - a|, a: clean, b: perturbed vector at a site, heads side by side
    rel_l2           |b - a| / |a|
    cosine_distance  1 - cos(a, b), computed as |a/|a| - b/|b||^2 / 2, which does not cancel
    kl_nats          KL(softmax a || softmax b), logits only
    top1_flips       share of positions whose most likely token changes, logits only
"""

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
    tiny = torch.finfo(a.dtype).tiny
    a_norm, b_norm = a.norm(dim=1).clamp_min(tiny), b.norm(dim=1).clamp_min(tiny)
    l2 = (b - a).norm(dim=1)
    unit_delta = (a / a_norm.unsqueeze(1)).sub_(b / b_norm.unsqueeze(1))
    return {"l2": l2, "rel_l2": l2 / a_norm, "cosine_distance": unit_delta.square().sum(1) / 2}


def _logit_deltas(a: Tensor, b: Tensor) -> Deltas:
    p = a.softmax(-1)
    d = b - a
    d -= (p * d).sum(-1, keepdim=True)
    return {
        **_vector_deltas(a, b),
        "kl_nats": (p * _exp_less_line(d)).sum(-1).log1p(),
        "top1_flips": (a.argmax(-1) != b.argmax(-1)).to(a.dtype),
    }


def _exp_less_line(d: Tensor) -> Tensor:
    """e^d - 1 - d."""
    series = d / 8 + 1
    for n in (7, 6, 5, 4, 3):
        series = series.mul_(d).div_(n).add_(1)
    series = series.mul_(d).mul_(d).div_(2)
    return torch.where(d.abs() < _SERIES_BELOW, series, d.expm1() - d)
