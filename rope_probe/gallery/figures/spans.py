"""What changed between two checkpoints, by part, head and rotary pair; and what transplants of spans do."""

from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go

from rope_probe.errors import InputError
from rope_probe.gallery.figures.layout import (
    headroom_for,
    lines_of,
    mark_at,
    missing_is_grey,
    panels,
    wrapped,
)
from rope_probe.gallery.figures.style import (
    GREY,
    PLAIN,
    SCALE,
    bar_of,
    down,
    drawing,
    in_short,
    joined,
    line_style,
    listed,
    seeds_of,
    short,
    styled,
    ticks_of,
    trials_of,
)

_PARTS = {"W_Q": "W_Q", "W_K": "W_K", "W_V": "W_V", "W_O": "W_O", "mlp": "MLP"}
_ROTARY = ("W_Q", "W_K")
CHANGES = {"rel_change": "relative change", "change_norm": "norm of change"}
_MOST_HEADS, _MOST_LANDMARKS = 40, 4
_LOWEST_PANEL, _HIGHEST_PANEL, _PIXELS_OF_LAYER, _PIXELS_OF_HEAD = 60, 190, 16, 12
_HIGHEST_OF_HEADS, _ALL_PANELS = 240, 900
_ROOM_FOR_GROUP, _LONGEST_GROUP = 150, 44
"""Pixels that the name of a group of weights takes beside its bars."""


def is_change_of_pair(frame: pd.DataFrame) -> pd.Series:
    """Rows that `span_heatmap` and `span_heads` draw: change of a pair in W_Q or W_K, relative and its norm."""
    rotary = frame["site"].str.endswith(_ROTARY).fillna(False)
    return rotary & frame["pair"].notna() & frame["metric"].isin(CHANGES)


def is_change_of_part(frame: pd.DataFrame) -> pd.Series:
    """Rows that `change_by_part` draws: change of a part of a layer, relative and its norm."""
    part = frame["site"].str.split(".").str[-1].isin(list(_PARTS)).fillna(False)
    return part & frame["layer"].notna() & frame["head"].isna() & frame["metric"].isin(CHANGES)


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

    The axis has each pair's wavelength before and after. Where the frame has windows, lines stand behind the last pair
    that completes a turn in the window before, and after. Raises InputError where the frame has no changes by pair.
    """
    rows = _by_pair(frame)
    height = max(_LOWEST_PANEL, min(_HIGHEST_PANEL, _PIXELS_OF_LAYER * int(rows["layer"].nunique())))
    maps = _maps(rows, frame, height)
    for k, part in maps.parts:
        table = part.pivot_table(index="layer", columns="pair", values="value")
        _map(maps.figure, k, table, [f"layer {layer}" for layer in table.index], height)
    note = _pair_note(rows, "mean over heads")
    return _finished(maps, rows, "Which rotary pairs changed", label, note)


@drawing
def span_heads(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Change of W_Q and W_K by pair, relative and below it its norm, for every head; otherwise as `span_heatmap`.

    With several seeds that of the first is drawn, since one seed's first head is not another's.
    """
    rows = _by_pair(frame)
    rows = rows[rows["seed"].fillna(-1) == rows["seed"].fillna(-1).min()]
    rows, note = _most_changed(rows)
    most = int(rows.groupby("part").apply(lambda part: len(part[["layer", "head"]].drop_duplicates())).max())
    height = max(_LOWEST_PANEL, min(_HIGHEST_OF_HEADS, _PIXELS_OF_HEAD * most))
    maps = _maps(rows, frame, height)
    for k, part in maps.parts:
        table = part.pivot_table(index=["layer", "head"], columns="pair", values="value")
        _map(maps.figure, k, table, [f"{layer}.{head} " for layer, head in table.index], height)
    maps.figure.update_yaxes(type="category", title="layer.head")
    return _finished(maps, rows, "Which pairs of which heads changed", label, _pair_note(rows, note))


def _most_changed(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The rows of the heads that there is room for, those of the largest change of each part, and a note of it."""
    kept, notes = [], []
    for part, mine in rows.groupby("part", sort=False):
        metric = "change_norm" if mine["metric"].eq("change_norm").any() else "rel_change"
        change = mine[mine["metric"] == metric].groupby(["layer", "head"])["value"].max()
        if len(change) <= _MOST_HEADS:
            kept.append(mine)
            continue
        most = change.nlargest(_MOST_HEADS).index
        kept.append(mine[pd.MultiIndex.from_frame(mine[["layer", "head"]]).isin(most)])
        notes.append(f"{part}: the {_MOST_HEADS} of {len(change)} heads with the largest {CHANGES[metric]} of a pair")
    return pd.concat(kept), "; ".join(notes)


@drawing
def change_by_part(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Change of W_Q against W_K, W_V, W_O and the MLP, by layer: the mean over seeds, every seed as a point.

    Above it is relative to the norm before, below it is the norm of the change itself. Raises InputError where the
    frame has no changes of whole parts.
    """
    rows = frame[is_change_of_part(frame)]
    if rows.empty:
        raise InputError("these results hold no changes of parts; compare two checkpoints with compare_spans")
    rows = rows.assign(part=rows["site"].str.split(".").str[-1])
    metrics = [metric for metric in CHANGES if rows["metric"].eq(metric).any()]
    titles = ["norm of change / norm before" if metric == "rel_change" else "norm of change" for metric in metrics]
    figure = panels(titles, 250, shared=True)
    for row, metric in enumerate(metrics, start=1):
        for i, (part, name) in enumerate(_PARTS.items()):
            mine = rows[(rows["part"] == part) & (rows["metric"] == metric)]
            mean = mine.groupby("layer")["value"].mean()
            colour, dash, symbol = line_style(i)
            line = {"color": colour, "dash": dash, "width": 2.5}
            marker = {"symbol": symbol, "size": 10}
            together = {"mode": "lines+markers", "legendgroup": part, "showlegend": row == 1}
            mean_line = go.Scatter(x=mean.index, y=mean, name=name, line=line, marker=marker, **together)
            figure.add_trace(mean_line, row=row, col=1)
            if mine["seed"].nunique() > 1:
                points = {"x": mine["layer"], "y": mine["value"], "mode": "markers", "showlegend": False}
                small = {"color": colour, "size": 5, "opacity": 0.5}
                seeds = go.Scatter(**points, marker=small, hoverinfo="skip", legendgroup=part)
                figure.add_trace(seeds, row=row, col=1)
    figure.update_yaxes(rangemode="tozero", nticks=6)
    few = rows["layer"].nunique() <= 10
    figure.update_xaxes(title="layer", **({"dtick": 1} if few else {"nticks": 10}))
    return styled(figure, "How much each part changed", label, _note(rows, "mean over seeds"))


@drawing
def causal_curves(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Accuracy against the share of query spans transplanted, a line for each order, a panel for each kind of set.

    Lines are means over distances and seeds; random orders are a grey line with the range of all of them. Raises
    InputError where the frame has no such curves.
    """
    rows = frame[is_curve(frame) & (frame["seq_len"] == frame.loc[is_curve(frame), "seq_len"].max())]
    if rows.empty:
        raise InputError("these results hold no curves of transplanted spans; see experiments/query_spans.py")
    what = joined(
        f"window {listed(rows['seq_len'])} tokens", seeds_of(rows), trials_of(rows, "point, distance and seed")
    )
    share = (rows["moved"] / rows["movable"]).astype(float)
    rows = rows.assign(share=share, is_random=rows["draw"].notna(), draw=rows["draw"].fillna(-1))
    keys = ["span_set", "order", "draw", "is_random", "seed", "share"]
    rows = rows.groupby(keys, sort=False, as_index=False, dropna=False)["value"].mean()
    span_sets = rows["span_set"].unique().tolist()
    named = rows.loc[~rows["is_random"], "order"].unique()
    figure = panels(span_sets, max(_LOWEST_PANEL, min(280, _ALL_PANELS // len(span_sets))), shared=True)
    for row, span_set in enumerate(span_sets, start=1):
        part = rows[rows["span_set"] == span_set]
        panel = {"row": row, "col": 1}
        random = part[part["is_random"]].groupby("share")["value"].agg(["mean", "min", "max"])
        if len(random):
            band = {"x": [*random.index, *random.index[::-1]], "y": [*random["max"], *random["min"][::-1]]}
            filled = {"fill": "toself", "fillcolor": "rgba(153,153,153,.25)", "line": {"width": 0}, "mode": "lines"}
            figure.add_trace(go.Scatter(**band, **filled, showlegend=False, hoverinfo="skip"), **panel)
            line = {"color": GREY, "width": 3}
            shared = {"name": "random", "legendgroup": "random", "showlegend": row == 1}
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
    figure.update_yaxes(title="accuracy", range=[-0.03, 1.03])
    note = (
        f"{what}; lines: orders of the spans, mean over distances and seeds; grey: random orders, their mean and range"
    )
    return styled(figure, "How many query spans carry the skill", label, note)


@drawing
def transplants(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Accuracy after transplanting each group of weights, from the later checkpoint into the earlier and the other way.

    Bars are means over seeds, lines their range; panels for the long window and the short one. Raises InputError where
    the frame has no transplants.
    """
    rows = frame[is_transplant(frame)]
    if rows.empty:
        raise InputError("these results hold no transplants; see experiments/query_spans.py")
    what = joined(seeds_of(rows), trials_of(rows, "bar, distance and seed"))
    keys = ["into", "group", "seed", "seq_len"]
    rows = rows.groupby(keys, sort=False, as_index=False, dropna=False)["value"].mean()
    windows = sorted(rows["seq_len"].unique(), reverse=True)
    order = rows["group"].unique().tolist()
    titles = [f"window of {window:,} tokens" for window in windows]
    texts = [wrapped(short(group, _LONGEST_GROUP), _ROOM_FOR_GROUP) for group in order]
    each = max(26, 17 * max(map(lines_of, texts)))
    height = max(_LOWEST_PANEL, min(each * len(order), _ALL_PANELS // len(windows)))
    figure = panels(titles, height, shared=True)
    for row, window in enumerate(windows, start=1):
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
                showlegend=row == 1,
            )
            figure.add_trace(trace, row=row, col=1)
    figure.update_layout(barmode="group", bargap=0.25)
    figure.update_xaxes(title="accuracy", range=[-0.03, 1.03])
    ticks = down(order, height, each)
    figure.update_yaxes(
        autorange="reversed",
        type="category",
        tickvals=ticks,
        ticktext=[text for group, text in zip(order, texts, strict=True) if group in ticks],
    )
    note = joined("bars: mean over distances and seeds", "lines: smallest to largest seed", what, by="; ")
    return styled(figure, "What transplanted weights do", label, note)


def _by_pair(frame: pd.DataFrame) -> pd.DataFrame:
    rows = frame[is_change_of_pair(frame)]
    if rows.empty:
        raise InputError("these results hold no changes by rotary pair; compare two checkpoints with compare_spans")
    return rows.assign(part=rows["site"].str.split(".").str[-1])


class _Maps(NamedTuple):
    """A figure of maps, by number of its panel the rows that each draws."""

    figure: go.Figure
    parts: list[tuple[int, pd.DataFrame]]


def _maps(rows: pd.DataFrame, frame: pd.DataFrame, height: int) -> _Maps:
    """Panels one below the other along the same pairs, a colour axis for each measure of change, and landmarks."""
    sites = [part for part in _ROTARY if rows["part"].eq(part).any()]
    metrics = [metric for metric in CHANGES if rows["metric"].eq(metric).any()]
    ends = frame[is_landmark(frame)].groupby(["phase", "seq_len"])["value"].first().iloc[:_MOST_LANDMARKS]
    titles = [f"{site}, {CHANGES[metric]}" for metric in metrics for site in sites]
    figure = panels(titles, height, headroom=headroom_for(len(ends)), shared=True)
    parts = []
    for k, title in enumerate(titles):
        metric, site = metrics[k // len(sites)], sites[k % len(sites)]
        axis = "coloraxis" if metric == metrics[0] else "coloraxis2"
        figure.update_layout({axis: {"colorscale": SCALE, "colorbar": bar_of(CHANGES[metric])}})
        parts.append((k + 1, rows[(rows["part"] == site) & (rows["metric"] == metric)]))
        figure.add_trace(go.Heatmap(name=title, coloraxis=axis), row=k + 1, col=1)
    pairs = rows["pair"].nunique()
    for line, ((phase, window), turning) in enumerate(ends.items()):
        for k in range(1, len(titles) + 1):
            text = f"window {phase}: {window:,}" if k == 1 else ""
            dash = "dot" if phase == "before" else "solid"
            mark_at(figure, k, turning - 0.5, text, line, share=turning / pairs, dash=dash, colour="white")
    return _Maps(figure, parts)


def _map(figure: go.Figure, k: int, table: pd.DataFrame, names: list[str], height: int) -> None:
    """Fill panel k: lines by name, pairs across."""
    figure.data[k - 1].update(
        z=table.to_numpy(dtype=float),
        x=table.columns.tolist(),
        y=names,
        name=None,
        hovertemplate="%{y}, pair %{x}: %{z:.4g}<extra></extra>",
    )
    figure.update_yaxes(type="category", autorange="reversed", tickvals=down(names, height), **PLAIN, row=k, col=1)


def _finished(maps: _Maps, rows: pd.DataFrame, title: str, label: str, note: str) -> go.Figure:
    ticks, what = _pair_ticks(rows)
    maps.figure.update_xaxes(**ticks, **PLAIN, tickangle=0, title=what)
    missing_is_grey(maps.figure)
    return styled(maps.figure, title, label, note)


def _pair_ticks(rows: pd.DataFrame) -> tuple[dict[str, Any], str]:
    """Ticks with the pair and its wavelengths before and after, of as many pairs as have room; their title."""
    lengths = rows.groupby("pair")[["wavelength", "wavelength_after"]].first()
    moved = bool((lengths["wavelength_after"] != lengths["wavelength"]).fillna(False).any())
    texts = {
        pair: "<br>".join([f"{pair}", *map(in_short, (before, after) if moved else (before,))])
        for pair, before, after in lengths.itertuples()
    }
    what = "its wavelength before, and after, in tokens" if moved else "its wavelength in tokens"
    return ticks_of(texts), f"rotary pair, 0 fastest<br>{what}"


def _note(rows: pd.DataFrame, how: str) -> str:
    return joined("relative change: norm of the change over the norm before", how, seeds_of(rows), by="; ")


def _pair_note(rows: pd.DataFrame, how: str) -> str:
    return f"{_note(rows, how)}; white lines: the last pair that turns in the window before (dotted) and after (solid)"
