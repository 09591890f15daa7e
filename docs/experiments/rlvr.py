"""Raise the share of right answers with six algorithms of reinforcement learning, and ruin it with too high a rate.

    python docs/experiments/rlvr.py

docs/rlvr.md explains what it shows.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

PROMPTS, GROUP, LONGEST = 8, 8, 6  # prompts of a step, answers to each, tokens of an answer
PER_GENERATION = 4  # steps that learn from answers of the same weights
RATE, TOO_HIGH = 2e-3, 3e-2


@dataclasses.dataclass
class Options(tiny.ExperimentOptions):
    sft_steps: int = flag(200, "optimizer steps before, on dialogues of which a third are right", min=10)
    steps: int = flag(48, "optimizer steps of each algorithm", min=8)


def ways(question: str) -> list[str]:
    """Return three answers: the digits as they are, the last one first, and (the right one) in ascending order."""
    return [question, question[::-1], "".join(sorted(question))]


def main() -> None:
    options = parse_options(Options, __doc__)
    import contextlib
    import copy
    import io
    import itertools
    import random

    import torch

    from data_pipeline.datasets import Schedule
    from evaluation.rollouts import RolloutPrompt, greedy_rollouts
    from evaluation.verifiers import parse_verifier
    from model.chat_format import render_chat
    from model.tokenizer import EOS_ID
    from trainer.distillation import answer_batch
    from trainer.options import ALGORITHMS, RolloutOptions
    from trainer.policy_losses import policy_loss
    from trainer.rollouts import PromptSet, RolloutLoader, add_value_head

    tokenizer, verifier, chance = tiny.tokenizer(), parse_verifier("exact"), random.Random(0)
    questions = ["".join(digits) for digits in itertools.permutations("0123456789", 3)]
    questions = [question for question in questions if len(set(ways(question))) == 3]
    chance.shuffle(questions)

    def prompt(question: str) -> RolloutPrompt:
        ids, _ = render_chat(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
        return RolloutPrompt([{"role": "user", "content": question}], ids, ways(question)[-1], verifier, {})

    prompts = [prompt(question) for question in questions]
    held_out, train = prompts[:96], prompts[96:]

    class Dialogues:
        """The questions, each with one of the three answers, drawn anew every time."""

        def __len__(self) -> int:
            return len(train)

        def batch(self, indices: list[int]) -> Any:
            drawn = [(train[i].ids, chance.choice(ways(train[i].messages[0]["content"]))) for i in indices]
            return answer_batch([(ids, [*tokenizer.encode(answer), EOS_ID]) for ids, answer in drawn])

    base = tiny.new_model(max_seq_len=64)
    tiny.train(base, Dialogues(), options.sft_steps, 8e-3, optimizer="muon", batch_size=64)

    def learn(algorithm: str, rate: float) -> tuple[Any, list[dict[str, float]]]:
        """Return a model after reinforcement learning, and what each step logs, as means over its answers."""
        model, data = copy.deepcopy(base), PromptSet(train, algorithm)
        head = add_value_head(model) if algorithm == "ppo" else None
        settings = RolloutOptions(
            algorithm=algorithm, group_size=GROUP, max_new_tokens=LONGEST, steps_per_generation=PER_GENERATION
        )
        answers = RolloutLoader(
            data, Schedule(len(data), PROMPTS, PROMPTS * options.steps, 0), 0, 1, PROMPTS, 0, model=model,
            dtype=torch.float32, tokenizer=tokenizer, options=settings, value_head=head,
        ).prefetch(0)  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            history = tiny.train(
                model, data, options.steps, rate, optimizer="muon", batch_size=PROMPTS, warmup=4,
                loss_fn=policy_loss(algorithm, LONGEST, value_head=head), change=lambda _: next(answers)[0][0],
            )  # fmt: skip
        return model, [{name: value / line["n_answers"] for name, value in line.items()} for line in history]

    def row(label: str, model: Any, lines: list[dict[str, float]]) -> tuple:
        rollouts = greedy_rollouts(model.eval(), tokenizer, held_out, LONGEST)
        greedy = sum(rollout.reward.correct for rollout in rollouts) / len(rollouts)
        means = [sum(line[name] for line in lines) / len(lines) for name in ("accuracy", "equal_rewards", "entropy")]
        return label, means[0], greedy, *means[1:]

    results, curves = [], {}
    for label, algorithm, rate in [*((name, name, RATE) for name in ALGORITHMS), ("grpo, rate x 15", "grpo", TOO_HIGH)]:
        model, curves[label] = learn(algorithm, rate)
        # The first answers are those of the model before any step.
        results = results or [row("before", base, curves[label][:PER_GENERATION])]
        results.append(row(label, model, curves[label][-2 * PER_GENERATION :]))
    tiny.table(
        "algorithm, right when sampled, right when greedy (held out), groups with equal rewards, entropy", results
    )

    def draw(accuracy, entropy) -> None:
        for i, (label, lines) in enumerate(curves.items()):
            style = {"color": f"C{i}"} if label in ALGORITHMS else {"color": "black", "linestyle": "--"}
            for axes, name in ((accuracy, "accuracy"), (entropy, "entropy")):
                values = tiny.losses([{"loss": line[name]} for line in lines])
                axes.plot(range(1, len(values) + 1), values, label=label, **style)
        accuracy.set(xlabel="optimizer step", ylabel="sampled answers that are right", ylim=(0, 1))
        entropy.set(xlabel="optimizer step", ylabel="entropy of a token (nats)", yscale="log")
        accuracy.legend(frameon=False, fontsize=8)

    tiny.plot(options.output, __file__, draw, n_plots=2)


if __name__ == "__main__":
    run_script(main)
