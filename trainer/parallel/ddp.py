"""Parallel strategies turn the gradient of a step into new weights; the training loop knows nothing else about them.

`ParallelStrategy` is their contract, `DDPStrategy` the simplest one: every process holds the whole model.
`trainer.parallel.fsdp` shards parameters, gradients and optimizer state over the processes with PyTorch's FSDP2,
`trainer.parallel.zero` with DeepSpeed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.distributed import DistEnv, broadcast_tensors
from trainer.optim import (
    OptimizerState,
    clip_gradients,
    gradient_norm,
    load_optimizer_state,
    make_optimizers,
    optimizer_state,
)
from trainer.options import TrainOptions

BUCKET_BYTES = 32 << 20  # gradients are summed in flat buckets of about this size


@dataclass
class TrainState:
    """Everything that training changed, in whole tensors by parameter name, whichever strategy trained them.

    So a run can be resumed with another strategy, and with another number of processes.

    Attributes:
        weights: trainable parameters, float32.
        optimizer: the optimizer's state of each of them.
        scaler: state of the gradient scaler (float16).
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: OptimizerState = field(default_factory=dict)
    scaler: dict = field(default_factory=dict)


class ParallelStrategy:
    """Train a model in one or several processes. What is here is the same in all strategies, or may be overridden.

    All processes make the same calls: where parameters are sharded, a forward pass needs every process. The losses given
    to `backward` add up, over calls and over processes, to the loss of the step.

    module: what a loss function calls; its parameters may be sharded over the processes.
    """

    module: nn.Module
    optimizers: list[torch.optim.Optimizer]

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    def set_learning_rate(self, lr: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of one part of the step's loss; `last`: no other part follows."""
        raise NotImplementedError

    def finish_backward(self) -> None:
        """Wait until all gradients are summed, also after a backward pass that failed."""

    def zero_grad(self) -> None:
        self.module.zero_grad()

    def step(self, max_norm: float) -> float:
        """Clip the gradients and update the weights; return the norm. If it is not finite, the weights stay."""
        raise NotImplementedError

    def may_skip_step(self) -> bool:
        """Return whether a norm that is not finite is normal (float16, until the scale cannot be lowered further)."""
        return False

    def state_dict(self) -> TrainState:
        """Return the state on the CPU of rank 0, where the model gets the trained weights too; elsewhere an empty one.

        Every process has to call it.
        """
        raise NotImplementedError

    def load_state_dict(self, optimizer: OptimizerState, scaler: dict) -> None:
        """Load what `state_dict` returned, except the weights: the model had them when the strategy was created."""
        raise NotImplementedError


class DDPStrategy(ParallelStrategy):
    """Data parallel: every process holds the whole model, and gradients are summed once a step. Also for one process."""

    def __init__(
        self, model: nn.Module, options: TrainOptions, dist_env: DistEnv, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.module, self.dist_env, self.device = model.to(device), dist_env, device
        self.trainable_parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizers = make_optimizers(model, options.optimizer, options.weight_decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.reducer = GradientReducer([*self.trainable_parameters.values()]) if dist_env.size > 1 else None

    def backward(self, loss: Tensor, last: bool) -> None:
        if last and self.reducer is not None:
            self.reducer.begin()
        self.scaler.scale(loss).backward()

    def finish_backward(self) -> None:
        if self.reducer is not None:
            self.reducer.finish()

    def zero_grad(self) -> None:
        if self.reducer is not None:
            self.reducer.zero()
        else:
            self.module.zero_grad()

    def step(self, max_norm: float) -> float:
        self.finish_backward()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in self.trainable_parameters.values() if p.grad is not None]
        norm = float(gradient_norm(gradients))
        clip_gradients(gradients, norm, max_norm)
        if self.scaler.is_enabled() or math.isfinite(norm):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
        self.zero_grad()
        return norm

    def may_skip_step(self) -> bool:
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def state_dict(self) -> TrainState:
        if not self.dist_env.is_main:
            return TrainState()
        weights = {name: p.detach() for name, p in self.trainable_parameters.items()}
        optimizer = optimizer_state(self.trainable_parameters, self.optimizers)
        return TrainState(weights, optimizer, self.scaler.state_dict())

    def load_state_dict(self, optimizer: OptimizerState, scaler: dict) -> None:
        states = broadcast_tensors(self.dist_env, optimizer, self.device)
        load_optimizer_state(self.trainable_parameters, self.optimizers, states)
        self.scaler.load_state_dict(scaler)


class GradientReducer:
    """Sum gradients over all processes while the last micro-batch of a step is still in its backward pass.

    Gradients are views of flat buckets, so nothing is copied. Buckets hold the parameters from the last to the first,
    about the order in which a backward pass reaches them, and are summed in that order on every process. Which values
    are summed together never changes, so that a restarted run gets bit-identical sums.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.buckets: list[Tensor] = []
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._sizes: list[int] = []
        self._missing: list[int] = []  # gradients that each bucket still waits for
        self._works: list[dist.Work] = []
        self._active = False
        for bucket in _split_into_buckets(list(reversed(parameters))):
            numbers = [parameter.numel() for parameter in bucket]
            flat = torch.zeros(sum(numbers), dtype=bucket[0].dtype, device=bucket[0].device)
            for parameter, piece in zip(bucket, flat.split(numbers), strict=True):
                parameter.grad = piece.view_as(parameter)
                parameter.register_post_accumulate_grad_hook(self._on_gradient)
                self._bucket_of[parameter] = len(self.buckets)
            self.buckets.append(flat)
            self._sizes.append(len(bucket))

    def begin(self) -> None:
        """Sum every bucket as soon as it is complete: the next backward pass is the last of the step."""
        self._missing, self._active = list(self._sizes), True

    def finish(self) -> None:
        """Wait for the sums. A bucket in which a parameter got no gradient is summed as it is: with zeros there."""
        self._active = False
        while len(self._works) < len(self.buckets):
            self._reduce_next()
        for work in self._works:
            work.wait()

    def zero(self) -> None:
        self._works = []
        for flat in self.buckets:
            flat.zero_()

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        if not self._active:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        while len(self._works) < len(self.buckets) and not self._missing[len(self._works)]:
            self._reduce_next()

    def _reduce_next(self) -> None:
        self._works.append(dist.all_reduce(self.buckets[len(self._works)], async_op=True))


def _split_into_buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
