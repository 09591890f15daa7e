"""C-Eval (https://cevalbenchmark.com): reading its CSVs, writing its prompts, and adding up the answers.

A folder has `val/SUBJECT_val.csv` (id, question, A, B, C, D, answer), `dev/SUBJECT_dev.csv` with five examples for
few-shot prompts, and `test/SUBJECT_test.csv` without answers. Any quiz in this format will do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from data_pipeline.readers import BadLine, iter_records

LETTERS = "ABCD"
CHANCE = 1 / len(LETTERS)
WHERE_TO_GET = (
    "C-Eval is at https://huggingface.co/datasets/ceval/ceval-exam (ceval-exam.zip; CC BY-NC-SA 4.0): unzip it into "
    "dataset/ceval/ceval-exam, so that the folders val and dev are in there; dataset/sample/ceval is a small quiz"
)

# The official categories, subject -> Chinese name.
STEM = {
    "computer_network": "计算机网络",
    "operating_system": "操作系统",
    "computer_architecture": "计算机组成",
    "college_programming": "大学编程",
    "college_physics": "大学物理",
    "college_chemistry": "大学化学",
    "advanced_mathematics": "高等数学",
    "probability_and_statistics": "概率统计",
    "discrete_mathematics": "离散数学",
    "electrical_engineer": "注册电气工程师",
    "metrology_engineer": "注册计量师",
    "high_school_mathematics": "高中数学",
    "high_school_physics": "高中物理",
    "high_school_chemistry": "高中化学",
    "high_school_biology": "高中生物",
    "middle_school_mathematics": "初中数学",
    "middle_school_biology": "初中生物",
    "middle_school_physics": "初中物理",
    "middle_school_chemistry": "初中化学",
    "veterinary_medicine": "兽医学",
}
SOCIAL_SCIENCE = {
    "college_economics": "大学经济学",
    "business_administration": "工商管理",
    "marxism": "马克思主义基本原理",
    "mao_zedong_thought": "毛泽东思想和中国特色社会主义理论体系概论",
    "education_science": "教育学",
    "teacher_qualification": "教师资格",
    "high_school_politics": "高中政治",
    "high_school_geography": "高中地理",
    "middle_school_politics": "初中政治",
    "middle_school_geography": "初中地理",
}
HUMANITIES = {
    "modern_chinese_history": "近代史纲要",
    "ideological_and_moral_cultivation": "思想道德修养与法律基础",
    "logic": "逻辑学",
    "law": "法学",
    "chinese_language_and_literature": "中国语言文学",
    "art_studies": "艺术学",
    "professional_tour_guide": "导游资格",
    "legal_professional": "法律职业资格",
    "high_school_chinese": "高中语文",
    "high_school_history": "高中历史",
    "middle_school_history": "初中历史",
}
OTHER = {
    "civil_servant": "公务员",
    "sports_science": "体育学",
    "plant_protection": "植物保护",
    "basic_medicine": "基础医学",
    "clinical_medicine": "临床医学",
    "urban_and_rural_planner": "注册城乡规划师",
    "accountant": "注册会计师",
    "fire_engineer": "注册消防工程师",
    "environmental_impact_assessment_engineer": "环境影响评价工程师",
    "tax_accountant": "税务师",
    "physician": "医师资格",
}
CATEGORIES = {"STEM": STEM, "Social science": SOCIAL_SCIENCE, "Humanities": HUMANITIES, "Other": OTHER}
OWN = "Own quiz"  # subjects that C-Eval does not have
# C-Eval Hard: a selection across the categories, counted in addition to them.
HARD = {
    "advanced_mathematics", "discrete_mathematics", "probability_and_statistics", "college_physics",
    "college_chemistry", "high_school_mathematics", "high_school_physics", "high_school_chemistry",
}  # fmt: skip


def category_of(subject: str) -> str:
    return next((name for name, subjects in CATEGORIES.items() if subject in subjects), OWN)


def chinese_name(subject: str) -> str:
    return next((subjects[subject] for subjects in CATEGORIES.values() if subject in subjects), "")


# ---- reading


@dataclass(frozen=True)
class Question:
    """One row of a CSV. `answer` is "" in test files."""

    subject: str
    id: str
    question: str
    options: tuple[str, str, str, str]
    answer: str
    where: str = field(default="", compare=False)  # file and line, for messages


def read_questions(data_dir: Path, part: str, *, answers: bool, subjects: Sequence[str] = ()) -> list[Question]:
    """All questions of `data_dir`/`part`, subject by subject in the order of the files' names.

    Args:
        part: val, dev or test.
        answers: require the column answer, and one of A to D in it.
        subjects: only these; all if empty.

    Raises UserError with everything that is wrong in the folder: not there, files of another kind, and for each bad
    row its file, line and reason.
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
    for subject in dict.fromkeys(subjects or by_subject):  # named twice counts once
        found = _read_subject(by_subject[subject], subject, answers, errors)
        questions += found
        if not found and not errors:
            errors.append(f"{by_subject[subject]}: no questions in it")
    if errors:
        more = f"\n  and {len(errors) - 10} more" if len(errors) > 10 else ""
        raise UserError("these files need correction:\n  " + "\n  ".join(errors[:10]) + more)
    return questions


def _read_subject(path: Path, subject: str, answers: bool, errors: list[str]) -> list[Question]:
    """The questions of one file; what is wrong goes to `problems`."""
    columns = ["id", "question", *LETTERS, *(["answer"] if answers else [])]
    found: list[Question] = []
    ids: dict[str, int] = {}

    def bad(line: BadLine) -> None:
        errors.append(f"{path}, line {line.line}: {line.reason}")

    for record in iter_records(path, bad):
        row = record.data
        missing = [column for column in columns if column not in row]
        if missing:
            errors.append(f"{path}: no column {', '.join(missing)}; it has {', '.join(row)}")
            break
        answer = row["answer"].strip() if answers else ""
        empty = [column for column in ("id", "question") if not row[column].strip()]
        if answers and (len(answer) != 1 or answer not in LETTERS):
            errors.append(f"{path}, line {record.line}: the answer is {row['answer']!r}, not one of A, B, C, D")
        elif empty:
            errors.append(f"{path}, line {record.line}: nothing in column {', '.join(empty)}")
        elif row["id"] in ids:
            errors.append(f"{path}, line {record.line}: the id {row['id']} stands in line {ids[row['id']]} already")
        else:
            ids[row["id"]] = record.line
            options = tuple(row[letter].strip() for letter in LETTERS)
            where = f"{path}, line {record.line}"
            found.append(Question(subject, row["id"], row["question"].strip(), options, answer, where))
    return found


# ---- prompts


def ask(question: Question, style: str) -> str:
    """What is asked: with the lettered options (style "letter"), or the question alone ("text").

    The first is the format of the multiple-choice questions in dataset/sample.
    """
    if style == "text":
        return question.question
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=True)]
    return "\n".join([question.question, *lines, "答案："])


def answers_of(question: Question, style: str) -> list[str]:
    """The four continuations that are compared."""
    return list(LETTERS) if style == "letter" else list(question.options)


def chat_prompt(question: Question, examples: Sequence[Question], style: str) -> list[dict]:
    """Messages: the examples as turns that have been, then the question."""
    messages = []
    for example in examples:
        right = answers_of(example, style)[LETTERS.index(example.answer)]
        messages += [{"role": "user", "content": ask(example, style)}, {"role": "assistant", "content": right}]
    return [*messages, {"role": "user", "content": ask(question, style)}]


def plain_prompt(question: Question, examples: Sequence[Question], style: str) -> str:
    """The same as running text, for models that have seen no chat."""
    end = "" if style == "letter" else "\n答案："
    text = ""
    for example in examples:
        right = answers_of(example, style)[LETTERS.index(example.answer)]
        text += f"{ask(example, style)}{end}{right}\n\n"
    return f"{text}{ask(question, style)}{end}"


# ---- results


@dataclass(frozen=True)
class Answered:
    """A question, its four scores, and what they say. Letters: `scores` are log-probabilities."""

    question: Question
    scores: tuple[float, float, float, float]

    @property
    def letter(self) -> str:
        return LETTERS[max(range(4), key=self.scores.__getitem__)]

    @property
    def correct(self) -> bool:
        return self.letter == self.question.answer

    @property
    def probabilities(self) -> list[float]:
        """The scores as probabilities that add up to 1 over the four options."""
        weights = [math.exp(score - max(self.scores)) for score in self.scores]
        return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class Accuracy:
    """Right answers of a group. `standard_error` is that of a share: sqrt(p (1 - p) / n)."""

    questions: int
    correct: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.questions)

    @property
    def above_chance(self) -> bool:
        """Whether guessing would hardly get here: two standard errors of guessing above 25%."""
        return self.accuracy > CHANCE + 2 * math.sqrt(CHANCE * (1 - CHANCE) / self.questions)

    def as_dict(self) -> dict:
        return {
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "correct": self.correct,
            "questions": self.questions,
            "above_chance": self.above_chance,
        }


def accuracy(answered: Sequence[Answered]) -> Accuracy:
    return Accuracy(len(answered), sum(one.correct for one in answered))


def by_subject(answered: Sequence[Answered]) -> dict[str, list[Answered]]:
    groups: dict[str, list[Answered]] = {}
    for one in answered:
        groups.setdefault(one.question.subject, []).append(one)
    return groups


def by_category(answered: Sequence[Answered]) -> dict[str, list[Answered]]:
    """The official order, then Hard, then subjects that are not of C-Eval; groups without questions are left out."""
    groups: dict[str, list[Answered]] = {name: [] for name in [*CATEGORIES, "Hard", OWN]}
    for one in answered:
        groups[category_of(one.question.subject)].append(one)
        if one.question.subject in HARD:
            groups["Hard"].append(one)
    return {name: group for name, group in groups.items() if group}


def summarise(answered: Sequence[Answered]) -> dict:
    """Overall, categories and subjects as JSON-friendly values.

    Overall counts every question once; `subject_mean`, the mean over subjects, is what the official ranking shows.
    """
    subjects = {name: accuracy(group) for name, group in by_subject(answered).items()}
    return {
        "overall": accuracy(answered).as_dict(),
        "subject_mean": sum(one.accuracy for one in subjects.values()) / len(subjects),
        "chance": CHANCE,
        "categories": {name: accuracy(group).as_dict() for name, group in by_category(answered).items()},
        "subjects": {
            name: {"name": chinese_name(name), "category": category_of(name), **one.as_dict()}
            for name, one in subjects.items()
        },
    }
