"""HookedCausalLM: TransformerLens' hook names and methods on a Hugging Face causal LM, any kernel, no T x T matrix.

Hook points, named as on `TransformerBridge` (B batch, T positions, H query and K key-value heads, D head dim,
M width):

    hook_embed                                [B, T, M]
    blocks.{i}.hook_resid_pre|mid|post        [B, T, M]   mid only where attention and MLP run one after the other
    blocks.{i}.hook_attn_out, hook_mlp_out    [B, T, M]   what is added to the residual stream
    blocks.{i}.attn.hook_rot_q, hook_z        [B, T, H, D]
    blocks.{i}.attn.hook_rot_k, hook_v        [B, T, K, D]
    blocks.{i}.attn.hook_attn_scores|pattern  [B, H, T, T]   attn="eager" only
    ln_final.hook_out                         [B, T, M]
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedModel

from rope_probe.errors import InputError
from rope_probe.models import attention, checkpoints
from rope_probe.models.architectures import (
    architecture_of,
    backbone_of,
    embedding_of,
    exact_length,
    final_norm_of,
    layers_of,
    output_projection_of,
    rotary_layers,
)
from rope_probe.models.configs import text_config_of
from rope_probe.models.measured import FinalStates, returning
from rope_probe.precision import promote_float32
from rope_probe.windows.packing import Batch, Window


class HookedCausalLM(HookedRootModule):
    """A Hugging Face causal LM whose activations can be read and changed by TransformerLens hooks.

    The model is wrapped, not copied: its attention runs through the seam until `release()`, or until another wrapper
    takes it over. In float64 everything runs in float64, also what transformers itself would compute in float32. One
    thread at a time runs it: others wait. Make one with `rope_probe.load_model`.

    Raises InputError for a model type that is not of the form that can be measured (GPT-2 and others without RoPE), and
    for weights that are no floating-point numbers of 16 bits or more.
    """

    def __init__(self, model: PreTrainedModel, attn: str = "sdpa") -> None:
        super().__init__()
        architecture = architecture_of(model.config)
        _require_float_weights(model)
        self.original_model = model
        self.attn = attn
        self.rotary = rotary_layers(model)
        self.exact_length = exact_length(model.config)
        self._one_thread = _OneThread()
        native = attention.native_kernel(model)
        layers = range(len(self.rotary))
        self._seam_of = {
            layer: attention.Seam(native, hooks_now=self._hooks_now) for layer in layers if architecture.attends(layer)
        }
        self._seams = list(self._seam_of.values())
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(
            _Block(self._seam_of.get(layer), architecture.parts(layer).resid_mid is not None, attn) for layer in layers
        )
        self.ln_final = _FinalNorm()
        self._install()
        self.setup()

    def _install(self) -> None:
        model = self.original_model
        architecture = architecture_of(model.config)
        if self.dtype == torch.float64:
            model.set_experts_implementation("eager")  # the grouped kernels of mixtures of experts stop at float32
        attention.attach(model, self.attn, self._seams)
        on_embedding = partial(_on_output, self.hook_embed)
        for seam in self._seams:
            seam.handles = []
        self._seams[0].handles = [embedding_of(model).register_forward_hook(on_embedding)]
        for index, (block, layer) in enumerate(zip(self.blocks, layers_of(model), strict=True)):
            seam = self._seam_of.get(index, self._seams[0])
            keep_shape: Any = block.keep_shape
            seam.handles.append(layer.register_forward_pre_hook(keep_shape, with_kwargs=True))
            parts = architecture.parts(index)
            of_attention, of_mlp = parts.scales
            if architecture.drops_arguments and index in self._seam_of:
                seam.handles.append(layer.register_forward_pre_hook(seam.keep_arguments, with_kwargs=True))
            inputs, outputs = [(layer, block.hook_resid_pre)], [(layer, block.hook_resid_post, 1.0)]
            outputs.append((layer.get_submodule(parts.attn_out), block.hook_attn_out, of_attention))
            outputs.append((layer.get_submodule(parts.mlp_out), block.hook_mlp_out, of_mlp))
            if parts.resid_mid is not None:
                inputs.append((layer.get_submodule(parts.resid_mid), block.hook_resid_mid))
            for module, hook_point in inputs:
                hook = partial(_on_input, hook_point)
                seam.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            for module, hook_point, scale in outputs:
                hook = partial(_reshaped, block, partial(_on_output, hook_point, scale=scale))
                seam.handles.append(module.register_forward_hook(hook))

    def setup(self) -> None:
        """Name the hook points, and only them: the wrapped modules stay as they are."""
        self.hook_dict = {name: module for name, module in self.named_modules() if isinstance(module, HookPoint)}
        self.mod_dict = dict(self.hook_dict)
        for name, hook_point in self.hook_dict.items():
            hook_point.name = name

    def release(self) -> PreTrainedModel:
        """Undo the wrapping: transformers' own attention, no hooks. Returns the plain model."""
        if attention.belongs_to(self.original_model, self._seams):
            attention.detach(self.original_model)
        for seam in self._seams:
            seam.handles = []
        return self.original_model

    def double(self) -> "HookedCausalLM":
        """A float64 copy of this model, the control that tells rounding from signal; this one is left as it is.

        It runs by sdpa where this model's kernel is a flash one, since those know no float64.
        """
        twin = self.plain_copy().to(torch.float64)
        return HookedCausalLM(twin, "sdpa" if self.attn.startswith("flash") else self.attn)

    def plain_copy(self) -> PreTrainedModel:
        """A copy of the plain model, without a wrapper or hooks; this one is left as it is."""
        with self._one_thread:
            self._check_attached()
            return attention.plain_copy(self.original_model)

    @contextmanager
    def released(self) -> Iterator[PreTrainedModel]:
        """The plain model; hooked again afterwards."""
        with self._one_thread:
            self._check_attached()
            try:
                yield self.release()
            finally:
                self._install()

    @contextmanager
    def hooks(self, *args: Any, **kwargs: Any) -> Iterator["HookedCausalLM"]:
        """TransformerLens' `hooks`; other threads that want the model wait for its end."""
        with self._one_thread, super().hooks(*args, **kwargs):
            yield self

    @contextmanager
    def measuring(self) -> Iterator["HookedCausalLM"]:
        """Within it, the model is in eval mode and this thread's alone; then each module is in its own mode again.

        Raises InputError for a wrapper whose model no longer runs through it.
        """
        with self._one_thread:
            self._check_attached()
            in_training = [module for module in self.original_model.modules() if module.training]
            self.original_model.eval()
            try:
                yield self
            finally:
                for module in in_training:
                    module.training = True

    def require_finite(self, values: Tensor, where: str) -> None:
        """Raises InputError unless all `values`, read at `where`, are finite; it says which weight is to blame."""
        if values.isfinite().all():
            return
        weights = self.original_model.named_parameters()
        broken = next((name for name, weight in weights if not weight.isfinite().all()), None)
        why = f"weight {broken} is not finite" if broken else f"they overflow {self.dtype}; try float32"
        raise InputError(f"activations at {where} are not finite numbers: {why}")

    @property
    def config(self) -> Any:
        """The transformers config, of a model that reads images or sound too that of its text model."""
        return text_config_of(self.original_model.config)

    @property
    def all_layers_attend(self) -> bool:
        """Whether every layer has attention: no recurrences, no convolutions."""
        return len(self._seams) == len(self.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.original_model.dtype

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings."""
        return embedding_of(self.original_model).weight.device

    def forward(
        self, tokens: Window | Batch | Int[Tensor, "B T"], *, masked: bool = False, rows: int = 1
    ) -> Float[Tensor, "B T V"]:
        """Logits. `tokens` is a Window, a Batch of them or plain token ids; `masked` keeps attention inside documents.

        A Window is repeated `rows` times along the batch; see `hidden` for what is refused.
        """
        return self.unembed(self.hidden(tokens, masked=masked, rows=rows))

    def hidden(
        self, tokens: Window | Batch | Int[Tensor, "B T"], *, masked: bool = False, rows: int = 1
    ) -> Float[Tensor, "B T M"]:
        """Final hidden states after the last norm, ready for `unembed`.

        Raises InputError for tokens that are not [B, T], for token ids outside the vocabulary, for `masked` without
        documents (plain tokens do not say where they end), and for positions past the length up to which a dynamic or
        longrope model's frequencies stand still.
        """
        if isinstance(tokens, Batch):
            if masked:
                return self.hidden(tokens.end_to_end, masked=True).view(*tokens.tokens.shape, -1)
            ids, positions, bounds = tokens.tokens, tokens.position_ids, None
        elif isinstance(tokens, Window):
            ids, positions = tokens.tokens.expand(rows, -1), tokens.position_ids
            bounds = tokens.cu_seqlens.tolist() if masked else None
        elif masked:
            raise InputError("masked=True needs a Window or a Batch: plain tokens do not say where documents end")
        else:
            if tokens.ndim != 2:
                raise InputError(f"tokens must be [batch, positions], but their shape is {tuple(tokens.shape)}")
            ids, positions, bounds = tokens, torch.arange(tokens.shape[1]).unsqueeze(0), None
        if bounds is not None and len(bounds) > 2 and not self.all_layers_attend:
            raise InputError(
                f"documents cannot be masked from each other in a {self.config.model_type} model: it has layers "
                "without attention, whose state runs through all of them"
            )
        with self._one_thread, self._precision():
            self._check(ids, positions)
            state = backbone_of(self.original_model)(
                input_ids=ids.to(self.device),
                position_ids=positions.expand(len(ids), -1).to(self.device),
                use_cache=False,
                return_dict=True,
                document_bounds=bounds,
                **self._for_recomputation(),
            ).last_hidden_state
            return self.ln_final.hook_out(state)

    def final_norm(self, resid_post: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        """What `hidden` makes of the residual stream after the last layer."""
        with self._one_thread, self._precision():
            return self.ln_final.hook_out(final_norm_of(self.original_model)(resid_post))

    @torch.no_grad()
    def greedy(self, prompt: Int[Tensor, " n"], count: int, *, stop: int | None = None) -> Int[Tensor, " written"]:
        """The most likely next token, `count` times over or until it is `stop`, which is left out.

        It runs by transformers' own attention and its cache of keys and values, whatever generation config the model
        carries. While hooks are attached, it reads the whole window anew for every token instead, since they see whole
        windows. Raises InputError for what `hidden` refuses.
        """
        self._check(prompt, torch.arange(len(prompt) + count))
        tokens, cache = prompt.unsqueeze(0).to(self.device), None
        hooks = any(point.has_hooks() for point in self.hook_dict.values())
        with self.measuring(), nullcontext() if hooks else self.released() as plain, self._precision():
            unread = tokens
            for _ in range(count):
                if plain is None:
                    logits = self.unembed(self.hidden(tokens)[:, -1:])
                else:
                    output = plain(input_ids=unread, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    logits, cache = output.logits, output.past_key_values
                unread = logits[:, -1].argmax(-1, keepdim=True)
                if stop is not None and int(unread) == stop:
                    break
                tokens = torch.cat([tokens, unread], 1)
        return tokens[0, len(prompt) :].cpu()

    def unembed(self, hidden: Float[Tensor, "B T M"]) -> Float[Tensor, "B T V"]:
        """Logits of final hidden states, by the model's own head: bias, soft cap and logit scale included."""
        state = FinalStates(last_hidden_state=hidden)
        with self._one_thread, self._precision(), returning(backbone_of(self.original_model), state):
            return self.original_model(inputs_embeds=hidden, use_cache=False).logits

    def after_projection(self, projected: Float[Tensor, "B T V"]) -> Float[Tensor, "B T V"]:
        """What the model's head does after its projection: soft cap and logit scale; nothing on most models."""
        projection = output_projection_of(self.original_model)
        with self._one_thread, returning(projection, projected):
            return self.unembed(projected.new_empty(*projected.shape[:2], projection.in_features))

    def _precision(self) -> Any:
        return promote_float32() if self.dtype == torch.float64 else nullcontext()

    def _hooks_now(self) -> tuple[int, ...]:
        """The hooks that are attached to hook points, by numbers that are never given twice."""
        handles = (handle for point in self.hook_dict.values() for handle in (*point.fwd_hooks, *point.bwd_hooks))
        return tuple(handle.hook.id for handle in handles)

    def _for_recomputation(self) -> dict[str, Any]:
        """What gradient checkpointing must find again when it computes a layer a second time, in backward."""
        again = torch.is_grad_enabled() and self.original_model.training and self._checkpoints_gradients
        return {"hooks_of_forward": self._hooks_now()} if again else {}

    @property
    def _checkpoints_gradients(self) -> bool:
        modules = self.original_model.modules()  # its own property for this has another name from transformers 6 on
        return any(getattr(module, "gradient_checkpointing", False) for module in modules)

    def _check_attached(self) -> None:
        if not attention.is_attached(self.original_model, self._seams):
            raise InputError(
                "this model's attention no longer runs through this wrapper: it was released, a newer one took its "
                "model over, or set_attn_implementation was called on it; call load_model again"
            )

    def _check(self, ids: Tensor, positions: Tensor) -> None:
        self._check_attached()
        low, high, vocabulary = int(ids.min()), int(ids.max()), self.config.vocab_size
        if low < 0 or high >= vocabulary:
            raise InputError(
                f"token id {low if low < 0 else high} is outside the vocabulary: ids run from 0 to {vocabulary - 1}"
            )
        if self.exact_length is not None and int(positions.max()) >= self.exact_length:
            raise InputError(
                f"position {int(positions.max())} is past {self.exact_length - 1}, from where this model's rope type "
                f"changes its frequencies with the input; use a window of at most {self.exact_length} tokens"
            )


class _OneThread:
    """A lock that the thread which holds it can take again. A copy of a model gets one of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict) -> "_OneThread":
        return _OneThread()


def _require_float_weights(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype not in checkpoints.FLOATS:
            raise InputError(
                f"weight {name} is {parameter.dtype}, which is quantised or no weight; rope_probe reads models in "
                "float64, float32, bfloat16 or float16"
            )


class _Block(nn.Module):
    def __init__(self, seam: attention.Seam | None, sequential: bool, attn: str) -> None:
        super().__init__()
        self.shape = torch.Size()
        self.hook_resid_pre, self.hook_resid_post = HookPoint(), HookPoint()
        self.hook_attn_out, self.hook_mlp_out = HookPoint(), HookPoint()
        if sequential:
            self.hook_resid_mid = HookPoint()
        if seam is None:
            return
        self.attn = nn.Module()
        for name in ("hook_rot_q", "hook_rot_k", "hook_v", "hook_z"):
            self.attn.add_module(name, getattr(seam, name))
        if attn == "eager":
            self.attn.add_module("hook_attn_scores", seam.hook_attn_scores)
            self.attn.add_module("hook_pattern", seam.hook_pattern)

    def keep_shape(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """A hook before a layer: how many windows of how many positions it reads."""
        self.shape = (args[0] if args else kwargs["hidden_states"]).shape[:2]


class _FinalNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hook_out = HookPoint()


def _on_input(hook_point: HookPoint, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if args:
        return (hook_point(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hook_point(kwargs["hidden_states"])}


def _on_output(hook_point: HookPoint, module: nn.Module, args: tuple, output: Any, *, scale: float = 1.0) -> Any:
    if isinstance(output, tuple):
        return (_hooked(hook_point, output[0], scale), *output[1:])
    return _hooked(hook_point, output, scale)


def _hooked(hook_point: HookPoint, x: Tensor, scale: float) -> Tensor:
    """What a hook point makes of `x`, which it sees times `scale`, as it is added to the residual stream."""
    if scale == 1:
        return hook_point(x)
    if not hook_point.has_hooks():
        return x
    return hook_point(x * scale) / scale


def _reshaped(block: Any, inner: Any, module: nn.Module, args: tuple, output: Any) -> Any:
    """For a module that returns [B T, M]: what `inner` makes of its output as [B, T, M]."""
    flat = output[0] if isinstance(output, tuple) else output
    if flat.ndim != 2:
        return inner(module, args, output)
    after = inner(module, args, flat.view(*block.shape, -1)).view(flat.shape)
    return (after, *output[1:]) if isinstance(output, tuple) else after


def load_model(
    model: str | os.PathLike[str] | PreTrainedModel,
    *,
    attn: str = "sdpa",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> HookedCausalLM:
    """A hooked causal LM from a checkpoint folder, a hub id, or a model already in memory.

    `attn` is the kernel: "sdpa" (default), "eager" (the only one with scores and patterns, [T, T] per head), or
    "flash_attention_2|3|4" where installed. A model in memory is wrapped in place, in eval mode, and moved if dtype or
    device ask.
    Raises InputError for what cannot be loaded (see `checkpoints.load`) or probed (see `HookedCausalLM`).
    """
    if isinstance(model, PreTrainedModel):
        _require_float_weights(model)
        target = checkpoints.require_device(model.device if device is None else device, dtype or model.dtype)
        return HookedCausalLM(checkpoints.cast(model, target, dtype or model.dtype).eval(), attn)
    return HookedCausalLM(checkpoints.load(model, dtype=dtype, device=device), attn)
