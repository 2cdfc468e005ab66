import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from rope_probe import InputError
from rope_probe.distillation import CrossEntropy, Divergence, HardLabels, Head, HiddenStates, LogitTerm
from rope_probe.distillation.terms import Counts, labels, loss_in_chunks
from rope_probe.distillation.terms.base import IGNORED

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
    got = Divergence(divergence=kind, temperature=temperature).nats(student, teacher)
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    torch.testing.assert_close(got, temperature**2 * textbook(kind, p, q), rtol=1e-10, atol=1e-12)
    assert Divergence(divergence=kind, temperature=temperature).nats(teacher, teacher).abs().max() < 1e-12


@pytest.mark.parametrize("nats", [80, 120, 500])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_divergences_of_many_nats_are_those_of_float64(kind, temperature, nats):
    student, teacher = logits(0), logits(1)
    student.scatter_(-1, teacher.argmax(-1, keepdim=True), -float(nats))
    teacher.scatter_(-1, student.argmax(-1, keepdim=True), -float(nats))
    divergence = Divergence(divergence=kind, temperature=temperature)
    exact = divergence.nats(student, teacher)
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (teacher, student))
    first, second = {"reverse_kl": (log_q, log_p)}.get(kind, (log_p, log_q))
    if kind != "jensen_shannon":
        torch.testing.assert_close(exact, temperature**2 * (first.exp() * (first - second)).sum(-1), rtol=1e-12, atol=0)
        assert exact.max() > temperature * nats / 2
    learned = student.float().requires_grad_()
    got = divergence.nats(learned, teacher.float())
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)
    got.sum().backward()
    assert learned.grad.isfinite().all()


@given(st.sampled_from(KINDS), st.integers(1, 11), st.integers(0, 100))
def test_top_k_keeps_the_teachers_tokens_and_a_tail(kind, k, seed):
    student, teacher = logits(seed), logits(seed + 1000)
    p, q = probabilities(teacher), probabilities(student)
    top = p.topk(k, -1).indices
    kept = [torch.cat([x.gather(-1, top), 1 - x.gather(-1, top).sum(-1, keepdim=True)], -1) for x in (p, q)]
    with_tail = Divergence(divergence=kind, top_k=k).nats(student, teacher)
    torch.testing.assert_close(with_tail, textbook(kind, *kept), rtol=1e-8, atol=1e-10)
    alone = [x.gather(-1, top) / x.gather(-1, top).sum(-1, keepdim=True) for x in (p, q)]
    without = Divergence(divergence=kind, top_k=k, tail=False).nats(student, teacher)
    torch.testing.assert_close(without, textbook(kind, *alone), rtol=1e-8, atol=1e-10)
    assert (with_tail <= Divergence(divergence=kind).nats(student, teacher) + 1e-12).all()


@pytest.mark.parametrize("k", [12, 40])
@pytest.mark.parametrize("tail", [True, False])
def test_a_top_k_of_everything_is_the_whole_vocabulary(k, tail):
    whole = Divergence().nats(logits(0), logits(1))
    torch.testing.assert_close(Divergence(top_k=k, tail=tail).nats(logits(0), logits(1)), whole)


def test_jensen_shannon_is_symmetric_and_bounded():
    divergence = Divergence(divergence="jensen_shannon").nats
    one, other = logits(0, size=30.0), logits(1, size=30.0)
    torch.testing.assert_close(divergence(one, other), divergence(other, one))
    assert divergence(one, other).max() <= math.log(2) + 1e-12


def test_the_gradient_keeps_its_size_when_the_temperature_rises():
    sizes = []
    for temperature in (20.0, 40.0):
        student = logits(0).requires_grad_()
        Divergence(temperature=temperature).nats(student, logits(1)).sum().backward()
        sizes.append(student.grad.norm())
    assert sizes[0] / sizes[1] == pytest.approx(1, rel=0.1)


def test_vocabularies_are_cut_to_the_shared_part():
    student, teacher = logits(0, v=16), logits(1, v=12)
    torch.testing.assert_close(Divergence().nats(student, teacher), Divergence().nats(student[:, :12], teacher))
    torch.testing.assert_close(Divergence().nats(teacher, student), Divergence().nats(teacher, student[:, :12]))


OBJECTIVES = [
    (CrossEntropy(),),
    (Divergence(),),
    (CrossEntropy(0.3), Divergence(0.7)),
    (CrossEntropy(0.5), Divergence(divergence="reverse_kl", temperature=2.0, top_k=4)),
    (Divergence(divergence="jensen_shannon", top_k=3, tail=False),),
    (Divergence(0.5), Divergence(2.0, "other", temperature=2.0), CrossEntropy(0.0)),
]


@pytest.mark.parametrize("chunk", [1, 5, 20, 64])
@pytest.mark.parametrize("terms", OBJECTIVES, ids=range(len(OBJECTIVES)))
def test_chunks_give_the_loss_and_the_gradients_of_the_plain_computation(terms, chunk):
    head = nn.Linear(8, 30, dtype=torch.float64)
    heads = {name: nn.Linear(6, 32, dtype=torch.float64) for name in ("teacher", "other")}
    hidden = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    states = torch.randn(20, 6, dtype=torch.float64)
    targets = torch.randint(30, (20,))
    targets[::7] = IGNORED

    def after(projected):
        return 3 * torch.tanh(projected / 3)

    student = after(head(hidden))
    plain = torch.zeros((), dtype=torch.float64)
    for term in terms:
        if isinstance(term, CrossEntropy):
            plain = plain + term.weight * F.cross_entropy(student, targets, ignore_index=IGNORED)
        else:
            plain = plain + term.weight * term.nats(student, heads[term.teacher](states).detach()).mean()
    inputs = [hidden, head.weight, head.bias]
    expected = torch.autograd.grad(2 * plain, inputs)

    taught = {name: (states, Head(teacher)) for name, teacher in heads.items()}
    loss, values = loss_in_chunks(terms, hidden, Head(head, after), targets, taught, chunk=chunk)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    for got, right in zip(torch.autograd.grad(2 * loss, inputs), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-12)
    for term, value in zip(terms, values, strict=True):
        assert value.shape == (20,)
        assert not isinstance(term, CrossEntropy) or (value[::7] == 0).all()
    with torch.no_grad():
        unlearning, _ = loss_in_chunks(terms, hidden, Head(head, after), targets, taught)
    torch.testing.assert_close(unlearning, loss)
    assert all(parameter.grad is None for teacher in heads.values() for parameter in teacher.parameters())


def test_terms_of_no_weight_are_told_and_change_nothing():
    head, teacher_head = nn.Linear(8, 30), nn.Linear(6, 30)
    hidden, states, targets = torch.randn(20, 8, requires_grad=True), torch.randn(20, 6), torch.randint(30, (20,))
    taught = {"teacher": (states, Head(teacher_head))}
    ce, kl = F.cross_entropy(head(hidden), targets), F.kl_div(
        head(hidden).log_softmax(-1), teacher_head(states).log_softmax(-1), log_target=True, reduction="batchmean"
    )  # fmt: skip
    for terms in ((CrossEntropy(), Divergence(0.0)), (CrossEntropy(0.0), Divergence())):
        weighted = [term for term in terms if term.weight]
        (alone, _), (loss, values) = (
            loss_in_chunks(some, hidden, Head(head), targets, taught) for some in (weighted, terms)
        )
        gradients = [torch.autograd.grad(one, [hidden, head.weight]) for one in (alone, loss)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        assert torch.equal(alone, loss)
        torch.testing.assert_close(values[0].mean(), ce.detach())
        torch.testing.assert_close(values[1].mean(), kl.detach())


def test_a_part_of_a_batch_has_its_share_of_the_loss():
    head, terms = nn.Linear(8, 30), (CrossEntropy(0.7), Divergence(0.4))
    hidden, states, targets = torch.randn(20, 8), torch.randn(20, 8), torch.randint(30, (20,))
    targets[2:9] = IGNORED
    whole, _ = loss_in_chunks(terms, hidden, Head(head), targets, {"teacher": (states, Head(head))})
    parts = [
        loss_in_chunks(
            terms,
            hidden[rows],
            Head(head),
            targets[rows],
            {"teacher": (states[rows], Head(head))},
            counts=Counts(20, 13),
            factor=0.25,
        )[0]
        for rows in (slice(0, 8), slice(8, 20))
    ]
    torch.testing.assert_close(4 * sum(parts), whole)


@given(st.integers(0, 100), st.floats(0.1, 10))
def test_hidden_states_are_compared_by_angle_or_by_distance(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    a, b, c, d = (torch.randn(2, 3, 8, dtype=torch.float64, generator=generator) for _ in range(4))
    cosine, mse = (HiddenStates(distance=distance, sites=("x", "y")).values for distance in ("cosine", "mse"))
    angle = lambda u, v: 1 - (u * v).sum(-1) / (u.norm(dim=-1) * v.norm(dim=-1))  # noqa: E731
    torch.testing.assert_close(cosine([a, b], [c, d]), (angle(a, c) + angle(b, d)).flatten())
    torch.testing.assert_close(cosine([scale * a, b], [c, d]), cosine([a, b], [c, d]))
    torch.testing.assert_close(mse([a, b], [c, d]), (((a - c) ** 2).mean(-1) + ((b - d) ** 2).mean(-1)).flatten())
    assert (mse([a, b], [a, b]) == 0).all()


def test_hidden_states_of_other_widths_are_refused():
    with pytest.raises(InputError, match="hook_out is 8 wide in the student, 6 in the teacher"):
        HiddenStates().values([torch.zeros(1, 2, 8)], [torch.zeros(1, 2, 6)])


def test_a_frozen_head_costs_no_gradient():
    head = nn.Linear(8, 30).requires_grad_(False)
    hidden = torch.randn(20, 8, requires_grad=True)
    loss, _ = loss_in_chunks([CrossEntropy()], hidden, Head(head), torch.zeros(20, dtype=torch.long), chunk=6)
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
    loss, _ = loss_in_chunks([CrossEntropy()], hidden, Head(head), targets, chunk=chunk)
    (chunked,) = torch.autograd.grad(loss, head.weight)
    errors = [(grad.double() - exact.grad).norm() / exact.grad.norm() for grad in (plain, chunked)]
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_without_probability_add_nothing(kind):
    student, teacher = logits(0), logits(1)
    for one in (student, teacher):
        one[:, 3] = float("-inf")
    student.requires_grad_()
    got = Divergence(divergence=kind).nats(student, teacher)
    kept = [i for i in range(12) if i != 3]
    torch.testing.assert_close(got, Divergence(divergence=kind).nats(student[:, kept], teacher[:, kept]))
    got.sum().backward()
    assert student.grad[:, kept].isfinite().all()


def test_no_more_logits_than_a_chunk_are_ever_made():
    seen = []
    projection = nn.Linear(8, 30, bias=False)
    head = Head(projection, lambda projected: seen.append(len(projected)) or projected)
    hidden = torch.randn(20, 8, requires_grad=True)
    loss, _ = loss_in_chunks(
        [Divergence()], hidden, head, torch.zeros(20, dtype=torch.long), {"teacher": (hidden.detach(), head)}, chunk=6
    )
    loss.backward()
    assert max(seen) == 6
    assert projection.weight.grad is not None


def test_without_logit_terms_no_logits_are_made():
    head = Head(nn.Linear(8, 30), lambda projected: pytest.fail("logits were made"))
    loss, values = loss_in_chunks([], torch.randn(20, 8, requires_grad=True), head, torch.zeros(20, dtype=torch.long))
    assert loss == 0
    assert values == []


def test_several_terms_of_one_metric_are_told_apart():
    terms = (CrossEntropy(), Divergence(), Divergence(1.0, "original"), HiddenStates(), HiddenStates(2.0))
    assert labels(terms) == ["ce_nats", "kd_nats.teacher", "kd_nats.original", "hidden.1", "hidden.2"]


def define(kind, metric=None):
    body = {"kind": kind, "__module__": __name__, "__qualname__": f"Of{kind}"} | ({"metric": metric} if metric else {})
    return type("Other", (LogitTerm,), body)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Divergence(divergence="chi_squared"), "chi_squared"),
        (lambda: Divergence(temperature=0.0), "temperature"),
        (lambda: Divergence(temperature=math.nan), "nan"),
        (lambda: Divergence(top_k=0), "top_k"),
        (lambda: Divergence(-1.0), "weight of kd must be 0 or more, but it is -1.0"),
        (lambda: CrossEntropy(math.inf), "inf"),
        (lambda: HiddenStates(distance="angle"), "angle"),
        (lambda: HiddenStates(sites=()), "a site"),
        (lambda: define("kd"), "kind 'kd' .* is Divergence's"),
        (lambda: define("else", "ce_nats"), "metric 'ce_nats' .* is CrossEntropy's"),
        (lambda: define("loss"), "metric 'loss' of term Other is taken"),
        (
            lambda: loss_in_chunks(
                [Divergence()], torch.zeros(2, 3), Head(nn.Linear(3, 4)), torch.zeros(2, dtype=torch.long)
            ),
            "the teacher 'teacher', which is not there",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, named):
    with pytest.raises(InputError, match=named):
        make()


# Labels of the teacher's ----------------------------------------------------------------------------------------------


def test_hard_labels_are_cross_entropy_with_the_teachers_most_likely_token_alone():
    torch.manual_seed(0)
    logits, taught = torch.randn(7, 11, requires_grad=True), torch.randn(7, 13, requires_grad=True)
    targets = torch.zeros(7, dtype=torch.long)
    values = HardLabels().values(logits, targets, taught)
    best = taught[:, :11].argmax(-1)  # vocabularies of different padded size: the shared part
    expected = torch.stack([logits[i].exp().sum().log() - logits[i, best[i]] for i in range(7)])
    assert torch.allclose(values, expected)
    values.sum().backward()
    assert taught.grad is None
    assert torch.equal(values, HardLabels().values(logits, targets, 5 * taught))  # scaled logits teach the same


def test_sampled_labels_have_the_teachers_frequencies_and_are_the_same_again():
    shares = torch.tensor([0.5, 0.3, 0.2])
    taught = shares.log().expand(20_000, 3)
    term = HardLabels(sampled=True)
    found = term.labels(taught)
    counted = torch.bincount(found, minlength=3) / len(found)
    assert torch.allclose(counted, shares, atol=4 * math.sqrt(0.25 / 20_000))
    assert torch.equal(found, term.labels(taught))
    assert not torch.equal(found, term.labels(taught - 1))  # the same distribution, other logits
