"""What a perturbation of the teacher takes from the signal that distils it."""

import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.layout import panels
from rope_probe.gallery.figures.style import GREY, across, drawing, line_style, listed, log_axis, seeds_of, styled

_KL = ("loss_kl_nats", "signal_kl_nats", "remaining_kl_nats")
_GRADIENTS = ("loss_gradient", "signal_gradient")
_COSINE = "remaining_gradient_cosine"
_MOST_DECADES = 8
_MATRIX = r"blocks\.\d+\.attn\.W_[QKV]"


def is_signal(frame: pd.DataFrame) -> pd.Series:
    """Rows that `signal_of_distillation` draws."""
    matrix = frame["site"].str.fullmatch(_MATRIX).fillna(False)
    return frame["metric"].isin(_KL) | (frame["metric"].isin([*_GRADIENTS, _COSINE]) & matrix)


@drawing
def signal_of_distillation(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Of each student: its loss against the teacher and the perturbed one by distance, and two views of its gradients.

    The gradients' panels: the norm of what the perturbation takes over the loss's, and the cosine of the gradients with
    and without it.

    The perturbation with the largest signal is drawn. Means over seeds, bars from the smallest to the largest. Raises
    InputError where the frame has no signal.
    """
    rows = frame[is_signal(frame)]
    whole = rows[(rows["metric"] == "signal_kl_nats") & rows["occurrence"].isna() & rows["perturbation"].notna()]
    if whole.empty:
        raise InputError("these results hold no distillation signal; make them with distillation_signal")
    strongest = whole.groupby("perturbation")["value"].mean().idxmax()
    rows = rows[rows["perturbation"].isna() | (rows["perturbation"] == strongest)]
    rows = rows.assign(model=rows["model"].fillna(""))
    titles = (
        "KL by tokens since the token last occurred",
        "gradient: size of what is taken",
        "gradient: with what is taken, and without",
    )
    figure = panels(titles, [240, 200, 200])
    signal = rows[rows["metric"] == _KL[1]]
    shares = [pd.Series(dtype=float)]
    figure.add_trace(
        _by_distance(signal, "teacher, before and after it is perturbed", {"color": GREY, "dash": "dot"}), 1, 1
    )
    for i, (model, part) in enumerate(rows.groupby("model", sort=False)):
        colour, dash, symbol = line_style(i)
        loss = _by_distance(part[part["metric"] == _KL[0]], f"loss of {model}", {"color": colour, "dash": dash})
        figure.add_trace(loss, 1, 1)
        remaining = part[part["metric"] == _KL[2]]
        if len(remaining):
            line = {"color": colour, "dash": "dot"}
            figure.add_trace(_by_distance(remaining, f"loss of {model}, teacher perturbed", line), 1, 1)
            cosines = part[part["metric"] == _COSINE].groupby(["site", "seed"], dropna=False)["value"].mean()
            cosine = _by_matrix(cosines.groupby("site").agg(["mean", "min", "max"]))
            figure.add_trace(_marks(cosine, str(model), colour, symbol), 3, 1)
        sizes = part.groupby(["site", "seed", "metric"], dropna=False)["value"].mean().unstack("metric")
        sizes = sizes.reindex(columns=_GRADIENTS)
        share = (sizes[_GRADIENTS[1]] / sizes[_GRADIENTS[0]]).dropna().groupby("site").agg(["mean", "min", "max"])
        figure.add_trace(_marks(_by_matrix(share), str(model), colour, symbol), 2, 1)
        shares += [share["min"], share["max"]]
    seen = rows.loc[rows["occurrence"].notna(), "distance"].fillna(0)
    distances = [_distance(distance) for distance in sorted(seen.unique())]
    matrices = list(_by_matrix(pd.DataFrame(index=rows["site"].dropna().unique())).index)
    for row, title, order in (
        (1, "tokens since it last occurred, up to", distances),
        (2, "layer, matrix", matrices),
        (3, "layer, matrix", matrices),
    ):
        places = {"type": "category", "categoryorder": "array", "categoryarray": order}
        figure.update_xaxes(title=title, **places, tickvals=across(order), tickangle=0, row=row, col=1)
    figure.update_yaxes(title="nats per position", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(
        title="norm / norm of<br>the loss's", **log_axis(pd.concat(shares), _MOST_DECADES), row=2, col=1
    )
    figure.update_yaxes(title="cosine", range=[-1.05, 1.05], row=3, col=1)
    note = (
        f"taken from the teacher: {strongest}; window {listed(rows['seq_len'])} tokens, one window a seed, "
        f"{seeds_of(rows)}; bars: smallest to largest seed"
    )
    return styled(figure, "What a perturbation of the teacher changes in distillation", label, note)


def _by_matrix(table: pd.DataFrame) -> pd.DataFrame:
    """Rows by site in the order of layers, then Q, K, V, under short names."""
    ordered = sorted(
        table.index, key=lambda site: ([part.zfill(4) for part in site.split(".")[1:2]], "QKV".find(site[-1:]))
    )
    names = {site: site.removeprefix("blocks.").replace(".attn.", ", ") for site in ordered}
    return table.loc[ordered].rename(index=names)


def _marks(table: pd.DataFrame, name: str, colour: str, symbol: str) -> go.Scatter:
    return go.Scatter(
        x=table.index,
        y=table["mean"],
        error_y=_range(table),
        mode="markers",
        name=name,
        marker={"color": colour, "symbol": symbol, "size": 10},
        showlegend=False,
    )


def _by_distance(rows: pd.DataFrame, name: str, line: dict) -> go.Scatter:
    seen = rows[rows["occurrence"].notna()].assign(distance=lambda frame: frame["distance"].fillna(0))
    curve = seen.groupby("distance")["value"].agg(["mean", "min", "max"])
    labels = [_distance(distance) for distance in curve.index]
    return go.Scatter(x=labels, y=curve["mean"], error_y=_range(curve), name=name, mode="lines+markers", line=line)


def _distance(tokens: int) -> str:
    return "new" if tokens == 0 else str(tokens)


def _range(curve: pd.DataFrame) -> dict:
    return {"array": curve["max"] - curve["mean"], "arrayminus": curve["mean"] - curve["min"], "width": 0}
