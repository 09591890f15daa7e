"""The project's own files agree: version, licence, and the Pythons it runs on."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_version_and_licence():
    version = PROJECT["project"]["version"]
    assert f"\nversion: {version}\n" in text("CITATION.cff") and f"\n## {version}\n" in text("CHANGELOG.md")
    assert PROJECT["project"]["license"] == "Apache-2.0" and "\nlicense: Apache-2.0\n" in text("CITATION.cff")
    assert "Apache License\n" in text("LICENSE") and "dataset/sample" in text("NOTICE")


def test_one_range_of_pythons():
    lowest, end = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["project"]["requires-python"]).groups()
    assert f"not (3, {lowest}) <= sys.version_info < (3, {end})" in text("setup_env.sh")
    assert PROJECT["tool"]["mypy"]["python_version"] == f"3.{lowest}"
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py3{lowest}"
    names = [f"3.{minor}" for minor in range(int(lowest), int(end))]
    assert f"{', '.join(names[:-1])} or {names[-1]} is needed" in text("setup_env.sh")
    assert all(name in text("README.md") for name in names)
    assert f"python: {json.dumps(names)}" in text(".github/workflows/tests.yml")


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
@pytest.mark.parametrize("version", [(2, 7, 18), (3, 10, 13), (3, 14, 0)])
def test_other_pythons_are_refused(tmp_path, version):
    """By an interpreter that pretends to be of another version."""
    python = tmp_path / "python"
    name = ".".join(map(str, version))
    pretend = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    shown, run = f'echo "Python {name}"', f'exec "{sys.executable}" -c "{pretend}" "$2"'
    python.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then {shown}; else {run}; fi\n')
    python.chmod(0o755)
    (tmp_path / "setup_env.sh").write_text(text("setup_env.sh"), encoding="utf-8")
    result = subprocess.run(
        ["bash", "setup_env.sh", "requirements.txt"], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHON": str(python), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert result.returncode == 1 and f"is needed, Python {name} was found" in result.stderr, result.stderr
    assert not (tmp_path / ".venv").exists()
