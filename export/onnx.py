"""ONNX files, which onnxruntime runs on every system without PyTorch: token ids in, logits out, no KV cache."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from export.self_check import Agreement, measure, model_logits
from model.model import Transformer

LARGEST_FILE = 1_500_000_000  # bytes; a protocol buffer ends at 2 GB, and then the weights go into a second file


class _Logits(nn.Module):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def write_onnx(file: Path, model: Transformer) -> None:
    """Write a float32 model that maps `input_ids` (batch, time) to `logits` (batch, time, vocab_size).

    Both sizes are free. Rows of different lengths are filled up on the right: no token attends to those after it.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision, which is not needed
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of torch, about its own code
        program = torch.onnx.export(
            _Logits(model.float()).eval(),
            (torch.zeros((2, 3), dtype=torch.long),),
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    n_bytes = 4 * sum(p.numel() for p in model.parameters())
    program.save(str(file), external_data=n_bytes > LARGEST_FILE)


def compare_onnx(file: Path, model: Transformer, rows: list[list[int]], tolerance: float | None) -> Agreement:
    """Compare the logits that onnxruntime computes with those of `model`, its source (tolerance None: 1e-4)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    exported = [torch.from_numpy(session.run(["logits"], {"input_ids": [row]})[0][0]) for row in rows]
    return measure(exported, model_logits(model, rows), None, 1e-4 if tolerance is None else tolerance, None)
