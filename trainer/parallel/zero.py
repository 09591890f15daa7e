"""`--deepspeed FILE`: optimizer state (ZeRO-1), gradients (2) and parameters (3) sharded over the processes.

The papers: https://arxiv.org/abs/1910.02054 (ZeRO), https://arxiv.org/abs/2101.06840 (offload to the CPU).
"""

from __future__ import annotations

import copy
import logging
import os
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from model.moe import MoEFeedForward
from trainer.distributed import DistEnv, broadcast_tensors
from trainer.optim import OptimizerState, load_parameters, make_optimizers
from trainer.options import TrainOptions, read_zero_config, zero_values_of_flags
from trainer.parallel.ddp import ParallelStrategy, TrainState

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state beside the number of steps


class DeepSpeedStrategy(ParallelStrategy):
    """Let DeepSpeed sum, clip and step; gradients are summed during every backward pass."""

    def __init__(
        self, model: nn.Module, options: TrainOptions, dist_env: DistEnv, device: torch.device, dtype: torch.dtype
    ) -> None:
        deepspeed = import_deepspeed(device)
        from deepspeed.utils import set_z3_leaf_modules

        config = complete_zero_config(options, dtype)
        self.cpu_model, self.dist_env, self.device = model, dist_env, device
        self.stage = config["zero_optimization"]["stage"]
        # ZeRO-3 takes the parameters out of the model it is given: it gets a copy, and cpu_model stays for saving.
        module = copy.deepcopy(model) if self.stage == 3 else model
        if self.stage < 3:
            module.to(device)
        elif any(isinstance(part, MoEFeedForward) for part in module.modules()):
            # Processes may run different experts, in different orders. All of a layer's experts are gathered at once, so
            # that every process asks for the same parameters in the same order.
            set_z3_leaf_modules(module, [MoEFeedForward])
        (optimizer,) = make_optimizers(module, "adamw", options.weight_decay)
        self.trainable_parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.module: Any
        self.module, self.zero, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.optimizers = [self.zero]
        self._init_optimizer_state()

    def train(self, mode: bool) -> None:
        self.module.train(mode)
        self.module.training = mode  # DeepSpeed's own wrapper keeps its mode, and loss functions ask the wrapper

    def backward(self, loss: Tensor, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        # DeepSpeed takes the mean over processes (and would divide by the number of micro-batches); ours is a sum.
        self.module.backward(loss * self.dist_env.size, scale_wrt_gas=False)

    def step(self, max_norm: float) -> float:
        self.module.step()  # clips: its configuration has the maximum norm
        return float(self.module.get_global_grad_norm())

    def state_dict(self) -> TrainState:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights: dict[str, Tensor] = {}
        state: OptimizerState = {}
        for name, parameter in self.trainable_parameters.items():
            weights[name] = self._keep(safe_get_full_fp32_param(parameter))
            state[name] = {key: self._keep(safe_get_full_optimizer_state(parameter, key)) for key in MOMENTS}
            state[name]["step"] = self.zero.optimizer.state[self._flat()[0]]["step"].detach().cpu().clone()
        if not self.dist_env.is_main:
            return TrainState()
        load_parameters(self.cpu_model, weights)
        return TrainState(weights, state)

    def load_state_dict(self, optimizer: OptimizerState, scaler: dict) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for name, group in broadcast_tensors(self.dist_env, optimizer, self.device):
            for flat in self._flat():
                self.zero.optimizer.state[flat]["step"].copy_(group["step"])
            parameter = self.trainable_parameters[name]
            for key in MOMENTS:
                if self.stage < 3:
                    safe_set_full_optimizer_state(parameter, group[key], key)
                else:
                    safe_set_local_optimizer_state(parameter, self._shard(parameter, group[key]), key)

    def _flat(self) -> list[Tensor]:
        """Return what DeepSpeed's optimizer really updates: this process's shard of the parameters, in flat pieces."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def _init_optimizer_state(self) -> None:
        """Create the optimizer state of step 0. (DeepSpeed's ZeRO-1 and 2 create it for one parameter group only.)"""
        for flat in self._flat():
            moments = {key: torch.zeros_like(flat.data) for key in MOMENTS}
            self.zero.optimizer.state[flat] = moments | {"step": torch.zeros((), device=flat.device)}
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    def _shard(self, parameter: Any, value: Tensor) -> Tensor:
        """Return this process's part of a tensor: the same number of values everywhere, the last ones padding."""
        n = parameter.ds_tensor.numel()
        flat = F.pad(value.flatten(), (0, n * self.dist_env.size - value.numel()))
        return flat[n * self.dist_env.rank : n * (self.dist_env.rank + 1)]

    def _keep(self, whole: Tensor) -> Tensor:
        return whole.detach().cpu() if self.dist_env.is_main else torch.empty(0)


def complete_zero_config(options: TrainOptions, dtype: torch.dtype) -> dict:
    """Return the file of --deepspeed with the values of the flags filled in, as `deepspeed.initialize` takes it."""
    assert options.deepspeed is not None
    config: dict[str, Any] = {"steps_per_print": 1_000_000_000, "zero_allow_untested_optimizer": True}
    config |= read_zero_config(options.deepspeed)
    for name in ("bf16", "fp16", "optimizer"):
        config.pop(name, None)
    config |= {name: value for name, (value, _) in zero_values_of_flags(options).items()}
    # Weights stay float32 and products are computed in --dtype, as without DeepSpeed: the same run.
    config["torch_autocast"] = {"enabled": dtype != torch.float32, "dtype": str(dtype).removeprefix("torch.")}
    return config | {"zero_force_ds_cpu_optimizer": False}


def import_deepspeed(device: torch.device) -> ModuleType:
    """Import the library for this device, with its log reduced to warnings."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
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
