"""Training snapshots: a Hugging Face checkpoint, and the state of optimizers and random number generators beside it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rope_probe.distillation.loop import Training
from rope_probe.distillation.phase import Phase
from rope_probe.errors import InputError
from rope_probe.models import checkpoints
from rope_probe.runs.folders import kind_of, remove_folder, whole_folder

_STATE, _PLACE = "training.safetensors", "training.json"
_RNG = "rng/"


@dataclass(frozen=True)
class Snapshot:
    """A whole snapshot on disk: so many steps of so-called phase are done."""

    folder: Path
    phase: str
    step: int
    names: str

    def resume(self, training: Training, rank: int) -> None:
        """Go on from here: optimizers and random number generators as they were; the weights are the model's already.

        Raises InputError for a snapshot whose files are damaged.
        """
        state = self._state()
        remembered = {name: value for name, value in state.items() if not name.startswith(_RNG)}
        try:
            if _hash_names(state) != self.names:
                raise InputError("it holds other tensors than were written")
            training.restore(self.step, remembered)
        except InputError as error:
            raise _damaged(self.folder, _STATE, str(error)) from error
        if f"{_RNG}{rank}/cpu" not in state:
            raise InputError(f"snapshot {str(self.folder)!r} is of fewer processes; resume with as many as it has")
        try:
            torch.set_rng_state(state[f"{_RNG}{rank}/cpu"])
            if f"{_RNG}{rank}/cuda" in state and torch.cuda.is_available():
                torch.cuda.set_rng_state(state[f"{_RNG}{rank}/cuda"])
        except (RuntimeError, TypeError) as error:
            raise _damaged(self.folder, _STATE, str(error)) from error

    def _state(self) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / _STATE)
        except (OSError, SafetensorError) as error:
            raise _damaged(self.folder, _STATE, str(error)) from error


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
            place = {"phase": training.phase.name, "step": training.step, "names": _hash_names(state)}
            (partial / _PLACE).write_text(json.dumps(place) + "\n")
    accelerator.wait_for_everyone()


def _hash_names(state: Mapping[str, Tensor]) -> str:
    return hashlib.sha256("\n".join(sorted(state)).encode()).hexdigest()


def name_of(phase: str, step: int) -> str:
    """What a snapshot's folder is called."""
    return f"{phase}-{step:06d}"


def found(folder: Path, phases: Sequence[Phase]) -> list[Snapshot]:
    """The snapshots in `folder`, latest last; what is not rope_probe's is not looked at.

    Raises InputError for a snapshot that is damaged, or of none of the phases.
    """
    names = [phase.name for phase in phases]
    ours = [place for place in folder.glob("[!.]*") if kind_of(place) == "checkpoint"]
    snapshots = [_read(place, phases) for place in ours]
    return sorted(snapshots, key=lambda one: (names.index(one.phase), one.step))


def prune(folder: Path, phases: Sequence[Phase], keep: int) -> None:
    """Remove all but the latest `keep` snapshots."""
    for old in found(folder, phases)[:-keep]:
        remove_folder(old.folder)


def _read(folder: Path, phases: Sequence[Phase]) -> Snapshot:
    try:
        place = json.loads((folder / _PLACE).read_text())
        phase, step, names = place["phase"], place["step"], place["names"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(folder, _PLACE, str(error)) from error
    steps = {phase.name: phase.steps for phase in phases}
    if not isinstance(phase, str) or type(step) is not int or folder.name != name_of(phase, step):
        raise _damaged(folder, _PLACE, f"it says phase {phase!r} and step {step!r}")
    if phase not in steps or not 0 < step < steps[phase]:
        raise _damaged(folder, _PLACE, f"the configuration has no step {step} of a phase {phase!r} to go on from")
    return Snapshot(folder, phase, step, names)


def _damaged(folder: Path, file: str, why: str) -> InputError:
    remedy = "remove it to resume from the one before, or from the start"
    return InputError(f"snapshot {str(folder)!r} is damaged: {file}: {why}; {remedy}")
