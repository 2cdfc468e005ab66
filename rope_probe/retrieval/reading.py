"""Reading: one pass over a long text serves any number of questions, each asked after any part of it.

A causal model's keys and values of the first n tokens do not depend on what follows. So a text is read once; a question
is then a short continuation of its first n tokens, for every n: windows of several lengths, needles at all distances.
What a whole pass over those n tokens and the question would give comes out to rounding.

Perturbations act while the text is read and while a question is, each at its own positions. Rotations (another theta,
YaRN's frequencies) are the model's own: give a model made by `checkpoints.with_rope`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from rope_probe.errors import InputError
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.tracing.perturbations import (
    AttentionTemperature,
    Hook,
    PairTurn,
    Perturbation,
    PositionShift,
    ThetaSwap,
)
from rope_probe.windows.packing import Window

_BY_POSITION = (AttentionTemperature, PairTurn, PositionShift, ThetaSwap)
"""What they do to a position depends on that position alone, wherever reading began."""
_SITES = ("hook_rot_k", "hook_v")


class Reading:
    """What a model has read of one text: the rotated keys and the values of every layer.

    `perturbations` act on all that is read, in their order. Hooks that are attached to the model act too.
    Raises InputError for perturbations that are drawn by window, that need its documents, or that are restricted to
    positions: pieces of a window do not tell them.
    """

    def __init__(self, model: HookedCausalLM, perturbations: Sequence[Perturbation] = ()) -> None:
        for perturbation in perturbations:
            if not isinstance(perturbation, _BY_POSITION) or perturbation.positions is not None:
                known = ", ".join(kind.__name__ for kind in _BY_POSITION)
                raise InputError(f"a text can be read in pieces under {known} at all positions, not {perturbation}")
        self.model = model
        self.perturbations = tuple(perturbations)
        self._kept: dict[int, tuple[Float[Tensor, "1 K n D"], Float[Tensor, "1 K n D"]]] = {}

    def __len__(self) -> int:
        """Tokens read so far."""
        return self._kept[0][0].shape[2] if self._kept else 0

    @torch.no_grad()
    def read(self, tokens: Int[Tensor, " m"], reads: Sequence[Hook] = ()) -> Float[Tensor, "1 m M"]:
        """Read on; the final hidden states of these tokens, ready for `unembed`.

        `reads` are hooks that see these positions after the perturbations. Raises InputError for no tokens, and for
        what `HookedCausalLM.hidden_after` refuses.
        """
        new: dict[tuple[int, str], Tensor] = {}

        def keep(layer: int, site: str, x: Float[Tensor, "1 m K D"], hook: HookPoint) -> None:
            new[layer, site] = x.detach().transpose(1, 2)  # [1, K, m, D]

        keeps: list[tuple[str, Callable[..., Any]]] = [
            (f"blocks.{layer}.attn.{site}", partial(keep, layer, site))
            for layer in self.model.attending_layers
            for site in _SITES
        ]
        states = self._pass(self._kept, tokens, [*reads, *keeps])
        for layer in self.model.attending_layers:
            kept = [new[layer, site] for site in _SITES]
            if layer in self._kept:
                kept = [torch.cat(pair, 2) for pair in zip(self._kept[layer], kept, strict=True)]
            self._kept[layer] = (kept[0].contiguous(), kept[1].contiguous())
        return states

    @torch.no_grad()
    def ask(
        self, tokens: Int[Tensor, " m"], at: int | None = None, reads: Sequence[Hook] = ()
    ) -> Float[Tensor, "1 m M"]:
        """Final hidden states of tokens that follow the first `at` of those read (None: all); nothing of it is kept.

        Raises InputError as `read`, and for `at` outside 1..len(self).
        """
        return self._pass(self._first(len(self) if at is None else at), tokens, reads)

    def branch(self, at: int | None = None, perturbations: Sequence[Perturbation] | None = None) -> "Reading":
        """Another reading that has read the first `at` tokens as this one did, and goes on by itself.

        It goes on under other `perturbations`, where they are given. Raises InputError as `ask`.
        """
        branched = Reading(self.model, self.perturbations if perturbations is None else perturbations)
        branched._kept = self._first(len(self) if at is None else at)
        return branched

    def keys(self, layer: int, at: int | None = None) -> Float[Tensor, "n K D"]:
        """Rotated keys of a layer, of the first `at` tokens."""
        return self._kept[layer][0][0, :, :at].transpose(0, 1)

    def _first(self, at: int) -> dict[int, tuple[Tensor, Tensor]]:
        if not 1 <= at <= len(self):
            raise InputError(f"at must be in 1..{len(self)}, the tokens read so far, but it is {at}")
        return {layer: (keys[:, :, :at], values[:, :, :at]) for layer, (keys, values) in self._kept.items()}

    def _pass(self, earlier: dict[int, tuple[Tensor, Tensor]], tokens: Tensor, reads: Sequence[Hook]) -> Tensor:
        if tokens.ndim != 1 or not len(tokens):
            raise InputError(f"tokens must be [m], one or more, but their shape is {tuple(tokens.shape)}")
        first = earlier[0][0].shape[2] if earlier else 0
        length = len(tokens)
        positions = torch.arange(first, first + length).unsqueeze(0)
        window = Window(tokens.unsqueeze(0).cpu(), torch.tensor([0, length], dtype=torch.int32), positions)
        turns = [hook for perturbation in self.perturbations for hook in perturbation.hooks(self.model, window)]
        with self.model.measuring(), self.model.hooks(fwd_hooks=[*turns, *reads]):
            return self.model.hidden_after(earlier, tokens) if earlier else self.model.hidden(window)
