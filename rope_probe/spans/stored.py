"""Weights tensor by tensor: of a model in memory, or of a checkpoint's safetensors files without ever loading it."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rope_probe.errors import InputError
from rope_probe.models import attention, checkpoints, gguf_files, offloaded, weight_files
from rope_probe.models.architectures import Rotary, architecture_of, shape_of
from rope_probe.models.checkpoints import read_config, require_plain, skeleton
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.models.parameters import is_weight, name_in_files, part_of
from rope_probe.runs import provenance

Model: TypeAlias = str | os.PathLike[str] | PreTrainedModel | HookedCausalLM


class Weights(Protocol):
    """The weights of a model by name, one at a time. `model` has its modules; their values may be on no device."""

    label: str
    model: PreTrainedModel
    names: list[str]

    @contextmanager
    def read(self, name: str) -> Iterator[Tensor]:
        """A tensor, valid within the block."""


class _Loaded:
    def __init__(self, model: PreTrainedModel, label: str) -> None:
        self.label = label
        self.model = model
        self._parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.names = list(self._parameters)

    @contextmanager
    def read(self, name: str) -> Iterator[Tensor]:
        values = self._parameters[name]
        weight_files.require_float(self.label, name, str(values.dtype).removeprefix("torch."))
        yield values.cpu()


class _Stored:
    def __init__(self, label: str) -> None:
        self.label, self._name = repr(label), label
        config = read_config(label)
        require_plain(config, label)
        architecture_of(config)
        self.model = skeleton(config)
        files = weight_files.files_of_tensors(label)
        self.files = {name: file for name, file in files.items() if is_weight(self.model, name)}
        self.names = list(self.files)
        weight_files.require_floats(self._name, self.files)
        self._require_whole()

    @contextmanager
    def read(self, name: str) -> Iterator[Tensor]:
        with self._opened(name) as file:
            yield file.get_tensor(name)  # a view of the mapped file: its pages go with it

    def _opened(self, name: str) -> AbstractContextManager[Any]:
        return weight_files.opened(self._name, self.files[name])

    def _require_whole(self) -> None:
        """That what the config describes is there, in that shape; files have their own names for parts of experts."""
        wanted = {name_in_files(name, self.files): parameter for name, parameter in self.model.named_parameters()}
        own_names = {name for name in self.names if name not in wanted}
        for name, parameter in wanted.items():
            if name not in self.files:
                if part_of(self.model, name)[0] == "mlp" and own_names:
                    continue
                raise InputError(f"checkpoint {self.label} lacks {name!r}, or has it quantised")
            with self._opened(name) as file:
                shape = file.get_slice(name).get_shape()
            if shape != list(parameter.shape):
                raise InputError(f"{name} of {self.label} is {shape}, but its config asks for {list(parameter.shape)}")


def weights_of(model: Model, role: str = "") -> Weights:
    """The weights of a model in memory, or of a checkpoint by folder, hub id, name or GGUF file.

    `role` tells two models in memory apart. Safetensors files are read tensor by tensor; a GGUF file is loaded, since
    its weights have to be dequantised. The experts of a mixture have other names in memory than in files.

    Raises InputError for a model in memory that accelerate dispatched, or that is quantised; for a checkpoint that is
    not there, has no safetensors files, lacks one of them or has a corrupt one, lacks a weight that its config asks for
    or has it in another shape, or is quantised; and for an architecture whose layout of rotary pairs is unknown.
    """
    if isinstance(model, HookedCausalLM):
        model = model.original_model
    if isinstance(model, PreTrainedModel):
        architecture_of(model.config)
        offloaded.require_in_memory(model, "comparing weights", "give the checkpoint by its folder")
        checkpoints.require_unquantised(model, "comparing weights")
        return _Loaded(model, f"the {model.config.model_type} model {role}".rstrip())
    name = os.fspath(model)
    if gguf_files.is_gguf(weight_files.place_of(name)):
        loaded = checkpoints.load(name)
        architecture_of(loaded.config)
        return _Loaded(loaded, repr(name))
    return _Stored(name)


def resolved(after: Model, before: Model) -> Model:
    """`after` itself; or, where it is the folder of a PEFT adapter, `before` with the adapter merged, in memory.

    Raises InputError for an adapter of another model.
    """
    if isinstance(after, PreTrainedModel | HookedCausalLM) or not weight_files.is_adapter(after):
        return after
    if isinstance(before, HookedCausalLM):
        return checkpoints.with_adapter(before.plain_copy(), after)
    if isinstance(before, PreTrainedModel):
        return checkpoints.with_adapter(attention.plain_copy(before), after)
    return checkpoints.load(before, adapter=after)


def describe_checkpoint(
    model: str | os.PathLike[str], adapter: str | os.PathLike[str] | None = None
) -> provenance.Model:
    """What a manifest says of a checkpoint's files: rope parameters in full, and hashes; an adapter's with its base's.

    Raises InputError as `weights_of`.
    """
    name = os.fspath(model)
    place = weight_files.place_of(name)
    if gguf_files.is_gguf(place):
        described, files = skeleton(read_config(name)), [place]
    else:
        stored = _Stored(name)
        described, files = stored.model, sorted(set(stored.files.values()))
    if adapter is not None:
        files.append(os.path.join(adapter, weight_files.ADAPTER_WEIGHTS))
    digests = {}
    for file in files:
        with open(file, "rb") as shard:
            digests[Path(file).name] = hashlib.file_digest(shard, "sha256").hexdigest()
    return provenance.Model(
        model_type=described.config.model_type,
        rope_parameters=dict(described.config.rope_parameters),
        parameters=described.num_parameters(),
        files_sha256=digests,
    )


def require_alike(before: PreTrainedConfig, after: PreTrainedConfig) -> None:
    """Raises InputError unless two models are of one architecture and shape; how they rotate may differ."""
    one, other = shape_of(before), shape_of(after)
    for name in one:
        if one[name] != other[name]:
            raise InputError(
                f"{name} is {one[name]} before and {other[name]} after; "
                "checkpoints are compared that are of one architecture"
            )


def require_same_pairs(before: Sequence[Rotary | None], after: Sequence[Rotary | None]) -> None:
    """Raises InputError unless the same layers of two models rotate the same number of dimensions."""
    for layer, rotaries in enumerate(zip(before, after, strict=True)):
        one, other = (0 if rotary is None else rotary.rotary_dim for rotary in rotaries)
        if one != other:
            raise InputError(f"layer {layer} rotates {one} dimensions of a head before and {other} after")
