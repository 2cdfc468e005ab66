"""LongReD and its kin at toy scale: what extension does to short text, and what restores it.

A base learns key-value retrieval in windows of 64 and then of 256 tokens (theta 2,000), each until its gate passes; in
windows of 256 alone, seed 0 still had a loss of 5.0 nats after 367 steps. Every arm extends it to
1,024 tokens (theta 100,000), f = 4 as in LongReD (arXiv 2502.07365), on the same tokens, steps and optimiser. Long text
is documents of 1,024 tokens, short text documents of 256. The KD arms learn from the teacher of `toy_checkpoints`.

LongReD's arms have its mix and weights: of 8 windows of 1,024 tokens, 4 long, 3 short and 1 short-to-long in tokens.
Other arms of two streams give each one half of the tokens. Ablations change one thing of `longred_u`, seed 0.

    python -m experiments.longred base 0 runs/longred_base-0
    python -m experiments.longred longred_u 0 runs/longred/longred_u-0 --checkpoints runs
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
from scipy import stats

from experiments.stages import Options, Stage
from experiments.toy_checkpoints import (
    BATCH_TOKENS,
    BY_CE,
    LONG,
    LONG_DOCUMENTS,
    OPTIMISER,
    CheckpointsIn,
    architecture,
    by_distance,
    short_phase,
    train_and_record,
)
from experiments.training import trained
from rope_probe import (
    AttentionTemperature,
    HookedCausalLM,
    KeyValueStream,
    KeyValueTask,
    load_model,
    retrieval_accuracy,
)
from rope_probe.distillation import CrossEntropy, Divergence, Gate, HiddenStates, Phase, Term
from rope_probe.distillation.log import LOSSES, history_rows
from rope_probe.distillation.loop import ORIGINAL
from rope_probe.distillation.sites import last_site, sites_of_layers
from rope_probe.distillation.streams import Stream
from rope_probe.distillation.terms.relations import Relations, relation_sites
from rope_probe.errors import InputError
from rope_probe.models import checkpoints
from rope_probe.names import MISSED_GATE
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.intervals import share_difference_interval, share_interval, student_interval
from rope_probe.runs.results import new_run, read_manifest
from rope_probe.runs.tables import Column, Metric, Tables, declare
from rope_probe.runs.verdicts import Section, decided, in_words, verdict, verdicts
from rope_probe.seeds import derive
from rope_probe.spans.drift import ATTENTION_KL, COSINE_DISTANCE, DRIFT, EXTENDED_LOSS, FINAL_NORM, drift
from rope_probe.tracing.cone import LOGITS
from rope_probe.windows.packing import Window

QUESTION = "What does extension do to short text, and does holding on to the original restore it?"
PREDICTIONS = {
    1: "Swapping theta without training drifts and costs short skill: accuracy at least .10 below the original's. It "
    "retrieves nothing far: .10 or less.",
    2: "Long cross-entropy gives far retrieval, .90 or more, and keeps short skill within .05 of the original, since "
    "long documents also ask for what is near. It drifts all the same.",
    3: "Mixed cross-entropy keeps short skill within .05 of the original.",
    4: "Both LongReD arms drift less in the last hidden state than mixed cross-entropy, and win no short skill over "
    "it: within .05 of each other.",
    5: "Far retrieval of both LongReD arms is below that of long cross-entropy by .05 or more: half the long tokens.",
    6: "LongReD-C and LongReD-U tie in far retrieval, within .05.",
    7: "KD on packed short documents gives far retrieval, .90 or more. Restoration beside it lessens drift of the last "
    "hidden state.",
    8: "LinearARD's attention KL is below that of long cross-entropy.",
    9: "PoSE gives little far retrieval, .30 or less, as its windows never hold as many keys as the long one; queries "
    "scaled by 3 bring it to .50 or more.",
    10: "A temperature alone does much: the theta-swapped base, untrained, with queries scaled by 3, finds .50 or more "
    "far away.",
    11: "With a larger weight of the short term (0, 2, 5, 10) drift of the last hidden state falls, in that order.",
    12: "Restoring the last state alone leaves it as near to the original's as restoring both layers does, within .01. "
    "Restoring the first layer alone leaves it farther away, by .01 or more.",
    13: "Shorter text restores less: with short documents of 64 tokens the last state of 256 tokens drifts more than "
    "with 256, by .01 or more. Far retrieval is the same within .05.",
}
"""Written before the first run, 12 and 13 before the first ablation.

Far: 512, 768 and 1,000 tokens in a window of 1,024. Short skill: 16 to 240 tokens in a window of 256."""
FIGURES = {
    1: ("trade_off", "drift_by_layer"),
    2: ("trade_off", "drift_by_layer"),
    3: ("trade_off",),
    4: ("drift_by_layer", "trade_off"),
    5: ("trade_off",),
    6: ("trade_off",),
    7: ("trade_off", "drift_by_layer"),
    8: ("drift_by_layer",),
    9: ("trade_off",),
    10: ("trade_off",),
    11: ("drift_by_layer",),
    12: ("drift_by_layer",),
    13: ("drift_by_layer", "trade_off"),
}
"""The drawings that show what a prediction is about, by its number."""

SHORT = 256
SMALL_THETA, LARGE_THETA = 2_000.0, 100_000.0
"""Near the base bound of 256 tokens (2,168 at head dim 32), and above that of 1,024 (58,153)."""
STEPS = 120
WARMUP = 20
TRIALS = 128
DISTANCES = (32, 64, 128, 256, 512, 768, 1000)
SHORT_DISTANCES = (16, 64, 128, 240)
FAR = (512, 768, 1000)
QUERY_SCALES = (1.0, 2.0, 3.0)
DRIFT_WINDOWS = 16
LAYERS = 2
NO_WEIGHT = 1e-6
"""What stands for 0, since a stream needs a weight above it."""
SHORT_DOCUMENTS = KeyValueStream(SHORT, distinct=(8, 64))

SKILLS = declare(
    "skills",
    "What a model can do in the window that it was first trained in, and far away in the one that it was extended to. "
    "Values are means over several distances; intervals are over trials.",
    ("arm", "seq_len", "query_scale", "trials", "low", "high"),
    {
        "short_accuracy": Metric("share of keys whose value is found in the short window"),
        "long_accuracy": Metric("share of keys whose value is found far away in the long window"),
        "short_loss_nats": Metric("minus the log-probability of the value in the short window", "nats"),
        "long_loss_nats": Metric("minus the log-probability of the value far away in the long window", "nats"),
    },
    own={
        "query_scale": Column("float64", "what queries of all layers are multiplied by after rotation; 1 for nothing"),
        "trials": Column("Int64", "trials of this seed, over all distances"),
    },
)

CE = CrossEntropy()
ALL_SITES = sites_of_layers(range(LAYERS), LAYERS)


@dataclasses.dataclass(frozen=True)
class Arm:
    """How the base is extended: to which theta, by which streams; without streams it is not trained.

    `group` says what is compared with what: the arms, or an ablation.
    """

    theta: float = LARGE_THETA
    streams: tuple[Stream, ...] = ()
    group: str = "arms"


def _short_documents(length: int) -> KeyValueStream:
    """Documents like the short ones of another length: a quarter of their pairs to half of them are distinct keys."""
    return dataclasses.replace(
        SHORT_DOCUMENTS, document_length=length, distinct=(max(length // 32, 2), max(length // 4, 4))
    )


def _long(term: Term = CE, share: float = 8) -> Stream:
    return Stream(data=LONG_DOCUMENTS, window=LONG, share=share, terms=(term,), name="long", chunk=BATCH_TOKENS)


def _short(term: Term, share: float = 8, length: int = SHORT) -> Stream:
    data = _short_documents(length)
    return Stream(data=data, window=length, share=share, terms=(term,), name="short", chunk=BATCH_TOKENS)


def _restoration(weight: float = 5.0, sites: tuple[str, ...] = ALL_SITES) -> Term:
    return HiddenStates(weight, ORIGINAL, sites)


def _longred(
    positions: Any, weight: float = 5.0, sites: tuple[str, ...] = ALL_SITES, length: int = SHORT
) -> tuple[Stream, ...]:
    """LongReD's mix: shares 8, 6 and 2, weights 1, 5 and 10."""
    short_to_long = Stream(
        data=SHORT_DOCUMENTS,
        window=SHORT,
        share=2,
        positions=positions,
        target_window=LONG,
        teacher_positions="continuous",
        terms=(HiddenStates(10.0, ORIGINAL, last_site()),),
        name="short_to_long",
        chunk=BATCH_TOKENS,
    )
    return (_long(), _short(_restoration(weight, sites), 6, length), short_to_long)


_PACKED = Stream(data=SHORT_DOCUMENTS, window=LONG, share=8, terms=(Divergence(),), name="packed", chunk=BATCH_TOKENS)
_POSE = Stream(
    data=SHORT_DOCUMENTS,
    window=SHORT,
    positions="pose",
    target_window=LONG,
    terms=(CE,),
    name="pose",
    chunk=BATCH_TOKENS,
)
_LINEAR_ARD = Relations(1.0, ORIGINAL, relation_sites(range(LAYERS)))
ARMS = {
    "original": Arm(theta=SMALL_THETA),
    "theta_swapped": Arm(),
    "long_ce": Arm(streams=(_long(),)),
    "mixed_ce": Arm(streams=(_long(), _short(CE))),
    "longred_c": Arm(streams=_longred("longred_cream")),
    "longred_u": Arm(streams=_longred("longred_uniform")),
    "kd_packed": Arm(streams=(_PACKED,)),
    "kd_restored": Arm(streams=(_PACKED, _short(_restoration()))),
    "linear_ard": Arm(streams=(_long(), _short(_LINEAR_ARD))),
    "pose": Arm(streams=(_POSE,)),
}
ABLATIONS = {
    "weight_0": Arm(streams=_longred("longred_uniform", weight=NO_WEIGHT), group="weight"),
    "weight_2": Arm(streams=_longred("longred_uniform", weight=2.0), group="weight"),
    "weight_10": Arm(streams=_longred("longred_uniform", weight=10.0), group="weight"),
    "last_layer": Arm(streams=_longred("longred_uniform", sites=last_site()), group="layers"),
    "first_layer": Arm(streams=_longred("longred_uniform", sites=sites_of_layers([0], LAYERS)), group="layers"),
    "short_64": Arm(streams=_longred("longred_uniform", length=64), group="short length"),
    "short_128": Arm(streams=_longred("longred_uniform", length=128), group="short length"),
}
"""What `longred_u` itself is compared with: it has weight 5, both layers, and short documents of 256 tokens."""
EVERY = ARMS | ABLATIONS


def run(
    what: str,
    seed: int,
    out: Path,
    checkpoints_in: CheckpointsIn = Path("runs"),
) -> None:
    """Train the base ("base"), or extend it by one arm or ablation, into the run directory `out`."""
    torch.set_num_threads(1)
    if what == "base":
        _train_base(seed, out)
    elif what in EVERY:
        _extend(what, seed, out, checkpoints_in)
    else:
        raise InputError(f"arm {what!r} is unknown; known are {', '.join(('base', *EVERY))}")


def base_phases() -> tuple[Phase, Phase]:
    """How the base learns: as the toy teacher does, in short windows first, then in windows of 256; theta is one."""
    gate = Gate(SHORT, SHORT_DISTANCES, 0.95, every=25)
    shortest = dataclasses.replace(short_phase(SMALL_THETA, accuracy=0.90), name="shortest")
    short = Phase(
        "short", SHORT_DOCUMENTS, SHORT, 500, BATCH_TOKENS, theta=SMALL_THETA, gate=gate, warmup=WARMUP, **BY_CE
    )
    return shortest, short


def _train_base(seed: int, out: Path) -> None:
    missed = None
    with new_run(out, "longred", base_config(seed), overwrite=True) as made:
        rope = {"rope_type": "default", "rope_theta": SMALL_THETA}
        model = load_model(checkpoints.build(architecture(rope), seed=derive(seed, "longred_base", "weights")))
        for phase in base_phases():
            if missed := train_and_record(made, model, phase, "longred_base", seed):
                break
        made.provenance.add_model("longred_base", model)
        checkpoints.save(model.release(), made.folder / "checkpoint")
        made.manifest["missed_gate"] = missed
    if missed:
        raise typer.Exit(MISSED_GATE)


def base_config(seed: int) -> dict:
    """The whole configuration of a base."""
    return {
        "role": "longred_base",
        "seed": seed,
        "architecture": architecture({}).to_diff_dict(),
        "phases": [dataclasses.asdict(phase) for phase in base_phases()],
    }


def phase_of(arm: Arm) -> Phase:
    """The extension of an arm; the same budget and optimiser for all. Raises InputError for an arm without streams."""
    if not arm.streams:
        raise InputError("this arm does not train")
    return Phase(
        "extension",
        steps=STEPS,
        batch_tokens=BATCH_TOKENS,
        theta=arm.theta,
        streams=arm.streams,
        warmup=WARMUP,
        **OPTIMISER,
    )


def _extend(name: str, seed: int, out: Path, checkpoints_in: Path) -> None:
    arm = EVERY[name]
    with new_run(out, "longred", config_of(name, seed, checkpoints_in), overwrite=True) as made:
        plain = checkpoints.load(checkpoints_in / f"longred_base-{seed}" / "checkpoint")
        student = load_model(checkpoints.with_rope(plain, arm.theta))
        original = load_model(checkpoints.load(checkpoints_in / f"longred_base-{seed}" / "checkpoint"))
        if arm.streams:
            teachers = {ORIGINAL: original}
            if "teacher" in needs(name):
                teachers["teacher"] = load_model(checkpoints_in / f"teacher-{seed}" / "checkpoint")
            phase = phase_of(arm)
            seed_of_data = derive(seed, "extension")
            history = trained(f"{name} {seed}", student, phase, seed=seed_of_data, teachers=teachers)
            made.record(LOSSES, history_rows(history), model=name, seed=seed, phase="extension", seq_len=LONG)
            for stream, batch in zip(phase.mix, phase.batches(seed_of_data, 0), strict=True):
                made.provenance.add_tokens(f"extension, {stream.name}", batch)
        measured = measure(student, seed)
        made.record(RETRIEVAL, measured, model=name, seed=seed, phase="extension")
        skilled = skills(student, seed, measured)
        made.record(SKILLS, skilled, model=name, seed=seed, arm=arm.group)
        made.record(DRIFT, drift(original, student, drift_windows(seed)), model=name, seed=seed)
        made.provenance.add_model(name, student)
        checkpoints.save(student.release(), made.folder / "checkpoint")
    print(name, seed, skilled[["metric", "query_scale", "value"]].round(3).to_string(index=False), file=sys.stderr)


def needs(name: str) -> tuple[str, ...]:
    """The checkpoints that an arm starts from: its base, and the teacher where it has one."""
    names = {term.teacher for stream in EVERY[name].streams for term in stream.terms}
    return ("longred_base", "teacher") if "teacher" in names else ("longred_base",)


def config_of(name: str, seed: int, checkpoints_in: Path) -> dict:
    """The whole configuration of an arm, as its manifest holds it: the checkpoints by their weights."""
    arm = EVERY[name]
    sources = [checkpoints_in / f"{role}-{seed}" for role in needs(name)]
    weights = [model["weights_sha256"] for run in sources for model in read_manifest(run)["models"].values()]
    phase = dataclasses.asdict(phase_of(arm)) if arm.streams else None
    probe = {"trials": TRIALS, "distances": DISTANCES, "short_distances": SHORT_DISTANCES, "scales": QUERY_SCALES}
    probe |= {"drift_windows": DRIFT_WINDOWS}
    return {"arm": name, "seed": seed, "theta": arm.theta, "phase": phase, "weights_sha256": weights, "probe": probe}


def measure(
    model: HookedCausalLM, seed: int, distances: tuple[int, ...] = DISTANCES, trials: int = TRIALS
) -> pd.DataFrame:
    """Retrieval by distance in the long window, and at all short distances in the short one."""
    frames = [
        retrieval_accuracy(model, KeyValueTask(SHORT_DOCUMENTS, window), at, trials=trials, seed=derive(seed, "probe"))
        for window, at in ((LONG, distances), (SHORT, SHORT_DISTANCES))
    ]
    return pd.concat(frames, ignore_index=True)


def skills(model: HookedCausalLM, seed: int, measured: pd.DataFrame, trials: int = TRIALS) -> pd.DataFrame:
    """Short and far skill with queries as they are, of `measured`, and with queries scaled; rows of SKILLS."""
    rows = []
    for factor in QUERY_SCALES:
        frame = measured
        if factor != 1:
            with model.hooks(fwd_hooks=AttentionTemperature(factor).hooks(model)):
                frame = measure(model, seed, FAR, trials)
        rows += skill_rows(frame, factor, trials)
    return SKILLS.frame(rows)


def skill_rows(measured: pd.DataFrame, factor: float, trials: int) -> list[dict[str, Any]]:
    """Means over distances: accuracy with Wilson's interval over all trials, loss with a normal one."""
    rows = []
    probed: tuple[tuple[str, int, tuple[int, ...]], ...] = (("short", SHORT, SHORT_DISTANCES), ("long", LONG, FAR))
    for name, window, distances in probed:
        part = measured[(measured["seq_len"] == window) & measured["distance"].isin(distances)]
        accuracy = part.loc[part["metric"] == "accuracy", "value"]
        count = trials * len(accuracy)
        low, high = stats.binomtest(round(accuracy.sum() * trials), count).proportion_ci(method="wilson")
        place = {"seq_len": window, "query_scale": factor, "trials": count}
        rows.append({**place, "metric": f"{name}_accuracy", "value": accuracy.mean(), "low": low, "high": high})
        answers = part[part["metric"] == "answer_logprob_nats"]
        half = float(np.sqrt(np.square(answers["high"] - answers["value"]).sum())) / len(answers)
        loss = -answers["value"].mean()
        rows.append({**place, "metric": f"{name}_loss_nats", "value": loss, "low": loss - half, "high": loss + half})
    return rows


def drift_windows(seed: int) -> list[Window]:
    """Short windows on which models are compared with the original, one document each."""
    tokens = SHORT_DOCUMENTS.documents(DRIFT_WINDOWS, seed=derive(seed, "drift"))
    bounds, positions = torch.tensor([0, SHORT], dtype=torch.int32), torch.arange(SHORT).unsqueeze(0)
    return [Window(row.unsqueeze(0), bounds, positions) for row in tokens]


def stages(options: Options) -> dict[str, Stage]:
    """In full: the base and every arm of each seed, and the ablations of seed 0. Nothing of it is quick."""
    planned: dict[str, Stage] = {}
    if not options.full:
        return planned
    for seed in range(options.seeds):
        base = options.out / f"longred_base-{seed}"
        train = ("longred", "base", str(seed), str(base))
        planned[base.name] = Stage(train, base, partial(base_config, seed), seconds=150.0)
        for name in EVERY if seed == 0 else ARMS:
            folder = options.out / "longred" / f"{name}-{seed}"
            command = ("longred", name, str(seed), str(folder), "--checkpoints", str(options.out))
            planned[f"longred/{folder.name}"] = Stage(
                command,
                folder,
                partial(config_of, name, seed, options.out),
                tuple(f"{role}-{seed}" for role in needs(name)),
                seconds=90.0 if EVERY[name].streams else 25.0,
            )
    return planned


def report(results: Mapping[str, Tables]) -> Section:
    """The table of arms, the control by queries scaled, the ablations, retrieval by distance, and the predictions."""
    tables = results["longred"]
    skilled, drifted, retrieval = tables["skills"], tables["drift"], tables["retrieval"]
    accuracy = retrieval[(retrieval["metric"] == "accuracy") & (retrieval["seq_len"] == LONG)]
    values = numbers(skilled, drifted)
    named = values[~values["model"].isin(ABLATIONS)]
    ablated = values[(values["seed"] == 0) & values["model"].isin([*ABLATIONS, "longred_u"])]
    wide = skilled.assign(metric=skilled["metric"] + ", queries x " + skilled["query_scale"].map("{:g}".format))
    scaled = wide[
        wide["query_scale"].ne(1)
        & skilled["metric"].isin(["short_accuracy", "long_accuracy"])
        & wide["model"].isin(ARMS)
    ]
    return Section(
        judged(values, skilled),
        {
            "arms: short skill, far skill in a window of 1,024, drift on short windows": as_table(named),
            "accuracy with queries scaled after rotation": as_table(scaled),
            "ablations of longred_u, seed 0": as_table(ablated),
            f"retrieval in a window of {LONG} tokens, accuracy by distance": by_distance(accuracy, ["model", "seed"]),
        },
    )


def numbers(skilled: pd.DataFrame, drifted: pd.DataFrame) -> pd.DataFrame:
    """A number for each model, seed and metric: skills with queries as they are, and drift by layer."""
    columns = ["model", "seed", "metric", "value", "trials", "low", "high"]
    states = drifted[drifted["metric"] == COSINE_DISTANCE]
    states = states.assign(metric="drift of " + states["site"])
    attention = drifted[drifted["metric"] == ATTENTION_KL].groupby(["model", "seed", "layer"])["value"].mean()
    attention = attention.reset_index()
    attention = attention.assign(metric="attention KL, layer " + attention["layer"].astype("string"))
    losses = drifted[(drifted["metric"] == EXTENDED_LOSS) & (drifted["site"] == LOGITS)]
    losses = losses.assign(metric="loss on short text")
    plain = skilled[skilled["query_scale"] == 1]
    frames = [frame.reindex(columns=columns) for frame in (plain, states, attention, losses) if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def as_table(values: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds with their intervals as text: a row for each model, a column for each metric."""
    cells: dict[str, dict[str, str]] = {}
    for (model, metric), part in values.groupby(["model", "metric"], sort=False):
        mean, low, high = mean_and_interval(part)
        interval = f" [{low:.3f}, {high:.3f}]" if np.isfinite([low, high]).all() else ""
        cells.setdefault(model, {})[metric] = f"{mean:.3f}{interval}"
    table = pd.DataFrame.from_dict(cells, orient="index")
    return table.reindex([name for name in EVERY if name in table.index]).fillna("")


def mean_and_interval(rows: pd.DataFrame) -> tuple[float, float, float]:
    """The mean of one metric over seeds with its interval; of one seed, that over trials where there is one."""
    values = rows["value"]
    metric = rows["metric"].iloc[0]
    if len(rows) == 1:
        low, high = rows["low"].item(), rows["high"].item()
    elif "accuracy" in metric:  # with queries scaled or not
        low, high = share_interval(values, rows["trials"])
    else:
        low, high = student_interval(values)
    return values.mean(), low, high


LAST_STATE = f"drift of {FINAL_NORM}"
MARGIN = 0.05
ANY = 0.0


def judged(values: pd.DataFrame, skilled: pd.DataFrame) -> pd.DataFrame:
    """The predictions for the arms that were run, by intervals.

    A claim holds where the whole interval does, fails where none of it does, and is undecided otherwise. Intervals of
    accuracies and of their differences carry seeds and trials. Others are Student's over seeds, differences by pairs of
    equal seed; there one seed leaves a claim undecided.
    """
    scaled = skilled[(skilled["query_scale"] == 3) & (skilled["metric"] == "long_accuracy")]
    of_arm = {key: part.set_index("seed") for key, part in values.groupby(["model", "metric"])}
    of_arm |= {(model, "x3"): part.set_index("seed") for model, part in scaled.groupby("model")}
    rows: list[dict[str, Any]] = []

    def bound(prediction: int, arm: str, metric: str, *, least: float = -np.inf, most: float = np.inf) -> None:
        part = of_arm.get((arm, metric))
        if part is not None:
            mean, low, high = mean_and_interval(part)
            held, claim = decided(low, high, least, most), f"{arm}: {metric} {in_words(least, most)}"
            rows.append(verdict(prediction, claim, mean, held, n=len(part), low=low, high=high))

    def apart(prediction: int, first: str, second: str, metric: str, least: float, most: float) -> None:
        """The first less the second lies from `least` to `most`."""
        one, other = of_arm.get((first, metric)), of_arm.get((second, metric))
        if one is not None and other is not None:
            seeds = one.index.intersection(other.index)
            ours, theirs = one["value"].loc[seeds], other["value"].loc[seeds]
            difference = ours - theirs
            if "accuracy" in metric and len(seeds) > 1:
                low, high = share_difference_interval(
                    ours, theirs, one.loc[seeds, "trials"], other.loc[seeds, "trials"]
                )
            else:
                low, high = student_interval(difference)
            claim = f"{metric}: {first} less {second}, {in_words(least, most)}"
            held = decided(low, high, least, most)
            rows.append(verdict(prediction, claim, difference.mean(), held, n=len(difference), low=low, high=high))

    apart(1, "theta_swapped", "original", "short_accuracy", -1, -0.10)
    bound(1, "theta_swapped", "long_accuracy", most=0.10)
    bound(2, "long_ce", "long_accuracy", least=0.90)
    apart(2, "long_ce", "original", "short_accuracy", -MARGIN, MARGIN)
    apart(3, "mixed_ce", "original", "short_accuracy", -MARGIN, MARGIN)
    for arm in ("longred_c", "longred_u"):
        apart(4, arm, "mixed_ce", LAST_STATE, -2, ANY)
        apart(4, arm, "mixed_ce", "short_accuracy", -MARGIN, MARGIN)
        apart(5, arm, "long_ce", "long_accuracy", -1, -MARGIN)
    apart(6, "longred_c", "longred_u", "long_accuracy", -MARGIN, MARGIN)
    bound(7, "kd_packed", "long_accuracy", least=0.90)
    apart(7, "kd_restored", "kd_packed", LAST_STATE, -2, ANY)
    for layer in range(LAYERS):
        apart(8, "linear_ard", "long_ce", f"attention KL, layer {layer}", -np.inf, ANY)
    bound(9, "pose", "long_accuracy", most=0.30)
    bound(9, "pose", "x3", least=0.50)
    bound(10, "theta_swapped", "x3", least=0.50)

    def ablated(prediction: int, name: str, metric: str, least: float, most: float) -> None:
        """An ablation less `longred_u`, both of seed 0 and so without an interval."""
        changed, plain = of_arm.get((name, metric)), of_arm.get(("longred_u", metric))
        if changed is not None and plain is not None and 0 in plain.index:
            difference = changed["value"].loc[0] - plain["value"].loc[0]
            claim = f"{metric}: {name} less longred_u, {in_words(least, most)}, seed 0"
            rows.append(verdict(prediction, claim, difference, bool(least <= difference <= most)))

    ordered = ("weight_0", "weight_2", "longred_u", "weight_10")
    if all((name, LAST_STATE) in of_arm for name in ordered):
        levels = [of_arm[name, LAST_STATE]["value"].loc[0] for name in ordered]
        largest = np.diff(levels).max()
        claim = f"{LAST_STATE} falls with every weight, seed 0; largest step < 0"
        rows.append(verdict(11, claim, largest, largest < 0))
    ablated(12, "last_layer", LAST_STATE, -0.01, 0.01)
    ablated(12, "first_layer", LAST_STATE, 0.01, np.inf)
    ablated(13, "short_64", LAST_STATE, 0.01, np.inf)
    ablated(13, "short_64", "long_accuracy", -MARGIN, MARGIN)
    return verdicts(rows)


if __name__ == "__main__":
    try:
        typer.run(run)
    except InputError as error:
        sys.exit(f"error: {error}")
