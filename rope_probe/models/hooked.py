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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from rope_probe.errors import InputError
from rope_probe.models import attention, checkpoints, offloaded, pretrained
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
from rope_probe.models.configs import chunk_of_layer, text_config_of
from rope_probe.models.hook_names import Cache, require_known
from rope_probe.models.measured import FinalStates, prepare_for_double, returning
from rope_probe.models.tokens import plain_ids, prompt_ids
from rope_probe.precision import promote_float32
from rope_probe.windows.packing import Batch, Window

Readable = Window | Batch | str | Int[Tensor, "B T"] | Int[Tensor, " T"]
"""What a forward pass reads: a window, several of them, text, or token ids."""


class HookedCausalLM(HookedRootModule):
    """A Hugging Face causal LM whose activations can be read and changed by TransformerLens hooks.

    The model is wrapped, not copied: its attention runs through the seam until `release()`, or until another wrapper
    takes it over. In float64 everything runs in float64, also what transformers itself would compute in float32. One
    thread at a time runs it: others wait. Make one with `rope_probe.load_model`. It reads and writes text by its
    `tokenizer`, where it has one.

    Raises InputError for a model type that is not of the form that can be measured (GPT-2 and others without RoPE), and
    for weights that are no floating-point numbers of 16 bits or more.
    """

    def __init__(self, model: PreTrainedModel, attn: str = "sdpa") -> None:
        super().__init__()
        self._load_tokenizer: Callable[[], PreTrainedTokenizerBase | None] | None = None
        self._own_tokenizer: PreTrainedTokenizerBase | None = None
        self.origin: dict[str, Any] | None = None
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
        if architecture.by_measurement is not None:  # no type that is known by hand heeds its config's chunks
            for layer, seam in self._seam_of.items():
                seam.chunk = chunk_of_layer(model.config, layer)
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
            offloaded.keep_stored_dtype(model)
            prepare_for_double(model)
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

        It runs by sdpa where this model's kernel is a flash one, since those know no float64. Raises InputError for a
        model that accelerate dispatched, and for a quantised one: they have no copy in float64.
        """
        no_control = "trace without the control, control=False or --no-control"
        loaded_anew = 'or give control=load_model(..., dtype=torch.float64, device_map="disk")'
        offloaded.require_in_memory(self.original_model, "a float64 copy", f"{no_control}, {loaded_anew}")
        if checkpoints.is_quantised(self.original_model):
            raise InputError(f"a quantised model has no float64 copy; {no_control}")
        copied = checkpoints.cast(self.plain_copy(), self.device, torch.float64)
        twin = HookedCausalLM(copied, "sdpa" if self.attn.startswith("flash") else self.attn)
        twin._load_tokenizer, twin._own_tokenizer = self._load_tokenizer, self._own_tokenizer
        return twin

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
    def hooks(
        self, fwd_hooks: Sequence[tuple] = (), bwd_hooks: Sequence[tuple] = (), *args: Any, **kwargs: Any
    ) -> Iterator["HookedCausalLM"]:
        """TransformerLens' `hooks`; other threads that want the model wait for its end.

        Raises InputError for a hook point that this model does not have, and says which is nearest.
        """
        fwd_hooks, bwd_hooks = list(fwd_hooks), list(bwd_hooks)
        for name, _ in [*fwd_hooks, *bwd_hooks]:
            require_known(name, self.hook_dict)
        with self._one_thread, super().hooks(fwd_hooks, bwd_hooks, *args, **kwargs):
            yield self

    def add_hook(self, name: str | Callable[[str], bool], *args: Any, **kwargs: Any) -> None:
        """TransformerLens' `add_hook`. Raises InputError as `hooks`."""
        require_known(name, self.hook_dict)
        super().add_hook(name, *args, **kwargs)

    def run_with_cache(self, *args: Any, names_filter: Any = None, **kwargs: Any) -> tuple[Any, Cache]:
        """TransformerLens' `run_with_cache`; activations go by full names, or short: `cache["resid_post", 7]`.

        Raises InputError for a hook point in `names_filter` that this model does not have.
        """
        if names_filter is not None and not callable(names_filter):
            names_filter = [names_filter] if isinstance(names_filter, str) else list(names_filter)
            for name in names_filter:
                require_known(name, self.hook_dict)
        output, activations = super().run_with_cache(*args, names_filter=names_filter, **kwargs)
        return output, Cache(activations)

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
        weights = [(name, weight) for name, weight in self.original_model.named_parameters() if not weight.is_meta]
        broken = next((name for name, weight in weights if not weight.isfinite().all()), None)
        why = f"weight {broken} is not finite" if broken else f"they overflow {self.dtype}; try float32"
        raise InputError(f"activations at {where} are not finite numbers: {why}")

    @property
    def config(self) -> Any:
        """The transformers config, of a model that reads images or sound too that of its text model."""
        return text_config_of(self.original_model.config)

    @property
    def attending_layers(self) -> list[int]:
        """The layers that have attention."""
        return list(self._seam_of)

    def scoring(self, layer: int) -> attention.Scoring:
        """How the attention of a layer scores keys; to be asked in a hook on its q, k, v or z."""
        scoring = self._seam_of[layer].scoring
        assert scoring is not None
        return scoring

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
        """Device that the input embeddings run on."""
        embedding = embedding_of(self.original_model)
        return offloaded.execution_device(embedding) or embedding.weight.device

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The checkpoint's tokenizer, loaded when it is first asked for; None for a model from memory, until it is set.

        Raises InputError for a tokenizer that cannot be loaded.
        """
        if self._own_tokenizer is None and self._load_tokenizer is not None:
            self._own_tokenizer, self._load_tokenizer = self._load_tokenizer(), None
        return self._own_tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._own_tokenizer, self._load_tokenizer = tokenizer, None

    def to_tokens(self, text: str, *, prepend_bos: bool | None = None) -> Int[Tensor, "1 T"]:
        """Token ids of a text: with BOS as the tokenizer has it, or as `prepend_bos` says; never with EOS behind.

        Raises InputError for a model without a tokenizer, for BOS from one that has none, and for text without tokens.
        """
        tokenizer = self._tokenizer()
        ids = prompt_ids(tokenizer, text) if prepend_bos is None else plain_ids(tokenizer, text)
        if prepend_bos:
            if tokenizer.bos_token_id is None:
                raise InputError("prepend_bos=True needs a tokenizer that has a BOS token, and this one has none")
            ids = [tokenizer.bos_token_id, *ids]
        if not ids:
            raise InputError(f"there are no tokens in the text {text!r}")
        return torch.tensor([ids])

    def to_string(self, tokens: Int[Tensor, "*row T"]) -> str:
        """The text of token ids [T] or [1, T], special ones included. Raises InputError without a tokenizer."""
        return self._tokenizer().decode(self._one_row(tokens).tolist())

    def as_window(self, given: Window | str | Int[Tensor, "*row T"] | Sequence[int]) -> Window:
        """A window of one document from text or from token ids, [T] or [1, T]; a Window as it is.

        Raises InputError for several rows of tokens, for none, and for text where there is no tokenizer.
        """
        if isinstance(given, Window):
            return given
        if isinstance(given, Batch):
            raise InputError("one window is needed here, but a Batch holds several")
        tokens = self.to_tokens(given) if isinstance(given, str) else self._one_row(given).unsqueeze(0)
        length = tokens.shape[1]
        return Window(tokens.cpu(), torch.tensor([0, length]), torch.arange(length).unsqueeze(0))

    def _one_row(self, tokens: Tensor | Sequence[int]) -> Int[Tensor, " T"]:
        row = torch.as_tensor(tokens)
        if row.ndim == 2 and len(row) == 1:
            row = row[0]
        if row.ndim != 1 or not len(row) or row.is_floating_point():
            raise InputError(
                f"token ids must be whole numbers, [T] or [1, T], but they are {row.dtype} of {list(row.shape)}"
            )
        return row.long()

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise InputError("text needs a tokenizer, and this model has none: set model.tokenizer, or give token ids")
        return self.tokenizer

    def forward(self, tokens: Readable, *, masked: bool = False, rows: int = 1) -> Float[Tensor, "B T V"]:
        """Logits. `tokens` is a Window, a Batch, text or token ids; `masked` keeps attention inside documents.

        A Window is repeated `rows` times along the batch; see `hidden` for what is refused.
        """
        return self.unembed(self.hidden(tokens, masked=masked, rows=rows))

    def hidden(self, tokens: Readable, *, masked: bool = False, rows: int = 1) -> Float[Tensor, "B T M"]:
        """Final hidden states after the last norm, ready for `unembed`.

        Raises InputError for tokens that are not [B, T] or [T], for text without a tokenizer, for token ids outside the
        vocabulary, for `masked` without documents (plain tokens do not say where they end), and for positions past the
        length up to which a dynamic or longrope model's frequencies stand still.
        """
        told: dict[str, Any] = {}
        shape: tuple[int, ...] = ()
        if isinstance(tokens, Batch) and masked:
            shape, tokens = tokens.tokens.shape, tokens.end_to_end
            told["window_length"] = shape[1]
        if isinstance(tokens, Batch):
            ids, positions, bounds = tokens.tokens, tokens.position_ids, None
        elif isinstance(tokens, Window):
            ids, positions = tokens.tokens.expand(rows, -1), tokens.position_ids
            bounds = tokens.cu_seqlens.tolist() if masked else None
        elif masked:
            raise InputError("masked=True needs a Window or a Batch: plain tokens do not say where documents end")
        else:
            ids = self.to_tokens(tokens) if isinstance(tokens, str) else tokens
            ids = ids.unsqueeze(0) if ids.ndim == 1 else ids
            if ids.ndim != 2 or not ids.numel():
                raise InputError(f"tokens must be [batch, positions], but their shape is {tuple(ids.shape)}")
            positions, bounds = torch.arange(ids.shape[1]).unsqueeze(0), None
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
                **told,
                **self._for_recomputation(),
            ).last_hidden_state
            final = self.ln_final.hook_out(state)
            return final.view(*shape, -1) if shape else final

    def hidden_after(
        self,
        earlier: Mapping[int, tuple[Float[Tensor, "1 K n D"], Float[Tensor, "1 K n D"]]],
        tokens: Int[Tensor, " m"],
    ) -> Float[Tensor, "1 m M"]:
        """Final hidden states of tokens that stand at positions n, n + 1, ..., behind n that were read before.

        `earlier` holds, of each layer, what a pass over these n left at hook_rot_k and hook_v, heads first. Hooks see
        the m new positions alone. `retrieval.reading.Reading` keeps such keys and values.
        Raises InputError for layers that attend to nothing, or are not all there, and for what `hidden` refuses.
        """
        if not self.all_layers_attend:
            raise InputError(
                f"a {self.config.model_type} model has layers without attention, whose state is not in keys and values"
            )
        if set(earlier) != set(self._seam_of):
            raise InputError(f"keys and values are needed of layers 0..{len(self.blocks) - 1}, but are of {[*earlier]}")
        before = earlier[0][0].shape[2]
        positions = torch.arange(before, before + len(tokens)).unsqueeze(0)
        with self._one_thread, self._precision():
            self._check(tokens, positions)
            try:
                for layer, seam in self._seam_of.items():
                    seam.earlier = earlier[layer]
                state = backbone_of(self.original_model)(
                    input_ids=tokens.unsqueeze(0).to(self.device),
                    position_ids=positions.to(self.device),
                    use_cache=False,
                    return_dict=True,
                ).last_hidden_state
            finally:
                for seam in self._seams:
                    seam.earlier = ()
            return self.ln_final.hook_out(state)

    def final_norm(self, resid_post: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        """What `hidden` makes of the residual stream after the last layer."""
        with self._one_thread, self._precision():
            return self.ln_final.hook_out(final_norm_of(self.original_model)(resid_post))

    def lens(self, resid_post: Float[Tensor, "B T M"]) -> Float[Tensor, "B T V"]:
        """The logit lens: what the model's own final norm and head make of the residual stream after any layer.

        Of the last layer's it is the logits. Soft cap, scale and bias of the head are included. No hook point fires.
        """
        with self._one_thread, self._precision():
            return self.unembed(final_norm_of(self.original_model)(resid_post))

    @contextmanager
    def keeping_keys(self) -> Iterator["KeysAndValues"]:
        """Within it, forward passes leave their keys and values, so that `greedy` need not read their windows again.

        Nothing is kept while hooks are attached, since `greedy` then reads whole windows anyway; nor of a model type
        that is only measured, whose cache may hold something else.
        """
        kept = KeysAndValues(self.config)
        if self.has_hooks or architecture_of(self.config).by_measurement is not None:
            yield kept
            return
        reads = [
            (f"blocks.{layer}.attn.{site}", partial(kept.keep, layer, site))
            for layer in range(len(self.blocks))
            for site in KeysAndValues.SITES
        ]
        with self.hooks(fwd_hooks=reads):
            yield kept

    @property
    def has_hooks(self) -> bool:
        """Whether any hook is attached to a hook point."""
        return any(point.has_hooks() for point in self.hook_dict.values())

    @torch.no_grad()
    def greedy(
        self,
        prompt: Int[Tensor, " n"],
        count: int,
        *,
        stop: int | None = None,
        read: "KeysAndValues | None" = None,
        row: int = 0,
    ) -> Int[Tensor, " written"]:
        """The most likely next token, `count` times over or until it is `stop`, which is left out.

        It runs by transformers' own attention and its cache of keys and values, whatever generation config the model
        carries. `read` says that the prompt begins row `row` of what the last forward pass under `keeping_keys` read,
        and is not read again. While hooks are attached, the whole window is read anew for every token instead, since
        they see whole windows. Raises InputError for what `hidden` refuses.
        """
        self._check(prompt, torch.arange(len(prompt) + count))
        tokens = prompt.unsqueeze(0).to(self.device)
        hooks = self.has_hooks
        cache = None if read is None or hooks else read.cache(row, len(prompt) - 1)
        with self.measuring(), nullcontext() if hooks else self.released() as plain, self._precision():
            unread = tokens if cache is None else tokens[:, -1:]
            for _ in range(count):
                if plain is None:
                    logits = self.unembed(self.hidden(tokens)[:, -1:])
                else:
                    options = {"use_cache": True, "logits_to_keep": 1, "return_dict": True}
                    output = plain(input_ids=unread, past_key_values=cache, **options)
                    logits, cache = output.logits, output.past_key_values
                unread = logits[:, -1].argmax(-1, keepdim=True)
                if stop is not None and int(unread) == stop:
                    break
                tokens = torch.cat([tokens, unread], 1)
        return tokens[0, len(prompt) :].cpu()

    def generate(
        self,
        prompt: str | Int[Tensor, "*row T"],
        max_new_tokens: int = 20,
        *,
        stop_at_eos: bool = True,
        return_type: Literal["input", "str", "tokens"] = "input",
    ) -> str | Int[Tensor, "1 n"]:
        """The prompt and what the model writes after it, by `greedy`: text for text, token ids for token ids.

        `return_type` asks for one of them whatever was given. It stops at the tokenizer's EOS (the config's, where
        there is no tokenizer), which is left out, unless `stop_at_eos` is False.
        Raises InputError as `greedy` and `to_tokens`, and for a count below 1.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be 1 or more, but it is {max_new_tokens}")
        if return_type not in ("input", "str", "tokens"):
            raise InputError(f"return_type must be 'input', 'str' or 'tokens', but it is {return_type!r}")
        row = self.to_tokens(prompt)[0] if isinstance(prompt, str) else self._one_row(prompt).cpu()
        eos = (self.config if self.tokenizer is None else self.tokenizer).eos_token_id
        stop = eos if stop_at_eos and isinstance(eos, int) else None
        written = self.greedy(row, max_new_tokens, stop=stop)
        if return_type == "tokens" or (return_type == "input" and not isinstance(prompt, str)):
            return torch.cat([row, written]).unsqueeze(0)
        if isinstance(prompt, str):
            return prompt + self.to_string(torch.cat([row, written]))[len(self.to_string(row)) :]
        return self.to_string(torch.cat([row, written]))

    def unembed(self, hidden: Float[Tensor, "B T M"]) -> Float[Tensor, "B T V"]:
        """Logits of final hidden states, by the model's own head: bias, soft cap and logit scale included."""
        state = FinalStates(last_hidden_state=hidden)
        with self._one_thread, self._precision(), returning(backbone_of(self.original_model), state):
            return self.original_model(inputs_embeds=hidden, use_cache=False, return_dict=True).logits

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


class KeysAndValues:
    """Rotated keys, and values, of every layer in the last forward pass under `HookedCausalLM.keeping_keys`."""

    SITES = ("hook_rot_k", "hook_v")

    def __init__(self, config: Any) -> None:
        self._config = config
        self._of: dict[tuple[int, str], Float[Tensor, "B T K D"]] = {}

    def keep(self, layer: int, site: str, x: Float[Tensor, "B T K D"], hook: HookPoint) -> None:
        """Keep what a layer's hook point saw."""
        self._of[layer, site] = x.detach()

    def cache(self, row: int, length: int) -> DynamicCache | None:
        """transformers' cache of the first `length` positions of a row; None where there is nothing to begin from."""
        if not self._of or not length:
            return None
        cache = DynamicCache(config=self._config)
        layers = sorted({layer for layer, _ in self._of})
        for layer in layers:
            keys, values = (self._of[layer, site][row : row + 1, :length].transpose(1, 2) for site in self.SITES)
            cache.update(keys.contiguous(), values.contiguous(), layer)  # [1, K, length, D]
        return cache


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
    """Raises InputError for weights that no kernel reads; a quantised model's own modules read theirs."""
    if checkpoints.is_quantised(model):
        return
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
    device_map: str | Mapping[str, Any] | None = None,
    quantization_config: Any = None,
    revision: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    accept_terms: bool = False,
) -> HookedCausalLM:
    """A hooked causal LM from a checkpoint folder, a `.gguf` file, a hub id, a name, or a model already in memory.

    Names are those of `pretrained.MODELS`, such as "smollm2-135m". `attn` is the kernel: "sdpa" (default), "eager" (the
    only one with scores and patterns, [T, T] per head), or "flash_attention_2|3|4" where installed. The other arguments
    are those of `checkpoints.load`: `device_map` spreads a model over devices, memory and disk, `adapter` is a folder
    of PEFT whose change is merged into the weights.

    A model in memory is wrapped in place, in eval mode, and moved if dtype or device ask; one that accelerate
    dispatched, or that is quantised, stays where and as it is.
    Raises InputError for what cannot be loaded (see `checkpoints.load`) or probed (see `HookedCausalLM`), and for
    arguments that a model in memory cannot follow.
    """
    if not isinstance(model, PreTrainedModel):
        loaded = checkpoints.load(
            model,
            dtype=dtype,
            device=device,
            device_map=device_map,
            quantization_config=quantization_config,
            revision=revision,
            adapter=adapter,
            accept_terms=accept_terms,
        )
        hooked = HookedCausalLM(loaded, attn)
        hooked._load_tokenizer = partial(checkpoints.load_tokenizer, model)
        hooked.origin = pretrained.origin_of(os.fspath(model))
        return hooked
    for name, value in {
        "device_map": device_map,
        "quantization_config": quantization_config,
        "revision": revision,
    }.items():
        if value is not None:
            raise InputError(f"{name} says how a checkpoint is loaded, but this model is in memory; leave it out")
    _require_float_weights(model)
    if offloaded.is_dispatched(model) or checkpoints.is_quantised(model):
        _require_unmoved(model, dtype, device)
    else:
        target = checkpoints.require_device(model.device if device is None else device, dtype or model.dtype)
        model = checkpoints.cast(model, target, dtype or model.dtype)
    if adapter is not None:
        model = checkpoints.with_adapter(attention.plain_copy(model), adapter)
    return HookedCausalLM(model.eval(), attn)


def _require_unmoved(model: PreTrainedModel, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
    """Raises InputError where a model that stays as it is was to be moved or cast."""
    if dtype is not None and dtype != model.dtype:
        raise InputError(f"a dispatched or quantised model stays in {model.dtype}; load it anew with dtype={dtype}")
    if device is not None:
        raise InputError(f"a dispatched or quantised model stays where it is; load it anew for device {str(device)!r}")
