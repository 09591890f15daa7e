"""C-Eval (https://cevalbenchmark.com): read its CSVs and write its prompts.

A folder has `val/SUBJECT_val.csv` (id, question, A, B, C, D, answer), `dev/SUBJECT_dev.csv` with five examples for
few-shot prompts, and `test/SUBJECT_test.csv` without answers. A quiz of your own in this format works too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from data_pipeline.readers import iter_records
from data_pipeline.text_files import BadLine

LETTERS = "ABCD"
WHERE_TO_GET = (
    "python data_process.py download ceval loads C-Eval (CC BY-NC-SA 4.0, https://huggingface.co/datasets/ceval/ceval-exam) "
    "into dataset/ceval/ceval-exam; dataset/sample/ceval is a small quiz"
)


@dataclass(frozen=True)
class Question:
    """One row of a CSV. `answer` is "" in test files."""

    subject: str
    id: str
    question: str
    options: tuple[str, ...]
    answer: str
    where: str = field(default="", compare=False)  # file and line, for messages


# ---- reading


def read_questions(data_dir: Path, part: str, *, answers: bool, subjects: Sequence[str] = ()) -> list[Question]:
    """Read all questions of `data_dir`/`part`, subject by subject in the order of the file names.

    Args:
        part: val, dev or test.
        answers: require the column answer with one of A to D in every row.
        subjects: read only these; empty: all.

    Raises UserError with everything that is wrong in the folder: it is missing, it holds other files, and for each bad
    row the file, line and reason.
    """
    folder = data_dir / part
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}. {WHERE_TO_GET}")
    ending = f"_{part}.csv"
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".csv" and path.name[0] != ".")
    foreign = [path.name for path in files if not path.name.endswith(ending) or path.name == ending]
    if foreign:
        raise UserError(
            f"{folder} holds files that are not of C-Eval: {', '.join(foreign[:5])}; "
            f"a subject's file is called SUBJECT{ending}: rename them or move them elsewhere"
        )
    by_subject = {path.name.removesuffix(ending): path for path in files}
    unknown = [subject for subject in subjects if subject not in by_subject]
    if unknown:
        raise UserError(f"no {', '.join(unknown)} in {folder}; there are: {', '.join(by_subject) or 'no CSV files'}")
    if not by_subject:
        raise UserError(f"there is no file *{ending} in {folder}. {WHERE_TO_GET}")

    questions: list[Question] = []
    errors: list[str] = []
    for subject in dict.fromkeys(subjects or by_subject):  # a subject named twice counts once
        found = _read_subject(by_subject[subject], subject, answers, errors)
        questions += found
        if not found and not errors:
            errors.append(f"{by_subject[subject]}: no questions in it")
    if errors:
        more = f"\n  and {len(errors) - 10} more" if len(errors) > 10 else ""
        raise UserError("these files need correction:\n  " + "\n  ".join(errors[:10]) + more)
    return questions


def _read_subject(path: Path, subject: str, answers: bool, errors: list[str]) -> list[Question]:
    """Read the questions of one file; append what is wrong to `errors`."""
    columns = ["id", "question", *LETTERS, *(["answer"] if answers else [])]
    found: list[Question] = []
    ids: dict[str, int] = {}

    def on_bad(line: BadLine) -> None:
        errors.append(f"{path}, line {line.line}: {line.reason}")

    for record in iter_records(path, on_bad):  # pandas would fill short rows with NaN, and knows no line numbers
        row, where = record.data, f"{path}, line {record.line}"
        missing = [column for column in columns if column not in row]
        if missing:
            errors.append(f"{path}: no column {', '.join(missing)}; it has {', '.join(row)}")
            break
        answer = row["answer"].strip() if answers else ""
        empty = [column for column in ("id", "question") if not row[column].strip()]
        if answers and (len(answer) != 1 or answer not in LETTERS):
            errors.append(f"{where}: the answer is {row['answer']!r}, not one of A, B, C, D")
        elif empty:
            errors.append(f"{where}: nothing in column {', '.join(empty)}")
        elif row["id"] in ids:
            errors.append(f"{where}: the id {row['id']} is already used in line {ids[row['id']]}")
        else:
            ids[row["id"]] = record.line
            options = tuple(row[letter].strip() for letter in LETTERS)
            found.append(Question(subject, row["id"], row["question"].strip(), options, answer, where))
    return found


def read_examples(data_dir: Path, subjects: Iterable[str], shots: int) -> dict[str, list[Question]]:
    """Read the first `shots` examples of each subject from `data_dir`/dev. Raises UserError if there are fewer."""
    examples: dict[str, list[Question]] = {subject: [] for subject in subjects}
    if not shots:
        return examples
    try:
        found = read_questions(data_dir, "dev", answers=True, subjects=list(examples))
    except UserError as error:
        raise UserError(f"--shots {shots} takes its examples from {data_dir / 'dev'}: {error}") from error
    for example in found:
        examples[example.subject].append(example)
    too_few = [subject for subject, some in examples.items() if len(some) < shots]
    if too_few:
        raise UserError(f"--shots {shots}: fewer examples in {data_dir / 'dev'} for {', '.join(too_few)}")
    return {subject: some[:shots] for subject, some in examples.items()}


# ---- prompts


def question_text(question: Question, style: str) -> str:
    """Return what the model is asked: with the lettered options (style "letter"), or the question alone ("text").

    The first is the format of the multiple-choice questions in dataset/sample.
    """
    if style == "text":
        return question.question
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=True)]
    return "\n".join([question.question, *lines, "答案："])


def answer_texts(question: Question, style: str) -> list[str]:
    """Return the four continuations that are compared."""
    return list(LETTERS) if style == "letter" else list(question.options)


def chat_prompt(question: Question, examples: Sequence[Question], style: str) -> list[dict]:
    """Return messages: the examples as earlier turns, then the question."""
    messages = []
    for example in examples:
        right = answer_texts(example, style)[LETTERS.index(example.answer)]
        messages += [
            {"role": "user", "content": question_text(example, style)},
            {"role": "assistant", "content": right},
        ]
    return [*messages, {"role": "user", "content": question_text(question, style)}]


def plain_prompt(question: Question, examples: Sequence[Question], style: str) -> str:
    """Return the same as running text, for models that were not trained on dialogues."""
    end = "" if style == "letter" else "\n答案："
    text = ""
    for example in examples:
        right = answer_texts(example, style)[LETTERS.index(example.answer)]
        text += f"{question_text(example, style)}{end}{right}\n\n"
    return f"{text}{question_text(question, style)}{end}"
