"""Which layers see the whole window where others see only what is near."""

from typing import NamedTuple

import pandas as pd

GLOBAL = "full_attention"
"""As configs of transformers call it."""


class GlobalLayers(NamedTuple):
    """The layers to mark, and what the caption says of the marks; both empty where all layers are of one kind."""

    layers: list[int]
    note: str


def global_layers(rows: pd.DataFrame, column: str) -> GlobalLayers:
    """The global layers among those of a column, where the rows tell that there are others."""
    if "attention" not in rows or rows["attention"].dropna().nunique() < 2:
        return GlobalLayers([], "")
    layers = sorted(
        rows.loc[(rows["attention"] == GLOBAL).fillna(False), column].dropna().astype(int).unique().tolist()
    )
    listed = ", ".join(map(str, layers))
    return GlobalLayers(layers, f"; orange edge: global layers ({listed}), which attend to the whole window")
