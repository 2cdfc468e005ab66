"""What each head attends to, and by which rotary pairs: the previous token, earlier copies, the start, how far back.

Scores are means over the queries of a window for which they have a meaning (t a query, s a key, both positions):

previous_token     attention to t - 1; queries that have one
induction          attention to all s + 1 < t whose s holds the query's token: what followed each earlier copy of it
                   (arXiv 2209.11895 scores the same on repeated random tokens); queries with such an s
duplicate_token    attention to all s < t that hold the query's token; queries with such an s
match              ... to those at distances from `distance` up to the next bin; queries with a copy there
attention_mass     attention to keys at distances from `distance` up to the next bin; all queries, so it sums to 1
entropy            of the attention, in nats; all queries
sink               attention to the first position, where BOS stands; all other queries

Bins of distance begin at 0, 1, 2, 4, 8, ... tokens, counted along the window, whatever position_ids say. With `masked`,
a document is all there is: its first position, the copies in it, the token before. A sliding window or a chunk hides
keys, which then count with no attention, so that layers are compared on the same queries.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rope_probe import rope
from rope_probe.models.architectures import heads_of
from rope_probe.models.attention import Scoring
from rope_probe.models.configs import attention_kinds
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.runs.tables import Column, Metric, declare
from rope_probe.tracing.patterns import Rows, blocks, by_key_head, chosen_layers, read_layers, row_blocks
from rope_probe.windows.packing import Window

TOTALS = ("previous_token", "induction", "duplicate_token", "entropy", "sink")
"""Metrics with one value a head; the others have one for each bin of distance."""
BY_DISTANCE = ("match", "attention_mass")
PAIR_METRIC, UNROTATED_METRIC = "pair_contribution", "unrotated_contribution"

HEADS = declare(
    "heads",
    "What each head attends to: shares of a query's attention, mean over the queries for which they have a meaning.",
    ("attention", "layer", "head", "distance", "queries", "trials"),
    {
        "previous_token": Metric("attention to the token before"),
        "induction": Metric("attention to what followed earlier copies of the query's token"),
        "duplicate_token": Metric("attention to earlier copies of the query's token"),
        "match": Metric("the same, of copies from `distance` up to the next bin"),
        "attention_mass": Metric("attention to keys from `distance` up to the next bin"),
        "entropy": Metric("entropy of the attention", "nats"),
        "sink": Metric("attention to the first position"),
        "retrieval_head": Metric("share of a needle's tokens that the head copies into the answer (arXiv 2404.15574)"),
    },
    own={
        "queries": Column("Int64", "over how many queries a score is a mean"),
        "trials": Column("Int64", "over how many trials"),
    },
)
HEAD_PAIRS = declare(
    "head_pairs",
    "By which rotary pairs an attended key outdoes the others: what each adds to its score, weighted by attention.",
    ("layer", "head", "pair", "wavelength", "distance"),
    {
        PAIR_METRIC: Metric("of a pair, in units of scores"),
        UNROTATED_METRIC: Metric("of the dimensions without rotation"),
    },
)
Sums = dict[str, Float[Tensor, "..."]]


def distance_edges(length: int) -> list[int]:
    """Where the bins of distance of a window begin: 0, 1, 2, 4, 8, ... below its length."""
    edges = [0]
    while (edge := max(1, 2 * edges[-1])) < length:
        edges.append(edge)
    return edges


def head_scores(
    model: HookedCausalLM,
    window: Window | str | Tensor,
    *,
    masked: bool = False,
    layers: int | Sequence[int] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """What every head of `layers` (None: all) attends to in `window`, by the scores that the module lists.

    `window` can be text too, or token ids: one document (see `HookedCausalLM.as_window`).
    Columns: `layer`, `head`, `metric`, `distance` (tokens, a bin's lower edge; null for scores that have none),
    `value`, and `queries`, over how many of them it is a mean; null where there are none. `masked` keeps attention
    inside documents. One forward pass by whatever kernel the model has, patterns in blocks of queries: memory is linear
    in the window. `progress` is called with the layers just done.
    Raises InputError for what `hidden` refuses, for layers that are out of range, and q or k that are not finite.
    """
    window = model.as_window(window)
    chosen = chosen_layers(model, layers)
    tokens = window.tokens[0].to(model.device)
    bounds = window.cu_seqlens.tolist() if masked else [0, len(window)]
    edges = distance_edges(len(window))
    queries = _count_queries(tokens, bounds, edges)
    sums_of: dict[int, Sums] = {}

    def read(layer: int, query: Tensor, key: Tensor, scoring: Scoring) -> None:
        sums_of[layer] = _sum_attention(query, key, scoring, tokens, edges)
        if progress is not None:
            progress(1)

    read_layers(model, window, read, masked=masked, layers=chosen)
    heads = heads_of(model.config).query
    kinds = attention_kinds(model.config)
    parts = []
    for layer in chosen:
        for metric, count in queries.items():
            value = sums_of[layer][metric].cpu() / count  # [H] or [H, bins]
            index = pd.MultiIndex.from_product(
                [[layer], range(heads), [metric], edges if metric in BY_DISTANCE else [None]],
                names=["layer", "head", "metric", "distance"],
            )
            part = index.to_frame(index=False)
            part["attention"] = kinds[layer]
            part["value"] = value.flatten().numpy()
            part["queries"] = count.expand_as(value).flatten().numpy()
            parts.append(part.astype({"distance": "Int64"}))
    return HEADS.frame(pd.concat(parts, ignore_index=True))


def _sum_attention(query: Tensor, key: Tensor, scoring: Scoring, tokens: Tensor, edges: list[int]) -> Sums:
    """Per metric the sum over queries, of every head [H], and bin [H, bins] where it has bins; float64."""
    heads = query.shape[1]
    sums: Sums = {metric: query.new_zeros(heads, dtype=torch.float64) for metric in TOTALS}
    sums |= {metric: query.new_zeros(heads, len(edges), dtype=torch.float64) for metric in BY_DISTANCE}
    bin_of = _bin_of_distance(len(tokens), edges).to(query.device)
    for block in blocks(query, key, scoring):
        rows, pattern = block.rows, block.pattern
        sums["entropy"] += torch.special.entr(pattern).sum((1, 2)).double()
        if rows.keys.start == rows.start:
            others = 1 if rows.queries.start == rows.start else 0  # all but the first position itself
            sums["sink"] += pattern[:, others:, 0].sum(1).double()
        profile = _by_distance(pattern).double()  # [H, k]
        sums["attention_mass"].index_add_(1, bin_of[: profile.shape[1]], profile)
        if profile.shape[1] > 1:
            sums["previous_token"] += profile[:, 1]
        of_query, of_key = after_copy(rows, tokens).nonzero(as_tuple=True)
        sums["induction"] += pattern[:, of_query, of_key].sum(1).double()
        of_query, of_key = _copies(rows, tokens).nonzero(as_tuple=True)
        to_copies = pattern[:, of_query, of_key].double()  # [H, copies]
        sums["duplicate_token"] += to_copies.sum(1)
        sums["match"].index_add_(1, bin_of[rows.distance[of_query, of_key]], to_copies)
    return sums


def _bin_of_distance(length: int, edges: list[int]) -> Int[Tensor, " T"]:
    return torch.bucketize(torch.arange(length), torch.tensor(edges), right=True) - 1


def _by_distance(pattern: Float[Tensor, "H q k"]) -> Float[Tensor, "H k"]:
    """Attention to keys 0, 1, ... k - 1 tokens back, summed over the queries; the last query stands at the last key."""
    heads, queries, keys = pattern.shape
    skewed = pattern.new_zeros(heads, queries, keys + queries - 1)
    row = skewed.shape[2]
    # Every row stands one further left than the one before it, so that a column holds keys of one distance.
    skewed.as_strided(pattern.shape, (queries * row, row - 1, 1), queries - 1).copy_(pattern)
    return skewed.sum(1)[:, :keys].flip(1)


def _copies(rows: Rows, tokens: Int[Tensor, " T"]) -> Bool[Tensor, "q k"]:
    """Where a key holds its query's token, before the query."""
    alike = tokens[rows.queries].unsqueeze(1) == tokens[rows.keys]
    return alike & (rows.distance > 0)


def after_copy(rows: Rows, tokens: Int[Tensor, " T"]) -> Bool[Tensor, "q k"]:
    """Where the token before a key is its query's, in the same document, and the key before the query."""
    keys = torch.arange(rows.keys.start, rows.keys.stop, device=tokens.device)
    alike = tokens[rows.queries].unsqueeze(1) == tokens[(keys - 1).clamp_min(0)]
    return alike & (keys > rows.start) & (rows.distance > 0)


def _count_queries(tokens: Tensor, bounds: list[int], edges: list[int]) -> dict[str, Int[Tensor, "..."]]:
    """Per metric, over how many queries of the window it is a mean; for each bin where it has bins."""
    after_first = torch.tensor(len(tokens) - (len(bounds) - 1))
    every = torch.tensor(len(tokens))
    induction, duplicate, match = torch.tensor(0), torch.tensor(0), torch.zeros(len(edges), dtype=torch.long)
    bin_of = _bin_of_distance(len(tokens), edges).to(tokens.device)
    for rows in row_blocks(bounds, len(edges), tokens.device):
        induction += after_copy(rows, tokens).any(1).sum().cpu()
        copies = _copies(rows, tokens)
        duplicate += copies.any(1).sum().cpu()
        of_query, of_key = copies.nonzero(as_tuple=True)
        in_bin = copies.new_zeros(len(copies), len(edges))
        in_bin[of_query, bin_of[rows.distance[of_query, of_key]]] = True
        match += in_bin.sum(0).cpu()
    return {
        "previous_token": after_first,
        "induction": induction,
        "duplicate_token": duplicate,
        "entropy": every,
        "sink": after_first,
        "match": match,
        "attention_mass": every.expand(len(edges)),
    }


def pair_contributions(
    model: HookedCausalLM,
    window: Window | str | Tensor,
    *,
    masked: bool = False,
    layers: int | Sequence[int] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """By which rotary pairs an attended key outdoes the others: what each pair adds to its score, by distance.

    A score is the sum over pairs p of scaling * q_p·k_p, before the soft cap where there is one. Of every query and
    head, a pair's contribution to each key is taken less its mean over all keys that the query sees; the value is the
    mean of that over queries and keys, weighted by attention. So it says how far a pair raises the attended key above
    any key, in the units of scores: e to that power is a ratio of attention.

    Columns: `layer`, `head`, `pair` (0 fastest), `wavelength` (tokens), `metric`, `distance` and `value`. Rows with
    `distance` take in the keys from there to the next bin alone (see `head_scores`); those where it is null all keys,
    and are the mean of the bins by their attention. A bin without attention is null. What dimensions without rotation
    contribute has the metric "unrotated_contribution" and no pair, so that all values of a head and distance add up to
    the score. Memory is linear in the window; window, options and errors as in `head_scores`.
    """
    window = model.as_window(window)
    chosen = chosen_layers(model, layers)
    edges = distance_edges(len(window))
    parts = []

    def read(layer: int, query: Tensor, key: Tensor, scoring: Scoring) -> None:
        sums, mass = _sum_contributions(query, key, scoring, edges)  # [H, bins, D], [H, bins]
        parts.append(_pair_frame(model, layer, edges, sums.cpu(), mass.cpu()))
        if progress is not None:
            progress(1)

    read_layers(model, window, read, masked=masked, layers=chosen)
    return HEAD_PAIRS.frame(pd.concat(parts, ignore_index=True))


def _sum_contributions(query: Tensor, key: Tensor, scoring: Scoring, edges: list[int]) -> tuple[Tensor, Tensor]:
    """Sums over queries and the keys of each bin, weighted by attention, of each dimension's contrast; and the weights.

    Keys enter as their sums under the pattern, so nothing is held for every query and key.
    """
    length, heads, width = query.shape
    sums = query.new_zeros(heads, len(edges), width, dtype=torch.float64)
    mass = query.new_zeros(heads, len(edges), dtype=torch.float64)
    key_heads = key.transpose(0, 1)  # [K, T, D]
    groups = heads // len(key_heads)
    for block in blocks(query, key, scoring):
        rows, pattern = block.rows, block.pattern
        keys = key_heads[:, rows.keys]  # [K, k, D]
        scaled = query[rows.queries].transpose(0, 1) * scoring.scaling  # [H, q, D]
        seen = rows.visible.to(keys.dtype)
        mean_key = ((seen / seen.sum(1, keepdim=True)) @ keys).repeat_interleave(groups, 0)  # [H, q, D]
        for number, (low, high) in enumerate(pairwise([*edges, 2 * length])):
            columns, in_bin = rows.band(low, high)
            if columns.start < columns.stop:
                attention = pattern[:, :, columns] * in_bin  # [H, q, n]
                of_query = attention.sum(-1, keepdim=True)  # [H, q, 1]
                contrast = by_key_head(attention, keys[:, columns]) - of_query * mean_key
                sums[:, number] += (scaled * contrast).sum(1).double()
                mass[:, number] += of_query.sum((1, 2)).double()
    return sums, mass


def _pair_frame(model: HookedCausalLM, layer: int, edges: list[int], sums: Tensor, mass: Tensor) -> pd.DataFrame:
    sums = torch.cat([sums.sum(1, keepdim=True), sums], 1)  # all keys, then bin by bin
    mass = torch.cat([mass.sum(1, keepdim=True), mass], 1)
    value = (sums / mass.unsqueeze(-1)).masked_fill((mass == 0).unsqueeze(-1), float("nan"))
    width = value.shape[-1]
    rotary = model.rotary[layer]
    dimensions = torch.empty(0, 2, dtype=torch.long) if rotary is None else rotary.pairs(width)
    of_pair = value[..., dimensions].sum(-1)  # [H, bins + 1, P]
    rest = np.setdiff1d(np.arange(width), dimensions.flatten().numpy())
    values = torch.cat([of_pair, value[..., torch.from_numpy(rest)].sum(-1, keepdim=True)], -1)
    if not len(rest):
        values = of_pair
    lengths = [] if rotary is None else rope.wavelengths(rotary.inv_freq).tolist()
    unrotated = 1 if len(rest) else 0
    what = pd.DataFrame(
        {
            "pair": pd.array([*range(len(lengths)), *[None] * unrotated], dtype="Int64"),
            "wavelength": [*lengths, *[np.nan] * unrotated],
            "metric": [PAIR_METRIC] * len(lengths) + [UNROTATED_METRIC] * unrotated,
        }
    )
    head, line, number = np.indices(values.shape).reshape(3, -1)
    frame = what.iloc[number].reset_index(drop=True)
    frame.insert(0, "layer", layer)
    frame.insert(1, "head", head)
    frame["distance"] = pd.array([None, *edges], dtype="Int64")[line]
    frame["value"] = values.flatten().numpy()
    return frame
