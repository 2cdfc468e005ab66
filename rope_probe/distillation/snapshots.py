"""Training snapshots: a Hugging Face checkpoint, and the state of optimizers and random number generators beside it."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rope_probe import checkpoints
from rope_probe.atomic import whole_folder
from rope_probe.distillation.loop import Training
from rope_probe.errors import InputError

_STATE, _PLACE = "training.safetensors", "training.json"
_RNG = "rng/"


@dataclass(frozen=True)
class Snapshot:
    """A whole snapshot on disk: so many steps of so-called phase are done."""

    folder: Path
    phase: str
    step: int

    def resume(self, training: Training, rank: int) -> None:
        """Go on from here: optimizers and random number generators as they were; the weights are the model's already.

        Raises InputError for a snapshot whose files are damaged.
        """
        state = self._state()
        training.restore(self.step, {name: value for name, value in state.items() if not name.startswith(_RNG)})
        if f"{_RNG}{rank}/cpu" not in state:
            raise InputError(f"snapshot {str(self.folder)!r} is of fewer processes; resume with as many as it has")
        torch.set_rng_state(state[f"{_RNG}{rank}/cpu"])
        if f"{_RNG}{rank}/cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state[f"{_RNG}{rank}/cuda"])

    def _state(self) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / _STATE)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"snapshot {str(self.folder)!r} is damaged: {_STATE}: {error}; remove it to resume from the one before"
            ) from error


def take(training: Training, accelerator: Accelerator, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Write a snapshot to `folder`, whole or not at all. Every process calls it; the first one writes."""
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    everyone = gather_object([rng]) if accelerator.num_processes > 1 else [rng]
    weights, state = training.weights(), training.state()
    if accelerator.is_main_process:
        state |= {f"{_RNG}{rank}/{name}": value for rank, one in enumerate(everyone) for name, value in one.items()}
        with whole_folder(folder, kind="checkpoint") as partial:
            checkpoints.write(training.model.original_model, partial, weights=weights, tokenizer=tokenizer)
            with checkpoints.failing_as_os_error(partial):
                save_file({name: value.contiguous() for name, value in state.items()}, partial / _STATE)
            place = {"phase": training.phase.name, "step": training.step}
            (partial / _PLACE).write_text(json.dumps(place) + "\n")
    accelerator.wait_for_everyone()


def found(folder: Path, phases: Sequence[str]) -> list[Snapshot]:
    """The snapshots in `folder`, latest last. Raises InputError for one that is damaged."""
    snapshots = [_read(place) for place in folder.glob("[!.]*")]
    return sorted(snapshots, key=lambda one: (phases.index(one.phase), one.step))


def prune(folder: Path, phases: Sequence[str], keep: int) -> None:
    """Remove all but the latest `keep` snapshots, and what writes that were cut short have left."""
    for old in found(folder, phases)[:-keep]:
        os.replace(old.folder, old.folder.with_name(f".{old.folder.name}"))  # not to be seen while it is half there
    for hidden in folder.glob(".*"):
        shutil.rmtree(hidden)


def _read(folder: Path) -> Snapshot:
    try:
        place = json.loads((folder / _PLACE).read_text())
        return Snapshot(folder, place["phase"], place["step"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"snapshot {str(folder)!r} is damaged: {_PLACE}: {error}; remove it to resume from the one before"
        ) from error
