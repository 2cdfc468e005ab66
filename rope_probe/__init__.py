"""rope_probe: a mechanistic-interpretability toolkit for rotary position embeddings.

What it offers is imported when it is first asked for, since torch and transformers take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rope_probe import rope
    from rope_probe.distillation import distill
    from rope_probe.errors import InputError
    from rope_probe.models.hooked import HookedCausalLM, load_model
    from rope_probe.retrieval.export import lm_eval_results, ruler_lines, write_ruler
    from rope_probe.retrieval.heads import retrieval_head_scores
    from rope_probe.retrieval.maps import retrieval_map
    from rope_probe.retrieval.probe import KeyValueTask, retrieval_accuracy, retrieval_trials
    from rope_probe.retrieval.tasks import TextTask
    from rope_probe.spans import Span, compare_spans, compare_states, span_effects, transplant_spans
    from rope_probe.spans.drift import drift
    from rope_probe.tracing.heads import head_scores, pair_contributions
    from rope_probe.tracing.massive import massive_values
    from rope_probe.tracing.perturbations import (
        AttentionTemperature,
        DocumentOffset,
        PairFreeze,
        PairTurn,
        PositionJitter,
        PositionShift,
        ThetaSwap,
    )
    from rope_probe.tracing.positional import PlacedContents, positional_part, positional_parts
    from rope_probe.tracing.positional_transfer import positional_alignment, positional_patches, principal_directions
    from rope_probe.tracing.propagation import copy_deltas, trace
    from rope_probe.tracing.silence import silenced
    from rope_probe.windows.corpora import KeyValueStream, TextCorpus
    from rope_probe.windows.natural import text_window
    from rope_probe.windows.packing import Batch, Window, pack, repeated_window

_MODULE_OF = {
    "AttentionTemperature": "tracing.perturbations",
    "Batch": "windows.packing",
    "DocumentOffset": "tracing.perturbations",
    "HookedCausalLM": "models.hooked",
    "InputError": "errors",
    "KeyValueStream": "windows.corpora",
    "KeyValueTask": "retrieval.probe",
    "PairFreeze": "tracing.perturbations",
    "PairTurn": "tracing.perturbations",
    "PlacedContents": "tracing.positional",
    "PositionJitter": "tracing.perturbations",
    "PositionShift": "tracing.perturbations",
    "Span": "spans",
    "TextCorpus": "windows.corpora",
    "TextTask": "retrieval.tasks",
    "ThetaSwap": "tracing.perturbations",
    "Window": "windows.packing",
    "compare_spans": "spans",
    "compare_states": "spans",
    "copy_deltas": "tracing.propagation",
    "distill": "distillation",
    "drift": "spans.drift",
    "head_scores": "tracing.heads",
    "lm_eval_results": "retrieval.export",
    "load_model": "models.hooked",
    "massive_values": "tracing.massive",
    "pack": "windows.packing",
    "pair_contributions": "tracing.heads",
    "positional_alignment": "tracing.positional_transfer",
    "positional_part": "tracing.positional",
    "positional_parts": "tracing.positional",
    "positional_patches": "tracing.positional_transfer",
    "principal_directions": "tracing.positional_transfer",
    "repeated_window": "windows.packing",
    "retrieval_accuracy": "retrieval.probe",
    "retrieval_head_scores": "retrieval.heads",
    "retrieval_map": "retrieval.maps",
    "retrieval_trials": "retrieval.probe",
    "ruler_lines": "retrieval.export",
    "silenced": "tracing.silence",
    "span_effects": "spans",
    "text_window": "windows.natural",
    "trace": "tracing.propagation",
    "transplant_spans": "spans",
    "write_ruler": "retrieval.export",
}

__all__ = [
    "AttentionTemperature",
    "Batch",
    "DocumentOffset",
    "HookedCausalLM",
    "InputError",
    "KeyValueStream",
    "KeyValueTask",
    "PairFreeze",
    "PairTurn",
    "PlacedContents",
    "PositionJitter",
    "PositionShift",
    "Span",
    "TextCorpus",
    "TextTask",
    "ThetaSwap",
    "Window",
    "compare_spans",
    "compare_states",
    "copy_deltas",
    "distill",
    "drift",
    "head_scores",
    "lm_eval_results",
    "load_model",
    "massive_values",
    "pack",
    "pair_contributions",
    "positional_alignment",
    "positional_part",
    "positional_parts",
    "positional_patches",
    "principal_directions",
    "repeated_window",
    "retrieval_accuracy",
    "retrieval_head_scores",
    "retrieval_map",
    "retrieval_trials",
    "rope",
    "ruler_lines",
    "silenced",
    "span_effects",
    "text_window",
    "trace",
    "transplant_spans",
    "write_ruler",
]


def __getattr__(name: str) -> Any:
    if name == "rope":
        return import_module("rope_probe.rope")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'rope_probe' has no attribute {name!r}")
    value = getattr(import_module(f"rope_probe.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
