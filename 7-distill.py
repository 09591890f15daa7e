"""Stage 7, distillation: a small model learns from the probabilities of a larger one, not only from the text.

    python 7-distill.py --teacher out/full_sft_768.pth --preset minimind-v1-small      # from the newest out/full_sft_512.pth
    python 7-distill.py --teacher out/full_sft_768.pth --init_from out/pretrain_512.pth --divergence reverse
    python 7-distill.py --teacher ../llama-folder --top_k 32                           # ask the teacher once, then reuse
    python 7-distill.py --teacher out/full_sft_768.pth --on_policy --max_new_tokens 128  # learn from its own answers
    python 7-distill.py --teacher out/full_sft_768.pth --resume

In:  the teacher: a .pth file, a LoRA folder, an exported folder or a causal language model of Hugging Face with the same
     tokenizer; the student's out/full_sft_{dim}[_moe].pth or pretrain; dialogues as for 3-full_sft.py
Out: out/distill_{dim}[_moe].pth and .json, .metrics.jsonl, .png and .resume/ as in 1-pretrain.py

For every token of an answer the student sees how probable the teacher finds each token of the vocabulary. The loss is
--alpha times the cross entropy of 3-full_sft.py, plus (1 - alpha) times the divergence from the teacher. Logged are "loss",
the cross entropy alone, which is comparable with that of 3-full_sft.py, and "divergence". With --on_policy the student
answers the questions itself, and learns from the teacher what it should have written. Answers of a teacher that is only
behind an API become training data with: python data_process.py distill
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.cli import as_word, flag, parse_options
from common.errors import UserError, run_script
from common.files import ROOT
from trainer.options import DialogueOptions


@dataclass
class DistillOptions(DialogueOptions):
    stage = "distill"

    data_path: list[Path] = flag(
        [ROOT / "dataset" / "sft_data.csv"],
        "dialogues: CSV (history,q,a) or JSONL (messages or conversations) (default: dataset/sft_data.csv)", nargs="+",
    )  # fmt: skip
    teacher: Path | None = flag(
        None,
        "model to learn from: .pth file, LoRA folder or model folder; every process holds all of it",
        metavar="PATH",
    )
    on_policy: bool = flag(
        False, "learn from the student's own answers to the questions, in place of those in the data"
    )
    num_workers: int = flag(1, "threads that prepare the next batches; on_policy: ignored", min=0)
    max_new_tokens: int = flag(256, "on_policy: maximum length of an answer in tokens", min=1)
    alpha: float | None = flag(
        None, "weight of the labels in the loss; the rest is the teacher's (default: 0.5; on_policy: 0)", min=0, below=1
    )
    temperature: float = flag(1.0, "divide the logits of both by this: above 1, improbable tokens count more", above=0)
    divergence: str | None = flag(
        None, "forward: KL(teacher || student); reverse: KL(student || teacher); js: Jensen-Shannon (default: forward; "
        "on_policy: reverse)", choices=["forward", "reverse", "js"],
    )  # fmt: skip
    top_k: int = flag(
        0, "keep only this many of the teacher's probabilities for each token, computed once into the cache; 0: all, "
        "computed while training", min=0, below=2**16,
    )  # fmt: skip
    learning_rate: float = 5e-4
    batch_size: int = flag(
        16, "rows of max_seq_len tokens (on_policy: questions) that go through the model at once, per process"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is None:
            self.alpha = 0.0 if self.on_policy else 0.5
        if self.divergence is None:
            self.divergence = "reverse" if self.on_policy else "forward"

    def validate(self) -> list[str]:
        rules = {
            "--teacher PATH is needed: the model to learn from": self.teacher is not None,
            "--alpha weighs labels, and --on_policy has none: leave --alpha out": not (self.on_policy and self.alpha),
            "--top_k keeps what the teacher says of the data, and --on_policy has other texts in every step: leave one "
            "of them out": not (self.on_policy and self.top_k),
            f"--max_new_tokens {self.max_new_tokens} is for --on_policy: leave it out": (
                self.on_policy or self.max_new_tokens == DistillOptions.max_new_tokens
            ),
            "--on_policy does not support --fsdp and --deepspeed: leave them out": not (
                self.on_policy and (self.fsdp or self.deepspeed)
            ),
        }
        return super().validate() + [error for error, kept in rules.items() if not kept]


def main() -> None:
    options = parse_options(DistillOptions, __doc__)

    # Imported here, because PyTorch takes seconds to load: --help and wrong flags are answered at once.
    from data_pipeline.datasets import BatchLoader
    from model.device import resolve_device, resolve_dtype
    from model.tokenizer import load_tokenizer
    from trainer.distillation import AnswerLoader, Questions, cached_top_k, distillation_loss, open_teacher
    from trainer.distributed import cleanup_distributed, init_distributed, main_process_first
    from trainer.finetune import chat_rows, starting_model
    from trainer.recipe import require_files, weights_run
    from trainer.trainer import fit

    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    dist_env = init_distributed(options.device, options.timeout)

    # Model: a student, and a teacher that stays as it is.
    tokenizer = load_tokenizer(options.tokenizer)
    model, origin = starting_model(options, ["full_sft", "pretrain"], tokenizer, dist_env)
    teacher = open_teacher(options.teacher, tokenizer, options.tokenizer, device, dtype)
    if origin is not None and teacher.fingerprint == origin.fingerprint:
        raise UserError(
            f"--teacher {options.teacher} is also what the student starts from: there is nothing to learn. Name smaller "
            "weights with --init_from, or their size with --preset"
        )
    names = ("alpha", "temperature", "divergence", "top_k", "on_policy", "max_new_tokens")
    objective = {name: getattr(options, name) for name in names}
    run = weights_run(
        options, model.config, tokenizer, dist_env, origin, teacher=teacher.fingerprint, objective=objective
    )
    require_files(options.data_path, "make it with: python data_process.py sft, or name one with --data_path")

    # Data: dialogues, with a mask over everything that the assistant does not say; or only their questions.
    rows, val = chat_rows(options, dist_env, tokenizer, model.config.max_seq_len)
    train, make_loader = rows, BatchLoader
    if options.on_policy:
        train = Questions(rows, model.config.max_seq_len - options.max_new_tokens)
        make_loader = partial(
            AnswerLoader, model=model, dtype=dtype, max_new_tokens=options.max_new_tokens,
            heartbeat=partial(dist_env.heartbeat, "answering the questions", count=False),
        )  # fmt: skip
    elif options.top_k:
        ask = partial(
            cached_top_k, teacher=teacher, k=options.top_k, temperature=options.temperature, cache_dir=options.cache_folder,
            device=device, dtype=dtype, batch_size=options.batch_size,
        )  # fmt: skip
        with main_process_first(dist_env, "asking the teacher"):
            train, val = ask(rows), ask(val) if val else None
        del ask
        teacher = None  # training does not need it any more

    # Loss: the labels, and what the teacher thinks of every token.
    loss = distillation_loss(options.alpha, options.temperature, options.divergence, teacher, model.config.use_moe)
    fit(model, loss, train, val, options, run, dist_env, make_loader=make_loader)
    cleanup_distributed(dist_env)
    path = options.out_dir / f"{run.name}.pth"
    print(f"done: {path}; now try: python 2-eval.py --weights {as_word(path)}")


if __name__ == "__main__":
    run_script(main)
