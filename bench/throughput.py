"""Share the parts of the throughput comparisons: the padded baseline, a training scheme, and the table of ratios."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from common.files import ROOT
from data_pipeline.datasets import Batch, PackedRows
from data_pipeline.packing import sample_order
from data_pipeline.tokenize import TokenizedDataset
from model.architecture import PRESETS
from model.device import peak_flops, resolve_device
from model.LMConfig import LMConfig, preset
from model.model import Transformer, parameter_counts, training_flops
from model.moe import MoEFeedForward
from trainer.losses import next_token_loss
from trainer.optim import make_optimizers


def add_flags(parser: argparse.ArgumentParser, data_path: Path) -> None:
    """Add the flags of every throughput comparison."""
    parser.add_argument("--data_path", type=Path, nargs="+", default=[data_path])
    parser.add_argument("--preset", choices=[*PRESETS], default="minimind-v1-small")
    parser.add_argument("--seq_len", type=int, help="tokens in a row (default: the preset's max_seq_len)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch_size", type=int, default=8, help="rows per step (default: 8)")
    parser.add_argument("--seconds", type=float, default=15, help="seconds per scheme and round (default: 15)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of every scheme (default: 3)")
    parser.add_argument("--cpu_time", action="store_true", help="count CPU time: on a machine that others use, too")
    parser.add_argument("--cache_dir", type=Path, default=ROOT / "out" / "cache")


def model_config(args: argparse.Namespace) -> LMConfig:
    """Return the model of --preset, for rows of --seq_len tokens."""
    return preset(args.preset, **({"max_seq_len": args.seq_len} if args.seq_len else {}))


def dense_equal(config: LMConfig) -> LMConfig:
    """Return a dense model with as many active parameters as this mixture of experts (less the routers')."""
    width = config.hidden_dim * (config.n_shared_experts + config.num_experts_per_tok)
    return LMConfig(**(config.own_fields() | dict(use_moe=False, hidden_dim=width)))


class MaskedExperts(MoEFeedForward):
    """Experts one after another, each with a mask over all pairs of token and choice, as in the original MiniMind."""

    def _route(
        self, tokens: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, _: torch.Tensor
    ) -> torch.Tensor:
        pairs = tokens.repeat_interleave(chosen.shape[1], dim=0)  # (tokens * k, dim)
        out, expert_of = torch.empty_like(pairs), chosen.flatten()
        for i, expert in enumerate(self.experts):
            out[expert_of == i] = expert(pairs[expert_of == i])
        return (out.unflatten(0, weights.shape) * weights[..., None]).sum(dim=1)


def original_model(config: LMConfig) -> Transformer:
    """Return a model whose experts, if it has any, compute as the original's."""
    model = Transformer(config)
    for layer in model.layers:
        if isinstance(layer.feed_forward, MoEFeedForward):
            layer.feed_forward.__class__ = MaskedExperts
    return model


class PaddedRows:
    """One document per row, cut or padded to the row length, as in the original MiniMind."""

    def __init__(self, dataset: TokenizedDataset, seq_len: int) -> None:
        self.dataset, self.seq_len = dataset, seq_len

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Sequence[int]) -> Batch:
        ids = np.zeros((len(indices), self.seq_len), np.int64)
        labels = np.full_like(ids, -100)
        lengths = np.zeros(len(indices), np.int64)
        for row, i in enumerate(indices):
            tokens = self.dataset.document(i)[: self.seq_len].astype(np.int64)
            begin, n = int(self.dataset.offsets[i]), len(tokens)
            ids[row, :n], lengths[row] = tokens, n
            learned = tokens[1:]
            if self.dataset.loss_mask is not None:
                learned = np.where(self.dataset.loss_mask[begin + 1 : begin + n], learned, -100)
            labels[row, 1:n] = learned
        inputs = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        return Batch(inputs, int((labels != -100).sum()), int(lengths.sum()), int((lengths**2).sum()))


def padded_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Compute cross entropy over materialised logits, as the original does."""
    logits = model(input_ids=batch.inputs["input_ids"], use_cache=False).logits
    targets = batch.inputs["labels"][:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum")


def packed_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return next_token_loss(model, batch)[0]


class Scheme:
    """A training scheme with its own model and optimizer, run a few steps at a time.

    make_model: returns the model to train, the same at every call.
    """

    def __init__(
        self,
        name: str,
        rows: PaddedRows | PackedRows,
        loss: Callable[[nn.Module, Batch], torch.Tensor],
        make_model: Callable[[], Transformer | PeftModel],
        args: argparse.Namespace,
        dtype: torch.dtype,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.name, self.rows, self.loss, self.dtype, self.compiled = name, rows, loss, dtype, compiled
        self.device = resolve_device(args.device)
        self.model = make_model().to(self.device).train()
        if compiled:
            self.model.compile()
        self.optimizers = make_optimizers(self.model, "adamw", 0.1)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.batch_size = args.batch_size
        self.clock = time.process_time if args.cpu_time else time.perf_counter
        self.order = sample_order(len(rows), seed=0, epoch=0).tolist()
        self.next = 0
        self.rates: list[float] = []
        self.flops: list[float] = []  # per second; not for adapters: frozen weights need fewer, and their number varies

    def step(self) -> tuple[int, int]:
        # In random order, as in training: neighbours in the file or in the packing have similar lengths.
        batch = self.rows.batch([self.order[(self.next + i) % len(self.order)] for i in range(self.batch_size)])
        self.next += self.batch_size
        batch = batch.to(self.device)
        if self.compiled:
            torch._dynamo.maybe_mark_dynamic(batch.inputs["cu_seqlens"], 0)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(self.model, batch)
        (loss / batch.n_targets).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-4
            optimizer.step()
            optimizer.zero_grad()
        return batch.n_tokens, batch.attention_pairs

    def measure(self, seconds: float) -> None:
        self._synchronise()
        start, tokens, pairs = self.clock(), 0, 0
        while self.clock() - start < seconds:
            n, p = self.step()
            tokens, pairs = tokens + n, pairs + p
        self._synchronise()
        elapsed = self.clock() - start
        self.rates.append(tokens / elapsed)
        if isinstance(self.model, Transformer):
            config = self.model.config
            active = parameter_counts(self.model)["active"]
            self.flops.append(training_flops(config, active, tokens, pairs) / elapsed)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def matrix_flops(rows: int, inner: int, columns: int, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Return the FLOP/s of this CPU's product of (rows, inner) and (inner, columns), the best of some."""
    x, weight = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = clock()
        F.linear(x, weight)
        seconds.append(clock() - start)
    return 2 * rows * inner * columns / min(seconds)


def compare(schemes: Sequence[Scheme], config: LMConfig, args: argparse.Namespace, half: torch.dtype) -> None:
    """Measure the schemes in turns and print a table; ratios are to the first scheme in the same round.

    MFU is the share of the peak in half precision. No data sheet gives that of a CPU: there it is the rate of the fastest of
    the model's matrix products, which are measured in every round, too.
    """
    device = schemes[0].device
    sizes = [(config.dim, config.dim), (config.dim, config.hidden_dim), (config.hidden_dim, config.dim)]
    shapes: dict[tuple[int, int, int], list[float]] = {
        (args.batch_size * config.max_seq_len, *size): [] for size in [*sizes, (config.dim, config.vocab_size)]
    }
    for scheme in schemes:
        for _ in range(2):  # warm up, compile
            scheme.step()
    for _ in range(args.rounds):
        for scheme in schemes:
            scheme.measure(args.seconds)
        for shape, rates in shapes.items() if device.type == "cpu" else ():
            rates.append(matrix_flops(*shape, half, schemes[0].clock))
    base = schemes[0].rates
    peak = peak_flops(device, half)
    if device.type == "cpu":
        medians = {shape: statistics.median(rates) for shape, rates in shapes.items()}
        products = ", ".join(f"{a:,} x {b:,} x {c:,}: {rate / 1e9:,.0f}" for (a, b, c), rate in medians.items())
        print(f"\nmatrix products, GFLOP/s: {products}")
        peak = max(medians.values())
    print(f"\n{'scheme':32} {'useful tok/s':>12} {'ratio to the first (each round)':>36} {'MFU':>7}")
    for scheme in schemes:
        ratios = [rate / other for rate, other in zip(scheme.rates, base, strict=True)]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        mfu = f"{statistics.median(scheme.flops) / peak:.1%}" if peak and scheme.flops else "n/a"
        words = f"{statistics.median(ratios):.2f} ({each})"
        print(f"{scheme.name:32} {statistics.median(scheme.rates):12,.0f} {words:>36} {mfu:>7}")


def describe(packed: PackedRows, seq_len: int, device: torch.device) -> str:
    return f"rows of {seq_len}: packed {packed.packing.fill:.1%} full; {os.cpu_count()} CPUs, {device}"
