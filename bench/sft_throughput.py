"""Measure useful tokens per second of SFT and LoRA, compared with one dialogue per row, padded, float32, eager.

    python bench/sft_throughput.py --data_path dataset/sft_data_single.csv
    python bench/sft_throughput.py --stages lora --preset minimind-v1 --rank 16

Useful tokens are those that are not padding, learned or not. The schemes of a stage train the same model on the same
dialogues of --data_path, in turns in one process, and the table gives ratios to the padded scheme: machines are noisy, and
ratios of neighbouring measurements less so.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from peft import PeftModel

from bench.throughput import PaddedRows, Scheme, add_flags, compare, describe, model_config, packed_loss, padded_loss
from common.cli import Parser  # noqa: E402
from common.errors import run_script
from common.files import ROOT
from data_pipeline.datasets import PackedRows
from data_pipeline.tokenize_chats import tokenize_chat_data
from model.device import resolve_device, resolve_dtype
from model.lora import add_adapter, trainable_share
from model.model import Transformer, describe_parameters
from model.tokenizer import load_tokenizer


def main() -> None:
    parser = Parser(description=__doc__)
    add_flags(parser, ROOT / "dataset" / "sft_data_single.csv")
    parser.add_argument("--stages", choices=["sft", "lora"], nargs="+", default=["sft", "lora"])
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapter (default: 8)")
    args = parser.parse_args()
    config, device = model_config(args), resolve_device(args.device)
    dataset = tokenize_chat_data(args.data_path, load_tokenizer(), args.cache_dir, max_tokens=config.max_seq_len)
    packed = PackedRows(dataset, np.arange(len(dataset)), config.max_seq_len, seed=0)
    padded = PaddedRows(dataset, config.max_seq_len)
    half = resolve_dtype("auto", device)
    name = str(half).removeprefix("torch.")
    print(describe(packed, config.max_seq_len, device))

    def whole_model() -> Transformer:
        return Transformer(config)

    def adapter() -> PeftModel:
        return add_adapter(Transformer(config), rank=args.rank, alpha=2.0 * args.rank, dropout=0.0)

    for stage, make_model in {"sft": whole_model, "lora": adapter}.items():
        if stage not in args.stages:
            continue
        schemes = [
            Scheme(f"{stage}: padded, float32, eager", padded, padded_loss, make_model, args, torch.float32),
            Scheme(f"{stage}: packed, {name}, eager", packed, packed_loss, make_model, args, half),
            Scheme(f"{stage}: packed, {name}, compiled", packed, packed_loss, make_model, args, half, compiled=True),
        ]
        model = schemes[0].model
        print(f"\n{stage}: {trainable_share(model) if isinstance(model, PeftModel) else describe_parameters(model)}")
        compare(schemes, config, args, half)


if __name__ == "__main__":
    run_script(main)
