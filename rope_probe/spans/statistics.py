"""How a change is spread over heads and pairs, how firmly that is known, and what sets one change off another."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats
from transformers import PreTrainedModel

from rope_probe import rope
from rope_probe.errors import InputError
from rope_probe.models.architectures import rotary_layers
from rope_probe.runs.tables import Column, Metric, declare
from rope_probe.spans.weights import SPANS

Values = npt.ArrayLike
BANDS = ("fast", "middle", "slow")
_PERMUTATIONS = 10_000
_LONGEST_BOUND = 2**17
CHANGES = ("rel_change", "change_norm")
"""Measures of change, told side by side: what is divided by the norm before falls where that norm rises."""
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
    ("layer", "site", "change", "low", "high"),
    {
        "gini": Metric("Gini coefficient of the squared change over heads and pairs"),
        "top_tenth_share": Metric("share of the squared change in the tenth of the spans that changed most"),
        "rank_correlation": Metric("Spearman's, between a pair's wavelength and its change"),
        "rank_correlation_p": Metric("its p value, by permutations of the pairs"),
        "partial_rank_correlation": Metric("the same with the pair's norm before partialled out"),
        "partial_rank_correlation_p": Metric("its p value, by permutations of what the norm leaves of the ranks"),
        "norm_rank_correlation": Metric("Spearman's, between a pair's wavelength and its norm before"),
        **{f"enrichment_{band}": Metric(f"mean change of {band} pairs over that of the others") for band in BANDS},
        **{f"enrichment_{band}_p": Metric("its p value, by permutations of the pairs") for band in BANDS},
        "seed_rank_correlation": Metric(
            "Spearman's, between the changes by pair of two seeds; mean over pairs of seeds"
        ),
    },
    own={"change": Column("string", "the measure of change that it is of: rel_change or change_norm")},
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
    frame: pd.DataFrame, *, short: float, long: float, metrics: Sequence[str] = CHANGES, seed: int = 0
) -> pd.DataFrame:
    """Statistics of the rows by pair of a frame of `compare_spans` or `compare_states`, for each site; a tidy frame.

    Of each of the `metrics`, named in the column `change`:

    - `gini`, `top_tenth_share`: how the squared metric is concentrated over heads and pairs;
    - `rank_correlation`: Spearman's between a pair's wavelength (after) and its mean over heads, `low` and `high` by
      Fisher's transformation; `rank_correlation_p`, by permutations of the pairs (as exchangeable, see `enrichment`);
    - `partial_rank_correlation`, with `low`, `high` and `_p`: the same given the pair's norm before (mean over heads),
      which itself may go with wavelength (`norm_rank_correlation`); see `partial_rank_correlation`;
    - `enrichment_fast`, `_middle`, `_slow` (see `bands`, of wavelengths after) and their `_p`; no row for a band that
      holds no pair, or all.

    The norm before is read off `change_norm` and `rel_change`; without both of them nothing is partialled out. What is
    undefined, as a correlation where nothing changed, has no row. Raises InputError for a metric that is not there.
    """
    of_pairs = frame[frame["pair"].notna()]
    norms = _norms_before(of_pairs)
    statistics_rows = []
    for metric in metrics:
        rows = of_pairs[of_pairs["metric"] == metric]
        if rows.empty:
            raise InputError(f"these results hold no {metric!r} by pair; compare two checkpoints with compare_spans")
        for site, part in rows.groupby("site", sort=False):
            statistics_rows += _site_statistics(part, norms.get(site), metric, short, long, seed)
    return SPAN_STATISTICS.frame([row for row in statistics_rows if not math.isnan(row["value"])])


def _norms_before(of_pairs: pd.DataFrame) -> dict[str, pd.Series]:
    """By site, the norm before of each pair, mean over heads: the change's norm over the relative change."""
    if not set(CHANGES) <= set(of_pairs["metric"]):
        return {}
    changes = of_pairs[of_pairs["metric"].isin(CHANGES)]
    keys = [column for column in ("site", "head", "pair", "document") if column in changes]
    table = changes.pivot_table(index=keys, columns="metric", values="value")
    norm = (table["change_norm"] / table["rel_change"]).groupby(["site", "pair"]).mean()
    return {site: part.droplevel("site") for site, part in norm.groupby("site")}


def _site_statistics(
    part: pd.DataFrame, norms: pd.Series | None, metric: str, short: float, long: float, seed: int
) -> list[dict[str, Any]]:
    """The statistics of one site and measure of change."""
    columns = {"site": part["site"].iloc[0], "layer": part["layer"].iloc[0], "change": metric}
    squares = part.groupby(["head", "pair"])["value"].mean().to_numpy() ** 2
    profile = part.groupby("pair").agg({"wavelength_after": "first", "value": "mean"})
    lengths, values = (profile[column].to_numpy(float) for column in ("wavelength_after", "value"))
    rho, low, high, p_value = _rank_correlation(lengths, values, seed)
    rows = [
        {**columns, "metric": "gini", "value": gini(squares)},
        {**columns, "metric": "top_tenth_share", "value": top_share(squares)},
        {**columns, "metric": "rank_correlation", "value": rho, "low": low, "high": high},
        {**columns, "metric": "rank_correlation_p", "value": p_value},
    ]
    if norms is not None:
        before = norms.reindex(profile.index).to_numpy(float)
        rho, low, high, p_value = partial_rank_correlation(lengths, values, before, seed=seed)
        rows += [
            {**columns, "metric": "partial_rank_correlation", "value": rho, "low": low, "high": high},
            {**columns, "metric": "partial_rank_correlation_p", "value": p_value},
        ]
        rho, low, high, _ = _rank_correlation(lengths, before, seed)
        rows.append({**columns, "metric": "norm_rank_correlation", "value": rho, "low": low, "high": high})
    label = bands(lengths, short, long)
    for band in BANDS:
        if 0 < (label == band).sum() < len(label) and values.any():
            ratio, p_value = enrichment(values, label == band, seed=seed)
            rows.append({**columns, "metric": f"enrichment_{band}", "value": ratio})
            rows.append({**columns, "metric": f"enrichment_{band}_p", "value": p_value})
    return rows


def partial_rank_correlation(
    x: Values, y: Values, given: Values, *, seed: int = 0
) -> tuple[float, float, float, float]:
    """Spearman's correlation of x and y with the ranks of a third partialled out: value, 95% low and high, p value.

    It is Pearson's correlation of what is left of both ranks after regression on the third's. The interval is by
    Fisher's transformation with one degree of freedom less, the p value by permutations of the residuals. NaN for fewer
    than 5 values, where one is constant or not finite, and where the third leaves nothing of x or y.
    """
    variables = [np.asarray(values, float) for values in (x, y, given)]
    usable = all(np.isfinite(values).all() and np.ptp(values) > 0 for values in variables if len(values))
    if len(variables[0]) < 5 or not usable:
        return (math.nan,) * 4
    one, other, third = (stats.zscore(stats.rankdata(values)) for values in variables)
    left, right = (ranks - (ranks @ third / len(third)) * third for ranks in (one, other))
    if min(left @ left, right @ right) < 1e-9 * len(third):
        return (math.nan,) * 4
    left, right = (part / math.sqrt(part @ part) for part in (left, right))
    rho = float(np.clip(left @ right, -1, 1))
    middle = math.atanh(np.clip(rho, -1 + 1e-15, 1 - 1e-15))
    reach = stats.norm.ppf(0.975) / math.sqrt(len(third) - 4)
    order = np.random.default_rng(seed).random((_PERMUTATIONS, len(third))).argsort(1)
    at_least = (np.abs(right[order] @ left) >= abs(rho) - 1e-12).sum()
    p_value = float((at_least + 1) / (_PERMUTATIONS + 1))
    return rho, math.tanh(middle - reach), math.tanh(middle + reach), p_value


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
        agreement = {"metric": "seed_rank_correlation", "value": float(np.mean(between))}
        correlations.append({"site": site, "layer": layer, "change": metric, **agreement})
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
