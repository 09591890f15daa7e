"""Draw the pictures of the sample data: scenes of coloured shapes and digits, with captions and questions about them.

A picture has a grid of 3 x 3 places, and one to three things in it, which differ in colour and in form: every question has
one answer. Every pixel is decided by whole numbers, so the pictures are the same on every machine. `HELD_OUT` pairs of
colour and shape never occur in the training data: a model that learned what red is and what a ring is recognises a red
ring at first sight.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

N_CAPTIONS = 4000  # pictures with a caption
N_DIALOGUES = 4000  # pictures with questions about them
N_HELD_OUT = 100  # questions of each kind
SIZE, CELL = 48, 16  # pixels
BACKGROUNDS = [(255, 255, 255), (226, 232, 240), (250, 240, 215)]
COLOURS = {
    "red": (214, 34, 40), "green": (30, 150, 60), "blue": (30, 80, 215), "yellow": (236, 190, 0), "purple": (140, 50, 170),
    "black": (25, 25, 25),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
NUMBERS = ("one", "two", "three")
HOW_MANY = (1, 1, 1, 1, 1, 2, 2, 2, 3, 3)  # things in a picture: what one is comes before which one
HELD_OUT = tuple(zip(COLOURS, (*SHAPES[4:], *SHAPES[:4]), strict=True))  # each colour once, each shape once
DIGITS = """
01110 00100 01110 11110 00010 11111 00110 11111 01110 01110
10001 01100 10001 00001 00110 10000 01000 00001 10001 10001
10011 00100 00001 00001 01010 11110 10000 00010 10001 10001
10101 00100 00010 01110 10010 00001 11110 00100 01110 01111
11001 00100 00100 00001 11111 00001 10001 01000 10001 00001
10001 00100 01000 00001 00010 10001 10001 01000 10001 00010
01110 01110 11111 11110 00010 01110 01110 01000 01110 01100
""".split()

CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "black": "黑色",
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "cross": "十字", "ring": "圆环", "diamond": "菱形",
    "top left": "左上角", "top": "上方", "top right": "右上角", "left": "左边", "middle": "中间", "right": "右边",
    "bottom left": "左下角", "bottom": "下方", "bottom right": "右下角",
    "one": "一个", "two": "两个", "three": "三个", "digit": "数字",
}  # fmt: skip
CAPTION = {"en": ("Describe this picture.", "What can you see?"), "zh": ("描述这张图片。", "图里有什么？")}
QUESTIONS = {
    "colour": {
        "en": ("What colour is the {shape}?", "The {shape} has which colour?"),
        "zh": ("{shape}是什么颜色的？", "图里的{shape}是什么颜色？"),
    },
    "shape": {
        "en": ("What shape is the {colour} thing?", "Which shape is {colour}?"),
        "zh": ("{colour}的东西是什么形状？", "什么形状是{colour}的？"),
    },
    "count": {
        "en": ("How many things are there?", "Count the things in the picture."),
        "zh": ("图里有几个东西？", "数一数有几个东西。"),
    },
    "position": {
        "en": ("Where is the {thing}?", "In which place is the {thing}?"),
        "zh": ("{thing}在哪里？", "{thing}在什么位置？"),
    },
    "digit": {"en": ("Which digit is it?", "Read the digit."), "zh": ("图里是数字几？", "读出这个数字。")},
}
LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Thing:
    """A shape ("circle") or a digit ("7") of a colour at a place of the grid."""

    form: str
    colour: str
    place: int

    @property
    def is_digit(self) -> bool:
        return self.form.isdigit()

    def name(self, language: str) -> str:
        form = self.form if self.is_digit else word(self.form, language)
        return f"{self.colour} {form}" if language == "en" else f"{word(self.colour, language)}{form}"


def word(text: str, language: str) -> str:
    return text if language == "en" else CHINESE[text]


# ---- scenes


def draw_things(dice, pairs: list[tuple[str, str]], first: tuple[str, str] | None = None) -> list[Thing]:
    """Return one to three things in reading order, of the allowed (colour, shape) pairs; `first` is one of them.

    No two have the same colour or the same shape, and at most one is a digit.
    """
    things: list[Thing] = []
    for place in dice.sample(range(9), dice.choice(HOW_MANY)):
        colours, forms = ({getattr(thing, name) for thing in things} for name in ("colour", "form"))
        if first is not None and not things:
            colour, form = first
        elif dice.below(3) == 0 and not any(thing.is_digit for thing in things):
            colour, form = dice.choice([colour for colour in COLOURS if colour not in colours]), str(dice.below(10))
        else:
            colour, form = dice.choice([pair for pair in pairs if pair[0] not in colours and pair[1] not in forms])
        things.append(Thing(form, colour, place))
    return sorted(things, key=lambda thing: thing.place)


def draw(dice, things: list[Thing]) -> bytes:
    """Return the scene as a PNG of few colours; sizes and exact places are drawn too."""
    palette = [dice.choice(BACKGROUNDS), *COLOURS.values()]
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    for thing in things:
        row, column = divmod(thing.place, 3)
        radius = 5 + dice.below(3)
        slack = 7 - radius  # a thing stays in its cell
        down, right = (8 + dice.below(2 * slack + 1) - slack for _ in range(2))
        cell = canvas[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        here = glyph(int(thing.form), right // 3) if thing.is_digit else inside(thing.form, X - right, Y - down, radius)
        cell[here] = 1 + list(COLOURS).index(thing.colour)
    image = Image.fromarray(canvas)
    image.putpalette([value for colour in palette for value in colour])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", bits=4)
    return buffer.getvalue()


X, Y = np.arange(CELL)[None, :], np.arange(CELL)[:, None]  # of the pixels of a cell


def inside(shape: str, x: np.ndarray, y: np.ndarray, radius: int) -> np.ndarray:
    """Return which pixels, relative to the middle, belong to a shape."""
    if shape == "circle":
        return x * x + y * y <= radius * radius + radius // 2
    if shape == "ring":
        distance = x * x + y * y
        return (distance <= radius * radius + radius // 2) & (distance >= (radius - 2) * (radius - 2))
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= radius - 1
    if shape == "diamond":
        return abs(x) + abs(y) <= radius
    if shape == "triangle":
        return (abs(y) <= radius) & (2 * abs(x) <= y + radius)
    return (np.maximum(abs(x), abs(y)) <= radius) & (np.minimum(abs(x), abs(y)) <= 1)  # a cross


def glyph(digit: int, left: int) -> np.ndarray:
    """Return which pixels of a cell belong to a digit of 10 x 14 pixels."""
    rows = [[c == "1" for c in DIGITS[10 * row + digit]] for row in range(7)]
    here = np.zeros((CELL, CELL), bool)
    here[1:15, 1 + left : 11 + left] = np.array(rows).repeat(2, 0).repeat(2, 1)
    return here


# ---- texts


def caption(things: list[Thing], language: str) -> str:
    if language == "zh":
        return "，".join(f"{word(PLACES[thing.place], 'zh')}有{thing.name('zh')}" for thing in things) + "。"
    return " ".join(f"A {thing.name('en')} in the {PLACES[thing.place]}." for thing in things)


# As in the captions, with a blank before most words: at the start of an answer, a word has other tokens than after a blank.
ANSWERS = {
    "colour": "It is {}.",
    "shape": "A {}.",
    "count": "There {}.",
    "position": "In the {}.",
    "digit": "It is {}.",
}


def answer(kind: str, text: str, language: str) -> str:
    if language == "zh":
        return word(text, language) if kind != "digit" else text
    return ANSWERS[kind].format(text if kind != "count" else f"{'is' if text == 'one' else 'are'} {text}")


def questions(things: list[Thing], kind: str, language: str) -> list[tuple[str, str, Thing | None]]:
    """Return (kind, answer, thing) of every question of a kind."""
    if kind == "count":
        return [(kind, answer(kind, NUMBERS[len(things) - 1], language), None)]
    found: list[tuple[str, str, Thing | None]] = []
    for thing in things:
        if kind == "colour":
            found.append((kind, answer(kind, thing.colour, language), thing))
        elif kind == "position":
            found.append((kind, answer(kind, PLACES[thing.place], language), thing))
        elif thing.is_digit == (kind == "digit"):
            found.append((kind, answer(kind, thing.form, language), thing))
    return found


def ask(dice, kind: str, language: str, thing: Thing | None) -> str:
    template = dice.choice(QUESTIONS[kind][language])
    if thing is None:
        return template
    shape = word("digit" if thing.is_digit else thing.form, language)
    return template.format(shape=shape, colour=word(thing.colour, language), thing=thing.name(language))


# ---- rows


def row(image: bytes, turns: list[tuple[str, str]], **more: str) -> dict:
    """Return a row of a parquet file; the image stands before the first question."""
    messages = []
    for i, (question, answer) in enumerate(turns):
        messages.append({"role": "user", "content": f"<image>\n{question}" if i == 0 else question})
        messages.append({"role": "assistant", "content": answer})
    return {"image_bytes": [image], "conversations": json.dumps(messages, ensure_ascii=False), **more}


def pairs_for_training() -> list[tuple[str, str]]:
    return [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT]


def captions(dice, n: int) -> list[dict]:
    """Return pictures with a caption in one language."""
    rows = []
    for _ in range(n):
        things, language = draw_things(dice, pairs_for_training()), dice.choice(LANGUAGES)
        rows.append(row(draw(dice, things), [(dice.choice(CAPTION[language]), caption(things, language))]))
    return rows


def dialogues(dice, n: int) -> list[dict]:
    """Return pictures with questions about each, in one language: one about each thing, and in some the number of things.

    A second question about a thing could be answered from the first: it would teach to read instead of to look.
    """
    rows = []
    for _ in range(n):
        things, language = draw_things(dice, pairs_for_training()), dice.choice(LANGUAGES)
        found = [one for kind in QUESTIONS for one in questions(things, kind, language)]
        asked = [*([None] if dice.below(3) == 0 else []), *dice.shuffled(things)]
        chosen = [dice.choice([one for one in found if one[2] == thing]) for thing in asked]
        turns = [(ask(dice, kind, language, thing), answer) for kind, answer, thing in chosen]
        rows.append(row(draw(dice, things), turns))
    return rows


def held_out(dice, n: int, taught: set[bytes]) -> list[dict]:
    """Return pictures with one question each: `n` of every kind, and `n` about pairs that training never shows.

    taught: the pictures of the training data, none of which is among them.
    """
    rows = []
    kinds = [*QUESTIONS, "unseen"]
    while len(rows) < n * len(kinds):
        kind = kinds[len(rows) // n]
        language = LANGUAGES[len(rows) % 2]
        turn = len(rows) // len(LANGUAGES)  # every pair in turn, asked about in both ways
        pair = HELD_OUT[turn % len(HELD_OUT)] if kind == "unseen" else None
        things = draw_things(dice, pairs_for_training(), pair)
        asked = ("colour", "shape")[turn // len(HELD_OUT) % 2] if kind == "unseen" else kind
        found = questions(things, asked, language)
        if pair is not None:
            found = [one for one in found if (one[2].colour, one[2].form) == pair]
        picture = draw(dice, things)
        if found and picture not in taught:
            template, answer, thing = dice.choice(found)
            rows.append(row(picture, [(ask(dice, template, language, thing), answer)], kind=kind, language=language))
    return rows


# ---- files


def write(rows: list[dict], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd")


def are_in(rows: list[dict], path: Path) -> bool:
    """Return whether a file has these rows. Pictures are compared by their pixels: libraries compress differently."""
    found = pq.read_table(path).to_pylist() if path.is_file() else []
    return len(found) == len(rows) and all(map(_same, rows, found))


def _same(one: dict, other: dict) -> bool:
    if one == other:
        return True
    texts = [{name: value for name, value in row.items() if name != "image_bytes"} for row in (one, other)]
    pixels = [
        [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in row["image_bytes"]] for row in (one, other)
    ]
    return texts[0] == texts[1] and all(map(np.array_equal, *pixels))


def make_tables(make_dice) -> dict[str, list[dict]]:
    """Return file name -> rows. make_dice: returns a source of random choices by its name."""
    pretrain = captions(make_dice("captions"), N_CAPTIONS)
    sft = dialogues(make_dice("picture dialogues"), N_DIALOGUES)
    taught = {row["image_bytes"][0] for row in (*pretrain, *sft)}
    heldout = held_out(make_dice("held-out pictures"), N_HELD_OUT, taught)
    return {"vlm_pretrain.parquet": pretrain, "vlm_sft.parquet": sft, "vlm_heldout.parquet": heldout}
