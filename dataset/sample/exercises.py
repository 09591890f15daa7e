"""Exercises with answers that can be checked: word problems, units, dates, look-ups; solved at once, by thinking, by tools.

There are dialogues for SFT, and questions for reinforcement learning and for measuring. The numbers of held-out exercises
never occur in the others, and neither do the combinations of sentences that tell them.
"""

from __future__ import annotations

import datetime
import functools
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
# A word problem is told in sentences: what there is at first, what happens, the question. {n}: a name, {o}: things.
SENTENCES = {
    "en": {
        "start": ["{n} has {x} {o}.", "There are {x} {o} in the bag of {n}.", "{n} counts {x} {o}."],
        "groups": [
            "{n} has {x} boxes of {y} {o}.", "There are {x} bags with {y} {o} each.", "{n} buys {x} packs of {y} {o}.",
        ],
        "plus": ["Then {n} finds {x} more.", "A friend brings {x} more.", "{n} buys {x} more."],
        "plus_groups": [
            "Then {n} finds {x} bags of {y}.", "A friend brings {x} boxes of {y}.", "{n} buys {x} packs of {y}.",
        ],
        "minus": ["{n} gives {x} away.", "Then {n} loses {x}.", "A friend takes {x}."],
        "question": ["How many {o} are there now?", "How many {o} does {n} have now?", "How many {o} is that?"],
    },
    "zh": {
        "start": ["{n}有{x}个{o}。", "{n}的袋子里有{x}个{o}。", "{n}数了数，有{x}个{o}。"],
        "groups": ["{n}有{x}盒{o}，每盒{y}个。", "这里有{x}袋{o}，每袋{y}个。", "{n}买了{x}包{o}，每包{y}个。"],
        "plus": ["后来又找到{x}个。", "朋友又送来{x}个。", "{n}又买了{x}个。"],
        "plus_groups": ["后来又找到{x}袋，每袋{y}个。", "朋友又送来{x}盒，每盒{y}个。", "{n}又买了{x}包，每包{y}个。"],
        "minus": ["{n}送出{x}个。", "后来丢了{x}个。", "朋友拿走{x}个。"],
        "question": ["现在有多少个{o}？", "{n}现在有多少个{o}？", "一共有多少个{o}？"],
    },
}  # fmt: skip
PROBLEMS = {
    "two_steps": [("start", "plus_groups"), ("groups", "minus"), ("start", "plus", "minus"), ("groups", "plus")],
    "three_steps": [("groups", "plus", "minus"), ("start", "plus_groups", "minus")],
}
TERMS = {"start": "{x}", "groups": "{x}*{y}", "plus": "{e}+{x}", "plus_groups": "{x}*{y}+{e}", "minus": "{e}-{x}"}
QUESTIONS = {
    "unit": {
        "en": ["How many {u} are {a} {t}?", "Convert {a} {t} to {u}.", "{a} {t} is how many {u}?"],
        "zh": ["{a} {t}等于多少{u}？", "把{a} {t}换算成{u}。", "{a} {t}是多少{u}？"],
    },
    "date": {
        "en": ["Which date is {a} days after {t}?", "It is {t}. Which date is it in {a} days?"],
        "zh": ["{t}之后{a}天是几号？", "今天是{t}，{a}天后是哪一天？"],
    },
    "weekday": {
        "en": ["Which day of the week is {t}?", "What weekday is {t}?"],
        "zh": ["{t}是星期几？", "请问{t}那天星期几？"],
    },
    "price": {
        "en": ["What does the {t} cost in the shop?", "What is the price of the {t}?"],
        "zh": ["店里的{t}多少钱？", "{t}的价格是多少？"],
    },
    "stock": {
        "en": ["How many of the item {t} are in stock?", "What is the stock of {t}?"],
        "zh": ["店里的{t}还有多少库存？", "{t}的库存是多少？"],
    },
    "total": {
        "en": ["What do {a} of the item {t} cost?", "What is the price of {a} times {t}?"],
        "zh": ["买{a}个{t}要多少钱？", "{a}个{t}一共多少钱？"],
    },
}
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


@dataclass(frozen=True)
class Exercise:
    """A question with its answer, the steps to it, and the tool calls that give it."""

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


@functools.cache
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


def _problem(kind: str, language: str, dice) -> tuple[Exercise, list[str]] | None:
    """Return a word problem, and what must be new if it is held out: its numbers, and how its sentences are combined."""
    events = dice.choice(PROBLEMS[kind])
    words = {"n": dice.choice(NAMES[language]), "o": dice.choice(THINGS[language])}
    expression, told, wording = "", [], []
    for event in (*events, "question"):
        numbers = {"x": 2 + dice.below(8), "y": 2 + dice.below(8)}
        wording.append(dice.below(len(SENTENCES[language][event])))
        told.append(SENTENCES[language][event][wording[-1]].format(**numbers, **words))
        expression = TERMS.get(event, "{e}").format(e=expression, **numbers)
    steps = _steps(expression)
    if any(int(step.split("=")[1]) < 0 for step in steps.split(", ")):
        return None
    question = (" " if language == "en" else "").join(told)
    calls = (_call("calculator", expression=expression),)
    exercise = Exercise(kind, language, question, _compute(expression), steps, calls)
    return exercise, [expression, f"{language} {events} {wording}"]


def _question(kind: str, language: str, dice) -> tuple[Exercise, list[str]]:
    """Return a question, and what must be new if it is held out: its numbers."""
    wording = dice.choice(QUESTIONS[kind][language])
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
    exercise = Exercise(kind, language, wording.format(**values), answer, steps, tuple(calls))
    return exercise, [str(calls)]


def make(kind: str, language: str, n: int, dice, is_held_out: Callable[[str], bool], held_out: bool) -> list[Exercise]:
    """Return n different exercises of which all parts are held out, or none; fewer where there are not so many."""
    found: dict[str, Exercise] = {}
    for _ in range(100 * n):
        made = (_problem if kind in PROBLEMS else _question)(kind, language, dice)
        if made is not None and {is_held_out(part) for part in made[1]} == {held_out}:
            found.setdefault(made[0].question, made[0])
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
    """Return a question with its answer, for reinforcement learning; mode "free": the model chooses whether it thinks."""
    row = {"messages": [{"role": "user", "content": exercise.question}], "answer": exercise.answer}
    row["verifier"] = exercise.verifier
    if mode == "free":
        return row
    return row | ({"tools": exercise.tools} if mode == "tools" else {"enable_thinking": mode == "thinking"})


# How many exercises of each kind and mode, per language: for SFT, for reinforcement learning, held out.
PLAN = [
    ("two_steps", "thinking", 1500, 0, 50), ("two_steps", "direct", 900, 0, 50), ("two_steps", "free", 0, 600, 50),
    ("two_steps", "tools", 400, 200, 25),
    ("three_steps", "thinking", 400, 200, 25), ("three_steps", "tools", 100, 100, 25),
    ("unit", "thinking", 50, 30, 0), ("unit", "tools", 30, 30, 0), ("unit", "thinking_tools", 15, 0, 0),
    ("date", "tools", 50, 15, 15), ("weekday", "tools", 30, 15, 15), ("price", "tools", 15, 10, 0),
    ("stock", "tools", 15, 10, 0), ("total", "tools", 25, 15, 10),
]  # fmt: skip


def make_rows(new_dice: Callable) -> tuple[list[dict], list[dict], list[dict]]:
    """Return the rows for SFT, for reinforcement learning, and held-out prompts."""

    @functools.cache
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
            labels = {"kind": kind, "language": language}
            held_out += [prompt(exercise, mode) | labels for exercise in others]
    dice = new_dice("order of exercises")
    return dice.shuffled(sft), dice.shuffled(rlvr), held_out
