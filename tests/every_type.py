"""Every causal-LM model type that transformers has: a tiny config of each, and whether rope_probe is exact on it."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rope_probe import InputError, PositionShift, load_model, pack
from rope_probe.models.architectures import attention_modules
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.models.measured import to_double
from rope_probe.precision import promote_float32
from rope_probe.tracing.cone import run_beside
from tests import zoo

_OTHERS_CODE = ("fuyu", "got_ocr2", "internlm3", "iquestcoder")  # whose text model is of another type


def _rotates(model_type: str) -> bool:
    folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(model_type)
    return any("rotary" in file.read_text().lower() for file in folder.glob("modeling_*.py"))


_ALL = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
TYPES = tuple(name for name in _ALL if name in _OTHERS_CODE or _rotates(name))
WITHOUT_ROPE = tuple(name for name in _ALL if name not in TYPES)
DISTANCE = 3
LENGTH = 30

# A tiny config of every type ------------------------------------------------------------------------------------------

_SIZES = {
    **zoo.SIZES, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 8, "attention_chunk_size": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "num_expert_group": 1, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
    "n_shared_experts": 1, "num_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16,
}  # fmt: skip


def _alike(types: str, **entries: Any) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(types.split(), entries)


_OWN: dict[str, dict[str, Any]] = {
    **_alike("axk1 axk2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash", num_key_value_heads=4),
    **_alike("minicpm3 youtu", num_key_value_heads=4),
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    **_alike("hunyuan_v1_dense hunyuan_v1_moe ministral", head_dim=8),
    **_alike("codegen gptj", rotary_dim=8),
    **_alike(
        "qwen3_next qwen3_5_text qwen3_5_moe_text olmo_hybrid",
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    ),
    "bailing_hybrid": {"num_key_value_heads": 4, "layer_group_size": 2, "num_hidden_layers": 2},
    "bamba": {"num_hidden_layers": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        **{
            f"{part}_config": {"hidden_size": width, "hidden_size_global": 64, "intermediate_size": 32,
                               "num_attention_heads": 4, "num_hidden_layers": 2}
            for part, width in {"patcher": 32, "encoder": 32, "decoder": 32, "global": 64}.items()
        },
    },
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "per_layer_config": {}, "moe_intermediate_size": 32, "adapter_in_dim": 32,
                          "adapter_out_dim": 32},
        "audio_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                         "adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "falcon_h1": {"num_hidden_layers": 1},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2, "laurel_rank": 8,
    },
    **_alike("gemma4_text gemma4_unified_text", head_dim=8, global_head_dim=16),
    "granitemoehybrid": {
        "num_hidden_layers": 2, "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8,
        "position_embedding_type": "rope", "num_local_experts": 0,
    },
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
                          "crop_size": 28},
        "audio_config": {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2,
                         "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32},
    },
    **_alike(
        "qwen4_exp_text",
        indexer_n_heads=4,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=8,
        indexer_compress_ratio=4,
        ngram_vocab_size_base=64,
    ),
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "zamba2": {
        "num_hidden_layers": 2, "layers_block_type": ["linear_attention", "hybrid"], "use_mem_rope": True,
        "n_mamba_heads": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(model_type: str) -> Any:
    """A small config of a model type; windows and chunks are short, and scales are not one."""
    made = CONFIG_MAPPING[model_type]
    given = _entries(made())
    vision = getattr(made(), "vision_config", None)
    if hasattr(vision, "num_hidden_layers"):
        small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
        given["vision_config"] = {name: size for name, size in small.items() if hasattr(vision, name)}
    text = getattr(made(), "text_config", None)
    if hasattr(text, "to_dict"):
        given["text_config"] = {**_entries(text), **_OWN.get(text.model_type, {})}
    return made(**{**given, **_OWN.get(model_type, {})})


def _entries(default: Any) -> dict[str, Any]:
    def known(name: str) -> bool:
        entry = getattr(type(default), name, None)
        if isinstance(entry, property) and entry.fset is None:  # computed from others
            return False
        try:
            return getattr(default, name) is not None or name == "num_key_value_heads"
        except Exception:  # not there, or another one in every layer
            return False

    entries: dict[str, Any] = {name: size for name, size in _SIZES.items() if known(name)}
    scales = [name for name, value in default.to_dict().items() if name.endswith("_multiplier") and value == 1]
    return entries | dict.fromkeys(scales, 0.7)


def tiny_model(model_type: str) -> Any:
    """A random float64 model of it, every parameter drawn anew."""
    torch.manual_seed(1)
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    if size > 10**8:
        raise InputError(f"cannot be built small: {size:.0e} parameters are left")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.2)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
    return _with_exact_constants(to_double(model)).eval()


def _with_exact_constants(model: Any) -> Any:
    """Constants that the model rounded when it was made in float32, such as Gemma's scale, as in float64."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            exact = getattr(module, f"scalar_{name}", None)
            if isinstance(exact, float):
                buffer.fill_(exact)
    return model


# Whether it is exact --------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """`status` is "exact", "refused", "cannot be built small" or "WRONG"; `why` a line."""

    status: str
    why: str


def outcome_of(model_type: str) -> Outcome:
    """What rope_probe makes of a tiny model of this type."""
    tokens = torch.randint(3, 64, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    try:
        plain = tiny_model(model_type)
        with torch.no_grad():
            wanted = _logits(plain, tokens)
    except Exception as error:
        return Outcome("cannot be built small", f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")
    with torch.no_grad():
        try:
            wrapped = load_model(plain)
        except InputError as error:
            return Outcome("refused", str(error).partition(" is refused: ")[2] or str(error))
        except Exception as error:
            return Outcome("WRONG", f"no InputError but {type(error).__name__}: {error}")
        wrapped.release()
        wanted_shifted = shifted_by_transformers(plain, tokens, wrapped)
        wrapped = load_model(plain)
        for check in (_check_logits, _check_residual, _check_documents, _check_cones):
            misfit = check(wrapped, tokens, wanted)
            if misfit is not None:
                return Outcome("WRONG", misfit)
        got = wrapped.run_with_hooks(tokens, fwd_hooks=PositionShift("q", DISTANCE).hooks(wrapped))
        if (misfit := _off(got, wanted_shifted)) > 1e-9:
            return Outcome("WRONG", f"shifted logits miss transformers' own rotation by {misfit:.1e}")
        if _off(got, wanted) < 1e-6:
            return Outcome("WRONG", "a shift of the queries changes nothing")
    return Outcome("exact", "")


def _off(got: Tensor, wanted: Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def _logits(plain: Any, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    with promote_float32():
        return plain(input_ids=tokens, position_ids=positions, use_cache=False).logits


def _check_logits(model: HookedCausalLM, tokens: Tensor, wanted: Tensor) -> str | None:
    off = max(_off(model(tokens), wanted), _off(load_model(model.original_model, attn="eager")(tokens), wanted))
    model._install()
    return f"logits miss transformers' own by {off:.1e}" if off > 1e-9 else None


def _check_residual(model: HookedCausalLM, tokens: Tensor, wanted: Tensor) -> str | None:
    cache = model.run_with_cache(tokens)[1]
    for layer in range(len(model.blocks)):
        before, attention, mlp, after = (
            cache[f"blocks.{layer}.hook_{site}"] for site in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        if (off := _off(before + attention + mlp, after)) > 1e-10:
            return f"the residual stream of layer {layer} does not add up, by {off:.1e}"
        middle = cache.get(f"blocks.{layer}.hook_resid_mid")
        if middle is not None and (off := _off(before + attention, middle)) > 1e-10:
            return f"the middle of layer {layer} is not what it says, by {off:.1e}"
    return None


def _check_documents(model: HookedCausalLM, tokens: Tensor, wanted: Tensor) -> str | None:
    if not model.all_layers_attend:  # masks are refused there
        return None
    first, second = tokens[0, :13], tokens[1, :17]
    alone = model(second.unsqueeze(0))[0]
    packed = model(pack([first, second], LENGTH), masked=True)[0, 13:]
    off = _off(packed, alone)
    return f"a document in a masked pack differs from itself alone by {off:.1e}" if off > 1e-9 else None


def _check_cones(model: HookedCausalLM, tokens: Tensor, wanted: Tensor) -> str | None:
    """The tracer's perturbed pass beside the clean one against hooks on whole windows."""
    rotating = [layer for layer, rotary in enumerate(model.rotary) if rotary is not None]
    shifts = [
        PositionShift("q", DISTANCE),
        PositionShift("k", DISTANCE, layers=rotating[-1], positions=range(11, 20)),
        PositionShift("q", DISTANCE, layers=rotating[0], heads=0, positions=range(20, LENGTH)),
    ]
    window = pack([tokens[0, :13], tokens[1, :17]], LENGTH)
    clean = model(window)[0]
    by_cone = clean.repeat(len(shifts), 1, 1)

    def read(which: list[int], site: str, at: Tensor, unmoved: Tensor, perturbed: Tensor) -> None:
        for row, index in enumerate(which):
            by_cone[index, at] = perturbed[row]

    run_beside(model, window, shifts, ["logits"], read)
    for index, shift in enumerate(shifts):
        by_hooks = model.run_with_hooks(window, fwd_hooks=shift.hooks(model, window))[0]
        if (off := _off(by_cone[index], by_hooks)) > 1e-9:
            return f"the tracer misses {shift} by {off:.1e}"
    return None


# Queries moved by transformers' own code ------------------------------------------------------------------------------


class _Moved:
    """An attention function that reads other queries than it is given: those the model makes further on."""

    def __init__(self) -> None:
        self.catching = False
        self.query: Tensor | None = None

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **told: Any
    ) -> tuple[Tensor, None]:
        if self.catching:
            self.query = query
        elif self.query is not None:
            query = self.query
            self.query = None
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scaling = told.get("scaling")
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if told.get("softcap") is not None:
            scores = torch.tanh(scores / told["softcap"]) * told["softcap"]
        scores = scores + attention_mask
        if told.get("s_aux") is not None:
            sinks = told["s_aux"].view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.dtype)
            return (torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ value).transpose(1, 2).contiguous(), None
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


_moved = _Moved()
AttentionInterface.register("test_moved_queries", _moved.__call__)
AttentionMaskInterface.register("test_moved_queries", eager_mask)


def shifted_by_transformers(plain: Any, tokens: Tensor, wrapped: HookedCausalLM) -> Tensor:
    """Logits where every layer's queries are those its own code makes `DISTANCE` positions further on.

    Each attention module runs twice: with the rotation it is given at those positions, of which only its queries are
    kept, and as it is.
    """
    layers = attention_modules(plain)
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    told: dict[nn.Module, dict[str, Any]] = {}
    native = plain.config._attn_implementation
    plain.set_attn_implementation("test_moved_queries")

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        told[module] = {
            name: kwargs[name] for name in ("position_embeddings", "position_ids") if kwargs.get(name) is not None
        }

    def catch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not _moved.catching:
            _moved.catching = True
            module(*args, **{**kwargs, **told[module]})
            _moved.catching = False

    def run(hook: Callable, at: Tensor) -> Tensor:
        with ExitStack() as stack, promote_float32():
            for module in layers:
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            return plain(input_ids=tokens, position_ids=at, use_cache=False).logits

    try:
        run(keep, positions + DISTANCE)
        return run(catch, positions)
    finally:
        _moved.catching = False
        plain.set_attn_implementation(native)
