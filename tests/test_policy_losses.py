"""The losses of reinforcement learning: TRL's on the same batch and weights, and the formulas of the papers."""

from __future__ import annotations

import os
from collections import defaultdict
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # trl must not ask a hub

import pytest
import torch
from test_losses import gradients, make, moved
from tolerances import assert_gradients_close, rounding, shape_of
from torch import nn
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from evaluation.rollouts import Rollout, RolloutPrompt
from evaluation.verifiers import Reward, parse_verifier
from trainer.options import ALGORITHMS
from trainer.policy_losses import EPSILON_HIGH, group_advantages, policy_loss, token_advantages
from trainer.rollouts import make_batch

LONGEST = 40  # max_new_tokens
REWARDS = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.2, 0.5]])
LENGTHS = [(7, 5), (7, 12), (7, 3), (11, 9), (11, 1), (11, 20)]  # of prompt and answer


@pytest.fixture(scope="module")
def models():
    """A policy and the one before it: far enough apart for some ratios to be clipped."""
    old = make()
    return moved(old, 0.01), old


@pytest.fixture(scope="module", params=[False, True], ids=["answers", "with tools"])
def rollouts(request, models) -> list[Rollout]:
    """Answers of random tokens; what tools returned stands in the middle of some."""
    torch.manual_seed(2)
    made = []
    for i, (n_prompt, n) in enumerate(LENGTHS):
        ids = torch.randint(3, 6400, (n_prompt + n,)).tolist()
        prompt = RolloutPrompt([], ids[:n_prompt], "", parse_verifier("exact"), {})
        sampled = [False] * n_prompt + [not (request.param and i % 2 and 1 < t < 5) for t in range(n)]
        rollout = Rollout(prompt, ids, sampled, reward=Reward(REWARDS.flatten()[i].item(), False))
        rollout.logps = token_logps(models[1], rollout)[torch.tensor(sampled)[1:]].tolist()
        made.append(rollout)
    return made


def token_logps(model, rollout: Rollout) -> torch.Tensor:
    """Log-probabilities of all tokens but the first, (tokens - 1,)."""
    ids = torch.tensor([rollout.ids])
    with torch.no_grad():
        return model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def batch_of(rollouts: list[Rollout], algorithm: str, advantages: torch.Tensor | None = None):
    advantages = group_advantages(REWARDS, algorithm).flatten() if advantages is None else advantages
    batch = make_batch(rollouts, [*advantages[:, None]], [False] * len(rollouts), algorithm)
    old = torch.tensor([logp for rollout in rollouts for logp in rollout.logps])
    batch.inputs["old_logps"] = old
    return batch


def trls(rollouts, policy, reference, trainer_class, advantages, **settings) -> torch.Tensor:
    """The loss that TRL's trainer computes, with logits of our model on padded rows."""
    n_prompt, n = max(p for p, _ in LENGTHS), max(a for _, a in LENGTHS)
    shape = len(rollouts), n
    ids = torch.zeros(len(rollouts), n_prompt + n, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    tools, old = torch.zeros(shape), torch.zeros(shape)
    for i, rollout in enumerate(rollouts):
        begin = n_prompt - len(rollout.prompt.ids)
        ids[i, begin : begin + len(rollout.ids)] = torch.tensor(rollout.ids)
        attention[i, begin : begin + len(rollout.ids)] = 1
        mask = torch.tensor(rollout.sampled[len(rollout.prompt.ids) :])
        tools[i, : len(mask)] = mask.float()
        old[i, : len(mask)][mask] = torch.tensor(rollout.logps)

    def logps_of(model, *_, **__):
        logits = model(ids, attention_mask=attention, position_ids=(attention.cumsum(1) - 1).clamp(0)).logits
        logps = logits[:, n_prompt - 1 : -1].log_softmax(-1)
        entropies = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, ids[:, n_prompt:, None])[..., 0], entropies, None

    plain = SimpleNamespace(
        _get_per_token_logps_and_entropies=logps_of, aux_loss_enabled=False, top_entropy_quantile=1.0, beta=0.0,
        off_policy_mask_threshold=None, importance_sampling_level="token", epsilon_low=0.2, epsilon_high=0.2,
        use_vllm=False, model=policy, current_gradient_accumulation_steps=1, max_completion_length=LONGEST,
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
    )  # fmt: skip
    plain.__dict__.update(settings)
    inputs = {
        "prompt_ids": ids[:, :n_prompt], "prompt_mask": attention[:, :n_prompt], "completion_ids": ids[:, n_prompt:],
        "completion_mask": tools, "tool_mask": tools, "advantages": advantages,
        "old_per_token_logps": old, "old_logps": old.sum(1), "num_items_in_batch": tools.sum(),
    }  # fmt: skip
    if reference is not None:
        with torch.no_grad():
            inputs["ref_per_token_logps"] = logps_of(reference)[0]
    return trainer_class._compute_loss(plain, policy, inputs)


@pytest.mark.parametrize(
    ("algorithm", "beta"),  # TRL's RLOO has the KL divergence in the reward
    [(name, beta) for name in ("grpo", "dr_grpo", "dapo", "cispo") for beta in (0.0, 0.3)] + [("rloo", 0.0)],
)
def test_loss_and_gradients_are_trls(models, rollouts, algorithm, beta):
    policy, reference = models[0], make(3) if beta else None
    high = EPSILON_HIGH.get(algorithm, 0.2)
    high = 0.3 if algorithm == "cispo" else high  # that some ratios are clipped
    batch = batch_of(rollouts, algorithm)
    policy.zero_grad()
    loss, n, extras = policy_loss(algorithm, LONGEST, epsilon_high=high, beta=beta, reference=reference)(policy, batch)
    (loss / n).backward()
    ours = gradients(policy)
    assert n == batch.n_targets and extras["clip_share"] > 0
    policy.zero_grad()
    expected = trls(
        rollouts, policy, reference, RLOOTrainer if algorithm == "rloo" else GRPOTrainer,
        group_advantages(REWARDS, algorithm).flatten(), loss_type=algorithm, beta=beta,
        epsilon_high=1 + high if algorithm == "cispo" else high,
    )  # fmt: skip
    expected.backward()
    assert (loss / n).item() == pytest.approx(expected.item(), abs=1e-4)
    n_tokens = sum(len(rollout.ids) for rollout in rollouts)
    assert_gradients_close(ours, gradients(policy), rounding(**shape_of(policy.config, n_tokens, backward=True)) * 10)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_on_policy_the_gradient_is_that_of_the_weighted_log_probabilities(models, rollouts, algorithm):
    """The ratio is exactly 1: nothing is clipped, and grpo's gradient is that of -A log p, by the plain formula."""
    policy, _ = models
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0, -0.5])
    batch = batch_of(rollouts, algorithm, advantages)
    del batch.inputs["old_logps"]
    with torch.no_grad():
        mine = torch.cat([token_logps(policy, r)[torch.tensor(r.sampled)[1:]] for r in rollouts])
    batch.inputs["sampler_logps"] = mine
    policy.zero_grad()
    loss, n, extras = policy_loss(algorithm, LONGEST)(policy, batch)
    (loss / n).backward()
    ours = gradients(policy)
    assert extras["clip_share"] == 0 and extras["sampler_difference"] < 1e-4 * len(rollouts)
    policy.zero_grad()
    total = 0.0
    n_tokens = sum(rollout.n_sampled for rollout in rollouts)
    for advantage, rollout in zip(advantages, rollouts, strict=True):
        ids = torch.tensor([rollout.ids])
        logps = policy(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        logps = logps[torch.tensor(rollout.sampled)[1:]]
        divisor = {"grpo": len(logps) * 6, "rloo": 6, "dr_grpo": 6 * LONGEST}.get(algorithm, n_tokens)
        total = total - advantage * logps.sum() / divisor
    total.backward()
    assert_gradients_close(ours, gradients(policy), rounding(**shape_of(policy.config, 128, backward=True)) * 10)


def test_equal_rewards_give_exactly_no_gradient(models, rollouts):
    """Also where their mean is rounded: 0.1 + 0.1 + 0.1 is not 0.3."""
    policy, _ = models
    for algorithm in set(ALGORITHMS) - {"ppo"}:
        advantages = group_advantages(torch.tensor([[0.1, 0.1, 0.1], [1.1, 1.1, 1.1]]), algorithm).flatten()
        assert not advantages.any()
        policy.zero_grad()
        loss, _, _ = policy_loss(algorithm, LONGEST)(policy, batch_of(rollouts, algorithm, advantages))
        loss.backward()
        assert not any(gradient.any() for gradient in gradients(policy).values())


def test_group_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 2.0]])
    assert group_advantages(rewards, "dr_grpo").tolist() == [[0.5, -0.5, -0.5, 0.5], [-0.5, -0.5, -0.5, 1.5]]
    rloo = group_advantages(rewards, "rloo")
    assert rloo[0].tolist() == pytest.approx([1 - 1 / 3, -2 / 3, -2 / 3, 1 - 1 / 3])
    assert rloo[1].tolist() == pytest.approx([-2 / 3, -2 / 3, -2 / 3, 2])
    scaled = group_advantages(rewards, "grpo")
    assert scaled[1].tolist() == pytest.approx([-0.5, -0.5, -0.5, 1.5], abs=1e-3)  # the standard deviation is 1
    assert scaled[0].std() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0)])
def test_advantages_of_ppo(gamma, lam):
    """Against the definition, a sum over all later tokens, in float64."""
    torch.manual_seed(0)
    values = torch.randn(9)
    found = token_advantages(values, 0.7, gamma, lam)
    v = [*values.double().tolist(), 0.0]
    deltas = [(0.7 if t == 8 else 0.0) + gamma * v[t + 1] - v[t] for t in range(9)]
    expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, 9)) for t in range(9)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_value_function_is_clipped_around_its_old_values(models, rollouts):
    policy, _ = models
    batch = batch_of(rollouts, "ppo", torch.zeros(6))
    n = len(batch.inputs["targets"])
    torch.manual_seed(0)
    head = nn.Linear(policy.config.dim, 1)
    batch.inputs.update(old_values=torch.randn(n), returns=torch.randn(n))
    loss, n_targets, extras = policy_loss("ppo", LONGEST, value_head=head, value_coef=0.5)(policy, batch)
    with torch.no_grad():
        hidden = torch.cat([
            policy(torch.tensor([r.ids])).last_hidden_state[0, :-1][torch.tensor(r.sampled)[1:]] for r in rollouts
        ])  # fmt: skip
        v, old, target = head(hidden)[:, 0].double(), batch.inputs["old_values"], batch.inputs["returns"]
        near = old + (v - old).clamp(-0.2, 0.2)
        errors = torch.maximum((v - target) ** 2, (near - target) ** 2) / 2
    assert n_targets == n and (near != v).any()
    assert loss.item() == pytest.approx(0.5 * errors.sum().item(), rel=1e-4)


def test_what_the_sampler_rounded_is_corrected(models, rollouts):
    """Importance weights: a token that the sampler thought half as probable counts twice, and never more."""
    policy, _ = models
    batch = batch_of(rollouts, "dapo")
    plain, _, _ = policy_loss("dapo", LONGEST)(policy, batch)
    for factor, weight in ((0.5, 2.0), (0.1, 2.0), (1.25, 0.8)):
        batch.inputs["sampler_logps"] = batch.inputs["old_logps"] + torch.tensor(factor).log()
        loss, _, _ = policy_loss("dapo", LONGEST)(policy, batch)
        assert loss.item() == pytest.approx(weight * plain.item(), rel=1e-4)
