"""C-Eval: how many multiple-choice questions about Chinese school, study and professions a model answers right.

    python eval_ceval.py                                          # the newest of out/rl_*.pth, out/full_sft_*.pth
    python eval_ceval.py --weights out/pretrain_512.pth --plain --shots 5
    python eval_ceval.py --lora out/lora_medical_512
    python eval_ceval.py --hf path/to/folder
    python eval_ceval.py --data_dir dataset/sample/ceval          # the quiz about the sample data
    python eval_ceval.py --test                                   # submission.json for cevalbenchmark.com

In: a folder of the official CSVs (val, dev, test). Out: a table on the terminal and, in --out_dir, summary.json, a
SUBJECT_result.csv with every answer, and ceval.png. Guessing gets 25%: a small model on the real C-Eval is not far
from there, so look at the standard error before calling a difference one.

--score letter  the question and the lettered options are shown; whichever of A, B, C, D is the most probable next token
                is the answer.
--score text    the question alone is shown; the option with the highest log-probability per byte (of its UTF-8: the same
                measure for every tokenizer) is the answer. For models that do not know what the letters are for.

Answers are those of float32. Where the hardware is fast in half precision, that computes first, and float32 decides
all close calls; --dtype sets one precision for everything.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load: no traceback

import argparse
import csv
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common.cli import Parser, validate_folder
from common.errors import UserError, run_script
from common.files import atomic_write
from evaluation import ceval
from evaluation.ceval import Answered, Question
from evaluation.scoring import BATCH_TOKENS, MultipleChoice, draft_models, score, score_cascade
from inference.model_finder import find_model
from model.device import DTYPES, resolve_device, resolve_dtype
from model.tokenizer import BOS_ID, CHAT_TEMPLATE, TOKENIZER_DIR, encode_text, load_tokenizer, render_chat
from model.weights import load_checkpoint

ROOT = Path(__file__).resolve().parent
COLUMNS = ["id", "question", *"ABCD", "answer", "prediction", "correct", *(f"p_{letter}" for letter in "ABCD")]

# Those that systems come with or offer; the first is the one to install.
CHINESE_FONTS = [
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Heiti TC", "Microsoft YaHei", "SimHei",
]  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--weights", type=Path, help=".pth file (default: the newest of rl and full_sft in out)")
    which.add_argument("--lora", type=Path, help="adapter folder; its base is found by what the adapter says")
    which.add_argument("--hf", type=Path, help="folder that transformers can load: an export, or another model")
    add = parser.add_argument
    add("--trust_remote_code", action="store_true", help="let --hf run Python code in that folder")
    add("--tokenizer", type=Path, default=TOKENIZER_DIR, help="tokenizer folder for .pth files (default: in model/)")
    add("--data_dir", type=Path, default=ROOT / "dataset" / "ceval" / "ceval-exam", help="folder with val, dev, test")
    add("--out_dir", type=Path, default=ROOT / "out" / "ceval", help="folder for the results (default: out/ceval)")
    add("--subjects", nargs="+", default=[], help="only these subjects (default: all in the folder)")
    add("--shots", type=int, default=0, choices=range(6), help="examples from dev before each question (default: 0)")
    add("--score", choices=["letter", "text"], default="letter", help="what is compared, see above (default: letter)")
    add("--plain", action="store_true", help="bare text instead of the chat format: for pretrained models")
    add("--test", action="store_true", help="answer the test questions and write submission.json")
    add("--max_seq_len", type=int, help="longest prompt in tokens (default: the length the model was trained at)")
    add("--batch_tokens", type=int, help="tokens that go through the model at once (default: 512 on a CPU, else 16384)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="precision, see above (default: auto)")
    args = parser.parse_args()
    errors = [
        f"--{name} {value} must be at least {least}"
        for name, value, least in (("max_seq_len", args.max_seq_len, 8), ("batch_tokens", args.batch_tokens, 1))
        if value is not None and value < least
    ]
    errors += validate_folder("--out_dir", args.out_dir)
    if args.trust_remote_code and args.hf is None:
        errors.append("--trust_remote_code is for --hf")
    if errors:
        parser.error(errors)
    return args


# ---- the model


@dataclass
class Subject:
    """What is examined: a model, how text becomes its tokens, and the context it was trained at."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    context: int
    ours: bool  # the tokenizer is MiniMind's: encoded by model.tokenizer, where text never becomes a control token

    def encode(self, prompt: str | list[dict]) -> tuple[list[int], int]:
        """Token ids of a prompt, and how many at its start must survive when it is cut from the left."""
        if isinstance(prompt, str):
            if self.ours:
                return [BOS_ID, *encode_text(self.tokenizer, prompt)], 1
            return self.tokenizer(prompt).input_ids, 0
        if self.ours:
            ids, _ = render_chat(self.tokenizer, prompt, add_generation_prompt=True)
            return ids, 1 + len(encode_text(self.tokenizer, "user\n"))
        chat = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        return chat["input_ids"], 0

    def continuation(self, prompt: str | list[dict], text: str) -> list[int]:
        if self.ours:
            return encode_text(self.tokenizer, text)
        if isinstance(prompt, str):  # some tokenizers put a space before a text that stands alone
            before, both = self.tokenizer(prompt).input_ids, self.tokenizer(prompt + text).input_ids
            if both[: len(before)] == before and len(both) > len(before):
                return both[len(before) :]
        return self.tokenizer(text, add_special_tokens=False).input_ids


def open_model(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Subject:
    """The model that the flags name; UserError if it cannot be had."""
    if args.hf is not None:
        return _open_folder(args, device, dtype)
    try:
        tokenizer = load_tokenizer(args.tokenizer)
        if args.lora is not None:
            from model.lora import load_adapter

            found = load_adapter(args.lora, device, tokenizer=tokenizer)
        else:
            path = args.weights or find_model(ROOT / "out", ["rl", "full_sft"])
            if path is None:
                raise UserError("no rl_*.pth or full_sft_*.pth in out: train one, or name a file with --weights")
            found = load_checkpoint(path, device, dtype, tokenizer)
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:  # what torch makes of some damaged files
        raise UserError(f"{args.lora or path} cannot be read ({error}); copy it again or save it anew") from error
    for note in found.notes:
        print(f"note: {note}")
    return Subject(found.model.to(dtype).eval(), tokenizer, str(args.lora or path), found.config.max_seq_len, ours=True)


def _open_folder(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Subject:
    folder = args.hf
    if not (folder / "config.json").is_file():
        raise UserError(f"--hf {folder}: no config.json in it; name a folder that transformers can load")
    options = {"local_files_only": True, "trust_remote_code": args.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).to(device)
    except (ValueError, OSError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--hf {folder} cannot be loaded: {reason}. If it comes with code of its own that you have read and "
            "trust, add --trust_remote_code"
        ) from error
    if not args.plain and not tokenizer.chat_template:
        raise UserError(f"--hf {folder}: its tokenizer has no chat template; add --plain to ask in bare text")
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"--hf {folder}: {len(tokenizer)} tokens in the tokenizer, {model.config.vocab_size} in the model"
        )
    ours = tokenizer.chat_template == CHAT_TEMPLATE and tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [
        0,
        1,
        2,
    ]
    context = getattr(model.config, "max_position_embeddings", None) or 2048
    return Subject(model.eval(), tokenizer, str(folder), context, ours)


# ---- prompts


def make_item(
    subject: Subject, question: Question, examples: Sequence[Question], args: argparse.Namespace
) -> tuple[MultipleChoice, int, bool]:
    """One question as token ids that fit into the context; how many examples were left out for that, and whether the
    question itself was cut from the left."""
    texts = ceval.answers_of(question, args.score)
    write = ceval.plain_prompt if args.plain else ceval.chat_prompt
    for dropped in range(len(examples) + 1):
        prompt = write(question, examples[dropped:], args.score)
        options = [subject.continuation(prompt, text) for text in texts]
        ids, head = subject.encode(prompt)
        room = max(1, (args.max_seq_len or subject.context) - max(map(len, options)) + 1)
        if len(ids) <= room:
            break
    too_long = len(ids) > room
    if too_long:
        head = min(head, room - 1)
        ids = ids[:head] + ids[len(ids) - (room - head) :]
    lengths = [float(len(text.encode())) for text in texts] if args.score == "text" else None
    return MultipleChoice(ids, options, lengths), dropped, too_long


def answer_all(subject: Subject, questions: list[Question], args: argparse.Namespace) -> tuple[list[Answered], dict]:
    """Every question's scores, and what is worth knowing about how they came about."""
    examples: dict[str, list[Question]] = {}
    if args.shots:
        names = list(ceval.by_subject([Answered(question, (0, 0, 0, 0)) for question in questions]))
        try:
            found = ceval.read_questions(args.data_dir, "dev", answers=True, subjects=names)
        except UserError as error:
            raise UserError(f"--shots {args.shots} takes its examples from {args.data_dir / 'dev'}: {error}") from error
        for example in found:
            examples.setdefault(example.subject, []).append(example)
        few = [name for name in names if len(examples[name]) < args.shots]
        if few:
            raise UserError(f"--shots {args.shots}: fewer examples in {args.data_dir / 'dev'} for {', '.join(few)}")
    empty = [question for question in questions if not all(question.options)]
    if empty and args.score == "text":
        raise UserError(f"{empty[0].where}: an option is empty; --score text cannot compare it")
    if empty:
        print(f"warning: {len(empty)} of {len(questions)} questions have an empty option, the first: {empty[0].where}")
    made = [make_item(subject, q, examples.get(q.subject, [])[: args.shots], args) for q in questions]
    items, dropped, cut = (
        [item for item, _, _ in made],
        sum(n for _, n, _ in made),
        sum(is_cut for _, _, is_cut in made),
    )
    context = args.max_seq_len or subject.context
    if dropped:
        print(f"warning: {dropped} of {len(items) * args.shots} examples were left out: context of {context} tokens")
    if cut:
        print(f"warning: {cut} of {len(items)} questions are longer than {context} tokens: cut from the left")

    model, device = subject.model, subject.model.device
    half = resolve_dtype("auto", device)
    batch_tokens = args.batch_tokens or (BATCH_TOKENS if device.type == "cpu" else 16384)
    with tqdm(total=len(items), desc="C-Eval", unit="question", disable=None, leave=False) as bar:
        rough = draft_models(model, half) if args.dtype == "auto" and half != torch.float32 else []
        if rough:
            scores, counts = score_cascade([*rough, model], items, batch_tokens=batch_tokens, on_done=bar.update)
            precision = {"dtype": f"{str(half).removeprefix('torch.')} and float32", "decided_in_float32": counts[-1]}
        else:
            scores = score(model, items, batch_tokens=batch_tokens, on_done=bar.update)
            precision = {"dtype": str(model.dtype).removeprefix("torch.")}
    broken = sum(not one.isfinite().all() for one in scores)
    if broken:
        raise UserError(f"{subject.name}: probabilities of {broken} questions are not finite; try --dtype float32")
    answered = [Answered(q, tuple(s.tolist())) for q, s in zip(questions, scores, strict=True)]
    return answered, {"examples_left_out": dropped, "questions_cut": cut, **precision}


# ---- results


def table(summary: dict) -> str:
    """Overall, categories and subjects as lines for people; a star where guessing hardly gets."""
    groups = [("overall", summary["overall"]), *summary["categories"].items()]
    subjects = [(f"{name} {one['name']}".strip(), one) for name, one in summary["subjects"].items()]
    lines = []
    for rows in (groups, subjects):
        lines += [f"{'accuracy':>8}  {'± s.e.':>6}  {'questions':>9}"]
        for name, one in rows:
            share, error, star = one["accuracy"], one["standard_error"], "*" if one["above_chance"] else " "
            lines.append(f"{share:8.1%}  {error:6.1%}  {one['questions']:9,} {star} {name}")
        lines.append("")
    lines.append("guessing: 25.0%    * more than two standard errors of guessing above it")
    return "\n".join(lines)


def write_results(out_dir: Path, answered: list[Answered], summary: dict) -> None:
    """Each file is written whole or not at all, and summary.json last: without it the folder is not a result."""
    (out_dir / "summary.json").unlink(missing_ok=True)
    subjects = ceval.by_subject(answered)
    for name, group in subjects.items():
        with atomic_write(out_dir / f"{name}_result.csv", encoding="utf-8-sig") as file:  # Excel needs the mark
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(COLUMNS)
            for one in group:
                q, shares = one.question, [f"{p:.4f}" for p in one.probabilities]
                rows.writerow([q.id, q.question, *q.options, q.answer, one.letter, int(one.correct), *shares])
    for old in set(out_dir.glob("*_result.csv")) - {out_dir / f"{name}_result.csv" for name in subjects}:
        with old.open(encoding="utf-8-sig", errors="replace") as file:
            ours = file.readline().strip() == ",".join(COLUMNS)
        if ours:  # of a run with other subjects: not what summary.json is about
            old.unlink()
    draw(summary, out_dir / "ceval.png")
    with atomic_write(out_dir / "summary.json") as file:
        json.dump(summary, file, ensure_ascii=False, indent=2)
        file.write("\n")


def draw(summary: dict, path: Path) -> None:
    """Accuracy of every group and subject as bars with their standard errors, and the line of guessing."""
    from matplotlib import font_manager, rc_context  # slow to import
    from matplotlib.figure import Figure  # no window is needed

    bars = [
        ("overall", summary["overall"], "black"),
        *((n, one, "tab:blue") for n, one in summary["categories"].items()),
    ]
    bars += [(name, one, "lightsteelblue") for name, one in summary["subjects"].items()]
    names, values, colours = zip(*bars, strict=True)
    # Subjects may be named in Chinese, and "$" in a name is no formula.
    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(font for font in CHINESE_FONTS if font in installed)]
    with rc_context({"font.family": fonts, "text.parse_math": False}), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure = Figure(figsize=(9, 1.2 + 0.22 * len(bars)), layout="constrained")
        axes = figure.subplots()
        axes.barh(
            names, [100 * one["accuracy"] for one in values], xerr=[100 * one["standard_error"] for one in values],
            color=colours, ecolor="grey",
        )  # fmt: skip
        axes.axvline(100 * ceval.CHANCE, color="tab:red", linestyle="--", label="guessing: 25%")
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="right answers, %", title=f"C-Eval: {Path(summary['model']).name}")
        axes.legend(loc="lower right")
        with atomic_write(path, "wb", encoding=None) as file:
            figure.savefig(file, format="png", dpi=120)
    missing = [warning for warning in caught if "missing from font" in str(warning.message)]
    for other in caught:
        if other not in missing:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    if missing:  # said once, not for each character
        print(f"note: no font on this machine has all characters of {path}; {CHINESE_FONTS[0]} has them")


def main() -> None:
    args = parse_args()
    part = "test" if args.test else "val"
    questions = ceval.read_questions(args.data_dir, part, answers=not args.test, subjects=args.subjects)
    try:
        device = resolve_device(args.device)
    except ValueError as error:
        raise UserError(str(error)) from error
    subject = open_model(args, device, DTYPES.get(args.dtype, torch.float32))
    print(f"{subject.name}: {len(questions):,} questions, {args.shots} examples each, by {args.score}, on {device}")
    if args.max_seq_len is not None and args.max_seq_len > subject.context:
        print(
            f"note: trained at {subject.context} tokens; --max_seq_len {args.max_seq_len} lets prompts go beyond them"
        )
    answered, facts = answer_all(subject, questions, args)

    if args.test:
        submission = {
            name: {one.question.id: one.letter for one in group} for name, group in ceval.by_subject(answered).items()
        }
        with atomic_write(args.out_dir / "submission.json") as file:
            json.dump(submission, file, ensure_ascii=False, indent=2)
            file.write("\n")
        print(
            f"answers to {len(answered):,} questions of {len(submission)} subjects: {args.out_dir / 'submission.json'}"
        )
        return
    settings = {"shots": args.shots, "score": args.score, "format": "plain" if args.plain else "chat"}
    summary = {"model": subject.name, "data": str(args.data_dir), **settings, **facts, **ceval.summarise(answered)}
    write_results(args.out_dir, answered, summary)
    print(table(summary))
    print(f"results: {args.out_dir}")


if __name__ == "__main__":
    run_script(main)
