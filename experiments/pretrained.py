"""A real pretrained model: which heads carry the effect of a shift of position, and what goes when they are silenced.

SmolLM2-135M (30 layers, 9 heads, theta 100,000), and Gemma 3 270M where it is installed, on natural text: documents of
the language reference that Python carries, cut at whole tokens and repeated in a window, begun as the tokenizer begins
a text. A *seed* here is a document of its own.

- `layers`: copies of a document by layer; shifts of q by tokens, and turns of all pairs by one angle; a shift of q by
  16 tokens in one layer alone; what each head attends to.
- `heads`: a shift of q by 16 tokens in one head alone, and each pair turned by 1 radian in all layers; what share of a
  passkey each head copies (the retrieval-head score of arXiv 2404.15574).
- `pairs`: each pair turned by 1 radian in one layer alone; what pairs add to the scores of attended keys.
- `long`: once more on a longer document, 192 tokens three times over: layers, and heads; or where there are local and
  global layers, whose local ones no longer see everything, layers and their kinds.
- `silence`: the heads with the largest effect, chosen on another document, are silenced, and random heads of the same
  layers; what is left of the effect of a shift, of the gain of later copies over the first, and of passkey retrieval.
- `kinds`, where there are local and global layers: passkeys beyond the local window, with layers of either kind
  shifted, without position, or silenced.

    python -m experiments.pretrained layers smollm2-135m 0 runs/pretrained/layers-smollm2-135m-0
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
import typer
from scipy import stats
from torch import Tensor

from experiments.stages import Options, Stage
from rope_probe import (
    HookedCausalLM,
    PairFreeze,
    PairTurn,
    PositionShift,
    TextTask,
    Window,
    copy_deltas,
    head_scores,
    load_model,
    repeated_window,
    silenced,
    trace,
)
from rope_probe.errors import InputError
from rope_probe.models.pretrained import is_available
from rope_probe.models.tokens import bos_of, plain_ids
from rope_probe.retrieval.heads import METRIC as RETRIEVAL_HEAD
from rope_probe.retrieval.heads import retrieval_head_scores
from rope_probe.retrieval.probe import forced_answers
from rope_probe.runs.intervals import student_interval
from rope_probe.runs.progress import progress
from rope_probe.runs.results import new_run, read_tables
from rope_probe.runs.tables import Column, Metric, Tables, declare
from rope_probe.runs.verdicts import Section, decided_or_met, mean_beside, verdict, verdicts
from rope_probe.seeds import derive
from rope_probe.tracing.cone import LOGITS
from rope_probe.tracing.heads import HEAD_PAIRS, HEADS, pair_contributions
from rope_probe.tracing.perturbations import Perturbation
from rope_probe.tracing.propagation import DELTAS, trace_work
from rope_probe.tracing.silence import Head
from rope_probe.tracing.sweeps import sweep
from rope_probe.windows import embedded_text

QUESTION = "In a real model, which heads carry the effect of a shift of position, and what goes with them?"
PREDICTIONS = {
    1: "Shifting the queries of one layer alone by 16 tokens costs most, in logit KL on a repeated document, in layers "
    "16 and 19 of SmolLM2: each more than any of the other 28.",
    2: "Two heads, 8 of layer 19 and 0 of layer 16, have half or more of the summed effect of single heads.",
    3: "Both look one token back: half or more of their attention goes to the token before.",
    4: "Over all heads, the effect goes with attention to the token before: Spearman's correlation above .3.",
    5: "With the four heads of the largest effect silenced, chosen on another document, later copies lose half or more "
    "of their gain over the first copy; with four random heads of the same layers less than a quarter.",
    6: "With these four heads silenced, the log-probability of a passkey falls by 1 nat or more below what random "
    "heads of the same layers leave.",
    7: "At one angle for all, the fastest quarter of the pairs costs more than the slowest quarter: to look one token "
    "back takes pairs that turn within a few tokens.",
    8: "In Gemma, a shift by 16 tokens of the local layers costs 5 times as much as one of the global layers, or more.",
    9: "In Gemma, a passkey beyond the local window is gone with the global layers silenced (log-probability 5 nats "
    "lower), and hardly lower (1 nat) with their queries shifted or without position in them.",
    10: "In Gemma, at one angle for all pairs (1 radian), a turn of the local layers costs twice as much as one of the "
    "global layers, or more: that 16 tokens turn pairs less at a theta of 1,000,000 is not all of it.",
    11: "In Gemma, as many local layers silenced, those before the global ones, cost a passkey less than half of the "
    "nats that the global layers cost.",
    12: "They are not retrieval heads: over all heads the effect goes with attention to the token before more than "
    "with the share of a passkey that a head copies (rank correlations), and 8 of layer 19 and 0 of layer 16 each copy "
    "less than .1 of it.",
    13: "With the four heads of the largest effect silenced, a shift of all queries costs a quarter less or more; with "
    "random heads of the same layers less than a tenth less.",
    14: "In a longer document, 192 tokens three times over, the layers of 1 and the two heads of 2 come out alike.",
    15: "In layers 16 and 19 the pairs of wavelengths up to 64 tokens, turned alone, have more than half of the summed "
    "effect of the layer's pairs.",
    16: "In Gemma, in the longer document, which local layers do not see whole, a shift of the local layers costs 5 "
    "times as much as one of the global layers, or more.",
}
"""Written before the first run of this script; 10 and 11 after the first of 8 and 9, as their controls; 12 to 16 before
what they speak of was first looked at. 1, 2 and 8 are what was seen on other text (docs/findings.md), to be confirmed
or corrected here. That two such heads carry copies and retrieval (5, 6) had been seen on one other text."""
FIGURES = {
    1: ("layer_effects",),
    2: ("head_effects",),
    3: ("head_map",),
    4: ("head_effects", "head_map"),
    7: ("sensitivity_by_pair",),
    8: ("dose_response",),
    9: ("passkey_by_intervention",),
    10: ("dose_response",),
    11: ("passkey_by_intervention",),
    12: ("head_map",),
    14: ("layer_effects", "head_effects"),
    15: ("pair_effects",),
    16: ("dose_response",),
}
"""The drawings that show what a prediction is about, by its number."""

MODELS = ("smollm2-135m", "gemma3-270m")
Part = Literal["layers", "heads", "pairs", "long", "silence", "kinds"]
DOCUMENT, LONG_DOCUMENT, COPIES = 32, 192, 3
SHIFT = 16.0
TOKENS = (0.25, 1.0, 4.0, SHIFT, 64.0)
RADIANS = (0.03, 0.1, 0.3, 1.0, 3.0)
SILENCED = 4
DRAWS = 3
PASSKEY_WINDOW, PASSKEY_DISTANCE, PASSKEY_TRIALS = 256, 128, 8
KINDS_WINDOW, KINDS_DISTANCE, KINDS_TRIALS = 1024, 768, 8
"""Beyond the 512 tokens that a local layer of Gemma 3 sees."""
LOCAL, GLOBAL = "sliding_attention", "full_attention"
"""Kinds of layers, as configs of transformers call them."""
ARMS_OF_KINDS = [f"{kind}{how}" for kind in (LOCAL, GLOBAL) for how in ("", " turned")]
GLOBAL_LAYERS = (5, 11, 17)
"""Of Gemma 3 270M."""
SECONDS: dict[Part, float] = {
    "layers": 50.0,
    "heads": 120.0,
    "pairs": 300.0,
    "long": 500.0,
    "silence": 90.0,
    "kinds": 300.0,
}
"""What each part takes, roughly."""
CARRIERS: tuple[Head, ...] = ((19, 8), (16, 0))
LAYER_PAIR, LONG = "pair of a layer", "long, "
"""An arm, and what the names of the arms of the part `long` begin with."""
FAST = 64.0
"""The longest wavelength of a fast pair, tokens."""

SILENCE = declare(
    "silence",
    "What a model does with some heads silenced, against what it does with all of them.",
    ("seq_len", "silenced", "draw"),
    {
        "shift_kl_nats": Metric("logit KL of a shift of all queries by 16 tokens", "nats"),
        "copy_gain_nats": Metric("loss on the first copy of a document less that on later copies", "nats"),
        "passkey_logprob_nats": Metric("log-probability of a passkey, mean over trials", "nats"),
    },
    own={
        "silenced": Column("string", "which heads: none, those of the largest effect, or random ones of their layers"),
        "draw": Column("Int64", "which draw of random heads"),
    },
)


PASSKEYS = declare(
    "passkeys",
    "Passkeys beyond the window of local layers, with layers of one kind meddled with; means over trials.",
    ("seq_len", "distance", "intervention"),
    {
        "hit": Metric("share of trials in which every token of the answer is the most likely one"),
        "answer_logprob_nats": Metric("log-probability of the answer, summed over its tokens", "nats"),
    },
    own={"intervention": Column("string", "what was done to which layers")},
)


def measure(
    part: Part,
    name: str,
    seed: int,
    out: Path,
    heads_from: Annotated[
        Path | None, typer.Option("--heads", help="Run of the part `heads`, of another seed.")
    ] = None,
) -> None:
    """Measure one part on one document into the run directory `out`."""
    torch.set_num_threads(1)
    with new_run(out, "pretrained", config_of(part, name, seed), overwrite=True) as run:
        model = load_model(name)
        window = repeated_document(model, seed, LONG_DOCUMENT if part == "long" else DOCUMENT)
        run.provenance.add_model(name, model)
        run.provenance.add_tokens("repeated document", window)
        if part == "layers":
            run.record(HEADS, head_scores(model, window), model=name, seed=seed)
            run.record(DELTAS, copy_deltas(model, window), model=name, seed=seed, arm="copies")
        if part == "heads":
            run.record(HEADS, copied_passkeys(model, seed), model=name, seed=seed)
        if part == "pairs":
            run.record(HEAD_PAIRS, pair_contributions(model, window), model=name, seed=seed)
        if part == "silence":
            assert heads_from is not None
            run.record(SILENCE, silencing(model, window, strongest(heads_from), seed), model=name, seed=seed)
        elif part == "kinds":
            run.record(PASSKEYS, passkeys_of_kinds(model, seed), model=name, seed=seed)
        else:
            arms = _perturbations(model, part, len(window))
            work = sum(trace_work(model, len(arms[arm]), sites=_sites(model, arm)) for arm in arms)
            with progress(f"{part} of {name}", work) as advance:
                for arm, perturbations in arms.items():
                    frame = trace(model, window, perturbations, sites=_sites(model, arm), progress=advance, by="window")
                    run.record(DELTAS, frame, model=name, seed=seed, arm=arm)


def repeated_document(model: HookedCausalLM, seed: int, length: int = DOCUMENT) -> Window:
    """`length` tokens of a document of the embedded text, COPIES times over."""
    assert model.tokenizer is not None
    texts = [text for text in embedded_text.documents() if len(text) > 40 * DOCUMENT]
    order = np.random.default_rng(derive(0, "documents")).permutation(len(texts))
    start = bos_of(model.tokenizer)
    tokens = plain_ids(model.tokenizer, texts[order[seed]])
    middle = len(tokens) // 2  # past the headings that these documents begin with
    return repeated_window([*start, *tokens[middle : middle + length - len(start)]], COPIES)


def copied_passkeys(model: HookedCausalLM, seed: int) -> pd.DataFrame:
    """The retrieval-head score of every head, with the answers given."""
    assert model.tokenizer is not None
    task = TextTask("passkey", model.tokenizer, PASSKEY_WINDOW)
    distances, of_seed = (PASSKEY_DISTANCE,), derive(seed, "passkey")
    return retrieval_head_scores(model, task, distances, trials=PASSKEY_TRIALS, seed=of_seed, forced=True)


def _perturbations(model: HookedCausalLM, part: Part, window: int) -> dict[str, Sequence]:
    """By arm."""
    if part == "heads":
        return {
            "head": sweep("head", model, window, sides=["q"], size=SHIFT),
            "pair": sweep("pair", model, window, sides=["q"]),
        }
    if part == "pairs":
        of_layers = [sweep("pair", model, window, sides=["q"], layers=layer) for layer in range(len(model.blocks))]
        return {LAYER_PAIR: [turn for turns in of_layers for turn in turns]}
    if part == "long":
        kinds = _kinds(model)
        longer: dict[str, Sequence] = {
            f"{LONG}{of}": sweep(of, model, window, sides=["q"], size=SHIFT)
            for of in (("layer",) if kinds else ("layer", "head"))
        }
        for kind, layers in kinds.items():
            longer[f"{LONG}{kind}"] = [PositionShift("q", SHIFT, layers=layers)]
        return longer
    arms: dict[str, Sequence] = {
        "layer": sweep("layer", model, window, sides=["q"], size=SHIFT),
        "dose": [PositionShift(side, dose) for side in ("q", "k") for dose in TOKENS],
        "angle": [PairTurn("q", radians) for radians in RADIANS],
    }
    for kind, layers in _kinds(model).items():
        arms[kind] = [PositionShift("q", SHIFT, layers=layers)]
        arms[f"{kind} turned"] = [PairTurn("q", 1.0, layers=layers)]
    return arms


def _kinds(model: HookedCausalLM) -> dict[str, tuple[int, ...]]:
    """Layers by their kind of attention, where there are several."""
    kinds = getattr(model.config, "layer_types", None) or []
    by_kind = {kind: tuple(np.flatnonzero(np.array(kinds) == kind).tolist()) for kind in dict.fromkeys(kinds)}
    return by_kind if len(by_kind) > 1 else {}


def _sites(model: HookedCausalLM, arm: str) -> list[str]:
    """Where it is read: the logits, and for single layers the residual stream after each layer too."""
    residual = [f"blocks.{layer}.hook_resid_post" for layer in range(len(model.blocks))]
    return [*residual, LOGITS] if arm.endswith("layer") else [LOGITS]


def strongest(heads_run: Path) -> list[Head]:
    """The heads with the largest effect in a run of the part `heads`, largest first."""
    effects = head_effects(read_tables([heads_run])["deltas"])
    return [(int(layer), int(head)) for layer, head in effects.nlargest(SILENCED).index]


def head_effects(deltas: pd.DataFrame, arm: str = "head") -> pd.Series:
    """Logit KL of a shift of one head alone, by layer and head."""
    rows = deltas[(deltas["arm"] == arm) & (deltas["metric"] == "kl_nats")]
    return rows.groupby(["inject_layer", "head"])["value"].mean()


def silencing(model: HookedCausalLM, window: Window, heads: Sequence[Head], seed: int) -> pd.DataFrame:
    """What is left with no heads silenced, with these, and with as many random others of their layers."""
    rng = np.random.default_rng(derive(seed, "silenced"))
    count = model.config.num_attention_heads
    sets: list[tuple[str, int | None, list[Head]]] = [("none", None, []), ("largest effect", None, list(heads))]
    for draw in range(DRAWS):
        others = [_other_head(layer, heads, count, rng) for layer, _ in heads]
        sets.append(("random", draw, others))
    frames = []
    for what, number, chosen in sets:
        with silenced(model, chosen):
            values = _abilities(model, window, seed)
        rows = [{"metric": metric, "value": value} for metric, value in values.items()]
        frames.append(pd.DataFrame(rows).assign(silenced=what, draw=number, seq_len=len(window)))
    return pd.concat(frames, ignore_index=True)


def _other_head(layer: int, heads: Sequence[Head], count: int, rng: np.random.Generator) -> Head:
    """A head of this layer that is none of `heads`."""
    free = [head for head in range(count) if (layer, head) not in heads]
    return layer, int(rng.choice(free))


def _abilities(model: HookedCausalLM, window: Window, seed: int) -> dict[str, float]:
    """The metrics of SILENCE."""
    shifted = trace(model, window, PositionShift("q", SHIFT), sites=[LOGITS], by="window")
    passkeys = _passkeys(model, PASSKEY_WINDOW, PASSKEY_DISTANCE, PASSKEY_TRIALS, seed)
    return {
        "shift_kl_nats": _value(shifted, "kl_nats"),
        "copy_gain_nats": copy_gain(model, window),
        "passkey_logprob_nats": float(passkeys["answer_logprob_nats"].mean()),
    }


def _passkeys(model: HookedCausalLM, window: int, distance: int, trials: int, seed: int) -> pd.DataFrame:
    assert model.tokenizer is not None
    task = TextTask("passkey", model.tokenizer, window)
    return forced_answers(model, task, distance, trials=trials, seed=derive(seed, "passkey"))


def passkeys_of_kinds(model: HookedCausalLM, seed: int) -> pd.DataFrame:
    """A passkey beyond the local layers' window, with local and global layers meddled with in turn."""
    kinds = _kinds(model)
    heads = range(model.config.num_attention_heads)
    window, distance = KINDS_WINDOW, KINDS_DISTANCE
    shift, frozen = PositionShift("q", SHIFT), PairFreeze("qk", range(len(model.rotary[0].inv_freq)))  # type: ignore[union-attr]
    interventions: dict[str, Any] = {
        "clean": nullcontext(),
        "global shifted": _perturbed(model, replace(shift, layers=kinds[GLOBAL])),
        "global without position": _perturbed(model, replace(frozen, layers=kinds[GLOBAL])),
        "local shifted": _perturbed(model, replace(shift, layers=kinds[LOCAL])),
        "global silenced": silenced(model, [(layer, head) for layer in kinds[GLOBAL] for head in heads]),
        "as many local silenced": silenced(model, [(layer - 1, head) for layer in kinds[GLOBAL] for head in heads]),
    }
    frames = []
    for intervention, meanwhile in interventions.items():
        with meanwhile:
            passkeys = _passkeys(model, window, distance, KINDS_TRIALS, seed)
        rows = [
            {"metric": "hit", "value": passkeys["hit"].mean()},
            {"metric": "answer_logprob_nats", "value": passkeys["answer_logprob_nats"].mean()},
        ]
        frames.append(pd.DataFrame(rows).assign(intervention=intervention, seq_len=window, distance=distance))
    return pd.concat(frames, ignore_index=True)


def _perturbed(model: HookedCausalLM, perturbation: Perturbation) -> Any:
    return model.hooks(fwd_hooks=perturbation.hooks(model))


def _value(frame: pd.DataFrame, metric: str) -> float:
    return float(frame.loc[frame["metric"] == metric, "value"].item())


@torch.no_grad()
def copy_gain(model: HookedCausalLM, window: Window) -> float:
    """Mean loss on the first copy less that on later ones, in nats a token; a document's first token is left out."""
    with model.measuring():
        logits = model(window)[0, :-1]
    loss: Tensor = torch.nn.functional.cross_entropy(logits.float(), window.tokens[0, 1:], reduction="none")
    length = len(window) // window.documents
    by_copy = torch.cat([loss.new_full((1,), torch.nan), loss]).view(window.documents, length)[:, 1:]
    return float(by_copy[0].mean() - by_copy[1:].mean())


def config_of(part: Part, name: str, seed: int) -> dict:
    """The whole configuration, as the manifest holds it."""
    return {
        "part": part,
        "model": name,
        "seed": seed,
        "document": LONG_DOCUMENT if part == "long" else DOCUMENT,
        "copies": COPIES,
        "shift": SHIFT,
        "tokens": TOKENS,
        "radians": RADIANS,
        "silenced": SILENCED,
        "passkey": [PASSKEY_WINDOW, PASSKEY_DISTANCE, PASSKEY_TRIALS],
        "passkey_of_kinds": [KINDS_WINDOW, KINDS_DISTANCE, KINDS_TRIALS],
    }


def stages(options: Options) -> dict[str, Stage]:
    """Every part, of the models that are installed, on a document for each seed and one more; first figures first.

    In full the heads of every document and the longer documents, else the heads of the first alone.
    """
    planned: dict[str, Stage] = {}
    for name in filter(is_available, MODELS):
        for seed in range(options.seeds + 1):
            parts: tuple[Part, ...] = ("layers", "heads") if options.full or seed == 0 else ("layers",)
            if options.full:
                parts = (*parts, "long", "pairs") if seed == 0 else (*parts, "long")
            for part in parts:
                planned |= _stage(part, name, seed, options)
            if seed > 0:
                planned |= _stage("silence", name, seed, options, chosen_on=seed - 1 if options.full else 0)
            if options.full and name == MODELS[1]:
                planned |= _stage("kinds", name, seed, options)
    return planned


def _stage(part: Part, name: str, seed: int, options: Options, chosen_on: int | None = None) -> dict[str, Stage]:
    folder = options.out / "pretrained"
    run = folder / f"{part}-{name}-{seed}"
    command: tuple[str, ...] = ("pretrained", part, name, str(seed), str(run))
    needs: tuple[str, ...] = ()
    if chosen_on is not None:
        heads = f"heads-{name}-{chosen_on}"
        command, needs = (*command, "--heads", str(folder / heads)), (f"pretrained/{heads}",)
    stage = Stage(
        command,
        run,
        partial(config_of, part, name, seed),
        needs,
        seconds=SECONDS[part],
        urgent=part == "layers" and seed < 2 and name == MODELS[0],
    )
    return {f"pretrained/{run.name}": stage}


def report(results: Mapping[str, Tables]) -> Section:
    """Which layers and heads carry the effect, what is left without them, and the predictions."""
    mine = results["pretrained"]
    deltas, silence = mine["deltas"], mine["silence"]
    logits = deltas[(deltas["site"] == LOGITS) & (deltas["metric"] == "kl_nats")]
    by_kind = logits[logits["arm"].isin(ARMS_OF_KINDS)]
    tables = {
        "the heads whose shift by 16 tokens costs most, and what they attend to": _carriers(logits, mine["heads"]),
        "logit KL by tokens shifted, nats": logits[logits["arm"] == "dose"].pivot_table(
            index=["model", "side"], columns="delta_tokens", values="value"
        ),
        "logit KL with all layers of one kind shifted by 16 tokens or turned by 1 radian, nats": by_kind.pivot_table(
            index=["model", "arm"], columns="seed", values="value"
        ),
        "passkeys beyond the local window, log-probability in nats": mine["passkeys"].pivot_table(
            index=["model", "intervention"], columns="metric", values="value", sort=False
        ),
        "with heads silenced, mean over documents": silence.pivot_table(
            index=["model", "silenced"], columns="metric", values="value"
        ),
    }
    return Section(judged(mine), {title: table for title, table in tables.items() if len(table)})


def _carriers(logits: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """The heads of the largest effect, means over documents, with their share of it and their scores."""
    rows = logits[logits["arm"] == "head"]
    if rows.empty:
        return rows
    rows = rows.assign(layer=rows["inject_layer"])
    effects = rows.groupby(["model", "layer", "head"])["value"].mean()
    most = effects.groupby("model", group_keys=False).nlargest(8).to_frame("nats")
    most["share"] = most["nats"] / effects.groupby("model").sum()
    attends = scores.pivot_table(index=["model", "layer", "head"], columns="metric", values="value")
    told = ["previous_token", "induction", "duplicate_token", "sink", RETRIEVAL_HEAD]
    return most.join(attends.reindex(columns=told))


def shares_of_carriers(logits: pd.DataFrame, arm: str) -> list[float]:
    """Of each document, the share of the two heads in the summed effect of single heads."""
    of_seed = [head_effects(rows, arm) for _, rows in logits[logits["arm"] == arm].groupby("seed")]
    return [float(effects[list(CARRIERS)].sum() / effects.sum()) for effects in of_seed]


def correlations_with_effect(logits: pd.DataFrame, scores: pd.DataFrame, metric: str) -> pd.Series:
    """Rank correlation over heads of what a shift of one costs and one of its scores, by document (`seed`)."""
    found = {}
    for seed, rows in logits[logits["arm"] == "head"].groupby("seed"):
        effects = head_effects(rows)
        of_metric = scores[(scores["seed"] == seed) & (scores["metric"] == metric)]
        if len(of_metric):
            score = of_metric.set_index(["layer", "head"])["value"].reindex(effects.index)
            found[seed] = float(stats.spearmanr(effects, score).statistic)
    return pd.Series(found, dtype=float)


def judged(mine: Tables) -> pd.DataFrame:
    """Each prediction: the mean over documents, Student's interval, held or not only where the interval says so."""
    rows: list[dict] = []

    def judge(number: int, claim: str, by_seed: Sequence[float], low: float = -np.inf, high: float = np.inf) -> None:
        """Whether the mean lies between two bounds."""
        if not len(by_seed):
            return
        values = pd.Series(by_seed, dtype=float).dropna()
        bottom, top = student_interval(values)
        held = decided_or_met(values.mean(), bottom, top, low, high)
        rows.append(verdict(number, claim, values.mean(), held, n=len(values), low=bottom, high=top))

    logits = mine["deltas"].query("site == @LOGITS and metric == 'kl_nats'")
    smollm = logits[logits["model"] == MODELS[0]]
    for number, prefix, where in ((1, "", ""), (14, LONG, "longer document: ")):
        by_layer = smollm[smollm["arm"] == f"{prefix}layer"].pivot_table(
            index="seed", columns="inject_layer", values="value"
        )
        if len(by_layer):
            carriers = [layer for layer, _ in CARRIERS]
            ratio = by_layer[carriers].min(axis=1) / by_layer.drop(columns=carriers).max(axis=1)
            claim = f"{where}KL of layer 16 or 19, the smaller, over the largest of the others, above 1"
            judge(number, claim, ratio, low=1.0)
        claim = f"{where}share of the two heads in the summed effect of single heads, .5 or more"
        judge(2 if number == 1 else number, claim, shares_of_carriers(smollm, f"{prefix}head"), low=0.5)
    of_heads = mine["heads"].query("model == @MODELS[0]")
    correlations = {
        metric: correlations_with_effect(smollm, of_heads, metric)
        for metric in ("previous_token", "induction", RETRIEVAL_HEAD)
    }
    scores = of_heads[of_heads["metric"] == "previous_token"]
    by_head = scores.groupby(["layer", "head", "seed"])["value"].mean()
    for layer, head in CARRIERS if len(by_head) else ():
        judge(
            3, f"attention of head {head} of layer {layer} to the token before, .5 or more", by_head[layer, head], 0.5
        )
    judge(
        4, "rank correlation of effect and attention to the token before, above .3", correlations["previous_token"], 0.3
    )
    apart = (correlations["previous_token"] - correlations[RETRIEVAL_HEAD]).dropna()  # documents that have both
    claim = "rank correlation of effect and attention to the token before, less that of effect and copying, above 0"
    judge(12, claim, apart.tolist(), low=0.0)
    copied = of_heads[of_heads["metric"] == RETRIEVAL_HEAD].groupby(["layer", "head", "seed"])["value"].mean()
    for layer, head in CARRIERS if len(copied) else ():
        judge(
            12, f"share of a passkey that head {head} of layer {layer} copies, below .1", copied[layer, head], high=0.1
        )
    for metric, name in (("induction", "induction"), (RETRIEVAL_HEAD, "copying a passkey")):
        if len(found := correlations[metric]):
            rows.append(mean_beside(f"rank correlation of effect and {name}, to compare with", found))
    left = mine["silence"].query("model == @MODELS[0]").groupby(["metric", "silenced", "seed"])["value"].mean()
    if len(left):
        gain = left["copy_gain_nats"]
        lost = 1 - gain["largest effect"] / gain["none"]
        judge(
            5, "share of the gain of later copies that goes with the heads of the largest effect, .5 or more", lost, 0.5
        )
        random = 1 - gain["random"] / gain["none"]
        judge(5, "share that goes with random heads of the same layers, below .25", random, high=0.25)
        shift = left["shift_kl_nats"]
        for silent, wanted, low, high in (
            ("largest effect", ".25 or more", 0.25, np.inf),
            ("random", "below .1", -np.inf, 0.1),
        ):
            claim = f"share of the cost of a shift of all queries that goes with heads silenced ({silent}), {wanted}"
            judge(13, claim, 1 - shift[silent] / shift["none"], low, high)
        passkey = left["passkey_logprob_nats"]
        below = passkey["random"] - passkey["largest effect"]
        judge(6, "nats that a passkey loses more than with random heads, 1 or more", below, low=1.0)
    pairs = smollm[smollm["arm"] == "pair"].pivot_table(index="seed", columns="pair", values="value")
    if len(pairs):
        quarter = len(pairs.columns) // 4
        ratio = pairs.iloc[:, :quarter].mean(axis=1) / pairs.iloc[:, -quarter:].mean(axis=1)
        judge(7, "KL of the fastest quarter of the pairs over the slowest, at 1 radian, above 1", ratio, low=1.0)
    by_pair = smollm[smollm["arm"] == LAYER_PAIR]
    for layer, _ in CARRIERS if len(by_pair) else ():
        of_layer = by_pair[by_pair["inject_layer"] == layer]
        fast = of_layer[of_layer["wavelength"] <= FAST].groupby("seed")["value"].sum()
        share = fast / of_layer.groupby("seed")["value"].sum()
        judge(
            15, f"share of pairs of wavelengths up to 64 in the summed effect of layer {layer}, .5 or more", share, 0.5
        )
    longer = logits[(logits["model"] == MODELS[1]) & logits["arm"].isin([f"{LONG}{kind}" for kind in (LOCAL, GLOBAL)])]
    if len(longer):
        by_kind = longer.pivot_table(index="seed", columns="arm", values="value")
        ratio = by_kind[f"{LONG}{LOCAL}"] / by_kind[f"{LONG}{GLOBAL}"]
        judge(
            16, "Gemma, longer document: KL of a shift of the local layers over the global ones, 5 or more", ratio, 5.0
        )
    kinds = logits[(logits["model"] == MODELS[1]) & logits["arm"].isin(ARMS_OF_KINDS)]
    if len(kinds):
        by_kind = kinds.pivot_table(index="seed", columns="arm", values="value")
        ratio = by_kind[LOCAL] / by_kind[GLOBAL]
        judge(8, "Gemma: KL of a shift of the local layers over that of the global ones, 5 or more", ratio, low=5.0)
        ratio = by_kind[f"{LOCAL} turned"] / by_kind[f"{GLOBAL} turned"]
        judge(10, "Gemma: the same by a turn of 1 radian, 2 or more", ratio, low=2.0)
        of_gemma = logits[(logits["model"] == MODELS[1]) & (logits["arm"] == "layer")]
        alone = of_gemma.pivot_table(index="seed", columns="inject_layer", values="value")
        is_global = alone.columns.isin(GLOBAL_LAYERS)
        ratio = alone.loc[:, ~is_global].mean(axis=1) / alone.loc[:, is_global].mean(axis=1)
        claim = "Gemma: KL of a shift of one layer alone, mean over local layers over that of global ones"
        rows.append(mean_beside(claim, ratio))
    passkeys = mine["passkeys"].query("metric == 'answer_logprob_nats'")
    if len(passkeys):
        logprob = passkeys.pivot_table(index="seed", columns="intervention", values="value")
        lost = logprob.rsub(logprob["clean"], axis=0)
        judge(
            9, "Gemma: nats that a passkey loses with the global layers silenced, 5 or more", lost["global silenced"], 5
        )
        for what in ("global shifted", "global without position"):
            judge(9, f"Gemma: nats that it loses with {what}, 1 or less", lost[what], high=1.0)
        share = lost["as many local silenced"] / lost["global silenced"]
        judge(11, "Gemma: what it loses with as many local layers silenced, over that, below .5", share, high=0.5)
    return verdicts(rows)


if __name__ == "__main__":
    try:
        typer.run(measure)
    except InputError as error:
        sys.exit(f"error: {error}")
