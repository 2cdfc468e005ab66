"""Which changed spans cause what a checkpoint can do: transplant them, measure, and see what foresees the result."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rope_probe.errors import InputError
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.models.parameters import projections_of
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.tables import Column, declare
from rope_probe.spans.parts import Piece, Span, pieces
from rope_probe.spans.stored import require_alike
from rope_probe.spans.transplant import plain_model, transplanted

SPAN_EFFECTS = declare(
    "span_effects",
    "What a measurement finds in one checkpoint with some of its weights as another has them.",
    (
        "arm", "into", "group", "span_set", "order", "draw", "moved", "movable", "layer", "head", "pair",
        "task", "seq_len", "distance", "trials", "low", "high",
    ),
    dict(RETRIEVAL.metrics),
    own={
        "into": Column("string", 'which checkpoint they are brought into: "start" or "end"'),
        "group": Column("string", "what is transplanted as one, by name"),
        "span_set": Column("string", "what a curve is of: which spans are brought where"),
        "order": Column("string", "the order in which spans are brought"),
        "draw": Column("Int64", "which draw of a random order"),
        "moved": Column("Int64", "how many query spans are transplanted"),
        "movable": Column("Int64", "how many there are"),
        "task": RETRIEVAL.columns["task"],
        "trials": RETRIEVAL.columns["trials"],
    },
)  # fmt: skip
"""Metrics are those of retrieval; `span_effects` itself returns whatever columns its measurement has."""


def query_spans(model: PreTrainedModel) -> list[Span]:
    """Every (layer, head, pair) of W_Q."""
    return [
        Span(one.layer, head, pair)
        for one in projections_of(model)
        if one.part == "W_Q"
        for head in range(len(one.index))
        for pair in range(len(one.pairs))
    ]


def span_effects(
    host: HookedCausalLM,
    donor: PreTrainedModel | HookedCausalLM,
    groups: Mapping[str, Iterable[Span]],
    measure: Callable[[HookedCausalLM], pd.DataFrame],
    *,
    progress: Callable[[int], Any] | None = None,
) -> pd.DataFrame:
    """What `measure` finds in `host` with each group of spans as `donor` has them; its name in the column `group`.

    With the checkpoint before as host and the one after as donor this asks what suffices, the other way round what is
    necessary. The host is as it was when this returns. `progress` is called with the groups just measured. Raises
    InputError as `transplanted`.
    """
    if not groups:
        raise InputError("there are no groups of spans to transplant; {'nothing': []} is one")
    frames = []
    for name, spans in groups.items():
        with transplanted(host, donor, spans):
            frames.append(measure(host).assign(group=name))
        if progress is not None:
            progress(1)
    return pd.concat(frames, ignore_index=True)


def gradient_times_change(
    host: HookedCausalLM,
    donor: PreTrainedModel | HookedCausalLM,
    spans: Sequence[Span],
    loss: Callable[[HookedCausalLM], Tensor],
    *,
    steps: int = 0,
) -> list[float]:
    """How much each span contributes to the loss that falls from `host` to `donor`, by gradients: - gradient . change.

    With `steps` of 0 the gradient is the host's own: the effect of transplanting a span alone, to first order, by one
    forward and backward pass for all spans. With more it is the mean over as many points on the straight path on which
    all weights go from the host's to the donor's (integrated gradients, arXiv 1703.01365): contributions of all weights
    then add up to what the loss falls by, and a span's counts with the others around it at every stage.

    The host is as it was when this returns. Raises InputError as `transplant_spans`.
    """
    if steps < 0:
        raise InputError(f"steps must be 0 or more, but it is {steps}")
    donor = plain_model(donor)
    require_alike(host.config, donor.config)
    projections = projections_of(host.original_model)
    of_span = [pieces(host.original_model, span, projections) for span in spans]
    if not of_span:
        return []
    own = dict(host.original_model.named_parameters())
    parameters = {piece.name: own[piece.name] for some in of_span for piece in some}
    change = {name: donor.get_parameter(name).detach().to(value) - value.detach() for name, value in own.items()}
    wanted = {name: value.requires_grad for name, value in own.items()}
    kept = {name: value.detach().clone() for name, value in own.items()}
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    try:
        for fraction in [0.0] if steps == 0 else [(step + 0.5) / steps for step in range(steps)]:
            for name, value in own.items():
                value.data.copy_(kept[name] + fraction * change[name])
            with torch.enable_grad():
                for value in parameters.values():
                    value.requires_grad_()
                gradients = torch.autograd.grad(loss(host), list(parameters.values()))
            for name, gradient in zip(parameters, gradients, strict=True):
                total[name] -= gradient / max(1, steps)
    finally:
        for name, value in own.items():
            value.data.copy_(kept[name])
            value.requires_grad_(wanted[name])
    contributions = {name: (total[name] * change[name]).double() for name in total}

    def of_piece(piece: Piece) -> float:
        values = contributions[piece.name]
        if piece.indices is not None:
            values = values.index_select(piece.dim, piece.indices.to(values.device))
        return values.sum().item()

    return [sum(map(of_piece, some)) for some in of_span]


def fraction_to_reach(fractions: Sequence[float], values: Sequence[float], level: float) -> float:
    """The smallest fraction of spans at which a curve, straight between its points, reaches a level; else inf.

    Raises InputError for fractions that do not rise.
    """
    x, y = np.asarray(fractions, float), np.asarray(values, float)
    if len(x) != len(y) or not (np.diff(x) > 0).all():
        raise InputError(f"a curve needs a value for each of its fractions, which rise, but they are {x.tolist()}")
    reached = np.flatnonzero(y >= level)
    if not len(reached):
        return math.inf
    first = int(reached[0])
    if first == 0:
        return float(x[0])
    return float(x[first - 1] + (level - y[first - 1]) / (y[first] - y[first - 1]) * (x[first] - x[first - 1]))
