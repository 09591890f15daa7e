"""Causal grouped-query attention: one mathematics, and the fastest exact kernel for each device and layout.

`attention` computes batches and KV caches; `varlen_attention` computes rows in which several documents stand one after
another and must not see each other. Both have a slow reference path, to which the tests compare the fast ones.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # exported models also run on older versions, without this kernel
    varlen_attn = None  # type: ignore[assignment]

# What the variable-length kernel takes: window_size since torch 2.11, grouped keys and values as they are since 2.13.
_VARLEN_FLAGS = inspect.signature(varlen_attn).parameters if varlen_attn is not None else {}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    flash: bool = True,
    weights: list[Tensor] | None = None,
) -> Tensor:
    """Return the attention of a batch of queries over its keys.

    Args:
        q: (batch, heads, q_time, head_dim).
        k, v: (batch, kv_heads, k_time, head_dim).
        mask: None for plain causal attention (q_time == k_time, or a single query that sees every key); otherwise
            (batch or 1, 1, q_time, k_time), True (or 0.0) where a query may look.
        dropout: probability of dropping attention weights.
        flash: False for the reference path.
        weights: the list to append the attention weights to (batch, heads, q_time, k_time): by the reference path.

    Returns: (batch, heads, q_time, head_dim)
    """
    causal = False
    if mask is None and q.shape[2] > 1:  # a branch: where the length is symbolic, the comparison is no bool
        causal = True
    if flash and weights is None:
        grouped = q.device.type == "cuda" and q.shape[1] != k.shape[1]
        if grouped and (mask is not None or not _has_flash_kernel(q)):
            # Of CUDA's fast kernels only flash takes grouped keys: PyTorch would keep all scores in memory instead.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=bool(q.shape[1] != k.shape[1])
        )
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])  # (batch, heads, q_time, k_time)
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    probabilities = scores.softmax(-1)
    if weights is not None:
        weights.append(probabilities.to(v.dtype))
    return F.dropout(probabilities, dropout).to(v.dtype) @ v


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    dropout: float = 0.0,
    flash: bool = True,
    weights: list[Tensor] | None = None,
) -> Tensor:
    """Return the causal attention inside each document of packed rows; nothing crosses a document boundary.

    Args:
        q: (batch, time, heads, head_dim); k, v: (batch, time, kv_heads, head_dim).
        cu_seqlens: (documents + 1,) int32, where each document starts in the flattened batch * time order, then
            batch * time. A document never spans two rows.
        dropout, flash, weights: as in `attention`.

    Returns: (batch, time, heads, head_dim)
    """
    batch, time = q.shape[:2]
    flash = flash and weights is None
    if flash and dropout == 0.0 and q.device.type == "cpu":
        out, _ = _packed_attention_cpu(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens)
        return out.unflatten(0, (batch, time))
    if flash and dropout == 0.0 and "window_size" in _VARLEN_FLAGS and _has_flash_kernel(q):
        return _varlen_attention_cuda(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens, time).view_as(q)
    mask = packed_mask(cu_seqlens, batch, time)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = attention(q, k, v, mask, dropout=dropout, flash=flash, weights=weights)
    return out.transpose(1, 2)


def packed_mask(cu_seqlens: Tensor, batch: int, time: int) -> Tensor:
    """Return a (batch, 1, time, time) mask, True where a query may look: same document, not in the future."""
    document = document_ids(cu_seqlens, batch, time)
    same = document[:, None, :, None] == document[:, None, None, :]
    return same & torch.ones(time, time, dtype=torch.bool, device=same.device).tril()


def document_ids(cu_seqlens: Tensor, batch: int, time: int) -> Tensor:
    """Return the (batch, time) index of the document every token belongs to."""
    flat = torch.arange(batch * time, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return (torch.bucketize(flat, cu_seqlens, right=True) - 1).view(batch, time)


def cu_seqlens_from_positions(position_ids: Tensor) -> Tensor:
    """Return the document boundaries of (batch, time) positions: one starts where the count does not increase by 1."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    starts = starts.flatten().nonzero().squeeze(1)
    return F.pad(starts, (0, 1), value=position_ids.numel()).to(torch.int32)


def _has_flash_kernel(q: Tensor) -> bool:
    """Return whether FlashAttention's kernels can run: half precision on NVIDIA Ampere (capability 8.0) and newer.

    PyTorch for Windows has none of them.
    """
    return (
        q.device.type == "cuda"
        and torch.version.cuda is not None
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and torch.cuda.get_device_capability(q.device)[0] >= 8
        and torch.backends.cuda.is_flash_attention_available()
    )


def _varlen_attention_cuda(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim) -> out like q."""
    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal: everything to the left, nothing to the right
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in _VARLEN_FLAGS:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(out, Tensor)  # a pair only if return_aux is given
    return out


# A CPU has no variable-length kernel, but the ordinary flash kernel on one document after another is as good: a row
# costs the sum of the squared lengths of its documents instead of the square of its own. As a custom op the loop is one
# node for torch.compile, which would otherwise unroll it or break the graph. It computes in float32: the kernel's
# bfloat16 backward was 2.5 times slower at 130 tokens (the average document), and rounds more.


@torch.library.custom_op("minimind::packed_attention_cpu", mutates_args=())
def _packed_attention_cpu(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim) -> out like q, logsumexp (tokens, heads)."""
    out = torch.empty(q.shape, dtype=q.dtype)
    logsumexp = torch.empty(q.shape[:2], dtype=torch.float32)
    qf, kf, vf = (_heads_first(x) for x in (q, k, v))
    for start, end in _spans(cu_seqlens):
        document = slice(start, end)
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            qf[:, :, document], kf[:, :, document], vf[:, :, document], 0.0, True
        )
        out[document] = o[0].transpose(0, 1)
        logsumexp[document] = lse[0].T
    return out, logsumexp


@torch.library.custom_op("minimind::packed_attention_cpu_backward", mutates_args=())
def _packed_attention_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    qf, kf, vf, of, gf = (_heads_first(x) for x in (q, k, v, out, grad))
    for start, end in _spans(cu_seqlens):
        document = slice(start, end)
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gf[:, :, document], qf[:, :, document], kf[:, :, document], vf[:, :, document], of[:, :, document],
            logsumexp[document].T[None].contiguous(), 0.0, True,
        )  # fmt: skip
        for gradient, part in zip((dq, dk, dv), parts, strict=True):
            gradient[document] = part[0].transpose(0, 1)
    return dq, dk, dv


def _heads_first(x: Tensor) -> Tensor:
    """(tokens, heads, head_dim) in any float dtype -> (1, heads, tokens, head_dim) in float32."""
    return x.float().transpose(0, 1)[None]


def _spans(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    bounds = cu_seqlens.tolist()
    return [(start, end) for start, end in zip(bounds, bounds[1:], strict=False) if end > start]


@_packed_attention_cpu.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:2], dtype=torch.float32)


@_packed_attention_cpu_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx: Any, grad: Tensor, _grad_logsumexp: Tensor) -> tuple:
    q, k, v, out, logsumexp, cu_seqlens = ctx.saved_tensors
    return *_packed_attention_cpu_backward(grad, q, k, v, out, logsumexp, cu_seqlens), None


_packed_attention_cpu.register_autograd(_backward, setup_context=_save_for_backward)
