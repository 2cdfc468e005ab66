"""Make docs/tables.md from what the code declares.

python docs/generate_tables.py
"""

import importlib
import pkgutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tables.md"
sys.path.insert(0, str(ROOT))

import experiments  # noqa: E402
import rope_probe  # noqa: E402
from rope_probe.runs.tables import TABLES, as_markdown  # noqa: E402


def page() -> str:
    """The page, after importing every module that may declare a table."""
    for package in (rope_probe, experiments):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    return as_markdown(list(TABLES.values()))


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
