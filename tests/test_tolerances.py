"""The bounds of tests/tolerances.py hold for a model that is computed right, and catch one that is computed too coarsely."""

import copy

import pytest
import torch
from tolerances import close_to, rounding, shape_of

from model.LMConfig import LMConfig
from model.model import Transformer

IDS = torch.randint(100, (2, 48), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [1, 5])
@pytest.mark.parametrize("fields", [{}, dict(use_moe=True), dict(dim=16, vocab_size=6400), dict(n_layers=6)])
def test_a_model_in_float32_is_within_rounding_of_float64(fields, scale):
    config = LMConfig(**{**dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=100), **fields})
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    exact = copy.deepcopy(model).double()
    found, expected = model(IDS, labels=IDS), exact(IDS, labels=IDS)
    shape = shape_of(config, IDS.shape[1])
    bound = close_to(expected.logits, **shape, dtype=torch.float32)
    difference = (found.logits - expected.logits).abs().max().item()
    assert difference < bound["atol"] / 2, (difference, bound)  # two such programs differ by twice that at most
    coarse = copy.deepcopy(model).bfloat16()(IDS).logits
    assert (coarse - expected.logits).abs().max() > 10 * bound["atol"]

    found.loss.backward()
    expected.loss.backward()
    relative = rounding(**shape_of(config, IDS.numel(), backward=True))
    for (name, parameter), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (parameter.grad - other.grad).norm() < relative / 2 * other.grad.norm(), name
