"""Loss functions: `loss_fn(model, batch) -> (sum over targets, number of targets, sums to log)`.

Sums, not means: the loop divides by the number of targets of the whole step, over all micro-batches and processes, so
that neither accumulation nor padding nor the number of processes changes the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.progress import Progress
from data_pipeline.datasets import Batch, Dataset
from model.model import TransformerOutput

LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, int, dict[str, Tensor]]]


def next_token_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Return the cross entropy of every target token given the tokens before it in its document.

    For pretraining, SFT and LoRA. While training a mixture of experts, the optimised sum includes the balance loss; it is
    logged separately, so that "loss" means the same for dense models and for mixtures, in training and in validation.
    """
    # num_items_in_batch=1: the model returns the sum.
    out = model(**batch.inputs, num_items_in_batch=1, loss_only=True, use_cache=False)
    return out.loss, batch.n_targets, token_sums(model, batch, out)


def token_sums(model: nn.Module, batch: Batch, out: TransformerOutput) -> dict[str, Tensor]:
    """Return what `next_token_loss` logs, from the model's output for a batch with labels."""
    assert out.loss is not None
    sums = {"loss": out.loss.detach()}
    if out.aux_loss is not None:
        balance = out.aux_loss.detach()
        sums = {"loss": sums["loss"] - balance if model.training else sums["loss"], "balance_loss": balance}
    if out.expert_load is not None and model.training:
        sums |= {name: share * batch.n_targets for name, share in expert_shares(out.expert_load).items()}
    return sums


def expert_shares(load: Tensor) -> dict[str, Tensor]:
    """Return the share of the routed tokens that each expert got, averaged over layers; and how uneven the layers are.

    `expert_max_load` is the load of the busiest expert of all layers, relative to the mean: 1 where all are equal.

    load: (layers, experts) tokens.
    """
    shares = load / load.sum(dim=1, keepdim=True).clamp_min(1)
    found = {f"expert_{i}_share": share for i, share in enumerate(shares.mean(dim=0))}
    return found | {"expert_max_load": shares.max() * load.shape[1]}


def sequence_logps(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the log-probability of every answer given its prompt, and its number of tokens; each (sequences,) float32.

    inputs: a batch of `data_pipeline.preferences.PreferencePairs`. Logits are computed only where an answer is predicted.
    """
    logits = model(
        input_ids=inputs["input_ids"],
        position_ids=inputs["position_ids"],
        cu_seqlens=inputs["cu_seqlens"],
        logits_to_keep=inputs["predicts"],
        use_cache=False,
    ).logits[0]  # (answer tokens, vocabulary)
    per_token = -F.cross_entropy(logits.float(), inputs["targets"], reduction="none")
    zeros = per_token.new_zeros(len(inputs["cu_seqlens"]) - 1)
    log_probs = zeros.index_add(0, inputs["sequence"], per_token)
    return log_probs, zeros.index_add(0, inputs["sequence"], torch.ones_like(per_token))


@torch.no_grad()
def compute_ref_logps(
    model: nn.Module, pairs: Dataset, device: torch.device, dtype: torch.dtype, batch_size: int,
    heartbeat: Callable[[str], None] = lambda doing: None,
) -> np.ndarray:  # fmt: skip
    """Return the log-probabilities of all answers under the model as it is now, (pairs, 2) float32: chosen, rejected.

    Args:
        pairs: a `data_pipeline.preferences.PreferencePairs`.
        heartbeat: called for every batch, where all processes compute together.
    """
    was_training = model.training
    model.eval()
    logps = []
    with Progress("reference model", len(pairs), "pairs") as progress:
        for begin in range(0, len(pairs), batch_size):
            heartbeat("reference model, a batch")
            batch = pairs.batch(range(begin, min(begin + batch_size, len(pairs)))).to(device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                logps.append(sequence_logps(model, batch.inputs)[0].view(-1, 2).cpu().numpy())
            progress.update(len(logps[-1]))
    model.train(was_training)
    return np.concatenate(logps).astype(np.float32)


def dpo_loss(beta: float, label_smoothing: float = 0.0, kind: str = "sigmoid") -> LossFunction:
    """Return the loss of Direct Preference Optimization (https://arxiv.org/abs/2305.18290), a sum over pairs.

    With r = log p(answer | prompt) - log p_reference(answer | prompt) and m = r(chosen) - r(rejected):

    sigmoid: -log sigmoid(beta m), equation 7. label_smoothing e assumes that a share e of the labels is swapped:
        (1 - e) (-log sigmoid(beta m)) + e (-log sigmoid(-beta m)) (conservative DPO).
    ipo: (m - 1 / (2 beta))^2 with log-probabilities averaged over an answer's tokens (https://arxiv.org/abs/2310.12036,
        equation 17); it does not push a pair any further once its margin is large enough.

    Before the first step m is 0: the sigmoid loss is ln 2, the ipo loss 1 / (2 beta)^2. Logged beside the loss, as means
    over pairs: `chosen_reward` and `rejected_reward` (beta r), their `margin`, `accuracy` (share of positive margins), and
    `kl_estimate`, the mean of -r per answer: how much less probable the answers of the data have become (an estimate of the
    KL divergence from the reference if the answers were samples of it).
    """

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        log_probs, n_tokens = sequence_logps(model, batch.inputs)
        ratios = log_probs.view(-1, 2) - batch.inputs["ref_logps"]  # (pairs, 2): chosen, rejected
        if kind == "ipo":
            means = ratios / n_tokens.view(-1, 2)
            loss = (means[:, 0] - means[:, 1] - 1 / (2 * beta)).square()
        else:
            scaled = beta * (ratios[:, 0] - ratios[:, 1])
            loss = -(1 - label_smoothing) * F.logsigmoid(scaled) - label_smoothing * F.logsigmoid(-scaled)
        rewards = beta * ratios.detach()
        margin = rewards[:, 0] - rewards[:, 1]
        extras = {
            "loss": loss.detach().sum(),
            "margin": margin.sum(),
            "accuracy": (margin > 0).float().sum(),
            "chosen_reward": rewards[:, 0].sum(),
            "rejected_reward": rewards[:, 1].sum(),
            "kl_estimate": -ratios.detach().mean(dim=1).sum(),
        }
        return loss.sum(), len(ratios), extras

    return loss_fn
