"""The tensors of a training state, for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint import load_tensors, tensor_layout


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights by name, and the optimizer's state as NAME/KEY."""
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensor_layout(path).items()}
    load_tensors(path, tensors)
    weights = {name.removeprefix("model/"): x for name, x in tensors.items() if name.startswith("model/")}
    return weights, {name.removeprefix("optimizer/"): x for name, x in tensors.items() if name.startswith("optimizer/")}
