"""Pictures with the questions asked about them and the answers of a model, on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from common.files import atomic_write
from evaluation.ceval_results import chinese_fonts
from evaluation.vlm import ImageQuestion, is_right
from inference.terminal import one_line
from model.chat_format import IMAGE

COLUMNS = 6
LABEL = 40  # characters of a question or an answer


def draw_sheet(questions: Sequence[ImageQuestion], answers: Sequence[str], n: int, path: Path) -> None:
    """Draw `n` of the questions, the same number of every kind, into a PNG; right answers are green, others red.

    Where no font has Chinese characters, only questions in other languages are drawn.
    """
    fonts = chinese_fonts()
    shown = [
        i for i, q in enumerate(questions) if fonts or (q.chat[-1]["content"] + q.answer).replace(IMAGE, "").isascii()
    ]
    by_kind: dict[str, list[int]] = {}
    for i in shown:
        by_kind.setdefault(questions[i].kind, []).append(i)
    each = -(-n // max(len(by_kind), 1))
    chosen = [i for members in by_kind.values() for i in members[:each]][:n]
    rows = max(-(-len(chosen) // COLUMNS), 1)
    with matplotlib.rc_context({"font.family": [*fonts, "sans-serif"]}):
        figure = Figure(figsize=(2.4 * COLUMNS, 2.7 * rows))
        for place, i in enumerate(chosen, start=1):
            axes = figure.add_subplot(rows, COLUMNS, place)
            axes.set_xticks([])  # the frame stays: a picture may be white
            axes.set_yticks([])
            if questions[i].images:
                axes.imshow(questions[i].images[0], interpolation="nearest")
            text = questions[i].chat[-1]["content"].replace(IMAGE, "").strip()
            axes.set_title(one_line(text, LABEL), fontsize=7, parse_math=False)
            right = is_right(answers[i], questions[i].answer)
            expected = "" if right else f" (right: {questions[i].answer})"
            axes.text(
                0.5, -0.1, one_line(answers[i] + expected, LABEL), transform=axes.transAxes, ha="center", fontsize=9,
                color="green" if right else "red", parse_math=False,
            )  # fmt: skip
        with atomic_write(path, "wb") as file:
            figure.savefig(file, dpi=100)
