"""fast_inference.py: the page's logic without a browser, and the page in a real one."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from serving_helpers import SUM, answer_ids, png, scripted_outputs, tiny_model
from streamlit.testing.v1 import AppTest

from common.files import atomic_folder
from data_pipeline.images import data_url, open_image
from export.huggingface import describe, write_minimind
from inference.generator import generate_text
from inference.model_loader import TextGenerator
from inference.options import SamplingParams
from inference.vision import ImageProcessor
from model.chat_format import truncate_chat, with_images
from model.LMConfig import preset
from model.lora import add_adapter, save_adapter
from model.model import Transformer
from model.tokenizer import EOS_ID, TOKENIZER_DIR, load_tokenizer
from model.weights import load_checkpoint
from model.weights_file import save_checkpoint
from serving.chat_model import ChatModel
from serving.web.texts import TEXTS

SCRIPT = Path(__file__).resolve().parents[1] / "fast_inference.py"
TOKENIZER = load_tokenizer()
CPU = ["--device", "cpu", "--dtype", "float32", "--language", "en"]
GREEDY = [*CPU, "--temperature", "0", "--max_new_tokens", "12"]
EN = TEXTS["en"]


def save(path: Path, stage: str, seed: int, endless: bool = False) -> Path:
    torch.manual_seed(seed)
    config = preset("toy", dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=96, initializer_range=0.2)
    model = Transformer(config)
    if endless:
        with torch.no_grad():
            model.output.weight[EOS_ID] = 0  # never a likely token: this model writes until it is stopped
    save_checkpoint(path, model, info={"stage": stage, "step": 7, "loss": 1.5})
    return path


def save_sft_vlm(folder: Path) -> Transformer:
    model = tiny_model(sees=True)
    model.config.max_seq_len = 96
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder / "sft_vlm_32.pth", model, info={"stage": "sft_vlm"})
    return model


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A folder with a model of every kind; rl is the newest that answers."""
    folder = tmp_path_factory.mktemp("out")
    for i, stage in enumerate(("full_sft", "rl", "pretrain")):
        path = save(folder / f"{stage}_64.pth", stage, i)
        os.utime(path, (2e9 + i, 2e9 + i))
    base = load_checkpoint(folder / "full_sft_64.pth")
    adapted = add_adapter(base.model, rank=2, alpha=4.0, dropout=0.0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(folder / "lora_x_64", adapted, base, {"stage": "lora"})
    source = load_checkpoint(folder / "rl_64.pth")
    with atomic_folder(folder / "rl_64-minimind", hidden=False) as target:
        write_minimind(target, source.model, TOKENIZER_DIR, torch.float32, describe(source, "float32"))
    return folder


@pytest.fixture
def open_page(monkeypatch) -> Callable[..., AppTest]:
    """The page as it is after its first run, started with some flags."""

    def start(*flags, chat: str | None = None) -> AppTest:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
        page = AppTest.from_file(str(SCRIPT), default_timeout=300)
        if chat is not None:  # in the page's address
            page.query_params["chat"] = chat
        return page.run()

    return start


def shown(page: AppTest) -> str:
    """Everything on the page that is HTML of ours, as text."""
    assert not page.exception
    return re.sub(r"<style>.*?</style>|<[^>]*>", "", "\n".join(element.value for element in page.html), flags=re.DOTALL)


def error(page: AppTest) -> str:
    assert not page.exception and len(page.error) == 1
    return page.error[0].value.replace("\\", "")


def ask(page: AppTest, question: str) -> AppTest:
    return page.chat_input(key="question").set_value(question).run()


def answer_of(path: Path, *texts: str) -> str:
    """What a model answers, all greedy."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    ids = truncate_chat(TOKENIZER, messages, 84).ids
    model = load_checkpoint(path, dtype=torch.float32).model
    return generate_text(model, TOKENIZER, [ids], SamplingParams(max_new_tokens=12))[0]


def exchanges(page: AppTest) -> list:
    return page.session_state["conversation"].exchanges


# ---- without a browser


def test_a_conversation(out, open_page):
    page = open_page("--out_dir", out, *GREEDY)
    assert page.selectbox(key="model").value == str(out / "rl_64.pth")
    assert EN["hello_chat"] in shown(page) and "loss 1.5" in shown(page) and "context of 96 tokens" in shown(page)
    ask(page, "你好")
    first = answer_of(out / "rl_64.pth", "你好")
    ask(page, "<b>why</b>?")
    second = answer_of(out / "rl_64.pth", "你好", first, "<b>why</b>?")
    assert [exchange.text for exchange in exchanges(page)] == [first, second]
    assert shown(page).count("cut off at the maximum length of 12 tokens · rl_64.pth") == 2
    assert any("&lt;b&gt;why&lt;/b&gt;?" in element.value for element in page.html)

    page.slider(key="history_turns").set_value(0)
    page.button(key="regenerate").click().run()
    assert exchanges(page)[1].text == answer_of(out / "rl_64.pth", "<b>why</b>?") and len(exchanges(page)) == 2
    page.button(key="new_chat").click().run()
    assert exchanges(page) == [] and EN["hello_chat"] in shown(page)


def test_tools(out, open_page, monkeypatch):
    """The model, here a script, calls a tool only while they are switched on; what it calls and thinks is folded."""
    call = answer_ids(reasoning_content="A sum.", tool_calls=[SUM])
    answers = iter([call, answer_ids(content="27"), call])
    monkeypatch.setattr(TextGenerator, "generate", lambda *_: scripted_outputs(next(answers)))
    page = ask(open_page("--out_dir", out, *GREEDY, "--max_seq_len", 1500, "--tools", "calculator"), "sum?")
    assert [message["role"] for message in exchanges(page)[0].called] == ["assistant", "tool"]
    for text in ("Thoughts: A sum.", 'Calls calculator: {"expression": "3 * (4 + 5)"}', "Returned: 27"):
        assert text in html.unescape(shown(page))
    page.toggle(key="tools").set_value(False).run()
    assert exchanges(ask(page, "sum?"))[1].called == []


def test_settings_reach_the_decoder(out, open_page):
    page = open_page("--out_dir", out, *CPU, "--min_p", 0.02, "--seed", 5, "--system", "short", "--max_new_tokens", 500)
    assert page.slider(key="max_new_tokens").value == 95  # all that the context has
    for key, value in dict(temperature=1.25, top_p=0.8, top_k=40, max_new_tokens=6, repetition_penalty=1.3).items():
        page.slider(key=key).set_value(value)
    ask(page, "hi")
    answer = exchanges(page)[0]
    expected = SamplingParams(6, 1.25, 40, 0.8, 0.02, 1.3, seed=5)
    assert answer.sampling == expected
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}]
    ids = truncate_chat(TOKENIZER, messages, 90).ids
    model = load_checkpoint(out / "rl_64.pth", dtype=torch.float32).model
    assert [answer.text] == generate_text(model, TOKENIZER, [ids], expected)
    page.number_input(key="seed").set_value(None)
    page.button(key="regenerate").click().run()
    assert exchanges(page)[0].sampling.seed is None


@pytest.mark.parametrize("name", ["full_sft_64.pth", "lora_x_64", "rl_64-minimind"])
def test_every_kind_of_model_answers(out, open_page, name):
    page = open_page("--out_dir", out, *GREEDY)
    plain = answer_of(out / "full_sft_64.pth", "hi"), answer_of(out / "rl_64.pth", "hi")
    page.selectbox(key="model").set_value(str(out / name)).run()
    ask(page, "hi")
    text = exchanges(page)[0].text
    if name == "lora_x_64":
        assert text not in plain and "on full_sft_64.pth" in shown(page)
    else:
        assert text == plain[name.startswith("rl")]
    assert page.selectbox(key="model").options[0].startswith(("rl_64-minimind", "lora_x", "pretrain"))


def test_a_base_model_goes_on_with_a_text(out, open_page):
    page = open_page("--out_dir", out, *GREEDY, "--weights", out / "pretrain_64.pth")
    assert EN["hello_base"] in shown(page) and page.chat_input(key="question").placeholder == EN["continue"]
    assert [slider for slider in page.slider if slider.key == "history_turns"] == []
    page.button(key="example_1").click().run()
    (exchange,) = exchanges(page)
    assert exchange.continues and f"中国的首都是{exchange.text.split()[0]}" in shown(page)


def test_languages(out, open_page):
    page = open_page("--out_dir", out, *CPU[:-1], "zh")
    assert page.selectbox(key="model").label == "模型" and TEXTS["zh"]["hello_chat"] in shown(page)
    page.segmented_control(key="language").set_value("ja").run()
    assert page.slider(key="temperature").label == "温度" and TEXTS["ja"]["hello_chat"] in shown(page)


def test_what_does_not_fit_is_said(out, open_page):
    page = open_page("--out_dir", out, *GREEDY)
    ask(page, "word " * 60)
    ask(page, "word " * 40)
    assert "1 of 1 earlier turns were left out: the context holds 96 tokens." in shown(page)
    ask(page, "word " * 300)
    assert "Not answered: the last question has" in error(page) and "84 is the limit" in error(page)
    ask(page, "hi")
    assert exchanges(page)[-1].tokens


def test_no_models_yet_and_then_one(tmp_path, open_page):
    page = open_page("--out_dir", tmp_path / "none", *GREEDY)
    (warning,) = page.warning
    assert f"no models in {tmp_path / 'none'}" in warning.value.replace("\\", "")
    assert "bash quickstart.sh" in page.code[0].value
    save(tmp_path / "none" / "full_sft_64.pth", "full_sft", 3)
    page.run()
    assert not page.warning and page.selectbox(key="model").value == str(tmp_path / "none" / "full_sft_64.pth")


def test_damaged_and_foreign_models_are_one_line(out, tmp_path, open_page):
    whole = (out / "rl_64.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("not a model")
    torch.save({"a": torch.zeros(3)}, tmp_path / "![x](http_).pth")
    shutil.copytree(out / "lora_x_64", tmp_path / "lora_x_64")
    shutil.copytree(out / "rl_64-minimind", tmp_path / "export")
    (tmp_path / "export" / "model.safetensors").write_bytes(b"\x00" * 100)
    good = save(tmp_path / "rl_64.pth", "rl", 1)
    page = open_page("--out_dir", tmp_path, *GREEDY)
    reasons = {
        "cut.pth": "damaged or cut off",
        "text.pth": "not a state dict of tensors",
        "![x](http_).pth": "is not a MiniMind",
        "lora_x_64": "does not exist; put full_sft_64.pth there",
        "export": "is damaged or cut off",
    }
    for name, reason in reasons.items():
        page.selectbox(key="model").set_value(str(tmp_path / name)).run()
        assert f"{name} cannot be loaded: " in error(page) and reason in error(page) and "\n" not in error(page)
        assert page.chat_input(key="question").disabled
    page.selectbox(key="model").set_value(str(good)).run()
    ask(page, "hi")
    assert not page.error and exchanges(page)[0].tokens


def test_a_model_that_was_trained_again_is_read_again(tmp_path, open_page):
    path = save(tmp_path / "full_sft_64.pth", "full_sft", 1)
    page = open_page("--out_dir", tmp_path, *GREEDY)
    ask(page, "hi")
    before = exchanges(page)[0].text
    save(path, "full_sft", 2)
    page.run()
    page.button(key="regenerate").click().run()
    assert exchanges(page)[0].text == answer_of(path, "hi") != before


def test_two_sessions_share_a_model_and_nothing_else(out, open_page):
    pages = [open_page("--out_dir", out, *GREEDY) for _ in range(2)]
    ask(pages[0], "one")
    ask(pages[1], "two")
    for page, question in zip(pages, ("one", "two"), strict=True):
        (exchange,) = exchanges(page)
        assert (exchange.question, exchange.text) == (question, answer_of(out / "rl_64.pth", question))


def test_an_answer_goes_on_where_it_was_left(out, tmp_path, open_page):
    """A rerun in the middle of an answer, which every click is, neither ends nor repeats it; Stop ends it."""
    save(tmp_path / "full_sft_64.pth", "full_sft", 4, endless=True)
    page = open_page("--out_dir", tmp_path, *CPU, "--temperature", 0, "--max_seq_len", 10**4, "--max_new_tokens", 200)
    ask(page, "hi")
    whole = exchanges(page)[0]
    assert whole.tokens == 200
    conversation = page.session_state["conversation"]
    settings = dict(sampling=whole.sampling, history_turns=0)
    model = ChatModel(
        TextGenerator(load_checkpoint(tmp_path / "full_sft_64.pth", dtype=torch.float32), TOKENIZER, 10**4)
    )
    half = conversation.regenerate(model, **settings)
    for _ in range(50):
        half.advance()
    page.run()
    assert (half.finish, half.tokens, half.text) == ("length", 200, whole.text)
    half = conversation.regenerate(model, **settings)
    for _ in range(50):
        half.advance()
    conversation.stop()
    page.run()
    assert half.tokens == 50 and whole.text.startswith(half.text)
    assert "stopped" in shown(page)


def test_chats_survive_a_reload(out, tmp_path, open_page):
    flags = ["--out_dir", tmp_path, "--weights", out / "rl_64.pth", *GREEDY]
    page = open_page(*flags, "--system", "short")
    assert not (tmp_path / "chats").exists() and "chat" not in page.query_params
    ask(page, "你好")
    ask(page, "and?")
    id, said = page.session_state["conversation"].id, exchanges(page)
    assert page.query_params["chat"] in (id, [id]) and page.selectbox(key="chat").value == id

    again = open_page(*flags, chat=id)
    assert exchanges(again) == said and again.text_area(key="system").value == "short"
    ask(again, "more")
    whole = open_page(*flags, "--system", "short")
    for question in ("你好", "and?", "more"):
        ask(whole, question)
    assert exchanges(again)[2].text == exchanges(whole)[2].text and exchanges(again)[2].turns_seen == 2

    # What another tab adds is seen at the next click.
    page.slider(key="top_k").set_value(3).run()
    assert exchanges(page) == exchanges(again) and exchanges(page) is not exchanges(again)

    # Renamed, opened from the list, exported, deleted.
    ask(page, "from another tab")
    again.text_input(key=f"title_{id}").set_value("../<b>My chat").run()
    page = open_page(*flags, chat="../../rl_64")
    assert exchanges(page) == [] and page.selectbox(key="chat").options[0] == "../<b>My chat"
    page.selectbox(key="chat").set_value(id).run()
    assert [exchange.question for exchange in exchanges(page)] == ["你好", "and?", "more", "from another tab"]
    page.selectbox(key="chat").set_value(None).run()  # as the Esc key in the list does
    assert page.selectbox(key="chat").value == id and len(exchanges(page)) == 4
    assert [button.label for button in page.get("download_button")] == [EN["export_md"], EN["export_jsonl"]]
    assert sorted(path.suffix for path in (tmp_path / "chats").iterdir()) == [".json", ".json"]
    page.button(key="delete_chat").click().run()
    assert exchanges(page) == [] and "chat" not in page.query_params
    assert [path.stem for path in (tmp_path / "chats").iterdir()] == [whole.session_state["conversation"].id]


def test_a_chat_comes_back_with_its_model(out, open_page):
    page = ask(open_page("--out_dir", out, *GREEDY, "--weights", out / "pretrain_64.pth"), "once")
    page = open_page("--out_dir", out, *GREEDY, chat=page.session_state["conversation"].id)
    assert page.selectbox(key="model").value == str(out / "pretrain_64.pth") and exchanges(page)[0].continues
    page.selectbox(key="model").set_value(str(out / "rl_64.pth")).run()
    assert exchanges(ask(page, "twice"))[1].model_name == "rl_64.pth"


def test_damaged_chats_are_named_and_what_cannot_be_saved_too(out, tmp_path, open_page):
    flags = ["--out_dir", tmp_path, "--weights", out / "rl_64.pth", *GREEDY]
    page = ask(open_page(*flags), "hi")
    id = page.session_state["conversation"].id
    (tmp_path / "chats" / "x.json").write_text("{")
    page = open_page(*flags, chat="x")
    assert "x.json is not a saved chat, or is damaged" in page.warning[0].value.replace("\\", "")
    assert exchanges(page) == [] and page.selectbox(key="chat").options == ["hi"]
    (tmp_path / "chats" / f"{id}.json").unlink()
    page.selectbox(key="chat").set_value(id).run()
    assert f"{id}.json cannot be read (No such file or directory)" in error(page)
    shutil.rmtree(tmp_path / "chats")
    (tmp_path / "chats").write_text("a file")
    ask(page, "hi")
    assert "A problem with the saved chats" in error(page) and exchanges(page)[0].text


def test_an_edited_question_begins_a_chat_of_its_own(out, tmp_path, open_page):
    page = open_page("--out_dir", tmp_path, "--weights", out / "rl_64.pth", *GREEDY)
    for question in ("one", "two", "three"):
        ask(page, question)
    id, said = page.session_state["conversation"].id, exchanges(page)
    page.text_area(key=f"question_{id}_1").set_value("zwei")
    page.button(key=f"send_{id}_1").click().run()
    assert [exchange.question for exchange in exchanges(page)] == ["one", "zwei"]
    assert exchanges(page)[1].text == answer_of(out / "rl_64.pth", "one", said[0].text, "zwei")
    page.selectbox(key="chat").set_value(id).run()
    assert exchanges(page) == said


def test_settings_outlast_a_model_that_has_less_room_or_cannot_be_loaded(out, tmp_path, open_page):
    for name in ("rl_64", "pretrain_64"):
        shutil.copy(out / f"{name}.pth", tmp_path)
        shutil.copy(out / f"{name}.json", tmp_path)
    torch.manual_seed(1)
    config = preset("toy", dim=64, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=24)
    save_checkpoint(tmp_path / "full_sft_64.pth", Transformer(config), info={"stage": "full_sft"})
    (tmp_path / "broken.pth").write_text("not a model")
    page = open_page("--out_dir", tmp_path, *CPU, "--weights", tmp_path / "rl_64.pth")
    page.slider(key="max_new_tokens").set_value(80)
    page.slider(key="history_turns").set_value(9)
    page.slider(key="top_k").set_value(7)
    page.text_area(key="system").set_value("be kind").run()
    for name, length in (("full_sft_64.pth", 23), ("pretrain_64.pth", 80), ("broken.pth", None), ("rl_64.pth", 80)):
        page.selectbox(key="model").set_value(str(tmp_path / name)).run()
        if length is not None:
            assert page.slider(key="max_new_tokens").value == length and page.slider(key="top_k").value == 7
    assert page.slider(key="history_turns").value == 9 and page.text_area(key="system").value == "be kind"


def test_wrong_flags_are_one_line_in_the_page(out, open_page):
    assert "--top_p 3.0 must be above 0" in error(open_page("--out_dir", out, "--top_p", 3))
    assert "unrecognized arguments: --nonsense" in error(open_page("--nonsense"))
    assert "none.pth does not exist" in error(open_page("--weights", out / "none.pth"))
    assert "--device cuda:99" in error(open_page("--out_dir", out, "--device", "cuda:99"))
    assert "--history_turns N" in open_page("--help").code[0].value


def test_questions_about_pictures(tmp_path, open_page):
    model = save_sft_vlm(tmp_path)
    page = open_page("--out_dir", tmp_path, *GREEDY)
    assert f"sft_vlm_32.pth · {EN['stage_sft_vlm']}" in page.selectbox(key="model").options
    page.chat_input(key="question").upload("a.png", png(0), "image/png").upload("b.png", png(1), "image/png")
    ask(page, "What is this?")
    (exchange,) = exchanges(page)
    image_ids = model.config.vision.image_ids
    ids = truncate_chat(
        TOKENIZER, [{"role": "user", "content": with_images("What is this?", 2)}], 84, image_ids=image_ids
    ).ids
    seen = ImageProcessor(model, None)([open_image(png(i)) for i in range(2)])
    assert [exchange.text] == generate_text(model, TOKENIZER, [ids], SamplingParams(max_new_tokens=12), images=[seen])
    assert exchange.images == [data_url(png(i)) for i in range(2)] == page.get("image")[0].value
    page.chat_input(key="question").upload("c.png", png(2)[:-200], "image/png")
    assert "c.png cannot be used: a damaged image" in error(ask(page, "And this?")) and len(exchanges(page)) == 1
    page.chat_input(key="question").upload("d.png", png(3), "image/png").run()  # without words
    assert exchanges(page)[1].question == EN["about_image"] and not page.error
    again = open_page("--out_dir", tmp_path, *GREEDY, chat=page.session_state["conversation"].id)
    assert exchanges(again) == exchanges(page)


def test_started_like_any_other_script(monkeypatch, capsys):
    def run(*flags) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return end.value.code

    assert run("--history_turns", -1) == 2
    assert capsys.readouterr().err == "error: --history_turns -1 must be at least 0\n"
    assert run("--help") == 0
    assert "--history_turns" in capsys.readouterr().out
    started = []
    monkeypatch.setattr("streamlit.web.cli.main", lambda: sys.exit(started.append(list(sys.argv))))
    assert run("--top_p", 0.5) == 0
    assert started == [["streamlit", "run", str(SCRIPT), "--", "--top_p", "0.5"]]


# ---- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="no chromium or no chromedriver: on Debian and Ubuntu, apt-get install chromium chromium-driver",
)


def until(ask: Callable[[], object], what: str, seconds: float = 120) -> object:
    """The first true answer; looks again and again, for so long at most."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(WebDriverException, IndexError):  # Streamlit replaced an element just now
            if found := ask():
                return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


@contextlib.contextmanager
def server(out: Path, log: Path, *flags) -> Iterator[str]:
    """The page on a free port, as a user starts it; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", SCRIPT, "--server.port", port, "--server.headless", "true"]
    command += ["--", "--out_dir", out, "--device", "cpu", "--dtype", "float32", *flags]
    with log.open("w") as file:
        process = subprocess.Popen([str(part) for part in command], stdout=file, stderr=file, cwd=out)
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{address}/_stcore/health", timeout=5).status == 200
        return False

    try:
        until(answers, "the server's start")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Browser:
    """A real Chromium with the page in it."""

    def __init__(self, profile: Path, language: str) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        quiet = (
            "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
        )
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", *quiet.split()):
            options.add_argument(flag)
        for flag in (f"--user-data-dir={profile}", f"--lang={language}", "--window-size=1280,900"):
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"intl.accept_languages": language})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))

    def find(self, css: str) -> list:
        return self.driver.find_elements("css selector", css)

    def click(self, css: str, text: str = "") -> None:
        def clicked() -> bool:
            next(iter([e for e in self.find(css) if text in e.text and e.is_displayed()]), None).click()
            return True

        until(lambda: any(text in e.text for e in self.find(css)) and clicked(), f"a click on {css} {text}")

    def sees(self, css: str, text: str) -> None:
        until(lambda: any(text in e.text for e in self.find(css)), f"{text!r} in {css}")

    def has_messages(self, count: int) -> None:
        """What a run of the page does not draw again goes only at its end: later than what it draws can be seen."""
        until(lambda: len(self.find("[data-testid=stChatMessage]")) == count, f"{count} messages in the conversation")

    def ask(self, question: str) -> None:
        from selenium.webdriver.common.keys import Keys

        box = "[data-testid=stChatInput] textarea"
        until(lambda: self.find(box)[0].is_enabled(), "an input that takes a question")
        until(lambda: self.find(box)[0].send_keys(question) or True, "typing")
        until(lambda: self.find(box)[0].send_keys(Keys.ENTER) or True, "sending")

    def answer(self) -> str:
        """The text of the last answer as it stands."""
        script = "const all = document.querySelectorAll('.mm-text'); return all[all.length - 1].textContent"
        return self.driver.execute_script(script)

    def waits_for_more(self, than: str) -> str:
        """The last answer once it is longer."""
        return until(lambda: len(self.answer()) > len(than) and self.answer(), "an answer that grows")

    def stop(self, text: str) -> None:
        """Click on Stop; once more if that was lost, because Streamlit replaced the button under the pointer.

        Not at once: every click starts the page anew, and clicks without a pause would keep it from getting anywhere.
        """
        from selenium.common.exceptions import WebDriverException

        for _ in range(6):
            for button in self.find(".st-key-stop button"):
                with contextlib.suppress(WebDriverException):
                    assert text in button.text
                    button.click()
            with contextlib.suppress(AssertionError):
                return until(lambda: not self.find(".mm-cursor"), "the end of an answer that was stopped", seconds=15)
        raise AssertionError("Stop was clicked six times, and the answer goes on")

    def press(self, key: str) -> None:
        """Press a key where the cursor is."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        ActionChains(self.driver).send_keys(getattr(Keys, key)).perform()

    def has_cursor(self) -> None:
        script = "return document.activeElement.closest('[data-testid=stChatInput]') !== null"
        until(lambda: self.driver.execute_script(script), "the cursor in the field for the question")

    def hears(self, text: str) -> None:
        """A screen reader is told a text."""
        script = """
            const all = (root) => [...root.querySelectorAll("*")].flatMap((e) => e.shadowRoot ? all(e.shadowRoot) : [e]);
            return all(document).some((e) => e.getAttribute("role") === "status" && e.textContent === arguments[0]);
        """
        until(lambda: self.driver.execute_script(script, text), f"{text!r} for screen readers")

    def idle(self) -> None:
        until(lambda: self.find(".st-key-regenerate button") and not self.find(".mm-cursor"), "the end of the answer")


@needs_browser
def test_in_a_browser(tmp_path):
    folder = tmp_path / "out"
    save(folder / "full_sft_64.pth", "full_sft", 1, endless=True)
    save(folder / "pretrain_64.pth", "pretrain", 2, endless=True)
    # Slow enough to be stopped: the compiled step writes all of it in seconds.
    flags = ["--max_seq_len", 20000, "--max_new_tokens", 19000, "--temperature", 1, "--compile", "off"]
    with server(folder, tmp_path / "log", *flags) as address:
        browser = Browser(tmp_path / "profile", "zh-CN")
        try:
            browser.driver.get(address)
            drive(browser, folder, address)
            look_inside(browser, folder)
            check_that_nothing_left_the_machine(browser)
        finally:
            browser.driver.quit()
    assert "Traceback" not in (tmp_path / "log").read_text(encoding="utf-8")


def drive(browser: Browser, folder: Path, address: str) -> None:
    zh, en, ja = (TEXTS[language] for language in ("zh", "en", "ja"))
    browser.sees(".mm-empty", zh["hello_chat"])  # the browser's language
    browser.has_cursor()
    assert [e.text for e in browser.find("h1")] == ["MiniMind" + zh["subtitle"]]
    assert browser.find("html")[0].get_attribute("lang") == "zh"

    # It streams, and Stop stops it.
    attack = "<script>window.acted = 1</script><img src=x onerror='window.acted = 1'>**hi**"
    browser.ask(attack)
    first = browser.waits_for_more("")
    longer = browser.waits_for_more(first)
    assert longer.startswith(first[:20])
    assert not browser.find(".st-key-regenerate")
    browser.hears(zh["writing"])
    browser.stop(zh["stop"])
    browser.idle()
    browser.sees(".mm-facts", zh["stopped"])
    browser.has_cursor()
    stopped = browser.answer()
    browser.hears(stopped)
    assert stopped.startswith(longer[:20]) and len(stopped) >= len(longer)

    # What was typed is shown and does nothing.
    until(lambda: attack in [e.text for e in browser.find(".mm-text")], "the question as it was typed")
    assert browser.driver.execute_script("return window.acted") is None and not browser.find(".mm-text img")

    # Another answer instead; a change of language while it is written does not disturb it.
    browser.click(".st-key-regenerate button", zh["regenerate"])
    until(lambda: browser.find(".mm-cursor") and browser.answer() != stopped, "another answer")
    begun = browser.waits_for_more("")
    browser.click(".st-key-language button", "日本語")
    browser.sees(".st-key-stop button", ja["stop"])
    grown = browser.waits_for_more(begun)
    assert grown.startswith(begun[:20]) and not browser.find(".st-key-regenerate")
    browser.press("ESCAPE")  # also stops
    browser.idle()
    browser.sees(".mm-facts", ja["stopped"])
    assert browser.answer() != stopped
    browser.has_messages(2)

    # Copy.
    browser.driver.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"origin": address, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    click = """
        const all = (root) => [...root.querySelectorAll("*")].flatMap((e) => e.shadowRoot ? all(e.shadowRoot) : [e]);
        const button = all(document).find((e) => e.tagName === "BUTTON" && e.textContent === arguments[0]);
        if (button) button.click();
        return Boolean(button);
    """
    until(lambda: browser.driver.execute_script(click, ja["copy"]), "a copy button")
    paste = "const done = arguments[0]; navigator.clipboard.readText().then(done, (error) => done(String(error)))"
    copied = until(lambda: browser.driver.execute_async_script(paste), "something in the clipboard")
    assert copied == browser.answer()

    # A base model goes on with a text.
    browser.click(".st-key-language button", "English")
    browser.sees(".st-key-new_chat button", en["new_chat"])
    browser.click(".st-key-model [data-baseweb=select], .st-key-model input")
    browser.click("[role=option]", "pretrain_64.pth")
    hint = "[data-testid=stChatInput] textarea"
    until(lambda: browser.find(hint)[0].get_attribute("placeholder") == en["continue"], "the hint of a base model")
    browser.ask("Once upon a time")
    until(lambda: browser.answer().startswith("Once upon a time"), "the text that goes on")
    browser.waits_for_more("Once upon a time")

    # A question that comes while it is still writing stops that, and is answered.
    browser.ask("Twice upon a time")
    until(lambda: browser.answer().startswith("Twice upon a time"), "the text that goes on")
    browser.waits_for_more("Twice upon a time")
    browser.sees(".mm-facts", en["stopped"])
    browser.stop(en["stop"])
    browser.idle()
    browser.has_messages(4)

    # The conversation survives a reload; so does an answer that is being written, up to there.
    browser.driver.refresh()
    browser.has_messages(4)
    browser.has_cursor()
    browser.click(".st-key-language button", "English")
    before = browser.answer()
    browser.click(".st-key-regenerate button", en["regenerate"])
    until(lambda: browser.find(".mm-cursor") and browser.answer() != before, "another answer")
    half = browser.waits_for_more("Twice upon a time")
    assert half.startswith("Twice upon a time")  # by the model that was chosen before
    browser.driver.refresh()
    browser.sees(".mm-facts", zh["interrupted"])
    assert browser.answer().startswith(half)
    browser.click(".st-key-language button", "English")
    browser.sees(".st-key-new_chat button", en["new_chat"])

    # An edited question begins another chat; the old one is in the list.
    before = browser.driver.current_url
    browser.click("[class*=st-key-actions_2] button", en["edit"])
    browser.click("[class*=st-key-send_] button", en["send"])
    until(lambda: browser.driver.current_url != before, "the address of another chat")
    browser.waits_for_more("Twice upon a time")
    browser.stop(en["stop"])
    browser.idle()
    browser.has_messages(4)
    saved = [json.loads(path.read_text(encoding="utf-8")) for path in (folder / "chats").iterdir()]
    questions = [[exchange["question"] for exchange in chat["exchanges"]] for chat in saved]
    assert questions == [[attack, "Once upon a time", "Twice upon a time"]] * 2

    # Exports.
    downloads = folder.parent / "downloads"
    browser.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(downloads)})
    browser.click("[data-testid=stPopover] button", en["this_chat"])
    for kind in ("md", "jsonl"):
        browser.click(f".st-key-export_{kind} button", en[f"export_{kind}"])
        until(lambda kind=kind: list(downloads.glob(f"*.{kind}")), f"the download of {kind}")
    (line,) = next(downloads.glob("*.jsonl")).read_text(encoding="utf-8").splitlines()
    assert [message["role"] for message in json.loads(line)["messages"]] == ["user", "assistant"]
    assert attack in next(downloads.glob("*.md")).read_text(encoding="utf-8")
    browser.press("ESCAPE")

    # Markdown, if the user wants it.
    assert not browser.find(".mm-markdown")
    browser.click(".st-key-markdown label")
    until(lambda: browser.find(".mm-markdown"), "rendered Markdown")

    # Another tab is another conversation.
    own = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    browser.driver.get(address)
    browser.sees(".mm-empty", zh["hello_chat"])
    browser.driver.close()
    browser.driver.switch_to.window(own)

    # A model that training saves appears by itself.
    save(folder / "rl_64.pth", "rl", 3)

    def offered() -> bool:
        browser.click(".st-key-model [data-baseweb=select], .st-key-model input")
        return any("rl_64.pth" in e.text for e in browser.find("[role=option]"))

    until(offered, "a new model in the list")

    def new_chat() -> bool:
        browser.press("ESCAPE")  # closes the list, which covers the button
        browser.find(".st-key-new_chat button")[0].click()
        return True

    until(new_chat, "a click on New chat")
    browser.sees(".mm-empty", en["hello_base"])
    browser.has_messages(0)

    # A picture with a question.
    save_sft_vlm(folder)

    def chosen() -> bool:
        browser.click(".st-key-model [data-baseweb=select], .st-key-model input")
        options = [option for option in browser.find("[role=option]") if "sft_vlm_32.pth" in option.text]
        for option in options:
            option.click()
        return bool(options)

    until(chosen, "the model that sees in the list")
    (folder.parent / "dot.png").write_bytes(png(0))
    until(lambda: browser.find("input[type=file]"), "the button for pictures")
    browser.find("input[type=file]")[0].send_keys(str(folder.parent / "dot.png"))
    browser.sees("[data-testid=stChatInput]", "dot.png")
    sending = "[data-testid=stChatInputSubmitButton]"  # works once the picture has arrived
    until(lambda: browser.find(sending)[0].is_enabled(), "the picture at the server")
    browser.ask("What is this?")
    until(lambda: browser.find("[data-testid=stChatMessage] img"), "the picture in the conversation")
    browser.waits_for_more("")


def look_inside(browser: Browser, folder: Path) -> None:
    """The pages beside the chat, as far as they need a browser: the menu, a click into a chart, curves that grow."""
    en = TEXTS["en"]

    def visit(name: str) -> None:
        browser.click("[data-testid=stTopNavSection]", en["inside"])
        browser.click("[data-testid=stTopNavDropdownLink]", en[f"{name}_page"])
        browser.sees("h1", en[f"{name}_page"])  # in the language of the chat

    visit("next_token")

    def appended() -> int:
        """Click on a bar, which does nothing if Streamlit replaces the chart just now; how many tokens that has made."""
        browser.find("[aria-roledescription=bar]")[0].click()
        time.sleep(0.5)
        found = re.search(r"Tokens appended: (\d+)", " ".join(e.text for e in browser.find(".mm-facts")))
        return int(found[1]) if found else 0

    until(lambda: appended() >= 2, "two clicks on bars")

    visit("runs")
    browser.sees("[data-testid=stAlert]", str(folder))
    for name in ("pretrain_64", "rl_64"):
        lines = ({"step": step, "loss": 5 / step} for step in (1, 2, 3))
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.metrics.jsonl").write_text(text, encoding="utf-8")
        browser.sees("svg text", name)

    visit("logit_lens")
    browser.sees(".mm-lens th", en["embedding"])
    browser.driver.set_window_size(500, 900)  # the narrowest that Chromium has
    until(lambda: browser.driver.execute_script("return innerWidth") <= 500, "a narrow window")
    assert not browser.driver.execute_script("return document.documentElement.scrollWidth > innerWidth")


def check_that_nothing_left_the_machine(browser: Browser) -> None:
    severe = [entry["message"] for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []
    events = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert (
        asked and [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:", "chrome:"))] == []
    )
