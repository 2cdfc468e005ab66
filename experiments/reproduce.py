"""The main job, end to end: toy checkpoints, every experiment, the gallery. `make reproduce` runs it.

Checkpoints are trained side by side, one process and one thread each. A stage whose run directory is complete and was
made with the same configuration is reused.
"""

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from experiments import propagation, toy_checkpoints
from rope_probe.errors import InputError
from rope_probe.report import gallery
from rope_probe.results import is_complete, read_run

WORKERS = 2


def main(
    out: Annotated[Path, typer.Option(help="Folder for all run directories.")] = Path("runs"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 1,
) -> None:
    """Run what is missing under `out`, print the tables and the path of the gallery."""
    roles: tuple[toy_checkpoints.Role, ...] = ("teacher", "base")
    made = {(role, seed): out / f"{role}-{seed}" for seed in range(seeds) for role in roles}
    missing = [key for key, run in made.items() if not is_complete(run, toy_checkpoints.config_of(*key))]
    with ThreadPoolExecutor(WORKERS) as pool:
        codes = list(pool.map(lambda key: _script("toy_checkpoints", key[0], str(key[1]), str(made[key])), missing))
    if any(codes):
        failed = ", ".join(f"{role} {seed}" for (role, seed), code in zip(missing, codes, strict=True) if code)
        raise InputError(f"training failed for {failed}; see above")

    traced = out / "propagation"
    if not is_complete(traced, propagation.config_of(list(made.values()))):
        propagation.measure(traced, list(made.values()))

    _print_tables(list(made.values()), traced)
    print(gallery([traced], out / "gallery"))


def _script(name: str, *arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", f"experiments.{name}", *arguments], check=False).returncode


def _print_tables(checkpoints: Sequence[Path], traced: Path) -> None:
    frames = pd.concat([read_run(run)[0] for run in checkpoints])
    gates = frames[frames["metric"] == "gate_accuracy"]
    print("\nRetrieval at the end of each phase, accuracy by distance")
    print(
        gates.pivot_table(index=["model", "seed", "phase"], columns="distance", values="value").to_string(
            float_format="{:.2f}".format, na_rep=""
        )
    )
    frame, manifest = read_run(traced)
    logits = frame[(frame["site"] == "logits") & (frame["metric"] == "kl_nats") & (frame["perturbation"] != "Copy")]
    print("\nLogit KL in nats by tokens shifted, float32 and its float64 control, mean over documents")
    print(
        logits.groupby(["model", "seed", "arm", "side", "delta_tokens"])[["value", "value_float64"]]
        .mean()
        .unstack("side")
        .to_string(float_format="{:.2e}".format)
    )
    print("\nPredictions (experiments/propagation.py) and what the float64 control says")
    print(pd.DataFrame(manifest["verdicts"]).to_string(index=False, float_format="{:.2e}".format))
    print()


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        sys.exit(f"error: {error}")
