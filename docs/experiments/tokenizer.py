"""Train tokenizers of several sizes on the sample texts, and measure bytes per token on texts they have not seen.

    python docs/experiments/tokenizer.py

docs/tokenizer.md explains what it shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

SIZES = (280, 500, 1000, 2000, 4000, 6400)
HELD_OUT = 0.1


def main() -> None:
    options = parse_options(tiny.ExperimentOptions, __doc__)
    import json

    from transformers import PreTrainedTokenizerFast

    from data_pipeline.bpe import measure, train_bpe
    from data_pipeline.tokenizer_data import is_held_out

    lines = (tiny.SAMPLE / tiny.TEXTS).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    held_out = [text for text in texts if is_held_out(text, HELD_OUT)]
    seen = [text for text in texts if not is_held_out(text, HELD_OUT)]
    parts = {
        "Chinese": [text for text in held_out if not text.isascii()],
        "English": [text for text in held_out if text.isascii()],
    }
    results, ratios = [], {name: [] for name in parts}
    for size in SIZES:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe(seen, size), eos_token="</s>")
        found = {name: measure(tokenizer, some).bytes_per_token for name, some in parts.items()}
        for name, ratio in found.items():
            ratios[name].append(ratio)
        results.append((len(tokenizer), *found.values(), f"{len(tokenizer) * 512 / 1e6:.2f}M"))
    tiny.table("vocabulary, bytes per token Chinese, English, embedding of a model of width 512", results)

    def draw(axes) -> None:
        for name, values in ratios.items():
            axes.plot([row[0] for row in results], values, "o-", label=name)
        axes.set(xlabel="entries of the vocabulary", ylabel="bytes per token, unseen text", ylim=(0, None))
        axes.legend(frameon=False)

    tiny.plot(options.output, __file__, draw)


if __name__ == "__main__":
    run_script(main)
