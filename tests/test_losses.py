import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from rope_probe import InputError
from rope_probe.distillation.losses import IGNORED, Divergence, Head, HiddenMatch, Objective

KINDS = ["forward_kl", "reverse_kl", "jensen_shannon"]


def logits(seed, n=6, v=12, size=2.0):
    return size * torch.randn(n, v, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def probabilities(x, temperature=1.0):
    return (x / temperature).softmax(-1)


def textbook(kind, p, q):
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    middle = (p + q) / 2
    return {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jensen_shannon": (kl(p, middle) + kl(q, middle)) / 2}[kind]


@given(st.sampled_from(KINDS), st.floats(0.5, 5), st.integers(0, 100))
def test_divergences_are_the_textbook_ones(kind, temperature, seed):
    student, teacher = logits(seed), logits(seed + 1000)
    got = Divergence(kind, temperature)(student, teacher)
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    torch.testing.assert_close(got, temperature**2 * textbook(kind, p, q), rtol=1e-10, atol=1e-12)
    assert Divergence(kind, temperature)(teacher, teacher).abs().max() < 1e-12


@given(st.sampled_from(KINDS), st.integers(1, 11), st.integers(0, 100))
def test_top_k_keeps_the_teachers_tokens_and_a_tail(kind, k, seed):
    student, teacher = logits(seed), logits(seed + 1000)
    p, q = probabilities(teacher), probabilities(student)
    top = p.topk(k, -1).indices
    kept = [torch.cat([x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, keepdim=True)], -1) for x in (p, q)]
    with_tail = Divergence(kind, top_k=k)(student, teacher)
    torch.testing.assert_close(with_tail, textbook(kind, *kept), rtol=1e-8, atol=1e-10)
    alone = [x.gather(-1, top) / x.gather(-1, top).sum(-1, keepdim=True) for x in (p, q)]
    without = Divergence(kind, top_k=k, tail=False)(student, teacher)
    torch.testing.assert_close(without, textbook(kind, *alone), rtol=1e-8, atol=1e-10)
    assert (with_tail <= Divergence(kind)(student, teacher) + 1e-12).all()


@pytest.mark.parametrize("k", [12, 40])
@pytest.mark.parametrize("tail", [True, False])
def test_a_top_k_of_everything_is_the_whole_vocabulary(k, tail):
    whole = Divergence()(logits(0), logits(1))
    torch.testing.assert_close(Divergence(top_k=k, tail=tail)(logits(0), logits(1)), whole)


def test_jensen_shannon_is_symmetric_and_bounded():
    divergence = Divergence("jensen_shannon")
    one, other = logits(0, size=30.0), logits(1, size=30.0)
    torch.testing.assert_close(divergence(one, other), divergence(other, one))
    assert divergence(one, other).max() <= math.log(2) + 1e-12


def test_the_gradient_keeps_its_size_when_the_temperature_rises():
    sizes = []
    for temperature in (20.0, 40.0):
        student = logits(0).requires_grad_()
        Divergence(temperature=temperature)(student, logits(1)).sum().backward()
        sizes.append(student.grad.norm())
    assert sizes[0] / sizes[1] == pytest.approx(1, rel=0.1)


def test_vocabularies_are_cut_to_the_shared_part():
    student, teacher = logits(0, v=16), logits(1, v=12)
    torch.testing.assert_close(Divergence()(student, teacher), Divergence()(student[:, :12], teacher))
    torch.testing.assert_close(Divergence()(teacher, student), Divergence()(teacher, student[:, :12]))


OBJECTIVES = [Objective(ce_weight=1.0, kd_weight=0.0), Objective(), Objective(ce_weight=0.3, kd_weight=0.7),
              Objective(0.5, 1.0, Divergence("reverse_kl", 2.0, top_k=4)),
              Objective(0.0, 1.0, Divergence("jensen_shannon", top_k=3, tail=False))]  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 5, 20, 64])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_chunks_give_the_loss_and_the_gradients_of_the_plain_computation(objective, chunk):
    head = nn.Linear(8, 30, dtype=torch.float64)
    teacher_head = nn.Linear(6, 32, dtype=torch.float64)
    hidden = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    taught = torch.randn(20, 6, dtype=torch.float64)
    targets = torch.randint(30, (20,))
    targets[::7] = IGNORED

    def after(projected):
        return 3 * torch.tanh(projected / 3)

    student, teacher = after(head(hidden)), teacher_head(taught).detach()
    plain = torch.zeros((), dtype=torch.float64)
    if objective.ce_weight:
        plain = plain + objective.ce_weight * F.cross_entropy(student, targets, ignore_index=IGNORED)
    if objective.kd_weight:
        plain = plain + objective.kd_weight * objective.divergence(student, teacher).mean()
    inputs = [hidden, head.weight, head.bias]
    expected = torch.autograd.grad(2 * plain, inputs)

    chunked = Objective(objective.ce_weight, objective.kd_weight, objective.divergence, chunk=chunk)
    loss, terms = chunked.loss(hidden, Head(head, after), targets, taught, Head(teacher_head))
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    for got, right in zip(torch.autograd.grad(2 * loss, inputs), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-12)
    assert (terms.cross_entropy is None) == (objective.ce_weight == 0)
    assert (terms.divergence is None) == (objective.kd_weight == 0)
    if terms.cross_entropy is not None:
        assert (terms.cross_entropy[::7] == 0).all()
    with torch.no_grad():
        unlearning, _ = chunked.loss(hidden, Head(head, after), targets, taught, Head(teacher_head))
    torch.testing.assert_close(unlearning, loss)
    assert all(parameter.grad is None for parameter in teacher_head.parameters())


def test_with_measure_terms_of_no_weight_are_told_and_change_nothing():
    head, teacher_head = nn.Linear(8, 30), nn.Linear(6, 30)
    hidden, taught, targets = torch.randn(20, 8, requires_grad=True), torch.randn(20, 6), torch.randint(30, (20,))
    for objective in (Objective(1.0, 0.0), Objective(0.0, 1.0)):
        told = [
            objective.loss(hidden, Head(head), targets, taught, Head(teacher_head), measure=m) for m in (False, True)
        ]
        gradients = [torch.autograd.grad(loss, [hidden, head.weight]) for loss, _ in told]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        assert torch.equal(told[0][0], told[1][0])
        torch.testing.assert_close(told[1][1].cross_entropy.mean(), F.cross_entropy(head(hidden), targets))
        kl = F.kl_div(
            head(hidden).log_softmax(-1), teacher_head(taught).log_softmax(-1), log_target=True, reduction="batchmean"
        )
        torch.testing.assert_close(told[1][1].divergence.mean(), kl)


def test_a_part_of_a_batch_has_its_share_of_the_loss():
    head, objective = nn.Linear(8, 30), Objective(0.7, 0.4)
    hidden, taught, targets = torch.randn(20, 8), torch.randn(20, 8), torch.randint(30, (20,))
    targets[2:9] = IGNORED
    whole, _ = objective.loss(hidden, Head(head), targets, taught, Head(head))
    parts = [
        objective.loss(hidden[rows], Head(head), targets[rows], taught[rows], Head(head), over=(13, 20))[0]
        for rows in (slice(0, 8), slice(8, 20))
    ]
    torch.testing.assert_close(sum(parts), whole)


@given(st.integers(0, 100), st.floats(0.1, 10))
def test_hidden_states_are_compared_by_angle_or_by_distance(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    a, b, c, d = (torch.randn(2, 3, 8, dtype=torch.float64, generator=generator) for _ in range(4))
    cosine, mse = (HiddenMatch(kind=kind, sites=("x", "y")) for kind in ("cosine", "mse"))
    angle = lambda u, v: 1 - (u * v).sum(-1) / (u.norm(dim=-1) * v.norm(dim=-1))  # noqa: E731
    torch.testing.assert_close(cosine([a, b], [c, d]), (angle(a, c) + angle(b, d)).flatten())
    torch.testing.assert_close(cosine([scale * a, b], [c, d]), cosine([a, b], [c, d]))
    torch.testing.assert_close(mse([a, b], [c, d]), (((a - c) ** 2).mean(-1) + ((b - d) ** 2).mean(-1)).flatten())
    assert (mse([a, b], [a, b]) == 0).all()


def test_hidden_states_of_other_widths_are_refused():
    with pytest.raises(InputError, match="hook_out is 8 wide in the student, 6 in the teacher"):
        HiddenMatch()([torch.zeros(1, 2, 8)], [torch.zeros(1, 2, 6)])


def test_a_frozen_head_costs_no_gradient():
    head = nn.Linear(8, 30).requires_grad_(False)
    hidden = torch.randn(20, 8, requires_grad=True)
    loss, _ = Objective(1.0, 0.0, chunk=6).loss(hidden, Head(head), torch.zeros(20, dtype=torch.long))
    (expected,) = torch.autograd.grad(F.cross_entropy(head(hidden), torch.zeros(20, dtype=torch.long)), hidden)
    loss.backward()
    torch.testing.assert_close(hidden.grad, expected, rtol=0, atol=1e-6)
    assert head.weight.grad is None


@pytest.mark.parametrize("chunk", [16, 256])
def test_bfloat16_weights_get_gradients_as_good_as_the_plain_ones(chunk):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator).bfloat16() for n in (512, 64))
    targets = torch.randint(64, (512,), generator=generator)
    head = nn.Linear(32, 64, bias=False, dtype=torch.bfloat16)
    head.weight.data.copy_(weight)
    exact = weight.double().requires_grad_()
    F.cross_entropy(hidden.double() @ exact.T, targets).backward()
    plain = torch.autograd.grad(F.cross_entropy(head(hidden).float(), targets), head.weight)[0]
    loss, _ = Objective(1.0, 0.0, chunk=chunk).loss(hidden, Head(head), targets)
    (chunked,) = torch.autograd.grad(loss, head.weight)
    errors = [(grad.double() - exact.grad).norm() / exact.grad.norm() for grad in (plain, chunked)]
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_without_probability_add_nothing(kind):
    student, teacher = logits(0), logits(1)
    for one in (student, teacher):
        one[:, 3] = float("-inf")
    student.requires_grad_()
    got = Divergence(kind)(student, teacher)
    kept = [i for i in range(12) if i != 3]
    torch.testing.assert_close(got, Divergence(kind)(student[:, kept], teacher[:, kept]))
    got.sum().backward()
    assert student.grad[:, kept].isfinite().all()


def test_no_more_logits_than_a_chunk_are_ever_made():
    seen = []
    projection = nn.Linear(8, 30, bias=False)
    head = Head(projection, lambda projected: seen.append(len(projected)) or projected)
    hidden = torch.randn(20, 8, requires_grad=True)
    loss, _ = Objective(chunk=6).loss(hidden, head, torch.zeros(20, dtype=torch.long), hidden.detach(), head)
    loss.backward()
    assert max(seen) == 6
    assert projection.weight.grad is not None


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Divergence("chi_squared"), "chi_squared"),
        (lambda: Divergence(temperature=0.0), "temperature"),
        (lambda: Divergence(temperature=math.nan), "nan"),
        (lambda: Divergence(top_k=0), "top_k"),
        (lambda: Objective(0.0, 0.0), "weights"),
        (lambda: Objective(-1.0, 2.0), "-1.0"),
        (lambda: Objective(chunk=0), "chunk 0"),
        (lambda: HiddenMatch(kind="angle"), "angle"),
        (lambda: HiddenMatch(weight=0.0), "0.0"),
        (lambda: HiddenMatch(sites=()), "a site"),
        (
            lambda: Objective().loss(torch.zeros(2, 3), Head(nn.Linear(3, 4)), torch.zeros(2, dtype=torch.long)),
            "teacher",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, named):
    with pytest.raises(InputError, match=named):
        make()
