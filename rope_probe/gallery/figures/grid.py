"""The map of short theta x long theta, with what two formulas say of each theta along its axes."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from rope_probe import rope
from rope_probe.errors import InputError
from rope_probe.gallery.figures.layout import ROOM, headroom_for, mark_at, panels, roomy
from rope_probe.gallery.figures.style import (
    PLAIN,
    SCALE,
    bar_of,
    drawing,
    in_short,
    joined,
    listed,
    seeds_of,
    styled,
    trials_of,
)

FAR, GATE = 8, 0.95
_HEAD_DIMS, _THETAS, _DISTANCES = (4, 1024), (1.0, 1e99), (1, 2**20)
_LOWEST_PANEL, _PIXELS_OF_THETA, _ALL_PANELS = 110, 44, 880
_OUTLINE, _BOUND = "#cc79a7", "#d55e00"


def is_cell(frame: pd.DataFrame) -> pd.Series:
    """Rows with the accuracy of one cell: a head dim, the thetas of both phases and the budget of the second."""
    complete = _is_base(frame) & frame["long_theta"].between(*_THETAS) & frame[["steps", "seq_len"]].notna().all(axis=1)
    return complete & (frame["metric"] == "accuracy") & frame["distance"].between(*_DISTANCES).fillna(False)


def is_gate(frame: pd.DataFrame) -> pd.Series:
    """Rows with what the gate of a base measured."""
    complete = _is_base(frame) & frame["seq_len"].notna() & (frame["phase"] == "short").fillna(False)
    return complete & (frame["metric"] == "gate_accuracy")


def _is_base(frame: pd.DataFrame) -> pd.Series:
    """Rows with a head dim and a short theta that there is a base bound for."""
    head_dim = frame["head_dim"].between(*_HEAD_DIMS) & (frame["head_dim"] % 2 == 0)
    return head_dim.fillna(False) & frame["short_theta"].between(*_THETAS)


@drawing
def theta_grid(frame: pd.DataFrame, label: str = "") -> go.Figure:
    """Heatmaps of accuracy at 8 times the document length: short theta x long theta, for each head dim and budget.

    The document length is the window of the bases' gates. A line between the cells is the base bound of the distance.
    Ticks tell the spectrum use of each theta in its own window. Constant theta is outlined. An asterisk marks cells
    whose base missed its gate. Raises InputError where the frame has no cells, no gates, or none at the distance.
    """
    cells, gates = read_cells(frame), frame[is_gate(frame)]
    if cells.empty or gates.empty:
        raise InputError("these results hold no cells of a theta grid with the gates of their bases")
    documents = int(gates["seq_len"].min())
    distance = FAR * documents
    cells = cells[cells["distance"] == distance]
    if cells.empty:
        raise InputError(f"these results hold no accuracy at {distance} tokens, {FAR} times {documents}")
    missed = set(gates[gates["value"] < GATE][["head_dim", "short_theta"]].itertuples(index=False, name=None))
    head_dims, budgets = (sorted(cells[column].unique()) for column in ("head_dim", "steps"))
    places = [(dim, steps) for dim in head_dims for steps in budgets]
    most = min(_PIXELS_OF_THETA * cells["short_theta"].nunique(), _ALL_PANELS // len(places))
    titles = [f"head dim {dim}, {steps} steps" for dim, steps in places]
    figure = panels(titles, max(_LOWEST_PANEL, most), headroom=headroom_for(1))
    for row, (head_dim, steps) in enumerate(places, start=1):
        bound = rope.base_bound(int(head_dim), distance)
        part = cells[(cells["head_dim"] == head_dim) & (cells["steps"] == steps)]
        _panel(figure, part, missed, bound, documents, {"row": row, "col": 1})
    figure.update_yaxes(title="short theta")
    figure.update_xaxes(title="long theta", row=len(places))
    bar = bar_of("accuracy", {share: f"{share:g}" for share in (0, 0.25, 0.5, 0.75, 1)})
    figure.update_layout(coloraxis={"colorscale": SCALE, "cmin": 0, "cmax": 1, "colorbar": bar})
    cell = cells.groupby(["head_dim", "steps", "short_theta", "long_theta"])["accuracy"]
    seeds = seeds_of(cells)
    if cells["seed"].nunique() > 1:
        apart = (cell.max() - cell.min()).max()
        seeds = f"mean over {seeds}, which are apart by {apart:.2f} at most"
    trials = trials_of(frame[is_cell(frame) & (frame["distance"] == distance)], "cell and seed")
    note = (
        f"each cell: accuracy at {distance} tokens, {FAR} times the documents of {documents}, in windows of "
        f"{listed(cells['seq_len'])}; {joined(seeds, trials, by='; ')}; outlined: constant theta; "
        f"dashed: the base bound, which says that {distance} tokens need a long theta to the right of it; "
        f"below each theta: how many of the pairs complete a turn in the window of the phase"
    )
    if missed:
        note += f"; *: the base of a seed missed its gate of {GATE}"
    title = f"Accuracy at {distance} tokens by the theta of each phase"
    return styled(figure, title, label, note)


def read_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of each cell and seed by distance.

    Columns: seed, seq_len, distance, head_dim, short_theta, long_theta, steps, accuracy.
    """
    columns = ["seed", "seq_len", "distance", "head_dim", "short_theta", "long_theta", "steps", "value"]
    numbers = {"head_dim": int, "steps": int, "distance": int, "seq_len": int}  # plain ones, no missing values
    return frame.loc[is_cell(frame), columns].astype(numbers).rename(columns={"value": "accuracy"})


def _panel(
    figure: go.Figure,
    cells: pd.DataFrame,
    missed: set[tuple[int, float]],
    bound: float,
    documents: int,
    at: dict[str, int],
) -> None:
    """The heatmap of one head dim and budget."""
    table = cells.pivot_table(values="accuracy", index="short_theta", columns="long_theta")
    head_dim = int(cells["head_dim"].iloc[0])
    marks = ["*" if (head_dim, theta) in missed else "" for theta in table.index]
    text = [
        ["" if np.isnan(value) else f"{value:.2f}{mark}" for value in row]
        for row, mark in zip(table.to_numpy(), marks, strict=True)
    ]
    seeds = cells.pivot_table(
        values="accuracy",
        index="short_theta",
        columns="long_theta",
        aggfunc=lambda values: ", ".join(f"{v:.2f}" for v in values),
    )
    trace = go.Heatmap(
        z=table.to_numpy(),
        text=text,
        texttemplate="%{text}",
        customdata=seeds.to_numpy(),
        coloraxis="coloraxis",
        xgap=2,
        ygap=2,
        hovertemplate="seeds: %{customdata}<extra></extra>",
    )
    figure.add_trace(trace, **at)
    axes = ((figure.update_xaxes, table.columns, cells["seq_len"].max()), (figure.update_yaxes, table.index, documents))
    for update, thetas, window in axes:
        texts = [_tick(theta, head_dim, window) for theta in thetas]
        ticks = list(range(len(thetas)))
        if update == figure.update_xaxes:
            ticks = roomy(ticks, texts, ticks, ROOM * (1 - 1 / len(thetas)))
        place = {"tickvals": ticks, "ticktext": [texts[tick] for tick in ticks], "range": [-0.5, len(thetas) - 0.5]}
        update(**place, tickangle=0, **PLAIN, **at)
    for y, short in enumerate(table.index):
        for x in np.flatnonzero(table.columns == short):
            corners = {"x0": x - 0.5, "x1": x + 0.5, "y0": y - 0.5, "y1": y + 0.5}
            figure.add_shape(type="rect", **corners, line={"color": _OUTLINE, "width": 3}, **at)
    edge = float(np.searchsorted(table.columns, bound)) - 0.5
    share = (edge + 0.5) / len(table.columns)
    mark_at(figure, at["row"], edge, f"base bound {in_short(bound)}", 0, share=share, dash="dash", colour=_BOUND)


def _tick(theta: float, head_dim: int, window: int) -> str:
    """A theta with the pairs that complete a turn in a window."""
    pairs = head_dim // 2
    use = rope.spectrum_use(rope.inv_freq({"rope_type": "default", "rope_theta": theta}, head_dim), window)
    return f"{in_short(theta)}<br>{use * pairs:.0f}/{pairs}"
