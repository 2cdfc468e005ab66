"""Windows: what one forward pass reads. Repeated tokens and documents, packed documents, position schemes, corpora.

- A window carries its documents as `cu_seqlens` and its positions as `position_ids`, and keeps the two apart.
- Position schemes: *continuous* counts through the window; *reset* starts every document at 0; *skipped* spreads a
  document over a longer window in three contiguous segments (LongReD, arXiv 2502.07365, after CREAM, 2406.07138).
- A corpus is a pure function of (seed, index): batch i does not depend on what was drawn before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from rope_probe.errors import InputError

Positions = Literal["continuous", "reset", "skipped"]


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

    `positions="skipped"` spreads each document over 0..target_window-1 (see `skipped_positions`), seeded by `seed`.
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
    Source: LongReD, arXiv 2502.07365, uniform variant. Raises InputError where the document is longer than its target.
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
    if positions == "continuous":
        position_ids = torch.arange(int(sizes.sum()))
    elif positions == "reset":
        position_ids = torch.cat([torch.arange(size) for size in sizes.tolist()])
    elif positions == "skipped":
        if target_window is None:
            raise InputError("skipped positions need target_window, the length that each document is spread over")
        position_ids = torch.cat(
            [skipped_positions(size, target_window, seed=seed + i) for i, size in enumerate(sizes.tolist())]
        )
    else:
        raise InputError(f"positions {positions!r} is unknown; known are continuous, reset, skipped")
    return Window(torch.cat(list(documents)).unsqueeze(0), cu_seqlens, position_ids.unsqueeze(0))


# Corpora --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyValueStream:
    """Documents that bind keys to values: "key value key value ...", a key with one value per document.

    A document draws m distinct keys, m log-uniform in `distinct`, gives each a random value, and emits
    `document_length / 2` pairs by sampling its keys with replacement. Token ids: 4.. are keys, the next are values.
    With `disjoint`, documents packed into one window share no key; otherwise keys collide by accident.
    """

    document_length: int
    distinct: tuple[int, int]
    keys: int = 256
    values: int = 256
    disjoint: bool = False

    FIRST_KEY = 4

    def __post_init__(self) -> None:
        low, high = self.distinct
        if self.document_length < 2 or self.document_length % 2:
            raise InputError(f"document_length must be even and 2 or more, but it is {self.document_length}")
        if not 1 <= low <= high <= self.keys:
            raise InputError(f"distinct must be a range inside 1..{self.keys} (the keys), but it is {low}..{high}")

    @property
    def first_value(self) -> int:
        """Token id of the first value."""
        return self.FIRST_KEY + self.keys

    @property
    def vocab_size(self) -> int:
        """Number of token ids in use."""
        return self.first_value + self.values

    def documents(self, count: int, *, seed: int, index: int = 0) -> Int[Tensor, "count n"]:
        """`count` documents, a pure function of (seed, index)."""
        rng = np.random.default_rng([seed, index])
        distinct = self._distinct(rng, count)
        return self._documents(rng, distinct, rng.random((count, self.keys)).argsort(1))

    def _distinct(self, rng: np.random.Generator, count: int) -> np.ndarray:
        low, high = self.distinct
        return np.rint(low * (high / low) ** rng.random((count, 1)))

    def _documents(self, rng: np.random.Generator, distinct: np.ndarray, keys: np.ndarray) -> Tensor:
        """One document for each row of `keys`, over its first `distinct` ones."""
        count = len(keys)
        values = rng.integers(0, self.values, keys.shape)
        pick = (rng.random((count, self.document_length // 2)) * distinct).astype(np.int64)
        pairs = np.take_along_axis(np.stack([keys + self.FIRST_KEY, values + self.first_value], -1), pick[..., None], 1)
        return torch.from_numpy(pairs.reshape(count, self.document_length))

    def windows(self, count: int, window: int, *, seed: int, index: int = 0) -> Int[Tensor, "count window"]:
        """`count` windows of whole packed documents, a pure function of (seed, index).

        Raises InputError unless documents fill the window exactly, and, where their keys are to be disjoint, unless
        there are keys enough for that.
        """
        if window < self.document_length or window % self.document_length:
            raise InputError(
                f"a window of {window} tokens does not hold whole documents of {self.document_length}; "
                f"use a multiple of {self.document_length}"
            )
        each = window // self.document_length
        if not self.disjoint:
            return self.documents(count * each, seed=seed, index=index).reshape(count, window)
        share = self.keys // each
        if share < self.distinct[1]:
            raise InputError(
                f"{each} documents of up to {self.distinct[1]} keys cannot be disjoint with {self.keys} keys in all; "
                f"use at most {share} keys a document"
            )
        rng = np.random.default_rng([seed, index])
        distinct = self._distinct(rng, count * each)
        dealt = rng.random((count, self.keys)).argsort(1)[:, : each * share].reshape(count * each, share)
        return self._documents(rng, distinct, dealt).reshape(count, window)
