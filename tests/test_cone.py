import pytest
import torch

from rope_probe import DocumentOffset, PositionShift, ThetaSwap, load_model, pack, trace
from rope_probe.runs import progress as progress_module
from rope_probe.tracing import cone
from rope_probe.tracing.cone import Cone, cone_of
from rope_probe.tracing.propagation import trace_work
from tests import zoo

WINDOW = pack([zoo.tokens(1, n, seed=n)[0] for n in (10, 13, 7)], 30)


def cone_in_window(perturbation, masked=False):
    return cone_of(perturbation.turns(zoo.llama(num_hidden_layers=4), 30, WINDOW), WINDOW, masked)


@pytest.mark.parametrize(
    ("perturbation", "unmasked", "masked"),
    [
        (PositionShift("q", 1.0), Cone(0, ((0, 0, 30),)), Cone(0, ((0, 0, 10), (10, 10, 23), (23, 23, 30)))),
        (PositionShift("k", 1.0, layers=[3, 2], positions=[12, 8]), Cone(2, ((0, 8, 30),)),
         Cone(2, ((0, 8, 10), (10, 12, 23)))),
        (DocumentOffset(1, 5.0), Cone(0, ((0, 10, 30),)), Cone(0, ((10, 10, 23),))),
        (ThetaSwap("k", 300.0, layers=1, positions=range(4)), Cone(1, ((0, 1, 30),)), Cone(1, ((0, 1, 10),))),
        (PositionShift("q", 0.0), None, None),
    ],
)  # fmt: skip
def test_the_cone_begins_where_something_turns(perturbation, unmasked, masked):
    assert cone_in_window(perturbation) == unmasked
    assert cone_in_window(perturbation, masked=True) == masked


def positions_run(perturbations, **options):
    """How many positions each layer's MLP reads in a trace."""
    model, read = load_model(zoo.llama(num_hidden_layers=4)), [0] * 4
    for layer, module in enumerate(model.original_model.model.layers):
        module.mlp.register_forward_pre_hook(
            lambda module, args, layer=layer: read.__setitem__(layer, read[layer] + args[0].shape[:2].numel())
        )
    trace(model, WINDOW, perturbations, **options)
    return read


def test_layers_below_and_positions_before_a_perturbation_run_once():
    assert positions_run([PositionShift("q", 1.0, layers=2)]) == [30, 30, 60, 60]
    assert positions_run([PositionShift("q", 1.0, layers=layer) for layer in range(4)]) == [60, 90, 120, 150]
    assert positions_run([PositionShift("k", 1.0, layers=1, positions=[27])]) == [30, 33, 33, 33]
    assert positions_run([DocumentOffset(1, 4.0)], masked=True, control=False) == [43, 43, 43, 43]
    assert positions_run([PositionShift("qk", 0.0)]) == [30, 30, 30, 30]


def test_perturbations_of_one_set_of_positions_share_calls(monkeypatch):
    monkeypatch.setattr(cone, "CALL_TOKENS", 90)
    model, calls = load_model(zoo.llama()), []
    model.original_model.model.layers[1].mlp.register_forward_pre_hook(
        lambda module, args: calls.append(list(args[0].shape[:2]))
    )
    late = PositionShift("q", 1.0, positions=[20])
    trace(model, WINDOW, [*(PositionShift("q", float(n)) for n in range(1, 5)), late])
    assert calls == [[1, 30], [3, 30], [1, 30], [1, 10]]


def test_no_hook_is_left_behind_even_after_an_error():
    model = load_model(zoo.llama())
    before = model(WINDOW)

    def stop(layers):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(model, WINDOW, PositionShift("q", 1.0), progress=stop)
    torch.testing.assert_close(model(WINDOW), before, rtol=0, atol=0)
    assert not any(point.has_hooks() for point in model.hook_dict.values())
    assert all(len(m._forward_hooks) == 1 for m in model.original_model.model.layers)


def test_progress_sums_to_the_work_of_layers_and_logits_in_every_pass():
    model, told = load_model(zoo.llama()), []
    shifts = [PositionShift("q", float(n)) for n in range(5)]  # the first is no shift, and still counts
    trace(model, WINDOW, shifts, rows=2, control=True, progress=told.append)
    assert sum(told) == trace_work(model, 5, control=True)
    told.clear()
    trace(model, WINDOW, shifts, sites=["blocks.1.hook_resid_post"], progress=told.append)
    assert sum(told) == trace_work(model, 5, sites=["blocks.1.hook_resid_post"]) == 5 * 2


def test_progress_goes_on_while_logits_are_made(monkeypatch):
    """A head of many weights is many layers of work, told block by block."""
    monkeypatch.setattr(cone, "LOGIT_TOKENS", 10)
    monkeypatch.setattr(cone, "LOGIT_ELEMENTS", {"cpu": 1, "cuda": 1})
    model, told = load_model(zoo.llama(vocab_size=5000)), []
    trace(model, WINDOW, PositionShift("q", 1.0), progress=told.append)
    weights_of_layer = sum(p.numel() for p in model.original_model.model.layers[0].parameters())
    head = round(5000 * 32 / weights_of_layer)
    assert told[:2] == [1, 1]
    assert sum(told[2:]) == head
    assert len(told[2:]) == len(WINDOW) // 5  # blocks of 10 tokens, half of them the clean pass's


def test_nothing_to_run_is_all_done():
    model, told = load_model(zoo.llama()), []
    trace(model, WINDOW, PositionShift("q", 0.0), progress=told.append)
    assert sum(told) == trace_work(model, 1)


def test_trace_shows_a_bar_of_its_own_if_asked(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "_PLAIN_SHORTEST_S", 0.0)
    model = load_model(zoo.llama())
    trace(model, WINDOW, PositionShift("q", 1.0), progress=True)
    work = trace_work(model, 1)
    assert f"layers of perturbed passes: {work}/{work}" in capsys.readouterr().err
