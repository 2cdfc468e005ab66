"""Names of models, arms and perturbations are never taken apart: what they would tell is a column."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMED = r"\[\"(arm|model|perturbation|group|order|span_set|kind|restriction)\"\]"
TAKEN_APART = re.compile(
    rf"{NAMED}\.str\.(extract|match|fullmatch|contains|startswith|endswith|split|replace|removeprefix)"
)


def test_no_figure_and_no_experiment_takes_a_name_apart():
    files = [*(ROOT / "rope_probe" / "gallery").rglob("*.py"), *(ROOT / "experiments").glob("*.py")]
    assert len(files) > 15
    texts = {file.name: file.read_text() for file in files}
    assert [name for name, text in texts.items() if TAKEN_APART.search(text)] == []
    assert [name for name, text in texts.items() if re.search(r"str\.extract|regex=True", text)] == []
    not_names = {"cloze.py", "letters.py"}  # sentences of a text; markup as plotly reads it
    assert {name for name, text in texts.items() if re.search(r"^import re$", text, re.MULTILINE)} == not_names
