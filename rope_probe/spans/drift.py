"""What extension does to a model on the same windows: drift of hidden states and attention, and what it costs.

LongReD (arXiv 2502.07365) explains the loss of short-text skill after extension by two drifts from the original model,
and restores those layers whose attention drifted most:

cosine_distance      1 - cosine of a hidden state of the original and of the extended model
attention_kl_nats    KL(A_original || A_extended) of a query's attention (its Eq. 6), by head
kl_nats              KL(original || extended) of next-token distributions
original_loss_nats   loss of the next token; the first token of a document is none that could be foreseen
extended_loss_nats

All are means over the positions of all windows.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from rope_probe.errors import InputError
from rope_probe.models.attention import Scoring
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.runs.tables import Column, Metric, declare
from rope_probe.spans.stored import require_alike
from rope_probe.tracing.cone import LOGITS, logit_block
from rope_probe.tracing.deltas import logit_deltas, vector_deltas
from rope_probe.tracing.patterns import Block, blocks, chosen_layers, read_layers
from rope_probe.windows.packing import Batch, Window

COSINE_DISTANCE, ATTENTION_KL = "cosine_distance", "attention_kl_nats"
ORIGINAL_LOSS, EXTENDED_LOSS, LOGIT_KL = "original_loss_nats", "extended_loss_nats", "kl_nats"
FINAL_NORM = "ln_final.hook_out"

DRIFT = declare(
    "drift",
    "How far an extended model has drifted from the original on the same windows: hidden states, attention, next "
    "tokens. Values are means over the positions of all windows.",
    ("seq_len", "masked", "layer", "site", "head", "positions"),
    {
        COSINE_DISTANCE: Metric("1 - cosine of a hidden state of the original and of the extended model"),
        ATTENTION_KL: Metric(
            "KL(original || extended) of a query's attention (LongReD, arXiv 2502.07365, Eq. 6)", "nats"
        ),
        LOGIT_KL: Metric("KL(original || extended) of next-token distributions", "nats"),
        ORIGINAL_LOSS: Metric("loss of the next token, of the original model", "nats"),
        EXTENDED_LOSS: Metric("the same of the extended model", "nats"),
    },
    own={"positions": Column("Int64", "over how many positions a value is a mean")},
)


@dataclass(frozen=True)
class _Attention:
    """What the pattern of a layer is made of: rotated queries and keys, and how it scores."""

    query: Float[Tensor, "T H D"]
    key: Float[Tensor, "T K D"]
    scoring: Scoring


@dataclass(frozen=True)
class _States:
    """What one model made of a window: residual streams, the final state among them, and attention by layer."""

    hidden: dict[str, Float[Tensor, "T M"]]
    attention: dict[int, _Attention]


class _Means:
    """Sums over positions by site and metric, a number or one for each head, and over how many positions they are."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str], Float[Tensor, "*H"]] = {}
        self.positions: dict[tuple[str, str], int] = {}

    def add(self, site: str, metric: str, total: Float[Tensor, "*H"], positions: int) -> None:
        """Take in a sum over so many positions."""
        key = site, metric
        self.sums[key] = self.sums.get(key, 0.0) + total.double().cpu()
        self.positions[key] = self.positions.get(key, 0) + positions

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the table: sites layer by layer, heads one by one."""
        rows = []
        for (site, metric), total in self.sums.items():
            positions = self.positions[site, metric]
            row = {"layer": _layer_of(site), "site": site, "metric": metric, "positions": positions}
            if not positions:  # documents of one token have nothing to foresee
                continue
            means = (total / positions).tolist()
            heads = enumerate(means) if isinstance(means, list) else [(None, means)]
            rows += [{**row, "head": head, "value": value} for head, value in heads]
        order = {metric: place for place, metric in enumerate(DRIFT.metrics)}
        last = 1 + max((row["layer"] for row in rows if row["layer"] is not None), default=0)
        return sorted(rows, key=lambda row: (last if row["layer"] is None else row["layer"], order[row["metric"]]))


@torch.no_grad()
def drift(
    original: HookedCausalLM,
    extended: HookedCausalLM,
    windows: Window | str | Tensor | Iterable[Window | str | Tensor],
    *,
    masked: bool = False,
    layers: int | Sequence[int] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """How far `extended` has drifted from `original` on the same windows, by layer and head; a tidy frame.

    Rows of `blocks.{i}.hook_resid_post` and `ln_final.hook_out` have the cosine distance of hidden states, rows of
    `blocks.{i}.attn.hook_pattern` the KL of attention of each head, rows of `logits` the KL of next-token distributions
    and the loss of both models; all as the module says. A window can be text too, or token ids: one document, by the
    tokenizer of `original` (see `HookedCausalLM.as_window`). `layers` (None: all) says whose attention and residual
    stream are compared. `masked` keeps attention inside documents, of both models. `progress` is called with the layers
    just compared.

    Attention is compared in blocks of queries, logits in blocks of positions. Of the original, all layers' rotated
    queries and keys and residual streams are held, [T, (H + K) D + M] a layer: memory is linear in the window.
    Raises InputError for models of different architecture, size, vocabulary or sliding window, for no windows, for
    layers that are out of range, and for what `hidden` refuses.
    """
    require_alike(original.config, extended.config)
    given = [windows] if isinstance(windows, Window | Batch | str | Tensor) else list(windows)
    if not given:
        raise InputError("drift is measured on windows, but there are none")
    read = [original.as_window(one) for one in given]
    of_states = range(len(original.blocks)) if layers is None else chosen_layers(original, layers)
    of_attention = chosen_layers(original, layers)
    sites = [*(f"blocks.{layer}.hook_resid_post" for layer in of_states), FINAL_NORM]
    means = _Means()
    for window in read:
        before = _read(original, window, sites, of_attention, masked)
        final = before.hidden[FINAL_NORM]
        final_extended = _compare_layers(extended, window, before, means, sites, of_attention, masked, progress)
        _compare_next_tokens(original, extended, window, final, final_extended, means)
    lengths = {len(window) for window in read}
    length = lengths.pop() if len(lengths) == 1 else None
    return DRIFT.frame([{**row, "seq_len": length, "masked": masked} for row in means.rows()])


def ranked_layers(frame: pd.DataFrame, count: int) -> list[int]:
    """The `count` layers that LongReD (arXiv 2502.07365) restores: those of largest attention KL, largest first.

    A layer's KL is the mean over its heads. The last layer of the frame is always in: where it is not among the
    largest, it takes the place of the least of them. Raises InputError for a frame without attention KL, and for a
    count that is not 1 to the number of layers.
    """
    of_layer = attention_by_layer(frame)["mean"].sort_values(ascending=False, kind="stable")
    if of_layer.empty:
        raise InputError("these results hold no attention KL; make them with drift")
    last = int(frame["layer"].max())
    ranked = [int(layer) for layer in of_layer.index]
    if last not in ranked:  # it has no attention
        ranked.append(last)
    if not 1 <= count <= len(ranked):
        raise InputError(f"count must be 1 to {len(ranked)}, the number of layers, but it is {count}")
    chosen = ranked[:count]
    return chosen if last in chosen else [*chosen[:-1], last]


def attention_by_layer(frame: pd.DataFrame) -> pd.DataFrame:
    """Attention KL of each layer, nats: columns `mean` and `max` over its heads."""
    rows = frame[frame["metric"] == ATTENTION_KL]
    return rows.groupby("layer")["value"].agg(["mean", "max"])


def _read(model: HookedCausalLM, window: Window, sites: Sequence[str], layers: Sequence[int], masked: bool) -> _States:
    """What the original makes of a window; copies, since layers may go on in place."""
    states = _States({}, {})

    def keep_hidden(x: Float[Tensor, "B T M"], hook: Any) -> None:
        states.hidden[hook.name] = x[0].clone()

    def keep_attention(layer: int, query: Tensor, key: Tensor, scoring: Scoring) -> None:
        states.attention[layer] = _Attention(query.clone(), key.clone(), scoring)

    with model.hooks(fwd_hooks=[(site, keep_hidden) for site in sites]):
        read_layers(model, window, keep_attention, masked=masked, layers=layers)
    for site, x in states.hidden.items():
        model.require_finite(x, site)
    return states


def _compare_layers(
    model: HookedCausalLM,
    window: Window,
    before: _States,
    means: _Means,
    sites: Sequence[str],
    layers: Sequence[int],
    masked: bool,
    progress: Callable[[int], Any] | None,
) -> Float[Tensor, "T M"]:
    """Compares the extended model's layers as they run, letting go of the original's; its final hidden states."""
    final: list[Tensor] = []

    def compare_hidden(x: Float[Tensor, "B T M"], hook: Any) -> None:
        model.require_finite(x, hook.name)
        clean = before.hidden.pop(hook.name).to(x.device)
        distance = vector_deltas(clean, x[0])[COSINE_DISTANCE]  # [T]
        means.add(hook.name, COSINE_DISTANCE, distance.double().sum(), len(window))
        if hook.name == FINAL_NORM:
            final.append(x[0])
        elif progress is not None:
            progress(1)

    def compare_attention(layer: int, query: Tensor, key: Tensor, scoring: Scoring) -> None:
        total = _sum_divergence(layer, before.attention.pop(layer), _Attention(query, key, scoring))
        means.add(f"blocks.{layer}.attn.hook_pattern", ATTENTION_KL, total, len(window))

    with model.hooks(fwd_hooks=[(site, compare_hidden) for site in sites]):
        read_layers(model, window, compare_attention, masked=masked, layers=layers)
    return final[0]


def _sum_divergence(layer: int, original: _Attention, extended: _Attention) -> Float[Tensor, " H"]:
    """KL(A_original || A_extended) of each head in nats, summed over queries, in float64."""
    before, after = (_reach(attention.scoring) for attention in (original, extended))
    if before != after:
        raise InputError(
            f"layer {layer} looks back over {before} tokens in the original and {after} in the extended model; "
            "attention is compared over the same keys"
        )
    device = extended.query.device
    total = torch.zeros(extended.query.shape[1], dtype=torch.float64, device=device)
    pairs = zip(
        blocks(original.query.to(device), original.key.to(device), original.scoring),
        blocks(extended.query, extended.key, extended.scoring),
        strict=True,
    )
    for clean, drifted in pairs:
        total += _divergence(clean, drifted).sum(1).double()
    return total


def _reach(scoring: Scoring) -> str:
    """How many tokens a layer looks back over, in words."""
    if scoring.chunk is not None:
        return f"chunks of {scoring.chunk}"
    return "all" if scoring.sliding_window is None else str(scoring.sliding_window)


def _divergence(original: Block, extended: Block) -> Float[Tensor, "H q"]:
    """KL of each query's attention, as sum of p (e^d - 1 - d), d = log q - log p: terms that are never negative.

    It is sum of p log(p / q), since p and q both sum to 1, and holds its digits where d is small.
    """
    log_p, log_q = original.log_weights, extended.log_weights  # [H, q, n]
    hidden = ~original.rows.visible
    if extra := log_p.shape[-1] - hidden.shape[-1]:  # a column of sinks, which every query sees
        hidden = functional.pad(hidden, (0, extra), value=False)
    d = (log_q - log_p).masked_fill_(hidden, 0)
    p = log_p.exp()
    small = p * (d.expm1() - d)
    large = log_q.exp() - p * (1 + d)  # where e^d would overflow; it cancels where d is small
    return torch.where(d > 1, large, small).sum(-1)


def _compare_next_tokens(
    original: HookedCausalLM,
    extended: HookedCausalLM,
    window: Window,
    final: Float[Tensor, "T M"],
    final_extended: Float[Tensor, "T M"],
    means: _Means,
) -> None:
    """KL of the logits, and both models' loss, block by block of positions."""
    targets, size = _next_tokens(window), logit_block(original, 2)
    for start in range(0, len(window), size):
        part = slice(start, start + size)
        clean = original.unembed(final[part].unsqueeze(0))[0]  # [n, V]
        drifted = extended.unembed(final_extended[part].unsqueeze(0))[0].to(clean.device)
        means.add(LOGITS, LOGIT_KL, logit_deltas(clean, drifted)[LOGIT_KL].double().sum(), len(clean))
        wanted = targets[part].to(clean.device)
        foreseeable = int((wanted != _NO_TARGET).sum())
        for metric, logits in ((ORIGINAL_LOSS, clean), (EXTENDED_LOSS, drifted)):
            precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = functional.cross_entropy(precise, wanted, ignore_index=_NO_TARGET, reduction="none")
            means.add(LOGITS, metric, loss.double().sum(), foreseeable)


_NO_TARGET = -100


def _next_tokens(window: Window) -> Int[Tensor, " T"]:
    """The token after each position; none where the document ends, since nothing tells how the next one begins."""
    tokens = window.tokens[0].cpu()
    targets = torch.cat([tokens[1:], tokens[:1]])
    targets[window.cu_seqlens[1:].long().cpu() - 1] = _NO_TARGET
    return targets


def _layer_of(site: str) -> int | None:
    return int(site.split(".")[1]) if site.startswith("blocks.") else None
