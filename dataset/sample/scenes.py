"""Draw the pictures of the sample data: scenes of coloured shapes and digits, with captions and questions about them.

A picture has a grid of 3 x 3 places, and one to four things in it. Every pixel is decided by whole numbers, so the
pictures are the same on every machine. `HELD_OUT` pairs of colour and shape never occur in the training data: a model
that learned what red is and what a ring is recognises a red ring at first sight.
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

N_CAPTIONS = 8000  # pictures with a caption
N_DIALOGUES = 8000  # pictures with questions about them
N_TURNS = 3  # questions about each, at most
N_HELD_OUT = 100  # questions of each kind
SIZE, CELL = 48, 16  # pixels
BACKGROUNDS = [(255, 255, 255), (226, 232, 240), (250, 240, 215)]
COLOURS = {
    "red": (214, 34, 40), "green": (30, 150, 60), "blue": (30, 80, 215), "yellow": (236, 190, 0), "purple": (140, 50, 170),
    "black": (25, 25, 25),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
NUMBERS = ("one", "two", "three", "four")
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
    "one": "一个", "two": "两个", "three": "三个", "four": "四个", "digit": "数字",
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
        return f"{self.colour} {form}" if language == "en" else f"{word(self.colour, language)}的{form}"


def word(text: str, language: str) -> str:
    return text if language == "en" else CHINESE[text]


# ---- scenes


def draw_things(dice, pairs: list[tuple[str, str]], first: tuple[str, str] | None = None) -> list[Thing]:
    """Return one to four things in reading order, of the allowed (colour, shape) pairs; `first` is one of them."""
    n = 1 + dice.below(4)
    places = dice.sample(range(9), n)
    things = []
    for i, place in enumerate(places):
        if first is not None and i == 0:
            colour, form = first
        elif dice.below(5) == 0:
            colour, form = dice.choice(list(COLOURS)), str(dice.below(10))
        else:
            colour, form = dice.choice(pairs)
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
    parts = []
    for thing in things:
        place = word(PLACES[thing.place], language)
        if language == "zh":
            parts.append(f"{place}有一个{thing.name(language)}")
        else:
            parts.append(f"{place.capitalize()}: a {thing.name(language)}.")
    return "，".join(parts) + "。" if language == "zh" else " ".join(parts)


def questions(things: list[Thing], kind: str, language: str) -> list[tuple[str, str, Thing | None]]:
    """Return (template, answer, thing) of every question of a kind that has one answer in this scene."""
    shapes = [thing.form for thing in things if not thing.is_digit]
    digits = [thing for thing in things if thing.is_digit]
    colours = [thing.colour for thing in things]
    names = [thing.name(language) for thing in things]
    if kind == "count":
        return [(kind, word(NUMBERS[len(things) - 1], language), None)]
    if kind == "digit":
        return [(kind, digits[0].form, digits[0])] if len(digits) == 1 else []
    found = []
    for thing in things:
        if kind == "colour" and (shapes.count(thing.form) == 1 or (thing.is_digit and len(digits) == 1)):
            found.append((kind, word(thing.colour, language), thing))
        elif kind == "shape" and not thing.is_digit and colours.count(thing.colour) == 1:
            found.append((kind, word(thing.form, language), thing))
        elif kind == "position" and names.count(thing.name(language)) == 1:
            found.append((kind, word(PLACES[thing.place], language), thing))
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
    """Return pictures with some questions about each, in one language."""
    rows = []
    for _ in range(n):
        things, language = draw_things(dice, pairs_for_training()), dice.choice(LANGUAGES)
        found = [one for kind in QUESTIONS for one in questions(things, kind, language)]
        turns = [(ask(dice, kind, language, thing), answer) for kind, answer, thing in dice.sample(found, N_TURNS)]
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
