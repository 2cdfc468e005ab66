"""docs/architecture.md names every module, and imports go one way: down its list."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rope_probe"


def listed():
    """The package's modules as docs/architecture.md lists them, by their dotted names."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = text.split("```")[1].split("experiments/\n")[0]
    names, folders = [], []
    for line in block.splitlines():
        entry = re.match(r"^( *)([\w.]+)(/?)(?:\s|$)", line)
        if entry is None or len(entry[1]) > 8:
            continue
        depth, name, is_folder = len(entry[1]) // 2, entry[2], bool(entry[3])
        folders = folders[:depth]
        if is_folder:
            folders.append(name)
            names.append(".".join(folders))
        else:
            names.append(".".join([*folders, name.removesuffix(".py")]))
    return names


def modules():
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in PACKAGE.rglob("*.py")
    }


def place(name, order):
    """Where a module stands in the list, by itself or by its folder."""
    while name not in order:
        name = name.rpartition(".")[0]
    return order.index(name)


def imported(file, package="rope_probe", known=modules):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package):
            yield from (
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in known() else node.module
                for alias in node.names
            )


def test_every_module_is_listed_and_every_entry_is_there():
    order, there = listed(), modules()
    assert [name for name in order if name not in there] == []
    unlisted = [name for name in there if name not in order and name.rpartition(".")[0] not in order]
    assert [name for name in unlisted if name != "rope_probe.__main__"] == []


def test_imports_go_one_way():
    order = listed()
    wrong = []
    for name, file in modules().items():
        if name in ("rope_probe", "rope_probe.__main__"):
            continue  # the outermost ones
        for other in imported(file):
            folder = name.rpartition(".")[0]
            one_of_many = name not in order and other.startswith(f"{folder}.")
            same_folder = other.startswith(f"{name}.") or other == folder or one_of_many
            if not same_folder and place(other, order) > place(name, order):
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_experiments_import_each_other_in_no_circle():
    files = {f"experiments.{file.stem}": file for file in (ROOT / "experiments").glob("*.py")}
    graph = {name: set(imported(file, "experiments", lambda: files)) for name, file in files.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(files) > 20


def test_the_page_of_tables_is_what_the_code_declares():
    script = "import runpy, sys; sys.stdout.write(runpy.run_path('docs/generate_tables.py')['page']())"
    made = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert made == (ROOT / "docs" / "tables.md").read_text(), "run python docs/generate_tables.py"
    assert made.count("\n## ") >= 12


def test_the_citation_is_of_this_package():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["cff-version"] == "1.2.0"
    assert (cited["version"], cited["license"]) == (declared["version"], declared["license"])
    assert cited["authors"] == declared["authors"]
    assert cited["title"].startswith(declared["name"])
    assert f"## [{cited['version']}]" in (ROOT / "CHANGELOG.md").read_text()
