"""Drive Open WebUI in a real browser, with my_openai_api.py behind it, and print which of its features work.

    python -m venv /tmp/openwebui                       # 2.4 GB, and more where pip installs PyTorch with CUDA
    /tmp/openwebui/bin/pip install torch==2.13.0 open-webui
    python bench/open_webui.py --command /tmp/openwebui/bin/open-webui --screenshot docs/images/open_webui.png

Open WebUI has its default settings, without accounts. The model is a tiny one whose answers are given, because one with
random weights would write no titles; everything around the model is the server as it is. Chromium and chromedriver are
needed, and the packages of requirements-dev.txt.

yes       it works
FAILED    anything else; the exit code is 1 then
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))  # for serving_helpers

from common.cli import Parser  # noqa: E402
from common.errors import UserError, run_script  # noqa: E402

QUESTION = "What does a fox eat?"
ANSWER = "A fox eats mice, birds, eggs, insects and berries."
STORY = "There was once a fox who wanted to see the sea. " * 30
WRITTEN = {"title": "What Foxes Eat", "tags": ["Animals"], "follow_ups": ["Where do foxes live?", "Do foxes eat fish?"]}
WAIT = 120  # seconds for anything to happen


def generator_class() -> type:
    """Return a generator whose model writes what Open WebUI asks for, at 50 tokens a second."""
    from serving_helpers import TOKENIZER, GivenAnswers

    from model.tokenizer import EOS_ID

    def text_after(prompt: str) -> str:
        for name, value in WRITTEN.items():
            if f'{{ "{name}":' in prompt:
                return json.dumps({name: value})
        return STORY if "story" in prompt.rpartition("user\n")[2] else ANSWER

    class Written(GivenAnswers):
        def answer_to(self, row) -> list[int]:
            prompt = TOKENIZER.decode(row.tokens[: len(row.tokens) - row.num_generated])
            return [*TOKENIZER.encode(text_after(prompt), add_special_tokens=False), EOS_ID]

        def _sample(self, logits, first):
            time.sleep(0.02)
            return super()._sample(logits, first)

    return Written


@contextlib.contextmanager
def open_webui(command: str, base_url: str, port: int, folder: Path) -> Iterator[str]:
    """Yield the address of an Open WebUI that knows one server, and keeps everything in `folder`."""
    settings = {"OPENAI_API_BASE_URL": base_url, "OPENAI_API_KEY": "none", "ENABLE_OLLAMA_API": "False"}
    settings |= {"WEBUI_AUTH": "False", "DATA_DIR": str(folder), "HOME": str(folder)}
    settings |= {"OFFLINE_MODE": "True", "HF_HUB_OFFLINE": "1", "RAG_EMBEDDING_ENGINE": "openai"}  # no downloads
    log, address = folder / "log.txt", f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen(
            [command, "serve", "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, **settings}, cwd=folder, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        while True:
            if process.poll() is not None:
                raise UserError(f"Open WebUI did not start:\n{log.read_text(encoding='utf-8')[-2000:]}")
            with contextlib.suppress(OSError), urlopen(f"{address}/health", timeout=5):
                break
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait()


class Page:
    """Open WebUI in Chromium, asked with JavaScript: it often replaces its elements, and they become stale."""

    def __init__(self, address: str, profile: Path) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        flags = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --lang=en --window-size=1280,900"
        for flag in (*flags.split(), f"--user-data-dir={profile}"):
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        self.driver.get(address)
        self.click("button", "Okay, Let's Go")  # what is new
        self.until('return !document.body.innerText.includes("Okay, Let\'s Go")', "the end of the greeting")

    def until(self, script: str, what: str) -> object:
        """Return the first true result of a script."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            if found := self.driver.execute_script(script):
                return found
            time.sleep(0.2)
        raise AssertionError(f"not within {WAIT} s: {what}; the page says {self.text()[-500:]!r}")

    def text(self) -> str:
        return self.driver.execute_script("return document.body.innerText")

    def has(self, text: str) -> None:
        self.until(f"return document.body.innerText.includes({json.dumps(text)})", text)

    def click(self, css: str, text: str = "") -> None:
        """Click on the last visible element of a kind that has a text."""
        found = f"[...document.querySelectorAll({json.dumps(css)})].filter(e => e.offsetParent !== null)"
        found += f".filter(e => e.innerText.includes({json.dumps(text)})).at(-1)"
        self.until(f"const e = {found}; if (e) e.click(); return !!e", f"{css} {text}")

    def ask(self, question: str) -> None:
        """Send a question."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        self.driver.execute_script("document.querySelector('#chat-input').focus()")
        ActionChains(self.driver).send_keys(question).perform()
        self.has(question)
        ActionChains(self.driver).send_keys(Keys.ENTER).perform()

    def answers(self, text: str) -> None:
        """Wait until the last answer has a text."""
        last = "return ([...document.querySelectorAll('.chat-assistant')].at(-1)?.innerText ?? '')"
        self.until(f"{last}.includes({json.dumps(text)})", f"the answer {text}")


def features(page: Page, metric: Callable[[str], float]) -> dict[str, Callable[[], None]]:
    """Return what is tried, in this order; each raises AssertionError if it does not work.

    metric: returns a number that the server reports.
    """

    def chat() -> None:
        page.ask(QUESTION)
        page.answers(ANSWER)

    def tags() -> None:
        asked = "fetch('/api/v1/chats/' + location.pathname.split('/').at(-1) + '/tags', "
        asked += "{headers: {Authorization: 'Bearer ' + localStorage.token}}).then(answer => answer.text())"
        page.until(f"return {asked}.then(text => text.includes({json.dumps(WRITTEN['tags'][0])}))", "the tags")

    def regenerate() -> None:
        page.click("button[aria-label=Regenerate]")
        page.click("button, [role=menuitem]", "Try Again")
        page.has("2/2")
        page.answers(ANSWER)

    def follow_up() -> None:
        page.click("button", WRITTEN["follow_ups"][0])
        page.until("return document.querySelectorAll('.chat-assistant').length === 2", "an answer to the follow-up")
        page.answers(ANSWER)

    def stop() -> None:
        page.ask("Tell me a story.")
        page.answers("There was once")
        page.click("button[aria-label=Stop]")
        page.until("return !document.querySelector('button[aria-label=Stop]')", "the end of the answer")
        assert metric("minimind_rows_running") == 0, "the server goes on with the answer"

    return {
        "chat, streamed": chat,
        "title of the chat": lambda: page.has(WRITTEN["title"]),
        "tags": tags,
        "follow-up questions": lambda: page.has(WRITTEN["follow_ups"][1]),
        "regenerate": regenerate,
        "chat of several turns": follow_up,
        "stop": stop,
    }


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--command", default="open-webui", help="Open WebUI's command (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8124, help="a free port for it (default: %(default)s)")
    parser.add_argument("--screenshot", type=Path, help="file for a picture of the page, a .png")
    args = parser.parse_args()
    missing = [name for name in (args.command, "chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not found: the beginning of this file says what is needed")

    from serving_helpers import serving

    outcomes, failures = {}, []
    with tempfile.TemporaryDirectory() as name, serving(generator=generator_class()) as server:
        folder = Path(name)
        with open_webui(args.command, server.url, args.port, folder) as address:
            page = Page(address, folder / "profile")
            try:
                for feature, try_it in features(page, server.metric).items():
                    if feature == "stop" and args.screenshot:
                        page.driver.save_screenshot(str(args.screenshot))
                    try:
                        try_it()
                        outcomes[feature] = "yes"
                    except AssertionError as error:
                        outcomes[feature] = "FAILED"
                        failures.append(f"- {feature}: {error}")
                version = page.driver.execute_script("return fetch('/api/version').then(answer => answer.json())")
            finally:
                page.driver.quit()
    print(f"| client | {' | '.join(outcomes)} |\n|---|{'---|' * len(outcomes)}")
    print(f"| Open WebUI {version['version']} | {' | '.join(outcomes.values())} |", *failures, sep="\n")
    return int(bool(failures))


if __name__ == "__main__":
    run_script(main)
