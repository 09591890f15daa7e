"""data_process.py download, against a server that speaks what is used of both hubs' protocols, and loses connections."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import threading
import time
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

import pytest
from huggingface_hub import constants

from common.progress import Progress
from data_pipeline import download

SFT, DPO, CEVAL = (download.DATA_SETS[name] for name in ("sft", "dpo", "ceval"))
MINI = download.SOURCES["modelscope"]["sft-mini"]
(MINI_FILE,) = MINI.files
ROWS = b"history,q,a\n" + b'"[]",question,answer\n' * 20_000


def zipped(**members: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return file.getvalue()


CSV = "id,question,A,B,C,D,answer\n0,What?,a,b,c,d,A\n"
EXAM = zipped(
    **{"val/law_val.csv": CSV, "dev/law_dev.csv": CSV, "../evil.csv": "x", "val/../../evil.csv": "x", "a.py": "x"}
)


class Hub(ThreadingHTTPServer):
    """Hugging Face with three repositories, ModelScope with one. `cut`: bytes of each answer until it is lost."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, bytes] = {f"{SFT.repo}/sft_data_single.csv": ROWS, f"{CEVAL.repo}/ceval-exam.zip": EXAM}
        self.files |= {f"{SFT.repo}/sft_data_multi.csv": ROWS[:-20], f"{MINI.repo}/{MINI_FILE}": ROWS}
        self.files |= {f"{MINI.repo}/{name}": b"other" for name in ("a.jsonl", "b.jsonl", "images/c.png", "z.jsonl")}
        self.files |= {f"{DPO.repo}/{name}": json.dumps([{"prompt": name}]).encode() for name in DPO.files}
        self.small = {f"{DPO.repo}/{name}" for name in DPO.files}  # in Git itself, without a SHA-256
        self.cut: list[int] = []
        self.busy = 0  # how many requests for content are answered with an error of the server
        self.ranges: list[str | None] = []  # of each request for content
        self.tokens: list[str | None] = []  # of each request
        self.wrong: set[str] = set()  # their content is not the one that was described
        self.whole = False  # whether requests for a part are answered with all
        self.listing: bytes | None = None  # ModelScope's answer instead of the right one

    def handle_error(self, *_: object) -> None:
        pass  # the client is gone


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self.server.tokens.append(self.headers.get("Authorization"))
        repo, _, revision = urlparse(self.path).path.removeprefix("/api/datasets/").partition("/paths-info/")
        body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        known = {data.repo: data.revision for data in (SFT, CEVAL)}
        if known.get(repo) != unquote(revision):
            self.answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            return
        found = []
        for name in body["paths"]:
            if (content := self.server.files.get(f"{repo}/{name}")) is None:
                continue
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
            if f"{repo}/{name}" not in self.server.small:
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
            found.append(entry)
        self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def do_GET(self) -> None:
        self.server.tokens.append(self.headers.get("Authorization"))
        if self.path.startswith("/api/v1/datasets/"):
            self.modelscope()
            return
        if not self.path.startswith("/cdn/"):  # large files are on another host
            repo, _, rest = self.path.removeprefix("/datasets/").partition("/resolve/")
            place = f"http://localhost:{self.server.server_address[1]}/cdn/{repo}/{rest.partition('/')[2]}"
            self.answer(302, b"", {"Location": place})
            return
        if self.server.busy:
            self.server.busy -= 1
            self.answer(502, b"", {})
            return
        name = unquote(self.path.removeprefix("/cdn/"))
        content = self.server.files[name]
        if name in self.server.wrong:
            content = content[:-1] + b"?"
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        asked = None if self.server.whole else asked
        begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        headers = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"} if asked else {}
        self.answer(206 if asked else 200, content[begin:], headers)

    def modelscope(self) -> None:
        url = urlparse(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        repo, _, command = url.path.removeprefix("/api/v1/datasets/").partition("/repo")
        if repo != MINI.repo or query["Revision"] != "master":
            self.answer(404, b'{"Code": 10010205001, "Message": "not found", "Success": false}', {})
        elif command == "/tree":
            files = {name: text for name, text in sorted(self.server.files.items()) if name.startswith(f"{repo}/")}
            entries = [{"Type": "tree", "Path": "images", "Size": 0, "Sha256": ""}] + [
                {"Type": "blob", "Path": name.removeprefix(f"{repo}/"), "Size": len(text), "Sha256": sha256(text)}
                for name, text in files.items()
            ]
            page = {"Files": entries[: int(query["PageSize"])], "TotalCount": len(entries)}
            right = json.dumps({"Code": 200, "Data": page, "Message": "success", "Success": True}).encode()
            self.answer(200, self.server.listing or right, {"Content-Type": "application/json"})
        else:
            place = f"http://localhost:{self.server.server_address[1]}/cdn/{repo}/{query['FilePath']}"
            self.answer(302, b"", {"Location": place})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if status < 300 and self.path.startswith("/cdn/") and self.server.cut:
            body = body[: self.server.cut.pop(0)]
            self.close_connection = True
        self.wfile.write(body)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # another test may have switched it on
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what arrived of a chunk (10 MB) is loaded again
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def load(run_here, hub, tmp_path):
    return lambda *names: run_here("data_process.py", "download", *names, "--out_dir", tmp_path / "data")


def test_the_list_needs_no_network(run_here):
    listed = run_here("data_process.py", "download")
    assert listed.returncode == 0
    assert all(name in listed.stdout and data.page in listed.stdout for name, data in download.DATA_SETS.items())
    wrong = run_here("data_process.py", "download", "sfd")
    assert wrong.returncode == 2 and "no data set sfd; there are pretrain, sft," in wrong.stderr
    listed = run_here("data_process.py", "download", "--source", "modelscope")
    assert "https://www.modelscope.cn/datasets/gongjy/minimind_dataset/files" in listed.stdout
    assert "sft-mini" in listed.stdout and "ceval" not in listed.stdout
    wrong = run_here("data_process.py", "download", "sft-mini", "ceval", "--source", "modelscope")
    assert wrong.returncode == 2 and "pretrain-mini, sft-mini, vlm, but not ceval: leave --source" in wrong.stderr
    wrong = run_here("data_process.py", "sft", "--source", "modelscope")
    assert wrong.returncode == 2 and "--source is for the stage download" in wrong.stderr
    wrong = run_here("data_process.py", "sft", "ceval")
    assert wrong.returncode == 2 and "only download takes names" in wrong.stderr


def test_files_arrive_though_connections_are_lost(load, hub, tmp_path):
    hub.cut, hub.busy = [100_000, 50_000, 70_000], 2
    result = load("sft", "dpo", "ceval", "sft")
    assert result.returncode == 0, result.stderr
    out = tmp_path / "data"
    assert (out / "sft_data_single.csv").read_bytes() == ROWS and (out / "sft_data_multi.csv").read_bytes() == ROWS[
        :-20
    ]
    assert len(hub.tokens) > 8 and not any(hub.tokens)  # a mirror gets no token
    assert hub.ranges[:4] == [None, "bytes=100000-", "bytes=150000-", "bytes=220000-"]
    assert all((out / name).read_bytes() == hub.files[f"{DPO.repo}/{name}"] for name in DPO.files)
    assert (out / "ceval/ceval-exam/val/law_val.csv").read_text() == CSV
    unpacked = sorted(str(path.relative_to(out / "ceval")) for path in (out / "ceval").rglob("*") if path.is_file())
    assert unpacked == ["ceval-exam/dev/law_dev.csv", "ceval-exam/val/law_val.csv"]
    assert not list(tmp_path.rglob("evil*")) and not (out / download.STAGING).exists()
    for words in ("0.4 MB  sft_data_single.csv", "free in", SFT.page, "CC BY-NC-SA 4.0"):
        assert words in result.stdout, result.stdout

    hub.ranges.clear()
    again = load("sft", "ceval")
    assert again.returncode == 0 and again.stdout.count("is already there") == 3 and not hub.ranges
    assert "to download" not in again.stdout


def test_what_another_download_began_is_kept(load, tmp_path):
    begun = tmp_path / "data" / download.STAGING / "0123.part"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(b"some gigabytes")
    assert load("ceval").returncode == 0
    assert [*begun.parent.iterdir()] == [begun]


def test_a_stopped_download_continues(load, hub, tmp_path):
    hub.cut = [100_000, *[0] * 100]
    result = load("sft")
    assert result.returncode == 1 and "the same command continues" in result.stderr.splitlines()[-1]
    out = tmp_path / "data"
    assert not (out / "sft_data_single.csv").exists()
    hub.cut, hub.ranges = [], []
    assert load("sft").returncode == 0
    assert hub.ranges == ["bytes=100000-", None]
    assert (out / "sft_data_single.csv").read_bytes() == ROWS


def test_damaged_content_gets_no_name(load, hub, tmp_path):
    for name in ("sft_data_single.csv", "dpo/dpo_zh_demo.json"):
        hub.wrong = {f"{SFT.repo}/{name}"}
        result = load("sft" if "sft" in name else "dpo")
        assert result.returncode == 1 and f"{name} arrived damaged" in result.stderr, result.stderr
        assert not (tmp_path / "data" / name).exists()
    hub.wrong = set()
    assert load("sft", "dpo").returncode == 0


def test_what_stands_in_the_way_is_named(load, hub, tmp_path, monkeypatch):
    out = tmp_path / "data"
    out.mkdir()
    own = out / "sft_data_single.csv"
    own.write_text("my own file")
    result = load("sft")
    assert result.returncode == 1 and f"{own} exists and is not the sft_data_single.csv of" in result.stderr
    assert own.read_text() == "my own file" and not hub.ranges
    own.unlink()

    with monkeypatch.context() as patched:
        usage = namedtuple("usage", "total used free")
        patched.setattr(shutil, "disk_usage", lambda path: usage(0, 0, download.MARGIN + 100))
        result = load("sft")
        assert result.returncode == 1 and "0.00 GB are needed and 0.27 GB are free" in result.stderr
        assert not hub.ranges

    del hub.files[f"{SFT.repo}/sft_data_multi.csv"]
    result = load("sft")
    assert result.returncode == 1 and f"{SFT.page} has no sft_data_multi.csv (any more)" in result.stderr
    result = load("vlm")
    assert result.returncode == 1 and "minimind-v_dataset: the hub answers: 404" in result.stderr, result.stderr
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = load("sft")
    assert result.returncode == 1 and "no useful answer from http://127.0.0.1:9" in result.stderr


def test_modelscope_sends_files_though_connections_are_lost(load, hub, tmp_path):
    hub.cut, hub.busy = [100_000, 50_000, *[0] * 100], 2
    result = load("sft-mini", "--source", "modelscope")
    assert result.returncode == 1 and "the same command continues" in result.stderr.splitlines()[-1], result.stderr
    hub.cut, hub.ranges = [20_000], []
    result = load("sft-mini", "--source", "modelscope")
    assert result.returncode == 0, result.stderr
    assert hub.ranges == ["bytes=150000-", "bytes=170000-"] and not any(hub.tokens)
    assert (tmp_path / "data" / MINI_FILE).read_bytes() == ROWS and not (tmp_path / "data" / download.STAGING).exists()
    for words in (f"0.4 MB  {MINI_FILE}", "free in", MINI.page, MINI.licence):
        assert words in result.stdout, result.stdout
    hub.ranges.clear()
    again = load("sft-mini", "--source", "modelscope")
    assert again.returncode == 0 and "is already there" in again.stdout and not hub.ranges


def test_modelscope_may_send_all_when_asked_for_the_rest(load, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(Progress, "EVERY", 0.0)  # a line each time, also where no byte is left of the first answer
    hub.cut, hub.whole = [100_000], True
    assert load("sft-mini", "--source", "modelscope").returncode == 0
    assert hub.ranges == [None, "bytes=100000-"] and (tmp_path / "data" / MINI_FILE).read_bytes() == ROWS


def test_wrong_answers_of_modelscope_are_errors(load, hub, tmp_path, monkeypatch):
    hub.wrong = {f"{MINI.repo}/{MINI_FILE}"}
    result = load("sft-mini", "--source", "modelscope")
    assert result.returncode == 1 and f"{MINI_FILE} arrived damaged" in result.stderr, result.stderr
    assert not (tmp_path / "data" / MINI_FILE).exists()
    result = load("pretrain-mini", "--source", "modelscope")
    assert result.returncode == 1 and f"{MINI.page} has no pretrain_t2t_mini.jsonl" in result.stderr, result.stderr
    result = load("vlm", "--source", "modelscope")
    assert result.returncode == 1 and "minimind-v_dataset: the hub answers: Client" in result.stderr, result.stderr
    without_hash, empty_hash = (
        json.dumps({"Data": {"Files": [{"Path": MINI_FILE, "Size": 5} | more]}}).encode()
        for more in ({}, {"Sha256": ""})
    )
    for hub.listing in (b"<html>", b'{"Data": null, "Message": "down", "Success": false}', without_hash, empty_hash):
        result = load("sft-mini", "--source", "modelscope")
        assert result.returncode == 1 and f"no useful answer from {hub.url}" in result.stderr, result.stderr
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    result = load("sft-mini", "--source", "modelscope")
    assert result.returncode == 1 and "no useful answer from http://127.0.0.1:9" in result.stderr
    assert "leave --source out" in result.stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (zipped(**{"train/a.csv": "x"}), "no folder val with CSV files"),
        (zipped(**{"val/a_val.csv": "x" * 2000}), "would unpack to 2,000 bytes"),
        (b"no archive", "cannot be unpacked"),
        (EXAM.replace(CSV.encode(), CSV.encode().upper(), 1), "cannot be unpacked"),
    ],
)
def test_other_archives_are_refused(tmp_path, monkeypatch, content, reason):
    monkeypatch.setattr(download, "MAX_UNPACKED", 1000)
    archive = tmp_path / "ceval-exam.zip"
    archive.write_bytes(content)
    with pytest.raises(download.UserError, match=reason):
        download.unpack(archive, tmp_path / "exam")
    assert [path.name for path in tmp_path.iterdir()] == ["ceval-exam.zip"]
