"""Measure useful training tokens per second, compared with one sample per row, padded, float32, eager.

    python bench/pretrain_throughput.py --data_path dataset/pretrain_data.csv
    python bench/pretrain_throughput.py --seq_len 2048 --batch_size 2
    python bench/pretrain_throughput.py --preset minimind-v1-moe --seconds 30

For a mixture of experts the first scheme has the original MiniMind's loop over them, and the last is a dense model with
as many active parameters.

Useful tokens are those that are not padding. All schemes train the same model on the same texts of --data_path, in turns in
one process, and the table gives ratios to the padded scheme: machines are noisy, and ratios of neighbouring measurements
less so.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from bench.throughput import (
    PaddedRows,
    Scheme,
    add_flags,
    compare,
    dense_equal,
    describe,
    model_config,
    original_model,
    packed_loss,
    padded_loss,
)
from common.cli import Parser  # noqa: E402
from common.errors import run_script
from common.files import ROOT
from data_pipeline.datasets import PackedRows
from data_pipeline.tokenize import tokenize_pretrain_data
from model.device import resolve_device, resolve_dtype
from model.model import Transformer, describe_parameters
from model.tokenizer import load_tokenizer


def main() -> None:
    parser = Parser(description=__doc__)
    add_flags(parser, ROOT / "dataset" / "pretrain_data.csv")
    args = parser.parse_args()
    config, device = model_config(args), resolve_device(args.device)
    dataset = tokenize_pretrain_data(args.data_path, load_tokenizer(), args.cache_dir)
    packed = PackedRows(dataset, np.arange(len(dataset)), config.max_seq_len, seed=0)
    padded = PaddedRows(dataset, config.max_seq_len)
    half = resolve_dtype("auto", device)
    name = str(half).removeprefix("torch.")

    def make_model() -> Transformer:
        return Transformer(config)

    schemes = [
        Scheme("padded, float32, eager", padded, padded_loss, lambda: original_model(config), args, torch.float32),
        Scheme("packed, float32, eager", packed, packed_loss, make_model, args, torch.float32),
        Scheme(f"packed, {name}, eager", packed, packed_loss, make_model, args, half),
        Scheme(f"packed, {name}, compiled", packed, packed_loss, make_model, args, half, compiled=True),
    ]
    if config.use_moe:
        dense = dense_equal(config)
        schemes.append(
            Scheme(
                f"dense, {name}, compiled", packed, packed_loss, lambda: Transformer(dense), args, half, compiled=True
            )
        )
    for model in (schemes[0].model, *([schemes[-1].model] if config.use_moe else [])):
        print(describe_parameters(model))
    print(describe(packed, config.max_seq_len, device))
    compare(schemes, config, args, half)


if __name__ == "__main__":
    run_script(main)
