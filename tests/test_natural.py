"""Windows of natural text: cut at whole tokens, repeated or packed, with BOS where the tokenizer has it."""

from itertools import chain

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from rope_probe import InputError
from rope_probe.windows.natural import read_text, text_window

BOS = 0
WORDS = [f"word{i}" for i in range(200)]
TEXT = " ".join(WORDS)
"""Of as many tokens as words, each another one, with the ids 2, 3, ..."""


def word_tokenizer(begins_with_bos):
    """A token for each word; one that adds BOS in front, and EOS behind, or nothing."""
    ids = {"<s>": BOS, "</s>": 1, **{word: i for i, word in enumerate(WORDS, 2)}}
    inner = Tokenizer(WordLevel(ids, unk_token="</s>"))
    inner.pre_tokenizer = Whitespace()
    if begins_with_bos:
        inner.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def plain():
    return word_tokenizer(begins_with_bos=False)


@pytest.fixture(scope="module")
def with_bos():
    return word_tokenizer(begins_with_bos=True)


def documents_of(window, length):
    assert window.cu_seqlens.diff().unique().tolist() == [length]
    return window.tokens.view(-1, length).tolist()


def test_a_repeated_document_is_a_piece_of_the_text_again_and_again(plain):
    first, *others = documents_of(text_window(plain, 40, document_length=8, text=TEXT), 8)
    assert len(others) == 4
    assert all(other == first for other in others)
    assert first == list(range(first[0], first[0] + 8))


def test_packed_documents_follow_one_another_in_the_text(plain):
    documents = documents_of(text_window(plain, 40, document_length=8, text=TEXT, packed=True), 8)
    flat = list(chain(*documents))
    assert flat == list(range(flat[0], flat[0] + 40))


@pytest.mark.parametrize("packed", [False, True])
def test_every_document_begins_with_bos_where_the_tokenizer_adds_one(with_bos, packed):
    documents = documents_of(text_window(with_bos, 40, document_length=8, text=TEXT, packed=packed), 8)
    inner = [document[1:] for document in documents]
    assert [document[0] for document in documents] == [BOS] * 5
    assert all(token > 1 for document in inner for token in document)  # and no EOS
    flat = list(chain(*inner)) if packed else inner[0]
    assert flat == list(range(flat[0], flat[0] + len(flat)))


def test_a_tokenizer_that_has_bos_and_does_not_add_it_gets_none(plain):
    assert plain.bos_token_id == BOS
    assert BOS not in text_window(plain, 40, document_length=8, text=TEXT).tokens


def test_documents_are_whole_tokens_of_the_whole_text(plain):
    """The text is tokenised before it is cut, so no word is torn, wherever a cut falls."""
    whole = plain(TEXT, add_special_tokens=False).input_ids
    for seed in range(20):
        document = documents_of(text_window(plain, 7, document_length=7, text=TEXT, seed=seed), 7)[0]
        assert any(whole[start : start + 7] == document for start in range(len(whole)))


def test_a_seed_draws_one_place_and_others_draw_others(plain):
    def starts(seed):
        return text_window(plain, 16, document_length=8, text=TEXT, seed=seed).tokens[0, 0].item()

    assert starts(3) == starts(3)
    drawn = {starts(seed) for seed in range(40)}
    assert len(drawn) > 20
    assert min(drawn) < 40
    assert max(drawn) > 160


def test_the_last_token_of_the_text_can_be_reached(plain):
    """A text of just as many tokens as are needed is read whole."""
    window = text_window(plain, 20, document_length=5, text=" ".join(WORDS[:20]), packed=True, seed=5)
    assert window.tokens.flatten().tolist() == list(range(2, 22))


def test_by_default_it_is_one_of_the_embedded_texts_that_the_seed_draws():
    tokenizer = ByT5Tokenizer(extra_ids=0)
    texts = [tokenizer.decode(text_window(tokenizer, 90, document_length=90, seed=seed).tokens[0]) for seed in range(3)]
    assert len(set(texts)) == 3
    assert all(sum(character.isalpha() for character in text) > 40 for text in texts)


def test_embedded_texts_are_joined_where_no_single_one_is_long_enough():
    tokenizer = ByT5Tokenizer(extra_ids=0)
    window = text_window(tokenizer, 90_000, document_length=90, packed=True)
    assert len(window) == 90_000
    assert window.documents == 1000


def test_lengths_that_documents_do_not_fill_are_refused(plain, with_bos):
    for tokenizer, length, document_length, named in (
        (plain, 40, 7, "window of 40 tokens must hold whole documents of 1 tokens or more, but they have 7"),
        (plain, 4, 8, "window of 4 tokens .* they have 8"),
        (plain, 40, 0, "they have 0"),
        (with_bos, 40, 1, "whole documents of 2 tokens or more, but they have 1"),
    ):
        with pytest.raises(InputError, match=named):
            text_window(tokenizer, length, document_length=document_length, text=TEXT)


@pytest.mark.parametrize("text", ["", " \n", "word1 word2 word3"])
def test_a_text_that_is_too_short_is_refused(plain, text):
    with pytest.raises(InputError, match=f"must have 8 tokens or more, but it has {len(text.split())}"):
        text_window(plain, 40, document_length=8, text=text)
    with pytest.raises(InputError, match="must have 40 tokens or more"):
        text_window(plain, 40, document_length=8, text=text, packed=True)


def test_files_that_are_no_text_are_refused(tmp_path):
    contents = {"latin.txt": b"caf\xe9 au lait", "picture.png": b"\x89PNG\r\n", "zeros.bin": b"text\0text"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}' is no text: ") as refusal:
            read_text(tmp_path / name)
        assert "\n" not in str(refusal.value)
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(InputError, match="cannot read the text"):
            read_text(path)


def test_a_file_of_text_is_read_as_utf8(tmp_path):
    (tmp_path / "text.txt").write_bytes("Bär\n".encode())
    assert read_text(tmp_path / "text.txt") == "Bär\n"
