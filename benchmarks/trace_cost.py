"""What a trace costs against window, depth and number of perturbations, and how well FLOPs foresee it.

Models of Llama's shape (float32, random weights) of several depths trace shifts of q in the first layer, read at the
default sites. Times are the least of some repeats, in one process, the sizes in a random order. The fit is a rate for
the FLOPs of projections, MLPs and head, one for those of attention, a price for a position read, and a constant; none
of them negative, least squares of the relative errors.

    python benchmarks/trace_cost.py runs/trace_cost && python -m figures.trace_cost runs/trace_cost figure.html
"""

import argparse
import itertools
import random
import time
from pathlib import Path
from trace import build  # type: ignore[attr-defined]  # the script beside this one
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from scipy.optimize import nnls

from rope_probe import PositionShift, load_model, pack, trace
from rope_probe.gallery.figures.cost import TRACE_COST
from rope_probe.runs.results import new_run

WINDOWS, LAYERS, COUNTS = (512, 1024, 2048, 4096), (2, 4, 8), (1, 4, 8)
SHAPE = {"width": 256, "heads": 4, "vocabulary": 2048}


def main(out: Path, repeats: Annotated[int, typer.Option(min=1)] = 3) -> None:
    """Measure, fit and print; the run directory `out` holds what the figure draws."""
    with new_run(
        out, "trace_cost", {"windows": WINDOWS, "layers": LAYERS, "perturbations": COUNTS, **SHAPE}, overwrite=True
    ) as run:
        frame = measured(repeats)
        work = np.array([terms(*size) for size in frame[["seq_len", "layers", "count"]].itertuples(index=False)])
        seconds = frame["seconds"].to_numpy()
        scale = work.max(axis=0)
        fit, _ = nnls(work / scale / seconds[:, None], np.ones(len(frame)))
        fitted = work / scale @ fit
        off = np.abs(fitted / seconds - 1)
        sizes = frame[["seq_len", "layers", "count"]].rename(columns={"count": "perturbations"})
        for metric, values in (("seconds", seconds), ("seconds_fitted", fitted)):
            run.record(TRACE_COST, sizes.assign(metric=metric, value=values))
        rates = run.manifest["fit"] = dict(zip(("linear", "attention", "read", "constant"), fit / scale, strict=True))
    print({name: f"{1e-9 / rates[name]:.0f} GFLOP/s" for name in ("linear", "attention") if rates[name]})
    print(f"{rates['read'] * 1e6:.2f} us a position read, {rates['constant'] * 1e3:.1f} ms a trace")
    print(
        f"{len(frame)} sizes, {torch.get_num_threads()} threads: off by {np.median(off):.1%}, {off.max():.1%} at most"
    )
    print(out)


def measured(repeats: int) -> pd.DataFrame:
    """Seconds of each size."""
    rows = []
    sizes = list(itertools.product(WINDOWS, LAYERS, COUNTS))
    for window, layers, count in random.Random(0).sample(sizes, len(sizes)):
        options = argparse.Namespace(positions=window, layers=layers, **SHAPE)
        model = load_model(build(options))
        tokens = torch.randint(SHAPE["vocabulary"], (window,), generator=torch.Generator().manual_seed(0))
        shifts = [PositionShift("q", float(dose), layers=0) for dose in range(1, count + 1)]
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            trace(model, pack([tokens], window), shifts, by="window")
            seconds.append(time.perf_counter() - started)
        rows.append({"seq_len": window, "layers": layers, "count": count, "seconds": min(seconds)})
    return pd.DataFrame(rows)


def terms(window: int, layers: int, count: int) -> list[float]:
    """FLOPs of everything linear, and of attention; positions read; 1."""
    width, passes = SHAPE["width"], 1 + count
    projections = 2 * window * 4 * width * width
    mlp = 2 * window * 3 * width * (width * 8 // 3)
    linear = (
        passes * (layers * (projections + mlp) + 2 * window * width * SHAPE["vocabulary"])
        - count * projections * 3 // 4
    )
    attention = passes * layers * 4 * width * window * (window + 1) // 2
    return [linear, attention, count * layers * window, 1.0]


if __name__ == "__main__":
    typer.run(main)
