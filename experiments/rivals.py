"""Rival explanations of what the toy students learn: every arm here takes one of them away, or leaves it alone.

All arms extend the base of `phase_scaling` as its arm `kd_phase_wise` does: theta 300 to 20,000, window 64 to 1,024, 2M
tokens of packed 64-token documents. They differ in one thing each:

    temperature   no training at all: queries of the base, with theta swapped, multiplied after rotation. Every trained
                  arm is measured at the same temperatures
    labels        the teacher's most likely token, or one drawn from its distribution, in place of its logits
    masks         attention inside documents for the student, for the teacher, for both
    positions     KL where a value is to be predicted, or everywhere else
    rate          cross-entropy at .1, .3 and 3 times its learning rates
    stream        windows in which a key has one value in all documents, for cross-entropy and for KD
    width         a teacher of twice the width
    disturbance   a teacher whose queries are shifted by 16 tokens; and two that are disturbed otherwise, by noise in
                  the queries or by flatter attention, at the same cost to the teacher in KL

Retrieval is measured with queries multiplied by 1, 2 and 3, and by what is best for the arm. What is best is chosen on
other trials than those that it is judged on.

    python -m experiments.rivals temperature 0 runs/rivals/temperature-0 --checkpoints runs
    python -m experiments.rivals argmax_labels 0 runs/rivals/argmax_labels-0 --checkpoints runs
"""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from transformers import LlamaConfig

from experiments import phase_scaling, toy_checkpoints
from experiments.rival_arms import (
    ALWAYS_JUDGED,
    ARMS,
    CONTROL_OF,
    DISTANCES,
    FAR,
    JUDGING,
    KNOWN,
    LOG_N,
    MEASURED_TOO,
    SELECTION,
    SHORT_DISTANCES,
    TEMPERATURES,
    TEMPERED,
    TOGETHER,
    UNSCALED,
    UNTRAINED,
    best_temperature,
)
from experiments.rival_lessons import (
    CALIBRATION_WINDOWS,
    DISTURBED,
    SHIFT,
    disturb,
)
from experiments.rival_verdicts import judged, shown
from experiments.stages import Options, Stage
from experiments.toy_checkpoints import LARGE_THETA, LONG, SHORT, SHORT_DOCUMENTS, CheckpointsIn
from experiments.training import trained
from rope_probe import (
    AttentionTemperature,
    HookedCausalLM,
    KeyValueTask,
    load_model,
    retrieval_accuracy,
)
from rope_probe.distillation import Phase
from rope_probe.distillation.log import LOSSES, history_rows
from rope_probe.errors import InputError
from rope_probe.models import checkpoints
from rope_probe.names import MISSED_GATE
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.results import new_run, read_manifest
from rope_probe.runs.tables import Tables
from rope_probe.runs.verdicts import Section
from rope_probe.seeds import derive

QUESTION = "Which of the toy results have a simpler explanation: temperature, labels, masks, data, or any disturbance?"
PREDICTIONS = {
    1: "Temperature alone: the base with theta swapped, untrained, finds nothing far away (.10 or less), and .60 or "
    "more with its queries at their best temperature. A fixed factor of 3 does better than log n, by .10 or more.",
    2: "Temperature explains half or more of what KD gains. At 1,000 tokens KD is ahead of the base at its best all "
    "the same, by .10 or more.",
    3: "A temperature adds nothing to KD's student: at its best it is within .05 of what it is unscaled.",
    4: "Cross-entropy takes the latent skill away: at its best temperature it is below the base at its own by .30 or "
    "more.",
    5: "Logits are not needed: students of the teacher's most likely token, and of a drawn one, reach .90 or more.",
    6: "With the teacher masked, alone or with the student, nothing is found far away (.10 or less). With the student "
    "masked and not the teacher, likewise. At its best temperature a masked student is within .15 of the base at its "
    "own, since nothing in its training speaks of far keys; the unmasked student of a masked teacher is below .50.",
    7: "KL at the positions of values is enough, .90 or more; KL at all others teaches nothing, .10 or less.",
    8: "No learning rate makes cross-entropy work: .10 or less for all. The lowest keeps more of the latent skill than "
    "the highest, by .20 or more.",
    9: "Where labels of repeated keys agree in a window, cross-entropy works as KD does: .90 or more for both.",
    10: "A teacher of twice the width teaches the same, .90 or more.",
    11: "A teacher shifted by 16 tokens teaches nothing, .10 or less. Noise in its queries and flatter attention, at "
    "the same cost in KL, leave a student that finds .50 or more: what teaches is what is left of the teacher's own "
    "retrieval, so the student is within .20 of its disturbed teacher.",
}
"""Written before the first run. Far: the mean over 128, 256, 512 and 1,000 tokens in a window of 1,024, queries as they
are unless it says otherwise. Known before: for one seed the untrained base at queries times 3 found .97, .92 and .52 at
128, 512 and 1,000 tokens, .00 unscaled; and all that docs/toy_findings.md tells of phase_scaling's arms."""
FIGURES = dict.fromkeys(PREDICTIONS, ("retrieval_by_temperature",))
"""The drawings that show what a prediction is about, by its number."""


@dataclass(frozen=True)
class Trials:
    """Trials at each distance: to choose a temperature, and to judge it."""

    selection: int = 16
    judging: int = 64


THOROUGH, QUICK = Trials(), Trials(8, 16)


def run(
    what: str,
    seed: int,
    out: Path,
    checkpoints_in: CheckpointsIn = Path("runs"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer trials.")] = False,
) -> None:
    """Train the wide teacher ("teacher"), measure untrained and known students ("temperature"), or train an arm."""
    torch.set_num_threads(1)
    if what == "teacher":
        _train_teacher(seed, out)
    elif what == "temperature" or what in KNOWN:
        _measure_known(what, seed, out, checkpoints_in, quick)
    elif what in ARMS:
        _extend(what, seed, out, checkpoints_in)
    else:
        known = ("teacher", "temperature", *KNOWN, *ARMS)
        raise InputError(f"arm {what!r} is unknown; known are {', '.join(known)}")


# Measuring ------------------------------------------------------------------------------------------------------------


def scaled(temperature: str) -> AttentionTemperature:
    """The perturbation of a temperature, by its name."""
    if temperature == LOG_N:
        return AttentionTemperature("log_n", reference=SHORT)
    return AttentionTemperature(float(temperature))


def tempered(model: HookedCausalLM, seed: int, trials: Trials, *, judge_all: bool = False) -> pd.DataFrame:
    """Retrieval at every temperature on trials to choose by, and at some on others; rows of TEMPERED but their model.

    Judged are those of ALWAYS_JUDGED and the best, or all of them; in the short window too.
    """
    frames = []

    def measure(purpose: str, temperature: str, probes: list[tuple[int, tuple[int, ...]]], count: int) -> None:
        hooks = [] if temperature == UNSCALED else scaled(temperature).hooks(model)
        with model.hooks(fwd_hooks=hooks):
            for window, distances in probes:
                task = KeyValueTask(SHORT_DOCUMENTS, window)
                frame = retrieval_accuracy(model, task, distances, trials=count, seed=derive(seed, purpose))
                frames.append(frame.assign(purpose=purpose, temperature=temperature))

    for temperature in TEMPERATURES:
        measure(SELECTION, temperature, [(LONG, FAR)], trials.selection)
    best = best_temperature(pd.concat(frames))
    for temperature in TEMPERATURES:
        if judge_all or temperature in (*ALWAYS_JUDGED, best):
            measure(JUDGING, temperature, [(LONG, DISTANCES), (SHORT, SHORT_DISTANCES)], trials.judging)
    columns = [column for column in TEMPERED.columns if column in frames[0]]
    return pd.concat(frames, ignore_index=True)[columns]


def _measure_known(what: str, seed: int, out: Path, checkpoints_in: Path, quick: bool) -> None:
    names = TOGETHER if what == "temperature" else (what,)
    trials = QUICK if quick else THOROUGH
    with new_run(out, "rivals", known_config(what, seed, checkpoints_in, quick=quick), overwrite=True) as made:
        for name in names:
            if name == UNTRAINED:
                base = checkpoints.load(checkpoints_in / f"base-{seed}" / "checkpoint")
                model = load_model(checkpoints.with_rope(base, LARGE_THETA))
            else:
                model = load_model(checkpoints_in / "phase_scaling" / f"{name}-{seed}" / "checkpoint")
            frame = tempered(model, seed, trials, judge_all=name == UNTRAINED)
            made.record(TEMPERED, frame, model=name, seed=seed, control=CONTROL_OF[name])
            made.provenance.add_model(name, model)
            _tell(name, seed, frame)


def _tell(name: str, seed: int, frame: pd.DataFrame) -> None:
    rows = frame[(frame["purpose"] == JUDGING) & (frame["metric"] == "accuracy") & (frame["seq_len"] == LONG)]
    print(name, seed, "best temperature", best_temperature(frame), file=sys.stderr)
    print(rows.pivot_table(index="temperature", columns="distance", values="value").round(2), file=sys.stderr)


# Training -------------------------------------------------------------------------------------------------------------


def phase_of(name: str) -> Phase:
    """The extension of an arm: that of `kd_phase_wise`, but for what the arm is about."""
    arm = ARMS[name]
    plain = phase_scaling.phase_of(phase_scaling.ARMS["kd_phase_wise"])
    assert plain.matrix_lr is not None
    return dataclasses.replace(
        plain,
        data=arm.data,
        terms=arm.terms,
        masked=arm.masked,
        teacher_masked=arm.teacher_masked,
        lr=arm.rate * plain.lr,
        matrix_lr=arm.rate * plain.matrix_lr,
    )


def _extend(name: str, seed: int, out: Path, checkpoints_in: Path) -> None:
    arm, phase = ARMS[name], phase_of(name)
    with new_run(out, "rivals", config_of(name, seed, checkpoints_in), overwrite=True) as made:
        base = checkpoints.load(checkpoints_in / f"base-{seed}" / "checkpoint")
        student = load_model(checkpoints.with_rope(base, LARGE_THETA))
        teacher = None
        if arm.teacher in needs(name):
            teacher = load_model(checkpoints_in / f"{arm.teacher}-{seed}" / "checkpoint")
            if arm.disturbance is not None:
                cost = disturb(teacher, arm.disturbance, seed, DISTANCES, trials=THOROUGH.judging)
                made.record(DISTURBED, cost, model=name, seed=seed, disturbance=arm.disturbance)
        history = trained(f"{name} {seed}", student, phase, seed=derive(seed, "extension"), teacher=teacher)
        made.record(LOSSES, history_rows(history, "loss"), model=name, seed=seed, phase="extension", seq_len=LONG)
        made.provenance.add_tokens("extension", phase.batch(derive(seed, "extension"), 0))
        frame = tempered(student, seed, THOROUGH)
        made.record(TEMPERED, frame, model=name, seed=seed, control=arm.control)
        made.provenance.add_model(name, student)
        checkpoints.save(student.release(), made.folder / "checkpoint")
    _tell(name, seed, frame)


def wide_architecture(rope_parameters: dict) -> LlamaConfig:
    """The toy Llama at twice the width: 4 heads of 32."""
    config = toy_checkpoints.architecture(rope_parameters)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, name, 2 * getattr(config, name))
    return config


def _train_teacher(seed: int, out: Path) -> None:
    missed = None
    with new_run(out, "rivals", teacher_config(seed), overwrite=True) as made:
        phases = toy_checkpoints.PHASES["teacher"]
        rope = {"rope_type": "default", "rope_theta": phases[0].theta}
        model = load_model(checkpoints.build(wide_architecture(rope), seed=derive(seed, "wide_teacher", "weights")))
        for phase in phases:
            what = f"wide teacher {seed}, {phase.name}"
            _, gate, missed = toy_checkpoints.train_to_gate(model, phase, derive(seed, what), what)
            gate = gate.assign(metric="gate_accuracy", phase=phase.name)
            made.record(RETRIEVAL, gate, model="wide_teacher", seed=seed)
            print(gate[["distance", "value", "low", "high"]].to_string(index=False), file=sys.stderr)
            if missed:
                print(missed, file=sys.stderr)
                break
        made.provenance.add_model("wide_teacher", model)
        checkpoints.save(model.release(), made.folder / "checkpoint")
        made.manifest["missed_gate"] = missed
    if missed:
        raise typer.Exit(MISSED_GATE)


# Configurations and stages --------------------------------------------------------------------------------------------


def needs(name: str) -> tuple[str, ...]:
    """The checkpoints an arm starts from: the base, and the teacher where a term reads one."""
    arm = ARMS[name]
    return ("base", arm.teacher) if any(term.teacher is not None for term in arm.terms) else ("base",)


def _weights(runs: list[Path]) -> list[str]:
    return [model["weights_sha256"] for made in runs for model in read_manifest(made)["models"].values()]


def _probe(trials: Trials) -> dict[str, Any]:
    return {**dataclasses.asdict(trials), "distances": DISTANCES, "temperatures": TEMPERATURES}


def config_of(name: str, seed: int, checkpoints_in: Path) -> dict:
    """The whole configuration of an arm, as its manifest holds it: the checkpoints by their weights."""
    disturbance = {"disturbance": ARMS[name].disturbance, "shift": SHIFT, "windows": CALIBRATION_WINDOWS}
    return {
        "arm": name,
        "seed": seed,
        "theta": LARGE_THETA,
        "phase": dataclasses.asdict(phase_of(name)),
        **(disturbance if ARMS[name].disturbance else {}),
        "weights_sha256": _weights([checkpoints_in / f"{role}-{seed}" for role in needs(name)]),
        "probe": _probe(THOROUGH),
    }


def _known_runs(what: str, seed: int) -> list[str]:
    """The runs whose checkpoints a stage without training reads, by the name of their stage."""
    names = TOGETHER if what == "temperature" else (what,)
    return [f"base-{seed}" if name == UNTRAINED else f"phase_scaling/{name}-{seed}" for name in names]


def known_config(what: str, seed: int, checkpoints_in: Path, *, quick: bool) -> dict:
    """The configuration of a stage that trains nothing."""
    weights = _weights([checkpoints_in / run for run in _known_runs(what, seed)])
    return {"what": what, "seed": seed, "weights_sha256": weights, "probe": _probe(QUICK if quick else THOROUGH)}


def teacher_config(seed: int) -> dict:
    """The configuration of the wide teacher."""
    phases = [dataclasses.asdict(phase) for phase in toy_checkpoints.PHASES["teacher"]]
    return {
        "role": "wide_teacher",
        "seed": seed,
        "architecture": wide_architecture({}).to_diff_dict(),
        "phases": phases,
    }


def stages(options: Options) -> dict[str, Stage]:
    """Temperatures of base, KD and cross-entropy; in full every arm and the wide teacher, and more trials."""
    planned: dict[str, Stage] = {}
    quick = not options.full
    for seed in range(options.seeds):
        if options.full:
            teacher = options.out / f"wide_teacher-{seed}"
            command = ("rivals", "teacher", str(seed), str(teacher))
            planned[teacher.name] = Stage(command, teacher, partial(teacher_config, seed), seconds=400.0)
        for what in ("temperature", *(() if quick else (*MEASURED_TOO, *ARMS))):
            folder = options.out / "rivals" / f"{what}-{seed}"
            measuring = ["rivals", what, str(seed), str(folder), "--checkpoints", str(options.out)]
            if what in ARMS:
                config = partial(config_of, what, seed, options.out)
                sources, seconds = tuple(f"{role}-{seed}" for role in needs(what)), 140.0
            else:
                measuring += ["--quick"] if quick else []
                config = partial(known_config, what, seed, options.out, quick=quick)
                sources, seconds = tuple(_known_runs(what, seed)), 40.0
            planned[f"rivals/{folder.name}"] = Stage(tuple(measuring), folder, config, sources, seconds=seconds)
    return planned


def report(results: Mapping[str, Tables]) -> Section:
    """Retrieval by temperature, what temperature explains of each gain, and the predictions."""
    mine = results["rivals"]
    return Section(judged(mine), shown(mine))


if __name__ == "__main__":
    try:
        typer.run(run)
    except InputError as error:
        sys.exit(f"error: {error}")
