"""The map behind phase-wise scaling: short theta x long theta, for two head dims and two extension budgets.

A row is one base (its head dim and short theta, trained to the gate of every base), extended by KD to every long
theta on each budget, as the arms of `phase_scaling` are, and probed at 8 times the document length. The diagonal is a
constant theta; above it (long theta the larger) is phase-wise scaling.

Two formulas from the literature could foresee which cells work, from the long theta alone:
- the base bound (arXiv 2405.14591): theta is enough for a reach L when sum_p cos(m inv_freq_p) >= 0 for all m < L;
- spectrum use: the share of rotary pairs whose wavelength fits into the window.
Beside the base bound stands its rival, a cutoff that knows no head dim.

    python -m experiments.theta_grid 32 300 0 runs/theta_grid/32-300-0 --checkpoints runs
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import typer
from scipy import stats

from experiments import phase_scaling, toy_checkpoints
from experiments.stages import Options, Stage
from experiments.toy_checkpoints import LONG, SHORT, SHORT_DOCUMENTS, CheckpointsIn
from experiments.training import trained
from rope_probe import KeyValueTask, load_model, retrieval_accuracy, rope
from rope_probe.distillation import Phase
from rope_probe.errors import InputError
from rope_probe.gallery.figures.grid import read_cells
from rope_probe.models import checkpoints
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.intervals import student_interval
from rope_probe.runs.results import new_run, read_manifest
from rope_probe.runs.tables import Column, Tables, declare
from rope_probe.runs.verdicts import ABOVE_0, BELOW_0, Section, decided_or_met, mean_beside, verdict, verdicts
from rope_probe.seeds import derive

QUESTION = "Which short theta goes with which long theta, and what foresees it?"
PREDICTIONS = {
    1: "Below the bound of 512 tokens (12.5k for head dim 32, 56k for 16) the long theta gives less than .5 at "
    "512 tokens, above it .5 or more, in at least four cells out of five on the larger budget.",
    2: "Head dim 32: a constant large theta does as well as phase-wise, within .1 (means over the cells with a "
    "long theta of 20,000 or more, diagonal against above it). Head dim 16: phase-wise is better by more than "
    ".1.",
    3: "Spectrum use ranks the cells the wrong way round: its correlation with accuracy is negative, the base "
    "bound's is positive, as a theta that fills the window with rotations leaves no slow pair to match "
    "content by.",
    4: "On the smaller budget fewer cells reach .5.",
}
"""Written before the first run."""
FIGURES = {
    1: ("theta_grid",),
    2: ("theta_grid",),
    3: ("theta_grid",),
    4: ("theta_grid",),
}
"""The drawings that show what a prediction is about, by its number."""

HEAD_DIMS = (16, 32)
THETA_GRID = declare(
    "theta_grid",
    "Retrieval in the cells of the grid, and what the gates of their bases measured.",
    (
        "phase", "head_dim", "short_theta", "long_theta", "steps", "task", "seq_len", "tokens", "distance",
        "trials", "low", "high",
    ),
    dict(RETRIEVAL.metrics),
    own={
        "head_dim": Column("Int64", "dimensions of a head"),
        "short_theta": Column("float64", "theta of the short phase"),
        "long_theta": Column("float64", "theta of the extension"),
        "steps": Column("Int64", "steps of the extension"),
        "task": RETRIEVAL.columns["task"],
        "trials": RETRIEVAL.columns["trials"],
    },
)  # fmt: skip
THETAS = (300.0, 2_000.0, 20_000.0, 100_000.0, 1_000_000.0)
NEAR_BOUNDS = (6_000.0, 10_000.0, 15_000.0, 40_000.0, 70_000.0)
"""More long thetas, on both sides of the two bounds of 512 tokens: 12.5k at head dim 32, 56k at 16."""
LONG_THETAS = tuple(sorted((*THETAS, *NEAR_BOUNDS)))
CUTOFF = 20_000.0
"""The rival of the base bound: one long theta for both head dims, which asks for no formula."""
BUDGETS = (60, 120)
DISTANCES = (128, 512)
UNUSED = ["role", "perturbation"]
"""Columns of retrieval that say nothing here."""
FAR = 8 * SHORT


def make_row(
    head_dim: int,
    short_theta: float,
    seed: int,
    out: Path,
    checkpoints_in: CheckpointsIn = Path("runs"),
) -> None:
    """Train one base and extend it to every long theta on every budget, into the run directory `out`."""
    torch.set_num_threads(1)
    with new_run(out, "theta_grid", config_of(head_dim, short_theta, seed, checkpoints_in), overwrite=True) as run:
        teacher = load_model(checkpoints_in / f"teacher-{seed}" / "checkpoint")
        purpose = ("grid", str(head_dim), f"{short_theta:g}")
        short = toy_checkpoints.short_phase(short_theta)
        config = toy_checkpoints.architecture({"rope_type": "default", "rope_theta": short_theta}, head_dim)
        base = load_model(checkpoints.build(config, seed=derive(seed, *purpose, "weights")))
        history, gate, missed = toy_checkpoints.train_to_gate(
            base, short, derive(seed, *purpose, "short"), f"{out.name} base"
        )
        plain = base.release()
        columns = {"seed": seed, "head_dim": head_dim, "short_theta": short_theta}
        gate = gate.drop(columns=UNUSED).assign(metric="gate_accuracy")
        run.record(THETA_GRID, gate, **columns, model="base", phase="short")
        run.manifest |= {"base_missed_gate": missed, "base_tokens": history[-1]["tokens"]}
        run.provenance.add_model("base", plain)
        for steps in BUDGETS:
            for long_theta in LONG_THETAS:
                student = load_model(checkpoints.with_rope(plain, long_theta))
                phase = extension(long_theta, steps)
                what = f"{out.name} to {long_theta:g}"
                trained(what, student, phase, seed=derive(seed, "extension"), teacher=teacher)
                task = KeyValueTask(SHORT_DOCUMENTS, LONG)
                probe = derive(seed, "probe")
                measured = retrieval_accuracy(student, task, DISTANCES, trials=phase_scaling.TRIALS, seed=probe)
                cell = {**columns, "long_theta": long_theta, "steps": steps}
                measured = measured.drop(columns=UNUSED)
                run.record(THETA_GRID, measured, **cell, model="student", phase="extension")
        run.provenance.add_tokens("extension", phase.batch(derive(seed, "extension"), 0))


def extension(long_theta: float, steps: int) -> Phase:
    """The extension of every cell: that of `phase_scaling`'s KD arms on another budget, warm-up a fifth of it."""
    phase = phase_scaling.phase_of(phase_scaling.Arm(theta=long_theta))
    return dataclasses.replace(phase, steps=steps, warmup=steps // 5)


def config_of(head_dim: int, short_theta: float, seed: int, checkpoints_in: Path) -> dict:
    """The whole configuration of a row, as its manifest holds it: the teacher by its weights."""
    teacher = read_manifest(checkpoints_in / f"teacher-{seed}")["models"]["teacher"]["weights_sha256"]
    return {
        "head_dim": head_dim,
        "seed": seed,
        "short": dataclasses.asdict(toy_checkpoints.short_phase(short_theta)),
        "extensions": [dataclasses.asdict(extension(theta, steps)) for steps in BUDGETS for theta in LONG_THETAS],
        "teacher_sha256": teacher,
        "probe": {"trials": phase_scaling.TRIALS, "distances": DISTANCES},
    }


def cells(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of each cell at 8 times the document length, beside what the two formulas say of its long theta.

    Columns: head_dim, steps, short_theta, long_theta, seed, accuracy, reaches (the long theta is at or above the base
    bound of that distance), use_long (spectrum use of the long theta in its window).
    """
    table = read_cells(frame).query("distance == @FAR")
    bounds = {dim: rope.base_bound(int(dim), FAR) for dim in table["head_dim"].unique()}
    use = [
        rope.spectrum_use(rope.inv_freq({"rope_type": "default", "rope_theta": theta}, int(dim)), LONG)
        for theta, dim in zip(table["long_theta"], table["head_dim"], strict=True)
    ]
    shown = table[["head_dim", "steps", "short_theta", "long_theta", "seed", "accuracy"]]
    return shown.assign(reaches=table["long_theta"] >= table["head_dim"].map(bounds), use_long=use)


def stages(options: Options) -> dict[str, Stage]:
    """In full only: a row of the grid for each seed, head dim and short theta."""
    planned = {}
    rows = itertools.product(range(options.seeds), HEAD_DIMS, THETAS) if options.full else ()
    for seed, head_dim, theta in rows:
        run = options.out / "theta_grid" / f"{head_dim}-{theta:g}-{seed}"
        command = ("theta_grid", str(head_dim), f"{theta:g}", str(seed), str(run), "--checkpoints", str(options.out))
        config = partial(config_of, head_dim, theta, seed, options.out)
        planned[f"theta_grid/{run.name}"] = Stage(command, run, config, (f"teacher-{seed}",), seconds=900.0)
    return planned


def report(results: Mapping[str, Tables]) -> Section:
    """What each base retrieves, the accuracy of each cell, and the predictions."""
    frame = results["theta_grid"]["theta_grid"]
    gates = frame[frame["metric"] == "gate_accuracy"].groupby(["head_dim", "short_theta"])["value"]
    tables = {"what each base retrieves in its own window, the worst distance": gates.min().unstack("head_dim")}
    for (head_dim, steps), part in cells(frame).groupby(["head_dim", "steps"]):
        bound = rope.base_bound(int(head_dim), FAR)
        title = (
            f"head dim {head_dim}, {steps} steps: accuracy at {FAR} tokens, short theta in rows, long theta in columns"
        )
        title += f"; the base bound of that distance is {bound:,.0f}"
        tables[title] = part.pivot_table(index="short_theta", columns="long_theta", values="accuracy")
    return Section(judged(frame), tables)


Figure = Callable[[pd.DataFrame], float]
"""Of the cells of one seed."""


def judged(frame: pd.DataFrame) -> pd.DataFrame:
    """Each prediction: a figure of each seed's whole grid, their mean, and Student's interval over seeds.

    Cells of a seed share bases and a teacher, so a seed is the unit. One seed has no interval.
    """
    table, rows = cells(frame), []
    larger = table[table["steps"] == max(BUDGETS)]

    def by_seed(of: pd.DataFrame, figure: Figure) -> pd.Series:
        return pd.Series([figure(part) for _, part in of.groupby("seed")], dtype=float).dropna()

    def judge(
        number: int, claim: str, figure: Figure, least: float = -np.inf, most: float = np.inf, of: pd.DataFrame = larger
    ) -> None:
        values = by_seed(of, figure)
        mean, (low, high) = values.mean(), student_interval(values)
        held = decided_or_met(mean, low, high, least, most)
        rows.append(verdict(number, claim, mean, held, n=len(values), low=low, high=high))

    judge(1, "share of cells the base bound sorts right, larger budget, .8 or more", _sorted_by_bound, 0.8)
    what = f"the same of its rival, one cutoff for both head dims: a long theta of {CUTOFF:,.0f} or more"
    rows.append(mean_beside(what, by_seed(larger, _sorted_by_cutoff)))
    for dim, part in larger[larger["long_theta"] >= 20_000].groupby("head_dim"):
        wanted, bounds = ("within .1", (-0.1, 0.1)) if dim == 32 else ("above .1", (0.1, np.inf))
        judge(2, f"head dim {dim}: phase-wise less constant large theta {wanted}", _gap, *bounds, of=part)
    judge(3, "rank correlation of base bound with accuracy above 0", partial(_rank, "reaches"), ABOVE_0)
    judge(3, "rank correlation of spectrum use with accuracy below 0", partial(_rank, "use_long"), most=BELOW_0)
    claim = f"cells at .5 or more with {BUDGETS[0]} steps, less those with {BUDGETS[1]}, below 0"
    judge(4, claim, _fewer_that_work, most=BELOW_0, of=table)
    return verdicts(rows)


def _sorted_by_bound(grid: pd.DataFrame) -> float:
    return float(((grid["accuracy"] >= 0.5) == grid["reaches"]).mean())


def _sorted_by_cutoff(grid: pd.DataFrame) -> float:
    return float(((grid["accuracy"] >= 0.5) == (grid["long_theta"] >= CUTOFF)).mean())


def _gap(grid: pd.DataFrame) -> float:
    """Accuracy with a smaller short theta, less that with one theta for both."""
    constant = grid.loc[grid["short_theta"] == grid["long_theta"], "accuracy"]
    return float(grid.loc[grid["short_theta"] < grid["long_theta"], "accuracy"].mean() - constant.mean())


def _rank(column: str, grid: pd.DataFrame) -> float:
    return float(stats.spearmanr(grid[column], grid["accuracy"]).statistic)


def _fewer_that_work(grid: pd.DataFrame) -> float:
    working = grid[grid["accuracy"] >= 0.5].groupby("steps").size()
    few, many = (int(working.get(steps, 0)) for steps in BUDGETS)
    return float(few - many)


if __name__ == "__main__":
    try:
        typer.run(make_row)
    except InputError as error:
        sys.exit(f"error: {error}")
