"""Where, in which precision and how fast at most a model computes."""

from __future__ import annotations

import re
import sys

import torch

from common.errors import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Dense half-precision peak of one device in FLOP/s, from the data sheets (no sparsity).
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`; auto: the first of CUDA, MPS and CPU that is available. CUDA's attention is set up.

    Raises UserError for a device that is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
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
    if device.type == "cuda":
        # On Hopper and Blackwell it comes first, and makes a plan for every length: tens of milliseconds at each new token.
        torch.backends.cuda.enable_cudnn_sdp(False)
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


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of the device in half precision; None where it is not known (CPUs, float32)."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"{part}(?![0-9A-Z])", name)), None)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a device or the system had no memory left for a tensor; only CUDA has an exception class for it."""
    texts = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)
