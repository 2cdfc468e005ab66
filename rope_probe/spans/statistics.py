"""How a change is spread over heads and pairs, how firmly that is known, and what sets one change off another."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats
from transformers import PreTrainedModel

from rope_probe import rope
from rope_probe.errors import InputError
from rope_probe.models.architectures import rotary_layers
from rope_probe.runs.tables import Metric, declare
from rope_probe.spans.weights import SPANS

Values = npt.ArrayLike
BANDS = ("fast", "middle", "slow")
_PERMUTATIONS = 10_000
_LONGEST_BOUND = 2**17
_SPAN = ["site", "layer", "head", "pair"]


class Enrichment(NamedTuple):
    """Mean inside a band over mean outside it, and how often a random band of that size is at least as far from 1."""

    ratio: float
    p_value: float


def gini(values: Values) -> float:
    """Gini coefficient of shares that are 0 or more: 0 where all are equal, (n - 1) / n where one has everything.

    Raises InputError for a negative value.
    """
    ordered = np.sort(np.asarray(values, float))
    if len(ordered) and ordered[0] < 0:
        raise InputError(f"shares must be 0 or more, but one is {ordered[0]:g}")
    if not ordered.sum():
        return 0.0
    n = len(ordered)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * ordered.sum()))


def top_share(values: Values, share: float = 0.1) -> float:
    """What the largest `share` of the values have of their sum; at least one value counts. 0 where all are 0."""
    ordered = np.sort(np.asarray(values, float))[::-1]
    count = max(1, round(share * len(ordered)))
    return float(ordered[:count].sum() / ordered.sum()) if ordered.sum() else 0.0


def enrichment(by_pair: Values, inside: npt.ArrayLike, *, permutations: int = 10_000, seed: int = 0) -> Enrichment:
    """How far the pairs of a band stand out, by a two-sided permutation test of which pairs are in it.

    `by_pair` has one value a pair, 0 or more, the mean over heads: heads of a layer rotate alike, so they count as one.
    The null takes pairs as exchangeable. Changes that go smoothly with wavelength are not, and get small p values from
    that alone; what several seeds agree on is firmer. Every permutation is tried where there are few enough. NaN for
    values that are not finite, or all 0. Raises InputError for a band of no pair or of all.
    """
    values, band = np.asarray(by_pair, float), np.asarray(inside, bool)
    if not 0 < band.sum() < len(band):
        raise InputError(f"a band must hold some of the {len(band)} pairs and not all, but it holds {band.sum()}")
    if not np.isfinite(values).all() or not values.any():
        return Enrichment(math.nan, math.nan)
    count, inside_of = len(values), int(band.sum())
    if math.comb(count, inside_of) <= permutations:
        drawn = np.array(list(itertools.combinations(range(count), inside_of)))
    else:
        rng = np.random.default_rng(seed)
        drawn = np.vstack([np.flatnonzero(band), rng.random((permutations, count)).argsort(1)[:, :inside_of]])
    sums = values[drawn].sum(1)  # which rise with the ratio
    slack = 1e-9 * values.sum()  # the same band, summed in another order
    inside_sum = values[band].sum()
    p_value = 2 * min((sums >= inside_sum - slack).mean(), (sums <= inside_sum + slack).mean())
    outside = values[~band].mean()
    ratio = values[band].mean() / outside if outside else math.inf
    return Enrichment(float(ratio), float(min(1.0, p_value)))


SPAN_STATISTICS = declare(
    "span_statistics",
    "How the change of a site is spread over its heads and pairs.",
    ("layer", "site", "low", "high"),
    {
        "gini": Metric("Gini coefficient of the squared change over heads and pairs"),
        "top_tenth_share": Metric("share of the squared change in the tenth of the spans that changed most"),
        "rank_correlation": Metric("Spearman's, between a pair's wavelength and its change"),
        "rank_correlation_p": Metric("its p value, by permutations of the pairs"),
        **{f"enrichment_{band}": Metric(f"mean change of {band} pairs over that of the others") for band in BANDS},
        **{f"enrichment_{band}_p": Metric("its p value, by permutations of the pairs") for band in BANDS},
        "seed_rank_correlation": Metric(
            "Spearman's, between the changes by pair of two seeds; mean over pairs of seeds"
        ),
    },
)
LANDMARKS = declare(
    "landmarks",
    "Where a window lies in the rotary spectrum of a checkpoint.",
    ("phase", "seq_len"),
    {
        "turning_pairs": Metric("pairs that complete a turn in the window"),
        "spectrum_use": Metric("their share"),
        "critical_dimension": Metric("critical dimension, arXiv 2310.05209"),
        "rope_theta": Metric("theta of the checkpoint"),
        "base_bound": Metric("least theta for the window by arXiv 2405.14591"),
    },
)


def bands(wavelengths: Values, short: float, long: float) -> np.ndarray:
    """For each wavelength "fast" (a turn within `short` tokens), "middle" (within `long`) or "slow"."""
    lengths = np.asarray(wavelengths, float)
    return np.array(BANDS)[(lengths > short).astype(int) + (lengths > long)]


def landmarks(before: PreTrainedModel, after: PreTrainedModel, *, short: int, long: int) -> pd.DataFrame:
    """Where the window of each phase lies in the rotary spectrum of its checkpoint; a tidy frame.

    Phases are `before` with the window `short` and `after` with `long` (as `seq_len`). Metrics: `turning_pairs`, those
    that complete a turn in the window, and `spectrum_use`, their share; for plain RoPE `critical_dimension` too (arXiv
    2310.05209), and `base_bound` (arXiv 2405.14591; in windows of up to 131,072), to be compared with `rope_theta`. By
    the first layer that rotates; no rows for a model without one.
    """
    rows = []
    for phase, model, window in (("before", before, short), ("after", after, long)):
        rotary = next((one for one in rotary_layers(model) if one is not None), None)
        if rotary is None:
            continue
        use = rope.spectrum_use(rotary.inv_freq, window)
        measures = {"turning_pairs": use * len(rotary.inv_freq), "spectrum_use": use}
        parameters = model.config.rope_parameters
        theta = parameters.get("rope_theta", 0.0)
        if parameters.get("rope_type") == "default" and theta > 1:
            measures["critical_dimension"] = rope.critical_dimension(rotary.rotary_dim, theta, window)
            measures["rope_theta"] = theta
            if rotary.rotary_dim > 2 and window <= _LONGEST_BOUND:
                measures["base_bound"] = rope.base_bound(rotary.rotary_dim, window)
        rows += [{"phase": phase, "seq_len": window, "metric": name, "value": measures[name]} for name in measures]
    return LANDMARKS.frame(rows)


def span_statistics(
    frame: pd.DataFrame, *, short: float, long: float, metric: str = "rel_change", seed: int = 0
) -> pd.DataFrame:
    """Statistics of the rows by pair of a frame of `compare_spans` or `compare_states`, for each site; a tidy frame.

    - `gini`, `top_tenth_share`: how the squared `metric` is concentrated over heads and pairs;
    - `rank_correlation`: Spearman's between a pair's wavelength (after) and its mean over heads, `low` and `high` by
      Fisher's transformation; `rank_correlation_p`, by permutations of the pairs (as exchangeable, see `enrichment`);
    - `enrichment_fast`, `_middle`, `_slow` (see `bands`, of wavelengths after) and their `_p`; no row for a band that
      holds no pair, or all.

    What is undefined, as a correlation where nothing changed, has no row.
    """
    rows = frame[frame["pair"].notna() & (frame["metric"] == metric)]
    if rows.empty:
        raise InputError(f"these results hold no {metric!r} by pair; compare two checkpoints with compare_spans")
    statistics_rows = []
    for site, part in rows.groupby("site", sort=False):
        columns = {"site": site, "layer": part["layer"].iloc[0]}
        squares = part.groupby(["head", "pair"])["value"].mean().to_numpy() ** 2
        profile = part.groupby("pair").agg({"wavelength_after": "first", "value": "mean"})
        lengths, values = (profile[column].to_numpy(float) for column in ("wavelength_after", "value"))
        rho, low, high, p_value = _rank_correlation(lengths, values, seed)
        statistics_rows += [
            {**columns, "metric": "gini", "value": gini(squares)},
            {**columns, "metric": "top_tenth_share", "value": top_share(squares)},
            {**columns, "metric": "rank_correlation", "value": rho, "low": low, "high": high},
            {**columns, "metric": "rank_correlation_p", "value": p_value},
        ]
        label = bands(lengths, short, long)
        for band in BANDS:
            if 0 < (label == band).sum() < len(label) and values.any():
                ratio, p_value = enrichment(values, label == band, seed=seed)
                statistics_rows.append({**columns, "metric": f"enrichment_{band}", "value": ratio})
                statistics_rows.append({**columns, "metric": f"enrichment_{band}_p", "value": p_value})
    return SPAN_STATISTICS.frame([row for row in statistics_rows if not math.isnan(row["value"])])


def _rank_correlation(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[float, float, float, float]:
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0 or not np.isfinite(y).all():
        return (float("nan"),) * 4
    ranks, others = (stats.zscore(stats.rankdata(values)) for values in (x, y))
    rho = float(ranks @ others / len(x))
    low, high = stats.pearsonr(ranks, others).confidence_interval(0.95)
    order = np.random.default_rng(seed).random((_PERMUTATIONS, len(x))).argsort(1)
    drawn = others[order] @ ranks / len(x)
    at_least = (np.abs(drawn) >= abs(rho) - 1e-12).sum()
    return rho, float(low), float(high), float((at_least + 1) / (_PERMUTATIONS + 1))


def stability(frame: pd.DataFrame, metric: str = "rel_change") -> pd.DataFrame:
    """Whether seeds agree on which pairs change: by site, the mean of Spearman's correlation over pairs of seeds.

    Heads are averaged over first, since one seed's first head is not another's. Metric `seed_rank_correlation`.
    Raises InputError for fewer than two seeds.
    """
    rows = frame[frame["pair"].notna() & (frame["metric"] == metric)]
    profiles = rows.groupby(["site", "layer", "seed", "pair"])["value"].mean().unstack("seed")
    if profiles.shape[1] < 2:
        raise InputError(f"stability is between seeds, but there is {profiles.shape[1]}")
    correlations = []
    for (site, layer), part in profiles.groupby(["site", "layer"]):
        between = [stats.spearmanr(part[a], part[b]).statistic for a, b in itertools.combinations(part, 2)]
        correlations.append(
            {"site": site, "layer": layer, "metric": "seed_rank_correlation", "value": float(np.mean(between))}
        )
    return SPAN_STATISTICS.frame(correlations)


def contrast(frame: pd.DataFrame, other: pd.DataFrame, metric: str = "rel_change") -> pd.DataFrame:
    """How much more each span changed in one comparison than in another: `log2_ratio`, 1 for twice as much.

    Both are frames of `compare_spans` for one pair of checkpoints each, of one architecture. Where the other is mere
    training on, what stands out here is what the first was for. Spans that one of the two left as they were have no
    row.
    """
    one, two = (part[part["metric"] == metric].set_index(_SPAN) for part in (frame, other))
    both = one.join(two["value"].rename("against"), how="inner").reset_index()
    both = both[(both["value"] > 0) & (both["against"] > 0)]
    return SPANS.frame(
        both.assign(metric="log2_ratio", value=np.log2(both["value"] / both["against"])).drop(columns="against")
    )
