"""docs/models.md says of every causal-LM type what rope_probe makes of a tiny model of it."""

import re

import pytest
import torch
import transformers

from docs.generate_models import PAGE, page, row
from rope_probe import load_model
from rope_probe.models.architectures import ARCHITECTURES, Architecture
from rope_probe.models.measured import measure
from tests import zoo
from tests.every_type import TYPES, Outcome, outcome_of

ROWS = {line.split("|")[1].strip(): line for line in PAGE.read_text().splitlines() if line.startswith("| ")}
CHUNK = 10
pytestmark = pytest.mark.skipif(
    f"{transformers.__version__} that" not in PAGE.read_text().replace("\n", " "),
    reason="docs/models.md is about another version of transformers",
)


@pytest.mark.parametrize("start", range(0, len(TYPES), CHUNK))
def test_the_page_is_true_of_these_types(start):
    types = TYPES[start : start + CHUNK]
    assert [without_misfits(row(one, outcome_of(one))) for one in types] == [
        without_misfits(ROWS[one]) for one in types
    ]


def without_misfits(line):
    """Digits of a misfit are a machine's own."""
    return re.sub(r"\d\.\de[-+]\d\d", "a misfit", line)


def test_the_page_is_what_its_rows_make_and_none_is_wrong():
    outcomes = {}
    for model_type in TYPES:
        _, _, status, why, _ = ROWS[model_type].split("|")
        outcomes[model_type] = Outcome(status.strip().removesuffix(", by hand"), why.strip())
    assert page(outcomes) == PAGE.read_text()
    statuses = [outcome.status for outcome in outcomes.values()]
    assert set(statuses) == {"exact", "refused", "cannot be built small"}
    assert statuses.count("exact") >= 90


def test_phimoe_scales_by_its_own_number_and_keeps_its_frequencies():
    """Its forward makes frequencies anew, and scales by `short_mscale` where there are short and long ones."""
    lengths = {"original_max_position_embeddings": 128, "short_mscale": 1.25, "long_mscale": 1.5}
    longrope = {**zoo.ROPE_TYPES["longrope"], **lengths}
    model = load_model(zoo.model(transformers.PhimoeConfig(**zoo.SIZES, num_local_experts=4, rope_parameters=longrope)))
    twin = model.double()
    assert {rotary.scaling for rotary in twin.rotary} == {1.25}
    _, cache = twin.run_with_cache(torch.full((1, 30), 5))
    unrotated = twin.rotary[0].undo(cache["rot_q", 0][0], torch.arange(30))
    plain = model.release().double().model.layers[0]
    projected = plain.self_attn.q_proj(plain.input_layernorm(cache["resid_pre", 0]))[0].view_as(unrotated)
    torch.testing.assert_close(unrotated, projected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_measuring_finds_what_was_written_by_hand(name):
    config = zoo.CONFIGS[name]()
    entry = ARCHITECTURES[config.model_type]
    by_hand = entry if isinstance(entry, Architecture) else entry(config)
    found = measure(config)
    assert (found.layout, found.start, found.backwards) == (by_hand.layout, 0, False)
    assert (found.attn, found.final_norm) == (by_hand.attn, by_hand.final_norm)
    assert [place is not None for place in found.rotary] == [
        by_hand.rotates(config, layer) for layer in range(config.num_hidden_layers)
    ]
    assert {parts.scales for parts in found.parts} == {(1.0, 1.0)}
    assert {parts.resid_mid for parts in found.parts} == {by_hand.resid_mid}
    if not name.startswith(("gpt_neox", "phi3")):  # dropout follows there, and returns the same
        assert {(parts.attn_out, parts.mlp_out) for parts in found.parts} == {(by_hand.attn_out, by_hand.mlp_out)}
