"""Making checkpoints: phases of training, each with its own window and theta."""

from rope_probe.distillation.config import DistillConfig, read_config
from rope_probe.distillation.job import distill
from rope_probe.distillation.loop import Training, train_phase
from rope_probe.distillation.phase import Gate, GateError, Phase
from rope_probe.distillation.signal import distillation_signal
from rope_probe.distillation.streams import Stream
from rope_probe.distillation.terms import (
    CrossEntropy,
    Divergence,
    HardLabels,
    Head,
    HiddenStates,
    LogitTerm,
    StateTerm,
    Term,
)

__all__ = [
    "CrossEntropy",
    "DistillConfig",
    "Divergence",
    "Gate",
    "GateError",
    "HardLabels",
    "Head",
    "HiddenStates",
    "LogitTerm",
    "Phase",
    "StateTerm",
    "Stream",
    "Term",
    "Training",
    "distill",
    "distillation_signal",
    "read_config",
    "train_phase",
]
