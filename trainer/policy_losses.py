"""Losses of reinforcement learning, as `trainer.losses` has those of the other stages, and the advantages that they need.

The algorithms differ in three things: how the advantage is measured, how far a probability may move, and what the mean is
taken over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.datasets import Batch
from trainer.losses import LossFunction

TOKEN_MEAN = ("dapo", "cispo", "ppo")  # the mean over all tokens that were sampled; the others: over answers
EPSILON_HIGH = {"dapo": 0.28, "cispo": 4.0}  # the others: as epsilon
MAX_CORRECTION = 2.0  # of a token whose probability the sampler rounded


def policy_loss(
    algorithm: str,
    max_new_tokens: int,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    reference: nn.Module | None = None,
    value_head: nn.Module | None = None,
    value_coef: float = 0.1,
) -> LossFunction:
    """Return the loss of an algorithm of reinforcement learning, for the batches of `trainer.rollouts`.

    All raise the probability of tokens with a positive advantage A and lower it for a negative one. With the ratio
    r = p(token) / p_old(token) of a token's probability now and when the batch was made, the loss of a token is

    grpo: -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), averaged over each answer, then over answers
        (https://arxiv.org/abs/2402.03300, equation 3).
    dr_grpo: the same, but an answer's sum is divided by the constant `max_new_tokens`, and A is not divided by a standard
        deviation, so that long wrong answers do not count less (https://arxiv.org/abs/2503.20783).
    dapo: the same, averaged over all tokens of the step, with an `epsilon_high` that lets improbable tokens rise
        (https://arxiv.org/abs/2503.14476, equation 8).
    cispo: -min(r, 1 + epsilon_high) A log p, where the weight has no gradient: no token is ever left out
        (https://arxiv.org/abs/2506.13585, equation 4); averaged over all tokens.
    rloo: as grpo, but r is the ratio of the whole answer, and A is measured against the other answers of the group
        (https://arxiv.org/abs/2402.14740).
    ppo: as dapo, with an advantage for each token from a value function, which is trained beside the policy on
        max((v - R)^2, (clip(v, v_old - epsilon, v_old + epsilon) - R)^2) / 2 (https://arxiv.org/abs/1707.06347).

    With one step per generation p_old is p itself: r is exactly 1, and the gradient is -A grad log p. What the sampler took
    for p may differ a little, because it rounds otherwise: the loss of a token is multiplied by p_old / p_sampler, at most
    `MAX_CORRECTION` (truncated importance sampling, https://arxiv.org/abs/1802.01561).

    Args:
        beta: weight of the KL divergence from `reference`, estimated for each token as q - log q - 1 with
            q = p_reference / p (http://joschu.net/blog/kl-approx.html, "k3"): never negative, and unbiased.
        value_head: (..., dim) -> (..., 1), for ppo.
    """
    high = epsilon_high if epsilon_high is not None else EPSILON_HIGH.get(algorithm, epsilon)

    def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        x = batch.inputs
        out = policy_forward(model, x)
        all_logps = out.logits[0].float().log_softmax(-1)  # (sampled tokens, vocabulary)
        logps = pick(all_logps, x["targets"])
        old_logps = x["old_logps"] if "old_logps" in x else logps.detach()
        lengths = x["answer_length"].float()
        share = 1 / lengths[x["sequence"]]  # of a token in its answer

        loss, clipped = surrogate(algorithm, logps, old_logps, x["advantages"], x["sequence"], epsilon, high)
        loss = loss * (old_logps - x["sampler_logps"]).exp().clamp(max=MAX_CORRECTION)
        extras = {}
        if reference is not None:
            with torch.no_grad():
                ref_logps = pick(policy_forward(reference, x).logits[0].float().log_softmax(-1), x["targets"])
            log_q = ref_logps - logps
            kl = log_q.exp() - log_q - 1
            loss = loss + beta * kl
            extras["kl_estimate"] = (kl.detach() * share).sum()
        if value_head is not None:
            values = value_head(out.last_hidden_state[0, x["predicts"]]).squeeze(-1).float()
            near = x["old_values"] + (values - x["old_values"]).clamp(-epsilon, epsilon)
            errors = torch.maximum((values - x["returns"]).square(), (near - x["returns"]).square()) / 2
            loss = loss + value_coef * errors
            extras["value_loss"] = (errors.detach() * share).sum()
        if algorithm == "dr_grpo":
            loss = loss / max_new_tokens
        elif algorithm not in TOKEN_MEAN:
            loss = loss * share

        with torch.no_grad():
            entropy = -(all_logps.exp() * all_logps).sum(-1)
            extras |= {
                "entropy": (entropy * share).sum(),
                "clip_share": (clipped * share).sum(),
                "sampler_difference": ((old_logps - x["sampler_logps"]).abs() * share).sum(),
            }
        extras |= {name: x[name].float().sum() for name in ROLLOUT_METRICS}
        extras |= {"loss": loss.detach().sum(), "n_answers": lengths.new_tensor(len(lengths))}
        return loss.sum(), batch.n_targets, extras

    return loss_fn


# What a batch of `trainer.rollouts` knows of each answer, (answers,): the log has the means.
ROLLOUT_METRICS = (
    "reward", "accuracy", "answer_length", "cut", "tool_calls", "failed_calls", "verifier_errors", "equal_rewards",
)  # fmt: skip


def policy_forward(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """Return the output of a model for a batch, with logits (1, sampled tokens, vocabulary) where tokens were sampled."""
    kept = {name: inputs[name] for name in ("input_ids", "position_ids", "cu_seqlens")}
    return model(**kept, logits_to_keep=inputs["predicts"], use_cache=False)


def pick(logps: Tensor, tokens: Tensor) -> Tensor:
    """Return the entry of each token, (tokens, vocabulary) -> (tokens,)."""
    return logps.gather(-1, tokens[:, None]).squeeze(1)


def surrogate(
    algorithm: str, logps: Tensor, old_logps: Tensor, advantages: Tensor, sequence: Tensor, epsilon: float, high: float
) -> tuple[Tensor, Tensor]:
    """Return the loss of each token, and whether clipping has taken its gradient; each (tokens,). See `policy_loss`.

    sequence: (tokens,) index of the answer of a token.
    """
    log_ratio = logps - old_logps
    if algorithm == "rloo":
        log_ratio = log_ratio.new_zeros(int(sequence.max()) + 1).index_add(0, sequence, log_ratio)[sequence]
    ratio = log_ratio.exp()
    if algorithm == "cispo":
        return -ratio.clamp(max=1 + high).detach() * advantages * logps, ratio > 1 + high
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages)
    return loss, ((ratio < 1 - epsilon) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))


def group_advantages(rewards: Tensor, algorithm: str) -> Tensor:
    """Return how much better each answer is than the others to the same question; 0 where all are equally good.

    rewards: (questions, answers), and so is the result.

    grpo, dapo, cispo: (reward - mean) / standard deviation; dr_grpo: reward - mean; rloo: reward - mean of the others.
    """
    n = rewards.shape[1]
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    # Exactly 0, however the mean is rounded:
    centred = (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(equal, 0)
    if algorithm == "dr_grpo":
        return centred
    if algorithm == "rloo":
        return centred * n / (n - 1)
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-4)


def token_advantages(values: Tensor, reward: float, gamma: float, lam: float) -> Tensor:
    """Return the advantage of each token of one answer by generalised advantage estimation (GAE), (tokens,).

    A_t = d_t + gamma lam A_(t+1) with d_t = r_t + gamma v_(t+1) - v_t (https://arxiv.org/abs/1506.02438, equation 16);
    the reward comes with the last token.

    values: (tokens,), of the text in front of each token.
    """
    advantages = torch.zeros_like(values)
    following = later = 0.0
    for t in reversed(range(len(values))):
        value = float(values[t])
        later = (reward if t == len(values) - 1 else 0.0) + gamma * following - value + gamma * lam * later
        advantages[t], following = later, value
    return advantages
