"""Comparison of two checkpoints' weights: exactness of rows, planted changes, streaming, and what is refused."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rope_probe import InputError, PositionShift, compare_spans, load_model, rope
from rope_probe.models.architectures import architecture_of, rotary_layers
from rope_probe.models.parameters import ATTENTION, part_of, projections_of
from rope_probe.precision import promote_float32
from rope_probe.spans import Span
from rope_probe.spans.parts import pieces
from tests import zoo

QK_NORMS = ("qwen3", "qwen3_moe", "gemma3", "olmo2")
BIG = {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 2}


def value(frame, metric, **where):
    rows = frame[frame["metric"] == metric]
    for column, wanted in where.items():
        rows = rows[rows[column].isna() if wanted is None else rows[column] == wanted]
    assert len(rows) == 1, (metric, where, len(rows))
    return rows["value"].item()


def rotated(model, side):
    """Rotated q or k of every layer, [T, H, D], of a model in float64 reading random residual streams of its own."""
    hooked = load_model(model)
    sites = [f"blocks.{i}.attn.hook_rot_{side}" for i in range(len(hooked.blocks))]
    with torch.no_grad():
        cache = hooked.run_with_cache(zoo.tokens(1, 12), names_filter=sites)[1]
    hooked.release()
    return [cache[site][0] for site in sites]


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_a_change_of_a_pairs_rows_moves_that_pairs_rotated_state_and_no_other(name, side):
    model = zoo.model(zoo.CONFIGS[name]()).double()
    layer = next(i for i, rotary in enumerate(rotary_layers(model)) if rotary is not None)
    rotary = rotary_layers(model)[layer]
    head, pair = 1, len(rotary.inv_freq) - 1
    before = rotated(model, side)[layer]
    changed = copy.deepcopy(model)
    for piece in pieces(changed, Span(layer, head, pair, f"W_{side.upper()}")):
        parameter = changed.get_parameter(piece.name)
        noise = torch.randn(parameter.shape, dtype=torch.float64)
        parameter.data.index_add_(0, piece.indices, noise[piece.indices])
    after = rotated(changed, side)[layer]
    members = rotary.pairs(before.shape[-1])[pair]
    moved = torch.zeros(before.shape[1:], dtype=torch.bool)
    moved[head, members] = True
    assert ((after - before)[:, moved].norm(dim=-1) > 1e-3).all()
    if name in QK_NORMS:  # the norm after the projection sees the whole head, or all heads: the rest shrinks alike
        ratio = after / before
        alike = ~moved if name == "olmo2" else ~moved & (torch.arange(len(moved)) == head).unsqueeze(-1)
        of_token = ratio[:, alike]
        torch.testing.assert_close(of_token, of_token[:, :1].expand_as(of_token), rtol=1e-8, atol=0)
    else:
        assert torch.equal(after[:, ~moved], before[:, ~moved])


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_every_parameter_is_in_one_part_and_the_projections_tile_theirs(name):
    model = zoo.model(zoo.CONFIGS[name]())
    covered = {key: torch.zeros(p.shape, dtype=torch.int64) for key, p in model.named_parameters()}
    present = {part_of(model, key)[0] for key in covered} - {None}
    for part in (*ATTENTION, *present):
        for piece in pieces(model, Span(part=part)):
            ones = torch.ones_like(covered[piece.name])
            indices = torch.arange(ones.shape[piece.dim]) if piece.indices is None else piece.indices
            covered[piece.name].index_add_(piece.dim, indices, ones.index_select(piece.dim, indices))
    assert all((count == 1).all() for count in covered.values())


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_a_model_compared_with_itself_has_not_changed(name):
    model = zoo.model(zoo.CONFIGS[name]())
    frame = compare_spans(model, copy.deepcopy(model))
    zero = frame[~frame["metric"].str.endswith("cosine")]
    assert (zero["value"] == 0).all()
    cosine = frame[frame["metric"].str.endswith("cosine")]["value"].dropna()
    np.testing.assert_allclose(cosine, 1, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["llama", "phi3_partial", "gpt_neox", "glm", "cohere", "gemma", "phi"]),
    part=st.sampled_from(["W_Q", "W_K"]),
    place=st.tuples(*[st.integers(0, 99)] * 3),
    seed=st.integers(0, 99),
)
def test_a_planted_change_is_found_and_ranked_first(name, part, place, seed):
    before = zoo.model(zoo.CONFIGS[name]())
    spots = [one for one in projections_of(before) if one.part == part]
    one = spots[place[0] % len(spots)]
    head, pair = place[1] % len(one.index), place[2] % len(one.pairs)
    after = copy.deepcopy(before)
    torch.manual_seed(seed)
    for piece in pieces(after, Span(one.layer, head, pair, part)):
        parameter = after.get_parameter(piece.name)
        parameter.data[piece.indices] += 1e-3 * torch.randn_like(parameter)[piece.indices]
    frame = compare_spans(before, after)
    rows = frame[frame["pair"].notna() & (frame["metric"] == "rel_change")].sort_values("value", ascending=False)
    assert tuple(rows.iloc[0][["site", "head", "pair"]]) == (one.site, head, pair)
    assert rows.iloc[0]["value"] > 0
    assert (rows.iloc[1:]["value"] == 0).all()
    other_parts = frame[(frame["metric"] == "rel_change") & (frame["site"] != one.site)]
    assert (other_parts["value"] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_metrics_are_their_textbook_formulas(dtype):
    before, after = (zoo.model(hf.LlamaConfig(**zoo.SIZES), seed=seed).to(dtype) for seed in (0, 1))
    frame = compare_spans(before, after)
    tolerance = {"rtol": 1e-5 if dtype == torch.bfloat16 else 1e-12, "atol": 1e-7}
    layer, head, pair = 1, 3, 2
    w, v = (m.model.layers[layer].self_attn.q_proj.weight.detach().double().numpy() for m in (before, after))
    r, s = rope.rows_of_pair("half", head, pair, head_dim=8)
    x, y = w[[r, s]], v[[r, s]]
    at = {"site": "blocks.1.attn.W_Q", "head": head, "pair": pair}
    turn = math.atan2((x[0] * y[1] - x[1] * y[0]).sum(), (x * y).sum())
    back = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    heads = [slice(8 * h, 8 * h + 8) for h in range(4)]
    left, singular, _ = np.linalg.svd((v - w)[heads[head]])
    frequency = rotary_layers(after)[layer].inv_freq[pair].item()
    for metric, wanted in {
        "change_norm": np.linalg.norm(y - x),
        "rel_change": np.linalg.norm(y - x) / np.linalg.norm(x),
        "cosine": (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y),
        "norm_change": np.linalg.norm(y) / np.linalg.norm(x) - 1,
        "rotation_radians": turn,
        "rotation_tokens": turn / frequency,
        "unrotated_rel_change": np.linalg.norm(back @ y - x) / np.linalg.norm(x),
        "top_direction_share": left[r % 8, 0] ** 2 + left[s % 8, 0] ** 2,
    }.items():
        np.testing.assert_allclose(value(frame, metric, **at), wanted, err_msg=metric, **tolerance)
    of_head = {"site": "blocks.1.attn.W_Q", "head": head, "pair": None}
    assert value(frame, "top_singular_share", **of_head) == pytest.approx(
        singular[0] ** 2 / (singular**2).sum(), rel=1e-4
    )
    rank = (singular**2).sum() ** 2 / (singular**4).sum()
    assert value(frame, "participation_rank", **of_head) == pytest.approx(rank, rel=1e-4)
    for site, path in (("mlp", "mlp"), ("ln", "layernorm"), ("attn.W_O", "o_proj"), ("attn.W_V", "v_proj")):
        names = [n for n, _ in before.named_parameters() if n.startswith("model.layers.0.") and path in n]
        x, y = (torch.cat([m.get_parameter(n).detach().double().flatten() for n in names]) for m in (before, after))
        wanted = ((y - x).norm() / x.norm()).item()
        found = value(frame, "rel_change", site=f"blocks.0.{site}", head=None)
        np.testing.assert_allclose(found, wanted, err_msg=site, **tolerance)


def test_the_wavelengths_of_both_stand_beside_each_pair():
    before, after = (zoo.llama(rope_parameters={"rope_type": "default", "rope_theta": theta}) for theta in (100.0, 1e4))
    rows = compare_spans(before, after)
    rows = rows[rows["pair"] == 3]
    np.testing.assert_allclose(rows["wavelength"], 2 * math.pi * 100 ** (6 / 8), rtol=1e-6)
    np.testing.assert_allclose(rows["wavelength_after"], 2 * math.pi * 1e4 ** (6 / 8), rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(turn=st.floats(-3, 3), head=st.integers(0, 1), pair=st.integers(0, 7), side=st.sampled_from("qk"))
def test_a_turned_plane_is_told_and_is_a_shift_of_position(turn, head, pair, side):
    before = zoo.llama(**BIG).double()
    after = copy.deepcopy(before)
    turned_plane(after, 1, head, pair, f"W_{side.upper()}", turn)
    frame = compare_spans(before, after)
    at = {"site": f"blocks.1.attn.W_{side.upper()}", "head": head, "pair": pair}
    assert value(frame, "rotation_radians", **at) == pytest.approx(turn, abs=1e-9)
    assert value(frame, "unrotated_rel_change", **at) < 1e-6
    tokens = value(frame, "rotation_tokens", **at)
    ids = zoo.tokens(1, 12)
    plain = load_model(before)
    shift = PositionShift(side, tokens, layers=[1], heads=[head], pairs=[pair])
    with torch.no_grad(), plain.hooks(fwd_hooks=shift.hooks(plain)):
        shifted = plain(ids)
    with torch.no_grad(), promote_float32():
        torch.testing.assert_close(load_model(after)(ids), shifted, rtol=0, atol=1e-9)


def turned_plane(model, layer, head, pair, part, turn, scale=1.0):
    [piece] = pieces(model, Span(layer, head, pair, part))
    weight = model.get_parameter(piece.name)
    x, y = weight.data[piece.indices]
    weight.data[piece.indices] = scale * torch.stack(
        [math.cos(turn) * x - math.sin(turn) * y, math.sin(turn) * x + math.cos(turn) * y]
    )


@settings(max_examples=15, deadline=None)
@given(turn=st.floats(-3, 3), scale=st.floats(0.2, 5), pair=st.integers(0, 7))
def test_what_k_undoes_of_q_does_not_show_in_the_scores(turn, scale, pair):
    before = zoo.llama(**BIG).double()
    after = copy.deepcopy(before)
    turned_plane(after, 0, 1, pair, "W_Q", turn, scale)
    turned_plane(after, 0, 1, pair, "W_K", turn, 1 / scale)
    at = {"site": "blocks.0.attn.W_Q", "head": 1, "pair": pair}
    frame = compare_spans(before, after)
    assert value(frame, "qk_rel_change", **at) < 1e-6
    assert value(frame, "qk_rotation_radians", **at) == pytest.approx(0, abs=1e-9)
    ids = zoo.tokens(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(load_model(after)(ids), load_model(before)(ids), rtol=0, atol=1e-9)


def test_the_change_of_scores_is_that_of_the_outer_product():
    before, after = (zoo.model(hf.LlamaConfig(**zoo.SIZES), seed=seed).double() for seed in (0, 1))
    frame = compare_spans(before, after)

    def scores(model, head, pair):
        attention = model.model.layers[0].self_attn
        rows = [rope.rows_of_pair("half", h, pair, head_dim=8) for h in (head, head // 2)]
        q, k = (w.weight.detach()[list(r)] for w, r in zip((attention.q_proj, attention.k_proj), rows, strict=True))
        return torch.outer(torch.complex(*k).conj(), torch.complex(*q))

    for head, pair in ((0, 0), (3, 2)):
        x, y = scores(before, head, pair), scores(after, head, pair)
        at = {"site": "blocks.0.attn.W_Q", "head": head, "pair": pair}
        assert value(frame, "qk_rel_change", **at) == pytest.approx(((y - x).norm() / x.norm()).item(), rel=1e-9)
        turn = (x.conj() * y).sum().angle().item()
        assert value(frame, "qk_rotation_radians", **at) == pytest.approx(turn, abs=1e-9)


@pytest.mark.parametrize("name", [name for name in zoo.CONFIGS if name not in ("olmo", "olmo2")])
def test_gains_that_are_folded_into_the_weights_do_not_show_in_the_effective_ones(name):
    before = zoo.model(zoo.CONFIGS[name]()).double()
    architecture = architecture_of(before.config)
    for layer in range(len(before.base_model.layers)):
        norm = _norm(before, layer)
        norm.weight.data.normal_(1 - architecture.gain_offset, 0.3)
        if getattr(norm, "bias", None) is not None:
            norm.bias.data.normal_(0, 0.3)
    after = copy.deepcopy(before)
    for layer in range(len(after.base_model.layers)):
        norm, gain = _norm(after, layer), _norm(before, layer).weight.data + architecture.gain_offset
        others = {one.weight: one.bias for one in projections_of(after) if one.layer == layer and one.part != "W_O"}
        for weight, bias in others.items():
            matrix = after.get_parameter(weight)
            if getattr(norm, "bias", None) is not None:
                after.get_parameter(bias).data += matrix.data @ norm.bias.data
            matrix.data *= gain
        norm.weight.data.fill_(1 - architecture.gain_offset)
        if getattr(norm, "bias", None) is not None:
            norm.bias.data.zero_()
    for side in "qk":  # it is the same function
        for x, y in zip(rotated(before, side)[:1], rotated(after, side)[:1], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    frame = compare_spans(before, after)
    rows = frame[frame["pair"].notna()].set_index("metric")["value"]
    assert rows["effective_rel_change"].max() < 1e-12
    assert rows["rel_change"].min() > 0.05
    assert rows["effective_qk_rel_change"].max() < 1e-6


def _norm(model, layer):
    return model.base_model.layers[layer].get_submodule(architecture_of(model.config).attn_norm)


@pytest.mark.parametrize("name", QK_NORMS)
def test_the_norms_of_q_and_k_count_in_the_effective_weights(name):
    before = zoo.model(zoo.CONFIGS[name]())
    after = copy.deepcopy(before)
    architecture = architecture_of(before.config)
    attention = after.base_model.layers[1].get_submodule(architecture.attn)
    offset = architecture.gain_offset
    attention.q_norm.weight.data.copy_(2 * (attention.q_norm.weight.data + offset) - offset)
    frame = compare_spans(before, after)
    rows = frame[(frame["site"] == "blocks.1.attn.W_Q") & frame["pair"].notna()].set_index("metric")["value"]
    assert (rows["rel_change"] == 0).all()
    np.testing.assert_allclose(rows["effective_norm_change"], 1, rtol=1e-6)
    keys = frame[(frame["site"] == "blocks.1.attn.W_K") & (frame["metric"] == "effective_norm_change")]
    assert (keys["value"] == 0).all()


@pytest.fixture
def saved(tmp_path):
    def save(model, name, **options):
        model.save_pretrained(tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_checkpoints_in_shards_compare_as_models_in_memory(name, saved):
    before, after = (zoo.model(zoo.CONFIGS[name](), seed=seed) for seed in (0, 1))
    folders = [saved(model, str(i), max_shard_size="20KB") for i, model in enumerate((before, after))]
    assert len(list(folders[0].glob("*.safetensors"))) > 1
    on_disk, in_memory = compare_spans(*folders), compare_spans(before, after)
    columns = ["site", "layer", "head", "pair", "metric"]
    on_disk, in_memory = (frame.set_index(columns)["value"].sort_index() for frame in (on_disk, in_memory))
    assert on_disk.index.equals(in_memory.index)
    np.testing.assert_allclose(on_disk, in_memory, rtol=1e-12)


def test_the_folder_a_file_of_one_piece_and_a_model_are_taken_alike(saved):
    before, after = zoo.llama(), zoo.model(hf.LlamaConfig(**zoo.SIZES), seed=1)
    wanted = compare_spans(before, after)
    found = compare_spans(load_model(saved(before, "before")), str(saved(after, "after")))
    assert found.equals(wanted) or np.allclose(found["value"], wanted["value"], equal_nan=True)


def _llama(**changes):
    return zoo.model(hf.LlamaConfig(**{**zoo.SIZES, **changes}))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (lambda: zoo.model(zoo.CONFIGS["glm"]()), "model_type is llama before and glm after"),
        (lambda: _llama(num_attention_heads=2), "num_attention_heads is 4 before and 2 after"),
        (lambda: _llama(num_key_value_heads=4), "num_key_value_heads is 2 before and 4 after"),
        (lambda: _llama(hidden_size=64), "hidden_size is 32 before and 64 after"),
        (lambda: _llama(num_hidden_layers=3), "num_hidden_layers is 2 before and 3 after"),
        (lambda: _llama(head_dim=16), "head_dim is 8 before and 16 after"),
        (lambda: _llama(vocab_size=65), "vocab_size is 64 before and 65 after"),
        (lambda: _llama(attention_bias=True), "has no tensor 'model.layers.0.self_attn.k_proj.bias'"),
    ],
)
def test_models_of_different_shape_are_refused(other, told):
    with pytest.raises(InputError, match=told):
        compare_spans(_llama(), other())


def test_an_unknown_layout_is_refused():
    with pytest.raises(InputError, match="model type 'gpt2' is refused: no rotary frequencies"):
        compare_spans(*[hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))] * 2)


def _spoil_index(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


def _lose_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def _cut_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])


def _empty_shard(folder):
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"")


def _lose_tensor(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, shard)


def _lose_all(folder):
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()


def _edit(change):
    def edit(folder):
        where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        name = "model.layers.1.self_attn.q_proj.weight"
        tensors = load_file(folder / where[name])
        tensors[name] = change(tensors[name])
        save_file(tensors, folder / where[name])

    return edit


def _put(number):
    def put(weight):
        weight[3, 5] = number
        return weight

    return put


def _quantised_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))


def _no_config(folder):
    (folder / "config.json").write_text("{}")


SPOILED = {
    "index": (_spoil_index, "is no index of shards"),
    "lost shard": (_lose_shard, "lacks 'model-00002-of-.*', one of its"),
    "cut shard": (_cut_shard, "weight file 'model-00002-of-.*' of .* is corrupt"),
    "empty shard": (_empty_shard, "weight file 'model-00001-of-.*' of .* is corrupt"),
    "lost tensor": (_lose_tensor, "lacks the tensor .* that its index promises"),
    "no weights": (_lose_all, "has no model.safetensors and no model.safetensors.index.json"),
    "int8": (_edit(lambda w: w.to(torch.int8)), "'model.layers.1.self_attn.q_proj.weight' .* is stored as I8"),
    "float8": (_edit(lambda w: w.to(torch.float8_e4m3fn)), "is stored as F8_E4M3"),
    "other shape": (
        _edit(lambda w: w[:16].clone()),
        r"q_proj.weight of .*after' is \[16, 32\], but its config asks for \[32, 32\]",
    ),
    "NaN": (_edit(_put(math.nan)), "'model.layers.1.self_attn.q_proj.weight' of .*after.* holds values that are not"),
    "infinity": (_edit(_put(math.inf)), "'model.layers.1.self_attn.q_proj.weight' of .* not finite"),
    "quantised": (_quantised_config, "is quantised; give one in float32"),
    "no config": (_no_config, "cannot read the config of"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_checkpoint_is_refused_by_what_is_wrong_with_it(how, saved):
    spoil, told = SPOILED[how]
    folders = [saved(zoo.llama(), name, max_shard_size="20KB") for name in ("before", "after")]
    spoil(folders[1])
    with pytest.raises(InputError, match=told):
        compare_spans(*folders)


@pytest.mark.parametrize("change", ["num_hidden_layers", "num_key_value_heads"])
@pytest.mark.parametrize("more", [False, True])
def test_a_config_that_is_not_of_its_weights_is_refused(change, more, saved):
    folders = [saved(zoo.llama(), name) for name in ("before", "after")]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        config[change] += 1 if more else -1
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=r"lacks 'model.layers.2|is of layer 1, but the config has 1|asks for|no causal LM|must divide"
    ):
        compare_spans(*folders)


@pytest.mark.parametrize("lost", ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_weight_that_both_lack_is_missed(lost, saved):
    folders = [saved(zoo.llama(), name) for name in ("before", "after")]
    for folder in folders:
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(lost)
        save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"lacks '{lost}', or has it quantised"):
        compare_spans(*folders)


def test_a_head_that_is_stored_though_it_is_tied_counts_once(saved):
    model = zoo.llama(tie_word_embeddings=True)
    folders = [saved(model, name) for name in ("before", "after")]
    tensors = load_file(folders[1] / "model.safetensors")
    save_file(tensors | {"lm_head.weight": model.lm_head.weight.detach().clone()}, folders[1] / "model.safetensors")
    frame = compare_spans(*folders)
    assert "unembed.W_U" not in set(frame["site"])


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float64, torch.float16)])
def test_checkpoints_of_different_precision_are_compared_in_the_wider_one(dtypes):
    model = zoo.llama()
    frame = compare_spans(*(copy.deepcopy(model).to(dtype) for dtype in dtypes))
    rounding = frame[frame["metric"] == "rel_change"]["value"]
    assert 1e-5 < rounding.max() < 1e-2


@pytest.mark.parametrize("name", ["gpt_neox", "phi", "starcoder2_sliding"])
def test_biases_count_and_are_named_where_they_are_not_finite(name):
    before = zoo.model(zoo.CONFIGS[name]())
    for part in ("W_Q", "W_O"):
        one = next(one for one in projections_of(before) if one.part == part)
        after = copy.deepcopy(before)
        after.get_parameter(one.bias).data += 1
        frame = compare_spans(before, after)
        assert value(frame, "change_norm", site=one.site, head=None) > 1
        after.get_parameter(one.bias).data[0] = math.nan
        with pytest.raises(InputError, match=f"tensor '{one.bias}' of the .* model after holds values"):
            compare_spans(before, after)


def test_heads_of_an_odd_dimension_are_compared():
    config = hf.GPTNeoXConfig(**{**zoo.NEOX, "hidden_size": 27, "num_attention_heads": 3, "intermediate_size": 30})
    before, after = (zoo.model(config, seed=seed) for seed in (0, 1))
    frame = compare_spans(before, after)
    x, y = (m.gpt_neox.layers[0].attention.query_key_value.weight.detach().double() for m in (before, after))
    wanted = ((y[18:27] - x[18:27]).norm() / x[18:27].norm()).item()
    assert value(frame, "rel_change", site="blocks.0.attn.W_V", head=0) == pytest.approx(wanted, rel=1e-3)


def test_models_that_rotate_in_other_layers_or_dimensions_are_refused():
    layers = [hf.SmolLM3Config(**zoo.DEEPER, no_rope_layers=some) for some in ([1, 1, 1, 1], [1, 1, 1, 0])]
    with pytest.raises(InputError, match="layer 3 rotates 8 dimensions of a head before and 0 after"):
        compare_spans(*map(zoo.model, layers))
    with pytest.raises(InputError, match="layer 0 rotates 8 dimensions of a head before and 4 after"):
        compare_spans(*(zoo.model(zoo.CONFIGS[name]()) for name in ("phi3", "phi3_partial")))


def test_weights_in_memory_that_are_no_floats_are_refused():
    model = zoo.llama()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        model.model.layers[0].mlp.up_proj.weight.data.to(torch.int8), requires_grad=False
    )
    with pytest.raises(InputError, match=r"up_proj.weight' of the llama model before is stored as int8"):
        compare_spans(model, zoo.llama())


def test_nan_in_a_part_without_heads_is_named_too():
    spoiled = zoo.llama()
    spoiled.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match=r"'model.layers.1.mlp.up_proj.weight' of .* holds values that are not finite"):
        compare_spans(zoo.llama(), spoiled)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="no folder at"):
        compare_spans(tmp_path / "nothing", zoo.llama())
