"""Published position schemes: hand-computed tables, and properties over many draws."""

import dataclasses
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rope_probe import InputError, KeyValueStream
from rope_probe.distillation import Stream
from rope_probe.windows import samplers
from rope_probe.windows.packing import Batch, pack, skipped_positions

DRAWS = 10_000
THREE_PIECES = ("longred_uniform", "longred_cream", "cream")
LENGTH, TARGET = 36, 144  # f = 4, so that 4f = 16 and n // 3 = 12


def cut(row):
    """The contiguous pieces of a row of positions."""
    jumps = [0, *(np.flatnonzero(np.diff(row) != 1) + 1), len(row)]
    return [row[start:end] for start, end in pairwise(jumps)]


@pytest.fixture(scope="module")
def drawn():
    """10,000 windows of each scheme, with a coin of their own."""
    return {
        scheme: samplers.sample_positions(scheme, DRAWS, LENGTH, TARGET, seed=3, coin="window").numpy()
        for scheme in samplers.SCHEMES
    }


def test_uniform_ends_by_hand():
    """n = 18, W = 36: f = 2, e = 6 or 8, m = 6 or 2; end from n - e to W - e - 1."""
    assert samplers.edge_lengths(18, 36) == (6, 8)
    assert [*samplers.uniform_ends(18, 36, 6)] == [*range(12, 30)]
    assert [*samplers.uniform_ends(18, 36, 8)] == [*range(10, 28)]
    first = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 30, 31, 32, 33, 34, 35]
    last = [0, 1, 2, 3, 4, 5, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35]
    by_four = [0, 1, 2, 3, 4, 5, 6, 7, 13, 14, 28, 29, 30, 31, 32, 33, 34, 35]
    assert samplers.three_pieces(18, 36, 6, 12).tolist() == first
    assert samplers.three_pieces(18, 36, 6, 29).tolist() == last
    assert samplers.three_pieces(18, 36, 8, 14).tolist() == by_four


@pytest.mark.parametrize(
    ("length", "edge", "halves", "first", "last"),
    [
        # int(e + (m - 1) a) ... a n - e - 1, by hand
        (18, 6, 2, 11, 11),  # a = 1: 6 + 5; 18 - 7: the middle goes on from the head, and the gap is before the tail
        (18, 6, 3, 13, 20),  # a = 1.5: int(6 + 7.5); 27 - 7
        (18, 6, 4, 16, 29),  # a = 2: 6 + 10; 36 - 7
        (18, 8, 3, 9, 18),  # m = 2: int(8 + 1.5); 27 - 9
        (17, 5, 3, 14, 19),  # an odd n and an odd r: 5 + 9; int(25.5 - 6)
        (36, 12, 8, 56, 131),  # f = 4, a = 4: 12 + 44; 144 - 13
    ],
)
def test_cream_ends_by_hand(length, edge, halves, first, last):
    ends = samplers.cream_ends(length, edge, halves)
    assert (ends[0], ends[-1]) == (first, last)


@pytest.mark.parametrize(
    ("u", "mean", "deviation", "halves"),
    [
        # N(5, 5), f = 4: P(x <= 2) = .274, P(x <= 3) = .345, P(x <= 5) = .5, P(x <= 8) = .726
        (0.0, 5, 5, 2), (0.27, 5, 5, 2), (0.34, 5, 5, 2), (0.35, 5, 5, 3), (0.49, 5, 5, 4), (0.51, 5, 5, 5),
        (0.72, 5, 5, 7), (0.73, 5, 5, 8), (0.999, 5, 5, 8),
        # N(9, 3), f = 4: P(x <= 3) = .023, P(x <= 6) = .159, P(x <= 8) = .369
        (0.02, 9, 3, 2), (0.15, 9, 3, 5), (0.36, 9, 3, 7), (0.38, 9, 3, 8),
    ],
)  # fmt: skip
def test_the_stretch_by_hand(u, mean, deviation, halves):
    assert samplers.cream_halves(u, 4, mean, deviation) == halves


def test_pose_and_perturbed_positions_by_hand():
    assert samplers.shifted_from(6, 2, 10).tolist() == [0, 1, 12, 13, 14, 15]
    assert samplers.shifted_from(4, 0, 3).tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("scheme", THREE_PIECES)
def test_three_pieces_keep_both_ends_around_a_contiguous_middle(scheme, drawn):
    rows = drawn[scheme]
    assert rows.shape == (DRAWS, LENGTH)
    assert (np.diff(rows) >= 1).all()
    third = has_third(rows)
    for edge, ours in ((12, rows[third]), (16, rows[~third])):
        assert len(ours)
        assert (ours[:, :edge] == np.arange(edge)).all()
        assert (ours[:, -edge:] == np.arange(TARGET - edge, TARGET)).all()
        assert (np.diff(ours[:, edge : LENGTH - edge]) == 1).all()


def has_third(rows):
    """Which windows have ends of n // 3 = 12 tokens; with ends of 4f = 16, the first and last 16 stand there."""
    first, last = np.arange(16), np.arange(TARGET - 16, TARGET)
    return ~((rows[:, :16] == first).all(1) & (rows[:, -16:] == last).all(1))


def test_the_uniform_end_has_the_published_range_and_is_flat(drawn):
    rows = drawn["longred_uniform"]
    third = has_third(rows)
    assert third.sum() == pytest.approx(DRAWS / 2, abs=4 * 50)  # a fair coin; 50 is its standard deviation
    for edge, ends in ((12, rows[third, 23]), (16, rows[~third, 19])):
        assert (ends.min(), ends.max()) == (LENGTH - edge, TARGET - edge - 1)
        places = TARGET - LENGTH
        counts = np.bincount(ends - ends.min(), minlength=places)
        expected = len(ends) / places
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < places - 1 + 5 * (2 * (places - 1)) ** 0.5


def test_the_stretch_is_distributed_as_published():
    """At f = 4, a = 1 has .345 of the draws and a = 4 has .274."""
    rng = np.random.default_rng(0)
    drawn = Counter(samplers.cream_halves(u, 4, 5, 5) for u in rng.random(DRAWS))
    assert drawn.keys() == {2, 3, 4, 5, 6, 7, 8}
    for halves, share in ((2, 0.345), (8, 0.274)):
        error = (share * (1 - share) / DRAWS) ** 0.5
        assert drawn[halves] / DRAWS == pytest.approx(share, abs=4 * error + 5e-4)


@pytest.mark.parametrize(("scheme", "share"), [("longred_cream", 0.345), ("cream", 0.023)])
def test_the_middle_follows_the_head_where_the_stretch_is_one(scheme, share, drawn):
    """And only there: for any larger stretch the range of the end begins later."""
    joined = (drawn[scheme][:, : LENGTH - 16] == np.arange(LENGTH - 16)).all(1)
    assert joined.mean() == pytest.approx(share, abs=4 * (share / DRAWS) ** 0.5 + 5e-4)


def test_an_odd_stretch_is_drawn_as_any_other():
    """In the published code one makes a fraction of a bound, which Python's own random numbers refuse."""
    rows = samplers.sample_positions("longred_cream", 500, 37, 37 * 4, coin="window")
    assert rows.shape == (500, 37)
    assert (rows.diff() >= 1).all()
    assert (rows[:, -1] == 147).all()


def test_pose_splits_once_and_shifts_up_to_the_end_of_the_target(drawn):
    rows = drawn["pose"]
    assert (rows[:, 0] == 0).all()
    shifts = rows[:, -1] - (LENGTH - 1)
    assert (shifts.min(), shifts.max()) == (0, TARGET - LENGTH)
    splits = set()
    for row, shift in zip(rows, shifts, strict=True):
        pieces = cut(row)
        assert len(pieces) == (1 if shift == 0 else 2)
        splits.add(len(pieces[0]))
    assert splits == set(range(1, LENGTH + 1))  # LENGTH where the shift is 0


def test_perturbed_positions_go_up_to_twice_the_window(drawn):
    rows = drawn["rope_perturbed"]
    shifts = rows[:, -1] - (LENGTH - 1)
    assert (shifts.min(), shifts.max()) == (1, LENGTH)
    firsts = (rows == np.arange(LENGTH)).sum(1)
    assert set(firsts) == set(range(LENGTH))
    assert rows.max() < samplers.reach("rope_perturbed", LENGTH, None)


@pytest.mark.parametrize("scheme", THREE_PIECES)
def test_one_coin_for_a_batch_or_one_for_each_window(scheme):
    of_batches = set()
    for seed in range(40):
        rows = samplers.sample_positions(scheme, 64, LENGTH, TARGET, seed=seed)
        of_batches.add(has_third(rows.numpy()).mean())
    assert of_batches == {0, 1}
    mixed = samplers.sample_positions(scheme, 64, LENGTH, TARGET, coin="window")
    assert 0.2 < has_third(mixed.numpy()).mean() < 0.8
    assert torch.equal(
        samplers.sample_positions(scheme, 64, LENGTH, TARGET, seed=5),
        samplers.sample_positions(scheme, 64, LENGTH, TARGET, seed=5),
    )


@given(st.sampled_from(THREE_PIECES), st.integers(2, 12), st.integers(1, 60), st.integers(0, 1000))
def test_every_length_that_has_room_is_spread(scheme, factor, more, seed):
    length = 8 * factor + more
    rows = samplers.sample_positions(scheme, 4, length, factor * length, seed=seed, coin="window")
    assert (rows.diff() >= 1).all()
    assert (rows[:, 0] == 0).all()
    assert (rows[:, -1] == factor * length - 1).all()
    assert ((rows.diff() > 1).sum(1) <= 2).all()


def test_batches_and_packs_take_the_published_schemes_window_by_window():
    batch = Batch.continuous(torch.arange(72).view(2, 36), torch.tensor([0, 10, 36, 72]))
    placed = batch.placed("longred_uniform", target_window=TARGET, seed=4)
    assert torch.equal(placed.position_ids, samplers.sample_positions("longred_uniform", 2, 36, TARGET, seed=4))
    assert torch.equal(placed.cu_seqlens, batch.cu_seqlens)
    packed = pack([[1] * 10, [2] * 26], 36, positions="pose", target_window=TARGET, seed=1)
    assert torch.equal(packed.position_ids, samplers.sample_positions("pose", 1, 36, TARGET, seed=1))
    perturbed = pack([[1] * 10, [2] * 26], 36, positions="rope_perturbed", seed=1)
    assert perturbed.position_ids.max() >= 36


def test_a_stream_draws_a_step_at_a_time_and_its_coin_is_an_option():
    data = KeyValueStream(36, distinct=(1, 4))
    stream = Stream(data, 36, positions="longred_uniform", target_window=TARGET, teacher_positions="continuous")
    one, other = (stream.batch(4, seed=0, step=step).position_ids for step in (0, 1))
    assert not torch.equal(one, other)
    assert torch.equal(one, stream.batch(4, seed=0, step=0).position_ids)
    assert stream.reach("longred_uniform") == TARGET
    assert stream.reach("continuous") == 36
    assert dataclasses.replace(stream, positions="rope_perturbed").reach(None) == 72
    flipped = dataclasses.replace(stream, coin="window").batch(64, seed=0, step=0).position_ids
    assert len(set((flipped[:, 12] == 12).tolist())) == 2


def test_the_scheme_of_this_project_is_none_of_the_published():
    """Its middle can begin right after the head, and its shorter ends take 4W // n, up to a third."""
    begins = {int(skipped_positions(18, 36, seed=seed)[6]) for seed in range(200)}
    assert min(begins) == 6
    assert min(samplers.uniform_ends(18, 36, 6)) - 6 + 1 == 7
    edges = {int((skipped_positions(100, 250, seed=seed) < 50).sum()) for seed in range(200)}
    assert {10, 33} <= edges
    assert samplers.edge_lengths(100, 250) == (33, 8)


@pytest.mark.parametrize(
    ("scheme", "length", "target", "named"),
    [
        ("longred_uniform", 36, None, "longred_uniform positions need target_window"),
        ("longred_cream", 36, 100, "2, 3 or more whole windows of 36 tokens, but it is 100"),
        ("cream", 36, 36, "2, 3 or more whole windows"),
        ("longred_uniform", 64, 1024, "keep 64 tokens at each end .* more than 128 tokens for a target of 16"),
        ("pose", 36, 35, "target_window of at least that, but they are 36 and 35"),
        ("pose", 1, 35, "window of 2 tokens or more"),
    ],
)
def test_samples_without_room_are_refused(scheme, length, target, named):
    with pytest.raises(InputError, match=named):
        samplers.sample_positions(scheme, 1, length, target)
    with pytest.raises(InputError, match=named):
        Stream(KeyValueStream(2, distinct=(1, 4)), length, positions=scheme, target_window=target)
