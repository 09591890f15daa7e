"""Tools that a model may call: plain functions, their JSON schemas, and one function that runs a call.

    tools = find_tools(["calculator", "my_tools:search"])
    schemas = [tool_schema(function) for function in tools.values()]                       # what the model is told
    call_tool({"name": "calculator", "arguments": {"expression": "3 * (4 + 5)"}}, tools)   # "27"

A tool takes the arguments of a call and returns text (anything else is converted). What it raises becomes text, too, so that
the model can read what was wrong: neither a bad call nor a bad tool ends a chat or a training run. The tools here are pure
and safe: they compute, and touch neither files nor the network.
"""

from __future__ import annotations

import ast
import datetime
import functools
import importlib
import inspect
import math
import operator
import os
import sys
import threading
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.errors import UserError

Tool = Callable[..., Any]
TIMEOUT = 5.0  # seconds for one call

# ---- the tools

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_SIGNS = str.maketrans({"×": "*", "÷": "/", "−": "-", "（": "(", "）": ")", "^": "**"})
MAX_EXPRESSION = 200  # characters
MAX_NUMBER = 1e15  # beyond it a float is no longer exact to the unit
MAX_EXPONENT = 64


def calculator(expression: str) -> str:
    """Compute an arithmetic expression."""
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(f"the expression is longer than {MAX_EXPRESSION} characters")
    return _number(_evaluate(ast.parse(expression.translate(_SIGNS).strip(), mode="eval").body))


def _evaluate(node: ast.expr) -> float:
    value: Any
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _evaluate(node.operand)
        value = -value if isinstance(node.op, ast.USub) else value
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > MAX_EXPONENT:
            raise ValueError(f"the exponent is larger than {MAX_EXPONENT}")
        value = _OPERATORS[type(node.op)](left, right)
    else:
        raise ValueError("use numbers, + - * / // % ** and brackets")
    if isinstance(value, complex) or not abs(value) <= MAX_NUMBER:
        raise ValueError(f"a number is not real or larger than {MAX_NUMBER:g}")
    return value


def _number(value: float) -> str:
    """Write a number as people do: 27 rather than 27.0, 0.3 rather than 0.30000000000000004."""
    return str(int(value)) if value == int(value) else f"{value:.10g}"


def calendar(date: str, days: int = 0, until: str = "") -> str:
    """Return the date some days later with its weekday, or the number of days until a date.

    Args:
        date: YYYY-MM-DD
    """
    start = datetime.date.fromisoformat(date)
    if until:
        return str((datetime.date.fromisoformat(until) - start).days)
    end = start + datetime.timedelta(days=days)
    return f"{end.isoformat()} {WEEKDAYS[end.weekday()]}"


WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
UNITS: dict[str, tuple[str, float]] = {  # unit: what it measures, and its size
    "mm": ("length", 0.001), "cm": ("length", 0.01), "m": ("length", 1), "km": ("length", 1000),
    "in": ("length", 0.0254), "ft": ("length", 0.3048), "mi": ("length", 1609.344),
    "mg": ("mass", 0.001), "g": ("mass", 1), "kg": ("mass", 1000), "t": ("mass", 1e6),
    "oz": ("mass", 28.349523125), "lb": ("mass", 453.59237),
    "ml": ("volume", 0.001), "l": ("volume", 1), "gal": ("volume", 3.785411784),
    "s": ("time", 1), "min": ("time", 60), "h": ("time", 3600), "d": ("time", 86400), "week": ("time", 604800),
}  # fmt: skip


def unit_converter(value: float, from_unit: str, to_unit: str) -> str:
    """Convert a length, mass, volume or time into another unit, or °C and °F into each other."""
    if abs(value) > MAX_NUMBER:
        raise ValueError(f"the value is larger than {MAX_NUMBER:g}")
    scales = {("C", "F"): value * 9 / 5 + 32, ("F", "C"): (value - 32) * 5 / 9}
    if (from_unit, to_unit) in scales:
        return f"{_number(scales[from_unit, to_unit])} {to_unit}"
    for unit in (from_unit, to_unit):
        if unit not in UNITS:
            raise ValueError(f"unknown unit {unit}; known: {', '.join(UNITS)}, C, F")
    (kind, size), (to_kind, to_size) = UNITS[from_unit], UNITS[to_unit]
    if kind != to_kind:
        raise ValueError(f"{from_unit} is a unit of {kind}, {to_unit} of {to_kind}")
    return f"{_number(value * size / to_size)} {to_unit}"


TABLE = {  # a small shop: what `lookup` knows
    "apple": {"price": 3, "stock": 40}, "pear": {"price": 4, "stock": 25}, "melon": {"price": 12, "stock": 8},
    "bread": {"price": 6, "stock": 15}, "cheese": {"price": 18, "stock": 9}, "milk": {"price": 5, "stock": 30},
    "tea": {"price": 14, "stock": 12}, "rice": {"price": 7, "stock": 50}, "pen": {"price": 2, "stock": 90},
    "book": {"price": 23, "stock": 11}, "lamp": {"price": 35, "stock": 6}, "chair": {"price": 48, "stock": 4},
}  # fmt: skip


def lookup(item: str, field: str) -> str:
    """Look up the price or stock of an item of the shop."""
    if item not in TABLE:
        raise ValueError(f"there is no {item}; items: {', '.join(TABLE)}")
    if field not in TABLE[item]:
        raise ValueError(f"there is no {field}; fields: {', '.join(TABLE[item])}")
    return str(TABLE[item][field])


TOOLS: dict[str, Tool] = {f.__name__: f for f in (calculator, calendar, unit_converter, lookup)}

# ---- schemas and calls

_JSON_TYPES: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    list: "array",
    dict: "object",
}


def tool_schema(function: Tool) -> dict[str, Any]:
    """Return what the model is told of a tool: {"name", "description", "parameters"}, from its signature and docstring.

    The description is the first sentence of the docstring; its section "Args:" describes parameters. Types of parameters
    are str, int, float, bool, list or dict. In OpenAI's form it is {"type": "function", "function": tool_schema(f)}.

    Raises UserError for a parameter without such a type.
    """
    hints = typing.get_type_hints(function)
    head, _, args = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    described = dict(line.strip().split(": ", 1) for line in args.splitlines() if ": " in line)
    properties, required = {}, []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = _JSON_TYPES.get(typing.get_origin(hints.get(name)) or hints.get(name))
        if kind is None or parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(
                f"the parameter {name} of the tool {function.__name__} has no type that JSON knows: annotate it as str, "
                "int, float, bool, list or dict"
            )
        properties[name] = {"type": kind} | ({"description": described[name]} if name in described else {})
        if parameter.default is parameter.empty:
            required.append(name)
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"name": function.__name__, "description": head.split("\n\n")[0].strip(), "parameters": parameters}


def call_tool(call: object, tools: Mapping[str, Tool] = TOOLS, timeout: float = TIMEOUT) -> str:
    """Run a call {"name", "arguments"} and return the text of the response; never raise an error.

    For an unknown tool, wrong arguments, a tool that raises an error or takes longer than `timeout` seconds, the text begins
    with "error:" and says so. A tool that hangs cannot be stopped: its thread is left behind, and ends with the process.
    """
    if not (isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)):
        return 'error: a call must be {"name": text, "arguments": object}'
    name, arguments = call["name"], call["arguments"]
    if name not in tools:
        return f"error: there is no tool {name}; tools: {', '.join(tools)}"
    if wrong := _wrong_arguments(tools[name], arguments):
        return f"error: {name}: {wrong}"
    answers: list[str] = []

    def run() -> None:
        try:
            answers.append(str(tools[name](**arguments)))
        except SyntaxError as error:
            answers.append(f"error: {error.msg}")
        except BaseException as error:  # a tool of the user can raise anything, SystemExit too
            answers.append(f"error: {str(error) or type(error).__name__}")

    thread = threading.Thread(target=run, daemon=True, name=f"tool {name}")
    thread.start()
    thread.join(timeout)
    text = answers[0] if answers else f"error: {name} did not answer within {timeout:g} seconds"
    return text.encode("utf-8", "replace").decode("utf-8")


def _wrong_arguments(function: Tool, arguments: dict[str, Any]) -> str | None:
    parameters = tool_schema(function)["parameters"]
    if unknown := arguments.keys() - parameters["properties"].keys():
        return f"unknown argument {min(unknown, key=str)}; arguments: {', '.join(parameters['properties'])}"
    if missing := [name for name in parameters["required"] if name not in arguments]:
        return f"missing argument {missing[0]}"
    kinds = {name: kind for kind, name in _JSON_TYPES.items()}
    for name, value in arguments.items():
        expected = parameters["properties"][name]["type"]
        allowed = (int, float) if expected == "number" else kinds[expected]
        if not isinstance(value, allowed) or (isinstance(value, bool) and expected != "boolean"):
            return f"{name} must be of type {expected}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} must be finite"
    return None


def find_tools(names: Sequence[str]) -> dict[str, Tool]:
    """Return tools by name: those of this module, or a user's function as "module:function".

    Raises UserError for a name that is neither, or a function without types.
    """
    found: dict[str, Tool] = {}
    for name in names:
        function = TOOLS[name] if name in TOOLS else import_function(name, f"tools: {', '.join(TOOLS)}")
        tool_schema(function)  # raises an error now, not at the first call
        found[function.__name__] = function
    return found


def chat_tools(names: Sequence[str] | None) -> dict[str, Any]:
    """Return the arguments `tools` and `call_tool` of a chat with the tools of these names; without a name the calculator.

    (The descriptions of all four take more than the 512 tokens of a default model.)

    Raises UserError like `find_tools`. None: a chat without tools.
    """
    if names is None:
        return {}
    tools = find_tools(names or ["calculator"])
    schemas = [tool_schema(function) for function in tools.values()]
    return {"tools": schemas, "call_tool": functools.partial(call_tool, tools=tools)}


def import_function(name: str, known: str) -> Callable[..., Any]:
    """Return a user's function by "module:function"; the module may stand in the current folder.

    known: names that could have been meant, for the error message.

    Raises UserError if there is none.
    """
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise UserError(f"{name!r} is unknown; {known}; or a function of your own as module:function")
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the module is a program: it can raise anything
        raise UserError(f"{name}: cannot be imported ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(folder)
    if not callable(function):
        raise UserError(f"{name} is not a function")
    return function
