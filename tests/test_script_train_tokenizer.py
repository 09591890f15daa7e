"""train_tokenizer.py: from files to a folder that loads, the same each time, with old folders never lost."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

import train_tokenizer
from common.errors import UserError
from common.files import atomic_folder, exclusive
from data_pipeline import bpe
from data_pipeline.bpe import (
    MAX_TOKEN_BYTES,
    longest_tokens,
    measure,
    round_trip_failures,
    train_bpe,
    unicode_samples,
    write_tokenizer,
)
from data_pipeline.records import Malformed
from data_pipeline.tokenizer_data import Sample, is_held_out, row_text
from model.tokenizer import CONTROL_TOKENS, load_tokenizer, tokenizer_hash
from train_tokenizer import main

ROOT = Path(__file__).resolve().parents[1]


def some_texts(count: int = 1500, seed: int = 0) -> list[str]:
    """Text with words and a grammar of sorts, about 100 bytes each."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("aeionrst", k=rng.randint(2, 7))) for _ in range(300)]
    words += ["".join(rng.choices("天地人山水火木金土日月星", k=rng.randint(1, 4))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=15)) + rng.choice(".。!\n") for _ in range(count)]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return some_texts()


@pytest.fixture
def data(tmp_path: Path, texts: list[str]) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in texts])


def run(data: Path | list[Path], out_dir: Path, *options: str, vocab_size: int = 600) -> None:
    paths = [str(path) for path in (data if isinstance(data, list) else [data])]
    main(["--data_path", *paths, "--out_dir", str(out_dir), "--vocab_size", str(vocab_size), *options])


def folder_content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- the whole -------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_tokenizer_and_a_report(tmp_path, data):
    out = tmp_path / "out" / "tokenizer"
    options = ["--data_path", data, "--out_dir", out, "--vocab_size", "600", "--held_out", "0.05"]
    command = [sys.executable, ROOT / "train_tokenizer.py", *options]
    done = subprocess.run(command, check=False, capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(out)
    assert len(tokenizer) == 600
    assert tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)) == [*range(584, 600)]
    assert sorted(path.name for path in out.iterdir()) == sorted(train_tokenizer.FILES)
    assert sorted(path.name for path in out.parent.iterdir()) == [
        ".tokenizer.lock",
        "tokenizer",
    ]  # nothing else is left
    training = json.loads((out / "training.json").read_text(encoding="utf-8"))
    assert training["tokenizer_hash"] == tokenizer_hash(tokenizer) == tokenizer_hash(AutoTokenizer.from_pretrained(out))
    assert training["files"] == {"data.jsonl": 1}
    for said in ("<unk>=0, <s>=1, </s>=2, 16 tags", "bytes/token", "17 Unicode planes come back", "longest tokens"):
        assert said in done.stdout
    figures = training["held_out_compression"]["data.jsonl"]
    assert f"{figures['n_bytes'] / figures['tokens']:.3f}" in done.stdout
    # Without --overwrite a second run does nothing, and says so in one line.
    before = folder_content(out)
    again = subprocess.run(command, check=False, capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.strip().startswith("error: ")
    assert "--overwrite" in again.stderr
    assert "\n" not in again.stderr.strip()
    assert folder_content(out) == before


def test_the_result_does_not_depend_on_the_order_of_the_texts(tmp_path, texts):
    first = write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in texts])
    run(first, tmp_path / "a")
    run(write_jsonl(first, [{"text": text} for text in reversed(texts)]), tmp_path / "b")
    assert folder_content(tmp_path / "a") == folder_content(tmp_path / "b")


def test_held_out_text_is_measured_and_leaves_no_trace(tmp_path, texts):
    marked = [f"{text}龘龘" for text in texts]
    held = [text for text in marked if is_held_out(text, 0.1)]
    rows = held * 5 + [text for text in texts if not is_held_out(text, 0.1)]
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in rows])
    run(data, tmp_path / "out", "--held_out", "0.1")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert not [token for token in map(tokenizer.decode, range(600)) if "龘" in token]
    figures = json.loads((tmp_path / "out" / "training.json").read_text())["held_out_compression"]["data.jsonl"]
    assert figures["texts"] == len(set(held))  # each counted once
    assert figures["n_bytes"] == sum(len(text.encode()) for text in set(held))
    assert figures["tokens"] == measure(tokenizer, set(held)).tokens


def test_a_file_named_twice_counts_twice(tmp_path, data):
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": f"zyxwv qqqq {i}"} for i in range(200)])
    run([data, other, other], tmp_path / "out")
    training = json.loads((tmp_path / "out" / "training.json").read_text())
    assert training["files"] == {"data.jsonl": 1, "other.jsonl": 2}
    n_trained = sum(not is_held_out(f"zyxwv qqqq {i}", 0.01) for i in range(200))
    n_first = sum(not is_held_out(json.loads(line)["text"], 0.01) for line in data.open(encoding="utf-8"))
    assert training["texts"] == n_first + 2 * n_trained


def test_files_of_one_name_are_reported_apart(tmp_path, data):
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": f"龘龘龘 {i}"} for i in range(500)])
    (tmp_path / "more").mkdir()
    other = other.rename(tmp_path / "more" / data.name)
    run([data], tmp_path / "out", "--eval_path", str(other), "--held_out", "0.1")
    training = json.loads((tmp_path / "out" / "training.json").read_text())
    first = f"{tmp_path.name}/data.jsonl"
    assert training["files"] == {first: 1}
    assert list(training["held_out_compression"]) == [first, "more/data.jsonl"]


def test_eval_files_are_not_trained_on(tmp_path, data):
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": f"龘龘龘 {i}"} for i in range(500)])
    run(data, tmp_path / "out", "--eval_path", str(other), "--held_out", "0.1")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert not [token for token in map(tokenizer.decode, range(600)) if "龘" in token]
    figures = json.loads((tmp_path / "out" / "training.json").read_text())["held_out_compression"]
    assert figures["other.jsonl"]["texts"] == sum(is_held_out(f"龘龘龘 {i}", 0.1) for i in range(500))


@pytest.mark.parametrize("kind", ["csv", "txt", "jsonl.gz", "parquet", "py"])
def test_formats(tmp_path, texts, kind):
    texts = [text.strip() for text in texts]
    path = tmp_path / f"data.{kind}"
    if kind == "csv":
        path.write_text("id,text\n" + "".join(f'1,"{text}"\n' for text in texts), encoding="utf-8")
    elif kind == "txt":
        path.write_text("\n".join(texts), encoding="utf-8")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    elif kind == "parquet":
        pandas = pytest.importorskip("pandas")
        pandas.DataFrame({"text": texts}).to_parquet(path)
    else:
        path.write_text("\n\n\n".join(texts), encoding="utf-8")
    run(path, tmp_path / "out", "--held_out", "0.05")
    training = json.loads((tmp_path / "out" / "training.json").read_text())
    n_held_out = training["held_out_compression"][f"*.{kind}" if kind == "py" else path.name]["texts"]
    assert n_held_out > 30
    assert training["texts"] + n_held_out == len(texts)


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a", "q": "b"}, "a"),
        ({"instruction": "i", "input": "", "output": "o", "history": [["h", "j"]]}, "h\nj\ni\no"),
        ({"history": "[['h', 'j']]", "q": "q", "a": "a"}, "h\nj\nq\na"),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]}, "u\nv"),
        ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "v"}]}, "u\nv"),
    ],
)
def test_texts_of_rows(row, text):
    assert row_text(row) == text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"body": "a", "id": 1}, "no field 'text'; the fields are body, id: use --text_field"),
        ({"text": 3}, "text is not a text but int"),
        ({"text": " \n"}, "the text is empty"),
        ({"q": "", "a": None}, "the text is empty"),
        ({"messages": [{"role": "user"}]}, "no content; the fields are role"),
    ],
)
def test_rows_without_text(row, reason):
    with pytest.raises(Malformed, match=reason):
        row_text(row)


def test_a_dialogue_is_held_out_wherever_it_stands():  # as a text or as question and answer
    for i in range(50):
        as_text, as_turns = {"text": f"q{i}\na{i}"}, {"q": f"q{i}", "a": f"a{i}"}
        assert is_held_out(row_text(as_text), 0.5) == is_held_out(row_text(as_turns), 0.5)
    assert 400 < sum(is_held_out(f"text {i}", 0.5) for i in range(1000)) < 600


def test_sample_is_uniform_bounded_and_independent_of_order():
    texts = [f"{i:09d}" for i in range(5000)]
    samples = []
    for order in (texts, texts[::-1]):
        sample = Sample(max_bytes=9000)
        for text in order:
            sample.add(text)
            assert sample.n_bytes <= 9000
        samples.append(set(sample))
    assert samples[0] == samples[1]
    assert len(samples[0]) == 1000
    assert 400 < sum(int(text) < 2500 for text in samples[0]) < 600
    assert (sample.seen, sample.seen_bytes) == (5000, 45000)


def test_bpe_has_every_byte_and_no_endless_token():
    bpe = train_bpe(["如果发现译文存在错误或其他需要改进的地方" * 3, "=" * 300] * 50, 320)
    tokens = [bpe.decode([i]) for i in range(3, bpe.get_vocab_size())]
    assert {len(token.encode()) for token in tokens} <= set(range(1, MAX_TOKEN_BYTES + 1))
    assert bpe.token_to_id("<unk>") == 0
    every_byte = bytes(range(256)).decode("latin-1")
    assert bpe.decode(bpe.encode(every_byte).ids) == every_byte


def test_samples_have_every_character():
    characters = {ord(c) for _, text in unicode_samples() for c in text}
    assert characters == {*range(0xD800), *range(0xE000, sys.maxunicode + 1)}


def test_longest_tokens_are_sorted(tmp_path, data):
    run(data, tmp_path / "out")
    tokens = longest_tokens(load_tokenizer(tmp_path / "out"), 5)
    assert [len(token) for token in tokens] == sorted(map(len, tokens), reverse=True)


# --- what can go wrong -----------------------------------------------------------------------------------------------


def lossy_bpe(*args, **kwargs):
    tokenizer = train_bpe(*args, **kwargs)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def test_a_lossy_tokenizer_is_noticed_and_not_written(tmp_path, data, monkeypatch):
    run(data, tmp_path / "out")
    before = folder_content(tmp_path / "out")
    assert round_trip_failures(load_tokenizer(tmp_path / "out"), unicode_samples()) == []
    monkeypatch.setattr(bpe, "train_bpe", lossy_bpe)
    with pytest.raises(UserError, match="do not survive encoding and decoding, nothing was written"):
        run(data, tmp_path / "out", "--overwrite")
    assert folder_content(tmp_path / "out") == before
    assert not list(tmp_path.glob(".out*.tmp"))


def refused(capsys, *args, **kwargs) -> str:
    """Run with wrong flags; return what is printed."""
    with pytest.raises(SystemExit) as ended:
        run(*args, **kwargs)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_wrong_flags_are_reported_together(data, capsys):
    printed = refused(capsys, data, data, "--held_out", "1", "--max_bytes", "0", "--min_frequency", "0", vocab_size=100)
    for flag in ("--vocab_size 100", "--held_out 1", "--max_bytes 0", "--min_frequency 0", "--out_dir"):
        assert flag in printed


def test_a_folder_with_other_things_is_not_touched(tmp_path, data, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    assert "holds other files (thesis.tex)" in refused(capsys, data, tmp_path / "out", "--overwrite")


def test_a_folder_that_another_process_trains_into_is_refused(tmp_path, data):
    (tmp_path / "link").symlink_to("out")
    with exclusive(tmp_path, "out", ""):
        for name in ("out", "link"):
            with pytest.raises(UserError, match=f"another process is training a tokenizer into .*{name}"):
                run(data, tmp_path / name)
    run(data, tmp_path / "out")


def test_a_tokenizer_that_came_while_we_waited_is_not_replaced(tmp_path, data, monkeypatch):
    """Of two trainings into one folder the second one finds the lock free again, and the folder full."""
    run(data, tmp_path / "first")

    @contextlib.contextmanager
    def wait(*_):
        shutil.copytree(tmp_path / "first", tmp_path / "out")
        yield True

    monkeypatch.setattr(train_tokenizer, "exclusive", wait)
    with pytest.raises(UserError, match="out already holds a tokenizer; add --overwrite"):
        run(data, tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_at_once_while_it_trains(tmp_path, data, number):
    """The trainer is stood in for by other code that computes for minutes outside of Python."""
    script = (
        "import hashlib, runpy, sys\n"
        "from data_pipeline import bpe\n"
        "bpe.train_bpe = lambda *_: hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
        "runpy.run_path('train_tokenizer.py', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", script, "--data_path", str(data), "--out_dir", str(tmp_path / "out")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A test run in the background has Ctrl-C switched off, and its children inherit that.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)
    try:
        assert process.stdout.readline().startswith("training on")
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert err == f"error: {'interrupted' if number == signal.SIGINT else 'stopped by SIGTERM'}\n"
    assert not (tmp_path / "out").exists()


def test_half_a_file_is_not_taken_for_a_whole_one(tmp_path, data):
    packed = gzip.compress("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20_000)).encode())
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"cut.jsonl.gz:\d+: truncated archive.* the rest is lost. Repair the file"):
        run(path, tmp_path / "out")


def test_a_readme_survives_a_new_tokenizer(tmp_path, data):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    run(data, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert len(load_tokenizer(tmp_path / "out")) == 600


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl: the file is empty"),
        ("a.jsonl", '\n{"body": "x"}\n', "a.jsonl:2: no field 'text'; the fields are body: use --text_field"),
        ("a.csv", "id,body\n1,x\n", "a.csv:2: no field 'text'; the fields are id, body"),
        ("a.jsonl", '{"text": "x"\n', "a.jsonl:1: invalid JSON"),
        ("a.docx", "x", "a.docx: cannot tell its format"),
        ("a.py", "\udcff", "a.py: invalid UTF-8 at byte 1"),
    ],
)
def test_unusable_files_are_named_with_line_and_reason(tmp_path, data, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError) as error:
        run([data, tmp_path / name], tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.jsonl: no such file"):
        run(tmp_path / "none.jsonl", tmp_path / "out")


def test_bad_lines_are_skipped_and_told_once(tmp_path, data, capsys):
    with data.open("ab") as file:
        file.write(b'{"text": "x\n{"body": 1}\n{"text": "\xff"}\n')
    run([data, data], tmp_path / "out")
    told = capsys.readouterr().err
    assert "skipped 3 rows" in told
    for line, reason in ((1501, "invalid JSON"), (1502, "no field 'text'"), (1503, "invalid UTF-8")):
        assert f"data.jsonl:{line}: {reason}" in told


def test_too_little_text_is_refused(tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": "abc abc abc"}])
    with pytest.raises(UserError, match=r"pairs for only \d+ tokens, not 6,400"):
        run(data, tmp_path / "out", vocab_size=6400)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", range(3))
def test_killed_while_replacing_the_old_tokenizer_still_loads(tmp_path, texts, moment):
    """A process dies before the rename number `moment`, or after both: a complete tokenizer loads."""
    write_tokenizer(train_bpe(texts, 500), tmp_path / "out", {})
    old_hash = tokenizer_hash(load_tokenizer(tmp_path / "out"))
    new = train_bpe(some_texts(seed=1), 600)
    replace, calls = os.replace, []

    def die(*paths) -> None:
        if len(calls) == moment:
            os._exit(9)
        calls.append(paths)
        replace(*paths)

    def publish() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            write_tokenizer(new, folder, {})

    pid = os.fork()
    if pid == 0:
        os.replace = die
        try:
            publish()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (9 if moment < 2 else 0)
    assert (tokenizer_hash(load_tokenizer(tmp_path / "out")) == old_hash) == (moment < 2)
    with exclusive(tmp_path, "out", ""):
        publish()  # the next run finds nothing in its way, and leaves nothing of the killed one
    assert len(load_tokenizer(tmp_path / "out")) == 600
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]
