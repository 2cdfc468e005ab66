"""What users of TransformerLens write, on a HookedCausalLM."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rope_probe import (
    Batch,
    InputError,
    PositionShift,
    copy_deltas,
    drift,
    head_scores,
    load_model,
    pair_contributions,
    repeated_window,
    trace,
)
from tests import zoo

TEXT = "w5 w9 w7 w8 w5 w9"


def word_tokenizer(bos):
    """A word for every token id, "w5" for 5; BOS is 1 and EOS 2."""
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing("w1 $A w2", special_tokens=[("w1", 1), ("w2", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="w1", eos_token="w2")


def reader(bos=True):
    model = load_model(zoo.llama())
    model.tokenizer = word_tokenizer(bos)
    return model


def test_a_cache_goes_by_short_names():
    model = reader()
    _, cache = model.run_with_cache(TEXT)
    assert cache["resid_post", 1] is cache["blocks.1.hook_resid_post"]
    assert cache["rot_q", 0] is cache["blocks.0.attn.hook_rot_q"]
    assert cache["embed"] is cache["hook_embed"]
    assert set(cache) == set(model.hook_dict)
    with pytest.raises(InputError, match=r"'blocks.9.hook_resid_post' was not cached; did you mean 'blocks.\d.hook_re"):
        cache["resid_post", 9]
    with pytest.raises(InputError, match="names no activation"):
        cache[7]
    _, part = model.run_with_cache(TEXT, names_filter="blocks.1.hook_resid_post")
    assert list(part) == ["blocks.1.hook_resid_post"]
    with pytest.raises(InputError, match="was not cached"):
        part["resid_post", 0]


@pytest.mark.parametrize("use", [
    lambda model, name: model.run_with_hooks(TEXT, fwd_hooks=[(name, lambda x, hook: x)]),
    lambda model, name: model.run_with_cache(TEXT, names_filter=name),
    lambda model, name: model.run_with_cache(TEXT, names_filter=[name]),
    lambda model, name: model.add_hook(name, lambda x, hook: x),
], ids=["run_with_hooks", "run_with_cache", "list", "add_hook"])  # fmt: skip
def test_a_misspelt_hook_point_is_refused_with_the_nearest_one(use):
    model = reader()
    with pytest.raises(
        InputError, match=r"'blocks.0.hook_resid_pots' is unknown; did you mean 'blocks.0.hook_resid_pos"
    ):
        use(model, "blocks.0.hook_resid_pots")
    for name in ("blocks.1.attn.hook_pattern", "blocks.0.attn.hook_attn_scores"):
        with pytest.raises(InputError, match="attn='eager'"):
            use(model, name)
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def test_filters_of_names_hold_as_in_transformer_lens():
    model, heard = reader(), []
    model.run_with_hooks(TEXT, fwd_hooks=[(lambda name: "resid_mid" in name, lambda x, hook: heard.append(hook.name))])
    assert heard == ["blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid"]
    _, cache = model.run_with_cache(TEXT, names_filter=lambda name: name.endswith("hook_z"))
    assert list(cache) == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    eager = load_model(zoo.llama(), attn="eager")
    assert eager.run_with_cache(torch.tensor([[3, 4, 5]]))[1]["pattern", 1].shape == (1, 4, 3, 3)


def test_text_becomes_tokens_with_bos_as_the_tokenizer_has_it():
    assert reader(bos=True).to_tokens("w5 w9").tolist() == [[1, 5, 9]]
    assert reader(bos=False).to_tokens("w5 w9").tolist() == [[5, 9]]
    assert reader(bos=True).to_tokens("w5 w9", prepend_bos=False).tolist() == [[5, 9]]
    assert reader(bos=False).to_tokens("w5 w9", prepend_bos=True).tolist() == [[1, 5, 9]]
    assert reader().to_string(torch.tensor([[1, 5, 9]])) == "w1 w5 w9"
    with pytest.raises(InputError, match="no tokens"):
        reader(bos=False).to_tokens("")
    with pytest.raises(InputError, match=r"set model\.tokenizer"):
        load_model(zoo.llama()).to_tokens("w5")


def test_text_and_token_ids_are_read_where_a_window_is():
    model = reader()
    ids = model.to_tokens(TEXT)
    window = model.as_window(TEXT)
    assert (window.tokens.tolist(), window.cu_seqlens.tolist()) == (ids.tolist(), [0, ids.shape[1]])
    assert model.as_window(window) is window
    shift = PositionShift("q", 3.0)
    wanted = trace(model, window, shift)
    for given in (TEXT, ids, ids[0], ids[0].tolist()):
        assert torch.equal(model.as_window(given).tokens, window.tokens)
        assert trace(model, given, shift)["value"].equals(wanted["value"])
    for given in (TEXT, ids, ids[0]):
        assert torch.equal(model(given), model(window))
        shifted = model.run_with_hooks(given, fwd_hooks=shift.hooks(model, given))
        assert torch.equal(shifted, model.run_with_hooks(window, fwd_hooks=shift.hooks(model, window)))
    assert model.double().to_tokens(TEXT).tolist() == ids.tolist()
    for given in (ids.expand(2, -1), ids[:, :0], ids.float(), torch.tensor(5)):
        with pytest.raises(InputError, match="token ids must be"):
            model.as_window(given)
    for given in (ids[None], ids[:, :0]):
        with pytest.raises(InputError, match="tokens must be"):
            model(given)
    with pytest.raises(InputError, match="tokenizer"):
        trace(load_model(zoo.llama()), TEXT, shift)


@pytest.mark.parametrize("measure", [head_scores, pair_contributions, lambda *given: drift(given[0], *given)],
                         ids=["head_scores", "pair_contributions", "drift"])  # fmt: skip
def test_heads_pairs_and_drift_are_measured_on_text_and_token_ids(measure):
    model = reader()
    ids = model.to_tokens(TEXT)
    wanted = measure(model, model.as_window(TEXT))
    for given in (TEXT, ids, ids[0]):
        assert measure(model, given).equals(wanted)
    with pytest.raises(InputError, match="token ids must be"):
        measure(model, ids.expand(2, -1))
    with pytest.raises(InputError, match="tokenizer"):
        measure(load_model(zoo.llama()), TEXT)


def test_drift_is_measured_on_several_texts_and_a_batch_is_refused():
    model = reader()
    texts = [TEXT, "w5 w6 w7"]
    windows = [model.as_window(text) for text in texts]
    assert drift(model, model, texts).equals(drift(model, model, windows))
    with pytest.raises(InputError, match="a Batch holds several"):
        drift(model, model, Batch.continuous(torch.full((2, 6), 5), torch.tensor([0, 6, 12])))


def test_copies_are_compared_in_a_window_of_them_and_one_text_is_refused():
    model = reader()
    assert not copy_deltas(model, repeated_window(model.to_tokens(TEXT)[0], 2)).empty
    for given in (TEXT, model.to_tokens(TEXT)):
        with pytest.raises(InputError, match=r"one length; make one with repeated_window\(token_ids, copies\)"):
            copy_deltas(model, given)


def test_generated_text_is_transformers_own_greedy_one():
    model = reader()
    ids = model.to_tokens(TEXT)
    plain = zoo.llama()
    with torch.no_grad():
        wanted = plain.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    got = model.generate(ids, 8, stop_at_eos=False)
    assert torch.equal(got, wanted)
    assert torch.equal(model.generate(ids[0], 8, stop_at_eos=False), wanted)
    assert torch.equal(model.generate(TEXT, 8, stop_at_eos=False, return_type="tokens"), wanted)
    written = [f"w{i}" for i in wanted[0, ids.shape[1] :].tolist()]
    assert model.generate(TEXT, 8, stop_at_eos=False) == " ".join([TEXT, *written])
    assert model.generate(ids, 8, stop_at_eos=False, return_type="str") == " ".join(["w1", TEXT, *written])
    model.tokenizer.eos_token = written[3]
    assert model.generate(TEXT, 8) == " ".join([TEXT, *written[: written.index(written[3])]])
    for wrong in ({"max_new_tokens": 0}, {"return_type": "list"}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            model.generate(TEXT, **wrong)


def test_a_window_of_documents_stays_what_it_is():
    window = repeated_window([5, 6, 7], 3)
    assert torch.equal(reader()(window), load_model(zoo.llama())(window))
