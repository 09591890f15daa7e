"""common/cli.py: wrong flags are said in one line, by every script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.cli import Parser, as_word, validate_folder
from common.errors import known_flags, name_flags

ROOT = Path(__file__).resolve().parent.parent


def make() -> Parser:
    parser = Parser(description="d")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--format", choices=["llama", "gguf"])
    parser.add_argument_group("more").add_argument("--folder", type=Path)
    return parser


@pytest.mark.parametrize(
    "line, message",
    [
        ("--batch_size abc", "--batch_size: invalid int value: 'abc' ("),
        ("--batch_size", "--batch_size: expected one argument ("),
        ("--format x", "--format: invalid choice: 'x' (choose from llama, gguf) ("),
        ("--batch 4", "unrecognized arguments: --batch 4; did you mean --batch_size? ("),  # nothing is abbreviated
        ("--batchsize=4", "unrecognized arguments: --batchsize=4; did you mean --batch_size? ("),
        ("--nothing_like_it", "unrecognized arguments: --nothing_like_it ("),
        ("--folder=", "--folder: the path is empty ("),  # it would be the current folder
        ("more", "unrecognized arguments: more ("),
    ],
)
def test_one_line(line, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        make().parse_args(line.split())
    assert stopped.value.code == 2
    said = capsys.readouterr().err.replace("'llama', 'gguf'", "llama, gguf")  # some versions of Python quote them
    assert said.startswith(f"error: {message}python ") and said.endswith(" --help lists the flags)\n")
    assert said.count("\n") == 1


def test_paths_are_paths():
    assert make().parse_args(["--folder", "a b"]).folder == Path("a b") and make().parse_args([]).folder is None
    assert as_word(Path("a b")) == '"a b"' and as_word(Path("é")) == "é"


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    assert validate_folder("--out", tmp_path) == validate_folder("--out", tmp_path / "new" / "one") == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert validate_folder("--out", path) == [f"--out {path}: {tmp_path / 'file'} is not a folder; choose another"]
    (long,) = validate_folder("--out", tmp_path / ("n" * 300))
    assert "too long" in long

    def locked(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", locked)
    (problem,) = validate_folder("--out", tmp_path / "new")
    where = f"--out {tmp_path / 'new'}: nothing can be written in {tmp_path}"
    assert problem == f"{where} (Permission denied); choose another"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can make a file")
def test_a_folder_in_which_nobody_can_make_a_file():
    (problem,) = validate_folder("--out", Path("/proc/new/one"))
    assert problem.startswith("--out /proc/new/one: nothing can be written in /proc (")


def test_of_several_processes_the_first_speaks(capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for rank, said in (("0", "error: a\nerror: b\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            make().error(["a", "b"])
        assert stopped.value.code == 2 and capsys.readouterr().err == said


SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.name != "fast_inference.py")  # a page has no exit code


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script(script):
    found = subprocess.run([sys.executable, script, "--no_such_flag"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1


def test_fields_in_errors_are_shown_as_the_flags_that_were_typed(capsys):
    known_flags.clear()
    make().parse_args([])
    message = "batch_size=3 is not divisible by n_heads=2; overwrite=True, --batch_size=4"
    assert name_flags(message) == "--batch_size 3 is not divisible by n_heads=2; overwrite=True, --batch_size=4"
    known_flags.add("seed")
    assert name_flags("/data/seed=1/a.csv: no such file") == "/data/seed=1/a.csv: no such file"
    parser = make()
    parser.add_argument("--overwrite", action="store_true")
    parser.parse_args([])
    with pytest.raises(SystemExit):
        parser.error(["it exists: set overwrite=True"])
    assert capsys.readouterr().err == "error: it exists: set --overwrite\n"
