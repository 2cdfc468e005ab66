"""The main job, end to end: toy checkpoints, every experiment, the gallery. `make reproduce` runs it.

Every stage is a script of its own in a process of its own, and starts when what it needs is there; two run at a time,
on one thread each. A stage whose run directory is complete and was made with the same configuration is reused. A stage
that fails, or a checkpoint that misses its gate, is reported at the end, with what could not be run for it.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pandas as pd
import typer

from experiments import (
    phase_scaling,
    positional_channel,
    propagation,
    query_span_verdicts,
    query_spans,
    text,
    theta_grid,
    toy_checkpoints,
)
from rope_probe import rope
from rope_probe.errors import InputError
from rope_probe.gallery.report import gallery
from rope_probe.runs.results import is_complete, read_frames, read_run

WORKERS = 2
QUICK_ARMS = ("kd_phase_wise", "base", "theta_swapped", "ce_phase_wise", "ce_more_short", "kd_small_theta")
QUICK_SPANS = ("kd_phase_wise", "ce_phase_wise", "ce_more_short")
QUICK_CHANNELS = ("scrubbed",)
QUICK_STUDENTS = ("theta_swapped", "kd_phase_wise")
BASE_SEEDS = 5
SCRIPTS = ("toy_checkpoints", "phase_scaling", "positional_channel", "theta_grid", "propagation", "query_spans", "text")


@dataclass(frozen=True)
class Stage:
    """A script and its arguments, the run directory it makes, the config it makes it with, and the stages it needs."""

    command: tuple[str, ...]
    run: Path
    config: Callable[[], dict]
    needs: tuple[str, ...] = ()


def main(
    out: Annotated[Path, typer.Option(help="Folder for all run directories.")] = Path("runs"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 1,
    full: Annotated[bool, typer.Option("--full", help="Every arm of every experiment, and the larger sweeps.")] = False,
) -> None:
    """Run what is missing under `out`, print the tables and the path of the gallery."""
    stages = plan(out, seeds, full)
    without = run_all(stages)
    runs = {
        script: [stage.run for name, stage in stages.items() if stage.command[0] == script and name not in without]
        for script in SCRIPTS
    }
    printers: dict[str, Callable[[list[Path]], None]] = {
        "toy_checkpoints": _print_checkpoints,
        "phase_scaling": _print_phase_scaling,
        "positional_channel": partial(_print_positional_channel, runs["phase_scaling"]),
        "theta_grid": _print_theta_grid,
        "propagation": _print_propagation,
        "query_spans": _print_query_spans,
        "text": _print_text,
    }
    for script, print_tables in printers.items():
        if runs[script]:
            print_tables(runs[script])
    for name, why in without.items():
        print(f"without a result: {name}: {why}")
    print(gallery([run for script in SCRIPTS for run in runs[script]], out / "gallery"))
    if without:
        raise typer.Exit(1)


def plan(out: Path, seeds: int, full: bool) -> dict[str, Stage]:
    """Every stage by name, each after the stages it needs; the longest waits come first."""
    stages: dict[str, Stage] = {}

    def checkpoint(role: str, seed: int) -> None:
        run = out / f"{role}-{seed}"
        config = partial(toy_checkpoints.config_of, role, seed)
        stages[run.name] = Stage(("toy_checkpoints", role, str(seed), str(run)), run, config)

    def student(kind: str, script: ModuleType, name: str, seed: int) -> None:
        folder = script.__name__.rpartition(".")[2]
        run = out / folder / f"{name}-{seed}"
        command = (folder, name, str(seed), str(run), "--checkpoints", str(out))
        needs = tuple(f"{role}-{seed}" for role in script.needs(name))
        stages[f"{kind} {run.name}"] = Stage(command, run, partial(script.config_of, name, seed, out), needs)

    arms = tuple(phase_scaling.ARMS) if full else QUICK_ARMS
    roles = {role for arm in arms for role in phase_scaling.needs(arm)}
    for seed in range(seeds):
        for role in toy_checkpoints.PHASES:
            if role in roles:
                checkpoint(role, seed)
        if full:
            run = out / f"nope_teacher-{seed}"
            config = partial(positional_channel.teacher_config, seed)
            stages[run.name] = Stage(("positional_channel", "teacher", str(seed), str(run)), run, config)
        for arm in arms:
            student("extension", phase_scaling, arm, seed)
        for channel in positional_channel.CHANNELS if full else QUICK_CHANNELS:
            student("channel", positional_channel, channel, seed)
        for arm in query_spans.ARMS if full else QUICK_SPANS:
            run = out / "query_spans" / f"{arm}-{seed}"
            command = ("query_spans", arm, str(seed), str(run), "--checkpoints", str(out))
            config = partial(query_spans.config_of, arm, seed, out, quick=not full)
            needs = (f"{phase_scaling.ARMS[arm].base}-{seed}", f"extension {arm}-{seed}")
            stages[f"spans {run.name}"] = Stage((*command, *([] if full else ["--quick"])), run, config, needs)
    if full:
        for seed in range(seeds, BASE_SEEDS):
            for role in ("base", "base_large_theta"):
                checkpoint(role, seed)
        for head_dim, theta in itertools.product(theta_grid.HEAD_DIMS, theta_grid.THETAS):
            run = out / "theta_grid" / f"{head_dim}-{theta:g}-0"
            row = ("theta_grid", str(head_dim), f"{theta:g}", "0", str(run), "--checkpoints", str(out))
            of_row = partial(theta_grid.config_of, head_dim, theta, 0, out)
            stages[f"grid {run.name}"] = Stage(row, run, of_row, ("teacher-0",))
    stages["text"] = Stage(("text", str(out / "text")), out / "text", text.config_of)
    for seed in range(seeds):
        students = [arm for arm in phase_scaling.ARMS if arm != "base"] if full else QUICK_STUDENTS
        traced = (f"teacher-{seed}", f"base-{seed}", *(f"extension {arm}-{seed}" for arm in students))
        runs = [stages[name].run for name in traced]
        run = out / f"propagation-{seed}"
        config = partial(propagation.config_of, runs)
        stages[run.name] = Stage(("propagation", str(run), *map(str, runs)), run, config, traced)
    return stages


def run_all(stages: dict[str, Stage]) -> dict[str, str]:
    """Run the stages, WORKERS at a time; returns those without a result, and why. What needs one of them is skipped.

    Of the stages that can start, the one planned first does.
    """
    order = TopologicalSorter({name: stage.needs for name, stage in stages.items()})
    order.prepare()
    without: dict[str, str] = {}
    pool = ThreadPoolExecutor(WORKERS)
    try:
        running: dict[Future[str], str] = {}
        ready: list[str] = []
        while order.is_active():
            for name in order.get_ready():
                if lost := [need for need in stages[name].needs if need in without]:
                    without[name] = f"needs {lost[0]}"
                    order.done(name)
                else:
                    ready.append(name)
            ready.sort(key=list(stages).index)
            while ready and len(running) < WORKERS:
                name = ready.pop(0)
                running[pool.submit(_run, stages[name])] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                name = running.pop(future)
                if why := future.result():
                    without[name] = why
                order.done(name)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return without


def _run(stage: Stage) -> str:
    """Run one stage unless its run is there; returns what went wrong, or nothing."""
    try:
        config = stage.config()
    except InputError as error:
        return str(error)
    if not is_complete(stage.run, config):
        script, *arguments = stage.command
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run([sys.executable, "-m", f"experiments.{script}", *arguments], env=environment).returncode
        if code not in (0, toy_checkpoints.MISSED_GATE):
            return f"exit code {code}, see above"
    return read_run(stage.run)[1].get("missed_gate") or ""


def _print_checkpoints(runs: Sequence[Path]) -> None:
    frame = read_frames(runs)
    gates = frame[frame["metric"] == "gate_accuracy"]
    print("\nToy checkpoints: retrieval at the end of each phase, accuracy by distance")
    print(_by_distance(gates, ["model", "seed", "phase"]))


def _print_phase_scaling(runs: Sequence[Path]) -> None:
    frame = read_frames(runs)
    for window, part in frame[frame["metric"] == "accuracy"].groupby("seq_len"):
        print(f"\nPhase scaling: retrieval in a window of {window} tokens after the extension, accuracy by distance")
        print(_by_distance(part, ["model", "seed"]))
    print("\nPhase scaling: predictions (experiments/phase_scaling.py), accuracy at 8 times the document length")
    print(phase_scaling.verdicts(frame).to_string(index=False, float_format="{:.3f}".format))


def _print_positional_channel(beside: Sequence[Path], runs: Sequence[Path]) -> None:
    frame = read_frames([*runs, *beside])
    ours = frame["experiment"] == "positional_channel"
    accuracy = frame[ours & (frame["metric"] == "accuracy") & (frame["seq_len"] == toy_checkpoints.LONG)]
    print("\nPositional channel: retrieval by students of teachers whose channel is cut, accuracy by distance")
    print(_by_distance(accuracy, ["model", "seed"]))
    print(
        "\nPositional channel: predictions (experiments/positional_channel.py), accuracy at 8 times the document length"
    )
    print(positional_channel.verdicts(frame).to_string(index=False, float_format="{:.3f}".format))


def _print_propagation(runs: Sequence[Path]) -> None:
    frame = read_frames(runs)
    logits = frame[(frame["site"] == "logits") & (frame["metric"] == "kl_nats")]
    shifts = logits[logits["arm"] == propagation.DOSES_ARM]
    table = shifts.groupby(["model", "seed", "masked", "side", "delta_tokens"])[["value", "value_float64"]].mean()
    print("\nPropagation: logit KL in nats by tokens shifted, in float32 and in float64, mean over documents")
    print(table.unstack("side").to_string(float_format="{:.2e}".format))
    print("\nPropagation: predictions (experiments/propagation.py) and what the float64 control says")
    verdicts = pd.concat([pd.DataFrame(read_run(run)[1]["verdicts"]) for run in runs])
    print(verdicts.to_string(index=False, float_format="{:.2e}".format), "\n")


def _print_theta_grid(runs: Sequence[Path]) -> None:
    frame = read_frames(runs)
    gates = frame[frame["metric"] == "gate_accuracy"].groupby(["head_dim", "short_theta"])["value"]
    bases = gates.min().unstack("head_dim")
    print("\nTheta grid: what each base retrieves in its own window, the worst distance; by short theta")
    print(bases.to_string(float_format="{:.2f}".format))
    table = theta_grid.cells(frame)
    for (head_dim, steps), part in table.groupby(["head_dim", "steps"]):
        bound = rope.base_bound(int(head_dim), theta_grid.FAR)
        print(f"\nTheta grid, head dim {head_dim}, {steps} steps: accuracy at {theta_grid.FAR} tokens, short theta")
        print(f"in rows, long theta in columns; the base bound of that distance is {bound:,.0f}")
        shown = part.pivot_table(index="short_theta", columns="long_theta", values="accuracy")
        print(shown.to_string(float_format="{:.2f}".format))
    print("\nTheta grid: predictions (experiments/theta_grid.py)")
    print(theta_grid.verdicts(frame).to_string(index=False, float_format="{:.3f}".format))


def _print_query_spans(runs: Sequence[Path]) -> None:
    frame = read_frames(runs)
    tables = {
        "relative change of each part, mean over layers": query_span_verdicts.part_changes(frame),
        "how many times as much the query spans changed in one arm as in another": query_span_verdicts.contrasts(frame),
        "share of the gain that transplants from the end bring": query_span_verdicts.gains(frame, query_spans.START).T,
        "share of the gain that is left after transplants from the start": query_span_verdicts.gains(
            frame, query_spans.END
        ).T,
        "fraction of the query spans that brings half and 90% of the gain": query_span_verdicts.carrying(frame),
    }
    if frame["seed"].nunique() > 1:
        tables["agreement of seeds on which pairs change"] = query_span_verdicts.agreement(frame)
    for what, table in tables.items():
        print(f"\nQuery spans: {what}")
        print(table.to_string(float_format="{:.2f}".format))
    foreseen = query_span_verdicts.foresight(frame).groupby(["model", "foreseen", "predictor"])["rho"].mean()
    print("\nQuery spans: rank correlation of what is cheap to know with which spans matter, mean over seeds")
    print(foreseen.unstack("predictor").to_string(float_format="{:.2f}".format))
    print("\nQuery spans: predictions (experiments/query_spans.py)")
    print(query_span_verdicts.verdicts(frame).to_string(index=False, float_format="{:.3f}".format))


def _print_text(runs: Sequence[Path]) -> None:
    frame = read_frames(runs)
    print("\nText: prediction (experiments/text.py), and the passkey task on the checkpoint")
    print(text.verdicts(frame).to_string(index=False, float_format="{:.3f}".format))
    print(_by_distance(frame[frame["metric"] == "accuracy"], ["model", "arm"]), "\n")


def _by_distance(frame: pd.DataFrame, index: list[str]) -> str:
    shown = frame.assign(
        value=[f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in frame.itertuples()],
    )
    table = shown.pivot_table(index=index, columns="distance", values="value", aggfunc="first", sort=False)
    return table.sort_index(axis=1).fillna("").to_string()


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        sys.exit(f"error: {error}")
