"""dataset/sample: what ships is what its generator writes, true to itself, and without leaks into what is held out."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.cleaning import STAGES, CleaningOptions, chinese_ratio, clean
from data_pipeline.image_records import parse_image_row
from data_pipeline.images import open_image
from data_pipeline.readers import iter_records
from data_pipeline.records import parse_conversation
from evaluation.rollouts import read_prompts
from evaluation.tools import TOOLS
from model.chat_format import IMAGE
from model.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
DICE = [18, 68, 41, 75, 64, 13, 3, 84]
SAMPLE = ROOT / "dataset" / "sample"
CORPUS, SFT = "mobvoi_seq_monkey_general_open_corpus.jsonl", "sft_data_zh.jsonl"
SUBJECTS = sorted(path.name.removesuffix("_val.csv") for path in (SAMPLE / "ceval" / "val").glob("*_val.csv"))


@pytest.fixture(scope="module")
def generate():
    """The generator as a module; its neighbours are found because a script's folder is on the path."""
    sys.path.insert(0, str(SAMPLE))
    try:
        import generate
    finally:
        sys.path.remove(str(SAMPLE))
    return generate


@pytest.fixture(scope="module")
def known(generate):
    return generate.all_facts()


@functools.cache
def jsonl(name: str) -> list[dict]:
    return [json.loads(line) for line in (SAMPLE / name).read_text(encoding="utf-8").splitlines()]


def quiz(part: str, subject: str) -> list[dict]:
    with open(SAMPLE / "ceval" / part / f"{subject}_{part}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def normal(text: str) -> str:
    """Letters and digits only, so that a changed comma or capital does not hide a leak; + and = matter in sums."""
    return re.sub(r"[^\w+=]|_", "", unicodedata.normalize("NFKC", text).casefold())


@functools.cache
def taught_questions() -> set[str]:
    return {normal(question) for row in jsonl(SFT) for question, _ in turns(row)}


def turns(row: dict) -> list[list[str]]:
    return [*row["history"], [row["instruction"], row["output"]]]


def chat(row: dict) -> tuple[str, str]:
    user, assistant = row["messages"]
    assert (user["role"], assistant["role"]) == ("user", "assistant")
    return user["content"], assistant["content"]


# --- the files are the generator's -----------------------------------------------------------------------------------


def run(*args: str, script: Path = SAMPLE / "generate.py") -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # a copy of the script finds our packages, too
    return subprocess.run(
        [sys.executable, str(script), *args], capture_output=True, text=True, cwd=script.parents[1], env=environment
    )


def test_the_files_are_what_the_generator_writes():
    done = run("--check")
    assert done.returncode == 0, done.stderr


def test_check_names_a_changed_and_a_missing_file_and_a_run_repairs_both(tmp_path):
    folder = tmp_path / "sample"
    folder.mkdir()
    for name in ("generate.py", "exercises.py", "facts.py", "phrasings.py"):
        (folder / name).write_bytes((SAMPLE / name).read_bytes())
    pictures = (SAMPLE / "scenes.py").read_text(encoding="utf-8")
    few = re.sub(r"^(N_\w+) = \d+", r"\1 = 4", pictures, flags=re.MULTILINE)
    (folder / "scenes.py").write_text(few, encoding="utf-8")
    script = folder / "generate.py"
    assert run(script=script).returncode == 0
    (folder / SFT).write_text((folder / SFT).read_text(encoding="utf-8") + "{}\n", encoding="utf-8")
    (folder / "dpo_heldout.json").unlink()
    (folder / "vlm_sft.parquet").write_bytes((folder / "vlm_pretrain.parquet").read_bytes())
    done = run("--check", script=script)
    assert done.returncode == 1
    assert SFT in done.stderr and "dpo_heldout.json" in done.stderr and "vlm_sft.parquet" in done.stderr
    assert CORPUS not in done.stderr and "vlm_heldout" not in done.stderr
    assert run(script=script).returncode == 0
    assert run("--check", script=script).returncode == 0
    for path in SAMPLE.rglob("*.json*"):  # what ships came from another process, with another hash seed
        assert (folder / path.relative_to(SAMPLE)).read_bytes() == path.read_bytes()


def test_dice_are_those_of_every_python(generate):
    dice = generate.Dice("test")
    assert [dice.below(100) for _ in range(8)] == DICE
    assert sorted(generate.Dice("test").shuffled(range(50))) == list(range(50))


def test_files_are_small_and_end_lines_as_everywhere(generate):
    files = [path for path in SAMPLE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    pictures = [path for path in files if path.suffix == ".parquet"]
    files = [path for path in files if path not in pictures]
    assert sum(path.stat().st_size for path in files) < 6_000_000
    assert sum(path.stat().st_size for path in pictures) < 4_000_000
    assert {path.name for path in pictures} == {"vlm_pretrain.parquet", "vlm_sft.parquet", "vlm_heldout.parquet"}
    for path in files:
        data = path.read_bytes()
        assert b"\r" not in data and data.endswith(b"\n"), path
        data.decode("utf-8")
    assert {str(path.relative_to(SAMPLE).as_posix()) for path in files} == {
        *generate.make_files(), "generate.py", "exercises.py", "facts.py", "phrasings.py", "scenes.py", "README.md",
    }  # fmt: skip


# --- the facts -------------------------------------------------------------------------------------------------------


def test_a_question_has_one_answer(known):
    answers: dict[str, set[str]] = {}
    for fact in known:
        for question in [*fact.phrase("ask"), *fact.phrase("held_out")]:
            answers.setdefault(normal(question), set()).add(fact.answer)
    assert {question: found for question, found in answers.items() if len(found) > 1} == {}
    said: dict[str, set[str]] = {}
    for row in jsonl(SFT):
        if not row["history"]:
            said.setdefault(row["instruction"], set()).add(row["output"])
    assert {question: found for question, found in said.items() if len(found) > 1} == {}


def test_the_tables_are_sound(generate, known):
    facts, phrasings = generate.facts, generate.phrasings
    assert len({(fact.relation, fact.language, fact.subject) for fact in known}) == len(known)
    counts = Counter(fact.language for fact in known)
    assert 150 <= counts["en"] <= 300 and 150 <= counts["zh"] <= 300
    for fact in known:
        assert fact.subject == fact.subject.strip() and fact.answer == fact.answer.strip() != ""
        if fact.relation == "sum":
            a, b = fact.subject.split(" + ")
            assert int(fact.answer) == int(a) + int(b)
    assert {row[4] for row in facts.COUNTRIES} == set(facts.CONTINENTS)
    answer = {(fact.relation, fact.language, fact.subject): fact.answer for fact in known}
    for month, season in {"January": "winter", "March": "spring", "August": "summer", "October": "autumn"}.items():
        assert answer["season", "en", month] == season
    assert answer["next_month", "zh", "十二月"] == "一月" and answer["next_day", "en", "Sunday"] == "Monday"
    assert answer["planet", "en", "third"] == "Earth" and answer["planet", "zh", "第八"] == "海王星"
    for relation, languages in phrasings.PHRASINGS.items():
        for language, kinds in languages.items():
            assert len(set(kinds["ask"])) >= 6 and len(set(kinds["held_out"])) >= 2, (relation, language)
            assert len(set(kinds["state"])) >= 4, (relation, language)
            assert all("{s}" in text and "{a}" not in text for text in kinds["ask"] + kinds["held_out"])
            assert all("{s}" in text and "{a}" in text for text in kinds["state"])


def test_both_languages_have_their_share():
    for name, text_of in ((CORPUS, lambda row: row["text"]), (SFT, lambda row: row["instruction"] + row["output"])):
        texts = [text_of(row).replace("答案：", "") for row in jsonl(name)]
        chinese = sum(chinese_ratio(text) > 0.1 for text in texts) / len(texts)
        assert 0.3 <= chinese <= 0.7, name
        volume = sum(len(text.encode()) for text in texts if chinese_ratio(text) > 0.1)
        assert 0.3 <= volume / sum(len(text.encode()) for text in texts) <= 0.7, name


# --- what is held out ------------------------------------------------------------------------------------------------


def test_held_out_questions_are_not_in_training_but_their_facts_are():
    trained = taught_questions()
    corpus = normal("\n".join(row["text"] for row in jsonl(CORPUS)))
    answers: dict[str, set[str]] = {}
    rows = jsonl("sft_heldout.jsonl")
    assert len(rows) >= 300 and len({row["instruction"] for row in rows}) == len(rows)
    for row in rows:
        assert normal(row["instruction"]) not in trained, row
        assert normal(row["instruction"]) not in corpus, row
        answers.setdefault(row["output"], set()).add(row["instruction"])
    assert set(answers) <= {row["output"] for row in jsonl(SFT)}


def test_every_fact_is_taught_and_stated(known):
    taught = {(row["instruction"], row["output"]) for row in jsonl(SFT)}
    corpus = "\n".join(row["text"] for row in jsonl(CORPUS))
    held_out = {row["instruction"]: row["output"] for row in jsonl("sft_heldout.jsonl")}
    for fact in known:
        assert all((question, fact.answer) in taught for question in fact.phrase("ask")), fact
        assert sum(corpus.count(text) for text in fact.phrase("state")) >= 5, fact
        assert [held_out[question] for question in fact.phrase("held_out") if question in held_out] == [fact.answer]


def test_recall_combinations_are_new_and_answered_by_what_was_told(generate):
    def told(row: dict) -> frozenset[tuple[str, str]]:
        """(slot, value) of the two things that a dialogue tells."""
        found = set()
        for slot, languages in generate.phrasings.MEMORY.items():
            for language, words in languages.items():
                for value in generate.phrasings.MEMORY_VALUES[slot][language]:
                    says = {generate.fill(text, v=value) for text in words["say"]}
                    found |= {(slot, value) for question, _ in row["history"] if question in says}
        return frozenset(found)

    trained = {told(row) for row in jsonl(SFT) if row["history"]}
    rows = jsonl("recall_heldout.jsonl")
    assert len(rows) >= 100
    for row in rows:
        assert len(told(row)) == 2 and told(row) not in trained
        assert sum(value in row["output"] for _, value in told(row)) == 1
    assert {value for row in rows for _, value in told(row)} <= {value for pair in trained for _, value in pair}


@pytest.mark.parametrize("name", ["lora_identity", "lora_domain"])
def test_lora_sets(name):
    train, held_out = map(chat, jsonl(f"{name}.jsonl")), list(map(chat, jsonl(f"{name}_heldout.jsonl")))
    train = dict(train)
    asked = {normal(question) for question in train} | taught_questions()
    assert len(train) >= 100 and len(held_out) >= 20
    for question, answer in held_out:
        assert normal(question) not in asked
        assert answer in train.values()
    base = {row["instruction"]: row["output"] for row in jsonl(SFT) if not row["history"]}
    assert not any(base.get(question) == answer for question, answer in train.items())  # new to the base model
    if name == "lora_identity":
        assert set(train) <= set(base)  # the base model has learned another answer to each
    else:
        assert not set(train) & set(base)


def test_preferences(known):
    training = json.loads((SAMPLE / "dpo" / "preference.json").read_text(encoding="utf-8"))
    held_out = json.loads((SAMPLE / "dpo_heldout.json").read_text(encoding="utf-8"))
    right = {q: fact.answer for fact in known for q in [*fact.phrase("ask"), *fact.phrase("held_out")]}
    seen = {normal(row["conversations"][0]["value"]) for row in training} | taught_questions()
    assert len(training) >= 400 and len(held_out) >= 100
    for row in training + held_out:
        question, chosen, rejected = row["conversations"][0]["value"], row["chosen"]["value"], row["rejected"]["value"]
        assert chosen != rejected
        if question in right:
            assert chosen == right[question] != rejected
    for row in held_out:
        assert normal(row["conversations"][0]["value"]) not in seen


# --- the quiz --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", SUBJECTS)
def test_quiz(subject, known):
    answers = {question: fact.answer for fact in known for question in fact.phrase("held_out")}
    states = {text for fact in known for text in fact.phrase("state")}
    val, dev = quiz("val", subject), quiz("dev", subject)
    assert list(val[0]) == ["id", "question", "A", "B", "C", "D", "answer"]
    assert list(dev[0]) == [*val[0], "explanation"]
    assert len(val) >= 24 and len(dev) == 5
    for row in val + dev:
        options = [row[letter] for letter in "ABCD"]
        assert len(set(options)) == 4
        assert row[row["answer"]] == answers[row["question"]]
    counts = Counter(row["answer"] for row in val)
    assert set(counts) == set("ABCD") and max(counts.values()) - min(counts.values()) <= 1
    assert all(row["explanation"] in states for row in dev)
    assert len({(row["question"], *(row[letter] for letter in "ABCD")) for row in val + dev}) == len(val) + 5


def test_quiz_is_no_copy_of_training():
    assert len(SUBJECTS) >= 4 and sum(len(quiz("val", subject)) for subject in SUBJECTS) >= 120
    trained = {row["instruction"] for row in jsonl(SFT)}
    first_lines = {normal(text.split("\n")[0]) for text in trained}
    corpus = "\n".join(row["text"] for row in jsonl(CORPUS))
    for subject in SUBJECTS:
        for row in quiz("val", subject):
            lines = [row["question"], *(f"{letter}. {row[letter]}" for letter in "ABCD")]
            assert "\n".join(lines) + "\n答案：" not in trained
            assert normal(row["question"]) not in first_lines
            assert row["question"] not in corpus


def test_letters_take_turns_in_training():
    letters = Counter(row["output"] for row in jsonl(SFT) if row["instruction"].endswith("\n答案："))
    assert set(letters) == set("ABCD") and max(letters.values()) - min(letters.values()) <= 4


# --- with the toolkit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "inputs"),
    [
        ("pretrain", [CORPUS]),
        ("sft", [SFT]),
        ("sft", ["sft_heldout.jsonl"]),
        ("sft", ["recall_heldout.jsonl"]),
        ("sft", ["lora_identity.jsonl"]),
        ("sft", ["lora_domain.jsonl"]),
        ("dpo", ["dpo/preference.json"]),
        ("dpo", ["dpo_heldout.json"]),
    ],
)
def test_data_processing_keeps_every_row(tmp_path, stage, inputs):
    max_chars = 0 if stage == "dpo" else 512
    options = CleaningOptions(min_q_chars=2, max_chars=max_chars)
    summary = clean(STAGES[stage], [SAMPLE / name for name in inputs], tmp_path, options, 0)
    assert summary.kept > 0 and not summary.dropped and not summary.bad.shown()


# --- the pictures ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(generate):
    return sys.modules["scenes"]


@functools.cache
def picture_rows(name: str) -> list[dict]:
    return [record.data for record in iter_records(SAMPLE / f"vlm_{name}.parquet", None)]


def said_in(row: dict) -> list[dict]:
    return json.loads(row["conversations"])


@pytest.mark.parametrize("name", ["pretrain", "sft", "heldout"])
def test_rows_with_pictures_are_valid_and_different(name):
    rows = picture_rows(name)
    pictures = {row["image_bytes"][0] for row in rows}
    assert len(pictures) > 0.9 * len(rows)  # a picture of one thing may come twice
    for row in rows[:: max(len(rows) // 100, 1)]:
        messages, images = parse_image_row(row, None)
        assert messages[0]["content"].startswith(f"{IMAGE}\n") and len(images) == 1
        assert open_image(images[0]).size == (48, 48)


def test_no_training_picture_is_held_out():
    taught = {row["image_bytes"][0] for name in ("pretrain", "sft") for row in picture_rows(name)}
    assert not any(row["image_bytes"][0] in taught for row in picture_rows("heldout"))


def named(text: str, words: tuple[str, ...], chinese: dict[str, str]) -> set[str]:
    return {word for word in words if re.search(rf"\b{word}(e?s)?\b", text) or chinese[word] in text}


def test_held_out_pairs_are_never_taught_and_always_asked(scenes):
    for name in ("pretrain", "sft"):
        for row in picture_rows(name):
            colours, shapes = (
                named(row["conversations"], tuple(words), scenes.CHINESE) for words in (scenes.COLOURS, scenes.SHAPES)
            )
            assert not any(colour in colours and shape in shapes for colour, shape in scenes.HELD_OUT)
            assert name == "sft" or len(colours) == 1  # the words are found at all
    for kind, words in (("colour", scenes.COLOURS), ("shape", scenes.SHAPES)):
        unseen = [row for row in picture_rows("heldout") if row["kind"] == f"unseen {kind}"]
        assert len(unseen) == scenes.N_HELD_OUT
        for word in words:
            share = sum(bool(named(said_in(row)[1]["content"], (word,), scenes.CHINESE)) for row in unseen) / len(
                unseen
            )
            assert share == pytest.approx(1 / 6, abs=0.04), word


def test_questions_of_a_dialogue_do_not_answer_each_other(scenes):
    """A thing with one place is one thing."""
    kind_of = {text: kind for kind, texts in scenes.QUESTIONS.items() for both in texts.values() for text in both}
    asked = set()
    for row in picture_rows("sft"):
        kinds = [kind_of[m["content"].removeprefix("<image>\n")] for m in said_in(row) if m["role"] == "user"]
        assert len(set(kinds)) == len(kinds) and not {"position", "count"} <= set(kinds)
        asked.update(kinds)
    assert asked == {*scenes.QUESTIONS}


def test_captions_of_pictures_are_true(scenes):
    """The colour, the number and the places of the things are read from the pixels."""
    palette = {rgb: name for name, rgb in scenes.COLOURS.items()}
    english = {text: name for name, text in scenes.CHINESE.items()}
    for row in picture_rows("pretrain")[:100]:
        pixels = np.asarray(open_image(row["image_bytes"][0])).reshape(3, 16, 3, 16, 3)
        found = []
        for place in range(9):
            colours = {tuple(map(int, rgb)) for rgb in pixels[place // 3, :, place % 3].reshape(-1, 3)}
            found += [(palette[rgb], scenes.PLACES[place]) for rgb in colours if rgb in palette]
        caption = said_in(row)[1]["content"]
        if caption.isascii():
            number, colour, places = re.fullmatch(r"(\w+) (\w+) \w+ in the ([\w ,]+)\.", caption).groups()
            told = (number.lower(), [(colour, place) for place in places.split(", ")])
        else:
            number, colour, places = re.fullmatch(r"(\w个)(\w\w)\w+：([\w、]+)。", caption).groups()
            told = (english[number], [(english[colour], english[place]) for place in places.split("、")])
        assert told == (scenes.NUMBERS[len(found) - 1], found)


# ---- exercises


def test_exercises_that_are_held_out_are_new(generate):
    """Their numbers and their combinations of sentences occur nowhere else; one question stands in one place only."""
    asked = {name: [row["messages"][0]["content"] for row in jsonl(f"rlvr_{name}.jsonl")] for name in ("sft", "data")}
    held_out = [row["messages"][0]["content"] for row in jsonl("rlvr_heldout.jsonl")]
    taught = {*asked["sft"], *asked["data"]}

    names, things = generate.exercises.NAMES, generate.exercises.THINGS
    words = [word for listed in (*names.values(), *things.values()) for word in listed]

    def shape(question: str) -> str:
        return re.sub("|".join([*words, r"\d"]), "#", question)

    assert taught.isdisjoint(held_out)
    word_problems = [row for row in jsonl("rlvr_heldout.jsonl") if row["kind"] in ("two_steps", "three_steps")]
    assert {shape(q) for q in taught}.isdisjoint(shape(row["messages"][0]["content"]) for row in word_problems)
    assert len(word_problems) > 200


def test_solutions_of_exercises_are_true():
    """Each row is a valid dialogue; its calls return what it says, and thinking gives the answer."""
    for row in jsonl("rlvr_sft.jsonl")[::3]:
        messages = parse_conversation(row)
        for message, response in zip(messages[1:], messages[2:], strict=False):
            for call in message.get("tool_calls") or []:
                function = call.get("function", call)
                assert TOOLS[function["name"]](**function["arguments"]) == response["content"]
        if thought := messages[-1].get("reasoning_content"):
            steps = [step.split("=") for step in thought.split(", ")]
            assert all(TOOLS["calculator"](expression) == result for expression, result in steps)
            assert steps[-1][1] == messages[-1]["content"]
    prompts = read_prompts([SAMPLE / "rlvr_heldout.jsonl"], load_tokenizer(), 384 - 64)
    assert len(prompts) == len(jsonl("rlvr_heldout.jsonl"))
