"""How often intervals of a parted gain hold the truth, by simulation: ours, and those of a bootstrap.

An untrained base finds `plain`, the same base at its best temperature `scaled`, an arm `arm`. Accuracies of three seeds
are beta-distributed around these, with trials of a seed correlated by rho; each was measured by 4 x 64 trials. The rest
is arm less scaled; temperature's part is (scaled - plain) / (arm - plain). The bootstrap draws two of the three seeds
anew, so that the spread of their mean is unbiased (Rao and Wu 1988), then the trials of each; ends are percentiles.

    python benchmarks/part_coverage.py
"""

from typing import Annotated

import numpy as np
import typer

from experiments.rival_verdicts import LEAST_GAIN, Found, parted

SEEDS, DISTANCES, TRIALS = 3, 4, 64
PLAIN = (0.02, 0.01)
CASES = (
    ((0.65, 0.3), (0.98, 0.05)),
    ((0.65, 0.5), (0.98, 0.05)),
    ((0.85, 0.05), (0.98, 0.05)),
    ((0.65, 0.3), (0.24, 0.05)),
    ((0.65, 0.3), (0.65, 0.3)),
)
"""Accuracy and rho of the scaled base and of the arm."""
BOOTSTRAP_DRAWS = 400


def measured(rng: np.random.Generator, accuracy: float, rho: float) -> Found:
    """Three seeds around an accuracy."""
    of_seed = rng.beta(accuracy * (1 / rho - 1), (1 - accuracy) * (1 / rho - 1), (SEEDS, 1))
    hits = rng.binomial(TRIALS, of_seed, (SEEDS, DISTANCES))
    return Found(tuple(range(SEEDS)), hits / TRIALS, np.full(hits.shape, TRIALS))


def bootstrapped(rng: np.random.Generator, *models: Found) -> list[np.ndarray]:
    """Means of each model with seeds, the same for all, and trials drawn anew, [draws]."""
    rows = rng.integers(SEEDS, size=(BOOTSTRAP_DRAWS, SEEDS - 1))
    means = []
    for model in models:
        never_certain = (model.shares * TRIALS + 0.5) / (TRIALS + 1)
        means.append((rng.binomial(TRIALS, never_certain[rows]) / TRIALS).mean((1, 2)))
    return means


def holds(interval: tuple[float, float], truth: float) -> bool:
    """Whether an interval holds the truth."""
    return interval[0] <= truth <= interval[1]


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """2.5% and 97.5%."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def main(
    draws: Annotated[int, typer.Option(help="Simulated measurements of a case.")] = 250,
    seed: Annotated[int, typer.Option(help="Seed of the simulation.")] = 0,
) -> None:
    """Print coverage in %, a line a case, and of how many measurements the part was told by both."""
    print("| scaled base, arm: accuracy and rho | rest: ours | bootstrap | part: ours | bootstrap | of so many |")
    print("|---|---|---|---|---|---|")
    for scaled_case, arm_case in CASES:
        rng = np.random.default_rng(seed)
        rest = arm_case[0] - scaled_case[0]
        part = (scaled_case[0] - PLAIN[0]) / (arm_case[0] - PLAIN[0])
        of_rest, of_part = [], []
        for _ in range(draws):
            plain, scaled, arm = (measured(rng, *case) for case in (PLAIN, scaled_case, arm_case))
            ours = parted(plain, scaled, arm)
            at_plain, at_scaled, at_arm = bootstrapped(rng, plain, scaled, arm)
            of_rest.append((holds(ours.rest_interval, rest), holds(percentiles(at_arm - at_scaled), rest)))
            gains = percentiles(at_arm - at_plain)
            if np.isfinite(ours.part) and gains[0] >= LEAST_GAIN:
                theirs = percentiles((at_scaled - at_plain) / (at_arm - at_plain))
                of_part.append((holds(ours.part_interval, part), holds(theirs, part)))
        cells = [f"{100 * share:.0f}" for share in (*np.mean(of_rest, 0), *np.mean(of_part, 0))]
        print(f"| {scaled_case}, {arm_case} |", " | ".join(cells), f"| {len(of_part)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
