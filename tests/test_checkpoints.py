import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rope_probe import InputError, load_model
from rope_probe.models import checkpoints
from tests import zoo


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "sharded"
    zoo.llama().save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def checkpoint(sharded, tmp_path):
    return shutil.copytree(sharded, tmp_path / "checkpoint")


def shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[1]


def test_what_is_saved_is_what_is_loaded(tmp_path):
    model = zoo.llama()
    loaded = checkpoints.load(checkpoints.save(model, tmp_path / "one"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert not list(tmp_path.glob("*.bin"))
    assert not list(tmp_path.glob(".*"))


def test_saving_replaces_a_checkpoint_and_nothing_else(tmp_path):
    checkpoints.save(zoo.llama(), tmp_path / "one")
    other = zoo.model(zoo.CONFIGS["llama"](), seed=1)
    checkpoints.save(other, tmp_path / "one")
    assert torch.equal(checkpoints.load(tmp_path / "one").lm_head.weight, other.lm_head.weight)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not replaced"):
        checkpoints.save(other, tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = zoo.llama()
    checkpoints.save(model, tmp_path / "one")

    def disk_full(folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(model, "save_pretrained", disk_full)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save(model, tmp_path / "one")
    assert torch.equal(checkpoints.load(tmp_path / "one").lm_head.weight, model.lm_head.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_loading_keeps_the_dtype_unless_told(tmp_path):
    checkpoints.save(zoo.llama().to(torch.bfloat16), tmp_path / "one")
    assert checkpoints.load(tmp_path / "one").dtype == torch.bfloat16
    assert load_model(tmp_path / "one", dtype=torch.float64).dtype == torch.float64
    assert not load_model(tmp_path / "one").original_model.training


def test_building_is_a_pure_function_of_the_seed():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = (checkpoints.build(zoo.CONFIGS["llama"](), seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_switching_theta_changes_the_rotation_and_nothing_else():
    model = zoo.llama()
    switched = checkpoints.with_rope(model, 500.0)
    assert model.config.rope_parameters["rope_theta"] == 1e4
    assert switched.config.rope_parameters["rope_theta"] == 500.0
    torch.testing.assert_close(switched.model.rotary_emb.inv_freq, 500.0 ** -(torch.arange(4) / 4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), switched.parameters(), strict=True))
    tokens = zoo.tokens()
    assert not torch.allclose(model(tokens).logits, switched(tokens).logits)
    back = checkpoints.with_rope(switched, model.config.rope_parameters)
    assert torch.equal(model(tokens).logits, back(tokens).logits)


def test_a_switched_theta_survives_saving(tmp_path):
    switched = checkpoints.with_rope(zoo.llama(), zoo.ROPE_TYPES["yarn"])
    loaded = checkpoints.load(checkpoints.save(switched, tmp_path / "one"))
    assert torch.equal(loaded.model.rotary_emb.inv_freq, switched.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("theta", [0.0, -1.0, float("nan"), float("inf")])
def test_a_theta_that_cannot_be_is_refused(theta):
    with pytest.raises(InputError, match="rope_theta"):
        checkpoints.with_rope(zoo.llama(), theta)


def test_rope_parameters_per_layer_type_are_refused():
    with pytest.raises(InputError, match="per layer type"):
        checkpoints.with_rope(zoo.model(zoo.CONFIGS["gemma3"]()), 500.0)


def test_a_missing_shard_is_named(checkpoint):
    gone = shard(checkpoint)
    gone.unlink()
    with pytest.raises(InputError, match=gone.name):
        checkpoints.load(checkpoint)


def test_a_corrupt_shard_is_refused(checkpoint):
    torn = shard(checkpoint)
    torn.write_bytes(torn.read_bytes()[:-200])
    with pytest.raises(InputError, match="corrupt"):
        checkpoints.load(checkpoint)


def test_a_missing_weight_is_named(checkpoint):
    thin = shard(checkpoint)
    tensors = load_file(thin)
    name = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != name}, thin, metadata={"format": "pt"})
    with pytest.raises(InputError, match=name):
        checkpoints.load(checkpoint)


def test_a_weight_of_the_wrong_shape_is_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 50}))
    with pytest.raises(
        InputError, match=r"mlp\.down_proj\.weight .* is \[32, 48\], but its config asks for \[32, 50\]"
    ):
        checkpoints.load(checkpoint)


@pytest.mark.parametrize("changes", [
    {"hidden_size": "32"}, {"head_dim": 7}, {"num_attention_heads": 0}, {"num_hidden_layers": 0}, {"vocab_size": 0},
    {"dtype": "zorp"}, {"rope_parameters": {"rope_type": "default", "rope_theta": "abc"}}, {"model_type": "nonsense"},
    {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, {"quantization_config": {"quant_method": "gptq"}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
], ids=str)  # fmt: skip
def test_configs_that_make_no_sense_are_refused(checkpoint, changes):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputError):
        load_model(checkpoint)


@pytest.mark.parametrize("text", ["null", "{", "[]", ""])
def test_a_config_that_is_none_is_refused(checkpoint, text):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(InputError, match="cannot read the config"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("name", "told"),
    [("/nowhere/at/all", "no folder"), ("no such folder", "no folder"), ("tiny/absent-model", "tiny/absent-model")],
)
def test_what_is_not_there_is_named(name, told):
    with pytest.raises(InputError, match=told):
        checkpoints.load(name)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read the config"):
        checkpoints.load(tmp_path)


def test_a_dtype_that_the_device_cannot_do_is_refused(sharded):
    with pytest.raises(InputError, match="float8"):
        checkpoints.load(sharded, dtype=torch.float8_e4m3fn)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused(sharded):
    with pytest.raises(InputError, match="cuda"):
        load_model(sharded, device="cuda")


def test_a_model_without_one_rotary_module_is_told_when_its_theta_is_to_change():
    model = zoo.llama()
    model.model.layers[0].self_attn.rotary_emb = model.model.rotary_emb
    del model.model.rotary_emb
    with pytest.raises(InputError, match="llama has no one rotary_emb beside its layers"):
        checkpoints.with_rope(model, 1000.0)
