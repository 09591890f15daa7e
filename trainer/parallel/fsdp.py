"""`--fsdp`: parameters, gradients and optimizer state sharded over the processes, with PyTorch's FSDP2.

Every process keeps a shard of each tensor. The parameters of a layer are gathered just before it computes and freed
right after; gradients are summed and sharded in one operation (reduce-scatter).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model.model import TransformerBlock
from trainer.distributed import DistEnv, all_reduce_sum, broadcast_tensors
from trainer.optim import (
    OptimizerState,
    clip_gradients,
    gradient_norm,
    load_optimizer_state,
    load_parameters,
    make_optimizers,
    optimizer_state,
)
from trainer.options import TrainOptions
from trainer.parallel.ddp import ParallelStrategy, TrainState


class FSDPStrategy(ParallelStrategy):
    """Compute in the precision of the training loop's autocast; everything stored and sent is float32.

    Gradients are summed during the backward pass of the last micro-batch.
    """

    def __init__(self, model: nn.Module, options: TrainOptions, dist_env: DistEnv, device: torch.device) -> None:
        self.cpu_model, self.dist_env, self.device = model, dist_env, device  # cpu_model is for saving
        self.module: Any = copy.deepcopy(model)
        mesh = init_device_mesh(device.type, (dist_env.size,))
        for module in self.module.modules():
            if isinstance(module, TransformerBlock):
                fully_shard(module, mesh=mesh)
        fully_shard(self.module, mesh=mesh)
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # a sum, not a mean: the loss is already divided
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
        self.trainable_parameters: dict[str, Any] = {
            name: p for name, p in self.module.named_parameters() if p.requires_grad
        }
        self.optimizers = make_optimizers(self.module, options.optimizer, options.weight_decay)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.module.set_requires_gradient_sync(last)
        loss.backward()

    def step(self, max_norm: float) -> float:
        shards = [p.grad.to_local() for p in self.trainable_parameters.values() if p.grad is not None]
        norm = math.sqrt(all_reduce_sum(self.dist_env, [float(gradient_norm(shards)) ** 2], self.device)[0])
        clip_gradients(shards, norm, max_norm)
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
        self.module.zero_grad()
        return norm

    def state_dict(self) -> TrainState:
        weights = {name: self._gather(p.detach()) for name, p in self.trainable_parameters.items()}
        state = {
            name: {key: self._gather(value) for key, value in group.items()}
            for name, group in optimizer_state(self.trainable_parameters, self.optimizers).items()
        }
        if not self.dist_env.is_main:
            return TrainState()
        load_parameters(self.cpu_model, weights)
        return TrainState(weights, state)

    def load_state_dict(self, optimizer: OptimizerState, scaler: dict) -> None:
        def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
            for name, group in broadcast_tensors(self.dist_env, optimizer, self.device):
                like = self.trainable_parameters[name]
                yield (
                    name,
                    {
                        key: distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
                        if value.shape == like.shape
                        else value
                        for key, value in group.items()
                    },
                )

        load_optimizer_state(self.trainable_parameters, self.optimizers, shards())

    def _gather(self, value: Tensor) -> Tensor:
        """Return a tensor gathered from all processes, on the CPU of rank 0; elsewhere an empty one."""
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return whole.cpu() if self.dist_env.is_main else torch.empty(0)
