"""bench/clients.py: real clients against a real server, and the table of what works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving_helpers import NAME, serving

from bench import clients
from bench.clients import CLIENTS, FEATURES, SCRIPTS, Environments, Row, run_client, table, version_of


@pytest.fixture(scope="module")
def url():
    with serving(sees=True) as server:
        yield server.url


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_works_as_documented(client, url):
    environments = Environments(clients.FOLDER)
    if client != "openai" and not environments.is_ready(CLIENTS[client][0]):
        pytest.skip("not installed: `python bench/clients.py --install_only` does it, or says what is missing")
    command = environments.command(client)
    if client == "openai":  # the tests have it anyway
        command[0] = sys.executable
    row = run_client(command, url, NAME, Row(client, version_of(client)))
    assert "FAILED" not in row.outcomes.values(), row.details
    assert (
        table([row]).splitlines()[2] in (clients.ROOT / "docs" / "clients.md").read_text(encoding="utf-8").splitlines()
    )


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


def test_what_cannot_be_installed_is_skipped(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(clients, "pip_pins", lambda: dict.fromkeys(("openai", "llm"), "./no-such-file.whl"))
    monkeypatch.setattr(clients, "CLIENTS", {name: CLIENTS[name] for name in ("openai", "llm", "npm-ai")})
    monkeypatch.setattr(Environments, "python", lambda *_: Path(sys.executable))
    monkeypatch.setattr(clients, "VENV", ["-c", "pass"])
    monkeypatch.setattr(clients, "version_of", lambda _: "1")
    monkeypatch.setattr(sys, "argv", ["clients.py", "--env", str(tmp_path), "--install_only"])
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert clients.main() == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("== openai is not installed") and "no-such-file.whl" in first
    assert second.startswith("== llm ") and third.startswith("== npm-ai ") and third.endswith(": npm is not installed")
    assert not any(Environments(tmp_path).is_ready(name) for name in ("openai3", "npm"))


def test_what_is_installed_stays_until_its_versions_change(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(clients, "run_command", lambda command, **_: ran.append(command) or (0, ""))
    for _ in range(2):
        assert Environments(tmp_path).install("npm") == "" and len(ran) == 1
    monkeypatch.setattr(clients, "npm_pins", lambda: {"ai": "7.0.0"})
    assert not Environments(tmp_path).is_ready("npm")
    assert Environments(tmp_path).install("npm") == "" and ran[1][-1] == "ai@7.0.0"


def test_every_client_has_its_script_and_its_versions():
    for environment, script, packages in CLIENTS.values():
        assert (SCRIPTS / script).is_file()
        assert set(packages) <= set(clients.npm_pins() if environment == "npm" else clients.pip_pins())
    versions = [*clients.npm_pins().values(), *(line.partition("==")[2] for line in clients.pip_pins().values())]
    assert all(re.fullmatch(r"\d+\.\d+(\.\d+)?", version) for version in versions)
    assert all(" # " in line for line in clients.PINS.read_text(encoding="utf-8").splitlines() if "==" in line)
    assert {path.name for path in SCRIPTS.glob("use_*")} == {script for _, script, _ in CLIENTS.values()}


def test_node_reports_like_python(tmp_path):
    """features.mjs and features.py print the same lines."""
    if subprocess.run(["sh", "-c", "command -v node"], capture_output=True).returncode:
        pytest.skip("node is not installed")
    code = "import { run } from './features.mjs';"
    code += "await run({ chat: () => 'a', 'chat, streamed': () => 'b', completions: () => '' })"
    row = run_client(["node", "--input-type=module", "-e", code], "http://127.0.0.1:1", NAME, Row("x"), cwd=SCRIPTS)
    assert row.outcomes == {"chat": "yes", "chat, streamed": "FAILED", "completions": "FAILED"}
