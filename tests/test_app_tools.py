"""serving/: tools, thinking and JSON, through the openai package.

Two servers: one whose answers are held to JSON or calls, by a model with random weights, and one whose model writes what a
test says (`scripted`), through the same sampler and engine.
"""

from __future__ import annotations

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, Field
from serving_helpers import NAME, QUESTION, SUM, TOKENIZER, Scripted, answer_ids, serving, without_tags

from evaluation.tools import TOOLS, call_tool, tool_schema
from model.chat_format import render_chat, with_tools
from model.chat_style import chat_style
from model.tokenizer import EOS_ID, encode_text

SCHEMAS = [tool_schema(function) for function in TOOLS.values()]
OFFERED = [{"type": "function", "function": schema} for schema in SCHEMAS]
FLAT = [{"type": "function", **schema} for schema in SCHEMAS]
DATE = {"name": "calendar", "arguments": {"date": "2026-11-26", "days": 7}}
TAGS = chat_style(TOKENIZER).tags


def raw_ids(text: str) -> list[int]:
    """Return the ids of an answer whose tags are control tokens, even if what stands between them is malformed."""
    return [*TOKENIZER(text, add_special_tokens=False).input_ids, EOS_ID]


@pytest.fixture(scope="module")
def scripted():
    with serving(generator=Scripted) as running, openai.OpenAI(base_url=running.url, api_key="none") as client:
        yield client


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as found:
        yield found


def ask(client: openai.OpenAI, stream: bool, **fields):
    """Return (message as a dict, finish_reason) of an answer; a streamed one is put together from its chunks."""
    if not stream:
        (choice,) = client.chat.completions.create(model=NAME, **fields).choices
        return choice.message.to_dict(), choice.finish_reason
    message, calls, finish = {"role": "assistant", "content": ""}, [], None
    for chunk in client.chat.completions.create(model=NAME, stream=True, **fields):
        (choice,) = chunk.choices
        for name in ("content", "reasoning_content"):
            if (new := getattr(choice.delta, name, None)) is not None:
                message[name] = message.get(name, "") + new
        for call in choice.delta.tool_calls or []:
            if call.index == len(calls):
                assert call.function.arguments == "" and call.type == "function"
                calls.append(
                    {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": ""}}
                )
            else:
                assert call.id is None
            calls[call.index]["function"]["arguments"] += call.function.arguments
        assert finish is None
        finish = choice.finish_reason
    message["content"] = message["content"] or None
    return message | ({"tool_calls": calls} if calls else {}), finish


# ---- the model decides


@pytest.mark.parametrize("stream", [False, True])
def test_the_loop_of_tools(scripted, stream):
    Scripted.script = answer_ids(content="So: ", reasoning_content="A sum.\n", tool_calls=[SUM, DATE])
    messages = [*QUESTION]
    message, finish = ask(scripted, stream, messages=messages, tools=OFFERED)
    assert finish == "tool_calls"
    assert message["content"] == "So: " and message["reasoning_content"] == "A sum.\n"
    calls = message["tool_calls"]
    assert len({call["id"] for call in calls}) == 2
    found = [{"name": c["function"]["name"], "arguments": json.loads(c["function"]["arguments"])} for c in calls]
    assert found == [SUM, DATE]
    results = [call_tool(call) for call in found]
    messages += [
        message,
        *(dict(role="tool", tool_call_id=c["id"], content=r) for c, r in zip(calls, results, strict=True)),
    ]
    # What the client sends back is what the model wrote.
    expected = [
        *QUESTION,
        {"role": "assistant", "content": "So: ", "reasoning_content": "A sum.\n", "tool_calls": found},
    ]
    expected += [{"role": "tool", "content": result} for result in results]
    prompt = render_chat(TOKENIZER, with_tools(expected, SCHEMAS), add_generation_prompt=True)[0]
    answer = scripted.chat.completions.create(model=NAME, messages=messages, tools=OFFERED)
    assert answer.usage.prompt_tokens == len(prompt)
    assert ask(scripted, stream, messages=messages, tools=OFFERED)[0]["content"] == Scripted.answer


def test_tools_that_do_not_fit_are_left_out(server):
    """Open WebUI offers 12,000 tokens of tools in every chat."""
    large = [{"type": "function", "function": {"name": f"f{i}", "description": "one " * 400}} for i in range(8)]
    asked = dict(model=NAME, messages=QUESTION, temperature=0, max_tokens=5)
    plain = server.post("/v1/chat/completions", **asked)[1]
    body = json.dumps(asked | {"tools": large}).encode()
    status, headers, answer = server.call("POST", "/v1/chat/completions", body)
    assert status == 200 and headers["x-ignored-fields"] == "tools"
    answer = json.loads(answer)
    assert (answer["choices"], answer["usage"]) == (plain["choices"], plain["usage"])
    for keep in (-1, 100):
        body = json.dumps(asked | {"tools": large, "truncate_prompt_tokens": keep}).encode()
        status, headers, found = server.call("POST", "/v1/chat/completions", body)
        assert status == 200 and headers["x-ignored-fields"] == "tools"
        assert json.loads(found)["choices"] == plain["choices"]
        cut = {"tools": large, "truncate_prompt_tokens": keep, "tool_choice": "required"}
        assert server.post("/v1/chat/completions", **asked, **cut)[0] == 400
    for choice in ("required", {"type": "function", "function": {"name": "f1"}}):
        status, answer = server.post("/v1/chat/completions", **asked, tools=large, tool_choice=choice)
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    messages = [{"role": "user", "content": "one " * 4000}]
    status, answer = server.post("/v1/chat/completions", **asked | {"messages": messages, "tools": large})
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    with serving(strict=True) as strict:
        status, answer = strict.post("/v1/chat/completions", **asked, tools=large)
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"


def test_the_stream_helper_of_the_package(scripted):
    Scripted.script = answer_ids(reasoning_content="A sum.", tool_calls=[SUM])
    with scripted.chat.completions.stream(model=NAME, messages=QUESTION, tools=OFFERED) as stream:
        kinds = {event.type for event in stream}
        (choice,) = stream.get_final_completion().choices
    assert "tool_calls.function.arguments.done" in kinds
    assert choice.finish_reason == "tool_calls" and choice.message.content in (None, "")
    assert json.loads(choice.message.tool_calls[0].function.arguments) == SUM["arguments"]


@pytest.mark.parametrize("stream", [False, True])
def test_parallel_calls_can_be_switched_off(scripted, stream):
    Scripted.script = answer_ids(tool_calls=[SUM, DATE])
    message, finish = ask(scripted, stream, messages=QUESTION, tools=OFFERED, parallel_tool_calls=False)
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["calculator"] and finish == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ('a<tool_call>{"name": "calculator"}</tool_call>b', {"tools": OFFERED}),
        ('<tool_call>{"name": "calculator", "arg', {"tools": OFFERED}),
        ('<tool_call>{"name": "calculator", "arguments": {}}</tool_call>', {}),
        ('<tool_call>{"name": "calculator", "arguments": {}}</tool_call>', {"tools": OFFERED, "tool_choice": "none"}),
    ],
    ids=["malformed", "unfinished", "no tools", "tool_choice none"],
)
def test_what_is_no_call_is_content(scripted, stream, text, fields):
    Scripted.script = raw_ids(text)
    message, finish = ask(scripted, stream, messages=QUESTION, **fields)
    assert message["content"] == text and "tool_calls" not in message and finish == "stop"


def test_a_call_to_an_unknown_tool_is_for_the_client_to_answer(scripted):
    Scripted.script = answer_ids(tool_calls=[{"name": "nothing", "arguments": {}}])
    message, finish = ask(scripted, False, messages=QUESTION, tools=OFFERED)
    call = message["tool_calls"][0]["function"]
    assert finish == "tool_calls" and call_tool({"name": call["name"], "arguments": {}}).startswith(
        "error: there is no"
    )


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_that_are_cut_are_thoughts(scripted, stream):
    Scripted.script = answer_ids(reasoning_content="well, " * 9, content="x")
    message, finish = ask(scripted, stream, messages=QUESTION, max_tokens=6)
    assert not message["content"] and message["reasoning_content"].startswith("well, well") and finish == "length"


def test_usage_tells_the_tokens_of_the_thoughts(scripted):
    Scripted.script = answer_ids(reasoning_content="well, " * 9, content="x")
    thoughts = len(encode_text(TOKENIZER, "well, " * 9))
    usage = scripted.chat.completions.create(model=NAME, messages=QUESTION).usage
    assert usage.completion_tokens_details.reasoning_tokens == 1 + thoughts  # <think>, too
    assert usage.completion_tokens == len(Scripted.script)
    usage = scripted.responses.create(model=NAME, input=QUESTION).usage
    assert usage.output_tokens_details.reasoning_tokens == 1 + thoughts


def test_log_probabilities_of_calls_are_those_of_all_tokens(scripted):
    Scripted.script = answer_ids(reasoning_content="A sum.", tool_calls=[SUM])
    asked = dict(model=NAME, messages=QUESTION, tools=OFFERED, logprobs=True)
    (choice,) = scripted.chat.completions.create(**asked).choices
    streamed = [
        entry.token
        for chunk in scripted.chat.completions.create(stream=True, **asked)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == [entry.token for entry in choice.logprobs.content] and len(streamed) == len(Scripted.script)


def test_the_thinking_switch_is_part_of_the_prompt(client):
    def used(**fields) -> int:
        return client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=1, **fields).usage.prompt_tokens

    plain = len(render_chat(TOKENIZER, QUESTION, add_generation_prompt=True)[0])
    off = len(render_chat(TOKENIZER, QUESTION, add_generation_prompt=True, enable_thinking=False)[0])
    assert off == plain + 2 and used() == plain
    for value, expected in ((False, off), (True, plain + 1), (None, plain)):
        assert used(extra_body={"chat_template_kwargs": {"enable_thinking": value}}) == expected
    for effort, expected in {"none": off, "minimal": off, "low": plain, "high": plain}.items():
        assert used(reasoning_effort=effort) == expected
    assert used(reasoning_effort="high", extra_body={"chat_template_kwargs": {"enable_thinking": False}}) == off


# ---- the model must


class Size(BaseModel):
    width: int = Field(ge=0, le=999)
    unit: Literal["m", "</s>"] | None


class Thing(BaseModel):
    name: str = Field(max_length=6)
    sizes: list[Size] = Field(max_length=2)
    ok: bool


PARAMETERS = Thing.model_json_schema()
MAKE = {"type": "function", "function": {"name": "make", "description": "Make a thing.", "parameters": PARAMETERS}}
OTHER = {"type": "function", "function": {"name": "now"}}
HOT = {"temperature": 1.5, "max_tokens": 300}


def test_a_pydantic_class(client):
    for seed in range(4):
        found = client.chat.completions.parse(
            model=NAME, messages=QUESTION, response_format=Thing, seed=seed, **HOT
        ).choices[0]
        assert found.finish_reason == "stop" and isinstance(found.message.parsed, Thing)
    with client.chat.completions.stream(model=NAME, messages=QUESTION, response_format=Thing, seed=3, **HOT) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == found.message.parsed
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=NAME, messages=QUESTION, response_format=Thing, max_tokens=2)
    answer = client.responses.parse(model=NAME, input="hi", text_format=Thing, temperature=1.5, max_output_tokens=300)
    assert isinstance(answer.output_parsed, Thing) and answer.text.format.type == "json_schema"


def test_json_mode(client):
    end = {str(token): 30.0 for token in encode_text(TOKENIZER, '{}"')}  # so that it comes to an end
    answer = client.chat.completions.create(
        model=NAME, messages=QUESTION, response_format={"type": "json_object"}, logit_bias=end, n=4, **HOT
    )
    assert all(isinstance(json.loads(choice.message.content), dict) for choice in answer.choices)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"tool_choice": "required"}, {"make", "now"}),
        ({"tool_choice": {"type": "function", "function": {"name": "make"}}}, {"make"}),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, {"make", "now"}),
        ({"tool_choice": "required", "reasoning_effort": "none"}, {"make", "now"}),
    ],
    ids=["required", "named", "required and JSON", "required without thinking"],
)
def test_required_calls(client, fields, names, stream):
    found = set()
    for seed in range(3):
        message, finish = ask(
            client,
            stream,
            messages=QUESTION,
            tools=[MAKE, OTHER],
            seed=seed,
            parallel_tool_calls=False,
            **fields,
            **HOT,
        )
        (call,) = message["tool_calls"]
        assert finish == "tool_calls" and not message["content"] and "reasoning_content" not in message
        found.add(call["function"]["name"])
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "make":
            Thing.model_validate(arguments)
        else:
            assert arguments == {}
    assert found <= names


def test_only_tools_that_do_not_fit_are_left_out(server):
    """Whatever else is wrong with a request remains an error, which blames no tools."""
    broken = [{"type": "function", "function": {"name": "f", "description": "half \ud800"}}]
    out_of_order = [*QUESTION, {"role": "tool", "content": "27"}]
    for messages, tools, reason in (QUESTION, broken, "is not Unicode"), (out_of_order, OFFERED, "tool"):
        for keep in ({}, {"truncate_prompt_tokens": -1}):
            body = json.dumps({"model": NAME, "messages": messages, "tools": tools, "max_tokens": 1, **keep}).encode()
            status, headers, answer = server.call("POST", "/v1/chat/completions", body)
            assert status == 400 and reason in json.loads(answer)["error"]["message"], answer
            assert "x-ignored-fields" not in headers


def test_strict_refuses_a_known_field_without_effect():
    """The error does not say that the field is unknown."""
    tools = [{"type": "function", "function": {"name": "f", "strict": True}}]
    with serving(tokenizer=without_tags(), strict=True) as found:
        status, answer = found.chat(tools=tools, max_tokens=4)
    assert status == 400 and answer["error"]["param"] == "tools.function.strict"
    assert "'tools.function.strict' would have no effect here" in answer["error"]["message"]


def test_strict_is_named_where_it_has_no_effect():
    """Where tags are ordinary text, a call that the model is free to make cannot be held to its schema."""
    strict = {"type": "function", "function": {"name": "f", "strict": True}}
    flat = {"type": "function", "name": "f", "strict": True}
    limit = dict(model=NAME, temperature=0)
    with serving(tokenizer=without_tags()) as found:
        for path, asked, name in (
            ("/v1/chat/completions", dict(messages=QUESTION, tools=[strict], max_tokens=4), "tools.function.strict"),
            ("/v1/responses", dict(input="hi", tools=[flat], max_output_tokens=4), "tools.strict"),
        ):
            for choice, ignored in ("auto", name), ("required", None):
                status, headers, _ = found.call("POST", path, limit | asked | {"tool_choice": choice})
                assert status == 200 and headers["x-ignored-fields"] == ignored


def test_tools_of_a_pydantic_class_are_strict(client):
    """As the package offers them; the answer is text, or calls that match."""
    tool = openai.pydantic_function_tool(Thing)
    calls = str(TAGS["<tool_call>"][0])
    for bias in ({calls: 50.0}, {calls: -100.0, str(EOS_ID): 20.0}):
        message = (
            client.chat.completions.parse(
                model=NAME, messages=QUESTION, tools=[tool], logit_bias=bias, parallel_tool_calls=False, **HOT
            )
            .choices[0]
            .message
        )
        if message.tool_calls:
            assert isinstance(message.tool_calls[0].function.parsed_arguments, Thing)
        else:
            assert "tool_call>" not in message.content
        assert bool(message.tool_calls) == (bias[calls] > 0)


def test_logit_bias(client):
    word = encode_text(TOKENIZER, "你好")
    bias = {str(word[0]): 100, str(EOS_ID): -100}
    chat = client.chat.completions.create(model=NAME, messages=QUESTION, logit_bias=bias, max_tokens=4, temperature=0)
    text = client.completions.create(model=NAME, prompt="x", logit_bias=bias, max_tokens=4, temperature=0)
    assert chat.choices[0].message.content == text.choices[0].text == TOKENIZER.decode(word[:1] * 4)


def schema_format(schema: object) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def tool(**function) -> dict:
    return {"type": "function", "function": {"name": "f", **function}}


def nested(depth: int) -> dict:
    return {"type": "array", "items": nested(depth - 1)} if depth else {"type": "null"}


BAD = {
    "a named tool that is not there": ({"tools": [MAKE], "tool_choice": tool()}, "tool_choice", "names the function 'f'"),
    "a named tool without tools": ({"tool_choice": tool()}, "tool_choice", "tools is empty"),
    "required without tools": ({"tool_choice": "required"}, "tool_choice", "tools is empty"),
    "an unknown choice": ({"tools": [MAKE], "tool_choice": "always"}, "tool_choice", '"required"'),
    "two tools of one name": ({"tools": [MAKE, MAKE]}, "tools", "two functions named make"),
    "a name that is none": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "letters"),
    "a tool that is no function": ({"tools": [{"type": "web_search"}]}, "tools", '"type": "function"'),
    "too many tools": ({"tools": [OTHER] * 129}, "tools", "at most 128"),
    "parameters that are no schema": (
        {"tools": [tool(parameters={"properties": {"x": {"type": "foo"}}})], "tool_choice": "required"}, "tools", "foo",
    ),
    "parameters that are no object": (
        {"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters", "of an object",
    ),
    "a strict tool with an unsupported schema": (
        {"tools": [tool(parameters={"type": "object", "if": {}}, strict=True)]}, "tools", "Unimplemented keys",
    ),
    "a schema that is not supported": ({"response_format": schema_format({"not": {}})}, "response_format", "Unimplemented"),
    "a schema from elsewhere": (
        {"response_format": schema_format({"$ref": "http://x.example/y"})}, "response_format", "x.example",
    ),
    "a schema without instances": ({"response_format": schema_format({"enum": []})}, "response_format", "Unsatisfiable"),
    "a schema that is no object": ({"response_format": schema_format([])}, "response_format", "json_schema"),
    "a deep schema": ({"response_format": schema_format(nested(150))}, "response_format", ""),
    "a very deep schema": ({"response_format": schema_format(nested(400))}, "response_format", ""),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format", 'needs a "schema"'),
    "an unknown format": ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
    "a token that does not exist": ({"logit_bias": {"6400": 1}}, "logit_bias", "0 to 6399"),
    "a token that is no id": ({"logit_bias": {"you": 1}}, "logit_bias", "token ids"),
    "a bias out of range": ({"logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"),
    "an unknown effort": ({"reasoning_effort": "huge"}, "reasoning_effort", "high"),
    "a switch that is a text": (
        {"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking", "boolean",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(server, name):
    fields, param, reason = BAD[name]
    status, answer = server.chat(max_tokens=2, **fields)
    assert status == 400, answer
    assert answer["error"]["param"] == param and reason in answer["error"]["message"], answer


def test_an_answer_held_to_a_schema_thinks_first_if_it_is_asked_to(server):
    asked = {"response_format": schema_format({"const": 1}), "chat_template_kwargs": {"enable_thinking": True}}
    status, answer = server.chat(**asked, max_tokens=200, logit_bias={str(TAGS["</think>"][0]): 50}, seed=1)
    assert status == 200 and answer["choices"][0]["message"]["content"] == "1", answer


def test_deep_tools_are_no_error_of_the_server(server):
    parameters = {"type": "object", "properties": {"x": nested(300)}}
    assert server.chat(tools=[tool(parameters=parameters)], max_tokens=2)[0] in (200, 400)
    flat = {"type": "function", "name": "f", "parameters": parameters}
    assert server.post("/v1/responses", input="hi", tools=[flat], max_output_tokens=2)[0] in (200, 400)


def test_an_error_of_the_server_has_an_id_and_is_counted(server, monkeypatch, caplog):
    monkeypatch.setattr("serving.chat.offered_tools", lambda body: 1 / 0)
    body = {"model": NAME, "messages": QUESTION}
    status, headers, text = server.call("POST", "/v1/chat/completions", body)
    assert status == 500 and json.loads(text)["error"]["code"] == "internal_error"
    assert (
        f"an internal error (request {headers['x-request-id']})" in caplog.text and "ZeroDivisionError" in caplog.text
    )
    assert 'status="500"' in str(server.call("GET", "/metrics")[2])


# ---- /v1/responses


def test_responses_with_tools(scripted):
    Scripted.script = answer_ids(content="So: ", reasoning_content="A sum.", tool_calls=[SUM])
    first = scripted.responses.create(model=NAME, input=QUESTION, tools=FLAT)
    assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
    assert first.output[0].content[0].text == "A sum." and first.output_text == "So: " and first.status == "completed"
    call = first.output[2]
    assert {"name": call.name, "arguments": json.loads(call.arguments)} == SUM
    returned = {"type": "function_call_output", "call_id": call.call_id, "output": "27"}
    chat = [*QUESTION, *(item.to_dict() for item in first.output), returned]
    second = scripted.responses.create(model=NAME, input=chat, tools=FLAT)
    answered = {"role": "assistant", "content": "So: ", "reasoning_content": "A sum.", "tool_calls": [SUM]}
    read = with_tools([*QUESTION, answered, {"role": "tool", "content": "27"}], SCHEMAS)
    assert second.output_text == Scripted.answer
    assert second.usage.input_tokens == len(render_chat(TOKENIZER, read, add_generation_prompt=True)[0])
    with scripted.responses.stream(model=NAME, input=QUESTION, tools=FLAT) as stream:
        kinds = [event.type.removeprefix("response.") for event in stream]
        whole = stream.get_final_response()
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    assert whole.output[2].arguments == call.arguments and whole.output_text == "So: "
    assert kinds[-6:] == ["output_item.done", "output_item.added", "function_call_arguments.delta",
                          "function_call_arguments.done", "output_item.done", "completed"]  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True])
def test_the_log_probabilities_of_a_response_are_those_of_its_text(scripted, streamed):
    Scripted.script = answer_ids(content="So: ", reasoning_content="A sum.", tool_calls=[SUM])
    asked = dict(model=NAME, input=QUESTION, tools=FLAT, include=["message.output_text.logprobs"])
    if streamed:
        with scripted.responses.stream(**asked) as stream:
            answer = stream.get_final_response()
    else:
        answer = scripted.responses.create(**asked)
    thoughts, message, _ = answer.output
    assert thoughts.status == "completed"
    assert "".join(entry.token for entry in message.content[0].logprobs) == "So: "


def test_responses_with_required_calls(client):
    make = {"type": "function", **MAKE["function"]}
    answer = client.responses.create(
        model=NAME, input="hi", tools=[make], tool_choice={"type": "function", "name": "make"}, parallel_tool_calls=False,
        temperature=1.5, max_output_tokens=300,
    )  # fmt: skip
    (call,) = answer.output
    Thing.model_validate_json(call.arguments)
    with pytest.raises(openai.BadRequestError, match="text is not supported.*Unimplemented"):
        client.responses.create(
            model=NAME, input="hi", text={"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}
        )
