"""Hugging Face checkpoints: build, load, save, and change how a model rotates. Safetensors or GGUF, never pickle.

- Loaded are folders, hub ids, GGUF files (dequantised), and pretrained models by name; adapters of PEFT are merged.
- A model can be spread over devices, memory and disk (`device_map`), or quantised (`quantization_config`).
"""

import copy
import errno
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.quantization_config import QuantizationMethod

from rope_probe.errors import InputError, is_out_of_memory, reason
from rope_probe.models import attention, gguf_files, offloaded, weight_files
from rope_probe.models.architectures import architecture_of, backbone_of, rotary_module_of, set_rotary_module
from rope_probe.models.configs import layer_configs
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


def read_config(model: str | os.PathLike[str], revision: str | None = None) -> PreTrainedConfig:
    """The config of a checkpoint by folder, GGUF file, name or hub id; of a multimodal one, that of its text part.

    Raises InputError for what is not there, for a config that transformers does not take or has no causal LM of, and
    for one without layers, vocabulary or positions.
    """
    name = os.fspath(model)
    return _read_config(name, weight_files.place_of(name), revision)


def _read_config(name: str, place: str, revision: str | None) -> PreTrainedConfig:
    if gguf_files.is_gguf(place):
        gguf_files.require_whole(name, place)
    source, of_gguf = weight_files.as_transformers_takes(place)
    try:
        with quiet(), gguf_files.reading(place):
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False, **of_gguf)
    except Exception as error:  # a config can be wrong in as many ways as transformers has classes of errors
        raise InputError(f"cannot read the config of {name!r}: {reason(error)}") from error
    text = config.get_text_config()
    if not isinstance(text, PreTrainedConfig):
        raise InputError(f"the text part of the config of {name!r} must be a table of entries, but it is {text!r:.80}")
    if text is not config and text.model_type in CONFIG_MAPPING:
        quantised = getattr(config, "quantization_config", None)
        config = text
        if quantised is not None:
            config.quantization_config = quantised
    _require_causal(config, name)
    _require_sensible(config, f"the config of {name!r}")
    _require_known_quantisation(config, name)
    return config


def _require_causal(config: PreTrainedConfig, name: str) -> None:
    """Raises InputError for a type of which transformers has no causal LM, such as the text part of Qwen2-VL."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    family = config.model_type.partition("_")[0]
    of_family = f", such as a {family} one" if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else ""
    raise InputError(
        f"checkpoint {name!r} has a text model of type {config.model_type!r}, of which transformers has no causal LM; "
        f"give a checkpoint that reads and writes text alone{of_family}"
    )


def _require_known_quantisation(config: PreTrainedConfig, name: str) -> None:
    """Raises InputError for a way to quantise that transformers does not know, since it would read on without it."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    if method not in {known.value for known in QuantizationMethod}:
        raise InputError(f"checkpoint {name!r} is quantised by {method!r:.60}, which transformers does not know")


def _require_sensible(config: PreTrainedConfig, whose: str) -> None:
    """Raises InputError for counts and shares that no model has, which transformers itself takes."""
    for one in layer_configs(config):
        for entry, most in _COUNTS.items():
            told: Any = getattr(one, entry, None)
            by_layer = entry == "intermediate_size" and isinstance(told, list) and told  # Gemma 3n's
            for count in told if by_layer else [told]:
                if count is not None and not (type(count) is int and 1 <= count <= most):
                    raise InputError(f"{entry} in {whose} must be a whole number in 1..{most}, but it is {count!r}")
        heads, groups = (getattr(one, entry, None) for entry in ("num_attention_heads", "num_key_value_heads"))
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
    model: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    quantization_config: Any = None,
    revision: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    accept_terms: bool = False,
) -> PreTrainedModel:
    """Load a causal LM in eval mode, in the dtype it was saved in unless one is given; a GGUF file in float32.

    `model` is a folder, a GGUF file (which is dequantised), a hub id, or a name of `pretrained.MODELS`; of a multimodal
    checkpoint the text part is loaded. `accept_terms` accepts the terms of use of a model by name that has them.

    `device_map` is transformers': "auto", "balanced", or from modules to devices, "cpu" and "disk"; "disk" leaves all
    weights in their files and computes on `device`. `quantization_config` and `revision` (of a hub id) are
    transformers' too. `adapter` is a folder of PEFT, whose change is merged into the weights.

    Raises InputError for a checkpoint that does not exist, is none, or has a file that is missing, truncated or
    corrupt; for weights that are missing, unused, of the wrong shape or no floating-point numbers; for a quantised
    checkpoint whose kernels are not here; for an adapter as `with_adapter` does; for a dtype that the device cannot
    compute in; and where the disk has no room for weights that have to be rewritten for it.
    """
    name = os.fspath(model)
    place = weight_files.place_of(name, accept_terms=accept_terms)
    if device_map is not None and device_map != offloaded.DISK and device is not None:
        raise InputError(f"device {str(device)!r} and device_map both say where the model is to be; give one of them")
    target = require_device("cpu" if device is None else device, dtype or torch.float32)
    config = _read_config(name, place, revision)
    if adapter is not None:
        _require_adapter(adapter)
        _require_plain_for(adapter, config, quantization_config, device_map)
    if gguf_files.is_gguf(place):
        loaded = _load_gguf(name, place, config, dtype, device_map, quantization_config)
    else:
        loaded = _load_safetensors(name, place, config, dtype, target, device_map, quantization_config, revision)
    if not offloaded.is_dispatched(loaded) and not is_quantised(loaded) and device_map is None:
        loaded = loaded.to(target)
    return (loaded if adapter is None else with_adapter(loaded, adapter)).eval()


def _load_gguf(
    name: str,
    place: str,
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
    device_map: str | Mapping[str, Any] | None,
    quantization_config: Any,
) -> PreTrainedModel:
    """A GGUF file's model, dequantised, so that it is a plain model and can be saved."""
    if quantization_config is not None:
        raise InputError(f"{name!r} is a GGUF file, which is dequantised; leave out quantization_config")
    options: dict[str, Any] = {"dtype": dtype or torch.float32, "device_map": device_map}
    if hasattr(transformers, "GgufConfig"):  # before it was there, all GGUF files were dequantised
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded, info = _from_pretrained(name, place, config, options)
    _require_all_used(name, info)
    if (quantiser := getattr(loaded, "hf_quantizer", None)) is not None:
        quantiser.remove_quantization_config(loaded)
    return loaded


def _load_safetensors(
    name: str,
    place: str,
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
    device: torch.device,
    device_map: str | Mapping[str, Any] | None,
    quantization_config: Any,
    revision: str | None,
) -> PreTrainedModel:
    files = weight_files.files_of_tensors(place, revision)
    if quantization_config is None and getattr(config, "quantization_config", None) is None:
        weight_files.require_floats(name, files)
    options: dict[str, Any] = {"dtype": dtype or "auto", "revision": revision, "use_safetensors": True}
    fetched_as = dtype if device_map is not None and quantization_config is None else None
    if fetched_as is not None:  # else transformers would write weights of another dtype to the disk once more
        options["dtype"] = "auto"
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if device_map is not None:
        if device_map == offloaded.DISK:
            device_map = offloaded.map_to_disk(_rotary_name(config), device)
        folder = TemporaryDirectory(prefix="rope_probe_offload_")  # for weights that are not in the files as they are
        options |= {"device_map": device_map, "offload_folder": folder.name}
    if wrapped := [key for key in files if _INSIDE_WRAPPER.match(key)]:
        options["key_mapping"] = _TEXT_PART
        files = dict.fromkeys(wrapped, "")
    loaded, info = _from_pretrained(name, place, config, options)
    if wrapped:  # what the checkpoint holds besides, for images and sound, is not loaded
        info["unexpected_keys"] = [key for key in info["unexpected_keys"] if _INSIDE_WRAPPER.match(key)]
    _require_all_used(name, info)
    if device_map is not None:
        loaded.rope_probe_offload_folder = folder  # is removed with the model
    if fetched_as is not None:
        offloaded.compute_in(loaded, fetched_as)
        loaded.config.dtype = fetched_as
    return loaded


_INSIDE_WRAPPER = re.compile(r"^(model\.)?(language_model|text_model)\.")
_TEXT_PART = {
    r"^(model\.)?(language_model|text_model)\.lm_head\.": "lm_head.",
    r"^(model\.)?(language_model|text_model)\.(model\.)?": "model.",
}
"""How multimodal checkpoints name the tensors of their text part, and how that part alone names them."""


def _rotary_name(config: PreTrainedConfig) -> str:
    """The name of the module that makes cos and sin."""
    model = skeleton(config)
    rotary = rotary_module_of(model)
    return next(name for name, module in model.named_modules() if module is rotary)


def _from_pretrained(
    name: str, place: str, config: PreTrainedConfig, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model, and what became of its checkpoint's weights. Raises InputError where transformers cannot load it."""
    source, of_gguf = weight_files.as_transformers_takes(place)
    try:
        with (
            quiet(),
            gguf_files.reading(place),
        ):  # what transformers would warn of is raised afterwards
            loaded, info = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **of_gguf,
                **options,
            )
    except Exception as error:  # a checkpoint can be wrong in as many ways as transformers has classes of errors
        if is_out_of_memory(error):
            raise
        if "offload_folder" in options and _says_disk_is_full(error):
            raise InputError(
                f"cannot offload {name!r}: there is no room in {options['offload_folder']!r}, where weights that have "
                f"to be rewritten go ({reason(error)}); set TMPDIR to a place with room"
            ) from error
        quantised = options.get("quantization_config") or getattr(config, "quantization_config", None)
        remedy = "" if quantised is None else "; it is to be read quantised, which needs its own package and kernels"
        raise InputError(f"cannot load {name!r} as a causal LM: {reason(error)}{remedy}") from error
    return loaded, info


def _says_disk_is_full(error: Exception) -> bool:
    full = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
    by_safetensors = re.search(r"\(os error (\d+)\)", str(error))  # whose errors have no errno
    number = int(by_safetensors.group(1)) if by_safetensors else getattr(error, "errno", None)
    return number in full


def _require_all_used(name: str, info: Mapping[str, Any]) -> None:
    """Raises InputError for weights that are missing, of the wrong shape, or unused."""
    if absent := sorted(info["missing_keys"]):
        raise InputError(f"checkpoint {name!r} lacks {len(absent)} weights of its model, the first is {absent[0]}")
    for key, stored, wanted in sorted(info["mismatched_keys"]):
        raise InputError(f"{key} of {name!r} is {list(stored)}, but its config asks for {list(wanted)}")
    if unused := sorted(key for key in info["unexpected_keys"] if not key.endswith(".inv_freq")):
        raise InputError(
            f"checkpoint {name!r} holds {len(unused)} tensors that its config does not use, the first is {unused[0]}"
        )


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether a model's weights are kept in a form of their own, which only its own modules can read."""
    return bool(getattr(model, "is_quantized", False))


def require_unquantised(model: PreTrainedModel, what: str) -> None:
    """Raises InputError for a quantised model where `what` reads or changes weights by their plain values."""
    if is_quantised(model):
        raise InputError(
            f"{what} needs plain weights, but this {model.config.model_type} model is quantised; give the checkpoint "
            "that it was quantised from"
        )


def with_adapter(model: PreTrainedModel, adapter: str | os.PathLike[str]) -> PreTrainedModel:
    """A plain model with the change of a PEFT adapter merged into its weights; `model` is changed in place.

    Raises InputError for a folder that holds no adapter in safetensors, for an adapter that does not merge into
    weights, and for one of another model: every tensor of it must find its place. A quantised model is refused too.
    """
    require_unquantised(model, "merging an adapter")
    folder = _require_adapter(adapter)
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    label = repr(os.fspath(adapter))
    base = f"this {model.config.model_type} model"
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = PeftConfig.from_pretrained(str(folder))
            adapted = PeftModel.from_pretrained(model, str(folder), config=config)
            wanted = get_peft_model_state_dict(adapted).keys()
    except Exception as error:  # an adapter can be wrong in as many ways as peft has kinds
        if is_out_of_memory(error):
            raise
        raise InputError(f"adapter {label} does not fit {base}: {_first_mismatch(error) or reason(error)}") from error
    with weight_files.opened(os.fspath(adapter), str(folder / weight_files.ADAPTER_WEIGHTS)) as file:
        stored = set(file.keys())
    if apart := sorted(stored ^ set(wanted)):
        where = f"has no place for its {apart[0]}" if apart[0] in stored else f"asks for {apart[0]}, which it lacks"
        raise InputError(f"adapter {label} is of another model: {base} {where}")
    if not hasattr(adapted, "merge_and_unload"):
        raise InputError(f"adapter {label} is a {config.peft_type}, which cannot be merged into weights; give a LoRA")
    try:
        with quiet():
            return adapted.merge_and_unload(safe_merge=True).eval()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"adapter {label} cannot be merged into {base}: {reason(error)}") from error


_MISMATCH = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)", re.DOTALL)


def _first_mismatch(error: Exception) -> str | None:
    """Of peft's list of all weights whose shapes differ, the first one with both shapes."""
    found = _MISMATCH.search(str(error))
    return found and f"{found[1]} is {found[2]} in the adapter, but the model asks for {found[3]}"


def _require_adapter(adapter: str | os.PathLike[str]) -> Path:
    """The folder of an adapter. Raises InputError unless it holds one, in safetensors."""
    folder = Path(adapter)
    for file in (weight_files.ADAPTER_CONFIG, weight_files.ADAPTER_WEIGHTS):
        if not (folder / file).is_file():
            raise InputError(f"no adapter at {os.fspath(adapter)!r}, it has no {file}; give the folder of a PEFT one")
    return folder


def _require_plain_for(
    adapter: str | os.PathLike[str], config: PreTrainedConfig, quantization_config: Any, device_map: Any
) -> None:
    """Raises InputError where an adapter was to be merged into weights that are quantised or away."""
    if quantization_config is not None or getattr(config, "quantization_config", None) is not None:
        raise InputError(f"adapter {os.fspath(adapter)!r} is merged into plain weights, but the model is quantised")
    if device_map is not None:
        raise InputError(f"adapter {os.fspath(adapter)!r} is merged into weights in memory; leave out device_map")


def load_tokenizer(model: str | os.PathLike[str], revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint by folder, GGUF file, name or hub id; None where it has none.

    Raises InputError for one that cannot be loaded, or needs code of its own.
    """
    name = os.fspath(model)
    place = weight_files.place_of(name)
    if gguf_files.is_gguf(place):
        gguf_files.require_whole(name, place)
    source, of_gguf = weight_files.as_transformers_takes(place)
    try:
        with quiet(), gguf_files.reading(place):
            files = [] if of_gguf else [weight_files.find(place, file, revision) for file in _TOKENIZER_FILES]
            if not of_gguf and not any(files):
                return None
            return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False, **of_gguf)
    except Exception as error:  # tokenizers can be wrong in as many ways as configs
        raise InputError(f"cannot load the tokenizer of {name!r}: {reason(error)}") from error


def cast(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Move a model in place, as loading it in `dtype` would.

    Its rotary frequencies keep the precision they have. Constants that transformers rounds to the dtype of a model
    when it makes it, such as the scale of Gemma 3's embeddings, are rounded anew from their exact values.
    """
    kept = {name: buffer.clone() for name, buffer in backbone_of(model).named_buffers() if "inv_freq" in name}
    model.to(device=device, dtype=dtype)
    for name, buffer in backbone_of(model).named_buffers():
        if name in kept:
            buffer.data = kept[name].to(device)
            continue
        owner, _, own_name = name.rpartition(".")
        exact = getattr(backbone_of(model).get_submodule(owner), f"scalar_{own_name}", None)
        if isinstance(exact, float):
            buffer.data = torch.full_like(buffer, exact)
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
    """No warnings and no progress bars from transformers, accelerate and the hub client."""
    others = [logging.getLogger(name) for name in ("huggingface_hub", "accelerate")]
    verbosity, levels = transformers_logging.get_verbosity(), [log.level for log in others]
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    for log in others:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        for log, level in zip(others, levels, strict=True):
            log.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
