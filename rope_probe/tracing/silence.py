"""Silenced heads: what a model does without them, whatever is measured meanwhile."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rope_probe.errors import InputError
from rope_probe.models.architectures import heads_of
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.windows.packing import Window

Head = tuple[int, int]
"""A layer, and a query head of it."""


@contextmanager
def silenced(
    model: HookedCausalLM, heads: Iterable[Head], *, mean_over: Window | None = None, masked: bool = False
) -> Iterator[HookedCausalLM]:
    """Within it, these heads, pairs (layer, query head), add nothing to the residual stream.

    What a head read, hook_z, is zero at every position; with `mean_over`, its mean over the positions of that window
    instead (read with `masked` or not, and with hooks that are there already). `retrieval_accuracy`, `greedy`, `trace`
    and forward passes all see it so. As with any hooks, greedy decoding reads the whole window anew for every token,
    and the cones of a trace have all positions.
    Raises InputError for a head that the model does not have.
    """
    of_layer = _by_layer(model, heads)
    instead = {layer: torch.zeros(()) for layer in of_layer}
    if mean_over is not None:
        instead = _mean_z(model, mean_over, list(of_layer), masked)

    def replace(z: Float[Tensor, "B T H D"], hook: Any) -> Tensor:
        layer = hook.layer()
        silent = torch.zeros(z.shape[2], 1, dtype=torch.bool)
        silent[of_layer[layer]] = True
        return torch.where(silent.to(z.device), instead[layer].to(z), z)

    with model.hooks(fwd_hooks=[(_site(layer), replace) for layer in of_layer]):
        yield model


def _by_layer(model: HookedCausalLM, heads: Iterable[Head]) -> dict[int, list[int]]:
    layers, count = len(model.blocks), heads_of(model.config).query
    of_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        if not (0 <= layer < layers and 0 <= head < count):
            raise InputError(
                f"head {head} of layer {layer} is out of range; layers are 0..{layers - 1} and heads 0..{count - 1}"
            )
        if layer not in model.attending_layers:
            raise InputError(f"layer {layer} of this model has no attention, and no heads to silence")
        of_layer.setdefault(int(layer), []).append(int(head))
    return of_layer


@torch.no_grad()
def _mean_z(model: HookedCausalLM, window: Window, layers: list[int], masked: bool) -> dict[int, Tensor]:
    means: dict[int, Tensor] = {}

    def keep(z: Tensor, hook: Any) -> None:
        means[hook.layer()] = z[0].to(torch.promote_types(z.dtype, torch.float32)).mean(0)  # [H, D]

    with model.measuring(), model.hooks(fwd_hooks=[(_site(layer), keep) for layer in layers]):
        model.hidden(window, masked=masked)
    return means


def _site(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"
