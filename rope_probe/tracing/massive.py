"""Massive values: pairs of dimensions in which a head's queries or keys are far longer than in its others.

arXiv 2502.01563 finds them in queries and keys but not in values, at slow rotary pairs. Here a head is cut into its
rotary pairs, and what does not rotate into dimensions two by two. For each, the length of the two numbers, mean over
positions, is set against the median of the head. A rotation leaves that length as it is, so it does not matter whether
it is read before or after. Values are cut like the queries and keys of their layer, though nothing rotates them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rope_probe import rope
from rope_probe.errors import InputError
from rope_probe.models.architectures import Rotary
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.runs.tables import Column, Metric, declare
from rope_probe.tracing.patterns import chosen_layers
from rope_probe.windows.packing import Window

STATES = {"q": "hook_rot_q", "k": "hook_rot_k", "v": "hook_v"}
"""What is measured, and the hook point in a layer's attention that it is read at."""

_BLOCK_TOKENS = 512
"""Positions whose lengths are taken at a time."""

MASSIVE_VALUES = declare(
    "massive_values",
    "How long queries, keys and values are in each pair of a head's dimensions.",
    ("seq_len", "masked", "layer", "head", "pair", "wavelength", "states", "dimension", "partner"),
    {
        "norm": Metric("length of the two numbers, mean over positions"),
        "ratio": Metric("that over the median of the head's pairs"),
    },
    own={
        "states": Column("string", "q, k or v; heads of k and v are key-value heads"),
        "dimension": Column("Int64", "first dimension of the head in the pair"),
        "partner": Column("Int64", "second dimension in the pair"),
    },
)


@torch.no_grad()
def massive_values(
    model: HookedCausalLM,
    window: Window | str | Int[Tensor, " T"],
    *,
    first: int = 0,
    masked: bool = False,
    layers: int | Sequence[int] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """Norms of queries, keys and values in each pair of dimensions, of every head of `layers` (None: all); tidy.

    `pair` is the rotary pair, 0 fastest, with its `wavelength` in tokens; null for dimensions that do not rotate.
    Metrics: `norm`, mean over the window's positions from `first` on, and `ratio`, over the median of its head, which
    is null where that is 0. `first=1` leaves out the first position, whose states are unlike all others in many models.
    `masked` keeps attention inside documents. `progress` is called with the layers just done.

    One forward pass; nothing outlives its layer. Raises InputError for what `hidden` refuses, for layers that are out
    of range, a `first` that leaves no position, and states that are not finite.
    """
    window = model.as_window(window)
    if not 0 <= first < len(window):
        raise InputError(f"first must be in 0..{len(window) - 1}, a position of the window, but it is {first}")
    parts = []
    query_widths: dict[int, int] = {}

    def read(x: Float[Tensor, "1 T H D"], hook: Any, states: str) -> None:
        layer, width = hook.layer(), x.shape[-1]
        model.require_finite(x, hook.name)
        if states == "q":
            query_widths[layer] = width
        rotary = model.rotary[layer] if width == query_widths[layer] else None
        pairs = _pairs(rotary, width)  # [pairs, 2]
        sums = torch.zeros(x.shape[2], len(pairs), dtype=torch.float64)  # [H, pairs]
        for block in x[0, first:].split(_BLOCK_TOKENS):
            two = block[..., pairs.to(x.device)].double()  # [t, H, pairs, 2]
            sums += torch.linalg.vector_norm(two, dim=-1).sum(0).cpu()
        norms = sums / (len(window) - first)
        parts.append(_frame(rotary, pairs, norms).assign(layer=layer, states=states))
        if progress is not None and states == "v":
            progress(1)

    def hook_of(states: str) -> Callable[[Tensor, Any], None]:
        return lambda x, hook: read(x, hook, states)

    chosen = chosen_layers(model, layers)
    hooks = [(f"blocks.{layer}.attn.{name}", hook_of(states)) for layer in chosen for states, name in STATES.items()]
    with model.measuring(), model.hooks(fwd_hooks=hooks):
        model.hidden(window, masked=masked)
    table = pd.concat(parts, ignore_index=True).assign(seq_len=len(window), masked=masked)
    return MASSIVE_VALUES.frame(table)


def _pairs(rotary: Rotary | None, width: int) -> Int[Tensor, "pairs 2"]:
    """The rotary pairs of a head, pair 0 first; behind them what does not rotate, dimensions two by two."""
    rotating = torch.empty(0, 2, dtype=torch.long) if rotary is None else rotary.pairs(width)
    still = np.setdiff1d(np.arange(width), rotating.flatten().numpy())
    return torch.cat([rotating, torch.from_numpy(still[: len(still) // 2 * 2]).view(-1, 2)])


def _frame(rotary: Rotary | None, pairs: Int[Tensor, "pairs 2"], norms: Float[Tensor, "H pairs"]) -> pd.DataFrame:
    """Rows of one layer's queries, keys or values: head by head, pair by pair, metric by metric."""
    wavelengths = [] if rotary is None else rope.wavelengths(rotary.inv_freq).tolist()
    still = len(pairs) - len(wavelengths)
    of_pair = pd.DataFrame(
        {
            "pair": pd.array([*range(len(wavelengths)), *[None] * still], dtype="Int64"),
            "wavelength": [*wavelengths, *[np.nan] * still],
            "dimension": pairs[:, 0].numpy(),
            "partner": pairs[:, 1].numpy(),
        }
    )
    median = norms.quantile(0.5, dim=1, keepdim=True)  # of an even number, midway between the two in the middle
    ratios = torch.where(median > 0, norms / median, torch.nan)
    values = torch.stack([norms, ratios], -1)  # [H, pairs, metrics]
    head, pair, metric = np.indices(values.shape).reshape(3, -1)
    frame = of_pair.iloc[pair].reset_index(drop=True)
    frame["head"] = head
    frame["metric"] = np.array(["norm", "ratio"])[metric]
    frame["value"] = values.flatten().numpy()
    return frame
