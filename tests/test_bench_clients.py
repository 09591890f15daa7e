"""bench/clients.py: the openai package against a real server, and the table of what works."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving_helpers import NAME, serving

from bench import clients
from bench.clients import FEATURES, NPM, PYTHON, SCRIPTS, Row, run_client, table


def test_openai_works():
    assert importlib.util.find_spec("openai") is not None
    with serving(sees=True) as server:
        row = run_client([sys.executable, str(SCRIPTS / "use_openai.py")], server.url, NAME, Row("openai"))
    assert row.outcomes == dict.fromkeys(FEATURES, "yes"), row.details


@pytest.mark.parametrize("code", ["raise SystemExit('broken')", "print('no line of JSON')", "print('[1]')"])
def test_a_script_that_fails_is_seen(code):
    row = run_client([sys.executable, "-c", code], "http://127.0.0.1:1", NAME, Row("x"))
    assert row.outcomes == {"chat": "FAILED"} and "FAILED" in table([row])


def test_a_wrong_stream_is_seen(tmp_path):
    code = (
        "from features import run; run({'chat': lambda: 'a', 'chat, streamed': lambda: 'b', 'completions': lambda: ''})"
    )
    row = run_client([sys.executable, "-c", code], "http://127.0.0.1:1", NAME, Row("x"), cwd=SCRIPTS)
    assert row.outcomes == {"chat": "yes", "chat, streamed": "FAILED", "completions": "FAILED"}
    assert "'b' instead of 'a'" in row.details["chat, streamed"]


def test_the_table():
    row = Row("one", "1.2", {"chat": "yes", "structured output": "FAILED"}, {"structured output": "Bad: no JSON"})
    lines = table([row, Row("two", skipped="npm is not installed")]).splitlines()
    assert lines[0].startswith("| client | chat | chat, streamed |")
    assert re.sub(r"[ –]", "", lines[2]) == "|one1.2|yes||||||FAILED||||"
    assert lines[3].count("skipped") == len(FEATURES)
    assert lines[5:] == [
        "- one (structured output): FAILED: Bad: no JSON",
        "- two: skipped: npm is not installed",
    ]


def test_what_cannot_be_installed_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(clients, "pip_pins", lambda: {"openai": "./no-such-file.whl"})
    python = clients.Environments(tmp_path).python("openai")
    monkeypatch.setattr(clients.Environments, "python", lambda *_: Path(sys.executable))
    monkeypatch.setattr(clients, "VENV", ["-c", "pass"])
    assert "no-such-file.whl" in clients.Environments(tmp_path).install("openai")
    assert not (tmp_path / "openai" / "installed.txt").exists() and python.is_relative_to(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert clients.Environments(tmp_path).install("npm-ai") == "npm is not installed"


def test_every_client_has_its_script_and_its_versions():
    for client, (script, packages) in {**PYTHON, **NPM}.items():
        assert (SCRIPTS / script).is_file()
        assert set(packages) <= set(clients.npm_pins() if client in NPM else clients.pip_pins())
    versions = [*clients.npm_pins().values(), *(line.partition("==")[2] for line in clients.pip_pins().values())]
    assert all(re.fullmatch(r"\d+\.\d+(\.\d+)?", version) for version in versions)
    assert all(" # " in line for line in clients.PINS.read_text(encoding="utf-8").splitlines() if "==" in line)
    assert {path.name for path in SCRIPTS.glob("use_*")} == {script for script, _ in [*PYTHON.values(), *NPM.values()]}


def test_node_reports_like_python(tmp_path):
    """features.mjs and features.py print the same lines."""
    if subprocess.run(["sh", "-c", "command -v node"], capture_output=True).returncode:
        pytest.skip("node is not installed")
    code = "import { run } from './features.mjs';"
    code += "await run({ chat: () => 'a', 'chat, streamed': () => 'b', completions: () => '' })"
    row = run_client(["node", "--input-type=module", "-e", code], "http://127.0.0.1:1", NAME, Row("x"), cwd=SCRIPTS)
    assert row.outcomes == {"chat": "yes", "chat, streamed": "FAILED", "completions": "FAILED"}
