"""What each layer of a model would rotate by if its theta were another one, by the model's own rope type.

The frequencies come from the model's own rotary module, made once more from its config with nothing but theta replaced;
so every rope type, and every set of parameters per layer type, is the one that the model has.
"""

import copy
import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rope_probe.errors import InputError
from rope_probe.models.architectures import Rotary, rotary_layers, rotary_places
from rope_probe.models.checkpoints import quiet
from rope_probe.models.configs import text_config_of
from rope_probe.precision import keep_float32

_BUFFER = "inv_freq"
_UNCHANGING_BUFFER = "original_inv_freq"  # the other one follows the input in dynamic and longrope
_SAME = 1e-5


@dataclass(frozen=True, kw_only=True)
class Rotation(Rotary):
    """A layer's `Rotary` that knows the model it is of, and so its theta, and what another theta would make of it."""

    embedding: nn.Module
    prefix: str
    config: Any

    @property
    def theta(self) -> float:
        """The theta that the model's config has for layers of this kind. Raises InputError where it has none."""
        return float(_parameters(self.config, self.prefix)["rope_theta"])

    def with_theta(self, theta: float) -> Rotary:
        """The same rope type with the same parameters but this theta; for the layer's own theta exactly what it is now.

        Raises InputError for a theta that is not positive and finite, and for a model whose frequencies are not those
        that its config makes.
        """
        if not math.isfinite(theta) or theta <= 0:
            raise InputError(f"theta must be a positive finite number, but it is {theta}")
        if theta == self.theta:
            return self._with(self.inv_freq, self.scaling)
        own_frequencies, own_scaling = self._made_with(self.theta)
        if not _close(own_frequencies, self.inv_freq) or not math.isclose(own_scaling, self.scaling, rel_tol=_SAME):
            raise InputError(
                f"this {self.config.model_type}'s rotary frequencies are not those that its config makes with theta "
                f"{self.theta:g}, so what another theta makes is unknown"
            )
        frequencies, scaling = self._made_with(theta)
        return self._with(frequencies, scaling)

    def _with(self, frequencies: Tensor, scaling: float) -> Rotary:
        return Rotary(frequencies, scaling, self.layout, self.start, self.backwards)

    def _made_with(self, theta: float) -> tuple[Tensor, float]:
        """Frequencies, [P] in float64, and scaling of the rotary module that this theta would make."""
        config = copy.deepcopy(self.config)
        _parameters(config, self.prefix)["rope_theta"] = float(theta)
        try:
            with quiet(), keep_float32():  # as when the model was built, also while it runs in float64
                made = type(self.embedding)(config=config)
            scaling = float(getattr(made, f"{self.prefix}attention_scaling"))
        except (AttributeError, TypeError) as error:
            raise InputError(
                f"the rotary module of this {self.config.model_type} does not say what another theta makes"
            ) from error
        as_stored = _frequencies(self.embedding, self.prefix).dtype
        frequencies = _frequencies(made, self.prefix).detach().to("cpu", as_stored)
        return frequencies.double(), scaling


def rotations_of(model: PreTrainedModel) -> list[Rotation | None]:
    """Per layer, the rotation it applies, as `rotary_layers` has it; None for a layer without RoPE."""

    def rotation(rotary: Rotary, place: tuple[Any, str]) -> Rotation:
        embedding, prefix = place
        embedding = getattr(embedding, "original_component", embedding)  # what a TransformerBridge has wrapped
        config = getattr(embedding, "config", text_config_of(model.config))
        same = {field.name: getattr(rotary, field.name) for field in fields(rotary)}
        return Rotation(**same, embedding=embedding, prefix=prefix, config=config)

    layers = zip(rotary_layers(model), rotary_places(model), strict=True)
    return [None if rotary is None or place is None else rotation(rotary, place) for rotary, place in layers]


def _parameters(config: Any, prefix: str) -> dict[str, Any]:
    """The rope parameters of one kind of layer."""
    parameters = config.rope_parameters
    if "rope_theta" not in parameters:
        parameters = parameters.get(prefix.removesuffix("_")) or {}
    if "rope_theta" not in parameters:
        raise InputError(f"the config of this {config.model_type} has no rope_theta for each of its layers")
    return parameters


def _frequencies(embedding: nn.Module, prefix: str) -> Tensor:
    unchanging = getattr(embedding, prefix + _UNCHANGING_BUFFER, None)
    return getattr(embedding, prefix + _BUFFER) if unchanging is None else unchanging


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=_SAME, atol=0)
