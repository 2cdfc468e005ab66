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
runs every arm for two steps of a tiny model. `make reproduce` does not run it.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from experiments.beyond import MODEL, ROTATIONS, TRAINED, readings, rotated
from experiments.beyond_verdicts import BEYOND
from rope_probe import HookedCausalLM, load_model
from rope_probe.distillation import DistillConfig, distill, read_config
from rope_probe.distillation.log import LOSSES
from rope_probe.errors import InputError
from rope_probe.retrieval.haystacks import haystack
from rope_probe.runs.results import new_run, read_run

Arm = Literal["kd-packed", "kd-masked", "hard-packed", "hard-masked", "ce-packed", "ce-masked", "temperature"]
TEACHER = "HuggingFaceTB/SmolLM2-1.7B-Instruct-16k"
DATASET = "HuggingFaceTB/smollm-corpus"
SUBSET = "fineweb-edu-dedup"
DOCUMENT = 512
PASSKEY_SEEDS = 3


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
    "temperature": Arms(None, False),
}


def main(
    arm: Arm,
    out: Path,
    student: str = MODEL,
    teacher: Annotated[str, typer.Option(help="Hub id or folder, of the student's tokenizer.")] = TEACHER,
    dataset: Annotated[str, typer.Option(help="Hub id or folder of a dataset with a column `text`.")] = DATASET,
    subset: str = SUBSET,
    rotation: str = "yarn_2",
    window: int = 16_384,
    tokens: int = 10_000_000,
    batch_tokens: int = 131_072,
    lr: float = 2e-5,
    device: str | None = None,
    dtype: str = "float32",
    attn: str = "sdpa",
    seed: int = 0,
) -> None:
    """Train and measure one arm into the run directory `out`."""
    data = {"kind": "text", "dataset": dataset, "subset": subset, "tokenizer": student}
    given: dict[str, Any] = {"window": window, "tokens": tokens, "batch_tokens": batch_tokens, "lr": lr}
    ways = {"device": device, "dtype": dtype, "attn": attn}
    train_and_measure(arm, out, student, teacher, data=data, rotation=rotation, seed=seed, ways=ways, **given)


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
    described: dict[str, Any] = {
        "arm": arm,
        "rotation": rotation,
        "training": None if config is None else dataclasses.asdict(config),
    }
    described |= {"student": student, "longest": longest or window, "trained": trained, "seeds": list(seeds)}
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


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
