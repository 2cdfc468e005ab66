"""Maps of retrieval: cells equal single measurements, and those without room are left out or refused."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from transformers import ByT5Tokenizer

from rope_probe import AttentionTemperature, InputError, load_model, retrieval_accuracy, retrieval_map
from rope_probe.gallery import figures as plots
from rope_probe.retrieval.maps import map_trials
from rope_probe.retrieval.probe import KeyValueTask
from rope_probe.retrieval.tasks import TextTask
from rope_probe.windows.corpora import KeyValueStream
from tests import zoo
from tests.frames import rows_of

TASK = KeyValueTask(KeyValueStream(32, distinct=(2, 8), keys=20, values=20), 16)
BYTES = ByT5Tokenizer(extra_ids=0)


def test_a_cell_is_the_accuracy_in_that_window_at_that_distance():
    model, done = load_model(zoo.llama()), []
    frame = retrieval_map(model, TASK, [24, 8, 48], [4, 16, 32], trials=6, seed=3, progress=done.append)
    cells = frame[["seq_len", "distance"]].drop_duplicates()
    assert sorted(cells.itertuples(index=False, name=None)) == [(8, 4), (24, 4), (24, 16), (48, 4), (48, 16), (48, 32)]
    for window, distance in ((8, 4), (48, 16)):
        alone = retrieval_accuracy(model, dataclasses.replace(TASK, window=window), [distance], trials=6, seed=3)
        mine = frame[(frame["seq_len"] == window) & (frame["distance"] == distance)].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, alone)
    assert sum(done) == 36 == map_trials(model, TASK, [24, 8, 48], [4, 16, 32], trials=6, seed=3)


def test_by_default_the_distances_are_those_of_the_largest_window():
    frame = retrieval_map(load_model(zoo.llama()), TASK, [16, 40], trials=2)
    assert sorted(frame["distance"].unique()) == [8, 16, 32]
    assert set(frame[frame["seq_len"] == 16]["distance"]) == {8}


def test_text_tasks_have_maps_and_perturbations_are_told():
    model = load_model(zoo.llama(vocab_size=259, max_position_embeddings=1024))
    warmer = AttentionTemperature(2.0)
    task = TextTask("passkey", BYTES, 400)
    frame = retrieval_map(model, task, [400, 700], [128, 500], trials=1, perturbation=warmer)
    cells = sorted(frame[["seq_len", "distance"]].drop_duplicates().itertuples(index=False, name=None))
    assert cells == [(400, 128), (700, 128), (700, 500)]
    assert set(frame["perturbation"]) == {str(warmer)}


@pytest.mark.parametrize(("make", "told"), [
    (lambda m: retrieval_map(m, TASK, []), "there is none"),
    (lambda m: retrieval_map(m, TASK, [8, 24], [4, 16, 64]), "distance 64 has no cell: distance 64 is not below"),
    (lambda m: retrieval_map(m, TASK, [8, 24], [12]), "window 8 has no cell: distance 12"),
    (lambda m: retrieval_map(m, TASK, [24, 48], [5]), "window 24 has no cell: distance must be even"),
    (lambda m: retrieval_map(m, TASK, [7], [4]), "window must be even"),
    (lambda m: retrieval_map(m, TextTask("fwe", BYTES, 400), [400, 500]), "fwe has none"),
])  # fmt: skip
def test_maps_without_cells_are_refused_with_the_reason(make, told):
    with pytest.raises(InputError, match=told):
        make(load_model(zoo.llama()))


def test_windows_past_what_the_frequencies_stand_still_for_are_refused_before_anything_runs():
    parameters = {"rope_parameters": zoo.ROPE_TYPES["dynamic"], "max_position_embeddings": 32}
    done = []
    with pytest.raises(InputError, match="window 48 is past 32"):
        retrieval_map(load_model(zoo.llama(**parameters)), TASK, [16, 48], [4], trials=1, progress=done.append)
    assert not done


def cells_of(windows, distances, seeds=(0,), **columns):
    return rows_of("retrieval", rows=[
        {"run_id": "a", "metric": "accuracy", "task": "passkey", "seq_len": window, "distance": distance, "seed": seed,
         "trials": 8, "value": (seed + distance / window) / 4, "low": 0.1, "high": 0.9, **columns}
        for seed in seeds for window in windows for distance in distances if distance < window
    ])  # fmt: skip


def test_the_figure_shows_every_cell_and_leaves_those_without_room_empty():
    frame = cells_of([64, 128, 256], [32, 64, 128], seeds=(0, 1))
    assert plots.maps.is_map(frame).all()
    panel = plots.retrieval_map(frame).data[0]
    assert list(panel.x) == ["64", "128", "256"]
    assert list(panel.y) == ["32", "64", "128"]
    table = np.asarray(panel.z, dtype=float)
    assert table[0, 2] == pytest.approx((32 / 256 / 4 + (1 + 32 / 256) / 4) / 2)
    assert np.isnan(table[2, :2]).all()
    assert np.isnan(table[1, 0])
    value, low, high, trials = np.asarray(panel.customdata, dtype=float)[0, 2]
    assert 0 <= low < value < high <= 1
    assert trials == 16
    one = np.asarray(plots.retrieval_map(cells_of([64, 128], [16, 32])).data[0].customdata, dtype=float)
    assert one[0, 0, 1:3].tolist() == pytest.approx([0.1, 0.9])


def test_what_is_no_map_or_several_is_not_drawn_as_one():
    assert not plots.maps.is_map(cells_of([64], [16, 32])).any()
    assert not plots.maps.is_map(cells_of([64, 128], [16])).any()
    both = pd.concat([cells_of([64, 128], [16, 32]), cells_of([64, 128], [16, 32], task="niah_single_1")])
    with pytest.raises(InputError, match="tasks"):
        plots.retrieval_map(both)
    wide = plots.retrieval_map(cells_of([2**k for k in range(5, 30)], [2**k for k in range(4, 29)]))
    assert wide.layout.height < 1200
    assert wide.data[0].texttemplate is None
