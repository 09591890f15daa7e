"""The notebook of the first hour: it runs from top to bottom, and is stored without what its cells printed."""

from __future__ import annotations

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

PATH = Path(__file__).resolve().parents[1] / "notebooks" / "first_hour.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    found = nbformat.read(PATH, as_version=4)
    nbformat.validate(found)
    return found


def test_outputs_are_cleared(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) > 10
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}  # nothing of the machine it was written on


def test_links_and_scripts_exist(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    files = re.findall(r"`([\w./-]+\.(?:py|sh|txt))`", text)
    assert len(links) > 8 and len(files) > 8
    assert [link for link in links if not (PATH.parent / link).exists()] == []
    assert [file for file in files if not (PATH.parents[1] / file).exists()] == []


def test_it_runs(notebook, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")  # as Streamlit sets it: the plots are shown all the same
    client = nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(PATH.parent)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    first, last = re.search(r"ln 6400 = ([\d.]+), our model: ([\d.]+)", printed).groups()
    assert float(first) == pytest.approx(float(last), abs=0.5)  # it knows nothing yet
    assert float(re.search(r"held out: ([\d.]+)", printed)[1]) < 2
    assert re.search(r"Who are you\? -> \w+", printed)
