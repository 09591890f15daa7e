"""Mixture of experts: a router sends every token to its top-k routed experts; shared experts see every token.

The design is DeepSeekMoE's (https://arxiv.org/abs/2401.06066); names and mathematics are the published weights'.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.LMConfig import LMConfig


def residual_projection(in_dim: int, out_dim: int) -> nn.Linear:
    """Return a linear layer that writes into the residual stream: `Transformer._init_weights` starts it smaller."""
    linear = nn.Linear(in_dim, out_dim, bias=False)
    linear.is_residual_projection = True  # type: ignore[assignment]
    return linear


class FeedForward(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202): w2(silu(w1 x) * w3 x). Also the shape of every expert."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = residual_projection(hidden_dim, dim)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


def is_tracing() -> bool:
    """Return whether operations are being recorded (compiled, exported, traced): none may then depend on values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class Routing(NamedTuple):
    """How one layer has routed its tokens: for the balance loss, the biases and the log.

    `probabilities` (tokens, experts) of the router, `chosen` (tokens, k) expert indices, which are the number of experts for
    padding; `load` (experts,) float32, the tokens that chose each. `bias_loss`: see `Router.bias_loss`.
    """

    probabilities: Tensor
    chosen: Tensor
    load: Tensor
    bias_loss: Tensor | None = None


# What multiplies the gradient of a router's bias: only its sign counts, and it must not count in the norm that is clipped.
BIAS_GRADIENT = 1e-6


class Router(nn.Module):
    """Choose `num_experts_per_tok` experts for every token, with their mixing weights.

    With `router_bias_rate` the choice is by probability plus a bias, the weights are not (https://arxiv.org/abs/2408.15664):
    an expert with too many tokens loses bias in every step, so the load is balanced without a loss that disturbs the
    others. In the training loop such a step is one of sign descent: see `bias_loss` and `trainer.optim`.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        # With top-1 a renormalised weight is the constant 1, and the router gets no gradient from the language-model loss:
        # by default the raw probability is kept there.
        self.renormalise = config.renormalizes_top_k
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.dim))
        self.bias = nn.Parameter(torch.zeros(config.n_routed_experts)) if config.router_bias_rate else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (tokens, dim) -> mixing weights (tokens, k), expert indices (tokens, k), probabilities (tokens, experts)."""
        # Routing is a comparison of close numbers; rounding them to bfloat16 would flip choices at random.
        with torch.autocast(x.device.type, enabled=False):
            probabilities = F.linear(x.float(), self.weight.float()).softmax(dim=-1)
        if self.bias is None:
            weights, experts = probabilities.topk(self.top_k, dim=-1)
        else:
            experts = (probabilities + self.bias.float()).topk(self.top_k, dim=-1).indices
            weights = probabilities.gather(-1, experts)
            weights = weights + 0.0 * self.bias.sum()  # a gradient of zero, not none, where a loss has no `bias_loss`
        if self.renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights, experts, probabilities

    def bias_loss(self, load: Tensor) -> Tensor | None:
        """Return 0, with a gradient for the bias: positive for the experts with more than the mean load.

        As part of the loss it adds up over micro-batches and processes like any other gradient.

        load: (experts,) tokens that chose each expert.
        """
        if self.bias is None or not self.training:
            return None
        term = BIAS_GRADIENT * (self.bias.float() * (load - load.mean())).sum()
        return term - term.detach()


class MoEFeedForward(nn.Module):
    """Routed experts, plus one shared MLP of `n_shared_experts` times their width."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = nn.ModuleList(
            FeedForward(config.dim, config.hidden_dim, config.dropout) for _ in range(config.n_routed_experts)
        )
        shared_dim = config.hidden_dim * config.n_shared_experts
        self.shared_experts = FeedForward(config.dim, shared_dim, config.dropout) if shared_dim else None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Mix the experts' outputs.

        Args:
            x: (batch, time, dim).
            valid: (batch, time) bool; False for padding, which is sent to no routed expert. None: all valid.

        Returns:
            (batch, time, dim), and how the tokens (batch * time) were routed.
        """
        tokens = x.flatten(0, 1)  # (tokens, dim)
        weights, chosen, probabilities = self.gate(tokens)
        if valid is not None:
            # The index after the last expert means "none": it is sorted to the end, and nothing is computed for it.
            chosen = chosen.masked_fill(~valid.flatten()[:, None], len(self.experts))
        pairs = torch.ones_like(chosen).flatten()
        counts = chosen.new_zeros(len(self.experts) + 1).index_add(0, chosen.flatten(), pairs)
        out = self._route(tokens, weights, chosen, counts).view_as(x)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        load = counts[:-1].float()
        return out, Routing(probabilities, chosen, load, self.gate.bias_loss(load))

    def _route(self, tokens: Tensor, weights: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
        """Sort (token, choice) pairs by expert, so that each expert runs once on a contiguous slice; then sort back."""
        top_k = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)  # (tokens * k,) pairs, grouped by expert
        x = tokens[order // top_k]  # (tokens * k, dim)
        can_group = self._can_group(x)
        if not can_group and not self.training and is_tracing():
            return self._every_expert(tokens, weights, chosen)
        y = self._grouped(x, counts) if can_group else self._one_by_one(x, counts)
        back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
        y = y[back].unflatten(0, (-1, top_k))  # (tokens, k, dim)
        return (y * weights[..., None].to(y.dtype)).sum(dim=1)

    def _one_by_one(self, x: Tensor, counts: Tensor) -> Tensor:
        """Call the experts as modules, adapters on them included: the reference path, and the one for decoding.

        Experts without tokens run on an empty slice: their gradient is zero, not missing, which DDP relies on.
        """
        *slices, unrouted = x.split(counts.tolist())
        outs = [expert(part) for expert, part in zip(self.experts, slices, strict=True)]
        return torch.cat([*outs, torch.zeros_like(unrouted, dtype=outs[0].dtype)])

    def _every_expert(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Let every expert compute every token, and mix the outputs: how many each would get is not known yet."""
        mixing = weights.new_zeros(tokens.shape[0], len(self.experts) + 1).scatter(1, chosen, weights).to(tokens.dtype)
        return sum(
            (expert(tokens) * mixing[:, i, None] for i, expert in enumerate(self.experts)), torch.zeros_like(tokens)
        )

    def _can_group(self, x: Tensor) -> bool:
        """Return whether the grouped kernel computes exactly what calling the modules would.

        It reads the weights without calling the modules, so a wrapped expert (LoRA, quantisation) or dropout rules it
        out; and stacking the weights pays only for the many tokens of a training batch.
        """
        if not self.training or x.shape[0] < 256:
            return False
        experts: list[Any] = list(self.experts)
        linears = [linear for expert in experts for linear in (expert.w1, expert.w2, expert.w3)]
        if not all(_is_plain(linear) for linear in linears):
            return False
        if any(expert.dropout.p for expert in experts):
            return False
        dtype = _compute_dtype(x)
        if any(size * dtype.itemsize % 16 for size in experts[0].w1.weight.shape):  # the kernel's alignment of rows
            return False
        if x.device.type == "cuda":
            # Only Hopper has the kernel. Elsewhere PyTorch waits for the counts in every product, which pays only where
            # one expert after the other would break the graph; Blackwell's gives gradients to experts without tokens.
            major = torch.cuda.get_device_capability(x.device)[0]
            return dtype is torch.bfloat16 and (major == 9 or (is_tracing() and major >= 8 and major != 10))
        # While compiling, torch has the shape of its result for bfloat16 only.
        return x.device.type == "cpu" and (dtype is torch.bfloat16 or not is_tracing())

    def _grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        """One grouped matrix product for all experts; the sizes stay on the device, and the kernel waits for nothing."""
        dtype = _compute_dtype(x)
        ends = counts[:-1].cumsum(0).to(torch.int32)
        w1, w2, w3 = (
            torch.stack([getattr(expert, name).weight.to(dtype) for expert in self.experts]).transpose(-2, -1)
            for name in ("w1", "w2", "w3")
        )  # each (experts, in, out)
        # Rows without an expert lie past the last group. The kernel leaves its results for them undefined, forward and
        # backward: both ends are masked, so that no garbage (it may be NaN) gets out either way.
        routed = (torch.arange(len(x), device=x.device) < ends[-1])[:, None]
        x = torch.where(routed, x, 0).to(dtype)
        hidden = F.silu(F.grouped_mm(x, w1, offs=ends)) * F.grouped_mm(x, w3, offs=ends)
        y = F.grouped_mm(hidden, w2, offs=ends)
        return torch.where(routed, y, 0)


def _is_plain(linear: nn.Linear) -> bool:
    """Return whether a call computes `F.linear` with its weight: no subclass, no hook, no forward put over it."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks
    return type(linear) is nn.Linear and not hooks and "forward" not in vars(linear)  # accelerate's offload sets one


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a Linear would compute here: autocast's if it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def balance_loss(probabilities: Tensor, chosen: Tensor, document: Tensor, n_documents: int) -> Tensor:
    """Return the sequence-level load-balancing loss of one layer, separately for every document.

    For a document of n tokens: sum over experts of f_e * P_e, where f_e = (times e was chosen) * experts / (n * k)
    and P_e = mean probability of e. It is 1 when all experts are used equally. (DeepSeek-V2,
    https://arxiv.org/abs/2405.04434, equations 23 to 25.)

    Args:
        probabilities: (tokens, experts) of the router.
        chosen: (tokens, k) expert indices; an index equal to `experts` marks padding, which is not counted.
        document: (tokens,) index of each token's document.

    Returns:
        (n_documents,) float32; 0 for documents without a valid token.
    """
    experts, top_k = probabilities.shape[1], chosen.shape[1]
    valid = (chosen[:, 0] < experts).float()[:, None]  # (tokens, 1)
    picks = F.one_hot(chosen, experts + 1)[..., :experts].sum(dim=1).float()  # (tokens, experts)
    zeros = probabilities.new_zeros(n_documents, experts)
    counts = zeros.index_add(0, document, picks)
    mass = zeros.index_add(0, document, probabilities * valid)
    tokens = zeros[:, :1].index_add(0, document, valid).clamp_min(1)  # (n_documents, 1)
    return (counts * experts / (tokens * top_k) * (mass / tokens)).sum(dim=1)
