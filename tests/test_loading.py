"""Loading what people have: GGUF files, adapters, offloaded and dispatched models, quantised ones, text parts."""

import collections
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import accelerate
import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from accelerate.utils.offload import OffloadedWeightsLoader
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from rope_probe import (
    InputError,
    PositionShift,
    cli,
    compare_spans,
    copy_deltas,
    head_scores,
    load_model,
    repeated_window,
    trace,
    transplant_spans,
)
from rope_probe.models import checkpoints, gguf_files, offloaded
from tests import zoo

WINDOW = repeated_window(range(3, 13), copies=3)
SHIFTS = [
    PositionShift("q", 4.0),
    PositionShift("q", 2.0, layers=1),
    PositionShift("k", 2.0, positions=range(20, 30)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoint") / "llama"
    zoo.llama().save_pretrained(place)
    return place


@pytest.fixture
def dispatched(folder):
    return load_model(folder, device_map="disk")


# GGUF


def write_gguf(file, model):
    """A tiny Llama as llama.cpp stores it: rows of q and k in pairs side by side, in 8-bit blocks where they fit."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, config.vocab_size))])
    writer.add_token_scores([0.0] * config.vocab_size)
    names = {
        "model.embed_tokens.": "token_embd.",
        "model.norm.": "output_norm.",
        "lm_head.": "output.",
        "model.layers.": "blk.",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
    }
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                by_half = values.reshape(heads, 2, -1, values.shape[1])
                values = np.ascontiguousarray(by_half.swapaxes(1, 2)).reshape(values.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        fits = values.ndim == 2 and values.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if fits else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file, zoo.llama(bos_token_id=1))
    return file


def test_a_gguf_file_is_a_plain_model(gguf_file, tmp_path):
    model = zoo.llama()
    loaded = load_model(gguf_file)
    assert loaded.dtype == torch.float32
    for name, weight in model.named_parameters():  # blocks of 32 weights share a scale: 127 steps to the largest
        step = weight.abs().max() / 127
        assert (loaded.original_model.get_parameter(name) - weight).abs().max() <= step
    tokens = zoo.tokens()
    assert (loaded(tokens) - load_model(model)(tokens)).abs().max() < 1.0
    plain = loaded.release()
    saved = checkpoints.save(plain, tmp_path / "saved")
    assert torch.equal(checkpoints.load(saved)(tokens).logits, plain(tokens).logits)
    assert load_model(gguf_file, dtype=torch.float64).dtype == torch.float64


def test_spans_are_compared_with_a_gguf_file(gguf_file, folder):
    frame = compare_spans(folder, gguf_file)
    changed = frame[(frame["metric"] == "rel_change") & frame["head"].isna()]["value"]
    assert 0 < changed.max() < 0.02


def test_the_fast_reader_reads_what_gguf_reads(gguf_file):
    fast, plain = gguf_files._Reader(gguf_file), gguf.GGUFReader(gguf_file)
    assert list(fast.fields) == list(plain.fields)
    for name, field in plain.fields.items():
        mine = fast.fields[name]
        assert (mine.types, mine.data, len(mine.parts)) == (field.types, field.data, len(field.parts))
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(mine.parts, field.parts, strict=True))
    for mine, theirs in zip(fast.tensors, plain.tensors, strict=True):
        assert mine.name == theirs.name
        assert np.array_equal(mine.data, theirs.data)


@pytest.mark.parametrize("kept", [0, 3, 20, 400, -1])
def test_a_truncated_gguf_file_is_told_in_a_line(gguf_file, tmp_path, kept):
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(gguf_file.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"torn\.gguf.*(truncated|empty|no GGUF)"):
        load_model(torn)
    with pytest.raises(InputError, match=r"torn\.gguf"):
        checkpoints.load_tokenizer(torn)


def test_a_gguf_path_where_nothing_is_says_so():
    with pytest.raises(InputError, match=r"no file at 'nowhere\.gguf'"):
        load_model("nowhere.gguf")


def test_a_folder_of_gguf_files_says_which_to_give(gguf_file):
    with pytest.raises(InputError, match=r"holds GGUF files; give one of them: .*tiny\.gguf"):
        load_model(gguf_file.parent)


# Offloaded and dispatched


def counted_reads(monkeypatch):
    """How often each weight is read from the disk."""
    read = collections.Counter()
    get = OffloadedWeightsLoader.__getitem__

    def counting(loader, name):
        read[name] += 1
        return get(loader, name)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counting)
    return read


@pytest.mark.parametrize("users_hooks", [False, True], ids=["", "hooks of the user's own"])
def test_a_trace_of_an_offloaded_model_reads_each_weight_once(folder, dispatched, users_hooks, monkeypatch):
    plain = load_model(folder)
    read = counted_reads(monkeypatch)
    frames = []
    for model in (plain, dispatched):
        if users_hooks:
            model.add_hook("blocks.0.hook_resid_post", lambda x, hook: 0.9 * x)
        frames.append(trace(model, WINDOW, SHIFTS))
    assert (frames[0]["value"] == frames[1]["value"]).all()
    final_norm = read.pop("model.norm.weight")
    assert final_norm <= 2  # once in the clean pass, once for all perturbed ones
    assert set(read) == set(plain.original_model.state_dict()) - {"model.norm.weight"}
    assert set(read.values()) == {1}
    assert all(weight.is_meta for weight in dispatched.original_model.parameters())


def test_weights_on_disk_are_converted_when_they_are_fetched_not_written_anew(tmp_path):
    """A checkpoint in bfloat16 that is computed in float32."""
    for name, tied in (("apart", False), ("tied", True)):
        zoo.llama(tie_word_embeddings=tied).bfloat16().save_pretrained(tmp_path / name)
        dispatched = load_model(tmp_path / name, device_map="disk", dtype=torch.float32)
        plain = load_model(tmp_path / name, dtype=torch.float32)
        assert dispatched.dtype == torch.float32
        assert torch.equal(dispatched(zoo.tokens()), plain(zoo.tokens()))
        assert (trace(dispatched, WINDOW, SHIFTS)["value"] == trace(plain, WINDOW, SHIFTS)["value"]).all()
        assert list(Path(dispatched.original_model.rope_probe_offload_folder.name).glob("*.dat")) == []
        in_memory = load_model(tmp_path / name, device_map="cpu", dtype=torch.float64)
        assert torch.equal(in_memory(zoo.tokens()), plain.double()(zoo.tokens()))
        head, embedding = in_memory.original_model.lm_head, in_memory.original_model.model.embed_tokens
        assert (head.weight is embedding.weight) == tied


def test_more_perturbations_than_fit_beside_each_other_still_read_once(dispatched, monkeypatch):
    read = collections.Counter()
    get = OffloadedWeightsLoader.__getitem__
    monkeypatch.setattr(
        OffloadedWeightsLoader, "__getitem__", lambda self, name: read.update([name]) or get(self, name)
    )
    monkeypatch.setattr("rope_probe.tracing.propagation._STATE_ELEMENTS", 1)
    trace(dispatched, WINDOW, SHIFTS)
    assert read["model.layers.1.mlp.up_proj.weight"] == 1


def test_offloaded_weights_are_given_back_when_a_trace_fails(dispatched):
    def fails(*_):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        trace(dispatched, WINDOW, SHIFTS, progress=fails)
    assert all(weight.is_meta for weight in dispatched.original_model.parameters())
    trace(dispatched, WINDOW, SHIFTS)


def test_an_offloaded_model_is_a_model_like_any_other(folder, dispatched):
    plain, tokens = load_model(folder), zoo.tokens()
    assert dispatched.device == torch.device("cpu")
    assert torch.equal(dispatched(tokens), plain(tokens))
    assert torch.equal(dispatched.greedy(tokens[0], 4), plain.greedy(tokens[0], 4))


@pytest.mark.parametrize("how", ["disk", "cpu"])
def test_a_model_that_accelerate_dispatched_is_wrapped_where_it_is(how, tmp_path):
    model, expected = zoo.llama(), load_model(zoo.llama())
    if how == "disk":
        accelerate.disk_offload(model, tmp_path / "offload")
    else:
        accelerate.cpu_offload(model)
    hooked = load_model(model)
    assert torch.equal(hooked(zoo.tokens()), expected(zoo.tokens()))
    frame = trace(hooked, WINDOW, SHIFTS)
    assert (frame["value"] == trace(expected, WINDOW, SHIFTS)["value"]).all()


def test_what_a_dispatched_model_cannot_do_is_told_in_a_line(dispatched, folder):
    with pytest.raises(InputError, match=r"float64 copy .* dispatched .*--no-control"):
        trace(dispatched, WINDOW, SHIFTS, control=True)
    plain = dispatched.release()
    with pytest.raises(InputError, match=r"stays in torch\.float32"):
        load_model(plain, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="stays where it is"):
        load_model(plain, device="cpu")
    with pytest.raises(InputError, match="comparing weights"):
        compare_spans(folder, plain)
    with pytest.raises(InputError, match="give one of them"):
        load_model(folder, device_map="auto", device="cpu")
    with pytest.raises(InputError, match="zorp"):
        load_model(folder, device_map="zorp")
    with pytest.raises(InputError, match="revision says how a checkpoint is loaded"):
        load_model(zoo.llama(), revision="main")


def test_a_device_map_of_one_device_is_a_plain_model(folder):
    model = load_model(folder, device_map="cpu")
    assert not offloaded.is_dispatched(model.original_model)
    assert torch.equal(model(zoo.tokens()), load_model(folder)(zoo.tokens()))
    assert model.double().dtype == torch.float64


def test_tied_embeddings_on_disk_are_one_weight(tmp_path):
    zoo.llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    disk, plain = load_model(tmp_path / "tied", device_map="disk"), load_model(tmp_path / "tied")
    assert (trace(disk, WINDOW, SHIFTS)["value"] == trace(plain, WINDOW, SHIFTS)["value"]).all()
    assert all(weight.is_meta for weight in disk.original_model.parameters())


def test_a_model_on_disk_is_its_own_control_in_float64(folder, dispatched):
    disk = load_model(folder, device_map="disk", dtype=torch.float64)
    plain = load_model(folder)
    assert torch.equal(disk(zoo.tokens()), plain.double()(zoo.tokens()))
    frame = trace(dispatched, WINDOW, SHIFTS, control=disk)
    assert (frame["value_float64"] == trace(plain, WINDOW, SHIFTS, control=True)["value_float64"]).all()


# Quantised


def test_a_quantised_checkpoint_without_its_kernels_is_told_in_a_line(folder):
    with pytest.raises(InputError, match="quantised, which needs its own package"):
        load_model(folder, quantization_config=hf.BitsAndBytesConfig(load_in_4bit=True))


def test_an_fp8_checkpoint_is_read_as_its_kernels_allow(folder, tmp_path):
    """Blocks of float8 with a scale each; without a device for them transformers makes them plain again."""
    model = zoo.llama()
    config = hf.FineGrainedFP8Config(weight_block_size=(16, 16))
    tensors = {}
    for name, weight in model.state_dict().items():
        if "_proj" not in name:
            tensors[name] = weight
            continue
        scale = weight.abs().max() / 448
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        blocks = [-(-size // 16) for size in weight.shape]
        tensors[name.replace("weight", "weight_scale_inv")] = torch.full(blocks, scale.item())
    checkpoint = tmp_path / "fp8"
    shutil.copytree(folder, checkpoint)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    model.config.quantization_config = config.to_dict()
    model.config.save_pretrained(checkpoint)
    loaded = load_model(checkpoint)
    for name, weight in loaded.original_model.named_parameters():
        scale = tensors.get(name.replace("weight", "weight_scale_inv"), torch.ones(1)).flatten()[0]
        torch.testing.assert_close(weight, tensors[name].float() * scale)
    assert trace(loaded, WINDOW, SHIFTS)["value"].max() > 0
    with pytest.raises(InputError, match="quantised"):
        compare_spans(folder, checkpoint)


class Int8Linear(nn.Module):
    """Rows of int8 with a scale each, made float where they are multiplied, as kernels of quantised models do."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = nn.Parameter(weight.abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def dequantised(self):
        return self.weight * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dequantised())


def quantised_and_plain():
    """A Llama with int8 layers, marked as transformers marks one it quantised, and the same weights in float32."""
    quantised, plain = zoo.llama(), zoo.llama()
    for name, linear in plain.model.named_modules():
        if isinstance(linear, nn.Linear):
            layer = Int8Linear(linear)
            quantised.model.set_submodule(name, layer)
            linear.weight.data = layer.dequantised().detach()
    quantised.is_quantized, quantised.quantization_method = True, "int8"
    return quantised, plain


def test_a_quantised_model_is_traced_as_the_weights_its_kernels_read():
    quantised, plain = map(load_model, quantised_and_plain())
    assert quantised.dtype == torch.float32
    assert torch.equal(quantised(zoo.tokens()), plain(zoo.tokens()))
    for masked in (False, True):
        frames = [trace(model, WINDOW, SHIFTS, masked=masked, control=False) for model in (quantised, plain)]
        assert frames[0].equals(frames[1])
        assert frames[0]["value"].max() > 0
    assert head_scores(quantised, WINDOW).equals(head_scores(plain, WINDOW))
    controlled = [trace(model, WINDOW, SHIFTS, control=plain.double()) for model in (quantised, plain)]
    assert controlled[0].equals(controlled[1])


def test_what_a_quantised_model_cannot_do_is_told_in_a_line(adapter):
    model, plain = quantised_and_plain()
    quantised = load_model(model)
    for run in (trace, lambda *given, **options: copy_deltas(*given[:2], **options)):
        with pytest.raises(InputError, match=r"quantised model has no float64 copy; .*--no-control"):
            run(quantised, WINDOW, SHIFTS, control=True)
    with pytest.raises(InputError, match=r"stays in torch\.float32"):
        load_model(model, dtype=torch.float64)
    for pair in ((plain, quantised), (model, plain)):
        with pytest.raises(InputError, match="comparing weights needs plain weights, but this llama model is quantis"):
            compare_spans(*pair)
        with pytest.raises(InputError, match="transplant of spans needs plain weights, but this llama model is quanti"):
            transplant_spans(*pair, [(0, None, None)])
    with pytest.raises(InputError, match="merging an adapter needs plain weights"):
        load_model(model, adapter=adapter)


# Adapters


def adapter_for(model, place, seed=0, **options):
    """A LoRA whose change is not nothing."""
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    adapted.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return adapter_for(zoo.llama(), tmp_path_factory.mktemp("adapter") / "lora", lora_alpha=6)


def test_an_adapter_is_merged_into_plain_weights(folder, adapter, tmp_path):
    base = checkpoints.load(folder)
    model = load_model(folder, adapter=adapter)
    low_rank = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    down, up = (low_rank[f"{prefix}.lora_{side}.weight"] for side in "AB")
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = base.get_parameter(name) + 6 / 2 * (up @ down)
    torch.testing.assert_close(model.original_model.get_parameter(name), expected, rtol=0, atol=1e-6)
    assert set(model.original_model.state_dict()) == set(base.state_dict())
    in_memory = load_model(base, adapter=adapter)
    assert torch.equal(in_memory(zoo.tokens()), model(zoo.tokens()))
    saved = checkpoints.save(model.release(), tmp_path / "merged")
    assert torch.equal(load_model(saved)(zoo.tokens()), in_memory(zoo.tokens()))


def test_an_adapter_is_what_a_checkpoint_became(folder, adapter, tmp_path):
    frame = compare_spans(folder, adapter)
    changed = frame[(frame["metric"] == "rel_change") & frame["head"].isna()].set_index("site")["value"]
    assert changed["blocks.0.attn.W_Q"] > 0
    assert changed["blocks.0.attn.W_K"] == 0
    merged = checkpoints.load(folder, adapter=adapter)
    same = compare_spans(folder, checkpoints.save(merged, tmp_path / "merged"))
    np.testing.assert_allclose(frame["value"], same["value"], rtol=1e-6, atol=1e-9)
    everything = transplant_spans(folder, adapter, [(0, None, None), (1, None, None)])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(everything.get_parameter(name), merged.get_parameter(name))


def test_an_adapter_for_another_model_is_refused(folder, adapter, tmp_path):
    wider = zoo.llama(hidden_size=64)
    deeper = adapter_for(zoo.llama(num_hidden_layers=3), tmp_path / "deeper")
    for model, of_another in ((wider, adapter), (zoo.llama(), deeper), (zoo.model(zoo.CONFIGS["gpt_neox"]()), adapter)):
        with pytest.raises(InputError, match=r"adapter .* (does not fit|is of another model)"):
            load_model(model, adapter=of_another)
    first = r"q_proj\.lora_A\.default\.weight is \[2, 32\] in the adapter, but the model asks for \[2, 64\]$"
    with pytest.raises(InputError, match=first):
        load_model(wider, adapter=adapter)
    with pytest.raises(InputError, match=r"this llama model has no place for its .*layers\.2\..*lora_A"):
        load_model(zoo.llama(), adapter=deeper)
    with pytest.raises(InputError, match="is an adapter, not a model"):
        load_model(adapter)
    with pytest.raises(InputError, match=r"no adapter at .* it has no adapter_config\.json"):
        load_model(folder, adapter=folder)


def test_an_adapter_that_is_no_change_of_weights_is_refused(folder, tmp_path):
    prompts = get_peft_model(zoo.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    prompts.save_pretrained(tmp_path / "prompts")
    with pytest.raises(InputError, match="PROMPT_TUNING, which cannot be merged"):
        load_model(folder, adapter=tmp_path / "prompts")


# Text parts, and constants that are rounded to a dtype


def test_of_a_multimodal_checkpoint_the_text_part_is_loaded(tmp_path):
    text = zoo.CONFIGS["gemma3"]()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = hf.Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    whole = hf.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    loaded = load_model(tmp_path / "whole")
    assert loaded.config.model_type == "gemma3_text"
    tokens = zoo.tokens()
    expected = whole(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(loaded(tokens), expected, rtol=0, atol=1e-5)
    with pytest.raises(InputError):
        compare_spans(tmp_path / "whole", tmp_path / "whole")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hf.Qwen2VLConfig, "of type 'qwen2_vl_text', of which transformers has no causal LM; .* such as a qwen2 one"),
        (hf.Qwen3VLConfig, "of type 'qwen3_vl_text', of which transformers has no causal LM; .* such as a qwen3 one"),
        (hf.T5Config, "of type 't5', of which transformers has no causal LM; give a checkpoint that reads .* alone$"),
    ],
)
def test_a_type_without_a_causal_lm_is_refused_by_its_name(config, message, tmp_path):
    config().save_pretrained(tmp_path)
    for read in (load_model, checkpoints.read_config):
        with pytest.raises(InputError, match=message):
            read(tmp_path)


def test_configs_whose_entries_differ_between_layers_are_read(tmp_path):
    """Gemma 4 has other heads in global layers, and Gemma 3n a width of the MLP for each layer."""
    for config in (hf.Gemma4TextConfig(attention_k_eq_v=True, num_global_key_value_heads=2), hf.Gemma3nTextConfig()):
        config.save_pretrained(tmp_path)
        assert type(checkpoints.read_config(tmp_path)) is type(config)
    config.intermediate_size[3] = 0
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"intermediate_size .* but it is 0"):
        checkpoints.read_config(tmp_path)


def test_float64_is_the_same_however_it_is_come_by(tmp_path):
    """Gemma 3 rounds the scale of its embeddings to the dtype it is made in: 5.656854... to 2.4e-7 in float32."""
    model = zoo.model(zoo.CONFIGS["gemma3"]())
    model.save_pretrained(tmp_path / "gemma")
    tokens = zoo.tokens()
    loaded = load_model(tmp_path / "gemma", dtype=torch.float64)(tokens)
    assert torch.equal(load_model(tmp_path / "gemma").double()(tokens), loaded)
    assert torch.equal(load_model(model, dtype=torch.float64)(tokens), loaded)


# The command line


def refusal(capsys, *arguments):
    """The one line on stderr of a command that exits with code 2."""
    argv, sys.argv = sys.argv, ["rope-probe", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = argv
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    return err


def test_bad_checkpoints_are_refused_in_a_line_and_exit_code_2(gguf_file, folder, adapter, tmp_path, capsys):
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(gguf_file.read_bytes()[:-100])
    out = ("--out", tmp_path / "run")
    assert "is truncated" in refusal(capsys, "trace", torn, *out)
    assert "no file at" in refusal(capsys, "trace", tmp_path / "absent.gguf", *out)
    other = tmp_path / "other"
    zoo.llama(hidden_size=64).save_pretrained(other)
    assert "does not fit" in refusal(capsys, "spans", other, adapter, *out)
    assert "does not fit" in refusal(capsys, "trace", other, "--adapter", adapter, *out)
    quantised = shutil.copytree(folder, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    assert "quantised" in refusal(capsys, "trace", quantised, *out)
    assert "--no-control" in refusal(capsys, "trace", folder, "--device-map", "disk", *out)
    assert not (tmp_path / "run").exists()


def test_a_model_on_disk_is_traced_from_the_command_line(folder, tmp_path, capsys):
    argv = ["rope-probe", "trace", folder, "--out", tmp_path / "run", "--device-map", "disk", "--no-control"]
    options = ["--window", "20", "--document-length", "10", "--shift", "2", "--side", "q"]
    with patch.object(sys, "argv", list(map(str, argv + options))), pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert list(manifest["models"][str(folder)]["files_sha256"]) == ["model.safetensors"]


def test_an_offload_that_fills_the_disk_is_told_in_a_line(tmp_path):
    """Experts are stored one by one and run as one tensor, so they are written anew, where files have a limit here."""
    mixture = tmp_path / "mixture"
    zoo.model(zoo.CONFIGS["mixtral"]()).save_pretrained(mixture)
    assert torch.equal(load_model(mixture, device_map="disk")(zoo.tokens()), load_model(mixture)(zoo.tokens()))
    script = (
        "import resource, signal; from rope_probe import load_model, InputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"try: load_model({str(mixture)!r}, device_map='disk')\n"
        "except InputError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith("cannot offload")
    assert "no room in" in done.stdout
    assert "rope_probe_offload_" in done.stdout
    assert "set TMPDIR to a place with room" in done.stdout
    assert done.stdout.count("\n") == 1
