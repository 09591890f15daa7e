"""`--fsdp`: parameters, gradients and optimizer state spread over the processes, with PyTorch's FSDP2.

Every process keeps a share of each tensor. A layer's parameters are brought together just before it computes and given
up again after it; gradients are summed and shared out in the same go.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model.model import TransformerBlock
from trainer.distributed import DistEnv, all_reduce_sum, broadcast_tensors
from trainer.optim import clip_gradients, gradient_norm, make_optimizers, set_learning_rate
from trainer.parallel.state import OptimizerState, TrainState, load_parameters, optimizer_state, restore_optimizer


class FullyShardedDataParallel:
    """See `trainer.parallel.strategy`.

    Computes in the precision of the loop's autocast; everything kept and sent is float32.
    """

    def __init__(self, model, options, dist_env: DistEnv, device: torch.device) -> None:
        self.plain, self.dist_env, self.device = model, dist_env, device  # `plain` stays on the CPU: for saving
        self.module = copy.deepcopy(model)
        mesh = init_device_mesh(device.type, (dist_env.size,))
        for module in self.module.modules():
            if isinstance(module, TransformerBlock):
                fully_shard(module, mesh=mesh)
        fully_shard(self.module, mesh=mesh)
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # a sum, not a mean: the loss is already divided
                module.set_force_sum_reduction_for_comms(True)  # the only kind that gloo has
        self.trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.optimizers = make_optimizers(self.module, options.optimizer, options.weight_decay)

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    def set_learning_rate(self, lr: float) -> None:
        set_learning_rate(self.optimizers, lr)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.module.set_requires_gradient_sync(last)
        loss.backward()

    def finish_backward(self) -> None:
        """Nothing is left to do: gradients are summed as backward goes."""

    def discard(self) -> None:
        self.module.zero_grad()

    def step(self, max_norm: float) -> float:
        shares = [p.grad.to_local() for p in self.trained.values() if p.grad is not None]
        norm = math.sqrt(all_reduce_sum(self.dist_env, [float(gradient_norm(shares)) ** 2], self.device)[0])
        clip_gradients(shares, norm, max_norm)
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
        self.module.zero_grad()
        return norm

    def may_skip_step(self) -> bool:
        return False

    def gather(self) -> TrainState:
        weights = {name: self._whole(p.detach()) for name, p in self.trained.items()}
        state = {
            name: {key: self._whole(value) for key, value in group.items()}
            for name, group in optimizer_state(self.trained, self.optimizers).items()
        }
        if not self.dist_env.is_main:
            return TrainState()
        load_parameters(self.plain, weights)
        return TrainState(weights, state)

    def restore(self, optimizer: OptimizerState, scaler: dict) -> None:
        def shares():
            for name, group in broadcast_tensors(self.dist_env, optimizer, self.device):
                like = self.trained[name]
                yield (
                    name,
                    {
                        key: distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
                        if value.shape == like.shape
                        else value
                        for key, value in group.items()
                    },
                )

        restore_optimizer(self.trained, self.optimizers, shares())

    def _whole(self, value: Tensor) -> Tensor | None:
        """A tensor put together from all processes, on the CPU of rank 0; nothing elsewhere."""
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return whole.cpu() if self.dist_env.is_main else None
