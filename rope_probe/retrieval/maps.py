"""Maps of retrieval, window x distance: with one window alone, a longer distance is also a deeper place in it.

A failure at a distance may be one of distance or one of the window, whose softmax is spread over more keys. Along a
row of the map the distance stays and the window grows; up a column the window stays and the distance grows.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from rope_probe.errors import InputError
from rope_probe.models.hooked import HookedCausalLM
from rope_probe.retrieval.probe import RETRIEVAL, KeyValueTask, retrieval_accuracy
from rope_probe.retrieval.tasks import TextTask
from rope_probe.tracing.perturbations import Perturbation


def retrieval_map(
    model: HookedCausalLM,
    task: KeyValueTask | TextTask,
    windows: Sequence[int],
    distances: Sequence[int] | None = None,
    *,
    trials: int | None = None,
    seed: int = 0,
    perturbation: Perturbation | None = None,
    progress: Callable[[int], Any] | None = None,
    trials_file: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """`retrieval_accuracy` of a task in each of these windows, at each distance that has room in them; a tidy frame.

    `windows` and `distances` are tokens; the task's own window does not count. By default the distances are all that
    the task has in the largest window. A cell has no rows where the distance is not below the window, or where the
    task has no trials of it: `seq_len` and `distance` say which cell a row is of. Trials are drawn anew in each cell.
    The other options, and what `progress` counts, are those of `retrieval_accuracy`; `map_trials` foretells their sum.

    Raises InputError for a task without distances, for no windows, for a window or a distance that has no cell, saying
    why, for windows that are longer than the model's frequencies stand still, and as `retrieval_accuracy` does.
    """
    cells = map_cells(model, task, windows, distances, trials=trials, seed=seed)
    frames = [
        retrieval_accuracy(
            model,
            in_window,
            fitting,
            trials=trials,
            seed=seed,
            perturbation=perturbation,
            progress=progress,
            trials_file=trials_file,
        )
        for in_window, fitting in cells
    ]
    return RETRIEVAL.frame(pd.concat(frames, ignore_index=True))


def map_trials(
    model: HookedCausalLM,
    task: KeyValueTask | TextTask,
    windows: Sequence[int],
    distances: Sequence[int] | None = None,
    *,
    trials: int | None = None,
    seed: int = 0,
) -> int:
    """How many trials a `retrieval_map` with these arguments is; errors as there."""
    count = task.default_trials if trials is None else trials
    return count * sum(
        len(fitting) for _, fitting in map_cells(model, task, windows, distances, trials=trials, seed=seed)
    )


def map_cells(
    model: HookedCausalLM,
    task: KeyValueTask | TextTask,
    windows: Sequence[int],
    distances: Sequence[int] | None = None,
    *,
    trials: int | None = None,
    seed: int = 0,
) -> list[tuple[KeyValueTask | TextTask, list[int]]]:
    """The task in each window of a `retrieval_map`, shortest first, with the distances that have room there.

    Arguments and errors as there.
    """
    if not windows:
        raise InputError("a map needs one window or more, but there is none")
    in_windows = [dataclasses.replace(task, window=window) for window in sorted(set(windows))]
    longest = in_windows[-1]
    if model.exact_length is not None and longest.window > model.exact_length:
        raise InputError(
            f"window {longest.window} is past {model.exact_length} tokens, up to which this model's frequencies stand "
            "still; leave it out"
        )
    possible = longest.distances() if distances is None else distances
    wanted = sorted({distance for distance in possible if distance is not None})
    if not wanted:
        raise InputError(f"a map needs distances, and {task.name} has none; use passkey, a niah task or key_value")
    count = task.default_trials if trials is None else trials
    refusals: dict[tuple[int, int], str] = {}
    cells = []
    for in_window in in_windows:
        fitting = []
        for distance in wanted:
            if distance >= in_window.window:
                refusals[in_window.window, distance] = f"distance {distance} is not below the window"
                continue
            try:
                in_window.draw(distance, count, seed=seed)
            except InputError as error:
                refusals[in_window.window, distance] = str(error)
            else:
                fitting.append(distance)
        if not fitting:
            raise InputError(f"window {in_window.window} has no cell: {refusals[in_window.window, wanted[0]]}")
        cells.append((in_window, fitting))
    for distance in wanted:
        if all((in_window.window, distance) in refusals for in_window in in_windows):
            raise InputError(f"distance {distance} has no cell: {refusals[longest.window, distance]}")
    return cells
