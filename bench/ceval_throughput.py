"""Measure how many C-Eval questions per second are scored in batches, compared with one question at a time in float32.

    python bench/ceval_throughput.py --data_dir dataset/ceval/ceval-exam --weights out/full_sft_512.pth

one at a time   float32, one forward pass for each sequence, logits only where they are needed
batched         float32, `evaluation.scoring.score`
cascade         as eval_ceval.py does it on this CPU: half precision first (including the time to convert the weights), then
                a more precise pass for close calls, and float32 for those that are still too close

It measures letters without examples, with 3 and with 5 examples, and the full text of the options. The cascade decides at
least 16 questions in float32, so a run with few questions says little about it: the whole set has 1,346. Without --weights
the model is random, and its margins are smaller than those of any trained model. The modes take turns, and the best round
of each counts.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.cli import Parser  # noqa: E402
from common.errors import run_script  # noqa: E402
from evaluation.ceval import read_examples, read_questions  # noqa: E402
from evaluation.evaluated_model import EvaluatedModel  # noqa: E402
from evaluation.scoring import MultipleChoice, draft_models, score, score_cascade  # noqa: E402
from model.LMConfig import preset  # noqa: E402
from model.model import Transformer  # noqa: E402
from model.tokenizer import load_tokenizer  # noqa: E402
from model.weights import load_checkpoint  # noqa: E402


def make_items(data_dir: Path, model: EvaluatedModel, n: int, shots: int, style: str) -> list[MultipleChoice]:
    """Return `n` questions, evenly spaced in the validation set; examples that do not fit into the context are left out."""
    questions = read_questions(data_dir, "val", answers=True)
    # Whole subjects, as in a real run: examples are shared by the questions of a subject.
    step = max(1, round(len(questions) / n)) if not shots else 1
    questions = questions[::step][:n]
    examples = read_examples(data_dir, [question.subject for question in questions], shots)
    return [model.to_multiple_choice(q, examples[q.subject], style, plain=False)[0] for q in questions]


@torch.inference_mode()
def one_at_a_time(model: Transformer, items: list[MultipleChoice]) -> list[torch.Tensor]:
    results = []
    for item in items:
        if all(len(option) == 1 for option in item.options):  # one pass is enough
            logits = model(torch.tensor([item.prompt]), logits_to_keep=1, use_cache=False).logits[0, -1]
            values = F.log_softmax(logits.float(), -1)[[option[0] for option in item.options]]
        else:
            values = torch.zeros(len(item.options))
            for i, option in enumerate(item.options):
                ids = torch.tensor([item.prompt + option[:-1]])
                logits = model(ids, logits_to_keep=len(option), use_cache=False).logits[0]
                values[i] = F.log_softmax(logits.float(), -1)[range(len(option)), option].sum()
        results.append(values / torch.tensor(item.lengths or [1.0]))
    return results


def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data_dir", type=Path, default=ROOT / "dataset" / "ceval" / "ceval-exam", help="folder with val and dev")
    add("--weights", type=Path, help=".pth file (default: random weights of minimind-v1-small)")
    add("--questions", type=int, default=200, help="number of questions (default: 200)")
    add("--rounds", type=int, default=2, help="rounds of each (default: 2)")
    add(
        "--only",
        choices=["letter", "letter, 3 shots", "letter, 5 shots", "text"],
        help="one of the kinds (default: all)",
    )
    args = parser.parse_args()
    if errors := [f"--{name} must be at least 1" for name in ("questions", "rounds") if getattr(args, name) < 1]:
        parser.error(errors)

    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    if args.weights:
        model = load_checkpoint(args.weights, dtype=torch.float32).model
    else:
        model = Transformer(preset("minimind-v1-small")).eval()
    evaluated = EvaluatedModel(model, tokenizer, "bench", context=480)
    print(f"{torch.get_num_threads()} threads, {args.questions} questions, best of {args.rounds} rounds")
    print("| | | questions/s | ratio | ratio by CPU time | different answers |")
    print("|---|---|---|---|---|---|")
    kinds = (
        ("letter", 0, "letter"),
        ("letter, 3 shots", 3, "letter"),
        ("letter, 5 shots", 5, "letter"),
        ("text", 0, "text"),
    )
    for title, shots, style in kinds:
        if args.only not in (None, title):
            continue
        items = make_items(args.data_dir, evaluated, args.questions, shots, style)
        modes = {
            "one at a time": lambda items=items: (one_at_a_time(model, items), []),
            "batched": lambda items=items: (score(model, items), []),
            "cascade": lambda items=items: score_cascade([*draft_models(model, torch.bfloat16), model], items),
        }
        walls: dict[str, list[float]] = {mode: [] for mode in modes}
        cpus: dict[str, list[float]] = {mode: [] for mode in modes}
        answers, checked = {}, {}
        for _ in range(args.rounds):
            for mode, work in modes.items():
                wall, cpu = time.perf_counter(), time.process_time()
                scores, checked[mode] = work()
                walls[mode].append(time.perf_counter() - wall)
                cpus[mode].append(time.process_time() - cpu)
                answers[mode] = [int(one.argmax()) for one in scores]
        first = "one at a time"
        for mode in modes:
            differ = sum(a != b for a, b in zip(answers[mode], answers[first], strict=True))
            name = " ".join([mode, *[f"({', '.join(map(str, checked[mode][1:]))} again)" for _ in checked[mode][:1]]])
            ratios = f"{min(walls[first]) / min(walls[mode]):.2f} | {min(cpus[first]) / min(cpus[mode]):.2f}"
            print(f"| {title} | {name} | {len(items) / min(walls[mode]):.1f} | {ratios} | {differ} |", flush=True)


if __name__ == "__main__":
    run_script(main)
