"""data_pipeline/readers.py and text_files.py: every format, every kind of damage, at any block size."""

import csv
import gzip
import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data_pipeline import readers, text_files
from data_pipeline.readers import Record, columns, iter_records
from data_pipeline.text_files import BadLine, total_bytes

ROOT = Path(__file__).resolve().parent.parent
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
anything = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufdd0"), max_size=30)


def read(path: Path) -> tuple[list[tuple[int, dict]], list[BadLine]]:
    bad: list[BadLine] = []
    rows = [(record.line, record.data) for record in iter_records(path, bad.append)]
    return rows, bad


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize(
    ("suffix", "content", "lines"),
    [
        (".jsonl", '{"text": "春"}\n\n{"text": "b"}', [1, 3]),
        (".jsonl", '{"text": "春"}\r\n\r\n{"text": "b"}\r\n', [1, 3]),
        (".json", '{"text": "春"}\n{"text": "b"}\n', [1, 2]),
        (".json", '\n [\n {"text": "春"},\n {"text":\n "b"} ]\n', [1, 2]),
        (".jsonl", '[{"text": "春"}, {"text": "b"}]', [1, 2]),
        (".txt", "春\n\nb", [1, 3]),
        (".csv", "text\n春\n\nb\n", [2, 4]),
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_formats(tmp_path, suffix, content, lines, ending, mark):
    path = write(tmp_path / f"a.b{suffix}{ending}", PACK[ending](mark + content.encode()))
    told = []
    rows = list(iter_records(path, None, on_bytes=told.append))
    assert rows == [Record(lines[0], {"text": "春"}), Record(lines[1], {"text": "b"})]
    assert sum(told) == total_bytes(path) == path.stat().st_size
    assert columns(path) == (["text"] if suffix == ".csv" else None)


def test_parquet(tmp_path):
    rows = [{"text": f"文{i}", "messages": [{"role": "user", "content": "x"}]} for i in range(500)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=150)
    told = []
    assert list(iter_records(path, None, on_bytes=told.append)) == [Record(i + 1, row) for i, row in enumerate(rows)]
    assert sum(told) == total_bytes(path)
    assert columns(path) == ["text", "messages"]
    # An object has the fields of all rows: arguments of other calls are no part of a call. Other nulls stay.
    rows = [
        {"call": {"name": "add", "arguments": {"x": 1}, "content": None}},
        {"call": {"name": "day", "arguments": {"y": [2]}, "content": "z"}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert [record.data for record in iter_records(path, None)] == rows
    with pytest.raises(UserError, match=r"b.parquet: not a readable Parquet file"):
        read(write(tmp_path / "b.parquet", path.read_bytes()[:-100]))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "abc', "invalid JSON: Unterminated string starting at character 10"),
        (b'{"text": 1', "invalid JSON: Expecting ',' delimiter"),
        (b'{"text": "ab\xff"}', "invalid UTF-8 at byte 13 of the line (0xff)"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'["text"]', "not an object but a list"),
        (b"17", "not an object but a number"),
        (b"1" * 5000, "invalid JSON: Exceeds the limit"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n' + line + b'\n{"text": "three \\ud83d\\ude00"}\n')
    rows, bad = read(path)
    assert rows == [(1, {"text": "one"}), (3, {"text": "three 😀"})]
    assert len(bad) == 1 and bad[0].line == 2 and reason in bad[0].reason
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: "):
        list(iter_records(path, None))


def test_text_and_csv_with_wrong_bytes(tmp_path):
    rows, bad = read(write(tmp_path / "a.txt", b"a\nb\x80\nc"))
    assert rows == [(1, {"text": "a"}), (3, {"text": "c"})]
    assert bad == [BadLine(2, "invalid UTF-8 at byte 2 of the line (0x80)")]
    rows, bad = read(write(tmp_path / "a.csv", b'q,a\n"1\nx",2\n3,"\xe6\n4"\n5,6,7\n8,9\0\n"a"b,c\n10,11\n'))
    assert rows == [(2, {"q": "1\nx", "a": "2"}), (9, {"q": "10", "a": "11"})]
    assert [(line.line, line.reason.split(":")[0]) for line in bad] == [
        (4, "invalid UTF-8 at byte 4 of the line (0xe6)"),
        (6, "3 fields where the header has 2"),
        (7, "a NUL byte in the row"),
        (8, "invalid CSV"),
    ]


def test_csv_quote_left_open(tmp_path):
    rows, bad = read(write(tmp_path / "a.csv", 'text\na\n"b\nc\nd\n'))
    assert rows == [(2, {"text": "a"})]
    assert bad == [BadLine(3, "invalid CSV: a quote is left open; lines 3 to 5 were lost to it", rest_lost=True)]


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
def test_endless_line(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 1 << 19)
    line = b'{"text": "%s"}' if suffix == ".jsonl" else b"%s"
    path = write(
        tmp_path / f"a{suffix}",
        b"text\n" * (suffix == ".csv") + b"\n".join(line % s for s in [b"a", b"x" * (3 << 20), b"b"]),
    )
    rows, bad = read(path)
    first = 1 + (suffix == ".csv")
    assert rows == [(first, {"text": "a"}), (first + 2, {"text": "b"})]
    assert [line.line for line in bad] == [first + 1] and "longer than" in bad[0].reason


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
def test_truncated_archive(tmp_path, ending, suffix):
    number = random.Random(0)
    texts = [f"{number.random()} 文" for _ in range(20_000)]
    content = {
        ".jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),
        ".csv": "text\n" + "".join(f"{text}\n" for text in texts),
        ".json": json.dumps([{"text": text} for text in texts]),
    }[suffix]
    packed = PACK[ending](content.encode())
    path = write(tmp_path / f"a{suffix}{ending}", packed[: len(packed) * 2 // 3])
    rows, bad = read(path)
    assert 0 < len(rows) < len(texts)
    assert [data["text"] for _, data in rows] == texts[: len(rows)]
    assert len(bad) == 1 and bad[0].rest_lost and bad[0].line == rows[-1][0] + 1
    assert re.search(r"^truncated archive: .* after 0\.\d MB of text; only what .* the rest is lost$", bad[0].reason)
    with pytest.raises(UserError, match=rf"line {bad[0].line}: truncated archive"):
        list(iter_records(path, None))
    with pytest.raises(UserError, match="not a readable"):
        read(write(tmp_path / f"b{suffix}{ending}", b"not an archive at all"))


def test_archives_of_several_parts(tmp_path):
    for ending in (".gz", ".zst"):
        path = write(tmp_path / f"a.txt{ending}", PACK[ending](b"a\nb") + PACK[ending](b"c\nd\n"))
        assert [data["text"] for _, data in read(path)[0]] == ["a", "bc", "d"]


@pytest.mark.parametrize(
    ("content", "good", "reason"),
    [
        (b'[{"a": 1}, {"a": tru}, {"a": 3}]', 1, "invalid JSON: lexical error"),
        (b'[{"a": 1}, {"a": NaN}, {"a": 3}]', 1, "invalid JSON: lexical error"),
        (b'[{"a": 1}, {"a": "x', 1, "invalid JSON: parse error: premature EOF"),
        (b'[{"a": 1}', 1, "invalid JSON: parse error: premature EOF"),
        (b'[{"a": 1} {"a": 2}]', 1, "invalid JSON: parse error: after array element, I expect ',' or ']'"),
        (b'[{"a": 1}] {"a": 2}', 1, "invalid JSON: parse error: trailing garbage"),
    ],
)
def test_a_broken_array_is_read_up_to_the_break(tmp_path, content, good, reason):
    rows, bad = read(write(tmp_path / "a.json", content))
    assert len(rows) == good and len(bad) == 1
    assert bad[0].line == good + 1 and bad[0].reason.startswith(reason)
    assert bad[0].reason.endswith("; nothing after this row could be read") and "\n" not in bad[0].reason
    assert bad[0].rest_lost


def test_bad_rows_inside_an_array(tmp_path):
    deep = b'{"a":' * 3000 + b"1" + b"}" * 3000
    items = [b'{"a": 1}', b"1" * 5000, b'{"a": "\xff"}', deep, b'{"a": 18446744073709551615, "b": 0.1}']
    rows, bad = read(write(tmp_path / "a.json", b"[" + b", ".join(items) + b"]"))
    assert rows == [(1, {"a": 1}), (5, {"a": 2**64 - 1, "b": 0.1})]
    assert bad == [
        BadLine(2, "not an object but a number"),
        BadLine(3, "invalid UTF-8, or half of a surrogate pair, in the row"),
        BadLine(4, "invalid JSON: nested too deeply"),
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11, 1000])
def test_half_of_a_surrogate_pair_in_an_array(size):
    """It is reported and the rows around it are read, wherever the file is cut into chunks."""
    rows = [
        r'{"a": "\ud83d\ude00"}',
        r'{"a": "x\ud800"}',
        r'{"a": "\udc00y"}',
        r'{"a": "\\ud800"}',
        r'{"a": "\ud83d\ud83d"}',
    ]
    raw = "[" + ", ".join([*rows, '{"a": "end"}']) + "]"
    chunks = (raw[i : i + size].encode() for i in range(0, len(raw), size))
    reason = "invalid UTF-8, or half of a surrogate pair, in the row"
    assert list(readers._array_rows(chunks)) == [
        Record(1, {"a": "\U0001f600"}),
        BadLine(2, reason),
        BadLine(3, reason),
        Record(4, {"a": "\\ud800"}),
        BadLine(5, reason),
        Record(6, {"a": "end"}),
    ]


def test_endless_row_of_an_array(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 1 << 19)
    rows, bad = read(write(tmp_path / "a.json", b'[{"a": 1}, {"a": "' + b"x" * (3 << 20) + b'"}, {"a": 3}]'))
    assert rows == [(1, {"a": 1})] and bad[0].line == 2
    assert bad[0].reason == "longer than 0 MB; nothing after this row could be read"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@anything
@given(
    rows=st.lists(st.dictionaries(texts, values, max_size=4), max_size=6),
    size=st.integers(1, 40),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
)
def test_array_equals_json_load_at_any_block_size(rows, size, indent, ascii_only):
    raw = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode()
    chunks = iter([raw[i : i + size] for i in range(0, len(raw), size)])
    assert list(readers._array_rows(chunks)) == [Record(i + 1, row) for i, row in enumerate(json.loads(raw))]


@anything
@given(rows=st.lists(st.lists(texts, min_size=2, max_size=2), min_size=1, max_size=8), data=st.data())
def test_csv_equals_the_csv_module_at_any_block_size(tmp_path, rows, data):
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator=data.draw(st.sampled_from(["\n", "\r\n"])), quoting=csv.QUOTE_ALL)
    writer.writerows([["q", "a"], *rows])
    raw = buffer.getvalue().encode()
    size = data.draw(st.integers(1, 40))
    chunks = iter([raw[i : i + size] for i in range(0, len(raw), size)])
    found = list(readers._csv_rows(Path("x.csv"), chunks))
    assert [list(row.data.values()) for row in found] == rows
    starts, line = [], 2
    for row in rows:
        starts.append(line)
        line += 1 + sum(field.count("\n") for field in row)
    assert [row.line for row in found] == starts


@anything
@given(
    lines=st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b" ")), max_size=30), size=st.integers(1, 50)
)
def test_line_blocks_lose_nothing(lines, size):
    raw = b"\n".join(lines)
    chunks = iter([raw[i : i + size] for i in range(0, len(raw), size)])
    blocks = list(text_files.line_blocks(chunks))
    assert b"".join(data for _, data in blocks) == raw
    number = 1
    for line, data in blocks:
        assert line == number
        number += data.count(b"\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", "\n \n", "no rows in it"),
        ("a.csv", "text\n", "no rows in it"),
        ("a.csv", "\n\n", "only blank lines"),
        ("a.csv", "a,a\n1,2\n", "occurs twice"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "the archive is empty"),
        ("a.txt", "x".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("a.jsonl", '{"text": "春"}'.encode("utf-16-be"), "UTF-16"),
        ("a.csv", "text\n春".encode("utf-32"), "UTF-32"),
        ("a.jsonl", '{"text": "春"}'.encode("utf-32-le"), "UTF-32"),
        ("a.doc", "x", "cannot tell its format"),
        ("a.xlsx", b"PK\x03\x04\x14", "an Excel workbook is not read; save its sheet as CSV"),
        ("a.csv", b"PK\x03\x04\x14", "an Excel workbook or a ZIP archive; save the sheet as CSV"),
        ("a.csv", b"\xd0\xcf\x11\xe0\xa1", "an old Excel or Word file"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "compressed with gzip; rename it to end in .gz"),
        ("a.jsonl", PACK[".zst"](b"{}"), "compressed with zstd"),
        ("a.json", b"PAR1\x15", "Parquet; rename it"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / name, content))


def test_missing_file_and_folder(tmp_path):
    for call in (read, total_bytes, columns):
        with pytest.raises(UserError, match=r"no\.jsonl: no such file"):
            call(tmp_path / "no.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises(UserError, match=r"loop\.jsonl: a link to a file that is not there"):
        read(tmp_path / "loop.jsonl")
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(UserError, match="not a file"):
        read(tmp_path / "d.jsonl")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    def peak(n_rows: int) -> int:
        path = tmp_path / f"{n_rows}{suffix}"
        with path.open("w", encoding="utf-8") as file:
            file.write("[" if suffix == ".json" else "text\n")
            for i in range(n_rows):
                text = f"{i} " + "春" * 300
                file.write(
                    ("," * (i > 0) + json.dumps({"text": text}, ensure_ascii=False))
                    if suffix == ".json"
                    else f'"{text}"\n'
                )
            file.write("]" * (suffix == ".json"))
        script = (
            "from pathlib import Path; from data_pipeline.readers import iter_records\n"
            f"assert sum(1 for _ in iter_records(Path({str(path)!r}), None)) == {n_rows}\n"
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
        )
        return int(subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)

    assert peak(30_000) < 1.2 * peak(3_000)  # 27 MB and 2.7 MB
