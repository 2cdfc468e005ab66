"""Terms of an objective, one file each; a term defined anywhere, by deriving from these classes, is known too."""

from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules

from rope_probe.distillation.terms.base import AnyKind, Counts, LogitTerm, StateTerm, Term, labels
from rope_probe.distillation.terms.chunks import Head, loss_in_chunks
from rope_probe.distillation.terms.cross_entropy import CrossEntropy
from rope_probe.distillation.terms.divergence import Divergence
from rope_probe.distillation.terms.hard_labels import HardLabels
from rope_probe.distillation.terms.hidden_states import HiddenStates

__all__ = [
    "AnyKind",
    "Counts",
    "CrossEntropy",
    "Divergence",
    "HardLabels",
    "Head",
    "HiddenStates",
    "LogitTerm",
    "StateTerm",
    "Term",
    "labels",
    "loss_in_chunks",
    "with_measured",
]

for _module in iter_modules(__path__):  # so that a new file is all that a new term takes
    import_module(f"{__name__}.{_module.name}")


def with_measured(terms: Sequence[Term], teacher: str | None) -> tuple[Term, ...]:
    """`terms`, and with weight 0 what measured records always tell: cross-entropy, and divergence from a teacher."""
    always = [CrossEntropy(0.0)] if teacher is None else [CrossEntropy(0.0), Divergence(0.0, teacher)]
    kinds = {term.kind for term in terms}
    return (*terms, *(term for term in always if term.kind not in kinds))
