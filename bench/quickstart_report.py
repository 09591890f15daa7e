"""Write the report at the end of quickstart.sh: the results of every stage, measured on held-out questions.

    python bench/quickstart_report.py --out_dir out/quickstart          # writes report.md and shows it

It reads the checkpoints and metrics in --out_dir and the held-out files in --data_dir, and computes every figure anew.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import PreTrainedTokenizerFast

from bench.rlvr import MEASURED, measure, read_held_out
from common.cli import Parser  # noqa: E402
from common.errors import UserError, run_script
from common.files import ROOT, atomic_write
from data_pipeline.preferences import PreferencePairs, read_pairs
from data_pipeline.readers import iter_records
from data_pipeline.records import parse_conversation
from evaluation.runs import read_metrics
from inference.generator import generate_text
from inference.model_finder import find_model
from inference.model_loader import open_model
from inference.options import SamplingParams
from model.chat_format import render_chat
from model.model import Transformer, describe_parameters
from model.tokenizer import BOS_ID, TOKENIZER_DIR, encode_text, load_tokenizer
from model.weights_file import Checkpoint
from trainer.losses import sequence_logps
from trainer.report import write_markdown_report

OPENINGS = ["The capital of France is", "中国的首都是", "Once upon a time", "从前"]
QUESTIONS = [
    ["What is the capital of Japan?"],
    ["水是什么颜色的？", "三加四等于几？"],
    ["Hello, my name is Anna.", "What is my name?"],
    ["你是谁？"],
]
GREEDY = SamplingParams(max_new_tokens=48)


def ask(model: Transformer, tokenizer: PreTrainedTokenizerFast, chats: list[list[dict]]) -> list[str]:
    """Return the greedy answers to chats that end with a question."""
    prompts = [render_chat(tokenizer, chat, add_generation_prompt=True)[0] for chat in chats]
    return generate_text(model, tokenizer, prompts, GREEDY, max_rows=64)


def dialogues(path: Path) -> list[list[dict]]:
    return [parse_conversation(record.data) for record in iter_records(path, None)]


def exact_match(model: Transformer, tokenizer: PreTrainedTokenizerFast, chats: list[list[dict]]) -> float:
    """Return the share of the chats whose last answer the model gives word for word."""
    answers = ask(model, tokenizer, [chat[:-1] for chat in chats])
    return sum(a.strip() == chat[-1]["content"] for a, chat in zip(answers, chats, strict=True)) / len(chats)


@torch.no_grad()
def preferred(model: Transformer, tokenizer: PreTrainedTokenizerFast, path: Path) -> float:
    """Return the share of the pairs whose chosen answer is more probable for the model than the rejected one."""
    pairs = PreferencePairs(read_pairs([path], tokenizer, model.config.max_seq_len, max_dropped=0), "report")
    right = 0
    for begin in range(0, len(pairs), 32):
        batch = pairs.batch(range(begin, min(begin + 32, len(pairs))))
        chosen, rejected = sequence_logps(model, batch.inputs)[0].view(-1, 2).unbind(1)
        right += int((chosen > rejected).sum())
    return right / len(pairs)


def transcript(model: Transformer, tokenizer: PreTrainedTokenizerFast) -> str:
    lines = []
    for questions in QUESTIONS:
        chat: list[dict] = []
        for question in questions:
            chat.append({"role": "user", "content": question})
            answer = ask(model, tokenizer, [chat])[0]
            chat.append({"role": "assistant", "content": answer})
            lines += [f"> **you**: {question}  ", f"> **MiniMind**: {answer}  "]
        lines.append("")
    return "\n".join(lines)


def load(path: Path | None, what: str) -> Checkpoint:
    if path is None or not path.exists():
        raise UserError(f"{what} is missing: create it with bash quickstart.sh")
    return open_model(path, dtype=torch.float32)[0]


def losses_table(out_dir: Path, names: list[str]) -> str:
    rows = [
        "| stage | steps | tokens | loss, first | last | validation | bits per byte |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        lines = read_metrics(out_dir / f"{name}.metrics.jsonl")
        if not lines:
            raise UserError(f"{out_dir / name}.metrics.jsonl is missing or empty: create it with bash quickstart.sh")
        last_val = next((line for line in reversed(lines) if "val_loss" in line), {})
        val = f"{last_val['val_loss']:.3f}" if last_val else "–"
        bits = f"{last_val['bits_per_byte']:.3f}" if "bits_per_byte" in last_val else "–"
        first, last = lines[0], lines[-1]
        rows.append(
            f"| {name} | {last['step']} | {last['tokens']:,} | {first['loss']:.3f} | {last['loss']:.3f} | {val} | {bits} |"
        )
    return "\n".join(rows)


def compression_table(folders: dict[str, Path]) -> str:
    rows = ["| tokenizer | held-out text | bytes per token |", "|---|---|---|"]
    for name, folder in folders.items():
        training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        for source, figures in training["held_out_compression"].items():
            rows.append(f"| {name} | {source} | {figures['bytes_per_token']:.2f} |")
    return "\n".join(rows)


def vision_table(path: Path) -> str:
    """Return what eval_vlm.py measured, by kind of question."""
    if not path.exists():
        raise UserError(f"{path} is missing: create it with bash quickstart.sh")
    rows = ["| questions about pictures | right | chance | no image | wrong image |", "|---|---|---|---|---|"]
    for kind, one in json.loads(path.read_text(encoding="utf-8"))["kinds"].items():
        shares = " | ".join(f"{one[name]:.1%}" for name in ("right", "chance", "without", "wrong"))
        rows.append(f"| {kind} ({one['n']}) | {shares} |")
    return "\n".join(rows)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "quickstart")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "dataset" / "sample")
    args = parser.parse_args()
    out, data = args.out_dir, args.data_dir
    started = time.perf_counter()
    tokenizer = load_tokenizer()
    base = load(find_model(out, ["pretrain"]), "the pretrained model")
    sft = load(find_model(out, ["full_sft"]), "the fine-tuned model")
    rl = load(find_model(out, ["rl"]), "the model after DPO")
    size = base.path.stem.removeprefix("pretrain_")
    adapter_path = out / f"lora_identity_{size}"
    adapter = load(adapter_path, "the identity adapter")

    questions = dialogues(data / "sft_heldout.jsonl")
    recall = dialogues(data / "recall_heldout.jsonl")
    identity = dialogues(data / "lora_identity_heldout.jsonl")
    pairs = data / "dpo_heldout.json"
    before = ask(sft.model, tokenizer, [chat[:-1] for chat in identity])
    after = ask(adapter.model, tokenizer, [chat[:-1] for chat in identity])
    changed = sum(a != b for a, b in zip(before, after, strict=True)) / len(identity)
    persona = sum(a.strip() == chat[-1]["content"] for a, chat in zip(after, identity, strict=True)) / len(identity)
    quiz_path = out / "ceval" / "summary.json"
    quiz = json.loads(quiz_path.read_text(encoding="utf-8"))["overall"] if quiz_path.exists() else None

    answered, recalled = (exact_match(sft.model, tokenizer, chats) for chats in (questions, recall))
    figures = [
        (f"SFT: exact match on {len(questions)} questions with new wording", answered),
        (f"SFT: exact match on {len(recall)} dialogues that ask about something said earlier", recalled),
        (f"LoRA: changed answers to {len(identity)} questions about its identity", changed),
        ("LoRA: of these, answers with the exact words of the new persona", persona),
        ("DPO: better answer more probable, held-out pairs, before", preferred(sft.model, tokenizer, pairs)),
        ("DPO: the same, after", preferred(rl.model, tokenizer, pairs)),
        ("DPO: exact match on the questions with new wording, after", exact_match(rl.model, tokenizer, questions)),
    ]  # fmt: skip
    exercises, folder = read_held_out(tokenizer), out / "exercises"
    taught = load(find_model(folder, ["full_sft"]), "the model that was taught exercises")
    rewarded = load(find_model(folder, ["rlvr"]), "the model after reinforcement learning")
    both = [measure(checkpoint.model, tokenizer, exercises) for checkpoint in (taught, rewarded)]
    for name in MEASURED:
        for when, found in zip(("before", "after"), both, strict=True):
            figures.append((f"RLVR: exercises, {name}, {when}", found[name]))
    if quiz is not None:
        title = f"SFT: quiz of {quiz['questions']} questions, most probable of four answers (chance: 25%)"
        figures.insert(2, (title, quiz["accuracy"]))
    prompts = [[BOS_ID, *encode_text(tokenizer, text)] for text in OPENINGS]
    continuations = generate_text(base.model, tokenizer, prompts, SamplingParams(max_new_tokens=30))
    names = [f"pretrain_{size}", f"full_sft_{size}", adapter_path.name, f"rl_{size}"]
    tokenizers = {"shipped": TOKENIZER_DIR}
    if (out / "tokenizer" / "training.json").exists():
        tokenizers["trained in this run"] = out / "tokenizer"

    sections = [
        "# Report of this run",
        f"The model: {describe_parameters(base.model)}, trained on dataset/sample on this machine.",
        "## Results",
        "\n".join(["| measured | result |", "|---|---|", *(f"| {name} | {value:.1%} |" for name, value in figures)]),
        "## Losses",
        losses_table(out, names),
        "\n".join(f"![{name}]({name}.png)" for name in names),
        f"![reward](exercises/{rewarded.path.stem}.png)",
        "## The base model continues",
        "\n".join(f"- **{text}** {' '.join(more.split())}" for text, more in zip(OPENINGS, continuations, strict=True)),
        "## A conversation after DPO",
        transcript(rl.model, tokenizer),
        "## Identity before and after LoRA",
        "\n".join(["| question | before | after |", "|---|---|---|"] + [
            f"| {chat[-2]['content']} | {b} | {a} |" for chat, b, a in list(zip(identity, before, after, strict=True))[::8]
        ]),
        "## What the model sees",
        vision_table(out / "vision" / "vlm" / "summary.json"),
        "![pictures with answers](vision/vlm/sheet.png)",
        "## Tokenizers",
        compression_table(tokenizers),
        f"(report made in {time.perf_counter() - started:.0f} s)",
    ]  # fmt: skip
    text = "\n\n".join(sections) + "\n"
    with atomic_write(out / "report.md") as file:
        file.write(text)
    write_markdown_report(out / "report.html", "Report of this run", text)
    print(text)
    print(f"written to {out / 'report.html'}, and as text to {out / 'report.md'}")


if __name__ == "__main__":
    run_script(main)
