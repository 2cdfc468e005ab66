"""Losses while a model trains."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rope_probe.errors import InputError
from rope_probe.gallery.figures.style import BESIDE, drawing, line_style, listed, styled

LOSSES = {"ce_nats": ("cross-entropy, nats", "linear"), "kd_nats": ("KD divergence, nats", "log")}
_LOG_TICKS = [step * 10.0**power for power in range(-6, 3) for step in (1, 2, 5)]
_PANEL = 330


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
    grid: list[list[dict | None]] = [
        [{} if (metric, phase) in panels else None for phase in phases] for metric in metrics
    ]
    figure = make_subplots(
        rows=len(metrics),
        cols=len(phases),
        specs=grid,
        shared_yaxes=True,
        subplot_titles=[phase and f"{phase} phase" for m in metrics for phase in phases if (m, phase) in panels],
        vertical_spacing=90 / (_PANEL * len(metrics)),
        horizontal_spacing=0.04,
    )
    styles = {line: line_style(i)[:2] for i, line in enumerate(rows["line"].unique())}
    untold = set(styles)
    for i, metric in enumerate(metrics, start=1):
        present = [phase for phase in phases if (metric, phase) in panels]
        for phase in present:
            panel, j = panels[metric, phase], phases.index(phase) + 1
            for line, part in panel.groupby("line", sort=False):
                traces = _seeds_and_mean(line, part, *styles[line], in_legend=line in untold)
                figure.add_traces(traces, rows=i, cols=j)
                untold.discard(line)
            figure.update_xaxes(title="tokens trained on in the phase", rangemode="tozero", row=i, col=j)
        title, scale = LOSSES[metric]
        figure.update_yaxes(title=title, row=i, col=phases.index(present[0]) + 1)
        figure.update_yaxes(type=scale, tickvals=_LOG_TICKS if scale == "log" else None, tickformat="~g", row=i)
    windows = f"windows of {windows} tokens, " if (windows := listed(rows["seq_len"])) else ""
    note = (
        f"loss of each measured step, {windows}seeds {listed(rows['seed'])}; "
        "thin: seeds as logged; bold: their mean, as far as all of them went"
    )
    figure = styled(figure, "Losses in training", label, note, height=200 + _PANEL * len(metrics))
    return figure.update_layout(legend=BESIDE)


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
