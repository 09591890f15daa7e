"""`--deepspeed FILE`: optimizer state (ZeRO-1), gradients (2) and parameters (3) sharded over the processes.

The papers: https://arxiv.org/abs/1910.02054 (ZeRO), https://arxiv.org/abs/2101.06840 (offload to the CPU).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import atomic_folder
from model.moe import MoEFeedForward
from trainer.checkpoint import TrainingCheckpoint
from trainer.distributed import DistEnv, barrier, main_process_first
from trainer.optim import make_optimizers
from trainer.options import TrainOptions, read_zero_config
from trainer.parallel.ddp import ParallelStrategy, is_finite

TAG = "deepspeed"  # the folder of DeepSpeed's files in a training state


class DeepSpeedStrategy(ParallelStrategy):
    """Let DeepSpeed sum, clip and step, save and load; gradients are summed during every backward pass.

    `model` is changed in place: ZeRO-3 takes the parameters out of it. Its weights may be mapped from a file.

    state: what will be loaded; DeepSpeed has to know beforehand whether another number of processes wrote it.
    """

    format = "deepspeed"

    def __init__(
        self,
        model: nn.Module,
        options: TrainOptions,
        dist_env: DistEnv,
        device: torch.device,
        dtype: torch.dtype,
        state: TrainingCheckpoint | None,
    ) -> None:
        deepspeed = import_deepspeed(device)
        from deepspeed.utils import set_z3_leaf_modules

        config = complete_zero_config(options, dtype, dist_env.size)
        self.dist_env, self.zero = dist_env, deepspeed.zero
        self.stage = config["zero_optimization"]["stage"]
        self.universal = state is not None and state.run["settings"]["world_size"] != dist_env.size
        if state is not None:
            by_zero3 = any((state.path / TAG).glob("zero_*model_states.pt"))  # each process has weights of its own
            if by_zero3 != (self.stage == 3):
                saved = "with" if by_zero3 else "without"
                raise UserError(
                    f"cannot resume {state.path}: it was saved {saved} ZeRO-3, and can only be continued so"
                )
        config["checkpoint"] = {"load_universal": self.universal}
        if self.stage < 3:
            model.to(device)
        elif any(isinstance(part, MoEFeedForward) for part in model.modules()):
            # Processes may run different experts, in different orders. All of a layer's experts are gathered at once, so
            # that every process asks for the same parameters in the same order.
            set_z3_leaf_modules(model, [MoEFeedForward])
        optimizer, *others = make_optimizers(model, "adamw", options.weight_decay)
        if others:
            raise UserError(
                "a model with router_bias_rate needs a second optimizer, and DeepSpeed takes one: use --fsdp"
            )
        self.trainable_parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.module: Any
        self.module, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.optimizers = [optimizer]

    def train(self, mode: bool) -> None:
        self.module.train(mode)
        self.module.training = mode  # DeepSpeed's own wrapper keeps its mode, and loss functions ask the wrapper

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        self.module.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed takes the mean over processes (and would divide by the number of micro-batches); ours is a sum.
        self.module.backward(loss * self.dist_env.size, scale_wrt_gas=False)

    def step(self, max_norm: float) -> float:
        self.module.step()  # clips: its configuration has the maximum norm
        return float(self.module.get_global_grad_norm())

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.trainable_parameters.items():
            with self.zero.GatheredParameters(parameter, enabled=self.stage == 3):
                yield name, parameter.detach().clone()

    def non_finite(self) -> list[str]:
        if self.stage < 3:
            return super().non_finite()
        from deepspeed.utils import safe_get_local_fp32_param

        shards = ((name, safe_get_local_fp32_param(p)) for name, p in self.trainable_parameters.items())
        return [name for name, shard in shards if shard is not None and not is_finite(shard)]

    def save(self, folder: Path) -> None:
        self.module.save_checkpoint(str(folder), tag=TAG, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        tag = TAG
        load_only_tensors()
        if self.universal:
            tag = f".universal_{folder.name}"
            with main_process_first(self.dist_env, "converting the state"):
                if self.dist_env.is_main:
                    _convert_to_universal(folder / TAG, folder.parent / tag)
            folder = folder.parent
        path, _ = self.module.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
        if path is None:
            raise UserError(f"cannot resume {folder}: DeepSpeed finds no state in it")
        barrier(self.dist_env)
        if self.universal and self.dist_env.is_main:
            shutil.rmtree(folder / tag)
            (folder / "latest_universal").unlink(missing_ok=True)


def _convert_to_universal(source: Path, target: Path) -> None:
    """Convert DeepSpeed's files for any number of processes."""
    from deepspeed.checkpoint import ds_to_universal

    with atomic_folder(target) as tmp, contextlib.redirect_stdout(None):
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(source), output_folder=str(tmp), num_extract_workers=1, num_merge_workers=1,
                keep_temp_folder=False, strict=True, inject_missing_state=True,
            )
        )  # fmt: skip


def load_only_tensors() -> None:
    """Let this process load files that hold nothing but tensors and DeepSpeed's plain classes: others could run code."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # DeepSpeed asks for anything
    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])


def complete_zero_config(options: TrainOptions, dtype: torch.dtype, world_size: int) -> dict:
    """Return the file of --deepspeed with the values of the flags filled in, as `deepspeed.initialize` takes it."""
    assert options.deepspeed is not None
    config: dict[str, Any] = {"steps_per_print": 1_000_000_000, "zero_allow_untested_optimizer": True}
    config |= read_zero_config(options.deepspeed)
    for name in ("bf16", "fp16", "optimizer", "scheduler"):
        config.pop(name, None)
    config |= {
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_accumulation_steps": options.accumulation_steps,
        "train_batch_size": options.batch_size * options.accumulation_steps * world_size,
        "gradient_clipping": options.grad_clip,
    }
    # Weights stay float32 and products are computed in --dtype, as without DeepSpeed: the same run.
    config["torch_autocast"] = {"enabled": dtype != torch.float32, "dtype": str(dtype).removeprefix("torch.")}
    return config | {"zero_force_ds_cpu_optimizer": False}


def import_deepspeed(device: torch.device) -> ModuleType:
    """Import the library for this device, with its log reduced to warnings."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")  # it insists on one, also for a single process without a launcher
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"--deepspeed needs DeepSpeed, which cannot be imported ({error}): pip install -r requirements.txt (Linux "
            "only); --fsdp needs nothing more than PyTorch"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On a CPU it would compile a kernel for sums within one machine, and every process would wait for it (forever, if a
    # killed compiler left its lock behind). Without the kernel it uses gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
