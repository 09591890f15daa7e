"""cleaning.py and dedupe.py: what is kept, what is dropped and why, and that nothing is lost."""

import csv
import errno
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data_pipeline import cleaning
from data_pipeline.cleaning import STAGES, CleaningOptions, Filtered, clean, dpo_row, pretrain_row, sft_row
from data_pipeline.dedupe import KeySet, content_key
from data_pipeline.text_files import BadLineLog


def fields(row):
    """The columns of a CSV line of `sft_row`, the history parsed."""
    ((history, q, a),) = csv.reader([row.line])
    return json.loads(history), q, a


def chat(*texts, roles=("user", "assistant")):
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


# --- rows ---


def test_pretrain_row():
    assert pretrain_row({"text": ' a "b"\n '}, CleaningOptions()).line == '"a ""b"""'
    assert pretrain_row({"text": "x" * 512}, CleaningOptions()).line
    assert pretrain_row({"text": "x" * 999}, CleaningOptions(max_chars=0)).line
    for text, options, reason in [
        ("x" * 513, CleaningOptions(), "longer than 512 characters"),
        (" \n", CleaningOptions(min_chars=0), "shorter than 1 characters"),
        ("abc", CleaningOptions(min_chars=4), "shorter than 4 characters"),
        ("春天来了 abc", CleaningOptions(min_chinese_ratio=0.6), "less than 60% Chinese"),
    ]:
        with pytest.raises(Filtered, match=reason):
            pretrain_row({"text": text}, options)
    assert pretrain_row({"text": "春天来了 abc"}, CleaningOptions(min_chinese_ratio=0.5)).line
    for data, reason in [
        ({"body": "x"}, "no text; the fields are body"),
        ({"text": 1}, "not a text but int"),
        ({"text": "a\0"}, "NUL"),
    ]:
        with pytest.raises(match=reason):
            pretrain_row(data, CleaningOptions())


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"instruction": "翻译：", "input": "hello", "output": "你好", "history": []}, ([], "翻译：\nhello", "你好")),
        ({"instruction": "", "input": " hi there ", "output": " yo "}, ([], "hi there", "yo")),
        (
            {"instruction": "go on", "input": None, "output": "ok", "history": [["a ", "b"]]},
            ([["a", "b"]], "go on", "ok"),
        ),
        ({"history": '[["a", "b"]]', "q": "cc", "a": "d"}, ([["a", "b"]], "cc", "d")),
        ({"history": "[['a', 'b']]", "q": "cc", "a": "d"}, ([["a", "b"]], "cc", "d")),
        ({"history": "", "q": "cc", "a": "d"}, ([], "cc", "d")),
        ({"messages": chat("aa", "b", "cc", "d")}, ([["aa", "b"]], "cc", "d")),
        ({"conversations": [{"from": "human", "value": "aa"}, {"from": "gpt", "value": "b"}]}, ([], "aa", "b")),
    ],
)
def test_sft_formats(data, expected):
    assert fields(sft_row(data, CleaningOptions())) == expected


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"messages": chat("a", "b", roles=("user", "bot"))}, "unknown role 'bot'"),
        ({"messages": chat("b", "a", roles=("assistant", "user"))}, "roles out of order: assistant"),
        ({"messages": chat("a", "b", "c")}, "out of order: user assistant user"),
        ({"messages": chat("a", "b", roles=("user", "user"))}, "out of order: user user"),
        ({"messages": chat("a", " ")}, "an empty assistant message"),
        ({"messages": [{"role": "system", "content": "s"}, *chat("a", "b")]}, "system message"),
        ({"messages": ["a", "b"]}, "not an object with a role"),
        ({"messages": "a, b"}, "neither JSON nor a Python list"),
        ({"system": "s", "instruction": "a", "output": "b"}, "system message"),
        ({"history": [["a"]], "q": "c", "a": "d"}, "history is not a list"),
        ({"history": "__import__('os').abort()", "q": "c", "a": "d"}, "history is neither JSON nor"),
        ({"history": [["a", ""]], "q": "c", "a": "d"}, "empty turn"),
        ({"question": "c"}, "no question and answer; the fields are question"),
        ({"q": ["c"], "a": "d"}, "q is not a text but list"),
        ({"prompt": "c", "completion": "d", "label": False}, "label is false"),
    ],
)
def test_sft_malformed(data, reason):
    with pytest.raises(match=reason):
        sft_row(data, CleaningOptions())


def test_sft_filters_and_history():
    row = {"q": "问题一二", "a": "答案", "history": [["x", "y"]]}
    for options, reason in [
        (CleaningOptions(min_q_chars=5), "question shorter than 5"),
        (CleaningOptions(min_a_chars=3), "answer shorter than 3"),
        (CleaningOptions(max_chars=3), "question longer than 3"),
    ]:
        with pytest.raises(Filtered, match=reason):
            sft_row(row, options)
    with pytest.raises(Filtered, match="answer less than 90% Chinese"):
        sft_row({**row, "a": "答案 in part"}, CleaningOptions(min_chinese_ratio=0.9))
    with pytest.raises(Filtered, match="answer shorter than 1"):  # an empty answer is never kept
        sft_row({**row, "a": " "}, CleaningOptions(min_a_chars=0))
    single = {**row, "history": []}
    outputs = {
        (h, bool(r["history"])): sft_row(r, CleaningOptions(history=h)).outputs
        for h in ("keep", "drop", "only")
        for r in (row, single)
    }
    assert outputs == {
        ("keep", True): (1,), ("keep", False): (0, 1),
        ("drop", True): (0,), ("drop", False): (0,),
        ("only", True): (1,), ("only", False): (0,),
    }  # fmt: skip
    assert fields(sft_row(row, CleaningOptions(history="drop")))[0] == []


@pytest.mark.parametrize(
    "data",
    [
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"prompt": "q", "chosen": "a", "rejected": " b "},
        {
            "prompt": chat("q"),
            "chosen": chat("a", roles=("assistant", "")),
            "rejected": chat("b", roles=("assistant", "")),
        },
        {"chosen": chat("q", "a"), "rejected": chat("q", "b")},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
    ],
)
def test_dpo_formats(data):
    assert json.loads(dpo_row(data, CleaningOptions()).line) == {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a "}, "chosen and rejected are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "rejected is empty"),
        ({"prompt": "q", "chosen": "a"}, "no rejected"),
        ({"prompt": "q", "chosen": {"role": "user", "content": "a"}, "rejected": "b"}, "chosen is a user message"),
        ({"prompt": chat("q", "x"), "chosen": "a", "rejected": "b"}, "out of order"),
        ({"chosen": "a", "rejected": "b"}, "no prompt, or an empty one"),
        ({"chosen": chat("q", "a"), "rejected": chat("p", "b")}, "repeat another prompt"),
    ],
)
def test_dpo_malformed(data, reason):
    with pytest.raises(match=reason):
        dpo_row(data, CleaningOptions())


# --- duplicates ---


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=200))
def test_key_set_equals_a_set(tmp_path_factory, numbers):
    seen = set()
    with KeySet(tmp_path_factory.getbasetemp()) as keys:
        for number in numbers:
            assert keys.add(content_key(str(number))) == (number not in seen)
            seen.add(number)


def test_key_set_larger_than_its_cache_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(KeySet, "CACHE_KB", 64)
    with KeySet(tmp_path) as keys:
        for i in range(20_000):
            assert keys.add(content_key(f"text {i}"))
        assert not any(keys.add(content_key(f"text {i}")) for i in range(20_000))
        if os.name != "nt":
            assert not list(tmp_path.iterdir())  # a killed process leaves nothing
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
@pytest.mark.parametrize("kind", ["limit", "pages"])
def test_key_set_on_a_full_disk_is_an_os_error(tmp_path, monkeypatch, kind):
    import resource

    monkeypatch.setattr(KeySet, "CACHE_KB", 64)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with KeySet(tmp_path) as keys, pytest.raises(OSError) as error:  # noqa: PT012
            if kind == "pages":
                keys.database.execute("PRAGMA max_page_count=100")
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
            for i in range(100_000):
                keys.add(content_key(f"text {i}"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.ENOSPC


# --- pipeline ---


def dump(path: Path, rows) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def read_csv(path: Path) -> list[dict]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_output_is_the_same_for_any_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning, "BYTES_PER_WORKER", 1)
    rows = [{"text": f"row {i % 9_000} " + "x" * (i % 9_000 % 97)} for i in range(20_000)]
    inputs = [dump(tmp_path / "a.jsonl", rows[:12_000] + ["broken"]), dump(tmp_path / "b.jsonl", rows[12_000:])]
    results = []
    for workers in (0, 1, 3):
        summary = clean(STAGES["pretrain"], inputs, tmp_path / str(workers), CleaningOptions(), workers)
        results.append(
            (
                summary.kept,
                summary.dropped,
                summary.bad.first,
                (tmp_path / str(workers) / "pretrain_data.csv").read_bytes(),
            )
        )
    assert results[0] == results[1] == results[2]
    expected = list(dict.fromkeys(row["text"].strip() for row in rows))
    assert [row["text"] for row in read_csv(tmp_path / "3" / "pretrain_data.csv")] == expected
    assert results[0][1] == {"duplicate": 11_000, "cannot be read": 1}
    assert results[0][2] == [f"{inputs[0]}:12001: invalid JSON: Expecting value at character 1"]


@pytest.mark.skipif(not hasattr(os, "getpgrp"), reason="needs process groups")
def test_a_signal_to_the_group_leaves_the_workers_to_the_main_process():
    """Killed while one sends a result, it would leave Python waiting for the rest for ever."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=cleaning._start_worker) as pool:
        assert pool.submit(os.getpgrp).result() not in (os.getpgrp(), 0)


def test_rejects_list_every_bad_line_and_vanish_with_them(tmp_path):
    path = dump(tmp_path / "a.jsonl", ["{"] * 25 + [{"body": 1}, {"text": "good"}])
    summary = clean(STAGES["pretrain"], [path], tmp_path, CleaningOptions(), 0)
    assert (summary.kept, summary.bad.count, len(summary.bad.first)) == (1, 26, BadLineLog.LISTED)
    listed = [json.loads(line) for line in summary.rejects.read_text(encoding="utf-8").splitlines()]
    assert [row["line"] for row in listed] == list(range(1, 27))
    assert listed[-1] == {"file": str(path), "line": 26, "reason": "no text; the fields are body"}
    clean(STAGES["pretrain"], [dump(path, [{"text": "good"}])], tmp_path, CleaningOptions(), 0)
    assert not summary.rejects.exists()


def test_sft_files(tmp_path):
    rows = [{"q": "q1 ?", "a": 'a "1"', "history": []}, {"q": "q2 ?", "a": "a2", "history": [["h", "i"]]}]
    clean(STAGES["sft"], [dump(tmp_path / "a.jsonl", rows)], tmp_path, CleaningOptions(), 0)
    assert [row["q"] for row in read_csv(tmp_path / "sft_data_single.csv")] == ["q1 ?"]
    assert read_csv(tmp_path / "sft_data.csv") == [
        {"history": "[]", "q": "q1 ?", "a": 'a "1"'},
        {"history": '[["h", "i"]]', "q": "q2 ?", "a": "a2"},
    ]
    before = (tmp_path / "sft_data.csv").read_bytes()
    summary = clean(STAGES["sft"], [tmp_path / "a.jsonl"], tmp_path, CleaningOptions(history="drop"), 0)
    assert [row["q"] for row in read_csv(tmp_path / "sft_data_single.csv")] == ["q1 ?", "q2 ?"]
    assert (tmp_path / "sft_data.csv").read_bytes() == before
    assert f"no rows for {tmp_path / 'sft_data.csv'}: left as it was" in summary.written


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_killed_process_left_is_deleted_where_it_is_known_to_be_dead(tmp_path, monkeypatch, locks):
    def no_locks(*_, **__):
        raise NotImplementedError("no locks here")

    if not locks:
        monkeypatch.setattr("common.files.FileLock.acquire", no_locks)
    names = (".sft_data.csv.12345678.tmp", ".sft_data_single.csv.12345678.tmp", ".sft_data.rejects.jsonl.12345678.tmp")
    for name in (*names, ".other.csv.12345678.tmp"):
        (tmp_path / name).write_text("half", encoding="utf-8")
    path = dump(tmp_path / "a.jsonl", [{"q": "q1 ?", "a": "a1"}])
    clean(STAGES["sft"], [path], tmp_path, CleaningOptions(), 0)
    left = {path.name for path in tmp_path.glob(".*.tmp")}
    assert left == ({".other.csv.12345678.tmp"} if locks else {*names, ".other.csv.12345678.tmp"})


def test_dpo_merges_lists(tmp_path):
    pairs = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(pairs[:3], indent=2), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(pairs[2:]), encoding="utf-8")
    summary = clean(STAGES["dpo"], [tmp_path / "a.json", tmp_path / "b.json"], tmp_path, CleaningOptions(), 0)
    merged = json.loads((tmp_path / "dpo" / "train_data.json").read_text(encoding="utf-8"))
    assert [row["conversations"][0]["value"] for row in merged] == ["p0", "p1", "p2", "p3", "p4"]
    assert summary.dropped == {"duplicate": 1}


def test_no_dedupe(tmp_path):
    path = dump(tmp_path / "a.jsonl", [{"text": "same"}] * 3)
    assert clean(STAGES["pretrain"], [path], tmp_path, CleaningOptions(dedupe=False), 0).kept == 3
    assert clean(STAGES["pretrain"], [path], tmp_path, CleaningOptions(), 0).kept == 1


def test_nothing_valid_leaves_the_old_output(tmp_path):
    old = tmp_path / "pretrain_data.csv"
    old.write_text("text\nold\n", encoding="utf-8")
    path = dump(tmp_path / "a.jsonl", ['{"text": "cut of', {"text": "x" * 600}])
    with pytest.raises(
        UserError, match=r"no valid rows in .*a\.jsonl: .*1 longer than 512.*a\.jsonl:1: invalid JSON: Unterm"
    ):
        clean(STAGES["pretrain"], [path], tmp_path, CleaningOptions(), 0)
    assert old.read_text(encoding="utf-8") == "text\nold\n"
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == ["a.jsonl", old.name, "pretrain_data.rejects.jsonl"]


@pytest.mark.parametrize("where", ["output", "duplicates", "fsync"])
def test_full_disk_leaves_the_old_output(tmp_path, monkeypatch, where):
    old = tmp_path / "pretrain_data.csv"
    old.write_text("text\nold\n", encoding="utf-8")
    path = dump(tmp_path / "a.jsonl", [{"text": f"{i}"} for i in range(10)])

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"output": (cleaning._Output, "add"), "duplicates": (KeySet, "add"), "fsync": (os, "fsync")}[where]
    monkeypatch.setattr(*target, full)
    with pytest.raises(UserError, match="no space left in .*: free some space"):
        clean(STAGES["pretrain"], [path], tmp_path, CleaningOptions(), 0)
    assert old.read_text(encoding="utf-8") == "text\nold\n"
    assert not list(tmp_path.glob(".*.tmp"))


def test_unusable_inputs_and_folders(tmp_path):
    def attempt(name, content, message, stage="pretrain", out_dir=tmp_path):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            clean(STAGES[stage], [path], out_dir, CleaningOptions(), 0)

    attempt("a.csv", "title,body\n1,2\n", r"a\.csv: needs the columns text, but this file has title, body")
    attempt("a.csv", "q\n1\n", "needs the columns q,a or .*instruction,output", stage="sft")
    attempt("a.csv", "text\n", "no rows in it")
    attempt("a.jsonl", "", "the file is empty")
    attempt("pretrain_data.csv", "text\nx\n", "is both input and output")
    (tmp_path / "file").write_text("", encoding="utf-8")
    attempt(
        "b.jsonl", '{"text": "x"}\n', "cannot write to .*choose another --out_dir", out_dir=tmp_path / "file" / "sub"
    )
