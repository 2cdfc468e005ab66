"""Progress on stderr: a bar with rate and remaining time on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_PLAIN_INTERVAL_S = 15.0
_PLAIN_SHORTEST_S = 2.0
"""What is done sooner needs no line."""
Advance = Callable[..., None]


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.1f}/s")


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """Yields `advance(count=1, note="")`; the note is shown beside the bar."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as bar:
            task = bar.add_task(what, total=total, note="")
            yield lambda count=1, note="": bar.update(task, advance=count, note=note)
    else:
        yield _plain(what, total)


def _plain(what: str, total: int) -> Advance:
    started = last_line = time.monotonic()
    done = 0

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, last_line
        done += count
        now = time.monotonic()
        if now - last_line < (_PLAIN_INTERVAL_S if done < total else _PLAIN_SHORTEST_S):
            return
        last_line, rate = now, done / max(now - started, 1e-9)
        left = f"{(total - done) / rate:,.0f} s left"
        print(f"{what}: {done}/{total}, {rate:,.1f}/s, {left} {note}".rstrip(), file=sys.stderr, flush=True)

    return advance
