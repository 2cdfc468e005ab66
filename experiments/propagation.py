"""Propagation: a perturbation of position in q or k travels through the layers to the logits, on the toy checkpoints.

On each model, with the float64 control beside every number:

- copies, each copy of a document in a repeated window against the first; and what is left of their differences with
  documents masked, with the first token of the window replaced, and with every softmax over the same number of keys
  (the same weights behind a sliding window of 128 keys, copies from beyond its edge on);
- shifts of q, k or both by 1/4 token to the whole window, on packed documents, masked and not;
- shifts of q or k by 16 tokens in one layer, one head of a layer, one pair; jitter of every position; other thetas;
- what holds for any weights, on a model that was never trained;
- on the students, what a shift of the teacher's q takes from the loss and the gradients that distil it into them.

    python -m experiments.propagation runs/propagation-0 runs/teacher-0 runs/base-0 runs/phase_scaling/kd_phase_wise-0
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import pandas as pd
import torch
import typer
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from experiments import phase_scaling
from experiments.stages import Options, Stage
from experiments.toy_checkpoints import SHORT, SHORT_DOCUMENTS
from rope_probe import HookedCausalLM, PositionShift, Window, copy_deltas, load_model, pack, repeated_window, trace
from rope_probe.distillation import distillation_signal
from rope_probe.distillation.signal import SIGNAL, signal_share
from rope_probe.models.checkpoints import build
from rope_probe.runs.progress import progress
from rope_probe.runs.results import Run, new_run, read_manifest
from rope_probe.runs.tables import Tables
from rope_probe.runs.verdicts import Kind, Section, beside, verdict, verdicts
from rope_probe.seeds import derive
from rope_probe.tracing.perturbations import Perturbation, Side
from rope_probe.tracing.propagation import COPY, DELTAS, trace_work
from rope_probe.tracing.sweeps import sweep

QUESTION = "How does a perturbation of position travel to the logits, and what else explains it?"
PREDICTIONS = {
    1: "One token repeated: every value vector is the same, so attention returns it whatever the weights are, "
    "and position reaches neither the residual stream nor the logits (float64 below 1e-10), though rotated q "
    "and k differ.",
    2: "The same after one other token: position 0 is now distinguishable and its softmax weight depends on "
    "distance, so position does reach the logits, far above the float64 floor.",
    3: "A document repeated: position reaches the logits, unless documents are masked from each other: then a "
    "plain RoPE model is blind to a document's place and what is left is rounding.",
    4: "Shifting q and k together changes nothing but rounding; shifting either alone changes the logits.",
    5: "The logit KL of a shift of q by a quarter token is smaller than that of a shift by 16 tokens.",
    6: "Delta size, teacher against base: the teacher uses position over a longer range, so the KL of its "
    "largest shift is the larger one of the two.",
    7: "With softmaxes over the same number of keys nothing is left between copies (float64 below 1e-10): in an "
    "unmasked window of copies the growing denominator is the whole channel.",
    8: "The first token is not the channel: replacing it changes the copies' rel_l2 at the logits by less than a "
    "factor 2.",
    9: "A shift of q by 16 in layer 0 alone, where the neighbour is found, does at least half of the KL of all "
    "layers'.",
    10: "The pair whose shift by 16 has the largest logit KL, in the teacher, turns within a document (wavelength "
    "<= 64).",
    11: "At the start of the extension, a shift of the teacher's q by 16 takes a signal of at least half the "
    "student's loss (KL against KL), and more of it at tokens last seen more than 64 tokens ago than at ones "
    "never seen.",
    12: "What it takes from the gradient is a larger part of it in W_Q and W_K than in W_V.",
}
"""Written before the first run; 7 to 12 before the first run of what they are about."""
FIGURES = {
    1: ("copy_heatmap",),
    2: ("copy_heatmap",),
    3: ("copy_heatmap",),
    4: ("dose_response",),
    5: ("dose_response",),
    6: ("dose_response",),
    7: ("copy_heatmap",),
    8: ("copy_heatmap",),
    9: ("layer_effects",),
    10: ("sensitivity_by_pair",),
    11: ("signal_of_distillation",),
    12: ("signal_of_distillation",),
}
"""The drawings that show what a prediction is about, by its number."""
UNTRAINED = "untrained"
"""A model of the teacher's architecture with the weights that it was initialised by.

What holds for any weights is no finding: the rows of 1, 4 (both shifted), 7 and the masked part of 3. They are of the
kind "identity", and are measured on this model too."""
QUICK_STUDENTS = ("theta_swapped", "kd_phase_wise")

WINDOW = 1024
DOSES = [2.0**k for k in range(-2, 11)]
DOSE = 16.0
REACH = 2 * SHORT
FLOOR = 1e-10
FIXED = "repeated document, same number of keys"
DOSES_ARM = "dose"
SWEEPS = {"layer": "layer", "head": "head", "pair": "pair-tokens", "jitter": "jitter", "theta": "theta"}
"""By arm, the sweep that it goes through."""
SIGNALS = [PositionShift("q", dose) for dose in (0.25, 1.0, WINDOW, DOSE)]


def measure(out: Path, checkpoints: list[Path]) -> None:
    """Trace every checkpoint into the run directory `out`.

    `checkpoints` are run directories of experiments.toy_checkpoints and of experiments.phase_scaling, these after the
    teacher of their seed.
    """
    torch.set_num_threads(1)
    teachers: dict[int, HookedCausalLM] = {}
    checked: set[int] = set()
    with new_run(out, "propagation", config_of(checkpoints), overwrite=True) as run:
        for checkpoint in checkpoints:
            made = read_manifest(checkpoint)["config"]
            name, seed = made.get("role") or made["arm"], made["seed"]
            model = load_model(checkpoint / "checkpoint")
            if seed not in checked:
                checked.add(seed)
                frame = identities(build(model.config, seed=derive(seed, UNTRAINED)), seed)
                run.record(DELTAS, frame, model=UNTRAINED, seed=seed)
            twin = model.double()
            for arm in copy_arms(seed):
                frame = copy_deltas(model, arm.window, reference=arm.reference, masked=arm.masked, control=twin)
                run.record(DELTAS, frame, model=name, seed=seed, arm=arm.name)
            run.record(DELTAS, _copies_of_fixed_denominator(model, seed), model=name, seed=seed, arm=FIXED)
            window = packed_documents(seed)
            for masked in (False, True):
                label = f"{name} {seed}{', masked' if masked else ''}"
                frame = _traced(model, twin, window, shifts(), masked, f"shifts, {label}")
                run.record(DELTAS, frame, model=name, seed=seed, arm=DOSES_ARM)
            for kind, sweep_name in SWEEPS.items():
                perturbations = sweep(sweep_name, model, WINDOW, size=DOSE)
                frame = _traced(model, twin, window, perturbations, False, f"{kind}, {name} {seed}")
                run.record(DELTAS, frame, model=name, seed=seed, arm=kind)
            if "arm" in made and seed in teachers:
                signal = distillation_signal(teachers[seed], model, window, SIGNALS)
                run.record(SIGNAL, signal, model=name, seed=seed)
            run.provenance.add_model(f"{name}-{seed}", model)
            _describe_reading(run, seed)
            plain = model.release()
            if name == "teacher":
                teachers[seed] = load_model(plain)


def identities(plain: PreTrainedModel, seed: int) -> pd.DataFrame:
    """What holds for any weights, measured on a model, and beside it the same where it does not; rows of `deltas`."""
    model = load_model(plain)
    twin = model.double()
    frames = [
        copy_deltas(model, arm.window, reference=arm.reference, masked=arm.masked, control=twin).assign(arm=arm.name)
        for arm in copy_arms(seed)
        if arm.name in ("repeated token", "repeated document")
    ]
    frames.append(_copies_of_fixed_denominator(model, seed).assign(arm=FIXED))
    both = [PositionShift("qk", dose) for dose in DOSES]
    shifted = trace(model, packed_documents(seed), [*both, PositionShift("q", DOSE)], control=twin)
    return pd.concat([*frames, shifted.assign(arm=DOSES_ARM)])


def _describe_reading(run: Run, seed: int) -> None:
    """The windows that every model of a seed reads, and whether masked."""
    for arm in copy_arms(seed):
        run.provenance.add_tokens(f"{arm.name}, seed {seed}", arm.window, masked=arm.masked)
    for masked in (False, True):
        run.provenance.add_tokens(f"packed documents, seed {seed}", packed_documents(seed), masked=masked)


def config_of(checkpoints: list[Path]) -> dict:
    """The whole configuration, as the manifest holds it: the checkpoints by their weights."""
    weights = [model["weights_sha256"] for run in checkpoints for model in read_manifest(run)["models"].values()]
    settings = {"window": WINDOW, "document": SHORT, "doses": DOSES, "one_dose": DOSE, "sliding_window": REACH}
    return {**settings, "signals": list(map(str, SIGNALS)), "weights_sha256": weights}


class CopyArm(NamedTuple):
    """A repeated window, the document that counts as its first copy, and whether documents are masked."""

    name: str
    window: Window
    reference: int = 0
    masked: bool = False


def copy_arms(seed: int) -> list[CopyArm]:
    """The repeated windows of predictions 1 to 3."""
    document = SHORT_DOCUMENTS.documents(1, seed=seed)[0]
    token, other = int(document[0]), int(document[1])
    repeated = repeated_window(document, WINDOW // SHORT)
    tokens = repeated.tokens.clone()
    tokens[0, 0] = other
    replaced = Window(tokens, repeated.cu_seqlens, repeated.position_ids)
    return [
        CopyArm("repeated token", repeated_window(token, SHORT)),
        CopyArm("repeated token after another", pack([[other], *[[token]] * SHORT], SHORT + 1), reference=1),
        CopyArm("repeated document", repeated),
        CopyArm("repeated document", repeated, masked=True),
        CopyArm("repeated document, second copy on", repeated, reference=1),
        CopyArm("repeated document, first token replaced", replaced, reference=1),
    ]


def _copies_of_fixed_denominator(model: HookedCausalLM, seed: int) -> pd.DataFrame:
    """Copies under the same weights, every query seeing REACH keys; from beyond where the window's edge still shows."""
    config = model.config
    reference = 1 + len(model.blocks) * REACH // SHORT
    plain = MistralForCausalLM(
        MistralConfig(**{**config.to_dict(), "model_type": "mistral", "architectures": None, "sliding_window": REACH})
    )
    plain.load_state_dict(model.original_model.state_dict())
    sliding = load_model(plain)
    document = SHORT_DOCUMENTS.documents(1, seed=seed)[0]
    return copy_deltas(sliding, repeated_window(document, WINDOW // SHORT), reference=reference, control=True)


def packed_documents(seed: int) -> Window:
    """Sixteen different documents packed into one window."""
    return pack(list(SHORT_DOCUMENTS.documents(WINDOW // SHORT, seed=seed, index=1)), WINDOW)


def shifts() -> list[PositionShift]:
    """Shifts of q, k and both, by 1/4 token to the window, doubling."""
    return [PositionShift(side, dose) for side in get_args(Side) for dose in DOSES]


def _traced(
    model: HookedCausalLM,
    twin: HookedCausalLM,
    window: Window,
    perturbations: Sequence[Perturbation],
    masked: bool,
    what: str,
) -> pd.DataFrame:
    with progress(f"{what}, layers", trace_work(model, len(perturbations), control=twin)) as advance:
        return trace(model, window, perturbations, masked=masked, control=twin, progress=advance)


def stages(options: Options) -> dict[str, Stage]:
    """One run a seed: teacher, base and students, all of them in full."""
    planned = {}
    students = [arm for arm in phase_scaling.ARMS if arm != "base"] if options.full else QUICK_STUDENTS
    for seed in range(options.seeds):
        checkpoints = {f"{role}-{seed}": options.out / f"{role}-{seed}" for role in ("teacher", "base")}
        for arm in students:
            checkpoints[f"phase_scaling/{arm}-{seed}"] = options.out / "phase_scaling" / f"{arm}-{seed}"
        run = options.out / f"propagation-{seed}"
        runs = list(checkpoints.values())
        command = ("propagation", str(run), *map(str, runs))
        config = partial(config_of, runs)
        planned[run.name] = Stage(command, run, config, tuple(checkpoints), seconds=20.0 * len(runs))
    return planned


def report(results: Mapping[str, Tables]) -> Section:
    """Logit KL by tokens shifted, and the predictions for each model and seed."""
    frame, signal = (results["propagation"][name] for name in ("deltas", "signal"))
    logits = frame[(frame["site"] == "logits") & (frame["metric"] == "kl_nats") & (frame["arm"] == DOSES_ARM)]
    keys = ["model", "seed", "masked", "side", "delta_tokens"]
    table = logits.groupby(keys)[["value", "value_float64"]].mean().unstack("side")
    title = "logit KL in nats by tokens shifted, in float32 and in float64, mean over documents"
    tables = {title: table}
    shares = signal_share(signal)
    if len(shares):
        whole = shares[shares["occurrence"].isna()].set_index(["model", "seed", "perturbation"])
        columns = ["loss_kl_nats", "remaining_kl_nats", "share"]
        kept = signal[signal["metric"] == "remaining_gradient_cosine"]
        cosine = kept.groupby(["model", "seed", "perturbation"])["value"].mean().rename("cosine of gradients")
        title = "what is left of a student's loss, and of its gradients, when a shift of the teacher's q takes its part"
        tables[title] = whole[columns].join(cosine)
    return Section(judged(frame, signal), tables)


def judged(frame: pd.DataFrame, signal: pd.DataFrame) -> pd.DataFrame:
    """Each prediction with its figures and whether it held, per model and seed, from deltas and signals."""
    logits = frame[frame["site"] == "logits"]
    rel = logits[logits["metric"] == "rel_l2"].groupby(["arm", "masked", "model", "seed"])["value_float64"].max()
    kl = logits[logits["metric"] == "kl_nats"]
    shifts = (
        kl[(kl["kind"] != COPY) & ~kl["masked"]]
        .groupby(["arm", "model", "seed", "side", "delta_tokens"])["value_float64"]
        .mean()
    )
    rows = []

    def judge(
        number: int, what: str, model: str, seed: int, figure: float, held: bool, *, identity: bool = False
    ) -> None:
        """`identity` for what holds for any weights."""
        kind: Kind = "identity" if identity else "prediction"
        rows.append(verdict(number, f"{model} {seed}: {what}", figure, held, kind=kind))

    for model, seed in frame.groupby(["model", "seed"]).groups:
        for number, arm, masked, reaches in (
            (1, "repeated token", False, False),
            (2, "repeated token after another", False, True),
            (3, "repeated document", False, True),
            (3, "repeated document", True, False),
        ):
            if (arm, masked, model, seed) not in rel.index:
                continue
            figure = rel[arm, masked, model, seed]
            what = f"logits rel_l2 between copies, {arm}{', masked' if masked else ''}"
            if model == UNTRAINED and reaches:
                rows.append(beside(f"{model} {seed}: {what}", figure))
            else:
                judge(number, what, model, seed, figure, (figure > FLOOR) == reaches, identity=not reaches)
        mine = shifts[DOSES_ARM, model, seed]
        both = mine["qk"].max()
        judge(4, "largest logit KL, both shifted", model, seed, both, both < FLOOR, identity=True)
        fixed = frame[(frame["arm"] == FIXED) & (frame["site"] == "logits") & (frame["metric"] == "rel_l2")]
        figure = fixed[(fixed["model"] == model) & (fixed["seed"] == seed)]["value_float64"].max()
        what = "logits rel_l2 between copies, same number of keys"
        judge(7, what, model, seed, figure, figure < FLOOR, identity=True)
        if model == UNTRAINED:
            rows.append(beside(f"{model} {seed}: logit KL, q by {DOSE:g}", mine["q", DOSE]))
            continue
        judge(
            4,
            "smallest logit KL, q or k shifted",
            model,
            seed,
            min(mine["q"].min(), mine["k"].min()),
            min(mine["q"].min(), mine["k"].min()) > FLOOR,
        )
        judge(
            5,
            "logit KL, q by 1/4 over q by 16",
            model,
            seed,
            mine["q", 0.25] / mine["q", 16.0],
            mine["q", 0.25] < mine["q", 16.0],
        )
        figure = (
            rel["repeated document, first token replaced", False, model, seed]
            / rel["repeated document, second copy on", False, model, seed]
        )
        judge(8, "logits rel_l2, first token replaced over not", model, seed, figure, 0.5 < figure < 2)
        of_layer, of_pair = (
            kl[(kl["arm"] == arm) & (kl["model"] == model) & (kl["seed"] == seed)] for arm in ("layer", "pair")
        )
        first = of_layer[(of_layer["side"] == "q") & (of_layer["inject_layer"] == 0)]["value_float64"].mean()
        figure = first / mine["q", DOSE]
        judge(9, "logit KL of q by 16, layer 0 over all layers", model, seed, figure, figure >= 0.5)
        if model == "teacher":
            by_length = of_pair[of_pair["side"] == "q"].groupby("wavelength")["value_float64"].mean()
            judge(
                10,
                "wavelength of the pair with the largest logit KL",
                model,
                seed,
                by_length.idxmax(),
                by_length.idxmax() <= SHORT,
            )
        taught = signal[(signal["model"] == model) & (signal["seed"] == seed)]
        if model == "theta_swapped" and len(taught):
            rows += _signal_verdicts(taught, model, seed)
    for seed in sorted(frame["seed"].unique()):
        if {("teacher", seed), ("base", seed)} <= set(frame.groupby(["model", "seed"]).groups):
            ratio = shifts[DOSES_ARM, "teacher", seed, "q", DOSES[-1]] / shifts[DOSES_ARM, "base", seed, "q", DOSES[-1]]
            judge(6, f"logit KL of q by {DOSES[-1]:g}, over that of the base", "teacher", seed, ratio, ratio > 1)
    return verdicts(rows)


def _signal_verdicts(taught: pd.DataFrame, model: str, seed: int) -> list[dict]:
    shifted = taught[(taught["perturbation"] == str(SIGNALS[-1]))]
    signal = shifted[shifted["metric"] == "signal_kl_nats"]
    loss = taught[(taught["metric"] == "loss_kl_nats") & taught["occurrence"].isna()]["value"].item()
    share = signal[signal["occurrence"].isna()]["value"].item() / loss
    far = signal[signal["distance"] > SHORT]["value"].mean()
    beyond = far / signal[signal["occurrence"] == "new"]["value"].item()
    size = shifted.pivot_table(values="value", index="site", columns="metric")
    part = (size["signal_gradient"] / size["loss_gradient"]).groupby(lambda site: site[-1]).mean()
    claims = (
        (11, "signal of q by 16 over the loss (two KLs, neither a part of the other)", share, share >= 0.5),
        (11, "signal at tokens last seen beyond 64, over new ones", beyond, beyond > 1),
        (12, "signal's part of the gradient, W_Q over W_V", part["Q"] / part["V"], part["Q"] > part["V"]),
        (12, "signal's part of the gradient, W_K over W_V", part["K"] / part["V"], part["K"] > part["V"]),
    )
    rows = [verdict(number, f"{model} {seed}: {what}", figure, held) for number, what, figure, held in claims]
    shares = signal_share(pd.concat([shifted, taught[taught["metric"] == "loss_kl_nats"]]))
    if len(shares):
        gone = shares[shares["occurrence"].isna()]["share"].item()
        rows.append(beside(f"{model} {seed}: part of the loss that goes when q by 16 is gone from the teacher", gone))
        kept = size["remaining_gradient_cosine"].groupby(lambda site: site[-1]).mean()
        rows += [
            beside(f"{model} {seed}: cosine of the gradients with and without it, W_{matrix}", kept[matrix])
            for matrix in "QKV"
        ]
    return rows


if __name__ == "__main__":
    typer.run(measure)
