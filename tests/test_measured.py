"""What measuring finds and refuses, and what the seam refuses rather than drops."""

import pytest
import torch
import transformers as hf

from rope_probe import InputError, PositionShift, load_model, pack, trace
from rope_probe.models.architectures import architecture_of, heads_of
from rope_probe.models.measured import measure
from rope_probe.models.parameters import query_key_value_rows
from tests import every_type, zoo

DOCUMENTS = [zoo.tokens(1, 12)[0], zoo.tokens(1, 18, seed=1)[0]]


@pytest.fixture(scope="module")
def hybrid():
    return load_model(every_type.tiny_model("lfm2_moe"))


def test_a_config_of_full_size_measures_as_a_tiny_one():
    large = hf.GraniteConfig(num_hidden_layers=6, residual_multiplier=0.22, num_key_value_heads=8)
    found = measure(large)
    tiny = measure(hf.GraniteConfig(**zoo.SIZES, residual_multiplier=0.22))
    assert found.parts[0] == tiny.parts[0]
    assert len(found.parts) == 6
    assert found.parts[0].scales == (0.22, 0.22)
    assert (large.hidden_size, large.num_hidden_layers) == (4096, 6)


def test_measuring_leaves_the_random_numbers_as_they_were():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    measure(hf.GraniteConfig(**zoo.SIZES, residual_multiplier=0.31))
    assert torch.equal(torch.rand(3), wanted)


def test_a_multiplier_is_in_what_the_hooks_see_and_out_of_what_they_return():
    model = load_model(zoo.model(hf.GraniteConfig(**zoo.SIZES, residual_multiplier=0.22)))
    noise = torch.randn(2, 30, 32)
    site, after = "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"
    clean = model.run_with_cache(zoo.tokens())[1]
    with model.hooks([(site, lambda x, hook: x + noise)]):
        moved = model.run_with_cache(zoo.tokens())[1]
    torch.testing.assert_close(moved[after], clean[after] + noise, rtol=0, atol=1e-5)


def test_sinks_take_weight_and_documents_are_masked_with_them():
    config = every_type.tiny_config("gpt_oss")
    assert config.sliding_window == 8
    model = load_model(every_type.tiny_model("gpt_oss"), attn="eager")
    pattern = model.run_with_cache(zoo.tokens())[1]["blocks.0.attn.hook_pattern"]
    assert (pattern.sum(-1) < 1).all()
    window = pack(DOCUMENTS, 30)
    masked = model(window, masked=True)[0, 12:]
    torch.testing.assert_close(masked, model(DOCUMENTS[1].unsqueeze(0))[0], rtol=0, atol=1e-10)


def test_an_argument_of_attention_that_the_seam_does_not_know_is_refused(monkeypatch):
    plain = zoo.llama()
    model = load_model(plain)
    attention = plain.model.layers[1].self_attn
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, **told: forward(*args, **told, position_bias=1.0))
    with pytest.raises(InputError, match="llama model is given position_bias"):
        model(zoo.tokens())


def test_layers_without_attention_are_traced_and_not_masked(hybrid):
    window = pack(DOCUMENTS, 30)
    assert not hybrid.all_layers_attend
    assert "blocks.0.attn.hook_rot_q" not in hybrid.hook_dict
    frame = trace(hybrid, window, PositionShift("q", 3.0, positions=range(20, 30)))
    by_position = frame[frame["site"] == "logits"]
    assert (by_position["value"] > 0).any()
    with pytest.raises(InputError, match=r"lfm2_moe.*layers without attention"):
        hybrid(window, masked=True)
    with pytest.raises(InputError, match="layer 0 has no RoPE"):
        trace(hybrid, window, PositionShift("q", 3.0, layers=0))


def test_a_measured_type_says_why_its_weights_are_not_compared(hybrid):
    with pytest.raises(InputError, match="'lfm2_moe' is known by measurement alone"):
        query_key_value_rows(hybrid.original_model, 1)


def test_the_text_part_of_a_model_that_reads_images_too():
    plain = every_type.tiny_model("gemma3")
    model = load_model(plain)
    assert model.config is plain.config.get_text_config()
    assert architecture_of(plain.config).by_measurement.text == "language_model"
    assert heads_of(plain.config) == heads_of(model.config) == (4, 2, 8)
    assert {rotary is None for rotary in model.rotary} == {False}


def test_a_split_head_rotates_at_its_end_and_the_rest_stays():
    model = load_model(every_type.tiny_model("deepseek_v3"))
    rotary = model.rotary[0]
    assert (rotary.start, rotary.rotary_dim, heads_of(model.config).width) == (8, 8, 16)
    assert rotary.pairs(16).min() == 8
    x = torch.randn(5, 4, 16, dtype=torch.float64)
    turned = rotary.turn(x, torch.full((5, 1, 4), 0.5, dtype=torch.float64))
    assert torch.equal(turned[..., :8], x[..., :8])
    assert (turned[..., 8:] - x[..., 8:]).abs().min() > 0
