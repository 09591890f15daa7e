"""bench/gpu_check.py on a CPU: a row for every check, whatever becomes of the others."""

from __future__ import annotations

import json
import re

import pytest

from bench import gpu_check
from bench.gpu_checks import CHECKS, STAGES, Check


def test_a_selection_at_toy_size(tmp_path, monkeypatch, capsys):
    """One check of each kind, and one that its process does not know: it fails, and the others go on."""
    monkeypatch.setitem(CHECKS, "ghost", Check(print))
    names = ["ghost", "experts in groups", "no synchronisation", "resume"]
    output = tmp_path / "check.json"
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--device", "cpu", "--output", str(output), "--only", *names])
    assert gpu_check.main() == 1
    report = json.loads(output.read_text())
    results = {name: row["result"] for name, row in report["rows"].items()}
    assert results == dict.fromkeys(["data and a model", *names], "pass") | {
        "ghost": "FAIL",
        "no synchronisation": "skipped",
    }
    assert report["rows"]["ghost"]["detail"] == "KeyError: 'ghost'"
    assert report["rows"]["resume"]["figures"]["largest relative difference of the loss"] == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^\| {name} \| {result} \| \d+ \| ", printed, re.M) for name, result in results.items())
    assert "4 of 5 without a fault" in printed


def test_when_the_time_is_up_the_rest_is_not_started(tmp_path, monkeypatch):
    output = tmp_path / "check.json"
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--device", "cpu", "--minutes", "0", "--output", str(output)])
    assert gpu_check.main() == 0
    rows = json.loads(output.read_text())["rows"]
    assert rows.keys() == CHECKS.keys() and {row["result"] for row in rows.values()} == {"skipped"}


def test_names(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--only", "no such check"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "no check has such a name" in capsys.readouterr().err
    assert all(any(script.removesuffix(".py") in name for name in CHECKS) for script in STAGES)
