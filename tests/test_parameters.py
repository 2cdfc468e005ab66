"""Heads, and the one home of the names by which configs and models tell which tensor is what."""

import re
from pathlib import Path

import pytest
import torch

import rope_probe
from rope_probe import load_model
from rope_probe.models.architectures import heads_of
from tests import zoo

PACKAGE = Path(rope_probe.__file__).parent
NAMES_OF_MODELS = (
    "num_attention_heads|num_key_value_heads|base_model|base_model_prefix|rotary_emb|get_input_embeddings|"
    "get_output_embeddings|lm_head|embed_out|[qkvo]_proj|qkv_proj|query_key_value"
)


def test_names_of_parts_of_models_are_known_to_one_folder():
    """rope.py is left out: it makes a config of one head for transformers' formulas, and reads none."""
    others = [file for file in PACKAGE.rglob("*.py") if PACKAGE / "models" not in file.parents]
    assert len(others) > 40
    texts = {str(file.relative_to(PACKAGE)): file.read_text() for file in others if file != PACKAGE / "rope.py"}
    assert {name for name, text in texts.items() if re.search(rf"\b({NAMES_OF_MODELS})\b", text)} == set()


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_heads_are_those_that_attention_has(name):
    model = load_model(zoo.model(zoo.CONFIGS[name]()))
    sites = [f"blocks.0.attn.{site}" for site in ("hook_rot_q", "hook_rot_k", "hook_v")]
    cache = model.run_with_cache(torch.arange(6).unsqueeze(0), names_filter=sites)[1]
    heads = heads_of(model.config)
    shapes = [(heads.query, heads.width), (heads.key, heads.width), (heads.key, heads.width)]
    assert [tuple(cache[site].shape[2:]) for site in sites] == shapes
