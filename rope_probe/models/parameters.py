"""Which tensor of a model is what: the part it belongs to, and the heads and rotary pairs in attention's projections.

Names of tensors, in a model and in its files, are read here and nowhere else. Only shapes are looked at, so a model may
be on the meta device.
"""

import re
from collections.abc import Container
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rope_probe.errors import InputError
from rope_probe.models.architectures import (
    Rotary,
    architecture_of,
    embedding_of,
    heads_of,
    layers_of,
    query_key_value_modules,
    rotary_layers,
)

Part = Literal["W_Q", "W_K", "W_V", "W_O", "mlp", "norms", "W_E", "W_U"]
ATTENTION: tuple[Part, ...] = ("W_Q", "W_K", "W_V", "W_O")
_OUTPUT_PROJECTIONS = ("lm_head", "embed_out")  # the second in files of GPT-NeoX
_NO_PAIRS = torch.zeros(0, 2, dtype=torch.int64)


class Rows(NamedTuple):
    """Some rows of a weight [out, M], head by head, and the name of the module whose weight (and bias) it is."""

    weight: nn.Parameter
    rows: Int[Tensor, "H D"]
    module: str


def require_projections(config: PreTrainedConfig) -> None:
    """Raises InputError for a model type whose projections to q, k and v are not known by name: measured ones."""
    if not architecture_of(config).query_key_value:
        raise InputError(
            f"model type {config.model_type!r} is known by measurement alone, which does not say which rows of its "
            "weights make which head; it can be traced, but its weights cannot be compared or transplanted by head and "
            "pair; rope_probe.models.architectures.register names its projections"
        )


def query_key_value_rows(model: PreTrainedModel, layer: int) -> dict[str, Rows]:
    """Where W_Q, W_K and W_V of a layer are: for "q", "k", "v", a weight and the rows of it, head by head.

    Raises InputError for a model type whose projections are not known by name.
    """
    architecture, heads = architecture_of(model.config), heads_of(model.config)
    require_projections(model.config)
    prefix = f"{_name_of_layer(model, layer)}.{architecture.attn}"
    names = [f"{prefix}.{name}" for name in architecture.query_key_value]
    weights = [module.weight for module in query_key_value_modules(model, layer)]
    counts = {"q": heads.query, "k": heads.key, "v": heads.key}
    if architecture.fused is None:
        return {
            side: Rows(weight, torch.arange(len(weight)).view(counts[side], -1), name)
            for side, weight, name in zip("qkv", weights, names, strict=True)
        }
    rows = torch.arange(len(weights[0]))
    if architecture.fused[1] == "by_head":
        of_sides = rows.view(heads.query, 3, -1).unbind(1)  # each [H, D]
    else:
        of_sides = rows.view(sum(counts.values()), -1).split(list(counts.values()))  # [H, D], [K, D], [K, D]
    return {side: Rows(weights[0], of_side, names[0]) for side, of_side in zip("qkv", of_sides, strict=True)}


@dataclass(frozen=True)
class Projection:
    """One attention projection of a layer: where its heads lie in a weight, and the pairs in a head.

    `index` are rows of the weight and elements of the bias, columns for W_O; `pairs` dimensions of a head, none where
    the layer does not rotate, or in W_V and W_O. `weight` and `bias` are names.
    """

    part: Part
    layer: int
    weight: str
    bias: str | None
    index: Int[Tensor, "H D"]
    pairs: Int[Tensor, "P 2"]
    rotary: Rotary | None

    @property
    def site(self) -> str:
        """How the frames call it."""
        return f"blocks.{self.layer}.attn.{self.part}"


def projections_of(model: PreTrainedModel) -> list[Projection]:
    """W_Q, W_K, W_V and W_O of every layer. Raises InputError as `query_key_value_rows` does."""
    architecture, heads = architecture_of(model.config), heads_of(model.config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    projections = []
    for layer, rotary in enumerate(rotary_layers(model)):
        for side, (_, rows, module) in query_key_value_rows(model, layer).items():
            part: Part = f"W_{side.upper()}"  # type: ignore[assignment]
            pairs = _NO_PAIRS if rotary is None or side == "v" else rotary.pairs(rows.shape[1])
            projections.append(Projection(part, layer, *_weight_and_bias(module, shapes), rows, pairs, rotary))
        module = f"{_name_of_layer(model, layer)}.{architecture.attn}.{architecture.out_proj}"
        weight, bias = _weight_and_bias(module, shapes)
        columns = torch.arange(shapes[weight][1]).view(heads.query, -1)
        projections.append(Projection("W_O", layer, weight, bias, columns, _NO_PAIRS, rotary))
    return projections


def _weight_and_bias(module: str, present: Container[str]) -> tuple[str, str | None]:
    bias = f"{module}.bias"
    return f"{module}.weight", bias if bias in present else None


class NormNames(NamedTuple):
    """Names of the norms before and after a projection; a layer may have no norm before it, a model none after it."""

    before: str | None
    after: str


def norms_around(model: PreTrainedModel, projection: Projection) -> NormNames:
    """What the norms before and after a projection to q or k are called."""
    architecture = architecture_of(model.config)
    layer = _name_of_layer(model, projection.layer)
    before = None if architecture.attn_norm is None else f"{layer}.{architecture.attn_norm}"
    of_query, of_key = architecture.qk_norms
    after = of_query if projection.part == "W_Q" else of_key
    return NormNames(before, f"{layer}.{architecture.attn}.{after}")


def part_of(model: PreTrainedModel, name: str) -> tuple[Part | None, int | None]:
    """The part and layer that a whole tensor belongs to; no part for those that `projections_of` tells apart.

    `name` is that of a parameter, or of a tensor in a file. Raises InputError for one that is in no part.
    """
    architecture = architecture_of(model.config)
    require_projections(model.config)
    base = model.base_model_prefix
    module = name.rpartition(".")[0]
    if match := re.match(rf"{base}\.layers\.(\d+)\.(.+)", name):
        layer, inside = int(match[1]), match[2]
        if layer >= len(layers_of(model)):
            raise InputError(f"tensor {name!r} is of layer {layer}, but the config has {len(layers_of(model))}")
        if "norm" in inside:
            return "norms", layer
        if not inside.startswith(f"{architecture.attn}."):
            return "mlp", layer
        projection = inside.removeprefix(f"{architecture.attn}.").rpartition(".")[0]
        if projection in (*architecture.query_key_value, architecture.out_proj):
            return None, layer
    elif name.startswith(f"{base}.{architecture.final_norm}."):
        return "norms", None
    elif module in _OUTPUT_PROJECTIONS:
        return "W_U", None
    elif embedding_of(model) is dict(model.named_modules()).get(module):
        return "W_E", None
    raise InputError(f"tensor {name!r} is in no part of a {model.config.model_type} that rope_probe knows")


def is_weight(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor in a checkpoint's files is a weight of the model's own.

    Frequencies are none, nor is what transformers leaves unread, nor an output projection that is the embedding.
    """
    unread = model._keys_to_ignore_on_load_unexpected or ()
    if name.endswith((".inv_freq", *(f".{pattern}" for pattern in unread))):
        return False
    return not (model.config.tie_word_embeddings and name.rpartition(".")[0] in _OUTPUT_PROJECTIONS)


def name_in_files(name: str, present: Container[str]) -> str:
    """What a parameter is called in a checkpoint's files, in which the tensors `present` are."""
    own, old = (f"{module}.weight" for module in _OUTPUT_PROJECTIONS)
    return old if name == own and old in present else name


def _name_of_layer(model: PreTrainedModel, layer: int) -> str:
    return f"{model.base_model_prefix}.layers.{layer}"
