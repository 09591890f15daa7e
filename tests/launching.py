"""Starting several processes as a user does, for tests."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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
