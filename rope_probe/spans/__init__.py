"""What changed between two checkpoints, span by span, and which of the changes cause what the second can do."""

from rope_probe.spans.causal import fraction_to_reach, gradient_times_change, query_spans, span_effects
from rope_probe.spans.parts import Span, spans_of, whole
from rope_probe.spans.states import compare_states
from rope_probe.spans.statistics import contrast, enrichment, gini, landmarks, span_statistics, stability, top_share
from rope_probe.spans.transplant import transplant_spans, transplanted
from rope_probe.spans.weights import compare_spans

__all__ = [
    "Span",
    "compare_spans",
    "compare_states",
    "contrast",
    "enrichment",
    "fraction_to_reach",
    "gini",
    "gradient_times_change",
    "landmarks",
    "query_spans",
    "span_effects",
    "span_statistics",
    "spans_of",
    "stability",
    "top_share",
    "transplant_spans",
    "transplanted",
    "whole",
]
