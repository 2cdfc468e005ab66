"""Attention patterns block by block of queries, from rotated q and k: what a head attends to, in linear memory.

- A block is some queries of one document, and the keys that they can see: never the pattern of a whole window.
- Scaling, soft cap, sliding window, chunks and documents are the layer's own (`attention.Scoring`), so a block is what
  `attn="eager"` would show at hook_pattern, whatever kernel the model runs by. Hooks of the user's own on q and k hold;
  those on scores and patterns, which only eager has, do not.
- Where a layer has attention sinks, scores of no key, a query's attention is what they leave: it sums to less than 1.
- Scores and patterns are float32, or float64 where q and k are.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rope_probe.errors import InputError
from rope_probe.models.attention import Scoring, chunk_bounds
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.windows.packing import Window

BLOCK_ELEMENTS = 2**20
"""Scores that a block holds at most, those of one query at least."""

ReadLayer = Callable[[int, Float[Tensor, "T H D"], Float[Tensor, "T K D"], Scoring], None]


@dataclass(frozen=True)
class Rows:
    """Which queries and keys of a window a block holds: q queries and k keys, of the document that begins at `start`.

    The last query is the last key; a query sees at most `sliding_window` keys.
    """

    start: int
    queries: slice
    keys: slice
    device: torch.device
    sliding_window: int | None = None

    @cached_property
    def distance(self) -> Int[Tensor, "q k"]:
        """Tokens from a key on to a query."""
        queries = torch.arange(self.queries.start, self.queries.stop, device=self.device)
        keys = torch.arange(self.keys.start, self.keys.stop, device=self.device)
        return queries.unsqueeze(1) - keys

    @cached_property
    def visible(self) -> Bool[Tensor, "q k"]:
        """Where a query may look."""
        seen = self.distance >= 0
        return seen if self.sliding_window is None else seen & (self.distance < self.sliding_window)

    def band(self, low: int, high: int) -> tuple[slice, Bool[Tensor, "q n"]]:
        """The keys at distances low..high-1 of any query, as a slice of the block's keys, and where in it they are so.

        The slice is empty where there are none.
        """
        first = max(self.keys.start, self.queries.start - high + 1)
        end = max(first, min(self.keys.stop, self.queries.stop - low))
        columns = slice(first - self.keys.start, end - self.keys.start)
        distance = self.distance[:, columns]
        return columns, (distance >= low) & (distance < high)


@dataclass(frozen=True)
class Block:
    """The scores of some queries in all heads, -inf where a query may not look."""

    rows: Rows
    scores: Float[Tensor, "H q k"]
    sinks: Float[Tensor, " H"] | None = None

    @cached_property
    def pattern(self) -> Float[Tensor, "H q k"]:
        """Attention: each query's sums to 1, less what sinks take."""
        return self._with_sinks().softmax(-1)[..., : self.scores.shape[-1]]

    @cached_property
    def log_weights(self) -> Float[Tensor, "H q n"]:
        """Log of the attention, -inf where a query may not look; where there are sinks, theirs is one more column."""
        return self._with_sinks().log_softmax(-1)

    def _with_sinks(self) -> Float[Tensor, "H q n"]:
        if self.sinks is None:
            return self.scores
        sinks = self.sinks.to(self.scores).view(-1, 1, 1).expand(*self.scores.shape[:2], 1)
        return torch.cat([self.scores, sinks], -1)


def row_blocks(
    documents: Sequence[int],
    heads: int,
    device: torch.device,
    *,
    sliding_window: int | None = None,
    chunk: int | None = None,
    first: int = 0,
) -> Iterator[Rows]:
    """The queries from `first` on in blocks, for documents with these bounds (cu_seqlens), of one chunk each."""
    for document, end_of_document in pairwise(documents):
        for start, end in pairwise(chunk_bounds(document, end_of_document, chunk)):
            size = max(1, BLOCK_ELEMENTS // (heads * (end - start)))
            if sliding_window is not None:  # n queries see fewer than n + sliding_window keys between them
                size = max(size, (math.isqrt(sliding_window**2 + 4 * BLOCK_ELEMENTS // heads) - sliding_window) // 2)
            for begin in range(max(start, first), end, size):
                stop = min(begin + size, end)
                seen_from = start if sliding_window is None else max(start, begin - sliding_window + 1)
                yield Rows(document, slice(begin, stop), slice(seen_from, stop), device, sliding_window)


def blocks(
    query: Float[Tensor, "T H D"], key: Float[Tensor, "T K D"], scoring: Scoring, *, first: int = 0
) -> Iterator[Block]:
    """The attention of one layer, block by block of the queries from `first` on."""
    length, heads, _ = query.shape
    documents = (0, length) if scoring.bounds is None else scoring.bounds
    query, key = query.transpose(0, 1) * scoring.scaling, key.transpose(0, 1)  # [H, T, D], [K, T, D]
    limits = {"sliding_window": scoring.sliding_window, "chunk": scoring.chunk}
    for rows in row_blocks(documents, heads, query.device, **limits, first=first):
        scores = by_key_head(query[:, rows.queries], key[:, rows.keys].transpose(1, 2))
        if scoring.softcap is not None:
            scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
        hidden = scores.new_zeros(rows.visible.shape).masked_fill_(~rows.visible, float("-inf"))
        yield Block(rows, scores.add_(hidden), scoring.sinks)  # many times faster than a masked fill of all heads


def by_key_head(of_query: Float[Tensor, "H q m"], of_key: Float[Tensor, "K m n"]) -> Float[Tensor, "H q n"]:
    """Matrix products of what each query head has with what its key-value head has."""
    groups = len(of_query) // len(of_key)
    product = rearrange(of_query, "(k g) q m -> k (g q) m", g=groups) @ of_key
    return rearrange(product, "k (g q) n -> (k g) q n", g=groups)


@torch.no_grad()
def read_layers(
    model: HookedCausalLM,
    tokens: Window | Int[Tensor, "1 T"],
    read: ReadLayer,
    *,
    masked: bool = False,
    layers: Sequence[int],
) -> None:
    """One forward pass; `read` gets each of `layers`, its rotated q and k and how it scores, and no layer outlives it.

    Raises InputError for q or k that are not finite.
    """
    queries: dict[int, Tensor] = {}

    def keep(q: Tensor, hook: Any) -> None:
        queries[hook.layer()] = q

    def pass_on(k: Tensor, hook: Any) -> None:
        layer = hook.layer()
        states = queries.pop(layer)[0], k[0]
        for states_of, name in zip(states, ("hook_rot_q", "hook_rot_k"), strict=True):
            model.require_finite(states_of, f"blocks.{layer}.attn.{name}")
        query, key = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in states)
        read(layer, query, key, model.scoring(layer))

    hooks = [
        hook
        for layer in layers
        for hook in ((f"blocks.{layer}.attn.hook_rot_q", keep), (f"blocks.{layer}.attn.hook_rot_k", pass_on))
    ]
    with model.measuring(), model.hooks(fwd_hooks=hooks):
        model.hidden(tokens, masked=masked)


def chosen_layers(model: HookedCausalLM, layers: int | Sequence[int] | None) -> list[int]:
    """The layers that are named, each once; for None all that have attention.

    Raises InputError for one that is not there, or has no attention.
    """
    count, attending = len(model.blocks), model.attending_layers
    chosen = attending if layers is None else [layers] if isinstance(layers, int) else list(layers)
    for layer in chosen:
        if not 0 <= layer < count:
            raise InputError(f"layer {layer} is out of range; this model's layers are 0..{count - 1}")
        if layer not in attending:
            others = ", ".join(map(str, attending))
            raise InputError(f"layer {layer} of this model has no attention; layers {others} have")
    return list(dict.fromkeys(chosen))
