"""Parallel strategies: data parallelism, FSDP and ZeRO behind one interface; imported by the training loop only."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from trainer.checkpoint import TrainingCheckpoint
from trainer.distributed import DistEnv
from trainer.options import TrainOptions
from trainer.parallel.ddp import DDPStrategy, ParallelStrategy


def make_strategy(
    model: nn.Module,
    options: TrainOptions,
    dist_env: DistEnv,
    device: torch.device,
    dtype: torch.dtype,
    state: TrainingCheckpoint | None,
) -> ParallelStrategy:
    """Return the parallel strategy that the flags ask for.

    Args:
        model: has the starting weights, the same in all processes.
        state: what will be loaded into it.
    """
    if not options.fsdp and options.deepspeed is None:
        return DDPStrategy(model, options, dist_env, device, dtype)
    if not dist.is_initialized():  # both need a process group, also for a single process
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if options.fsdp:
        from trainer.parallel.fsdp import FSDPStrategy

        return FSDPStrategy(model, options, dist_env, device)
    from trainer.parallel.zero import DeepSpeedStrategy  # loads deepspeed, which not every system has

    return DeepSpeedStrategy(model, options, dist_env, device, dtype, state)
