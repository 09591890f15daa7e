"""Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864), as the published weights expect it.

Consecutive pairs of a head's features, (x0, x1), (x2, x3), ..., are rotated by an angle that grows with the position.
(Llama checkpoints on Hugging Face pair feature i with i + head_dim/2 instead; an export reorders rows.)

**Longer contexts.** Positions beyond those of the training give angles that the model has never seen. Scaling rotates
the pairs more slowly, so that `factor` times as many tokens stay within known angles:

linear  every pair turns `factor` times slower: positions are interpolated (https://arxiv.org/abs/2306.15595).
ntk     a larger base: the fastest pair stays as it is, the slowest turns `factor` times slower ("NTK-aware", described
        in section 3.1 of the YaRN paper).
yarn    pairs that turn often within the trained length stay as they are, those that do not turn once are interpolated,
        with a ramp between them; and attention gets sharper (YaRN, https://arxiv.org/abs/2309.00071, section 3).

A factor of 1 changes no bit. `RopeScaling` applies to all positions of a text: keys rotated in one way cannot be
compared with queries rotated in another. `DynamicRopeScaling` decides which factor a text gets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.architecture import ROPE_SCALING_METHODS

BETA_FAST, BETA_SLOW = 32, 1  # YaRN's beta and alpha: turns within the trained length, ends of its ramp


@dataclass(frozen=True)
class RopeScaling:
    """The method and factor by which the rotations of one call are slowed down.

    Args:
        method: one of `ROPE_SCALING_METHODS`.
        factor: by how much; a number, or (batch,) for rows that differ.
        original: length in tokens that the model was trained at without scaling.
        attention_factor: YaRN multiplies queries and keys by it; None: 0.1 ln(factor) + 1.
    """

    method: str
    factor: float | Tensor
    original: int
    attention_factor: float | None = None


def rope_tables(
    position_ids: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position's rotation angles, in float32.

    Computed from the positions of each call (a few thousand numbers) rather than kept in a buffer: there is no table
    to outgrow, to load wrongly or to move between devices.

    Args:
        position_ids: (batch, time) integer positions, restarting at 0 for every document.
        scaling: for texts that are longer than those of the training. YaRN makes the tables larger than 1.

    Returns:
        cos, sin: (batch, time, 1, head_dim / 2), the 1 standing for the heads.
    """
    pair = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    inv_freq = 1.0 / theta ** (pair / head_dim)  # (head_dim / 2,)
    # Autocast would round the angles to bfloat16, which has no room for position 300: stay in float32.
    if scaling is None:
        angles = position_ids[:, :, None, None].float() * inv_freq  # (batch, time, 1, head_dim / 2)
        return angles.cos(), angles.sin()
    inv_freq, attention_factor = scaled_frequencies(
        inv_freq, head_dim, theta, scaling
    )  # (rows, head_dim / 2), (rows, 1)
    angles = position_ids[:, :, None, None].float() * inv_freq[:, None, None]
    attention_factor = attention_factor[:, None, None]
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def scaled_frequencies(inv_freq: Tensor, head_dim: int, theta: float, scaling: RopeScaling) -> tuple[Tensor, Tensor]:
    """Return the rotation per token of every pair, slowed down.

    Args:
        inv_freq: (head_dim / 2,) as trained.

    Returns:
        frequencies (rows, head_dim / 2), and (rows, 1) what queries and keys are to be multiplied by; 1 row if the
        factor is a number.
    """
    factor = scaling.factor
    if not isinstance(factor, Tensor):
        factor = inv_freq.new_full((1,), factor)  # filled where it is needed: nothing is copied to a GPU
    factor = factor[:, None]
    attention_factor = torch.ones_like(factor)
    if scaling.method == "linear":
        scaled = inv_freq / factor
    elif scaling.method == "ntk":
        pair = torch.arange(0, head_dim, 2, device=inv_freq.device, dtype=torch.float32)
        scaled = 1.0 / (theta * factor ** (head_dim / (head_dim - 2))) ** (pair / head_dim)
    elif scaling.method == "yarn":
        ramp = yarn_ramp(head_dim, theta, scaling.original, inv_freq.device)
        scaled = inv_freq / factor * ramp + inv_freq * (1 - ramp)
        # Queries and keys alike: the scores grow by its square (equation 22 of the paper).
        given = scaling.attention_factor
        attention_factor = 0.1 * factor.log() + 1 if given is None else torch.full_like(factor, given)
    else:
        raise ValueError(f"unknown RoPE scaling {scaling.method!r}; known: {', '.join(ROPE_SCALING_METHODS)}")
    longer = factor > 1
    return torch.where(longer, scaled, inv_freq), torch.where(longer, attention_factor, 1.0)


def yarn_ramp(head_dim: int, theta: float, original: int, device: torch.device | str = "cpu") -> Tensor:
    """Return how much of every pair (head_dim / 2,) is interpolated: 0 for fast ones, 1 for slow ones.

    Linear in the number of the pair between whole numbers, as in the authors' code and in transformers.
    """

    def pair_with(turns: float) -> float:
        """Return the (fractional) index of the pair that makes this many turns within the original length."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(BETA_FAST)), 0)
    high = max(min(math.ceil(pair_with(BETA_SLOW)), head_dim - 1), low + 0.001)
    number = torch.arange(head_dim // 2, device=device, dtype=torch.float32)
    return ((number - low) / (high - low)).clamp(0, 1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of `x` (batch, time, heads, head_dim); computes in float32, returns x's dtype."""
    x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # each (batch, time, heads, head_dim / 2)
    rotated = torch.stack((x0 * cos - x1 * sin, x0 * sin + x1 * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


# ---- which scaling a text gets


@dataclass(frozen=True)
class DynamicRopeScaling:
    """RoPE scaling of texts longer than those the model was trained at, chosen for every text by its length.

    Up to the trained length a text is computed as in training. Beyond it, all its positions are scaled, by the first of
    `factors` that covers it, because less scaling loses less quality.

    Args:
        method: one of `ROPE_SCALING_METHODS`.
        original: length in tokens that the model was trained at without scaling.
        trained: length that it was trained at last: the same, unless it was trained with scaling.
        trained_factor: of that last training; 1 without scaling.
        factors: rising, each relative to `trained`.
        attention_factor: as in `RopeScaling`.
    """

    method: str
    original: int
    trained: int
    trained_factor: float
    factors: tuple[float, ...]
    attention_factor: float | None = None

    def factor(self, length: int) -> float:
        """Return the factor of a text of `length` tokens, relative to `original`."""
        steps = (1.0, *self.factors)
        return self.trained_factor * next((step for step in steps if length <= self.trained * step), steps[-1])

    def scaling(self, factor: float | Tensor) -> RopeScaling:
        return RopeScaling(self.method, factor, self.original, self.attention_factor)


def doublings(factor: float) -> tuple[float, ...]:
    """Return 2, 4, 8, ... up to `factor`, which is the last."""
    powers = range(1, math.ceil(math.log2(factor))) if factor > 1 else ()
    return (*(2.0**power for power in powers), float(factor))
