"""Text from end to end at tiny scale: `distill` on the text Python carries, then a retrieval task on its checkpoint.

The model is far too small to retrieve, so nothing is claimed of its accuracy: the run shows that the path from text to
a checkpoint that transformers loads, and on to a task in text, is whole.

    python -m experiments.text runs/text
"""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.stages import Options, Stage
from experiments.toy_checkpoints import by_distance
from rope_probe import TextTask, load_model, retrieval_accuracy
from rope_probe.distillation import DistillConfig, distill, read_config
from rope_probe.distillation.log import LOSSES
from rope_probe.errors import InputError
from rope_probe.retrieval.probe import RETRIEVAL
from rope_probe.runs.provenance import Read
from rope_probe.runs.results import new_run, read_run
from rope_probe.runs.tables import Tables
from rope_probe.runs.verdicts import Section, verdict, verdicts

QUESTION = "Is the path from text to a checkpoint, and on to a task in text, whole?"
PREDICTIONS = {
    1: "The cross-entropy of the first phase falls by more than 1 nat a byte, and the second phase ends lower "
    "still than the first.",
}
"""Written before the first run."""
FIGURES = {
    1: ("loss_curves",),
}
"""The drawings that show what a prediction is about, by its number."""

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
        retrieval = retrieval_accuracy(model, task, DISTANCES, trials=TRIALS, seed=config.seed)
        run.record(LOSSES, training["losses"].drop(columns=["run_id", "experiment"]))
        run.record(RETRIEVAL, retrieval, model="student", phase=config.phases[-1].name)
        run.provenance.add_model("student", model)
        for name, entries in manifest["read"].items():
            for entry in entries:
                run.provenance.add_read(name, Read(**entry))


def training_config() -> DistillConfig:
    """The example that the README shows."""
    return read_config(CONFIG, device="cpu")


def config_of() -> dict:
    """The whole configuration, as the manifest holds it."""
    probe = {"task": "passkey", "window": WINDOW, "distances": DISTANCES, "trials": TRIALS}
    return {"training": dataclasses.asdict(training_config()), "probe": probe}


def stages(options: Options) -> dict[str, Stage]:
    """The one run."""
    run = options.out / "text"
    return {"text": Stage(("text", str(run)), run, config_of, seconds=60.0)}


def report(results: Mapping[str, Tables]) -> Section:
    """The task on its checkpoint, and the prediction; losses are means over the last three measured steps."""
    losses, retrieval = (results["text"][name] for name in ("losses", "retrieval"))
    losses = losses[losses["metric"] == "ce_nats"]
    short, long = (losses[losses["phase"] == phase]["value"] for phase in ("short", "long"))
    end, further = short.tail(3).mean(), long.tail(3).mean()
    fall = short.iloc[0] - end
    claim = "cross-entropy at the end of the long phase, less that of the short, below 0"
    rows = [
        verdict(1, "cross-entropy falls by more than 1 nat a byte in the short phase", fall, fall > 1),
        verdict(1, claim, further - end, further < end),
    ]
    table = by_distance(retrieval[retrieval["metric"] == "accuracy"], ["model", "task"])
    return Section(verdicts(rows), {"passkey on its checkpoint, accuracy by distance": table})


if __name__ == "__main__":
    try:
        typer.run(train_and_probe)
    except InputError as error:
        sys.exit(f"error: {error}")
