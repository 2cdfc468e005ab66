"""Propagation: a perturbation of position in q or k travels through the layers to the logits, on the toy checkpoints.

Two measurements on each model, each with its float64 control beside it:
copies, each copy of a document in a repeated window against the first, and shifts of q, k or both by 1/4 token to the
whole window, on packed documents.

Predictions, written before the first run:

 1. One token repeated: every value vector is the same, so attention returns it whatever the weights are, and position
    reaches neither the residual stream nor the logits (float64 below 1e-10), though rotated q and k differ.
 2. The same after one other token: position 0 is now distinguishable and its softmax weight depends on distance, so
    position does reach the logits, far above the float64 floor.
 3. A document repeated: position reaches the logits, unless documents are masked from each other: then a plain RoPE
    model is blind to a document's place and what is left is rounding.
 4. Shifting q and k together changes nothing but rounding; shifting either alone changes the logits.
 5. The logit KL of a shift of q by a quarter token is smaller than that of a shift by 16 tokens.
 6. Delta size, teacher against base: the teacher uses position over a longer range, so the KL of its largest shift is
    the larger one of the two.

    python -m experiments.propagation runs/propagation-0 runs/teacher-0 runs/base-0
"""

from pathlib import Path
from typing import NamedTuple

import pandas as pd
import typer

from experiments.toy_checkpoints import SHORT, SHORT_DOCUMENTS
from rope_probe import HookedCausalLM, PositionShift, Window, copy_deltas, load_model, pack, repeated_window, trace
from rope_probe.progress import progress
from rope_probe.results import describe_model, hash_tokens, new_run, read_run

WINDOW = 1024
DOSES = [2.0**k for k in range(-2, 11)]
FLOOR = 1e-10


def measure(out: Path, checkpoints: list[Path]) -> None:
    """Trace every checkpoint (run directories of experiments.toy_checkpoints) and write the run directory `out`."""
    with new_run(out, "propagation", config_of(checkpoints)) as run:
        run.manifest["models"] = {}
        for checkpoint in checkpoints:
            made = read_run(checkpoint)[1]["config"]
            role, seed = made["role"], made["seed"]
            model = load_model(checkpoint / "checkpoint")
            run.manifest["models"][f"{role}-{seed}"] = describe_model(model.original_model)
            for arm in copy_arms(seed):
                frame = copy_deltas(model, arm.window, reference=arm.reference, masked=arm.masked, control=True)
                run.record(frame, model=role, seed=seed, arm=arm.name)
            window = packed_documents(seed)
            run.manifest["models"][f"{role}-{seed}"]["tokens_sha256"] = hash_tokens(window.tokens)
            for masked in (False, True):
                frame = _sweep(model, window, masked, f"{role} {seed}")
                run.record(frame, model=role, seed=seed, arm=f"packed documents{', masked' if masked else ''}")
            model.release()
        run.manifest |= {"attention_kernel": "sdpa", "mask": "as the arm says, else none", "positions": "continuous"}
        run.manifest["verdicts"] = verdicts(pd.concat(run.frames)).to_dict("records")


def config_of(checkpoints: list[Path]) -> dict:
    """The whole configuration, as the manifest holds it: the checkpoints by their weights."""
    weights = [model["weights_sha256"] for run in checkpoints for model in read_run(run)[1]["models"].values()]
    return {"window": WINDOW, "document": SHORT, "doses": DOSES, "weights_sha256": weights}


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
    return [
        CopyArm("repeated token", repeated_window(token, SHORT)),
        CopyArm("repeated token after another", pack([[other], *[[token]] * SHORT], SHORT + 1), reference=1),
        CopyArm("repeated document", repeated),
        CopyArm("repeated document, masked", repeated, masked=True),
    ]


def packed_documents(seed: int) -> Window:
    """Sixteen different documents packed into one window."""
    return pack(list(SHORT_DOCUMENTS.documents(WINDOW // SHORT, seed=seed, index=1)), WINDOW)


def _sweep(model: HookedCausalLM, window: Window, masked: bool, what: str) -> pd.DataFrame:
    shifts = [PositionShift(side, dose) for side in ("q", "k", "qk") for dose in DOSES]
    with progress(f"shifts, {what}, layers", 2 * len(shifts) * len(model.blocks)) as advance:
        return trace(model, window, shifts, masked=masked, control=True, progress=advance)


def verdicts(frame: pd.DataFrame) -> pd.DataFrame:
    """Each prediction with its figures and whether it held, per model and seed."""
    logits = frame[frame["site"] == "logits"]
    rel = logits[logits["metric"] == "rel_l2"].groupby(["arm", "model", "seed"])["value_float64"].max()
    kl = logits[logits["metric"] == "kl_nats"]
    shifts = (
        kl[kl["perturbation"] != "Copy"]
        .groupby(["arm", "model", "seed", "side", "delta_tokens"])["value_float64"]
        .mean()
    )
    rows = []

    def judge(number: int, what: str, model: str, seed: int, figure: float, held: bool) -> None:
        rows.append({"prediction": number, "what": what, "model": model, "seed": seed, "float64": figure, "held": held})

    for model, seed in frame.groupby(["model", "seed"]).groups:
        for number, arm, reaches in (
            (1, "repeated token", False),
            (2, "repeated token after another", True),
            (3, "repeated document", True),
            (3, "repeated document, masked", False),
        ):
            figure = rel[arm, model, seed]
            judge(number, f"logits rel_l2 between copies, {arm}", model, seed, figure, (figure > FLOOR) == reaches)
        mine = shifts["packed documents", model, seed]
        judge(4, "largest logit KL, both shifted", model, seed, mine["qk"].max(), mine["qk"].max() < FLOOR)
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
    for seed in sorted(frame["seed"].unique()):
        if {("teacher", seed), ("base", seed)} <= set(frame.groupby(["model", "seed"]).groups):
            ratio = (
                shifts["packed documents", "teacher", seed, "q", DOSES[-1]]
                / shifts["packed documents", "base", seed, "q", DOSES[-1]]
            )
            judge(6, f"logit KL of q by {DOSES[-1]:g}, teacher over base", "both", seed, ratio, ratio > 1)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    typer.run(measure)
