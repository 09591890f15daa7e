"""Check the verifiers by examples, and how they are combined."""

import json

import pytest

from common.errors import UserError
from evaluation.verifiers import VERIFIERS, parse_verifier

SCHEMA = json.dumps({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]})


@pytest.mark.parametrize(
    ("name", "answer", "reference", "reward"),
    [
        ("exact", " Paris\n", "paris", 1), ("exact", "Paris is it", "paris", 0), ("exact", "a  b", "a b", 1),
        ("number", "3 + 4 = 7", "7.0", 1), ("number", "1,024 apples", "1024", 1), ("number", "seven", "7", 0),
        ("number", "5-3", "3", 1), ("number", "it is -3.", "-3", 1), ("number", "共 １２ 个", "12", 1),
        ("number", "1,2", "2", 1), ("number", "So it is...12", "12", 1), ("number", "答案是……12。", "12", 1),
        ("number", "about .5", "0.5", 1), ("number", "-.5", "-0.5", 1),
        ("number", "m2.5", "5", 0), ("number", "1.2.3", "3", 0),
        ("number", "12 of 30", "12", 0), ("number", "0.3333333", "0.33333333", 1), ("number", "", "0", 0),
        ("number", "-0", "0", 1), ("number", "9" * 500, "1", 0),
        ("choice", "B", "B", 1), ("choice", "The answer is (B), not C.", "B", 1), ("choice", "A dog: C", "C", 1),
        ("choice", "答案为B。因为A是错的", "B", 1), ("choice", "选择B，不选A", "B", 1), ("choice", "答案应为B，A错", "B", 1),
        ("choice", "应选择B，因为A不对", "B", 1), ("choice", "选B，不应该选A", "B", 1), ("choice", "选B，不可以选A", "B", 1),
        ("choice", "Choose B. Not choose A", "B", 1), ("choice", "I choose B, and would not choose A", "B", 1),
        ("choice", "答案是 D。", "D", 1), ("choice", "Because", "B", 0), ("choice", "", "A", 0),
        ("regex", "the year 1984", r"\b\d{4}\b", 1), ("regex", "the year", r"\d", 0),
        ("json_schema", '{"x": 1}', SCHEMA, 1), ("json_schema", '```json\n{"x": 1}\n```', SCHEMA, 1),
        ("json_schema", '{"x": "1"}', SCHEMA, 0), ("json_schema", "x = 1", SCHEMA, 0),
        ("json_schema", "[" * 9999, SCHEMA, 0),
        ("length", "12345", "5", 1), ("length", "1234567890", "5", 0), ("length", "123456", "4", 0.5),
        ("format", "<think>a</think>7", "", 1), ("format", "7", "", 1), ("format", "<think>7", "", 0),
        ("format", "<think>a</think>", "", 0), ("format", '7<tool_call>{"name": </tool_call>', "", 0),
        ("thinks", "<think>a</think>7", "", 1), ("thinks", "<think></think>7", "", 0), ("thinks", "7", "", 0),
    ],
)  # fmt: skip
def test_rewards(name, answer, reference, reward):
    assert VERIFIERS[name](answer, reference) == reward


def test_weights_arguments_and_thinking():
    verifier = parse_verifier("number:1, format:0.2, length=4:0.5")
    assert verifier("12", "12") == (pytest.approx(1.7), True, ())
    assert verifier("13", "12") == (pytest.approx(0.7), False, ())
    # Only what the user reads is compared; a call is not a part of it, and thinking that does not end is no answer.
    assert verifier("<think>13</think>12", "12").correct
    assert not verifier("<think>12</think>13", "12").correct
    assert verifier("<think>it is 12", "12") == (pytest.approx(0.5), False, ())
    assert not parse_verifier("number")('<tool_call>{"name": "f", "arguments": {"x": 12}}</tool_call>', "12").correct


def test_an_endless_regular_expression_is_stopped():
    value, correct, errors = parse_verifier("regex")("a" * 40, "(a|aa)+b")
    assert (value, correct) == (0, False) and errors == ("regex: TimeoutError: regex timed out",)


def test_functions_of_the_user(tmp_path, monkeypatch):
    source = (
        "def half(answer, reference): return 0.5 if reference in answer else 0\n"
        "def broken(answer, reference): raise KeyError('no ' + answer)\n"
        "def endless(answer, reference): return float('inf')\n"
    )
    (tmp_path / "my_own_rewards.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    parse = lambda spec: parse_verifier(spec, allow_functions=True)  # noqa: E731
    assert parse("exact:1,my_own_rewards:half:0.5")("b", "b") == (1.25, True, ())
    assert parse("my_own_rewards:half")("abc", "b") == (0.5, False, ())
    value, correct, errors = parse("exact,my_own_rewards:broken")("b", "b")
    assert (value, correct) == (0, False) and errors == ("my_own_rewards:broken: KeyError: 'no b'",)
    assert "returned inf" in parse("my_own_rewards:endless")("b", "b").errors[0]
    with pytest.raises(UserError, match="functions of your own only with --verifier"):
        parse_verifier("my_own_rewards:half")  # a data file must not choose which code runs


@pytest.mark.parametrize(
    ("spec", "message"),
    [("numbers", "verifier 'numbers' is unknown; verifiers: exact, number"), ("", "'' is unknown"),
     ("number:nan", "must be a finite number"), ("number:x", "'number:x' is unknown"), ("number,,format", "'' is unknown")],
)  # fmt: skip
def test_a_wrong_spec_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        parse_verifier(spec)


@pytest.mark.parametrize(
    ("spec", "reference"),
    [("number", "seven"), ("choice", "AB"), ("regex", "("), ("json_schema", "{"), ("json_schema", '{"type": "no"}'),
     ("length", "0"), ("exact,length", "x")],
)  # fmt: skip
def test_a_reference_that_cannot_be_used_is_refused(spec, reference):
    with pytest.raises(UserError, match="cannot use this answer"):
        parse_verifier(spec).check(reference)
    parse_verifier("exact,length=5").check(reference)
