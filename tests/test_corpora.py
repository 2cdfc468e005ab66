import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_probe import InputError, KeyValueStream


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


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: KeyValueStream(7, (1, 2)), "7"),
        (lambda: KeyValueStream(8, (4, 300)), "4..300"),
        (lambda: KeyValueStream(8, (5, 4)), "5..4"),
        (lambda: KeyValueStream(8, (1, 2)).batch(1, 12, seed=0), "multiple of 8"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, named):
    with pytest.raises(InputError, match=named):
        call()
