"""Samplers: where the tokens of a short sample stand in a longer window, by the published schemes.

A sample is one window of n tokens, whatever documents are in it, and W is the target window. Letters as in the sources:
f = W // n; e tokens at each end; m = n - 2e in the middle; `end` is the position of the middle's last token.

    longred_uniform   three pieces; end uniform                               LongReD, arXiv 2502.07365
    longred_cream     three pieces; end by a normal CDF around 1 + f          LongReD, arXiv 2502.07365
    cream             the same with N(9, 3) for any f                         CREAM, arXiv 2406.07138
    pose              two pieces; the second shifted by U{0 ... W - n}        PoSE, arXiv 2309.10400
    rope_perturbed    i before a random s, i + y from there on; needs no W    arXiv 2604.14339

Three pieces are [0, e), [end - m + 1, end] and [W - e, W). A coin says whether e is n // 3 or 4f: one for all windows
of a batch, as in LongReD, or one for each window. Where the sources leave a choice open, what is done here is said at
the function. The samplers give positions alone: CREAM's own code also takes the tokens at those positions from a long
document, where these leave the sample's tokens as they are.

"skipped" of `packing` is none of these. It spreads every document rather than every window, lets the middle begin right
after the head, takes 4W // n for 4 (W // n), and flips its coin for every document.
"""

from collections.abc import Callable
from functools import cache
from statistics import NormalDist
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from rope_probe.errors import InputError

Scheme = Literal["longred_uniform", "longred_cream", "cream", "pose", "rope_perturbed"]
Coin = Literal["batch", "window"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
POINTS = 1000
"""Points of the grid on which CREAM's distribution is tabulated."""


def sample_positions(
    scheme: Scheme,
    windows: int,
    length: int,
    target_window: int | None = None,
    *,
    seed: int = 0,
    coin: Coin = "batch",
) -> Int[Tensor, "B n"]:
    """Positions of the tokens of `windows` samples of `length` tokens, a pure function of `seed`.

    Every sample has draws of its own, but for the coin of three pieces, which is one for all of them where `coin` is
    "batch". Raises InputError as `require_room`.
    """
    require_room(scheme, length, target_window)
    rng = np.random.default_rng([seed, windows, length])
    if scheme == "rope_perturbed":
        return torch.stack([_perturbed(rng, length) for _ in range(windows)])
    assert target_window is not None
    if scheme == "pose":
        return torch.stack([_two_pieces(rng, length, target_window) for _ in range(windows)])
    edges = edge_lengths(length, target_window)
    flips = rng.integers(2, size=windows)
    if coin == "batch":
        flips[:] = flips[:1]
    ends_of = _ENDS[scheme]
    rows = []
    for flip in flips:
        edge = edges[int(flip)]
        ends = ends_of(rng, length, target_window, edge)
        end = int(rng.integers(ends.start, ends.stop))
        rows.append(three_pieces(length, target_window, edge, end))
    return torch.stack(rows)


def require_room(scheme: Scheme, length: int, target_window: int | None = None) -> None:
    """Raises InputError where a sample of `length` tokens cannot be spread over `target_window` as a scheme has it.

    Three pieces need a target of f = 2, 3, ... whole samples, since else the middle can run into the tail, and more
    than 8f tokens, since else the two ends of 4f tokens leave no middle. The published code asks for neither, and has
    lengths for which both hold.
    """
    if scheme == "rope_perturbed":
        return
    if target_window is None:
        raise InputError(f"{scheme} positions need target_window, the length that each window is spread over")
    if scheme == "pose":
        if length < 2 or target_window < length:
            raise InputError(
                f"pose positions need a window of 2 tokens or more and a target_window of at least that, but they are "
                f"{length} and {target_window}"
            )
        return
    if target_window % length or target_window < 2 * length:
        raise InputError(
            f"{scheme} positions need a target_window of 2, 3 or more whole windows of {length} tokens, but it is "
            f"{target_window}"
        )
    factor = target_window // length
    if length <= 8 * factor:
        raise InputError(
            f"{scheme} positions keep {4 * factor} tokens at each end of half the windows, which leaves no middle in "
            f"{length} tokens; use a window of more than {8 * factor} tokens for a target of {factor} of them, or "
            "positions skipped, which keeps fewer"
        )


def reach(scheme: Scheme, length: int, target_window: int | None) -> int:
    """How many positions a scheme runs over."""
    return 2 * length if scheme == "rope_perturbed" else max(length, target_window or 0)


def edge_lengths(length: int, target_window: int) -> tuple[int, int]:
    """The two lengths of head and tail, of which a coin takes one: a third of the sample, or 4 tokens times f."""
    return length // 3, 4 * (target_window // length)


def three_pieces(length: int, target_window: int, edge: int, end: int) -> Int[Tensor, " n"]:
    """Head [0, e), middle [end - m + 1, end] and tail [W - e, W)."""
    middle = length - 2 * edge
    return torch.cat(
        [
            torch.arange(edge),
            torch.arange(end - middle + 1, end + 1),
            torch.arange(target_window - edge, target_window),
        ]
    )


def uniform_ends(length: int, target_window: int, edge: int) -> range:
    """Where the middle can end in LongReD's uniform form, each place as likely: n - e ... W - e - 1.

    The middle thus begins at e + 1 or later: one position at least is skipped after the head.
    """
    return range(length - edge, target_window - edge)


def cream_ends(length: int, edge: int, halves: int) -> range:
    """Where the middle can end for a stretch of a = `halves` / 2: int(e + (m - 1) a) ... int(a n - e - 1).

    In whole numbers, so that an odd number of halves is as good as an even one.
    """
    middle = length - 2 * edge
    return range(edge + (middle - 1) * halves // 2, length * halves // 2 - edge)


def cream_halves(u: float, factor: int, mean: float, deviation: float) -> int:
    """Twice the stretch, r = int of the inverse CDF at `u`, for u uniform in [0, 1).

    The CDF is that of a normal distribution, tabulated on 1,000 points of [2, 2f] and not renormalised: what the
    distribution has below 2 goes to 2, and what it has above 2f to 2f.
    """
    points, heights = _table(factor, mean, deviation)
    return int(np.interp(u, heights, points))


@cache
def _table(factor: int, mean: float, deviation: float) -> tuple[np.ndarray, np.ndarray]:
    points = np.linspace(2, 2 * factor, POINTS)
    normal = NormalDist(mean, deviation)
    return points, np.array([normal.cdf(point) for point in points])


def _uniform(rng: np.random.Generator, length: int, target_window: int, edge: int) -> range:
    return uniform_ends(length, target_window, edge)


def _longred_cream(rng: np.random.Generator, length: int, target_window: int, edge: int) -> range:
    factor = target_window // length
    return cream_ends(length, edge, cream_halves(rng.random(), factor, 1 + factor, 5))


def _cream(rng: np.random.Generator, length: int, target_window: int, edge: int) -> range:
    return cream_ends(length, edge, cream_halves(rng.random(), target_window // length, 9, 3))


_ENDS: dict[str, Callable[[np.random.Generator, int, int, int], range]] = {
    "longred_uniform": _uniform,
    "longred_cream": _longred_cream,
    "cream": _cream,
}


def _two_pieces(rng: np.random.Generator, length: int, target_window: int) -> Int[Tensor, " n"]:
    """The place of the split is uniform in 1 ... n - 1 here, which leaves neither piece empty."""
    split = int(rng.integers(1, length))
    shift = int(rng.integers(target_window - length + 1))
    return shifted_from(length, split, shift)


def _perturbed(rng: np.random.Generator, length: int) -> Int[Tensor, " n"]:
    first = int(rng.integers(length))
    shift = int(rng.integers(1, length + 1))
    return shifted_from(length, first, shift)


def shifted_from(length: int, first: int, shift: int) -> Int[Tensor, " n"]:
    """i before `first`, i + `shift` from there on."""
    positions = torch.arange(length)
    positions[first:] += shift
    return positions
