"""Compare what the same minutes of training from nothing give: bits per byte on held-out texts.

    python bench/loss_per_minute.py --data_path dataset/pretrain_data.csv
    python bench/loss_per_minute.py --data_path dataset/pretrain_data.csv --minutes 2 --rounds 3
    python bench/loss_per_minute.py --data_path dataset/pretrain_data.csv --nanochat ../nanochat
    python bench/loss_per_minute.py --only ours --ours "--optimizer adamw" "--batch_size 32 --compile"
    python bench/loss_per_minute.py --only ours --ours=--compile             # a flag alone needs the sign

original       one text per row, padded; float32, AdamW 2e-4, as in the original MiniMind
transformers   its Llama of the same size on the same rows; bfloat16 where the hardware has it, AdamW 1e-3
ours           1-pretrain.py with nothing but the files and the end of the run, and once more with each --ours
nanochat       its model of 8 layers and 512 channels, its optimizer, schedule and tokenizer, trained on these texts, in the
               same precision as ours (clone it yourself, and name the folder)

Every contestant trains for --minutes, without the time for tokenizing, and its learning-rate schedule ends with the time:
those of the first kind look at the clock, 1-pretrain.py gets as many steps as a short trial before promises. The time that
compilation takes counts. Bits per byte are those of whole texts: each is scored alone, after its own start token, in pieces
of 512 tokens that overlap by one. The contestants take turns, --rounds times, with other seeds; the table has medians, and
the range.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonlines
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.throughput import PaddedRows, padded_loss
from common.cli import Parser  # noqa: E402
from common.errors import UserError, run_script
from common.files import ROOT
from data_pipeline.datasets import PackedRows
from data_pipeline.packing import sample_order
from data_pipeline.readers import iter_records
from data_pipeline.tokenize import tokenize_pretrain_data
from evaluation.runs import read_metrics
from model.device import resolve_device, resolve_dtype
from model.LMConfig import preset
from model.model import Transformer
from model.tokenizer import BOS_ID, encode_text, load_tokenizer
from model.weights import load_checkpoint
from trainer.optim import BETAS, get_lr
from trainer.recipe import best_batch

SEQ_LEN, ROWS = 512, 32  # of the contestants that are not ours: rows in an optimizer step
TRIAL_STEPS = 12  # of 1-pretrain.py, to know how long one takes

Logits = Callable[[Tensor], Tensor]  # ids (1, time) -> logits (time, vocab)


@dataclass
class Trained:
    """A trained model, as the scoring needs it."""

    logits: Logits
    encode: Callable[[str], list[int]]  # with the start token, without an end token
    tokens: int
    seconds: float


@torch.no_grad()
def bits_per_byte(trained: Trained, texts: Sequence[str]) -> float:
    nats = 0.0
    for text in texts:
        ids = trained.encode(text)
        for begin in range(0, len(ids) - 1, SEQ_LEN - 1):
            piece = torch.tensor([ids[begin : begin + SEQ_LEN]])
            nats += float(F.cross_entropy(trained.logits(piece)[:-1].float(), piece[0, 1:], reduction="sum"))
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def train_until(
    seconds: float,
    step: Callable[[int], tuple[Tensor, int]],
    optimizers: Sequence[torch.optim.Optimizer],
    schedule: Callable[[int, float, dict], None],
) -> tuple[int, float]:
    """Train until the time is over; return the tokens seen and the seconds.

    step: does forward and backward of step n; returns the loss and the number of tokens.
    schedule: sets what changes in a group of an optimizer, given the number of the step and the share of the time that
        is over.
    """
    start, tokens, n = time.perf_counter(), 0, 0
    while (elapsed := time.perf_counter() - start) < seconds:
        loss, n_tokens = step(n)
        if not math.isfinite(value := loss.detach().item()):
            raise UserError(f"the loss of step {n + 1} is {value}")
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                schedule(n, elapsed / seconds, group)
            optimizer.step()
            optimizer.zero_grad()
        tokens, n = tokens + n_tokens, n + 1
    return tokens, time.perf_counter() - start


def cosine(peak: float) -> Callable[[int, float, dict], None]:
    def schedule(step: int, progress: float, group: dict) -> None:
        group["lr"] = get_lr(int(progress * 1000), 1000, peak, warmup_steps=50)

    return schedule


def batches(rows: PackedRows | PaddedRows, seed: int) -> Iterator:
    order = sample_order(len(rows), seed, 0).tolist()
    for begin in range(0, len(order) - ROWS, ROWS):
        yield rows.batch(order[begin : begin + ROWS])
    raise UserError("the texts are too few for the time: every contestant may see each of them once")


# ---- the contestants: (file with the texts to train on, seconds, seed, a folder for files) -> Trained


def original(path: Path, seconds: float, seed: int, folder: Path, args: argparse.Namespace) -> Trained:
    tokenizer, device = load_tokenizer(), resolve_device(args.device)
    dataset = tokenize_pretrain_data([path], tokenizer, folder / "cache")
    torch.manual_seed(seed)
    model = Transformer(preset("minimind-v1-small")).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    source = batches(PaddedRows(dataset, SEQ_LEN), seed)

    def step(n: int) -> tuple[Tensor, int]:
        batch = next(source).to(device)
        loss = padded_loss(model, batch) / batch.n_targets
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss, batch.n_tokens

    tokens, spent = train_until(seconds, step, [optimizer], cosine(2e-4))
    return Trained(logits_of(model, device), our_encode(), tokens, spent)


def transformers(path: Path, seconds: float, seed: int, folder: Path, args: argparse.Namespace) -> Trained:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, device = load_tokenizer(), resolve_device(args.device)
    dataset = tokenize_pretrain_data([path], tokenizer, folder / "cache")
    rows = PackedRows(dataset, np.arange(len(dataset)), SEQ_LEN, seed)
    size, dtype = preset("minimind-v1-small"), resolve_dtype("auto", device)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocab_size, hidden_size=size.dim, intermediate_size=size.hidden_dim,
        num_hidden_layers=size.n_layers, num_attention_heads=size.n_heads, num_key_value_heads=size.n_kv_heads,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=BETAS, weight_decay=0.1)
    source = batches(rows, seed)

    def step(n: int) -> tuple[Tensor, int]:
        batch = next(source).to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            # Documents in a row see each other, as in most training with this library.
            loss = model(input_ids=batch.inputs["input_ids"], labels=batch.inputs["labels"]).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss, batch.n_tokens

    tokens, spent = train_until(seconds, step, [optimizer], cosine(1e-3))
    return Trained(logits_of(model, device), our_encode(), tokens, spent)


def ours(flags: str) -> Callable[..., Trained]:
    def run(path: Path, seconds: float, seed: int, folder: Path, args: argparse.Namespace) -> Trained:
        def pretrain(out: Path, *more: object) -> list[dict]:
            files = ["--data_path", path, "--out_dir", out, "--cache_dir", folder / "cache"]
            others = ["--seed", seed, "--device", args.device, *shlex.split(flags), *more]
            command = [str(x) for x in (sys.executable, "1-pretrain.py", *files, *others)]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            return read_metrics(next(out.glob("*.metrics.jsonl")))

        chosen = "--batch_size" not in flags  # by the length of the run; the trial is shorter
        trial_flags = ["--batch_size", 8] if chosen else []
        trial = pretrain(folder / "trial", "--max_steps", TRIAL_STEPS, "--log_interval", 1, *trial_flags)
        rate = statistics.median(line["tokens_per_second"] for line in trial[1:])
        compiling = max(trial[0]["tokens"] * (1 / trial[0]["tokens_per_second"] - 1 / rate), 0.0)
        tokens = rate * (seconds - compiling)
        per_step = best_batch(tokens=tokens) if chosen else trial[-1]["tokens"] / TRIAL_STEPS
        lines = pretrain(folder / "run", "--max_steps", max(round(tokens / per_step), 1))
        model = load_checkpoint(next((folder / "run").glob("*.pth"))).model
        seen = int(lines[-1]["tokens"])
        return Trained(logits_of(model, torch.device("cpu")), our_encode(), seen, seconds_of([{"tokens": 0}, *lines]))

    return run


def nanochat(path: Path, seconds: float, seed: int, folder: Path, args: argparse.Namespace) -> Trained:
    """Follow its scripts/base_train.py of 2026: rows filled by best fit, its scaling of rates and its schedules."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    for name in ("rustbpe", "tiktoken"):  # its tokenizer's libraries; the pattern is all that is needed
        sys.modules.setdefault(name, ModuleType(name))
    sys.path.insert(0, str(args.nanochat))
    # It takes bfloat16 on GPUs only, unless it is told to.
    os.environ.setdefault("NANOCHAT_DTYPE", str(resolve_dtype("auto", resolve_device(args.device))).split(".")[1])
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.tokenizer import SPLIT_PATTERN

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.train_from_iterator(
        texts_of([path]),
        trainers.BpeTrainer(
            vocab_size=6400, special_tokens=["<|bos|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )  # fmt: skip

    def encode(text: str) -> list[int]:
        return [0, *tokenizer.encode(text).ids]

    device, micro_batch, per_step = resolve_device(args.device), 8, ROWS * SEQ_LEN
    torch.manual_seed(seed)
    model = GPT(GPTConfig(SEQ_LEN, 6400, n_layer=8, n_head=4, n_kv_head=4, n_embd=512, window_pattern="L")).to(device)
    model.init_weights()
    compiled = torch.compile(model, dynamic=False)
    counts = model.num_scaling_params()
    # Its reference is a model of 12 layers and 768 channels, trained with 2^19 tokens a step.
    size = (12 * 12 * 768**2 + 768 * 6400) / (counts["transformer_matrices"] + counts["lm_head"])
    scale = (per_step / 2**19) ** 0.5
    optimizer = model.setup_optimizer(
        unembedding_lr=0.008 * scale, embedding_lr=0.3 * scale, scalar_lr=0.5 * scale, matrix_lr=0.02 * scale,
        weight_decay=(weight_decay := 0.28 * scale * size),
    )  # fmt: skip
    source = best_fit_rows(list(texts_of([path])), encode, seed)

    def step(n: int) -> tuple[Tensor, int]:
        total = torch.zeros(())
        for _ in range(ROWS // micro_batch):
            rows = torch.tensor([next(source) for _ in range(micro_batch)], device=device)
            loss = compiled(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) * (micro_batch / ROWS)
            loss.backward()
            total += loss.detach().cpu()
        return total, per_step

    def schedule(n: int, progress: float, group: dict) -> None:
        steps = max(n / max(progress, 1e-3), n + 1)  # as many as the time promises
        left = (steps - n) / (0.65 * steps)  # of the last 65%, in which the rate falls
        rate = (n + 1) / 40 if n < 40 else min(1.0, left + (1 - left) * 0.05)
        group["lr"] = group["initial_lr"] * rate
        if group["kind"] == "muon":
            warm = min(n / 400, 1)
            group["momentum"] = 0.85 + 0.12 * warm if n < 400 else 0.97 - 0.07 * max(1 - left, 0)
            group["weight_decay"] = weight_decay * 0.5 * (1 + math.cos(math.pi * progress))

    tokens, spent = train_until(seconds, step, [optimizer], schedule)
    model.eval()
    return Trained(lambda ids: model(ids.to(device))[0].cpu(), encode, tokens, spent)


def best_fit_rows(texts: list[str], encode: Callable[[str], list[int]], seed: int) -> Iterator[list[int]]:
    """Yield rows of SEQ_LEN + 1 tokens: the longest document of a thousand that fits, again and again, then a cut one."""
    random.Random(seed).shuffle(texts)
    waiting: list[list[int]] = []
    while True:
        row: list[int] = []
        while (room := SEQ_LEN + 1 - len(row)) > 0:
            while len(waiting) < 1000 and texts:
                waiting.append(encode(texts.pop()))
            fitting = [i for i, ids in enumerate(waiting) if len(ids) <= room]
            if fitting:
                best = max(fitting, key=lambda i: len(waiting[i]))
            else:
                best = min(range(len(waiting)), key=lambda i: len(waiting[i]))
            row += waiting.pop(best)[:room]
        yield row


def logits_of(model: nn.Module, device: torch.device) -> Logits:
    model.eval()
    return lambda ids: model(input_ids=ids.to(device)).logits[0].cpu()


def our_encode() -> Callable[[str], list[int]]:
    tokenizer = load_tokenizer()
    return lambda text: [BOS_ID, *encode_text(tokenizer, text)]


def seconds_of(lines: Sequence[dict]) -> float:
    """Return the seconds of training between the first line of metrics and the last."""
    pairs = zip(lines, lines[1:], strict=False)
    return sum((line["tokens"] - before["tokens"]) / line["tokens_per_second"] for before, line in pairs)


def texts_of(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        for record in iter_records(path, on_bad=lambda row: None):
            if text := record.data.get("text"):
                yield text


def split_texts(args: argparse.Namespace, folder: Path) -> tuple[Path, list[str]]:
    """Write the texts to train on to a file; return it, and those held out. Which are held out depends on their content."""
    held_out: list[str] = []
    path = folder / "train.jsonl"
    with jsonlines.open(path, "w") as writer:
        for text in texts_of(args.data_path):
            if int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 == 0 and len(held_out) < args.held_out:
                held_out.append(text)
            else:
                writer.write({"text": text})
    return path, held_out


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--data_path", type=Path, nargs="+", default=[ROOT / "dataset" / "pretrain_data.csv"])
    parser.add_argument("--minutes", type=float, default=6.0, help="training time of each contestant (default: 6)")
    parser.add_argument("--rounds", type=int, default=1, help="turns of every contestant (default: 1)")
    parser.add_argument("--held_out", type=int, default=300, help="number of texts that are scored (default: 300)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ours", nargs="+", default=[], metavar="FLAGS", help="more runs of 1-pretrain.py, with flags")
    parser.add_argument("--nanochat", type=Path, metavar="DIR", help="folder with a clone of nanochat")
    parser.add_argument(
        "--only", nargs="+", choices=["original", "transformers", "ours", "nanochat"], help="only these contestants"
    )
    args = parser.parse_args()
    contestants: dict[str, Callable[..., Trained]] = {"original": original, "transformers": transformers}
    contestants |= {f"ours {flags}".strip(): ours(flags) for flags in ["", *args.ours]}
    if args.nanochat:
        contestants["nanochat"] = nanochat
    if args.only:
        contestants = {name: run for name, run in contestants.items() if name.split()[0] in args.only}
    results: dict[str, list[tuple[float, int, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path, held_out = split_texts(args, Path(folder))
        print(f"{args.minutes:g} minutes each; scored on {len(held_out)} texts", flush=True)
        for turn in range(args.rounds):
            for i, (name, run) in enumerate(contestants.items()):
                own = Path(folder) / f"{turn} {i}"
                trained = run(path, args.minutes * 60, turn + 1, own, args)
                results.setdefault(name, []).append((bits_per_byte(trained, held_out), trained.tokens, trained.seconds))
                bpb, tokens, seconds = results[name][-1]
                print(
                    json.dumps({"name": name, "bits_per_byte": bpb, "tokens": tokens, "seconds": seconds}), flush=True
                )
    print("\n| contestant | tokens/s | tokens seen | bits per byte (range) |\n|---|---|---|---|")
    for name, turns in results.items():
        bits, seen = [turn[0] for turn in turns], [turn[1] for turn in turns]
        rate = statistics.median(tokens / seconds for _, tokens, seconds in turns)
        spread = f" ({min(bits):.3f} to {max(bits):.3f})" if len(turns) > 1 else ""
        print(f"| {name} | {rate:,.0f} | {statistics.median(seen):,.0f} | {statistics.median(bits):.3f}{spread} |")


if __name__ == "__main__":
    run_script(main)
