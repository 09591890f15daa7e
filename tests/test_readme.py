"""The pages tell the truth: their commands, files and links are those of the code, and the READMEs say the same."""

from __future__ import annotations

import functools
import re
import runpy
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from model.LMConfig import PRESETS, preset
from model.model import Transformer, parameter_counts

ROOT = Path(__file__).resolve().parents[1]
MAKE_FLAGS = runpy.run_path(str(ROOT / "docs" / "make_flags.py"))
READMES = ["README.md", "README_zh.md", "README_jp.md"]
PAGES = [
    *READMES,
    "bench/README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]
COMMAND = re.compile(r"(?:python|torchrun --nproc_per_node \d+) ([\w/.-]+\.py)([^`\n#，。、]*)")


@functools.cache
def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Return (script, words after it) for every command of a page, or of a shell script with its variables."""
    text = re.sub(r"^echo .*", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    for name, value in reversed(re.findall(r'^(\w+)="?([^"\n]*)"?$', text, re.MULTILINE)):
        text = text.replace(f"${name}", value)
    return [(script, shlex.split(rest)) for script, rest in COMMAND.findall(text)]


@pytest.mark.parametrize("name", [*PAGES, "quickstart.sh"])
def test_commands(name):
    """Every script exists, and takes the flags and choices it is shown with."""
    found = commands(page(name))
    for script, words in found:  # grows: a word with spaces is the value of a flag, here the flags of another script
        assert (ROOT / script).is_file(), f"{name}: there is no {script}"
        found += [(words[0], shlex.split(word)) for word in words if word.startswith("--") and " " in word]
        flags = MAKE_FLAGS["actions_of"](script) if script != "docs/make_flags.py" else {}
        words = [word if " " in word else word.partition("=")[0] for word in words]
        given = [(i, word) for i, word in enumerate(words) if word.startswith("--") and " " not in word]
        for i, word in given:
            assert word in flags, f"{name}: {script} has no {word}"
            choices = flags[word].choices
            if choices and i + 1 < len(words):
                assert words[i + 1] in map(str, choices), f"{name}: {script} {word} {words[i + 1]}"


def test_the_pages_have_commands():
    """An empty search would prove nothing."""
    stages = {script for script in MAKE_FLAGS["scripts"]() if MAKE_FLAGS["is_stage"](script)}
    assert len(stages) >= 7 and {script for script, _ in commands(page("README.md"))} >= stages
    assert ("9-sft_vlm.py", "--preset") in {
        (script, word) for script, words in commands(page("quickstart.sh")) for word in words
    }


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_that_is_named_exists(name):
    # Flags of the launchers, Slurm, Streamlit and TensorBoard.
    elsewhere = {"--no-", "--nproc_per_node", "--nnodes", "--num_gpus", "--max_restarts", "--server", "--logdir"}
    elsewhere |= {"--rdzv_backend", "--rdzv_id", "--rdzv_endpoint"}
    elsewhere |= {"--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time"}
    elsewhere |= {"--requeue", "--signal", "--kill-on-bad-exit"}
    elsewhere |= {"--repo-type", "--local-dir"}  # of hf, which downloads data sets
    actions_of = MAKE_FLAGS["actions_of"]
    if name == "docs/scaling.md":
        elsewhere |= actions_of("bench/scaling.py").keys()
    scripts = {"TrainOptions", *MAKE_FLAGS["scripts"](), *(script for script, _ in commands(page(name)))}
    known = {flag for script in scripts - {"docs/make_flags.py"} for flag in actions_of(script)}
    named = set(re.findall(r"--[a-z][\w-]*", re.sub(r"<!--.*?-->", "", page(name))))
    assert named - known - elsewhere == set()


def test_flag_pages_are_up_to_date():
    """If this fails: python docs/make_flags.py"""
    assert {path.stem: path.read_text(encoding="utf-8") for path in MAKE_FLAGS["FOLDER"].glob("*.md")} == MAKE_FLAGS[
        "pages"
    ]()


@pytest.mark.parametrize("name", PAGES)
def test_links(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = unquote(target).partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), f"{name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{name}: {target}"


PACKAGES = ("common", "model", "data_pipeline", "export", "inference", "evaluation", "trainer", "serving")


@pytest.mark.parametrize("name", PAGES)
def test_files(name):
    """Files that stand in backticks and belong to the project are there."""
    for text in re.findall(r"`([\w./-]+)`", page(name)):
        ours = text.startswith(("model/", "trainer/", "serving/", "bench/", "tests/", "docs/", "dataset/sample"))
        if ours or text.endswith((".py", ".sh")):
            assert any((ROOT / folder / text).exists() for folder in ("", *PACKAGES)), f"{name}: {text}"


def test_every_module_is_in_the_map():
    modules = [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in ROOT.glob(f"{name}/*.py"))]
    names = page("docs/code_map.md")
    assert [str(path) for path in modules if path.name != "__init__.py" and path.name not in names] == []


def test_the_readme_is_an_overview():
    assert page("README.md").count("\n") <= 350


@pytest.mark.parametrize("name", READMES[1:])
def test_the_readmes_say_the_same(name):
    """Headings, commands, links and figures of a translation are those of the English page."""
    english, other = page("README.md"), page(name)

    def headings(text: str) -> list[str]:
        return re.findall(r"^(#+) ", text, re.MULTILINE)

    def links(text: str) -> list[str]:
        found = re.findall(r"\]\(([^)\s]+)\)", text.replace("_zh.ipynb", ".ipynb"))
        return sorted("#" if target.startswith("#") else target for target in found if not target.startswith("README"))

    def figures(text: str) -> set[str]:
        return set(re.findall(r"\d+(?:[.,]\d+)*", text))

    assert headings(other) == headings(english)
    assert commands(other) == commands(english)
    assert links(other) == links(english)
    assert figures(english) - figures(other) == set()


@pytest.mark.parametrize("name", READMES)
def test_presets(name):
    """The table of sizes has every preset, with its number of parameters."""
    for size in PRESETS:
        row = re.search(rf"^\| `{size}` \|(.*)$", page(name), re.MULTILINE)
        assert row, f"{name}: {size}"
        config = preset(size)
        with torch.device("meta"):
            counts = parameter_counts(Transformer(config))
        numbers = re.findall(r"[\d.]+", row[1])
        assert f"{counts['total'] / 1e6:.2f}" in numbers
        assert f"{counts['active'] / 1e6:.2f}" in numbers
        assert {str(config.dim), str(config.n_layers), str(config.n_heads), str(config.n_kv_heads)} <= set(numbers)


def test_the_simulated_table_is_what_the_script_prints(monkeypatch, capsys):
    """The figures depend on the real numbers of parameters: a preset that changes changes the page."""
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    runpy.run_path(str(ROOT / "bench" / "scaling.py"), run_name="__main__")
    begin, end = "<!-- simulated:begin -->\n", "\n<!-- simulated:end -->"
    assert page("docs/scaling.md").partition(begin)[2].partition(end)[0].strip() == capsys.readouterr().out.strip()
