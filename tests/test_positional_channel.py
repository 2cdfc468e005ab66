import pandas as pd
import pytest
import torch

from experiments import positional_channel
from experiments.positional_channel import Scrubbed, kept_pairs, temperature_hooks
from experiments.toy_checkpoints import LONG, SHORT, SHORT_DOCUMENTS
from rope_probe import copy_deltas, load_model, repeated_window, rope
from rope_probe.models import checkpoints
from rope_probe.retrieval.probe import RETRIEVAL
from tests import zoo


@pytest.fixture
def batch():
    return SHORT_DOCUMENTS.batch(2, LONG, seed=0, index=0)


def toy(seed=0):
    config = zoo.hf.LlamaConfig(
        **{**zoo.SIZES, "vocab_size": SHORT_DOCUMENTS.vocab_size, "max_position_embeddings": 4 * LONG}
    )
    return checkpoints.build(config, seed=seed).double()


def test_scrubbing_a_masked_teacher_changes_nothing(batch):
    plain, scrubbed = load_model(toy()), Scrubbed(toy())
    with torch.no_grad():
        torch.testing.assert_close(scrubbed.hidden(batch, masked=True), plain.hidden(batch, masked=True))


def test_scrubbing_is_a_mean_over_orders_and_a_function_of_the_batch(batch):
    plain, scrubbed = load_model(toy()), Scrubbed(toy())
    with torch.no_grad():
        first, again, whole = scrubbed.hidden(batch), scrubbed.hidden(batch), plain.hidden(batch)
    assert torch.equal(first, again)
    assert (first - whole)[:, :SHORT].abs().mean() > 1e-6


def test_bands_share_out_all_pairs():
    inv_freq = rope.inv_freq({"rope_type": "default", "rope_theta": 1e4}, 32)
    bands = [kept_pairs(band, inv_freq) for band in positional_channel.BANDS]
    assert [pair for band in bands for pair in band] == list(range(16))
    assert all(bands)


def test_the_nope_teacher_knows_its_place_through_masks_by_its_temperature_alone():
    model = load_model(checkpoints.build(positional_channel._nope_architecture(), seed=0).double())
    window = repeated_window(SHORT_DOCUMENTS.documents(1, seed=0)[0], LONG // SHORT)

    def apart():
        frame = copy_deltas(model, window, masked=True, control=False)
        return frame[(frame["site"] == "logits") & (frame["metric"] == "rel_l2")]["value"]

    assert (apart() < 1e-12).all()
    with model.hooks(fwd_hooks=temperature_hooks(model)):
        assert (apart() > 1e-12).all()
    (name, scale), *others = temperature_hooks(model)
    assert (name, others) == ("blocks.1.attn.hook_rot_q", [])
    factor = scale(torch.ones(1, 2 * LONG, 1, 1), None).flatten()
    assert factor[SHORT - 2] == 1
    assert factor[SHORT - 1].item() == pytest.approx(1 + 0.1 * torch.log(torch.tensor(2.0)).item())
    assert torch.equal(factor[:LONG], factor[LONG:])


def test_verdicts_are_arithmetic():
    def rows(model, values, role="student"):
        told = {"model": model, "role": role, "metric": "accuracy", "seq_len": LONG, "distance": positional_channel.FAR}
        return [{**told, "seed": seed, "value": v, "low": v, "high": v} for seed, v in enumerate(values)]

    frame = pd.DataFrame(
        rows("kd_phase_wise", [1, 1]) + rows("scrubbed", [0.9, 1.0]) + rows("nope", [0.5, 0.52])
        + rows("slow_pairs", [0.1, 0.1], role="teacher") + rows("slow_pairs", [0.3, 0.3])
        + rows("middle_pairs", [0.1, 0.1], role="teacher") + rows("middle_pairs", [0.02, 0.02])
    )  # fmt: skip
    table = positional_channel.judged(RETRIEVAL.frame(frame)).set_index("claim")
    assert table.loc["student of scrubbed: accuracy 0.9 or more", ["measured", "held"]].tolist() == [
        pytest.approx(0.95),
        "undecided",
    ]
    assert table.loc["student of nope: accuracy 0.9 or more", "held"] == "not held"
    assert table.loc["teacher with slow_pairs alone: accuracy 0.5 or less", "held"] == "held"
    assert table.loc["student of middle_pairs: accuracy 0.2 or less", "held"] == "held"
    assert table.loc["student of slow_pairs: accuracy 0.2 or less", "held"] == "not held"
    assert pd.isna(table.loc["student of kd_phase_wise", "held"])
