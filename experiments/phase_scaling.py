"""Phase-wise RoPE scaling: which theta, and which objective, gives a short-window base the long window.

Every arm extends a base that only saw 64-token windows to 1,024 tokens, on the same budget of packed 64-token documents
(the ceiling and the ones of more short training aside), and is then probed for retrieval by distance.

    python -m experiments.phase_scaling kd_phase_wise 0 runs/phase_scaling/kd_phase_wise-0 --checkpoints runs
"""

import dataclasses
import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import typer

from experiments.stages import Options, Stage
from experiments.toy_checkpoints import (
    BATCH_TOKENS,
    CE,
    LARGE_THETA,
    LONG,
    LONG_DOCUMENTS,
    OPTIMISER,
    SHORT,
    SHORT_DOCUMENTS,
    SMALL_THETA,
    CheckpointsIn,
    by_distance,
)
from experiments.training import trained
from rope_probe import HookedCausalLM, KeyValueStream, KeyValueTask, load_model, retrieval_accuracy, rope
from rope_probe.distillation import Divergence, Phase, Term
from rope_probe.distillation.log import LOSSES, history_rows
from rope_probe.errors import InputError
from rope_probe.models import checkpoints
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.intervals import share_difference_interval, share_interval
from rope_probe.runs.results import new_run, read_manifest
from rope_probe.runs.tables import Metric, Tables, declare
from rope_probe.runs.verdicts import Section, decided, in_words, verdict, verdicts
from rope_probe.seeds import derive

QUESTION = "Which theta for which phase, and which objective, gives a short-window base the long window?"
PREDICTIONS = {
    1: "KD with theta chosen per phase (300, then 20,000) transfers the teacher's retrieval: .95 or more.",
    2: "CE on the same documents does not, whatever its theta: .10 or less. Keys that collide between documents "
    "have independent values there, so CE learns not to look past the document.",
    3: "KD at the small theta throughout does not: .10 or less. Beyond the wavelengths it was trained on, "
    "nothing carries the match.",
    4: "KD at the large theta throughout ties with phase-wise at this head dim (32), as the base gets by in its "
    "short window with the slow pairs unused.",
    5: "KD from a teacher with masked documents does not: .10 or less, since its logits are blind to what came before.",
    6: "KD with disjoint keys does not: .10 or less; the accidental collisions carry the transfer.",
    7: "Swapping theta without training does not: .10 or less. CE on real long documents, the ceiling, does: .95 "
    "or more.",
    8: "With AdamW for all weights instead of Muon for the matrices, KD transfers too, .95 or more, and CE does "
    "not, .10 or less; nor does as much training more in the short window, .10 or less. These arms are there "
    "for what they do to the weights (experiments/query_spans.py): Muon gives every direction of a matrix the "
    "same step.",
}
"""Written before the first run, for accuracy at 512 tokens, 8 times the document length."""
FIGURES = {
    1: ("retrieval_by_distance",),
    2: ("retrieval_by_distance",),
    3: ("rotations_by_pair", "retrieval_by_distance"),
    4: ("rotations_by_pair", "retrieval_by_distance"),
    5: ("retrieval_by_distance",),
    6: ("retrieval_by_distance",),
    7: ("retrieval_by_distance",),
    8: ("retrieval_by_distance",),
}
"""The drawings that show what a prediction is about, by its number."""

QUICK_ARMS = ("kd_phase_wise", "base", "theta_swapped", "ce_phase_wise", "kd_small_theta")
STEPS = 250
DISTANCES = (32, 64, 128, 256, 512, 768, 1000)
SHORT_DISTANCES = (8, 32, 60)
TRIALS = 128
HEAD_DIM = 32
BASE_THETAS = {"base": SMALL_THETA, "base_large_theta": LARGE_THETA}

ADAMW: dict[str, Any] = {"lr": 2e-3, "matrix_lr": None}
KD = (Divergence(),)
GEOMETRY = declare(
    "geometry",
    "How each phase of training uses the rotary spectrum, and on what documents.",
    ("phase", "seq_len", "pair", "wavelength"),
    {
        "rotations": Metric("full turns of a pair over the phase's window"),
        "spectrum_use": Metric("share of pairs that complete a turn there"),
        "document_length": Metric("length of the documents", "tokens"),
    },
)


@dataclasses.dataclass(frozen=True)
class Arm:
    """How a base is extended: from which base, to which theta and window, on what data, towards what, by what."""

    base: str = "base"
    theta: float = LARGE_THETA
    objective: tuple[Term, ...] | None = KD
    data: KeyValueStream = SHORT_DOCUMENTS
    teacher_masked: bool = False
    window: int = LONG
    lr: float = OPTIMISER["lr"]
    matrix_lr: float | None = OPTIMISER["matrix_lr"]


ARMS = {
    "base": Arm(theta=SMALL_THETA, objective=None),
    "theta_swapped": Arm(objective=None),
    "kd_phase_wise": Arm(),
    "kd_small_theta": Arm(theta=SMALL_THETA),
    "kd_large_theta": Arm(base="base_large_theta"),
    "ce_phase_wise": Arm(objective=CE),
    "ce_small_theta": Arm(theta=SMALL_THETA, objective=CE),
    "ce_large_theta": Arm(base="base_large_theta", objective=CE),
    "kd_teacher_masked": Arm(teacher_masked=True),
    "kd_disjoint_keys": Arm(data=dataclasses.replace(SHORT_DOCUMENTS, disjoint=True)),
    "ce_long_documents": Arm(objective=CE, data=LONG_DOCUMENTS),
    "ce_more_short": Arm(theta=SMALL_THETA, objective=CE, window=SHORT),
    "kd_adamw": Arm(**ADAMW),
    "ce_adamw": Arm(objective=CE, **ADAMW),
    "ce_more_short_adamw": Arm(theta=SMALL_THETA, objective=CE, window=SHORT, **ADAMW),
}


def extend(
    name: str,
    seed: int,
    out: Path,
    checkpoints_in: CheckpointsIn = Path("runs"),
) -> None:
    """Run one arm with one seed into the run directory `out`."""
    if name not in ARMS:
        raise InputError(f"arm {name!r} is unknown; known are {', '.join(ARMS)}")
    torch.set_num_threads(1)
    arm = ARMS[name]
    with new_run(out, "phase_scaling", config_of(name, seed, checkpoints_in), overwrite=True) as run:
        base = checkpoints.load(checkpoints_in / f"{arm.base}-{seed}" / "checkpoint")
        student = load_model(checkpoints.with_rope(base, arm.theta))
        if arm.objective is not None:
            taught = "teacher" in needs(name)
            teacher = load_model(checkpoints_in / f"teacher-{seed}" / "checkpoint") if taught else None
            phase = phase_of(arm)
            history = trained(f"{name} {seed}", student, phase, seed=derive(seed, "extension"), teacher=teacher)
            losses = history_rows(history, "loss", "ce_nats", "kd_nats")
            run.record(LOSSES, losses, model=name, seed=seed, phase="extension", seq_len=arm.window)
            first = phase.batch(derive(seed, "extension"), 0)
            run.provenance.add_tokens("extension", first, teacher_masked=phase.teacher_masked if taught else None)
        run.record(GEOMETRY, geometry(arm), model=name, seed=seed)
        measured = measure(student, seed)
        run.record(RETRIEVAL, measured, model=name, seed=seed, phase="extension")
        run.provenance.add_model(name, student)
        checkpoints.save(student.release(), run.folder / "checkpoint")
    accuracy = measured[(measured["metric"] == "accuracy") & (measured["seq_len"] == LONG)]
    print(name, seed, dict(zip(accuracy["distance"], accuracy["value"].round(2), strict=True)), file=sys.stderr)


def phase_of(arm: Arm) -> Phase:
    """The extension phase of an arm; the same budget for all."""
    if arm.objective is None:
        raise InputError("this arm does not train")
    return Phase(
        "extension",
        arm.data,
        arm.window,
        STEPS,
        BATCH_TOKENS,
        theta=arm.theta,
        terms=arm.objective,
        chunk=BATCH_TOKENS,
        teacher_masked=arm.teacher_masked,
        lr=arm.lr,
        matrix_lr=arm.matrix_lr,
    )


def geometry(arm: Arm) -> pd.DataFrame:
    """How each phase of an arm uses the rotary spectrum, and on what documents: see `rope.spectrum_use`.

    Metrics: `rotations` of each pair over the phase's window, `spectrum_use`, `document_length` in tokens.
    """
    extension = (arm.window, arm.theta, arm.data.document_length)
    phases = {"short": (SHORT, BASE_THETAS[arm.base], SHORT)} | ({"extension": extension} if arm.objective else {})
    rows: list[dict] = []
    for phase, (window, theta, length) in phases.items():
        columns = {"phase": phase, "seq_len": window}
        inv_freq = rope.inv_freq({"rope_type": "default", "rope_theta": theta}, HEAD_DIM)
        turns = zip(rope.wavelengths(inv_freq).tolist(), rope.rotations(inv_freq, window).tolist(), strict=True)
        rows += [
            {**columns, "metric": "rotations", "pair": pair, "wavelength": wavelength, "value": value}
            for pair, (wavelength, value) in enumerate(turns)
        ]
        rows.append({**columns, "metric": "spectrum_use", "value": rope.spectrum_use(inv_freq, window)})
        rows.append({**columns, "metric": "document_length", "value": length})
    return GEOMETRY.frame(rows)


def needs(name: str) -> tuple[str, ...]:
    """The toy checkpoints an arm starts from: its base, and the teacher where it has one."""
    arm = ARMS[name]
    taught = any(term.teacher is not None for term in arm.objective or ())
    return (arm.base, "teacher") if taught else (arm.base,)


def config_of(name: str, seed: int, checkpoints_in: Path) -> dict:
    """The whole configuration of an arm, as its manifest holds it: the checkpoints by their weights."""
    arm = ARMS[name]
    sources = [checkpoints_in / f"{role}-{seed}" for role in needs(name)]
    weights = [model["weights_sha256"] for run in sources for model in read_manifest(run)["models"].values()]
    phase = None if arm.objective is None else dataclasses.asdict(phase_of(arm))
    probe = {"trials": TRIALS, "distances": DISTANCES, "short_distances": SHORT_DISTANCES}
    return {"arm": name, "seed": seed, "theta": arm.theta, "phase": phase, "weights_sha256": weights, "probe": probe}


def measure(model: HookedCausalLM, seed: int) -> pd.DataFrame:
    """Retrieval by distance in the long window, and what is left of it in the short one."""
    frames = [
        retrieval_accuracy(
            model, KeyValueTask(SHORT_DOCUMENTS, window), distances, trials=TRIALS, seed=derive(seed, "probe")
        )
        for window, distances in ((LONG, DISTANCES), (SHORT, SHORT_DISTANCES))
    ]
    return pd.concat(frames)


MUCH, LITTLE = (0.95, math.inf), (-math.inf, 0.10)
BOUNDS = (
    (1, "kd_phase_wise", MUCH),
    *((2, f"ce_{theta}", LITTLE) for theta in ("phase_wise", "small_theta", "large_theta")),
    (3, "kd_small_theta", LITTLE),
    (5, "kd_teacher_masked", LITTLE),
    (6, "kd_disjoint_keys", LITTLE),
    (7, "theta_swapped", LITTLE),
    (7, "ce_long_documents", MUCH),
    (8, "kd_adamw", MUCH),
    *((8, arm, LITTLE) for arm in ("ce_adamw", "ce_more_short", "ce_more_short_adamw")),
)
"""What each prediction says of an arm: accuracy far away, from the one to the other."""
FAR, TIE = 8 * SHORT, 0.05


def stages(options: Options) -> dict[str, Stage]:
    """Every arm, or the quick ones, of each seed."""
    planned = {}
    for seed in range(options.seeds):
        for name in ARMS if options.full else QUICK_ARMS:
            run = options.out / "phase_scaling" / f"{name}-{seed}"
            command = ("phase_scaling", name, str(seed), str(run), "--checkpoints", str(options.out))
            trains = ARMS[name].objective is not None
            planned[f"phase_scaling/{run.name}"] = Stage(
                command,
                run,
                partial(config_of, name, seed, options.out),
                tuple(f"{role}-{seed}" for role in needs(name)),
                seconds=100.0 if trains else 12.0,
            )
    return planned


def report(results: Mapping[str, Tables]) -> Section:
    """Retrieval by distance in both windows, and the predictions for the arms that were run."""
    frame = results["phase_scaling"]["retrieval"]
    accuracy = frame[frame["metric"] == "accuracy"]
    tables = {
        f"retrieval in a window of {window} tokens after the extension, accuracy by distance": by_distance(
            part, ["model", "seed"]
        )
        for window, part in accuracy.groupby("seq_len")
    }
    return Section(judged(frame), tables)


def judged(frame: pd.DataFrame) -> pd.DataFrame:
    """The predictions for the arms that were run: mean accuracy at 8 times the document length, and whether it held.

    A bound, or a tie's margin, is held against the whole interval: a claim that the interval crosses is undecided. The
    interval carries seeds and trials (`share_interval`); with one seed, trials alone. One seed decides no tie.
    """
    far = frame[(frame["metric"] == "accuracy") & (frame["seq_len"] == LONG) & (frame["distance"] == FAR)]
    by_arm = {arm: part.set_index("seed") for arm, part in far.groupby("model")}
    rows = []
    for prediction, arm, (least, most) in BOUNDS:
        if arm in by_arm:
            part = by_arm[arm]
            mean, low, high = mean_and_interval(part)
            held = decided(low, high, least, most)
            claim = f"{arm}: accuracy at {FAR} tokens {in_words(least, most)}"
            rows.append(verdict(prediction, claim, mean, held, n=len(part), low=low, high=high))
    if {"kd_phase_wise", "kd_large_theta"} <= set(by_arm):
        one, other = (by_arm[arm].reset_index() for arm in ("kd_phase_wise", "kd_large_theta"))
        (apart, low, high), seeds = difference_and_interval(one, other)
        if seeds == 1:
            low, high = -math.inf, math.inf
        claim = f"kd_phase_wise less kd_large_theta, {in_words(-TIE, TIE)}"
        rows.append(verdict(4, claim, apart, decided(low, high, -TIE, TIE), n=seeds, low=low, high=high))
    return verdicts(rows)


def mean_and_interval(rows: pd.DataFrame) -> tuple[float, float, float]:
    """The mean accuracy over seeds with the interval that carries seeds and trials; of one seed, that over trials."""
    if len(rows) == 1:
        low, high = rows["low"].item(), rows["high"].item()
    else:
        low, high = share_interval(rows["value"], trials_of(rows))
    return rows["value"].mean(), low, high


def difference_and_interval(one: pd.DataFrame, other: pd.DataFrame) -> tuple[tuple[float, float, float], int]:
    """The mean accuracy of one less another over the seeds that both have, its interval, and the number of seeds.

    The interval carries seeds and trials; without a seed in common the numbers are nan.
    """
    one, other = one.set_index("seed"), other.set_index("seed")
    common = one.index.intersection(other.index)
    if common.empty:
        return (math.nan, math.nan, math.nan), 0
    one, other = one.loc[common], other.loc[common]
    low, high = share_difference_interval(one["value"], other["value"], trials_of(one), trials_of(other))
    return ((one["value"] - other["value"]).mean(), low, high), len(common)


def trials_of(rows: pd.DataFrame) -> pd.Series:
    """Trials of each row; of runs that do not tell them, this experiment's own."""
    trials = rows["trials"] if "trials" in rows else pd.Series(pd.NA, index=rows.index, dtype="Int64")
    return trials.fillna(TRIALS).astype(float)


if __name__ == "__main__":
    try:
        typer.run(extend)
    except InputError as error:
        sys.exit(f"error: {error}")
