"""Weights tensor by tensor: of a model in memory, or of a checkpoint's safetensors files without ever loading it."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from rope_probe.architectures import Rotary, architecture_of
from rope_probe.checkpoints import ABSENT_IS_NONE, quiet
from rope_probe.errors import InputError
from rope_probe.hooked import HookedCausalLM
from rope_probe.spans.parts import OUTPUT_HEADS, part_of

Model: TypeAlias = str | os.PathLike[str] | PreTrainedModel | HookedCausalLM
_READABLE = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}
_ALIKE = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


class Weights(Protocol):
    """The weights of a model by name, one at a time. `model` has its modules; their values may be on no device."""

    label: str
    model: PreTrainedModel
    names: list[str]

    @contextmanager
    def read(self, name: str) -> Iterator[Tensor]:
        """A tensor, valid within the block."""


class _Loaded:
    def __init__(self, model: PreTrainedModel, role: str) -> None:
        self.label = f"the {model.config.model_type} model {role}".rstrip()
        self.model = model
        self._parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.names = list(self._parameters)

    @contextmanager
    def read(self, name: str) -> Iterator[Tensor]:
        values = self._parameters[name]
        _require_readable(name, self.label, str(values.dtype).removeprefix("torch."))
        yield values.cpu()


class _Stored:
    def __init__(self, label: str) -> None:
        self.label = repr(label)
        config = _config(label)
        if getattr(config, "quantization_config", None) is not None:
            raise InputError(f"checkpoint {self.label} is quantised; give one in float32, bfloat16 or float16")
        architecture_of(config)
        self.model = skeleton(config)
        ignored = self.model._keys_to_ignore_on_load_unexpected or ()
        self.files = {
            name: file
            for name, file in _files(label).items()
            if not name.endswith((".inv_freq", *(f".{pattern}" for pattern in ignored)))
        }
        if config.tie_word_embeddings:
            self.files = {
                name: file for name, file in self.files.items() if name.rpartition(".")[0] not in OUTPUT_HEADS
            }
        self.names = list(self.files)
        self._require_whole()

    @contextmanager
    def read(self, name: str) -> Iterator[Tensor]:
        with self._opened(name) as file:
            _require_readable(name, self.label, file.get_slice(name).get_dtype())
            yield file.get_tensor(name)  # a view of the mapped file: its pages go with it

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        with _reading(self.label, self.files[name]), safe_open(self.files[name], framework="pt") as file:
            yield file

    def _require_whole(self) -> None:
        """That what the config describes is there, in that shape; files have their own names for parts of experts."""
        wanted = dict(self.model.named_parameters())
        if "lm_head.weight" in wanted and "embed_out.weight" in self.files:
            wanted["embed_out.weight"] = wanted.pop("lm_head.weight")
        own_names = {name for name in self.names if name not in wanted}
        for name, parameter in wanted.items():
            if name not in self.files:
                if part_of(self.model, name)[0] == "mlp" and own_names:
                    continue
                raise InputError(f"checkpoint {self.label} lacks {name!r}, or has it quantised")
            with self._opened(name) as file:
                shape = file.get_slice(name).get_shape()
                _require_readable(name, self.label, file.get_slice(name).get_dtype())
            if shape != list(parameter.shape):
                raise InputError(f"{name} of {self.label} is {shape}, but its config asks for {list(parameter.shape)}")


def _require_readable(name: str, label: str, dtype: str) -> None:
    if dtype not in _READABLE:
        raise InputError(
            f"tensor {name!r} of {label} is stored as {dtype}, quantised or no weight; "
            "give a checkpoint in float32, bfloat16 or float16"
        )


def weights_of(model: Model, role: str = "") -> Weights:
    """The weights of a model in memory, or of a checkpoint by folder or hub id; `role` tells two in memory apart.

    The experts of a mixture have other names in memory than in files. Raises InputError for a checkpoint that is not
    there, has no safetensors files, lacks one of them or has a corrupt one, lacks a weight that its config asks for or
    has it in another shape, is quantised, or is of an architecture whose layout of rotary pairs is unknown.
    """
    if isinstance(model, HookedCausalLM):
        model = model.original_model
    if isinstance(model, PreTrainedModel):
        architecture_of(model.config)
        return _Loaded(model, role)
    return _Stored(os.fspath(model))


def describe_checkpoint(model: str | os.PathLike[str]) -> dict[str, Any]:
    """What a manifest says of a checkpoint that is read but not loaded: its rope parameters in full, and file hashes.

    Raises InputError as `weights_of`.
    """
    stored = _Stored(os.fspath(model))
    digests = {}
    for file in sorted(set(stored.files.values())):
        with open(file, "rb") as shard:
            digests[Path(file).name] = hashlib.file_digest(shard, "sha256").hexdigest()
    return {
        "model_type": stored.model.config.model_type,
        "rope_parameters": dict(stored.model.config.rope_parameters),
        "parameters": stored.model.num_parameters(),
        "files_sha256": digests,
    }


def require_alike(before: PreTrainedConfig, after: PreTrainedConfig) -> None:
    """Raises InputError unless two models are of one architecture and shape; how they rotate may differ."""

    def shape(config: PreTrainedConfig) -> dict[str, Any]:
        named = {name: getattr(config, name, None) for name in _ALIKE}
        heads = config.num_attention_heads
        named["num_key_value_heads"] = named["num_key_value_heads"] or heads
        return named | {"head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads}

    one, other = shape(before), shape(after)
    for name in one:
        if one[name] != other[name]:
            raise InputError(
                f"{name} is {one[name]} before and {other[name]} after; "
                "spans are compared between checkpoints of one architecture"
            )


def require_same_pairs(before: Sequence[Rotary | None], after: Sequence[Rotary | None]) -> None:
    """Raises InputError unless the same layers of two models rotate the same number of dimensions."""
    for layer, rotaries in enumerate(zip(before, after, strict=True)):
        one, other = (0 if rotary is None else rotary.rotary_dim for rotary in rotaries)
        if one != other:
            raise InputError(f"layer {layer} rotates {one} dimensions of a head before and {other} after")


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """A causal LM's modules and shapes without their values, but with the rotary embedding it would have."""
    try:
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.base_model.rotary_emb = type(model.base_model.rotary_emb)(config=config)
    except Exception as error:  # each config has its own checks
        raise InputError(f"transformers makes no causal LM of this {config.model_type} config: {error}") from error
    return model


def _config(label: str) -> PreTrainedConfig:
    try:
        with quiet():
            return AutoConfig.from_pretrained(label, trust_remote_code=False)
    except Exception as error:  # a config can be wrong in as many ways as transformers has classes of errors
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"cannot read the config of {label!r}: {type(error).__name__}: {reason}") from error


def _files(label: str) -> dict[str, str]:
    """The file that each tensor of a checkpoint is in."""
    single = _find(label, SAFE_WEIGHTS_NAME)
    if single is not None:  # transformers looks for it first, too
        with _reading(repr(label), single), safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    index = _find(label, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise InputError(f"checkpoint {label!r} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}")
    try:
        where = json.loads(Path(index).read_text())["weight_map"]
        shards = {shard: _find(label, shard) for shard in sorted(set(where.values()))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{SAFE_WEIGHTS_INDEX_NAME} of {label!r} is no index of shards: {error!r}") from error
    if lost := [shard for shard, file in shards.items() if file is None]:
        raise InputError(f"checkpoint {label!r} lacks {lost[0]!r}, one of its {len(shards)} shards; copy it again")
    for shard, file in shards.items():
        with _reading(repr(label), str(file)), safe_open(file, framework="pt") as opened:
            inside = set(opened.keys())
        if absent := [name for name, holder in where.items() if holder == shard and name not in inside]:
            raise InputError(f"shard {shard!r} of {label!r} lacks the tensor {absent[0]!r} that its index promises")
    return {name: str(shards[shard]) for name, shard in where.items()}


def _find(label: str, file: str) -> str | None:
    return cached_file(label, file, **ABSENT_IS_NONE)


@contextmanager
def _reading(label: str, file: str) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        name = Path(file).name
        raise InputError(f"weight file {name!r} of {label} is corrupt: {error}; copy it again") from error
