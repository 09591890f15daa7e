"""`--fsdp`: parameters, gradients and optimizer state sharded over the processes, with PyTorch's FSDP2.

Every process keeps a shard of each tensor. The parameters of a layer are gathered just before it computes and freed
right after; gradients are summed and sharded in one operation (reduce-scatter).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from model.model import TransformerBlock
from trainer.distributed import DistEnv, all_reduce_sum
from trainer.optim import make_optimizers
from trainer.options import TrainOptions
from trainer.parallel.ddp import ParallelStrategy


class FSDPStrategy(ParallelStrategy):
    """Compute in the precision of the training loop's autocast; everything stored and sent is float32.

    `model` is sharded in place. Its weights may be mapped from a file: each process reads its shards.
    """

    def __init__(self, model: nn.Module, options: TrainOptions, dist_env: DistEnv, device: torch.device) -> None:
        self.dist_env, self.device = dist_env, device
        self.module: Any = model
        mesh = init_device_mesh(device.type, (dist_env.size,))
        for module in self.module.modules():
            if isinstance(module, TransformerBlock):
                fully_shard(module, mesh=mesh)
        fully_shard(self.module, mesh=mesh)
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # a sum, not a mean: the loss is already divided
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
                if device.type == "cpu":  # gathering the next layer in advance would only cost memory: nothing overlaps
                    module.set_modules_to_backward_prefetch([module])
        self.trainable_parameters: dict[str, Any] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizers = make_optimizers(model, options.optimizer, options.weight_decay, options.embedding_lr_scale)
        if options.compile:
            self.module.compile()

    def backward(self, loss: Tensor) -> None:
        # Gradients are summed and sharded in every backward pass: if only in the last one, each process would keep whole
        # gradients until then.
        loss.backward()

    def _norm(self, shards: list[Tensor]) -> float:
        return math.sqrt(all_reduce_sum(self.dist_env, [super()._norm(shards) ** 2], self.device)[0])
