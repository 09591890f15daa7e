"""Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864), as the published weights expect it.

Consecutive pairs of a head's features, (x0, x1), (x2, x3), ..., are rotated by an angle that grows with the position.
(Llama checkpoints on Hugging Face pair feature i with i + head_dim/2 instead; an export has to re-order rows.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's rotation angles, in float32.

    Computed from the positions of each call (a few thousand numbers) rather than kept in a buffer: there is no table
    to outgrow, to load wrongly or to move between devices.

    Args:
        position_ids: (batch, time) integer positions, restarting at 0 for every document.

    Returns:
        cos, sin: (batch, time, 1, head_dim / 2), the 1 standing for the heads.
    """
    pair = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    inv_freq = 1.0 / theta ** (pair / head_dim)  # (head_dim / 2,)
    # Autocast would round the angles to bfloat16, which has no room for position 300: stay in float32.
    angles = position_ids[:, :, None, None].float() * inv_freq  # (batch, time, 1, head_dim / 2)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of `x` (batch, time, heads, head_dim); computes in float32, returns x's dtype."""
    x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # each (batch, time, heads, head_dim / 2)
    rotated = torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)
