"""What changed between two checkpoints, span by span, and which of the changes cause what the second can do."""

from rope_probe.spans.parts import Span, whole
from rope_probe.spans.states import compare_states
from rope_probe.spans.transplant import transplant_spans, transplanted
from rope_probe.spans.weights import compare_spans

__all__ = ["Span", "compare_spans", "compare_states", "transplant_spans", "transplanted", "whole"]
