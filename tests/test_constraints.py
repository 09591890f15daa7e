"""inference/constraints.py: whatever a model with random weights prefers, it writes what the grammar allows."""

from __future__ import annotations

import gc
import weakref

import pytest
from serving_helpers import TOKENIZER, tiny_model, without_tags

from bench.json_schemas import check_answers
from common.errors import UserError
from inference.constraints import Constraint, answer_grammar, blocked_tokens, without_other_properties
from inference.generator import generate
from inference.options import SamplingParams
from model.chat_parser import parse_answer
from model.chat_style import chat_style
from model.tokenizer import encode_text

TAGS = chat_style(TOKENIZER).tags
PROMPT = [1, 5, 6]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def answers(model, grammar, tokenizer=TOKENIZER, n=1, **sampling) -> list[tuple[str, str]]:
    """Return (text, finish) of n answers that are sampled together."""
    constraint = Constraint(tokenizer, grammar)
    samplings = [
        SamplingParams(**{"max_new_tokens": 200, "temperature": 1.0, "seed": i} | sampling, constraint=constraint)
        for i in range(n)
    ]
    texts, finishes = [""] * n, [""] * n
    for output in generate(model, [PROMPT] * n, samplings, tokenizer=tokenizer):
        texts[output.key] += output.text
        finishes[output.key] = output.finish or ""
    return list(zip(texts, finishes, strict=True))


def test_json_matches_its_schema(model):
    """Over schemas that are drawn at random, eight answers at a time."""
    finished, cut, wrong = check_answers(model, 40)
    assert not wrong and finished > 36 and finished + cut == 40


def test_no_tokenizer_of_an_earlier_model_is_kept():
    grammar, earlier = answer_grammar(TAGS, schema={"type": "object"}), without_tags()
    Constraint(earlier, grammar)
    gone = weakref.ref(earlier)
    del earlier
    Constraint(TOKENIZER, grammar)
    gc.collect()
    assert gone() is None


TOOLS = [
    {"name": "f", "parameters": {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["x"],
                                 "additionalProperties": False, "$defs": {"a": {"enum": [1, "</tool_call>"]}}}},
    {"name": 'g "', "parameters": None},
]  # fmt: skip


@pytest.mark.parametrize("tokenizer", [TOKENIZER, without_tags()], ids=["control tokens", "tags are text"])
@pytest.mark.parametrize("thinking", [False, True])
def test_required_calls_are_well_formed(model, tokenizer, thinking):
    tags = chat_style(tokenizer).tags
    # The end of the thoughts, which may go on for ever, and another call are made probable.
    bias = {tags["</think>"][0]: 8.0, tags["<tool_call>"][0]: 8.0}
    many, one = (
        answers(
            model, answer_grammar(tags, tools=TOOLS, required=True, parallel=parallel, thinking=thinking), tokenizer, n=8,
            logit_bias=bias,
        )
        for parallel in (True, False)
    )  # fmt: skip
    names = set()
    for text, finish in many + one:
        answer = parse_answer(text)
        assert thinking or answer.thinking is None
        if finish == "stop":
            assert answer.content == "" and answer.calls
        for call in answer.calls:
            names.add(call["name"])
            assert call["arguments"] in ([{"x": 1}, {"x": "</tool_call>"}] if call["name"] == "f" else [{}])
    assert names == {"f", 'g "'}
    assert {len(parse_answer(text).calls) for text, finish in one if finish == "stop"} == {1}
    assert max(len(parse_answer(text).calls) for text, _ in many) > 1
    assert sum(finish == "stop" for _, finish in many + one) > 4


def test_a_call_that_is_spelled_out_is_not_possible():
    """Without the control token it would be text to the grammar, and a call to the parser."""
    matcher = Constraint(TOKENIZER, answer_grammar(TAGS, tools=TOOLS[:1])).matcher()
    spelled = [id for letter in "so <tool_call>" for id in encode_text(TOKENIZER, letter)]
    assert all(map(matcher.consume_token, spelled[:-1])) and not matcher.consume_token(spelled[-1])


@pytest.mark.parametrize("tokenizer", [TOKENIZER, without_tags()], ids=["control tokens", "tags are text"])
def test_thoughts_that_begin_in_the_prompt_end_in_the_answer(tokenizer):
    tags = chat_style(tokenizer).tags
    grammar = answer_grammar(tags, schema={"const": 1}, thinking=True, begun=True)
    matcher = Constraint(tokenizer, grammar).matcher()
    thoughts, answer = encode_text(tokenizer, "it is 1"), encode_text(tokenizer, "1")
    accepted = matcher.deep_copy()
    assert accepted.consume_tokens([*thoughts, *tags["</think>"], *answer]) and accepted.is_accepting()
    assert matcher.consume_tokens(thoughts) and not matcher.is_accepting()


def test_text_or_calls_and_json_or_calls(model):
    for schema, weight in (None, 9.0), ({"type": "integer", "minimum": 0, "maximum": 9}, 2.0):
        bias = {TAGS["<tool_call>"][0]: weight, 2: 6.0}
        found = answers(model, answer_grammar(TAGS, tools=TOOLS[:1], schema=schema), n=12, logit_bias=bias)
        parsed = [parse_answer(text) for text, finish in found if finish == "stop"]
        assert any(answer.calls for answer in parsed) and any(answer.content for answer in parsed)
        assert not any(answer.malformed for answer in parsed)
        assert schema is None or all(answer.content in ("", *map(str, range(10))) for answer in parsed)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "foo"}, "Invalid type: foo"),
        ({"not": {}}, "Unimplemented keys"),
        ({"type": "string", "pattern": "(?=a)b"}, "regex parse error"),
        ({"$ref": "http://x/y"}, "http://x/y"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"type": ["string", 5]}, "type must be a string"),
    ],
)
def test_unsupported_schemas_are_refused_with_the_reason(schema, reason):
    with pytest.raises(UserError, match=reason) as raised:
        Constraint(TOKENIZER, answer_grammar(TAGS, schema=schema))
    assert "\n" not in str(raised.value)


def test_other_rows_and_reported_probabilities_do_not_change(model):
    """A constrained row shares the batch with free ones, which generate what they generate alone."""
    free = SamplingParams(max_new_tokens=12, logprobs=2)
    schema = {"type": "integer", "minimum": 10, "maximum": 99}
    held = SamplingParams(
        max_new_tokens=12, logprobs=2, constraint=Constraint(TOKENIZER, answer_grammar(TAGS, schema=schema))
    )
    pushed = SamplingParams(max_new_tokens=12, logprobs=2, logit_bias={7: 1000, 8: 2000, 9: -1000})
    alone = list(generate(model, [PROMPT], free))
    together = list(generate(model, [PROMPT] * 4, [free, held, pushed, free]))
    by_key = {key: [output for output in together if output.key == key] for key in range(4)}
    for key in (0, 3):
        assert [output.token for output in by_key[key]] == [output.token for output in alone]
    assert {output.token for output in by_key[2]} == {8}
    # The first position has seen the same text in all rows, so the model's own probabilities are the same.
    tops = [by_key[key][0].top_logprobs for key in range(4)]
    assert all([token for token, _ in top] == [token for token, _ in tops[0]] for top in tops)
    assert by_key[1][-1].finish == "stop" and len(by_key[1]) <= 4


def test_a_model_may_have_more_logits_than_tokens(model):
    text, finish = answers(model, answer_grammar(TAGS, schema={"const": "é"}))[0]
    assert (text, finish) == ('"é"', "stop")
    constraint = Constraint(TOKENIZER, answer_grammar(TAGS, schema={"const": 1}))
    free, held = blocked_tokens([None, constraint.matcher()], constraint.vocab_size, 6500)
    assert not free.any() and held.sum() == 6499 and held[6400:].all()


def test_a_token_that_does_not_exist_is_refused(model):
    with pytest.raises(ValueError, match="it knows 0 to 6399"):
        list(generate(model, [PROMPT], SamplingParams(logit_bias={6400: 1})))


def test_objects_have_no_properties_that_the_schema_does_not_name():
    item = {"type": "object", "properties": {"properties": {"type": "string"}}}
    schema = {"properties": {"x": {"type": "array", "items": item}, "y": {"$ref": "#/$defs/d"}}, "$defs": {"d": item}}
    closed = item | {"additionalProperties": False}
    expected = {
        "properties": {"x": {"type": "array", "items": closed}, "y": {"$ref": "#/$defs/d"}},
        "$defs": {"d": closed},
    }
    assert without_other_properties(schema) == expected | {"additionalProperties": False}
    assert "additionalProperties" not in item
    for same in (
        {"type": "object"},
        {"properties": {"x": {}}, "additionalProperties": {"type": "integer"}},
        {"properties": {"x": {}}, "anyOf": [{"properties": {"y": {}}}]},
        {"allOf": [{"properties": {"x": {}}}, {"properties": {"y": {}}}]},
    ):
        assert without_other_properties(same) == same
