"""Exercises with answers that can be checked: word problems, units, dates, look-ups; solved at once, by thinking, by tools.

`examples` are dialogues for SFT, `prompts` are questions for reinforcement learning and for measuring. Numbers and wordings
of held-out exercises never occur in the others.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from evaluation.tools import TABLE, TOOLS, UNITS, WEEKDAYS, tool_schema  # noqa: E402

NAMES = {
    "en": ["Tom", "Anna", "Ben", "Mia", "Leo", "Eva", "Max", "Lily"],
    "zh": ["小明", "小红", "小刚", "小丽", "小华", "小芳"],
}
THINGS = {
    "en": ["apples", "pens", "books", "coins", "cards", "eggs", "stones", "cups"],
    "zh": ["苹果", "梨", "鸡蛋", "球", "杯子", "橘子", "玩具", "贝壳"],
}
# Expression, and wordings: of the training data, then the held-out ones. {n}: a name, {o}: things, a to d: numbers.
PROBLEMS = {
    "two_steps": [
        ("b*c+a", {
            "en": (["{n} has {a} {o} and buys {b} bags of {c} {o}. How many {o} does {n} have now?",
                    "There are {a} {o} on the table. {n} brings {b} boxes with {c} {o} each. How many {o} are there now?"],
                   ["{n} owned {a} {o}, then got {b} packs of {c} {o}. How many {o} is that in all?"]),
            "zh": (["{n}有{a}个{o}，又买了{b}袋，每袋{c}个。现在有多少个{o}？",
                    "桌上有{a}个{o}，{n}拿来{b}盒，每盒{c}个。现在有多少个{o}？"],
                   ["{n}原来有{a}个{o}，后来得到{b}包，每包{c}个。一共有多少个{o}？"]),
        }),
        ("a*b-c", {
            "en": (["A shop has {a} boxes of {b} {o} and sells {c}. How many {o} are left?",
                    "{n} buys {a} bags of {b} {o} and gives {c} to a friend. How many {o} does {n} keep?"],
                   ["{n} had {a} packs of {b} {o} and lost {c}. How many {o} are still there?"]),
            "zh": (["商店有{a}盒{o}，每盒{b}个，卖了{c}个。还剩多少个{o}？",
                    "{n}买了{a}袋{o}，每袋{b}个，送给朋友{c}个。还有多少个{o}？"],
                   ["{n}有{a}包{o}，每包{b}个，丢了{c}个。还剩下多少个{o}？"]),
        }),
        ("a+b-c", {
            "en": (["{n} has {a} {o}, finds {b} more and gives {c} away. How many {o} are left?",
                    "There are {a} {o} in a box. {n} puts {b} in and takes {c} out. How many {o} are in the box?"],
                   ["{n} had {a} {o}, got {b} and then lost {c}. How many {o} are still there?"]),
            "zh": (["{n}有{a}个{o}，又捡到{b}个，送出{c}个。还剩多少个{o}？",
                    "盒子里有{a}个{o}，{n}放进{b}个，拿走{c}个。盒子里有多少个{o}？"],
                   ["{n}原来有{a}个{o}，得到{b}个，后来丢了{c}个。还剩下多少个{o}？"]),
        }),
    ],
    "three_steps": [
        ("a*b+c-d", {
            "en": (["A shop has {a} boxes of {b} {o}, gets {c} more and sells {d}. How many {o} are left?",
                    "{n} buys {a} bags of {b} {o}, finds {c} and gives {d} away. How many {o} does {n} have?"],
                   ["{n} had {a} packs of {b} {o}, got {c} and lost {d}. How many {o} are still there?"]),
            "zh": (["商店有{a}盒{o}，每盒{b}个，又进了{c}个，卖了{d}个。还剩多少个{o}？",
                    "{n}买了{a}袋{o}，每袋{b}个，又捡到{c}个，送出{d}个。有多少个{o}？"],
                   ["{n}有{a}包{o}，每包{b}个，得到{c}个，丢了{d}个。还剩下多少个{o}？"]),
        }),
    ],
}  # fmt: skip
QUESTIONS = {
    "unit": {
        "en": (["How many {u} are {a} {t}?", "Convert {a} {t} to {u}."], ["{a} {t} is how many {u}?"]),
        "zh": (["{a} {t}等于多少{u}？", "把{a} {t}换算成{u}。"], ["{a} {t}是多少{u}？"]),
    },
    "date": {
        "en": (["Which date is {a} days after {t}?", "What is the date {a} days from {t}?"],
               ["It is {t}. Which date will it be in {a} days?"]),
        "zh": (["{t}之后{a}天是几号？", "从{t}起过{a}天是哪天？"], ["今天是{t}，{a}天后是哪一天？"]),
    },
    "weekday": {
        "en": (["Which day of the week is {t}?", "What weekday is {t}?"], ["{t} is which day of the week?"]),
        "zh": (["{t}是星期几？", "请问{t}那天星期几？"], ["{t}这天是星期几？"]),
    },
    "price": {
        "en": (["What does the {t} cost in the shop?", "What is the price of the {t}?"], ["How much is the {t}?"]),
        "zh": (["店里的{t}多少钱？", "{t}的价格是多少？"], ["{t}卖多少钱？"]),
    },
    "stock": {
        "en": (["How many of the item {t} are in stock?", "What is the stock of {t}?"], ["How much {t} is there?"]),
        "zh": (["店里的{t}还有多少库存？", "{t}的库存是多少？"], ["店里有多少{t}？"]),
    },
    "total": {
        "en": (["What do {a} of the item {t} cost?", "What is the price of {a} times {t}?"], ["How much is {a} x {t}?"]),
        "zh": (["买{a}个{t}要多少钱？", "{a}个{t}一共多少钱？"], ["{a}份{t}共卖多少钱？"]),
    },
}  # fmt: skip
CONVERSIONS = [
    ("m", "cm"),
    ("km", "m"),
    ("kg", "g"),
    ("l", "ml"),
    ("h", "min"),
    ("min", "s"),
    ("week", "d"),
    ("d", "h"),
]
WEEKDAYS_ZH = ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日")
FIRST_DAY = datetime.date(2024, 1, 1)
ARITHMETIC = ("two_steps", "three_steps")


@dataclass(frozen=True)
class Exercise:
    """A question with its answer, the steps to it, and the calls of tools that give it."""

    kind: str
    language: str
    question: str
    answer: str
    steps: str
    calls: tuple[tuple[str, tuple[tuple[str, object], ...]], ...]

    @property
    def tools(self) -> list[str]:
        return [*dict.fromkeys(name for name, _ in self.calls)]

    @property
    def verifier(self) -> str:
        return "number" if self.answer.isdigit() else "exact"


def _call(name: str, **arguments: object) -> tuple[str, tuple[tuple[str, object], ...]]:
    return name, tuple(arguments.items())


def _compute(expression: str) -> str:
    return TOOLS["calculator"](expression)


def _steps(expression: str) -> str:
    """Return an expression step by step: "3*4+5" as "3*4=12, 12+5=17"."""
    numbers, signs = [""], []
    for sign in expression:
        if sign.isdigit():
            numbers[-1] += sign
        else:
            signs.append(sign)
            numbers.append("")
    result, shown = numbers[0], []
    for sign, number in zip(signs, numbers[1:], strict=True):
        step = f"{result}{sign}{number}"
        result = _compute(step)
        shown.append(f"{step}={result}")
    return ", ".join(shown)


def _problem(kind: str, language: str, dice, held_out: bool) -> Exercise | None:
    formula, wordings = dice.choice(PROBLEMS[kind])
    values = {name: 2 + dice.below(8) for name in "abcd"}
    expression = "".join(str(values.get(sign, sign)) for sign in formula)
    steps = _steps(expression)
    if any(not 0 <= int(step.split("=")[1]) < 100 for step in steps.split(", ")):
        return None
    words = {"n": dice.choice(NAMES[language]), "o": dice.choice(THINGS[language])}
    question = dice.choice(wordings[language][held_out]).format(**values, **words)
    answer = _compute(expression)
    return Exercise(kind, language, question, answer, steps, (_call("calculator", expression=expression),))


def _question(kind: str, language: str, dice, held_out: bool) -> Exercise:
    wording = dice.choice(QUESTIONS[kind][language][held_out])
    a, steps = 2 + dice.below(8), ""
    day = (FIRST_DAY + datetime.timedelta(days=dice.below(366))).isoformat()
    item = dice.choice([*TABLE])
    values = {"a": a, "t": item, "u": ""}
    if kind == "unit":
        large, little = dice.choice(CONVERSIONS)
        values |= {"t": large, "u": little}
        factor = f"{UNITS[large][1] / UNITS[little][1]:.0f}"
        answer = _compute(f"{a}*{factor}")
        steps = f"{a}*{factor}={answer}"
        calls = [_call("unit_converter", value=a, from_unit=large, to_unit=little)]
    elif kind == "date":
        a += dice.below(20)
        values |= {"t": day, "a": a}
        answer = (datetime.date.fromisoformat(day) + datetime.timedelta(days=a)).isoformat()
        calls = [_call("calendar", date=day, days=a)]
    elif kind == "weekday":
        values |= {"t": day}
        number = datetime.date.fromisoformat(day).weekday()
        answer = (WEEKDAYS if language == "en" else WEEKDAYS_ZH)[number]
        calls = [_call("calendar", date=day)]
    else:
        field = "stock" if kind == "stock" else "price"
        answer = str(TABLE[item][field])
        calls = [_call("lookup", item=item, field=field)]
        if kind == "total":
            expression = f"{a}*{answer}"
            answer = _compute(expression)
            calls.append(_call("calculator", expression=expression))
    return Exercise(kind, language, wording.format(**values), answer, steps, tuple(calls))


def make(kind: str, language: str, n: int, dice, is_held_out: Callable[[str], bool], held_out: bool) -> list[Exercise]:
    """Return n different exercises. Look-ups have few numbers: only their wordings are held out."""
    found: dict[str, Exercise] = {}
    for _ in range(20 * n):
        new = (_problem if kind in PROBLEMS else _question)(kind, language, dice, held_out)
        if new is None or (kind not in ("price", "stock") and is_held_out(f"{kind} {new.calls}") != held_out):
            continue
        found.setdefault(new.question, new)
        if len(found) == n:
            break
    return [*found.values()]


def example(exercise: Exercise, mode: str) -> dict:
    """Return a dialogue for SFT; mode: "direct", "thinking", "tools" or "thinking_tools"."""
    messages: list[dict] = [{"role": "user", "content": exercise.question}]
    thought = {"reasoning_content": exercise.steps} if mode == "thinking" else {}
    row: dict = {"messages": messages}
    if mode == "direct":
        thought = {"reasoning_content": ""}
    if mode.endswith("tools"):
        row["tools"] = [tool_schema(TOOLS[name]) for name in exercise.tools]
        for name, arguments in exercise.calls:
            call = {"name": name, "arguments": dict(arguments)}
            planned = {"reasoning_content": name} if mode == "thinking_tools" else {}
            messages.append({"role": "assistant", "content": "", **planned, "tool_calls": [call]})
            messages.append({"role": "tool", "content": TOOLS[name](**call["arguments"])})
    messages.append({"role": "assistant", "content": exercise.answer, **thought})
    return row


def prompt(exercise: Exercise, mode: str) -> dict:
    """Return a question with its answer, for reinforcement learning."""
    row = {
        "messages": [{"role": "user", "content": exercise.question}], "answer": exercise.answer,
        "verifier": exercise.verifier, "kind": exercise.kind, "language": exercise.language,
    }  # fmt: skip
    if mode.endswith("tools"):
        return row | {"tools": exercise.tools}
    return row | {"enable_thinking": mode == "thinking"}


# How many exercises of each kind and mode, per language: for SFT, for reinforcement learning, held out.
PLAN = [
    ("two_steps", "thinking", 400, 400, 50), ("two_steps", "direct", 200, 0, 50), ("two_steps", "tools", 80, 150, 25),
    ("three_steps", "thinking", 150, 150, 0), ("three_steps", "tools", 40, 75, 25),
    ("unit", "thinking", 40, 40, 15), ("unit", "tools", 30, 40, 15), ("unit", "thinking_tools", 15, 0, 0),
    ("date", "tools", 50, 60, 15), ("weekday", "tools", 30, 40, 15), ("price", "tools", 15, 15, 10),
    ("stock", "tools", 15, 15, 10), ("total", "tools", 25, 30, 15),
]  # fmt: skip


def make_rows(new_dice: Callable) -> tuple[list[dict], list[dict], list[dict]]:
    """Return the rows for SFT, for reinforcement learning, and held-out prompts."""

    def is_held_out(name: str) -> bool:
        return new_dice(name).below(8) == 0

    sft, rlvr, held_out = [], [], []
    for kind, mode, n_sft, n_rlvr, n_held_out in PLAN:
        for language in ("en", "zh"):
            dice = new_dice(f"{kind} {mode} {language}")
            made = make(kind, language, n_sft + n_rlvr, dice, is_held_out, held_out=False)
            sft += [example(exercise, mode) for exercise in made[:n_sft]]
            rlvr += [prompt(exercise, mode) for exercise in made[::-1][:n_rlvr]]  # both have some where there are few
            others = make(kind, language, n_held_out, dice, is_held_out, held_out=True) if n_held_out else []
            held_out += [prompt(exercise, mode) for exercise in others]
    dice = new_dice("order of exercises")
    return dice.shuffled(sft), dice.shuffled(rlvr), held_out
