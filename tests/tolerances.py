"""Bounds on numeric differences, computed from precision, number of terms and size of values: the same on every CPU.

Two correct programs that add the same numbers in another order (other vector width, other library, packed or not) differ
by rounding. A sum of n terms in a dtype of precision eps is off by about eps * sqrt(n) of its size, and errors of
consecutive operations add up like independent ones, with the square root of their number (Higham, "Accuracy and
Stability of Numerical Algorithms", 3.1 and 2.8). `rounding` is four times that: two programs, each of which may be off
by two standard deviations more than usual in one of many values.

    torch.testing.assert_close(found, expected, **close_to(expected, terms=dim, depth=3))
    assert loss == pytest.approx(other, rel=rounding(terms=vocab_size))
"""

import math

import torch

from model.LMConfig import LMConfig


def rounding(dtype: torch.dtype = torch.float32, *, terms: int = 1, depth: int = 1) -> float:
    """Return the relative difference that rounding explains after `depth` operations that each add up to `terms` terms."""
    return 4 * torch.finfo(dtype).eps * math.sqrt(terms * depth)


def close_to(
    expected: torch.Tensor, *, terms: int = 1, depth: int = 1, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Return atol and rtol of torch.testing.assert_close for values that were computed in `dtype` (default: their own).

    The absolute part is relative to the size of a typical value (the root of the mean square), since a value near zero
    is the difference of large ones.
    """
    relative = rounding(dtype or expected.dtype, terms=terms, depth=depth)
    size = float(expected.detach().double().square().mean().sqrt())
    return dict(atol=relative * size, rtol=relative)


def shape_of(config: LMConfig, length: int | None = None, *, backward: bool = False) -> dict[str, int]:
    """Return `terms` and `depth` of a whole model: its widest sum and its operations one after another.

    A layer has six: two norms, the projections into attention, attention, and the two halves of the feed-forward layer;
    a backward pass has twice as many again, and adds up over the positions.
    """
    terms = max(config.dim, config.hidden_dim or 0, length or config.max_seq_len)
    depth = 6 * config.n_layers + 2
    return dict(terms=terms, depth=3 * depth if backward else depth)
