"""serving/web/page.py and serving/web/texts.py: text that stays text, and texts in every language."""

from __future__ import annotations

import re
import string
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.options import SamplingParams
from serving.chat_model import LENGTH, STOPPED, Exchange
from serving.web.inside import runs
from serving.web.inside.menu import PAGES
from serving.web.page import (
    answer_facts,
    blocks,
    facts_html,
    left_out_note,
    literal,
    shown_answer,
    size_text,
    steps_html,
    text_html,
    title_html,
)
from serving.web.texts import LANGUAGES, TEXTS, Texts, language_of
from serving.web.widgets import STAGES

ROOT = Path(__file__).resolve().parents[1]


class Reader(HTMLParser):
    """What a browser would make of some HTML: its elements, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags, self.shown, self.attributes = [], "", []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data) -> None:
        self.shown += data


@given(
    st.text(alphabet=st.sampled_from(list("<>&\"'`! /=abpreimgscript\n")) | st.characters(exclude_categories=["Cs"]))
)
def test_any_text_is_shown_and_does_nothing(text):
    read = Reader(text_html(text))
    assert set(read.tags) <= {"div", "span", "pre", "code"}
    if "```" not in text:
        assert read.shown == text
    read = Reader(facts_html(text, text))
    assert set(read.tags) == {"div", "br"} and read.shown == text * 2


SAFE_TAGS = "div span pre code p br em strong s a ul ol li blockquote hr table thead tbody tr th td h3 h4 h5 h6".split()


@given(
    st.lists(
        st.sampled_from(
            [
                "<img src=x onerror=alert(1)>",
                "![x](http://a.b/c.png)",
                "[x](javascript:alert(1))",
                "[y]: data:text/html,x\n",
            ]
            + ["<script>", "<a href='x' onclick='y'>", '[x](http://a.b "t")', "<http://a.b>", "![x][y]", "\n\n", "\n"]
            + ["# ", "* ", "> ", "    ", "```", "`", "|a|b|\n|-|-|\n", "**", "~~", "text", "&lt;", "---", "1. ", "\\"]
        )
    ).map("".join)
)
def test_markdown_does_nothing(text):
    read = Reader(text_html(text, markdown=True))
    assert set(read.tags) <= set(SAFE_TAGS)
    assert {name for name, _ in read.attributes} <= {"class", "dir", "href", "title", "target", "start", "style"}
    assert all(value.startswith(("http", "%", "mm-", "x")) for name, value in read.attributes if name == "href")


def test_markdown_is_rendered():
    text = "# Head\none\n**two** <b>\n\n- [x](http://a.b) ![image](http://a.b/c.png)\n\n|a|\n|-|\n|b|\n\n"
    text += "```python\nif a < b:\n```"
    read = Reader(text_html(text, markdown=True, writing=True))
    assert " ".join(read.tags) == (
        "div div h3 p br strong ul li a a table thead tr th tbody tr td pre code span"  # an image is a link
    )
    assert "<b>" in read.shown and "if a < b:" in read.shown and ("target", "_blank") in read.attributes


def test_headings_for_screen_readers():
    read = Reader(title_html("MiniMind", "chat") + text_html("x", label="<Question>"))
    assert read.tags == ["h1", "span", "h2", "div"] and "<Question>x" in read.shown


def test_tags_are_seen():
    text = "<script>alert(1)</script> <img src=x onerror=alert(1)> ![x](http://a.b/c.png) **bold** &lt;"
    read = Reader(text_html(text, beginning="<b>"))
    assert read.tags == ["div", "span"] and read.shown == "<b>" + text


def test_code_is_set_off():
    text = "before\n```python\nif a < b:\n    ```x\n    pass\n```\n\nafter\n```\nopen"
    assert blocks(text) == [
        (None, "before"),
        ("python", "if a < b:\n    ```x\n    pass"),
        (None, "\nafter"),
        ("", "open"),
    ]
    read = Reader(text_html(text))
    assert read.tags == ["div", "pre", "span", "code", "pre", "code"]
    assert "if a < b:\n    ```x\n    pass" in read.shown
    assert blocks("") == [] and blocks("a `b` ```c``` d") == [(None, "a `b` ```c``` d")]


def test_a_cursor_while_it_writes():
    assert Reader(text_html("a", writing=True)).tags == ["div", "span"]
    assert "mm-cursor" in text_html("", writing=True) and "mm-cursor" not in text_html("")


def test_literal():
    assert literal("![x](http://a) :red[b] $c$ <d>") == (
        r"\!\[x\]\(http\:\/\/a\) \:red\[b\] \$c\$ \<d\>"
    )  # fmt: skip
    assert literal("模型 7") == "模型 7"


def test_sizes():
    assert (size_text(0), size_text(11_421_745), size_text(2_345_000_000)) == ("0.0 MB", "11.4 MB", "2.35 GB")


def made(finish: str | None = None, model: str = "tiny.pth", text: str = "x", tokens: int = 9, **prompt) -> Exchange:
    sampling = SamplingParams(max_new_tokens=9)
    return Exchange("?", model, False, sampling, 64, text=text, tokens=tokens, seconds=3.0, finish=finish, **prompt)


def test_facts_under_an_answer():
    facts = answer_facts(made(LENGTH, prompt_tokens=3), Texts("en"))
    assert facts == "9 tokens, prompt 3 · 3.0 tokens/s · cut off at the maximum length of 9 tokens · tiny.pth"
    assert "stopped" in answer_facts(made(STOPPED), Texts("en"))
    assert "interrupted" in answer_facts(made(), Texts("en"))  # the page was closed while it was being written
    running = made()
    running.begin(iter(()), None)
    assert answer_facts(running, Texts("en")) == "9 tokens, prompt 0 · 3.0 tokens/s · tiny.pth"


def test_an_answer_without_text_says_so():
    texts = Texts("en")
    assert shown_answer(made(STOPPED, text="", tokens=0), texts) == "(ended before the first token)"
    assert shown_answer(made(text="", tokens=0), texts) == "(ended before the first token)"
    assert shown_answer(made(LENGTH, text=""), texts) == "(no text)"
    assert shown_answer(made(LENGTH, text="a\x1b"), texts) == "a␛"
    running = made(text="", tokens=0)
    running.begin(iter(()), None)
    assert shown_answer(running, texts) == ""


def test_thoughts_and_calls_are_folded():
    call = {"name": "f<b>", "arguments": {"x": "<i>"}}
    exchange = made(LENGTH, text="<think>final <b>\n\nthoughts</think>yes")
    exchange.called = [
        {"role": "assistant", "content": "So", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "first <u>" + "\nmore" * 50},
    ]
    read = Reader(steps_html(exchange, Texts("en")))
    assert read.tags == ["details", "summary", "div", "div", "details", "summary", "div", "details", "summary", "div",
                         "details", "summary", "div"]  # fmt: skip
    for text in (
        "Thoughts: hm",
        "So",
        'Calls f<b>: {"x": "<i>"}',
        "Returned: first <u> more",
        "Thoughts: final <b> thoughts",
    ):
        assert text in read.shown
    assert "yes" not in read.shown and shown_answer(exchange, Texts("en")) == "yes"
    assert exchange.called[1]["content"] in read.shown  # whole, when it is opened
    running = made(text="<think>hm</think>yes<tool_c")
    running.begin(iter(()), None)
    assert shown_answer(running, Texts("en")) == "yes<tool_c"
    running.tools = [{"name": "calculator"}]
    assert shown_answer(running, Texts("en")) == "yes"  # what may become a call is not shown yet


@pytest.mark.parametrize("language", LANGUAGES)
def test_notes_on_what_was_left_out(language):
    texts = Texts(language)
    assert left_out_note(made(turns_seen=2), texts) == ""
    note = left_out_note(made(turns_seen=2, turns_left_out=3), texts)
    assert "3" in note and "5" in note and "64" in note
    assert "17" in left_out_note(made(tokens_left_out=17), texts)


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_every_text(language):
    assert set(TEXTS) == set(LANGUAGES)
    assert list(TEXTS[language]) == list(TEXTS["en"])
    for key, text in TEXTS[language].items():
        assert text.strip() == text and text, key
        assert fields(text) == fields(TEXTS["en"][key]), key
        assert text.count("|") == TEXTS["en"][key].count("|"), key
    if language != "en":
        same = {key for key, text in TEXTS[language].items() if text == TEXTS["en"][key]}
        assert same <= {"top_p", "top_k", "example_chat", "example_base"}


def test_every_text_is_used_and_every_used_one_exists():
    files = [*ROOT.glob("serving/web/*.py"), *ROOT.glob("serving/web/inside/*.py"), ROOT / "fast_inference.py"]
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    built = {f"stage_{stage}" for stage in STAGES} | {"export_md", "export_jsonl"}
    built |= {
        f"{what}_{kind}{more}" for what in ("hello", "example") for kind in ("chat", "base") for more in ("", "_more")
    }
    built |= {f"{name}_{what}" for name in PAGES for what in ("page", "about")}
    built |= {f"over_{name}" for name in runs.OVER}
    used = set(re.findall(r"['\"](\w+)['\"]", code)) | built
    assert {key for key in TEXTS["en"] if key.removesuffix("_help") not in used} == set()
    assert set(re.findall(r"\btexts\(['\"](\w+)['\"]", code)) <= set(TEXTS["en"])


def test_language_of_the_browser():
    tags = ("zh-CN", "zh_TW", "JA", "en-GB", "fr", "", None)
    assert [language_of(tag) for tag in tags] == ["zh", "zh", "ja", "en", "en", "en", "en"]
