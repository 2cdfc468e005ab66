"""Spans of one checkpoint in another: what a change of weights does is found by making it, or undoing it, alone."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from rope_probe.errors import InputError
from rope_probe.models import attention, checkpoints
from rope_probe.models.architectures import rotary_layers
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.models.parameters import projections_of
from rope_probe.spans.parts import Piece, Span, pieces
from rope_probe.spans.stored import Model, require_alike, require_same_pairs, resolved


def transplant_spans(before: Model, after: Model, spans: Iterable[Span | tuple]) -> PreTrainedModel:
    """A copy of `before` with `spans` of its weights as `after` has them; neither of the two is changed.

    `after` may be the folder of a PEFT adapter for `before`.

    Spans are `Span`s, or (layer, head, pair) of W_Q with None for all; `whole(before)` names everything. Exchange the
    two models to ask what is necessary instead of what suffices. How the result rotates is as `before` does, unless
    Span(part="rope") is among them; other entries of the config stay as they are. Queries and keys have a gauge in
    common (a pair of W_Q turned or scaled, and that of W_K turned or scaled back, is the same model), so parts trained
    together may only work together.

    Raises InputError for a span that is not there, for models of different architecture or shape, and for quantised
    ones.
    """
    named = [Span(*span) for span in spans]
    donor = plain_model(resolved(after, before))
    result = _copy(before)
    matched = _matched(result, donor, [span for span in named if span.part != "rope"])
    for parameter, piece in matched:
        _write(parameter, piece, donor.get_parameter(piece.name))
    if any(span.part == "rope" for span in named):
        require_same_pairs(rotary_layers(result), rotary_layers(donor))
        checkpoints.rotate_as(result, donor)
    return result


def plain_model(model: Model) -> PreTrainedModel:
    """The transformers model of a folder, a hub id, a hooked model or itself."""
    if isinstance(model, HookedCausalLM):
        return model.original_model
    return model if isinstance(model, PreTrainedModel) else checkpoints.load(model)


def _copy(model: Model) -> PreTrainedModel:
    in_memory = isinstance(model, PreTrainedModel | HookedCausalLM)
    return attention.plain_copy(plain_model(model)) if in_memory else checkpoints.load(model)


@contextmanager
def transplanted(
    host: HookedCausalLM, donor: PreTrainedModel | HookedCausalLM, spans: Iterable[Span | tuple]
) -> Iterator[HookedCausalLM]:
    """Within it, `host` has `spans` of its weights as `donor` has them, in place; then its own again, bit for bit.

    Raises InputError as `transplant_spans`, and for "rope", which is no weight.
    """
    model = plain_model(donor)
    matched = _matched(host.original_model, model, [Span(*span) for span in spans])
    parameters = {piece.name: parameter for parameter, piece in matched}
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        for parameter, piece in matched:
            _write(parameter, piece, model.get_parameter(piece.name))
        yield host
    finally:
        for name, parameter in parameters.items():
            parameter.data.copy_(kept[name])


def _matched(host: PreTrainedModel, donor: PreTrainedModel, spans: Iterable[Span]) -> list[tuple[torch.Tensor, Piece]]:
    """Where to write, and what."""
    require_alike(host.config, donor.config)
    for model in (host, donor):
        checkpoints.require_unquantised(model, "a transplant of spans")
    theirs = dict(donor.named_parameters(remove_duplicate=False))
    projections = projections_of(host)
    matched = []
    for span in spans:
        for piece in pieces(host, span, projections):
            parameter = host.get_parameter(piece.name)
            if piece.name not in theirs or theirs[piece.name].shape != parameter.shape:
                raise InputError(f"{piece.name} is not in both models in one shape; {span} cannot be transplanted")
            matched.append((parameter, piece))
    return matched


def _write(target: torch.Tensor, piece: Piece, source: torch.Tensor) -> None:
    values = source.detach().to(target.device, target.dtype)
    if piece.indices is None:
        target.data.copy_(values)
    else:
        index = piece.indices.to(target.device)
        target.data.index_copy_(piece.dim, index, values.index_select(piece.dim, index))
