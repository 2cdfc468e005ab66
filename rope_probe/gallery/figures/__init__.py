"""Tidy frame in, plotly figure out. One function per figure; each says in its caption what n and the seeds were."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures import (
    beyond,
    cost,
    drift,
    geometry,
    grid,
    heads,
    propagation,
    retrieval,
    sensitivity,
    signal,
    spans,
    trade,
    training,
)
from rope_probe.gallery.figures.beyond import window_by_distance
from rope_probe.gallery.figures.cost import trace_cost
from rope_probe.gallery.figures.drift import drift_by_layer
from rope_probe.gallery.figures.geometry import rotations_by_pair
from rope_probe.gallery.figures.grid import theta_grid
from rope_probe.gallery.figures.heads import head_map
from rope_probe.gallery.figures.propagation import copy_heatmap, dose_response
from rope_probe.gallery.figures.retrieval import retrieval_by_distance, retrieval_by_task
from rope_probe.gallery.figures.sensitivity import (
    head_effects,
    injected_by_read,
    layer_effects,
    sensitivity_by_pair,
)
from rope_probe.gallery.figures.signal import signal_of_distillation
from rope_probe.gallery.figures.spans import causal_curves, change_by_part, span_heads, span_heatmap, transplants
from rope_probe.gallery.figures.trade import trade_off
from rope_probe.gallery.figures.training import loss_curves
from rope_probe.names import KEY_VALUE

__all__ = [
    "DRAWINGS",
    "Drawing",
    "causal_curves",
    "change_by_part",
    "copy_heatmap",
    "dose_response",
    "drift_by_layer",
    "head_effects",
    "head_map",
    "injected_by_read",
    "layer_effects",
    "loss_curves",
    "register",
    "retrieval_by_distance",
    "retrieval_by_task",
    "rotations_by_pair",
    "sensitivity_by_pair",
    "signal_of_distillation",
    "span_heads",
    "span_heatmap",
    "theta_grid",
    "trace_cost",
    "trade_off",
    "transplants",
    "window_by_distance",
]


def _nothing(frame: pd.DataFrame) -> pd.Series:
    return pd.Series(False, index=frame.index)


@dataclass(frozen=True)
class Drawing:
    """A figure by name: the tables it reads, which of their rows it draws, and how, given those and a label.

    `split` says what it is drawn once for, beside the experiment: rows with other values there get their own figure.
    `per_model` says that it is drawn for each model by itself; otherwise models are told apart within the figure.
    `context` are rows that a figure is given as well, those of the runs that it draws, and of its model where it is
    drawn per model; alone they draw nothing.
    """

    name: str
    tables: tuple[str, ...]
    rows: Callable[[pd.DataFrame], pd.Series]
    draw: Callable[[pd.DataFrame, str], go.Figure]
    split: Callable[[pd.DataFrame], list[pd.Series]] = lambda rows: []
    context: Callable[[pd.DataFrame], pd.Series] = _nothing
    per_model: bool = False


def _task(frame: pd.DataFrame) -> pd.Series:
    """The task that was measured, "" where all is key-value retrieval."""
    task = frame["task"].fillna("")
    return task if set(task) - {KEY_VALUE, ""} else task.mask(task == KEY_VALUE, "")


def _phase(frame: pd.DataFrame) -> pd.Series:
    """The phase after which something was measured, "" where that is the same throughout."""
    phase = frame["phase"].fillna("")
    return phase if phase.nunique() > 1 else phase.mask(phase != "", "")


def _kind(frame: pd.DataFrame) -> pd.Series:
    """What is dosed, "" for a shift."""
    return frame["kind"].mask(frame["kind"] == "PositionShift", "")


def _masked(frame: pd.DataFrame) -> pd.Series:
    """Whether documents were masked from each other, "" where they were not."""
    return frame["masked"].map({True: "masked"}, na_action="ignore").fillna("")


DRAWINGS = [
    Drawing(
        "retrieval_by_distance",
        ("retrieval", "geometry"),
        retrieval.is_accuracy,
        retrieval_by_distance,
        lambda rows: [_task(rows), _phase(rows), "window " + rows["seq_len"].astype("string")],
        retrieval.is_document_length,
    ),
    Drawing(
        "retrieval_by_task",
        ("retrieval",),
        retrieval.is_accuracy_of_task,
        retrieval_by_task,
        lambda rows: [_phase(rows), "window " + rows["seq_len"].astype("string")],
    ),
    Drawing("trade_off", ("skills",), trade.is_skill, trade_off, lambda rows: [rows["arm"].fillna("")]),
    Drawing(
        "window_by_distance",
        ("beyond",),
        beyond.is_asked,
        window_by_distance,
        lambda rows: [rows["task"].fillna("")],
        per_model=True,
    ),
    Drawing("theta_grid", ("theta_grid",), grid.is_cell, theta_grid, context=grid.is_gate),
    Drawing(
        "rotations_by_pair", ("geometry",), geometry.is_rotations, rotations_by_pair, context=geometry.is_spectrum_use
    ),
    Drawing("loss_curves", ("losses",), training.is_loss, loss_curves),
    Drawing(
        "copy_heatmap",
        ("deltas",),
        propagation.is_copy,
        copy_heatmap,
        lambda rows: [rows["arm"], _masked(rows)],
        per_model=True,
    ),
    Drawing(
        "dose_response",
        ("deltas",),
        propagation.is_dose,
        dose_response,
        lambda rows: [rows["arm"], _masked(rows), _kind(rows), rows["restriction"]],
        per_model=True,
    ),
    Drawing(
        "layer_effects",
        ("deltas",),
        sensitivity.is_effect_of_layer,
        layer_effects,
        lambda rows: [_masked(rows)],
        per_model=True,
    ),
    Drawing(
        "head_effects",
        ("deltas",),
        sensitivity.is_effect_of_head,
        head_effects,
        lambda rows: [_masked(rows)],
        per_model=True,
    ),
    Drawing("head_map", ("heads",), heads.is_head_score, head_map, per_model=True),
    Drawing("drift_by_layer", ("drift",), drift.is_drift, drift_by_layer, lambda rows: [_masked(rows)]),
    Drawing("injected_by_read", ("deltas",), sensitivity.is_of_layer, injected_by_read, per_model=True),
    Drawing(
        "sensitivity_by_pair",
        ("deltas",),
        sensitivity.is_of_pair,
        sensitivity_by_pair,
        lambda rows: [_kind(rows)],
        per_model=True,
    ),
    Drawing("transplants", ("span_effects",), spans.is_transplant, transplants, per_model=True),
    Drawing("causal_curves", ("span_effects",), spans.is_curve, causal_curves, per_model=True),
    Drawing("change_by_part", ("spans",), spans.is_change_of_part, change_by_part, per_model=True),
    Drawing(
        "span_heatmap",
        ("spans", "landmarks"),
        spans.is_change_of_pair,
        span_heatmap,
        context=spans.is_landmark,
        per_model=True,
    ),
    Drawing(
        "span_heads",
        ("spans", "landmarks"),
        spans.is_change_of_pair,
        span_heads,
        context=spans.is_landmark,
        per_model=True,
    ),
    Drawing("signal_of_distillation", ("signal",), signal.is_signal, signal_of_distillation),
    Drawing("trace_cost", ("trace_cost",), cost.is_cost, trace_cost, per_model=True),
]
"""What the gallery draws, in order."""


def register(drawing: Drawing) -> None:
    """Have the gallery draw one more figure. Raises InputError for a name that another drawing has."""
    if drawing.name in {known.name for known in DRAWINGS}:
        raise InputError(f"there is a drawing {drawing.name!r} already; give this one another name")
    DRAWINGS.append(drawing)
