"""What commands print: tables and facts, as rich tables on a terminal, aligned text elsewhere, or one JSON object.

The last line on stdout is the path of what was made. Notes and errors go to stderr.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rope_probe.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

_LONGEST_LINE = 560
_GAP = "  "
_NARROWEST_TEXT = 40


@dataclass(frozen=True)
class Table:
    """Rows of a frame under a title.

    `key` is what JSON calls the rows; tables of one key are one list there, told apart by `labels`, which stand in each
    of their rows. `number` is how floats are written, `names` what columns are called in print. `keys` counts the
    first columns, which say what a row is of: they are repeated where a table is wider than the terminal and is cut
    into several.
    """

    key: str
    title: str
    frame: "pd.DataFrame"
    number: str = "{:.3g}"
    keys: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fact:
    """A line of text, and the value that JSON holds of it."""

    key: str
    text: str
    value: Any


Part = Table | Fact


def show(path: Path, parts: Sequence[Part] = (), *, command: str, as_json: bool = False, made: str = "run") -> None:
    """Print what was found, and at last where it is, which JSON calls `made`.

    It is on the disk already, so nothing is lost where this fails.
    Raises InputError where stdout cannot be written to.
    """
    if as_json:
        text = json.dumps({"command": command, made: str(path), **_as_values(parts)}, allow_nan=False)
    else:
        text = "\n".join([*as_texts(parts), str(path)])
    encoding = sys.stdout.encoding or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(text, flush=True)
    except OSError as error:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter's own flush at its end
        if not isinstance(error, BrokenPipeError):  # who reads through a pipe may have read enough
            raise InputError(f"cannot print to stdout ({error.strerror}); the result is whole, at {path}") from error


def print_overview(what: str, examples: Mapping[str, Sequence[str]]) -> None:
    """Say what the tool is for: its questions, each with commands to copy."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(Text(what))
    for question, commands in examples.items():
        console.print(Text(f"\n{question}", style="bold"))
        for command in commands:
            console.print(Text(f"  {command}", style="cyan"), soft_wrap=True)
    console.print("\nrope-probe COMMAND --help says more.")


def tell(what: str) -> None:
    """One line on stderr, from one of several processes."""
    line = " ".join(what.split())
    if len(line) > _LONGEST_LINE:  # somebody's value of thousands of letters
        line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def as_texts(parts: Sequence[Part]) -> Iterator[str]:
    """Each part as it is printed."""
    from rich.console import Console

    console = Console()
    for part in parts:
        if isinstance(part, Fact):
            yield part.text
        elif console.is_terminal:
            yield _rich(part, console)
        else:
            yield f"{part.title}\n{_plain(part)}"


def _plain(table: Table) -> str:
    """Columns of text to the left, columns of numbers to the right, a row a line however wide it is."""
    columns = _columns(table)
    rows = zip(*(column.aligned for column in columns), strict=True)
    return "\n".join(_GAP.join(row).rstrip() for row in rows)


def _rich(table: Table, console: "Console") -> str:
    """The table as rich draws it, cut into several where it is wider than the terminal."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    with console.capture() as capture:
        console.print(Text(table.title, style="bold"))
        for columns in _fitting(_columns(table), table.keys, console.width):
            drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
            for column in columns:
                drawn.add_column(
                    Text(column.name),
                    justify="right" if column.is_number else "left",
                    no_wrap=column.is_number,
                    overflow="fold",
                )
            for row in zip(*(column.cells for column in columns), strict=True):
                drawn.add_row(*map(Text, row))
            console.print(drawn)
    return capture.get()


@dataclass(frozen=True)
class _Column:
    """The cells of a column as text."""

    name: str
    cells: list[str]
    is_number: bool

    @property
    def width(self) -> int:
        return max(map(len, [self.name, *self.cells]))

    @property
    def least(self) -> int:
        """Width that it needs: long text can be written in several lines."""
        return self.width if self.is_number else min(self.width, _NARROWEST_TEXT)

    @property
    def aligned(self) -> list[str]:
        """The name and the cells, of one width."""
        pad = str.rjust if self.is_number else str.ljust
        return [pad(cell, self.width) for cell in (self.name, *self.cells)]


def _columns(table: Table) -> list[_Column]:
    columns = []
    for name in table.frame:
        values = table.frame[name].tolist()
        given = [value for value in values if not _is_absent(value)]
        is_number = bool(given) and all(isinstance(value, int | float) for value in given)
        columns.append(
            _Column(table.names.get(name, str(name)), [_cell(value, table.number) for value in values], is_number)
        )
    return columns


def _cell(value: Any, number: str) -> str:
    if _is_absent(value):
        return "-"
    return number.format(value) if isinstance(value, float) else str(value)


def _is_absent(value: Any) -> bool:
    """None, NaN and pandas' NA alike."""
    import pandas as pd

    return bool(pd.isna(value))


def _fitting(columns: list[_Column], keys: int, width: int) -> Iterator[list[_Column]]:
    """Groups of columns that fit beside each other, the first `keys` of them in every group."""
    first, rest = columns[:keys], columns[keys:]
    taken: list[_Column] = []
    for column in rest:
        group = [*first, *taken, column]
        needed = sum(one.least for one in group) + 3 * len(group)
        if taken and needed > width:
            yield [*first, *taken]
            taken = []
        taken.append(column)
    yield [*first, *taken]


def _as_values(parts: Sequence[Part]) -> dict[str, Any]:
    """The parts by their keys, as JSON has them; tables of one key are one list of rows."""
    values: dict[str, Any] = {}
    for part in parts:
        if isinstance(part, Fact):
            values[part.key] = part.value
        else:
            records = part.frame.to_dict("records")
            rows = [{str(name): _json_value(value) for name, value in record.items()} for record in records]
            values.setdefault(part.key, []).extend({**part.labels, **row} for row in rows)
    return values


def _json_value(value: Any) -> Any:
    """A cell as JSON has it: null for what is absent, and no infinity."""
    if _is_absent(value):
        return None
    plain = value.item() if hasattr(value, "item") else value
    return str(plain) if isinstance(plain, float) and not math.isfinite(plain) else plain
