"""Rivals of the causal spans: does one number on a head's queries do what the head's transplanted weights do?

`query_spans` finds one first-layer head whose queries and keys bring most of what KD gains. Attention that is too flat
in a longer window would look the same, so here stand beside it

    scaled        the start of the extension with that head's queries multiplied by one number, and nothing transplanted
    all scaled    the same with the queries of all heads
    chosen spans  as many query spans as are of use by gradients along the path, with all of W_K
    random spans  as many spans drawn at random, with all of W_K

and what that head attends to in all of these. Head, numbers and spans are chosen on other trials than they are judged
on. The gain is accuracy at the end less accuracy at the start, mean over 128, 256, 512 and 1,000 tokens.

    python -m experiments.rival_spans kd_adamw 0 runs/rival_spans/kd_adamw-0 --checkpoints runs
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import typer

from experiments import phase_scaling
from experiments.propagation import packed_documents
from experiments.query_span_verdicts import CAUSAL
from experiments.query_spans import DISTANCES, answer_loss, trials_seed
from experiments.stages import Options, Stage
from experiments.toy_checkpoints import LONG, SHORT_DOCUMENTS, CheckpointsIn
from rope_probe import (
    AttentionTemperature,
    HookedCausalLM,
    KeyValueTask,
    Span,
    head_scores,
    load_model,
    retrieval_accuracy,
)
from rope_probe.errors import InputError
from rope_probe.models import checkpoints
from rope_probe.models.architectures import heads_of
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.intervals import share_difference_interval, student_interval
from rope_probe.runs.results import new_run, read_manifest
from rope_probe.runs.tables import Column, Tables, declare
from rope_probe.runs.verdicts import Section, decided, decided_or_met, verdict, verdicts
from rope_probe.seeds import derive
from rope_probe.spans import gradient_times_change, query_spans
from rope_probe.spans.transplant import transplanted
from rope_probe.tracing.heads import HEADS

QUESTION = "Does one number on a head's queries do what its transplanted weights do?"
PREDICTIONS = {
    1: "A number on the causal head's queries brings the start as much of the gain as the head's own weights do, "
    "within .15.",
    2: "A number on all queries brings more than the head's weights do, by .05 or more.",
    3: "In the start the head looks at the token before it, but not sharply: less than half of its attention in the "
    "end goes there. The number brings it to within .15 of what it is in the end.",
    4: "Spans chosen by gradients along the path bring more than as many random ones, by .10 or more.",
}
"""Written before the first run."""

FACTORS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
TRIALS, SELECTION_TRIALS, PATH_TRIALS, PATH_POINTS = 32, 32, 16, 8
CHOSEN, DRAWS = 8, 6
"""Query spans brought along with W_K, and draws of as many random ones."""
START, END, SPANS, SCALED, ALL_SCALED = "start", "end", "head's weights", "scaled", "all scaled"
REVERTED, BY_PATH, RANDOM = "end without the head", "chosen spans", "random spans"
SCORES = ("previous_token", "induction", "sink")

RIVAL_SPANS = declare(
    "rival_spans",
    "What the start of an extension finds, and where its causal head looks, with weights of the end or scaled queries.",
    ("state", "factor", "draw", "layer", "head", "task", "seq_len", "distance", "trials", "low", "high"),
    {
        **{name: RETRIEVAL.metrics[name] for name in ("accuracy", "answer_logprob_nats")},
        **{name: HEADS.metrics[name] for name in SCORES},
    },
    own={
        "state": Column("string", "the start or the end of the extension, and what is changed in it"),
        "draw": Column("Int64", "which draw of random spans"),
        "task": RETRIEVAL.columns["task"],
        "trials": RETRIEVAL.columns["trials"],
    },
)
Head = tuple[int, int]


def measure(name: str, seed: int, out: Path, checkpoints_in: CheckpointsIn = Path("runs")) -> None:
    """Measure one arm of query_spans whose causes were looked for, into the run directory `out`."""
    if name not in CAUSAL:
        raise InputError(f"arm {name!r} is unknown; known are {', '.join(CAUSAL)}")
    torch.set_num_threads(1)
    with new_run(out, "rival_spans", config_of(name, seed, checkpoints_in), overwrite=True) as made:
        end = load_model(checkpoints_in / "phase_scaling" / f"{name}-{seed}" / "checkpoint")
        plain = checkpoints.load(checkpoints_in / f"{phase_scaling.ARMS[name].base}-{seed}" / "checkpoint")
        start = load_model(checkpoints.with_rope(plain, phase_scaling.ARMS[name].theta))
        frame = rivals_of(start, end, seed)
        made.record(RIVAL_SPANS, frame, model=name, seed=seed)
        for model_name, model in ((START, start), (END, end)):
            made.provenance.add_model(model_name, model)
    accuracy = frame[frame["metric"] == "accuracy"].groupby("state")["value"].mean()
    print(name, seed, accuracy.round(2).to_dict(), file=sys.stderr)


def rivals_of(start: HookedCausalLM, end: HookedCausalLM, seed: int) -> pd.DataFrame:
    """Rows of RIVAL_SPANS but their model. Neither model is changed."""
    select = partial(_retrieval, trials=SELECTION_TRIALS, seed=trials_seed(seed, "selection"))
    judge = partial(_retrieval, trials=TRIALS, seed=trials_seed(seed, "transplants"))
    window = packed_documents(derive(seed, "head scores"))
    head = causal_head(start, end, select)
    of_head = [Span(*head), Span(*head, part="W_K")]
    number, number_of_all = best_factor(start, head, select), best_factor(start, None, select)
    frames = []

    def tell(state: str, model: HookedCausalLM, **columns: Any) -> None:
        scores = head_scores(model, window, layers=head[0])
        scores = scores[scores["metric"].isin(SCORES) & (scores["head"] == head[1])]
        found = judge(model).drop(columns=["seed", "phase", "role", "tokens", "perturbation"], errors="ignore")
        looks = scores[["layer", "head", "metric", "value"]]
        frames.append(pd.concat([found, looks]).assign(state=state, **columns))

    tell(START, start)
    tell(END, end)
    with transplanted(start, end, of_head):
        tell(SPANS, start)
    with transplanted(end, start, of_head):
        tell(REVERTED, end)
    for state, which, factor in ((SCALED, head, number), (ALL_SCALED, None, number_of_all)):
        with scaled(start, which, factor):
            tell(state, start, factor=factor)
    spans = query_spans(end.original_model)
    loss = answer_loss(PATH_TRIALS, seed)
    brings = gradient_times_change(start, end.original_model, spans, loss, steps=PATH_POINTS)
    keys = [Span(part="W_K")]
    with transplanted(start, end, keys + [spans[i] for i in np.argsort(np.negative(brings), kind="stable")[:CHOSEN]]):
        tell(BY_PATH, start)
    rng = np.random.default_rng(derive(seed, "random spans"))
    for draw in range(DRAWS):
        with transplanted(start, end, keys + [spans[i] for i in rng.permutation(len(spans))[:CHOSEN]]):
            tell(RANDOM, start, draw=draw)
    return RIVAL_SPANS.frame(pd.concat(frames, ignore_index=True))


def _retrieval(model: HookedCausalLM, *, trials: int, seed: int) -> pd.DataFrame:
    return retrieval_accuracy(model, KeyValueTask(SHORT_DOCUMENTS, LONG), DISTANCES, trials=trials, seed=seed)


def causal_head(start: HookedCausalLM, end: HookedCausalLM, select: Callable[[HookedCausalLM], pd.DataFrame]) -> Head:
    """The head without whose queries and keys the end's answers are least likely."""
    heads = [(layer, head) for layer in range(len(end.blocks)) for head in range(heads_of(end.config).query)]
    left = []
    for head in heads:
        with transplanted(end, start, [Span(*head), Span(*head, part="W_K")]):
            left.append(_quality(select(end))[1])
    return heads[int(np.argmin(left))]


@contextmanager
def scaled(model: HookedCausalLM, head: Head | None, factor: float) -> Iterator[None]:
    """Within it, a head's queries, or those of all, are multiplied by a factor."""
    layer, number = (None, None) if head is None else head
    with model.hooks(fwd_hooks=AttentionTemperature(factor, layers=layer, heads=number).hooks(model)):
        yield


def best_factor(model: HookedCausalLM, head: Head | None, select: Callable[[HookedCausalLM], pd.DataFrame]) -> float:
    """The factor at which most is found; of equal ones the one whose answers are likelier."""
    qualities = []
    for factor in FACTORS:
        with scaled(model, head, factor):
            qualities.append(_quality(select(model)))
    return FACTORS[max(range(len(FACTORS)), key=qualities.__getitem__)]


def _quality(frame: pd.DataFrame) -> tuple[float, float]:
    means = frame.groupby("metric")["value"].mean()
    return float(means["accuracy"]), float(means["answer_logprob_nats"])


def config_of(name: str, seed: int, checkpoints_in: Path) -> dict:
    """The whole configuration, as the manifest holds it: the checkpoints by their weights."""
    sources = [
        checkpoints_in / f"{phase_scaling.ARMS[name].base}-{seed}",
        checkpoints_in / f"phase_scaling/{name}-{seed}",
    ]
    weights = [model["weights_sha256"] for made in sources for model in read_manifest(made)["models"].values()]
    probe = {"trials": TRIALS, "selection": SELECTION_TRIALS, "distances": DISTANCES, "factors": FACTORS}
    sizes = {"chosen": CHOSEN, "draws": DRAWS, "path_trials": PATH_TRIALS, "path_points": PATH_POINTS}
    return {"arm": name, "seed": seed, "weights_sha256": weights, "probe": probe, **sizes}


def stages(options: Options) -> dict[str, Stage]:
    """In full only: every arm whose causes query_spans looks for, of each seed."""
    planned = {}
    for seed in range(options.seeds if options.full else 0):
        for arm in CAUSAL:
            folder = options.out / "rival_spans" / f"{arm}-{seed}"
            command = ("rival_spans", arm, str(seed), str(folder), "--checkpoints", str(options.out))
            sources = (f"{phase_scaling.ARMS[arm].base}-{seed}", f"phase_scaling/{arm}-{seed}")
            config = partial(config_of, arm, seed, options.out)
            planned[f"rival_spans/{folder.name}"] = Stage(command, folder, config, sources, seconds=120.0)
    return planned


def report(results: Mapping[str, Tables]) -> Section:
    """Shares of the gain, where the causal head looks, and the predictions."""
    frame = results["rival_spans"]["rival_spans"]
    shares = gains(frame).pivot_table(index=["model", "seed"], columns="state", values="share")
    scores = frame[frame["metric"].isin(SCORES) & frame["draw"].isna()]
    looks = scores.pivot_table(index=["model", "metric"], columns="state", values="value")
    tables = {
        "share of the gain that each change of the start brings (of the end without the head: leaves)": shares,
        "what the causal head attends to, mean over seeds": looks,
    }
    return Section(judged(frame), {title: table for title, table in tables.items() if len(table)})


def accuracies(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of each state, the mean over distances (and over draws), with the trials behind it.

    All draws of random spans are judged on the same trials, so these count once.
    """
    rows = frame[frame["metric"] == "accuracy"]
    of_draw = rows.groupby(["model", "seed", "state", "draw"], dropna=False)
    summed = pd.DataFrame({"value": of_draw["value"].mean(), "trials": of_draw["trials"].sum()}).reset_index()
    return summed.groupby(["model", "seed", "state"])[["value", "trials"]].mean().reset_index()


def gains(frame: pd.DataFrame) -> pd.DataFrame:
    """The share of the gain of each state: 0 as at the start, 1 as at the end."""
    found = accuracies(frame)
    ends = found.pivot_table(index=["model", "seed"], columns="state", values="value")
    joined = found.join(ends[[START, END]], on=["model", "seed"])
    return found.assign(share=(joined["value"] - joined[START]) / (joined[END] - joined[START]))


def judged(frame: pd.DataFrame) -> pd.DataFrame:
    """The predictions: differences of accuracy with intervals over seeds and trials; undecided across a bound."""
    rows: list[dict] = []
    for model, part in accuracies(frame).groupby("model"):
        by_state = {state: some.set_index("seed") for state, some in part.groupby("state")}

        def apart(number: int, first: str, second: str, least: float, most: float, by_state: dict = by_state) -> None:
            one, other = by_state[first], by_state[second]
            low, high = share_difference_interval(one["value"], other["value"], one["trials"], other["trials"])
            mean = one["value"].mean() - other["value"].mean()
            held = decided(low, high, least, most)
            what = f"{model}: accuracy of {first} less {second} in [{least:g}, {most:g}]"  # noqa: B023
            rows.append(verdict(number, what, mean, held, n=len(one), low=low, high=high))

        apart(1, SCALED, SPANS, -0.15, 0.15)
        apart(2, ALL_SCALED, SPANS, 0.05, 1)
        apart(4, BY_PATH, RANDOM, 0.10, 1)
        looks = frame[(frame["model"] == model) & (frame["metric"] == "previous_token")]
        of_state = looks[looks["draw"].isna()].pivot_table(index="seed", columns="state", values="value")
        for what, values, least, most in (
            ("attention to the token before, start over end, below .5", of_state[START] / of_state[END], -np.inf, 0.5),
            ("the same, scaled less end, within .15", of_state[SCALED] - of_state[END], -0.15, 0.15),
        ):
            mean = values.mean()
            low, high = student_interval(values)
            held = decided_or_met(mean, low, high, least, most)
            rows.append(verdict(3, f"{model}: {what}", mean, held, n=len(values), low=low, high=high))
    return verdicts(rows)


if __name__ == "__main__":
    try:
        typer.run(measure)
    except InputError as error:
        sys.exit(f"error: {error}")
