"""Starting several processes as a user does, for tests."""

from __future__ import annotations

import os
import socket
import sys
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
