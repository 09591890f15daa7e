"""How a step's gradient becomes new weights: alone or in several processes. The loop knows nothing else about it.

Three engines keep one contract. `DataParallel` is here: one process, or several that all hold the whole model (data
parallel). `trainer.parallel.fsdp` spreads the parameters over the processes with PyTorch's FSDP2,
`trainer.parallel.zero` with DeepSpeed.

    engine.module                     what a loss function calls; its parameters may be spread over the processes
    engine.train(mode)                whether to train or to validate
    engine.set_learning_rate(lr)
    engine.backward(loss, last)       adds the gradient of a part of the step's loss; `last`: no other part follows
    engine.finish_backward()          waits until gradients are summed; also where a backward pass broke off
    engine.discard()                  forgets the gradients instead of stepping
    norm = engine.step(max_norm)      sums over processes, clips, updates; leaves the weights alone if norm is not finite
    engine.gather()                   -> Snapshot: whole tensors on the CPU of rank 0; every process has to call it
    engine.restore(optimizer, scaler) the inverse, for what is not in the weights

All processes make the same calls: where parameters are spread, a forward pass needs every process. The losses given to
`backward` add up, over calls and over processes, to the loss of the step. A snapshot does not say which engine made it:
a run can be resumed with another one, and with another number of processes.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.distributed import DistEnv, GradientSum, broadcast_tensors
from trainer.optim import clip_gradients, gradient_norm, make_optimizers, set_learning_rate
from trainer.options import TrainOptions
from trainer.parallel.state import OptimizerState, TrainState, optimizer_state, restore_optimizer


class ParallelStrategy(Protocol):
    """See the top of the file."""

    module: nn.Module

    def train(self, mode: bool) -> None: ...

    def set_learning_rate(self, lr: float) -> None: ...

    def backward(self, loss: Tensor, last: bool) -> None: ...

    def finish_backward(self) -> None: ...

    def discard(self) -> None: ...

    def step(self, max_norm: float) -> float: ...

    def may_skip_step(self) -> bool:
        """Whether a norm that is not finite only means that a step was skipped (float16, until no scale is left)."""
        ...

    def gather(self) -> TrainState: ...

    def restore(self, optimizer: OptimizerState, scaler: dict) -> None: ...


def make_strategy(
    model: nn.Module, options: TrainOptions, dist_env: DistEnv, device: torch.device, dtype: torch.dtype
) -> ParallelStrategy:
    """The engine that the flags ask for. `model` has the weights to start from, the same on every process.

    After `gather` the model of rank 0 has the trained weights again, whatever the engine trains.
    """
    if (options.deepspeed is not None or options.fsdp) and not dist.is_initialized():  # these want a group, even alone
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if options.deepspeed is not None:
        from trainer.parallel.zero import DeepSpeedZero

        return DeepSpeedZero(model, options, dist_env, device, dtype)
    if options.fsdp:
        from trainer.parallel.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, options, dist_env, device)
    return DataParallel(model, options, dist_env, device, dtype)


class DataParallel:
    """Every process holds the whole model; gradients are summed once a step."""

    def __init__(self, model, options, dist_env, device, dtype) -> None:
        self.module, self.dist_env, self.device = model.to(device), dist_env, device
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizers = make_optimizers(model, options.optimizer, options.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.gradients = GradientSum(list(self.trained.values())) if dist_env.size > 1 else None

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    def set_learning_rate(self, lr: float) -> None:
        set_learning_rate(self.optimizers, lr)

    def backward(self, loss: Tensor, last: bool) -> None:
        if last and self.gradients is not None:
            self.gradients.begin()
        self.scaler.scale(loss).backward()

    def finish_backward(self) -> None:
        if self.gradients is not None:
            self.gradients.finish()

    def discard(self) -> None:
        if self.gradients is not None:
            self.gradients.zero()
        else:
            self.module.zero_grad()

    def step(self, max_norm: float) -> float:
        self.finish_backward()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = float(gradient_norm(gradients))
        clip_gradients(gradients, norm, max_norm)
        if self.scaler.is_enabled() or math.isfinite(norm):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
        self.discard()
        return norm

    def may_skip_step(self) -> bool:
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def gather(self) -> TrainState:
        if not self.dist_env.is_main:
            return TrainState()
        weights = {name: p.detach() for name, p in self.trained.items()}
        return TrainState(weights, optimizer_state(self.trained, self.optimizers), self.scaler.state_dict())

    def restore(self, optimizer: OptimizerState, scaler: dict) -> None:
        restore_optimizer(self.trained, self.optimizers, broadcast_tensors(self.dist_env, optimizer, self.device))
        self.scaler.load_state_dict(scaler)
