"""The differentiated part of a training step, as one module that DDP and FSDP can wrap."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from rope_probe.distillation.streams import Stream
from rope_probe.distillation.terms import Counts, Head, LogitTerm, StateTerm, Term, loss_in_chunks
from rope_probe.distillation.terms.base import IGNORED
from rope_probe.models.architectures import output_projection_of
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.windows.packing import Batch


@dataclass(frozen=True)
class Lesson:
    """One stream's part in one step: its windows as student and teachers read them, and the terms to tell.

    `counts` are what terms are averaged over, and `factor` is what the stream counts for in the loss.
    """

    stream: Stream
    terms: tuple[Term, ...]
    batch: Batch
    teachers_batch: Batch
    counts: Counts
    factor: float

    @classmethod
    def of(
        cls, stream: Stream, terms: tuple[Term, ...], batch: Batch, teachers_batch: Batch, factor: float
    ) -> "Lesson":
        """The lesson of a whole step."""
        targets = int((targets_of(batch, stream.masked) != IGNORED).sum())
        moved = int((batch.position_ids != teachers_batch.position_ids).sum())
        return cls(stream, terms, batch, teachers_batch, Counts(batch.tokens.numel(), targets, moved), factor)


@dataclass(frozen=True)
class Taught:
    """What a teacher makes of some windows: final hidden states with their head, and states by site."""

    head: Head
    hidden: Float[Tensor, "B T K"]
    states: Mapping[str, Tensor]


class Student(nn.Module):
    """A model as a phase trains it."""

    def __init__(self, model: HookedCausalLM) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = model.original_model._no_split_modules  # what accelerate shards layer by layer

    def forward(
        self, part: Batch, lesson: Lesson, taught: Mapping[str, Taught]
    ) -> tuple[Float[Tensor, ""], list[Float[Tensor, " N"]]]:
        """What some of a lesson's windows add to the loss, and each of its terms at each position, detached."""
        stream = lesson.stream
        hidden, states = read(self.model, part, stream.masked, sites_of(lesson.terms))
        targets = targets_of(part, stream.masked).flatten().to(hidden.device)
        of_logits = [term for term in lesson.terms if isinstance(term, LogitTerm)]
        loss, values_of_logits = loss_in_chunks(
            of_logits,
            hidden.flatten(0, 1),
            head_of(self.model),
            targets,
            {name: (teacher.hidden.flatten(0, 1), teacher.head) for name, teacher in taught.items()},
            chunk=stream.chunk,
            counts=lesson.counts,
            factor=lesson.factor,
        )
        remaining = iter(values_of_logits)
        values = []
        for term in lesson.terms:
            if isinstance(term, StateTerm):
                theirs = None if term.teacher is None else [taught[term.teacher].states[site] for site in term.sites]
                with torch.set_grad_enabled(torch.is_grad_enabled() and term.weight > 0):
                    value = term.of_counted(
                        term.values([states[site] for site in term.sites], theirs), targets != IGNORED
                    )
                if term.weight > 0:
                    loss = loss + term.loss(value, lesson.counts, lesson.factor)
                values.append(value.detach())
            else:
                values.append(next(remaining))
        return loss, values


def taught_by(teacher: HookedCausalLM, part: Batch, masked: bool, terms: Sequence[Term]) -> Taught:
    """What a teacher makes of some windows, with the states that `terms` compare."""
    return Taught(head_of(teacher), *read(teacher, part, masked, sites_of(terms)))


def sites_of(terms: Iterable[Term]) -> tuple[str, ...]:
    """The sites that terms read, each once."""
    return tuple(dict.fromkeys(site for term in terms if isinstance(term, StateTerm) for site in term.sites))


def read(
    model: HookedCausalLM, part: Batch, masked: bool, sites: Sequence[str]
) -> tuple[Float[Tensor, "B T M"], dict[str, Tensor]]:
    """Final hidden states, and the states at `sites`."""
    if not sites:
        return model.hidden(part, masked=masked), {}
    kept: dict[str, Tensor] = {}
    with model.hooks(fwd_hooks=[(site, partial(_keep, kept)) for site in sites]):
        hidden = model.hidden(part, masked=masked)
    return hidden, kept


def targets_of(batch: Batch, masked: bool) -> Int[Tensor, "B T"]:
    """The next token at each position; none at a window's end, nor at a document's where attention cannot cross it."""
    targets = nn.functional.pad(batch.tokens[:, 1:], (0, 1), value=IGNORED)
    if masked:
        targets[:, :-1][batch.first_of_document[:, 1:]] = IGNORED
    return targets


def _keep(kept: dict[str, Tensor], state: Tensor, hook: HookPoint) -> None:
    kept[str(hook.name)] = state


def head_of(model: HookedCausalLM) -> Head:
    """The model's own head: its projection, and what it does after it."""

    def after(projected: Tensor) -> Tensor:
        return model.after_projection(projected.unsqueeze(0)).squeeze(0)

    return Head(output_projection_of(model.original_model), after)


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
