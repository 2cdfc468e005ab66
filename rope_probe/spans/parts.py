"""Spans: some of a model's weights, named by part, layer, head and rotary pair, and the elements that they are."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import pandas as pd
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from rope_probe.errors import InputError
from rope_probe.models.architectures import layers_of
from rope_probe.models.parameters import ATTENTION, Part, Projection, part_of, projections_of

_OF_LAYERS: tuple[Part, ...] = (*ATTENTION, "mlp", "norms")
_SITES = {"mlp": "mlp", "norms": "ln", "W_E": "embed.W_E", "W_U": "unembed.W_U"}


class Span(NamedTuple):
    """Some weights, by what they do. A plain (layer, head, pair) is a span of W_Q; None stands for all there are.

    Heads are query heads in W_Q and W_O, key-value heads in W_K and W_V. Pairs, 0 the fastest, are in W_Q and W_K
    only: the two rows that make one, their biases with them. The other parts have neither, and W_E, W_U (the
    embeddings) and "rope" (how the model rotates, which is no weight) no layers. A layer's biases that belong to no
    head (of the output projection) come with any span of all heads. "norms" without a layer includes the final norm.
    """

    layer: int | None = None
    head: int | None = None
    pair: int | None = None
    part: Part | Literal["rope"] = "W_Q"

    def __str__(self) -> str:
        where = ((name, value) for name, value in zip(self._fields, self, strict=True) if name != "part")
        return " ".join([self.part, *(f"{name} {value}" for name, value in where if value is not None)])


def site_of(part: Part, layer: int | None) -> str:
    """How the frames call a part without heads."""
    return "ln_final" if part == "norms" and layer is None else _in_layer(_SITES[part], layer)


def _in_layer(site: str, layer: int | None) -> str:
    return site if layer is None else f"blocks.{layer}.{site}"


def spans_of(frame: pd.DataFrame) -> list[Span]:
    """The spans that rows of `compare_spans` speak of, each once, in their order: to transplant what stands out there.

    Raises InputError for a row of no span by itself, as those of the final norm.
    """
    parts = {site.rpartition(".")[2]: part for part, site in _SITES.items()} | {part: part for part in ATTENTION}
    spans = []
    for row in frame[["site", "layer", "head", "pair"]].drop_duplicates().itertuples(index=False):
        part = parts.get(str(row.site).rpartition(".")[2])
        if part is None:
            raise InputError(f"rows at site {row.site!r} are of no span; take rows of {', '.join(parts)}")
        layer, head, pair = (None if pd.isna(value) else int(value) for value in (row.layer, row.head, row.pair))
        spans.append(Span(layer, head, pair, part))  # type: ignore[arg-type]
    return spans


class Piece(NamedTuple):
    """Elements of one parameter: whole, or some of its rows or columns."""

    name: str
    indices: Int[Tensor, " n"] | None = None
    dim: int = 0


def pieces(model: PreTrainedModel, span: Span, projections: Sequence[Projection] | None = None) -> list[Piece]:
    """The elements of a model's parameters that a span names; its `projections_of` are worked out unless given.

    Raises InputError for a part, layer, head or pair that is not there, and for "rope", which is no weight.
    """
    if span.part not in get_args(Part):
        raise InputError(f"{span.part!r} is no part of the weights; parts are {', '.join(get_args(Part))}")
    layers = len(layers_of(model))
    if span.layer is not None and (span.part not in _OF_LAYERS or not 0 <= span.layer < layers):
        raise InputError(f"span {span} is not there: {_which(span.part, 'layers', layers)}")
    if span.part in ATTENTION:
        of_model = projections_of(model) if projections is None else projections
        return [piece for one in of_model if _names(span, one) for piece in _of_projection(span, one)]
    if span.head is not None or span.pair is not None:
        raise InputError(f"span {span} is not there: {span.part} has no heads and no pairs")
    named = [(name, part_of(model, name)) for name, _ in model.named_parameters()]
    chosen = [Piece(name) for name, place in named if place[0] == span.part and span.layer in (None, place[1])]
    if not chosen:
        raise InputError(f"span {span} is not there: this model has no such weights of their own")
    return chosen


def _names(span: Span, projection: Projection) -> bool:
    return span.part == projection.part and span.layer in (None, projection.layer)


def _of_projection(span: Span, projection: Projection) -> Iterable[Piece]:
    heads, index = len(projection.index), projection.index
    if span.head is not None:
        if not 0 <= span.head < heads:
            raise InputError(f"span {span} is not there: {_which(span.part, 'heads', heads)}")
        index = index[span.head : span.head + 1]
    if span.pair is not None:
        if not 0 <= span.pair < len(projection.pairs):
            if span.layer is None and not len(projection.pairs) and span.part in ("W_Q", "W_K"):
                return
            raise InputError(f"span {span} is not there: {_which(projection.site, 'pairs', len(projection.pairs))}")
        index = index[:, projection.pairs[span.pair]]
    output = projection.part == "W_O"
    yield Piece(projection.weight, index.flatten(), int(output))
    if projection.bias is not None and not output:
        yield Piece(projection.bias, index.flatten())
    elif projection.bias is not None and span.head is None:
        yield Piece(projection.bias)


def _which(what: str, of: str, count: int) -> str:
    return f"{what} has {of} 0 to {count - 1}" if count else f"{what} has no {of}"


def whole(model: PreTrainedModel) -> list[Span]:
    """Every part that a model has: transplanting them all makes the other model."""
    own = {part_of(model, name)[0] for name, _ in model.named_parameters()}
    weights = [Span(part=part) for part in get_args(Part) if part in ATTENTION or part in own]
    return [*weights, Span(part="rope")]
