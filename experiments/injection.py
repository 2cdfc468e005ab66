"""Is it the positional part of the teacher's logits that teaches? It is injected, and taken away.

The teacher's logits are split (rope_probe.positional_part): what its place in the window does to every document alike,
whatever stands before it, is their positional part. The head is linear, so the split of final hidden states is that of
the logits, and a teacher is altered by adding a multiple of this part to its final hidden states. Students of one base
then learn, as the arm `kd_phase_wise` of phase_scaling does, from

    full              the teacher as it is
    masked            its documents masked from each other: a RoPE teacher's logits then have no positional part
    masked_plus_1     masked, plus the positional part of the full logits, at its own size
    masked_plus_4     ... four times as large
    masked_plus_16    ... sixteen times
    shuffled_16       ... sixteen times, with places in another order: as much place, but not the teacher's
    full_less         the full logits less their positional part
    nope_masked       a teacher with a NoPE layer and temperature by position (see positional_channel), masked: its
                      logits depend on the place by themselves
    nope_strong       the same, its temperature rising ten times as fast
    theta_swapped     no teacher: the base at the larger theta, untrained, with which all of them begin

Each student is then asked what it retrieves, with queries as they are and multiplied by 2 and 3, which tells what a
temperature alone would give; and whether the positional part of its logits is the teacher's.

    python -m experiments.injection full_less 0 runs/injection/full_less-0 --checkpoints runs
"""

import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import typer
from jaxtyping import Float
from torch import Tensor

from experiments import phase_scaling, positional_channel
from experiments.positional_channel import Hook
from experiments.stages import Options, Stage
from experiments.toy_checkpoints import LARGE_THETA, LONG, SHORT, SHORT_DOCUMENTS, CheckpointsIn, by_distance
from experiments.training import trained
from rope_probe import (
    AttentionTemperature,
    HookedCausalLM,
    KeyValueTask,
    PlacedContents,
    load_model,
    positional_alignment,
    positional_part,
    positional_parts,
    retrieval_accuracy,
)
from rope_probe.distillation import Phase
from rope_probe.distillation.log import LOSSES, history_rows
from rope_probe.errors import InputError
from rope_probe.models import checkpoints
from rope_probe.runs.intervals import student_interval
from rope_probe.runs.results import new_run, read_manifest
from rope_probe.runs.tables import Column, Metric, Tables, declare
from rope_probe.runs.verdicts import Section, beside, decided, in_words, verdict, verdicts
from rope_probe.seeds import derive
from rope_probe.spans.drift import FINAL_NORM
from rope_probe.tracing.cone import LOGITS
from rope_probe.tracing.positional import POSITIONAL_PARTS
from rope_probe.tracing.positional_transfer import POSITIONAL_ALIGNMENT

QUESTION = "Is it the positional part of the teacher's logits that teaches?"
PREDICTIONS = {
    1: "The full teacher's logits have a positional part beyond chance, but a small one: without it they differ by .05 "
    "nats or less.",
    2: "Without it the student learns all the same: full_less retrieves .90 or more.",
    3: "It alone teaches no retrieval, however large: masked_plus_1, _4 and _16 retrieve .10 or less.",
    4: "Nor does it teach what sharper attention would bring out: with queries multiplied by 3, none of these three "
    "retrieves more than the student of masked logits by .10.",
    5: "Students do take it over: the slope of the student's positional part on the teacher's is .5 or more for full, "
    ".5 or more for masked_plus_1 and 2 or more for masked_plus_4; for masked it is .25 or less.",
    6: "For full_less the slope is .25 or less: students copy the place from the logits, it does not come with "
    "retrieval.",
    7: "The strong NoPE teacher's logits depend on the place by .1 nats or more, masked as they are, and its student "
    "retrieves .10 or less.",
}
"""Written before the first run. Retrieval: accuracy at 512 tokens, 8 times the document length, window 1,024."""

DOCUMENTS = LONG // SHORT
PART_CONTENTS = 64
"""Documents that the positional part is a mean over, each with fillers of its own."""
MEASURED_CONTENTS = 24
DISTANCES = {1.0: (32, 128, 256, 512, 768, 1000), 2.0: (128, 512, 1000), 3.0: (128, 512, 1000)}
"""At which distances students are asked, by what their queries are multiplied by."""
SHARP = 3.0
"""What queries are multiplied by to see what sharper attention alone brings out."""
TRIALS = phase_scaling.TRIALS
FAR = phase_scaling.FAR
STRONG = 10 * positional_channel.TEMPERATURE
INJECTED = ("masked_plus_1", "masked_plus_4", "masked_plus_16")
QUICK_ARMS = ("theta_swapped", "full", "full_less")

Number = tuple[float, float, float]
"""A value, and the ends of its interval."""

INJECTION = declare(
    "injection",
    "Retrieval by students of altered teachers, with queries multiplied after rotation.",
    ("role", "seq_len", "query_scale", "distance", "trials", "low", "high"),
    {"accuracy": Metric("share of keys whose value is found")},
    own={
        "query_scale": Column("float64", "what queries of all layers are multiplied by after rotation; 1 for nothing"),
        "trials": Column("Int64", "trials that the value is a mean over"),
    },
)


@dataclasses.dataclass(frozen=True)
class Arm:
    """How the teacher is altered: `amplitude` times the positional part is added to its final hidden states.

    `source` is the teacher's checkpoint, None for no teacher. With `shuffled`, the parts of places change places. A
    teacher without RoPE in a layer has its `temperature` there. `trained_as` is the stage of another experiment that
    trains the same student.
    """

    source: str | None = "teacher"
    masked: bool = False
    amplitude: float = 0.0
    shuffled: bool = False
    temperature: float = positional_channel.TEMPERATURE
    trained_as: str | None = None


ARMS = {
    "theta_swapped": Arm(source=None, trained_as="phase_scaling/theta_swapped"),
    "full": Arm(trained_as="phase_scaling/kd_phase_wise"),
    "masked": Arm(masked=True, trained_as="phase_scaling/kd_teacher_masked"),
    "masked_plus_1": Arm(masked=True, amplitude=1.0),
    "masked_plus_4": Arm(masked=True, amplitude=4.0),
    "masked_plus_16": Arm(masked=True, amplitude=16.0),
    "shuffled_16": Arm(masked=True, amplitude=16.0, shuffled=True),
    "full_less": Arm(amplitude=-1.0),
    "nope_masked": Arm(source="nope_teacher", masked=True, trained_as="positional_channel/nope_masked"),
    "nope_strong": Arm(source="nope_teacher", masked=True, temperature=STRONG),
}


def adding(added: Float[Tensor, "T M"]) -> Hook:
    """A hook that adds to final hidden states what depends on the place in a window of T positions alone.

    Where the head is linear, logits change by what the head makes of it. Masked windows come end to end.
    """

    def add(x: Float[Tensor, "B T M"], hook: Any) -> Tensor:
        places = torch.arange(x.shape[1]) % len(added)
        return x + added[places].to(x)

    return FINAL_NORM, add


def placed(seed: int, purpose: str, count: int) -> PlacedContents:
    """Documents at each of the places that packed documents have, each with fillers of its own."""
    documents = SHORT_DOCUMENTS.documents(count, seed=derive(seed, purpose, "contents"))
    fillers = SHORT_DOCUMENTS.batch(count, LONG, seed=derive(seed, purpose, "fillers")).tokens
    return PlacedContents(documents, fillers, tuple(range(0, LONG, SHORT)))


def part_by_position(teacher: HookedCausalLM, seed: int, count: int) -> Float[Tensor, "T M"]:
    """The positional part of the full teacher's final hidden states at every position of a packed window."""
    part = positional_part(teacher, placed(seed, "part", count), [FINAL_NORM])[FINAL_NORM]
    return part.flatten(0, 1)


def shuffled(part: Float[Tensor, "T M"], seed: int) -> Float[Tensor, "T M"]:
    """The same with the places of documents in another order, in which none stands where it did."""
    places = part.view(DOCUMENTS, SHORT, -1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(DOCUMENTS, generator=generator)
    moved_to = torch.empty_like(order)
    moved_to[order] = order.roll(1)  # one cycle, so no place keeps its own
    return places[moved_to].flatten(0, 1)


def teacher_of(name: str, seed: int, checkpoints_in: Path) -> tuple[HookedCausalLM, HookedCausalLM]:
    """The teacher of an arm as it is, and as it teaches. Raises InputError for an arm without one."""
    arm = ARMS[name]
    if arm.source is None:
        raise InputError(f"arm {name!r} has no teacher")
    folder = checkpoints_in / f"{arm.source}-{seed}" / "checkpoint"
    plain = load_model(folder)
    if arm.source == "nope_teacher":
        teaches = load_model(folder)
        for hook_name, hook in positional_channel.temperature_hooks(plain):
            plain.add_hook(hook_name, hook)
        for hook_name, hook in positional_channel.temperature_hooks(teaches, arm.temperature):
            teaches.add_hook(hook_name, hook)
        return plain, teaches
    if not arm.amplitude:
        return plain, plain
    part = part_by_position(plain, seed, PART_CONTENTS)
    if arm.shuffled:
        part = shuffled(part, derive(seed, "order of places"))
    teaches = load_model(folder)
    name, hook = adding(arm.amplitude * part)
    teaches.add_hook(name, hook)
    return plain, teaches


def phase_of(name: str) -> Phase:
    """The extension of an arm: that of `kd_phase_wise`, its data, order and budget; the teacher masked or not."""
    arm = phase_scaling.ARMS["kd_phase_wise"]
    return phase_scaling.phase_of(dataclasses.replace(arm, teacher_masked=ARMS[name].masked))


def run(
    name: str,
    seed: int,
    out: Path,
    checkpoints_in: CheckpointsIn = Path("runs"),
) -> None:
    """Train the student of one arm, unless another experiment did, and measure it, into the run directory `out`."""
    if name not in ARMS:
        raise InputError(f"arm {name!r} is unknown; known are {', '.join(ARMS)}")
    torch.set_num_threads(1)
    arm = ARMS[name]
    with new_run(out, "injection", config_of(name, seed, checkpoints_in), overwrite=True) as made:
        reference = load_model(checkpoints_in / f"{arm.source or 'teacher'}-{seed}" / "checkpoint")
        if arm.source is not None:
            plain, teaches = teacher_of(name, seed, checkpoints_in)
            reference = teaches if _own_place(arm) else plain
            _measure_teacher(made, name, arm, plain, teaches, seed)
        if arm.trained_as is not None:
            student = load_model(checkpoints_in / f"{arm.trained_as}-{seed}" / "checkpoint")
        else:
            base = checkpoints.load(checkpoints_in / f"base-{seed}" / "checkpoint")
            student = load_model(checkpoints.with_rope(base, LARGE_THETA))
            phase = phase_of(name)
            history = trained(f"{name} {seed}", student, phase, seed=derive(seed, "extension"), teacher=teaches)
            made.record(
                LOSSES, history_rows(history, "kd_nats"), model=name, seed=seed, phase="extension", seq_len=LONG
            )
            first = phase.batch(derive(seed, "extension"), 0)
            made.provenance.add_tokens("extension", first, teacher_masked=phase.teacher_masked)
        measured = measure(student, seed)
        made.record(INJECTION, measured, model=name, role="student", seed=seed)
        contents = placed(seed, "measured", MEASURED_CONTENTS)
        parts = positional_parts(student, contents)
        made.record(POSITIONAL_PARTS, parts, model=name, role="student", seed=seed)
        with student.hooks(fwd_hooks=AttentionTemperature(SHARP).hooks(student)):
            sharpened = positional_parts(student, contents, sites=[LOGITS])
        made.record(POSITIONAL_PARTS, sharpened, model=name, role="student", arm=f"queries x {SHARP:g}", seed=seed)
        alignment = positional_alignment(reference, student, contents, second_masked=False, masked=_own_place(arm))
        made.record(POSITIONAL_ALIGNMENT, alignment, model=arm.source or "teacher", other=name, seed=seed)
        made.provenance.add_model(name, student)
        if arm.trained_as is None:
            checkpoints.save(student.release(), made.folder / "checkpoint")
    shown = measured.pivot(index="query_scale", columns="distance", values="value").round(2)
    slope = alignment.set_index("metric").loc[["cosine_across_contents", "slope"], ["value", "low", "high"]]
    print(name, seed, shown.to_string(), slope.round(3).to_string(), sep="\n", file=sys.stderr)


def _own_place(arm: Arm) -> bool:
    """Whether students are compared with the masked teacher: one whose place is in its logits without injection."""
    return arm.source == "nope_teacher"


def _measure_teacher(made: Any, name: str, arm: Arm, plain: HookedCausalLM, teaches: HookedCausalLM, seed: int) -> None:
    """The parts of the logits that this arm's student learns from, and how they align with the teacher's own."""
    contents = placed(seed, "measured", MEASURED_CONTENTS)
    parts = positional_parts(teaches, contents, sites=[LOGITS], masked=arm.masked)
    made.record(POSITIONAL_PARTS, parts, model=name, role="teacher", seed=seed)
    if teaches is not plain:
        alignment = positional_alignment(plain, teaches, contents, masked=_own_place(arm), second_masked=arm.masked)
        made.record(POSITIONAL_ALIGNMENT, alignment, model=arm.source, other=name, role="teacher", seed=seed)


def measure(model: HookedCausalLM, seed: int, trials: int = TRIALS) -> pd.DataFrame:
    """Retrieval by distance in the long window with queries as they are, and multiplied; rows of INJECTION."""
    task = KeyValueTask(SHORT_DOCUMENTS, LONG)
    frames = []
    for factor, distances in DISTANCES.items():
        with model.hooks(fwd_hooks=AttentionTemperature(factor).hooks(model)):
            found = retrieval_accuracy(model, task, distances, trials=trials, seed=derive(seed, "probe"))
        found = found[found["metric"] == "accuracy"]
        columns = ["seq_len", "distance", "trials", "metric", "value", "low", "high"]
        frames.append(found[columns].assign(query_scale=factor))
    return INJECTION.frame(pd.concat(frames, ignore_index=True))


def needs(name: str) -> tuple[str, ...]:
    """The stages an arm starts from, without the seed."""
    arm = ARMS[name]
    return arm.trained_as or "base", arm.source or "teacher"


def config_of(name: str, seed: int, checkpoints_in: Path) -> dict:
    """The whole configuration of an arm, as its manifest holds it: the checkpoints by their weights."""
    arm = ARMS[name]
    sources = [checkpoints_in / f"{need}-{seed}" for need in needs(name)]
    weights = [model["weights_sha256"] for source in sources for model in read_manifest(source)["models"].values()]
    probe = {"trials": TRIALS, "distances": list(DISTANCES.items()), "contents": [PART_CONTENTS, MEASURED_CONTENTS]}
    phase = dataclasses.asdict(phase_of(name)) if arm.trained_as is None else None
    return {"arm": dataclasses.asdict(arm), "seed": seed, "phase": phase, "weights_sha256": weights, "probe": probe}


def stages(options: Options) -> dict[str, Stage]:
    """Every arm of each seed; the quick plan has the full logits with and without their positional part."""
    planned = {}
    for seed in range(options.seeds):
        for name in ARMS if options.full else QUICK_ARMS:
            folder = options.out / "injection" / f"{name}-{seed}"
            command = ("injection", name, str(seed), str(folder), "--checkpoints", str(options.out))
            trains = ARMS[name].trained_as is None
            planned[f"injection/{folder.name}"] = Stage(
                command,
                folder,
                partial(config_of, name, seed, options.out),
                tuple(f"{need}-{seed}" for need in needs(name)),
                seconds=150.0 if trains else 40.0,
            )
    return planned


def report(results: Mapping[str, Tables]) -> Section:
    """Retrieval by arm and query scale, positional parts of teachers and students, alignment, and the predictions."""
    tables = results["injection"]
    found, parts, aligned = tables["injection"], tables["positional_parts"], tables["positional_alignment"]
    shown = {
        f"retrieval in a window of {LONG} tokens, accuracy by distance": by_distance(
            found, ["model", "seed", "query_scale"]
        ),
        "the positional part of the logits": _wide(
            parts[parts["site"] == LOGITS].assign(arm=parts["arm"].fillna("")), ["role", "model", "arm"]
        ),
        "the student's positional part against the teacher's own": _wide(
            aligned[aligned["role"].isna()], ["model", "other"]
        ),
        "the logits that were learnt from against the teacher's own": _wide(
            aligned[aligned["role"].notna()], ["model", "other"]
        ),
    }
    return Section(judged(found, parts, aligned), shown)


def _wide(frame: pd.DataFrame, index: list[str]) -> pd.DataFrame:
    """Means over seeds: a column for each metric."""
    table = frame.pivot_table(index=index, columns="metric", values="value", aggfunc="mean", sort=False)
    return table.map("{:.3g}".format)


def judged(found: pd.DataFrame, parts: pd.DataFrame, aligned: pd.DataFrame) -> pd.DataFrame:
    """The predictions for the arms that were run, by intervals.

    A claim holds where the whole interval does, fails where none of it does, and is undecided otherwise. Accuracies
    have intervals over seeds and trials; other numbers Student's over seeds, with one seed that over contents, if any.
    """
    far = found[found["distance"] == FAR]
    of_arm = dict(list(far.groupby(["model", "query_scale"])))
    logits = parts[parts["site"] == LOGITS]
    of_students = aligned[aligned["role"].isna()]
    slopes = dict(list(of_students[of_students["metric"] == "slope"].groupby("other")))
    rows: list[dict[str, Any]] = []

    def judge(prediction: int, claim: str, number: Number, least: float, most: float, n: int) -> None:
        value, low, high = number
        rows.append(verdict(prediction, claim, value, decided(low, high, least, most), n=n, low=low, high=high))

    def accuracy(prediction: int, name: str, least: float, most: float) -> None:
        part = of_arm.get((name, 1.0))
        if part is not None:
            claim = f"{name}: accuracy {in_words(least, most)}"
            judge(prediction, claim, phase_scaling.mean_and_interval(part), least, most, len(part))

    def of_teacher(prediction: int, name: str, metric: str, least: float, most: float) -> None:
        chosen = (logits["role"] == "teacher") & (logits["model"] == name) & (logits["metric"] == metric)
        if chosen.any():
            values = logits.loc[chosen, "value"]
            number = (values.mean(), *student_interval(values))
            claim = f"{name}: {metric} of its teacher {in_words(least, most)}"
            judge(prediction, claim, number, least, most, len(values))

    def slope(prediction: int, name: str, least: float, most: float) -> None:
        part = slopes.get(name)
        if part is not None:
            bounds = student_interval(part["value"]) if len(part) > 1 else (part["low"].item(), part["high"].item())
            number = (part["value"].mean(), *bounds)
            claim = f"{name}: slope of its positional part against its teacher's {in_words(least, most)}"
            judge(prediction, claim, number, least, most, len(part))

    of_teacher(1, "full", "position_kl_nats", -np.inf, 0.05)
    of_full = logits[(logits["role"] == "teacher") & (logits["model"] == "full")]
    share = of_full.pivot_table(index="seed", columns="metric", values="value")
    if len(share):
        beyond = share["position_share"] - share["position_by_chance"]
        claim = "positional share of the full logits, less chance, above 0"
        judge(1, claim, (beyond.mean(), *student_interval(beyond)), 0, 1, len(beyond))
    accuracy(2, "full_less", 0.90, np.inf)
    for name in INJECTED:
        accuracy(3, name, -np.inf, 0.10)
    for name in INJECTED:
        one, other = of_arm.get((name, SHARP)), of_arm.get(("masked", SHARP))
        if one is not None and other is not None:
            apart, seeds = phase_scaling.difference_and_interval(one, other)
            if seeds:
                claim = f"queries x 3: accuracy of {name} less that of masked, 0.1 or less"
                judge(4, claim, apart, -1, 0.10, seeds)
    for name, least, most in (
        ("full", 0.5, np.inf),
        ("masked_plus_1", 0.5, np.inf),
        ("masked_plus_4", 2.0, np.inf),
        ("masked", -np.inf, 0.25),
    ):
        slope(5, name, least, most)
    slope(6, "full_less", -np.inf, 0.25)
    of_teacher(7, "nope_strong", "position_kl_nats", 0.1, np.inf)
    accuracy(7, "nope_strong", -np.inf, 0.10)
    for name in ("theta_swapped", "full", "masked", "shuffled_16", "nope_masked"):
        for factor in DISTANCES:
            part = of_arm.get((name, factor))
            if part is not None:
                mean, low, high = phase_scaling.mean_and_interval(part)
                rows.append(beside(f"accuracy of {name}, queries x {factor:g}", mean, n=len(part), low=low, high=high))
    return verdicts(rows)


if __name__ == "__main__":
    try:
        typer.run(run)
    except InputError as error:
        sys.exit(f"error: {error}")
