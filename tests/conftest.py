"""What holds for every test, and how tests run the scripts."""

from __future__ import annotations

import io
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[name]  # the tests talk to servers on this machine only
SLOWEST = (
    "launchers distributed script_pretrain script_fast_inference trainer app interop_lm_eval notebook chaos script_full_sft "
    "script_eval_suite survival script_vlm export bench_clients script_openai_api"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slowest files: when the last ones are done, no worker should have been without work for long."""
    order = {f"test_{name}": i for i, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def same_environment():
    """Give the next test the environment variables that this one found: libraries set some (accelerate, DeepSpeed)."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def run_here(monkeypatch, capsys) -> Callable[..., subprocess.CompletedProcess]:
    """Run a script in this process: the same code as in one of its own, without the seconds of its start."""

    def run(script: str, *args: object, input: str = "") -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input.encode())))
        capsys.readouterr()
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as end:
                runpy.run_path(str(ROOT / script), run_name="__main__")
        finally:
            signal.signal(signal.SIGTERM, before)
        return subprocess.CompletedProcess(args, end.value.code, *capsys.readouterr())

    return run
