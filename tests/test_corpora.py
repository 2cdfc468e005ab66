from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rope_probe import Batch, InputError, KeyValueStream, TextCorpus
from rope_probe.windows import embedded_text


def test_streams_are_a_pure_function_of_seed_and_index():
    stream = KeyValueStream(64, distinct=(4, 16))
    first = stream.documents(8, seed=1, index=3)
    stream.documents(8, seed=1, index=2)
    assert torch.equal(first, stream.documents(8, seed=1, index=3))
    assert not torch.equal(first, stream.documents(8, seed=1, index=4))
    assert not torch.equal(first, stream.documents(8, seed=2, index=3))
    assert torch.equal(stream.batch(2, 256, seed=1, index=3).tokens.reshape(8, 64), first)


@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 100))
def test_streams_bind_each_key_of_a_document_to_one_value(low, spread, seed):
    stream = KeyValueStream(48, distinct=(low, low + spread), keys=64, values=32)
    for document in stream.documents(4, seed=seed).tolist():
        keys, values = document[0::2], document[1::2]
        assert all(4 <= key < 68 for key in keys)
        assert all(stream.first_value <= value < stream.vocab_size for value in values)
        bound = dict(zip(keys, values, strict=True))
        assert [bound[key] for key in keys] == values
        assert len(bound) <= low + spread


def test_disjoint_documents_share_no_key():
    stream = KeyValueStream(64, distinct=(4, 16), disjoint=True)
    for window in stream.batch(3, 1024, seed=0).tokens.tolist():
        owners = {}
        for place, key in enumerate(window[0::2]):
            assert owners.setdefault(key, place // 32) == place // 32
    assert torch.equal(stream.batch(3, 1024, seed=0).tokens, stream.batch(3, 1024, seed=0).tokens)
    with pytest.raises(InputError, match="at most 12 keys"):
        KeyValueStream(64, distinct=(4, 16), keys=200, disjoint=True).batch(1, 1024, seed=0)


def test_distinct_keys_are_log_uniform():
    stream = KeyValueStream(512, distinct=(4, 16))
    seen = np.array([len(set(d[0::2])) for d in stream.documents(4000, seed=0).tolist()])
    assert (seen.min(), seen.max()) == (4, 16)
    assert np.log(seen).mean() == pytest.approx(np.log([4, 16]).mean(), abs=0.02)


def test_the_text_python_carries_needs_nothing_else():
    corpus = TextCorpus(longest=64)
    batch = corpus.batch(4, 256, seed=1, index=2)
    assert corpus.vocab_size == 259
    assert torch.equal(batch.tokens, TextCorpus(longest=64).batch(4, 256, seed=1, index=2).tokens)
    assert not torch.equal(batch.tokens, corpus.batch(4, 256, seed=1, index=3).tokens)
    assert not torch.equal(batch.tokens, corpus.batch(4, 256, seed=2, index=2).tokens)
    assert batch.cu_seqlens.diff().max() <= 64
    text = "\n".join(embedded_text.documents())
    for document in batch.tokens.flatten().tensor_split(batch.cu_seqlens[1:-1].long())[:5]:
        assert corpus.loaded_tokenizer.decode(document, skip_special_tokens=True) in text


@pytest.fixture
def files(tmp_path):
    for name, words in (("a", "the cat sat on the mat " * 5), ("b", "ein Hund"), ("c", "zwölf " * 30)):
        (tmp_path / name).write_text(words)
    return tuple(str(tmp_path / name) for name in "abc")


def tokenizer_in(folder, *, eos):
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2, "sat": 3, "</s>": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", eos_token="</s>" if eos else None
    ).save_pretrained(folder)
    return str(folder)


def read(batch):
    return [document.tolist() for document in batch.tokens.flatten().tensor_split(batch.cu_seqlens[1:-1].long())]


@pytest.mark.parametrize("eos", [True, False])
def test_a_document_ends_in_its_tokenizers_mark_where_it_has_one(files, tmp_path, eos):
    corpus = TextCorpus(files=files[:1], tokenizer=tokenizer_in(tmp_path / "tokenizer", eos=eos))
    document = [1, 2, 3, 0, 1, 0] * 5 + [4] * eos
    whole = len(document)
    assert read(corpus.batch(1, 2 * whole + 3, seed=0)) == [document, document, document[:3]]


def test_documents_are_cut_to_the_longest_and_left_out_below_the_shortest(files):
    pieces = TextCorpus(files=files, shortest=20, longest=50)
    for seed in range(3):
        for document in read(pieces.batch(2, 500, seed=seed))[1:-1]:
            assert len(document) <= 50
    whole = TextCorpus(files=files, shortest=100)
    assert {bytes(b - 3 for b in d[:3]) for d in read(whole.batch(3, 400, seed=0))} <= {b"the", b"zw\xc3"}


def test_a_document_longer_than_the_window_is_read_everywhere(tmp_path):
    (tmp_path / "book").write_text("".join(f"{number:06d}" for number in range(5_000)))
    book = TextCorpus(files=(str(tmp_path / "book"),))
    batch = book.batch(64, 600, seed=0)
    told = [int(book.loaded_tokenizer.decode(window)[6:12]) for window in batch.tokens if True]
    assert len(set(told)) > 60
    assert batch.cu_seqlens.diff().tolist() == [600] * 64


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_a_dataset_on_disk_reads_as_its_files_do(files, tmp_path, kind):
    rows = datasets.Dataset.from_dict({"words": [Path(file).read_text() for file in files], "more": [1, 2, 3]})
    if kind == "saved":
        rows.save_to_disk(tmp_path / "data")
    else:
        (tmp_path / "data").mkdir()
        rows.to_parquet(tmp_path / "data" / "train.parquet")
    corpus = TextCorpus(dataset=str(tmp_path / "data"), column="words")
    assert torch.equal(corpus.batch(2, 64, seed=3).tokens, TextCorpus(files=files).batch(2, 64, seed=3).tokens)


def test_a_batch_places_its_documents_by_each_scheme():
    batch = KeyValueStream(8, distinct=(1, 4)).batch(2, 24, seed=0)
    assert batch.placed("continuous").position_ids.tolist() == [list(range(24))] * 2
    assert batch.placed("reset").position_ids.tolist() == [[*range(8)] * 3] * 2
    skipped = batch.placed("skipped", target_window=100, seed=1).position_ids.reshape(6, 8)
    assert (skipped[:, 0] == 0).all()
    assert (skipped[:, -1] == 99).all()
    assert len({tuple(row) for row in skipped.tolist()}) > 1
    part = batch.rows(1, 2)
    assert torch.equal(part.tokens, batch.tokens[1:])
    assert part.cu_seqlens.tolist() == [0, 8, 16, 24]
    assert batch.first_of_document.sum() == 6
    assert batch.first_of_document[0, [0, 8, 16]].all()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: KeyValueStream(7, (1, 2)), "7"),
        (lambda: KeyValueStream(8, (4, 300)), "4..300"),
        (lambda: KeyValueStream(8, (5, 4)), "5..4"),
        (lambda: KeyValueStream(8, (1, 2)).batch(1, 12, seed=0), "multiple of 8"),
        (lambda: TextCorpus(files=("no/such/file",)).batch(1, 8, seed=0), "no/such/file"),
        (lambda: TextCorpus(dataset="no/such/folder/here").batch(1, 8, seed=0), "no/such/folder/here"),
        (lambda: TextCorpus(tokenizer="no/such/folder/here").batch(1, 8, seed=0), "no/such/folder/here"),
        (lambda: TextCorpus(shortest=10**6).batch(1, 8, seed=0), "no document of this text has 1000000 tokens"),
        (lambda: TextCorpus(shortest=9, longest=8), "9, 8"),
        (lambda: TextCorpus(files=("a",), dataset="b"), "give one"),
        (lambda: Batch.continuous(torch.zeros(2, 4), torch.tensor([0, 3, 8])), "must end with a document"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, named):
    with pytest.raises(InputError, match=named):
        call()
