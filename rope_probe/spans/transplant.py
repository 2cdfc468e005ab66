"""Spans of one checkpoint in another: what a change of weights does is found by making it, or undoing it, alone."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from rope_probe import checkpoints
from rope_probe.attention import is_hooked
from rope_probe.errors import InputError
from rope_probe.hooked import HookedCausalLM
from rope_probe.spans.parts import Piece, Span, pieces
from rope_probe.spans.stored import Model, require_alike


def transplant_spans(before: Model, after: Model, spans: Iterable[Span | tuple]) -> PreTrainedModel:
    """A copy of `before` with `spans` of its weights as `after` has them; neither of the two is changed.

    Spans are `Span`s, or (layer, head, pair) of W_Q with None for all; `whole(before)` names everything. Exchange the
    two models to ask what is necessary instead of what suffices. How the result rotates is as `before` does, unless
    Span(part="rope") is among them. Queries and keys have a gauge in common (a pair of W_Q turned or scaled, and that
    of W_K turned or scaled back, is the same model), so parts trained together may only work together.

    Raises InputError for a span that is not there, and for models of different architecture or shape.
    """
    named = [Span(*span) for span in spans]
    donor = _plain(after)
    result = _copy(before)
    if any(span.part == "rope" for span in named):
        result = checkpoints.with_rope(result, donor.config.rope_parameters)
    for parameter, piece in _matched(result, donor, [span for span in named if span.part != "rope"]):
        _write(parameter, piece, donor.get_parameter(piece.name))
    return result


def _plain(model: Model) -> PreTrainedModel:
    if isinstance(model, HookedCausalLM):
        return model.original_model
    return model if isinstance(model, PreTrainedModel) else checkpoints.load(model)


def _copy(model: Model) -> PreTrainedModel:
    if isinstance(model, HookedCausalLM):
        with model.released() as plain:
            return copy.deepcopy(plain)
    if not isinstance(model, PreTrainedModel):
        return checkpoints.load(model)
    if is_hooked(model):
        raise InputError("this model is hooked, and a copy would share its hooks; give what load_model returned")
    return copy.deepcopy(model)


@contextmanager
def transplanted(
    host: HookedCausalLM, donor: PreTrainedModel, spans: Iterable[Span | tuple]
) -> Iterator[HookedCausalLM]:
    """Within it, `host` has `spans` of its weights as `donor` has them, in place; then its own again, bit for bit.

    Raises InputError as `transplant_spans`, and for "rope", which is no weight.
    """
    model = host.original_model
    matched = _matched(model, donor, [Span(*span) for span in spans])
    kept = {piece.name: parameter.detach().clone() for parameter, piece in matched}
    try:
        for parameter, piece in matched:
            _write(parameter, piece, donor.get_parameter(piece.name))
        yield host
    finally:
        for parameter, piece in matched:
            parameter.data.copy_(kept[piece.name])


def _matched(host: PreTrainedModel, donor: PreTrainedModel, spans: Iterable[Span]) -> list[tuple[torch.Tensor, Piece]]:
    """Where to write, and what."""
    require_alike(host.config, donor.config)
    return [(host.get_parameter(piece.name), piece) for span in spans for piece in pieces(host, span)]


def _write(target: torch.Tensor, piece: Piece, source: torch.Tensor) -> None:
    values = source.detach().to(target.device, target.dtype)
    if piece.indices is None:
        target.data.copy_(values)
    else:
        index = piece.indices.to(target.device)
        target.data.index_copy_(piece.dim, index, values.index_select(piece.dim, index))
