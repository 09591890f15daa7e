"""On-policy batches: the model answers the questions of a step, and learns from its own answers.

`RolloutLoader` takes the place of the `BatchLoader` of other stages: its batches depend on the weights, so that none is
prepared ahead. A step's rollouts are a function of weights, seed and step: a resumed run repeats them. With
--steps_per_generation several steps share the answers of one generation, each with prompts of its own.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from common.files import short_hash
from data_pipeline.datasets import Batch, BatchLoader
from data_pipeline.packing import derive_seed
from data_pipeline.sequences import sequence_batch, split_samples
from evaluation.rollouts import Rollout, RolloutPrompt, run_rollouts
from inference.backends import choose_backend
from inference.generator import BatchGenerator
from inference.options import SamplingParams
from model.model import Transformer
from model.tokenizer import EOS_ID
from trainer.options import RolloutOptions
from trainer.policy_losses import TOKEN_MEAN, group_advantages, pick, policy_forward, token_advantages
from trainer.trainer import Run


class PromptSet:
    """Prompts as a data set for the loop, which asks it for numbers only: the batches come from `RolloutLoader`."""

    def __init__(self, prompts: Sequence[RolloutPrompt], algorithm: str) -> None:
        self.prompts, self.algorithm = prompts, algorithm
        self.fingerprint = short_hash([prompt.content_hash() for prompt in prompts])

    def __len__(self) -> int:
        return len(self.prompts)

    def documents(self, indices: Sequence[int]) -> list[int]:
        return [*indices]

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return empty answers without any advantage, for passes that count for nothing."""
        rollouts = [
            Rollout(prompt, [*prompt.ids, EOS_ID], [False] * len(prompt.ids) + [True], [0.0])
            for prompt in (self.prompts[i] for i in indices)
        ]
        return make_batch(rollouts, [torch.zeros(1)] * len(rollouts), [False] * len(rollouts), self.algorithm)


def train_and_val_prompts(prompts: list[RolloutPrompt], options: RolloutOptions) -> tuple[PromptSet, PromptSet | None]:
    """Split prompts by content; hold out as --val_fraction and --val_tokens say."""
    n_tokens = sum(len(prompt.ids) for prompt in prompts)
    train, val = split_samples(prompts, "prompts", n_tokens, options.val_fraction, options.val_tokens)
    return PromptSet(train, options.algorithm), PromptSet(val, options.algorithm) if val else None


def make_batch(
    rollouts: Sequence[Rollout], advantages: Sequence[Tensor], equal: Sequence[bool], algorithm: str
) -> Batch:
    """Return rollouts as one row of packed sequences: no padding, and they do not attend to each other.

    Args:
        advantages: of each rollout's sampled tokens, (tokens,) or (1,).
        equal: whether its group had equal rewards.

    The inputs are those of `sequence_batch`, with sampler_logps and advantages of the sampled tokens, and the entries named
    in `ROLLOUT_METRICS`, (rollouts,).
    """
    batch = sequence_batch([(rollout.ids, rollout.sampled) for rollout in rollouts])
    lengths = [rollout.n_sampled for rollout in rollouts]
    batch.inputs.update({
        "sampler_logps": torch.tensor([logp for rollout in rollouts for logp in rollout.logps]),
        "advantages": torch.cat([a.expand(n) for a, n in zip(advantages, lengths, strict=True)]),
        "reward": torch.tensor([rollout.reward.value for rollout in rollouts]),
        "accuracy": torch.tensor([rollout.reward.correct for rollout in rollouts]),
        "answer_length": torch.tensor(lengths),
        "cut": torch.tensor([rollout.cut for rollout in rollouts]),
        "tool_calls": torch.tensor([rollout.calls for rollout in rollouts]),
        "failed_calls": torch.tensor([rollout.failed_calls for rollout in rollouts]),
        "verifier_errors": torch.tensor([len(rollout.reward.errors) for rollout in rollouts]),
        "equal_rewards": torch.tensor([*equal]),
    })  # fmt: skip
    if algorithm == "ppo":
        batch.inputs.update({name: torch.zeros(batch.n_targets) for name in ("old_values", "returns")})
    return batch if algorithm in TOKEN_MEAN else dataclasses.replace(batch, n_targets=len(rollouts))


def frozen_copy(model: Transformer, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Transformer:
    """Return a copy of a model that is not trained."""
    frozen = copy.deepcopy(model)
    nn.Module.to(frozen, device, dtype)
    return frozen.eval().requires_grad_(False)


def add_value_head(model: Transformer) -> nn.Linear:
    """Give a model a value function: from the hidden state of a token to the reward to expect after it, at first 0."""
    head = nn.Linear(model.config.dim, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model.value_head = head
    return head


def without_value_head(run: Run) -> Run:
    """Return a run whose weights for later stages do not have the value function; its training state does."""

    def save_weights(info: dict, tensors: Iterable[tuple[str, Tensor]]) -> None:
        run.save_weights(info, (pair for pair in tensors if not pair[0].startswith("value_head.")))

    return dataclasses.replace(run, save_weights=save_weights)


class Sampler:
    """Decode with the weights that a model has now: in a copy, so that the model may be in training mode, and compiled.

    The copy, the memory for keys and values and the compiled kernel stay from step to step.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype, rows: int) -> None:
        self.model = model
        self.copy = frozen_copy(model, model.tok_embeddings.weight.device, dtype)
        self.generator = BatchGenerator(self.copy, rows)

    @torch.no_grad()
    def refresh(self) -> BatchGenerator:
        """Return the generator, with the newest weights."""
        for mine, newest in zip(self.copy.parameters(), self.model.parameters(), strict=True):
            mine.copy_(newest)
        self.generator.use_backend(choose_backend(self.copy))
        return self.generator


@dataclass
class OnPolicyLoader(BatchLoader):
    """One process's micro-batches of every step, made when the step begins; `micro_batch` counts prompts.

    Attributes:
        model: the one that is trained, on its device.
        dtype: of the sampler's weights.
        heartbeat: called while answers are made, which takes as long as it takes.
    """

    model: Transformer = field(kw_only=True)
    dtype: torch.dtype = field(kw_only=True)
    heartbeat: Callable[[], None] = field(kw_only=True, default=lambda: None)
    _sampler: Sampler | None = field(init=False, default=None)

    def prefetch(self, first: int) -> Iterator[tuple[list[Batch], BaseException | None]]:
        """Yield the batches of every step from `first` on, each made with the weights of that moment."""
        for step in range(first, self.schedule.total_steps):
            try:
                yield self.batches(step), None
            except Exception as error:
                yield [], error

    def generator(self, rows: int) -> BatchGenerator:
        """Return a generator with the newest weights; `rows` is the number of sequences at a time."""
        if self._sampler is None:
            self._sampler = Sampler(self.model, self.dtype, rows)
        return self._sampler.refresh()

    def numbered(self, step: int) -> list[tuple[int, int]]:
        """Return (number in the step, sample) of this process's prompts of a step; the seeds depend on the numbers."""
        return list(enumerate(self.schedule.samples(step)))[self.rank :: self.world_size]

    def padded(self, batches: list[Batch], step: int, size: int) -> list[Batch]:
        """Return micro-batches of `size` prompts, and as many more that do not count as other processes have."""
        samples = self.schedule.samples(step)
        dummy = dataclasses.replace(self.data.batch(samples[:1]), dummy=True)
        return batches + [dummy] * (-(-len(samples[:: self.world_size]) // size) - len(batches))


@dataclass
class RolloutLoader(OnPolicyLoader):
    """The batches of reinforcement learning.

    Attributes:
        value_head: of `model`, for ppo.
    """

    data: PromptSet
    tokenizer: PreTrainedTokenizerFast = field(kw_only=True)
    options: RolloutOptions = field(kw_only=True)
    value_head: nn.Module | None = field(kw_only=True, default=None)
    _ready: dict[tuple[int, int], list[Batch]] = field(init=False, default_factory=dict)  # of (step, micro-batch)
    _silent: bool = field(init=False, default=False)  # the last step had no gradient
    _errors: set[str] = field(init=False, default_factory=set)  # of verifiers, that were printed

    def resumable(self, step: int) -> bool:
        """Return whether the next step begins with new answers: those of a generation are not saved."""
        return step % self.options.steps_per_generation == 0

    def batches(self, step: int, size: int | None = None) -> list[Batch]:
        """Return the model's answers to this process's prompts of a step, `group_size` to each."""
        size = size or self.micro_batch
        if (step, size) not in self._ready:
            per_generation = self.options.steps_per_generation
            last = min((step // per_generation + 1) * per_generation, self.schedule.total_steps)
            self._ready = self._generate(range(step, last), size)
        return self._ready.pop((step, size))

    def _generate(self, steps: range, size: int) -> dict[tuple[int, int], list[Batch]]:
        """Let the model answer the prompts of some steps; return the batches of each, of `size` prompts."""
        group_size, prompts, samplings, counts = self.options.group_size, [], [], []
        for step in steps:
            mine = self.numbered(step)
            counts.append(len(mine))
            prompts += [self.data.prompts[sample] for _, sample in mine for _ in range(group_size)]
            seeds = [derive_seed(self.schedule.seed, step, n, k) for n, _ in mine for k in range(group_size)]
            samplings += [self._sampling(temperature=1.0, seed=seed) for seed in seeds]
        answers = self._run(prompts, samplings)
        judged = [answer for answer in answers if answer.prompt.verifier.waits and not answer.cut]
        if judged and all(answer.reward.errors for answer in judged):
            raise UserError(f"the judge graded none of {len(judged)} answers: {judged[0].reward.errors[0]}")
        rollouts = iter(answers)
        made = {}
        for step, count in zip(steps, counts, strict=True):
            groups = [[next(rollouts) for _ in range(group_size)] for _ in range(count)]
            self._report(step, groups)
            found = [self._learnable(groups[i : i + size]) for i in range(0, count, size)]
            made[step, size] = self.padded(found, step, size)
        return made

    def shard(self, data: PromptSet, samples: list[int], micro_batch: int) -> Iterator[Batch]:  # type: ignore[override]
        """Yield this process's part of a validation set, answered without chance: always the most probable token."""
        size = micro_batch * self.options.group_size
        mine = samples[self.rank :: self.world_size]
        for begin in range(0, len(samples[:: self.world_size]), size):
            prompts = [data.prompts[i] for i in mine[begin : begin + size]]
            if not prompts:
                yield dataclasses.replace(data.batch(samples[:1]), dummy=True)
                continue
            rollouts = self._run(prompts, [self._sampling(temperature=0.0)] * len(prompts))
            nothing = [torch.zeros(1)] * len(rollouts)
            batch = make_batch(rollouts, nothing, [False] * len(rollouts), self.options.algorithm)
            if self.value_head is not None:
                batch.inputs.update(self._old_policy(batch, rollouts))  # the returns that its values are compared with
            yield batch

    def _sampling(self, temperature: float, seed: int | None = None) -> SamplingParams:
        return SamplingParams(self.options.max_new_tokens, temperature, seed=seed, logprobs=0)

    def _run(self, prompts: list[RolloutPrompt], samplings: list[SamplingParams]) -> list[Rollout]:
        generator = self.generator(self.micro_batch * self.options.group_size)
        rollouts = run_rollouts(
            generator, self.tokenizer, prompts, samplings, self.options.max_tool_calls, self.heartbeat
        )
        for error in {error for rollout in rollouts for error in rollout.reward.errors} - self._errors:
            self._errors.add(error)
            tqdm.write(f"WARNING: a verifier failed, and its answer is not learned from: {error}")
        return rollouts

    def _learnable(self, groups: list[list[Rollout]]) -> Batch:
        """Return the rollouts of some groups as a batch with their advantages.

        An answer whose verifier failed has none: nobody knows whether it was good. For the others it counts as the mean.
        """
        options, rollouts = self.options, [rollout for group in groups for rollout in group]
        known = torch.tensor([[not rollout.reward.errors for rollout in group] for group in groups])
        rewards = torch.tensor([[rollout.reward.value for rollout in group] for group in groups])
        means = (rewards * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp_min(1)
        rewards = torch.where(known, rewards, means)
        equal = [has_equal_rewards(group) for group in groups for _ in group]
        advantages = group_advantages(rewards, options.algorithm) if options.algorithm != "ppo" else rewards
        batch = make_batch(rollouts, [*advantages.flatten()[:, None]], equal, options.algorithm)
        if options.algorithm == "ppo" or options.steps_per_generation > 1:
            batch.inputs.update(self._old_policy(batch, rollouts))
        return batch

    @torch.no_grad()
    def _old_policy(self, batch: Batch, rollouts: list[Rollout]) -> dict[str, Tensor]:
        """Return what the model now thinks of its answers, for losses that compare: each (sampled tokens,) float32."""
        options, device = self.options, self.model.tok_embeddings.weight.device
        x = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        was_training = self.model.training
        self.model.eval()  # without dropout, as the sampler: a resumed run gets the same
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            out = policy_forward(self.model, x)
            values = None
            if self.value_head is not None:
                values = self.value_head(out.last_hidden_state[0, x["predicts"]]).squeeze(-1).float().cpu()
        self.model.train(was_training)
        found = {}
        if options.steps_per_generation > 1:
            found["old_logps"] = pick(out.logits[0].float().log_softmax(-1), x["targets"]).cpu()
        if values is not None:
            parts = zip(values.split([rollout.n_sampled for rollout in rollouts]), rollouts, strict=True)
            advantages = torch.cat([
                token_advantages(part, rollout.reward.value, options.gamma, options.gae_lambda) * (not rollout.reward.errors)
                for part, rollout in parts
            ])  # fmt: skip
            found |= {"advantages": advantages, "old_values": values, "returns": advantages + values}
        return found

    def _report(self, step: int, groups: list[list[Rollout]]) -> None:
        """Print an answer now and then, and say when there is nothing to learn."""
        if self.rank != 0:
            return
        if step % self.options.show_interval == 0:
            tqdm.write(describe(self.tokenizer, groups[0][0], step))
        silent = all(map(has_equal_rewards, groups))
        failed = sum(bool(rollout.reward.errors) for group in groups for rollout in group)
        if silent and not self._silent and self.options.algorithm != "ppo":
            reward = groups[0][0].reward.value
            tqdm.write(
                f"step {step + 1}: the answers to every question have equal rewards (the first: {reward:g}), and give no "
                "gradient: nothing can be learned from them; "
                + (
                    f"the verifiers failed for {failed} answers, see the warnings"
                    if failed
                    else "easier, harder or more prompts help, or a larger --group_size"
                )
            )
        self._silent = silent


def has_equal_rewards(group: Sequence[Rollout]) -> bool:
    """Return whether answers to one prompt have the same reward, apart from those whose verifier failed."""
    return len({rollout.reward.value for rollout in group if not rollout.reward.errors}) <= 1


def describe(tokenizer: PreTrainedTokenizerFast, rollout: Rollout, step: int) -> str:
    """Return a rollout as text: its question, everything after it, and its reward."""
    n_prompt = len(rollout.prompt.ids)
    question = rollout.prompt.messages[-1]["content"]
    expected = f" (the answer is {rollout.prompt.answer})" if rollout.prompt.answer else ""  # a judge needs none
    return (
        f"--- a rollout of step {step + 1}, reward {rollout.reward.value:g}{expected}:\n"
        f"{question}\n{tokenizer.decode(rollout.ids[n_prompt:])}\n---"
    )
