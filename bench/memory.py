"""Compute how much memory a training step needs on a GPU, without a GPU; and how many rows at once fit.

    python bench/memory.py                          # peak by preset, context length and rows at once
    python bench/memory.py --gpu_gb 8               # the largest --batch_size that fits into 8 GB, per preset and context
    python bench/memory.py --measure                # steps on this machine's CPU: measured beside computed

The step is that of the training loop in bfloat16, eager: forward, loss, backward, clipping, optimizer. It runs on tensors
without data (PyTorch's FakeTensorMode), along the code that a GPU takes, and the sizes of all tensors that exist at a time
are added up as CUDA's allocator counts them, in blocks of 512 bytes. That is the figure `mem` of the log. What a GPU needs
beyond it is --reserved_gb: the CUDA context, the libraries' workspaces, and gaps between blocks. --compile needs less.

--measure runs real steps, each in a process of its own, and reads the peak of the memory that the process has taken from
the system, less what it had before it made the model. The computed figure beside it follows the code that a CPU takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from bench.parallel_memory import PeakMemory  # noqa: E402
from common.cli import Parser  # noqa: E402
from common.errors import run_script  # noqa: E402
from data_pipeline.datasets import Batch  # noqa: E402
from model.architecture import PRESETS as ALL_PRESETS  # noqa: E402
from model.attention import _varlen_attention_cuda  # noqa: E402
from model.device import DTYPES  # noqa: E402
from model.LMConfig import LMConfig, preset  # noqa: E402
from model.model import Transformer  # noqa: E402
from trainer.distributed import DistEnv  # noqa: E402
from trainer.losses import next_token_loss  # noqa: E402
from trainer.options import TrainOptions  # noqa: E402
from trainer.parallel.ddp import DDPStrategy  # noqa: E402

PRESETS = ("minimind-v1-small", "minimind-v1", "minimind-v1-moe")
CONTEXTS = (512, 1024, 2048, 4096, 8192)
DOCUMENT = 128  # tokens of a document; a row holds as many as fit
BLOCK = 512  # bytes: CUDA's allocator rounds every tensor up to a multiple
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Step:
    """A training step: the model (fields of LMConfig), rows at once, and flags of the training loop."""

    model: dict[str, Any]
    rows: int
    gradient_checkpointing: bool = False
    dtype: str = "bfloat16"
    optimizer: str = "adamw"

    @property
    def config(self) -> LMConfig:
        fields = dict(self.model)
        name = fields.pop("preset", None)
        return preset(name, **fields) if name else LMConfig(**fields)


class MemoryTracker(TorchDispatchMode):
    """Add up the sizes of all tensors made inside this mode, until nothing refers to their memory; `peak`: the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.known.add(storage._cdata)
        weakref.finalize(storage, self._free, storage._cdata, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def computed_peak(step: Step, gpu: bool = True) -> int:
    """Return the peak of a step in bytes, along the code that a GPU takes, or a CPU.

    The tensors without data stand on the CPU all the same: a PyTorch built for CPUs only has no gradients of others.
    """
    patches = [
        # Neither may wait for a value: there is none. While compiling, the loss does not count its targets either.
        mock.patch("trainer.parallel.ddp.gradient_norm", lambda gradients: 1.0),
        mock.patch("torch.compiler.is_compiling", lambda: True),
        mock.patch.object(Transformer, "to", lambda model, device: model),  # it is there, and has no data to move
    ]
    if gpu:
        patches.append(mock.patch("model.model.varlen_attention", _attention_as_on_a_gpu))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        with torch.device("meta"):
            model = Transformer(step.config)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        tracker = stack.enter_context(MemoryTracker())
        give_memory(model)
        strategy = start(model, step)
        tracker.peak = 0
        train(strategy, make_batch(step), step)
        return tracker.peak


def _attention_as_on_a_gpu(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, **_: Any) -> Tensor:
    heads = (x.flatten(0, 1) for x in (q, k, v))
    return _varlen_attention_cuda(*heads, cu_seqlens, q.shape[1]).view_as(q)


def give_memory(model: nn.Module) -> None:
    """Replace the parameters of a model on the meta device by uninitialised ones."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # by parameter, because some are tied
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty(parameter.shape))
                module._parameters[name] = made[parameter]


def start(model: Transformer, step: Step, device: torch.device = CPU) -> DDPStrategy:
    """Return what trains the model, with the optimizer's state in place, as after the first step."""
    options = TrainOptions(optimizer=step.optimizer, gradient_checkpointing=step.gradient_checkpointing)
    if step.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    strategy = DDPStrategy(model.train(), options, DistEnv(), device, DTYPES[step.dtype])
    strategy.set_learning_rate(0.0)
    for parameter in strategy.trainable_parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    strategy.step(1.0)
    return strategy


def make_batch(step: Step) -> Batch:
    """Return rows full of documents, as `PackedRows.batch` does."""
    length = step.config.max_seq_len
    shape = (step.rows, length)
    ids = torch.full(shape, 5)
    labels = torch.full(shape, 5)
    positions = (torch.arange(length) % DOCUMENT).expand(shape).contiguous()
    inputs = {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": torch.ones_like(ids)}
    inputs["cu_seqlens"] = torch.arange(0, step.rows * length + 1, min(DOCUMENT, length), dtype=torch.int32)
    n = step.rows * length
    return Batch(inputs, n, n, n * DOCUMENT)


def train(strategy: DDPStrategy, batch: Batch, step: Step) -> None:
    """Do one step of the training loop."""
    device = batch.inputs["input_ids"].device
    with torch.autocast(device.type, dtype=DTYPES[step.dtype], enabled=step.dtype != "float32"):
        loss_sum, n_targets, _ = next_token_loss(strategy.module, batch)
        strategy.backward(loss_sum / n_targets)
    strategy.step(1.0)


def largest_batch(model: dict[str, Any], budget: float, gradient_checkpointing: bool) -> int:
    """Return the most rows at once with which a step stays within `budget` bytes; 0: not even one."""

    def peak(rows: int) -> int:
        return computed_peak(Step(model, rows, gradient_checkpointing))

    fits, used = 1, peak(1)
    if used > budget:
        return 0
    while (needed := peak(2 * fits)) <= budget:
        fits, used = 2 * fits, needed
    too_many = 2 * fits
    while too_many - fits > 1:  # between them the peak grows almost linearly
        guess = fits + int((budget - used) / (needed - used) * (too_many - fits))
        guess = min(max(guess, fits + 1), too_many - 1)
        now = peak(guess)
        if now <= budget:
            fits, used = guess, now
        else:
            too_many, needed = guess, now
    return fits


# ---- measuring on the CPU


def worker(step: Step) -> None:
    """Do real steps; print the peak of this process's own memory beyond what it had before the model."""
    watch = PeakMemory()
    torch.ones(64, 64) @ torch.ones(64, 64)
    watch.start()
    time.sleep(0.1)
    before = watch.peak["own"]
    strategy = start(Transformer(step.config), step)
    batch = make_batch(step)
    for _ in range(2):
        train(strategy, batch, step)
    time.sleep(0.02)
    print(json.dumps({"peak": watch.peak["own"] - before}))


def measured_peak(step: Step) -> int:
    # The C library would keep freed tensors for reuse, and they would count as used.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--worker", json.dumps(asdict(step))]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])["peak"]


# ---- tables


def names(model: dict[str, Any]) -> str:
    return f"{model['preset']} | {model['max_seq_len']:,}"


def settings(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], bool]]:
    for name in args.presets:
        for context in args.contexts:
            for checkpointing in (False, True):
                yield {"preset": name, "max_seq_len": context}, checkpointing


def peaks(args: argparse.Namespace) -> None:
    print(f"| preset | context | --gradient_checkpointing | {' | '.join(f'{n} rows, GB' for n in args.rows)} |")
    print(f"|---|---|---|{'---|' * len(args.rows)}")
    for model, checkpointing in settings(args):
        cells = [f"{computed_peak(Step(model, n, checkpointing)) / 1e9:.2f}" for n in args.rows]
        print(f"| {names(model)} | {'yes' if checkpointing else 'no'} | {' | '.join(cells)} |", flush=True)


def largest(args: argparse.Namespace) -> None:
    budget = (args.gpu_gb - args.reserved_gb) * 1e9
    print(
        f"The largest --batch_size on a GPU with {args.gpu_gb:g} GB, of which {args.reserved_gb:g} GB are not for tensors:\n"
    )
    print("| preset | context | rows | with --gradient_checkpointing |\n|---|---|---|---|")
    for name in args.presets:
        for context in args.contexts:
            model = {"preset": name, "max_seq_len": context}
            found = [largest_batch(model, budget, checkpointing) for checkpointing in (False, True)]
            print(f"| {names(model)} | {' | '.join(str(n or 'none') for n in found)} |", flush=True)


def comparison(args: argparse.Namespace) -> None:
    print("| preset | context | --gradient_checkpointing | rows | computed, MB | measured, MB | measured / computed |")
    print("|---|---|---|---|---|---|---|")
    for model, checkpointing in settings(args):
        step = Step(model, args.rows[0], checkpointing)
        computed, measured = computed_peak(step, gpu=False), measured_peak(step)
        cells = f"{step.rows} | {computed / 1e6:,.0f} | {measured / 1e6:,.0f} | {measured / computed:.2f}"
        print(f"| {names(model)} | {'yes' if checkpointing else 'no'} | {cells} |", flush=True)


def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--gpu_gb", type=float, help="memory of the GPU in GB (10^9 bytes)")
    add("--reserved_gb", type=float, default=0.8, help="of which are not for tensors (default: 0.8)")
    add("--presets", nargs="+", choices=[*ALL_PRESETS], default=[*PRESETS])
    add("--contexts", nargs="+", type=int, default=[*CONTEXTS], help="tokens in a row (default: 512 to 8192)")
    add("--rows", nargs="+", type=int, help="rows at once (default: 1, 8 and 32; with --measure 1)")
    add("--measure", action="store_true", help="measure steps on this machine's CPU")
    add("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.gpu_gb is not None and args.gpu_gb <= args.reserved_gb:
        parser.error(f"--gpu_gb {args.gpu_gb:g} must be more than --reserved_gb {args.reserved_gb:g}")
    args.rows = args.rows or ([1] if args.measure else [1, 8, 32])
    if args.worker:
        worker(Step(**args.worker))
    elif args.measure:
        comparison(args)
    elif args.gpu_gb is not None:
        largest(args)
    else:
        peaks(args)


if __name__ == "__main__":
    run_script(main)
