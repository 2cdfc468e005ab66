"""What training adds beyond a pretrained window, for one GPU: what is learnt from, masks, and temperature alone.

SmolLM2-135M with another rotation, which `experiments.beyond` measures untrained, is trained on packed documents of at
most 512 tokens in windows of 16,384: 10 million tokens an arm. Arms are what is learnt from, each with attention across
documents and inside them:

- `kd`: the next-token distribution of a teacher that was trained at 16,384 tokens;
- `hard`: the teacher's most likely token, so no logits;
- `ce`: the next token of the text, so no teacher;
- `temperature`: nothing is trained.

Then every arm is measured as in `experiments.beyond`: passkeys by window and distance, loss of natural text by
position, each without a temperature, with log n beyond 8,192 tokens, and with YaRN's.

    python -m experiments.beyond_train kd-packed runs/beyond_train/kd-packed --device cuda --dtype bfloat16
    for arm in kd-masked hard-packed hard-masked ce-packed ce-masked temperature; do
        python -m experiments.beyond_train $arm runs/beyond_train/$arm --device cuda --dtype bfloat16
    done

Teacher and text come from the hub: `--teacher` and `--dataset` say which, `--window 32768` needs a teacher of that
length. Flash attention, where it is installed, is `--attn flash_attention_2`. It has not been run on a GPU: the test
runs every arm for two steps of a tiny model. `make reproduce` trains none of it. It reports the arms that it finds
under `runs/beyond_train`, if they are complete, of this size, and made by these sources.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import typer

from experiments.beyond import MODEL, ROTATIONS, TRAINED, readings, rotated
from experiments.beyond_verdicts import (
    BEYOND,
    gains,
    hits,
    logprobs,
    losses,
    mean_and_interval,
    once,
    paired,
    share,
    tables_of,
)
from experiments.stages import Options, Stage
from rope_probe import HookedCausalLM, load_model
from rope_probe.distillation import DistillConfig, distill, read_config
from rope_probe.distillation.log import LOSSES
from rope_probe.errors import InputError
from rope_probe.retrieval.haystacks import haystack
from rope_probe.runs.intervals import share_interval
from rope_probe.runs.results import is_complete, new_run, read_manifest, read_run, source_hash
from rope_probe.runs.tables import Tables
from rope_probe.runs.verdicts import Section, decided, verdict, verdicts

QUESTION = (
    "Beyond a pretrained window, what does training on short packed documents add over temperature alone: by a "
    "teacher's distribution, by hard labels, by the text?"
)
PREDICTIONS = {
    1: "Temperature alone saves no text: with nothing trained, log n beyond 8,192 tokens and YaRN's temperature each "
    "change natural text at 12,288 to 16,384 by less than .1 nats a token.",
    2: "A teacher's distribution across documents teaches retrieval far away: in windows of 16,384, answers to "
    "passkeys are .3 nats a token or more likelier by kd-packed than with nothing trained.",
    3: "That is not temperature: by kd-packed, without one, these answers are .2 nats a token or more likelier than "
    "with nothing trained and log n, or YaRN's temperature.",
    4: "It needs attention across documents: the answers are .2 nats a token or more likelier by kd-packed than by "
    "kd-masked.",
    5: "Inside documents nothing of it is learnt: kd-masked, hard-masked and ce-masked each change the answers by less "
    "than .2 nats a token against nothing trained.",
    6: "Text alone teaches less: the answers are .2 nats a token or more likelier by kd-packed than by ce-packed.",
    7: "Hard labels teach less than the distribution: the answers are .1 nats a token or more likelier by kd-packed "
    "than by hard-packed.",
    8: "Hard labels teach more than the text: the answers are .1 nats a token or more likelier by hard-packed than by "
    "ce-packed.",
    9: "Natural text far away gains little: at 12,288 to 16,384 every trained arm saves less than .1 nats a token over "
    "nothing trained.",
    10: "Inside the window little is lost: at 0 to 2,048 every trained arm costs natural text less than .05 nats a "
    "token more than nothing trained.",
    11: "Likelier is not found: in windows of 16,384 every trained arm finds less than half of the passkeys.",
}
"""Written before the first run at full size: SmolLM2-135M, YaRN's frequencies by 2, three texts. What untrained
rotations give had been seen (docs/beyond.md). An arm is read without a temperature where none is named."""
FIGURES = {
    **dict.fromkeys((1, 9, 10), ("loss_by_position",)),
    11: ("window_by_distance",),
}
"""The drawings that show what a prediction is about, by its number."""

Arm = Literal["kd-packed", "kd-masked", "hard-packed", "hard-masked", "ce-packed", "ce-masked", "temperature"]
TEACHER = "HuggingFaceTB/SmolLM2-1.7B-Instruct-16k"
DATASET = "HuggingFaceTB/smollm-corpus"
SUBSET = "fineweb-edu-dedup"
DOCUMENT = 512
ROTATION = "yarn_2"
WINDOW = 16_384
TOKENS = 10_000_000
BATCH_TOKENS = 131_072
LR = 2e-5
PASSKEY_SEEDS = 3
NOTHING_TRAINED = "temperature"
FAR, NEAR = (12_288, WINDOW), (0, 2048)
"""Positions of text that predictions speak of."""

TERMS: dict[str, dict[str, Any]] = {
    "kd": {"kind": "kd"},
    "hard": {"kind": "hard_labels"},
    "ce": {"kind": "cross_entropy"},
}


@dataclass(frozen=True)
class Arms:
    """What an arm is: which terms it learns by (None: it learns nothing), and whether documents are masked."""

    learns_by: str | None
    masked: bool


ARMS: dict[str, Arms] = {
    **{f"{by}-packed": Arms(by, False) for by in TERMS},
    **{f"{by}-masked": Arms(by, True) for by in TERMS},
    NOTHING_TRAINED: Arms(None, False),
}


def main(
    arm: Arm,
    out: Path,
    student: str = MODEL,
    teacher: Annotated[str, typer.Option(help="Hub id or folder, of the student's tokenizer.")] = TEACHER,
    dataset: Annotated[str, typer.Option(help="Hub id or folder of a dataset with a column `text`.")] = DATASET,
    subset: str = SUBSET,
    rotation: str = ROTATION,
    window: int = WINDOW,
    tokens: int = TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    lr: float = LR,
    device: str | None = None,
    dtype: str = "float32",
    attn: str = "sdpa",
    seed: int = 0,
) -> None:
    """Train and measure one arm into the run directory `out`."""
    data = data_of(dataset, subset, student)
    given: dict[str, Any] = {"window": window, "tokens": tokens, "batch_tokens": batch_tokens, "lr": lr}
    ways = {"device": device, "dtype": dtype, "attn": attn}
    train_and_measure(arm, out, student, teacher, data=data, rotation=rotation, seed=seed, ways=ways, **given)


def data_of(dataset: str, subset: str, student: str) -> dict[str, Any]:
    """What is trained on, as a phase takes it."""
    return {"kind": "text", "dataset": dataset, "subset": subset, "tokenizer": student}


def train_and_measure(
    arm: str,
    out: Path,
    student: str,
    teacher: str,
    *,
    data: dict[str, Any],
    rotation: str,
    window: int,
    tokens: int,
    batch_tokens: int,
    lr: float,
    seed: int,
    ways: dict[str, Any],
    longest: int | None = None,
    trained: int = TRAINED,
    seeds: Sequence[int] = range(PASSKEY_SEEDS),
) -> None:
    """Train an arm, unless it learns nothing, and measure it in haystacks of `longest` tokens (None: the window).

    `trained` is the window that the student was trained in before. The training's own run is in `out`, under
    `training`. Raises InputError for an unknown arm or rotation, and as `read_config` and `distill` do.
    """
    if rotation not in ROTATIONS:
        raise InputError(f"rotation must be one of {', '.join(ROTATIONS)}, but it is {rotation!r}")
    shape: dict[str, Any] = {"window": window, "tokens": tokens, "batch_tokens": batch_tokens, "lr": lr}
    config = training_config(arm, student, teacher, data=data, rope=ROTATIONS[rotation], seed=seed, ways=ways, **shape)
    described = config_of(arm, config, rotation, student, longest or window, trained, seeds)
    with new_run(out, "beyond_train", described, overwrite=True) as run:
        device = ways.get("device")
        if config is None:
            model = rotated(load_model(student, device=device), ROTATIONS[rotation])
        else:
            placed = dataclasses.replace(config, out=str(run.folder / "training"))
            training, _ = read_run(distill(placed))
            run.record(LOSSES, training[LOSSES.name].drop(columns=["run_id", "experiment"]))
            model = load_model(run.folder / "training" / "checkpoints" / placed.phases[-1].name, device=device)
        run.provenance.add_model(arm, model)
        for number in seeds:
            rows = measured(model, longest or window, number, trained)
            run.record(BEYOND, [{**row, "rotation": rotation} for row in rows], model=arm, seed=number)


def measured(model: HookedCausalLM, longest: int, seed: int, trained: int) -> list[dict]:
    """Rows of one haystack under every temperature."""
    assert model.tokenizer is not None
    stack = haystack("passkey", model.tokenizer, longest, seed=seed)
    return [
        {**row, "temperature": temperature, "task": stack.kind}
        for sharpened in ("none_and_log_n", "yarn")
        for temperature, rows in readings(model, stack, sharpened, longest, lambda tokens: None, trained)
        for row in rows
    ]


def training_config(
    arm: str,
    student: str,
    teacher: str,
    *,
    data: dict[str, Any],
    rope: dict[str, Any],
    window: int,
    tokens: int,
    batch_tokens: int,
    lr: float,
    seed: int,
    ways: dict[str, Any],
) -> DistillConfig | None:
    """What `rope-probe distill` would read to train this arm; None for one that learns nothing.

    Raises InputError for an unknown arm, and for fewer tokens than one step reads.
    """
    if arm not in ARMS:
        raise InputError(f"arm must be one of {', '.join(ARMS)}, but it is {arm!r}")
    chosen = ARMS[arm]
    if chosen.learns_by is None:
        return None
    if tokens < batch_tokens:
        raise InputError(f"tokens must be {batch_tokens} or more, those of one step, but it is {tokens}")
    steps = tokens // batch_tokens
    phase = {
        "name": "extension",
        "window": window,
        "rope_parameters": rope,
        "data": {"longest": DOCUMENT, **data},
        "masked": chosen.masked,
        "teacher_masked": chosen.masked,
        "terms": [TERMS[chosen.learns_by]],
        "steps": steps,
        "batch_tokens": batch_tokens,
        "accumulate": batch_tokens // window,
        "lr": lr,
        "warmup": max(1, steps // 20),
    }
    teachers = {} if chosen.learns_by == "ce" else {"teacher": teacher}
    told = {name: value for name, value in ways.items() if value is not None}
    run = {"student": student, "teachers": teachers, "out": "set where it runs", "seed": seed}
    return read_config({**run, "phases": [phase], **told})


# The contract of experiments ------------------------------------------------------------------------------------------


def config_of(
    arm: str,
    training: DistillConfig | None,
    rotation: str = ROTATION,
    student: str = MODEL,
    longest: int = WINDOW,
    trained: int = TRAINED,
    seeds: Sequence[int] = range(PASSKEY_SEEDS),
) -> dict[str, Any]:
    """The whole configuration, as the manifest holds it."""
    return {
        "arm": arm,
        "rotation": rotation,
        "training": None if training is None else dataclasses.asdict(training),
        "student": student,
        "longest": longest,
        "trained": trained,
        "seeds": list(seeds),
    }


def full_size_config(arm: str, ways: dict[str, Any]) -> dict[str, Any]:
    """The configuration that predictions speak of; `ways` are device, dtype and attention, which are free."""
    shape: dict[str, Any] = {"window": WINDOW, "tokens": TOKENS, "batch_tokens": BATCH_TOKENS, "lr": LR}
    data, rope = data_of(DATASET, SUBSET, MODEL), ROTATIONS[ROTATION]
    training = training_config(arm, MODEL, TEACHER, data=data, rope=rope, seed=0, ways=ways, **shape)
    return config_of(arm, training)


def stages(options: Options) -> dict[str, Stage]:
    """The arms that are there at full size, made by these sources: the main job reports them, and trains none."""
    planned, sources = {}, source_hash(Path(__file__))
    for arm in ARMS:
        run = options.out / "beyond_train" / arm
        config = partial(full_size_config, arm, _ways_of(run))
        if is_complete(run, config(), sources=sources):
            planned[f"beyond_train/{arm}"] = Stage(("beyond_train", arm, str(run)), run, config)
    return planned


def _ways_of(run: Path) -> dict[str, Any]:
    """Device, dtype and attention that a run was trained by; none where nothing was trained."""
    try:
        training = read_manifest(run)["config"].get("training") or {}
    except InputError:
        return {}
    return {name: training[name] for name in ("device", "dtype", "attn") if name in training}


def report(results: Mapping[str, Tables]) -> Section:
    """Passkeys by window and distance, loss by position, and the predictions, for the arms that were run."""
    rows = results["beyond_train"][BEYOND.name]
    return Section(judged(rows), tables_of(rows, (NOTHING_TRAINED, ROTATION, "none")))


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """Every prediction that these rows can judge, block by block of text and question by question.

    A claim holds where the whole interval does, fails where none of it does, and is undecided otherwise. Each arm is
    one trained model: intervals are over texts and questions, and say nothing of other seeds of training.
    """
    rows = once(rows)
    told: list[dict] = []

    def text(arm: str, span: tuple[int, int], temperature: str = "none") -> pd.Series:
        return losses(rows, (arm, ROTATION, temperature), span)

    def answers(arm: str, temperature: str = "none") -> pd.Series:
        return logprobs(rows, (arm, ROTATION, temperature), WINDOW)

    def judge(
        number: int, claim: str, one: pd.Series, other: pd.Series, least: float = -np.inf, most: float = np.inf
    ) -> None:
        """A claim of one less the other."""
        apart = paired(one, other)
        if len(apart) > 1:
            value, low, high = mean_and_interval(apart)
            held = decided(low, high, least, most)
            told.append(verdict(number, claim, value, held, n=len(apart), low=low, high=high))

    untrained_far, untrained = text(NOTHING_TRAINED, FAR), answers(NOTHING_TRAINED)
    for temperature in ("log_n", "yarn"):
        changed = text(NOTHING_TRAINED, FAR, temperature)
        claim = f"nothing trained: loss at 12,288 to 16,384 with temperature {temperature} less without, within .1"
        judge(1, claim, changed, untrained_far, -0.1, 0.1)
    kd = answers("kd-packed")
    judge(2, "answers in 16,384 tokens: kd-packed less nothing trained, .3 nats or more", kd, untrained, least=0.3)
    for temperature in ("log_n", "yarn"):
        claim = f"answers: kd-packed less nothing trained with temperature {temperature}, .2 nats or more"
        judge(3, claim, kd, answers(NOTHING_TRAINED, temperature), least=0.2)
    judge(4, "answers: kd-packed less kd-masked, .2 nats or more", kd, answers("kd-masked"), least=0.2)
    for arm in (f"{by}-masked" for by in TERMS):
        judge(5, f"answers: {arm} less nothing trained, within .2", answers(arm), untrained, -0.2, 0.2)
    judge(6, "answers: kd-packed less ce-packed, .2 nats or more", kd, answers("ce-packed"), least=0.2)
    judge(7, "answers: kd-packed less hard-packed, .1 nats or more", kd, answers("hard-packed"), least=0.1)
    hard = answers("hard-packed")
    judge(8, "answers: hard-packed less ce-packed, .1 nats or more", hard, answers("ce-packed"), least=0.1)
    for arm in (arm for arm in ARMS if arm != NOTHING_TRAINED):
        claim = f"nats of text that {arm} saves over nothing trained, below .1"
        judge(9, f"12,288 to 16,384: {claim}", untrained_far, text(arm, FAR), most=0.1)
        claim = f"nats of text that {arm} costs more than nothing trained, below .05"
        judge(10, f"0 to 2,048: {claim}", text(arm, NEAR), text(NOTHING_TRAINED, NEAR), most=0.05)
        found = hits(rows, (arm, ROTATION, "none"), WINDOW)
        if len(found):
            low, high = share_interval(*share(found))
            claim = f"passkeys in 16,384 tokens that {arm} finds, less than half"
            told.append(
                verdict(11, claim, found.mean(), decided(low, high, most=0.5), n=len(found), low=low, high=high)
            )
    return verdicts([*told, *gains(rows, (NOTHING_TRAINED, ROTATION, "none"))])


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
