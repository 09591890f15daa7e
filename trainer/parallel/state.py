"""What training changed: whole tensors by parameter name, whatever was spread over which processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

OptimizerState = dict[str, dict[str, Tensor]]  # parameter name -> {"step": ..., "exp_avg": ..., ...}


@dataclass
class TrainState:
    """Everything that training changed.

    Attributes:
        weights: trainable parameters by name, float32.
        optimizer: state of each parameter, in whole tensors of its shape.
        scaler: of the float16 gradients.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: OptimizerState = field(default_factory=dict)
    scaler: dict = field(default_factory=dict)


def optimizer_state(trained: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]) -> OptimizerState:
    """The state of each parameter, by its name: a parameter belongs to one optimizer."""
    states = {parameter: state for optimizer in optimizers for parameter, state in optimizer.state.items()}
    return {name: dict(states[parameter]) for name, parameter in trained.items() if parameter in states}


def restore_optimizer(
    trained: dict[str, nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
    states: Iterable[tuple[str, dict[str, Tensor]]],
) -> None:
    """Put (name, state) of `states` back to where `optimizer_state` took them from."""
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, state in states:
        parameter = trained[name]
        owner[parameter].state[parameter] = state


@torch.no_grad()
def load_parameters(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy tensors by name into the parameters of `model`."""
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)
