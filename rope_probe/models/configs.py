"""What a transformers config says: heads, the part of it that reads text, and a small config of the same kind."""

import copy
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from rope_probe.errors import InputError


class Heads(NamedTuple):
    """How many heads q has in each layer, how many k and v have, and the dimensions of one."""

    query: int
    key: int
    width: int


def text_config_of(config: PreTrainedConfig) -> Any:
    """The part of a config that is about text: all of it, but for models that read images or sound too."""
    return config.get_text_config(decoder=True)


def layer_configs(config: PreTrainedConfig) -> list[Any]:
    """A config for each layer where entries differ between layers, else the one of all layers."""
    config = text_config_of(config)
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]


def attention_kinds(config: PreTrainedConfig) -> list[str | None]:
    """Per layer, its kind of attention as the config calls it: sliding_attention, full_attention; None if untold."""
    text_config = text_config_of(config)
    return list(getattr(text_config, "layer_types", None) or [None] * text_config.num_hidden_layers)


def chunk_of_layer(config: PreTrainedConfig, layer: int) -> int | None:
    """How many positions a chunk has in a layer whose queries see their own chunk alone; None in any other layer."""
    chunked = attention_kinds(config)[layer] == "chunked_attention"
    return getattr(text_config_of(config), "attention_chunk_size", None) if chunked else None


def heads_of(config: PreTrainedConfig) -> Heads:
    """The heads of a config's attention; k and v have as many as q where the config names no other number.

    Of a head that is split into a part that rotates and one that does not (DeepSeek's), the width is that of both.
    Raises InputError for a config whose layers have different heads.
    """
    found = [_heads_of_one(one) for one in layer_configs(config)]
    for layer, heads in enumerate(found):
        if heads != found[0]:
            raise InputError(
                "its layers have different heads: layer 0 has {} query heads and {} key heads of {} dimensions, "
                "layer {} has {}, {} and {}".format(*found[0], layer, *heads)
            )
    return found[0]


def _heads_of_one(config: Any) -> Heads:
    query = config.num_attention_heads
    if getattr(config, "qk_rope_head_dim", None) and getattr(config, "kv_lora_rank", None):
        return Heads(query, query, config.qk_nope_head_dim + config.qk_rope_head_dim)
    if config.model_type == "jetmoe":  # every key head is there once for each expert that a query goes to
        return Heads(query, query, config.kv_channels)
    key = getattr(config, "num_key_value_heads", None) or query
    width = getattr(config, "head_dim", None) or config.hidden_size // query
    return Heads(query, key, width)


# Shrinking ------------------------------------------------------------------------------------------------------------

WIDTH = 32
"""Most dimensions of a head, where the number is free."""
WINDOW = 6
"""What sliding windows and chunks are shrunk to, so that they show in a few tokens."""
_SIZES = {
    "vocab_size": 64, "intermediate_size": 32, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "ffn_hidden_size": 32, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "max_position_embeddings": 4096, "sliding_window": WINDOW, "attention_chunk_size": WINDOW,
}  # fmt: skip
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of the same type, depth and switches with four heads and small everything else."""
    made = copy.deepcopy(config)
    text = text_config_of(made)
    width = getattr(text, "hidden_size", None)
    for part in {id(part): part for part in (made, text)}.values():
        _shrink(part)
    for name in made.sub_configs:  # of images and sound, which are not read
        other = getattr(made, name, None)
        if isinstance(other, PreTrainedConfig) and other is not text and text is not made:
            _shrink(other)
            if isinstance(getattr(other, "kv_n_heads", None), int):  # DBRX has configs for the modules of a layer
                other.kv_n_heads = text.num_key_value_heads
            elif getattr(other, "hidden_size", None) == width and not hasattr(other, "num_hidden_layers"):
                other.hidden_size = text.hidden_size
            if isinstance(getattr(other, "num_hidden_layers", None), int):
                other.num_hidden_layers = min(2, other.num_hidden_layers)
    return made


def _shrink(config: Any) -> None:
    of_layers = config.to_dict().get("per_layer_config") if getattr(config, "is_heterogeneous", False) else None
    if of_layers:
        config.per_layer_config = None  # else entries that differ between layers cannot be read
    entries: dict[str, Any] = {
        name: size for name, size in _SIZES.items() if isinstance(getattr(config, name, None), int)
    }
    query = getattr(config, "num_attention_heads", None)
    if isinstance(query, int) and isinstance(getattr(config, "hidden_size", None), int):
        key = getattr(config, "num_key_value_heads", None) or query
        width = getattr(config, "head_dim", None) or config.hidden_size // query
        rope = str(getattr(config, "rope_parameters", None))
        split = getattr(config, "qk_rope_head_dim", None) is not None  # heads have sizes of their own, small ones
        if not split and "section" not in rope and "_factor'" not in rope.replace("partial_rotary_factor", ""):
            width = min(width, WIDTH)  # else lists in it have an entry for each pair of a head
            if isinstance(getattr(config, "head_dim", None), int) and not _is_derived(config, "head_dim"):
                entries["head_dim"] = width
        entries["num_attention_heads"] = 4
        entries["hidden_size"] = 4 * (WIDTH if split else width)
        if isinstance(getattr(config, "mamba_n_heads", None), int):
            inner = config.mamba_expand * entries["hidden_size"]
            entries |= {"mamba_n_heads": 4, "mamba_d_head": inner // 4}
            if isinstance(getattr(config, "mamba_d_ssm", None), int):
                entries["mamba_d_ssm"] = inner
        if getattr(config, "num_key_value_heads", None) is not None:
            entries["num_key_value_heads"] = 4 if key == query else 2
        if isinstance(getattr(config, "num_kv_heads", None), int):  # Falcon's name for them
            entries["num_kv_heads"] = 4 if config.num_kv_heads == query else 2
    if isinstance(sizes := getattr(config, "intermediate_size", None), list):  # one for each layer
        config.intermediate_size = [min(size, _SIZES["intermediate_size"]) for size in sizes]
    for name, value in entries.items():
        if getattr(config, name) > value or name not in _SIZES:
            setattr(config, name, value)
    for name, token in _TOKENS.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, token)
    if of_layers:
        config.per_layer_config = {
            layer: {name: _at_most(name, value) for name, value in entries_of_layer.items()}
            for layer, entries_of_layer in of_layers.items()
        }


def _is_derived(config: Any, name: str) -> bool:
    """Whether a config computes an entry from others, so that it cannot be set."""
    entry = getattr(type(config), name, None)
    return isinstance(entry, property) and entry.fset is None


def _at_most(name: str, value: Any) -> Any:
    return min(value, _SIZES[name]) if name in _SIZES and isinstance(value, int) else value
