"""Making checkpoints: phases of training, each with its own window and theta."""

from rope_probe.distillation.config import DistillConfig, read_config
from rope_probe.distillation.job import distill
from rope_probe.distillation.loop import Training, train_phase
from rope_probe.distillation.losses import Divergence, Head, HiddenMatch, Objective
from rope_probe.distillation.phase import Gate, GateError, Phase
from rope_probe.distillation.signal import distillation_signal

__all__ = [
    "DistillConfig",
    "Divergence",
    "Gate",
    "GateError",
    "Head",
    "HiddenMatch",
    "Objective",
    "Phase",
    "Training",
    "distill",
    "distillation_signal",
    "read_config",
    "train_phase",
]
