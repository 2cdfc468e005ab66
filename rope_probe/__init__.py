"""rope_probe: a mechanistic-interpretability toolkit for rotary position embeddings.

What it offers is imported when it is first asked for, since torch and transformers take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rope_probe import rope
    from rope_probe.corpora import KeyValueStream, TextCorpus
    from rope_probe.distillation import distill
    from rope_probe.errors import InputError
    from rope_probe.hooked import HookedCausalLM, load_model
    from rope_probe.packing import Batch, Window, pack, repeated_window
    from rope_probe.perturbations import DocumentOffset, PairFreeze, PositionJitter, PositionShift, ThetaSwap
    from rope_probe.propagation import copy_deltas, trace
    from rope_probe.retrieval import KeyValueTask, retrieval_accuracy
    from rope_probe.spans import Span, compare_spans, compare_states, span_effects, transplant_spans
    from rope_probe.tasks import TextTask

_MODULE_OF = {
    "Batch": "packing",
    "DocumentOffset": "perturbations",
    "HookedCausalLM": "hooked",
    "InputError": "errors",
    "KeyValueStream": "corpora",
    "KeyValueTask": "retrieval",
    "PairFreeze": "perturbations",
    "PositionJitter": "perturbations",
    "PositionShift": "perturbations",
    "Span": "spans",
    "TextCorpus": "corpora",
    "TextTask": "tasks",
    "ThetaSwap": "perturbations",
    "Window": "packing",
    "compare_spans": "spans",
    "compare_states": "spans",
    "copy_deltas": "propagation",
    "distill": "distillation",
    "load_model": "hooked",
    "pack": "packing",
    "repeated_window": "packing",
    "retrieval_accuracy": "retrieval",
    "span_effects": "spans",
    "trace": "propagation",
    "transplant_spans": "spans",
}

__all__ = [
    "Batch",
    "DocumentOffset",
    "HookedCausalLM",
    "InputError",
    "KeyValueStream",
    "KeyValueTask",
    "PairFreeze",
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
    "load_model",
    "pack",
    "repeated_window",
    "retrieval_accuracy",
    "rope",
    "span_effects",
    "trace",
    "transplant_spans",
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
