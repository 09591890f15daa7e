"""Near duplicates and exam questions: what counts as one, and what data_process.py does with it."""

from __future__ import annotations

import csv
import json
import random

import pytest

from data_pipeline.near_duplicates import BANDS, band_keys, contained_question, ngrams

QUESTION = "在下列选项中，哪一个城市是欧洲国家法国的首都？"


def article(seed: int, n: int = 200) -> list[str]:
    rng = random.Random(seed)
    return [chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(n)]


def share_a_band(a: str, b: str) -> bool:
    return not {*band_keys(a)}.isdisjoint(band_keys(b))


def test_ngrams_are_of_characters_or_words_without_punctuation():
    assert ngrams("Hello, WORLD！ 春眠 foo_bar", 3) == ["hello world 春", "world 春 眠", "春 眠 foo", "眠 foo bar"]
    assert ngrams("春 ２", 5) == ["春 2"] and ngrams(" …！", 5) == []


def test_a_changed_copy_shares_a_band_and_another_text_does_not():
    """Of 50 texts each: with J about 0.95, 0.82 and 0. The first is found with a probability of 1 - 1e-6."""
    found = {1: 0, 4: 0, 200: 0}
    for seed in range(50):
        text = article(seed)
        for changed in found:
            copy = list(text)
            for at in range(0, len(copy), len(copy) // changed):
                copy[at] = "变"
            found[changed] += share_a_band("".join(text), "".join(copy))
    assert found[1] == 50 and found[4] > 35 and found[200] == 0
    assert share_a_band("Der Text, ist gleich.", "der text ist GLEICH!")
    assert len({*band_keys("春眠")}) == BANDS and band_keys("……") == []


def test_a_question_is_found_in_other_punctuation_and_not_by_its_beginning():
    questions = (
        "短的问题？",
        QUESTION,
        "What is the name of the largest city that stands on the river Seine in France?",
    )
    text = "".join(article(0))
    assert contained_question(f"{text}{QUESTION.replace('，', ' ')}A. 巴黎{text}", questions) == QUESTION
    assert contained_question(questions[2].upper().replace("THE", "the\n"), questions) == questions[2]
    for other in (text, "短的问题？", QUESTION[:14] + text, ""):
        assert contained_question(other, questions) is None


@pytest.mark.parametrize("workers", [0, 2])
def test_data_process_drops_both_and_lists_the_questions(run_here, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("data_pipeline.cleaning.BYTES_PER_WORKER", 100)
    exam = tmp_path / "exam" / "val"
    exam.mkdir(parents=True)
    with (exam / "geography_val.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(["id question A B C D answer".split(), [0, QUESTION, *"abcd", "A"]])
    one, two = "".join(article(1)), "".join(article(2))
    texts = [one, two, one[:100] + "，" + one[100:-1], f"{QUESTION} 巴黎。", two, "。。。", "！！！"]
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    flags = ["--input", raw, "--out_dir", tmp_path / "out", "--num_workers", workers]
    result = run_here("data_process.py", "pretrain", *flags, "--near_dedupe", "--contamination", tmp_path / "exam")
    assert result.returncode == 0, result.stderr
    kept = (tmp_path / "out" / "pretrain_data.csv").read_text(encoding="utf-8").splitlines()
    assert kept == ["text", *(f'"{text}"' for text in (one, two, "。。。", "！！！"))]
    for line in ("dropped: near duplicate", "dropped: duplicate", "dropped: contains a question of the exam"):
        assert f"{line} " in result.stdout
    (rejected,) = (tmp_path / "out" / "pretrain_data.rejects.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(rejected)["line"] == 4 and QUESTION in rejected
    assert not list((tmp_path / "out").glob(".seen*"))

    # In the JSON of preference pairs a line break is written as two characters.
    lines = "\n".join([QUESTION[:6], QUESTION[6:12], QUESTION[12:]])
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([{"prompt": text, "chosen": "a", "rejected": "b"} for text in (lines, "why?")]))
    flags = ["--input", pairs, "--out_dir", tmp_path / "out", "--num_workers", workers]
    result = run_here("data_process.py", "dpo", *flags, "--contamination", tmp_path / "exam")
    assert result.returncode == 0 and "dropped: contains a question of the exam" in result.stdout, result.stderr
    assert [row["conversations"] for row in json.loads((tmp_path / "out" / "dpo" / "train_data.json").read_text())] == [
        [{"from": "human", "value": "why?"}]
    ]

    flags = ["--input", raw, "--out_dir", tmp_path / "out", "--num_workers", workers]
    result = run_here("data_process.py", "pretrain", *flags)
    assert len((tmp_path / "out" / "pretrain_data.csv").read_text(encoding="utf-8").splitlines()) == 7
    result = run_here("data_process.py", "pretrain", *flags, "--contamination", tmp_path / "nothing")
    assert result.returncode == 1 and "there is no folder" in result.stderr
