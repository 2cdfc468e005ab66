"""Progress on stderr: a bar with rate and remaining time on a terminal, a plain line now and then elsewhere.

There is one at a time: the work of a command has one total, so that the time it tells is the time to its end.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

_PLAIN_INTERVAL_S = 15.0
_PLAIN_SHORTEST_S = 2.0
"""What is done sooner needs no line."""
_SPEED_PERIOD_S = 600.0
"""How far back the speed is measured: a step may take minutes."""


class Advance(Protocol):
    """Says that so much more is done; the note is shown beside it. What is `skipped` took no time."""

    def __call__(self, count: int = 1, note: str = "", *, skipped: bool = False) -> None:
        """Add to what is done."""


def in_time(seconds: float) -> str:
    """A duration as a reader thinks of it: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:,.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60:02d} min"


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.1f}/s")


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        left = task.time_remaining
        return Text("" if left is None or task.finished else f"about {in_time(left)} left", style="progress.remaining")


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """Yields `advance(count=1, note="", skipped=False)`; see `Advance`."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), _Left())
        note_column = TextColumn("{task.fields[note]}", markup=False)
        with Progress(*columns, note_column, console=console, speed_estimate_period=_SPEED_PERIOD_S) as bar:
            task = bar.add_task(what, total=total, note="")

            def advance(count: int = 1, note: str = "", *, skipped: bool = False) -> None:
                if skipped:  # and the speed is measured from here on
                    bar.reset(task, completed=int(bar.tasks[0].completed) + count, note=note)
                else:
                    bar.update(task, advance=count, note=note)

            yield advance
    else:
        yield _plain(what, total)


def _plain(what: str, total: int) -> Advance:
    started = last_line = time.monotonic()
    done, skipped_so_far = 0, 0

    def advance(count: int = 1, note: str = "", *, skipped: bool = False) -> None:
        nonlocal done, skipped_so_far, last_line
        done += count
        if skipped:
            skipped_so_far += count
            return
        now = time.monotonic()
        if now - last_line < (_PLAIN_INTERVAL_S if done < total else _PLAIN_SHORTEST_S):
            return
        last_line, rate = now, (done - skipped_so_far) / max(now - started, 1e-9)
        left = f"about {in_time((total - done) / rate)} left" if done < total else f"in {in_time(now - started)}"
        print(f"{what}: {done}/{total}, {rate:,.1f}/s, {left} {note}".rstrip(), file=sys.stderr, flush=True)

    return advance
