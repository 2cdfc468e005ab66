"""What a perturbation of the teacher takes from the signal that distils it."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rope_probe.errors import InputError
from rope_probe.gallery.figures.style import drawing, line_style, listed, styled

_KL = ("loss_kl_nats", "signal_kl_nats")
_GRADIENTS = ("loss_gradient", "signal_gradient")
_MATRIX = r"blocks\.\d+\.attn\.W_[QKV]"


def is_signal(frame: pd.DataFrame) -> pd.Series:
    """Rows that `signal_of_distillation` draws."""
    matrix = frame["site"].str.fullmatch(_MATRIX).fillna(False)
    return frame["metric"].isin(_KL) | (frame["metric"].isin(_GRADIENTS) & matrix)


@drawing
def signal_of_distillation(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Of each student: the loss and the signal by distance (left), the signal's part of the gradients (right).

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
    titles = ("KL by tokens since the token last occurred", "part of the gradient's norm that hangs on position")
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.12)
    signal = rows[rows["metric"] == _KL[1]]
    figure.add_trace(_by_distance(signal, "signal in the teacher's logits", {"color": "#000000", "dash": "dot"}), 1, 1)
    for i, (model, part) in enumerate(rows.groupby("model", sort=False)):
        colour, dash, symbol = line_style(i)
        loss = _by_distance(part[part["metric"] == _KL[0]], f"loss of {model}", {"color": colour, "dash": dash})
        figure.add_trace(loss, 1, 1)
        sizes = part.groupby(["site", "seed", "metric"], dropna=False)["value"].mean().unstack("metric")
        sizes = sizes.reindex(columns=_GRADIENTS)
        share = (sizes[_GRADIENTS[1]] / sizes[_GRADIENTS[0]]).dropna().groupby("site").agg(["mean", "min", "max"])
        share = share.loc[sorted(share.index, key=lambda site: (site.split(".")[1].zfill(4), "QKV".index(site[-1])))]
        share.index = [site.removeprefix("blocks.").replace(".attn.", ", ") for site in share.index]
        marks = go.Scatter(
            x=share.index,
            y=share["mean"],
            error_y=_range(share),
            mode="markers",
            name=str(model),
            marker={"color": colour, "symbol": symbol, "size": 10},
            showlegend=False,
        )
        figure.add_trace(marks, 1, 2)
    figure.update_xaxes(title="tokens since it last occurred, up to", type="category", tickangle=0, row=1, col=1)
    figure.update_yaxes(title="nats per position", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title="layer and matrix of the student", row=1, col=2)
    figure.update_yaxes(title="norm of what is taken / norm of the loss's", type="log", tickformat="~g", row=1, col=2)
    note = (
        f"taken from the teacher: {strongest}; window {listed(rows['seq_len'])} tokens, one window a seed, seeds "
        f"{listed(rows['seed'])}; bars: smallest to largest seed"
    )
    return styled(figure, "What position contributes to distillation", label, note, height=560, below=72).update_layout(
        legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"}
    )


def _by_distance(rows: pd.DataFrame, name: str, line: dict) -> go.Scatter:
    seen = rows[rows["occurrence"].notna()].assign(distance=lambda frame: frame["distance"].fillna(0))
    curve = seen.groupby("distance")["value"].agg(["mean", "min", "max"])
    labels = ["new" if distance == 0 else str(distance) for distance in curve.index]
    return go.Scatter(x=labels, y=curve["mean"], error_y=_range(curve), name=name, mode="lines+markers", line=line)


def _range(curve: pd.DataFrame) -> dict:
    return {"array": curve["max"] - curve["mean"], "arrayminus": curve["mean"] - curve["min"], "width": 0}
