"""Making checkpoints: phases of training, each with its own window and theta."""

from rope_probe.distillation.loop import train_phase
from rope_probe.distillation.losses import Divergence, Head, Objective
from rope_probe.distillation.phase import Gate, GateError, Phase

__all__ = ["Divergence", "Gate", "GateError", "Head", "Objective", "Phase", "train_phase"]
