"""A long-context teacher and short-window bases at toy scale, on one CPU core each, by cross-entropy.

Llama architecture, 2 layers, width 64, 2 heads of 32, on key-value streams (256 keys, 256 values). The teacher (theta
10,000) learns on packed 64-token documents, then on 1,024-token documents with 32 to 256 keys; the bases (theta 300,
and 20,000) only ever see 64-token windows. Each phase ends when its gate passes: retrieval of 0.95 or more at every
distance (0.90 for the teacher's first phase, which only prepares the second).

    python -m experiments.toy_checkpoints teacher 0 runs/teacher-0
"""

import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
import typer
from transformers import LlamaConfig

from experiments.stages import Options, Stage
from rope_probe import HookedCausalLM, KeyValueStream, load_model
from rope_probe.distillation import CrossEntropy, Gate, GateError, Phase, train_phase
from rope_probe.distillation.log import LOSSES, history_rows
from rope_probe.distillation.loop import Record
from rope_probe.models import checkpoints
from rope_probe.names import MISSED_GATE
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.progress import progress
from rope_probe.runs.results import Run, new_run
from rope_probe.runs.tables import Tables
from rope_probe.runs.verdicts import Section, verdict, verdicts
from rope_probe.seeds import derive

SHORT, LONG = 64, 1024
BATCH_TOKENS = 8192
OPTIMISER: dict[str, Any] = {"lr": 3e-3, "matrix_lr": 0.01}
CE = (CrossEntropy(),)
BY_CE: dict[str, Any] = {"terms": CE, "chunk": BATCH_TOKENS, **OPTIMISER}
SMALL_THETA, LARGE_THETA = 300.0, 20_000.0
CheckpointsIn = Annotated[Path, typer.Option("--checkpoints", help="Folder of the toy checkpoints.")]
Role = Literal["teacher", "base", "base_large_theta"]
BASE_SEEDS = 5

QUESTION = "Do the toy models learn what the other experiments build on?"
PREDICTIONS = {
    1: "Every phase of every checkpoint passes its gate within its budget of steps.",
}
FIGURES = {
    1: ("loss_curves", "retrieval_by_distance"),
}
"""The drawings that show what a prediction is about, by its number."""

SHORT_DOCUMENTS = KeyValueStream(SHORT, distinct=(4, 16))
LONG_DOCUMENTS = KeyValueStream(LONG, distinct=(32, 256))
IN_SHORT = (8, 16, 32, 48, 60)
IN_LONG = (64, 128, 256, 512, 768, 1000)


def short_phase(theta: float, accuracy: float = 0.95) -> Phase:
    """The short window, until its gate passes: the same data, budget and optimiser whatever the theta."""
    gate = Gate(SHORT, IN_SHORT, accuracy, every=25)
    rates = {**BY_CE, "lr": 1e-2}
    return Phase("short", SHORT_DOCUMENTS, SHORT, 500, BATCH_TOKENS, theta=theta, gate=gate, **rates)


PHASES: dict[str, tuple[Phase, ...]] = {
    "teacher": (
        short_phase(10_000.0, accuracy=0.90),
        Phase(
            "long",
            LONG_DOCUMENTS,
            LONG,
            600,
            BATCH_TOKENS,
            theta=10_000.0,
            gate=Gate(LONG, IN_LONG, accuracy=0.95, every=50),
            **BY_CE,
        ),
    ),
    "base": (short_phase(SMALL_THETA),),
    "base_large_theta": (short_phase(LARGE_THETA),),
}


def stages(options: Options) -> dict[str, Stage]:
    """The teacher and the base of each seed; in full both bases, and more seeds of them."""
    wanted = [(role, seed) for seed in range(options.seeds) for role in ("teacher", "base")]
    if options.full:
        wanted += [("base_large_theta", seed) for seed in range(options.seeds)]
        wanted += [(role, seed) for seed in range(options.seeds, BASE_SEEDS) for role in ("base", "base_large_theta")]
    planned = {}
    for role, seed in wanted:
        run = options.out / f"{role}-{seed}"
        command = ("toy_checkpoints", role, str(seed), str(run))
        seconds = 150.0 if role == "teacher" else 60.0
        planned[run.name] = Stage(command, run, partial(config_of, role, seed), seconds=seconds)
    return planned


def report(results: Mapping[str, Tables]) -> Section:
    """Retrieval at the end of each phase, by distance, and whether every gate passed."""
    frame = results["toy_checkpoints"]["retrieval"]
    gates = frame[frame["metric"] == "gate_accuracy"]
    worst = gates.groupby(["model", "seed", "phase"])["value"].min()
    rows = [
        verdict(1, f"{model} {seed}, {phase} phase: worst distance at or above {bound}", value, value >= bound)
        for (model, seed, phase), value in worst.items()
        if (bound := _gate_of(model, phase)) is not None
    ]
    table = by_distance(gates, ["model", "seed", "phase"])
    return Section(verdicts(rows), {"retrieval at the end of each phase, accuracy by distance": table})


def _gate_of(role: str, phase: str) -> float | None:
    gates = {one.name: one.gate for one in PHASES[role]}
    return None if (gate := gates[phase]) is None else gate.accuracy


def by_distance(frame: pd.DataFrame, index: list[str]) -> pd.DataFrame:
    """Values with their intervals as text, a column for each distance."""
    text = [f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in frame.itertuples()]
    shown = frame.assign(value=pd.Series(text, index=frame.index, dtype="object"))
    table = shown.pivot_table(index=index, columns="distance", values="value", aggfunc="first", sort=False)
    return table.sort_index(axis=1).fillna("")


def make(role: Role, seed: int, out: Path) -> None:
    """Train one checkpoint into the run directory `out` (its `checkpoint/` is a Hugging Face folder).

    Weights and data are drawn from seeds of their own for each role and phase: a teacher and a base of one seed share
    nothing. A phase that misses its gate ends the training; the run then says so (`missed_gate` in its manifest), and
    the exit code is MISSED_GATE.
    """
    torch.set_num_threads(1)
    model, missed = None, None
    with new_run(out, "toy_checkpoints", config_of(role, seed), overwrite=True) as run:
        for phase in PHASES[role]:
            print(f"{role} {seed}: phase {phase.name}, window {phase.window}, theta {phase.theta:g}", file=sys.stderr)
            rope = {"rope_type": "default", "rope_theta": phase.theta}
            plain = (
                checkpoints.build(architecture(rope), seed=derive(seed, role, "weights")) if model is None else model
            )
            model = checkpoints.with_rope(plain, rope)
            hooked = load_model(model)
            missed = train_and_record(run, hooked, phase, role, seed)
            hooked.release()
            if missed:
                break
        checkpoints.save(model, run.folder / "checkpoint")
        run.provenance.add_model(role, model, kernel="sdpa")
        run.manifest["missed_gate"] = missed
    if missed:
        raise typer.Exit(MISSED_GATE)


def config_of(role: str, seed: int) -> dict:
    """The whole configuration of a checkpoint, as its manifest holds it."""
    phases = [dataclasses.asdict(phase) for phase in PHASES[role]]
    return {"role": role, "seed": seed, "architecture": architecture({}).to_diff_dict(), "phases": phases}


def architecture(rope_parameters: dict, head_dim: int = 32) -> LlamaConfig:
    """The toy Llama: 2 layers, width 64, 2 heads of 32 unless told otherwise."""
    return LlamaConfig(
        vocab_size=SHORT_DOCUMENTS.vocab_size,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=64 // head_dim,
        num_key_value_heads=64 // head_dim,
        max_position_embeddings=LONG,
        tie_word_embeddings=False,
        rope_parameters=rope_parameters,
        bos_token_id=None,
        eos_token_id=None,
    )


def train_to_gate(
    model: HookedCausalLM, phase: Phase, seed: int, what: str
) -> tuple[list[Record], pd.DataFrame, str | None]:
    """Train by cross-entropy until the gate passes or the cap: losses, the gate's last measurement, what it missed."""
    with progress(f"{what}, tokens", phase.steps * phase.batch_tokens) as advance:
        try:
            history, gate = train_phase(
                model,
                phase,
                seed=seed,
                on_step=lambda n: advance(phase.batch_tokens, f"CE {n['ce_nats']:.2f} nats"),
            )
        except GateError as error:
            return error.history, error.measured, str(error)
    return history, gate, None


def train_and_record(run: Run, model: HookedCausalLM, phase: Phase, role: str, seed: int) -> str | None:
    """Train a model in place through one phase, record it under its role, and say what its gate missed."""
    data_seed = derive(seed, role, phase.name)
    history, gate, missed = train_to_gate(model, phase, data_seed, f"{role} {seed}, {phase.name} phase")
    columns = {"model": role, "seed": seed, "phase": phase.name}
    run.record(LOSSES, history_rows(history, "ce_nats"), **columns, seq_len=phase.window)
    run.record(RETRIEVAL, gate.assign(metric="gate_accuracy"), **columns)
    run.provenance.add_tokens(phase.name, phase.batch(data_seed, 0))
    print(gate[["distance", "value", "low", "high"]].to_string(index=False), file=sys.stderr)
    if missed:
        print(missed, file=sys.stderr)
    return missed


if __name__ == "__main__":
    typer.run(make)
