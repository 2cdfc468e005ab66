"""Losses while a model trains."""

import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.layout import panels as panels_of
from rope_probe.gallery.figures.style import drawing, joined, line_style, listed, seeds_of, styled

LOSSES = {"ce_nats": ("cross-entropy, nats", "linear"), "kd_nats": ("KD divergence, nats", "log")}
_LOWEST_PANEL, _HIGHEST_PANEL, _ALL_PANELS = 90, 240, 900


def is_loss(frame: pd.DataFrame) -> pd.Series:
    """Rows with a loss of the whole batch, by tokens trained on."""
    return frame["metric"].isin(LOSSES) & frame["tokens"].notna()


@drawing
def loss_curves(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Cross-entropy and KD divergence against the tokens trained on: a panel for each loss and phase that there is.

    Thin lines are seeds as they were logged, not smoothed; a bold line is their mean, as far as all seeds of the model
    went. Raises InputError where the frame has no losses by tokens.
    """
    rows = frame[is_loss(frame)]
    if rows.empty:
        raise InputError("these results hold no losses by tokens trained on; train something first")
    rows = rows.assign(line=_names(rows), phase=rows["phase"].fillna(""))
    metrics = [metric for metric in LOSSES if (rows["metric"] == metric).any()]
    phases = rows["phase"].unique().tolist()
    panels = dict(tuple(rows.groupby(["metric", "phase"])))
    places = [(metric, phase) for metric in metrics for phase in phases if (metric, phase) in panels]
    titles = [f"{LOSSES[metric][0]}{phase and f': {phase} phase'}" for metric, phase in places]
    height = max(_LOWEST_PANEL, min(_HIGHEST_PANEL, _ALL_PANELS // len(places)))
    figure = panels_of(titles, height)
    styles = {line: line_style(i)[:2] for i, line in enumerate(rows["line"].unique())}
    untold = set(styles)
    for row, (metric, phase) in enumerate(places, start=1):
        for line, part in panels[metric, phase].groupby("line", sort=False):
            traces = _seeds_and_mean(line, part, *styles[line], in_legend=line in untold)
            figure.add_traces(traces, rows=row, cols=1)
            untold.discard(line)
        scale = LOSSES[metric][1]
        first = next(i for i, (other, _) in enumerate(places, start=1) if other == metric)
        same = {"matches": "y" if first == 1 else f"y{first}"} if row > first else {}
        figure.update_yaxes(title="nats", type=scale, tickformat="~g", nticks=6, **same, row=row, col=1)
        figure.update_xaxes(rangemode="tozero", tickformat="~s", row=row, col=1)
    figure.update_xaxes(title="tokens trained on in the phase", row=len(places), col=1)
    windows = f"windows of {windows} tokens" if (windows := listed(rows["seq_len"])) else ""
    note = (
        f"{joined('loss of each measured step', windows, seeds_of(rows))}; "
        "thin: seeds as logged; bold: their mean, as far as all of them went"
    )
    return styled(figure, "Losses in training", label, note)


def _names(rows: pd.DataFrame) -> pd.Series:
    """What each row's line is called: its model, with the run where several runs trained one of its name and seed."""
    model = rows["model"].fillna("")
    runs = rows["run_id"].groupby([model, rows["seed"]], dropna=False).transform("nunique")
    return model.where(runs <= 1, model + " of " + rows["run_id"])


def _seeds_and_mean(name: str, part: pd.DataFrame, colour: str, dash: str, *, in_legend: bool) -> list[go.Scatter]:
    """The thin lines of a model's seeds where it has several, and the bold one, in the legend if `told`."""
    seeds = [seed.sort_values("tokens") for _, seed in part.groupby("seed", dropna=False)]
    mean = part.groupby("tokens")["value"].agg(["mean", "count"])
    mean = mean.loc[mean["count"] == len(seeds), "mean"]
    thin = {"mode": "lines", "line": {"color": colour, "width": 1}, "opacity": 0.4, "hoverinfo": "skip"}
    lines = [
        go.Scatter(x=seed["tokens"], y=seed["value"], legendgroup=name, showlegend=False, **thin) for seed in seeds
    ]
    bold = {"color": colour, "width": 2, "dash": dash}
    shown = {"name": name, "mode": "lines", "line": bold, "legendgroup": name, "showlegend": in_legend}
    return [*(lines if len(seeds) > 1 else []), go.Scatter(x=mean.index.to_numpy(), y=mean, **shown)]
