"""Measure what a model forgets when it learns something new with all its weights, with and without replay of earlier data.

    python bench/replay.py                # after bash quickstart.sh; about two minutes

It fine-tunes the quickstart's model (stage 3, SFT) on 188 dialogues about an invented tea house, of dataset/sample: once
alone, and once with a share of the dialogues of stage 3 (--mix). Both have the same new dialogues as often. Measured is the
share of held-out questions that are answered word for word.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import UserError, run_script  # noqa: E402
from common.files import ROOT  # noqa: E402

SAMPLE = ROOT / "dataset" / "sample"


@dataclass
class Options:
    out_dir: Path = flag(ROOT / "out" / "quickstart", "folder of the quickstart (default: out/quickstart)")
    replay: list[float] = flag([0.2, 0.5], "shares of the earlier dialogues (default: 0.2 0.5)", nargs="+")
    epochs: float = flag(4.0, "passes over the new dialogues", above=0)


def main() -> None:
    options = parse_options(Options, __doc__)
    weights, earlier = options.out_dir / "full_sft_192.pth", options.out_dir / "data" / "sft_data.csv"
    if not (weights.exists() and earlier.exists()):
        raise UserError(f"{weights} or {earlier} is missing: create them with bash quickstart.sh")
    from bench.quickstart_report import dialogues, exact_match, load  # PyTorch takes seconds to load
    from bench.stages import run_stage
    from model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer()
    new = dialogues(SAMPLE / "lora_domain_heldout.jsonl")
    old = dialogues(SAMPLE / "sft_heldout.jsonl")

    def row(name: str, path: Path) -> None:
        model = load(path, name).model
        shares = (exact_match(model, tokenizer, chats) for chats in (new, old))
        print(f"| {name} | {' | '.join(f'{share:.1%}' for share in shares)} |", flush=True)

    print(f"| fine-tuned on | {len(new)} new questions | {len(old)} earlier questions |\n|---|---|---|")
    row("nothing", weights)
    with tempfile.TemporaryDirectory() as folder:
        for share in [0.0, *options.replay]:
            mix = [earlier, "--mix", 1 - share, share] if share else []
            flags = ["--init_from", weights, "--out_dir", folder, "--epochs", options.epochs]
            flags += ["--data_path", SAMPLE / "lora_domain.jsonl", *mix]
            flags += "--overwrite --device cpu --batch_size 4 --learning_rate 1e-3 --val_fraction 0".split()
            run_stage("3-full_sft.py", *flags)
            name = f"the new dialogues and {share:.0%} replay" if share else "the new dialogues only"
            row(name, Path(folder) / "full_sft_192.pth")


if __name__ == "__main__":
    run_script(main)
