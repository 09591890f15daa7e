"""Check the example diffs of CONTRIBUTING.md: they apply to the code as it is, and each is short."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = [section.partition("\n") for section in PAGE.split("\n### ")[1:]]
DIFFS = {title: body.partition("```diff\n")[2].partition("```")[0] for title, _, body in SECTIONS}


def test_every_diff_has_a_heading_of_its_own():
    assert DIFFS and all(DIFFS.values()) and len(DIFFS) == PAGE.count("```diff")


@pytest.mark.parametrize("title", DIFFS)
def test_diff_applies_and_is_short(title):
    assert DIFFS[title].count("\n") < 60
    # The ceiling: a copy of the project inside another git repository is checked as if it were alone.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(ROOT.parent)}
    result = subprocess.run(
        ["git", "apply", "--check", "--verbose", "-"],
        input=DIFFS[title], cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Skipped" not in result.stderr, result.stderr
