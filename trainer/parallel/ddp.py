"""Parallel strategies turn the gradient of a step into new weights; the training loop knows nothing else about them.

`ParallelStrategy` is their contract, `DDPStrategy` the simplest one: every process holds the whole model.
`trainer.parallel.fsdp` shards parameters, gradients and optimizer state over the processes with PyTorch's FSDP2,
`trainer.parallel.zero` with DeepSpeed.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError
from common.files import write_json
from trainer.checkpoint import load_tensors, save_tensors, tensor_layout
from trainer.distributed import DistEnv
from trainer.optim import clip_gradients, gradient_norm, make_optimizers
from trainer.options import TrainOptions


class ParallelStrategy:
    """Train a model in one or several processes. What is here is the same in all strategies, or may be overridden.

    All processes make the same calls: where parameters are sharded, a forward pass needs every process. The losses given
    to `backward` add up, over calls and over processes, to the loss of the step.

    Attributes:
        module: what a loss function calls; its parameters may be sharded over the processes.
        trainable_parameters: by name, sharded or not, float32.
    """

    format = "torch"  # of the files of a training state
    dist_env: DistEnv
    module: nn.Module
    optimizers: list[torch.optim.Optimizer]
    scaler = torch.amp.GradScaler("cpu", enabled=False)  # only float16 needs one
    trainable_parameters: dict[str, Any]

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of all parameters, that of the embedding in proportion."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """Return the context for forward and backward of one part of the step's loss; `last`: no other part follows.

        The gradients of all processes are summed in the last part, or in every part.
        """
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one part of the step's loss."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        self.module.zero_grad()

    def step(self, max_norm: float) -> float:
        """Clip the gradients and update the weights; return the norm. If it is not finite, the weights stay."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        gradients = [local(p.grad) for p in self.trainable_parameters.values() if p.grad is not None]
        norm = self._norm(gradients)
        clip_gradients(gradients, norm, max_norm)
        if math.isfinite(norm):  # the scaler would decide for each optimizer alone
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update()
        elif self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())
        self.zero_grad()
        return norm

    def _norm(self, gradients: list[Tensor]) -> float:
        return float(gradient_norm(gradients))

    def may_skip_step(self) -> bool:
        """Return whether a norm that is not finite is normal (float16, until the scale cannot be lowered further)."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor) of the trainable parameters, one at a time. Every process has to take them all."""
        for name, parameter in self.trainable_parameters.items():
            tensor = parameter.detach()
            yield name, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def non_finite(self) -> list[str]:
        """Return the names of the parameters in which this process sees a value that is not finite."""
        return [name for name, p in self.trainable_parameters.items() if not is_finite(local(p.detach()))]

    def save(self, folder: Path) -> None:
        """Write this process's part of the training state into `folder`. Every process has to call it."""
        save_tensors(folder, self._state())
        if self.dist_env.is_main and self.scaler.is_enabled():
            write_json(folder / "scaler.json", self.scaler.state_dict())

    def load(self, folder: Path) -> None:
        """Load what `save` wrote, with the same or another number of processes. Every process has to call it."""
        layout = tensor_layout(folder)
        saved = {name.removeprefix("model/") for name in layout if name.startswith("model/")}
        if unknown := sorted(saved ^ self.trainable_parameters.keys()):
            raise UserError(f"cannot resume {folder}: it has different parameters ({', '.join(unknown[:3])} ...)")
        owner = {
            p: optimizer for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        for path, (shape, dtype) in layout.items():
            kind, name, *key = path.split("/")
            if kind == "optimizer":
                parameter = self.trainable_parameters[name]
                owner[parameter].state[parameter][key[0]] = (
                    torch.zeros_like(parameter.detach())
                    if shape == parameter.shape
                    else torch.zeros(shape, dtype=dtype, device=parameter.device)
                )
        load_tensors(folder, self._state())
        if self.scaler.is_enabled() and (file := folder / "scaler.json").exists():  # not if it was another precision
            self.scaler.load_state_dict(json.loads(file.read_text(encoding="utf-8")))

    def _state(self) -> dict[str, Tensor]:
        """Return the tensors of the training state: model/NAME and optimizer/NAME/exp_avg, ..."""
        tensors = {f"model/{name}": parameter.detach() for name, parameter in self.trainable_parameters.items()}
        for optimizer in self.optimizers:
            for name, parameter in self.trainable_parameters.items():
                state = optimizer.state.get(parameter, {})
                tensors |= {f"optimizer/{name}/{key}": value for key, value in state.items()}
        return tensors


class DDPStrategy(ParallelStrategy):
    """Data parallel: every process holds the whole model, and gradients are summed once a step. Also for one process."""

    def __init__(
        self, model: nn.Module, options: TrainOptions, dist_env: DistEnv, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.module, self.dist_env = model.to(device), dist_env
        self.trainable_parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizers = make_optimizers(model, options.optimizer, options.weight_decay, options.embedding_lr_scale)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        if options.compile:
            # Its cutting of graphs at DDP's buckets fails for ours, in which the number of documents is dynamic.
            torch._dynamo.config.optimize_ddp = False
            model.compile()
        if dist_env.size > 1:
            self.module = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        if last or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def backward(self, loss: Tensor) -> None:
        # DDP takes the mean over processes; ours is a sum.
        self.scaler.scale(loss * self.dist_env.size).backward()


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite; faster than `tensor.isfinite().all()`, which makes a tensor of its size."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def local(tensor: Any) -> Tensor:
    """Return this process's shard of a tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
