import pytest
import torch

from rope_probe.tracing import deltas


def test_kl_of_nearly_equal_logits_keeps_its_digits():
    logits = torch.randn(5, 50, dtype=torch.float64)
    for size in (1e-2, 1e-5, 1e-8):
        step = torch.randn(5, 50, dtype=torch.float64) * size
        kl = deltas.logit_deltas(logits, logits + step)["kl_nats"]
        p = logits.softmax(-1)
        variance = (p * step**2).sum(-1) - (p * step).sum(-1) ** 2
        torch.testing.assert_close(kl, variance / 2, rtol=max(20 * size, 1e-6), atol=0)
    assert (deltas.logit_deltas(logits, logits)["kl_nats"] == 0).all()


def test_kl_of_distant_logits_is_the_textbook_one():
    clean, other = 5 * torch.randn(2, 8, 50, dtype=torch.float64)
    expected = (clean.softmax(-1) * (clean.log_softmax(-1) - other.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(deltas.logit_deltas(clean, other)["kl_nats"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [3.0, 1e-1, 1e-3])
def test_lower_precision_gives_the_kl_of_the_logits_as_they_are(dtype, size):
    clean = (4 * torch.randn(6, 3000, generator=torch.Generator().manual_seed(0))).to(dtype)
    other = (clean + size * torch.randn(6, 3000, generator=torch.Generator().manual_seed(1))).to(dtype)
    exact = deltas.logit_deltas(clean.double(), other.double())
    got = deltas.logit_deltas(clean, other)
    for metric, values in got.items():
        atol = 1e-12 if metric == "cosine_distance" else 0
        torch.testing.assert_close(values.double(), exact[metric], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nats", [40, 60, 80, 88, 100, 120, 200, 500])
def test_a_kl_of_many_nats_is_a_number_in_lower_precision_too(dtype, nats):
    """In float32 it was infinite at 80 nats and no number at 120."""
    clean = 4 * torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    other = 4 * torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
    likely = clean.argmax(-1, keepdim=True)
    other.scatter_(-1, likely, -float(nats))  # from where the clean distribution is, to where it is not
    other[:3, 7] += nats
    clean[:3, 7] -= nats
    clean[3, 7:] -= 3 * nats  # probabilities that float32 does not hold
    clean, other = clean.to(dtype), other.to(dtype)
    exact = clean.double().log_softmax(-1).exp() * (clean.double().log_softmax(-1) - other.double().log_softmax(-1))
    got = deltas.logit_deltas(clean, other)["kl_nats"]
    assert exact.sum(-1).max() > nats
    torch.testing.assert_close(got.double(), exact.sum(-1), rtol=1e-5, atol=0)
    doubled = deltas.logit_deltas(clean.double(), other.double())["kl_nats"]
    torch.testing.assert_close(doubled, exact.sum(-1), rtol=1e-12, atol=0)


def test_rows_beside_a_far_one_keep_their_numbers():
    clean, other = torch.randn(2, 6, 300)
    alone = deltas.logit_deltas(clean, other)["kl_nats"]
    other[2] *= 200
    beside = deltas.logit_deltas(clean, other)["kl_nats"]
    assert beside.isfinite().all()
    assert torch.equal(beside[[0, 1, 3, 4, 5]], alone[[0, 1, 3, 4, 5]])


def test_blocks_of_positions_do_not_change_the_numbers(monkeypatch):
    clean, other = torch.randn(2, 10, 5, 8, dtype=torch.float64)
    whole = deltas.vector_deltas(clean, other)
    monkeypatch.setattr(deltas, "_BLOCK_ELEMENTS", 120)
    for metric, values in deltas.vector_deltas(clean, other).items():
        torch.testing.assert_close(values, whole[metric], rtol=0, atol=0)


def test_a_vector_of_zeros_has_no_direction_but_a_finite_delta():
    got = deltas.vector_deltas(torch.zeros(1, 4), torch.ones(1, 4))
    assert got["l2"].item() == 2
    assert all(values.isfinite().all() for values in got.values())
