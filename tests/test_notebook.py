"""The notebook of the first hour runs from top to bottom, is stored without outputs, and is the same in both languages."""

from __future__ import annotations

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
ENGLISH, CHINESE = "first_hour.ipynb", "first_hour_zh.ipynb"


def read(name: str) -> nbformat.NotebookNode:
    found = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(found)
    return found


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text)


def outline(text: str) -> list[str]:
    """Return the signs of headings, and of the rows of tables."""
    return re.findall(r"^(#+ |\|)", text, re.MULTILINE)


@pytest.mark.parametrize("name", [ENGLISH, CHINESE])
def test_outputs_are_cleared(name):
    notebook = read(name)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) > 10
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}  # nothing of the machine it was written on


@pytest.mark.parametrize("name", [ENGLISH, CHINESE])
def test_links_and_scripts_exist(name):
    text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    files = re.findall(r"`([\w./-]+\.(?:py|sh|txt))`", text)
    assert len(links(text)) > 8 and len(files) > 8
    assert [link for link in links(text) if not (FOLDER / link).exists()] == []
    assert [file for file in files if not (FOLDER.parent / file).exists()] == []


def test_both_languages_have_the_same():
    """Code, levels of headings, rows of tables, links: what a change of only one notebook would miss."""

    def translated(link: str) -> str:
        chinese = ENGLISH if link == CHINESE else link.replace("/docs/", "/docs/zh/")
        return chinese if (FOLDER / chinese).exists() else link

    english, chinese = read(ENGLISH), read(CHINESE)
    assert [cell.cell_type for cell in chinese.cells] == [cell.cell_type for cell in english.cells]
    for one, other in zip(english.cells, chinese.cells, strict=True):
        if one.cell_type == "code":
            assert other == one
        else:
            assert outline(other.source) == outline(one.source)
            assert links(other.source) == [translated(link) for link in links(one.source)]
            assert re.search("[\u4e00-\u9fff]", other.source), other.source
    assert (chinese.metadata, chinese.nbformat) == (english.metadata, english.nbformat)


def test_it_runs(monkeypatch):
    notebook = read(ENGLISH)  # the code of the other one is the same
    monkeypatch.setenv("MPLBACKEND", "agg")  # as Streamlit sets it: the plots are shown all the same
    client = nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    first, last = re.search(r"ln 6400 = ([\d.]+), our model: ([\d.]+)", printed).groups()
    assert float(first) == pytest.approx(float(last), abs=0.5)  # it knows nothing yet
    assert float(re.search(r"held out: ([\d.]+)", printed)[1]) < 2
    assert re.search(r"Who are you\? -> \w+", printed)
