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
    interventions,
    lens,
    maps,
    massive,
    positional,
    propagation,
    retrieval,
    sensitivity,
    signal,
    spans,
    temperature,
    trade,
    training,
)
from rope_probe.gallery.figures.beyond import loss_by_position, window_by_distance
from rope_probe.gallery.figures.cost import trace_cost
from rope_probe.gallery.figures.drift import drift_by_layer
from rope_probe.gallery.figures.findings import Extremes, extremes, losses_by_position, losses_in_the_end
from rope_probe.gallery.figures.geometry import rotations_by_pair
from rope_probe.gallery.figures.grid import theta_grid
from rope_probe.gallery.figures.heads import head_map, head_pairs
from rope_probe.gallery.figures.interventions import passkey_by_intervention
from rope_probe.gallery.figures.layout import fitted
from rope_probe.gallery.figures.lens import lens_by_layer
from rope_probe.gallery.figures.maps import retrieval_map
from rope_probe.gallery.figures.massive import massive_map
from rope_probe.gallery.figures.positional import positional_shares
from rope_probe.gallery.figures.propagation import copy_heatmap, dose_response
from rope_probe.gallery.figures.retrieval import retrieval_by_distance, retrieval_by_task
from rope_probe.gallery.figures.sensitivity import (
    head_effects,
    injected_by_read,
    layer_effects,
    pair_effects,
    sensitivity_by_pair,
)
from rope_probe.gallery.figures.signal import signal_of_distillation
from rope_probe.gallery.figures.spans import causal_curves, change_by_part, span_heads, span_heatmap, transplants
from rope_probe.gallery.figures.static import save_figure, save_figures
from rope_probe.gallery.figures.style import themed
from rope_probe.gallery.figures.temperature import retrieval_by_temperature
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
    "fitted",
    "head_effects",
    "head_map",
    "head_pairs",
    "injected_by_read",
    "layer_effects",
    "lens_by_layer",
    "loss_by_position",
    "loss_curves",
    "massive_map",
    "pair_effects",
    "passkey_by_intervention",
    "positional_shares",
    "register",
    "retrieval_by_distance",
    "retrieval_by_task",
    "retrieval_by_temperature",
    "retrieval_map",
    "rotations_by_pair",
    "save_figure",
    "save_figures",
    "sensitivity_by_pair",
    "signal_of_distillation",
    "span_heads",
    "span_heatmap",
    "themed",
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

    `how_to_read` says in one or two sentences what a reader looks at and what it would mean. `finding` states what the
    figure shows, made of the rows that it draws: the text alternative for who does not see it.
    """

    name: str
    tables: tuple[str, ...]
    rows: Callable[[pd.DataFrame], pd.Series]
    draw: Callable[[pd.DataFrame, str], go.Figure]
    split: Callable[[pd.DataFrame], list[pd.Series]] = lambda rows: []
    context: Callable[[pd.DataFrame], pd.Series] = _nothing
    per_model: bool = False
    how_to_read: str = ""
    finding: Callable[[pd.DataFrame], str] = extremes


def _task(frame: pd.DataFrame) -> pd.Series:
    """The task that was measured, "" where all is key-value retrieval."""
    task = frame["task"].fillna("")
    return task if set(task) - {KEY_VALUE, ""} else task.mask(task == KEY_VALUE, "")


def _phase(frame: pd.DataFrame) -> pd.Series:
    """The phase after which something was measured, "" where that is the same throughout."""
    phase = frame["phase"].fillna("")
    return phase if phase.nunique() > 1 else phase.mask(phase != "", "")


def _perturbed(frame: pd.DataFrame) -> pd.Series:
    """What a model was perturbed by while it was measured, "" where by nothing."""
    return frame["perturbation"].fillna("")


def _kind(frame: pd.DataFrame) -> pd.Series:
    """What is dosed, "" for a shift."""
    return frame["kind"].mask(frame["kind"] == "PositionShift", "")


def _masked(frame: pd.DataFrame) -> pd.Series:
    """Whether documents were masked from each other, "" where they were not."""
    return frame["masked"].map({True: "masked"}, na_action="ignore").fillna("")


def _role(frame: pd.DataFrame) -> pd.Series:
    """The part that the model plays, "" where that is not told."""
    return frame["role"].fillna("")


DRAWINGS = [
    Drawing(
        "retrieval_by_distance",
        ("retrieval", "geometry"),
        retrieval.is_accuracy,
        retrieval_by_distance,
        lambda rows: [_task(rows), _phase(rows), _perturbed(rows), "window " + rows["seq_len"].astype("string")],
        retrieval.is_document_length,
        how_to_read=(
            "A line that stays high to the right finds what lies far back. Compare lines at the farthest distance, "
            "where the legend ranks them; intervals that overlap may not tell two models apart."
        ),
        finding=Extremes(("model", "distance"), {"accuracy": "accuracy"}),
    ),
    Drawing(
        "retrieval_by_task",
        ("retrieval",),
        retrieval.is_accuracy_of_task,
        retrieval_by_task,
        lambda rows: [_phase(rows), _perturbed(rows), "window " + rows["seq_len"].astype("string")],
        how_to_read=(
            "Each group is a task and each mark a model, higher is better. Intervals that overlap may not tell two "
            "models apart."
        ),
        finding=Extremes(("task", "model"), {"accuracy": "accuracy"}),
    ),
    Drawing(
        "retrieval_by_temperature",
        ("tempered_retrieval",),
        temperature.is_judged,
        retrieval_by_temperature,
        lambda rows: ["window " + rows["seq_len"].astype("string")],
        how_to_read=(
            "A line that rises to the right has a skill that flat attention hides. A student gains its highest point "
            "less the untrained base at 1. What the base gains by its own highest point is temperature's part of that."
        ),
        finding=Extremes(("model", "temperature", "distance"), {"accuracy": "accuracy"}),
    ),
    Drawing(
        "loss_by_position",
        ("beyond",),
        beyond.is_loss,
        loss_by_position,
        lambda rows: [rows["task"].fillna("")],
        per_model=True,
        how_to_read=(
            "Compare lines at one position: they read the same text. Where a line leaves the others upwards, that "
            "rotation no longer reads the text."
        ),
        finding=losses_by_position,
    ),
    Drawing(
        "window_by_distance",
        ("beyond",),
        beyond.is_asked,
        window_by_distance,
        lambda rows: [rows["task"].fillna("")],
        per_model=True,
        how_to_read=(
            "Each panel is a rotation and a temperature, rows are windows, columns distances. Bright cells find the "
            "needle. A row that is dark throughout says that the window is too long, a column that the distance is."
        ),
        finding=Extremes(("rotation", "temperature", "seq_len"), {"hit": "share of answers found"}),
    ),
    Drawing(
        "passkey_by_intervention",
        ("passkeys",),
        interventions.is_answer,
        passkey_by_intervention,
        lambda rows: ["window " + rows["seq_len"].astype("string")],
        per_model=True,
        how_to_read=(
            "Further right, the answer is likelier. Compare each line with the clean one. What loses most is needed "
            "most, but any layers that are silenced cost something: see what as many others cost."
        ),
        finding=Extremes(
            ("intervention",),
            {"answer_logprob_nats": "log-probability of the answer", "hit": "share of answers found"},
        ),
    ),
    Drawing(
        "retrieval_map",
        ("retrieval",),
        maps.is_map,
        retrieval_map,
        lambda rows: [_task(rows), _phase(rows), _perturbed(rows)],
        per_model=True,
        how_to_read=(
            "Columns are windows, rows distances. Along a row the distance stays and the window grows; along a column "
            "it is the other way around. So the two are told apart."
        ),
        finding=Extremes(("seq_len", "distance"), {"accuracy": "accuracy"}),
    ),
    Drawing(
        "trade_off",
        ("skills",),
        trade.is_skill,
        trade_off,
        lambda rows: [rows["arm"].fillna("")],
        how_to_read=(
            "Up is skill far away, right is skill in short text. The upper right corner has both; a model to the "
            "left of the original has paid with short text."
        ),
        finding=Extremes(
            ("model",), {"short_accuracy": "accuracy in the short window", "long_accuracy": "accuracy far away"}
        ),
    ),
    Drawing(
        "theta_grid",
        ("theta_grid",),
        grid.is_cell,
        theta_grid,
        context=grid.is_gate,
        how_to_read=(
            "Each cell is a pair of thetas, brighter retrieves better. Go along a row to see what another long "
            "theta does; the line marks where the base bound says that retrieval begins."
        ),
        finding=Extremes(("head_dim", "steps", "short_theta", "long_theta"), {"accuracy": "accuracy"}),
    ),
    Drawing(
        "rotations_by_pair",
        ("geometry",),
        geometry.is_rotations,
        rotations_by_pair,
        context=geometry.is_spectrum_use,
        how_to_read=(
            "Pairs above the line of one turn come around within the window; those below never do. The further right a"
            " curve crosses it, the more of the spectrum is used."
        ),
        finding=Extremes(("phase", "seq_len", "pair"), {"rotations": "number of turns over the window"}),
    ),
    Drawing(
        "loss_curves",
        ("losses",),
        training.is_loss,
        loss_curves,
        how_to_read=(
            "Lower is better. A curve that is still falling at its end was not trained to the end; thin lines are "
            "seeds."
        ),
        finding=losses_in_the_end,
    ),
    Drawing(
        "copy_heatmap",
        ("deltas",),
        propagation.is_copy,
        copy_heatmap,
        lambda rows: [rows["arm"], _masked(rows)],
        per_model=True,
        how_to_read=(
            "Each cell compares a later copy of the document with the first. A panel is a place in the model, with "
            "deeper layers further down. Brighter differs more; grey differs by rounding alone."
        ),
        finding=Extremes(("site", "document"), {"rel_l2": "relative change"}),
    ),
    Drawing(
        "dose_response",
        ("deltas",),
        propagation.is_dose,
        dose_response,
        lambda rows: [rows["arm"], _masked(rows), _kind(rows), rows["restriction"]],
        per_model=True,
        how_to_read=(
            "Further right is a larger move of position, higher is a larger change of the output. A flat curve has "
            "saturated. Moves that cancel leave rounding alone, which lies below the axis."
        ),
        finding=Extremes(("side", "delta_tokens", "radians"), {"kl_nats": "change of the output"}),
    ),
    Drawing(
        "layer_effects",
        ("deltas",),
        sensitivity.is_effect_of_layer,
        layer_effects,
        lambda rows: [_masked(rows)],
        per_model=True,
        how_to_read=(
            "Each point moves positions in one layer alone and measures the output. A high point is a layer that is "
            "sensitive to position; that it carries most of the effect does not follow."
        ),
        finding=Extremes(("inject_layer", "side"), {"kl_nats": "change of the output"}, largest_dose=True, share=True),
    ),
    Drawing(
        "head_effects",
        ("deltas",),
        sensitivity.is_effect_of_head,
        head_effects,
        lambda rows: [_masked(rows)],
        per_model=True,
        how_to_read=(
            "Each cell moves positions in one head alone. Bright cells are heads that are sensitive to position; the "
            "caption tells their share of the sum. The scale is logarithmic, so a step of colour is a factor."
        ),
        finding=Extremes(
            ("inject_layer", "head", "side"), {"kl_nats": "change of the output"}, largest_dose=True, share=True
        ),
    ),
    Drawing(
        "pair_effects",
        ("deltas",),
        sensitivity.is_effect_of_pair,
        pair_effects,
        lambda rows: [_masked(rows)],
        per_model=True,
        how_to_read=(
            "Each cell turns one rotary pair of one layer, all by the same angle. Bright cells are pairs that the "
            "layer uses; a column that is bright in few layers is used there alone. The scale is logarithmic."
        ),
        finding=Extremes(
            ("inject_layer", "pair", "wavelength", "side"), {"kl_nats": "change of the output"}, share=True
        ),
    ),
    Drawing(
        "head_map",
        ("heads",),
        heads.is_head_score,
        head_map,
        per_model=True,
        how_to_read=(
            "Each cell is a head, each panel a thing that heads attend to. A head that is bright in one panel "
            "alone does that one thing."
        ),
        finding=Extremes(("layer", "head"), heads.SCORES),
    ),
    Drawing(
        "head_pairs",
        ("head_pairs",),
        heads.is_contribution,
        head_pairs,
        per_model=True,
        how_to_read=(
            "Each line is a head, each column a rotary pair. Red pairs raise the score of what the head attends to, "
            "blue ones lower it. A head that looks by position lives on fast pairs, one that looks by content on slow "
            "ones."
        ),
        finding=Extremes(("layer", "head", "pair"), {heads.PAIR_METRIC: "contribution of a pair to the score"}),
    ),
    Drawing(
        "drift_by_layer",
        ("drift",),
        drift.is_drift,
        drift_by_layer,
        lambda rows: [_masked(rows)],
        how_to_read=(
            "Higher is further from the original model. A curve that climbs with depth adds drift layer by layer; "
            "a jump names the layer that adds most."
        ),
        finding=Extremes(("model", "layer"), drift.MEASURES),
    ),
    Drawing(
        "injected_by_read",
        ("deltas",),
        sensitivity.is_of_layer,
        injected_by_read,
        per_model=True,
        how_to_read=(
            "Rows are where positions are moved, columns where it is read. Nothing can be read before it is "
            "injected; a row that fades to the right is forgotten by later layers."
        ),
        finding=Extremes(("inject_layer", "head", "side"), {"rel_l2": "relative change"}, largest_dose=True),
    ),
    Drawing(
        "massive_map",
        ("massive_values",),
        massive.is_ratio,
        massive_map,
        lambda rows: [_masked(rows)],
        per_model=True,
        how_to_read=(
            "Each cell is a rotary pair of a layer, told as a multiple of the median pair of its head. Red pairs are "
            "longer than it, the deep red ones massive values; blue pairs are shorter."
        ),
        finding=Extremes(("states", "layer", "head", "pair"), {"ratio": "length over the median of the head"}),
    ),
    Drawing(
        "positional_shares",
        ("positional_parts",),
        positional.is_share,
        positional_shares,
        lambda rows: [rows["arm"].fillna(""), _role(rows), _masked(rows)],
        per_model=True,
        how_to_read=(
            "Shares of content, position and their interaction add up to one at every layer. Position says what a "
            "place does to every content alike."
        ),
        finding=Extremes(("site", "layer"), {"position_share": "share of position"}),
    ),
    Drawing(
        "lens_by_layer",
        ("deltas",),
        lens.is_of_lens,
        lens_by_layer,
        lambda rows: [_masked(rows)],
        per_model=True,
        how_to_read=(
            "Each row is a layer whose positions are moved; along it the model's own head reads every later layer. "
            "Where a row brightens, the change becomes one of the prediction."
        ),
        finding=Extremes(("inject_layer", "layer"), {"kl_nats": "change of what the lens reads"}, largest_dose=True),
    ),
    Drawing(
        "sensitivity_by_pair",
        ("deltas",),
        sensitivity.is_of_pair,
        sensitivity_by_pair,
        lambda rows: [_kind(rows)],
        per_model=True,
        how_to_read=(
            "Each point moves one rotary pair alone, fast pairs to the left. A high point is a wavelength that the "
            "output depends on; hollow points are rounding."
        ),
        finding=Extremes(
            ("pair", "wavelength", "side", "inject_layers"),
            {"kl_nats": "change of the output"},
            largest_dose=True,
            share=True,
        ),
    ),
    Drawing(
        "transplants",
        ("span_effects",),
        spans.is_transplant,
        transplants,
        per_model=True,
        how_to_read=(
            "Each bar puts a part of one checkpoint's weights into the other. A part that brings or destroys "
            "retrieval alone carries it."
        ),
        finding=Extremes(("into", "group"), {"accuracy": "accuracy"}),
    ),
    Drawing(
        "causal_curves",
        ("span_effects",),
        spans.is_curve,
        causal_curves,
        per_model=True,
        how_to_read=(
            "Spans are moved one after another in the order of a predictor. The earlier a curve leaves the start, "
            "the better that predictor foresees which spans matter."
        ),
        finding=Extremes(("order", "span_set"), {"accuracy": "accuracy"}),
    ),
    Drawing(
        "change_by_part",
        ("spans",),
        spans.is_change_of_part,
        change_by_part,
        per_model=True,
        how_to_read=(
            "Higher changed more between the two checkpoints. That a part changed much does not say that the "
            "change does anything; see the transplants."
        ),
        finding=Extremes(("site",), spans.CHANGES),
    ),
    Drawing(
        "span_heatmap",
        ("spans", "landmarks"),
        spans.is_change_of_pair,
        span_heatmap,
        context=spans.is_landmark,
        per_model=True,
        how_to_read=(
            "Each cell is a rotary pair of a layer, brighter changed more. Pairs right of a line make no full turn in "
            "the window."
        ),
        finding=Extremes(("site", "pair", "wavelength"), spans.CHANGES),
    ),
    Drawing(
        "span_heads",
        ("spans", "landmarks"),
        spans.is_change_of_pair,
        span_heads,
        context=spans.is_landmark,
        per_model=True,
        how_to_read=(
            "Each row is a head of a layer, each column a rotary pair, brighter changed more. Compare the rows of one "
            "layer: a change in few of them is specialised."
        ),
        finding=Extremes(("site", "head", "pair"), spans.CHANGES),
    ),
    Drawing(
        "signal_of_distillation",
        ("signal",),
        signal.is_signal,
        signal_of_distillation,
        how_to_read=(
            "Grey is how far the perturbation moves the teacher. Where a student's dotted line lies below its solid "
            "one, the perturbation takes some of its loss. The lower panels show what it takes from the gradients."
        ),
        finding=Extremes(
            ("model", "site"),
            {"loss_kl_nats": "loss against the teacher", "signal_kl_nats": "change of the teacher"},
        ),
    ),
    Drawing(
        "trace_cost",
        ("trace_cost",),
        cost.is_cost,
        trace_cost,
        per_model=True,
        how_to_read=("Points are measured, lines fitted. A line that is straight here grows as a power of the window."),
        finding=Extremes(("seq_len", "layers", "perturbations"), {"seconds": "time of a trace"}),
    ),
]
"""What the gallery draws, in order."""


def register(drawing: Drawing) -> None:
    """Have the gallery draw one more figure. Raises InputError for a name that another drawing has."""
    if drawing.name in {known.name for known in DRAWINGS}:
        raise InputError(f"there is a drawing {drawing.name!r} already; give this one another name")
    DRAWINGS.append(drawing)
