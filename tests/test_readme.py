"""README.md tells the truth: its commands, files and flag tables are those of the code."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from common.cli import parse_options
from model.LMConfig import FIELD_TYPES, PRESETS, LMConfig, preset
from model.model import Transformer, parameter_counts
from trainer.options import TrainOptions

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "README_zh.md",
    "README_jp.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
    "bench/README.md",
]
STAGES = ["1-pretrain.py", "3-full_sft.py", "4-lora_sft.py", "5-dpo_train.py", "8-pretrain_vlm.py", "9-sft_vlm.py"]
COMMAND = re.compile(r"(?:python|torchrun --nproc_per_node \d+) ([\w/.-]+\.py)([^`\n#]*)")


class _Parser(Exception):
    """Carries a script's parser out of it, before anything is done."""


def _parser_of(parse) -> argparse.ArgumentParser:
    def stop(parser, *_):
        raise _Parser(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(_Parser) as caught:
            parse()
    return caught.value.args[0]


@functools.cache
def flags_of(script: str) -> dict[str, argparse.Action]:
    """The flags of a script by name, --help included; "TrainOptions" stands for those of all stages."""
    if script == "TrainOptions":
        parser = _parser_of(lambda: parse_options(TrainOptions, ""))
    else:
        path = ROOT / script
        name = f"readme_{path.stem.replace('-', '_')}"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(path.parent)
            patch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
            parser = _parser_of(getattr(module, "parse_args", None) or module.main)
    return {name: action for action in parser._actions for name in action.option_strings}


@functools.cache
def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(script, words after it) for every command of a page."""
    text = text.replace("\\\n", " ")
    return [(script, shlex.split(rest)) for script, rest in COMMAND.findall(text)]


def tables(text: str) -> dict[str, dict[str, str]]:
    """Flag tables by the name in the comment above them: {flag: default as it is written}."""
    found = {}
    for name, body in re.findall(r"<!-- flags: (\S+) -->\n((?:\|.*\n)+)", text):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body.splitlines()[2:]]
        found[name] = {row[0].strip("` "): row[1] for row in rows}
        assert len(found[name]) == len(rows), f"a flag stands twice in the table of {name}"
    return found


def says(cell: str, default: object) -> bool:
    """Whether a cell of a table is the default; words stand for one that is found out at run time."""
    written = re.fullmatch(r"`([^`]*)`", cell)
    if default is None or default == []:
        return written is None or written[1].startswith("out/<")
    if written is None:
        return False
    text = written[1]
    if isinstance(default, bool):
        return text == ("on" if default else "off")
    if isinstance(default, (int, float)):
        return float(text) == default
    values = default if isinstance(default, (list, tuple)) else [default]
    plain = [str(v.relative_to(ROOT)) if isinstance(v, Path) else str(v) for v in values]
    return text == " ".join(plain)


@pytest.mark.parametrize("name", PAGES)
def test_commands(name):
    """Every script exists, and takes the flags and choices it is shown with."""
    found = commands(page(name))
    assert found or name == "docs/formats.md"
    for script, words in found:
        assert (ROOT / script).is_file(), f"{name}: there is no {script}"
        flags = flags_of(script)
        given = [(i, word) for i, word in enumerate(words) if word.startswith("--")]
        for i, word in given:
            assert word in flags, f"{name}: {script} has no {word}"
            choices = flags[word].choices
            if choices and i + 1 < len(words):
                assert words[i + 1] in map(str, choices), f"{name}: {script} {word} {words[i + 1]}"


@pytest.mark.parametrize("name", PAGES)
def test_every_flag_that_is_named_exists(name):
    # Flags of the launchers, Slurm, Streamlit and TensorBoard.
    elsewhere = {"--no-", "--nproc_per_node", "--nnodes", "--num_gpus", "--max_restarts", "--server", "--logdir"}
    elsewhere |= {"--rdzv_backend", "--rdzv_id", "--rdzv_endpoint"}
    elsewhere |= {"--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time"}
    elsewhere |= {"--requeue", "--signal", "--kill-on-bad-exit"}
    if name == "docs/scaling.md":
        elsewhere |= flags_of("bench/scaling.py").keys()
    scripts = ["TrainOptions", *STAGES, *{script for script, _ in commands(page("README.md") + page(name))}]
    known = {flag for script in scripts for flag in flags_of(script)}
    named = set(re.findall(r"--[a-z][\w-]*", re.sub(r"<!--.*?-->", "", page(name))))
    assert named - known - elsewhere == set()


def test_the_examples_are_of_the_known_kind():
    """The page has the tables and commands that the other tests look at; an empty search would prove nothing."""
    assert set(tables(page("README.md"))) >= {"TrainOptions", "LMConfig", *STAGES}
    assert {script for script, _ in commands(page("README.md"))} >= set(STAGES)


@pytest.mark.parametrize("name", tables((ROOT / "README.md").read_text(encoding="utf-8")))
def test_flag_tables(name):
    table = tables(page("README.md"))[name]
    if name == "LMConfig":
        actions = flags_of("1-pretrain.py")
        own = [f"--{field}" for field in FIELD_TYPES if f"--{field}" in actions]
        assert list(table) == own
        defaults = {flag: getattr(LMConfig, flag[2:]) for flag in own}
    else:
        actions = flags_of(name)
        assert [flag for flag in table if flag not in actions] == []
        defaults = {flag: actions[flag].default for flag in table}
    wrong = {flag: (cell, defaults[flag]) for flag, cell in table.items() if not says(cell, defaults[flag])}
    if name == "TrainOptions":  # a stage says which data; the preset of none is the first
        assert wrong == {}
        assert TrainOptions().config().own_fields() == preset("minimind-v1-small").own_fields()
        assert {flag for flag in actions if not flag.startswith(("--no-", "--help", "-h"))} - set(table) == {
            f"--{field}" for field in FIELD_TYPES if f"--{field}" in actions
        }
    if name == "data_process.py":
        assert wrong == {"--num_workers": ("one per CPU", actions["--num_workers"].default)}
    else:
        assert wrong == {}


@pytest.mark.parametrize("script", STAGES)
def test_a_stage_table_has_all_that_is_its_own(script):
    """A flag that only this stage has, or whose default differs from the shared one."""
    shared, own = flags_of("TrainOptions"), flags_of(script)
    different = {
        flag
        for flag, action in own.items()
        if not flag.startswith("--no-") and (flag not in shared or action.default != shared[flag].default)
    }
    assert different - set(tables(page("README.md"))[script]) == set()


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


@pytest.mark.parametrize("name", PAGES)
def test_files(name):
    """Files that stand in backticks and belong to the project are there."""
    quoted = re.findall(r"`([\w./-]+)`", page(name))
    for text in quoted:
        ours = text.startswith(("model/", "trainer/", "serving/", "bench/", "tests/", "docs/", "dataset/sample"))
        if ours or text.endswith((".py", ".sh")):
            places = [
                ROOT / folder / text
                for folder in (
                    "",
                    "common",
                    "model",
                    "data_pipeline",
                    "export",
                    "inference",
                    "evaluation",
                    "trainer",
                    "serving",
                )
            ]
            assert any(place.exists() for place in places), f"{name}: {text}"


def test_every_module_is_in_the_map():
    section = page("README.md").split("\n## Reading the code\n")[1].split("\n## ")[0]
    packages = ("common", "model", "data_pipeline", "export", "inference", "evaluation", "trainer", "serving")
    modules = [*ROOT.glob("*.py"), *(path for name in packages for path in ROOT.glob(f"{name}/*.py"))]
    assert [str(path) for path in modules if path.name != "__init__.py" and path.name not in section] == []


@pytest.mark.parametrize("name", ["README.md", "README_zh.md", "README_jp.md"])
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
