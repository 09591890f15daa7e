"""evaluation/runs.py and evaluation/token_rows.py: metrics and tokenised data are read as they were written, and drawn."""

from __future__ import annotations

import json
import math
import os
import time

import numpy as np
import pytest
from matplotlib.figure import Figure

from common.errors import UserError
from data_pipeline.tokenize import tokenize_pretrain_data
from data_pipeline.tokenize_chats import tokenize_chat_data
from evaluation.runs import curve, list_runs, logged_shares, read_metrics
from evaluation.token_rows import first_rows, list_datasets, row_tokens
from model.chat_format import render_chat
from model.tokenizer import load_tokenizer
from trainer.metrics import plot_losses
from trainer.options import TrainOptions
from trainer.report import write_markdown_report

TOKENIZER = load_tokenizer()


def write(path, lines) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_runs_of_a_folder_and_of_the_folders_in_it(tmp_path):
    assert list_runs(tmp_path / "none") == []
    write(tmp_path / "pretrain_64.metrics.jsonl", [{"step": 1, "eta_seconds": 60.0}])
    write(tmp_path / "quick" / "full_sft_64.metrics.jsonl", [{"step": 2, "eta_seconds": 0.0}])
    os.utime(tmp_path / "quick" / "full_sft_64.metrics.jsonl", (time.time() + 1,) * 2)
    ended, running = list_runs(tmp_path)
    assert [ended.name, running.name] == ["quick/full_sft_64", "pretrain_64"]
    assert running.running(read_metrics(running.path)) and not ended.running(read_metrics(ended.path))
    os.utime(running.path, (time.time() - 600,) * 2)  # killed: nothing was written for ten minutes
    stale = list_runs(tmp_path)[1]
    assert not stale.running(read_metrics(stale.path)) and stale.stamp != running.stamp


def test_metrics_while_a_line_is_being_written(tmp_path):
    path = tmp_path / "a.metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0, "expert_0_share": 0.4, "expert_max_load": 1.2}\n{"step": 2, "lo')
    (line,) = read_metrics(path)
    assert line["loss"] == 2.0 and logged_shares(line) == [0.4]
    assert read_metrics(tmp_path / "none.metrics.jsonl") == []


def test_the_plot_shows_other_runs_over_the_tokens_seen(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure", lambda **settings: figures.append(Figure(**settings)) or figures[-1]
    )
    mine = [{"step": n, "tokens": 100 * n, "loss": 9 - n} for n in range(1, 4)]
    other = [{"step": n, "tokens": 400 * n, "loss": 8 - n} | ({"val_loss": 5.0} if n == 3 else {}) for n in range(1, 4)]
    plot_losses(mine, tmp_path / "a.png", "a", others=[])
    plot_losses(mine, tmp_path / "b.png", "b", others=[("theirs", other), ("of another kind", [{"step": 1}])])
    drawn = [{line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines} for figure in figures]
    assert drawn[0] == {"training": [[1, 8], [2, 7], [3, 6]]}
    assert drawn[1] == {
        "training": [[100, 8], [200, 7], [300, 6]],
        "theirs training": [[400, 7], [800, 6], [1200, 5]],
        "theirs validation": [[1200, 5]],
    }
    assert [figure.axes[0].get_xlabel() for figure in figures] == ["optimizer step", "tokens seen"]


@pytest.mark.parametrize("text", [None, "", "loss 2.0\n", '{"step": 1, "text": "sample"}\n'])
def test_a_file_without_metrics_to_compare_with_is_refused(tmp_path, text):
    path = tmp_path / "a.samples.jsonl"
    if text is not None:
        path.write_text(text)
    for wrong in (path, tmp_path):
        assert any(f"--compare {wrong} holds no metrics" in error for error in TrainOptions(compare=[wrong]).validate())


def test_a_report_in_markdown_is_a_page_without_other_files(tmp_path):
    plot_losses([{"step": 1, "tokens": 9, "loss": 1.0}], tmp_path / "out" / "a.png", "a", others=[])
    text = (
        "# Runs\n\n| run | loss |\n|---|---|\n| a<b> | 1 |\n\n![a](out/a.png) ![none](none.png)\n\n<script>x</script>\n"
    )
    write_markdown_report(tmp_path / "report.html", "A & B", text)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>A &amp; B</title>" in page and "<td>a&lt;b&gt;</td>" in page and "<script>" not in page
    assert page.count("data:image/png;base64,") == 1 and 'src="none.png"' in page


def test_curves_keep_every_point_or_the_means_of_equal_parts():
    lines = [{"step": n, "tokens": 10 * n, "loss": 1 / n} for n in range(1, 101)]
    assert curve(lines, "loss") == [(n, 1 / n) for n in range(1, 101)]
    thinned = curve(lines, "loss", "tokens", points=20)
    assert len(thinned) == 20
    assert thinned[0] == pytest.approx((30, np.mean([1 / n for n in range(1, 6)])))
    # Lines without the metric, and values that cannot be drawn.
    odd = [
        {"step": 1},
        {"step": 2, "loss": math.nan},
        {"loss": 1.0},
        {"step": 3, "loss": None},
        {"step": 4, "loss": 0.5},
    ]
    assert curve(odd, "loss") == [(4, 0.5)]
    assert curve([], "loss") == []


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = ["short text", "another one, a little longer than the first", "word " * 60]
    write(folder / "texts.jsonl", [{"text": text} for text in texts])
    chats = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"hello {n}"}]} for n in "ab"
    ]
    write(folder / "chats.jsonl", chats)
    tokenize_pretrain_data([folder / "texts.jsonl"], TOKENIZER, folder / "cache")
    tokenize_chat_data([folder / "chats.jsonl"], TOKENIZER, folder / "cache", max_tokens=64)
    return folder / "cache"


def test_data_sets_of_a_cache(cache, tmp_path):
    found = {info["kind"]: info for info in list_datasets(cache, tmp_path)}
    assert {kind: info["documents"] for kind, info in found.items()} == {"pretrain": 3, "chat": 2}
    assert [source["name"] for source in found["chat"]["sources"]] == ["chats.jsonl"]
    broken = tmp_path / "pretrain-0"
    broken.mkdir()
    (broken / "info.json").write_text("[")
    assert list_datasets(tmp_path) == []
    with pytest.raises(UserError, match="is damaged"):
        first_rows(broken, 64)


def test_rows_of_texts_hold_every_document_once(cache):
    (info,) = [info for info in list_datasets(cache) if info["kind"] == "pretrain"]
    rows = first_rows(info["folder"], seq_len=32)
    shown = [row_tokens(rows, n) for n in range(len(rows))]
    assert all(len(row.ids) + row.n_padding == 32 for row in shown)
    targets = sum(int(row.trained.sum()) for row in shown)
    assert targets == info["tokens"] - info["documents"]  # each token but a document's first, however it is cut
    for row in shown:
        first = np.flatnonzero(np.diff(row.document, prepend=-1))
        assert not row.trained[first].any() and row.trained.sum() == len(row.ids) - len(first)
        assert set(np.diff(row.document)) <= {0, 1}


def test_rows_of_dialogues_count_the_answers(cache):
    (info,) = [info for info in list_datasets(cache) if info["kind"] == "chat"]
    rows = first_rows(info["folder"], seq_len=64)
    (row,) = [row_tokens(rows, n) for n in range(len(rows))]
    found = []
    for n in range(2):
        here = row.document == n
        found.append((row.ids[here].tolist(), row.trained[here].tolist()))
    chats = [
        render_chat(TOKENIZER, [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"hello {n}"}])
        for n in "ab"
    ]
    assert sorted(found) == sorted((list(ids), list(mask)) for ids, mask in chats)
