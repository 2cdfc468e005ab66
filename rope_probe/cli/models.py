"""How commands load a model, and what they write down of it."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rope_probe.cli.options import Dtype, Kernel
from rope_probe.cli.output import tell
from rope_probe.errors import InputError

if TYPE_CHECKING:
    import torch

    from rope_probe.models.hooked import HookedCausalLM
    from rope_probe.runs.results import Run


def torch_dtype(dtype: Dtype | None) -> "torch.dtype | None":
    """The dtype as torch has it."""
    import torch

    return None if dtype is None else getattr(torch, dtype.value)


def how_to_load(
    attn: Kernel, dtype: Dtype | None, device: str, device_map: str | None, adapter: Path | None
) -> dict[str, Any]:
    """How a model is loaded, as `load_model` takes it. Raises InputError where two options say where it is to be."""
    spread = device_map not in (None, "disk")  # then it is transformers that chooses devices
    if spread and device != "cpu":
        raise InputError(f"--device {device} and --device-map {device_map} both say where the model is to be; give one")
    return {
        "attn": attn.value,
        "dtype": torch_dtype(dtype),
        "device": None if spread else device,
        "device_map": device_map,
        "adapter": adapter,
    }


def tell_origin(model: str) -> None:
    """Say on stderr where a model given by name comes from."""
    from rope_probe.models.pretrained import told_origin

    if (origin := told_origin(model)) is not None:
        tell(origin)


def recorded(options: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of a command's options: all that decides what is measured."""
    aside = ("out", "overwrite", "accept_terms", "as_json")
    return {name: value for name, value in options.items() if name not in aside}


def describe(run: "Run", model: "HookedCausalLM", name: str, adapter: Path | None) -> None:
    """Put a model and where it comes from into a run's provenance; one that is not in memory by its files."""
    describe_as(run, model, name, name, adapter)


def describe_as(run: "Run", model: "HookedCausalLM", name: str, source: str, adapter: Path | None) -> None:
    """As `describe`, of a model that the run calls otherwise than where it was loaded from."""
    from rope_probe.models.offloaded import is_offloaded
    from rope_probe.models.pretrained import origin_of
    from rope_probe.runs.provenance import describe_model
    from rope_probe.spans.stored import describe_checkpoint

    away = is_offloaded(model.original_model)
    described = describe_checkpoint(source) if away else describe_model(model.original_model)
    run.provenance.models[name] = dataclasses.replace(
        described,
        attention_kernel=model.attn,
        origin=origin_of(source),
        adapter=None if adapter is None else str(adapter),
    )
