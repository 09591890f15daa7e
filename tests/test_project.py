"""The project's own files agree: version, licence, and the Pythons it runs on."""

import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

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


def test_the_workflow_is_what_the_ci_script_does():
    steps = yaml.safe_load(text(".github/workflows/tests.yml"))["jobs"]["tests"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == text(".ci/run").splitlines()[2:]


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name
)
def test_issue_forms(path):
    """What GitHub requires of a form; without it the form is not shown."""
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"] and form["description"] and any(field["type"] != "markdown" for field in form["body"])
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids))
    assert all("label" in field["attributes"] for field in form["body"] if field["type"] != "markdown")
    assert all((ROOT / name).exists() for name in re.findall(r"[\w/]+\.(?:md|py)", path.read_text(encoding="utf-8")))


# ---- containers


def dockerfile() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile, with their arguments."""
    lines = "".join(line for line in text("Dockerfile").splitlines(keepends=True) if not line.startswith("#"))
    return [tuple(line.split(maxsplit=1)) for line in lines.replace("\\\n", " ").splitlines() if line]


def compose(*names: str) -> dict[str, dict]:
    """Return the services of compose files, by name, with the keys of the later files added."""
    services: dict[str, dict] = {}
    for name in names:
        for service, keys in yaml.safe_load(text(name))["services"].items():
            services[service] = services.get(service, {}) | keys
    return services


def test_the_image_has_what_it_names():
    instructions = dockerfile()
    assert instructions[0] == ("FROM", f"python:3.{re.search(r'python:3[.](1[1-3])-slim', text('Dockerfile'))[1]}-slim")
    ignored = text(".dockerignore").splitlines()
    for name, arguments in instructions:
        for source in arguments.split()[:-1] if name == "COPY" else []:
            assert (ROOT / source).exists() and source not in ignored
    assert {"dataset/*", "!dataset/sample", "out", ".git"} <= set(ignored)
    root = [name for name, _ in instructions].index("USER")
    assert instructions[root][1] == "1000" and {name for name, _ in instructions[root:]} == {"USER", "EXPOSE", "CMD"}
    torch = re.search(r"sed -n '([^']+)'", text("Dockerfile"))[0]
    assert torch in text("setup_env.sh")  # which also installs torch first


def test_commands_of_containers_have_flags_that_exist():
    actions = runpy.run_path(str(ROOT / "docs" / "make_flags.py"))["actions_of"]("my_openai_api.py")
    (in_image,) = [json.loads(arguments) for name, arguments in dockerfile() if name == "CMD"]
    for words in (in_image, compose("compose.yaml")["minimind"]["command"].split()):
        assert words[:2] == ["python", "my_openai_api.py"]
        assert all(word in actions for word in words if word.startswith("--"))
        assert words[words.index("--host") + 1] == "0.0.0.0"  # inside the container


def test_containers_are_open_to_this_machine_only():
    services = compose("compose.yaml", "compose.cuda.yaml")
    assert set(services) == {"minimind", "webui"}
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service["ports"])
    names = services["minimind"]["command"].partition("--allowed_hosts ")[2].split()
    server, page = (services[name]["environment"] for name in ("minimind", "webui"))
    assert page["OPENAI_API_BASE_URL"] == "http://minimind:8000/v1" and {"minimind", "localhost"} == set(names)
    assert page["OPENAI_API_KEY"] == server["MINIMIND_API_KEY"] != ""
    declared = {arguments.partition("=")[0] for name, arguments in dockerfile() if name == "ARG"}
    assert set(services["minimind"]["build"]["args"]) <= declared
    assert all(":latest" not in service.get("image", "") for service in services.values())


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
