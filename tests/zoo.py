"""Tiny random models of every architecture rope_probe knows, and of every rope type."""

from typing import Any

import torch
import transformers as hf

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MHA = {**SIZES, "num_key_value_heads": 4}
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
DEEPER = {**SIZES, "num_hidden_layers": 4}
HALF_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "mistral_sliding": lambda: hf.MistralConfig(**SIZES, sliding_window=8),
    "mixtral": lambda: hf.MixtralConfig(**SIZES, num_local_experts=2),
    "qwen2_local_global": lambda: hf.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=8),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "gemma": lambda: hf.GemmaConfig(**SIZES, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**SIZES, head_dim=8, sliding_window=8),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: hf.Phi3Config(**SIZES),
    "phi3_partial": lambda: hf.Phi3Config(**SIZES, rope_parameters=HALF_ROTARY),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**NEOX),
    "gpt_neox_sequential": lambda: hf.GPTNeoXConfig(**NEOX, use_parallel_residual=False),
    "olmo": lambda: hf.OlmoConfig(**SIZES),
    "olmo2": lambda: hf.Olmo2Config(**SIZES),
    "smollm3_nope_layer": lambda: hf.SmolLM3Config(**DEEPER),
    "starcoder2_sliding": lambda: hf.Starcoder2Config(**SIZES, sliding_window=8),
    "phi": lambda: hf.PhiConfig(**MHA),
    "glm": lambda: hf.GlmConfig(**SIZES, head_dim=8),
    "ernie4_5": lambda: hf.Ernie4_5Config(**SIZES, head_dim=8),
    "cohere": lambda: hf.CohereConfig(**SIZES),
    "cohere2_nope_layer": lambda: hf.Cohere2Config(**DEEPER, sliding_window=8),
}

ROPE_TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
}  # fmt: skip


def model(config: Any, *, attn: str | None = None, seed: int = 0, scale: float = 0.3) -> Any:
    """A tiny model with weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    config._attn_implementation = attn
    made = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, scale, generator=generator)
    return made


def llama(**changes: Any) -> Any:
    return model(hf.LlamaConfig(**{**SIZES, **changes}))


def tokens(rows: int = 2, length: int = 30, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))
