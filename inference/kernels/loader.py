"""Compile the C++ kernels of this package for this CPU, and allocate memory for their weights.

A C++ compiler (g++ or clang++) builds the library in a few seconds; it is kept in the user's cache folder under a name
that depends on the source, the compiler and the CPU. If that fails, `load_library` says why, and its callers fall back to
PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared"]
CHUNK = 32 * 2**20  # bytes of memory to ask for at a time


class KernelUnavailable(RuntimeError):
    """The kernel cannot be built or used here; the message says why."""


@functools.cache
def load_library(name: str, *flags: str) -> ctypes.CDLL:
    """Return `name`_kernel.cpp of this folder as a library; compile it first if necessary. Raises KernelUnavailable.

    Args:
        flags: additional ones for the compiler.
    """
    if platform.system() == "Windows":
        raise KernelUnavailable("the kernel needs g++ or clang++, and has not been built on Windows")
    compiler, source = shlex.split(os.environ.get("CXX") or "g++"), HERE / f"{name}_kernel.cpp"
    options = [*FLAGS, *flags]
    try:
        # The compiler's version, and the instructions of this CPU: a home folder may be shared by several machines.
        macros = [*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
        target = subprocess.run(macros, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise KernelUnavailable(f"no C++ compiler ({shlex.join(compiler)}): {error}") from error
    read = b"".join(path.read_bytes() for path in (source, HERE / "kernel.hpp"))
    key = hashlib.sha256(read + " ".join(options).encode() + target).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minimind"
    except RuntimeError as error:  # a user without a home folder, as in some containers
        raise KernelUnavailable(f"there is no folder for the library: {error}; set XDG_CACHE_HOME") from error
    library = folder / f"{name}_{key}.so"
    if not library.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / "made.so"
                command = [*compiler, *options, str(source), "-o", str(made)]
                subprocess.run(command, capture_output=True, check=True, text=True)
                os.replace(made, library)  # atomic, also if another process compiles it at the same time
        except OSError as error:
            raise KernelUnavailable(f"cannot write to {folder}: {error}") from error
        except subprocess.CalledProcessError as error:
            raise KernelUnavailable(f"{shlex.join(compiler)} failed: {error.stderr.strip()[-500:]}") from error
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelUnavailable(f"cannot load {library}: {error}") from error


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return zeros like `torch.zeros`; on a CPU in pages of 2 MB where the system has them.

    With the usual pages of 4 KB, a CPU that reads much memory spends half of its time on address translation.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if torch.device(device).type != "cpu" or size < 2**21 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        pass  # a kernel without them
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Memory:
    """Tensors that C++ has pointers to: copies of them, side by side in large pages."""

    def __init__(self) -> None:
        self._alive: list[Tensor] = []
        self._chunk, self._used = torch.empty(0, dtype=torch.uint8), 0

    def keep(self, tensor: Tensor) -> int:
        """Copy a tensor into this memory; return its address there, a multiple of 64."""
        size = -(-tensor.nbytes // 64) * 64
        if self._used + size > len(self._chunk):
            self._chunk, self._used = zeros((max(size, CHUNK),), torch.uint8), 0
            self._alive.append(self._chunk)
        part = self._chunk[self._used : self._used + tensor.nbytes]
        part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self._used += size
        return part.data_ptr()
