"""A pretrained model beyond its window: what does its rotation alone give, and what does temperature?

SmolLM2-135M was trained in windows of 8,192 tokens at theta 100,000. Nothing is trained here. Its weights rotate by
another theta, by linear interpolation or by YaRN's frequencies, and its attention is sharpened: not at all, by log n
beyond its window, or by YaRN's temperature. YaRN's frequencies come without the temperature that YaRN puts on them, so
that the two are told apart.

A text is read once, up to its longest window (`rope_probe.retrieval.reading`). At each window's end its needles are
asked for, at all distances, in continuations that are not kept. So windows are nested: the same needles, the same
distances, more tokens before them. Of the text between passkeys the loss is measured too, and what heads attend to.

    python -m experiments.beyond yarn_2 none passkey 0 12288 runs/beyond/yarn_2-none-passkey-0-12288
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import typer
from jaxtyping import Float
from torch import Tensor

from experiments.beyond_verdicts import BEYOND, MODEL, judged, tables_of
from experiments.stages import Options, Stage
from rope_probe import AttentionTemperature, HookedCausalLM, load_model
from rope_probe.errors import InputError
from rope_probe.models import checkpoints
from rope_probe.models.pretrained import is_available
from rope_probe.retrieval.haystacks import Haystack, Kind, Question, answered, haystack
from rope_probe.retrieval.heads import needle_of
from rope_probe.retrieval.reading import Reading
from rope_probe.retrieval.tasks import Trial
from rope_probe.rope import yarn_temperature
from rope_probe.runs.progress import progress
from rope_probe.runs.results import new_run
from rope_probe.runs.tables import Tables
from rope_probe.runs.verdicts import Section
from rope_probe.tracing.heads import after_copy
from rope_probe.tracing.patterns import blocks

QUESTION = "Beyond its window of 8,192 tokens, what does changing a model's rotation alone give, and what temperature?"
PREDICTIONS = {
    1: "Beyond the window the model fails by its own theta: natural text at positions 8,192 to 12,288 costs 1 nat a "
    "token or more above what it costs at 4,096 to 8,192.",
    2: "Rotation alone gives most of that back: with YaRN's frequencies at factor 2 the same positions cost at most .3 "
    "nats more than 4,096 to 8,192 cost by the model's own theta.",
    3: "Theta 500,000 does so too, within .5 nats.",
    4: "Linear interpolation by 2 costs more inside the window than YaRN does: .2 nats or more at 0 to 2,048.",
    5: "In a window of 12,288 passkeys are found with YaRN's frequencies at least .3 oftener than by the model's own "
    "theta.",
    6: "It is not distance: by its own theta, passkeys at distances below 2,048 are found in windows of 4,096 at least "
    ".3 oftener than in one of 12,288.",
    7: "Temperature alone does not do it: by its own theta, log n beyond the window and YaRN's temperature each give "
    "back less than .1 of what YaRN's frequencies give, in nats of natural text at 8,192 to 12,288.",
    8: "With YaRN's frequencies, YaRN's temperature changes natural text at 8,192 to 12,288 by less than .1 nats.",
    9: "The head that looks one token back (layer 16, head 0) keeps that beyond the window by its own theta: its "
    "attention to the token before falls by less than .1. What fails is elsewhere.",
    10: "Inside the window, at 2,048 tokens, no rotation gains a passkey: none is found .1 oftener than by the own "
    "theta.",
}
"""Written before the first run. That theta 20,000 loses no passkey in a window of 1,024 had been seen, and no more."""
FIGURES = {
    **dict.fromkeys((1, 2, 3, 4, 7, 8), ("loss_by_position",)),
    **dict.fromkeys((5, 6, 10), ("window_by_distance",)),
}
"""The drawings that show what a prediction is about, by its number."""

TRAINED = 8192
WINDOWS = (2048, 4096, TRAINED, 12_288, 16_384)
QUESTIONS = 8
"""Needles asked for at a window's end."""
EXTENSION = 2.0
_YARN = {"rope_type": "yarn", "rope_theta": 1e5, "original_max_position_embeddings": TRAINED, "attention_factor": 1.0}
ROTATIONS: dict[str, dict[str, Any]] = {
    "own": {"rope_type": "default", "rope_theta": 1e5},
    "theta_200000": {"rope_type": "default", "rope_theta": 2e5},
    "theta_500000": {"rope_type": "default", "rope_theta": 5e5},
    "linear_2": {"rope_type": "linear", "rope_theta": 1e5, "factor": EXTENSION},
    "linear_4": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
    "yarn_2": {**_YARN, "factor": EXTENSION},
    "yarn_4": {**_YARN, "factor": 4.0},
}
YARN_TEMPERATURE = AttentionTemperature(yarn_temperature(EXTENSION))
HEADS = ((16, 0), (19, 8))
"""The two that carry a shift of position in this model (experiments/pretrained.py)."""
HEAD_WINDOWS = (2048, 12_288)
BLOCK, SAMPLED_EVERY = 256, 8
"""Loss of natural text: a mean for each block of positions, over every eighth of them."""
Rotation = Literal["own", "theta_200000", "theta_500000", "linear_2", "linear_4", "yarn_2", "yarn_4"]
Sharpened = Literal["none", "yarn", "none_and_log_n"]
"""Log n changes nothing up to the trained window, so it is a branch of the reading without a temperature."""
SHARPENED: tuple[Sharpened, ...] = ("none_and_log_n", "yarn")
"""These readings have every temperature once."""


def measure(rotation: Rotation, sharpened: Sharpened, kind: Kind, seed: int, longest: int, out: Path) -> None:
    """Read one haystack up to its longest window, and measure at the end of each, into the run directory `out`."""
    torch.set_num_threads(1)
    with new_run(out, "beyond", config_of(rotation, sharpened, kind, seed, longest), overwrite=True) as run:
        model = rotated(load_model(MODEL), ROTATIONS[rotation])
        assert model.tokenizer is not None
        stack = haystack(kind, model.tokenizer, longest, seed=seed)
        run.provenance.add_model(MODEL, model)
        run.manifest["haystack_tokens"] = len(stack.tokens)
        with progress(f"{rotation}, {sharpened}, {kind}", len(stack.tokens)) as advance:
            for temperature, rows in readings(model, stack, sharpened, longest, advance):
                place = {"rotation": rotation, "temperature": temperature, "task": kind}
                run.record(BEYOND, [{**place, **row} for row in rows], model=MODEL, seed=seed)


def rotated(original: HookedCausalLM, rope: Mapping[str, Any]) -> HookedCausalLM:
    """The same weights with another rotation."""
    model = load_model(checkpoints.with_rope(original.original_model, rope))
    model.tokenizer = original.tokenizer
    return model


def readings(
    model: HookedCausalLM, stack: Haystack, sharpened: Sharpened, longest: int, advance: Any, trained: int = TRAINED
) -> Iterator[tuple[str, list[dict]]]:
    """Rows of every window under each temperature, window by window."""
    windows = [*(window for window in WINDOWS if window < longest), longest]
    temperature = "yarn" if sharpened == "yarn" else "none"
    reading = Reading(model, [YARN_TEMPERATURE] if sharpened == "yarn" else [])
    log_n = (AttentionTemperature("log_n", reference=trained),)
    branch: Reading | None = None
    for window in windows:
        if sharpened == "none_and_log_n" and window > trained and branch is None:
            branch = reading.branch(perturbations=log_n) if len(reading) else Reading(model, log_n)
        start = len(reading)
        yield temperature, read_on(reading, stack, window)
        if branch is not None:
            yield "log_n", read_on(branch, stack, window)
        advance(len(reading) - start)


def read_on(reading: Reading, stack: Haystack, window: int) -> list[dict]:
    """Read up to a window's end, and measure there."""
    at, first = stack.cut(window), len(reading)
    queries: dict[int, Tensor] = {}
    watched = window in HEAD_WINDOWS and fits(reading.model)
    reads = [_keep(queries, layer, "q") for layer, _ in HEADS] if watched else []
    states = reading.read(stack.tokens[first:at], reads)
    rows = [] if stack.kind != "passkey" else list(loss_rows(reading, stack, states, first))
    if watched:
        rows += head_rows(reading, stack.tokens[:at], queries, first, window)
    return rows + list(question_rows(reading, stack.questions(at, QUESTIONS), stack, window))


def fits(model: HookedCausalLM) -> bool:
    """Whether the model has the heads that are watched."""
    return len(model.blocks) > max(layer for layer, _ in HEADS)


@torch.no_grad()
def loss_rows(reading: Reading, stack: Haystack, states: Float[Tensor, "1 m M"], first: int) -> Iterator[dict]:
    """Loss of natural text, nats a token, by block of positions; the tokens of needles are left out."""
    read = min(len(reading), len(stack.tokens) - 1)
    positions = torch.arange(first, read)
    positions = positions[(positions % SAMPLED_EVERY == 0) & stack.is_text[positions + 1]]
    for block in positions.div(BLOCK, rounding_mode="floor").unique().tolist():
        chosen = positions[positions.div(BLOCK, rounding_mode="floor") == block]
        logits = reading.model.unembed(states[:, chosen - first])[0].float()
        targets = stack.tokens[chosen + 1].to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits, targets).double().item()
        yield {"position": block * BLOCK, "metric": "loss_nats", "value": loss}


def head_rows(
    reading: Reading, tokens: Tensor, queries: Mapping[int, Float[Tensor, "1 m H D"]], first: int, window: int
) -> list[dict]:
    """Attention of two heads to the token before, and to what followed earlier copies, of the queries just read."""
    rows = []
    for layer, head in HEADS:
        new, keys = queries[layer][0], reading.keys(layer)
        groups = new.shape[1] // keys.shape[1]
        query = new.new_zeros(len(tokens), 1, new.shape[2])
        query[first:] = new[:, head : head + 1]
        found = looks_back(query, keys[:, head // groups, None], reading.model.scoring(layer), tokens, first)
        place = {"layer": layer, "head": head, "seq_len": window, "position": first}
        rows += [{**place, "metric": metric, "value": value} for metric, value in found.items()]
    return rows


def looks_back(
    query: Float[Tensor, "T 1 D"], key: Float[Tensor, "T 1 D"], scoring: Any, tokens: Tensor, first: int
) -> dict[str, float]:
    """`previous_token` and `induction` of one head as `head_scores` has them, over the queries from `first` on."""
    previous, induced, with_copy = 0.0, 0.0, 0
    for block in blocks(query, key, scoring, first=first):
        rows, pattern = block.rows, block.pattern[0]  # [q, k]
        previous += pattern[rows.distance == 1].sum().item()
        copies = after_copy(rows, tokens)
        induced += pattern[copies].sum().item()
        with_copy += int(copies.any(1).sum())
    followers = len(tokens) - max(first, 1)
    return {"previous_token": previous / followers, "induction": induced / max(with_copy, 1)}


def question_rows(reading: Reading, questions: Sequence[Question], stack: Haystack, window: int) -> Iterator[dict]:
    """Hit and log-probability of every question, and by which heads answers were copied, a mean over questions."""
    copied = []
    for unit, question in enumerate(questions):
        hit, logprob = answered(reading, question)
        place = {"seq_len": window, "distance": question.distance, "keys": question.keys, "unit": unit}
        yield {**place, "metric": "hit", "value": float(hit)}
        yield {**place, "metric": "answer_logprob_nats", "value": logprob}
        if window in HEAD_WINDOWS:
            copied.append(copied_by(reading, question, stack))
    if copied:
        mean = torch.stack(copied).mean(0)  # [layers, H]
        for layer, head in np.ndindex(*mean.shape):
            place = {"layer": layer, "head": head, "seq_len": window}
            yield {**place, "metric": "retrieval_head", "value": mean[layer, head].item()}


def copied_by(reading: Reading, question: Question, stack: Haystack) -> Float[Tensor, "layers H"]:
    """Share of the answer's tokens that each head copies from the needle, as `retrieval_head_scores(forced=True)`."""
    queries: dict[int, Tensor] = {}
    keys: dict[int, Tensor] = {}
    layers = reading.model.attending_layers
    reads = [read for layer in layers for read in (_keep(queries, layer, "q"), _keep(keys, layer, "k"))]
    reading.ask(torch.cat([question.prompt, question.answer[:-1]]), question.at, reads)
    asked = torch.cat([stack.tokens[: question.at], question.prompt])
    needle = needle_of(Trial(asked, question.answer, (question.needle.value,), question.distance))
    needle = torch.cat([needle, needle.new_zeros(len(question.answer) - 1)])
    tokens = torch.cat([asked, question.answer[:-1]])
    shares = []
    for layer in layers:
        key = torch.cat([reading.keys(layer, question.at), keys[layer][0]])  # [T, K, D]
        query = key.new_zeros(len(key), *queries[layer].shape[2:])
        query[question.at :] = queries[layer][0]
        found = blocks(query, key, reading.model.scoring(layer), first=len(asked) - 1)
        attended = torch.cat([block.scores.argmax(-1) + block.rows.keys.start for block in found], 1)  # [H, a]
        hits = needle[attended] & (tokens[attended] == question.answer)
        shares.append(hits.double().mean(1))
    return torch.stack(shares)


def _keep(into: dict[int, Tensor], layer: int, side: str) -> tuple[str, Any]:
    """A hook that keeps the rotated queries or keys of a layer."""

    def keep(x: Tensor, hook: Any) -> None:
        into[layer] = x.detach()

    return f"blocks.{layer}.attn.hook_rot_{side}", keep


# The contract of experiments ------------------------------------------------------------------------------------------


def config_of(rotation: str, sharpened: str, kind: str, seed: int, longest: int) -> dict:
    """The whole configuration, as the manifest holds it."""
    return {
        "model": MODEL,
        "rope": ROTATIONS[rotation],
        "sharpened": sharpened,
        "temperature": YARN_TEMPERATURE.factor,
        "kind": kind,
        "seed": seed,
        "longest": longest,
        "windows": WINDOWS,
        "questions": QUESTIONS,
        "heads": [HEADS, HEAD_WINDOWS],
        "loss": [BLOCK, SAMPLED_EVERY],
    }


@dataclass(frozen=True)
class Arm:
    """One reading: how it rotates and is sharpened, which haystack, of which seed, how far, and about how long."""

    rotation: Rotation
    sharpened: Sharpened
    kind: Kind
    longest: int
    seed: int = 0

    @property
    def name(self) -> str:
        """Its run directory's."""
        return f"{self.rotation}-{self.sharpened}-{self.kind}-{self.seed}-{self.longest}"

    @property
    def seconds(self) -> float:
        """About how long it takes on one core of 45 GFLOP/s, by the operations of weights and of attention."""
        operations = 2 * 106e6 * self.longest + 2 * 30 * 576 * self.longest**2
        beyond = 1.0 if self.sharpened != "none_and_log_n" else 2 - (TRAINED / self.longest) ** 1.4
        return 15.0 + 1.2 * beyond * operations / 45e9


QUICK = (Arm("own", "none", "passkey", 2048), Arm("yarn_2", "none", "passkey", 2048))
LONGEST = WINDOWS[-1]
FULL = (
    # the readings that docs/beyond.md shows
    Arm("own", "none_and_log_n", "passkey", LONGEST),
    Arm("yarn_2", "none", "passkey", LONGEST),
    Arm("theta_500000", "none", "passkey", LONGEST),
    # every rotation by every temperature
    Arm("own", "yarn", "passkey", LONGEST),
    *(
        Arm(rotation, sharpened, "passkey", LONGEST)
        for rotation in get_args(Rotation)
        if rotation != "own"
        for sharpened in SHARPENED
    ),
    *(
        Arm(rotation, sharpened, "niah_multikey_2", LONGEST)
        for rotation in get_args(Rotation)
        for sharpened in SHARPENED
    ),
    # further texts
    *(
        further
        for seed in (1, 2)
        for kind in get_args(Kind)
        for further in (
            Arm("own", "none_and_log_n", kind, LONGEST, seed),
            Arm("yarn_2", "none", kind, LONGEST, seed),
        )
    ),
)
"""Every reading goes to the longest window. Those by yarn_2 and theta 500,000 without a temperature are made again on
the way to log n; they count once."""


def stages(options: Options) -> dict[str, Stage]:
    """The quick plan reads two texts of 2,048 tokens; in full all arms. None where the model is not installed."""
    if not is_available(MODEL):
        return {}
    arms = (*QUICK, *FULL) if options.full else QUICK
    return {f"beyond/{arm.name}": _stage(arm, options) for arm in arms}


def _stage(arm: Arm, options: Options) -> Stage:
    run = options.out / "beyond" / arm.name
    given = (arm.rotation, arm.sharpened, arm.kind, arm.seed, arm.longest)
    command = ("beyond", *map(str, given), str(run))
    return Stage(command, run, partial(config_of, *given), seconds=arm.seconds)


def report(results: Mapping[str, Tables]) -> Section:
    """Passkeys by window and distance, loss by position, heads, and the predictions."""
    rows = results["beyond"][BEYOND.name]
    return Section(judged(rows), tables_of(rows))


if __name__ == "__main__":
    try:
        typer.run(measure)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
