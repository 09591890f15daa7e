"""Stage 6, reinforcement learning with verifiable rewards: the model answers questions, and learns from what was right.

    python 6-rlvr_train.py --data_path prompts.jsonl      # from the newest out/full_sft_*, rl_* or distill_*
    python 6-rlvr_train.py --data_path prompts.jsonl --algorithm dapo --group_size 16 --beta 0.01
    python 6-rlvr_train.py --resume

In:  the newest of out/full_sft_{dim}[_moe].pth, rl_ and distill_, and JSONL of {"messages", "answer", "verifier"}, perhaps
     with "tools" (the names of tools that the model may call) and "enable_thinking"; {"question", "answer"} as in GSM8K
     with --verifier number
Out: out/rlvr_{dim}[_moe].pth and .json, .metrics.jsonl, .png and .resume/ as in 1-pretrain.py

In every step the model answers some questions, --group_size times each; tool calls are run, and it goes on with what
they return. A verifier compares each answer with the reference and gives it a reward. Answers that are better than the
others to the same question become more probable, the worse ones less. Nobody has to write good answers: it is enough to
recognise them. What cannot be learned this way is what the model never does by chance: SFT on some examples comes first.

For a mixture of experts the balance loss is not part of this stage, as in stage 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.cli import as_word, flag, parse_options
from common.errors import run_script
from common.files import ROOT
from trainer.options import RolloutOptions


@dataclass
class RlvrOptions(RolloutOptions):
    stage = "rlvr"

    data_path: list[Path] = flag(
        [ROOT / "dataset" / "rlvr_data.jsonl"],
        "prompts with answers that can be checked: JSONL (default: dataset/rlvr_data.jsonl)", nargs="+",
    )  # fmt: skip
    epsilon: float = flag(
        0.2, "how far the probability of a token may move in a step before it has no gradient", above=0
    )
    epsilon_high: float | None = flag(
        None,
        "the same for tokens that become more probable (default: dapo 0.28, cispo 4, the others --epsilon)",
        above=0,
    )
    beta: float = flag(0.0, "strength of the pull towards the model before this stage (KL divergence); 0: none", min=0)
    judge_url: str | None = flag(
        None, "address of an OpenAI-compatible API whose model grades answers, for --verifier judge; its key is read from "
        "OPENAI_API_KEY", metavar="URL",
    )  # fmt: skip
    judge_model: str | None = flag(None, "the model that grades answers at --judge_url", metavar="NAME")
    reward_model: Path | None = flag(
        None, "folder of a sequence classifier with one output, for --verifier reward_model", metavar="FOLDER"
    )
    value_coef: float = flag(0.1, "ppo: weight of the loss of the value function", above=0)
    learning_rate: float = 1e-4
    batch_size: int = flag(8, "prompts whose answers go through the model at once, per process")
    warmup_iters: int = 10
    weight_decay: float = 0.0
    log_interval: int = 1
    val_fraction: float = flag(0.05, "share of the prompts held out for validation, chosen by content; 0: none")
    val_interval: int = 50

    def validate(self) -> list[str]:
        for_ppo = ("value_coef", "gamma", "gae_lambda")
        changed = [name for name in for_ppo if getattr(self, name) != getattr(RlvrOptions, name)]
        found = super().validate()
        if (self.judge_url is None) != (self.judge_model is None):
            found.append("--judge_url and --judge_model belong together: give both")
        if self.algorithm == "cispo" and self.epsilon != RlvrOptions.epsilon:
            found.append("--epsilon does nothing for --algorithm cispo: use --epsilon_high")
        return found + [
            f"--{name} is for --algorithm ppo and does nothing for {self.algorithm}: leave it out"
            for name in changed
            if self.algorithm != "ppo"
        ]


def main() -> None:
    options = parse_options(RlvrOptions, __doc__)

    # Imported here, because PyTorch takes seconds to load: --help and wrong flags are answered at once.
    from evaluation.judges import open_judges
    from evaluation.rollouts import read_prompts
    from evaluation.tools import TOOLS, find_tools
    from evaluation.verifiers import parse_verifier
    from model.device import resolve_device, resolve_dtype
    from model.tokenizer import load_tokenizer
    from trainer.distributed import cleanup_distributed, init_distributed
    from trainer.finetune import starting_model
    from trainer.policy_losses import policy_loss
    from trainer.recipe import require_files, weights_run
    from trainer.rollouts import RolloutLoader, add_value_head, frozen_copy, train_and_val_prompts, without_value_head
    from trainer.trainer import fit

    device = resolve_device(options.device)
    dist_env = init_distributed(options.device, options.timeout)
    tools = TOOLS | find_tools(options.tools)
    judges = open_judges(options.judge_url, options.judge_model, options.reward_model, device)
    verifier = parse_verifier(options.verifier, judges=judges, allow_functions=True) if options.verifier else None

    # Model: one that answers, for ppo with a value function, and for --beta a copy of what it is now.
    tokenizer = load_tokenizer(options.tokenizer)
    model, origin = starting_model(options, ["full_sft", "rl", "distill"], tokenizer, dist_env)
    names = (
        "algorithm", "group_size", "max_new_tokens", "max_tool_calls", "verifier", "judge_model", "reward_model", "epsilon",
        "epsilon_high", "beta", "value_coef", "gamma", "gae_lambda", "steps_per_generation", "tools",
    )  # fmt: skip
    flags = options.describe()
    objective = {name: flags[name] for name in names}
    run = weights_run(options, model.config, tokenizer, dist_env, origin, objective=objective)
    require_files(options.data_path, "name your prompts with --data_path; dataset/sample/rlvr_data.jsonl has some")
    reference = frozen_copy(model, device) if options.beta else None
    value_head = add_value_head(model) if options.algorithm == "ppo" else None
    run = without_value_head(run)

    # Data: questions with their answers. The batches are the model's own answers to them.
    prompts = read_prompts(
        options.data_path, tokenizer, model.config.max_seq_len - options.max_new_tokens,
        verifier=verifier, judges=judges, tools=tools, max_dropped=options.max_dropped,
    )  # fmt: skip
    train, val = train_and_val_prompts(prompts, options)
    make_loader = partial(
        RolloutLoader, model=model, tokenizer=tokenizer, options=options, dtype=resolve_dtype(options.dtype, device),
        value_head=value_head, heartbeat=partial(dist_env.heartbeat, "answering the prompts", count=False),
    )  # fmt: skip

    # Loss: answers with a positive advantage become more probable.
    loss = policy_loss(
        options.algorithm, options.max_new_tokens, options.epsilon, options.epsilon_high, options.beta, reference,
        value_head, options.value_coef,
    )  # fmt: skip
    fit(model, loss, train, val, options, run, dist_env, make_loader=make_loader)
    cleanup_distributed(dist_env)
    path = options.out_dir / f"{run.name}.pth"
    print(f"done: {path}; now try: python 2-eval.py --weights {as_word(path)}")


if __name__ == "__main__":
    run_script(main)
