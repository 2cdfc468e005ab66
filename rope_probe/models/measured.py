"""A model type recognised from a model of it: measured, on random weights in float64, and refused where it misfits.

- The config is shrunk: as many layers, of the same kinds and with the same switches, but narrow, with few experts and
  short windows. A random model of it runs with every parameter drawn anew, so that no gain of one hides a scale.
- **Layout.** Each layer reads one state at every position. Its rotated queries and keys must then be rotations of each
  other, under one layout, at the frequencies that a buffer of the model holds; or alike, in a layer without RoPE.
- **Residual stream.** Of all submodules of a layer, two must add up with its input to its output, each times a number.
  Noise put on what they return must come out of the layer as it went in.
- **Attention.** Each layer must call transformers' attention interface once, with a mask that is causal (inside a
  window, where it says so, and inside a chunk, where its config does), and hand keyword arguments on to it, which is
  how documents are masked.

What holds to rounding is told to `architectures`. What does not raises InputError with the misfit.
"""

import importlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import logging as transformers_logging

from rope_probe.errors import InputError, is_out_of_memory, reason
from rope_probe.models.configs import chunk_of_layer, heads_of, layer_configs, shrunk, text_config_of
from rope_probe.precision import keep_float32, promote_float32
from rope_probe.rope import Layout, rotate

TOLERANCE = 1e-9
"""Largest misfit, relative to what is compared, that passes for rounding in float64."""
LENGTH = 20
"""Positions that are read; more than the windows of a shrunk config reach."""
PARAMETERS = 3 * 10**8
"""A shrunk model with more parameters than this is not built."""
_NAME = "rope_probe_measured"


class Place(NamedTuple):
    """Where a layer's frequencies are: the rotary module, by its name in the text model, and its buffers' prefix."""

    module: str
    prefix: str


class Parts(NamedTuple):
    """Modules of a layer, by their names in it, that its residual stream is made of.

    What `attn_out` returns is added to it times `scales[0]`, what `mlp_out` returns times `scales[1]`; `resid_mid`
    reads the stream between the two, None where both read the same.
    """

    attn_out: str
    resid_mid: str | None
    mlp_out: str
    scales: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class Measured:
    """What `measure` found of a model type; `text` is a module's name in the backbone, `attn` one in a layer.

    Layer by layer: `parts`, the modules that add to its residual stream; `attends`, whether it has attention at all;
    `rotary`, where its frequencies are, None without RoPE.
    """

    text: str
    attn: str
    final_norm: str
    layout: Layout
    start: int
    backwards: bool
    parts: tuple[Parts, ...]
    attends: tuple[bool, ...]
    rotary: tuple[Place | None, ...]
    drops_arguments: bool


# The small model -----------------------------------------------------------------------------------------------------


def _random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A float64 model whose parameters, one-dimensional ones and buffers too, are not what they begin as."""
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            with torch.device("meta"):
                size = sum(weight.numel() for weight in _built(config).parameters())
            if size > PARAMETERS:
                raise InputError(f"cannot be built small: {size:.1e} parameters are left of it")
            model = _built(config, dtype=torch.float32, attn_implementation="eager")
        except InputError:
            raise
        except Exception as error:  # each config has its own checks
            raise InputError(f"cannot be built small: {reason(error)}") from error
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0, 0.3)
                else:
                    weight.add_(0.2 * torch.randn_like(weight))
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point() and not name.endswith("inv_freq") and "embed_scale" not in name:
                    buffer.add_(0.2 * torch.rand_like(buffer))
        return to_double(model).eval()


def _built(config: PreTrainedConfig, **kind: Any) -> PreTrainedModel:
    """A causal LM of a config; also of the text part of a larger one, which AutoModelForCausalLM knows by the whole."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM.from_config(config, **kind)
    package = importlib.import_module(type(config).__module__.rpartition(".")[0])
    for name in dir(package):
        made = getattr(package, name)
        if name.endswith("ForCausalLM") and getattr(made, "config_class", None) is type(config):
            return made._from_config(config, **kind)
    raise InputError("transformers has no causal LM of it")


def backbone_of(model: PreTrainedModel) -> Any:
    """The model without its head: from token ids to final hidden states."""
    return model.model if model.base_model is model else model.base_model  # Llama 4's prefix is another's


def to_double(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64, in place; mixtures of experts too."""
    model = model.to(torch.float64)
    prepare_for_double(model)
    return model


def prepare_for_double(model: PreTrainedModel) -> None:
    """Have a float64 model run in float64 throughout, with the rotary frequencies that it was built with."""
    model.set_experts_implementation("eager")  # the grouped kernels of mixtures of experts stop at float32
    for module in model.modules():
        compute = module.__dict__.get("rope_init_fn")
        if compute is not None and not hasattr(compute, "__wrapped__"):  # PhiMoE's forward computes them anew each time
            module.__dict__["rope_init_fn"] = keep_float32()(compute)


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """What one call of the attention interface got."""

    query: Float[Tensor, "B H T D"]
    key: Float[Tensor, "B K T D"]
    mask: Tensor | None
    told: dict[str, Any]


@dataclass
class _Reader:
    """Stands for the attention while a model is measured; one a thread would want, so measuring takes turns."""

    calls: dict[nn.Module, list[_Call]] = field(default_factory=dict)
    noise: float = 0.0

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **told: Any
    ) -> tuple[Tensor, None]:
        self.calls.setdefault(module, []).append(_Call(query, key, attention_mask, told))
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scaling = told.get("scaling")
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if told.get("softcap") is not None:
            scores = torch.tanh(scores / told["softcap"]) * told["softcap"]
        if attention_mask is not None:
            scores = scores + attention_mask
        if told.get("s_aux") is not None:
            sinks = told["s_aux"].to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            pattern = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            pattern = scores.softmax(-1)
        z = (pattern @ value).transpose(1, 2).contiguous()
        return z + self.noise * torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view(z.shape), None


_reader: list[_Reader] = []


def _read(module: nn.Module, *args: Any, **told: Any) -> tuple[Tensor, None]:
    return _reader[-1](module, *args, **told)


AttentionInterface.register(_NAME, _read)
AttentionMaskInterface.register(_NAME, eager_mask)


@dataclass
class _Pass:
    """One forward pass: what went into and came out of every module, by name, in the order in which they ended.

    `begun` are the names in the order in which the modules were called, so that an outer one comes before its parts.
    """

    begun: list[str] = field(default_factory=list)
    inputs: dict[str, tuple[tuple, dict]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


@contextmanager
def _recording(root: nn.Module) -> Iterator[_Pass]:
    record = _Pass()

    def begin(name: str, module: nn.Module, args: tuple) -> None:
        record.begun.append(name)

    def keep(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        record.outputs.pop(name, None)  # in the order of the last calls
        record.outputs[name] = _first(output)
        record.inputs[name] = (args, kwargs)
        record.counts[name] = record.counts.get(name, 0) + 1

    with ExitStack() as stack:
        for name, module in root.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(begin, name)).remove)
            stack.callback(module.register_forward_hook(partial(keep, name), with_kwargs=True).remove)
        yield record


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _stream_of(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs.get("hidden_states")


def misfit(got: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest element wanted."""
    return ((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300)).item()


# Measuring ------------------------------------------------------------------------------------------------------------

_known: dict[str, Measured | str] = {}


def measure(config: PreTrainedConfig) -> Measured:
    """The architecture of a config's model type, measured; the same config is measured once.

    Raises InputError with the reason or the misfit, for a model type that is not exactly of this form.
    """
    key = json.dumps(config.to_dict(), sort_keys=True, default=str)
    if key not in _known:
        try:
            _known[key] = _Measurement(config).result()
        except InputError as error:
            _known[key] = str(error)
        except Exception as error:  # each model type has its own
            if is_out_of_memory(error):
                raise
            _known[key] = f"it is of another form than what can be measured: {reason(error)}"
    known = _known[key]
    if isinstance(known, str):
        raise InputError(f"model type {config.model_type!r} is refused: {known}")
    return known


class _Measurement:
    def __init__(self, config: PreTrainedConfig) -> None:
        if getattr(config, "is_encoder_decoder", False):
            raise InputError("it is an encoder and a decoder")
        if not hasattr(text_config_of(config), "num_hidden_layers"):
            raise InputError("its config has no num_hidden_layers: it is not one stack of layers")
        if len(layer_configs(config)) > 1:
            heads_of(config)  # refuses heads that differ, before they are shrunk to the same
        self.config = shrunk(config)
        self.model = _random_model(self.config)
        if not [name for name, _ in self.model.named_buffers() if name.endswith("inv_freq")]:
            raise InputError("no rotary frequencies (inv_freq) are among its buffers; it has no RoPE that can be read")
        self.model.set_attn_implementation(_NAME)
        self.backbone = backbone_of(self.model)
        generator = torch.Generator().manual_seed(0)
        vocabulary = text_config_of(self.config).vocab_size
        self.tokens = torch.randint(3, vocabulary, (1, LENGTH), generator=generator)
        self.depth = text_config_of(self.config).num_hidden_layers

    def result(self) -> Measured:
        with torch.no_grad(), promote_float32():
            self._run_clean()
            self._find_layers()
            self._check_attention()
            self._check_layers()
            parts = self._residual()
            final_norm = self._final_norm()
            (layout, start, backwards), rotary = self._rotation()
            self._check_head()
        return Measured(
            text=self.text_name,
            attn=self.attn,
            final_norm=final_norm,
            layout=layout,
            start=start,
            backwards=backwards,
            parts=parts,
            attends=tuple(module is not None for module in self.attentions),
            rotary=rotary,
            drops_arguments=self.drops_arguments,
        )

    def _forward(self, positions: Int[Tensor, " T"]) -> tuple[Any, dict[nn.Module, list[_Call]]]:
        reader = _Reader()
        _reader.append(reader)
        try:
            output = self.backbone(
                input_ids=self.tokens,
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                return_dict=True,
                document_bounds=[0, LENGTH],
            )
        except Exception as error:  # each model has its own
            raise InputError(f"it does not run as a causal LM on token ids and positions: {reason(error)}") from error
        finally:
            _reader.pop()
        return output, reader.calls

    def _run_clean(self) -> None:
        with _recording(self.backbone) as self.clean:
            output, self.calls = self._forward(torch.arange(LENGTH))
        self.hidden: Any = getattr(output, "last_hidden_state", None)
        if not isinstance(self.hidden, Tensor):
            raise InputError("its backbone gives no final hidden states")
        if not self.calls:
            raise InputError("none of its layers calls transformers' attention interface")

    def _find_layers(self) -> None:
        lists = [
            (name, modules, [[m for m in layer.modules() if m in self.calls] for layer in modules])
            for name, modules in self.backbone.named_modules()
            if isinstance(modules, nn.ModuleList) and len(modules) == self.depth
        ]
        lists = [one for one in lists if any(one[2])]
        if not lists:
            raise InputError(f"its backbone has no list of {self.depth} layers")
        name, modules, inside = lists[0]
        for layer, attentions in enumerate(inside):
            times = sum(len(self.calls[module]) for module in attentions)
            if times > 1:
                raise InputError(f"layer {layer} calls attention {times} times")
        names = {
            next(name for name, module in layer.named_modules() if module is attentions[0])
            for layer, attentions in zip(modules, inside, strict=True)
            if attentions
        }
        if len(names) > 1:
            raise InputError(f"attention is called {' and '.join(sorted(names))} in different layers")
        self.layers: Any = modules
        self.attentions = [attentions[0] if attentions else None for attentions in inside]
        self.attn = names.pop()
        if name.rpartition(".")[2] != "layers":
            raise InputError(f"its layers are called {name}, not layers")
        self.layers_name, self.text_name = name, name.rpartition(".")[0]
        self.text = self.backbone.get_submodule(self.text_name)

    def _check_attention(self) -> None:
        """Masks are causal, windows are told, and keyword arguments arrive."""
        self.drops_arguments = False
        config = text_config_of(self.config)
        query_heads, key_heads, width = heads_of(config)
        positions = torch.arange(LENGTH)
        distance = positions.unsqueeze(1) - positions
        for layer, module in enumerate(self.attentions):
            if module is None:
                continue
            call = self.calls[module][0]
            if not getattr(module, "is_causal", True):
                raise InputError(f"layer {layer} attends in both directions")
            told = self.clean.inputs[f"{self.layers_name}.{layer}"][1]
            if told.get("document_bounds") != [0, LENGTH]:
                raise InputError(
                    f"layer {layer} is not handed keyword arguments, so that documents cannot be masked from each other"
                )
            if call.told.get("document_bounds") != [0, LENGTH]:
                self.drops_arguments = True
            unknown = unknown_arguments(call.told)
            if unknown:
                raise InputError(f"its attention has {unknown[0]}, which the seam does not know")
            window = call.told.get("sliding_window")
            wanted = (distance >= 0) & (distance < (LENGTH if window is None else window))
            if (chunk := chunk_of_layer(config, layer)) is not None:
                wanted &= (positions // chunk).unsqueeze(1) == positions // chunk
            if call.mask is None:
                raise InputError(f"layer {layer} has no attention mask")
            if call.mask.shape != (1, 1, LENGTH, LENGTH):
                raise InputError(f"layer {layer} has a mask of shape {tuple(call.mask.shape)}, more than a causal one")
            got = (call.mask > -1)[0, 0]
            if not torch.equal(got, wanted):
                raise InputError(
                    f"the mask of layer {layer} differs from the causal one"
                    f"{'' if window is None else ' of its sliding window'} at {int((got != wanted).sum())} of "
                    f"{LENGTH**2} places, and its attention is not told why (chunks, or another window)"
                )
            seen = (call.query.shape[1], call.key.shape[1], call.query.shape[3])
            if seen != (query_heads, key_heads, width) or call.key.shape[3] != width:
                raise InputError(
                    f"layer {layer} has {seen[0]} query heads and {seen[1]} key heads of {seen[2]} dimensions, where "
                    f"its config says {query_heads}, {key_heads} and {width}"
                )

    def _check_layers(self) -> None:
        """Every layer runs once, after the other, on [B, T, M]; and by itself it does again what it did."""
        stream = None
        for layer in range(self.depth):
            name = f"{self.layers_name}.{layer}"
            if self.clean.counts.get(name) != 1:
                raise InputError(f"layer {layer} runs {self.clean.counts.get(name, 0)} times")
            args, kwargs = self.clean.inputs[name]
            entered, left = _stream_of(args, kwargs), self.clean.outputs[name]
            if not isinstance(entered, Tensor) or entered.ndim != 3 or getattr(left, "shape", None) != entered.shape:
                raise InputError(f"layer {layer} does not take one state per position and give one back")
            if stream is not None and misfit(entered, stream) > 0:
                raise InputError(
                    f"layer {layer} does not read what layer {layer - 1} wrote, but what differs from it by "
                    f"{misfit(entered, stream):.1e}"
                )
            stream = left
            self._check_arguments(layer, args[1:], kwargs)
            try:
                apart = misfit(self._layer(layer), left)
            except Exception as error:
                raise InputError(f"layer {layer} cannot run by itself: {reason(error)}") from error
            if not apart <= TOLERANCE:
                raise InputError(f"layer {layer} run by itself gives something else, with a misfit of {apart:.1e}")

    def _check_arguments(self, layer: int, args: tuple, kwargs: dict[str, Any]) -> None:
        """That a layer takes nothing by position but its state and rotations, which can be cut to some positions."""
        all_attend = all(module is not None for module in self.attentions)
        for value in args:
            positions = isinstance(value, Tensor) and not value.is_floating_point()
            mask = isinstance(value, Tensor) and value.shape[-2:] == (LENGTH, LENGTH)
            if _has_tensor(value) and (all_attend or not (positions or mask)):  # only layers of attention are ever cut
                raise InputError(f"layer {layer} takes something else by position than its state and its rotation")
        for name, value in kwargs.items():
            if name in ("hidden_states", "attention_mask", "position_ids", "cache_position") or not _has_tensor(value):
                continue
            tensors = (value,) if isinstance(value, Tensor) else value
            cut = name == "position_embeddings" and all(x.shape[:2] == (1, LENGTH) for x in tensors)
            if not cut:
                raise InputError(f"layer {layer} takes {name}, which rope_probe cannot cut to some positions")

    def _layer(self, layer: int, noise: float = 0.0) -> Tensor:
        """A layer's output, run again by itself on what it got; with noise on what its attention read."""
        args, kwargs = self.clean.inputs[f"{self.layers_name}.{layer}"]
        reader = _Reader(noise=noise)
        _reader.append(reader)
        try:
            return _first(self.layers[layer](*args, **kwargs))
        finally:
            _reader.pop()

    # Residual stream --------------------------------------------------------------------------------------------------

    def _residual(self) -> tuple[Parts, ...]:
        """The parts of every layer: the same ones where all layers have them, else each layer's own."""
        firsts: dict[tuple, int] = {}  # the first layer of each kind, where noise shows which modules are which
        kinds = []
        for layer, module in enumerate(self.layers):
            kinds.append(tuple((name, type(inner)) for name, inner in module.named_modules()))
            firsts.setdefault(kinds[-1], layer)
        forms = {kind: self._forms_of_layer(layer) for kind, layer in firsts.items()}
        shared = [one[:3] for one in forms[kinds[0]] if all(one[:3] in [x[:3] for x in xs] for xs in forms.values())]
        chosen = {kind: shared[0] if shared else of_kind[0][:3] for kind, of_kind in forms.items()}
        return tuple(self._parts_of_layer(layer, *chosen[kind]) for layer, kind in enumerate(kinds))

    def _parts_of_layer(self, layer: int, attn_out: str, resid_mid: str | None, mlp_out: str) -> Parts:
        """The parts of a layer by their names, with this layer's factors; it must add up with them."""
        name = f"{self.layers_name}.{layer}"
        before, after = _stream_of(*self.clean.inputs[name]), self.clean.outputs[name]
        outputs = {inner: self._inside(layer, inner).view(before.shape) for inner in (attn_out, mlp_out)}
        pairs, closest = _pairs(outputs, after - before)
        if not pairs:
            raise InputError(
                f"{attn_out} and {mlp_out} of layer {layer} do not add up as in others, by {closest[0]:.1e}"
            )
        factors = dict(pairs[0])
        scales = (factors[attn_out], factors[mlp_out])
        if resid_mid is not None:
            read = _stream_of(*self.clean.inputs[f"{name}.{resid_mid}"])
            if not misfit(read, before + scales[0] * outputs[attn_out]) <= TOLERANCE:
                raise InputError(f"{resid_mid} of layer {layer} does not read its stream as in other layers")
        return Parts(attn_out, resid_mid, mlp_out, scales)

    def _forms_of_layer(self, layer: int) -> list[Parts]:
        """Every choice of modules that add up to the residual stream, the best first."""
        name = f"{self.layers_name}.{layer}"
        before, after = _stream_of(*self.clean.inputs[name]), self.clean.outputs[name]
        module = self.layers[layer]
        inside = {
            inner.removeprefix(f"{name}."): output.view(before.shape)
            for inner, output in self.clean.outputs.items()
            if inner.startswith(f"{name}.") and isinstance(output, Tensor) and _holds(output, before)
        }
        pairs, closest = _pairs(inside, after - before)
        if not pairs:
            raise InputError(
                f"the residual stream of layer {layer} is not its input plus what two of its modules return: the "
                f"closest two, {closest[1]}, miss by {closest[0]:.1e}"
            )
        with _recording(module) as noisy:
            self._layer(layer, noise=0.5)
        moved = {
            inner
            for inner, output in inside.items()
            if misfit(noisy.outputs[inner].view(output.shape), output) > TOLERANCE
        }
        attends = self.attentions[layer] is not None
        order = list(inside)
        found: list[Parts] = []
        for pair in pairs:
            (first, of_first), (second, of_second) = sorted(pair, key=lambda one: order.index(one[0]))
            if attends and first not in moved:
                first, of_first, second, of_second = second, of_second, first, of_first
            if attends and first not in moved:
                continue
            mids: list[str | None] = [None]
            if second in moved or not attends:
                mids = [*self._readers(name, before + of_first * inside[first])]
            parts = [Parts(first, mid, second, (of_first, of_second)) for mid in mids]
            found += [one for one in parts if self._flows(layer, one)][:1]
        if not found:
            raise InputError(
                f"the modules of layer {layer} that add up to the residual stream, {pairs[0][0][0]} and "
                f"{pairs[0][1][0]}, are not attention and MLP one after the other or side by side"
            )
        return found

    def _readers(self, name: str, between: Tensor) -> Iterator[str]:
        """Modules that read the stream between attention and MLP, in the order of their calls."""
        for inner in self.clean.begun:
            read = _stream_of(*self.clean.inputs[inner])
            alike = isinstance(read, Tensor) and read.shape == between.shape
            if inner.startswith(f"{name}.") and alike and misfit(read, between) <= TOLERANCE:
                yield inner.removeprefix(f"{name}.")

    def _flows(self, layer: int, parts: Parts) -> bool:
        """Whether noise on what the modules return comes out of the layer, or of its middle, as it went in."""
        attn_out, mid, mlp_out, scales = parts
        module = self.layers[layer]
        generator = torch.Generator().manual_seed(1)
        after = self.clean.outputs[f"{self.layers_name}.{layer}"]
        noise = torch.randn(after.shape, dtype=after.dtype, generator=generator)

        def run(name: str) -> tuple[Tensor, _Pass]:
            handle = module.get_submodule(name).register_forward_hook(partial(_add, noise))
            try:
                with _recording(module) as record:
                    return self._layer(layer), record
            finally:
                handle.remove()

        left, record = run(mlp_out)
        mlp_flows = misfit(left, after + scales[1] * noise) <= TOLERANCE
        attention_as_before = misfit(record.outputs[attn_out], self._inside(layer, attn_out)) <= TOLERANCE
        left, record = run(attn_out)
        if mid is None:
            attention_flows = misfit(left, after + scales[0] * noise) <= TOLERANCE
        else:
            args, kwargs = self.clean.inputs[f"{self.layers_name}.{layer}.{mid}"]
            wanted = _stream_of(args, kwargs) + scales[0] * noise
            attention_flows = misfit(_stream_of(*record.inputs[mid]), wanted) <= TOLERANCE
        return mlp_flows and attention_as_before and attention_flows

    def _inside(self, layer: int, name: str) -> Tensor:
        return self.clean.outputs[f"{self.layers_name}.{layer}.{name}"]

    def _final_norm(self) -> str:
        last = self.clean.outputs[f"{self.layers_name}.{self.depth - 1}"]
        for name, _ in self.text.named_children():
            inner = f"{self.text_name}.{name}".removeprefix(".")
            if inner in self.clean.inputs:
                read, output = _stream_of(*self.clean.inputs[inner]), self.clean.outputs[inner]
                same = isinstance(read, Tensor) and read.shape == last.shape and misfit(read, last) == 0
                if same and isinstance(output, Tensor) and misfit(output, self.hidden) == 0:
                    return name
        raise InputError("no module makes its final hidden states of what its last layer wrote")

    def _check_head(self) -> None:
        """That logits can be made of final hidden states alone."""
        reader = _Reader()
        _reader.append(reader)
        try:
            wanted = self.model(input_ids=self.tokens, use_cache=False, return_dict=True).logits
            state = FinalStates(last_hidden_state=self.hidden)
            with returning(self.backbone, state):
                got = self.model(inputs_embeds=self.hidden, use_cache=False, return_dict=True).logits
        except Exception as error:  # each model has its own
            raise InputError(f"logits cannot be made of its final hidden states alone: {reason(error)}") from error
        finally:
            _reader.pop()
        if not misfit(got, wanted) <= TOLERANCE:
            raise InputError(
                f"logits are not made of final hidden states alone: the misfit is {misfit(got, wanted):.1e}"
            )

    # Rotation ---------------------------------------------------------------------------------------------------------

    def _rotation(self) -> tuple["_Form", tuple[Place | None, ...]]:
        far = max(100, getattr(text_config_of(self.config), "max_position_embeddings", 4096) - LENGTH)
        passes = [self._of_one_state(first) for first in (0, 5, far)]
        places: list[Place | None] = []
        forms: set[_Form] = set()
        candidates = list(self._frequencies())
        for layer, module in enumerate(self.attentions):
            if module is None:
                places.append(None)
                continue
            states = [(calls[module][0].query[0], calls[module][0].key[0]) for calls in passes]  # [H, T, D]
            moved = max(misfit(x, states[0][side][:, :1]) for pair in states for side, x in enumerate(pair))
            if moved <= TOLERANCE:
                places.append(None)
                continue
            fits = [
                (self._rotation_misfit(states, frequencies, form, (0, 5, far)), place, form)
                for place, frequencies in self._in_order(candidates, layer)
                for form in _forms(states[0][0].shape[-1], 2 * len(frequencies))
            ]
            if not fits:
                raise InputError("its rotary frequencies do not fit into a head")
            best = min(fits, key=lambda fit: fit[0])
            good = [fit for fit in fits if fit[0] <= TOLERANCE * 10]
            if not good:
                raise InputError(
                    f"rotated queries and keys of one state in layer {layer} are not rotations of each other at the "
                    f"frequencies of its buffers: the closest layout, {best[2].layout}, misses by {best[0]:.1e}"
                )
            _, place, form = good[0]
            if not (dict(candidates)[place] > 0).all():
                raise InputError(f"some pairs of layer {layer} do not turn: their frequency is 0")
            places.append(place)
            forms.add(form)
        if not forms:
            raise InputError("none of its layers rotates queries and keys")
        if len(forms) > 1:
            raise InputError("rotary pairs lie in memory in more than one way")
        return forms.pop(), tuple(places)

    def _of_one_state(self, first: int) -> dict[nn.Module, list[_Call]]:
        """What attention gets where every position of every layer reads one state, from position `first` on."""
        entered = _stream_of(*self.clean.inputs[f"{self.layers_name}.0"])
        generator = torch.Generator().manual_seed(2)
        state = torch.randn(1, 1, entered.shape[-1], dtype=entered.dtype, generator=generator).expand(entered.shape)

        def replace(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})

        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_pre_hook(replace, with_kwargs=True).remove)
            return self._forward(torch.arange(first, first + LENGTH))[1]

    def _frequencies(self) -> Iterator[tuple[Place, Float[Tensor, " P"]]]:
        for name, module in self.text.named_modules():
            for buffer, values in module.named_buffers(recurse=False):
                prefix = buffer.removesuffix("inv_freq")
                if buffer.endswith("inv_freq") and not prefix.endswith("original_"):
                    yield Place(name, prefix), values.to(torch.float64)

    def _in_order(self, candidates: list, layer: int) -> list:
        """The frequencies that a layer may rotate by, those of its own type first."""
        layer_types = getattr(text_config_of(self.config), "layer_types", None) or [""] * self.depth
        own = f"{layer_types[layer]}_"
        return sorted(candidates, key=lambda one: one[0].prefix != own)

    @staticmethod
    def _rotation_misfit(
        states: list[tuple[Tensor, Tensor]], frequencies: Tensor, form: "_Form", firsts: tuple[int, ...]
    ) -> float:
        worst = 0.0
        for first, pair in zip(firsts, states, strict=True):
            angles = torch.outer(torch.arange(first, first + LENGTH, dtype=torch.float64), frequencies)
            angles = -angles if form.backwards else angles
            for x, base in zip(pair, states[0], strict=True):
                begin = base[:, :1].expand_as(x)
                turned = rotate(begin[..., form.start :], angles, form.layout)
                worst = max(worst, misfit(x, torch.cat([begin[..., : form.start], turned], -1)))
        return worst


class _Form(NamedTuple):
    """How pairs lie in a head, from which dimension on, and whether they turn by minus their angles."""

    layout: Layout
    start: int
    backwards: bool


def _forms(head_dim: int, rotary_dim: int) -> list[_Form]:
    """Ways in which pairs can lie in a head: at its beginning, or at its end."""
    layouts: tuple[Layout, Layout] = ("half", "adjacent")
    if rotary_dim > head_dim:
        return []
    starts = sorted({0, head_dim - rotary_dim})
    return [_Form(layout, start, back) for back in (False, True) for start in starts for layout in layouts]


_Term = tuple[str, float]


def _pairs(outputs: dict[str, Tensor], added: Tensor) -> tuple[list[tuple[_Term, _Term]], tuple[float, str]]:
    """The two of `outputs` that make up what a layer added, with their factors; those with factors of one first.

    And the misfit of the closest two, with their names. Modules called last come first, since a module that passes
    another's output on has the last word on it. What is closer by rounding alone is not closer.
    """
    names = list(reversed(outputs))
    flat = {name: outputs[name].flatten() for name in names}
    found: list[tuple[float, tuple[_Term, _Term]]] = []
    closest = (float("inf"), "none")
    target = added.flatten()
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            columns = torch.stack([flat[one], flat[other]], 1)
            gram = columns.T @ columns
            if torch.linalg.det(gram) <= 1e-12 * gram.diagonal().prod():
                continue
            factors = torch.linalg.lstsq(columns, target.unsqueeze(1)).solution.squeeze(1)
            off = misfit(columns @ factors, target)
            if off < closest[0] * (1 - 1e-6):
                closest = off, f"{one} and {other}"
            if off <= TOLERANCE and factors.abs().min() > 1e-6:
                a, b = (round(factor, 12) for factor in factors.tolist())
                found.append((abs(a - 1) + abs(b - 1), ((one, a), (other, b))))
    found.sort(key=lambda pair: pair[0])
    return [pair for _, pair in found], closest


def _add(noise: Tensor, module: nn.Module, args: tuple, output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0] + noise.view(output[0].shape), *output[1:])
    return output + noise.view(output.shape)


class FinalStates(MoeModelOutputWithPast):
    """What a backbone returns, with final hidden states and nothing else."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


HARMLESS = frozenset(
    {
        "scaling", "dropout", "softcap", "s_aux", "sliding_window", "document_bounds", "tail", "hooks_of_forward",
        "position_ids", "window_length",
        "is_causal", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict",
        "output_router_logits", "position_embeddings",
    }
)  # fmt: skip
"""Arguments of an attention function that the seam heeds, or that change nothing about what attention computes."""


def unknown_arguments(told: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that an attention function is given and that neither may be dropped nor is known here."""
    return [name for name, value in told.items() if name not in HARMLESS and value is not None]


@contextmanager
def returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Within it, `module` returns `output` whatever it is given; so a causal LM's forward is what comes after it."""
    before = {
        name: value for name, value in module.__dict__.items() if name == "forward"
    }  # accelerate's hooks sit here
    module.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
        module.__dict__.update(before)


@contextmanager
def _quiet() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _holds(output: Tensor, stream: Tensor) -> bool:
    """Whether a module's output is one state per position, [B, T, M] or [B T, M]."""
    return output.shape in (stream.shape, stream.flatten(0, 1).shape)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(_has_tensor(x) for x in value))
