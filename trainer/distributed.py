"""The processes that train together. Alone, every function here does nothing and costs nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 64 << 20  # gradients are summed in flat pieces of about this size


@dataclass(frozen=True)
class World:
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_world(device_type: str) -> World:
    """Join the processes started by a launcher (torchrun sets RANK, WORLD_SIZE and LOCAL_RANK), or be alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    if device_type == "cuda":
        torch.cuda.set_device(world.local_rank)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    if not world.is_main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - one process speaks; errors of all are heard
    return world


def leave_world(world: World) -> None:
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def barrier(world: World) -> None:
    """Wait until every process has come here."""
    if world.size > 1:
        dist.barrier()


def sum_over_world(world: World, values: Iterable[float], device: torch.device) -> list[float]:
    """Each value summed over all processes, in double precision where the device has it."""
    values = list(values)
    if world.size == 1:
        return values
    dtype = torch.float32 if device.type == "mps" else torch.float64
    tensor = torch.tensor(values, dtype=dtype, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def share_parameters(world: World, model: nn.Module) -> None:
    """Give every process the parameters of rank 0."""
    if world.size > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter.data, src=0)


def sum_gradients(world: World, parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its sum over all processes.

    Called once a step, after the last micro-batch. A parameter that got no gradient here (an expert without tokens, a
    process without samples) takes part with zeros, so nobody waits for it.
    """
    if world.size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in parameters]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def _buckets(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
