"""What the runs of experiments.query_spans say of its predictions, and how many query spans carry the gain."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
from scipy import stats

from experiments.toy_checkpoints import LONG, SHORT
from rope_probe.runs.intervals import share_interval, student_interval
from rope_probe.runs.tables import Metric, Tables, declare
from rope_probe.runs.verdicts import decided_or_met, mean_beside, verdict, verdicts
from rope_probe.spans import contrast, enrichment, fraction_to_reach, stability

CAUSAL = ("kd_adamw", "kd_phase_wise")
MAIN = "kd_adamw"
START, END = "start", "end"
GROUPS, ALONE, TOGETHER_ALONE, CURVE = "groups", "query span alone", "query and key span alone", "curve"
SELECTION = "heads to select by"
"""Heads reverted on trials of their own: the causal head is chosen by these, and judged by its row of GROUPS."""
KEPT = "query spans kept in the end"
WITH_KEYS = "query spans brought into the start after W_K"
TOGETHER = "query and key spans brought into the start"
BY_EFFECT, GREEDY, PATH, RANDOM = "by single effect", "greedy", "by gradients along the path", "random"
PREDICTORS = {
    "by change of weights": "change_norm",
    "by change of states": "state_change",
    "by gradient times change": "gradient_times_change",
    PATH: "path_gradients",
}
SPAN_PREDICTORS = declare(
    "span_predictors",
    "What might foresee which query spans cause the skill, for far less than a transplant each.",
    ("layer", "head", "pair"),
    {
        "change_norm": Metric("norm of the change of the span's weights"),
        "state_change": Metric("root mean square of the change of its query states"),
        "gradient_times_change": Metric("what reverting it costs to first order", "nats"),
        "path_gradients": Metric("what it brings by gradients along the path", "nats"),
        "greedy_rank": Metric("its place in the greedy order, after W_K"),
        "greedy_rank_together": Metric("its place in the greedy order, with the key span that it is matched with"),
    },
)
_PARTS = {"W_Q": "W_Q", "W_K": "W_K", "W_V": "W_V", "W_O": "W_O", "mlp": "MLP", "ln": "norms"}
_EMBEDDINGS = {"W_E": "W_E", "W_U": "W_U"}


def part_changes(spans: pd.DataFrame, metric: str = "rel_change") -> pd.DataFrame:
    """Change of each part, the mean over layers: a row for each arm and seed."""
    rows = spans[(spans["metric"] == metric) & spans["head"].isna()]
    rows = rows.assign(part=rows["site"].str.split(".").str[-1].map({**_PARTS, **_EMBEDDINGS}))
    return rows.pivot_table(index=["model", "seed"], columns="part", values="value")


def accuracies(effects: pd.DataFrame, into: str, seq_len: int = LONG) -> pd.DataFrame:
    """Accuracy, the mean over distances, after transplanting each group: by arm of training and seed."""
    rows = effects[(effects["arm"] == GROUPS) & (effects["into"] == into)]
    rows = rows[(rows["metric"] == "accuracy") & (rows["seq_len"] == seq_len)]
    return rows.pivot_table(index=["model", "seed"], columns="group", values="value", sort=False)


def gains(effects: pd.DataFrame, into: str) -> pd.DataFrame:
    """Share of the gain that is there after transplanting each group: 0 as at the start, 1 as at the end."""
    table = accuracies(effects, into)
    if table.empty:
        return table
    start, end = ("nothing", "everything") if into == START else ("everything", "nothing")
    return table.sub(table[start], axis=0).div(table[end] - table[start], axis=0)


def curves(effects: pd.DataFrame, span_set: str) -> pd.DataFrame:
    """Accuracy against the fraction of query spans transplanted: a row for each arm of training, seed, order, draw.

    The draw of an order that is not random is -1.
    """
    rows = effects[(effects["arm"] == CURVE) & (effects["span_set"] == span_set)]
    rows = rows[(rows["metric"] == "accuracy") & (rows["seq_len"] == LONG)]
    fraction = (rows["moved"] / rows["movable"]).astype(float)
    rows = rows.assign(fraction=fraction, draw=rows["draw"].fillna(-1))
    return rows.pivot_table(index=["model", "seed", "order", "draw"], columns="fraction", values="value")


def reached(effects: pd.DataFrame, span_set: str, share: float) -> pd.DataFrame:
    """The fraction of query spans at which each order has `share` of the gain; by arm and seed, random orders' mean.

    inf where no size reaches it.
    """
    ends = accuracies(effects, START)
    fractions = []
    for (model, seed, order, _), values in curves(effects, span_set).iterrows():
        start, end = (ends.loc[(model, seed), name] for name in ("nothing", "everything"))
        level = start + share * (end - start)
        fraction = fraction_to_reach(values.index.to_list(), values.to_list(), level)
        fractions.append({"model": model, "seed": seed, "order": order, "fraction": fraction})
    table = pd.DataFrame(fractions).groupby(["model", "seed", "order"])["fraction"].mean()
    return table.unstack("order")


def causal_heads(effects: pd.DataFrame) -> pd.DataFrame:
    """The head whose queries and keys matter most, and what it does on trials that it was not selected on.

    A row for each arm of training and seed. The `head` is the one without which the answer's log-probability in the
    end is lowest, on the trials of SELECTION. On the judging trials: the share of the gain that is `left` in the end
    with it reverted, and that it `brings` to the start, each beside the mean over the other heads.
    """
    rows = effects[(effects["arm"] == SELECTION) & (effects["metric"] == "answer_logprob_nats")]
    left, brings = gains(effects, END), gains(effects, START)
    found = []
    for (model, seed), part in rows.groupby(["model", "seed"]):
        logprob = part.groupby("group")["value"].mean()
        head, others = logprob.idxmin(), logprob.index.drop(logprob.idxmin())
        columns = {"model": model, "seed": seed, "head": head}
        for name, table in (("left", left), ("brings", brings)):
            columns[name] = table.loc[(model, seed), head]
            columns[f"{name}, other heads"] = table.loc[(model, seed), others].mean()
        found.append(columns)
    return pd.DataFrame(found).set_index(["model", "seed"]) if found else pd.DataFrame()


def carrying(effects: pd.DataFrame) -> pd.DataFrame:
    """The fraction of the query spans that brings half, and 90%, of the gain; the mean over seeds and its interval.

    Orders are made on other trials than these. `most` is the share of the gain that the best size reaches: the largest
    of as many as there are sizes, on the trials that it is told of, so rather too large.
    """
    rows = []
    ends = accuracies(effects, START)
    for span_set in (WITH_KEYS, TOGETHER, KEPT):
        if curves(effects, span_set).empty:
            continue
        shares = {name: reached(effects, span_set, share) for name, share in (("half", 0.5), ("90%", 0.9))}
        best = curves(effects, span_set).max(axis=1).groupby(["model", "seed", "order"]).mean().unstack("order")
        most = best.sub(ends["nothing"], axis=0).div(ends["everything"] - ends["nothing"], axis=0)
        for model in most.index.unique("model"):
            for order in most.columns[most.loc[model].notna().any()]:
                columns = {name: _told(table.loc[model][order].to_list()) for name, table in shares.items()}
                columns["most"] = _told(most.loc[model][order].to_list())
                rows.append({"what": f"{span_set}, {order}", "model": model, "seeds": len(most.loc[model]), **columns})
    return pd.DataFrame(rows)


def _told(values: list[float]) -> str:
    if not np.isfinite(values).all():
        return f"not on {np.isinf(values).sum()} of {len(values)}"
    low, high = np.clip(student_interval(values), 0, 1)
    return f"{np.mean(values):.2f}" + (f" [{low:.2f}, {high:.2f}]" if len(values) > 1 else "")


def single_effects(effects: pd.DataFrame, predictors: pd.DataFrame) -> pd.DataFrame:
    """Nats that the answer loses when one query span is reverted in the end, and what was to foresee it; by span."""
    keys = ["model", "seed", "layer", "head", "pair"]
    rows = effects[(effects["arm"] == ALONE) & (effects["metric"] == "answer_logprob_nats")]
    foreseen = predictors.pivot_table(index=keys, columns="metric", values="value")
    return foreseen.assign(effect=-rows.groupby(keys)["value"].mean())


def foresight(effects: pd.DataFrame, predictors: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of each predictor with the single effects, and with the greedy order of causes."""
    if predictors.empty:
        return pd.DataFrame(columns=["model", "seed", "foreseen", "predictor", "rho"])
    table = single_effects(effects, predictors)
    targets = {"effect": 1, "greedy_rank": -1, "greedy_rank_together": -1}
    rows = []
    for (model, seed), part in table.groupby(level=["model", "seed"]):
        for target, sign in targets.items():
            if target in part:
                for name, metric in PREDICTORS.items():
                    rho = sign * stats.spearmanr(part[metric], part[target]).statistic
                    rows.append({"model": model, "seed": seed, "foreseen": target, "predictor": name, "rho": rho})
    return pd.DataFrame(rows)


def contrasts(spans: pd.DataFrame) -> pd.DataFrame:
    """How many times as much the query spans changed in one arm as in another, the geometric mean.

    Arms of one seed start from the same weights, so ratios of relative changes are those of their norms.
    """
    rows = []
    for arm, other in (
        (MAIN, "ce_adamw"),
        (MAIN, "ce_more_short_adamw"),
        ("kd_phase_wise", "ce_phase_wise"),
        ("kd_phase_wise", "ce_more_short"),
        ("kd_phase_wise", "kd_large_theta"),
        ("kd_phase_wise", "kd_small_theta"),
    ):
        by_seed = {}
        for seed in sorted(set(_seeds(spans, arm)) & set(_seeds(spans, other))):
            one, two = (spans[(spans["model"] == name) & (spans["seed"] == seed)] for name in (arm, other))
            ratio = contrast(one, two)
            queries = ratio[ratio["site"].str.endswith("W_Q") & ratio["pair"].notna()]
            by_seed[seed] = 2 ** queries["value"].mean()
        if by_seed:
            low, high = student_interval(pd.Series(by_seed))
            rows.append((f"{arm} over {other}", len(by_seed), np.mean(list(by_seed.values())), low, high))
    return pd.DataFrame(rows, columns=["query spans changed, times", "seeds", "mean", "low", "high"])


def rank_tables(statistics: pd.DataFrame) -> pd.DataFrame:
    """Rank correlations with wavelength of W_Q and W_K, of each measure of change, and of the norm before itself."""
    wanted = ["rank_correlation", "partial_rank_correlation", "norm_rank_correlation"]
    rows = statistics[statistics["metric"].isin(wanted)]
    if "change" not in rows or rows["change"].isna().all():  # runs of before there were several
        return pd.DataFrame()
    table = rows.pivot_table(index=["model", "site", "change"], columns="metric", values="value")
    return table.reindex(columns=wanted)


def agreement(spans: pd.DataFrame, metric: str = "rel_change") -> pd.DataFrame:
    """Whether seeds agree on which pairs of W_Q and W_K change: Spearman's correlation between their profiles."""
    by_arm = {arm: stability(part, metric) for arm, part in spans.groupby("model") if part["seed"].nunique() > 1}
    return pd.DataFrame({arm: table.set_index("site")["value"] for arm, table in by_arm.items()}).T


def _seeds(spans: pd.DataFrame, arm: str) -> Iterable[int]:
    return spans.loc[spans["model"] == arm, "seed"].unique()


def _of(results: Tables) -> tuple[pd.DataFrame, ...]:
    """Changes of spans, effects of transplants, and what was to foresee them."""
    return tuple(results[name] for name in ("spans", "span_effects", "span_predictors"))


def shown(results: Tables) -> dict[str, pd.DataFrame]:
    """What changed, what transplants bring and leave, how many spans carry the gain, and what foresees it."""
    spans, effects, predictors = _of(results)
    tables = {
        "relative change of each part, mean over layers": part_changes(spans),
        "norm of the change of each part, mean over layers": part_changes(spans, "change_norm"),
        "rank correlation of change with wavelength, plain and given the norm before, mean over seeds": rank_tables(
            results["span_statistics"]
        ),
        "how many times as much the query spans changed in one arm as in another": contrasts(spans),
        "share of the gain that transplants from the end bring": gains(effects, START).T,
        "share of the gain that is left after transplants from the start": gains(effects, END).T,
        "fraction of the query spans that brings half and 90% of the gain": carrying(effects),
        "the head that matters most, selected on other trials than it is judged on; shares of the gain": causal_heads(
            effects
        ),
    }
    if spans["seed"].nunique() > 1:
        tables["agreement of seeds on which pairs change, relatively"] = agreement(spans)
        tables["agreement of seeds on which pairs change, by its norm"] = agreement(spans, "change_norm")
    seen = foresight(effects, predictors)
    if len(seen):
        title = "rank correlation of what is cheap to know with which spans matter, mean over seeds"
        foreseen = seen.groupby(["model", "foreseen", "predictor"])["rho"].mean()
        tables[title] = foreseen.unstack("predictor")
    return {title: table for title, table in tables.items() if len(table)}


def judged(results: Tables) -> pd.DataFrame:
    """The predictions that these runs can judge: the mean over seeds, its interval, and what the interval says.

    Accuracies have the interval that carries seeds and trials, everything else Student's. Where there is none, as of
    one seed or of a fraction that was not reached, the mean alone is compared with the bounds.
    """
    spans, effects, predictors = _of(results)
    rows: list[dict] = []

    def judge(
        number: int,
        what: str,
        by_seed: Iterable[float],
        least: float = -math.inf,
        most: float = math.inf,
        *,
        trials: Iterable[float] | None = None,
        fraction: bool = False,
        also: bool = True,
    ) -> None:
        """`trials` of each seed where its value is an accuracy; a `fraction`'s interval ends at 0 and 1.

        `also` is what the claim asks for beside the bounds.
        """
        values = pd.Series(list(by_seed), dtype=float)
        if values.empty:
            return
        mean = values.mean()
        low, high = _interval(values, None if trials is None else pd.Series(list(trials), dtype=float))
        if fraction and math.isfinite(low):
            low, high = max(low, 0.0), min(high, 1.0)
        held = decided_or_met(mean, low, high, least, most)
        rows.append(verdict(number, what, mean, held if also else False, n=len(values), low=low, high=high))

    changes, norms = part_changes(spans), part_changes(spans, "change_norm")
    for number, arm in ((1, MAIN), (2, "kd_phase_wise")):
        if arm not in changes.index:
            continue
        mine = changes.loc[arm]
        for other in ("W_K", "W_V", "W_O", "MLP"):
            even = number == 2 or other == "W_K"
            wanted = "within .8 to 1.25" if even else "above 1"
            bounds = (0.8, 1.25) if even else (1.0, math.inf)
            judge(number, f"{arm}: change of W_Q over {other} {wanted}", mine["W_Q"] / mine[other], *bounds)
            if arm in norms.index:
                of_norms = norms.loc[arm]["W_Q"] / norms.loc[arm][other]
                rows.append(mean_beside(f"{arm}: norm of the change, W_Q over {other}, to compare with", of_norms))
    if MAIN in changes.index:
        _judge_spectrum(spans, judge, rows.append)
        for number, other, low, high in ((5, "ce_more_short_adamw", 2, math.inf), (6, "ce_adamw", 1 / 1.5, 1.5)):
            if other in changes.index:
                ratio = (changes.loc[MAIN]["W_Q"] / changes.loc[other]["W_Q"]).dropna()
                wanted = "2 or more" if number == 5 else "within 1/1.5 to 1.5"
                judge(number, f"change of W_Q, {MAIN} over {other} {wanted}", ratio, low, high)
    into_start, into_end, short = gains(effects, START), gains(effects, END), accuracies(effects, END, SHORT)
    seen = foresight(effects, predictors)
    for arm in CAUSAL:
        if arm not in into_start.index:
            continue
        brought, left = into_start.loc[arm], into_end.loc[arm]
        judge(7, f"{arm}: gain that W_Q alone brings below .1", brought["W_Q"], most=0.1)
        judge(7, f"{arm}: gain that W_Q, W_K, W_V, W_O bring .5 or more", brought["W_Q, W_K, W_V, W_O"], 0.5)
        judge(8, f"{arm}: gain left with W_Q reverted below .1", left["W_Q"], most=0.1)
        judge(8, f"{arm}: gain left with the MLP reverted above .5", left["mlp"], 0.5)
        _judge_curves(curves(effects, KEPT).loc[arm], arm, judge)
        cost = left["W_Q, slow pairs"] - left["W_Q, fast pairs"]
        judge(10, f"{arm}: gain lost without W_Q's fast pairs, less without slow ones, above 0", cost, 0)
        of_effect = seen[(seen["model"] == arm) & (seen["foreseen"] == "effect")].pivot(
            index="seed", columns="predictor", values="rho"
        )
        gradient = of_effect["by gradient times change"]
        judge(11, f"{arm}: correlation of gradient times change with effects .5 or more", gradient, 0.5)
        rivals = of_effect[["by change of weights", "by change of states"]].max(axis=1)
        judge(11, f"{arm}: less the better of weights and states, above 0", gradient - rivals, 0)
        reverted = short.loc[arm]["W_Q"]
        trials = _trials(effects, arm).reindex(reverted.index)
        judge(12, f"{arm}: short-window accuracy with W_Q reverted below .5", reverted, most=0.5, trials=trials)
        _judge_path(effects, arm, judge)
    return verdicts(rows)


def _interval(by_seed: pd.Series, trials: pd.Series | None) -> tuple[float, float]:
    """Of accuracies with their trials, else Student's; without bounds where a value or its trials are unknown."""
    known = by_seed if trials is None else trials
    if not np.isfinite(known).all():
        return math.nan, math.nan
    return student_interval(by_seed) if trials is None else share_interval(by_seed, trials)


def _trials(effects: pd.DataFrame, arm: str) -> pd.Series:
    """Trials behind each seed's short-window accuracy with a group reverted, over all distances."""
    rows = effects[(effects["model"] == arm) & (effects["arm"] == GROUPS) & (effects["into"] == END)]
    rows = rows[(rows["metric"] == "accuracy") & (rows["seq_len"] == SHORT) & (rows["group"] == "W_Q")]
    if "trials" not in rows:  # in runs of before it was recorded
        return pd.Series(math.nan, index=rows["seed"].unique())
    return rows.groupby("seed")["trials"].sum(min_count=1).astype(float)


def _left_behind(changed: pd.DataFrame) -> tuple[list[float], float]:
    """Change of pairs that turned in the short window and no longer do over that of others: by seed, and a p value."""
    left = (changed["wavelength"] <= SHORT) & (changed["wavelength_after"] > SHORT)
    profile = changed.assign(left=left).groupby(["seed", "pair"]).agg({"value": "mean", "left": "first"})
    of_seed = [enrichment(part["value"], part["left"]).ratio for _, part in profile.groupby("seed")]
    mean = profile.groupby("pair").agg({"value": "mean", "left": "first"})
    return of_seed, enrichment(mean["value"], mean["left"]).p_value


def _judge_spectrum(spans: pd.DataFrame, judge: Callable, tell: Callable) -> None:
    """Predictions 3 and 4."""
    weights = spans[(spans["model"] == MAIN) & spans["pair"].notna()]
    for layer in sorted(weights["layer"].unique()):
        queries = weights[(weights["site"] == f"blocks.{layer}.attn.W_Q")]
        of_seed, p_value = _left_behind(queries[queries["metric"] == "rel_change"])
        what = f"{MAIN}: layer {layer}, pairs that no longer turn over the others above 1, p {p_value:.3f} below .05"
        judge(3, what, of_seed, 1, also=p_value < 0.05)
        norms = queries[queries["metric"] == "change_norm"]
        if len(norms):
            of_seed, p_value = _left_behind(norms)
            what = f"{MAIN}: layer {layer}, the same of the norm of the change, p {p_value:.3f}, to compare with"
            tell(mean_beside(what, of_seed))
    turns = weights[(weights["site"] == "blocks.0.attn.W_Q") & (weights["metric"] == "qk_rotation_radians")]
    frequency = 2 * np.pi / turns["wavelength"] - 2 * np.pi / turns["wavelength_after"]
    by_pair = turns.assign(frequency=frequency).groupby(["seed", "pair"])[["value", "frequency"]].mean()
    rho = [stats.spearmanr(part["value"], part["frequency"]).statistic for _, part in by_pair.groupby("seed")]
    judge(4, f"{MAIN}: layer 0, correlation of turns with lost frequency above .5", rho, 0.5)


def _judge_curves(kept: pd.DataFrame, arm: str, judge: Callable) -> None:
    """Prediction 9: of what the query spans add to the end without them, between none and all; seeds where they do."""
    fractions: dict[tuple[str, float], dict[int, list[float]]] = {}
    for (seed, order, _), values in kept.iterrows():
        first, last = values.iloc[0], values.iloc[-1]
        if last <= first:
            continue
        for share in (0.5, 0.9):
            fraction = fraction_to_reach(values.index.to_list(), values.to_list(), first + share * (last - first))
            fractions.setdefault((order, share), {}).setdefault(seed, []).append(fraction)
    means = {
        order_and_share: pd.Series({seed: np.mean(values) for seed, values in of.items()})
        for order_and_share, of in fractions.items()
    }
    half = means[BY_EFFECT, 0.5]
    judge(9, f"{arm}: fraction of query spans by single effect for half .25 or less", half, most=0.25, fraction=True)
    judge(9, f"{arm}: the same for 90% .5 or less", means[BY_EFFECT, 0.9], most=0.5, fraction=True)
    judge(9, f"{arm}: random over single effect, for half, above 2", means[RANDOM, 0.5] / half, 2)


def _judge_path(effects: pd.DataFrame, arm: str, judge: Callable) -> None:
    """Prediction 13: the mean over seeds, inf where a predictor does not get to half of the gain on one of them."""
    half = reached(effects, WITH_KEYS, 0.5).loc[arm]
    best = half[[name for name in PREDICTORS if name != PATH]].mean().min()
    what = f"{arm}: fraction for half by gradients along the path below {best:.2f}, the best other predictor's"
    judge(13, what, half[PATH], most=best, fraction=True)
