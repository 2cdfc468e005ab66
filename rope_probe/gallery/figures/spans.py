"""What changed between two checkpoints, by part, head and rotary pair; and what transplants of spans do."""

from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from rope_probe.errors import InputError
from rope_probe.gallery.figures.style import BESIDE, drawing, line_style, listed, styled

_PARTS = {"W_Q": "W_Q", "W_K": "W_K", "W_V": "W_V", "W_O": "W_O", "mlp": "MLP"}
_ROTARY = ("W_Q", "W_K")
_CHANGES = {"rel_change": "relative change", "change_norm": "norm of change"}
_GREY = "#999999"


def is_change_of_pair(frame: pd.DataFrame) -> pd.Series:
    """Rows that `span_heatmap` and `span_heads` draw: change of a pair in W_Q or W_K, relative and its norm."""
    rotary = frame["site"].str.endswith(_ROTARY).fillna(False)
    return rotary & frame["pair"].notna() & frame["metric"].isin(_CHANGES)


def is_change_of_part(frame: pd.DataFrame) -> pd.Series:
    """Rows that `change_by_part` draws: change of a part of a layer, relative and its norm."""
    part = frame["site"].str.split(".").str[-1].isin(list(_PARTS)).fillna(False)
    return part & frame["layer"].notna() & frame["head"].isna() & frame["metric"].isin(_CHANGES)


def is_landmark(frame: pd.DataFrame) -> pd.Series:
    """Rows with how many pairs complete a turn in the window before, and after."""
    return frame["metric"] == "turning_pairs"


def is_curve(frame: pd.DataFrame) -> pd.Series:
    """Rows that `causal_curves` draws: accuracy with so many of the spans transplanted, in some order."""
    placed = frame[["span_set", "order", "moved", "seq_len"]].notna().all(axis=1)
    return placed & (frame["movable"] > 0).fillna(False) & (frame["metric"] == "accuracy")


def is_transplant(frame: pd.DataFrame) -> pd.Series:
    """Rows that `transplants` draws: accuracy with a part transplanted into one of two checkpoints."""
    placed = frame[["into", "group", "seq_len"]].notna().all(axis=1)
    whole_group = placed & frame["span_set"].isna() & frame["pair"].isna()
    return whole_group & (frame["metric"] == "accuracy")


@drawing
def span_heatmap(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Change of W_Q and W_K, layer x rotary pair, relative and below it its norm: the mean over heads and seeds.

    The axis has each pair's wavelength before and after; lines stand behind the last pair that completes a turn in the
    window before, and after, where the frame has these. Raises InputError where the frame has no changes by pair.
    """
    rows = _by_pair(frame)
    sites = [part for part in _ROTARY if rows["part"].eq(part).any()]
    panels = _panels(rows, sites, horizontal_spacing=0.04, shared_yaxes=True)
    for place, part in panels.parts:
        table = part.pivot_table(index="layer", columns="pair", values="value")
        _heatmap(panels, place, table, [f"layer {layer}" for layer in table.index], _lengths(rows), frame)
    panels.figure.update_yaxes(autorange="reversed")
    title = "Which rotary pairs changed"
    height = 100 + panels.rows * (230 + 30 * len(table))
    return styled(panels.figure, title, label, _pair_note(rows, "mean over heads"), height=height, below=95)


@drawing
def span_heads(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Change of W_Q and W_K by pair, relative and below it its norm, for every head; otherwise as `span_heatmap`.

    With several seeds that of the first is drawn, since one seed's first head is not another's.
    """
    rows = _by_pair(frame)
    rows = rows[rows["seed"].fillna(-1) == rows["seed"].fillna(-1).min()]
    sites = [part for part in _ROTARY if rows["part"].eq(part).any()]
    panels = _panels(rows, sites, horizontal_spacing=0.1, shared_yaxes=False)
    for place, part in panels.parts:
        table = part.pivot_table(index=["layer", "head"], columns="pair", values="value")
        names = [f"{layer}.{head} " for layer, head in table.index]
        _heatmap(panels, place, table, names, _lengths(rows), frame)
    panels.figure.update_yaxes(autorange="reversed", type="category", title="layer.head")
    tallest = rows.groupby("part").apply(lambda part: len(part[["layer", "head"]].drop_duplicates())).max()
    height = 100 + panels.rows * (230 + min(22 * int(tallest), 1600))
    return styled(
        panels.figure, "Which pairs of which heads changed", label, _pair_note(rows, ""), height=height, below=95
    )


@drawing
def change_by_part(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Change of W_Q against W_K, W_V, W_O and the MLP, by layer: the mean over seeds, every seed as a point.

    On the left relative to the norm before, on the right the norm of the change itself. Raises InputError where the
    frame has no changes of whole parts.
    """
    rows = frame[is_change_of_part(frame)]
    if rows.empty:
        raise InputError("these results hold no changes of parts; compare two checkpoints with compare_spans")
    rows = rows.assign(part=rows["site"].str.split(".").str[-1])
    metrics = [metric for metric in _CHANGES if rows["metric"].eq(metric).any()]
    figure = make_subplots(rows=1, cols=len(metrics), horizontal_spacing=0.14)
    for column, metric in enumerate(metrics, start=1):
        for i, (part, name) in enumerate(_PARTS.items()):
            mine = rows[(rows["part"] == part) & (rows["metric"] == metric)]
            mean = mine.groupby("layer")["value"].mean()
            colour, dash, symbol = line_style(i)
            line = {"color": colour, "dash": dash, "width": 2.5}
            marker = {"symbol": symbol, "size": 10}
            together = {"mode": "lines+markers", "legendgroup": part, "showlegend": column == 1}
            mean_line = go.Scatter(x=mean.index, y=mean, name=name, line=line, marker=marker, **together)
            figure.add_trace(mean_line, row=1, col=column)
            if mine["seed"].nunique() > 1:
                points = {"x": mine["layer"], "y": mine["value"], "mode": "markers", "showlegend": False}
                small = {"color": colour, "size": 5, "opacity": 0.5}
                seeds = go.Scatter(**points, marker=small, hoverinfo="skip", legendgroup=part)
                figure.add_trace(seeds, row=1, col=column)
        title = "norm of change / norm before" if metric == "rel_change" else "norm of change"
        figure.update_yaxes(title=title, rangemode="tozero", row=1, col=column)
    layers = sorted(rows["layer"].unique())
    ticks = {"tickvals": layers} if len(layers) <= 16 else {}
    figure.update_xaxes(title="layer", **ticks)
    return styled(figure, "How much each part changed", label, _note(rows, ""), height=460)


@drawing
def causal_curves(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Accuracy against the share of query spans transplanted, a line for each order, a panel for each kind of set.

    Lines are means over distances and seeds; random orders are a grey line with the range of all of them. Raises
    InputError where the frame has no such curves.
    """
    rows = frame[is_curve(frame) & (frame["seq_len"] == frame.loc[is_curve(frame), "seq_len"].max())]
    if rows.empty:
        raise InputError("these results hold no curves of transplanted spans; see experiments/query_spans.py")
    share = (rows["moved"] / rows["movable"]).astype(float)
    rows = rows.assign(share=share, is_random=rows["draw"].notna(), draw=rows["draw"].fillna(-1))
    keys = ["span_set", "order", "draw", "is_random", "seed", "share"]
    rows = rows.groupby(keys, sort=False, as_index=False, dropna=False)["value"].mean()
    span_sets = rows["span_set"].unique().tolist()
    named = rows.loc[~rows["is_random"], "order"].unique()
    figure = make_subplots(
        rows=1, cols=len(span_sets), shared_yaxes=True, subplot_titles=[_wrapped(name) for name in span_sets]
    )
    for column, span_set in enumerate(span_sets, start=1):
        part = rows[rows["span_set"] == span_set]
        panel = {"row": 1, "col": column}
        random = part[part["is_random"]].groupby("share")["value"].agg(["mean", "min", "max"])
        if len(random):
            band = {"x": [*random.index, *random.index[::-1]], "y": [*random["max"], *random["min"][::-1]]}
            filled = {"fill": "toself", "fillcolor": "rgba(153,153,153,.25)", "line": {"width": 0}, "mode": "lines"}
            figure.add_trace(go.Scatter(**band, **filled, showlegend=False, hoverinfo="skip"), **panel)
            line = {"color": _GREY, "width": 3}
            shared = {"name": "random", "legendgroup": "random", "showlegend": column == 1}
            figure.add_trace(go.Scatter(x=random.index, y=random["mean"], mode="lines", line=line, **shared), **panel)
        for i, order in enumerate(named):
            mean = part[(part["order"] == order) & ~part["is_random"]].groupby("share")["value"].mean()
            if mean.empty:
                continue
            colour, dash, symbol = line_style(i)
            figure.add_trace(
                go.Scatter(
                    x=mean.index,
                    y=mean,
                    name=order,
                    legendgroup=order,
                    showlegend=not any(trace.name == order for trace in figure.data),
                    mode="lines+markers",
                    line={"color": colour, "dash": dash},
                    marker={"symbol": symbol, "size": 7},
                ),
                **panel,
            )
    figure.update_xaxes(title="share of the query spans", tickformat=".0%", range=[-0.02, 1.02])
    figure.update_yaxes(title="accuracy", range=[-0.03, 1.03], col=1)
    note = f"mean over distances and seeds {listed(rows['seed'])}; grey: random orders, their mean and range"
    figure = styled(figure, "How many query spans carry the skill", label, note, height=520)
    return figure.update_layout(legend={**BESIDE, "title": {"text": "order of spans"}}, margin={"t": 125})


@drawing
def transplants(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Accuracy after transplanting each group of weights, from the later checkpoint into the earlier and the other way.

    Bars are means over seeds, lines their range; panels for the long window and the short one. Raises InputError where
    the frame has no transplants.
    """
    rows = frame[is_transplant(frame)]
    if rows.empty:
        raise InputError("these results hold no transplants; see experiments/query_spans.py")
    keys = ["into", "group", "seed", "seq_len"]
    rows = rows.groupby(keys, sort=False, as_index=False, dropna=False)["value"].mean()
    windows = sorted(rows["seq_len"].unique(), reverse=True)
    order = rows["group"].unique().tolist()
    titles = [f"window of {window:,} tokens" for window in windows]
    figure = make_subplots(rows=1, cols=len(windows), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.05)
    for column, window in enumerate(windows, start=1):
        for i, (into, part) in enumerate(rows[rows["seq_len"] == window].groupby("into", sort=False)):
            by_group = part.groupby("group")["value"].agg(["mean", "min", "max"]).reindex(order)
            bars = {
                "array": by_group["max"] - by_group["mean"],
                "arrayminus": by_group["mean"] - by_group["min"],
                "width": 3,
            }
            trace = go.Bar(
                x=by_group["mean"],
                y=by_group.index,
                orientation="h",
                error_x={**bars, "thickness": 1.2},
                marker={"color": line_style(i)[0]},
                name=f"into the {into}",
                legendgroup=into,
                showlegend=column == 1,
            )
            figure.add_trace(trace, row=1, col=column)
    figure.update_layout(barmode="group", bargap=0.25)
    figure.update_xaxes(title="accuracy", range=[-0.03, 1.03])
    figure.update_yaxes(autorange="reversed", automargin=True, type="category")
    note = f"mean over distances and seeds {listed(rows['seed'])}; lines: smallest to largest seed"
    figure = styled(figure, "What transplanted weights do", label, note, height=280 + 26 * len(order))
    return figure.update_layout(legend={**BESIDE})


def _by_pair(frame: pd.DataFrame) -> pd.DataFrame:
    rows = frame[is_change_of_pair(frame)]
    if rows.empty:
        raise InputError("these results hold no changes by rotary pair; compare two checkpoints with compare_spans")
    return rows.assign(part=rows["site"].str.split(".").str[-1])


def _lengths(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.groupby("pair")[["wavelength", "wavelength_after"]].first()


class _Panels(NamedTuple):
    """A figure of heatmaps: a row for each measure of change, a column for each site; the rows that each draws."""

    figure: go.Figure
    rows: int
    parts: list[tuple[tuple[int, int], pd.DataFrame]]


def _panels(rows: pd.DataFrame, sites: list[str], *, horizontal_spacing: float, shared_yaxes: bool) -> _Panels:
    metrics = [metric for metric in _CHANGES if rows["metric"].eq(metric).any()]
    titles = [f"{site}, {_CHANGES[metric]}" for metric in metrics for site in sites]
    figure = make_subplots(
        rows=len(metrics),
        cols=len(sites),
        shared_yaxes=shared_yaxes,
        subplot_titles=titles,
        horizontal_spacing=horizontal_spacing,
        vertical_spacing=0.3 if len(metrics) > 1 else 0,
    )
    figure.update_annotations(yshift=14)
    parts = []
    for i, metric in enumerate(metrics, start=1):
        bar = {"title": _CHANGES[metric].replace(" ", "<br>", 1), "len": 1 / len(metrics), "yanchor": "top"}
        bar["y"] = 1 - (i - 1) / len(metrics)
        axis = "coloraxis" if i == 1 else f"coloraxis{i}"
        figure.update_layout({axis: {"colorscale": "Viridis", "colorbar": bar}})
        for j, site in enumerate(sites, start=1):
            parts.append(((i, j), rows[(rows["part"] == site) & (rows["metric"] == metric)]))
    return _Panels(figure, len(metrics), parts)


def _heatmap(
    panels: _Panels,
    place: tuple[int, int],
    table: pd.DataFrame,
    names: list[str],
    lengths: pd.DataFrame,
    frame: pd.DataFrame,
) -> None:
    """One panel: rows by name, pairs along a common axis with their wavelengths, and where windows end in it."""
    figure, (row, column) = panels.figure, place
    trace = go.Heatmap(
        z=table.to_numpy(),
        x=table.columns,
        y=names,
        coloraxis="coloraxis" if row == 1 else f"coloraxis{row}",
        hovertemplate="%{y}, pair %{x}: %{z:.4g}<extra></extra>",
    )
    figure.add_trace(trace, row=row, col=column)
    step = max(1, len(lengths) // 8)
    shown = lengths.iloc[::step]
    text = [f"{_short(row.wavelength)}<br>{_short(row.wavelength_after)}" for row in shown.itertuples()]
    title = "wavelength before, and after"
    figure.update_xaxes(tickvals=shown.index, ticktext=text, title=title, row=row, col=column)
    ends = frame[is_landmark(frame)].groupby(["phase", "seq_len"])["value"].first()
    for (phase, window), turning in ends.items():
        dash = "dot" if phase == "before" else "solid"
        figure.add_vline(x=turning - 0.5, line={"color": "white", "width": 3, "dash": dash}, row=row, col=column)
        axis = next(figure.select_xaxes(row=row, col=column)).plotly_name.removeprefix("xaxis")
        figure.add_annotation(
            x=turning - 0.5,
            y=1,
            xref=f"x{axis}",
            yref=f"y{axis} domain",
            yanchor="bottom",
            text=f"{window:,}",
            showarrow=False,
            font={"size": 11, "color": "#555555"},
        )


def _note(rows: pd.DataFrame, how: str) -> str:
    seeds = listed(rows["seed"])
    return "; ".join(
        part
        for part in ("relative change: norm of the change over the norm before", how, f"seeds {seeds}" if seeds else "")
        if part
    )


def _pair_note(rows: pd.DataFrame, how: str) -> str:
    lines = (
        "wavelengths in tokens; white lines: the last pair that turns in the window before (dotted) and after (solid)"
    )
    return f"{_note(rows, how)}; {lines}"


def _short(tokens: float) -> str:
    """A wavelength in few letters."""
    return f"{tokens / 1000:.3g}k" if tokens >= 1000 else f"{tokens:.3g}"


def _wrapped(title: str) -> str:
    words = title.split()
    return " ".join(words[: len(words) // 2]) + "<br>" + " ".join(words[len(words) // 2 :])
