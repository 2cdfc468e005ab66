import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_probe import InputError, Window, pack, repeated_window
from rope_probe.windows.packing import skipped_positions

lengths = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def documents(sizes):
    return [list(range(100 * i, 100 * i + size)) for i, size in enumerate(sizes)]


def test_a_repeated_token_and_a_repeated_document():
    token = repeated_window(7, 5)
    assert token.tokens.tolist() == [[7] * 5]
    assert token.cu_seqlens.tolist() == [0, 1, 2, 3, 4, 5]
    document = repeated_window([3, 4, 5], 2)
    assert document.tokens.tolist() == [[3, 4, 5, 3, 4, 5]]
    assert document.cu_seqlens.tolist() == [0, 3, 6]
    assert document.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert document.cu_seqlens.dtype == torch.int32
    assert (len(document), document.documents) == (6, 2)


@given(lengths, st.data())
def test_packing_keeps_order_and_cuts_the_last_document(sizes, data):
    window = data.draw(st.integers(1, sum(sizes)))
    packed = pack(documents(sizes), window)
    flat = [token for document in documents(sizes) for token in document]
    assert packed.tokens[0].tolist() == flat[:window]
    assert packed.cu_seqlens[0] == 0
    assert packed.cu_seqlens[-1] == window
    assert (packed.cu_seqlens.diff() > 0).all()
    assert packed.position_ids[0].tolist() == list(range(window))
    assert (packed.tokens[0] // 100).tolist() == packed.document_of.tolist()


@given(lengths)
def test_reset_positions_start_every_document_at_zero(sizes):
    packed = pack(documents(sizes), sum(sizes), positions="reset")
    assert packed.position_ids[0].tolist() == [i for size in sizes for i in range(size)]


@given(st.integers(1, 60), st.integers(0, 500), st.integers(0, 50))
def test_skipped_positions_keep_both_ends_of_the_target_and_rise(length, extra, seed):
    positions = skipped_positions(length, length + extra, seed=seed)
    assert len(positions) == length
    assert (positions.diff() > 0).all()
    assert positions[0] >= 0
    assert positions[-1] < length + extra
    assert ((positions.diff() > 1).sum() <= 2).item()
    assert torch.equal(positions, skipped_positions(length, length + extra, seed=seed))
    if length >= 3 and extra == 0:
        assert positions.tolist() == list(range(length))
    if length // 3 and 4 * (length + extra) // length:
        assert positions[0] == 0
        assert positions[-1] == length + extra - 1


def test_skipped_windows_spread_every_document_over_its_target():
    packed = pack(documents([12, 12]), 24, positions="skipped", target_window=100)
    assert packed.position_ids[0, 11] == packed.position_ids[0, 23] == 99


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: pack([[1, 2], [3]], 4), "window of 4 tokens is longer than the 3 tokens"),
        (lambda: pack([[1, 2]], 0), "0 was asked"),
        (lambda: pack([[1], []], 2), "non-empty"),
        (lambda: pack([[[1, 2]]], 2), "shape"),
        (lambda: pack([[1, 2]], 2, positions="skipped"), "target_window"),
        (lambda: pack([[1, 2]], 2, positions="random"), "random"),
        (lambda: skipped_positions(10, 9), "10 tokens"),
        (lambda: repeated_window(3, 0), "copies"),
        (lambda: pack([[2**70]], 1), "whole numbers"),
        (lambda: pack([["cat"]], 1), "whole numbers"),
        (lambda: Window(torch.zeros(1, 10), torch.tensor([0, 5]), torch.zeros(1, 10)), "rise from 0 to 10"),
        (lambda: Window(torch.zeros(1, 10), torch.tensor([0, 5, 5, 10]), torch.zeros(1, 10)), "rise from 0 to 10"),
        (lambda: Window(torch.zeros(1, 10), torch.tensor([0, 10]), torch.zeros(1, 9)), "1, 9"),
        (lambda: Window(torch.zeros(2, 10), torch.tensor([0, 10]), torch.zeros(2, 10)), "2, 10"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, named):
    with pytest.raises(InputError, match=named):
        call()
