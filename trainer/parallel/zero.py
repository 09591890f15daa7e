"""`--deepspeed FILE`: optimizer state (ZeRO-1), gradients (2) and parameters (3) spread over the processes.

The papers: https://arxiv.org/abs/1910.02054 (ZeRO), https://arxiv.org/abs/2101.06840 (offload to the CPU).
"""

from __future__ import annotations

import copy
import logging
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from model.moe import MoEFeedForward
from trainer.distributed import DistEnv, broadcast_tensors
from trainer.optim import make_optimizers, set_learning_rate
from trainer.parallel.state import OptimizerState, TrainState, load_parameters
from trainer.parallel.zero_config import complete_zero_config, read_zero_config

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state beside the number of steps


class DeepSpeedZero:
    """See `trainer.parallel.strategy`."""

    def __init__(self, model, options, dist_env: DistEnv, device: torch.device, dtype: torch.dtype) -> None:
        deepspeed = import_deepspeed(device)
        from deepspeed.utils import set_z3_leaf_modules

        self.plain, self.dist_env, self.device = model, dist_env, device
        self.stage = read_zero_config(options.deepspeed)["zero_optimization"]["stage"]
        # ZeRO-3 takes the parameters out of the model it is given: it gets a copy, `plain` stays for saving.
        module = copy.deepcopy(model) if self.stage == 3 else model
        if self.stage < 3:
            module.to(device)
        elif any(isinstance(part, MoEFeedForward) for part in module.modules()):
            # Which experts run, and how, may differ between processes; so that all ask for the same parameters in the
            # same order, a layer's experts are brought together at once.
            set_z3_leaf_modules(module, [MoEFeedForward])
        (optimizer,) = make_optimizers(module, "adamw", options.weight_decay)
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        config = complete_zero_config(options.deepspeed, options, str(dtype).removeprefix("torch."))
        self.module, self.zero, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self._make_state()

    def train(self, mode: bool) -> None:
        self.module.train(mode)
        self.module.training = mode  # DeepSpeed passes the mode on and keeps its own: loss functions ask for it

    def set_learning_rate(self, lr: float) -> None:
        set_learning_rate([self.zero], lr)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        # DeepSpeed takes the mean over processes (and would divide by the number of micro-batches); ours is a sum.
        self.module.backward(loss * self.dist_env.size, scale_wrt_gas=False)

    def finish_backward(self) -> None:
        """Nothing is left to do: gradients are summed as backward goes."""

    def discard(self) -> None:
        self.module.zero_grad()

    def step(self, max_norm: float) -> float:
        """The largest norm stands in DeepSpeed's configuration already."""
        self.module.step()
        return float(self.module.get_global_grad_norm())

    def may_skip_step(self) -> bool:
        return False

    def gather(self) -> TrainState:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights, state = {}, {}
        for name, parameter in self.trained.items():
            weights[name] = self._keep(safe_get_full_fp32_param(parameter))
            state[name] = {key: self._keep(safe_get_full_optimizer_state(parameter, key)) for key in MOMENTS}
            state[name]["step"] = self.zero.optimizer.state[self._flat()[0]]["step"].detach().cpu().clone()
        if not self.dist_env.is_main:
            return TrainState()
        load_parameters(self.plain, weights)
        return TrainState(weights, state)

    def restore(self, optimizer: OptimizerState, scaler: dict) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for name, group in broadcast_tensors(self.dist_env, optimizer, self.device):
            for flat in self._flat():
                self.zero.optimizer.state[flat]["step"].copy_(group["step"])
            parameter = self.trained[name]
            for key in MOMENTS:
                if self.stage < 3:
                    safe_set_full_optimizer_state(parameter, group[key], key)
                else:
                    safe_set_local_optimizer_state(parameter, self._shard(parameter, group[key]), key)

    def _flat(self) -> list[Tensor]:
        """What DeepSpeed's optimizer really updates: this process's share of the parameters, in flat pieces."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def _make_state(self) -> None:
        """Optimizer state as before the first step. (By itself ZeRO-1 and 2 would miss that of all groups but one.)"""
        for flat in self._flat():
            moments = {key: torch.zeros_like(flat.data) for key in MOMENTS}
            self.zero.optimizer.state[flat] = moments | {"step": torch.zeros((), device=flat.device)}
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    def _shard(self, parameter, value: Tensor) -> Tensor:
        """What this process keeps of a tensor: the same number of values everywhere, the last ones padding."""
        n = parameter.ds_tensor.numel()
        flat = F.pad(value.flatten(), (0, n * self.dist_env.size - value.numel()))
        return flat[n * self.dist_env.rank : n * (self.dist_env.rank + 1)]

    def _keep(self, whole: Tensor) -> Tensor | None:
        return whole.detach().cpu() if self.dist_env.is_main else None


def import_deepspeed(device: torch.device):
    """The library, told which device to use, and with its own remarks turned down to warnings."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"--deepspeed needs DeepSpeed, which cannot be imported ({error}): pip install -r requirements.txt (Linux "
            "only); --fsdp needs nothing more than PyTorch"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On a CPU it would compile a kernel for sums within one machine, for which everybody waits (forever, if a compiler that
    # was killed left its lock behind). Without it, it uses gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
