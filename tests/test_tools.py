"""Check the tools by examples: whatever the model writes, the response is text."""

import threading

import pytest

from common.errors import UserError
from evaluation.tools import TOOLS, call_tool, find_tools, tool_schema


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("3 * (4 + 5)", "27"), ("7 / 2", "3.5"), ("0.1 + 0.2", "0.3"), ("-2 ** 2", "-4"), ("6 × 7 ÷ 2", "21"),
        ("17 // 5 + 17 % 5", "5"), ("2 ** 10", "1024"), ("1 / 0", "error: division by zero"),
        ("open('x')", "error: use numbers, + - * / // % ** and brackets"), ("True + 1", "error: use numbers"),
        ("9 ** 9 ** 9", "error: the exponent is larger than 64"), ("99999999 ** 64", "error: a number is not real or"),
        ("(-8) ** 0.5", "error: a number is not real or"), ("1e999", "error: a number"), ("3 +", "error: "),
        ("(" * 100, "error: "), ("1+" * 500 + "1", "error: the expression is longer"), ("", "error: "), ("\0", "error: "),
        ("-" * 199 + "1", "-1"),
    ],
)  # fmt: skip
def test_calculator(expression, result):
    found = call_tool({"name": "calculator", "arguments": {"expression": expression}})
    assert found == result or (result.startswith("error: ") and found.startswith(result))


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("calendar", {"date": "2024-02-25", "days": 10}, "2024-03-06 Wednesday"),
        ("calendar", {"date": "2023-12-31"}, "2023-12-31 Sunday"),
        ("calendar", {"date": "2024-01-01", "until": "2025-01-01"}, "366"),
        ("calendar", {"date": "2024-02-30"}, "error: "),
        ("calendar", {"date": "2024-02-01", "days": 10**12}, "error: "),
        ("unit_converter", {"value": 2.5, "from_unit": "km", "to_unit": "m"}, "2500 m"),
        ("unit_converter", {"value": 3, "from_unit": "ft", "to_unit": "in"}, "36 in"),
        ("unit_converter", {"value": 100, "from_unit": "C", "to_unit": "F"}, "212 F"),
        ("unit_converter", {"value": 1, "from_unit": "kg", "to_unit": "m"}, "error: kg is a unit of mass, m of length"),
        ("unit_converter", {"value": 1, "from_unit": "kg", "to_unit": "stone"}, "error: unknown unit stone"),
        ("lookup", {"item": "tea", "field": "price"}, "14"),
        ("lookup", {"item": "gold", "field": "price"}, "error: there is no gold; items: apple"),
    ],
)  # fmt: skip
def test_other_tools(name, arguments, result):
    found = call_tool({"name": name, "arguments": arguments})
    assert found == result or (result.startswith("error: ") and found.startswith(result))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (None, "a call must be"), ([], "a call must be"), ({"name": "calculator"}, "a call must be"),
        ({"name": "calculator", "arguments": "{}"}, "a call must be"),
        ({"name": "search", "arguments": {}}, "there is no tool search; tools: calculator, calendar"),
        ({"name": "calculator", "arguments": {}}, "calculator: missing argument expression"),
        ({"name": "calculator", "arguments": {"expression": "1", "x": 1}}, "calculator: unknown argument x"),
        ({"name": "calculator", "arguments": {"expression": 1}}, "calculator: expression must be of type string"),
        ({"name": "calendar", "arguments": {"date": "2024-01-01", "days": True}}, "days must be of type integer"),
        ({"name": "calendar", "arguments": {"date": "2024-01-01", "days": 1.5}}, "days must be of type integer"),
        ({"name": "unit_converter", "arguments": {"value": float("nan"), "from_unit": "m", "to_unit": "m"}}, "finite"),
    ],
)  # fmt: skip
def test_bad_calls_are_answered_with_text(call, message):
    found = call_tool(call)
    assert found.startswith("error: ")
    assert message in found


def test_tools_that_raise_or_hang():
    released = threading.Event()

    def hang() -> str:
        released.wait(60)
        return "late"

    def stop() -> str:
        raise SystemExit

    tools = {"hang": hang, "stop": stop, "half": lambda: "\ud800"}
    assert (
        call_tool({"name": "hang", "arguments": {}}, tools, timeout=0.05)
        == "error: hang did not answer within 0.05 seconds"
    )
    assert call_tool({"name": "stop", "arguments": {}}, tools) == "error: SystemExit"
    assert call_tool({"name": "half", "arguments": {}}, tools) == "?"  # half a surrogate pair could not be encoded
    released.set()


def test_schemas_come_from_signatures():
    assert tool_schema(TOOLS["calendar"]) == {
        "name": "calendar",
        "description": "Return the date some days later with its weekday, or the number of days until a date.",
        "parameters": {
            "type": "object",
            "properties": {
                "date": {"type": "string", "description": "YYYY-MM-DD"},
                "days": {"type": "integer"},
                "until": {"type": "string"},
            },
            "required": ["date"],
        },
    }


def test_tools_of_the_user(tmp_path, monkeypatch):
    source = (
        "def double(x: int) -> int:\n    'Double a number.'\n    return 2 * x\n\ndef untyped(x): pass\n\nnumber = 1\n"
    )
    (tmp_path / "my_own_tools.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    tools = find_tools(["calculator", "my_own_tools:double"])
    assert list(tools) == ["calculator", "double"]
    assert call_tool({"name": "double", "arguments": {"x": 4}}, tools) == "8"
    for name, message in (
        ("abacus", "'abacus' is unknown; tools: calculator, calendar"), ("my_own_tools:untyped", "no type that JSON knows"),
        ("my_own_tools:number", "is not a function"), ("no_such_module:f", "cannot be imported"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            find_tools([name])
