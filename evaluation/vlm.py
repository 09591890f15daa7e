"""Questions about images with one right answer: read them, ask a model, compare with chance and with a wrong image.

`draw_sheet` draws pictures with the questions about them and the answers of a model.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import atomic_write
from common.text import one_line
from data_pipeline.image_records import parse_image_row
from data_pipeline.images import open_image
from data_pipeline.readers import iter_records
from evaluation.ceval_results import chinese_fonts
from inference.generator import Images, generate_text
from inference.options import SamplingParams
from inference.vision import ImageProcessor
from model.chat_format import IMAGE, Message, render_chat

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerFast

RIGHT, NONE, WRONG = "its image", "no image", "a wrong image"
BATCH = 64
COLUMNS = 6  # of a sheet with pictures
LABEL = 40  # characters of a question or an answer on it


@dataclass(frozen=True)
class ImageQuestion:
    """A chat that ends with a question about its images, the expected answer, and what kind of question it is."""

    chat: list[Message]
    images: list[Image]
    answer: str
    kind: str
    language: str


@dataclass(frozen=True)
class KindResult:
    """Shares of right answers to the questions of one kind. `chance`: always giving the most frequent right answer."""

    n: int
    chance: float
    right: float
    without: float
    wrong: float


def read_questions(path: Path, limit: int = 0) -> list[ImageQuestion]:
    """Return the questions of a file whose rows have a `kind`, and perhaps a `language`. Raises UserError.

    limit: at most this many of each kind; 0: all.
    """
    found, counts = [], Counter[str]()
    for record in iter_records(path, None):
        try:
            messages, images = parse_image_row(record.data, None)
        except UserError as error:
            raise UserError(f"{path}, row {record.line}: {error}") from None
        kind, language = str(record.data.get("kind") or "all"), str(record.data.get("language") or "")
        counts[kind] += 1
        if 0 < limit < counts[kind]:
            continue
        pictures = [open_image(data) for data in images]
        found.append(ImageQuestion(messages[:-1], pictures, messages[-1]["content"], kind, language))
    return found


def ask(
    prepare: ImageProcessor, tokenizer: PreTrainedTokenizerFast, questions: Sequence[ImageQuestion],
    images: Sequence[list[Image]], name: str,
) -> list[str]:  # fmt: skip
    """Return the greedy answer to each question, asked about the images that are given for it ([]: none)."""
    answers: list[str] = []
    with tqdm(total=len(questions), desc=name, unit="question", disable=None, leave=False) as bar:
        for begin in range(0, len(questions), BATCH):
            part = range(begin, min(begin + BATCH, len(questions)))
            prompts, prepared = [], list[Images | None]()
            for i in part:
                chat = questions[i].chat
                if not images[i]:
                    chat = [m | {"content": m["content"].replace(f"{IMAGE}\n", "").replace(IMAGE, "")} for m in chat]
                image_ids = prepare.model.vision.image_ids
                prompts.append(render_chat(tokenizer, chat, add_generation_prompt=True, image_ids=image_ids)[0])
                prepared.append(prepare(images[i]))
            sampling = SamplingParams(max_new_tokens=32)
            answers += generate_text(prepare.model, tokenizer, prompts, sampling, max_rows=BATCH, images=prepared)
            bar.update(len(part))
    return answers


def wrong_images(questions: Sequence[ImageQuestion], seed: int) -> list[list[Image]]:
    """Return for every question the images of another one of its kind and language (and number of images)."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        groups[question.kind, question.language, len(question.images)].append(i)
    other = np.empty(len(questions), np.int64)
    for (_, _, n_images), members in groups.items():
        order = np.random.default_rng(seed).permutation(members)
        other[order] = np.roll(order, 1)
        if len(members) == 1:  # then of another kind
            (alone,) = members
            others = (i for i, q in enumerate(questions) if i != alone and len(q.images) == n_images)
            if (found := next(others, None)) is None:
                raise UserError(
                    f"no other question has {n_images} images: there is no wrong image for question {alone + 1}"
                )
            other[alone] = found
    return [questions[i].images for i in other]


def evaluate(
    prepare: ImageProcessor, tokenizer: PreTrainedTokenizerFast, questions: Sequence[ImageQuestion]
) -> tuple[dict[str, KindResult], list[str]]:
    """Return the results by kind, and the answers to the questions with their own images."""
    ways = {RIGHT: [q.images for q in questions], NONE: [[] for _ in questions], WRONG: wrong_images(questions, seed=1)}
    answers = {way: ask(prepare, tokenizer, questions, images, way) for way, images in ways.items()}
    results = {}
    for kind in dict.fromkeys(question.kind for question in questions):
        members = [i for i, question in enumerate(questions) if question.kind == kind]
        shares = {
            way: sum(is_right(answers[way][i], questions[i].answer) for i in members) / len(members) for way in ways
        }
        results[kind] = KindResult(
            len(members), _chance([questions[i] for i in members]), shares[RIGHT], shares[NONE], shares[WRONG]
        )
    return results, answers[RIGHT]


def is_right(answer: str, expected: str) -> bool:
    """Compare answers word for word, without the case of letters, blanks and full stops around them."""
    return answer.strip(" .。\n").casefold() == expected.strip(" .。\n").casefold()


def _chance(questions: Sequence[ImageQuestion]) -> float:
    """Return the share of right answers of a model that does not look, but knows how frequent every answer is."""
    right = 0
    for language in {question.language for question in questions}:
        counts = Counter(question.answer for question in questions if question.language == language)
        right += counts.most_common(1)[0][1]
    return right / len(questions)


def draw_sheet(questions: Sequence[ImageQuestion], answers: Sequence[str], n: int, path: Path) -> None:
    """Draw `n` of the questions, the same number of every kind, into a PNG; right answers are green, others red.

    Where no font has Chinese characters, only questions in other languages are drawn.
    """
    import matplotlib  # slow to import
    from matplotlib.figure import Figure

    fonts = chinese_fonts()
    shown = [
        i for i, q in enumerate(questions) if fonts or (q.chat[-1]["content"] + q.answer).replace(IMAGE, "").isascii()
    ]
    by_kind: dict[str, list[int]] = {}
    for i in shown:
        by_kind.setdefault(questions[i].kind, []).append(i)
    in_turn = (i for turn in itertools.zip_longest(*by_kind.values()) for i in turn if i is not None)
    chosen = sorted(itertools.islice(in_turn, n), key=lambda i: list(by_kind).index(questions[i].kind))
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
