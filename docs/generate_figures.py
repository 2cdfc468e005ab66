"""Make docs/figures.md from what the drawings say of themselves.

python docs/generate_figures.py
"""

import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "figures.md"
sys.path.insert(0, str(ROOT))

from rope_probe.gallery.figures import DRAWINGS, Drawing  # noqa: E402

_BEGIN = """# Figures

Every figure is a function: rows of a table in, a plotly figure out. The gallery (`rope-probe report RUN...`) draws all
that its runs hold. This page is made by `python docs/generate_figures.py`.

## From Python

<!-- not run: reads a run of your own -->
```python
from rope_probe.gallery import figures
from rope_probe.runs.results import read_tables

frame = read_tables(["runs/mine"])["deltas"]
figure = figures.layer_effects(frame, "my model")  # frame and label; the label goes into the title
figures.save_figure(figure, "paper/layers.pdf", width=700)  # or .svg, .png
```

A drawing that reads several tables gets them joined: `read_tables(runs).joined(("spans", "landmarks"))`.

- A figure has no fixed width. It holds from 390 pixels on: text is wrapped for that, and plots grow with the page.
- `figures.fitted(figure, width)` lays a copy out for another width. With `words=False` it has no title and no caption.
- `figure.layout.meta["title"]` and `["caption"]` hold these as text for pages that show them themselves;
  `html.unescape` gives names as they were written. In the figure, the caption is the annotation named "caption".
- `figures.themed(figure, "dark")` is a copy for dark pages. No drawing sets a colour of text or page.

## As files for a paper

<!-- not run: installs a package and starts a browser -->
```console
pip install 'rope_probe[static]'      # kaleido; it needs Chromium or Chrome, and finds one by BROWSER_PATH too
python -m figures.all runs/mine runs/heads --out paper --format svg --format pdf --width 700
python -m figures.all runs/mine --out paper --only layer_effects
```

The second command writes every figure that the runs hold, with one start of the browser. Without kaleido or a browser
it says so in one line and ends with exit code 2. `python -m figures.NAME` writes one figure as a page of its own.

## What all of them share

- Grey is what holds no number: nothing, or rounding as a float64 control shows it. Captions tell the noise floor: the
  mean distance of what was measured to float64.
- An orange edge marks global layers, where a model has local ones too (`attention` in the table says which is which).
- Lines differ by colour, dash and marker. The colour-blind tell the colours apart: any two are 14 or more apart in Lab.
- Scales of numbers with a sign are centred at zero. Logarithmic scales say so.
- Where there is room for only some of the ticks, the others are left out. Hovering tells every number.
"""


def entry(drawing: Drawing) -> str:
    """What a figure shows, how to read it, what it reads and how it is drawn."""
    shows = inspect.cleandoc(drawing.draw.__doc__ or "")
    tables = ", ".join(f"[{name}](tables.md#{name})" for name in drawing.tables)
    read = (
        f'["{drawing.tables[0]}"]'
        if len(drawing.tables) == 1
        else f".joined({list(drawing.tables)!r})".replace("'", '"')
    )
    lines = [f"## {drawing.name}", "", shows, ""]
    if drawing.how_to_read:
        lines += [f"How to read it: {drawing.how_to_read}", ""]
    lines += [
        f"- Reads: {tables}.",
        f"- Python: `figures.{drawing.name}(read_tables(runs){read}, label)`",
        f"- Command: `python -m figures.all RUN... --out DIR --only {drawing.name}`",
    ]
    if (ROOT / "figures" / f"{drawing.name}.py").exists():
        lines.append(f"- A page of its own: `python -m figures.{drawing.name} --help`")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page."""
    return "\n".join([_BEGIN, *map(entry, DRAWINGS)])


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
