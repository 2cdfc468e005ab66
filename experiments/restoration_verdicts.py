"""Tables and verdicts of experiments/restoration.py: plain arithmetic on its rows."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
from scipy import stats

from rope_probe.runs.intervals import share_difference_interval, student_interval
from rope_probe.runs.tables import Column, Metric, declare
from rope_probe.runs.verdicts import ABOVE_0, beside, decided, mean_beside, verdict, verdicts
from rope_probe.spans.drift import ATTENTION_KL, COSINE_DISTANCE

RESTORATION = declare(
    "restoration",
    "What a larger theta and short training make of a pretrained model. A row is of one window, trial or question.",
    ("theta", "seq_len", "distance", "query_scale", "unit", "layer"),
    {
        "loss_nats": Metric("loss of natural text, mean over a window's tokens", "nats"),
        ATTENTION_KL: Metric("KL(original || model) of a layer's attention, mean over heads and queries", "nats"),
        COSINE_DISTANCE: Metric("1 - cosine of a hidden state of the original and the model, mean over positions"),
        "passkey_hit": Metric("1 where every token of the passkey is the most likely one, else 0"),
        "passkey_logprob_nats": Metric("log-probability of a passkey, summed over its tokens", "nats"),
        "choice_correct": Metric("1 where a multiple-choice question is answered rightly, else 0"),
    },
    own={
        "theta": Column("float64", "base of the model's rotary frequencies"),
        "query_scale": Column("float64", "factor on the queries after rotation; 1 where they are left alone"),
        "unit": Column("Int64", "which window, trial or question, 0 first"),
    },
)

PRETRAINED = "smollm2-135m"
ORIGINAL_THETA, TRAINED_THETA = 100_000.0, 5_000_000.0
FEWEST_THETAS = 4
"""Of the untrained model, the original's theta among them, to correlate over."""
SHORT = 256
RESAMPLES = 2000
_SEED = 0

Statistic = Callable[[np.ndarray], float]


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """Every prediction that these rows can judge."""
    untrained, trained = rows[rows["model"] == PRETRAINED], rows[rows["model"] != PRETRAINED]
    return verdicts([*_of_drift(untrained), *_of_training(trained)])


# Part A: thetas, untrained --------------------------------------------------------------------------------------------


def rise_of_loss(rows: pd.DataFrame) -> pd.DataFrame:
    """What a theta costs each window, nats a token: a row for each window, a column for each theta above the least."""
    losses = _by_unit(rows[rows["query_scale"] == 1.0], "loss_nats")
    original = losses.columns.min()
    return losses.drop(columns=original).sub(losses[original], axis=0)


def attention_drift(rows: pd.DataFrame, layer: int | None = None) -> pd.DataFrame:
    """Attention KL in the shape of `rise_of_loss`: of one layer, or the mean over layers."""
    kl = rows[rows["metric"] == ATTENTION_KL]
    kl = kl if layer is None else kl[kl["layer"] == layer]
    by_theta = kl.groupby(["unit", "theta"])["value"].mean().unstack("theta")
    return by_theta.drop(columns=by_theta.columns.min())


def over_thetas(foreseen_by: pd.DataFrame, rise: pd.DataFrame) -> np.ndarray:
    """Spearman's correlation of two such frames over thetas, for each window."""
    return np.array([stats.spearmanr(foreseen_by.loc[unit], rise.loc[unit]).statistic for unit in rise.index])


def at_one_theta(foreseen_by: pd.DataFrame, rise: pd.DataFrame) -> float:
    """Partial rank correlation over windows: of ranks taken within each theta, so that theta itself tells nothing.

    NaN where nothing varies over windows.
    """
    return _at_one_theta(foreseen_by.to_numpy(), rise.to_numpy())


def _at_one_theta(foreseen_by: np.ndarray, rise: np.ndarray) -> float:
    """The same of arrays [windows, thetas]."""
    centred = [stats.rankdata(values, axis=0) - (len(values) + 1) / 2 for values in (foreseen_by, rise)]
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(centred[0].ravel(), centred[1].ravel())[0, 1])


def best_layer(rows: pd.DataFrame, units: Iterable[int]) -> int:
    """The layer whose attention KL foresees best which of these windows lose most, theta held."""
    chosen_on = rows[rows["unit"].isin(list(units))]
    rise = rise_of_loss(chosen_on)
    layers = sorted(rows.loc[rows["metric"] == ATTENTION_KL, "layer"].dropna().unique())
    return int(max(layers, key=lambda layer: at_one_theta(attention_drift(chosen_on, int(layer)), rise)))


def restored_by_scaling(rows: pd.DataFrame, theta: float) -> tuple[float, pd.DataFrame]:
    """The best scaling of queries on windows of even number; and losses of the others: original, plain, scaled."""
    losses = rows[rows["metric"] == "loss_nats"]
    at_theta = losses[losses["theta"] == theta].pivot_table(index="unit", columns="query_scale", values="value")
    original = losses[(losses["theta"] == losses["theta"].min()) & (losses["query_scale"] == 1.0)]
    even = at_theta.index % 2 == 0
    scale = float(at_theta[even].mean().idxmin())
    judged_on = at_theta[~even]
    return scale, pd.DataFrame(
        {
            "original": original.set_index("unit")["value"].reindex(judged_on.index),
            "swapped": judged_on[1.0],
            "restored": judged_on[scale],
        }
    )


def _of_drift(rows: pd.DataFrame) -> list[dict]:
    losses = _by_unit(rows[rows["query_scale"] == 1.0], "loss_nats")
    if ORIGINAL_THETA not in losses:
        return []
    told = _of_cost(rows) if TRAINED_THETA in losses else []
    return told if losses.shape[1] < FEWEST_THETAS else [*told, *_of_foresight(rows)]


def _of_cost(rows: pd.DataFrame) -> list[dict]:
    """What the theta of the training costs, and how much of it scaled queries restore."""
    cost = rise_of_loss(rows)[TRAINED_THETA]
    told = [_judge(1, "nats that theta 5,000,000 costs, .3 or more", cost, low=0.3)]
    if (rows["query_scale"] > 1).any():
        scale, losses = restored_by_scaling(rows, TRAINED_THETA)
        claim = f"share of the cost of theta 5,000,000 restored by queries x {scale:g}, below .25"
        told.append(_judge_share(6, claim, losses, high=0.25))
    correct = _by_unit(rows, "choice_correct")
    claim = "multiple choice: accuracy lost at theta 5,000,000, .1 or less"
    told.append(_judge_answers(7, claim, correct[correct.columns.min()], correct[TRAINED_THETA], high=0.1))
    return told


def _of_foresight(rows: pd.DataFrame) -> list[dict]:
    """Whether drift foresees the loss: over thetas, and over documents at one theta."""
    told: list[dict] = []
    rise, kl = rise_of_loss(rows), attention_drift(rows)
    of_drift = over_thetas(kl, rise)
    of_ratio = over_thetas(pd.DataFrame([rise.columns] * len(rise), index=rise.index, columns=rise.columns), rise)
    told.append(_judge(2, "over thetas, correlation of attention KL and loss, .9 or more", of_drift, low=0.9))
    told.append(
        _judge(3, "correlation of log theta ratio less that of attention KL, 0 or more", of_ratio - of_drift, 0.0)
    )
    told.append(mean_beside("over thetas, correlation of log theta ratio and loss", of_ratio))
    of_documents, of_all = rise.to_numpy(), kl.loc[rise.index].to_numpy()

    def partial(chosen: np.ndarray) -> float:
        return _at_one_theta(of_all[chosen], of_documents[chosen])

    rows_of = np.arange(len(rise))
    told.append(_judge_resampled(4, "at one theta, partial rank correlation above .3", rows_of, partial, low=0.3))
    even = rise.index.to_numpy() % 2 == 0
    layer = best_layer(rows, rise.index[even])
    of_layer = attention_drift(rows, layer).loc[rise.index].to_numpy()

    def gain(chosen: np.ndarray) -> float:
        return _at_one_theta(of_layer[chosen], of_documents[chosen]) - partial(chosen)

    claim = f"partial correlation of layer {layer} less that of all, below .1"
    told.append(_judge_resampled(5, claim, rows_of[~even], gain, high=0.1))
    return told


# Part B: trained models -----------------------------------------------------------------------------------------------


def _of_training(rows: pd.DataFrame) -> list[dict]:
    told: list[dict] = []
    short = _of_models(rows[(rows["seq_len"] == SHORT)], "loss_nats")
    if {"original", "swapped", "longred_u", "long_ce"} <= set(short.columns):
        losses = short.rename(columns={"longred_u": "restored"})
        told.append(_judge_share(8, "share of the swap's cost that LongReD-U restores, .5 or more", losses, low=0.5))
        by_ce = short.rename(columns={"long_ce": "restored"})
        told.append(_share_beside("share that long cross-entropy restores", by_ce))
        difference = short["longred_u"] - short["long_ce"]
        told.append(
            _judge(9, "loss of LongReD-U less that of cross-entropy at 256 tokens, above 0", difference, low=ABOVE_0)
        )
        last = rows[(rows["metric"] == COSINE_DISTANCE)]
        last = _of_models(last[last["layer"] == last["layer"].max()], COSINE_DISTANCE)
        nearer = last["long_ce"] - last["longred_u"]
        told.append(
            _judge(10, "cosine distance of the last state, cross-entropy's less LongReD-U's, above 0", nearer, ABOVE_0)
        )
        correct = _of_models(rows, "choice_correct")
        claim = "multiple choice: accuracy of LongReD-U less cross-entropy's, 0 or more"
        told.append(_judge_answers(11, claim, correct["longred_u"], correct["long_ce"], low=0.0))
    if {"original", "long_ce", "ce_own_theta"} <= set(short.columns):
        learnt, left = short["original"] - short["ce_own_theta"], short["long_ce"] - short["ce_own_theta"]
        claim = "nats that cross-entropy at the original's theta wins over the original at 256 tokens, .05 or more"
        told.append(_judge(13, claim, learnt, low=0.05))
        told.append(_judge(14, "loss of cross-entropy at theta 5,000,000 less at its own, .02 or more", left, low=0.02))
    beyond = _of_models(rows[rows["seq_len"] > 8192], "passkey_logprob_nats")
    if {"original", "swapped"} <= set(beyond.columns):
        gain = beyond["swapped"] - beyond["original"]
        told.append(
            _judge(12, "nats by which the swap makes a passkey in 12,288 tokens likelier, 5 or more", gain, low=5.0)
        )
    return told


def share_restored(losses: pd.DataFrame) -> float:
    """What part of the cost `swapped` - `original` is gone in `restored`: of the sums over windows."""
    return float((losses["swapped"] - losses["restored"]).sum() / (losses["swapped"] - losses["original"]).sum())


# Intervals and verdicts -----------------------------------------------------------------------------------------------


def _judge(number: int, claim: str, values: Iterable[float], low: float = -np.inf, high: float = np.inf) -> dict:
    """Whether a mean over units lies between two bounds, by Student's interval."""
    series = pd.Series(list(values), dtype=float)
    bottom, top = student_interval(series)
    return _row(number, claim, float(series.mean()), bottom, top, len(series), low, high)


def _judge_answers(
    number: int, claim: str, first: pd.Series, second: pd.Series, low: float = -np.inf, high: float = np.inf
) -> dict:
    """Whether a share of right answers less another does, by the interval of each; answers are not taken as pairs."""
    bottom, top = share_difference_interval([first.mean()], [second.mean()], len(first), len(second))
    return _row(number, claim, float(first.mean() - second.mean()), bottom, top, len(first), low, high)


def _judge_resampled(
    number: int, claim: str, units: np.ndarray, statistic: Statistic, low: float = -np.inf, high: float = np.inf
) -> dict:
    """Whether a statistic of several windows does, by resampling the windows."""
    bottom, top = resampled(units, statistic)
    return _row(number, claim, statistic(units), bottom, top, len(units), low, high)


def _judge_share(number: int, claim: str, losses: pd.DataFrame, low: float = -np.inf, high: float = np.inf) -> dict:
    return _judge_resampled(number, claim, np.arange(len(losses)), _share_of(losses), low, high)


def _share_beside(claim: str, losses: pd.DataFrame) -> dict:
    low, high = resampled(np.arange(len(losses)), _share_of(losses))
    return beside(claim, share_restored(losses), n=len(losses), low=low, high=high)


def _share_of(losses: pd.DataFrame) -> Statistic:
    """`share_restored` of the rows that are chosen by number."""
    gone = (losses["swapped"] - losses["restored"]).to_numpy()
    cost = (losses["swapped"] - losses["original"]).to_numpy()
    return lambda chosen: float(gone[chosen].sum() / cost[chosen].sum())


def _row(number: int, claim: str, value: float, bottom: float, top: float, n: int, low: float, high: float) -> dict:
    return verdict(number, claim, value, decided(bottom, top, low, high), n=n, low=bottom, high=top)


def resampled(units: np.ndarray, statistic: Statistic) -> tuple[float, float]:
    """95% interval of a statistic, by drawing as many of the units again and again, with replacement."""
    rng = np.random.default_rng(_SEED)
    drawn = [statistic(rng.choice(units, len(units))) for _ in range(RESAMPLES)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(low), float(high)


# Tables ---------------------------------------------------------------------------------------------------------------


def tables_of(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Means with 95% intervals, by theta and by trained model."""
    untrained, trained = rows[rows["model"] == PRETRAINED], rows[rows["model"] != PRETRAINED]
    tables = {
        "untrained, by theta": _means(untrained[untrained["query_scale"].fillna(1.0) == 1.0], ["theta"]),
        "loss with scaled queries, nats a token": _means(
            untrained[untrained["metric"] == "loss_nats"], ["theta", "query_scale"]
        ),
        "after training": _means(trained, ["model", "theta"]),
    }
    return {title: table for title, table in tables.items() if len(table)}


def _means(rows: pd.DataFrame, index: list[str]) -> pd.DataFrame:
    """A row for each of `index`, a column for each metric and window: the mean over units, and its interval as text."""
    of_layers = rows[rows["layer"].notna()].groupby([*index, "unit", "seq_len", "metric"], dropna=False, sort=False)[
        "value"
    ]
    units = pd.concat([of_layers.mean().reset_index(), rows[rows["layer"].isna()]])
    units = units.assign(seq_len=units["seq_len"].fillna(0))
    shown = []
    for key, values in units.groupby([*index, "metric", "seq_len"], sort=False)["value"]:
        shown.append((*key, _text(values, binary=key[-2] in ("passkey_hit", "choice_correct"))))
    frame = pd.DataFrame(shown, columns=[*index, "metric", "seq_len", "mean"])
    return frame.pivot_table(index=index, columns=["metric", "seq_len"], values="mean", aggfunc="first", sort=False)


def _text(values: pd.Series, *, binary: bool) -> str:
    """Mean and interval: Wilson's for what is 0 or 1, else Student's."""
    if binary:
        low, high = stats.binomtest(int(values.sum()), len(values)).proportion_ci(method="wilson")
    else:
        low, high = student_interval(values)
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def _by_unit(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A row for each unit, a column for each theta."""
    return rows[rows["metric"] == metric].pivot_table(index="unit", columns="theta", values="value")


def _of_models(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A row for each unit, a column for each model."""
    return rows[rows["metric"] == metric].pivot_table(index="unit", columns="model", values="value")
