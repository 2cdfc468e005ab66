"""How the queries and keys of two checkpoints differ on the same windows, by layer, head, rotary pair and document."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from rope_probe import rope
from rope_probe.errors import InputError
from rope_probe.models.architectures import Rotary
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.runs.tables import Metric, declare
from rope_probe.spans.stored import require_alike, require_same_pairs
from rope_probe.windows.packing import Window

Site = tuple[int, str]
SPAN_STATES = declare(
    "span_states",
    "How queries and keys of two checkpoints differ on the same windows, their rotation undone; pairs as complex "
    "numbers.",
    ("seq_len", "document", "position", "layer", "site", "head", "pair", "wavelength", "wavelength_after"),
    {
        "norm_before": Metric("root mean square of the pair, in the first checkpoint"),
        "norm_after": Metric("the same in the second"),
        "rel_change": Metric("norm of the change over the norm before"),
        "change_norm": Metric("root mean square of the change"),
        "cosine": Metric("cosine of all of the document's states, before and after"),
        "phase_radians": Metric("the one turn that brings the states after closest to those before", "radians"),
        "norm_share_before": Metric("the pair's share of its layer's squared norm, in the first checkpoint"),
        "norm_share_after": Metric("the same in the second"),
    },
)


@torch.no_grad()
def compare_states(
    before: HookedCausalLM,
    after: HookedCausalLM,
    windows: Window | Iterable[Window],
    *,
    masked: bool = False,
    by_position: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """Queries and keys, their rotation undone, of two checkpoints reading the same windows; a tidy frame.

    Sites are `blocks.{i}.attn.unrotated_q|k`, in layers that rotate. Pairs of a state are taken as complex numbers
    z = first + i second. Rows by layer, head, pair and `document` of the window (with `by_position`, by `position` too,
    T times as many), means over windows, angles by their directions:

    - `norm_before`, `norm_after`: root mean square of |z| over the document's positions;
    - `change_norm`, root mean square of |z' - z|; `rel_change`, root of the sum of |z' - z|^2 over that of |z|^2;
      `cosine`, between all of the document's z and z';
      `phase_radians`, the one angle by which the z' are best turned against the z;
    - `norm_share_before`, `norm_share_after`: the pair's share of its layer's squared norm, over all heads and
      dimensions. Massive values (arXiv 2502.01563) are pairs and heads with a share far above 1 / (H * D / 2).

    States of one window are held at a time, [T, H + K, D] a layer. `progress` is called with 1 after each of the two
    passes over a window. Raises InputError for models of different
    architecture, and for no windows.
    """
    require_alike(before.config, after.config)
    require_same_pairs(before.rotary, after.rotary)
    windows = [windows] if isinstance(windows, Window) else list(windows)
    if not windows:
        raise InputError("states are compared on windows, but there are none")
    frames = []
    for window in windows:
        mine, theirs = (_states(model, window, masked, progress) for model in (before, after))
        groups = torch.arange(len(window)) if by_position else window.document_of
        for (layer, side), x in mine.items():
            rotaries = before.rotary[layer], after.rotary[layer]
            assert rotaries[0] is not None  # only such layers are read
            rows = _compared(x, theirs[layer, side], groups, rotaries[0])
            heads, pairs = rows["cosine"].shape[1:]
            columns = _columns(window, groups, heads, pairs, rotaries, by_position)
            columns |= {"layer": layer, "site": f"blocks.{layer}.attn.unrotated_{side}", "seq_len": len(window)}
            frames += [pd.DataFrame({**columns, "metric": m, "value": v.flatten().numpy()}) for m, v in rows.items()]
    frame = pd.concat(frames, ignore_index=True)
    keys = [column for column in frame.columns if column != "value"]
    return SPAN_STATES.frame(_over_windows(frame, keys) if len(windows) > 1 else frame)


def _over_windows(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Means over windows; of angles, the direction of the mean of their unit vectors."""
    turns = frame["metric"] == "phase_radians"
    vectors = np.exp(1j * frame.loc[turns, "value"])
    angles = frame[turns].assign(real=vectors.to_numpy().real, imaginary=vectors.to_numpy().imag)
    mean = angles.groupby(keys, sort=False, as_index=False)[["real", "imaginary"]].mean()
    mean["value"] = np.arctan2(mean.pop("imaginary"), mean.pop("real"))
    return pd.concat([frame[~turns].groupby(keys, sort=False, as_index=False)["value"].mean(), mean])


def _states(
    model: HookedCausalLM, window: Window, masked: bool, progress: Callable[[int], Any] | None
) -> dict[Site, Float[Tensor, "T H D"]]:
    states_at: dict[Site, Tensor] = {}

    def read(x: Tensor, hook: Any) -> None:
        layer = hook.layer()
        rotary = model.rotary[layer]
        assert rotary is not None
        states_at[layer, hook.name[-1]] = rotary.undo(x[0].double(), window.position_ids[0]).cpu()

    rotating = [layer for layer, rotary in enumerate(model.rotary) if rotary is not None]
    sites = [f"blocks.{layer}.attn.hook_rot_{side}" for layer in rotating for side in "qk"]
    with model.measuring(), model.hooks(fwd_hooks=[(site, read) for site in sites]):
        model.hidden(window, masked=masked)
    for (layer, side), states in states_at.items():
        model.require_finite(states, f"blocks.{layer}.attn.hook_rot_{side}")
    if progress is not None:
        progress(1)
    return states_at


def _compared(x: Tensor, y: Tensor, groups: Int[Tensor, " T"], rotary: Rotary) -> dict[str, Float[Tensor, "G H P"]]:
    count = int(groups.max()) + 1
    size = torch.bincount(groups, minlength=count).double().view(-1, 1, 1)

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(count, *values.shape[1:], dtype=values.dtype).index_add_(0, groups, values)

    one, other = (_complex(part, rotary) for part in (x, y))
    before, after, change = (summed(part.abs().square()) for part in (one, other, other - one))
    product = summed(one.conj() * other)
    of_layer = [summed(part.square().sum((-1, -2), keepdim=True)) for part in (x, y)]
    return {
        "norm_before": (before / size).sqrt(),
        "norm_after": (after / size).sqrt(),
        "rel_change": torch.where(change == 0, change, (change / before)).sqrt(),
        "change_norm": (change / size).sqrt(),
        "cosine": product.real / (before * after).sqrt(),
        "phase_radians": product.angle(),
        "norm_share_before": before / of_layer[0],
        "norm_share_after": after / of_layer[1],
    }


def _complex(x: Float[Tensor, "T H D"], rotary: Rotary) -> Complex[Tensor, "T H P"]:
    return torch.view_as_complex(x[..., rotary.pairs(x.shape[-1])].contiguous())


def _columns(
    window: Window, groups: Tensor, heads: int, pairs: int, rotaries: Sequence[Rotary | None], by_position: bool
) -> dict[str, Any]:
    count = int(groups.max()) + 1
    each = np.repeat(np.arange(count), heads * pairs)
    columns = {"position": each, "document": window.document_of.numpy()[each]} if by_position else {"document": each}
    columns["head"] = np.tile(np.repeat(np.arange(heads), pairs), count)
    columns["pair"] = np.tile(np.arange(pairs), count * heads)
    for name, rotary in zip(("wavelength", "wavelength_after"), rotaries, strict=True):
        assert rotary is not None
        columns[name] = np.tile(rope.wavelengths(rotary.inv_freq).numpy(), count * heads)
    return columns
