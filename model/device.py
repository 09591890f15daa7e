"""Where and in which precision a model computes."""

from __future__ import annotations

import sys

import torch

from common.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; auto: the first of CUDA, MPS and CPU that is available.

    Raises UserError for a device that is not available.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name} is not a device; use cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}: this PyTorch ({torch.__version__}) sees no CUDA device; use device=cpu")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"device={name}: there are only {torch.cuda.device_count()} CUDA devices, from cuda:0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: no MPS device is available; use device=cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device={name} is not supported; use cpu, cuda, cuda:N or mps")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the precision of the computation; auto: bfloat16 where the hardware multiplies it fast."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        ampere = torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if ampere else torch.float16
    if device.type == "cpu" and _cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def _cpu_has_bfloat16() -> bool:
    """Return whether this CPU has instructions for bfloat16 (AVX512-BF16 or AMX); elsewhere it is emulated and slow."""
    if sys.platform != "linux":
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
