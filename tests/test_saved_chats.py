"""serving/saved_chats.py: chats that come back as they were, and damaged files that harm no others."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.errors import UserError
from data_pipeline.records import parse_conversation
from inference.options import SamplingParams
from serving.chat_model import ENDED, Conversation, Exchange
from serving.saved_chats import ChatFolder, title_of, to_jsonl, to_markdown

SAMPLING = SamplingParams(max_new_tokens=9, temperature=0.7, seed=5, stop=("x",))


def chat(*pairs: tuple[str, str], **settings) -> Conversation:
    exchanges = [
        Exchange(
            question, "tiny.pth", False, SAMPLING, 64, prompt_tokens=3, text=text, tokens=9, seconds=0.1, finish=ENDED
        )
        for question, text in pairs
    ]
    return Conversation(exchanges, **settings)


@pytest.fixture
def folder(tmp_path) -> ChatFolder:
    return ChatFolder(tmp_path / "out" / "chats")


def test_a_chat_comes_back_as_it_was(folder):
    assert folder.titles() == ({}, [])
    saved = chat(("你好 <b>\n</s>", "```\n\x1b é"), ("second", ""), system="be kind", title="My ../title")
    folder.save(saved)
    (path,) = folder.folder.iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{8}\.json", path.name)  # generated, whatever the title
    loaded = folder.load(saved.id)
    assert loaded == saved and loaded.exchanges[0].sampling == SAMPLING
    assert folder.titles() == ({saved.id: "My ../title"}, [])
    assert {"id", "stamp"}.isdisjoint(json.loads(path.read_text(encoding="utf-8")))
    folder.delete(saved.id)
    folder.delete(saved.id)  # another page was faster
    assert folder.titles() == ({}, [])


def test_titles_and_order(folder):
    chats = [chat(("first\n question", "a")), chat(("second", "b")), chat(("second", "c"))]
    for i, one in enumerate(chats):
        folder.save(one)
        os.utime(folder.path(one.id), (1e9 + i, 1e9 + i))
    titles = folder.titles()[0]
    assert list(titles) == [one.id for one in reversed(chats)]
    assert list(titles.values()) == ["second", "second (2)", "first question"]
    assert title_of(chat(("x" * 90, "a"))) == "x" * 49 + "…" and title_of(Conversation()) == "…"
    renamed = folder.load(chats[0].id)
    renamed.title = "renamed\x07"
    folder.save(renamed)
    assert next(iter(folder.titles()[0].values())) == "renamed␇"
    for title, shown in (("second (2)", "second (2)"), (" \t", "first question")):  # a title that another chat got
        renamed.title = title
        folder.save(renamed)
        titles = list(folder.titles()[0].values())
        assert titles[0] == shown and len(set(titles)) == 3


def damage(path: Path, kind: str) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:50])
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind == "not UTF-8":
        path.write_bytes(b'{"exchanges": [], "title": "\xff"}')
    elif kind == "of another kind":
        path.write_text("[1]", encoding="utf-8")
    elif kind == "nested":
        path.write_text("[" * 100_000, encoding="utf-8")
    else:
        content["exchanges"][0] |= {"wrong type": {"tokens": "many"}, "wrong number": {"sampling": {"top_p": 7}}}[kind]
        path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    "kind", ["cut off", "a folder", "not UTF-8", "of another kind", "nested", "wrong type", "wrong number"]
)
def test_a_damaged_file_is_named_and_harms_no_other(folder, kind):
    good, bad = chat(("good", "a")), chat(("bad", "b"))
    folder.save(good)
    folder.save(bad)
    folder.titles()
    path = folder.path(bad.id)
    damage(path, kind)
    titles, damaged = folder.titles()
    assert titles == {good.id: "good"} and len(damaged) == 1 and str(path) in damaged[0]
    with pytest.raises(UserError, match=re.escape(str(path))):
        folder.load(bad.id)
    assert path.exists()  # for the user to repair
    with pytest.raises(UserError, match="cannot be read"):
        folder.load("none")


def test_two_pages_do_not_overwrite_each_other(folder):
    first = chat(("one", "a"))
    folder.save(first)
    second = folder.load(first.id)
    second.exchanges += chat(("two", "b")).exchanges
    folder.save(second)
    assert second.id == first.id and folder.changed(first) and not folder.changed(second)
    first.exchanges += chat(("three", "c")).exchanges
    folder.save(first)  # its file is another one by now
    assert first.id != second.id and len(folder.titles()[0]) == 2
    assert folder.load(second.id).exchanges[1].question == "two"
    assert folder.load(first.id).exchanges[1].question == "three"


def test_saving_twice_at_the_same_time_makes_no_copy(folder):
    saved = chat(("one", "a"))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: folder.save(saved), range(40)))
    assert list(folder.titles()[0]) == [saved.id]


def test_exports():
    said = chat(("q\n1", "a1"), ("q2", ""), ("q3", "a3"), system="be kind")
    said.exchanges[1].error = "too long"
    said.exchanges.append(dataclasses.replace(said.exchanges[0], question="Once", continues=True, text=" upon"))
    assert to_markdown(said, "User") == (
        "# q 1\n\n## User\n\nq\n1\n\n## tiny.pth\n\na1\n\n## User\n\nq2\n\n## tiny.pth\n\ntoo long\n\n"
        "## User\n\nq3\n\n## tiny.pth\n\na3\n\n## tiny.pth\n\nOnce upon\n"
    )
    line = to_jsonl(said)
    assert line.count("\n") == 1
    roles = [(message["role"], message["content"]) for message in parse_conversation(json.loads(line))]
    assert roles == [
        ("system", "be kind"), ("user", "q\n1"), ("assistant", "a1"), ("user", "q3"), ("assistant", "a3")
    ]  # fmt: skip
    assert to_jsonl(chat(("q", ""))) == ""
