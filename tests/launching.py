"""Starting processes as a user does, for tests."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *args: object, **settings) -> subprocess.CompletedProcess:
    """Run a script in a process of its own; see the fixture `run_here` for one without the seconds of its start."""
    command = [sys.executable, ROOT / script, *args]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, encoding="utf-8", timeout=300, **settings
    )


def error_of(result: subprocess.CompletedProcess) -> str:
    """Return the error of a script that failed as it should: one line, no traceback."""
    assert result.returncode, result.stdout
    assert "Traceback" not in result.stderr, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    return line


def fork(function: Callable[..., None], *args: object, output: Path) -> BaseProcess:
    """Start `function` in a process of its own, which prints into the file `output`.

    It is a copy of a process that has imported PyTorch and the trainer, which takes seconds: for what is killed often.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.recipe"])
    process = context.Process(target=_print_into, args=(output, function, *args))
    process.start()
    return process


def _print_into(output: Path, function: Callable[..., None], *args: object) -> None:
    with output.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
            stream.reconfigure(line_buffering=True)
    function(*args)


def run_script_file(script: str, *args: object) -> None:
    """Run a script as Python does; for `fork`."""
    sys.argv = [script, *map(str, args)]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def environment() -> dict[str, str]:
    """One thread a process, output as it comes, and our packages and test modules can be imported."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(n: int, *flags: object) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), *map(str, flags)]


def node(port: int, *flags: object) -> list[str]:
    """One of two machines with a process each, which meet at `port` of this one."""
    meeting = ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}"]
    return [sys.executable, "-m", "torch.distributed.run", *map(str, meeting), "--rdzv_id", "test", *map(str, flags)]


def deepspeed(n: int) -> list[str]:
    program = Path(sys.executable).parent / "deepspeed"
    return [str(program), "--num_gpus", str(n), "--master_port", str(free_port())]


HOLDER = """
import sys, time
from pathlib import Path
from common.files import exclusive
with exclusive(Path(sys.argv[1]), sys.argv[2], ""):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def another_process_holds(folder: Path, name: str) -> Iterator[subprocess.Popen]:
    """The lock on what is called `name` in `folder`, by a process that is killed in the end."""
    command = [sys.executable, "-c", HOLDER, str(folder), name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()
