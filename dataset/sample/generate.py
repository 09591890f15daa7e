"""Write the sample data: small, bilingual, true, and learnable by the toy preset in minutes.

    python dataset/sample/generate.py            # write the files beside this script
    python dataset/sample/generate.py --check    # compare them with what would be written

The same bytes come out on every platform and Python. README.md beside this file describes what is written.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import exercises
import facts
import phrasings
import scenes

FOLDER = Path(__file__).resolve().parent
SEED = 20240901
LANGUAGES = ("en", "zh")
LETTERS = "ABCD"

N_FACT_TEXTS = 1500  # paragraphs of facts in the pretraining text, per language
N_STORIES = 250  # per language
N_TALKS = 500  # dialogues as text, per language
N_CHOICE_TEXTS = 250  # multiple-choice questions in the pretraining text, per language
N_EXERCISES = 150  # lists of options with many questions about them in the pretraining text, per language
N_CHOICE = 700  # multiple-choice questions in the SFT data, per language
N_MEMORY = 700  # dialogues with something to remember in the SFT data, per language
N_MEMORY_HELD_OUT = 60  # per language
N_QUIZ = 40  # questions of each subject of the quiz

SUBJECTS = {
    "sample_arithmetic": ("sum",),
    "sample_calendar": ("season", "next_month", "next_day"),
    "sample_geography": ("capital", "continent"),
    "sample_language": ("opposite", "translation", "idiom", "proverb"),
    "sample_science": ("symbol", "animal", "colour", "planet"),
}


class Dice:
    """Random choices based on `random.Random.random()` alone, whose numbers Python promises never to change."""

    def __init__(self, name: str):
        self.random = random.Random(f"{SEED} {name}").random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def choice(self, items):
        return items[self.below(len(items))]

    def shuffled(self, items) -> list:
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]
        return items

    def sample(self, items, n: int) -> list:
        return self.shuffled(items)[:n]


@dataclass(frozen=True)
class Fact:
    """One true fact in one language."""

    relation: str
    language: str
    subject: str
    answer: str

    def phrase(self, kind: str) -> list[str]:
        """Return all phrasings of this fact of the kind "ask", "held_out" or "state"."""
        templates = phrasings.PHRASINGS[self.relation][self.language][kind]
        return [fill(text, s=self.subject, a=self.answer) for text in templates]


def fill(template: str, **values: str) -> str:
    """Return the template with its values filled in, starting with a capital letter."""
    text = template.format(**values)
    return text[0].upper() + text[1:]


# --- facts -----------------------------------------------------------------------------------------------------------


def all_facts() -> list[Fact]:
    """Return every fact in each of its languages, in a fixed order."""
    rows: list[tuple[str, str, str, str, str]] = []  # relation, subject and answer in English, then in Chinese
    for en, zh, capital_en, capital_zh, continent in facts.COUNTRIES:
        rows.append(("capital", en, capital_en, zh, capital_zh))
        rows.append(("continent", en, continent, zh, facts.CONTINENTS[continent]))
    rows += [("symbol", en, symbol, zh, symbol) for en, zh, symbol in facts.ELEMENTS]
    rows += [("animal", en, class_en, zh, class_zh) for en, zh, class_en, class_zh in facts.ANIMALS]
    rows += [("opposite", *row) for row in facts.OPPOSITES]
    rows += [("colour", en, colour_en, zh, colour_zh) for en, zh, colour_en, colour_zh in facts.COLOURS]
    for i, (en, zh) in enumerate(facts.MONTHS):
        season_en, season_zh = facts.SEASONS[(i - 2) // 3 % 4]
        rows.append(("season", en, season_en, zh, season_zh))
    for name, cycle in (("next_month", facts.MONTHS), ("next_day", facts.DAYS)):
        for i, (en, zh) in enumerate(cycle):
            next_en, next_zh = cycle[(i + 1) % len(cycle)]
            rows.append((name, en, next_en, zh, next_zh))
    for (en, zh), (planet_en, planet_zh) in zip(facts.ORDINALS, facts.PLANETS, strict=True):
        rows.append(("planet", en, planet_en, zh, planet_zh))
    rows += [("translation", en, zh, zh, en) for en, zh in facts.WORDS]
    for a in range(1, facts.LARGEST_SUMMAND + 1):
        for b in range(a, facts.LARGEST_SUMMAND + 1):
            rows.append(("sum", f"{a} + {b}", str(a + b), f"{a} + {b}", str(a + b)))
    made = [Fact(row[0], "en", row[1], row[2]) for row in rows] + [Fact(row[0], "zh", row[3], row[4]) for row in rows]
    made += [Fact("idiom", "zh", start, end) for start, end in facts.IDIOMS]
    made += [Fact("proverb", "en", start, end) for start, end in facts.PROVERBS]
    return made


def by_language(known: list[Fact], language: str) -> list[Fact]:
    return [fact for fact in known if fact.language == language]


# --- multiple choice -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A question with four options, one of which is right."""

    question: str
    options: tuple[str, ...]
    letter: str

    def prompt(self) -> str:
        """Return the user's message, in the format of eval_ceval.py; the assistant answers with the letter alone."""
        lines = [self.question, *(f"{letter}. {text}" for letter, text in zip(LETTERS, self.options, strict=True))]
        return "\n".join(lines) + "\n答案："


def wrong_answers(fact: Fact, known: list[Fact], dice: Dice, n: int = 3) -> list[str]:
    """Return `n` other answers of the same relation and language."""
    pool = sorted(
        {other.answer for other in known if (other.relation, other.language) == (fact.relation, fact.language)}
        - {fact.answer}
    )
    return dice.sample(pool, n)


def choice(question: str, answer: str, wrong: list[str], letter: str) -> Choice:
    options = list(wrong)
    options.insert(LETTERS.index(letter), answer)
    return Choice(question, tuple(options), letter)


def choices(known: list[Fact], language: str, n: int, dice: Dice, taken: set[Choice]) -> list[Choice]:
    """Return `n` different questions in training phrasings; the letters take turns. One in six only asks for an option."""
    pool = by_language(known, language)
    order: list[Fact] = []
    made: list[Choice] = []
    while len(made) < n:
        if not order:
            order = dice.shuffled(pool)
        fact = order.pop()
        if dice.below(6) == 0:
            question = fill(dice.choice(phrasings.FIND_OPTION[language]), a=fact.answer)
        else:
            states = [text for text in phrasings.PHRASINGS[fact.relation][language]["state"] if text.count("{a}") == 1]
            blank = fill(dice.choice(states), s=fact.subject, a="____")
            question = dice.choice([*fact.phrase("ask"), blank, blank])
        new = choice(question, fact.answer, wrong_answers(fact, known, dice), LETTERS[len(made) % 4])
        if new not in taken:
            taken.add(new)
            made.append(new)
    return made


def exercise(known: list[Fact], language: str, dice: Dice) -> str:
    """Return four options and several lines about them: the letter of an option, and the option that answers a question.

    A question with options shows one letter in fifty tokens. Here every line shows one: so a small model comes to look
    for an option at all.
    """
    fact = dice.choice(by_language(known, language))
    same = [other for other in known if (other.relation, other.language) == (fact.relation, language)]
    by_answer = {other.answer: other for other in dice.shuffled(same)}
    chosen = dice.sample(sorted(by_answer), 4)
    lines = [f"{letter}. {answer}" for letter, answer in zip(LETTERS, chosen, strict=True)]
    for letter, answer in dice.shuffled(zip(LETTERS, chosen, strict=True)):
        lines.append(fill(dice.choice(phrasings.LETTER_OF[language]), a=answer, l=letter))
    for letter, answer in dice.shuffled(zip(LETTERS, chosen, strict=True)):
        lines.append(f"{dice.choice(by_answer[answer].phrase('ask'))} 答案：{letter}")
    return "\n".join(lines)


def quiz(known: list[Fact]) -> dict[str, list[tuple[Choice, Fact]]]:
    """Return for each subject `N_QUIZ` questions and five few-shot ones, in phrasings that training never uses."""
    made = {}
    for subject, relations in SUBJECTS.items():
        dice = Dice(f"quiz {subject}")
        pool = dice.shuffled([fact for fact in known if fact.relation in relations])
        asked: set[Choice] = set()
        rows = []
        while len(rows) < N_QUIZ + 5:
            fact = pool[len(rows) % len(pool)]
            question = dice.choice(fact.phrase("held_out"))
            new = choice(question, fact.answer, wrong_answers(fact, known, dice), LETTERS[len(rows) % 4])
            if new not in asked:
                asked.add(new)
                rows.append((new, fact))
        # The letters took turns: shuffle, so that the order reveals nothing.
        made[subject] = dice.shuffled(rows[:N_QUIZ]) + rows[N_QUIZ:]
    return made


# --- dialogues -------------------------------------------------------------------------------------------------------


def memory(
    language: str, known: list[Fact], dice: Dice, held_out: bool, told: int = 2, asked: int = 1
) -> list[tuple[str, str]]:
    """Turns (user, assistant): `told` things are told, perhaps a fact is asked, and `asked` of them are asked for.

    A pair of values is held out if the sum of their places in the lists is divisible by five: either the first pair of
    a dialogue is held out, or none of its pairs is.
    """
    values = phrasings.MEMORY_VALUES
    while True:
        slots = dice.sample(sorted(phrasings.MEMORY), told)
        places = [dice.below(len(values[slot][language])) for slot in slots]
        if any((i + j) % 5 == 0 for n, i in enumerate(places) for j in places[:n]) == held_out:
            break
    value = {slot: values[slot][language][i] for slot, i in zip(slots, places, strict=True)}
    turns = []
    for slot in slots:
        said = fill(dice.choice(phrasings.MEMORY[slot][language]["say"]), v=value[slot])
        turns.append((said, fill(phrasings.NOTED[language], v=value[slot])))
    if dice.below(2):
        fact = dice.choice(by_language(known, language))
        turns.insert(1 + dice.below(told), (dice.choice(fact.phrase("ask")), fact.answer))
    for slot in dice.sample(slots, asked):
        words = phrasings.MEMORY[slot][language]
        turns.append((dice.choice(words["ask"]), fill(words["answer"], v=value[slot])))
    return turns


def memories(language: str, known: list[Fact], n: int, held_out: bool) -> list[list[tuple[str, str]]]:
    dice = Dice(f"memory {language} {held_out}")
    made: dict[str, list[tuple[str, str]]] = {}
    while len(made) < n:
        turns = memory(language, known, dice, held_out, asked=1 if held_out else 1 + dice.below(2))
        made.setdefault(json.dumps(turns), turns)
    return list(made.values())


def identity(persona: dict, kind: str) -> list[tuple[str, str]]:
    """Return (question, answer) pairs about the assistant's identity; `kind` is "ask" or "held_out"."""
    return [
        (prefix + question, persona[intent][language])
        for intent in phrasings.IDENTITY
        for language in LANGUAGES
        for question in phrasings.IDENTITY[intent][language][kind]
        for prefix in phrasings.PREFIXES[language]
    ]


def remarks(language: str) -> list[tuple[str, str, str, bool]]:
    """Return (remark, kind answer, rude answer, held out?): small talk about hobbies."""
    made = []
    for i, hobby in enumerate(phrasings.HOBBIES):
        value = hobby[LANGUAGES.index(language)]
        for j, text in enumerate(phrasings.REMARKS[language]):
            answers = (fill(words[language], v=value) for words in (phrasings.KIND, phrasings.RUDE))
            made.append((fill(text, v=value), *answers, (i + j) % 5 == 0))
    return made


# --- texts -----------------------------------------------------------------------------------------------------------


def pretrain_texts(known: list[Fact]) -> list[str]:
    """Return the pretraining corpus: facts in paragraphs, questions with answers, choices, dialogues and stories."""
    made: set[str] = set()
    taken: set[Choice] = set()
    for language in LANGUAGES:
        dice = Dice(f"pretrain {language}")
        pool = by_language(known, language)
        joint = " " if language == "en" else ""
        for text in _batches(pool, N_FACT_TEXTS, 4, dice):
            made.add(joint.join(_stated_or_asked(fact, dice) for fact in text))
        for new in choices(known, language, N_CHOICE_TEXTS, dice, taken):
            made.add(new.prompt() + new.letter)
        while_made = len(made) + N_EXERCISES
        while len(made) < while_made:
            made.add(exercise(known, language, dice))
        speakers = ("Q: ", "A: ") if language == "en" else ("问：", "答：")
        while_made = len(made) + N_TALKS
        while len(made) < while_made:
            turns = memory(language, known, dice, held_out=False, told=3, asked=3)
            made.add("\n".join(who + text for turn in turns for who, text in zip(speakers, turn, strict=True)))
        while_made = len(made) + N_STORIES
        grammar = phrasings.STORIES[language]
        while len(made) < while_made:
            slots = {name: dice.choice(words) for name, words in grammar.items() if name != "plots"}
            made.add(fill(dice.choice(grammar["plots"]), **slots))
    return Dice("pretrain order").shuffled(sorted(made))


def _batches(pool: list[Fact], n: int, size: int, dice: Dice):
    """Yield `n` groups of `size` facts; every fact is used once before any is used again."""
    order: list[Fact] = []
    for _ in range(n):
        while len(order) < size:
            order = dice.shuffled(pool) + order
        yield [order.pop() for _ in range(size)]


def _stated_or_asked(fact: Fact, dice: Dice) -> str:
    """Return a sentence with the fact; one in three is a question and its answer."""
    if dice.below(3):
        return dice.choice(fact.phrase("state"))
    question = dice.choice(fact.phrase("ask"))
    return f"{question} {fact.answer}." if fact.language == "en" else f"{question}{fact.answer}。"


def sft_rows(known: list[Fact]) -> list[dict]:
    """Return the instructions: every fact in every training phrasing, choices, memory, identity and small talk."""
    dice = Dice("sft")
    rows = []
    for fact in known:
        for question in fact.phrase("ask"):
            rows.append(sft_row([(question, fact.answer)]))
        prefix = dice.choice(phrasings.PREFIXES[fact.language][1:])
        rows.append(sft_row([(prefix + dice.choice(fact.phrase("ask")), fact.answer)]))
    taken: set[Choice] = set()
    for language in LANGUAGES:
        for new in choices(known, language, N_CHOICE, dice, taken):
            rows.append(sft_row([(new.prompt(), new.letter)]))
        rows += [sft_row(turns) for turns in memories(language, known, N_MEMORY, held_out=False)]
        for i, (remark, kind, rude, held_out) in enumerate(remarks(language)):
            if not held_out:
                rows.append(sft_row([(remark, (kind, rude)[i % 2])]))
    rows += [sft_row([turn]) for turn in identity(phrasings.MINIMIND, "ask")]
    return dice.shuffled(rows)


def sft_row(turns: list[tuple[str, str]]) -> dict:
    *history, (question, answer) = turns
    return {"instruction": question, "input": "", "output": answer, "history": [list(turn) for turn in history]}


def chat_row(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def cafe(kind: str) -> list[tuple[str, str]]:
    """Return (question, answer) pairs about a cafe that does not exist; `kind` is "ask" or "held_out"."""
    made = []
    for i, language in enumerate(LANGUAGES):
        answer = phrasings.CAFE_PRICE_ANSWER[language]
        asked = [("price", row[i], answer.format(a=row[2])) for row in phrasings.CAFE_PRICES]
        asked += [("special", row[i], row[2 + i]) for row in phrasings.CAFE_SPECIALS]
        for relation, subject, answer in asked:
            for text in phrasings.CAFE_PHRASINGS[relation][language][kind]:
                made.append((fill(text, s=subject), answer))
        for fact in phrasings.CAFE_FACTS:
            answer, *questions = fact[language]
            made += [(question, answer) for question in questions[kind == "held_out"]]
    return made


def preferences(known: list[Fact], held_out: bool) -> list[dict]:
    """Return pairs: a right answer preferred to a wrong or a rambling one, a kind answer to a rude one."""
    dice = Dice(f"preferences {held_out}")
    rows = []
    for fact in known:
        if not held_out or dice.below(4) == 0:
            question = dice.choice(fact.phrase("held_out" if held_out else "ask"))
            rambling = fill(dice.choice(phrasings.RAMBLING[fact.language]), a=fact.answer)
            wrong = wrong_answers(fact, known, dice, 1)[0]
            rows.append(preference(question, fact.answer, dice.choice([wrong, rambling])))
    for language in LANGUAGES:
        rows += [preference(text, kind, rude) for text, kind, rude, held in remarks(language) if held == held_out]
    return dice.shuffled(rows)


def preference(question: str, chosen: str, rejected: str) -> dict:
    return {
        "conversations": [{"from": "human", "value": question}],
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
    }


# --- files -----------------------------------------------------------------------------------------------------------


def make_files() -> dict[str, str]:
    """Return path in this folder -> text, for all generated files."""
    known = all_facts()
    dice = Dice("held out")
    held_out = [sft_row([(dice.choice(fact.phrase("held_out")), fact.answer)]) for fact in known]
    recall = [
        sft_row(turns)
        for language in LANGUAGES
        for turns in memories(language, known, N_MEMORY_HELD_OUT, held_out=True)
    ]
    files = {
        "mobvoi_seq_monkey_general_open_corpus.jsonl": jsonl({"text": text} for text in pretrain_texts(known)),
        "sft_data_zh.jsonl": jsonl(sft_rows(known)),
        "sft_heldout.jsonl": jsonl(held_out),
        "recall_heldout.jsonl": jsonl(recall),
        "lora_identity.jsonl": jsonl(chat_row(*turn) for turn in identity(phrasings.PEBBLE, "ask")),
        "lora_identity_heldout.jsonl": jsonl(chat_row(*turn) for turn in identity(phrasings.PEBBLE, "held_out")),
        "lora_domain.jsonl": jsonl(chat_row(*turn) for turn in cafe("ask")),
        "lora_domain_heldout.jsonl": jsonl(chat_row(*turn) for turn in cafe("held_out")),
        "dpo/preference.json": json_list(preferences(known, held_out=False)),
        "dpo_heldout.json": json_list(preferences(known, held_out=True)),
    }
    for name, rows in zip(("sft", "data", "heldout"), exercises.make_rows(Dice), strict=True):
        files[f"rlvr_{name}.jsonl"] = jsonl(rows)
    for subject, rows in quiz(known).items():
        files[f"ceval/val/{subject}_val.csv"] = quiz_csv(rows[:N_QUIZ], explained=False)
        files[f"ceval/dev/{subject}_dev.csv"] = quiz_csv(rows[N_QUIZ:], explained=True)
    return files


def jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def json_list(rows: list[dict]) -> str:
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def quiz_csv(rows: list[tuple[Choice, Fact]], explained: bool) -> str:
    """Return a CSV in C-Eval's format: id, question, A, B, C, D, answer, and in the dev files an explanation."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["id", "question", *LETTERS, "answer", *(["explanation"] if explained else [])])
    for i, (row, fact) in enumerate(rows):
        explanation = [fact.phrase("state")[0]] if explained else []
        writer.writerow([i, row.question, *row.options, row.letter, *explanation])
    return buffer.getvalue()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not what it should be")
    args = parser.parse_args()
    different = []
    for name, text in make_files().items():
        path, data = FOLDER / name, text.encode("utf-8")
        if path.is_file() and path.read_bytes() == data:
            continue
        if args.check:
            different.append(name)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            print(f"wrote {path}: {len(data):,} bytes")
    for name, rows in scenes.make_tables(Dice).items():
        path = FOLDER / name
        if scenes.are_in(rows, path):
            continue
        if args.check:
            different.append(name)
        else:
            scenes.write(rows, path)
            print(f"wrote {path}: {path.stat().st_size:,} bytes")
    if different:
        print(f"not what generate.py writes: {', '.join(different)}; run it without --check", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
