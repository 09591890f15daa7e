"""bench/open_webui.py without Open WebUI, whose installation is too large for the tests: its model, and what it needs."""

from __future__ import annotations

import json

import pytest
from serving_helpers import serving

from bench.open_webui import ANSWER, STORY, WRITTEN, generator_class


@pytest.fixture(scope="module")
def server():
    with serving(generator=generator_class()) as running:
        yield running


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What does a fox eat?", ANSWER),
        ("Tell me a story.", STORY.rstrip()),
        *((f'JSON format: {{ "{name}": … }}', json.dumps({name: value})) for name, value in WRITTEN.items()),
    ],
)
def test_the_model_writes_what_is_asked_for(server, question, answer):
    written = server.chat(question, max_tokens=60)[1]["choices"][0]["message"]["content"]
    assert written and answer.startswith(written) and (answer == written) == (len(answer) < 200)


def test_what_is_missing_is_named(run_here, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run_here("bench/open_webui.py")
    assert done.returncode == 1 and "open-webui, chromium, chromedriver not found" in done.stderr
