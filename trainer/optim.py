"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

BETAS = (0.9, 0.95)


def get_lr(step: int, total_steps: int, peak: float, warmup_steps: int = 0, floor: float = 0.1) -> float:
    """Return the learning rate: linear warm-up to `peak`, then a cosine down to `floor * peak` at the last step.

    A pure function of the step, so that nothing of the schedule has to be saved.

    Args:
        step: optimizer steps taken so far, from 0.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps - 1, 1)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def parameter_groups(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Return the trainable parameters by how they are treated, as (name, parameter).

    "matrices" are the weights of linear layers: they decay, and Muon can update them. "embeddings" and "vectors" (norms)
    do not decay: a rare token's row would shrink between its occurrences, and a norm's weight has no reason to be near 0.
    The gates of experts decay, but Muon does not update them: the rows of a gate are independent classifiers. Their
    "biases", if they have any, only follow the load of the experts: see `SignDescent`.
    """
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {
        name: [] for name in ("matrices", "gates", "embeddings", "vectors", "biases")
    }
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    if isinstance(model, PreTrainedModel) and (output := model.get_output_embeddings()) is not None:
        embeddings.add(id(output.weight))  # a row for each token, too, where it is not tied to the embedding
    for name, parameter in model.named_parameters():  # yields a tied parameter once
        if not parameter.requires_grad:
            continue
        if id(parameter) in embeddings:
            groups["embeddings"].append((name, parameter))
        elif name.endswith(".gate.bias"):
            groups["biases"].append((name, parameter))
        elif parameter.dim() < 2:
            groups["vectors"].append((name, parameter))
        elif ".gate." in name:
            groups["gates"].append((name, parameter))
        else:
            groups["matrices"].append((name, parameter))
    if not any(groups.values()):
        raise ValueError("nothing to train: no parameter requires a gradient")
    return groups


class SignDescent(torch.optim.Optimizer):
    """Move every number by `rate` against the sign of its gradient, whatever the learning rate is.

    For the biases of routers (`model.moe.Router.bias_loss`), as DeepSeek-V3 moves them.
    """

    def __init__(self, parameters: list[nn.Parameter], rate: float) -> None:
        super().__init__(parameters, {"rate": rate})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["rate"])


def make_optimizers(
    model: nn.Module, name: str, weight_decay: float, embedding_lr_scale: float = 1.0
) -> list[torch.optim.Optimizer]:
    """Return the optimizer(s) that together update every trainable parameter; the loop sets their learning rate.

    adamw: AdamW (https://arxiv.org/abs/1711.05101) for all.
    muon: Muon (https://kellerjordan.github.io/posts/muon/) for the matrices, scaled so that its updates have the size of
        AdamW's (https://arxiv.org/abs/2502.16982) and one learning rate serves both; AdamW for the rest.

    embedding_lr_scale: the embedding's learning rate relative to that of the rest; in its group as `lr_scale`.
    """
    if name not in ("adamw", "muon"):
        raise ValueError(f"unknown optimizer {name!r}; known: adamw, muon")
    groups = {key: [parameter for _, parameter in pairs] for key, pairs in parameter_groups(model).items()}
    matrices = groups.pop("matrices")
    optimizers: list[torch.optim.Optimizer] = []
    if biases := groups.pop("biases"):
        optimizers.append(SignDescent(biases, model.config.router_bias_rate))  # type: ignore[union-attr, arg-type]
    rest: list[dict] = [
        {"params": groups["gates"], "weight_decay": weight_decay},
        {"params": groups["embeddings"], "weight_decay": 0.0, "lr_scale": embedding_lr_scale},
        {"params": groups["vectors"], "weight_decay": 0.0},
    ]
    if name == "adamw":
        rest.insert(0, {"params": matrices, "weight_decay": weight_decay})
    elif matrices:
        muon = torch.optim.Muon(matrices, weight_decay=weight_decay, momentum=0.9, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    rest = [group for group in rest if group["params"]]
    if rest:
        fused = rest[0]["params"][0].device.type in ("cpu", "cuda", "mps")
        optimizers.insert(0, torch.optim.AdamW(rest, betas=BETAS, eps=1e-8, fused=fused))
    return optimizers


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Return the norm of all gradients together.

    On a CPU PyTorch adds up the squares in float32, one after the other: the norm of 3 million values is too small by a
    relative 6e-5, that of 26 million by 1.3e-3. So there it is computed in double precision.
    """
    if gradients[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(gradients)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]))


def clip_gradients(gradients: list[Tensor], norm: float, max_norm: float) -> None:
    """Scale `gradients`, whose common norm is `norm`, so that it is at most `max_norm`."""
    factor = max_norm / (norm + 1e-6)
    if factor < 1:
        torch._foreach_mul_(gradients, factor)
