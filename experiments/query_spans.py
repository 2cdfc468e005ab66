"""Query spans: which weights of a base its extension changes, and which of these changes cause the new retrieval.

A base at theta 300 (window 64) and what an arm of experiments.phase_scaling made of it (theta 20,000, window 1,024) are
compared span by span: W_Q by layer, head and rotary pair, beside W_K, W_V, W_O, the MLP, norms and embeddings. Then
spans are transplanted between the *start* of the extension (the base's weights at theta 20,000) and its *end*: into the
start, to see what suffices; from the start into the end, to see what is necessary. The *gain* is accuracy at the end
less accuracy at the start, the mean over 128, 256, 512 and 1,000 tokens. What is selected, an order of
spans or a head, is selected on trials of its own, and judged on others.

    python -m experiments.query_spans kd_adamw 0 runs/query_spans/kd_adamw-0 --checkpoints runs
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor

from experiments import phase_scaling
from experiments.propagation import packed_documents
from experiments.query_span_verdicts import (
    ALONE,
    BY_EFFECT,
    CAUSAL,
    CURVE,
    END,
    GREEDY,
    GROUPS,
    KEPT,
    PREDICTORS,
    RANDOM,
    SELECTION,
    SPAN_PREDICTORS,
    START,
    TOGETHER,
    TOGETHER_ALONE,
    WITH_KEYS,
    judged,
    shown,
)
from experiments.stages import Options, Stage
from experiments.toy_checkpoints import LONG, SHORT, SHORT_DOCUMENTS, CheckpointsIn
from rope_probe import HookedCausalLM, KeyValueTask, load_model, retrieval_accuracy, rope
from rope_probe.errors import InputError
from rope_probe.models import checkpoints
from rope_probe.models.architectures import heads_of
from rope_probe.runs.progress import progress
from rope_probe.runs.results import new_run, read_manifest
from rope_probe.runs.tables import Tables
from rope_probe.runs.verdicts import Section
from rope_probe.seeds import derive
from rope_probe.spans import (
    Span,
    compare_spans,
    compare_states,
    gradient_times_change,
    landmarks,
    query_spans,
    span_effects,
    span_statistics,
    transplanted,
)
from rope_probe.spans.causal import SPAN_EFFECTS
from rope_probe.spans.states import SPAN_STATES
from rope_probe.spans.statistics import BANDS, LANDMARKS, SPAN_STATISTICS, bands
from rope_probe.spans.weights import SPANS

QUESTION = "Which query spans does extension change, and which of these changes cause the new retrieval?"
PREDICTIONS = {
    1: "By AdamW, KD changes W_Q relatively more than W_V, W_O and the MLP, in the mean over layers, and about "
    "as much as W_K (ratio .8 to 1.25).",
    2: "By Muon, which gives every direction of every matrix the same step, all these ratios lie within .8 to 1.25.",
    3: "The pairs of W_Q that turned within the short window before and no longer do after (wavelength 64 or "
    "less before, more after) change more than the others, in both layers (ratio above 1, p < .05): they are "
    "what the swap of theta takes away.",
    4: "In layer 0 the turn of a pair's attention scores makes up for the swap: over pairs it goes with the "
    "pair's change of frequency (Spearman's correlation, heads' mean, above .5), as a head that looks one "
    "token back would need.",
    5: "W_Q changes at least twice as much as by as many steps of more short training (AdamW both).",
    6: "W_Q changes about as much by CE as by KD (ratio within 1/1.5 to 1.5, AdamW both), though CE brings no "
    "retrieval: how much a span changes does not say what the change is for.",
    7: "Into the start, W_Q alone brings less than .1 of the gain; W_Q, W_K, W_V and W_O together .5 or more.",
    8: "In the end, reverting W_Q leaves less than .1 of the gain, reverting the MLP more than .5.",
    9: "Of what the end's W_Q does in the end, a quarter of the query spans or less, in the order of their "
    "single effects, carries half, and half of them 90%; spans in random order need more than twice as many "
    "for half.",
    10: "Reverting all fast pairs of W_Q (wavelength 64 or less) costs more than reverting all slow ones (above "
    "1,024).",
    11: "Gradient times change foresees which single spans matter (Spearman's correlation .5 or more), and better "
    "than the size of the change of weights or of query states.",
    12: "With W_Q reverted in the end, retrieval in the short window is below .5 too: it is one circuit.",
    13: "Brought into the start after W_K, query spans in the order of gradients along the path carry half of the "
    "gain by a smaller fraction than by any other predictor, the mean over seeds.",
}
"""Written before the first run of this script. While compare_spans was tried out, the weights of seed 0 of `kd_adamw`
had been seen by part and by pair, which favours 1; none of the rest had. After seeds 0 and 1 of `kd_adamw` it was plain
that the order of single effects, and gradient times change with it, is no order of causes. Gradients along the path
were added as a predictor then, with prediction 13 of their own."""
FIGURES = {
    1: ("change_by_part",),
    2: ("change_by_part",),
    3: ("span_heatmap",),
    4: ("span_heads",),
    5: ("change_by_part",),
    6: ("change_by_part",),
    7: ("transplants",),
    8: ("transplants",),
    9: ("causal_curves",),
    10: ("transplants",),
    11: ("causal_curves",),
    13: ("causal_curves",),
}
"""The drawings that show what a prediction is about, by its number."""

QUICK_ARMS = ("kd_phase_wise", "ce_phase_wise")
ARMS = tuple(arm for arm, made in phase_scaling.ARMS.items() if made.objective is not None)
DISTANCES = (128, 256, 512, 1000)
SHORT_DISTANCES = (8, 32)
PARTS = ("W_Q", "W_K", "W_V", "W_O", "mlp", "norms", "W_E", "W_U")
Purpose = Literal["transplants", "ranking", "selection"]
Measure = Callable[[HookedCausalLM], pd.DataFrame]


@dataclass(frozen=True)
class Budget:
    """How much is measured: trials a distance, to judge and to rank by; random orders; sizes; picks of the greedy."""

    trials: int = 32
    ranking_trials: int = 16
    orders: int = 6
    sizes: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 24, 32, 48, 64)
    greedy: int = 12
    greedy_trials: int = 8
    path: int = 8


THOROUGH = Budget()
QUICK = Budget(trials=8, ranking_trials=2, orders=1, sizes=(0, 4, 16, 64), greedy=0, path=4)


def stages(options: Options) -> dict[str, Stage]:
    """Every arm that trains, or the quick ones, of each seed."""
    planned = {}
    for seed in range(options.seeds):
        for arm in ARMS if options.full else QUICK_ARMS:
            run = options.out / "query_spans" / f"{arm}-{seed}"
            quick = () if options.full else ("--quick",)
            command = ("query_spans", arm, str(seed), str(run), "--checkpoints", str(options.out), *quick)
            planned[f"query_spans/{run.name}"] = Stage(
                command,
                run,
                partial(config_of, arm, seed, options.out, quick=not options.full),
                (f"{phase_scaling.ARMS[arm].base}-{seed}", f"phase_scaling/{arm}-{seed}"),
                seconds=15.0 if arm not in CAUSAL else 600.0 if options.full else 90.0,
            )
    return planned


def report(results: Mapping[str, Tables]) -> Section:
    """Tables and verdicts; see experiments/query_span_verdicts.py."""
    mine = results["query_spans"]
    return Section(judged(mine), shown(mine))


def measure(
    name: str,
    seed: int,
    out: Path,
    checkpoints_in: CheckpointsIn = Path("runs"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer trials, random orders and sizes.")] = False,
) -> None:
    """Compare one arm's end with its base into the run directory `out`; transplant spans where it is one of CAUSAL."""
    if name not in ARMS:
        raise InputError(f"arm {name!r} is unknown; known are {', '.join(ARMS)}")
    torch.set_num_threads(1)
    base = checkpoints_in / f"{phase_scaling.ARMS[name].base}-{seed}" / "checkpoint"
    after = checkpoints_in / "phase_scaling" / f"{name}-{seed}" / "checkpoint"
    budget = QUICK if quick else THOROUGH
    with new_run(out, "query_spans", config_of(name, seed, checkpoints_in, quick=quick), overwrite=True) as run:
        weights = run.record(SPANS, compare_spans(base, after), model=name, seed=seed)
        run.record(SPAN_STATISTICS, span_statistics(weights, short=SHORT, long=LONG), model=name, seed=seed)
        end = load_model(after)
        plain = checkpoints.load(base)
        start = load_model(checkpoints.with_rope(plain, phase_scaling.ARMS[name].theta))
        geometry = landmarks(plain, end.original_model, short=SHORT, long=LONG)
        run.record(LANDMARKS, geometry, model=name, seed=seed)
        windows = [packed_documents(derive(seed, f"states {i}")) for i in range(4)]
        states = run.record(SPAN_STATES, compare_states(start, end, windows), model=name, seed=seed)
        for window in windows:
            run.provenance.add_tokens("states", window)
        if name in CAUSAL:
            effects, predictors = _causes(start, end, weights, states, seed, budget, f"{name} {seed}")
            run.record(SPAN_EFFECTS, effects, model=name, seed=seed)
            run.record(SPAN_PREDICTORS, predictors, model=name, seed=seed)
        for model_name, model in ((START, start), (END, end)):
            run.provenance.add_model(model_name, model)


def config_of(name: str, seed: int, checkpoints_in: Path, *, quick: bool) -> dict:
    """The whole configuration, as the manifest holds it: the checkpoints by their weights."""
    budget = dataclasses.asdict(QUICK if quick else THOROUGH) if name in CAUSAL else None
    sources = [
        checkpoints_in / f"{phase_scaling.ARMS[name].base}-{seed}",
        checkpoints_in / f"phase_scaling/{name}-{seed}",
    ]
    weights = [model["weights_sha256"] for run in sources for model in read_manifest(run)["models"].values()]
    return {"arm": name, "seed": seed, "budget": budget, "distances": DISTANCES, "weights_sha256": weights}


def _causes(
    start: HookedCausalLM,
    end: HookedCausalLM,
    weights: pd.DataFrame,
    states: pd.DataFrame,
    seed: int,
    budget: Budget,
    what: str,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Everything that is found by transplanting spans, and what might have foreseen it."""
    judge = partial(_retrieval, trials=budget.trials, seed=trials_seed(seed, "transplants"))
    rank = partial(_retrieval, trials=budget.ranking_trials, seed=trials_seed(seed, "ranking"), short=False)
    select = partial(_retrieval, trials=budget.trials, seed=trials_seed(seed, "selection"), short=False)
    spans = query_spans(end.original_model)
    groups = {"nothing": [], **_groups(end)}
    heads = {name: group for name, group in groups.items() if name in head_groups(end)}
    with progress(f"transplants, {what}", _evaluations(budget, len(spans), len(groups), len(heads))) as advance:
        effects = partial(span_effects, progress=advance)
        frames = [
            effects(start, end.original_model, groups, judge).assign(arm=GROUPS, into=START),
            effects(end, start.original_model, groups, judge).assign(arm=GROUPS, into=END),
            effects(end, start.original_model, heads, select).assign(arm=SELECTION, into=END, span_set=SELECTION),
        ]
        alone = {str(span): [span] for span in spans}
        both = {f"{span} and key": _with_key(span) for span in spans}
        single = effects(end, start.original_model, alone, rank)
        paired = effects(end, start.original_model, both, rank)
        frames += [
            _placed(single, alone).assign(arm=ALONE, into=END),
            _placed(paired, both).assign(arm=TOGETHER_ALONE, into=END),
        ]
        predictors = _predictors(start, end, spans, weights, states, budget, seed)
        orders = {BY_EFFECT: _ranked(spans, [-_logprob(single, name) for name in alone])}
        orders_together = {BY_EFFECT: _ranked(spans, [-_logprob(paired, name) for name in both])}
        orders |= {by: _ranked(spans, predictors[metric]) for by, metric in PREDICTORS.items()}
        keys = [Span(part="W_K")]
        if budget.greedy:
            pick = partial(_greedy, start, end, spans, budget, seed, advance)
            orders[GREEDY] = pick(keys, lambda span: [span])
            orders_together[GREEDY] = pick([], _with_key)
            for metric, order in (("greedy_rank", orders[GREEDY]), ("greedy_rank_together", orders_together[GREEDY])):
                predictors[metric] = [order.index(span) for span in spans]
        foreseen = [
            {"layer": span.layer, "head": span.head, "pair": span.pair, "metric": metric, "value": value}
            for metric, values in predictors.items()
            for span, value in zip(spans, values, strict=True)
        ]
        shuffled = np.random.default_rng(derive(seed, "random orders"))
        random: dict[tuple[str, int | None], list[Span]] = {}
        for number in range(budget.orders):
            random[RANDOM, number] = [spans[j] for j in shuffled.permutation(len(spans))]

        def measured(
            host: HookedCausalLM, donor: HookedCausalLM, sets: Iterable[list[Span]], **columns: Any
        ) -> pd.DataFrame:
            """What is found after transplanting each of the sets, the first of which moves `sizes[0]` query spans."""
            moved = {str(n): n for n in budget.sizes}
            by_size = dict(zip(moved, sets, strict=True))
            frame = effects(host, donor.original_model, by_size, judge)
            return frame.assign(arm=CURVE, moved=frame["group"].map(moved), movable=len(spans), **columns)

        def drawn(named: Mapping[str, list[Span]]) -> dict[tuple[str, int | None], list[Span]]:
            return {**{(by, None): order for by, order in named.items()}, **random}

        for (by, draw), order in drawn({BY_EFFECT: orders[BY_EFFECT]}).items():
            sets = [order[n:] for n in budget.sizes]
            frames.append(measured(end, start, sets, into=END, span_set=KEPT, order=by, draw=draw))
        for (by, draw), order in drawn(orders).items():
            sets = [keys + order[:n] for n in budget.sizes]
            frames.append(measured(start, end, sets, into=START, span_set=WITH_KEYS, order=by, draw=draw))
        for (by, draw), order in drawn(orders_together).items():
            sets = [[one for span in order[:n] for one in _with_key(span)] for n in budget.sizes]
            frames.append(measured(start, end, sets, into=START, span_set=TOGETHER, order=by, draw=draw))
    measured_all = pd.concat(frames, ignore_index=True).drop(columns=["phase", "role", "tokens", "perturbation"])
    return SPAN_EFFECTS.frame(measured_all), SPAN_PREDICTORS.frame(foreseen)


def trials_seed(seed: int, purpose: Purpose) -> int:
    """The seed of the trials that judge, of those that rank spans, or of those that select a head; all differ."""
    return derive(seed, purpose)


def head_groups(model: HookedCausalLM) -> list[str]:
    """The groups that are a head's queries and keys, by name."""
    heads = heads_of(model.config).query
    return [f"W_Q, W_K, layer {layer} head {head}" for layer in range(len(model.blocks)) for head in range(heads)]


def _groups(model: HookedCausalLM) -> dict[str, list[Span]]:
    """What is transplanted as one: parts, and layers, heads and bands of pairs of W_Q, and of W_Q with W_K."""
    groups = {part: [Span(part=part)] for part in PARTS}  # type: ignore[arg-type]
    attention = [Span(part=part) for part in ("W_Q", "W_K", "W_V", "W_O")]
    groups |= {"W_Q, W_K": attention[:2], "W_V, W_O": attention[2:], "W_Q, W_K, W_V, W_O": attention}
    groups["all but W_Q, W_K"] = [Span(part=part) for part in PARTS[2:]]  # type: ignore[arg-type]
    groups["everything"] = [Span(part=part) for part in PARTS]  # type: ignore[arg-type]
    layers, heads = len(model.blocks), heads_of(model.config).query
    within = {f"layer {layer}": [Span(layer)] for layer in range(layers)}
    within |= {f"layer {layer} head {head}": [Span(layer, head)] for layer in range(layers) for head in range(heads)}
    within |= {f"{band} pairs": [Span(pair=pair) for pair in pairs] for band, pairs in _bands(model).items()}
    for where, spans in within.items():
        groups[f"W_Q, {where}"] = spans
        groups[f"W_Q, W_K, {where}"] = [one for span in spans for one in _with_key(span)]
    return groups


def _with_key(span: Span) -> list[Span]:
    """A span of W_Q and that of W_K which it is matched with; the toy models have a key head for each query head."""
    return [span, span._replace(part="W_K")]


def _bands(model: HookedCausalLM) -> dict[str, list[int]]:
    """Pairs by their wavelength: a turn in the short window, in the long one, in neither."""
    rotary = model.rotary[0]
    assert rotary is not None
    of_pair = bands(rope.wavelengths(rotary.inv_freq), SHORT, LONG)
    return {band: np.flatnonzero(of_pair == band).tolist() for band in BANDS}


def _retrieval(model: HookedCausalLM, *, trials: int, seed: int, short: bool = True) -> pd.DataFrame:
    probes = [(LONG, DISTANCES), (SHORT, SHORT_DISTANCES)][: 2 if short else 1]
    return pd.concat(
        retrieval_accuracy(model, KeyValueTask(SHORT_DOCUMENTS, window), distances, trials=trials, seed=seed)
        for window, distances in probes
    )


def _logprob(frame: pd.DataFrame, group: str) -> float:
    rows = frame[(frame["group"] == group) & (frame["metric"] == "answer_logprob_nats")]
    return float(rows["value"].mean())


def _placed(frame: pd.DataFrame, groups: Mapping[str, Sequence[Span]]) -> pd.DataFrame:
    """Layer, head and pair of the group's span beside its name."""
    places = {name: group[0] for name, group in groups.items()}
    columns = ("layer", "head", "pair")
    return frame.assign(**{column: [places[name][i] for name in frame["group"]] for i, column in enumerate(columns)})


def _ranked(spans: Sequence[Span], values: Sequence[float]) -> list[Span]:
    """Spans, that of the largest value first."""
    return [spans[i] for i in np.argsort(np.negative(values), kind="stable")]


def _predictors(
    start: HookedCausalLM,
    end: HookedCausalLM,
    spans: Sequence[Span],
    weights: pd.DataFrame,
    states: pd.DataFrame,
    budget: Budget,
    seed: int,
) -> dict[str, list[float]]:
    """What might foresee which spans matter, for far less than a transplant each."""
    loss = answer_loss(budget.ranking_trials, seed)
    queries = weights[weights["site"].str.endswith("W_Q") & (weights["metric"] == "change_norm")]
    of_weights = queries.set_index(["layer", "head", "pair"])["value"]
    read = states[states["site"].str.endswith("_q")]
    table = read.pivot_table(index=["layer", "head", "pair"], columns="metric", values="value")
    of_states = table["change_norm"]
    reverting = gradient_times_change(end, start.original_model, spans, loss)
    return {
        "change_norm": [of_weights[span[:3]] for span in spans],
        "state_change": [of_states[span[:3]] for span in spans],
        "gradient_times_change": [-lowered for lowered in reverting],
        "path_gradients": gradient_times_change(start, end.original_model, spans, loss, steps=budget.path),
    }


def answer_loss(trials: int, seed: int) -> Callable[[HookedCausalLM], Tensor]:
    """A function that gives a model's cross-entropy with the answer, in nats, the mean over trials and distances."""

    def loss(model: HookedCausalLM) -> Tensor:
        task = KeyValueTask(SHORT_DOCUMENTS, LONG)
        tokens = torch.cat([task.trials(d, trials, seed=derive(seed, "gradient")) for d in DISTANCES])
        logits = model.unembed(model.hidden(tokens[:, :-1])[:, -1:])[:, 0]
        return torch.nn.functional.cross_entropy(logits, tokens[:, -1])

    return loss


def _evaluations(budget: Budget, spans: int, groups: int, heads: int) -> int:
    """How many transplants are measured."""
    picks = sum(spans - done for done in range(budget.greedy))
    curves = 3 * (1 + budget.orders) + len(PREDICTORS) + 2 * (budget.greedy > 0)
    return 2 * groups + heads + 2 * spans + 2 * picks + curves * len(budget.sizes)


def _greedy(
    start: HookedCausalLM,
    end: HookedCausalLM,
    spans: Sequence[Span],
    budget: Budget,
    seed: int,
    advance: Callable[[int], object],
    first: list[Span],
    brings: Callable[[Span], list[Span]],
) -> list[Span]:
    """An order in which each span brought into the start helps the answer's log-probability most, given those before.

    `first` is brought along from the beginning. After the budget's picks, the rest come as they last stood.
    """
    task = KeyValueTask(SHORT_DOCUMENTS, LONG)
    chosen: list[Span] = []
    left = list(spans)
    for pick in range(budget.greedy):
        probe = partial(retrieval_accuracy, trials=budget.greedy_trials, seed=derive(seed, f"greedy {pick}"))
        values = []
        for span in left:
            brought = [one for each in [*chosen, span] for one in brings(each)]
            with transplanted(start, end.original_model, first + brought):
                frame = probe(start, task, DISTANCES[1:3])
            values.append(float(frame[frame["metric"] == "answer_logprob_nats"]["value"].mean()))
            advance(1)
        left = _ranked(left, values)
        chosen.append(left.pop(0))
    return chosen + left


if __name__ == "__main__":
    try:
        typer.run(measure)
    except InputError as error:
        sys.exit(f"error: {error}")
