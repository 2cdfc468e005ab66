"""Text from end to end at tiny scale: `distill` on the text Python carries, then a retrieval task on its checkpoint.

The model is far too small to retrieve, so nothing is claimed of its accuracy: the run shows that the path from text to
a checkpoint that transformers loads, and on to a task in text, is whole.

Prediction, written before the first run: the cross-entropy of the first phase falls by more than 1 nat a byte, and the
second phase ends lower still than the first.

    python -m experiments.text runs/text
"""

import dataclasses
import sys
from pathlib import Path

import pandas as pd
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rope_probe import TextTask, load_model, retrieval_accuracy
from rope_probe.distillation import DistillConfig, distill, read_config
from rope_probe.errors import InputError
from rope_probe.runs.results import describe_model, new_run, read_run

CONFIG = Path(__file__).parents[1] / "examples" / "text.toml"
WINDOW, DISTANCES, TRIALS = 512, (64, 256), 32


def train_and_probe(out: Path) -> None:
    """Run both into the run directory `out`; the training's own is in it, under `training`."""
    torch.set_num_threads(1)
    with new_run(out, "text", config_of(), overwrite=True) as run:
        config = dataclasses.replace(training_config(), out=str(run.folder / "training"))
        training, manifest = read_run(distill(config))
        folder = run.folder / "training" / "checkpoints" / config.phases[-1].name
        model = load_model(AutoModelForCausalLM.from_pretrained(folder))
        task = TextTask("passkey", AutoTokenizer.from_pretrained(folder), WINDOW)
        found = retrieval_accuracy(model, task, DISTANCES, trials=TRIALS, seed=config.seed)
        run.record(training.drop(columns=["run_id", "experiment"]))
        run.record(found, model="student", arm=task.name, phase=config.phases[-1].name)
        kept = ("tokens_sha256", "attention_kernel", "mask", "positions")
        run.manifest |= {key: manifest[key] for key in kept}
        run.manifest["models"] = {"student": describe_model(model.original_model)}


def training_config() -> DistillConfig:
    """The example that the README shows."""
    return read_config(CONFIG, device="cpu")


def config_of() -> dict:
    """The whole configuration, as the manifest holds it."""
    probe = {"task": "passkey", "window": WINDOW, "distances": DISTANCES, "trials": TRIALS}
    return {"training": dataclasses.asdict(training_config()), "probe": probe}


def verdicts(frame: pd.DataFrame) -> pd.DataFrame:
    """The prediction with its figures, and whether it held; losses are means over the last three measured steps."""
    losses = frame[frame["metric"] == "ce_nats"]
    short, long = (losses[losses["phase"] == phase]["value"] for phase in ("short", "long"))
    end, further = short.tail(3).mean(), long.tail(3).mean()
    fall = short.iloc[0] - end
    rows = [
        ("cross-entropy falls in the short phase, nats a byte", fall, fall > 1),
        ("cross-entropy at the end of the long phase, less that of the short", further - end, further < end),
    ]
    return pd.DataFrame(rows, columns=["what", "figure", "held"])


if __name__ == "__main__":
    try:
        typer.run(train_and_probe)
    except InputError as error:
        sys.exit(f"error: {error}")
