"""Verifiers: compare an answer with a reference and return a reward, for reinforcement learning and for measuring.

    verifier = parse_verifier("number:1,format:0.2,length=200:0.1")
    verifier("3 * 4 = 12, so 12 are left.", "12")      # Reward(value=1.3, correct=True, errors=())

A verifier is a pure function of two texts, answer and reference, that returns a number, as a rule from 0 to 1; the reward is
the sum of its verifiers, times their weights. `name=text` compares with that text instead of the reference. The first one
says whether the answer is correct. A user's function of (answer, reference) is named as "module:function"; models that
judge are in `evaluation.judges`.

Verifiers look at what the user would read; "format" and "thinks" look at the whole answer with its thinking and calls.
"""

from __future__ import annotations

import functools
import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from regex import search as search_regex  # type: ignore[import-untyped]  # `re` has no time limit

from common.errors import UserError
from evaluation.judges import Judge, JudgeFunction
from evaluation.tools import import_function
from model.chat_format import Message
from model.chat_parser import END_THINK, parse_answer

VerifierFunction = Callable[[str, str], float]

# Not of "CO2" or "1.2.3"; the minus of "5-3" is no sign, and the dots of "...12" are no decimal point.
_NUMBER = re.compile(r"(?<![A-Za-z\d])(?<!\d\.)-?(?:\d+(?:\.\d+)?|(?<!\.)\.\d+)")
_RAISED = str.maketrans("", "", "⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉")
_LETTER = re.compile(r"(?<![A-Za-z])[A-Z](?![A-Za-z])")
_NOT = r"(?<![不别])(?<!不[能该应要可])(?<!不应该)(?<!不可以)(?i:(?<!not ))"
_CHOSEN = re.compile(
    _NOT + r"(?i:answer is|choose|option|答案(?:应该?|应当)?[是为]?|选择?)[\s:：(（*]*([A-Z])(?![A-Za-z])"
)


def exact(answer: str, reference: str) -> float:
    """Return 1 if the answer is the reference, apart from case and white space."""
    return float(answer.casefold().split() == reference.casefold().split())


def number(answer: str, reference: str) -> float:
    """Return 1 if the last number in the answer is the reference: "so it is 1,024.0 m" for 1024."""
    try:
        expected = float(reference)
    except ValueError:
        expected = math.nan
    if not math.isfinite(expected):
        raise ValueError(f"{reference!r} is not a number")
    found = _NUMBER.findall(_plain_digits(answer))
    return float(bool(found) and math.isclose(float(found[-1]), expected, rel_tol=1e-6, abs_tol=1e-9))


def _plain_digits(text: str) -> str:
    """Return a text with ASCII digits and minus signs, and without commas between thousands."""
    text = unicodedata.normalize("NFKC", text.translate(_RAISED)).replace("−", "-")
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def choice(answer: str, reference: str) -> float:
    """Return 1 if the answer chooses this letter: after "answer is" or 答案是, or else the last that stands alone."""
    if not re.fullmatch("[A-Z]", reference):
        raise ValueError(f"the answer to a choice is a letter from A to Z, not {reference!r}")
    letters = _LETTER.findall(answer)
    found = _CHOSEN.findall(answer) or [letter for letter in letters if letter != "I"] or letters  # as in "B, I think"
    return float(bool(found) and found[-1] == reference)


def regex(answer: str, reference: str) -> float:
    """Return 1 if the regular expression is found in the answer; raise TimeoutError after a second of searching."""
    return float(search_regex(reference, answer, timeout=1) is not None)


def json_schema(answer: str, reference: str) -> float:
    """Return 1 if the answer is JSON (perhaps in a code block) that fits the schema."""
    validator = _json_validator(reference)
    block = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", answer.strip(), re.DOTALL)
    try:
        return float(validator.is_valid(json.loads(block[1] if block else answer)))
    except (ValueError, RecursionError):
        return 0.0


@functools.lru_cache(maxsize=1024)
def _json_validator(schema_text: str) -> Any:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    schema = json.loads(schema_text)
    if re.search(r'"\$(dynamic)?[rR]ef":\s*"[^#]', json.dumps(schema)):
        raise ValueError("its $ref is an address, and data must not make a program open addresses")
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"this is not a JSON schema: {error.message}") from None
    return kind(schema)


def length(answer: str, reference: str) -> float:
    """Return 1 for up to so many characters, less for more, 0 from twice as many on."""
    limit = int(reference)
    if limit < 1:
        raise ValueError(f"a length is at least 1, not {limit}")
    return min(1.0, max(0.0, 2 - len(answer) / limit))


def well_formed(answer: str, reference: str) -> float:
    """Return 1 if the thinking of the answer ends, all its calls can be read, and it says something to the user."""
    parsed = parse_answer(answer)
    ended = parsed.thinking is None or END_THINK in answer
    return float(ended and not parsed.malformed and bool(parsed.content.strip()))


def thinks(answer: str, reference: str) -> float:
    """Return 1 if the answer begins with some thinking."""
    return float(bool((parse_answer(answer).thinking or "").strip()))


VERIFIERS: dict[str, VerifierFunction] = {
    "exact": exact, "number": number, "choice": choice, "regex": regex, "json_schema": json_schema, "length": length,
    "format": well_formed, "thinks": thinks,
}  # fmt: skip
_WHOLE_ANSWER = ("format", "thinks")
# Name of a verifier -> the flags that open its model.
JUDGE_FLAGS = {"judge": "--judge_url and --judge_model", "reward_model": "--reward_model"}


class Reward(NamedTuple):
    """The reward of an answer.

    correct: the first verifier returned 1 or more.
    errors: what verifiers raised; the reward is 0 then.
    """

    value: float
    correct: bool
    errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    name: str
    function: VerifierFunction | JudgeFunction
    argument: str | None
    weight: float
    is_judge: bool = False

    def __call__(self, answer: str, reference: str, messages: Sequence[Message]) -> float:
        text = answer if self.name in _WHOLE_ANSWER else parse_answer(answer).content.strip()
        seen = (messages,) if self.is_judge else ()
        value = float(self.function(text, reference if self.argument is None else self.argument, *seen))
        if not math.isfinite(value):
            raise ValueError(f"returned {value}")
        return value


@dataclass(frozen=True)
class Verifier:
    """A weighted sum of verifiers; see `parse_verifier`."""

    parts: tuple[_Part, ...]
    spec: str

    @property
    def waits(self) -> bool:
        """Return whether it waits for a server, so that several answers should be verified at a time."""
        return any(isinstance(part.function, Judge) for part in self.parts)

    @property
    def needs_reference(self) -> bool:
        """Return whether some part compares with the reference."""
        return not all(part.is_judge or part.argument or part.name in _WHOLE_ANSWER for part in self.parts)

    def __call__(self, answer: str, reference: str, messages: Sequence[Message] = ()) -> Reward:
        """Return the reward of an answer (its whole text, with thinking and calls). Never raises an error.

        messages: what stands before the answer, for judges.
        """
        values, errors = [], []
        for part in self.parts:
            try:
                values.append(part(answer, reference, messages))
            except Exception as error:  # a function of the user can raise anything
                errors.append(f"{part.name}: {type(error).__name__}: {error}")
        if errors:
            return Reward(0.0, False, tuple(errors))
        total = sum(part.weight * value for part, value in zip(self.parts, values, strict=True))
        return Reward(total, values[0] >= 1, ())

    def check(self, reference: str) -> None:
        """Raise UserError if one of our verifiers cannot use this reference: a number that is none, a broken schema."""
        for part in self.parts:
            if part.name in VERIFIERS:
                try:
                    part("", reference, ())
                except Exception as error:  # whatever is wrong with the reference, it is the row's fault
                    raise UserError(f"the verifier {part.name} cannot use this answer: {error}") from None


def parse_verifier(
    spec: str, *, judges: Mapping[str, JudgeFunction] | None = None, allow_functions: bool = False
) -> Verifier:
    """Read "name[=text][:weight],…"; names are those of VERIFIERS and of `judges`.

    Args:
        judges: models that may be asked, by name.
        allow_functions: also "module:function[:weight]". Only for what the user typed: a data file must not choose which
            code runs.

    Raises UserError for an unknown name or a weight that is no number.
    """
    judges = judges or {}
    known = f"verifiers: {', '.join([*VERIFIERS, *judges])}"
    parts = []
    for text in spec.split(","):
        named, colon, weight_text = text.strip().rpartition(":")
        try:
            weight = float(weight_text) if colon else 1.0
        except ValueError:
            weight, colon = 1.0, ""  # module:function
        named = named if colon else text.strip()
        name, equals, argument = named.partition("=")
        if not math.isfinite(weight):
            raise UserError(f"verifier {text.strip()!r}: the weight must be a finite number")
        function: VerifierFunction | JudgeFunction
        if name in VERIFIERS:
            function = VERIFIERS[name]
        elif name in judges:
            function = judges[name]
        elif name in JUDGE_FLAGS:
            raise UserError(f"verifier {name!r} needs {JUDGE_FLAGS[name]}")
        elif allow_functions:
            function = import_function(name, known)
        else:
            raise UserError(f"verifier {name!r} is unknown; {known}; functions of your own only with --verifier")
        parts.append(_Part(name, function, argument if equals else None, weight, name in judges))
    return Verifier(tuple(parts), spec)
