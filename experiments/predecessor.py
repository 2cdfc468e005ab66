"""A teacher and a student of the predecessor's kind, in small: what passes through packed documents, and through masks?

The study builds on MobileLLM-Pro (arXiv 2511.06719). Its teacher has layers without RoPE and a temperature by position,
so its logits know the place even where documents are masked from each other. Its student sees far in a few layers only.
Here the teacher has a local layer with RoPE, which sees 256 tokens back, and a global one without, whose temperature
rises with the position as Llama 4's does. The student has a local layer of 64 tokens and a global one, both with RoPE.
Llama 4's own local layers attend in chunks. A sliding window stands for them, or with --chunked they do here too.

    teacher, base    the two that the arms start from, trained as those of toy_checkpoints
    theta_swapped    the base at the larger theta, untrained
    ce               extended by cross-entropy on packed documents
    kd               by the teacher's logits, attention across documents
    kd_masked        the same, attention inside documents, the teacher's and the student's: "block-causal" as a mask

    python -m experiments.predecessor teacher 0 runs/predecessor_teacher-0
    python -m experiments.predecessor kd_masked 0 runs/predecessor/kd_masked-0 --checkpoints runs
"""

import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from transformers import Llama4TextConfig, PreTrainedConfig

from experiments import injection, phase_scaling, positional_channel, toy_checkpoints
from experiments.injection import INJECTION, placed
from experiments.stages import Options, Stage
from experiments.toy_checkpoints import LARGE_THETA, LONG, SHORT, CheckpointsIn, by_distance
from experiments.training import trained
from rope_probe import HookedCausalLM, load_model, positional_parts
from rope_probe.distillation import Phase
from rope_probe.distillation.log import LOSSES, history_rows
from rope_probe.errors import InputError
from rope_probe.models import checkpoints
from rope_probe.names import MISSED_GATE
from rope_probe.runs.intervals import student_interval
from rope_probe.runs.results import new_run, read_manifest
from rope_probe.runs.tables import Tables
from rope_probe.runs.verdicts import Section, beside, decided, in_words, verdict, verdicts
from rope_probe.seeds import derive
from rope_probe.tracing.cone import LOGITS
from rope_probe.tracing.positional import POSITIONAL_PARTS

QUESTION = "With local layers, a teacher without RoPE in its global one, and masks: what does packing pass on?"
PREDICTIONS = {
    1: "Masked, the teacher's logits hold its place: their positional share is above what chance gives.",
    2: "Across documents the teacher passes retrieval on: the student of kd retrieves .50 or more.",
    3: "Inside documents it passes none on: the student of kd_masked retrieves .10 or less.",
    4: "Nor does it then bring out by sharper attention what the base has not: with queries multiplied by 3, kd_masked "
    "retrieves more than the untrained base by .10 at most.",
    5: "Cross-entropy on the same documents retrieves .10 or less.",
    6: "An identity: masked, the student has no place in its logits (share below 1e-6), so it cannot learn the "
    "teacher's.",
}
"""Written before the first run. Retrieval: accuracy at 512 tokens, 8 times the document length, window 1,024."""

LOCAL = {"teacher": 256, "base": SHORT}
"""Tokens that the local layer of each sees, or that a chunk of it has."""
ROLES = tuple(LOCAL)
CONTENTS = injection.MEASURED_CONTENTS
FAR = phase_scaling.FAR


@dataclasses.dataclass(frozen=True)
class Arm:
    """How the base is extended: as an arm of phase_scaling, or not at all, with both sides masked or not."""

    trained_as: str | None = "kd_phase_wise"
    masked: bool = False


ARMS = {
    "theta_swapped": Arm(trained_as=None),
    "ce": Arm(trained_as="ce_phase_wise"),
    "kd": Arm(),
    "kd_masked": Arm(masked=True),
}


def architecture(role: str, chunked: bool = False) -> PreTrainedConfig:
    """Two layers of the toy models' size: a local one with RoPE and a global one, which the teacher does not rotate.

    The local one has a sliding window. With `chunked` it attends in chunks of as many tokens: the model is then a Llama
    4 without experts, and without its own temperature, since hooks set that of both kinds.
    """
    sliding = positional_channel.architecture(
        role,
        [True, role != "teacher"],
        layer_types=["sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=LOCAL[role],
    )
    if not chunked:
        return sliding
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "max_position_embeddings", "tie_word_embeddings", "rope_parameters", "no_rope_layers", "bos_token_id",
              "eos_token_id", "pad_token_id", "use_cache")  # fmt: skip
    return Llama4TextConfig(
        **{name: getattr(sliding, name) for name in shared},
        head_dim=sliding.hidden_size // sliding.num_attention_heads,
        intermediate_size_mlp=sliding.intermediate_size,
        moe_layers=[],
        use_qk_norm=False,
        layer_types=["chunked_attention", "full_attention"],
        attention_chunk_size=LOCAL[role],
        attn_temperature_tuning=False,
    )


def phase_of(name: str) -> Phase:
    """The extension of an arm: data, order and budget of phase_scaling's, documents masked from each other or not."""
    arm = ARMS[name]
    if arm.trained_as is None:
        raise InputError(f"arm {name!r} does not train")
    plain = phase_scaling.phase_of(phase_scaling.ARMS[arm.trained_as])
    return dataclasses.replace(plain, masked=arm.masked, teacher_masked=arm.masked)


def teacher_of(folder: Path) -> HookedCausalLM:
    """The teacher with its temperature by position."""
    teacher = load_model(folder)
    for name, hook in positional_channel.temperature_hooks(teacher):
        teacher.add_hook(name, hook)
    return teacher


def run(
    what: str,
    seed: int,
    out: Path,
    checkpoints_in: CheckpointsIn = Path("runs"),
    chunked: Annotated[bool, typer.Option("--chunked", help="a teacher's or base's local layer has chunks")] = False,
) -> None:
    """Train the teacher or the base, or extend the base by one arm, into the run directory `out`."""
    torch.set_num_threads(1)
    if what in ROLES:
        _train(what, seed, out, chunked)
    elif what in ARMS and chunked:
        raise InputError("--chunked goes with teacher and base; an arm has the local layers of its checkpoints")
    elif what in ARMS:
        _extend(what, seed, out, checkpoints_in)
    else:
        raise InputError(f"arm {what!r} is unknown; known are {', '.join((*ROLES, *ARMS))}")


def _train(role: str, seed: int, out: Path, chunked: bool) -> None:
    missed = None
    purpose = f"predecessor_{role}"
    with new_run(out, "predecessor", role_config(role, seed, chunked), overwrite=True) as made:
        model = load_model(checkpoints.build(architecture(role, chunked), seed=derive(seed, purpose, "weights")))
        for name, hook in positional_channel.temperature_hooks(model):
            model.add_hook(name, hook)
        for phase in toy_checkpoints.PHASES[role]:
            if missed := toy_checkpoints.train_and_record(made, model, phase, purpose, seed):
                break
        made.provenance.add_model(purpose, model)
        checkpoints.save(model.release(), made.folder / "checkpoint")
        made.manifest["missed_gate"] = missed
    if missed:
        raise typer.Exit(MISSED_GATE)


def _extend(name: str, seed: int, out: Path, checkpoints_in: Path) -> None:
    arm = ARMS[name]
    with new_run(out, "predecessor", config_of(name, seed, checkpoints_in), overwrite=True) as made:
        base = checkpoints.load(checkpoints_in / f"predecessor_base-{seed}" / "checkpoint")
        student = load_model(checkpoints.with_rope(base, LARGE_THETA))
        contents = placed(seed, "measured", CONTENTS)
        if arm.trained_as is not None:
            phase = phase_of(name)
            teacher = None
            if "teacher" in needs(name):
                teacher = teacher_of(checkpoints_in / f"predecessor_teacher-{seed}" / "checkpoint")
                parts = positional_parts(teacher, contents, sites=[LOGITS], masked=arm.masked)
                place = {"model": name, "role": "teacher", "seed": seed}
                made.record(POSITIONAL_PARTS, parts, **place, arm="masked" if arm.masked else None)
            history = trained(f"{name} {seed}", student, phase, seed=derive(seed, "extension"), teacher=teacher)
            losses = history_rows(history, "loss")
            made.record(LOSSES, losses, model=name, seed=seed, phase="extension", seq_len=LONG)
            first = phase.batch(derive(seed, "extension"), 0)
            made.provenance.add_tokens("extension", first, masked=arm.masked, teacher_masked=arm.masked)
        measured = injection.measure(student, seed)
        made.record(INJECTION, measured, model=name, role="student", seed=seed)
        for masked in (False, True):
            parts = positional_parts(student, contents, sites=[LOGITS], masked=masked)
            columns = {"model": name, "role": "student", "seed": seed}
            made.record(POSITIONAL_PARTS, parts, **columns, arm="masked" if masked else None)
        made.provenance.add_model(name, student)
        checkpoints.save(student.release(), made.folder / "checkpoint")
    shown = measured.pivot(index="query_scale", columns="distance", values="value").round(2)
    print(name, seed, shown.to_string(), sep="\n", file=sys.stderr)


def needs(name: str) -> tuple[str, ...]:
    """The roles an arm starts from."""
    return ("base", "teacher") if name.startswith("kd") else ("base",)


def role_config(role: str, seed: int, chunked: bool = False) -> dict:
    """The whole configuration of the teacher or the base, as its manifest holds it."""
    phases = [dataclasses.asdict(phase) for phase in toy_checkpoints.PHASES[role]]
    temperature = positional_channel.TEMPERATURE
    shape = architecture(role, chunked).to_diff_dict()
    return {"role": role, "seed": seed, "architecture": shape, "phases": phases, "temperature": temperature}


def config_of(name: str, seed: int, checkpoints_in: Path) -> dict:
    """The whole configuration of an arm, as its manifest holds it: the checkpoints by their weights."""
    sources = [checkpoints_in / f"predecessor_{role}-{seed}" for role in needs(name)]
    weights = [model["weights_sha256"] for source in sources for model in read_manifest(source)["models"].values()]
    arm = ARMS[name]
    phase = None if arm.trained_as is None else dataclasses.asdict(phase_of(name))
    probe = {"trials": injection.TRIALS, "distances": list(injection.DISTANCES.items()), "contents": CONTENTS}
    return {"arm": dataclasses.asdict(arm), "seed": seed, "phase": phase, "weights_sha256": weights, "probe": probe}


def stages(options: Options) -> dict[str, Stage]:
    """Both checkpoints and every arm of each seed; nothing in the quick plan."""
    planned: dict[str, Stage] = {}
    for seed in range(options.seeds) if options.full else ():
        for role in ROLES:
            folder = options.out / f"predecessor_{role}-{seed}"
            seconds = 150.0 if role == "teacher" else 60.0
            command = ("predecessor", role, str(seed), str(folder))
            planned[folder.name] = Stage(command, folder, partial(role_config, role, seed), seconds=seconds)
        for name in ARMS:
            folder = options.out / "predecessor" / f"{name}-{seed}"
            planned[f"predecessor/{folder.name}"] = Stage(
                ("predecessor", name, str(seed), str(folder), "--checkpoints", str(options.out)),
                folder,
                partial(config_of, name, seed, options.out),
                tuple(f"predecessor_{role}-{seed}" for role in needs(name)),
                seconds=30.0 if ARMS[name].trained_as is None else 150.0,
            )
    return planned


def report(results: Mapping[str, Tables]) -> Section:
    """Retrieval by arm and query scale, the place in the logits of teacher and students, and the predictions."""
    tables = results["predecessor"]
    found, parts = tables["injection"], tables["positional_parts"]
    parts = parts[parts["site"] == LOGITS].assign(arm=parts["arm"].fillna("unmasked"))
    shares = parts.pivot_table(index=["role", "model", "arm"], columns="metric", values="value", sort=False)
    title = f"retrieval in a window of {LONG} tokens, accuracy by distance"
    shown = {
        title: by_distance(found, ["model", "seed", "query_scale"]),
        "the place in the logits, means over seeds": shares.map("{:.3g}".format),
    }
    return Section(judged(found, parts), shown)


def judged(found: pd.DataFrame, parts: pd.DataFrame) -> pd.DataFrame:
    """The predictions for the arms that were run, by intervals over seeds and trials."""
    of_arm = dict(list(found[found["distance"] == FAR].groupby(["model", "query_scale"])))
    rows: list[dict[str, Any]] = []

    def judge(number: int, claim: str, values: tuple[float, float, float], least: float, most: float, n: int) -> None:
        value, low, high = values
        rows.append(verdict(number, claim, value, decided(low, high, least, most), n=n, low=low, high=high))

    teacher = parts[(parts["role"] == "teacher") & (parts["model"] == "kd_masked")]
    share = teacher.pivot_table(index="seed", columns="metric", values="value")
    if len(share):
        beyond = share["position_share"] - share["position_by_chance"]
        claim = "masked: positional share of the teacher's logits, less chance, above 0"
        judge(1, claim, (beyond.mean(), *student_interval(beyond)), 0, 1, len(beyond))
    for number, name, least, most in ((2, "kd", 0.5, np.inf), (3, "kd_masked", -np.inf, 0.1), (5, "ce", -np.inf, 0.1)):
        part = of_arm.get((name, 1.0))
        if part is not None:
            claim = f"{name}: accuracy {in_words(least, most)}"
            judge(number, claim, phase_scaling.mean_and_interval(part), least, most, len(part))
    one, other = (of_arm.get((name, injection.SHARP)) for name in ("kd_masked", "theta_swapped"))
    if one is not None and other is not None:
        apart, seeds = phase_scaling.difference_and_interval(one, other)
        if seeds:
            claim = "queries x 3: accuracy of kd_masked less that of theta_swapped, 0.1 or less"
            judge(4, claim, apart, -1, 0.10, seeds)
    own = parts[(parts["role"] == "student") & (parts["arm"] == "masked") & (parts["metric"] == "position_share")]
    if len(own):
        claim = "masked: largest positional share of a student's logits below 1e-6, an identity"
        largest = own["value"].max()
        rows.append(verdict(6, claim, largest, largest < 1e-6, n=len(own), kind="identity"))
    for (name, factor), part in of_arm.items():
        if (name, factor) not in (("kd", 1.0), ("kd_masked", 1.0), ("ce", 1.0)):
            mean, low, high = phase_scaling.mean_and_interval(part)
            rows.append(beside(f"accuracy of {name}, queries x {factor:g}", mean, n=len(part), low=low, high=high))
    return verdicts(rows)


if __name__ == "__main__":
    try:
        typer.run(run)
    except InputError as error:
        sys.exit(f"error: {error}")
