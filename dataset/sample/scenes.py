"""Draw the pictures of the sample data: scenes of coloured shapes and digits, with captions and questions about them.

A picture has a grid of 3 x 3 places, and one to four copies of a thing in it: three red rings, or a blue 7. Every pixel is
decided by whole numbers, so the pictures are the same on every machine. `HELD_OUT` pairs of colour and shape never occur in
the training data: a model that learned what red is and what a ring is recognises a red ring at first sight.
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
NUMBERS = ("one", "two", "three", "four")
HOW_MANY = (1, 1, 1, 1, 2, 3, 4)  # copies of the thing: most pictures have one
HELD_OUT = tuple(zip(COLOURS, (*SHAPES[4:], *SHAPES[:4]), strict=True))  # each colour once, each shape once
TAUGHT = tuple((colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT)
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
        "en": ("What colour is in the picture?", "Which colour do you see?"),
        "zh": ("图里有什么颜色？", "你看到什么颜色？"),
    },
    "shape": {
        "en": ("What shape is in the picture?", "Which shape do you see?"),
        "zh": ("图里有什么形状？", "你看到什么形状？"),
    },
    "count": {
        "en": ("How many things are there?", "Count the things in the picture."),
        "zh": ("图里有几个东西？", "数一数有几个东西。"),
    },
    "position": {
        "en": ("Where is the thing?", "In which place is the thing?"),
        "zh": ("东西在哪里？", "东西在什么位置？"),
    },
    "digit": {"en": ("Which digit is it?", "Read the digit."), "zh": ("图里是数字几？", "读出这个数字。")},
}
LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Scene:
    """Copies of a shape ("circle") or a digit ("7") of a colour at some places of the grid."""

    form: str
    colour: str
    places: tuple[int, ...]

    @property
    def is_digit(self) -> bool:
        return self.form.isdigit()


def word(text: str, language: str) -> str:
    return text if language == "en" else CHINESE[text]


# ---- scenes


def draw_scene(dice, pair: tuple[str, str] | None = None) -> Scene:
    """Return a scene with this pair of colour and shape, or with any that may be taught."""
    colour, form = pair or dice.choice(TAUGHT)
    if pair is None and dice.below(3) == 0:
        form = str(dice.below(10))
    return Scene(form, colour, tuple(sorted(dice.sample(range(9), dice.choice(HOW_MANY)))))


def draw(dice, scene: Scene) -> bytes:
    """Return the scene as a PNG of few colours; sizes and exact places are drawn too."""
    palette = [dice.choice(BACKGROUNDS), *COLOURS.values()]
    canvas = np.zeros((SIZE, SIZE), np.uint8)
    for place in scene.places:
        row, column = divmod(place, 3)
        radius = 5 + dice.below(3)
        slack = 7 - radius  # a thing stays in its cell
        down, right = (8 + dice.below(2 * slack + 1) - slack for _ in range(2))
        cell = canvas[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        here = glyph(int(scene.form), right // 3) if scene.is_digit else inside(scene.form, X - right, Y - down, radius)
        cell[here] = 1 + list(COLOURS).index(scene.colour)
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


def caption(scene: Scene, language: str) -> str:
    """Return a sentence with the number, the colour, the form and the places of the things."""
    number, colour = word(NUMBERS[len(scene.places) - 1], language), word(scene.colour, language)
    form = scene.form if scene.is_digit else word(scene.form, language)
    places = [word(PLACES[place], language) for place in scene.places]
    if language == "zh":
        return f"{number}{colour}{form}：{'、'.join(places)}。"
    plural = "" if len(places) == 1 else "es" if form == "cross" else "s"
    return f"{number.capitalize()} {colour} {form}{plural} in the {', '.join(places)}."


# As in the captions, with a blank before most words: at the start of an answer, a word has other tokens than after a blank.
ANSWERS = {
    "colour": "It is {}.",
    "shape": "A {}.",
    "count": "There {}.",
    "position": "In the {}.",
    "digit": "It is {}.",
}


def answer(scene: Scene, kind: str, language: str) -> str | None:
    """Return the answer to a question, None where there is none: copies have several places, digits no shape."""
    number = NUMBERS[len(scene.places) - 1]
    if kind in ("shape", "digit") and scene.is_digit != (kind == "digit"):
        return None
    if kind == "position" and number != "one":
        return None
    found = {"colour": scene.colour, "count": number, "position": PLACES[scene.places[0]]}.get(kind, scene.form)
    if language == "zh":
        return found if kind == "digit" else word(found, language)
    return ANSWERS[kind].format(found if kind != "count" else f"{'is' if number == 'one' else 'are'} {number}")


# ---- rows


def row(image: bytes, turns: list[tuple[str, str]], **more: str) -> dict:
    """Return a row of a parquet file; the image stands before the first question."""
    messages = []
    for i, (question, answer) in enumerate(turns):
        messages.append({"role": "user", "content": f"<image>\n{question}" if i == 0 else question})
        messages.append({"role": "assistant", "content": answer})
    return {"image_bytes": [image], "conversations": json.dumps(messages, ensure_ascii=False), **more}


def captions(dice, n: int) -> list[dict]:
    """Return pictures with a caption in one language."""
    rows = []
    for _ in range(n):
        scene, language = draw_scene(dice), dice.choice(LANGUAGES)
        rows.append(row(draw(dice, scene), [(dice.choice(CAPTION[language]), caption(scene, language))]))
    return rows


def dialogues(dice, n: int) -> list[dict]:
    """Return pictures with up to three questions about each, in one language, in any order.

    Where the thing is, and how many there are, is not asked together: one answer would give away the other.
    """
    rows = []
    for _ in range(n):
        scene, language = draw_scene(dice), dice.choice(LANGUAGES)
        kinds = [kind for kind in QUESTIONS if answer(scene, kind, language)]
        if "position" in kinds:
            kinds.remove(dice.choice(("position", "count", "count")))
        turns = [
            (dice.choice(QUESTIONS[kind][language]), answer(scene, kind, language)) for kind in dice.shuffled(kinds)
        ]
        rows.append(row(draw(dice, scene), turns))
    return rows


def held_out(dice, n: int, taught: set[bytes]) -> list[dict]:
    """Return pictures with one question each: `n` of every kind, and as many about pairs that training never shows.

    taught: the pictures of the training data, none of which is among them.
    """
    rows = []
    kinds = [*QUESTIONS, "unseen colour", "unseen shape"]
    while len(rows) < n * len(kinds):
        kind = kinds[len(rows) // n]
        language = LANGUAGES[len(rows) % 2]
        pair = HELD_OUT[len(rows) // len(LANGUAGES) % len(HELD_OUT)]  # every pair in turn
        scene = draw_scene(dice, pair if kind.startswith("unseen") else None)
        asked = kind.removeprefix("unseen ")
        text, picture = answer(scene, asked, language), draw(dice, scene)
        if text is not None and picture not in taught:
            question = dice.choice(QUESTIONS[asked][language])
            rows.append(row(picture, [(question, text)], kind=kind, language=language))
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
