"""Hugging Face checkpoints: build, load, save, and change how a model rotates. Safetensors only, never pickle."""

import copy
import errno
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging

from rope_probe.errors import InputError, is_out_of_memory, reason
from rope_probe.models import attention, weight_files
from rope_probe.models.architectures import architecture_of, backbone_of, rotary_module_of, set_rotary_module
from rope_probe.runs.folders import whole_folder

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What weights can be stored in."""
_COUNTS = {
    "num_hidden_layers": 10_000,
    "hidden_size": 2**24,
    "intermediate_size": 2**24,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "vocab_size": 2**28,
    "max_position_embeddings": 2**31,
}
"""Counts in a config, and the most that any of them can sensibly be."""
_ROTATION = ("rope_parameters", "max_position_embeddings", "original_max_position_embeddings", "partial_rotary_factor")


def config_of(table: Mapping[str, Any]) -> PreTrainedConfig:
    """A transformers config from its `model_type` and other entries. Raises InputError for one that does not exist."""
    model_type = table.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise InputError(f"model_type {model_type!r} is unknown to transformers; 'llama' is one it knows")
    known = AutoConfig.for_model(model_type)
    if unknown := sorted(key for key in table if not _is_entry(known, key)):
        raise InputError(f"a {known.model_type} config has no entry {unknown[0]!r}")
    try:
        with quiet():
            config = AutoConfig.for_model(**table)
    except Exception as error:  # each config has its own checks
        raise InputError(f"transformers does not take this {known.model_type} config: {reason(error)}") from error
    architecture_of(config)
    _require_sensible(config, f"this {known.model_type} config")
    return config


def _is_entry(config: PreTrainedConfig, key: str) -> bool:
    if key in config.to_dict():
        return True
    return not key.startswith("_") and hasattr(config, key) and not callable(getattr(config, key))


def build(config: Any, *, seed: int) -> PreTrainedModel:
    """A causal LM with random weights from a transformers config, a pure function of (config, seed).

    Raises InputError for a config that transformers makes no causal LM of.
    """
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        try:
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
        except Exception as error:  # each model has its own checks
            if is_out_of_memory(error):
                raise
            what = f"this {config.model_type} config"
            raise InputError(f"transformers makes no causal LM of {what}: {reason(error)}") from error


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """A causal LM's modules and shapes without their values, but with the rotary embedding it would have.

    Raises InputError for a config that transformers makes no causal LM of.
    """
    try:
        with quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        set_rotary_module(model, type(rotary_module_of(model))(config=config))
    except Exception as error:  # each config has its own checks
        raise InputError(
            f"transformers makes no causal LM of this {config.model_type} config: {reason(error)}"
        ) from error
    return model


def read_config(model: str) -> PreTrainedConfig:
    """The config of a checkpoint by folder or hub id.

    Raises InputError for a folder that is not there, for a config that transformers does not take, and for one without
    layers, vocabulary or positions.
    """
    weight_files.require_place(model)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # a config can be wrong in as many ways as transformers has classes of errors
        raise InputError(f"cannot read the config of {model!r}: {reason(error)}") from error
    _require_sensible(config, f"the config of {model!r}")
    return config


def _require_sensible(config: PreTrainedConfig, whose: str) -> None:
    """Raises InputError for counts and shares that no model has, which transformers itself takes."""
    for entry, most in _COUNTS.items():
        count = getattr(config, entry, None)
        if count is not None and not (type(count) is int and 1 <= count <= most):
            raise InputError(f"{entry} in {whose} must be a whole number in 1..{most}, but it is {count!r}")
    heads, groups = (getattr(config, entry, None) for entry in ("num_attention_heads", "num_key_value_heads"))
    if heads is not None and groups is not None and heads % groups:
        raise InputError(f"num_key_value_heads in {whose} must divide the {heads} heads, but it is {groups}")
    for entry, share in config.to_dict().items():
        if "drop" in entry and isinstance(share, int | float) and not 0 <= share < 1:
            raise InputError(f"{entry} in {whose} must be at least 0 and below 1, but it is {share!r}")


def require_plain(config: PreTrainedConfig, model: str) -> None:
    """Raises InputError for the config of a quantised checkpoint."""
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"checkpoint {model!r} is quantised; give one in float32, bfloat16 or float16")


def load(
    model: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """Load a causal LM in eval mode from a folder or by hub id, in the dtype it was saved in unless one is given.

    Raises InputError for a folder that does not exist, is not a checkpoint, or has a shard that is missing or corrupt,
    for weights that are missing, unused, of the wrong shape or no floating-point numbers, and for a dtype that the
    device cannot compute in.
    """
    name = os.fspath(model)
    device = require_device("cpu" if device is None else device, dtype or torch.float32)
    require_plain(read_config(name), name)
    weight_files.require_floats(name, weight_files.files_of_tensors(name))
    try:
        with quiet():  # what transformers would warn of is raised below, as one clear error
            loaded, info = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # a config can be wrong in as many ways as transformers has classes of errors
        if is_out_of_memory(error):
            raise
        raise InputError(f"cannot load {name!r} as a causal LM: {reason(error)}") from error
    if absent := sorted(info["missing_keys"]):
        raise InputError(f"checkpoint {name!r} lacks {len(absent)} weights of its model, the first is {absent[0]}")
    for key, stored, wanted in sorted(info["mismatched_keys"]):
        raise InputError(f"{key} of {name!r} is {list(stored)}, but its config asks for {list(wanted)}")
    if unused := sorted(key for key in info["unexpected_keys"] if not key.endswith(".inv_freq")):
        raise InputError(
            f"checkpoint {name!r} holds {len(unused)} tensors that its config does not use, the first is {unused[0]}"
        )
    return loaded.to(device).eval()


def load_tokenizer(model: str | os.PathLike[str]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint by folder or hub id; None where it has none.

    Raises InputError for one that cannot be loaded, or needs code of its own.
    """
    name = os.fspath(model)
    weight_files.require_place(name)
    try:
        with quiet():
            if all(weight_files.find(name, file) is None for file in _TOKENIZER_FILES):
                return None
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # tokenizers can be wrong in as many ways as configs
        raise InputError(f"cannot load the tokenizer of {name!r}: {reason(error)}") from error


def cast(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Move a model in place, as loading it in `dtype` would: its rotary frequencies keep the precision they have."""
    kept = {name: buffer.clone() for name, buffer in backbone_of(model).named_buffers() if "inv_freq" in name}
    model.to(device=device, dtype=dtype)
    for name, buffer in backbone_of(model).named_buffers():
        if name in kept:
            buffer.data = kept[name].to(device)
    return model


def save(model: PreTrainedModel, folder: str | os.PathLike[str]) -> Path:
    """Write a checkpoint to `folder`, whole or not at all, replacing an older one there that holds nothing else."""
    with whole_folder(folder, kind="checkpoint", overwrite=True) as partial:
        write(model, partial)
    return Path(folder)


def write(
    model: PreTrainedModel,
    folder: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a checkpoint into a folder that is there, with a tokenizer if it has one.

    `weights` are the model's state dict, where it is not in the model itself. Raises OSError where there is no room.
    """
    with quiet(), failing_as_os_error(folder):
        model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


@contextmanager
def failing_as_os_error(folder: Path) -> Iterator[None]:
    """Failures to write, which safetensors and tokenizers tell by classes of their own, as OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"cannot write, {error}", str(folder)) from error


def with_rope(model: PreTrainedModel, rope: float | Mapping[str, Any]) -> PreTrainedModel:
    """A copy of `model` that rotates with another theta, or with other `rope_parameters`; its weights are the same.

    A copy of a hooked model is not hooked. This is how a model passes from one phase to the next. Raises InputError as
    `rotary_embedding` does.
    """
    embedding, parameters = rotary_embedding(model, rope)
    switched = attention.plain_copy(model)
    switched.config.rope_parameters = parameters
    set_rotary_module(switched, embedding)
    return switched


def rotate_as(model: PreTrainedModel, donor: PreTrainedModel) -> None:
    """Make a model rotate as `donor` does, in place: its frequencies, and the entries of its config that say them."""
    set_rotary_module(model, copy.deepcopy(rotary_module_of(donor)).to(model.device))
    for entry in _ROTATION:
        if hasattr(donor.config, entry):
            setattr(model.config, entry, copy.deepcopy(getattr(donor.config, entry)))


def rotary_embedding(model: PreTrainedModel, rope: float | Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The rotary embedding that a model would have with another theta or `rope_parameters`, and these in full.

    How many of a head's dimensions rotate stays as it was. Raises InputError for a theta that is not positive and
    finite, for parameters that transformers does not take, and for a model whose layers do not share one set of them.
    """
    architecture_of(model.config)
    if "rope_type" not in model.config.rope_parameters:
        raise InputError(f"{model.config.model_type} has rope parameters per layer type; set them in its config")
    before = model.config.rope_parameters
    shape = {"partial_rotary_factor": before["partial_rotary_factor"]} if "partial_rotary_factor" in before else {}
    given = rope if isinstance(rope, Mapping) else {**before, "rope_theta": rope}
    parameters = {"rope_type": "default", **shape, **given}
    theta = parameters.get("rope_theta")
    if not isinstance(theta, int | float) or not math.isfinite(theta) or theta <= 0:
        raise InputError(f"rope_theta must be a positive finite number, but it is {theta!r}")
    config = copy.deepcopy(model.config)
    config.rope_parameters = parameters
    old = rotary_module_of(model)
    try:
        with quiet():
            config.validate()
            return type(old)(config=config).to(old.inv_freq.device), parameters
    except Exception as error:  # each config has its own checks
        raise InputError(f"transformers does not take rope_parameters {parameters}: {reason(error)}") from error


def require_device(device: torch.device | str, dtype: torch.dtype) -> torch.device:
    """The torch device, after seeing it compute in `dtype`, and in float64 as angles and controls do.

    Raises InputError for one that is not there or cannot.
    """
    for needed in (torch.float64, dtype):
        try:
            x = torch.ones(2, 2, dtype=needed, device=device)
            (x @ x).softmax(-1).sum().item()
        except Exception as error:  # each backend has its own
            raise InputError(
                f"device {str(device)!r} cannot compute in {needed}: {reason(error)}; try float32 on cpu"
            ) from error
    return x.device


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no progress bars from transformers and the hub client."""
    hub_log = logging.getLogger("huggingface_hub")
    verbosity, hub_level = transformers_logging.get_verbosity(), hub_log.level
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    hub_log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_log.setLevel(hub_level)
        if bars:
            transformers_logging.enable_progress_bar()
