"""What rope_probe must know of a transformers model type: where its parts are, how its rotary pairs lie in memory.

Nothing else asks a model for its modules. Which tensor is what is told by `parameters`.

A model type is measured (`measured`), on a small random model of its config, and refused with the misfit where it is
not of the form that is known. The table has the types that also name their projections, which only `spans` needs; tests
that never read an entry check it, and measuring must find what it says.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rope_probe.errors import InputError
from rope_probe.models import measured
from rope_probe.models.configs import heads_of, text_config_of
from rope_probe.rope import Layout, rotate, rows_of_pair

LayerRule = Callable[[PreTrainedConfig, int], bool]


@dataclass(frozen=True)
class Architecture:
    """Sub-module names of one decoder layer, and the layout of its rotary pairs.

    `attn_out` and `mlp_out` name the modules whose output is added to the residual stream (the norm after attention,
    where there is one); `resid_mid` the module whose *input* is the residual stream between attention and MLP, None
    where both read the same stream. `fused` names the module that projects to q, k and v at once, where there is one,
    and how their rows lie in it: all of q, then k, then v ("stacked"), or q, k, v of head after head ("by_head");
    `out_proj` the module that projects what attention read. `attn_norm` names the layer's norm before that projection,
    `qk_norms` those of q and k after it, where a model has them, and `gain_offset` is what its norms add to their
    weights. `final_norm` names the module between the last layer and the head. `rotates` says which layers apply RoPE.

    Of a measured model type, `by_measurement` has what only measurement told; its projections are not known by name, so
    that `spans` refuses it.
    """

    layout: Layout = "half"
    attn: str = "self_attn"
    attn_out: str = "self_attn"
    resid_mid: str | None = "post_attention_layernorm"
    mlp_out: str = "mlp"
    final_norm: str = "norm"
    fused: tuple[str, Literal["stacked", "by_head"]] | None = None
    out_proj: str = "o_proj"
    attn_norm: str | None = "input_layernorm"
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    gain_offset: float = 0.0
    rotates: LayerRule = field(default=lambda config, layer: True)
    by_measurement: measured.Measured | None = None

    @property
    def query_key_value(self) -> tuple[str, ...]:
        """Names, in the attention module, of what projects to q, k and v: three modules, the fused one, or unknown."""
        if self.by_measurement is not None:
            return ()
        return ("q_proj", "k_proj", "v_proj") if self.fused is None else self.fused[:1]

    @property
    def drops_arguments(self) -> bool:
        """Whether a layer keeps keyword arguments from its attention, so that the seam must take them at the layer."""
        return self.by_measurement is not None and self.by_measurement.drops_arguments

    def parts(self, layer: int) -> measured.Parts:
        """The modules of a layer that its residual stream is made of."""
        if self.by_measurement is not None:
            return self.by_measurement.parts[layer]
        return measured.Parts(self.attn_out, self.resid_mid, self.mlp_out)

    def attends(self, layer: int) -> bool:
        """Whether a layer has attention; other layers are recurrences and convolutions."""
        return self.by_measurement is None or self.by_measurement.attends[layer]


@dataclass(frozen=True)
class Rotary:
    """The rotation one layer applies: frequencies in radians per token (float64), scaling of cos and sin, layout.

    The dimensions of a head that rotate lie together, from `start` on; `backwards`, they turn by minus the angles.
    """

    inv_freq: Float[Tensor, " P"]
    scaling: float
    layout: Layout
    start: int = 0
    backwards: bool = False

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head rotate, 2P."""
        return 2 * len(self.inv_freq)

    def pairs(self, head_dim: int) -> Int[Tensor, "P 2"]:
        """The two dimensions of a head that make each pair, pair 0 first."""
        size = {"head_dim": head_dim - self.start, "rotary_dim": self.rotary_dim}
        pairs = self.start + torch.tensor(
            [rows_of_pair(self.layout, 0, pair, **size) for pair in range(len(self.inv_freq))]
        )
        return pairs.flip(1) if self.backwards else pairs

    def undo(self, x: Float[Tensor, "T H D"], positions: Int[Tensor, " T"]) -> Float[Tensor, "T H D"]:
        """Rotated q or k as they were before their rotation."""
        back = -torch.outer(positions.to(x.device, torch.float64), self.inv_freq.to(x.device)).unsqueeze(1)
        return self.turn(x, back, 1 / self.scaling)

    def turn(
        self, x: Float[Tensor, "*batch D"], angles: Float[Tensor, "*broadcast P"], scale: float | Tensor = 1.0
    ) -> Float[Tensor, "*shape D"]:
        """Rotated q or k with its pairs turned onward by `angles` (radians) and scaled."""
        angles = -angles if self.backwards else angles
        turned = rotate(x[..., self.start :], angles, self.layout, scale)
        return torch.cat([x[..., : self.start].expand(*turned.shape[:-1], -1), turned], -1) if self.start else turned


_SANDWICH = Architecture(
    attn_out="post_attention_layernorm",
    resid_mid="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
    gain_offset=1.0,
)


def _gpt_neox(config: PreTrainedConfig) -> Architecture:
    resid_mid = None if config.use_parallel_residual else "post_attention_layernorm"
    fused: tuple[str, Literal["by_head"]] = ("query_key_value", "by_head")
    return Architecture(
        attn="attention",
        attn_out="attention",
        resid_mid=resid_mid,
        final_norm="final_layer_norm",
        fused=fused,
        out_proj="dense",
    )


ARCHITECTURES: dict[str, Architecture | Callable[[PreTrainedConfig], Architecture]] = {
    **dict.fromkeys(
        ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "olmo", "starcoder2"],
        Architecture(),
    ),
    "gemma": Architecture(gain_offset=1.0),
    "phi3": Architecture(fused=("qkv_proj", "stacked")),
    "smollm3": Architecture(rotates=lambda config, layer: bool(config.no_rope_layers[layer])),
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "olmo2": Architecture(
        attn_out="post_attention_layernorm", resid_mid="mlp", mlp_out="post_feedforward_layernorm", attn_norm=None
    ),
    "gpt_neox": _gpt_neox,
    "phi": Architecture(
        resid_mid=None, final_norm="final_layernorm", out_proj="dense", qk_norms=("q_layernorm", "k_layernorm")
    ),
    "glm": Architecture(layout="adjacent"),
    "ernie4_5": Architecture(layout="adjacent"),
    "cohere": Architecture(layout="adjacent", resid_mid=None),
    "cohere2": Architecture(
        layout="adjacent",
        resid_mid=None,
        rotates=lambda config, layer: config.layer_types[layer] == "sliding_attention",
    ),
}


def register(model_type: str, entry: Architecture | Callable[[PreTrainedConfig], Architecture]) -> None:
    """Make a model type known: by its architecture, or by what makes one of its config.

    A type that measuring refuses, or whose projections `spans` is to know. Nothing measures an entry, so check it as
    tests/test_hooked.py does: rotated queries of a repeated token must be rotations of each other, and logits
    transformers' own. Raises InputError for a type that is known already.
    """
    if model_type in ARCHITECTURES:
        raise InputError(f"model type {model_type!r} is known already")
    ARCHITECTURES[model_type] = entry


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The table entry for a config's model type, or what measuring a small model of that type finds.

    Raises InputError for a type that is not in the table and misfits: it says what misfits, and by how much.
    """
    entry = ARCHITECTURES.get(config.model_type)
    if entry is None:
        return _as_architecture(measured.measure(config))
    return entry if isinstance(entry, Architecture) else entry(config)


def _as_architecture(found: measured.Measured) -> Architecture:
    return Architecture(
        layout=found.layout,
        attn=found.attn,
        attn_out=found.parts[0].attn_out,
        resid_mid=found.parts[0].resid_mid,
        mlp_out=found.parts[0].mlp_out,
        final_norm=found.final_norm,
        rotates=lambda config, layer: found.rotary[layer] is not None,
        by_measurement=found,
    )


def shape_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Entries of a config that say which weights a model has, and how large they are; by their names in configs."""
    heads, model_type = heads_of(config), config.model_type
    config = text_config_of(config)
    return {
        "model_type": model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": getattr(config, "intermediate_size", None),  # not every model type has it
        "num_attention_heads": heads.query,
        "num_key_value_heads": heads.key,
        "vocab_size": config.vocab_size,
        "head_dim": heads.width,
    }


def backbone_of(model: PreTrainedModel) -> Any:
    """The model without its head: from token ids to final hidden states."""
    return measured.backbone_of(model)


def _text_model_of(model: PreTrainedModel) -> Any:
    """The part of the backbone that reads text: all of it, but for models that read images or sound too."""
    found = architecture_of(model.config).by_measurement
    return backbone_of(model).get_submodule("" if found is None else found.text)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, first layer first."""
    return _text_model_of(model).layers


def attention_modules(model: PreTrainedModel) -> list[Any]:
    """The attention module of every layer that has attention, first layer first."""
    architecture = architecture_of(model.config)
    layers = enumerate(layers_of(model))
    return [layer.get_submodule(architecture.attn) for index, layer in layers if architecture.attends(index)]


def query_key_value_modules(model: PreTrainedModel, layer: int) -> list[Any]:
    """The modules that project to q, k and v of a layer: three of them, the fused one, or none that are known."""
    architecture = architecture_of(model.config)
    if not architecture.query_key_value:
        return []
    attention = layers_of(model)[layer].get_submodule(architecture.attn)
    return [attention.get_submodule(name) for name in architecture.query_key_value]


def embedding_of(model: PreTrainedModel) -> Any:
    """The module that embeds token ids."""
    return model.get_input_embeddings()


def final_norm_of(model: PreTrainedModel) -> nn.Module:
    """The norm between the last layer and the head."""
    return _text_model_of(model).get_submodule(architecture_of(model.config).final_norm)


def output_projection_of(model: PreTrainedModel) -> Any:
    """The module that projects final hidden states to logits."""
    return model.get_output_embeddings()


def rotary_module_of(model: PreTrainedModel) -> Any:
    """The module that makes cos and sin of positions, for all layers.

    Raises InputError for a model that has several, or has it elsewhere than beside its layers.
    """
    try:
        return _text_model_of(model).rotary_emb
    except AttributeError as error:
        kind = model.config.model_type
        raise InputError(f"{kind} has no one rotary_emb beside its layers, whose frequencies could be set") from error


def set_rotary_module(model: PreTrainedModel, module: nn.Module) -> None:
    """Let another module make cos and sin, in place."""
    _text_model_of(model).rotary_emb = module


def rotary_places(model: PreTrainedModel) -> list[tuple[Any, str] | None]:
    """Per layer, the module that holds its frequencies and the prefix of its buffers; None for a layer without RoPE."""
    architecture = architecture_of(model.config)
    config, text_model = text_config_of(model.config), _text_model_of(model)
    layer_types = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers

    def place_of(layer: int) -> tuple[Any, str] | None:
        if not architecture.rotates(model.config, layer):
            return None
        if architecture.by_measurement is not None:
            place = architecture.by_measurement.rotary[layer]
            assert place is not None
            return text_model.get_submodule(place.module), place.prefix
        embedding = text_model.rotary_emb
        return embedding, f"{layer_types[layer]}_" if hasattr(embedding, f"{layer_types[layer]}_inv_freq") else ""

    return [place_of(layer) for layer in range(config.num_hidden_layers)]


def rotary_layers(model: PreTrainedModel) -> list[Rotary | None]:
    """Per layer, the rotation the model's own buffers say it applies; None for a layer without RoPE."""
    architecture = architecture_of(model.config)
    config = text_config_of(model.config)

    def rotary(layer: int, place: tuple[Any, str] | None) -> Rotary | None:
        if place is None:
            return None
        embedding, prefix = place
        fixed = exact_length(model.config) is None
        name = "inv_freq" if fixed else "original_inv_freq"  # the other one remembers long inputs
        frequencies = getattr(embedding, prefix + name).detach().to("cpu", torch.float64)
        if not (frequencies.isfinite() & (frequencies > 0)).all():
            raise InputError(
                f"layer {layer} has rotary frequencies that are not positive and finite; check the model's rope_theta"
            )
        _require_factors(config)
        rope = getattr(config, "rope_parameters", None) or {}
        own_scaling = rope.get("short_mscale") if rope.get("rope_type") != "default" else None  # PhiMoE's
        scaling = float(getattr(embedding, f"{prefix}attention_scaling", 1.0) if own_scaling is None else own_scaling)
        found = architecture.by_measurement
        if found is None:
            return Rotary(frequencies, scaling, architecture.layout)
        return Rotary(frequencies, scaling, architecture.layout, found.start, found.backwards)

    return [rotary(layer, place) for layer, place in enumerate(rotary_places(model))]


def _require_factors(config: PreTrainedConfig) -> None:
    """That longrope's factors are one a pair; transformers finds that out when it rotates, if at all."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return
    pairs = int(heads_of(config).width * rope.get("partial_rotary_factor", 1.0)) // 2
    for name in ("short_factor", "long_factor"):
        if len(rope[name]) != pairs:
            raise InputError(
                f"{name} of rope_parameters must have a number for each of {pairs} pairs, not {len(rope[name])}"
            )


def exact_length(config: PreTrainedConfig) -> int | None:
    """Number of positions up to which a model's frequencies do not depend on its input; None where they never do."""
    config = text_config_of(config)
    parameters = getattr(config, "rope_parameters", None) or {}
    per_type = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    limits = []
    for rope in per_type:
        if rope.get("rope_type") == "dynamic":
            limits.append(config.max_position_embeddings)
        elif rope.get("rope_type") == "longrope":
            limits.append(rope["original_max_position_embeddings"])
    return min(limits, default=None)
