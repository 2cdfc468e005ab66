import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rope_probe import (
    DocumentOffset,
    InputError,
    PairFreeze,
    PositionJitter,
    PositionShift,
    ThetaSwap,
    copy_deltas,
    load_model,
    pack,
    repeated_window,
    trace,
)
from rope_probe.tracing import cone, propagation
from rope_probe.tracing.propagation import DELTAS
from tests import zoo

PERTURBATIONS = [PositionShift("q", 3.0), PositionShift("k", -0.25, layers=1), PositionJitter("qk", 4.0, positions=[5]),
                 ThetaSwap("q", 300.0, heads=0), PairFreeze("k", [0, 1]), DocumentOffset(1, 9.0)]  # fmt: skip


def packed():
    return pack([zoo.tokens(1, n, seed=n)[0] for n in (10, 13, 7)], 30)


def two_plain_passes(model, window, perturbation, masked=False, base=()):
    """The same deltas, the long way round: two forward passes, everything cached, textbook formulas."""
    sites = [*propagation.default_sites(model), "hook_embed", "blocks.1.attn.hook_z", "ln_final.hook_out"]
    passes = []
    for hooks in ([], perturbation.hooks(model, window)):
        cache = {}
        reads = [(name, lambda x, hook, cache=cache: cache.update({hook.name: x.clone()})) for name in sites[:-4]]
        reads += [(name, lambda x, hook, cache=cache: cache.update({hook.name: x.clone()})) for name in sites[-3:]]
        with torch.no_grad():
            logits = model.run_with_hooks(window, masked=masked, fwd_hooks=[*base, *hooks, *reads])
        passes.append({**cache, "logits": logits})
    rows = []
    for site in sites:
        a, b = (one[site][0].flatten(1).numpy() for one in passes)
        norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
        l2 = np.linalg.norm(b - a, axis=1)
        found = {"l2": l2, "rel_l2": l2 / norms[0], "cosine_distance": 1 - (a * b).sum(1) / norms[0] / norms[1]}
        if site == "logits":
            p = np.exp(a) / np.exp(a).sum(1, keepdims=True)
            q = np.exp(b) / np.exp(b).sum(1, keepdims=True)
            found |= {"kl_nats": (p * np.log(p / q)).sum(1), "top1_flips": (a.argmax(1) != b.argmax(1)).astype(float)}
        rows += [(site, metric, position, x) for metric, xs in found.items() for position, x in enumerate(xs)]
    return pd.DataFrame(rows, columns=["site", "metric", "position", "value"])


def check_against_plain(model, perturbations, masked, base=(), **options):
    sites = [*propagation.default_sites(model), "hook_embed", "blocks.1.attn.hook_z", "ln_final.hook_out"]
    with model.hooks(fwd_hooks=list(base)):
        frame = trace(
            model, packed(), perturbations, sites=sites, masked=masked, by="position", control=False, **options
        )
    for perturbation in perturbations:
        got = frame[frame["perturbation"] == str(perturbation)]
        expected = two_plain_passes(model, packed(), perturbation, masked, base)
        both = got.merge(expected, on=["site", "metric", "position"], suffixes=("", "_plain"))
        assert len(both) == len(got) == len(expected)
        np.testing.assert_allclose(both["value"], both["value_plain"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_a_trace_equals_two_plain_passes(name, masked):
    rotating = next(i for i, one in reversed([*enumerate(load_model(zoo.model(zoo.CONFIGS[name]())).rotary)]) if one)
    late = [PositionShift("k", 3.0, layers=rotating, positions=[17, 25]), DocumentOffset(1, 9.0)]
    model = load_model(zoo.model(zoo.CONFIGS[name]()).double())
    check_against_plain(model, [PositionShift("q", 3.0), *late, PairFreeze("k", [0])], masked)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral_sliding", "gemma2"])
def test_a_trace_equals_two_plain_passes_of_the_eager_kernel(name, masked):
    model = load_model(zoo.model(zoo.CONFIGS[name]()).double(), attn="eager")
    check_against_plain(model, PERTURBATIONS, masked)


SELECTIONS = st.one_of(st.none(), st.lists(st.integers(0, 1), min_size=1, max_size=2, unique=True))
RANDOM = st.builds(
    lambda kind, side, size, layers, heads, pairs, start, width: {
        "shift": lambda **where: PositionShift(side, size, **where),
        "jitter": lambda **where: PositionJitter(side, abs(size), **where),
        "theta": lambda **where: ThetaSwap(side, 10 + abs(size), **where),
        "offset": lambda **where: DocumentOffset(start % 3, size, side, **where),
    }[kind](layers=layers, heads=heads, pairs=pairs, positions=range(start, min(30, start + width))),
    st.sampled_from(["shift", "jitter", "theta", "offset"]), st.sampled_from(["q", "k", "qk"]), st.floats(-40, 40),
    SELECTIONS, SELECTIONS, SELECTIONS, st.integers(0, 29), st.integers(1, 30),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    perturbations=st.lists(RANDOM, min_size=1, max_size=4, unique_by=str),
    masked=st.booleans(),
    name=st.sampled_from(["llama", "mistral_sliding", "qwen3", "phi3_partial"]),
    rows=st.integers(1, 4),
)
def test_a_trace_of_anything_equals_two_plain_passes(perturbations, masked, name, rows):
    model = load_model(zoo.model(zoo.CONFIGS[name]()).double())
    check_against_plain(model, perturbations, masked, rows=rows)


@pytest.mark.parametrize("masked", [False, True])
def test_hooks_of_the_user_hold_in_every_pass(masked):
    def swap_halves(x, hook):
        return torch.cat([x[:, 15:], x[:, :15]], 1)

    def grow(x, hook):
        return 1.5 * x

    model = load_model(zoo.llama(num_hidden_layers=3).double())
    base = [("blocks.1.hook_mlp_out", swap_halves), ("blocks.1.hook_resid_pre", grow), ("blocks.2.attn.hook_v", grow)]
    check_against_plain(model, PERTURBATIONS, masked, base)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 7), by=st.sampled_from(["document", "window"]))
def test_grouping_and_averaging_do_not_change_the_numbers(rows, by):
    model = load_model(zoo.llama().double())
    window = packed()
    each = trace(model, window, PERTURBATIONS, by="position", control=False)
    frame = trace(model, window, PERTURBATIONS, by=by, rows=rows, control=False)
    keys = ["perturbation", "site", "metric"] + (["document"] if by == "document" else [])
    expected = each.groupby(keys, sort=False)["value"].mean().reset_index()
    both = frame.merge(expected, on=keys, suffixes=("", "_each"))
    assert len(both) == len(frame)
    np.testing.assert_allclose(both["value"], both["value_each"], rtol=0, atol=1e-12)


def test_logits_in_blocks_are_the_same(monkeypatch):
    model = load_model(zoo.llama().double())
    whole = trace(model, packed(), PERTURBATIONS, control=False)
    monkeypatch.setitem(cone.LOGIT_ELEMENTS, "cpu", 64 * 7 * 7)
    monkeypatch.setattr(cone, "LOGIT_TOKENS", 1)
    blocks = trace(model, packed(), PERTURBATIONS, control=False)
    np.testing.assert_allclose(whole["value"], blocks["value"], rtol=0, atol=1e-12)


def test_no_more_logits_than_a_block_are_ever_held(monkeypatch):
    model = load_model(zoo.llama())
    monkeypatch.setitem(cone.LOGIT_ELEMENTS, "cpu", 64 * 3 * 4)
    monkeypatch.setattr(cone, "LOGIT_TOKENS", 1)
    sizes = []
    unembed = model.unembed
    monkeypatch.setattr(model, "unembed", lambda hidden: sizes.append(hidden[..., 0].numel()) or unembed(hidden))
    trace(model, packed(), PERTURBATIONS[:2])
    assert max(sizes) <= 2 * 4
    assert sum(sizes) == 3 * 30  # the clean pass once, each perturbed one once


def test_frames_are_tidy():
    model = load_model(zoo.llama())
    frame = trace(model, packed(), [PositionShift("k", 2.0, layers=1, heads=0, pairs=3)], masked=True)
    assert list(frame.columns) == list(DELTAS.columns)
    row = frame.iloc[0]
    assert (row["side"], row["delta_tokens"], row["inject_layer"], row["head"], row["pair"]) == ("k", 2.0, 1, 0, 3)
    assert row["wavelength"] == pytest.approx(2 * np.pi * 1e4 ** (6 / 8), rel=1e-6)
    assert set(frame["document"]) == {0, 1, 2}
    logits = frame[frame["site"] == "logits"]
    assert set(logits["metric"]) == {"l2", "rel_l2", "cosine_distance", "kl_nats", "top1_flips"}
    assert logits["layer"].isna().all()


def test_what_comes_before_a_perturbation_does_not_change():
    model = load_model(zoo.llama())
    frame = trace(model, packed(), PositionShift("q", 3.0, layers=1, positions=range(20, 30)), by="position")
    early = frame[(frame["position"] < 20) | (frame["layer"] == 0)]
    assert (early["value"] == 0).all()
    assert (
        frame[(frame["position"] >= 20) & (frame["site"] == "logits") & (frame["metric"] == "l2")]["value"] > 0
    ).all()


def test_the_control_tells_rounding_from_signal():
    model = load_model(zoo.llama())
    shifts = [PositionShift("qk", 5.0), DocumentOffset(1, 5.0), PositionShift("q", 5.0)]
    frame = trace(model, packed(), shifts, masked=True)
    verdicts = propagation.attribute(frame).set_index(["perturbation", "site", "metric"])["verdict"]
    for metric in ("l2", "rel_l2", "cosine_distance", "kl_nats"):
        assert verdicts[str(shifts[0]), "logits", metric] == "rounding"
        assert verdicts[str(shifts[1]), "logits", metric] == "rounding"
        assert verdicts[str(shifts[2]), "logits", metric] == "signal"
    assert verdicts[str(shifts[1]), "blocks.1.attn.hook_rot_q", "l2"] == "signal"
    assert verdicts[str(shifts[2]), "blocks.0.attn.hook_rot_k", "l2"] == "none"


def test_rounding_is_rounding_on_a_float64_model_too():
    model = load_model(zoo.llama().double())
    frame = trace(model, packed(), [PositionShift("qk", 5.0), PositionShift("q", 5.0)], masked=True)
    verdicts = propagation.attribute(frame).set_index(["side", "site", "metric"])["verdict"]
    for metric in ("l2", "rel_l2", "cosine_distance", "kl_nats"):
        assert verdicts["qk", "logits", metric] == "rounding"
        assert verdicts["q", "logits", metric] == "signal"


def test_weights_that_are_no_numbers_are_named():
    plain = zoo.llama()
    plain.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    for call in (lambda m: trace(m, packed(), PERTURBATIONS[:1]), lambda m: copy_deltas(m, repeated_window(7, 3))):
        with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight is not finite"):
            call(load_model(plain))


def test_the_wavelength_is_told_where_it_is_one():
    model = load_model(zoo.model(zoo.CONFIGS["gemma3"]()))
    everywhere, local = (PositionShift("q", 1.0, pairs=[2], layers=layers) for layers in (None, 0))
    frame = trace(model, packed(), [everywhere, local])
    assert frame[frame["inject_layer"].isna()]["wavelength"].isna().all()
    assert frame[frame["inject_layer"] == 0]["wavelength"].notna().all()
    assert (frame["pair"] == 2).all()


def test_the_control_is_there_by_default_where_masked_and_on_request_elsewhere():
    model = load_model(zoo.llama())
    assert trace(model, packed(), PERTURBATIONS[:1], masked=True)["value_float64"].notna().all()
    assert trace(model, packed(), PERTURBATIONS[:1], control=True)["value_float64"].notna().all()
    bare = trace(model, packed(), PERTURBATIONS[:1])
    assert bare["value_float64"].isna().all()
    with pytest.raises(InputError, match="control=True"):
        propagation.attribute(bare)


def test_copies_equal_what_a_cache_says():
    model = load_model(zoo.llama().double())
    window = repeated_window(zoo.tokens(1, 10)[0], 3)
    frame = copy_deltas(model, window)
    logits, cache = model.run_with_cache(window)
    for site in ("blocks.0.hook_resid_post", "blocks.1.attn.hook_rot_k", "logits"):
        x = (logits if site == "logits" else cache[site])[0].flatten(1).view(3, 10, -1)
        for copy in (1, 2):
            expected = (x[copy] - x[0]).norm(dim=1).mean().item()
            got = frame[(frame["site"] == site) & (frame["metric"] == "l2") & (frame["document"] == copy)]["value"]
            assert got.item() == pytest.approx(expected, abs=1e-12)


def test_a_repeated_token_hides_its_position_and_a_repeated_document_does_not():
    model = load_model(zoo.llama())
    token = copy_deltas(model, repeated_window(7, 20), control=True)
    arrived = token[token["site"].isin(["logits", "blocks.0.hook_resid_post", "blocks.1.attn.unrotated_q"])]
    assert (arrived["value_float64"] < 1e-12).all()
    rotated = token[(token["site"] == "blocks.1.attn.hook_rot_q") & (token["metric"] == "rel_l2")]
    assert (rotated["value_float64"] > 1e-2).all()
    document = repeated_window(zoo.tokens(1, 10)[0], 4)
    seen = copy_deltas(model, document)
    assert (seen[(seen["site"] == "logits") & (seen["metric"] == "l2")]["value"] > 1e-2).all()
    masked = copy_deltas(model, document, masked=True)
    assert (masked[masked["site"] == "logits"]["value_float64"] < 1e-12).all()


def test_a_token_before_the_copies_lets_their_position_through():
    model = load_model(zoo.llama())
    frame = copy_deltas(model, pack([[9], *[[7]] * 10], 11), reference=1, control=True)
    logits = frame[(frame["site"] == "logits") & (frame["metric"] == "l2")]
    assert logits["document"].tolist() == list(range(2, 11))
    assert (logits["value_float64"] > 1e-3).all()


@pytest.mark.parametrize("name", ["llama", "smollm3_nope_layer"])
def test_undoing_the_rotation_of_the_first_layer_leaves_no_position(name):
    model = load_model(zoo.model(zoo.CONFIGS[name]()).double())
    frame = copy_deltas(model, repeated_window(zoo.tokens(1, 10)[0], 3))
    first = frame[frame["site"].isin(["blocks.0.attn.unrotated_q", "blocks.0.attn.unrotated_k"])]
    assert len(first) == 12
    assert (first["value"] < 1e-10).all()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda m: trace(m, packed(), PERTURBATIONS, sites=["blocks.7.hook_resid_post"]), "blocks.7"),
        (lambda m: trace(m, packed(), PERTURBATIONS, by="chapter"), "chapter"),
        (
            lambda m: trace(
                load_model(m.original_model, attn="eager"),
                packed(),
                PERTURBATIONS,
                sites=["blocks.0.attn.hook_pattern"],
            ),
            "hook_z",
        ),
        (lambda m: trace(m, packed(), [DocumentOffset(5, 1.0)]), "document 5"),
        (lambda m: copy_deltas(m, packed()), "one length"),
        (lambda m: copy_deltas(m, pack(list(zoo.tokens(3, 10)), 30)), "repeated_window"),
        (lambda m: copy_deltas(m, repeated_window(7, 3), reference=2), "4 or more"),
    ],
)
def test_bad_calls_are_refused_by_name(call, named):
    with pytest.raises(InputError, match=named):
        call(load_model(zoo.llama()))


@pytest.mark.parametrize(("layers", "told"), [
    (None, None), (1, None), ((1,), None), ((0, 1), "0-1"), ([3, 0, 1, 2, 5], "0-3, 5"), (range(4, 7), "4-6"),
    ((5, 11, 17), "5, 11, 17"),
])  # fmt: skip
def test_several_layers_are_told_as_ranges(layers, told):
    assert propagation._several(layers) == told
