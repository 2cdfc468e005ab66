"""The tables that runs hold: `tables/NAME.parquet`, each declared once, beside the code that makes its rows.

A table is long: a row is one number (`value`), what it is (`metric`), and the columns that say of what. Every table has
the keys `run_id`, `experiment`, `model` and `seed`. docs/tables.md is made of the declarations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from rope_probe.errors import InputError

Type = Literal["string", "Int64", "float64", "boolean"]


@dataclass(frozen=True)
class Column:
    """What a column holds: its pandas type, its meaning, and the unit of its numbers where they have one."""

    type: Type
    meaning: str
    unit: str = ""


KEYS = {
    "run_id": Column("string", "the run that the row is of"),
    "experiment": Column("string", "the command or script that made the run"),
    "model": Column("string", "the model, or arm of training, that was measured"),
    "seed": Column("Int64", "seed of the model and of what was drawn for it"),
}
"""First columns of every table. A run fills in the first two."""

VALUES = {
    "metric": Column("string", "what `value` is; see the table's metrics"),
    "value": Column("float64", "the number"),
    "value_float64": Column("float64", "the same measured in float64, the control that tells rounding from signal"),
    "low": Column("float64", "lower end of the 95% confidence interval of `value`"),
    "high": Column("float64", "upper end of that interval"),
}
"""Last columns. Every table has `metric` and `value`; the others where they are measured."""

SHARED = {
    "phase": Column("string", "phase of training that this is of, or after which it was measured"),
    "role": Column("string", "the part that the model plays in its run: teacher or student"),
    "arm": Column("string", "what was measured together: a window, or a set of perturbations, by name"),
    "seq_len": Column("Int64", "length of the window", "tokens"),
    "tokens": Column("Int64", "tokens trained on so far in the phase", "tokens"),
    "masked": Column("boolean", "whether attention stayed inside documents"),
    "document": Column("Int64", "document of the window, 0 first"),
    "position": Column("Int64", "place in the window, 0 first", "tokens"),
    "distance": Column("Int64", "from what is read to where it is asked for", "tokens"),
    "occurrence": Column("string", '"new" for tokens that occur for the first time in a window, "again" for others'),
    "perturbation": Column("string", "the perturbation, as text"),
    "kind": Column("string", "its class"),
    "restriction": Column("string", "layers, heads, pairs and positions that it is restricted to, as text"),
    "side": Column("string", "what it acts on: q, k or qk"),
    "delta_tokens": Column("float64", "by how much it moves positions, or how far apart two copies begin", "tokens"),
    "factor": Column("float64", "what it multiplies attention scores by, where that is one number"),
    "radians": Column("float64", "by how much it turns pairs, where that is one angle for all", "radians"),
    "inject_layer": Column("Int64", "the one layer that it acts in; null for several"),
    "inject_layers": Column("string", "the several layers that it acts in, as ranges; null for one, and for all"),
    "attention": Column(
        "string",
        "kind of attention of the layer that is perturbed, else of the one that is read, as the config calls it: "
        "sliding_attention, full_attention; null where it tells none",
    ),
    "layer": Column("Int64", "layer, 0 first"),
    "site": Column("string", "where it is read: a TransformerLens hook name, or the name of a weight"),
    "head": Column("Int64", "head, 0 first"),
    "pair": Column("Int64", "rotary pair, 0 fastest"),
    "wavelength": Column("float64", "wavelength of the pair; of two checkpoints, in the first", "tokens"),
    "wavelength_after": Column("float64", "wavelength of the pair in the second checkpoint", "tokens"),
}
"""Columns that mean the same in several tables."""


@dataclass(frozen=True)
class Metric:
    """What a metric is, and its unit."""

    meaning: str
    unit: str = ""


@dataclass(frozen=True)
class Table:
    """A kind of table: its name, what a row is, its columns in order, and its metrics by name.

    `other_metrics` says which metrics there may be beside these, by names that are not known beforehand; where it is
    empty, there are none.
    """

    name: str
    meaning: str
    columns: Mapping[str, Column]
    metrics: Mapping[str, Metric]
    other_metrics: str = ""
    types: Mapping[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "types", {name: column.type for name, column in self.columns.items()})

    def frame(self, rows: pd.DataFrame | Sequence[Mapping[str, Any]]) -> pd.DataFrame:
        """Rows in the table's columns, their order and types; columns that a row leaves out are null.

        Raises InputError for a column that the table does not have, and for a metric that it does not.
        """
        frame = pd.DataFrame(rows)
        if unknown := [column for column in frame.columns if column not in self.columns]:
            raise InputError(
                f"table {self.name!r} has no column {unknown[0]!r}; its columns are {', '.join(self.columns)}"
            )
        frame = frame.reindex(columns=list(self.columns)).astype(dict(self.types))
        if not self.other_metrics:
            undeclared = sorted(set(frame["metric"].dropna().unique()) - set(self.metrics))
            if undeclared:
                raise InputError(
                    f"table {self.name!r} has no metric {undeclared[0]!r}; its metrics are {', '.join(self.metrics)}"
                )
        return frame

    def read(self, frame: pd.DataFrame) -> pd.DataFrame:
        """A frame that was stored, in the types of today; columns that the table has gained since are null.

        Raises InputError for columns that the table does not have, or that do not fit their type.
        """
        if unknown := [column for column in frame.columns if column not in self.columns]:
            raise InputError(f"column {unknown[0]!r} is none of this version's")
        if missing := [column for column in ("metric", "value") if column not in frame.columns]:
            raise InputError(f"column {missing[0]!r} is not there")
        try:
            return frame.reindex(columns=list(self.columns)).astype(dict(self.types))
        except Exception as error:  # a column can be wrong in as many ways as pandas and pyarrow have types
            raise InputError(f"columns of other types: {error}") from error


TABLES: dict[str, Table] = {}
"""The tables that were declared, by name."""


def declare(
    name: str,
    meaning: str,
    columns: Sequence[str],
    metrics: Mapping[str, Metric],
    *,
    own: Mapping[str, Column] | None = None,
    other_metrics: str = "",
) -> Table:
    """Declare a table: `columns` by name, in order, from SHARED, VALUES and the table's `own`.

    Keys, `metric` and `value` need not be named. Raises InputError for a column that is in none of these, for a name
    that is no file name, and for a name that another table has.
    """
    if not name.isidentifier():
        raise InputError(f"a table's name is letters, digits and underscores, but it is {name!r}")
    known = {**SHARED, **VALUES, **(own or {})}
    if unknown := [column for column in columns if column not in known]:
        raise InputError(f"table {name!r} names column {unknown[0]!r}, which is none of its own or of the shared ones")
    wanted = {"metric", "value", *columns}
    middle = {column: known[column] for column in columns if column not in VALUES}
    last = {column: VALUES[column] for column in VALUES if column in wanted}
    table = Table(name, meaning, {**KEYS, **middle, **last}, dict(metrics), other_metrics)
    if TABLES.setdefault(name, table) != table:
        raise InputError(f"there is another table {name!r} already; give this one another name")
    return TABLES[name]


class Tables(dict[str, pd.DataFrame]):
    """Tables by name. One that is declared and has no rows here is empty."""

    def __missing__(self, name: str) -> pd.DataFrame:
        if name not in TABLES:
            raise InputError(f"there is no table {name!r} here; there are {', '.join(sorted(self)) or 'none'}")
        return TABLES[name].frame([])

    def joined(self, names: Sequence[str]) -> pd.DataFrame:
        """The rows of several tables, one under the other; columns that a table does not have are null in its rows.

        A table that is not there, and that nobody declared, has no rows.
        """
        frames = [self[name] for name in names if name in self or name in TABLES]
        if not frames:
            return pd.DataFrame(columns=["metric", "value"])
        filled = [frame for frame in frames if len(frame)] or frames[:1]
        types = {column: kind for frame in frames for column, kind in frame.dtypes.items()}
        return pd.concat(filled, ignore_index=True).reindex(columns=list(types)).astype(types)


def as_markdown(tables: Sequence[Table]) -> str:
    """docs/tables.md: every table with its columns and metrics."""
    lines = [
        "# Tables",
        "",
        "A run directory holds its numbers in `tables/NAME.parquet`. Every table is long: a row is one number.",
        "`rope_probe.runs.results.read_run(run)` returns them by name, and the manifest.",
        "This page is made from the declarations by `python docs/generate_tables.py`.",
        "",
        "Every table begins with these columns:",
        "",
        *_columns(KEYS),
    ]
    for table in sorted(tables, key=lambda table: table.name):
        mine = {name: column for name, column in table.columns.items() if name not in KEYS}
        lines += ["", f"## {table.name}", "", table.meaning, "", *_columns(mine), "", *_metrics(table)]
    return "\n".join(lines) + "\n"


def _columns(columns: Mapping[str, Column]) -> list[str]:
    rows = [f"| `{name}` | {c.type} | {c.unit} | {_escaped(c.meaning)} |" for name, c in columns.items()]
    return ["| column | type | unit | meaning |", "|---|---|---|---|", *rows]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _metrics(table: Table) -> list[str]:
    rows = [f"| `{name}` | {m.unit} | {_escaped(m.meaning)} |" for name, m in table.metrics.items()]
    if table.other_metrics:
        rows.append(f"| others | | {table.other_metrics} |")
    return ["| metric | unit | meaning |", "|---|---|---|", *rows]
