import copy
import math

import pytest
import torch

from rope_probe import DocumentOffset, PositionShift, load_model, pack
from rope_probe.distillation import distillation_signal
from rope_probe.distillation import signal as module
from rope_probe.distillation.signal import signal_share
from tests import zoo

WINDOW = pack([zoo.tokens(1, n, seed=n)[0] for n in (10, 13, 7)], 30)


def models(vocabulary=64, name="llama"):
    teacher = load_model(zoo.llama(vocab_size=vocabulary).double())
    return teacher, load_model(zoo.model(zoo.CONFIGS[name](), scale=0.2, seed=1).double())


def value(frame, **where):
    for column, wanted in where.items():
        frame = frame[frame[column].isna() if wanted is None else frame[column] == wanted]
    return frame["value"].item()


def kl(p, q):
    p, q = (x[0, :, :64].log_softmax(-1) for x in (p, q))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vocabulary", [64, 70])
def test_numbers_are_those_of_whole_logits(masked, vocabulary, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 7)
    teacher, student = models(vocabulary)
    shifts = [PositionShift("q", 3.0), DocumentOffset(1, 4.0, "k")]
    frame = distillation_signal(teacher, student, WINDOW, shifts, masked=masked)
    clean, other = teacher(WINDOW, masked=masked).detach(), {}
    for shift in shifts:
        with torch.no_grad():
            other[shift] = teacher.run_with_hooks(WINDOW, masked=masked, fwd_hooks=shift.hooks(teacher, WINDOW))
    attention = student.original_model.model.layers[1].self_attn

    def gradient_to_keys(target):
        loss = kl(target, student(WINDOW)).mean()
        return torch.autograd.grad(loss, attention.k_proj.weight)[0]

    loss = gradient_to_keys(clean)
    assert value(frame, metric="loss_kl_nats", occurrence=None) == pytest.approx(
        kl(clean, student(WINDOW)).mean().item()
    )
    for shift in shifts:
        of_shift = frame[frame["perturbation"] == str(shift)]
        signal = kl(clean, other[shift])
        assert value(of_shift, metric="signal_kl_nats", occurrence=None) == pytest.approx(
            signal.mean().item(), rel=1e-9
        )
        each = of_shift[of_shift["metric"] == "signal_kl_nats_at"].sort_values("position")["value"]
        assert each.tolist() == pytest.approx(signal.tolist(), rel=1e-9, abs=1e-15)
        left = kl(other[shift], student(WINDOW).detach())
        assert value(of_shift, metric="remaining_kl_nats", occurrence=None) == pytest.approx(
            left.mean().item(), rel=1e-9
        )
        remaining = gradient_to_keys(other[shift])
        taken = loss - remaining
        at = {"site": "blocks.1.attn.W_K"}
        assert value(of_shift, metric="signal_gradient", **at) == pytest.approx(taken.norm().item(), rel=1e-9)
        assert value(of_shift, metric="loss_gradient", **at) == pytest.approx(loss.norm().item(), rel=1e-9)
        along = torch.cosine_similarity(remaining.flatten(), loss.flatten(), dim=0).item()
        assert value(of_shift, metric="remaining_gradient_cosine", **at) == pytest.approx(along, rel=1e-9)
        cosine = torch.cosine_similarity(taken.flatten(), loss.flatten(), dim=0).item()
        assert value(of_shift, metric="gradient_cosine", **at) == pytest.approx(cosine, rel=1e-9)


def test_bins_by_distance_average_to_the_whole():
    tokens = torch.tensor([5, 6, 5, 7, 6, 5, 8, 9, 7, 5])
    frame = distillation_signal(*models(), pack([tokens], 10), PositionShift("q", 3.0))
    signal = frame[frame["metric"] == "signal_kl_nats"]
    whole = signal[signal["occurrence"].isna()]["value"].item()
    new, again = (signal[signal["occurrence"] == name].set_index("distance")["value"] for name in ("new", "again"))
    counts = {2: 1, 4: 3, 8: 1}
    assert set(again.index) == set(counts)
    mean = (5 * new.item() + sum(count * again[distance] for distance, count in counts.items())) / 10
    assert mean == pytest.approx(whole)


def test_a_fused_projection_is_told_apart():
    frame = distillation_signal(*models(name="phi3"), WINDOW, PositionShift("q", 3.0))
    gradients = frame[frame["metric"] == "signal_gradient"].set_index("site")["value"]
    assert len(gradients) == 6
    assert gradients.nunique() == 6


def test_a_shift_of_both_sides_takes_nothing():
    frame = distillation_signal(*models(), WINDOW, PositionShift("qk", 3.0))
    taken = frame[frame["metric"].isin(["signal_kl_nats", "signal_gradient"])]
    assert (taken["value"].abs() < 1e-12).all()


def whole(frame):
    shares = signal_share(frame)
    return shares[shares["occurrence"].isna()].set_index("perturbation")["share"]


def test_all_of_the_loss_is_the_signal_where_the_student_is_the_teacher_without_it():
    shift = PositionShift("q", 3.0)
    plain = zoo.llama(vocab_size=64).double()
    teacher, student = load_model(plain), load_model(copy.deepcopy(plain))
    for name, hook in shift.hooks(student, WINDOW):
        student.add_hook(name, hook)
    frame = distillation_signal(teacher, student, WINDOW, [shift, PositionShift("qk", 3.0)])
    assert whole(frame)[str(shift)] == pytest.approx(1, abs=1e-9)
    assert whole(frame)[str(PositionShift("qk", 3.0))] == pytest.approx(0, abs=1e-9)
    of_shift = frame[frame["perturbation"] == str(shift)]
    assert of_shift[of_shift["metric"] == "gradient_cosine"]["value"].tolist() == pytest.approx([1] * 6)
    assert of_shift[of_shift["metric"] == "remaining_gradient"]["value"].max() < 1e-9
    of_both = frame[frame["perturbation"] == str(PositionShift("qk", 3.0))]
    assert of_both[of_both["metric"] == "remaining_gradient_cosine"]["value"].tolist() == pytest.approx([1] * 6)


def test_a_student_that_knows_nothing_loses_what_the_teachers_entropy_says():
    shift = PositionShift("q", 3.0)
    teacher, student = models()
    torch.nn.init.zeros_(student.original_model.lm_head.weight)
    frame = distillation_signal(teacher, student, WINDOW, shift)
    with torch.no_grad():
        other = teacher.run_with_hooks(WINDOW, fwd_hooks=shift.hooks(teacher, WINDOW))
        loss, remaining = (
            math.log(64) + (x[0].softmax(-1) * x[0].log_softmax(-1)).sum(-1).mean().item()
            for x in (teacher(WINDOW), other)
        )
    assert whole(frame).item() == pytest.approx(1 - remaining / loss, abs=1e-9)
    over = value(frame, metric="signal_kl_nats", occurrence=None) / loss
    assert over > 5 * abs(whole(frame).item())  # what the ratio of the two KLs would have said
