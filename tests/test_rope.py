import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rotation
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotation

from rope_probe import InputError, rope
from tests.zoo import ROPE_TYPES

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
layouts = st.sampled_from(["half", "adjacent"])


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_frequencies_are_those_of_a_transformers_model(rope_type):
    parameters = ROPE_TYPES[rope_type]
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=128, rope_parameters=dict(parameters)
    )
    expected = LlamaRotaryEmbedding(config)
    assert torch.equal(rope.inv_freq(parameters, 8, max_position_embeddings=128), expected.inv_freq)
    assert rope.attention_scaling(parameters, 8, max_position_embeddings=128) == expected.attention_scaling


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_float64_frequencies_agree_with_float32_ones_to_float32_rounding(rope_type):
    single = rope.inv_freq(ROPE_TYPES[rope_type], 8, max_position_embeddings=128)
    double = rope.inv_freq(ROPE_TYPES[rope_type], 8, max_position_embeddings=128, dtype=torch.float64)
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=0)


def test_float64_frequencies_are_right_to_the_last_digits():
    got = rope.inv_freq(PLAIN, 128, dtype=torch.float64)
    expected = torch.tensor([10000 ** (-2 * p / 128) for p in range(64)], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-15, atol=0)


def test_yarn_scales_attention_as_published():
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 2048}
    assert rope.attention_scaling(yarn, 64, max_position_embeddings=16384) == pytest.approx(0.1 * math.log(8) + 1)


def test_longrope_scales_attention_as_transformers_and_never_guesses_its_factor():
    """Without the model's length it was 1.0, for Phi-3's 1.190: the factor is in the ratio of two lengths."""
    phi3 = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}  # fmt: skip
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=dict(phi3)
    )
    expected = LlamaRotaryEmbedding(config).attention_scaling
    assert expected == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096))) == pytest.approx(1.190, abs=1e-3)
    assert rope.attention_scaling(phi3, 8, max_position_embeddings=131072) == expected
    with pytest.raises(InputError, match="max_position_embeddings"):
        rope.attention_scaling(phi3, 8)
    assert rope.attention_scaling({**phi3, "factor": 32.0}, 8) == expected
    assert rope.attention_scaling({**phi3, "attention_factor": 1.3}, 8) == 1.3
    assert torch.equal(rope.inv_freq(phi3, 8), rope.inv_freq(PLAIN, 8))


def test_length_dependent_frequencies_follow_seq_len():
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    short = rope.inv_freq(dynamic, 8, max_position_embeddings=128, seq_len=128)
    long = rope.inv_freq(dynamic, 8, max_position_embeddings=128, seq_len=512)
    assert torch.equal(short, rope.inv_freq(PLAIN, 8))
    assert (long[1:] < short[1:]).all()


@pytest.mark.parametrize(
    ("parameters", "head_dim", "named"),
    [
        ({"rope_type": "spiral", "rope_theta": 1e4}, 8, "spiral"),
        ({"rope_theta": 0.0}, 8, "0.0"),
        ({"rope_theta": math.nan}, 8, "nan"),
        ({"rope_theta": math.inf}, 8, "inf"),
        ({}, 8, "None"),
        (PLAIN, 7, "7"),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 8, "max_position_embeddings"),
        ({"rope_type": "linear", "rope_theta": 1e4}, 8, "'factor'"),
        ({"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}, 8, "'low_freq_factor'"),
    ],
)
def test_bad_frequencies_are_refused_by_name(parameters, head_dim, named):
    with pytest.raises(InputError, match=named):
        rope.inv_freq(parameters, head_dim)


def test_rotations_wavelengths_and_spectrum_use():
    frequencies = rope.inv_freq(PLAIN, 64, dtype=torch.float64)
    torch.testing.assert_close(rope.rotations(frequencies, 2048), 2048 / rope.wavelengths(frequencies))
    assert rope.spectrum_use(frequencies, 2048) == 21 / 32
    large = rope.inv_freq({"rope_type": "default", "rope_theta": 5e5}, 64, dtype=torch.float64)
    assert (rope.spectrum_use(large, 131072), rope.spectrum_use(large, 2048)) == (25 / 32, 15 / 32)


def test_critical_dimension_of_llama_2():
    assert rope.critical_dimension(128, 1e4, 4096) == 92


def test_critical_dimension_stays_within_the_head():
    assert rope.critical_dimension(64, 1e4, 10**6) == 64
    assert rope.critical_dimension(64, 1e4, 4) == 0


@pytest.mark.parametrize(
    ("head_dim", "window", "published"), [(128, 1024, 4.3e3), (128, 8192, 8.4e4), (64, 512, 3.4e3), (32, 64, 315)]
)
def test_base_bound_has_its_published_values(head_dim, window, published):
    bound = rope.base_bound(head_dim, window)
    assert bound == pytest.approx(published, rel=0.02)
    distances = torch.arange(window, dtype=torch.float64)
    exponents = -torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    similarity = torch.outer(distances, bound**exponents).cos().sum(-1)
    assert similarity.min() >= 0


@given(layouts, st.floats(-500, 500), st.floats(-500, 500), st.integers(1, 4))
def test_rotations_compose_and_undo(layout, first, second, pairs):
    frequencies = rope.inv_freq(PLAIN, 2 * pairs, dtype=torch.float64)
    x = torch.randn(3, 10, dtype=torch.float64)
    once = rope.rotate(rope.rotate(x, first * frequencies, layout), second * frequencies, layout)
    torch.testing.assert_close(once, rope.rotate(x, (first + second) * frequencies, layout), rtol=0, atol=1e-10)
    torch.testing.assert_close(rope.rotate(once, -(first + second) * frequencies, layout), x, rtol=0, atol=1e-10)
    assert torch.equal(once[..., 2 * pairs :], x[..., 2 * pairs :])


@given(layouts, st.floats(-1000, 1000), st.integers(-500, 500))
def test_scores_see_relative_position_only(layout, shift, distance):
    frequencies = rope.inv_freq(PLAIN, 8, dtype=torch.float64)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    near = rope.rotate(q, distance * frequencies, layout) @ k
    far = rope.rotate(q, (distance + shift) * frequencies, layout) @ rope.rotate(k, shift * frequencies, layout)
    torch.testing.assert_close(near, far, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("layout", "theirs"), [("half", llama_rotation), ("adjacent", glm_rotation)])
def test_rotation_is_the_one_transformers_applies(layout, theirs):
    x = torch.randn(1, 2, 20, 8, dtype=torch.float64)
    angles = torch.outer(torch.arange(20, dtype=torch.float64), rope.inv_freq(PLAIN, 8, dtype=torch.float64))
    full = torch.cat([angles, angles], -1).unsqueeze(0)
    expected, _ = theirs(x, x, full.cos(), full.sin())
    torch.testing.assert_close(rope.rotate(x, angles, layout), expected, rtol=0, atol=1e-14)


@given(layouts, st.floats(-100, 100))
def test_pair_norms_are_blind_to_rotation_and_add_up(layout, tokens):
    frequencies = rope.inv_freq(PLAIN, 8, dtype=torch.float64)
    x = torch.randn(5, 8, dtype=torch.float64)
    norms = rope.pair_norms(x, layout)
    assert norms.shape == (5, 4)
    torch.testing.assert_close(rope.pair_norms(rope.rotate(x, tokens * frequencies, layout), layout), norms)
    torch.testing.assert_close(norms.square().sum(-1).sqrt(), x.norm(dim=-1))


def test_scale_acts_on_the_rotary_dims_alone():
    x = torch.randn(3, 10, dtype=torch.float64)
    scaled = rope.rotate(x, torch.zeros(4, dtype=torch.float64), scale=2.0)
    torch.testing.assert_close(scaled, torch.cat([2 * x[:, :8], x[:, 8:]], -1))


@pytest.mark.parametrize("layout", ["half", "adjacent"])
@pytest.mark.parametrize(("rotary_dim", "stride", "offset"), [(None, None, 0), (4, None, 0), (4, 24, 8)])
def test_rows_of_a_pair_move_that_pair_alone(layout, rotary_dim, stride, offset):
    heads, head_dim = 3, 8
    stride_, pairs = stride or head_dim, (rotary_dim or head_dim) // 2
    for head in range(heads):
        for pair in range(pairs):
            rows = rope.rows_of_pair(
                layout, head, pair, head_dim=head_dim, rotary_dim=rotary_dim, head_stride=stride, offset=offset
            )
            state = torch.zeros(offset + heads * stride_)
            state[list(rows)] = 1.0
            heads_of = torch.stack([state[offset + h * stride_ :][:head_dim] for h in range(heads)])
            moved = rope.pair_norms(heads_of, layout, rotary_dim) != 0
            assert moved.nonzero().tolist() == [[head, pair]]
            for row in rows:
                assert rope.pair_of_row(
                    layout, row, head_dim=head_dim, rotary_dim=rotary_dim, head_stride=stride, offset=offset
                ) == (head, pair)


def test_rows_outside_the_rotary_dims_have_no_pair():
    assert rope.pair_of_row("half", 5, head_dim=8, rotary_dim=4) is None
    assert rope.pair_of_row("half", 13, head_dim=8, rotary_dim=4) is None


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: rope.rows_of_pair("zigzag", 0, 0, head_dim=8), "zigzag"),
        (lambda: rope.rows_of_pair("half", 0, 4, head_dim=8), "pair 4"),
        (lambda: rope.rows_of_pair("half", -1, 0, head_dim=8), "-1"),
        (lambda: rope.rotate(torch.zeros(8), torch.zeros(5)), "10"),
        (lambda: rope.pair_norms(torch.zeros(8), "zigzag"), "zigzag"),
    ],
)
def test_unknown_layouts_and_pairs_are_refused_by_name(call, named):
    with pytest.raises(InputError, match=named):
        call()


@pytest.mark.parametrize("head_dim", [0, 2, 5, -4])
def test_a_head_dim_that_no_theta_changes_has_no_base_bound(head_dim):
    with pytest.raises(InputError, match="head_dim must be even and 4 or more"):
        rope.base_bound(head_dim, 64)
