"""trainer/parser.py: wrong flags are said in one line, by every script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.parser import Parser

ROOT = Path(__file__).resolve().parent.parent


def make() -> Parser:
    parser = Parser(description="d")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--format", choices=["llama", "gguf"])
    return parser


@pytest.mark.parametrize(
    "line, message",
    [
        ("--batch_size abc", "--batch_size: invalid int value: 'abc' ("),
        ("--batch_size", "--batch_size: expected one argument ("),
        ("--format x", "--format: invalid choice: 'x' (choose from 'llama', 'gguf') ("),
        ("--batch 4", "unrecognized arguments: --batch 4; did you mean --batch_size? ("),  # nothing is abbreviated
        ("--batchsize=4", "unrecognized arguments: --batchsize=4; did you mean --batch_size? ("),
        ("--nothing_like_it", "unrecognized arguments: --nothing_like_it ("),
        ("more", "unrecognized arguments: more ("),
    ],
)
def test_one_line(line, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        make().parse_args(line.split())
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}python ") and said.endswith(" --help lists the flags)\n")
    assert said.count("\n") == 1


def test_of_several_processes_the_first_speaks(capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for rank, said in (("0", "error: a\nerror: b\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            make().refuse(["a", "b"])
        assert stopped.value.code == 2 and capsys.readouterr().err == said


SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.name != "fast_inference.py")  # a page has no exit code


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script(script):
    found = subprocess.run([sys.executable, script, "--no_such_flag"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
