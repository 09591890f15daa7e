"""Stage 5, DPO: from pairs of a better and a worse answer, the model learns which of them to prefer.

    python 5-dpo_train.py                                                      # from the newest out/full_sft_*.pth
    python 5-dpo_train.py --data_path pairs.jsonl --beta 0.1 --loss ipo
    python 5-dpo_train.py --resume

In:  out/full_sft_{dim}[_moe].pth, and dataset/dpo/train_data.json (made by python data_process.py dpo) or JSONL:
     {"prompt", "chosen", "rejected"} or {"conversations", "chosen", "rejected"}, with one or more turns before the answers
Out: out/rl_{dim}[_moe].pth and .json, .metrics.jsonl, .png and .resume/ as in 1-pretrain.py

The model is compared with itself before this stage (the reference): the loss falls as the better answer gains
probability over the worse one, relative to the probabilities under the reference. --beta sets the penalty for moving
away from the reference. The loss starts at ln 2 = 0.693 (--loss sigmoid) or at 1 / (2 beta)^2, which is 25 for the default
beta (--loss ipo), the accuracy (share of pairs ranked correctly) at 0.

For a mixture of experts the balance loss is not part of this stage: pairs are few, and the gate hardly changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.cli import as_word, flag, parse_options
from common.errors import run_script
from common.files import ROOT
from trainer.options import TuneOptions


@dataclass
class DpoOptions(TuneOptions):
    stage = "rl"

    data_path: list[Path] = flag(
        [ROOT / "dataset" / "dpo" / "train_data.json"],
        "preference pairs: JSON or JSONL (default: dataset/dpo/train_data.json)", nargs="+",
    )  # fmt: skip
    beta: float = flag(0.1, "strength of the pull towards the reference model", above=0)
    loss: str = flag("sigmoid", "sigmoid: DPO; ipo: its squared variant", choices=["sigmoid", "ipo"])
    label_smoothing: float = flag(0.0, "assumed share of pairs with swapped labels (sigmoid only)")
    max_dropped: float = flag(
        0.1, "largest share of rows that cannot be used; more than elsewhere: long questions are common in pairs"
    )
    learning_rate: float = flag(2e-5, "peak learning rate; DPO needs far smaller ones than SFT")
    batch_size: int = flag(8, "pairs that go through the model at once, per process")
    val_fraction: float = flag(0.05, "share of the pairs held out for validation, chosen by content; 0: none")
    weight_decay: float = 0.0

    def validate(self) -> list[str]:
        smoothing = self.label_smoothing
        rules = {
            f"--label_smoothing {smoothing} must be at least 0 and below 0.5": 0 <= smoothing < 0.5,
            "--label_smoothing has no meaning for --loss ipo": not (smoothing and self.loss == "ipo"),
        }
        return super().validate() + [error for error, kept in rules.items() if not kept]


def main() -> None:
    options = parse_options(DpoOptions, __doc__)

    # Imported here, because PyTorch takes seconds to load: --help and wrong flags are answered at once.
    from data_pipeline.preferences import read_pairs, train_and_val_pairs
    from model.tokenizer import load_tokenizer
    from trainer.distributed import cleanup_distributed, init_distributed
    from trainer.finetune import add_ref_logps, starting_model
    from trainer.losses import dpo_loss
    from trainer.recipe import require_files, weights_run
    from trainer.trainer import fit

    dist_env = init_distributed(options.device, options.timeout)

    # Model: one that answers.
    tokenizer = load_tokenizer(options.tokenizer)
    model, origin = starting_model(options, ["full_sft"], tokenizer, dist_env)
    objective = {"loss": options.loss, "beta": options.beta, "label_smoothing": options.label_smoothing}
    run = weights_run(options, model.config, tokenizer, dist_env, origin, objective=objective)
    require_files(options.data_path, "make it with: python data_process.py dpo, or name one with --data_path")

    # Data: pairs of answers, and the log-probabilities that the model gives them before this stage.
    pairs = read_pairs(options.data_path, tokenizer, model.config.max_seq_len, options.max_dropped)
    train, val = train_and_val_pairs(pairs, tokenizer, options.val_fraction, options.val_tokens)
    weights = origin.fingerprint if origin else f"random weights of seed {options.seed}"
    reference = [weights, model.config.architecture()]
    add_reference = partial(add_ref_logps, [part for part in (train, val) if part], reference, options, dist_env)

    # Loss: the better answer should gain probability over the worse one.
    loss = dpo_loss(options.beta, options.label_smoothing, options.loss)
    fit(model, loss, train, val, options, run, dist_env, add_reference)
    cleanup_distributed(dist_env)
    path = options.out_dir / f"{run.name}.pth"
    print(f"done: {path}; now try: python 2-eval.py --weights {as_word(path)}")


if __name__ == "__main__":
    run_script(main)
