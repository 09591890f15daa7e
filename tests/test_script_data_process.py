"""data_process.py as users run it."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("MINIMIND_DATA", ROOT.parent / "shared" / "data"))
DUMP = "mobvoi_seq_monkey_general_open_corpus.jsonl"


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "data_process.py"), *map(str, args)]
    return subprocess.run(command, check=False, capture_output=True, text=True, encoding="utf-8", **kwargs)


def fails(*args, **kwargs) -> str:
    """Run, expect exit code 1 and one line on stderr; return it."""
    result = run(*args, **kwargs)
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture
def raw(tmp_path):
    """A folder with the three dumps."""
    folder = tmp_path / "raw"
    (folder / "dpo").mkdir(parents=True)
    (folder / DUMP).write_text('{"text": "春眠不觉晓"}\n{"text": "cut of\n{"text": "hello"}\n', encoding="utf-8")
    (folder / "sft_data_zh.jsonl").write_text(
        '{"instruction": "问？", "input": "", "output": "答", "history": []}\n', encoding="utf-8"
    )
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    (folder / "dpo" / "one.json").write_text(json.dumps([pair]), encoding="utf-8")
    (folder / "dpo" / "train_data.json").write_text("[]", encoding="utf-8")
    return folder


def test_all(raw, tmp_path):
    out = tmp_path / "out"
    result = run("all", "--data_dir", raw, "--out_dir", out, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (out / "pretrain_data.csv").read_text(encoding="utf-8") == 'text\n"春眠不觉晓"\n"hello"\n'
    assert (out / "sft_data.csv").read_text(encoding="utf-8") == 'history,q,a\n"[]","问？","答"\n'
    assert len(json.loads((out / "dpo" / "train_data.json").read_text(encoding="utf-8"))) == 1
    assert f"{DUMP}:2: invalid JSON: Unterminated string" in result.stdout
    assert "dropped: cannot be read" in result.stdout

    (raw / "sft_data_zh.jsonl").unlink()
    result = run("all", "--data_dir", raw, "--out_dir", out)
    assert result.returncode == 0 and "sft: skipped, there is no" in result.stdout
    assert f"replaced {out / 'pretrain_data.csv'}: 2 rows" in result.stdout


def test_flags_reach_the_filters(raw, tmp_path):
    result = run("pretrain", "--data_dir", raw, "--out_dir", tmp_path, "--min_chinese_ratio", 0.9, "--max_chars", 5)
    assert result.returncode == 0
    assert (tmp_path / "pretrain_data.csv").read_text(encoding="utf-8") == 'text\n"春眠不觉晓"\n'
    assert "longer than 4" in fails("pretrain", "--data_dir", raw, "--out_dir", tmp_path, "--max_chars", 4)
    assert "shorter than 3" in fails("sft", "--data_dir", raw, "--out_dir", tmp_path, "--min_q_chars", 3)
    assert "shorter than 2" in fails("sft", "--data_dir", raw, "--out_dir", tmp_path, "--min_a_chars", 2)
    wrong = run("all", "--input", "x", "--max_chars", "-1", "--min_chinese_ratio", "2")
    assert wrong.returncode == 2
    for problem in ("--max_chars -1 must be at least 0", "2.0 must be between 0 and 1", "--input needs one stage"):
        assert problem in wrong.stderr
    wrong = run(
        "pretrain", "--input", "x", "--data_dir", raw, "--min_a_chars", 3, "--history", "only", "--min_chars", 3
    )
    assert wrong.returncode == 2 and wrong.stderr.splitlines() == [
        "error: --min_a_chars is for the stage sft and does nothing for pretrain: leave it out",
        "error: --history is for the stage sft and does nothing for pretrain: leave it out",
        "error: --input names the files itself: leave --data_dir out",
    ]


def test_wrong_input_is_one_clear_line(tmp_path):
    def attempt(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return fails("pretrain", "--input", path, "--out_dir", tmp_path / "out")

    assert "the file is empty" in attempt("a.jsonl", b"")
    assert "needs the columns text, but this file has a, b" in attempt("a.csv", b"a,b\n1,2\n")
    assert "a.jsonl:1: invalid JSON: Unterminated string" in attempt("a.jsonl", b'{"text": "cut')
    assert "a.jsonl:1: invalid UTF-8 at byte 11" in attempt("a.jsonl", b'{"text": "\xff"}\n')
    assert "no such file" in fails("pretrain", "--input", tmp_path / "none.jsonl", "--out_dir", tmp_path)
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    link = fails("pretrain", "--input", tmp_path / "loop.jsonl", "--out_dir", tmp_path)
    assert "loop.jsonl: a link to a file that is not there" in link
    nothing = fails("all", "--data_dir", tmp_path, "--out_dir", tmp_path)
    assert f"no raw data in {tmp_path}. Download into it {DUMP} (ModelScope: ddzhu123/seq-monkey), sft_data" in nothing
    assert str(ROOT / "dataset" / "sample") in nothing
    assert not (tmp_path / "out" / "pretrain_data.csv").exists()


def test_out_dir_that_cannot_be_written(raw, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = run("all", "--data_dir", raw, "--out_dir", tmp_path / "file")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and result.stderr.startswith("error: --out_dir ")
    assert "choose another" in result.stderr
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if not os.access(locked, os.W_OK):  # root may write anywhere
        result = run("all", "--data_dir", raw, "--out_dir", locked)
        assert result.returncode == 2 and "choose another" in result.stderr


def test_a_lost_end_is_an_error_that_keeps_what_was_read(raw, tmp_path):
    """Also of the other stages, which are done."""
    packed = gzip.compress("".join(f'{{"text": "text {i}"}}\n' for i in range(20_000)).encode())
    (raw / DUMP).rename(raw / "whole.jsonl")
    (raw / f"{DUMP}.gz").write_bytes(packed[: len(packed) // 2])
    (raw / "dpo" / "one.json").write_text(
        '[{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": ', encoding="utf-8"
    )
    message = fails("all", "--data_dir", raw, "--out_dir", tmp_path)
    with (tmp_path / "pretrain_data.csv").open(encoding="utf-8", newline="") as file:
        n_rows = sum(1 for _ in csv.DictReader(file))
    assert 0 < n_rows < 20_000 and f"{DUMP}.gz:{n_rows + 1}: truncated archive: " in message
    assert "one.json:2: invalid JSON: parse error: premature EOF; nothing after this row could be read. What" in message
    assert (tmp_path / "sft_data.csv").exists()
    assert len(json.loads((tmp_path / "dpo" / "train_data.json").read_text(encoding="utf-8"))) == 1


# Runs data_process.py, which says so when it has written a row, and waits.
HANG = """
import runpy, time
from data_pipeline import cleaning
def hang(self, line):
    print("hanging", flush=True)
    time.sleep(60)
cleaning._Output.add = hang
runpy.run_path("data_process.py", run_name="__main__")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped(raw, tmp_path, number):
    """It says so, keeps the old file, and leaves nothing for ever; another process is not let in meanwhile."""
    command = ["sft", "--data_dir", str(raw), "--out_dir", str(tmp_path / "out")]
    out = tmp_path / "out"
    assert run(*command).returncode == 0
    before = {path.name: path.read_bytes() for path in out.glob("[!.]*")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # A test run in the background has Ctrl-C switched off, and its children inherit that.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([sys.executable, "-c", HANG, *command], cwd=ROOT, env=environment, **pipes)
    try:
        assert process.stdout.readline() == "hanging\n"
        assert len(list(out.glob(".*.tmp"))) == 3
        if number == signal.SIGTERM:
            assert "another process is writing" in fails(*command)
    finally:
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        what = "stopped by SIGTERM" if number == signal.SIGTERM else "interrupted"
        assert err == f"error: {what}: earlier output files are unchanged\n"
    assert len(list(out.glob(".*.tmp"))) == (3 if number == signal.SIGKILL else 0)
    assert run(*command).returncode == 0
    assert not list(out.glob(".*.tmp")) and before == {path.name: path.read_bytes() for path in out.glob("[!.]*")}


def test_names_that_are_not_ascii_in_a_locale_that_is(tmp_path):
    """Python takes them for bytes without a meaning then; they must neither stop a run nor its report."""
    source = tmp_path / "数据.jsonl"
    source.write_text('{"text": "春眠不觉晓"}\n{"text": 坏}\n', encoding="utf-8")
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = run("pretrain", "--input", source, "--out_dir", tmp_path / "出", env=plain)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "出" / "pretrain_data.csv").read_text(encoding="utf-8") == 'text\n"春眠不觉晓"\n'
    rejects = (tmp_path / "出" / "pretrain_data.rejects.jsonl").read_text(encoding="utf-8")
    assert os.fsencode(json.loads(rejects)["file"]) == os.fsencode(source)


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
def test_full_disk(tmp_path):
    """A limit on the size of files stops the write half-way, as a full disk does."""
    import resource

    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"{i} " * 60}) + "\n" for i in range(3000)), encoding="utf-8")
    (tmp_path / "pretrain_data.csv").write_text("text\nold\n", encoding="utf-8")
    message = fails(
        "pretrain", "--input", source, "--out_dir", tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)),
    )  # fmt: skip
    assert "no space left in" in message and "unchanged" in message
    assert (tmp_path / "pretrain_data.csv").read_text(encoding="utf-8") == "text\nold\n"
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_input(tmp_path):
    """All rows differ, so that neither the pipeline nor the search for duplicates may keep them."""

    def peak(n_rows: int) -> tuple[int, int]:
        source = tmp_path / f"{n_rows}.jsonl"
        with source.open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"text": f"{i} " + "春" * 100}, ensure_ascii=False) + "\n" for i in range(n_rows)
            )
        script = (
            "import resource, sys, runpy\n"
            "from data_pipeline import cleaning\n"
            "if __name__ == '__main__':\n"
            "    cleaning.BYTES_PER_WORKER = 1\n"
            "    try: runpy.run_path('data_process.py', run_name='__main__')\n"
            "    except SystemExit as done: assert not done.code\n"
            "    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # the largest one's\n"
            # not RUSAGE_SELF: it starts with the peak of the process that started this one
            "    main = open('/proc/self/status').read().split('VmHWM:')[1].split()[0]\n"
            "    print(main, worker, file=sys.stderr)\n"
        )
        (tmp_path / "peak.py").write_text(script, encoding="utf-8")
        args = ["pretrain", "--input", source, "--out_dir", tmp_path / "out", "--num_workers", "2"]
        result = subprocess.run(
            [sys.executable, tmp_path / "peak.py", *args], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        main, worker = map(int, result.stderr.split()[-2:])
        return main, worker

    small, large = peak(9_000), peak(90_000)  # 2.9 MB and 29 MB
    assert 0 < large[0] < 1.2 * small[0] and 0 < large[1] < 1.2 * small[1]


@pytest.mark.skipif(not DATA.exists(), reason="the real data is not here")
def test_real_data(tmp_path):
    dumps = {
        "pretrain": DATA / "pretrain" / DUMP,
        "sft": DATA / "sft" / "sft_data_zh.jsonl",
        "dpo": DATA / "dpo" / "dpo_zh_demo.json",
    }
    for stage, path in dumps.items():
        result = run(stage, "--input", path, "--out_dir", tmp_path)
        assert result.returncode == 0, result.stderr
        assert "cannot be read" not in result.stdout and "wrong fields" not in result.stdout
    with (tmp_path / "pretrain_data.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    kept = {}
    with dumps["pretrain"].open(encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)["text"].strip()
            if 0 < len(text) <= 512:
                kept[text] = None
    assert texts == list(kept)
