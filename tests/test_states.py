"""Queries and keys of two checkpoints on the same windows."""

import copy
import math

import numpy as np
import pytest
import torch

from rope_probe import InputError, compare_states, load_model, pack, repeated_window, rope
from rope_probe.spans import Span
from rope_probe.spans.parts import pieces
from tests import zoo
from tests.test_spans import BIG, turned_plane

WINDOW = pack([[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]], 12)


def rows(frame, metric, **where):
    found = frame[frame["metric"] == metric]
    for column, wanted in where.items():
        found = found[found[column] == wanted]
    return found["value"].to_numpy(float)


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_a_model_beside_itself_has_the_same_states(name):
    model = load_model(zoo.model(zoo.CONFIGS[name]()))
    frame = compare_states(model, model, WINDOW)
    assert (rows(frame, "rel_change") == 0).all()
    np.testing.assert_allclose(rows(frame, "cosine"), 1, atol=1e-12)
    assert (rows(frame, "phase_radians") == 0).all()
    rotating = {i for i, rotary in enumerate(model.rotary) if rotary is not None}
    assert set(frame["layer"].unique()) == rotating
    assert set(frame["document"].unique()) == {0, 1, 2}


@pytest.mark.parametrize("name", ["llama", "glm", "phi3_partial", "gpt_neox"])
def test_states_without_their_rotation_are_the_projections(name):
    model = load_model(zoo.model(zoo.CONFIGS[name]()).double())
    frame = compare_states(model, model, WINDOW)
    one = load_model(model.original_model)
    at_zero = pack([WINDOW.tokens[0].tolist()], 12)
    at_zero.position_ids.zero_()  # nothing turns at position 0
    with torch.no_grad():
        x = one.run_with_cache(at_zero, names_filter=["blocks.0.attn.hook_rot_q"])[1]["blocks.0.attn.hook_rot_q"][0]
    rotary = one.rotary[0]
    norms = rope.pair_norms(x, rotary.layout, rotary.rotary_dim)
    for document, part in enumerate(norms.split([4, 3, 5])):
        found = rows(frame, "norm_before", site="blocks.0.attn.unrotated_q", document=document)
        np.testing.assert_allclose(found, part.square().mean(0).sqrt().flatten(), rtol=1e-9)
        share = rows(frame, "norm_share_after", site="blocks.0.attn.unrotated_q", document=document)
        of_layer = x.split([4, 3, 5])[document].square().sum()
        np.testing.assert_allclose(share, (part.square().sum(0) / of_layer).flatten(), rtol=1e-9)


def test_a_turned_plane_shows_as_that_phase_in_that_pair():
    before = zoo.llama(**BIG).double()
    after = copy.deepcopy(before)
    turned_plane(after, 0, 1, 3, "W_Q", 0.7)
    frame = compare_states(load_model(before), load_model(after), WINDOW)
    queries = frame[(frame["site"] == "blocks.0.attn.unrotated_q") & (frame["metric"] == "phase_radians")]
    turned = (queries["head"] == 1) & (queries["pair"] == 3)
    np.testing.assert_allclose(queries[turned]["value"], 0.7, atol=1e-9)
    assert (queries[~turned]["value"] == 0).all()
    np.testing.assert_allclose(
        rows(frame, "rel_change", site="blocks.0.attn.unrotated_q", head=1, pair=3), 2 * math.sin(0.35), atol=1e-9
    )


def test_another_theta_alone_leaves_the_first_layers_states():
    before = zoo.llama(rope_parameters={"rope_type": "default", "rope_theta": 100.0}).double()
    after = zoo.llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4}).double()
    frame = compare_states(load_model(before), load_model(after), WINDOW)
    assert rows(frame, "rel_change", layer=0).max() < 1e-7
    assert rows(frame, "rel_change", layer=1).max() > 1e-3
    last = frame[frame["pair"] == 3]
    np.testing.assert_allclose(last["wavelength"], 2 * math.pi * 100**0.75, rtol=1e-6)
    np.testing.assert_allclose(last["wavelength_after"], 2 * math.pi * 1000, rtol=1e-6)


def test_positions_average_to_their_document():
    before, after = (load_model(zoo.llama()) for _ in range(2))
    [piece] = pieces(after.original_model, Span(0, 0, 0))
    after.original_model.get_parameter(piece.name).data[piece.indices] *= 1.5
    by_document = compare_states(before, after, WINDOW)
    by_position = compare_states(before, after, WINDOW, by_position=True)
    assert len(by_position) == 4 * len(by_document)  # 12 positions, 3 documents
    squares = by_position[by_position["metric"] == "norm_after"].assign(value=lambda x: x["value"] ** 2)
    keys = ["site", "head", "pair", "document"]
    mean = squares.groupby(keys)["value"].mean() ** 0.5
    wanted = by_document[by_document["metric"] == "norm_after"].set_index(keys)["value"]
    np.testing.assert_allclose(mean.sort_index(), wanted.sort_index(), rtol=1e-9)


def test_windows_are_averaged():
    before, after = load_model(zoo.llama()), load_model(zoo.model(zoo.CONFIGS["llama"](), seed=1))
    windows = [WINDOW, pack([[20, 21, 22, 23], [24, 25, 26], [27, 28, 29, 30, 31]], 12)]
    both = compare_states(before, after, windows)
    each = [compare_states(before, after, window) for window in windows]
    keys = ["site", "head", "pair", "document", "metric"]
    phases = [
        frame[frame["metric"] == "phase_radians"].set_index(keys)["value"].sort_index() for frame in (*each, both)
    ]
    away = np.exp(1j * (phases[0] - phases[2])) + np.exp(1j * (phases[1] - phases[2]))
    np.testing.assert_allclose(away.to_numpy().imag, 0, atol=1e-9)
    assert (away.to_numpy().real >= -1e-9).all()
    both, *each = (frame[frame["metric"] != "phase_radians"] for frame in (both, *each))
    mean = (each[0].set_index(keys)["value"] + each[1].set_index(keys)["value"]) / 2
    np.testing.assert_allclose(both.set_index(keys)["value"].sort_index(), mean.sort_index(), rtol=1e-12)


def test_what_cannot_be_compared_is_refused():
    model = load_model(zoo.llama())
    with pytest.raises(InputError, match="there are none"):
        compare_states(model, model, [])
    with pytest.raises(InputError, match="num_hidden_layers is 2 before and 3 after"):
        compare_states(model, load_model(zoo.llama(num_hidden_layers=3)), repeated_window([5], 4))
