import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as hf
from transformers import GenerationConfig

from rope_probe import (
    InputError,
    KeyValueStream,
    PositionShift,
    copy_deltas,
    load_model,
    pack,
    repeated_window,
    rope,
    trace,
)
from rope_probe.models import attention, checkpoints
from rope_probe.models.architectures import ARCHITECTURES
from rope_probe.models.parameters import query_key_value_rows
from rope_probe.windows.packing import Window
from tests import zoo

KERNELS = ["sdpa", "eager"]


def native(name, kernel):
    """Gemma 2 has no sdpa of its own in transformers: its soft cap needs eager, which the seam's sdpa must equal."""
    return "eager" if name == "gemma2" else kernel


def assert_parity(plain, tokens, kernel="sdpa"):
    """Hooked logits are transformers' own."""
    with torch.no_grad():
        expected = plain(tokens, use_cache=False).logits
        got = load_model(plain, attn=kernel)(tokens)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_the_zoo_has_every_known_architecture():
    assert {make().model_type for make in zoo.CONFIGS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_logits_equal_transformers_own(name, kernel):
    assert_parity(zoo.model(zoo.CONFIGS[name](), attn=native(name, kernel)), zoo.tokens(), kernel)


@pytest.mark.parametrize("name", ["mistral_sliding", "gemma2", "gemma3", "cohere2_nope_layer"])
def test_windows_longer_than_a_block_of_queries_equal_transformers_own(name):
    config = zoo.CONFIGS[name]()
    config.max_position_embeddings = 2048
    assert_parity(zoo.model(config, attn=native(name, "sdpa")), zoo.tokens(1, 1300))


@pytest.mark.parametrize("rope_type", zoo.ROPE_TYPES)
def test_logits_equal_transformers_own_for_every_rope_type(rope_type):
    assert_parity(zoo.llama(rope_parameters=zoo.ROPE_TYPES[rope_type]), zoo.tokens())


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_repeated_tokens_show_the_layout_and_the_frequencies(name):
    model = load_model(zoo.model(zoo.CONFIGS[name]()))
    _, cache = model.run_with_cache(repeated_window(7, 24))
    rotary = model.rotary[0]
    angles = torch.outer(torch.arange(24).double(), rotary.inv_freq).unsqueeze(1)
    for side in "qk":
        rotated = cache[f"blocks.0.attn.hook_rot_{side}"][0]
        torch.testing.assert_close(rope.rotate(rotated[:1], angles, rotary.layout), rotated, rtol=0, atol=1e-5)
        assert (rotated[1:] - rotated[:1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["smollm3_nope_layer", "cohere2_nope_layer"])
def test_layers_without_rope_are_known(name):
    model = load_model(zoo.model(zoo.CONFIGS[name]()))
    _, cache = model.run_with_cache(repeated_window(7, 24))
    for layer, rotary in enumerate(model.rotary):
        q = cache[f"blocks.{layer}.attn.hook_rot_q"][0]
        position_shows = (q - q[:1]).abs().max() > 1e-2
        assert position_shows == (rotary is not None)
    assert None in model.rotary


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "gpt_neox_sequential"])
def test_the_residual_stream_adds_up(name):
    model = load_model(zoo.model(zoo.CONFIGS[name]()))
    _, cache = model.run_with_cache(zoo.tokens())
    for layer in range(2):
        at = {site: cache[f"blocks.{layer}.hook_{site}"] for site in
              ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")}  # fmt: skip
        torch.testing.assert_close(at["resid_pre"] + at["attn_out"], at["resid_mid"], rtol=0, atol=1e-5)
        torch.testing.assert_close(at["resid_mid"] + at["mlp_out"], at["resid_post"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt_neox", "phi", "cohere"])
def test_parallel_blocks_add_up_without_a_middle(name):
    model = load_model(zoo.model(zoo.CONFIGS[name]()))
    _, cache = model.run_with_cache(zoo.tokens())
    total = sum(cache[f"blocks.0.hook_{site}"] for site in ("resid_pre", "attn_out", "mlp_out"))
    torch.testing.assert_close(total, cache["blocks.0.hook_resid_post"], rtol=0, atol=1e-5)
    assert "blocks.0.hook_resid_mid" not in model.hook_dict


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "gpt_neox", "phi"])
def test_the_head_is_its_projection_and_what_comes_after(name):
    model = load_model(zoo.model(zoo.CONFIGS[name]()))
    hidden = model.hidden(zoo.tokens())
    projected = model.original_model.get_output_embeddings()(hidden)
    assert torch.equal(model.after_projection(projected), model.unembed(hidden))
    assert torch.equal(model.unembed(hidden), model(zoo.tokens()))


def test_a_forward_that_someone_else_put_there_stays():
    model = load_model(zoo.llama())
    calls = []
    head = model.original_model.lm_head
    forward = head.forward
    head.forward = lambda x: calls.append(1) or forward(x)
    hidden = model.hidden(zoo.tokens())
    model.after_projection(model.unembed(hidden))
    model.unembed(hidden)
    assert len(calls) == 2


def test_hook_shapes_are_transformer_lens_ones():
    model = load_model(zoo.llama(), attn="eager")
    _, cache = model.run_with_cache(zoo.tokens(2, 30))
    shapes = {name: tuple(x.shape) for name, x in cache.items() if not name.startswith("blocks.1")}
    assert shapes == {
        "hook_embed": (2, 30, 32),
        "blocks.0.hook_resid_pre": (2, 30, 32),
        "blocks.0.attn.hook_rot_q": (2, 30, 4, 8),
        "blocks.0.attn.hook_rot_k": (2, 30, 2, 8),
        "blocks.0.attn.hook_v": (2, 30, 2, 8),
        "blocks.0.attn.hook_attn_scores": (2, 4, 30, 30),
        "blocks.0.attn.hook_pattern": (2, 4, 30, 30),
        "blocks.0.attn.hook_z": (2, 30, 4, 8),
        "blocks.0.hook_attn_out": (2, 30, 32),
        "blocks.0.hook_resid_mid": (2, 30, 32),
        "blocks.0.hook_mlp_out": (2, 30, 32),
        "blocks.0.hook_resid_post": (2, 30, 32),
        "ln_final.hook_out": (2, 30, 32),
    }


@pytest.mark.parametrize("site", ["hook_resid_pre", "hook_resid_mid", "hook_attn_out", "hook_mlp_out", "attn.hook_z",
                                  "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k"])  # fmt: skip
def test_what_a_hook_returns_is_what_the_model_goes_on_with(site):
    model = load_model(zoo.llama())
    tokens = zoo.tokens()
    clean = model(tokens)
    changed = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.{site}", lambda x, hook: x.flip(1))])
    assert (changed - clean).abs().max() > 1e-3
    assert torch.equal(model(tokens), clean)


def test_patterns_are_causal_and_sum_to_one():
    model = load_model(zoo.llama(), attn="eager")
    _, cache = model.run_with_cache(zoo.tokens())
    pattern = cache["blocks.0.attn.hook_pattern"]
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 30))
    assert pattern.triu(1).abs().max() == 0


def effective_mask(model, window, masked):
    """Which positions can influence which: the mask as the model sees it, read from gradients."""
    inputs = []

    def keep(x, hook):
        inputs.append(x.detach().requires_grad_())
        return inputs[0]

    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_v", keep)]):
        reads = []
        with model.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda x, hook: reads.append(x))]):
            model(window, masked=masked)
    rows = [torch.autograd.grad(z.sum(), inputs[0], retain_graph=True)[0][0].abs().sum((1, 2)) for z in reads[0][0]]
    return torch.stack(rows) > 0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "gemma2"])
def test_the_effective_mask_is_the_documents_and_the_window(name, kernel):
    model = load_model(zoo.model(zoo.CONFIGS[name]()), attn=kernel)
    documents = [zoo.tokens(1, n, seed=n)[0] for n in (10, 13, 10)]
    for positions in ("continuous", "reset", "skipped"):
        window = pack(documents, 33, positions=positions, target_window=100)
        distance = torch.arange(33).unsqueeze(1) - torch.arange(33)
        causal = (distance >= 0) & (distance < (33 if name == "llama" else 8))
        same = window.document_of.unsqueeze(1) == window.document_of
        assert torch.equal(effective_mask(model, window, masked=True), causal & same)
        assert torch.equal(effective_mask(model, window, masked=False), causal)


@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "gemma2", "gemma3"])
def test_kernels_agree_in_float64_on_masked_packs(name):
    plain = zoo.model(zoo.CONFIGS[name]()).double()
    window = pack([zoo.tokens(1, n, seed=n)[0] for n in (10, 13, 10, 4)], 37)
    with torch.no_grad():
        fused = load_model(plain, attn="sdpa")(window, masked=True, rows=2)
        eager = load_model(plain, attn="eager")(window, masked=True, rows=2)
    torch.testing.assert_close(fused, eager, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_a_document_alone_equals_itself_in_a_masked_pack_wherever_it_stands(name):
    model = load_model(zoo.model(zoo.CONFIGS[name]()).double())
    document, other, third = (zoo.tokens(1, n, seed=n)[0] for n in (12, 17, 9))
    with torch.no_grad():
        alone = model(document.unsqueeze(0))[0]
        first = model(pack([document, other, third], 38), masked=True)[0, :12]
        last = model(pack([other, third, document], 38), masked=True)[0, 26:]
        reset = model(pack([other, third, document], 38, positions="reset"), masked=True)[0, 26:]
    for placed in (first, last, reset):
        torch.testing.assert_close(placed, alone, rtol=0, atol=1e-10)


def test_unmasked_documents_see_each_other():
    model = load_model(zoo.llama())
    window = pack([zoo.tokens(1, 12)[0], zoo.tokens(1, 12, seed=1)[0]], 24)
    with torch.no_grad():
        assert (model(window)[0, 12:] - model(window, masked=True)[0, 12:]).abs().max() > 1e-2


@pytest.mark.parametrize("scheme", ["reset", "skipped"])
def test_position_schemes_rotate_but_never_mask(scheme):
    model = load_model(zoo.llama().double())
    window = pack([zoo.tokens(1, 12)[0], zoo.tokens(1, 12, seed=1)[0]], 24, positions=scheme, target_window=60)
    _, cache = model.run_with_cache(window)
    plain = Window(window.tokens, window.cu_seqlens, torch.arange(24).unsqueeze(0))
    _, continuous = model.run_with_cache(plain)
    rotary = model.rotary[0]
    moved = (window.position_ids - plain.position_ids)[0].double()
    expected = rope.rotate(continuous["blocks.0.attn.hook_rot_q"][0], torch.outer(moved, rotary.inv_freq).unsqueeze(1))
    torch.testing.assert_close(cache["blocks.0.attn.hook_rot_q"][0], expected, rtol=0, atol=1e-10)


def test_float64_is_float64_throughout():
    model = load_model(zoo.llama().double())
    window = repeated_window(zoo.tokens(1, 10)[0], 3)
    seen = {name: x.dtype for name, x in model.run_with_cache(window)[1].items()}
    assert set(seen.values()) == {torch.float64}
    _, cache = model.run_with_cache(repeated_window(7, 24))
    rotated, rotary = cache["blocks.0.attn.hook_rot_q"][0], model.rotary[0]
    angles = torch.outer(torch.arange(24).double(), rotary.inv_freq).unsqueeze(1)
    torch.testing.assert_close(rope.rotate(rotated[:1], angles), rotated, rtol=0, atol=1e-13)


def test_double_makes_a_control_and_leaves_the_model_as_it_was():
    model = load_model(zoo.llama())
    tokens = zoo.tokens()
    before = model(tokens)
    control = model.double()
    assert (model.dtype, control.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(control(tokens).float(), before, rtol=0, atol=1e-4)
    assert torch.equal(model(tokens), before)
    changed = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_rot_q", lambda x, hook: x.flip(1))])
    assert not torch.equal(changed, before)


def test_release_gives_the_plain_model_back():
    plain = zoo.llama()
    tokens = zoo.tokens()
    expected = plain(tokens, use_cache=False).logits
    model = load_model(plain)
    assert model.release() is plain
    assert plain.config._attn_implementation == "sdpa"
    assert torch.equal(plain(tokens, use_cache=False).logits, expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
    with pytest.raises(InputError, match="released"):
        model(tokens)


def test_a_newer_wrapper_takes_over_and_the_older_one_says_so():
    plain = zoo.llama()
    older = load_model(plain)
    load_model(plain, attn="eager")
    with pytest.raises(InputError, match="newer"):
        older(zoo.tokens())


def test_a_saved_model_does_not_know_that_it_was_hooked(tmp_path):
    plain = zoo.llama()
    load_model(plain)
    plain.save_pretrained(tmp_path)
    assert "rope_probe" not in (tmp_path / "config.json").read_text()
    reloaded = load_model(tmp_path)
    assert torch.equal(reloaded(zoo.tokens()), load_model(plain)(zoo.tokens()))


def test_an_exception_in_a_hook_leaves_no_hook_and_no_mask_behind():
    model = load_model(zoo.llama())
    window = pack([zoo.tokens(1, 12)[0], zoo.tokens(1, 12, seed=1)[0]], 24)
    clean = model(window)

    def fail(x, hook):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        model.run_with_hooks(window, masked=True, fwd_hooks=[("blocks.1.attn.hook_rot_k", fail)])
    assert torch.equal(model(window), clean)


def test_gradients_flow_through_masked_packs():
    model = load_model(zoo.llama().double())
    window = pack([zoo.tokens(1, 12)[0], zoo.tokens(1, 7, seed=1)[0], zoo.tokens(1, 12, seed=2)[0]], 31)
    weight = model.original_model.model.layers[0].self_attn.q_proj.weight
    grads = []
    for kernel in KERNELS:
        model = load_model(model.original_model, attn=kernel)
        model(window, masked=True).square().mean().backward()
        grads.append(weight.grad.clone())
        weight.grad = None
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4), "gpt2"),
        (lambda: hf.DogeConfig(**zoo.SIZES), "doge.*mask"),
        (lambda: hf.HunYuanDenseV1Config(**zoo.SIZES, head_dim=8), r"hunyuan.*not rotations of each other.*misses by"),
    ],
)
def test_models_without_rope_or_of_an_unknown_form_are_refused(make, named):
    with pytest.raises(InputError, match=named):
        load_model(hf.AutoModelForCausalLM.from_config(make()))


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_frequencies_that_would_change_with_the_input_are_refused(rope_type):
    model = load_model(zoo.llama(rope_parameters=zoo.ROPE_TYPES[rope_type]))
    limit = {"longrope": 64, "dynamic": 128}[rope_type]
    model(zoo.tokens(1, limit))
    with pytest.raises(InputError, match=f"at most {limit} tokens"):
        model(zoo.tokens(1, limit + 1))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m: m(torch.tensor([[1, 64]])), "token id 64"),
        (lambda m: m(torch.tensor([[-1, 4]])), "token id -1"),
        (lambda m: m(zoo.tokens(), masked=True), "Window"),
        (lambda m: m(zoo.tokens()[None]), "batch, positions"),
        (lambda m: load_model(m.original_model, attn="quantum"), "quantum"),
    ],
)
def test_bad_calls_are_refused_by_name(call, named):
    with pytest.raises(InputError, match=named):
        call(load_model(zoo.llama()))


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_frequencies_do_not_remember_a_long_input(rope_type):
    plain = zoo.llama(rope_parameters=zoo.ROPE_TYPES[rope_type])
    fresh = load_model(copy.deepcopy(plain))
    plain(zoo.tokens(1, 200), use_cache=False)
    model = load_model(plain)
    assert torch.equal(model.rotary[0].inv_freq, fresh.rotary[0].inv_freq)
    assert torch.equal(model(zoo.tokens()), fresh(zoo.tokens()))


def test_casting_a_model_in_memory_keeps_its_frequencies(tmp_path):
    plain = zoo.llama()
    plain.to(torch.bfloat16).save_pretrained(tmp_path)
    by_path = load_model(tmp_path, dtype=torch.bfloat16)
    in_memory = load_model(zoo.llama(), dtype=torch.bfloat16)
    assert torch.equal(by_path.rotary[0].inv_freq, in_memory.rotary[0].inv_freq)
    assert torch.equal(by_path(zoo.tokens(1, 100)), in_memory(zoo.tokens(1, 100)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_checkpointing_keeps_the_mask(kernel):
    window = pack([zoo.tokens(1, 12)[0], zoo.tokens(1, 7, seed=1)[0]], 19)
    grads = []
    for checkpointing in (False, True):
        plain = zoo.llama()
        model = load_model(plain, attn=kernel)
        plain.train()
        if checkpointing:
            plain.gradient_checkpointing_enable({"use_reentrant": False})
        model(window, masked=True).square().mean().backward()
        grads.append(plain.model.layers[0].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-6)
    assert grads[0].abs().max() > 1e-2


def test_releasing_an_older_wrapper_leaves_the_newer_one():
    plain = zoo.llama()
    older = load_model(plain)
    newer = load_model(plain)
    older.release()
    older.release()
    newer(zoo.tokens())
    with pytest.raises(InputError, match="newer"):
        older.double()


def test_frequencies_that_are_no_numbers_are_refused():
    plain = zoo.llama()
    plain.model.rotary_emb.inv_freq.fill_(float("inf"))
    with pytest.raises(InputError, match="rope_theta"):
        load_model(plain)


def test_padding_cannot_slip_through_the_seam():
    plain = load_model(zoo.llama()).original_model
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :4] = 0
    with pytest.raises(InputError, match="padding"):
        plain(zoo.tokens(), attention_mask=mask, use_cache=False)


def reference_flash(
    query, key, value, mask, *, query_length, softmax_scale, sliding_window, attn_implementation, **kwargs
):
    """What a varlen flash kernel promises, in a few lines: [B, T, H, D] in and out, documents by cu_seq_lens."""
    assert attn_implementation == "flash_attention_2"
    assert (mask, kwargs["is_causal"]) == (None, True)
    bounds = kwargs.get("cu_seq_lens_q", torch.tensor([0, query_length])).tolist()
    place = torch.arange(query_length)
    reach = place.unsqueeze(1) - place
    document = torch.bucketize(place, torch.tensor(bounds[1:]), right=True)
    seen = (reach >= 0) & (document.unsqueeze(1) == document) & (reach < (sliding_window or query_length))
    groups = query.shape[2] // key.shape[2]
    q, k, v = query.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(groups, 1) for x in (key, value))
    z = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=softmax_scale)
    return z.transpose(1, 2)


@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "gpt_neox"])
def test_flash_kernels_are_told_what_they_must_know(name, monkeypatch):
    monkeypatch.setattr(attention, "_flash_attention_forward", reference_flash)
    monkeypatch.setattr(attention, "_require_flash", lambda model, kernel: None)
    window = pack([zoo.tokens(1, n, seed=n)[0] for n in (10, 13, 10, 4)], 37, positions="reset")
    plain = zoo.model(zoo.CONFIGS[name]()).double()
    expected = [load_model(plain)(window, masked=masked, rows=2) for masked in (False, True)]
    model = load_model(plain, attn="flash_attention_2")
    for masked in (False, True):
        torch.testing.assert_close(model(window, masked=masked, rows=2), expected[masked], rtol=0, atol=1e-10)
    assert model.double().attn == "sdpa"


def test_flash_kernels_refuse_float32():
    with pytest.raises(InputError, match="float32"):
        load_model(zoo.llama(), attn="flash_attention_2")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3"])
def test_flash_kernels_agree_with_sdpa(kernel):
    config = hf.LlamaConfig(**{**zoo.SIZES, "hidden_size": 128, "head_dim": 32})
    plain = zoo.model(config).to("cuda", torch.bfloat16)
    stream = KeyValueStream(16, (2, 4), keys=20, values=20)
    window = pack(list(stream.documents(4, seed=0)), 64)
    reference = load_model(copy.deepcopy(plain))
    try:
        model = load_model(plain, attn=kernel)
    except InputError as error:
        pytest.skip(str(error))
    for masked in (False, True):
        torch.testing.assert_close(model(window, masked=masked), reference(window, masked=masked), rtol=0, atol=0.1)


@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "gemma2", "gpt_neox", "qwen3_moe", "phi3_partial"])
def test_greedy_writes_what_generate_writes_with_hooks_and_without(name):
    plain = zoo.model(zoo.CONFIGS[name]())
    prompt = zoo.tokens(1)[0]
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = plain.generate(prompt.unsqueeze(0), generation_config=config)[0, len(prompt) :]
    model = load_model(plain)
    plain.generation_config.repetition_penalty = 9.0  # a checkpoint's own; greedy is greedy
    before = model(prompt.unsqueeze(0))
    assert torch.equal(model.greedy(prompt, 12), expected)
    assert torch.equal(model(prompt.unsqueeze(0)), before)
    reads = []
    with model.hooks([("blocks.0.attn.hook_rot_q", lambda x, hook: reads.append(x.shape[1]))]):
        assert torch.equal(model.greedy(prompt, 12), expected)
    assert reads == list(range(30, 42))


def test_greedy_stops_before_its_stop_and_hooks_change_it():
    model = load_model(zoo.llama())
    prompt = zoo.tokens(1)[0]
    written = model.greedy(prompt, 8)
    at = written.tolist().index(written[5])
    assert torch.equal(model.greedy(prompt, 8, stop=int(written[5])), written[:at])
    with model.hooks([("ln_final.hook_out", lambda x, hook: -x)]):
        assert not torch.equal(model.greedy(prompt, 8), written)
    with pytest.raises(InputError, match="64"):
        model.greedy(torch.tensor([64]), 2)


def test_a_model_is_hooked_again_after_greedy_fails(monkeypatch):
    model = load_model(zoo.llama())
    prompt = zoo.tokens(1)[0]
    before = model(prompt.unsqueeze(0))
    with monkeypatch.context() as patch:
        patch.setattr(model.original_model, "forward", None)
        with pytest.raises(TypeError):
            model.greedy(prompt, 2)
    assert torch.equal(model(prompt.unsqueeze(0)), before)


@pytest.mark.parametrize("name", zoo.CONFIGS)
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_without_its_rows_a_projection_is_zero_and_the_others_are_as_they_were(name, part):
    model = load_model(zoo.model(zoo.CONFIGS[name]()))
    for parameter_name, parameter in model.original_model.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data.zero_()
    tokens = torch.arange(12).unsqueeze(0)
    sites = {"q": "hook_rot_q", "k": "hook_rot_k", "v": "hook_v"}
    names = {key: f"blocks.0.attn.{site}" for key, site in sites.items()}
    before = model.run_with_cache(tokens, names_filter=list(names.values()))[1]
    projection = query_key_value_rows(model.original_model, 0)[part]
    projection.weight.data[projection.rows] = 0
    after = model.run_with_cache(tokens, names_filter=list(names.values()))[1]
    for key, site in names.items():
        if key == part:
            assert before[site].abs().max() > 0
            assert after[site].abs().max() == 0
        else:
            assert torch.equal(before[site], after[site])


@pytest.mark.parametrize("positions", ["continuous", "reset"])
@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "gpt_neox"])
def test_a_batch_reads_as_its_windows_and_masked_as_its_documents(name, positions):
    model = load_model(zoo.model(zoo.CONFIGS[name]()))
    batch = KeyValueStream(8, (1, 4), keys=20, values=20).batch(3, 24, seed=0).placed(positions)
    with torch.no_grad():
        if positions == "continuous":
            torch.testing.assert_close(model(batch), model(batch.tokens), rtol=0, atol=1e-5)
        else:
            assert (model(batch) - model(batch.tokens)).abs().max() > 1e-4
        masked = model.unembed(model.hidden(batch, masked=True))
        alone = model(batch.tokens.reshape(9, 8)).reshape(masked.shape)
    torch.testing.assert_close(masked, alone, rtol=0, atol=1e-5)


def test_hooks_that_are_gone_when_gradient_checkpointing_computes_again_are_refused():
    plain = zoo.llama()
    model = load_model(plain)
    plain.train()
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    doubled = [("blocks.0.attn.hook_rot_q", lambda x, hook: 2 * x)]
    lost = model.run_with_hooks(zoo.tokens(), fwd_hooks=doubled).sum()
    with pytest.raises(InputError, match="where the hooks are still attached"):
        lost.backward()
    plain.zero_grad()
    with model.hooks(fwd_hooks=doubled):
        model(zoo.tokens()).sum().backward()
    ours = plain.model.layers[0].self_attn.q_proj.weight.grad.clone()
    plain.gradient_checkpointing_disable()
    plain.zero_grad()
    model.run_with_hooks(zoo.tokens(), fwd_hooks=doubled).sum().backward()
    torch.testing.assert_close(ours, plain.model.layers[0].self_attn.q_proj.weight.grad, rtol=0, atol=1e-6)


def test_a_model_in_train_mode_is_measured_in_eval_and_put_back():
    plain = zoo.llama(attention_dropout=0.5)
    model, window = load_model(plain), repeated_window([5, 6, 7, 8], 4)
    shift = PositionShift("q", 2.0)
    wanted = trace(model, window, shift)
    plain.train()
    plain.model.layers[0].mlp.eval()
    modes = [module.training for module in plain.modules()]
    assert trace(model, window, shift).equals(wanted)
    assert copy_deltas(model, window).equals(copy_deltas(model, window))
    assert [module.training for module in plain.modules()] == modes


def test_attention_that_was_set_elsewhere_is_refused_by_a_trace():
    plain = zoo.llama()
    model = load_model(plain)
    plain.set_attn_implementation("eager")
    with pytest.raises(InputError, match="set_attn_implementation"):
        trace(model, repeated_window([5, 6], 4), PositionShift("q", 2.0))
    assert model.release().config._attn_implementation == "eager"
    assert len(trace(load_model(plain), repeated_window([5, 6], 4), PositionShift("q", 2.0)))


def count_hooks(plain):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in plain.modules())


def test_a_second_wrapper_inherits_no_hooks_and_piles_up_none():
    plain, heard = zoo.llama(), []
    load_model(plain).add_hook("blocks.0.hook_resid_post", lambda x, hook: heard.append(hook.name))
    once = count_hooks(plain)
    for _ in range(3):
        model = load_model(plain)
    model(zoo.tokens())
    assert heard == []
    assert count_hooks(plain) == once
    model.release()
    assert count_hooks(plain) == 0


@pytest.mark.parametrize("owner_is_alive", [True, False])
def test_copies_of_a_hooked_model_carry_no_hooks(owner_is_alive):
    plain, heard = zoo.llama(), []
    model = load_model(plain)
    model.add_hook("blocks.0.hook_resid_post", lambda x, hook: heard.append(threading.Lock()))  # cannot be copied
    wanted = model(zoo.tokens())
    if not owner_is_alive:
        del model
    heard.clear()
    copied = checkpoints.with_rope(plain, plain.config.rope_parameters["rope_theta"])
    assert torch.equal(copied(zoo.tokens()).logits, wanted)
    assert (heard, count_hooks(copied)) == ([], 0)
    assert not hasattr(copied.model.layers[0].self_attn, "rope_probe_seam")


def test_threads_that_share_a_model_take_turns():
    model, window = load_model(zoo.llama()), repeated_window([5, 6, 7, 8], 8)
    shifts = [PositionShift("q", tokens) for tokens in (1.0, 4.0, 16.0)]
    wanted = [trace(model, window, shift) for shift in shifts]
    doubled = [("blocks.0.hook_resid_post", lambda x, hook: 2 * x)]
    wanted_doubled = model.run_with_hooks(window, fwd_hooks=doubled)

    def work(number):
        if number % 4 == 3:
            return torch.equal(model.run_with_hooks(window, fwd_hooks=doubled), wanted_doubled)
        return trace(model, window, shifts[number % 4]).equals(wanted[number % 4])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(48)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_are_no_floats_are_refused_in_memory(dtype):
    plain = zoo.llama()
    projection = plain.model.layers[0].mlp.up_proj
    projection.weight = torch.nn.Parameter(projection.weight.data.to(dtype), requires_grad=False)
    with pytest.raises(InputError, match=r"up_proj\.weight is torch\."):
        load_model(plain)
