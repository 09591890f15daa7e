"""The pages of fast_inference.py that look inside a model, without a browser."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from data_pipeline.tokenize_chats import tokenize_chat_data
from evaluation.inspect import attention_weights, describe_tokens, expert_routing, logit_lens, next_token_logits
from inference.prompts import chat_prompt
from model.LMConfig import preset
from model.model import Transformer
from model.tokenizer import BOS_ID, encode_text, load_tokenizer
from model.weights import load_checkpoint
from model.weights_file import save_checkpoint
from serving.web.inside.menu import PAGES
from serving.web.inside.next_token import Branches
from serving.web.inside.shared import tokens_html
from serving.web.texts import TEXTS

SCRIPT = Path(__file__).resolve().parents[1] / "fast_inference.py"
TOKENIZER = load_tokenizer()
EN = TEXTS["en"]


def save(path: Path, stage: str, seed: int, **fields) -> None:
    torch.manual_seed(seed)
    config = preset("toy", dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=96, initializer_range=0.2, **fields)
    save_checkpoint(path, Transformer(config), info={"stage": stage, "step": 7, "loss": 1.5})


def write(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A folder with a base model, a chat model, a mixture with its metrics, and tokenised dialogues."""
    folder = tmp_path_factory.mktemp("out")
    save(folder / "pretrain_64.pth", "pretrain", 0)
    save(folder / "full_sft_64.pth", "full_sft", 1)
    save(folder / "pretrain_64_moe.pth", "pretrain", 2, use_moe=True, n_routed_experts=4, num_experts_per_tok=2)
    shares = {f"expert_{n}_share": 0.25 for n in range(4)}
    lines = [{"step": n, "tokens": 9 * n, "loss": 5 - n, **shares} for n in (1, 2)]
    write(folder / "pretrain_64_moe.metrics.jsonl", lines)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    write(folder / "chats.jsonl", [{"messages": chat}])
    tokenize_chat_data([folder / "chats.jsonl"], TOKENIZER, folder / "cache", max_tokens=64)
    return folder


@pytest.fixture
def open_page(out, monkeypatch) -> Callable[..., AppTest]:
    """One of the pages as it is after its first run."""

    def start(name: str, weights: str = "pretrain_64.pth", folder: Path = out, language: str = "en") -> AppTest:
        flags = [
            "--out_dir",
            folder,
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--compile",
            "off",
            "--language",
            language,
        ]
        flags += ["--weights", folder / weights] if folder == out else []
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
        return visit(AppTest.from_file(str(SCRIPT), default_timeout=300), name)

    return start


def visit(page: AppTest, name: str) -> AppTest:
    """Open another page in the same tab. `AppTest.switch_page` knows only pages that are files."""
    page._page_hash = calc_hash(name)
    page.run()
    assert not page.exception
    return page


def html(page: AppTest) -> str:
    assert not page.exception
    return re.sub(r"<style>.*?</style>", "", "\n".join(element.value for element in page.html), flags=re.DOTALL)


def shown(page: AppTest) -> str:
    return re.sub(r"<[^>]*>", "", html(page))


def charts(page: AppTest) -> list[dict]:
    return [json.loads(element.proto.spec) for element in page.get("vega_lite_chart")]


def model(out: Path, name: str) -> Transformer:
    return load_checkpoint(out / name, dtype=torch.float32).model.eval()


def test_every_page_says_what_is_missing(tmp_path, open_page):
    """In an empty folder, in another language."""
    page = open_page("tokens", folder=tmp_path, language="zh")
    for name in PAGES:
        page = visit(page, name)
        assert TEXTS["zh"][f"{name}_about"] in [caption.value for caption in page.caption]
        texts = [element.value for kind in (page.warning, page.info) for element in kind]
        if name == "tokens":  # needs no model
            assert not texts and page.selectbox(key="tokenizer_1").value == "bytes"
        else:
            assert len(texts) == 1 and str(tmp_path) in texts[0].replace("\\", "")


def test_choices_outlast_a_page_that_does_not_show_them(out, open_page):
    page = open_page("attention")
    page.selectbox(key="model").set_value(str(out / "full_sft_64.pth")).run()
    page = visit(page, "chat")
    assert page.selectbox(key="model").value == str(out / "full_sft_64.pth")
    page.toggle(key="markdown").set_value(True).run()
    page = visit(visit(visit(page, "runs"), "data"), "logit_lens")
    assert page.selectbox(key="model").value == str(out / "full_sft_64.pth")
    page = visit(page, "chat")
    assert page.selectbox(key="model").value == str(out / "full_sft_64.pth") and page.toggle(key="markdown").value
    page = visit(page, "runs")
    assert page.multiselect(key="runs").value == ["pretrain_64_moe"]
    page.multiselect(key="runs").set_value([]).run()
    assert visit(visit(page, "data"), "runs").multiselect(key="runs").value == []


def test_tokens(out, open_page):
    page = open_page("tokens")
    text = "你好, <b>world</b>"
    page.text_area(key="tokens_text").set_value(text).run()
    ids = encode_text(TOKENIZER, text)
    assert [metric.value for metric in page.metric] == [str(len(ids)), str(len(text.encode()))]
    assert "&lt;" in html(page) and "<b>" not in html(page)
    assert page.dataframe[0].value[EN["id"]].tolist() == ids
    page.text_area(key="tokens_text").set_value("x" * 5000).run()
    assert "5000 characters" in page.info[0].value

    # The text and the model go along to other pages.
    page = visit(page, "attention")
    assert page.text_area(key="attention_text").value == "x" * 5000 and "The first 64 are shown" in page.info[0].value
    page.selectbox(key="model").set_value(str(out / "full_sft_64.pth")).run()
    page = visit(page, "logit_lens")
    assert page.selectbox(key="model").value == str(out / "full_sft_64.pth")


def test_next_token(out, open_page):
    page = open_page("next_token")
    prompt = [BOS_ID, *encode_text(TOKENIZER, EN["next_token_text"])]
    logits = next_token_logits(model(out, "pretrain_64.pth"), prompt)
    first = int(logits.argmax())
    page.slider(key="next_temperature").set_value(0.0).run()
    assert len(charts(page)) == 1
    page.button(key="draw").click().run()  # with a temperature of 0 it can only be the first
    branches: Branches = page.session_state["branches"]
    assert branches.steps == [(first, pytest.approx(float(logits.softmax(-1)[first]), rel=1e-4))]
    page.button(key="greedy").click().run()
    second = int(next_token_logits(model(out, "pretrain_64.pth"), [*prompt, first]).argmax())
    assert [id for id, _ in branches.steps] == [first, second] and "Tokens appended: 2" in shown(page)

    # Another branch, and back to the first one.
    page.button(key="back").click().run()
    branches.add(77, 0.01)
    page.run()
    assert len(branches.tried) == 2
    page.selectbox(key="tried").set_value(0).run()
    assert [id for id, _ in branches.steps] == [first, second]
    page.text_area(key="next_token_text").set_value("Another").run()
    assert page.session_state["branches"].steps == []


def test_attention(out, open_page):
    page = open_page("attention")
    prompt = [BOS_ID, *encode_text(TOKENIZER, EN["attention_text"])]
    weights = attention_weights(model(out, "pretrain_64.pth"), prompt)
    page.slider(key="attention_layer_2").set_value(1)
    page.slider(key="attention_head_4").set_value(3)
    page.slider(key=f"looking_{len(prompt)}").set_value(5).run()
    hints = re.findall(r"title='\d+ [^']*: ([\d.]+)%'", html(page))
    assert hints == [f"{100 * float(weight):.1f}" for weight in weights[0, 2, 4]]
    assert html(page).count("mm-chosen") == 1


def test_logit_lens(out, open_page):
    page = open_page("logit_lens", "full_sft_64.pth")
    question = [{"role": "user", "content": EN["logit_lens_text"]}]
    prompt = chat_prompt(TOKENIZER, [], question, context=96, max_new_tokens=1, history_turns=0).ids
    lens = logit_lens(model(out, "full_sft_64.pth"), prompt)
    rows = re.findall(r"<tr>(.*?)</tr>", html(page), re.DOTALL)
    assert len(rows) == len(lens.ids) + 1
    first = describe_tokens(TOKENIZER, [int(lens.ids[-1, -1, 0])])[0]
    cell = rows[0].rpartition("--shade:")[2]
    assert cell.startswith(f"{float(lens.probabilities[-1, -1, 0]):.3f}") and first.text.strip() in cell


def test_experts(out, open_page):
    page = open_page("experts", "pretrain_64_moe.pth")
    prompt = [BOS_ID, *encode_text(TOKENIZER, EN["experts_text"])]
    routing = expert_routing(model(out, "pretrain_64_moe.pth"), prompt)
    page.slider(key="experts_layer_2").set_value(2).run()
    colours = re.findall(r"mm-token mm-c(\d)' title", html(page))
    assert list(map(int, colours)) == routing.experts[1, :, 0].tolist()
    assert len(charts(page)) == 2  # the load now, and while it was trained
    page.selectbox(key="model").set_value(str(out / "pretrain_64.pth")).run()
    assert "pretrain_64.pth is a dense model" in page.info[0].value


def test_runs_appear_while_they_are_written(tmp_path, open_page):
    lines = [{"step": n, "tokens": 9 * n, "loss": 5 / n, "lr": 0.1} for n in (1, 2, 3)]
    write(tmp_path / "pretrain_64.metrics.jsonl", lines)
    page = open_page("runs", folder=tmp_path)
    assert page.multiselect(key="runs").value == ["pretrain_64"]
    assert page.selectbox(key="metric").options == ["loss", "lr"]
    line = {"step": 1, "tokens": 9, "loss": 3.0, "val_loss": 3.1, "eta_seconds": 5}
    write(tmp_path / "full_sft_64.metrics.jsonl", [line])
    page.run()
    assert sorted(page.multiselect(key="runs").value) == ["full_sft_64", "pretrain_64"]
    table = page.dataframe[0].value
    assert table[EN["state"]].tolist() == [EN["run_running"]] * 2
    assert sorted(table[EN["train_loss"]]) == [pytest.approx(5 / 3), 3.0]
    page.selectbox(key="metric").set_value("val_loss")
    page.multiselect(key="runs").set_value(["pretrain_64"]).run()
    assert "val_loss" in page.info[0].value


def test_compare(out, open_page):
    page = open_page("compare")
    names = ["pretrain_64.pth", "full_sft_64.pth"]
    page.multiselect(key="compared").set_value([str(out / name) for name in names])
    page.slider(key="compare_temperature").set_value(0.0)
    page.slider(key="compare_longest").set_value(5)
    page.button(key="compare_ask").click().run()
    answers = page.session_state["answers"]
    assert [(answer.model_name, answer.continues) for answer in answers] == [(names[0], True), (names[1], False)]
    assert all(1 <= answer.tokens <= 5 and not answer.running for answer in answers)
    assert all(name in shown(page) for name in names) and EN["compare_facts"] in shown(page)


def test_data(open_page):
    page = open_page("data")
    assert "Documents: 1; " in shown(page)
    assert "mm-c0 mm-untrained" in html(page) and EN["counted"] in html(page)
    page.selectbox(key="seq_len").set_value(64).run()
    assert "padding: " in shown(page)


def test_white_space_and_line_ends_can_be_seen():
    tokens = describe_tokens(TOKENIZER, encode_text(TOKENIZER, "a\n b"))
    shown = tokens_html(tokens, ["mm-c0"] * len(tokens), ["<'"] * len(tokens))
    assert "↵</span><br>" in shown and "title='&lt;&#x27;'" in shown
