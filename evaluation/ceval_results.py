"""Results of a multiple-choice evaluation: the table of answers, accuracies, files and a chart.

results = results_table(questions, scores)      # a DataFrame, one row per question
summary = {"model": name, **summarize(results)}
write_results(out_dir, results, summary)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from common.files import atomic_write, write_json
from evaluation.ceval import LETTERS, Question

CHANCE = 1 / len(LETTERS)
HARD, OWN = "Hard", "Own quiz"  # C-Eval Hard is counted in addition to the categories; OWN: not a subject of C-Eval
PROBABILITIES = [f"p_{letter}" for letter in LETTERS]
COLUMNS = ["id", "question", *LETTERS, "answer", "prediction", "correct", *PROBABILITIES]

# Fonts that systems include or offer; the first is the one to install.
CHINESE_FONTS = [
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Heiti TC", "Microsoft YaHei", "SimHei",
]  # fmt: skip


def official_subjects() -> pd.DataFrame:
    """Return the subjects of C-Eval with their Chinese name, category, and whether they belong to C-Eval Hard."""
    return pd.read_csv(Path(__file__).with_name("ceval_subjects.csv"), index_col="subject", encoding="utf-8")


def results_table(questions: Sequence[Question], scores: Sequence[Sequence[float]]) -> pd.DataFrame:
    """Return one row per question: subject and COLUMNS. The scores become probabilities that sum to 1 over the options."""
    values = np.array(scores)  # (questions, 4)
    weights = np.exp(values - values.max(axis=1, keepdims=True))
    asked = [(q.subject, q.id, q.question, *q.options, q.answer) for q in questions]
    table = pd.DataFrame(asked, columns=["subject", "id", "question", *LETTERS, "answer"])
    table["prediction"] = [LETTERS[best] for best in values.argmax(axis=1)]
    table["correct"] = (table["prediction"] == table["answer"]).astype(int)
    table[PROBABILITIES] = weights / weights.sum(axis=1, keepdims=True)
    return table


def accuracy(correct: pd.Series) -> dict:
    """Return the share of right answers with its standard error, and whether guessing would hardly reach it.

    `above_chance`: more than two standard errors of guessing above 25%.
    """
    n, right = len(correct), int(correct.sum())
    share = right / n
    return {
        "accuracy": share,
        "standard_error": math.sqrt(share * (1 - share) / n),
        "correct": right,
        "questions": n,
        "above_chance": share > CHANCE + 2 * math.sqrt(CHANCE * (1 - CHANCE) / n),
    }


def summarize(results: pd.DataFrame) -> dict:
    """Return the accuracy overall, of the categories (in the official order) and of the subjects, as values for JSON.

    Overall counts every question once; `subject_mean`, the mean over subjects, is what the official ranking shows.
    """
    official, correct = official_subjects(), results["correct"]
    category = results["subject"].map(official["category"]).fillna(OWN)
    groups = {name: correct[category == name] for name in official["category"].unique()}
    groups[HARD] = correct[results["subject"].map(official["hard"]).eq(True)]
    groups[OWN] = correct[category == OWN]
    subjects = {name: accuracy(group) for name, group in correct.groupby(results["subject"], sort=False)}
    return {
        "overall": accuracy(correct),
        "subject_mean": sum(one["accuracy"] for one in subjects.values()) / len(subjects),
        "chance": CHANCE,
        "categories": {name: accuracy(group) for name, group in groups.items() if len(group)},
        "subjects": {
            name: {"name": official["name"].get(name, ""), "category": official["category"].get(name, OWN), **one}
            for name, one in subjects.items()
        },
    }


def format_summary(summary: dict) -> str:
    """Return overall, categories and subjects as lines for the terminal, with a star where accuracy is above chance."""
    groups = [("overall", summary["overall"]), *summary["categories"].items()]
    subjects = [(f"{name} {one['name']}".strip(), one) for name, one in summary["subjects"].items()]
    lines = []
    for rows in (groups, subjects):
        lines += [f"{'accuracy':>8}  {'± s.e.':>6}  {'questions':>9}"]
        for name, one in rows:
            star = "*" if one["above_chance"] else " "
            lines.append(f"{one['accuracy']:8.1%}  {one['standard_error']:6.1%}  {one['questions']:9,} {star} {name}")
        lines.append("")
    lines.append("guessing: 25.0%    * more than two standard errors of guessing above it")
    return "\n".join(lines)


def write_results(out_dir: Path, results: pd.DataFrame, summary: dict) -> None:
    """Write a CSV for each subject, the chart, and summary.json last: without it the folder is not a result."""
    (out_dir / "summary.json").unlink(missing_ok=True)
    written = set()
    for subject, group in results.groupby("subject", sort=False):
        path = out_dir / f"{subject}_result.csv"
        with atomic_write(path, encoding="utf-8-sig") as file:  # Excel needs the byte order mark
            group.to_csv(file, columns=COLUMNS, index=False, float_format="%.4f", lineterminator="\n")
        written.add(path)
    for old in set(out_dir.glob("*_result.csv")) - written:
        with old.open(encoding="utf-8-sig", errors="replace") as file:
            ours = file.readline().strip() == ",".join(COLUMNS)
        if ours:  # from a run with other subjects, which summary.json does not describe
            old.unlink()
    draw(summary, out_dir / "ceval.png")
    write_json(out_dir / "summary.json", summary)


def write_submission(path: Path, results: pd.DataFrame) -> None:
    """Write the answers to the test questions in the format of cevalbenchmark.com."""
    groups = results.groupby("subject", sort=False)
    write_json(path, {name: dict(zip(one["id"], one["prediction"], strict=True)) for name, one in groups})


def chinese_fonts() -> list[str]:
    """Return the fonts on this machine that have Chinese characters."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return [font for font in CHINESE_FONTS if font in installed]


def draw(summary: dict, path: Path) -> None:
    """Draw the accuracy of every group and subject as a bar with its standard error, and the line of guessing."""
    from matplotlib import rc_context  # slow to import
    from matplotlib.figure import Figure  # needs no window

    rows = [("overall", summary["overall"], "black")]
    rows += [(name, one, "tab:blue") for name, one in summary["categories"].items()]
    rows += [(name, one, "lightsteelblue") for name, one in summary["subjects"].items()]
    names, groups, colours = zip(*rows, strict=True)
    bars = 100 * pd.DataFrame(groups)[["accuracy", "standard_error"]]
    fonts = chinese_fonts()
    if not fonts and not all(map(str.isascii, names)):
        print(f"note: no font on this machine has all characters of {path}; {CHINESE_FONTS[0]} has them")
    # "$" in a name does not start a formula.
    with rc_context({"font.family": ["DejaVu Sans", *fonts], "text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* missing from font")  # one for each character
        figure = Figure(figsize=(9, 1.2 + 0.22 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.barh(names, bars["accuracy"], xerr=bars["standard_error"], color=colours, ecolor="grey")
        axes.axvline(100 * CHANCE, color="tab:red", linestyle="--", label="guessing: 25%")
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="right answers, %", title=f"C-Eval: {Path(summary['model']).name}")
        axes.legend(loc="lower right")
        with atomic_write(path, "wb") as file:
            figure.savefig(file, format="png", dpi=120)
