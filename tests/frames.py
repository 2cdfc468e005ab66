"""Frames as drawings get them: rows in the columns and types of one table, or of several."""

import pandas as pd

from rope_probe.gallery import figures as plots
from rope_probe.runs.tables import TABLES


def rows_of(*tables, rows):
    """Rows in the columns of these tables, whatever their metrics."""
    types = {column: kind for name in tables for column, kind in TABLES[name].types.items()}
    return pd.DataFrame(rows).reindex(columns=list(types)).astype(types)


def rows_for(drawing, rows):
    """Rows as a drawing gets them."""
    (found,) = [one for one in plots.DRAWINGS if one.name == drawing]
    return rows_of(*found.tables, rows=rows)
