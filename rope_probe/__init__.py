"""rope_probe: a mechanistic-interpretability toolkit for rotary position embeddings."""

from rope_probe import rope
from rope_probe.corpora import KeyValueStream, TextCorpus
from rope_probe.errors import InputError
from rope_probe.hooked import HookedCausalLM, load_model
from rope_probe.packing import Batch, Window, pack, repeated_window
from rope_probe.perturbations import DocumentOffset, PairFreeze, PositionJitter, PositionShift, ThetaSwap
from rope_probe.propagation import copy_deltas, trace
from rope_probe.retrieval import KeyValueTask, retrieval_accuracy
from rope_probe.spans import Span, compare_spans, compare_states, transplant_spans
from rope_probe.tasks import TextTask

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
    "load_model",
    "pack",
    "repeated_window",
    "retrieval_accuracy",
    "rope",
    "trace",
    "transplant_spans",
]
