"""C-Eval: how many multiple-choice questions about Chinese school, study and professions a model answers right.

    python eval_ceval.py                                          # the newest of rlvr, rl, distill and full_sft in out
    python eval_ceval.py --weights out/pretrain_512.pth --plain --shots 5
    python eval_ceval.py --lora out/lora_medical_512
    python eval_ceval.py --hf path/to/folder
    python eval_ceval.py --data_dir dataset/sample/ceval          # the quiz about the sample data
    python eval_ceval.py --test                                   # submission.json for cevalbenchmark.com

In: a folder of the official CSVs (val, dev, test). Out: a table on the terminal and, in --out_dir, summary.json, a
SUBJECT_result.csv with every answer, and ceval.png. Guessing gets 25%: a small model on the real C-Eval is not far
from there, so compare a difference with the standard error before you trust it.

--score letter  the question and the lettered options are shown; the answer is whichever of A, B, C, D is the most
                probable continuation.
--score text    the question alone is shown; the answer is the option with the highest log-probability per byte (of its
                UTF-8: the same measure for every tokenizer). For models that do not know what the letters are for.

Answers are those of float32. Where the hardware is fast in half precision, that computes first, and float32 decides
all close calls; --dtype sets one precision for everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.cli import flag, parse_options, validate_folder
from common.errors import UserError, run_script
from common.files import ROOT
from evaluation.options import EvaluatedModelOptions


@dataclass
class CevalOptions(EvaluatedModelOptions):
    data_dir: Path = flag(ROOT / "dataset" / "ceval" / "ceval-exam", "folder with val, dev, test")
    out_dir: Path = flag(ROOT / "out" / "ceval", "folder for the results (default: out/ceval)")
    subjects: list[str] = flag([], "only these subjects (default: all in the folder)", nargs="+")
    shots: int = flag(0, "examples from dev before each question", choices=range(6))
    score: str = flag("letter", "what is compared, see above", choices=["letter", "text"])
    plain: bool = flag(False, "bare text instead of the chat format: for pretrained models", action="store_true")
    test: bool = flag(False, "answer the test questions and write submission.json", action="store_true")
    dtype: str = flag("auto", "precision, see above", choices=["auto", "bfloat16", "float16", "float32"])

    def validate(self) -> list[str]:
        return super().validate() + validate_folder("--out_dir", self.out_dir)


def main() -> None:
    options = parse_options(CevalOptions, __doc__)

    import torch  # heavy imports come after the command line is checked, so that --help is fast

    from evaluation import ceval_results
    from evaluation.ceval import read_examples, read_questions
    from evaluation.evaluated_model import open_evaluated_model
    from model.device import DTYPES

    part = "test" if options.test else "val"
    questions = read_questions(options.data_dir, part, answers=not options.test, subjects=options.subjects)
    examples = read_examples(options.data_dir, [question.subject for question in questions], options.shots)
    empty = [question for question in questions if not all(question.options)]
    if empty and options.score == "text":
        raise UserError(f"{empty[0].where}: an option is empty; --score text cannot compare it")
    if empty:
        print(f"warning: {len(empty)} of {len(questions)} questions have an empty option, the first: {empty[0].where}")

    model = open_evaluated_model(options, DTYPES.get(options.dtype, torch.float32), plain=options.plain)
    device, context = model.model.device, model.context
    print(f"{model.name}: {len(questions):,} questions, {options.shots} examples each, by {options.score}, on {device}")
    encoded = [model.to_multiple_choice(q, examples[q.subject], options.score, options.plain) for q in questions]
    items = [item for item, _, _ in encoded]
    n_dropped, n_cut = sum(dropped for _, dropped, _ in encoded), sum(cut for _, _, cut in encoded)
    if n_dropped:
        print(
            f"warning: {n_dropped} of {len(items) * options.shots} examples were left out: context of {context} tokens"
        )
    if n_cut:
        print(f"warning: {n_cut} of {len(items)} questions are longer than {context} tokens: cut from the left")
    scores, precision = model.score(items, options.dtype, options.batch_tokens)
    results = ceval_results.results_table(questions, [one.tolist() for one in scores])

    if options.test:
        path = options.out_dir / "submission.json"
        ceval_results.write_submission(path, results)
        print(f"answers to {len(results):,} questions of {results['subject'].nunique()} subjects: {path}")
        return
    summary = {
        "model": model.name,
        "data": str(options.data_dir),
        "shots": options.shots,
        "score": options.score,
        "format": "plain" if options.plain else "chat",
        "examples_left_out": n_dropped,
        "questions_cut": n_cut,
        **precision,
        **ceval_results.summarize(results),
    }
    ceval_results.write_results(options.out_dir, results, summary)
    print(ceval_results.format_summary(summary))
    print(f"results: {options.out_dir}")


if __name__ == "__main__":
    run_script(main)
