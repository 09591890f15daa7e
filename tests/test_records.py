"""data_pipeline/records.py: every format becomes the same messages, and nothing unsound gets through."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data_pipeline.records import (
    CHAT_COLUMNS,
    WrongStage,
    check_columns,
    iter_preferences,
    parse_conversation,
    parse_preference,
)


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
        ({"messages": chat("q", "a", roles=("user", "tool"))}, "unknown role 'tool'"),
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


def test_a_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert parse_conversation({"messages": chat(parts, "c")}) == chat("a b", "c")


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "[1]", "[{}]"]),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), values, max_size=2)
    ),
    max_leaves=8,
)
names = ["messages", "conversations", "history", "q", "a", "instruction", "input", "output", "system"]


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*names, "prompt", "chosen", "rejected"]), junk, max_size=5))
def test_any_row_is_sound_or_malformed(data):
    for parse in (parse_conversation, parse_preference):
        try:
            result = parse(data)
        except UserError:
            continue
        messages = result if parse is parse_conversation else result[0]
        turns = [m["role"] for m in messages if m["role"] != "system"]
        assert turns == (["user", "assistant"] * len(turns))[: len(turns)]
        assert turns[-1] == ("assistant" if parse is parse_conversation else "user")
        assert all(m["content"].strip() for m in messages)


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
        list(iter_preferences(tmp_path / "a.csv", lambda bad: None))


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
            {"prompt": chat("q", "a"), "chosen": "a", "rejected": "b"},
            "out of order: user assistant; the last must be user",
        ),
        ({"prompt": chat("q", "r", roles=("user", "user")), "chosen": "a", "rejected": "b"}, r"messages\[1\] must be"),
        ({"chosen": "a", "rejected": "b"}, "out of order: no messages"),
        ({"prompt": "p", "chosen": chat("q", "a"), "rejected": "b"}, "repeat another prompt"),
        ({"chosen": chat("q", "a"), "rejected": chat("p", "b")}, "repeat another prompt"),
    ],
)
def test_unsound_preferences(data, reason):
    with pytest.raises(UserError, match=reason):
        parse_preference(data)


def test_preference_files(tmp_path):
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"conversations": sharegpt(chat("r")), "chosen": {"from": "gpt", "value": "c"}, "rejected": "d"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name in ("a.json", "a.jsonl"):
        bad = []
        found = list(iter_preferences(tmp_path / name, bad.append))
        assert [(p.line, p.prompt_messages, p.chosen, p.rejected) for p in found] == [
            (1, chat("q"), "a", "b"),
            (3, chat("r"), "c", "d"),
        ]
        assert [(b.line, b.reason) for b in bad] == [(2, "chosen and rejected are the same")]
