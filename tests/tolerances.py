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
from collections.abc import Iterable

import torch

from model.LMConfig import LMConfig


def rounding(dtype: torch.dtype = torch.float32, *, terms: int = 1, depth: int = 1) -> float:
    """Return the relative difference that rounding explains after `depth` operations that each add up to `terms` terms."""
    return 4 * torch.finfo(dtype).eps * math.sqrt(terms * depth)


def log_probability_rounding(config: LMConfig, n_tokens: int) -> float:
    """Return the error of the summed log-probabilities of `n_tokens` tokens that are about as unlikely as by chance."""
    return rounding(**shape_of(config, n_tokens)) * math.log(config.vocab_size) * math.sqrt(n_tokens)


def rms(x: torch.Tensor) -> float:
    """Return the root of the mean square."""
    return float(x.detach().double().square().mean().sqrt())


def close_to(
    expected: torch.Tensor, *, terms: int = 1, depth: int = 1, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Return atol and rtol of torch.testing.assert_close for values that were computed in `dtype` (default: their own).

    The absolute part is relative to the size of a typical value (the root of the mean square), since a value near zero
    is the difference of large ones.
    """
    relative = rounding(dtype or expected.dtype, terms=terms, depth=depth)
    return dict(atol=relative * rms(expected), rtol=relative)


def shape_of(config: LMConfig, length: int | None = None, *, backward: bool = False) -> dict[str, int]:
    """Return `terms` and `depth` of a whole model: its widest sum and its operations one after another.

    A layer has six: two norms, the projections into attention, attention, and the two halves of the feed-forward layer;
    a backward pass has twice as many again, and adds up over the positions.
    """
    terms = max(config.dim, config.hidden_dim or 0, length or config.max_seq_len)
    depth = 6 * config.n_layers + 2
    return dict(terms=terms, depth=3 * depth if backward else depth)


def norm(tensors: Iterable[torch.Tensor]) -> float:
    """Return the norm of all tensors together."""
    return math.sqrt(sum(float(x.detach().double().square().sum()) for x in tensors))


def assert_gradients_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> None:
    """Assert that each gradient is off by at most `relative` of its norm.

    One that is the small difference of large terms, as a router's may be, is known to the precision of those: of the
    norm of all gradients.
    """
    assert found.keys() == expected.keys()
    floor = torch.finfo(torch.float32).eps * norm(expected.values())
    for name, gradient in expected.items():
        difference = norm([found[name].double() - gradient.double()])
        assert difference <= relative * norm([gradient]) + floor, (name, difference, norm([gradient]))


def assert_trained_alike(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float, learned: float
) -> None:
    """Assert that two runs of AdamW ended with the same weights, but for the rounding of their gradients.

    AdamW divides a gradient by its own size: one that is as small as its rounding error moves its weight by rounding
    alone, in each step by up to the learning rate. Such are a share of `relative` of all, so the weights differ by the
    square root of `relative` of the largest possible move.

    Args:
        relative: the rounding error of a gradient, relative to its size.
        learned: the sum of the learning rates of all steps.
    """
    assert found.keys() == expected.keys()
    count = sum(x.numel() for x in expected.values())
    difference = norm(found[name].double() - expected[name].double() for name in expected) / math.sqrt(count)
    assert difference <= math.sqrt(relative) * learned, (difference, relative, learned)


def assert_moments_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float) -> None:
    """Assert that two states of AdamW are the same, but for the rounding that `assert_trained_alike` explains.

    Keys are "<name of the weight>.<kind>"; gradients follow the weights, so they are off by as much.
    """
    assert found.keys() == expected.keys()
    for kind in {name.rpartition(".")[2] for name in expected}:
        names = [name for name in expected if name.endswith(f".{kind}")]
        difference = norm(found[name].double() - expected[name].double() for name in names)
        assert difference <= math.sqrt(relative) * norm(expected[name] for name in names), (kind, difference)
