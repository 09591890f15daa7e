"""The checks of bench/gpu_check.py: each a function that returns its figures, and raises where something is wrong.

Each runs in a process of its own, so nothing that one leaves behind (a broken CUDA context, memory, compiled code) reaches
another. Without a GPU they run at toy size: the same code, figures without meaning.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ("minimind-v1-small", "minimind-v1", "minimind-v1-moe")
TOY = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64)
STAGES = {  # script -> its data, further flags
    "1-pretrain.py": ("texts.jsonl", []),
    "3-full_sft.py": ("chats.jsonl", ["--init_from", "base.pth"]),
    "4-lora_sft.py": ("chats.jsonl", ["--init_from", "base.pth", "--merge"]),
    "5-dpo_train.py": ("pairs.jsonl", ["--init_from", "base.pth"]),
    "6-rlvr_train.py": (
        "prompts.jsonl",
        "--init_from base.pth --algorithm ppo --beta 0.1 --group_size 4 --max_new_tokens 16".split(),
    ),
    "7-distill.py": ("chats.jsonl", ["--init_from", "base.pth", "--teacher", "teacher.pth"]),
}
SEEING = {  # one after the other
    "8-pretrain_vlm.py": (ROOT / "dataset" / "sample" / "vlm_pretrain.parquet", ["--init_from", "base.pth"]),
    "9-sft_vlm.py": (ROOT / "dataset" / "sample" / "vlm_sft.parquet", []),
}
Figures = dict[str, Any]


class Skipped(Exception):
    """This machine cannot run a check; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where the checks run: the device, the number of processes that can train together, and a folder for files."""

    folder: Path
    device: str
    processes: int

    @property
    def toy(self) -> bool:
        return self.device == "cpu"


@dataclass(frozen=True)
class Check:
    """A check, whether nothing else may run beside it because it measures, and the seconds after which it has failed."""

    function: Callable[[Place], Figures]
    alone: bool = False
    timeout: float = 180.0


def expect(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


# ---- training with the scripts, as a user does


def prepare(place: Place) -> Figures:
    """Describe the machine; write random texts, chats and preference pairs, and a model to start from."""
    import random

    import torch

    from model.LMConfig import LMConfig, preset
    from model.model import Transformer
    from model.tokenizer import load_tokenizer, tokenizer_hash
    from model.weights_file import save_checkpoint

    rng = random.Random(0)
    words = "the cat saw a dog near 河 and 山 then slept until morning".split()

    def sentence(longest: int = 20) -> str:
        return " ".join(rng.choices(words, k=rng.randint(3, longest)))

    def write(name: str, rows: Iterator[dict]) -> None:
        (place.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    n = 200 if place.toy else 8000
    write("texts.jsonl", ({"text": sentence(20 if place.toy else 300)} for _ in range(n)))
    roles = ("user", "assistant")
    write("chats.jsonl", ({"messages": [{"role": r, "content": sentence()} for r in roles]} for _ in range(n)))
    write("pairs.jsonl", ({name: sentence() for name in ("prompt", "chosen", "rejected")} for _ in range(n // 4)))
    write("prompts.jsonl", ({"prompt": sentence(8), "verifier": "length=20"} for _ in range(n // 4)))
    config = LMConfig(**TOY) if place.toy else preset(PRESETS[0])
    info = {"stage": "full_sft", "step": 1, "tokenizer_hash": tokenizer_hash(load_tokenizer())}
    for seed, name in enumerate(("base", "teacher")):
        torch.manual_seed(seed)
        save_checkpoint(place.folder / f"{name}.pth", Transformer(config), info=info)
    if place.toy:
        return {"device": "cpu", "torch": torch.__version__}
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory
    return {
        "device": torch.cuda.get_device_name(), "GPUs": place.processes, "memory, GB": memory / 1e9,
        "capability": f"{major}.{minor}", "torch": torch.__version__, "CUDA": torch.version.cuda,
    }  # fmt: skip


def command_line(place: Place, script: str, out: Path, *more: object) -> list[str]:
    """Return a script's command line: a few steps on the prepared data, with `more` flags, of which the last counts."""
    data, flags = (STAGES | SEEING)[script]
    flags = [str(place.folder / flag) if flag.endswith(".pth") else flag for flag in flags]
    common = f"--device {place.device} --log_interval 1 --max_steps 4 --batch_size 8 --val_fraction 0".split()
    if script == "1-pretrain.py" and place.toy:
        flags += [text for name, value in TOY.items() for text in (f"--{name}", str(value))]
    files = ["--data_path", place.folder / data, "--cache_dir", place.folder / "cache", "--out_dir", out]
    return [script, *map(str, (*common, *flags, *files, *more))]


def run_here(command: list[str]) -> None:
    """Run a script in this process: the same code as in one of its own, without the seconds of a start."""
    with mock.patch.object(sys, "argv", command):
        try:
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        except SystemExit as end:
            expect(not end.code, f"{command[0]} exited with {end.code}")


def metrics(out: Path) -> list[dict]:
    """Return the lines that the run in `out` has logged."""
    lines = [json.loads(line) for line in next(out.glob("*.metrics.jsonl")).read_text().splitlines()]
    expect(bool(lines) and all(abs(line["loss"]) < 1e4 for line in lines), f"the losses are not sound: {lines}")
    return lines


def train(place: Place, script: str, name: str, *flags: object) -> list[dict]:
    """Train a few steps with a script; return what it logged."""
    out = place.folder / "runs" / re.sub(r"\W+", "_", name)
    run_here(command_line(place, script, out, *flags))
    expect(any(out.glob("*.pth")) or any(out.glob("lora_*/*.safetensors")), "no weights were written")
    return metrics(out)


def brief(lines: list[dict]) -> Figures:
    return {"loss": lines[-1]["loss"], "tokens/s": lines[-1]["tokens_per_second"], "GB": lines[-1]["memory_gb"]}


def stage(place: Place, script: str, *flags: object) -> Figures:
    return brief(train(place, script, " ".join(map(str, (script, *flags))), *flags))


def in_precision(place: Place, script: str, dtype: str) -> Figures:
    return stage(place, script, "--dtype", dtype)


def seeing(place: Place, dtype: str) -> Figures:
    """Learn to see, then to answer questions about images."""
    train(place, "8-pretrain_vlm.py", f"seeing {dtype}", "--dtype", dtype)
    weights = next((place.folder / "runs" / f"seeing_{dtype}").glob("*.pth"))
    return brief(train(place, "9-sft_vlm.py", f"seeing {dtype} sft", "--dtype", dtype, "--init_from", weights))


def moe_flags(place: Place) -> list[str]:
    return ["--use_moe"] if place.toy else ["--preset", "minimind-v1-moe"]


def mixture(place: Place, *flags: object) -> Figures:
    return stage(place, "1-pretrain.py", *moe_flags(place), *flags)


def same_losses(found: list[dict], expected: list[dict]) -> Figures:
    """Compare the losses of two runs over the same samples: they may differ by the rounding of bfloat16, 2^-8."""
    expect(len(found) == len(expected), f"{len(found)} steps instead of {len(expected)}")
    worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, expected, strict=True))
    expect(worst < 2**-8, f"the losses differ by a relative {worst:.2g}")
    return {"largest relative difference of the loss": worst}


def resume(place: Place) -> Figures:
    """Continue from the state in the middle of a run: the second half must be that of the run itself."""
    expected = train(place, "1-pretrain.py", "resume", "--save_interval", 2)
    out = place.folder / "runs" / "resume"
    state = next(out.glob("*.resume/step_*2"))
    run_here(command_line(place, "1-pretrain.py", out, "--save_interval", 2, "--resume", state))
    return same_losses(metrics(out), expected)


@contextlib.contextmanager
def little_memory(place: Place, room: float) -> Iterator[None]:
    """Leave `room` bytes of the GPU's memory free. On a CPU pretend that more than two rows do not fit."""
    import torch

    from model.model import Transformer

    if place.toy:
        forward = Transformer.forward

        def fails(model: Transformer, input_ids: Any = None, **inputs: Any) -> Any:
            if len(input_ids) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return forward(model, input_ids, **inputs)

        with mock.patch.object(Transformer, "forward", fails):
            yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(int(free - room), dtype=torch.uint8, device="cuda")
    yield
    del ballast
    torch.cuda.empty_cache()


def auto_batch(place: Place) -> Figures:
    """Run out of memory with the rows of a step at once; --auto_batch must continue with the same samples."""
    expected = train(place, "1-pretrain.py", "small batches", "--accumulation_steps", 16)
    output = place.folder / "auto_batch.txt"
    with little_memory(place, 3e9), output.open("w+") as file, contextlib.redirect_stdout(file):
        found = train(place, "1-pretrain.py", "auto_batch", "--batch_size", 128, "--auto_batch")
    rows = re.findall(r"out of memory with (\d+) rows at once", output.read_text())
    expect(bool(rows), "the memory was enough: nothing was tested")
    return {"did not fit": ", ".join(rows)} | same_losses(found, expected)


# ---- several processes


def one_process_group(place: Place) -> Figures:
    """Sum over a group of one process, and compare the gradients of DistributedDataParallel with the model's own."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    backend = "gloo" if place.toy else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    ones = torch.ones(1000, device=place.device)
    dist.all_reduce(ones)
    expect(bool((ones == 1).all()), "a sum over one process changes the values")
    model, batch = small_model(place), rows(place, 4, model_length(place))
    plain = gradients(model, batch, place)
    wrapped = gradients(DistributedDataParallel(model), batch, place)
    dist.destroy_process_group()
    return {"backend": backend} | close(wrapped, plain, torch.bfloat16)


def launched(place: Place, *flags: object, optimizer: str = "muon") -> Figures:
    """Train with torchrun, a process per GPU: the losses must be those of one process over the same samples."""
    if place.processes == 1 and not flags:
        raise Skipped("one GPU: nothing is distributed")
    name = re.sub(r"\W+", "_", f"launched {' '.join(map(str, flags))}")
    expected = train(place, "1-pretrain.py", f"{name} alone", "--optimizer", optimizer)
    out, n = place.folder / "runs" / name, max(n for n in (1, 2, 4, 8) if n <= place.processes)
    command = command_line(place, "1-pretrain.py", out, "--batch_size", 8 // n, "--timeout", 120, *flags)
    command += ["--optimizer", optimizer]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    subprocess.run([*launcher, *command], cwd=ROOT, check=True)
    return {"processes": n} | same_losses(metrics(out), expected)


def deepspeed(place: Place, stage: int) -> Figures:
    if importlib.util.find_spec("deepspeed") is None:
        raise Skipped("deepspeed is not installed")
    return launched(place, "--deepspeed", ROOT / "configs" / f"zero{stage}.json", optimizer="adamw")


# ---- kernels against their references


def close(found: Any, expected: Any, dtype: Any) -> Figures:
    """Compare lists of tensors by the norm of their difference, relative to that of the expected ones.

    Each number was rounded to `dtype` some ten times one after another on its way: the errors add up as independent ones.
    """
    import torch

    bound = 4 * torch.finfo(dtype).eps * 10**0.5
    a, b = (torch.cat([x.detach().double().flatten() for x in tensors]) for tensors in (found, expected))
    relative = float((a - b).norm() / b.norm())
    expect(relative <= bound, f"the relative difference is {relative:.2g}, more than rounding explains ({bound:.2g})")
    return {"relative difference": relative}


def varlen(place: Place, dtype: str) -> Figures:
    """Compare attention in packed rows, and its gradients, with the reference path in float32."""
    import torch

    from model.attention import _has_flash_kernel, varlen_attention
    from model.LMConfig import LMConfig, preset

    torch.manual_seed(0)
    half = getattr(torch, dtype)
    bounds = [0, 1, 130, 512, 700, 1024]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=place.device)
    figures: Figures = {}
    presets = map(preset, PRESETS[:1] if place.toy else PRESETS[:2])
    for config in (*presets, LMConfig(dim=320)):  # 20 channels of a head are no multiple of 8: no kernel takes them
        shapes = [(2, 512, heads, config.head_dim) for heads in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
        inputs = [torch.randn(shape, device=place.device).to(half).requires_grad_() for shape in shapes]
        found = varlen_attention(*inputs, cu_seqlens)
        exact = [x.detach().float().requires_grad_() for x in inputs]
        expected = varlen_attention(*exact, cu_seqlens, flash=False)
        gradient = torch.randn_like(expected).to(half)
        found.backward(gradient)
        expected.backward(gradient.float())
        label = f"head dimension {config.head_dim}"
        figures |= {label: close([found], [expected], half)["relative difference"]}
        pairs = [(a.grad, b.grad) for a, b in zip(inputs, exact, strict=True)]
        figures |= {f"{label}, gradient": close(*zip(*pairs, strict=True), half)["relative difference"]}
    kernel = _has_flash_kernel(torch.empty(1, 32, device=place.device, dtype=half))
    return figures | {"kernel": "flash, variable length" if kernel else "none for this device"}


def grouped_experts(place: Place) -> Figures:
    """Compare the experts' grouped products, and their gradients, with one expert after another in float32."""
    import torch

    from model.LMConfig import preset
    from model.moe import MoEFeedForward

    torch.manual_seed(0)
    moe = MoEFeedForward(preset("minimind-v1-moe", **({"dim": 64} if place.toy else {}))).to(place.device).train()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x = torch.randn(4, 512, moe.gate.weight.shape[1], device=place.device).bfloat16().float().requires_grad_()
    valid = torch.rand(4, 512, device=place.device) > 0.1

    def run(half: bool, grouped: bool) -> list:
        moe.zero_grad()
        x.grad = None
        with (
            torch.autocast(place.device, torch.bfloat16, enabled=half),
            mock.patch.object(moe, "_can_group", lambda tokens: grouped),
        ):
            out = moe(x, valid)[0]
        out.float().square().sum().backward()
        return [out.detach(), x.grad, *(p.grad.clone() for name, p in moe.named_parameters() if "gate" not in name)]

    with torch.autocast(place.device, torch.bfloat16):
        if not moe._can_group(x.flatten(0, 1)):
            raise Skipped("this device has no kernel for it: one expert is computed after the other")
    return close(run(half=True, grouped=True), run(half=False, grouped=False), torch.bfloat16)


def no_synchronisation(place: Place) -> Figures:
    """Let CUDA raise an error if forward or backward of a training step waits for the device."""
    import torch

    if place.toy:
        raise Skipped("only a GPU computes asynchronously")
    grouped = torch.cuda.get_device_capability()[0] == 9  # see model/moe.py: elsewhere experts wait for their counts
    for use_moe in (False, True) if grouped else (False,):
        model, batch = small_model(place, use_moe), rows(place, 8, model_length(place))
        gradients(model, batch, place)  # the first call loads kernels
        torch.cuda.set_sync_debug_mode("error")
        gradients(model, batch, place)
        torch.cuda.set_sync_debug_mode("default")
    return {"models": "dense, mixture of experts" if grouped else "dense"}


def small_model(place: Place, use_moe: bool = False) -> Any:
    import torch

    from model.LMConfig import LMConfig, preset
    from model.model import Transformer

    torch.manual_seed(0)
    config = LMConfig(**TOY, use_moe=use_moe) if place.toy else preset(PRESETS[2 if use_moe else 0])
    return Transformer(config).to(place.device).train()


def model_length(place: Place) -> int:
    return TOY["max_seq_len"] if place.toy else 512


def gradients(model: Any, batch: Any, place: Place) -> list:
    import torch

    from trainer.losses import next_token_loss

    for parameter in model.parameters():
        parameter.grad = None
    with torch.autocast(place.device, torch.bfloat16):
        loss_sum, n_targets, _ = next_token_loss(model, batch)
    (loss_sum / n_targets).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def rows(place: Place, n: int, seq_len: int) -> Any:
    return packed_rows(n, seq_len).batch(range(n)).to(torch_device(place))


def torch_device(place: Place) -> Any:
    import torch

    return torch.device(place.device)


def packed_rows(n: int, seq_len: int) -> Any:
    """Return at least `n` rows of random tokens, packed from documents of 130 tokens on average, as Chinese web text has."""
    import numpy as np

    from data_pipeline.datasets import PackedRows
    from data_pipeline.tokenize import TokenizedDataset

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.exponential(130, n * seq_len // 80 + 8), 2, None).astype(np.int64)
    offsets = np.concatenate([[0], lengths.cumsum()])
    tokens = rng.integers(3, 6400, offsets[-1]).astype(np.uint16)
    hashes = np.arange(len(lengths)).astype(np.uint64)
    dataset = TokenizedDataset(tokens, None, offsets, lengths, hashes, "random", {})
    packed = PackedRows(dataset, np.arange(len(lengths)), seq_len, seed=0)
    expect(len(packed) >= n, f"only {len(packed)} rows")
    return packed


# ---- speed


def matrix_peak(place: Place) -> Figures:
    """Measure the FLOP/s of a large bfloat16 product: the share of the data sheet's peak that any program can reach."""
    import torch

    from model.device import peak_flops

    n = 256 if place.toy else 8192
    a, b = (torch.randn(n, n, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    best = min(seconds(place, lambda: [a @ b for _ in range(10)]) for _ in range(4)) / 10
    found = 2 * n**3 / best
    peak = peak_flops(torch_device(place), torch.bfloat16)
    return {"TFLOP/s": found / 1e12} | ({"of the data sheet": f"{found / peak:.0%}"} if peak else {})


def seconds(place: Place, work: Callable[[], object]) -> float:
    import torch

    def synchronise() -> None:
        if not place.toy:
            torch.cuda.synchronize()

    synchronise()
    started = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - started


def best_batch(place: Place, name: str) -> int:
    """Return how many rows at once train fastest, eager, and 1% faster than half as many."""

    from model.device import is_out_of_memory
    from model.LMConfig import LMConfig, preset
    from model.model import Transformer

    config = LMConfig(**TOY) if place.toy else preset(name)
    model = Transformer(config).to(place.device).train()

    def rate(n: int) -> float:
        batch = rows(place, n, config.max_seq_len)
        gradients(model, batch, place)
        return n / min(seconds(place, lambda: gradients(model, batch, place)) for _ in range(3))

    rates = {1: 0.0}
    for n in (8, 16) if place.toy else (8, 16, 32, 64, 128, 256, 512):
        try:
            rates[n] = rate(n)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        if rates[n] < 1.01 * max(list(rates.values())[:-1]):
            break
    return max(rates, key=lambda n: rates[n])


def memory(place: Place, preset: str) -> Figures:
    """Compare the peak memory of a training step with what bench/memory.py computes: at most a tenth may differ."""
    import torch

    from bench.memory import Step, computed_peak, make_batch, start, train
    from model.model import Transformer

    figures: Figures = {}
    for length, n, checkpointing in ((512, 16, False), (2048, 4, False), (2048, 4, True)):
        step = Step(TOY if place.toy else {"preset": preset, "max_seq_len": length}, n, checkpointing)
        computed, device = computed_peak(step), torch_device(place)
        label = f"{n} rows of {length}{', checkpointing' if checkpointing else ''}"
        figures[f"{label}: computed, GB"] = computed / 1e9
        if place.toy:
            continue
        strategy, batch = start(Transformer(step.config), step, device), make_batch(step).to(device)
        train(strategy, batch, step)
        torch.cuda.reset_peak_memory_stats()
        train(strategy, batch, step)
        measured = torch.cuda.max_memory_allocated()
        del strategy, batch
        gc.collect()
        measured -= torch.cuda.memory_allocated()  # workspaces of cuBLAS, which stay
        figures[f"{label}: measured / computed"] = ratio = measured / computed
        expect(0.9 < ratio < 1.1, f"{label}: {measured / 1e9:.3g} GB instead of {computed / 1e9:.3g}")
    return figures


def mfu(place: Place, preset: str) -> Figures:
    """Train with --compile at the best batch, as a user does; return the last log line's figures."""
    import torch

    batch = best_batch(place, preset)
    if not place.toy:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    flags = ["--use_moe"] if "moe" in preset else []
    if not place.toy:
        flags = ["--preset", preset, "--compile"]
    steps = 3 if place.toy else 40
    flags += ["--batch_size", batch, "--max_steps", steps, "--log_interval", 1 if place.toy else 10]
    lines = train(place, "1-pretrain.py", f"mfu {preset}", *flags, "--num_workers", 2)
    return {"rows": batch} | brief(lines) | ({"mfu": lines[-1]["mfu"]} if "mfu" in lines[-1] else {})


def cuda_graphs(place: Place) -> Figures:
    """Compare greedy decoding through the compiled step (CUDA graphs) with the model itself, in float32."""
    import torch

    from inference.backends import choose_backend
    from inference.generator import generate
    from inference.options import SamplingParams
    from model.LMConfig import LMConfig, preset
    from model.model import Transformer

    torch.manual_seed(0)
    given = dict(initializer_range=0.1)
    config = LMConfig(**TOY, **given) if place.toy else preset(PRESETS[0], **given)
    model = Transformer(config).to(place.device).eval()
    prompts = [[1, *range(100 + i, 110 + 2 * i)] for i in range(4)]

    def decode(backend: Any) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in prompts]
        for token in generate(model, prompts, SamplingParams(max_new_tokens=24), eos_id=None, backend=backend):
            found[token.key].append(token.token)
        return found

    expected = decode(None)
    expect(decode(choose_backend(model, compile="on")) == expected, "the tokens differ")
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    expect(not skipped, f"{skipped} CUDA graphs were not recorded")
    return {"equal tokens": sum(map(len, expected))}


def serving(place: Place) -> Figures:
    """Answer requests of several lengths at the same time, as the server does, compiled and not: as one at a time."""
    import asyncio

    import torch

    from inference.backends import choose_backend
    from inference.generator import BatchGenerator, generate
    from inference.options import SamplingParams
    from model.LMConfig import LMConfig, preset
    from model.model import Transformer
    from serving.engine import Engine

    torch.manual_seed(0)
    given = dict(initializer_range=0.1)
    config = LMConfig(**TOY, **given) if place.toy else preset(PRESETS[0], **given)
    model = Transformer(config).to(place.device).eval()
    prompts = [[1, *range(100, 100 + config.max_seq_len * i // 8)] for i in range(1, 6)]
    samplings = [SamplingParams(max_new_tokens=4 * i) for i in range(1, 6)]

    async def answer_all(compile: str) -> list[list[int]]:
        engine = Engine(lambda: BatchGenerator(model, 3, eos_id=None, backend=choose_backend(model, compile=compile)))
        engine.start()

        async def answer(prompt: list[int], sampling: SamplingParams) -> list[int]:
            async with engine.submit([prompt], [sampling]) as stream:
                return [output.token async for outputs in stream for _, output in outputs]

        found = await asyncio.gather(*map(answer, prompts, samplings))
        await engine.close(drain_seconds=30)
        return found

    expected = [
        [output.token for output in generate(model, [prompt], sampling, eos_id=None)]
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    for compile in ("off", "on"):
        expect(asyncio.run(answer_all(compile)) == expected, f"--compile {compile}: the tokens differ")
    return {"equal tokens": sum(map(len, expected))}


def decoding(place: Place, name: str) -> Figures:
    """Measure tokens per second of greedy decoding in bfloat16, eager and compiled; and of the compiled step alone."""
    import torch

    from inference.backends import choose_backend
    from inference.generator import generate
    from inference.options import SamplingParams
    from model.LMConfig import LMConfig, preset
    from model.model import Transformer

    config = LMConfig(**TOY) if place.toy else preset(name)
    model = Transformer(config).to(place.device, torch.bfloat16).eval()
    new_tokens = 32 if place.toy else 256
    compiled = choose_backend(model, compile="on")
    figures: Figures = {}
    for n in (1, 16):
        prompts = [[1, *range(100, 115)]] * n

        def run(backend: Any, prompts: list[list[int]] = prompts) -> None:
            for _ in generate(model, prompts, SamplingParams(max_new_tokens=new_tokens), eos_id=None, backend=backend):
                pass

        for label, backend in (("eager", None), ("compiled", compiled)):
            run(backend)  # compiles, records the graphs
            took = min(seconds(place, partial(run, backend)) for _ in range(3))
            figures[f"batch {n}, {label}, tokens/s"] = n * new_tokens / took
    return figures


CHECKS: dict[str, Check] = {
    "data and a model": Check(prepare),
    **{f"varlen attention {dtype}": Check(partial(varlen, dtype=dtype)) for dtype in ("bfloat16", "float16")},
    "experts in groups": Check(grouped_experts),
    "no synchronisation": Check(no_synchronisation),
    "pretrain --compile": Check(lambda place: stage(place, "1-pretrain.py", "--compile")),
    "pretrain moe --compile": Check(lambda place: mixture(place, "--compile")),
    **{
        f"{script.removesuffix('.py')} {dtype}": Check(partial(in_precision, script=script, dtype=dtype))
        for script in STAGES
        for dtype in ("bfloat16", "float16")
    },
    **{f"{', '.join(SEEING)} {dtype}": Check(partial(seeing, dtype=dtype)) for dtype in ("bfloat16", "float16")},
    "pretrain moe bfloat16": Check(lambda place: mixture(place, "--dtype", "bfloat16")),
    "pretrain moe float16": Check(lambda place: mixture(place, "--dtype", "float16")),
    "pretrain --optimizer adamw": Check(lambda place: stage(place, "1-pretrain.py", "--optimizer", "adamw")),
    "pretrain --gradient_checkpointing": Check(lambda place: stage(place, "1-pretrain.py", "--gradient_checkpointing")),
    "resume": Check(resume),
    "process group, DDP": Check(one_process_group),
    "torchrun": Check(launched),
    "torchrun --fsdp": Check(lambda place: launched(place, "--fsdp")),
    "torchrun --fsdp --compile": Check(lambda place: launched(place, "--fsdp", "--compile")),
    **{f"torchrun --deepspeed zero{n}": Check(partial(deepspeed, stage=n)) for n in (2, 3)},
    "decoding: compiled equals eager": Check(cuda_graphs),
    "serving": Check(serving),
    "7-distill --on_policy": Check(lambda place: stage(place, "7-distill.py", "--on_policy", "--max_new_tokens", 16)),
    **{f"memory {name}": Check(partial(memory, preset=name)) for name in PRESETS},
    "--auto_batch": Check(auto_batch, alone=True),
    "matrix product": Check(matrix_peak, alone=True),
    **{f"decoding {name}": Check(partial(decoding, name=name), alone=True) for name in PRESETS[:2]},
    **{f"mfu {name}": Check(partial(mfu, preset=name), alone=True, timeout=240) for name in PRESETS},
}
