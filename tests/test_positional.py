"""The positional decomposition against sums written down by hand, planted channels of position, and patches."""

import itertools

import accelerate
import numpy as np
import pytest
import torch
import transformers as hf

import rope_probe
from rope_probe import (
    AttentionTemperature,
    InputError,
    PlacedContents,
    load_model,
    positional_alignment,
    positional_part,
    positional_parts,
    positional_patches,
    principal_directions,
)
from rope_probe.gallery import figures as plots
from rope_probe.tracing import positional
from rope_probe.tracing.positional import SHARES, default_sites, states_at, two_way
from rope_probe.tracing.positional_transfer import _by_contents, moved
from tests import zoo

CONTENTS, LENGTH, WINDOW, PLACES = 4, 5, 24, (0, 6, 11, 19)


def placed(own_fillers=False, contents=CONTENTS, places=PLACES):
    generator = torch.Generator().manual_seed(1)
    filler = (contents, WINDOW) if own_fillers else (WINDOW,)
    return PlacedContents(
        torch.randint(3, 64, (contents, LENGTH), generator=generator),
        torch.randint(3, 64, filler, generator=generator),
        places,
    )


def by_hand(table):
    """Shares of content, position and interaction of a table [D, P, n, ...], summed cell by cell."""
    table = np.asarray(table, float).reshape(*table.shape[:2], -1)
    contents, places, _ = table.shape
    mean = sum(table[d, p] for d in range(contents) for p in range(places)) / (contents * places)
    sums, total = np.zeros(3), 0.0
    for d, p in itertools.product(range(contents), range(places)):
        of_content = sum(table[d, q] for q in range(places)) / places - mean
        of_position = sum(table[e, p] for e in range(contents)) / contents - mean
        rest = table[d, p] - mean - of_content - of_position
        sums += [np.sum(part**2) for part in (of_content, of_position, rest)]
        total += np.sum((table[d, p] - mean) ** 2)
    return sums / total, total


def shares(frame, site):
    rows = frame[frame["site"] == site].set_index("metric")["value"]
    return rows[list(SHARES)].to_numpy(float)


def value(frame, site, metric):
    return frame[(frame["site"] == site) & (frame["metric"] == metric)]["value"].item()


def llama(layers=2):
    return load_model(zoo.llama(num_hidden_layers=layers).double())


def add_by_place(vectors):
    """A hook that adds to the states of each position a vector of its own, [T, M]: position by one known channel."""
    return lambda x, hook: x + vectors[: x.shape[1]].to(x)


def random_vectors(seed, scale=1.0):
    return scale * torch.randn(WINDOW, zoo.SIZES["hidden_size"], dtype=torch.float64, generator=_generator(seed))


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def test_two_way_is_what_is_worked_out_on_paper():
    # Means: rows 2, 5; columns 2, 3.5, 5; all 3.5. Position -1.5, 0, 1.5; content -1.5, 1.5; rest +-.5 and 0.
    table = torch.tensor([[1.0, 2.0, 3.0], [3.0, 5.0, 7.0]])
    parts = two_way(table)
    assert parts.mean.item() == 3.5
    assert parts.content.flatten().tolist() == [-1.5, 1.5]
    assert parts.position.flatten().tolist() == [-1.5, 0, 1.5]
    assert parts.interaction.tolist() == [[0.5, 0, -0.5], [-0.5, 0, 0.5]]
    assert parts.sums_of_squares == (13.5, 9.0, 1.0)
    assert sum(parts.sums_of_squares) == pytest.approx(float((table - 3.5).square().sum()))
    expected, _ = by_hand(table)
    np.testing.assert_allclose(np.array(parts.sums_of_squares) / 23.5, expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "glm", "smollm3_nope_layer"])
def test_shares_are_those_worked_out_by_hand_and_sum_to_1(name, masked):
    model = load_model(zoo.model(zoo.CONFIGS[name]()).double())
    contents = placed(own_fillers=name == "llama")
    frame = positional_parts(model, contents, masked=masked)
    assert list(frame["site"].unique()) == default_sites(model)
    for site in default_sites(model):
        states = states_at(model, contents, site, masked=masked)
        if site == "logits":
            with torch.no_grad():
                states = model.unembed(states.flatten(0, 1)).view(CONTENTS, len(PLACES), LENGTH, -1)
            states = states - states.mean(-1, keepdim=True)
        expected, total = by_hand(states)
        found = shares(frame, site)
        assert found.sum() == pytest.approx(1, abs=1e-14)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-14, err_msg=site)
        assert value(frame, site, "position_by_chance") == pytest.approx(found[2] / (CONTENTS - 1))
        assert value(frame, site, "mean_square") == pytest.approx(total / (CONTENTS * len(PLACES) * LENGTH))
    attention = frame[frame["site"].isin(["blocks.1.attn.unrotated_q", "logits"])]
    assert (attention["places"] == len(PLACES)).all()
    assert (attention["content_length"] == LENGTH).all()


def test_states_stand_where_the_contents_do():
    model, contents = llama(), placed(own_fillers=True)
    states = states_at(model, contents, "blocks.1.hook_resid_post")
    for d, p in itertools.product(range(CONTENTS), range(len(PLACES))):
        tokens = torch.cat([contents.filler[d, : PLACES[p]], contents.contents[d]])
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter="blocks.1.hook_resid_post")
        torch.testing.assert_close(states[d, p], cache["resid_post", 1][0, -LENGTH:])


def test_masked_documents_of_a_rope_model_have_no_place():
    model = llama()
    frame = positional_parts(model, placed(), masked=True)
    for site in default_sites(model):
        _, position, interaction = shares(frame, site)
        if "hook_rot" in site:  # rotation itself depends on the place, and turns each content its own way
            assert min(position, interaction) > 1e-6
        else:
            assert max(position, interaction) < 1e-24
    assert value(frame, "logits", "position_kl_nats") < 1e-24
    in_float32 = positional_parts(load_model(zoo.llama()), placed(), masked=True)
    assert shares(in_float32, "logits")[1] < 1e-9


def test_a_learnt_bias_is_attributed_to_position_and_to_nothing_before_it():
    model, contents, site = llama(), placed(), "blocks.1.hook_resid_pre"
    vectors = random_vectors(2)
    clean = states_at(model, contents, site, masked=True)
    with model.hooks(fwd_hooks=[(site, add_by_place(vectors))]):
        frame = positional_parts(model, contents, masked=True, sites=[*default_sites(model), site])
        part = positional_part(model, contents, [site], masked=True)[site]
    bias = torch.stack([vectors[place : place + LENGTH] for place in PLACES])  # [P, n, M]
    bias = bias - bias.mean(0)
    torch.testing.assert_close(part, bias)
    of_position = CONTENTS * bias.square().sum()
    content = (clean - clean.mean(0)).square().sum()
    expected = torch.stack([content, of_position]) / (content + of_position)
    found = shares(frame, site)
    np.testing.assert_allclose(found[:2], expected, rtol=1e-12)
    assert found[2] < 1e-14  # it is added to every content alike
    for other in default_sites(model):
        _, position, _ = shares(frame, other)
        if other.startswith("blocks.0"):
            assert "hook_rot" in other or position < 1e-24
        else:
            assert position > 1e-4
    assert value(frame, "logits", "position_kl_nats") > 1e-4


def test_a_temperature_by_position_is_seen_in_the_queries_it_scales_and_in_no_key():
    model, contents = llama(), placed()
    clean = states_at(model, contents, "blocks.1.attn.unrotated_q", masked=True)
    temperature = AttentionTemperature("log_n", reference=2, layers=1)
    with model.hooks(fwd_hooks=temperature.hooks(model)):
        frame = positional_parts(model, contents, masked=True)
    positions = torch.tensor(PLACES).unsqueeze(1) + torch.arange(LENGTH)
    factors = (torch.log1p(positions.double()) / np.log(2)).clamp(min=1)  # [P, n]
    expected, _ = by_hand(clean * factors[None, :, :, None, None])
    np.testing.assert_allclose(shares(frame, "blocks.1.attn.unrotated_q"), expected, rtol=1e-9)
    assert expected[1] > 1e-3
    for site in default_sites(model):
        _, position, interaction = shares(frame, site)
        above = site in ("blocks.1.attn.unrotated_q", "blocks.1.hook_attn_out", "blocks.1.hook_resid_post", "logits")
        if "hook_rot" not in site:
            assert [position > 1e-8, interaction > 1e-8] == [above, above], site


def nope_model():
    """A layer without RoPE whose queries are zero, then one with RoPE: place enters by the number of keys alone."""
    config = hf.SmolLM3Config(**zoo.SIZES, no_rope_layers=[0, 1])
    plain = zoo.model(config).double()
    plain.model.layers[0].self_attn.q_proj.weight.data.zero_()
    return load_model(plain)


@pytest.mark.parametrize("own_fillers", [False, True])
def test_the_number_of_keys_of_a_causal_softmax_is_seen_first_in_what_attention_adds(own_fillers):
    model, contents = nope_model(), placed(own_fillers)
    attention = model.original_model.model.layers[0].self_attn
    table = torch.empty(CONTENTS, len(PLACES), LENGTH, zoo.SIZES["hidden_size"], dtype=torch.float64)
    for d, p in itertools.product(range(CONTENTS), range(len(PLACES))):
        with torch.no_grad():
            _, cache = model.run_with_cache(contents.window(d, p), names_filter="blocks.0.attn.hook_v")
            values = cache["v", 0][0]  # [T, K, D]
            seen = torch.arange(1, len(values) + 1).view(-1, 1, 1)
            mean = values.cumsum(0) / seen  # every key counts alike
            added = attention.o_proj(mean.repeat_interleave(2, 1).flatten(1))
        table[d, p] = added[-LENGTH:]
    expected, _ = by_hand(table)
    frame = positional_parts(model, contents)
    np.testing.assert_allclose(shares(frame, "blocks.0.hook_attn_out"), expected, rtol=1e-9)
    assert expected[1] > 0.01
    for site in ("blocks.0.attn.hook_rot_k",):  # no layer below has told it where it stands
        np.testing.assert_allclose(shares(frame, site), [1, 0, 0], atol=1e-20)
    assert np.isnan(shares(frame, "blocks.0.attn.hook_rot_q")).all(), "zero in every cell"
    assert shares(frame, "blocks.1.attn.unrotated_k")[1] > 1e-4
    assert "blocks.0.attn.unrotated_q" not in default_sites(model)


def test_few_contents_leave_in_position_what_is_told_by_chance():
    table = torch.randn(6, 5, 20_000, dtype=torch.float64, generator=_generator(0))
    content, position, interaction = two_way(table).sums_of_squares
    assert position == pytest.approx(interaction / (6 - 1), rel=0.03)
    table += 0.5 * torch.randn(1, 5, 20_000, dtype=torch.float64, generator=_generator(1))
    _, position, interaction = two_way(table).sums_of_squares
    assert position > 2 * interaction / (6 - 1)
    assert content > 0


def test_a_planted_line_is_the_one_principal_direction():
    model, contents, site = llama(), placed(), "blocks.1.hook_resid_pre"
    line = torch.nn.functional.normalize(random_vectors(3)[0], dim=0)
    along = torch.arange(WINDOW, dtype=torch.float64)
    with model.hooks(fwd_hooks=[(site, add_by_place(torch.outer(along, line)))]):
        part = positional_part(model, contents, [site], masked=True)[site]
    directions = principal_directions(part)
    assert directions.shares[0].item() == pytest.approx(1)
    assert directions.shares.sum().item() == pytest.approx(1)
    assert abs(float(directions.vectors[0] @ line)) == pytest.approx(1)
    places = torch.tensor(PLACES, dtype=torch.float64)
    expected = (places - places.mean()).unsqueeze(1).expand(-1, LENGTH)
    sign = torch.sign(directions.vectors[0] @ line)
    torch.testing.assert_close(sign * directions.coordinates[:, :, 0], expected)
    rebuilt = torch.einsum("pnr,rw->pnw", directions.coordinates, directions.vectors)
    torch.testing.assert_close(rebuilt, part)
    with pytest.raises(InputError, match="zero everywhere"):
        principal_directions(torch.zeros(3, 2, 4))


SITE = "blocks.1.hook_resid_pre"


def biased(vectors):
    model = llama()
    model.add_hook(SITE, add_by_place(vectors))
    return model


def aligned(first, second, **options):
    frame = positional_alignment(first, second, placed(places=tuple(range(0, 19, 3))), masked=True, **options)
    return frame.set_index("metric")


def test_models_with_one_bias_are_aligned_and_their_slope_is_its_size():
    found = aligned(biased(random_vectors(4)), biased(random_vectors(4, scale=2.0)), site=SITE)
    assert found.loc["cosine", "value"] == pytest.approx(1)
    across = found.loc["cosine_across_contents", ["value", "low", "high"]].astype(float)
    np.testing.assert_allclose(across, 1, rtol=1e-9)
    assert found.loc["slope", "value"] == pytest.approx(2)
    assert found.loc["p_value", "value"] < 0.01
    assert found.loc["cosine_places_permuted", "high"] < 0.6
    logits = aligned(biased(random_vectors(4)), biased(random_vectors(4)))
    assert logits.loc["cosine", "value"] == pytest.approx(1)
    assert set(logits["site"]) == {"logits"}


def test_models_with_biases_of_their_own_are_not_aligned():
    found = aligned(biased(random_vectors(4)), biased(random_vectors(5)), site=SITE)
    low, high = found.loc["cosine_places_permuted", ["low", "high"]]
    assert low <= found.loc["cosine", "value"] <= high
    assert found.loc["p_value", "value"] > 0.05


def test_what_two_models_owe_to_the_same_contents_is_no_alignment_across_contents():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(4, 5, 20_000))  # the same interaction in both, and no position
    shared -= shared.mean(1, keepdims=True)
    products = np.einsum("dpf,epf->de", shared, shared)
    rows = {row["metric"]: row for row in _by_contents(np.stack([products] * 3), 99, rng)}
    assert rows["cosine"]["value"] == pytest.approx(1)
    across = rows["cosine_across_contents"]["value"]
    assert np.isnan(across) or abs(products.trace() / products.sum() - 1) < 0.1
    assert abs((products.sum() - products.trace()) / products.trace()) < 0.1
    position = rng.normal(size=(1, 5, 20_000))
    moves = shared + position - position.mean(1, keepdims=True)
    products = np.einsum("dpf,epf->de", moves, moves)
    rows = {row["metric"]: row for row in _by_contents(np.stack([products] * 3), 99, rng)}
    assert rows["cosine_across_contents"]["value"] == pytest.approx(1)
    assert rows["slope"]["low"] <= 1 <= rows["slope"]["high"]


def test_alignment_is_that_of_the_parts():
    contents = placed()
    models = biased(random_vectors(4)), load_model(zoo.llama(num_hidden_layers=2).double())
    for site in ("logits", "blocks.1.attn.hook_rot_q"):
        one, other = (positional_part(model, contents, [site])[site].flatten() for model in models)
        expected = float(one @ other / (one.norm() * other.norm()))
        frame = positional_alignment(*models, contents, site=site, draws=19).set_index("metric")
        assert frame.loc["cosine", "value"] == pytest.approx(expected, rel=1e-9)
        assert np.isnan(frame.loc["cosine", "low"])


def test_a_patch_of_the_channel_makes_here_there_and_one_beside_it_does_nothing():
    model, contents, site = llama(), placed(), "blocks.0.hook_resid_post"
    with model.hooks(fwd_hooks=[(site, add_by_place(random_vectors(6)))]):
        parts = positional_part(model, contents, [site], masked=True)
        for content in range(CONTENTS):
            with torch.no_grad():
                there = model(contents.window(content, 3), masked=True)[0, -LENGTH:]
                with moved(model, parts, contents, 1, 3):
                    here = model(contents.window(content, 1), masked=True)[0, -LENGTH:]
            torch.testing.assert_close(here, there)
        beside = "blocks.0.hook_attn_out"
        frame = positional_patches(model, contents, [site, beside, "blocks.1.hook_resid_post"], masked=True)
    assert value(frame, site, "apart_nats") > 1e-3
    assert value(frame, site, "share_caused") == pytest.approx(1)
    assert value(frame, beside, "share_caused") == pytest.approx(0, abs=1e-9)
    assert frame["here"].unique().tolist() == [PLACES[0]]
    assert frame["there"].unique().tolist() == [PLACES[-1]]
    assert value(frame, "blocks.1.hook_resid_post", "share_caused") < 1


def test_logits_may_be_taken_in_any_blocks(monkeypatch):
    model, contents = llama(), placed()
    whole = positional_parts(model, contents, sites=["logits"])
    part = positional_part(model, contents, ["logits"])["logits"]
    monkeypatch.setattr(positional, "LOGIT_ELEMENTS", 1)
    np.testing.assert_allclose(positional_parts(model, contents, sites=["logits"])["value"], whole["value"], rtol=1e-12)
    torch.testing.assert_close(positional_part(model, contents, ["logits"])["logits"], part)
    assert part.shape == (len(PLACES), LENGTH, zoo.SIZES["vocab_size"])
    torch.testing.assert_close(part.sum(0), torch.zeros_like(part[0]))
    torch.testing.assert_close(part.sum(-1), torch.zeros_like(part[..., 0]))


def test_what_does_not_fit_is_refused():
    contents, filler = torch.ones(3, 4, dtype=torch.long), torch.ones(20, dtype=torch.long)
    for wrong, why in (
        ((contents[:1], filler, (0, 4)), "2 contents"),
        ((contents, filler, (3,)), "2 places"),
        ((contents, filler, (4, 4)), "rise"),
        ((contents, filler, (0, 17)), r"0\.\.16"),
        ((contents, filler.expand(2, -1), (0, 4)), "each of the 3"),
        ((contents.double(), filler, (0, 4)), "token ids"),
    ):
        with pytest.raises(InputError, match=why):
            PlacedContents(*wrong)
    model = llama()
    for site, why in (("blocks.7.hook_resid_post", "unknown"), ("blocks.0.attn.hook_pattern", "hook_z")):
        with pytest.raises(InputError, match=why):
            positional_parts(model, placed(), sites=[site])
    with (
        pytest.raises(InputError, match="read, not changed"),
        moved(model, {"logits": torch.zeros(4, LENGTH, 64)}, placed(), 0, 1),
    ):
        pass
    with pytest.raises(InputError, match="out of range"), moved(model, {}, placed(), 0, 9):
        pass
    with pytest.raises(InputError, match="out of range"):
        positional_patches(model, placed(), ["blocks.0.hook_resid_post"], there=-7)
    wider = load_model(zoo.llama(vocab_size=80).double())
    with pytest.raises(InputError, match="widths agree"):
        positional_alignment(model, wider, placed())
    with pytest.raises(InputError, match="draws"):
        positional_alignment(model, model, placed(), draws=0)
    with pytest.raises(InputError, match="table"):
        two_way(torch.zeros(1, 3))
    offloaded = load_model(accelerate.cpu_offload(zoo.llama()))
    with pytest.raises(InputError, match="device_map"):
        positional_parts(offloaded, placed())


def test_progress_counts_passes():
    done = []
    positional_parts(llama(), placed(), sites=["logits"], progress=done.append)
    assert sum(done) == CONTENTS * len(PLACES)


def test_the_figure_shows_every_share_by_layer():
    model = llama()
    frame = positional_parts(model, placed()).assign(model="tiny <b>", seed=0)
    figure = plots.positional_shares(frame, "here")
    names = {trace.name for trace in figure.data}
    assert len(names) >= 3
    drawn = {round(float(y), 12) for trace in figure.data for y in trace.y}
    expected = frame[(frame["site"] == "blocks.1.hook_resid_post") & frame["metric"].isin(SHARES)]["value"]
    assert {round(y, 12) for y in expected} <= drawn
    for trace in figure.data:
        low, high = figure.layout[trace.yaxis.replace("y", "yaxis")].range
        assert low < np.log10(min(trace.y)) <= np.log10(max(trace.y)) < high
    for nothing in (frame.iloc[:0], frame[frame["site"] == "logits"]):
        with pytest.raises(InputError, match="positional_parts"):
            plots.positional_shares(nothing)
    assert "positional_parts" in rope_probe.__all__
