"""Statistics over spans."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rope_probe import InputError, compare_spans, rope
from rope_probe.spans import contrast, enrichment, gini, landmarks, span_statistics, stability, top_share
from rope_probe.spans.statistics import bands, partial_rank_correlation
from tests import zoo

SHARES = st.lists(st.floats(0, 1e6, allow_subnormal=False).map(lambda x: round(x, 6)), min_size=1, max_size=30)


@given(SHARES)
def test_gini_is_the_mean_difference_over_twice_the_mean(values):
    x = np.array(values)
    wanted = np.abs(x[:, None] - x).mean() / (2 * x.mean()) if x.sum() else 0
    assert gini(values) == pytest.approx(wanted, abs=1e-9)


def test_gini_and_top_share_of_the_extremes():
    assert gini([1, 1, 1, 1]) == 0
    assert gini([0, 0, 0, 1]) == 0.75
    assert top_share([1] * 20, 0.1) == 0.1
    assert top_share([0] * 19 + [3], 0.1) == 1
    assert top_share([1, 2, 3], 0.01) == 0.5
    assert top_share([0, 0]) == 0
    with pytest.raises(InputError, match="0 or more, but one is -1"):
        gini([1, -1])


def test_enrichment_counts_every_way_to_draw_the_band():
    values = np.array([5.0, 4.0, 3.0, 1.0, 1.5, 0.5])
    inside = np.array([True, True, False, False, False, False])
    found = enrichment(values, inside)
    assert found.ratio == pytest.approx(4.5 / 1.5)
    ratios = []
    for band in itertools.combinations(range(6), 2):
        drawn = np.isin(np.arange(6), band)
        ratios.append(math.log(values[drawn].mean() / values[~drawn].mean()))
    as_far = np.mean(np.array(ratios) >= math.log(3) - 1e-12)
    assert found.p_value == pytest.approx(2 * as_far)


def test_enrichment_of_one_pair_that_alone_changed_is_as_likely_as_it_is():
    found = enrichment([0, 0, 0, 1], [False, False, False, True])
    assert (found.ratio, found.p_value) == (math.inf, 0.5)
    assert math.isnan(enrichment([1, math.inf, 1, 1], [True, False, False, False]).p_value)
    assert math.isnan(enrichment([0, 0, 0], [True, False, False]).p_value)


def test_rank_correlation_has_the_p_value_of_permutations():
    profile = np.array([8.0, 7, 6, 5, 4, 1, 2, 3])
    found = span_statistics(frame_of(profile), short=64, long=1000, metrics=["rel_change"]).set_index("metric")["value"]
    wanted = stats.spearmanr(np.arange(8), profile)
    assert found["rank_correlation_p"] == pytest.approx(wanted.pvalue, abs=0.01)


def test_no_enrichment_is_found_in_noise_more_often_than_it_says():
    rng = np.random.default_rng(0)
    inside = np.arange(12) < 4
    p_values = [enrichment(rng.random(12) + 0.5, inside).p_value for _ in range(200)]
    assert np.mean(np.array(p_values) < 0.05) < 0.1


@pytest.mark.parametrize("inside", [[False] * 4, [True] * 4])
def test_a_band_of_nothing_or_all_is_refused(inside):
    with pytest.raises(InputError, match="must hold some of the 4 pairs"):
        enrichment([1, 2, 3, 4], inside)


def test_bands_by_wavelength():
    assert bands([6, 64, 65, 1024, 1e5], 64, 1024).tolist() == ["fast", "fast", "middle", "middle", "slow"]


def frame_of(profile, seed=0, heads=2, metric="rel_change", site="blocks.0.attn.W_Q"):
    """Rows by head and pair whose mean over heads is `profile`."""
    lengths = 2 * math.pi * 1e4 ** (np.arange(len(profile)) / len(profile))
    return pd.DataFrame(
        [
            {"site": site, "layer": 0, "head": head, "pair": pair, "wavelength": 1.0, "wavelength_after": lengths[pair],
             "metric": metric, "value": value * (0.5 + head), "seed": seed}
            for head in range(heads)
            for pair, value in enumerate(profile)
        ]
    )  # fmt: skip


def test_a_frame_of_spans_gets_its_statistics():
    profile = np.array([8.0, 7, 6, 5, 1, 1.1, 1.2, 1.3])
    found = span_statistics(frame_of(profile), short=64, long=1000, metrics=["rel_change"]).set_index("metric")
    squares = np.outer([0.5, 1.5], profile).flatten() ** 2
    assert found.loc["gini", "value"] == pytest.approx(gini(squares))
    assert found.loc["top_tenth_share", "value"] == pytest.approx(top_share(squares))
    rho = stats.spearmanr(np.arange(8), profile).statistic
    assert found.loc["rank_correlation", "value"] == pytest.approx(rho)
    assert found.loc["rank_correlation", "low"] < rho < found.loc["rank_correlation", "high"]
    fast = profile[:3]  # wavelengths 6.3, 19.9, 62.8
    assert found.loc["enrichment_fast", "value"] == pytest.approx(fast.mean() / profile[3:].mean())
    assert 0 < found.loc["enrichment_fast_p", "value"] < 0.06
    with pytest.raises(InputError, match="hold no 'cosine' by pair"):
        span_statistics(frame_of(profile), short=64, long=1000, metrics=["cosine"])


def test_a_comparison_of_models_gets_statistics_even_where_nothing_changed():
    model = zoo.llama()
    found = span_statistics(compare_spans(model, model), short=10, long=100)
    assert (found[found["metric"].isin(["gini", "top_tenth_share"])]["value"] == 0).all()
    assert set(found["site"]) == {f"blocks.{i}.attn.W_{p}" for i in range(2) for p in "QK"}


def test_the_partial_correlation_is_that_of_the_formula_on_ranks():
    x, y, z = [1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 5], [1, 3, 2, 6, 5, 4]
    # by 1 - 6 sum d^2 / (n (n^2 - 1)): d^2 of xy 6, xz 10, yz 20
    xy, xz, yz = 1 - 36 / 210, 1 - 60 / 210, 1 - 120 / 210
    rho, low, high, p_value = partial_rank_correlation(x, y, z)
    assert rho == pytest.approx((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)), abs=1e-12)
    assert math.atanh(high) - math.atanh(rho) == pytest.approx(1.959964 / math.sqrt(2), abs=1e-6)
    assert low < rho < high
    assert 0.01 < p_value < 0.3


@pytest.mark.parametrize("given", [[1, 2, 3, 4, 5, 6], [3, 3, 3, 3, 3, 3]])
def test_nothing_is_said_where_the_norm_goes_with_wavelength_exactly_or_is_constant(given):
    assert math.isnan(partial_rank_correlation([1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 5], given)[0])


def test_a_relative_change_that_falls_only_because_the_norm_rises_is_told_apart():
    rng = np.random.default_rng(3)
    pairs = 64
    norm = np.exp(3 * np.arange(pairs) / pairs + 0.4 * rng.standard_normal(pairs))
    change = np.exp(0.2 * rng.standard_normal(pairs))
    frame = pd.concat([frame_of(change / norm), frame_of(change, metric="change_norm")])
    # frame_of scales heads alike in both, so the norm of every head is the same
    found = span_statistics(frame, short=64, long=1000).set_index(["change", "metric"])["value"]
    assert found["rel_change", "rank_correlation"] < -0.8
    assert found["rel_change", "rank_correlation_p"] < 0.001
    assert abs(found["change_norm", "rank_correlation"]) < 0.25
    assert found["rel_change", "norm_rank_correlation"] > 0.8
    for measure in ("rel_change", "change_norm"):
        assert abs(found[measure, "partial_rank_correlation"]) < 0.25
        assert found[measure, "partial_rank_correlation_p"] > 0.05


def test_a_change_that_goes_with_wavelength_itself_is_left_when_the_norm_is_partialled_out():
    rng = np.random.default_rng(3)
    norm = np.exp(rng.standard_normal(64))
    change = norm * (1 + np.arange(64)[::-1])
    frame = pd.concat([frame_of(change / norm), frame_of(change, metric="change_norm")])
    found = span_statistics(frame, short=64, long=1000).set_index(["change", "metric"])["value"]
    assert found["rel_change", "partial_rank_correlation"] < -0.9
    assert found["change_norm", "partial_rank_correlation"] < -0.5


def test_stability_is_the_agreement_of_profiles_whatever_the_heads():
    rising = np.arange(1.0, 9)
    one, two = frame_of(rising, 0), frame_of(rising**2, 1)
    two["head"] = 1 - two["head"]
    agree = stability(pd.concat([one, two]))
    assert agree["value"].item() == pytest.approx(1)
    three = frame_of(rising[::-1], 2)
    mixed = stability(pd.concat([one, two, three]))
    assert mixed["value"].item() == pytest.approx((1 - 1 - 1) / 3)
    with pytest.raises(InputError, match="between seeds, but there is 1"):
        stability(one)


def test_a_contrast_is_in_doublings_and_knows_its_spans():
    one, other = frame_of(np.array([4.0, 2, 1, 0])), frame_of(np.array([1.0, 2, 4, 1]))
    found = contrast(one, other)
    assert found.groupby("pair")["value"].mean().to_dict() == {0: 2.0, 1: 0.0, 2: -2.0}
    assert (found["metric"] == "log2_ratio").all()
    assert found["wavelength_after"].notna().all()


def test_landmarks_leave_out_what_has_no_meaning():
    plain, flat = (zoo.llama(rope_parameters={"rope_type": "default", "rope_theta": theta}) for theta in (100.0, 1.0))
    scaled = zoo.llama(rope_parameters=zoo.ROPE_TYPES["yarn"])
    frame = landmarks(plain, scaled, short=16, long=64).set_index(["phase", "metric"])["value"]
    assert frame["before", "rope_theta"] == 100
    assert frame["before", "turning_pairs"] == 1
    assert frame["before", "base_bound"] == pytest.approx(rope.base_bound(8, 16))
    assert frame["before", "critical_dimension"] == rope.critical_dimension(8, 100.0, 16)
    assert set(frame["after"].index) == {"turning_pairs", "spectrum_use"}
    assert set(landmarks(flat, flat, short=16, long=16)["metric"]) == {"turning_pairs", "spectrum_use"}
    one_pair = zoo.llama(head_dim=2)
    assert "base_bound" not in set(landmarks(one_pair, one_pair, short=16, long=16)["metric"])
