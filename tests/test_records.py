"""data_pipeline/records.py: every format becomes the same messages, and nothing unsound gets through."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data_pipeline.readers import iter_records
from data_pipeline.records import (
    CHAT_COLUMNS,
    PREFERENCE_COLUMNS,
    WrongStage,
    check_columns,
    parse_conversation,
    parse_preference,
)
from model.chat_format import check_messages, message_text

DATA = Path(os.environ.get("MINIMIND_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def chat(*texts, roles=("user", "assistant"), system=None):
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def sharegpt(messages):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


def pairs(messages):
    texts = [m["content"] for m in messages]
    return [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]


# Every way to write the chat of these messages (without a system message); contents are kept to the last blank.
FORMATS = {
    "messages": lambda m: {"messages": m},
    "messages as text": lambda m: {"messages": json.dumps(m)},
    "from/value": lambda m: {"conversations": sharegpt(m)},
    "conversations, role/content": lambda m: {"conversations": m},
    "q,a and JSON": lambda m: {"history": json.dumps(pairs(m)[:-1]), "q": m[-2]["content"], "a": m[-1]["content"]},
    "q,a and Python": lambda m: {"history": repr(pairs(m)[:-1]), "q": m[-2]["content"], "a": m[-1]["content"]},
    "instruction": lambda m: {
        "instruction": m[-2]["content"].strip(),
        "input": "",
        "output": m[-1]["content"],
        "history": pairs(m)[:-1],
    },
    **{
        f"{ask},{answer}": lambda m, ask=ask, answer=answer: {
            "history": pairs(m)[:-1],
            ask: m[-2]["content"],
            answer: m[-1]["content"],
        }
        for ask, answer in [("question", "answer"), ("prompt", "response"), ("prompt", "completion")]
    },
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("messages", [chat("q", " a\n"), chat("你好", "'\"</s>", "c\nd", "e,\\"), chat(*"abcdef")])
def test_every_format_reads_as_the_same_messages(name, messages):
    assert parse_conversation(FORMATS[name](messages)) == messages


def test_system_messages():
    expected = chat("q", "a", system="be kind")
    assert parse_conversation({"messages": expected}) == expected
    assert parse_conversation({"conversations": sharegpt(expected)}) == expected
    assert parse_conversation({"system": "be kind", "conversations": sharegpt(chat("q", "a"))}) == expected
    assert parse_conversation({"system": "be kind", "instruction": "q", "output": "a"}) == expected
    # one that says nothing is rendered as nothing
    empty = [{"role": "system", "content": ""}, *chat("q", "a")]
    assert parse_conversation({"messages": empty, "system": ""}) == chat("q", "a")


@pytest.mark.parametrize("history", ["", " ", "[]", "nan", "NaN", None, [], float("nan"), "None", "null"])
def test_no_history(history):
    assert parse_conversation({"history": history, "q": "q", "a": "a"}) == chat("q", "a")
    assert parse_conversation({"q": "q", "a": "a"}) == chat("q", "a")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"messages": chat("a", "q", roles=("assistant", "user"))}, r"out of order: assistant; messages\[0\] must be"),
        (
            {"messages": chat("q", "r", roles=("user", "user"))},
            r"out of order: user user; messages\[1\] must be assistant",
        ),
        (
            {"messages": chat("q", "a", "q", "a")[:3]},
            "out of order: user assistant user; the last must be assistant$",
        ),
        ({"messages": [*chat("q", "a"), *chat("b", roles=("assistant", ""))]}, r"messages\[2\] must be user"),
        ({"messages": [*chat("q", "a"), *chat("q", "a", system="s")]}, "out of order: user assistant system"),
        ({"messages": [{"role": "system", "content": "s"}]}, "out of order: system"),
        ({"messages": [{"role": "system", "content": ""}]}, "out of order: no messages"),
        ({"messages": chat("q", "a"), "system": "s", "q": 1}, None),
        ({"messages": chat("q", "a", system="s"), "system": "t"}, "out of order: system system"),
        ({"messages": chat("q", "a", roles=("user", "bot"))}, "unknown role 'bot'"),
        (
            {"messages": chat("q", "a", roles=("user", "tool"))},
            r"order: user tool; messages\[1\] must be assistant; a tool",
        ),
        ({"messages": [{"role": ["user"], "content": "q"}]}, "unknown role"),
        ({"messages": [{"role": None, "content": "q"}]}, "unknown role None"),
        ({"messages": [{"content": "q"}]}, "unknown role None"),
        ({"messages": chat("q", "")}, "an empty assistant message"),
        ({"messages": chat(" \n", "a")}, "an empty user message"),
        ({"messages": chat("q", None)}, "an empty assistant message"),
        ({"messages": chat("q", ["a"])}, "content is not a text but list"),
        ({"messages": [{"role": "user"}, {"role": "assistant"}]}, "no content; the fields are role"),
        ({"messages": {"role": "user"}}, "not a list of messages"),
        ({"messages": chat("q", "a\0")}, "a NUL character"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "unknown role 'bot'"),
        ({"q": "q", "a": ""}, "an empty assistant message"),
        ({"q": "", "a": "a"}, "an empty user message"),
        ({"q": "q"}, "no question and answer; the fields are q"),
        ({"prompt": "q", "response": None}, "an empty assistant message"),
        ({"instruction": "", "input": " ", "output": "a"}, "an empty user message"),
        ({"instruction": "q"}, "no question and answer; the fields are instruction"),
        ({"text": "q"}, "no question and answer; the fields are text"),
        ({"history": "[['a']]", "q": "q", "a": "a"}, "not a list of .question, answer. pairs"),
        ({"history": "{1: 2}", "q": "q", "a": "a"}, "not a list of"),
        ({"history": "[['a', 1]]", "q": "q", "a": "a"}, "not a list of"),
        ({"history": '[["a", "b"]', "q": "q", "a": "a"}, "neither JSON nor a Python list"),
        ({"history": "[" * 20000, "q": "q", "a": "a"}, "neither JSON nor a Python list"),
        ({"history": "__import__('os').abort()", "q": "q", "a": "a"}, "neither JSON nor a Python list"),
        ({"history": '[["\\ud800", "b"]]', "q": "q", "a": "a"}, "half of a surrogate pair in history"),
        ({"history": [["a", ""]], "q": "q", "a": "a"}, "an empty turn in the history"),
        ({"messages": chat([{"type": "text"}], "a")}, "no text; the fields are type"),
        ({"messages": chat(["q"], "a")}, "content is not a text but list"),
        ({"messages": chat([{"type": "image_url", "image_url": {}}], "a")}, "a part of type image_url"),
    ],
)
def test_unsound_chats(data, reason):
    if reason is None:
        parse_conversation(data)
        return
    with pytest.raises(UserError, match=reason):
        parse_conversation(data)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"chosen": "a", "rejected": "b"}, "preference pairs .chosen, rejected. are for 5-dpo_train.py"),
        ({"label": False}, "label is false: an example of what not to answer"),
        ({"label": "False"}, "label is false"),
        ({"kto_tag": False}, "kto_tag is false"),
        ({"images": ["cat.jpg"]}, "it has images, and a model of text"),
        ({"image_bytes": "a picture"}, "it has image_bytes, and a model of text"),
        ({"image": "cat.jpg"}, "it has image, "),
        ({"label": True, "kto_tag": None, "images": [], "image": "", "videos": "[]", "chosen": None}, None),
    ],
)
def test_rows_for_another_kind_of_training(more, reason):
    """Each has a dialogue in it, which must not be learned."""
    for row in (FORMATS["messages"](chat("<image>q", "a")), {"prompt": "<image>q", "completion": "a"}):
        if reason is None:
            assert parse_conversation(row | more) == chat("<image>q", "a")
        else:
            with pytest.raises(WrongStage, match=reason):
                parse_conversation(row | more)
    if "images" in more:
        pair = {"prompt": "<image>q", "chosen": "a", "rejected": "b"}
        assert parse_preference(pair | {"images": []})
        with pytest.raises(WrongStage, match="it has images"):
            parse_preference(pair | {"images": ["cat.jpg"]})


TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"x": i}}} for i in (1, 2)]
TOOL_CHAT = [
    {"role": "system", "content": "s", "tools": [TOOL]},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "wait", "reasoning_content": "hm", "tool_calls": CALLS},
    {"role": "tool", "content": "[3]"},
    {"role": "tool", "content": ""},
    {"role": "assistant", "content": "a", "reasoning_content": ""},
]


def openai(chat):
    """As its API has it: a tools field, arguments as JSON, null for no content, ids."""
    (system, *turns), tools = chat, [{"type": "function", "function": TOOL}]
    messages = [{"role": "system", "content": system["content"]}]
    for message in turns:
        calls = [
            {
                "id": "c",
                "type": "function",
                "function": {"name": "add", "arguments": json.dumps(call["function"]["arguments"])},
            }
            for call in message.get("tool_calls", [])
        ]
        messages.append(
            message
            | ({"tool_calls": calls} if calls else {})
            | ({"tool_call_id": "c"} if message["role"] == "tool" else {})
        )
    return {"messages": messages, "tools": tools}


def original(chat):
    """As the original MiniMind: tools in the system message and calls as JSON, and every message has all fields."""
    fields = {"content": "", "reasoning_content": None, "tools": None, "tool_calls": None}
    messages = [
        fields | {key: json.dumps(value) if key in ("tools", "tool_calls") else value for key, value in message.items()}
        for message in chat
    ]
    return {"conversations": messages}


def typed_parts(chat):
    (system, *turns), messages = chat, []
    for message in turns:
        parts = []
        if "reasoning_content" in message:
            parts.append({"type": "reasoning", "value": message["reasoning_content"]})
        parts.append({"type": "text", "value": message["content"]})
        parts += [
            {"type": "tool_call", "value": json.dumps(call["function"])} for call in message.get("tool_calls", [])
        ]
        messages.append({"role": message["role"], "content": parts})
    return {"system": system["content"], "messages": messages, "tools": json.dumps([TOOL])}


def unwrapped(messages):
    """Without OpenAI's wrapping of tools, which says nothing."""
    if messages[0].get("tools"):
        tools = [tool.get("function", tool) for tool in messages[0]["tools"]]
        messages = [messages[0] | {"tools": tools}, *messages[1:]]
    return messages


@pytest.mark.parametrize("form", [openai, original, typed_parts])
def test_thinking_and_tools_in_every_form(form):
    assert unwrapped(parse_conversation(form(TOOL_CHAT))) == TOOL_CHAT


@pytest.mark.parametrize("calls", [CALLS, CALLS[:1]])
def test_function_call_and_observation(calls):
    """LLaMA-Factory's: a turn of its own for a call or a list of calls, and the tools as JSON."""
    values = [call["function"] for call in calls]
    turns = [("human", "q"), ("function_call", json.dumps(values if len(values) > 1 else values[0]))]
    turns += [("observation", "[3]"), ("gpt", "a")]
    row = {"conversations": [{"from": name, "value": text} for name, text in turns], "tools": json.dumps([TOOL])}
    assert parse_conversation(row) == [
        {"role": "system", "content": "", "tools": [TOOL]},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "[3]"},
        {"role": "assistant", "content": "a"},
    ]


def asked(message, **more):
    return {"messages": [*chat("q"), {"role": "assistant", "content": ""} | message], **more}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"conversations": [*sharegpt(chat("q", "a")), {"from": "observation", "value": "3"}]},
         "order: user assistant tool; .* a tool message must follow an answer with tool_calls"),
        (asked({"tool_calls": CALLS}, messages=[*chat("q"), {"role": "assistant", "tool_calls": CALLS}, *chat("r", "a")]),
         r"order: user tool_calls user; messages\[2\] must be tool"),
        (asked({"content": "a", "tool_calls": "add(1)"}), "a tool call is neither JSON nor a Python list"),
        (asked({"tool_calls": [{"function": {"arguments": {}}}]}), "a tool call has no name: {'function'"),
        (asked({"tool_calls": [{"name": " "}]}), "a tool call has no name"),
        (asked({"tool_calls": ["add"]}), "a tool call has no name: 'add'"),
        (asked({"tool_calls": [{"name": "add", "arguments": "x=1"}]}), "the argument list of add is neither JSON"),
        (asked({"tool_calls": [{"name": "add", "arguments": "[1]"}]}), r"the arguments of add are no object: \[1\]"),
        (asked({"reasoning_content": "hm"}), "an empty assistant message"),
        (asked({"content": "a", "reasoning_content": 1}), "reasoning_content is not a text: 1"),
        (asked({"content": "a", "reasoning_content": "\0"}), "a NUL character in reasoning_content"),
        (asked({"content": [{"type": "text", "text": "a"}, {"type": "reasoning", "value": "hm"}]}),
         "a part of type reasoning behind the text or the calls"),
        (asked({"content": [{"type": "tool_call", "value": "{"}]}), "a tool call is neither JSON"),
        ({"messages": [{"role": "tool", "content": ""}, *chat("q", "a")]}, "order: tool; .* must be system or user"),
        (asked({"content": "a"}, tools="[1]"), "tools is not a list of functions"),
        (asked({"content": "a"}, tools={"name": "add"}), "tools is not a list of functions"),
        (asked({"content": "a"}, tools=[{"type": "function"}]), "tools is not a list of functions with a name"),
        ({"messages": TOOL_CHAT, "tools": [TOOL]}, "tools are listed twice"),
        ({"messages": [chat("q")[0] | {"tools": [TOOL]}, *chat("q", "a")[1:]]}, "has tools, and only system messages may"),
        ({"messages": [chat("q")[0] | {"reasoning_content": "hm"}, *chat("q", "a")[1:]]}, "has reasoning_content"),
    ],
)  # fmt: skip
def test_unsound_thinking_and_tools(data, reason):
    with pytest.raises(UserError, match=reason):
        parse_conversation(data)


def test_tools_in_preference_pairs():
    with pytest.raises(UserError, match="a list of functions with a name"):
        nameless = [{"role": "system", "content": "", "tools": [{"type": "function"}]}, *chat("q", "a")]
        parse_preference({"prompt": "q", "chosen": nameless, "rejected": "b"})
    prompt = TOOL_CHAT[:-1]
    row = {"prompt": prompt[1:], "system": "s", "tools": [TOOL], "chosen": "a", "rejected": "b"}
    assert parse_preference(row) == (prompt, "a", "b")
    for answer in ({"role": "assistant", "content": "", "tool_calls": CALLS}, TOOL_CHAT[2]):
        with pytest.raises(WrongStage, match="chosen thinks or calls a tool, and preference training compares texts"):
            parse_preference({"prompt": "q", "chosen": answer, "rejected": "b"})


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("glaive_toolcall_en_demo.json", {}),
        (
            "glaive_toolcall_zh_demo.json",
            {198: "order: system user assistant tool; messages[3] must be user; a tool message"},
        ),
        ("reason_tool_use_demo.jsonl", {}),
    ],
)
def test_real_tool_data(name, refused):
    path = DATA / "tools" / name
    if not path.is_file():
        pytest.skip("needs the real data")
    found, n_calls = {}, 0
    for record in iter_records(path, lambda bad: found.update({bad.line: bad.reason})):
        try:
            n_calls += sum(bool(message.get("tool_calls")) for message in parse_conversation(record.data))
        except UserError as error:
            found[record.line] = str(error)
    assert n_calls > 30
    assert found.keys() == refused.keys()
    assert all(refused[line] in reason for line, reason in found.items())


def test_a_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert parse_conversation({"messages": chat(parts, "c")}) == chat("a b", "c")


KEYS = [
    "role",
    "content",
    "from",
    "value",
    "type",
    "name",
    "arguments",
    "function",
    "tools",
    "tool_calls",
    "reasoning_content",
]
junk = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "tool", "function_call", "[1]", "[{}]", '{"name": "f"}']),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(KEYS), values, max_size=3),
    max_leaves=8,
)
names = ["messages", "conversations", "history", "q", "a", "instruction", "input", "output", "system", "tools"]


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*names, "prompt", "chosen", "rejected"]), junk, max_size=5))
def test_any_row_is_sound_or_malformed(data):
    for parse in (parse_conversation, parse_preference):
        try:
            result = parse(data)
        except UserError:
            continue
        messages = result if parse is parse_conversation else result[0]
        check_messages(messages, answered=parse is parse_conversation)
        assert all(message_text(m).strip() for m in messages)


def test_unusable_files(tmp_path):
    (tmp_path / "a.csv").write_text("topic,remark\n1,2\n", encoding="utf-8")
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\n1,2,3\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("x\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("", encoding="utf-8")
    for name, reason in [
        ("a.csv", "needs the columns q,a or .*but this file has topic, remark; name a file that has them"),
        ("pairs.csv", "needs the columns q,a or .*but this file has prompt, .*; preference pairs .* 5-dpo_train.py"),
        ("a.txt", "plain text has no fields"),
        ("a.jsonl", "the file is empty"),
        ("b.jsonl", "no such file"),
    ]:
        with pytest.raises(UserError, match=reason):
            check_columns(tmp_path / name, CHAT_COLUMNS)
    with pytest.raises(UserError, match="needs the columns chosen,rejected"):
        check_columns(tmp_path / "a.csv", PREFERENCE_COLUMNS)


# --- preference pairs ---


@pytest.mark.parametrize(
    "data",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": chat("q"), "chosen": "a", "rejected": "b"},
        {"prompt": json.dumps(chat("q")), "chosen": "a", "rejected": "b"},
        {
            "prompt": sharegpt(chat("q")),
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {
            "conversations": sharegpt(chat("q")),
            "chosen": {"role": "assistant", "content": "a"},
            "rejected": [{"role": "assistant", "content": "b"}],
        },
        {"prompt": "q", "chosen": chat("q", "a"), "rejected": chat("q", "b")},
        {"chosen": chat("q", "a"), "rejected": chat("q", "b")},
        {"prompt": "q", "messages": chat("q", "a"), "chosen": chat("q", "a"), "rejected": chat("q", "b")},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    ],
)
def test_preference_formats(data):
    assert parse_preference(data) == (chat("q"), "a", "b")


def test_preference_prompts():
    turns = chat("q", "a", "r", system="s")
    assert parse_preference({"prompt": turns, "chosen": "c", "rejected": "d"})[0] == turns
    row = {"system": "s", "history": [["q", "a"]], "instruction": "r", "chosen": "c", "rejected": "d"}
    assert parse_preference(row)[0] == turns
    row["prompt"] = row.pop("instruction")
    assert parse_preference(row)[0] == turns
    # a text may begin like a list
    for text in ("[INST] hi", "[1, 2, 3]: the sum?", "[]"):
        row = {"prompt": text, "chosen": "[a]", "rejected": "[b]"}
        assert parse_preference(row) == (chat(text), "[a]", "[b]")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a\n"}, "chosen and rejected are the same"),
        ({"prompt": "q", "chosen": "", "rejected": "a"}, "chosen is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": {"from": "gpt", "value": " "}}, "rejected is empty"),
        ({"prompt": "q", "chosen": "a"}, "no rejected"),
        ({"prompt": "q", "chosen": 1, "rejected": "a"}, "chosen is not a text but int"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "the prompt is empty"),
        ({"prompt": "q", "chosen": {"from": "human", "value": "a"}, "rejected": "b"}, "chosen is a user message"),
        ({"prompt": "q", "chosen": {"from": "x", "value": "a"}, "rejected": "b"}, "unknown role 'x'"),
        (
            {"prompt": chat("q", "x"), "chosen": "a", "rejected": "b"},
            "out of order: user assistant; the last must be user",
        ),
        ({"prompt": chat("q", "r", roles=("user", "user")), "chosen": "a", "rejected": "b"}, r"messages\[1\] must be"),
        ({"chosen": "a", "rejected": "b"}, "no prompt, or an empty one"),
        ({"prompt": "p", "chosen": chat("q", "a"), "rejected": "b"}, "repeat another prompt"),
        ({"chosen": chat("q", "a"), "rejected": chat("p", "b")}, "repeat another prompt"),
    ],
)
def test_unsound_preferences(data, reason):
    with pytest.raises(UserError, match=reason):
        parse_preference(data)
