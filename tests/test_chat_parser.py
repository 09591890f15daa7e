"""model/chat_parser.py: what was rendered is found again, whole and in pieces; whatever else a model writes is text."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.chat_format import message_text
from model.chat_parser import AnswerParser, ParsedAnswer, parse_answer

PIECES = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_", "</", "<", "\n", " ", "a", '"', "\\", "{", "}",
    '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {"x": "</tool_call>"}}',
)  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
plain = texts.filter(lambda text: "<t" not in text and "</t" not in text)  # no tags
values = st.none() | st.booleans() | st.integers() | texts | st.lists(texts, max_size=2)
calls = st.fixed_dictionaries({"name": texts.filter(bool), "arguments": st.dictionaries(texts, values, max_size=2)})
CALL = {"name": "f", "arguments": {}}
CALL_TEXT = f"<tool_call>{json.dumps(CALL)}</tool_call>"


def streamed(pieces) -> ParsedAnswer:
    parser, thinking, content, found = AnswerParser(), None, "", []
    for field, new in [*(part for piece in pieces for part in parser.add(piece)), *parser.finish()]:
        if field == "reasoning_content":
            thinking = (thinking or "") + new
        elif field == "content":
            content += new
        else:
            found.append(new)
    return ParsedAnswer(thinking, content, found)


@settings(max_examples=60, deadline=None)
@given(st.none() | plain, plain, st.lists(calls, max_size=3))
@example(None, "\n", [CALL, CALL])
def test_a_rendered_answer_is_found_again(thinking, content, tool_calls):
    message = {"role": "assistant", "content": content, "reasoning_content": thinking, "tool_calls": tool_calls}
    answer = parse_answer(message_text(message))
    assert answer == (thinking, content, tool_calls) and not answer.malformed
    assert message_text(answer.message()) == message_text(message)


@settings(max_examples=150, deadline=None)
@given(st.lists(texts, max_size=5))
def test_pieces_and_characters_give_the_same_as_the_whole(pieces):
    text = "".join(pieces)
    whole = parse_answer(text)
    assert streamed(pieces) == streamed(text) == whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>cut", ("cut", "", [])),
        ("<think></think>yes", ("", "yes", [])),
        ("\n<think>\nhm</think>\nyes", ("\nhm", "\nyes", [])),
        ("no <think>hm</think>", (None, "no <think>hm</think>", [])),
        ("<think>" + CALL_TEXT, (CALL_TEXT, "", [])),
        (f"so\n{CALL_TEXT}\n{CALL_TEXT}\n", (None, "so\n", [CALL, CALL])),
        (f"{CALL_TEXT} and", (None, " and", [CALL])),
        ("<tool_call>{cut", (None, "<tool_call>{cut", [])),
        (f"<tool_call>{{{CALL_TEXT}", (None, "<tool_call>{", [CALL])),
        (f'<tool_call>{{"</tool_call>{CALL_TEXT}', (None, '<tool_call>{"</tool_call>', [CALL])),
    ],
)
def test_examples(text, expected):
    assert parse_answer(text) == streamed(text) == expected
    assert parse_answer(text).malformed == ("tool_call>" in expected[1])


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "f", "arguments": {"x": 1e999}}',
        "", "[]", '"f"', '{"name": "f"}', '{"name": "", "arguments": {}}', '{"name": 1, "arguments": {}}',
        '{"name": "f", "arguments": "{}"}', '{"name": "f", "arguments": {"x": NaN}}', "[" * 100_000, "9" * 10_000,
        '{"name": "f", "arguments": {"x": "\\ud800"}}', '{"name": "f", "arguments": {}} {}',
    ],
)  # fmt: skip
def test_malformed_calls_are_text(body):
    text = f"see<tool_call>{body}</tool_call>"
    answer = parse_answer(text)
    assert answer == (None, text, []) and answer.malformed


def test_an_answer_may_begin_inside_its_thoughts():
    parser = AnswerParser(thinking=True)
    assert [*parser.add("hm</think>yes"), *parser.finish()] == [("reasoning_content", "hm"), ("content", "yes")]
