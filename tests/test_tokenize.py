"""tokenize.py and tokenize_chats.py: right tokens, a cache that is never stale or half, memory that does not grow."""

import csv
import errno
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.files import exclusive
from data_pipeline import text_files
from data_pipeline import tokenize as module
from data_pipeline.datasets import PackedRows
from data_pipeline.text_files import hash_files
from data_pipeline.tokenize import TokenizedDataset, tokenize_pretrain_data
from data_pipeline.tokenize_chats import (
    ANSWER_CUT,
    QUESTION_TOO_LONG,
    TURNS_CUT,
    NothingToTrainOn,
    encode_preference,
    tokenize_chat_data,
)
from model.chat_format import render_chat
from model.tokenizer import TOKENIZER_DIR, encode_text, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["春眠不觉晓，处处闻啼鸟。", "a literal </s> and <s> are text", " two\n\nlines ", "🙂 \u200d café"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def write_jsonl(path: Path, rows) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def texts_file(path: Path, texts=TEXTS) -> Path:
    return write_jsonl(path, ({"text": text} for text in texts))


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def chat(*texts, system=None):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *messages] if system else messages


# --- documents ---


def test_documents_of_every_format(tokenizer, tmp_path):
    import gzip

    import pyarrow
    import pyarrow.parquet

    texts_file(tmp_path / "a.jsonl")
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(TEXTS)])
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS]), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    expected = [[1, *encode_text(tokenizer, text), 2] for text in TEXTS]
    for name in ("a.jsonl", "a.csv", "a.json", "a.parquet", "a.jsonl.gz"):
        dataset = tokenize_pretrain_data([tmp_path / name], tokenizer, tmp_path / "cache")
        assert [dataset.document(i).tolist() for i in range(len(dataset))] == expected, name
        assert dataset.n_bytes.tolist() == [len(text.encode()) for text in TEXTS]
        assert dataset.lengths.tolist() == list(map(len, expected))
        assert dataset.loss_mask is None and dataset.tokens.dtype == np.uint16
        assert dataset.info["targets"] == sum(map(len, expected)) - len(TEXTS)
        assert tokenizer.decode(dataset.document(1)[1:-1]) == TEXTS[1]
        with pytest.raises(IndexError):
            dataset.document(len(dataset))
    assert len(folders(tmp_path / "cache")) == 5
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    dataset = tokenize_pretrain_data([tmp_path / "a.txt"], tokenizer, tmp_path / "c", text_field="body")
    assert len(dataset) == 2


def test_several_files_and_many_blocks_keep_their_order(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.text_files.BLOCK_BYTES", 200)
    texts = [f"text {i} " + "春" * (i % 7) for i in range(300)]
    paths = [texts_file(tmp_path / "a.jsonl", texts[:100]), texts_file(tmp_path / "b.jsonl", texts[100:])]
    seen = []
    for n_threads in (1, 3):
        monkeypatch.setattr("os.cpu_count", lambda n=n_threads: n)
        dataset = tokenize_pretrain_data(paths, tokenizer, tmp_path / f"c{n_threads}")
        seen.append([tokenizer.decode(dataset.document(i)[1:-1]) for i in range(len(dataset))])
    assert seen[0] == seen[1] == texts
    assert [source["rows"] for source in dataset.info["sources"]] == [100, 200]
    assert dataset.source_ends.tolist() == [100, 300]


def test_bad_rows_are_skipped_counted_and_listed(tokenizer, tmp_path, capsys):
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [
            {"text": "good"},
            '{"text": "cut',
            {"body": "x"},
            {"text": 3},
            {"text": " \n"},
            {"text": None},
            {"text": "ok"},
        ],
    )
    with path.open("ab") as file:
        file.write(b'{"text": "\xff"}\n')
    dataset = tokenize_pretrain_data([path], tokenizer, tmp_path / "cache", max_dropped=1)
    printed = capsys.readouterr().out
    assert len(dataset) == 2
    assert dataset.info["skipped"] == {"unreadable": 2, "without text": 2, "empty": 2}
    with (Path(dataset.info["folder"]) / "skipped.jsonl").open(encoding="utf-8") as file:
        listed = [json.loads(line) for line in file]
    assert sorted(row["line"] for row in listed) == [2, 3, 4, 5, 6, 8]
    assert {row["file"] for row in listed} == {str(path)}
    assert "a.jsonl:2: invalid JSON: Unterminated string" in printed
    assert "a.jsonl:8: invalid UTF-8 at byte 11" in printed
    assert "a.jsonl:3: no text; the fields are body" in printed


def test_wrong_input_is_a_user_error_and_leaves_nothing(tokenizer, tmp_path):
    cache = tmp_path / "cache"

    def attempt(name, content, reason):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=reason):
            tokenize_pretrain_data([path], tokenizer, cache)

    attempt("a.csv", b"a,b\n1,2\n", r"a\.csv: no column text, this file has a, b")
    attempt("a.jsonl", b"", "the file is empty")
    attempt("a.jsonl", b"\n\n", "no rows in it")
    attempt("a.jsonl", b'{"text": "cut\n{"text": ""}\n', r"no usable row: 1 unreadable, 1 empty.*a\.jsonl:1")
    attempt("a.xyz", b"x", "cannot tell its format")
    with pytest.raises(UserError, match="no such file"):
        tokenize_pretrain_data([tmp_path / "none.jsonl"], tokenizer, cache)
    with pytest.raises(UserError, match="no data files"):
        tokenize_pretrain_data([], tokenizer, cache)
    assert folders(cache) == []
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="choose another folder"):
        tokenize_pretrain_data([texts_file(tmp_path / "a.jsonl")], tokenizer, tmp_path / "file" / "c")

    class Large:
        def __len__(self):
            return 65_537

    with pytest.raises(UserError, match="65,537 does not fit in 16 bits"):
        tokenize_pretrain_data([tmp_path / "a.jsonl"], Large(), cache)


# --- the cache ---


def test_the_cache_is_used_when_nothing_changed_and_only_then(tokenizer, tmp_path, monkeypatch):
    cache, path = tmp_path / "cache", texts_file(tmp_path / "a.jsonl")
    build = lambda tok=tokenizer, **kw: tokenize_pretrain_data([path], tok, cache, **kw)  # noqa: E731
    first = build()
    other = load_tokenizer()
    other.chat_template += " "  # stands for any change of the tokenizer
    with monkeypatch.context() as patch:
        patch.setattr(module, "encode_texts", None)  # whoever encodes now fails
        again = build()
        assert again.fingerprint == first.fingerprint
        assert np.array_equal(again.tokens, first.tokens) and again.info == first.info
        moved = path.rename(tmp_path / "b.jsonl")  # the content counts, not where it lies
        assert len(tokenize_pretrain_data([moved], tokenizer, cache)) == len(first)
        path = moved.rename(path)
        with pytest.raises(TypeError):
            build(other)
        with pytest.raises(TypeError):
            build(text_field="body")
        patch.setattr(module, "VERSION", module.VERSION + 1)
        with pytest.raises(TypeError):
            build()
    assert len({first.fingerprint, build(other).fingerprint}) == 2
    pair = [path, texts_file(tmp_path / "c.jsonl", ["another"])]
    fingerprints = {tokenize_pretrain_data(p, tokenizer, cache).fingerprint for p in (pair, pair[::-1])}
    assert len(fingerprints | {first.fingerprint}) == 3


@pytest.mark.parametrize("age", [0, 100])
def test_a_changed_file_is_noticed(tokenizer, tmp_path, monkeypatch, age):
    """Even with the size and time of before, and however soon after."""
    cache, path = tmp_path / "cache", texts_file(tmp_path / "a.jsonl", ["aaaa"])
    now = time.time_ns()
    monkeypatch.setattr(text_files.time, "time_ns", lambda: now + age * 10**9)
    os.utime(path, ns=(1, 10**18))
    first = tokenize_pretrain_data([path], tokenizer, cache)
    remembered = json.loads((cache / "hashes.json").read_text(encoding="utf-8"))
    assert len(remembered) == (1 if age else 0)
    time.sleep(0.02)
    texts_file(path, ["bbbb"])
    os.utime(path, ns=(1, 10**18))
    second = tokenize_pretrain_data([path], tokenizer, cache)
    assert second.fingerprint != first.fingerprint
    assert tokenizer.decode(second.document(0)[1:-1]) == "bbbb"


def test_files_are_not_read_again_to_be_recognised(tokenizer, tmp_path, monkeypatch):
    cache, path = tmp_path / "cache", texts_file(tmp_path / "a.jsonl")
    real = time.time_ns
    monkeypatch.setattr(text_files.time, "time_ns", lambda: real() + 10**10)
    hash_files([path], tmp_path)
    monkeypatch.setattr(text_files.hashlib, "blake2b", None)
    assert len(hash_files([path], tmp_path)) == 1
    monkeypatch.undo()
    expected = hash_files([path, path], tmp_path / "new")
    name = json.dumps(str(path))
    for damaged in ("[dam", "[1]", "3", "{%s: 5}", "{%s: [1]}", "{%s: [[1, 2], null]}", "{%s: {}}", "\xff"):
        (tmp_path / "hashes.json").write_text(damaged.replace("%s", name), encoding="latin-1")
        assert hash_files([path, path], tmp_path) == expected
    assert not cache.exists()


@pytest.mark.parametrize(
    "damage",
    ["no info", "bad info", "info of another shape", "an older info", "short tokens", "no offsets", "offsets of 0xFF"],
)
def test_a_damaged_cache_is_made_again_and_it_is_said(tokenizer, tmp_path, damage, capsys):
    cache, path = tmp_path / "cache", texts_file(tmp_path / "a.jsonl")
    folder = Path(tokenize_pretrain_data([path], tokenizer, cache).info["folder"])
    info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    if damage == "no info":
        (folder / "info.json").unlink()
    elif damage == "short tokens":
        (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-2])
    elif damage == "no offsets":
        (folder / "offsets.bin").unlink()
    elif damage == "offsets of 0xFF":
        (folder / "offsets.bin").write_bytes(b"\xff" * info["files"]["offsets"])
    else:
        del info["vocab_size"]
        content = {"bad info": "{", "info of another shape": "[1]", "an older info": json.dumps(info)}[damage]
        (folder / "info.json").write_text(content, encoding="utf-8")
    capsys.readouterr()
    dataset = tokenize_pretrain_data([path], tokenizer, cache)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{folder} is damaged, or of an earlier version: tokenizing again"
    assert second.startswith("tokens: ")
    assert tokenizer.decode(dataset.document(3)[1:-1]) == TEXTS[3]
    assert folders(cache) == [folder.name]


def test_damaged_tokens_are_named_before_they_are_trained_on(tokenizer, tmp_path):
    path = texts_file(tmp_path / "a.jsonl")
    build = functools.partial(tokenize_pretrain_data, [path], tokenizer, tmp_path / "cache")
    tokens = Path(build().info["folder"]) / "tokens.bin"
    tokens.write_bytes(b"\xff" * tokens.stat().st_size)
    rows = PackedRows(build(), np.arange(len(TEXTS)), 64, seed=0)
    with pytest.raises(UserError, match=rf"{tokens.parent}: tokens.bin is damaged .token 65535 .* 6,400.; delete this"):
        rows.batch([0])


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
        (OSError(errno.EIO, "bad disk"), OSError),
    ],
)
def test_an_interrupted_build_leaves_nothing(tokenizer, tmp_path, monkeypatch, raised, expected):
    cache, path = tmp_path / "cache", texts_file(tmp_path / "a.jsonl")
    add = module._ArrayWriter.add

    def fail(self, *args):
        add(self, *args)
        raise raised

    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    with monkeypatch.context() as patch:
        patch.setattr(module._ArrayWriter, "add", fail)
        with pytest.raises(expected) as caught:
            tokenize_pretrain_data([path], tokenizer, cache)
    if expected is UserError:
        assert f"no space left in {cache}" in str(caught.value)
    assert folders(cache) == [] and os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert len(tokenize_pretrain_data([path], tokenizer, cache)) == len(TEXTS)


def test_a_file_that_grows_while_it_is_read_is_refused(tokenizer, tmp_path, monkeypatch):
    cache, path = tmp_path / "cache", texts_file(tmp_path / "a.jsonl")
    add = module._ArrayWriter.add

    def grow(self, *args):
        add(self, *args)
        with path.open("a", encoding="utf-8") as file:
            file.write('{"text": "more"}\n')

    monkeypatch.setattr(module._ArrayWriter, "add", grow)
    with pytest.raises(UserError, match="the file changed while it was read"):
        tokenize_pretrain_data([path], tokenizer, cache)
    assert folders(cache) == []


# Builds a dataset and prints what came of it. HANG: encodes one block, says so and waits for its end.
SCRIPT = """
import contextlib, os, sys, time
from pathlib import Path
from model.tokenizer import load_tokenizer
from data_pipeline import text_files, tokenize
if os.environ.get("HANG"):
    text_files.BLOCK_BYTES = 1000
    add = tokenize._ArrayWriter.add
    def hang(self, *args):
        add(self, *args)
        self.files["tokens"].flush()
        print("hanging", file=sys.__stdout__, flush=True)
        time.sleep(60)
    tokenize._ArrayWriter.add = hang
with contextlib.redirect_stdout(sys.stderr):
    made = tokenize.tokenize_pretrain_data([Path(sys.argv[1])], load_tokenizer(), Path(sys.argv[2]))
peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0] if os.path.exists("/proc/self/status") else 0
print(len(made), int(made.tokens.sum(dtype="int64")), peak)
"""


def start(source: Path, cache: Path, **env) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, str(source), str(cache)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


def test_names_that_are_not_ascii_in_a_locale_that_is(tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "数据.jsonl", [*({"text": text} for text in TEXTS * 30), '{"text": 坏'])
    process = start(source, tmp_path / "存", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert process.communicate()[0].split()[0] == str(len(TEXTS) * 30) and process.returncode == 0
    (skipped,) = (tmp_path / "存").glob("*/skipped.jsonl")
    assert os.fsencode(json.loads(skipped.read_text(encoding="utf-8"))["file"]) == os.fsencode(source)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("same", [True, False], ids=["same data", "other data"])
def test_a_killed_build_does_no_harm(tokenizer, tmp_path, same):
    source, cache = texts_file(tmp_path / "a.jsonl", [f"text {i}" for i in range(500)]), tmp_path / "cache"
    other = texts_file(tmp_path / "b.jsonl")
    process = start(source, cache, HANG="1")
    try:
        assert process.stdout.readline() == "hanging\n"
        (left,) = folders(cache)
        finished = Path(tokenize_pretrain_data([other], tokenizer, cache).info["folder"]).name
        assert folders(cache) == sorted([left, finished])  # the owner of the other one lives
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert left.startswith(".") and left.endswith(".tmp")
    if not same:
        texts_file(other, ["something else"])
        dataset = tokenize_pretrain_data([other], tokenizer, cache)
    else:
        dataset = tokenize_pretrain_data([source], tokenizer, cache)
        assert len(dataset) == 500 and tokenizer.decode(dataset.document(499)[1:-1]) == "text 499"
    assert folders(cache) == sorted([finished, Path(dataset.info["folder"]).name])  # what the killed one left is gone


def test_two_builds_at_once(tokenizer, tmp_path):
    source, cache = texts_file(tmp_path / "a.jsonl", [f"text {i} " * 20 for i in range(3000)]), tmp_path / "cache"
    processes = [start(source, cache) for _ in range(2)]
    results = [process.communicate()[0].split()[:2] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    dataset = tokenize_pretrain_data([source], tokenizer, cache)
    assert results[0] == results[1] == ["3000", str(int(dataset.tokens.sum(dtype=np.int64)))]
    assert folders(cache) == [Path(dataset.info["folder"]).name]


def test_the_second_of_two_builds_waits_and_takes_the_result(tokenizer, tmp_path, capfd, monkeypatch):
    cache, path = tmp_path / "cache", texts_file(tmp_path / "a.jsonl")
    folder = Path(tokenize_pretrain_data([path], tokenizer, cache).info["folder"])
    hidden = folder.rename(cache / "hidden")
    capfd.readouterr()
    monkeypatch.setattr(module, "encode_texts", None)  # whoever encodes now fails
    with exclusive(cache, folder.name, ""):
        waiting = threading.Thread(target=lambda: tokenize_pretrain_data([path], tokenizer, cache), daemon=True)
        waiting.start()
        printed, deadline = "", time.monotonic() + 60
        while "waiting for another process that is tokenizing into" not in printed:
            assert waiting.is_alive() and time.monotonic() < deadline
            time.sleep(0.1)
            printed += capfd.readouterr().err
        hidden.rename(folder)
    waiting.join(30)
    said = capfd.readouterr().out.splitlines()
    assert len(said) == 1 and f"ready in {folder}" in said[0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_data(tmp_path):
    def peak(n_rows: int) -> int:
        source = texts_file(tmp_path / f"{n_rows}.jsonl", (f"{i} " + "春眠不觉晓，" * 15 for i in range(n_rows)))
        process = start(source, tmp_path / "cache")
        n_documents, _, kilobytes = process.communicate()[0].split()
        assert int(n_documents) == n_rows
        return int(kilobytes)

    small, large = peak(8_000), peak(80_000)  # 2.3 MB and 23 MB
    assert 0 < large < 1.2 * small, (small, large)
    assert large - small < 15_000  # kB: the imports take so much that 20% of them could hide most of the text


# --- the split ---


def dataset_of(keys) -> TokenizedDataset:
    keys = np.array(keys, np.uint64)
    empty = np.zeros(0, np.uint16)
    return TokenizedDataset(empty, None, np.zeros(len(keys) + 1, np.int64), np.zeros(len(keys), np.int64), keys, "", {})


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**63, 2**64 - 1]), min_size=1, max_size=40),
    st.floats(0, 0.999),
    st.randoms(),
)
def test_split(keys, fraction, random):
    train, val = dataset_of(keys).split(fraction)
    assert sorted([*train, *val]) == list(range(len(keys)))
    train_keys, val_keys = ({keys[i] for i in part} for part in (train, val))
    assert not train_keys & val_keys and train_keys
    assert bool(val_keys) == (fraction > 0 and len(set(keys)) > 1)
    shuffled = random.sample(keys, len(keys))
    assert {shuffled[i] for i in dataset_of(shuffled).split(fraction)[1]} == val_keys


def test_split_shares_and_arguments():
    keys = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    train, val = dataset_of(keys).split(0.1)
    assert 0.09 < len(val) / 20_000 < 0.11
    longer = dataset_of([*keys[::-1], 5, 6]).split(0.1)[1]  # others come, and the order changes
    assert {int(keys[i]) for i in val} <= {int(keys[::-1][i]) for i in longer if i < 20_000}
    for wrong in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="val_fraction"):
            dataset_of(keys).split(wrong)


def test_duplicates_share_a_key_across_files(tokenizer, tmp_path):
    paths = [texts_file(tmp_path / "a.jsonl", ["x", "y", "x"]), texts_file(tmp_path / "b.jsonl", ["y"])]
    keys = tokenize_pretrain_data(paths, tokenizer, tmp_path / "cache").content_hashes
    assert keys[0] == keys[2] != keys[1] == keys[3]
    rows = [{"messages": chat("q", "a " * 30)}, {"q": "q", "a": "a " * 30}, {"q": "q", "a": "b"}]
    path = write_jsonl(tmp_path / "c.jsonl", rows)
    found = [tokenize_chat_data([path], tokenizer, tmp_path / "cache", max_tokens=n).content_hashes for n in (20, 99)]
    assert found[0][0] == found[0][1] != found[0][2]
    assert np.array_equal(*found)  # the split does not depend on where chats are cut


# --- chats ---


def learned(tokenizer, ids, loss_mask) -> list[str]:
    """The text of each run of targets."""
    runs, inside = [], False
    for token, target in zip(ids, loss_mask, strict=True):
        if target and not inside:
            runs.append([])
        if target:
            runs[-1].append(int(token))
        inside = target
    return [tokenizer.decode(run) for run in runs]


words = st.lists(
    st.sampled_from(["春眠", "</s>", "<s>", "\n", " ", "🙂", "code()", "assistant\n", "a", "é"]), min_size=1, max_size=8
).map("".join).filter(str.strip)  # fmt: skip


def test_chat_dataset_of_every_format(tokenizer, tmp_path):
    from tests.test_records import FORMATS

    chats = [chat("q", "a"), chat("</s>x", "<s>y", "春", " 眠\n"), chat("1", "2 " * 30, "3", "4 " * 30, "5", "6 " * 30)]
    rows = [make(messages) for make in FORMATS.values() for messages in chats]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for max_tokens, n_answers, cuts in [
        (512, (1, 2, 3), {}),
        (150, (1, 2, 2), {TURNS_CUT: len(FORMATS)}),
        (40, (1, 2, 1), {TURNS_CUT: len(FORMATS), ANSWER_CUT: len(FORMATS)}),
    ]:
        dataset = tokenize_chat_data([path], tokenizer, tmp_path / "cache", max_tokens=max_tokens)
        assert len(dataset) == len(rows) and dataset.info["cut"] == cuts
        for i in range(len(dataset)):
            messages, kept = chats[i % 3], n_answers[i % 3]
            span = slice(dataset.offsets[i], dataset.offsets[i + 1])
            found = learned(tokenizer, dataset.tokens[span], dataset.loss_mask[span])
            answers = [m["content"] + "</s>" for m in messages if m["role"] == "assistant"][-kept:]
            if max_tokens == 40 and i % 3 == 2:
                assert answers[0].startswith(found[0]) and len(found) == 1
                assert dataset.n_bytes[i] == len(found[0].encode())
            else:
                assert found == answers
                assert dataset.n_bytes[i] == sum(len(answer.encode()) - 4 for answer in answers)
        assert dataset.info["targets"] == int(np.asarray(dataset.loss_mask).sum())
        assert dataset.loss_mask.dtype == np.bool_ and not dataset.loss_mask[dataset.offsets[:-1]].any()
    assert len(folders(tmp_path / "cache")) == 3


def test_unsound_chats_are_listed_and_never_trained_on(tokenizer, tmp_path, capsys):
    twice = [chat("secret")[0], chat("secret")[0]]
    rows = [{"q": "q", "a": "a"}, {"messages": twice}, '{"cut', {"q": "q", "a": ""}, {"messages": chat("q", "a", "r")}]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, rows[0] | {"label": False}])
    dataset = tokenize_chat_data([path], tokenizer, tmp_path / "cache", max_tokens=64, max_dropped=0.84)
    printed = capsys.readouterr().out
    counts = {"not a valid dialogue": 3, "unreadable": 1, "not for this stage": 1}
    assert len(dataset) == 1 and dataset.info["skipped"] == counts
    assert "a.jsonl:2: roles out of order: user user" in printed and "a.jsonl:3: invalid JSON" in printed
    for content, reason in [
        (
            rows[1:],
            "no usable row: 3 not a valid dialogue, 1 unreadable; the first is .*a.jsonl:1: roles out of order",
        ),
        ([{"text": "pretraining data"}], "no question and answer; the fields are text"),
    ]:
        with pytest.raises(UserError, match=reason):
            tokenize_chat_data([write_jsonl(path, content)], tokenizer, tmp_path / "cache", max_tokens=64)
    (tmp_path / "a.csv").write_text("text\nx\n", encoding="utf-8")
    with pytest.raises(UserError, match="needs the columns q,a or"):
        tokenize_chat_data([tmp_path / "a.csv"], tokenizer, tmp_path / "cache", max_tokens=64)
    with pytest.raises(UserError, match="nothing to train on"):
        tokenize_chat_data([path], tokenizer, tmp_path / "cache", max_tokens=1)


LONG = {"q": "long question " * 20, "a": "a"}


@pytest.mark.parametrize(
    ("kind", "bad", "reason"),
    [
        ("pretrain", '{"text": "cut', "2 unreadable"),
        ("pretrain", {"text": " "}, "2 empty"),
        ("chat", '{"q": "cut', "2 unreadable"),
        ("chat", {"q": "q", "a": ""}, "2 not a valid dialogue"),
        ("chat", {"prompt": "q", "completion": "a", "label": False}, "2 not for this stage"),
        ("chat", LONG, f"2 {QUESTION_TOO_LONG}"),
    ],
)
def test_one_rule_for_rows_that_cannot_be_used(tokenizer, tmp_path, monkeypatch, kind, bad, reason):
    """More than 1% of them are an error, whatever is wrong with them, and trying another limit costs nothing."""
    good = {"q": "q", "a": "a", "text": "t"}
    tokenize = {
        "pretrain": tokenize_pretrain_data,
        "chat": functools.partial(tokenize_chat_data, max_tokens=32),
    }[kind]
    path = write_jsonl(tmp_path / "a.jsonl", [good] * 99 + [bad])
    assert len(tokenize([path], tokenizer, tmp_path / "c")) == 99
    write_jsonl(path, [good] * 98 + [bad] * 2)
    for limit in (0.01, 0.019):
        with pytest.raises(UserError) as error:
            tokenize([path], tokenizer, tmp_path / "c", max_dropped=limit)
        monkeypatch.setattr(module, "_ArrayWriter", None)  # whoever tokenizes now fails
        found = str(error.value)
        assert f"2 of 100 rows cannot be used, more than max_dropped={limit} allows ({reason}). The first: " in found
        assert (
            f"{path}:99: " in found and f"{path}:100: " in found and found.endswith("the others with max_dropped=0.02")
        )
        assert ("--max_seq_len" in found) == (bad is LONG)
    assert len(tokenize([path], tokenizer, tmp_path / "c", max_dropped=0.02)) == 98


@pytest.mark.parametrize(("n_skipped", "n_rows"), [(29, 100), (57, 100), (1, 3), (7, 9), (99_999, 100_000), (5, 5)])
def test_the_limit_that_is_advised_is_enough(n_skipped, n_rows):
    check = functools.partial(
        module.check_dropped, [Path("a")], {"empty": n_skipped}, n_rows - n_skipped, ["a:1: empty"], []
    )
    with pytest.raises(UserError) as error:
        check(0.0)
    check(float(str(error.value).rpartition("max_dropped=")[2]))


def test_a_file_whose_end_is_lost_is_an_error(tokenizer, tmp_path):
    """One bad row of a thousand, and nobody knows how many behind it."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "t"}] * 1000)[:-1] + ', {"text": tru}, {"text": "lost"}]', encoding="utf-8")
    build = functools.partial(tokenize_pretrain_data, [path], tokenizer, tmp_path / "c")
    for limit in (0.01, 0.99):
        with pytest.raises(
            UserError, match=r"a.json:1001: invalid JSON.* after this row .*; max_dropped=1 trains on what"
        ):
            build(max_dropped=limit)
    assert len(build(max_dropped=1)) == 1000


@settings(max_examples=100, deadline=None)
@given(st.none() | words, st.lists(st.tuples(words, words), max_size=3), words, words, words, st.integers(2, 100))
def test_encode_preference(tokenizer, system, turns, question, chosen, rejected, max_tokens):
    assume(chosen != rejected)
    before = chat(*(text for turn in turns for text in turn), system=system)
    prompt = [*before, {"role": "user", "content": question}]
    header = render_chat(tokenizer, prompt[-1:], add_generation_prompt=True)[0]
    whole = [[*encode_text(tokenizer, text), 2] for text in (chosen, rejected)]
    room = max_tokens - len(header)
    try:
        prompt_ids, *answers = encode_preference(tokenizer, prompt, chosen, rejected, max_tokens)
    except NothingToTrainOn:
        assert room <= 0 or whole[0][:room] == whole[1][:room]
        return
    assert answers == [answer[:room] for answer in whole]
    assert len(prompt_ids) + max(map(len, answers)) <= max_tokens
    assert prompt_ids[len(prompt_ids) - len(header) :] == header
    if max_tokens == 100 and len(turns) < 2:
        assert prompt_ids == render_chat(tokenizer, prompt, add_generation_prompt=True)[0] or answers == whole


def test_the_default_tokenizer_is_byte_level():
    """What counts the bytes of a cut answer relies on it."""
    content = json.loads((TOKENIZER_DIR / "tokenizer.json").read_text(encoding="utf-8"))
    assert "ByteLevel" in json.dumps(content["decoder"])
