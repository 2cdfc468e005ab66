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
from rope_probe.spans.statistics import bands
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
    found = span_statistics(frame_of(profile), short=64, long=1000).set_index("metric")["value"]
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
    found = span_statistics(frame_of(profile), short=64, long=1000).set_index("metric")
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
        span_statistics(frame_of(profile), short=64, long=1000, metric="cosine")


def test_a_comparison_of_models_gets_statistics_even_where_nothing_changed():
    model = zoo.llama()
    found = span_statistics(compare_spans(model, model), short=10, long=100)
    assert (found[found["metric"].isin(["gini", "top_tenth_share"])]["value"] == 0).all()
    assert set(found["site"]) == {f"blocks.{i}.attn.W_{p}" for i in range(2) for p in "QK"}


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
