"""Fine-tune with three loss masks, and look at the answers: all tokens, only the answers, answers without their end.

    python docs/experiments/sft.py

docs/sft.md explains what it shows.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import flag, parse_options  # noqa: E402
from common.errors import run_script  # noqa: E402
from docs.experiments import tiny  # noqa: E402

QUESTIONS = 64


@dataclasses.dataclass
class Options(tiny.ExperimentOptions):
    steps: int = flag(160, "optimizer steps of each run", min=20)


def main() -> None:
    options = parse_options(Options, __doc__)
    import json

    from inference.generator import generate
    from inference.options import SamplingParams
    from model.chat_format import render_chat
    from model.tokenizer import EOS_ID

    rows, val = tiny.chat_rows()

    def all_tokens(batch):
        inputs = batch.inputs
        labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["position_ids"] == 0), -100)
        return changed(batch, labels)

    def without_end(batch):
        labels = batch.inputs["labels"]
        return changed(batch, labels.masked_fill(labels == EOS_ID, -100))

    def changed(batch, labels):
        n_targets = int((labels != -100).sum())
        return dataclasses.replace(batch, inputs=batch.inputs | {"labels": labels}, n_targets=n_targets)

    lines = (tiny.SAMPLE / "sft_heldout.jsonl").read_text(encoding="utf-8").splitlines()[:: 514 // QUESTIONS]
    asked = [json.loads(line) for line in lines[:QUESTIONS]]
    messages = [[{"role": "user", "content": f"{row['instruction']}\n{row['input']}".strip()}] for row in asked]
    prompts = [render_chat(tiny.tokenizer(), chat, add_generation_prompt=True)[0] for chat in messages]
    ways = {"answers and their </s>": lambda batch: batch, "all tokens": all_tokens, "answers, not </s>": without_end}
    curves, results = {}, []
    for name, change in ways.items():
        model = tiny.new_model()
        curves[name] = []

        def look(step: int, model=model, curve=curves[name]) -> None:
            if step % 20 == 0:
                curve.append((step, tiny.evaluate(model, val)))

        tiny.train(model, rows, options.steps, 8e-3, optimizer="muon", change=change, each_step=look)
        model.eval()
        ended = lengths = 0
        for output in generate(model, prompts, SamplingParams(max_new_tokens=48)):
            lengths += 1
            ended += output.finish == "stop"
        shares = [change(rows.batch([i])) for i in range(32)]
        share = sum(batch.n_targets for batch in shares) / sum(batch.n_tokens for batch in shares)
        stopped = f"{ended} of {len(prompts)}"
        results.append((name, f"{share:.0%}", curves[name][-1][1], stopped, f"{lengths / len(prompts):.1f}"))
    tiny.table("learned, share of the tokens, loss of held-out answers, answers that end, tokens in an answer", results)

    def draw(axes) -> None:
        for name, curve in curves.items():
            axes.plot(*zip(*curve, strict=True), "o-", label=name)
        axes.set(xlabel="optimizer step", ylabel="loss of held-out answers and their </s>", ylim=(0, None))
        axes.legend(frameon=False, title="learned")

    tiny.plot(options.output, __file__, draw)


if __name__ == "__main__":
    run_script(main)
