"""Windows: what one forward pass reads. Repeated tokens and documents, packed documents, position schemes.

- A window carries its documents as `cu_seqlens` and its positions as `position_ids`, and keeps the two apart.
- Position schemes: *continuous* counts through the window; *reset* starts every document at 0; *skipped* spreads a
  document over a longer window in three contiguous segments. The published schemes, of which *skipped* is none, are in
  `samplers`; they place whole windows.
- A `Batch` is several windows of one length, read together: a training step.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rope_probe.errors import InputError
from rope_probe.windows import samplers
from rope_probe.windows.samplers import Coin

Positions = Literal[
    "continuous", "reset", "skipped", "longred_uniform", "longred_cream", "cream", "pose", "rope_perturbed"
]


@dataclass(frozen=True)
class Window:
    """T tokens in N documents. `cu_seqlens[n]` is where document n begins; the last of its N + 1 entries is T.

    Raises InputError where the three do not fit each other.
    """

    tokens: Int[Tensor, "1 T"]
    cu_seqlens: Int[Tensor, " bounds"]
    position_ids: Int[Tensor, "1 T"]

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or len(self.tokens) != 1 or self.position_ids.shape != self.tokens.shape:
            raise InputError(
                f"tokens and position_ids must both be [1, T], but they are {list(self.tokens.shape)} and "
                f"{list(self.position_ids.shape)}"
            )
        bounds = self.cu_seqlens
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != len(self) or (bounds.diff() <= 0).any():
            raise InputError(f"cu_seqlens must rise from 0 to {len(self)}, the window, but it is {bounds.tolist()}")

    def __len__(self) -> int:
        return self.tokens.shape[1]

    @cached_property
    def document_of(self) -> Int[Tensor, " T"]:
        """Index of the document that each position belongs to."""
        sizes = self.cu_seqlens.diff().long()
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.cu_seqlens) - 1


@dataclass(frozen=True)
class Batch:
    """B windows of T tokens each. `cu_seqlens` bounds the documents of all windows laid end to end, 0 to B x T.

    A window's end is a document's end.
    Raises InputError where the three do not fit each other.
    """

    tokens: Int[Tensor, "B T"]
    cu_seqlens: Int[Tensor, " bounds"]
    position_ids: Int[Tensor, "B T"]

    @classmethod
    def continuous(cls, tokens: Int[Tensor, "B T"], cu_seqlens: Int[Tensor, " bounds"]) -> "Batch":
        """Windows whose positions count through each of them."""
        return cls(tokens, cu_seqlens, torch.arange(tokens.shape[1]).expand_as(tokens))

    def __post_init__(self) -> None:
        end_to_end = self.end_to_end
        edges = torch.arange(0, len(end_to_end) + 1, self.tokens.shape[1])
        if not torch.isin(edges, end_to_end.cu_seqlens).all():
            raise InputError("every window of a batch must end with a document; cut the one that crosses its end")

    @property
    def end_to_end(self) -> Window:
        """The windows as a single one. Masked, they do not meet."""
        return Window(self.tokens.reshape(1, -1), self.cu_seqlens, self.position_ids.reshape(1, -1))

    @property
    def first_of_document(self) -> Bool[Tensor, "B T"]:
        """True where a document begins."""
        first = torch.zeros(self.tokens.numel(), dtype=torch.bool)
        first[self.cu_seqlens[:-1].long()] = True
        return first.view_as(self.tokens)

    def rows(self, start: int, end: int) -> "Batch":
        """The windows `start` to `end`."""
        length = self.tokens.shape[1]
        inside = (self.cu_seqlens >= start * length) & (self.cu_seqlens <= end * length)
        bounds = self.cu_seqlens[inside] - start * length
        return Batch(self.tokens[start:end], bounds, self.position_ids[start:end])

    def placed(
        self, positions: Positions, *, target_window: int | None = None, seed: int = 0, coin: Coin = "batch"
    ) -> "Batch":
        """The same documents at the positions of a scheme; see `pack`, and `samplers` for `coin`."""
        if positions == "continuous":
            return Batch.continuous(self.tokens, self.cu_seqlens)
        if positions in samplers.SCHEMES:
            windows, length = self.tokens.shape
            placed = samplers.sample_positions(positions, windows, length, target_window, seed=seed, coin=coin)
        else:
            placed = _positions(self.cu_seqlens.diff().tolist(), positions, target_window, seed)
        return dataclasses.replace(self, position_ids=placed.view_as(self.tokens))


def repeated_window(document: int | Sequence[int] | Int[Tensor, " n"], copies: int) -> Window:
    """One token, or one document of n tokens, `copies` times over: content is constant, position alone varies.

    Positions are continuous. Raises InputError for an empty document or fewer than one copy.
    """
    if copies < 1:
        raise InputError(f"copies must be 1 or more, but it is {copies}")
    tokens = _as_tokens(document)
    return _window([tokens] * copies, "continuous")


def pack(
    documents: Sequence[Sequence[int] | Int[Tensor, " _"]],
    window: int,
    *,
    positions: Positions = "continuous",
    target_window: int | None = None,
    seed: int = 0,
) -> Window:
    """Pack `documents` in order into a window of `window` tokens; the document that crosses its end is cut there.

    `positions="skipped"` spreads each document over 0..target_window-1 (see `skipped_positions`), seeded by `seed`; the
    schemes of `samplers` spread the window as a whole.
    Raises InputError for a window longer than the tokens at hand, an empty document, or a missing target_window.
    """
    if window < 1:
        raise InputError(f"a window needs 1 token or more, but {window} was asked for")
    kept, room = [], window
    for document in documents:
        if room == 0:
            break
        kept.append(_as_tokens(document)[:room])
        room -= len(kept[-1])
    if room > 0:
        raise InputError(f"a window of {window} tokens is longer than the {window - room} tokens of its documents")
    return _window(kept, positions, target_window, seed)


def skipped_positions(length: int, target_window: int, *, seed: int = 0) -> Int[Tensor, " n"]:
    """Positions of a document of `length` tokens spread over 0..target_window-1, both ends kept.

    Head and tail segments stand at the two ends of the target window, the contiguous middle one is placed uniformly
    between them. Head and tail take a third of the document each, or 4 * target_window / length tokens, by a coin flip.
    After LongReD (arXiv 2502.07365), but not its scheme: that is "longred_uniform" of `samplers`, where the differences
    stand. Raises InputError where the document is longer than its target.
    """
    if target_window < length:
        raise InputError(f"target_window must be at least the document's {length} tokens, but it is {target_window}")
    rng = np.random.default_rng([seed, length, target_window])
    third = length // 3
    edge = third if rng.random() < 0.5 else min(third, 4 * target_window // length)
    middle = length - 2 * edge
    start = int(rng.integers(edge, target_window - edge - middle + 1))
    return torch.cat(
        [torch.arange(edge), torch.arange(start, start + middle), torch.arange(target_window - edge, target_window)]
    )


def _as_tokens(document: int | Sequence[int] | Tensor) -> Tensor:
    try:
        tokens = torch.as_tensor([document] if isinstance(document, int) else document, dtype=torch.long)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise InputError(f"a document is a row of token ids, whole numbers below 2^63: {error}") from error
    if tokens.ndim != 1 or len(tokens) == 0:
        raise InputError(f"a document is a non-empty row of token ids, but its shape is {tuple(tokens.shape)}")
    return tokens


def _window(
    documents: Sequence[Tensor], positions: Positions, target_window: int | None = None, seed: int = 0
) -> Window:
    sizes = torch.tensor([len(document) for document in documents])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]).to(torch.int32)
    if positions in samplers.SCHEMES:
        position_ids = samplers.sample_positions(positions, 1, int(sizes.sum()), target_window, seed=seed)[0]
    else:
        position_ids = _positions(sizes.tolist(), positions, target_window, seed)
    return Window(torch.cat(list(documents)).unsqueeze(0), cu_seqlens, position_ids.unsqueeze(0))


def _positions(sizes: Sequence[int], positions: Positions, target_window: int | None, seed: int) -> Tensor:
    if positions == "continuous":
        return torch.arange(sum(sizes))
    if positions == "reset":
        return torch.cat([torch.arange(size) for size in sizes])
    if positions == "skipped":
        if target_window is None:
            raise InputError("skipped positions need target_window, the length that each document is spread over")
        return torch.cat([skipped_positions(size, target_window, seed=seed + i) for i, size in enumerate(sizes)])
    raise InputError(f"positions {positions!r} is unknown; known are {', '.join(get_args(Positions))}")
