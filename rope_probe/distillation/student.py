"""The differentiated part of a training step, as one module that DDP and FSDP can wrap."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from rope_probe.distillation.losses import IGNORED, Head, Terms
from rope_probe.distillation.phase import Phase
from rope_probe.models.architectures import output_projection_of
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.windows.packing import Batch


@dataclass
class Taught:
    """What a teacher makes of a batch: final hidden states with their head, and states at the sites compared."""

    head: Head
    hidden: Tensor
    states: list[Tensor]


class Student(nn.Module):
    """A model as a phase trains it."""

    def __init__(self, model: HookedCausalLM, phase: Phase) -> None:
        super().__init__()
        self.model = model
        self._phase = phase
        self._no_split_modules = model.original_model._no_split_modules  # what accelerate shards layer by layer

    def forward(self, part: Batch, taught: Taught | None, over: tuple[int, int], measure: bool) -> tuple[Tensor, Terms]:
        """The loss of a part of a batch, of which `over` are the targets and positions, and its terms."""
        objective = self._phase.objective
        hidden, states = read(self.model, part, self._phase, self._phase.masked)
        targets = targets_of(part, self._phase).flatten().to(hidden.device)
        heads = (None, None) if taught is None else (taught.hidden.flatten(0, 1), taught.head)
        loss, terms = objective.loss(
            hidden.flatten(0, 1), head_of(self.model), targets, *heads, over=over, measure=measure
        )
        if objective.hidden is not None and taught is not None:
            apart = objective.hidden(states, taught.states)
            loss = loss + objective.hidden.weight * apart.sum() / over[1]
            terms.hidden = apart.detach()
        return loss, terms


def read(model: HookedCausalLM, part: Batch, phase: Phase, masked: bool) -> tuple[Tensor, list[Tensor]]:
    """Final hidden states, and the states at the sites that the objective compares."""
    match = phase.objective.hidden
    if match is None:
        return model.hidden(part, masked=masked), []
    kept: dict[str, Tensor] = {}
    with model.hooks(fwd_hooks=[(site, partial(_keep, kept)) for site in match.sites]):
        hidden = model.hidden(part, masked=masked)
    return hidden, [kept[site] for site in match.sites]


def targets_of(batch: Batch, phase: Phase) -> Tensor:
    """The next token at each position; none at a window's end, nor at a document's where attention cannot cross it."""
    targets = nn.functional.pad(batch.tokens[:, 1:], (0, 1), value=IGNORED)
    if phase.masked:
        targets[:, :-1][batch.first_of_document[:, 1:]] = IGNORED
    return targets


def _keep(kept: dict[str, Tensor], state: Tensor, hook: HookPoint) -> None:
    kept[str(hook.name)] = state


def head_of(model: HookedCausalLM) -> Head:
    """The model's own head: its projection, and what it does after it."""

    def after(projected: Tensor) -> Tensor:
        return model.after_projection(projected.unsqueeze(0)).squeeze(0)

    return Head(output_projection_of(model.original_model), after)


def shares(loss: Tensor, terms: Terms, over: tuple[int, int], tokens: Tensor | None) -> dict[str, Tensor]:
    """The loss of a part and its terms, as shares of the whole batch's means; with `tokens`, by distance too."""
    sums = {"loss": loss.detach()}
    if terms.cross_entropy is not None:
        sums["ce_nats"] = terms.cross_entropy.sum() / max(over[0], 1)
    if terms.divergence is not None:
        sums["kd_nats"] = terms.divergence.sum() / over[1]
        if tokens is not None:
            sums["kd_nats_by_distance"] = by_distance(terms.divergence, tokens).to(loss)
    if terms.hidden is not None:
        sums["hidden"] = terms.hidden.sum() / over[1]
    return sums


def by_distance(values: Float[Tensor, " N"], tokens: Int[Tensor, "B T"]) -> Float[Tensor, "2 bins"]:
    """Sums of `values`, and how many they are, by how many tokens ago a position's token last occurred in its window.

    Bin 0 is for tokens that occur for the first time, bin k for distances above 2^(k-2), up to 2^(k-1).
    """
    values = values.double().cpu()
    ordered, places = tokens.cpu().sort(dim=-1, stable=True)
    repeats = (ordered.diff(dim=-1) == 0) * places.diff(dim=-1)
    distance = torch.zeros_like(places).scatter_(-1, places[:, 1:], repeats).flatten()
    bins = torch.where(distance > 0, distance.double().log2().ceil() + 1, 0).long()
    size = math.ceil(math.log2(max(tokens.shape[1], 2))) + 2
    return torch.stack([torch.bincount(bins, weights, size) for weights in (values, torch.ones_like(values))])
